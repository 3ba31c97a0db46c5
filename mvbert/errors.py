"""The one exception for wrong input."""


class InputError(ValueError):
    """Input that a user can mend: the message names it, what was expected and what to do.

    The command line prints the message as one sentence and exits with code 2.
    """


class Interrupted(Exception):
    """A run was asked to stop, has saved a checkpoint, and can be resumed by the same command."""
