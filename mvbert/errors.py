"""What a command ends with, other than being done."""


class InputError(ValueError):
    """Input that a user can mend: the message names it, what was expected and what to do.

    The command line prints the message as one sentence and exits with code 2.
    """


class MissingExtra(InputError, ImportError):
    """A package that an optional part needs is not installed; the message has the command."""

    def __init__(self, purpose: str, package: str, extra: str) -> None:
        super().__init__(f"{purpose} needs {package}; run: pip install 'mvbert[{extra}]'")


class FailedElsewhere(InputError):
    """Another process of this run met wrong input and has told the user."""


class OutOfTime(Exception):
    """The hours of a command are used up; the run was saved and the same command goes on."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Interrupted(Exception):
    """A run was asked to stop, has saved a checkpoint, and can be resumed by the same command."""
