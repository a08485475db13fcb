"""Errors that a user can correct: what was given, what was expected, what to change."""


class UserError(ValueError):
    """A wrong input. The command line prints its text as one line and exits with code 2, without a traceback."""


EXIT_RANK_LOST = 69  # "service unavailable" of sysexits.h: `tessella resume` continues, torchrun may restart all ranks


class RankLost(Exception):
    """Another rank died, hangs or failed; the text names it."""
