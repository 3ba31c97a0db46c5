"""Exceptions that end a command."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input: the message says where it is, what was expected and how to fix it.

    The command line prints the message and exits with code 2.
    """


class MissingExtra(InputError, ImportError):
    """An optional package is not installed; the message gives the pip command."""

    def __init__(self, purpose: str, package: str, extra: str) -> None:
        super().__init__(f"{purpose} needs {package}; run: pip install 'mvbert[{extra}]'")


@contextmanager
def require_extra(name: str, purpose: str) -> Iterator[None]:
    """Around imports of packages that `pip install 'mvbert[NAME]'` brings.

    Raises:
        MissingExtra: one is not installed.
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or name).split(".")[0]
        raise MissingExtra(purpose, package, name) from None


class FailedElsewhere(InputError):
    """Another process of this run failed on bad input and has reported it."""


class OutOfTime(Exception):
    """The time limit was reached; a checkpoint was saved and the same command resumes."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Interrupted(Exception):
    """The run was stopped by a signal; a checkpoint was saved and the same command resumes."""
