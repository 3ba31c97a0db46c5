"""Arguments of tokenizers: what is a text, a list of texts, a whole number; refused by name."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real

from mvbert.errors import InputError

Text = str | bytes | bytearray | memoryview
TEXT_TYPES = (str, bytes, bytearray, memoryview)  # (isinstance is slow for a union of types)


def list_of_texts(name: str, texts: Iterable[Text]) -> tuple[Text, ...]:
    """The texts of an argument, which must be one list of them; `check_texts` checks each.

    A tuple: the caller's list may change before a batch reads it again. (The core needs one, too.)
    """
    if isinstance(texts, list | tuple):
        return tuple(texts)
    if isinstance(texts, TEXT_TYPES):
        raise InputError(
            f"{name}s is {type(texts).__name__}, expected a list of texts; use encode() for "
            "a single text"
        )
    # A table, an array of rows or one value: iterating it would give columns, names or no text.
    dimensions = len(getattr(texts, "shape", (0,)))
    if dimensions != 1:
        raise InputError(
            f"{name}s is {type(texts).__name__} of {dimensions} dimensions, expected a list of "
            "texts; choose one column or row"
        )
    if isinstance(texts, Mapping | set | frozenset) or not isinstance(texts, Iterable):
        raise InputError(f"{name}s is {type(texts).__name__}, expected a list of texts, in order")
    return tuple(texts)


def check_texts(name: str, texts: Sequence[object]) -> None:
    """Refuses the first that is no text; its number is in the message."""
    for number, text in enumerate(texts):
        if not is_text(text):
            raise InputError(
                f"{name} {number} is {described(text)}, expected str or bytes"
                + ("; give a missing text as an empty one" if _is_missing(text) else "")
            )


def check_text(name: str, text: object) -> None:
    if not is_text(text):
        several = "; use encode_batch() for several" if isinstance(text, list | tuple) else ""
        raise InputError(f"{name} is {described(text)}, expected str or bytes{several}")


def is_text(text: object) -> bool:
    """Whether the core takes it: str, or contiguous bytes."""
    if isinstance(text, str):
        return True
    try:
        view = memoryview(text)  # type: ignore[arg-type]
    except TypeError:
        return False
    return view.ndim == 1 and view.itemsize == 1 and view.contiguous


def _is_missing(value: object) -> bool:
    """None, NaN, and pandas' NA and NaT."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, Real) and value != value


def described(value: object) -> str:
    shown = repr(value)
    return type(value).__name__ if len(shown) > 40 else f"{shown} ({type(value).__name__})"


def check_size(text: Text) -> None:
    """Refuses a text whose offsets do not fit into int32, or an argument that is not text."""
    check_text("text", text)
    if len(text) >= 2**31:
        raise InputError(
            f"the text has {len(text)} characters or bytes; offsets are 32-bit, so at most "
            f"{2**31 - 1}: split it into several texts"
        )


def check_length(max_length: int) -> None:
    check_integer("max_length", max_length, 0, 2**31)


def check_integer(name: str, value: object, least: int, end: int) -> None:
    integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not integer or not least <= operator.index(value) < end:  # type: ignore[arg-type]
        raise InputError(
            f"{name} is {value!r}, expected an integer of [{least}, 2^{end.bit_length() - 1})"
        )


def check_index(name: str, value: object) -> None:
    """Refuses what is no number of a row, a piece, a word or a character."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InputError(f"the {name} is {described(value)}, expected an integer")


def check_flags(**flags: object) -> None:
    """Refuses options that are neither True nor False."""
    for name, value in flags.items():
        if value is not True and value is not False:
            raise InputError(f"{name} is {described(value)}, expected True or False")
