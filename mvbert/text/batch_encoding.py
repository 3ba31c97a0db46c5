"""What calling a tokenizer gives: rows for a model, under the names transformers has for them."""

import itertools
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvbert import _core
from mvbert.errors import InputError

if TYPE_CHECKING:
    from mvbert.text.vocab import Vocab


class CharSpan(NamedTuple):
    """Characters [start, end) of a text."""

    start: int
    end: int


class TokenSpan(NamedTuple):
    """Pieces [start, end) of a row."""

    start: int
    end: int


@dataclass
class EncodedRows:
    """Rows as the core made them, and how each is put together.

    Attributes:
        ids: [N] flat or [B, T] padded.
        offsets: [B + 1], of the rows in the flattened ids.
        places: [B + 1], of the rows in what is not padded.
        lead: special pieces before and after each text: 1 or 0.
        firsts, seconds: [B] pieces of the first and of the second text; seconds of pairs only.
        words: not padded, the number of each piece's word, -1 where none is; None: not found yet.
        spans: not padded, [N, 2]; None: not found yet.
        find_words, find_spans: find them when they are first asked for.
        with_spans: whether the call asked for spans.
    """

    vocab: "Vocab"
    ids: NDArray[Any]
    offsets: NDArray[np.int64]
    places: NDArray[np.int64]
    lead: int
    firsts: NDArray[np.int64]
    seconds: NDArray[np.int64] | None
    words: NDArray[np.int32] | None
    spans: NDArray[Any] | None
    find_words: Callable[[], NDArray[np.int32]] | None
    find_spans: Callable[[], NDArray[Any]] | None
    with_spans: bool

    def __getstate__(self) -> dict[str, Any]:
        """The functions hold the texts and the tokenizer, which are not pickled."""
        known = {"words": self.all_words(), "spans": self.all_spans() if self.with_spans else None}
        return {**self.__dict__, **known, "find_words": None, "find_spans": None}

    def all_words(self) -> NDArray[np.int32]:
        if self.words is None:
            assert self.find_words is not None
            self.words = self.find_words()
        return self.words

    def all_spans(self) -> NDArray[Any]:
        if self.spans is None:
            if self.find_spans is None:
                raise InputError(
                    "this batch was pickled without offsets; pass return_offsets_mapping=True"
                )
            self.spans = self.find_spans()
        return self.spans

    def number(self, row: int) -> int:
        """A row's number, which may be given from the end."""
        rows = len(self.offsets) - 1
        if not -rows <= row < rows:
            raise InputError(f"there is no row {row}; the batch has {rows}")
        return row % rows

    def row(self, number: int) -> slice:
        """Where a row is in what is not padded."""
        number = self.number(number)
        return slice(int(self.places[number]), int(self.places[number + 1]))

    def padding(self, number: int) -> int:
        """How many pieces of padding a row has."""
        number = self.number(number)
        own = self.places[number + 1] - self.places[number]
        return int(self.offsets[number + 1] - self.offsets[number] - own)

    def sequence_ids(self, number: int) -> list[int | None]:
        number = self.number(number)
        special: list[int | None] = [None] * self.lead
        ids = special + [0] * int(self.firsts[number]) + special
        if self.seconds is not None:
            ids += [1] * int(self.seconds[number]) + special
        return ids + [None] * self.padding(number)


