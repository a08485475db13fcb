"""The one kind of error that is the user's to mend: what was given, what was expected, what to change."""


class UserError(ValueError):
    """A wrong input. The command line prints its text as one line and exits with code 2, without a traceback."""


EXIT_RANK_LOST = 69  # "service unavailable" of sysexits.h: `tessella resume` goes on, torchrun may start all ranks anew


class RankLost(Exception):
    """Another rank has died, hangs, or has failed; the text names it."""
