"""The one kind of error that is the user's to mend: what was given, what was expected, what to change."""


class UserError(ValueError):
    """A wrong input. The command line prints its text as one line and exits with code 2, without a traceback."""
