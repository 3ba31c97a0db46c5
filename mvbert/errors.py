"""Exceptions that end a command."""


class InputError(ValueError):
    """Bad input: the message says where it is, what was expected and how to fix it.

    The command line prints the message and exits with code 2.
    """


class MissingExtra(InputError, ImportError):
    """An optional package is not installed; the message gives the pip command."""

    def __init__(self, purpose: str, package: str, extra: str) -> None:
        super().__init__(f"{purpose} needs {package}; run: pip install 'mvbert[{extra}]'")


class FailedElsewhere(InputError):
    """Another process of this run failed on bad input and has reported it."""


class OutOfTime(Exception):
    """The time limit was reached; a checkpoint was saved and the same command resumes."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Interrupted(Exception):
    """The run was stopped by a signal; a checkpoint was saved and the same command resumes."""