class LazyValue:
    """A value that is made when it is first asked for."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


class BatchEncoding(MutableMapping[str, Any]):
    """Rows by the names of a model's inputs, as transformers' class of this name.

    It is a mapping (`batch["input_ids"]`, `model(**batch)`), gives its values as attributes, and
    moves to a device. Lists are made when they are first read.

    Args:
        data: the values by name.
        rows: what the methods about words, characters and texts answer from.
    """

    def __init__(
        self, data: Mapping[str, Any] | None = None, rows: EncodedRows | None = None
    ) -> None:
        self._values = dict(data or {})
        self._rows = rows

    def __getitem__(self, name: str) -> Any:
        if not isinstance(name, str):
            raise KeyError(f"{name!r}: a batch is read by name ({', '.join(self._values)})")
        value = self._values[name]
        if isinstance(value, LazyValue):
            value = self._values[name] = value.make()
        return value

    def __setitem__(self, name: str, value: Any) -> None:
        self._values[name] = value

    def __delitem__(self, name: str) -> None:
        del self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            raise AttributeError(f"a {type(self).__name__} has no {name!r}")
        return self[name]

    def __repr__(self) -> str:
        return repr(dict(self))

    def __copy__(self) -> "BatchEncoding":
        return type(self)(self._values, self._rows)

    def __getstate__(self) -> dict[str, Any]:
        return {"_values": dict(self), "_rows": self._rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def data(self) -> dict[str, Any]:
        """All values."""
        return dict(self)

    def to(self, device: Any, *, non_blocking: bool = False) -> "BatchEncoding":
        """Moves the tensors to a device; returns this batch."""
        for name, value in self._values.items():
            if hasattr(value, "to"):
                self._values[name] = value.to(device, non_blocking=non_blocking)
        return self

    # ---- words, characters, texts ------------------------------------------------------------

    @property
    def rows(self) -> EncodedRows:
        if self._rows is None:
            raise InputError("this batch was not made by a tokenizer's call, so it has no words")
        return self._rows

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The pieces of a row."""
        row = self.rows.number(batch_index)
        ids = self.rows.ids.reshape(-1)[self.rows.offsets[row] : self.rows.offsets[row + 1]]
        return [self.rows.vocab.pieces[id] for id in ids.tolist()]

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """The number of each piece's word in its text, or in the list that was given."""
        words = _core.word_list(self.rows.all_words()[self.rows.row(batch_index)])
        return words + [None] * self.rows.padding(batch_index)

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """0 for pieces of the first text, 1 of the second, None for others."""
        return self.rows.sequence_ids(batch_index)

    def token_to_sequence(
        self, batch_or_token_index: int, token_index: int | None = None
    ) -> int | None:
        """Which text of the row a piece belongs to."""
        row, token = _row_and(batch_or_token_index, token_index)
        return self._of_token(self.sequence_ids(row), token)

    def token_to_word(
        self, batch_or_token_index: int, token_index: int | None = None
    ) -> int | None:
        """The number of a piece's word."""
        row, token = _row_and(batch_or_token_index, token_index)
        return self._of_token(self.word_ids(row), token)

    def token_to_chars(
        self, batch_or_token_index: int, token_index: int | None = None
    ) -> CharSpan | None:
        """Where a piece lies in its text."""
        row, token = _row_and(batch_or_token_index, token_index)
        if self._of_token(self.sequence_ids(row), token) is None:
            return None
        return CharSpan(*self._spans(row)[token].tolist())

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> TokenSpan | None:
        """The pieces of a word."""
        row, word = _row_and(batch_or_word_index, word_index)
        keys = zip(self.word_ids(row), self.sequence_ids(row), strict=True)
        places = [place for place, key in enumerate(keys) if key == (word, sequence_index)]
        return TokenSpan(places[0], places[-1] + 1) if places else None

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> CharSpan | None:
        """Where a word lies in its text."""
        row, word = _row_and(batch_or_word_index, word_index)
        tokens = self.word_to_tokens(row, word, sequence_index)
        if tokens is None:
            return None
        spans = self._spans(row)
        return CharSpan(int(spans[tokens.start, 0]), int(spans[tokens.end - 1, 1]))

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The piece that a character of a text is in."""
        row, char = _row_and(batch_or_char_index, char_index)
        spans = self._spans(row)
        inside = (spans[:, 0] <= char) & (char < spans[:, 1])
        sequences = self.sequence_ids(row)
        return next((int(t) for t in inside.nonzero()[0] if sequences[t] == sequence_index), None)

    def char_to_word(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The number of the word that a character of a text is in."""
        row, char = _row_and(batch_or_char_index, char_index)
        token = self.char_to_token(row, char, sequence_index)
        return None if token is None else self.word_ids(row)[token]

    def _spans(self, row: int) -> NDArray[Any]:
        return self.rows.all_spans()[self.rows.row(row)]

    def _of_token(self, values: list[int | None], token: int) -> int | None:
        if not 0 <= token < len(values):
            raise InputError(f"there is no piece {token}; the row has {len(values)}")
        return values[token]


def _row_and(first: int, second: int | None) -> tuple[int, int]:
    """Transformers' arguments: (row, place), or the place alone in row 0."""
    return (0, first) if second is None else (first, second)


def lists(values: NDArray[Any], offsets: NDArray[np.int64]) -> list[Any]:
    """Rows of flat values as lists; rows of pairs as lists of tuples."""
    flat: list[Any] = values.tolist() if values.ndim == 1 else pairs(values)
    return [flat[begin:end] for begin, end in itertools.pairwise(offsets.tolist())]


def pairs(values: NDArray[Any]) -> list[tuple[int, int]]:
    """[N, 2] as a list of tuples."""
    return list(zip(values[:, 0].tolist(), values[:, 1].tolist(), strict=True))
