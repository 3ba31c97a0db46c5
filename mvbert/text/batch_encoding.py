"""What calling a tokenizer gives: rows for a model, under the names transformers has for them."""

from collections.abc import Iterator, Mapping, MutableMapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvbert import _core
from mvbert.errors import InputError, MissingExtra
from mvbert.text.texts import check_index

if TYPE_CHECKING:
    from mvbert.text.vocab import Vocab


def check_tensors(return_tensors: str | None) -> None:
    if return_tensors not in (None, "np", "pt"):
        raise InputError(f"return_tensors is {return_tensors!r}, expected 'np', 'pt' or None")


def as_tensors(values: NDArray[Any], return_tensors: str | None) -> Any:
    """An array as it is, or as a torch tensor of the same memory."""
    if return_tensors != "pt":
        return values
    try:
        import torch
    except ImportError:
        raise MissingExtra("return_tensors='pt'", "torch", "hf") from None
    return torch.from_numpy(values)


def as_array(name: str, value: Any) -> NDArray[Any]:
    """Numbers, or lists of them, as an array."""
    try:
        array = np.asarray(value)
    except ValueError:
        raise InputError(
            f"{name} has rows of different lengths, so it is no array; pass padding=True"
        ) from None
    if not array.size:
        return array.astype(np.int64)
    if array.dtype.kind not in "biuf":
        raise InputError(f"{name} has {array.dtype} values, expected numbers")
    return array


class CharSpan(NamedTuple):
    """Characters [start, end) of a text."""

    start: int
    end: int


class TokenSpan(NamedTuple):
    """Pieces [start, end) of a row."""

    start: int
    end: int


class EncodedRows:
    """Rows as the core keeps them: what is asked of them is found when it is first asked for.

    Args:
        vocab: the vocabulary of the ids.
        core: the rows; None of pickled ones, which have been asked for all.
        lead: special pieces before and after each text: 1 or 0.
        pairs: whether each row has two texts.
        first: one text: a column is its list, without a list of rows around it.
        with_spans: whether the call asked for offsets.
    """

    def __init__(
        self,
        vocab: "Vocab",
        core: _core.TokenRows | None,
        lead: int,
        pairs: bool,
        first: bool,
        with_spans: bool,
    ) -> None:
        self.vocab = vocab
        self.core = core
        self.lead = lead
        self.pairs = pairs
        self.first = first
        self.with_spans = with_spans

    def __getstate__(self) -> dict[str, Any]:
        """The core's rows hold the texts and the tokenizer, which are not pickled."""
        for name in ("ids", "offsets", "width", "firsts", "seconds", "words"):
            getattr(self, name)
        if self.with_spans:
            _ = self.spans
        return {**self.__dict__, "core": None}

    @property
    def rows(self) -> _core.TokenRows:
        assert self.core is not None
        return self.core

    def column(self, name: str) -> list[Any]:
        """Lists of the rows, or the list of the only one."""
        rows = self.rows.lists(name)
        return rows[0] if self.first else rows

    # Without padding:

    @cached_property
    def ids(self) -> NDArray[np.int32]:
        """[N]."""
        return self.rows.flat()[0]

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """[B + 1]: row i is ids[offsets[i] : offsets[i + 1]]."""
        return self.rows.offsets()

    @cached_property
    def width(self) -> int | None:
        """The length that rows are padded to."""
        return self.rows.width

    @cached_property
    def firsts(self) -> NDArray[np.int64]:
        """[B]: pieces of the first text."""
        return self.rows.sizes(0)

    @cached_property
    def seconds(self) -> NDArray[np.int64]:
        """[B]: pieces of the second text."""
        return self.rows.sizes(1)

    @cached_property
    def words(self) -> NDArray[np.int32]:
        """[N]: the number of each piece's word, -1 where none is."""
        return self.rows.words()

    @cached_property
    def spans(self) -> NDArray[np.int32]:
        """[N, 2]: where each piece lies in its text or word."""
        if self.core is None:
            raise InputError(
                "this batch was pickled without offsets; pass return_offsets_mapping=True"
            )
        return self.core.spans()

    def number(self, row: int) -> int:
        """A row's number, which may be given from the end."""
        rows = len(self.offsets) - 1
        check_index("row", row)
        if not -rows <= row < rows:
            raise InputError(f"there is no row {row}; the batch has {rows}")
        return row % rows

    def row(self, number: int) -> slice:
        """Where a row is in what is not padded."""
        number = self.number(number)
        return slice(int(self.offsets[number]), int(self.offsets[number + 1]))

    def padding(self, number: int) -> int:
        """How many pieces of padding a row has."""
        row = self.row(number)
        return 0 if self.width is None else self.width - (row.stop - row.start)

    def tokens(self, number: int) -> list[str]:
        ids = self.ids[self.row(number)].tolist()
        return [self.vocab.pieces[id] for id in ids + [self.vocab.pad] * self.padding(number)]

    def word_ids(self, number: int) -> list[int | None]:
        number = self.number(number)
        if self.core is not None:
            return self.core.row_words(number)
        words = [None if word < 0 else word for word in self.words[self.row(number)].tolist()]
        return words + [None] * self.padding(number)

    def sequence_ids(self, number: int) -> list[int | None]:
        number = self.number(number)
        special: list[int | None] = [None] * self.lead
        ids = special + [0] * int(self.firsts[number]) + special
        if self.pairs:
            ids += [1] * int(self.seconds[number]) + special
        return ids + [None] * self.padding(number)


UNREAD = object()  # a column that is made when it is first read


class BatchEncoding(MutableMapping[str, Any]):
    """Rows by the names of a model's inputs, as transformers' class of this name.

    It is a mapping (`batch["input_ids"]`, `model(**batch)`), gives its values as attributes, and
    moves to a device. Lists are made when they are first read. `batch[0]` is row 0 by itself.

    Args:
        data: the values by name.
        rows: what the methods about words, characters and texts answer from.
    """

    def __init__(
        self, data: Mapping[str, Any] | None = None, rows: EncodedRows | None = None
    ) -> None:
        self._values = dict(data or {})
        self._rows = rows

    def __getitem__(self, name: Any) -> Any:
        if not isinstance(name, str):
            return self._numbered(name)
        value = self._values[name]
        if value is UNREAD:
            value = self._values[name] = self.rows.column(name)
        return value

    def _numbered(self, number: Any) -> Any:
        """A row by its number, or a list of those of a slice."""
        if self._rows is None and isinstance(number, slice):
            return {name: self[name][number] for name in self}
        if self._rows is None or not (isinstance(number, slice) or hasattr(number, "__index__")):
            raise KeyError(f"{number!r}: a batch is read by name ({', '.join(self._values)})")
        if isinstance(number, slice):
            rows = range(len(self._rows.offsets) - 1)
            return [BatchRow(self, row) for row in rows[number]]
        return BatchRow(self, self._rows.number(number))

    def __contains__(self, name: object) -> bool:
        return name in self._values

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

    copy = __copy__

    def __or__(self, other: Any) -> "BatchEncoding":
        if not isinstance(other, Mapping):
            return NotImplemented
        return type(self)({**self, **other})

    def __ror__(self, other: Any) -> "BatchEncoding":
        if not isinstance(other, Mapping):
            return NotImplemented
        return type(self)({**other, **self})

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

    def convert_to_tensors(
        self, tensor_type: str | None = None, prepend_batch_axis: bool = False
    ) -> "BatchEncoding":
        """Makes arrays or tensors of all lists; returns this batch.

        Args:
            tensor_type: "np" or "pt"; None changes nothing.
            prepend_batch_axis: values are of one row: [1, ...].

        Raises:
            InputError: values of different lengths, or no numbers.
        """
        check_tensors(tensor_type)
        for name in self if tensor_type is not None else ():
            value = [self[name]] if prepend_batch_axis else self[name]
            array = as_array(name, value)
            if tensor_type == "pt" and array.dtype == np.float64:
                array = array.astype(np.float32)  # as torch.tensor of a list
            self._values[name] = as_tensors(array, tensor_type)
        return self

    # ---- words, characters, texts ------------------------------------------------------------

    @property
    def rows(self) -> EncodedRows:
        if self._rows is None:
            raise InputError("this batch was not made by a tokenizer's call, so it has no words")
        return self._rows

    @property
    def is_fast(self) -> bool:
        """Whether the methods below answer: of what a call made."""
        return self._rows is not None

    @property
    def n_sequences(self) -> int | None:
        """1, 2 for pairs."""
        return None if self._rows is None else 1 + self._rows.pairs

    @property
    def encodings(self) -> "list[BatchRow] | None":
        """The rows, each by itself."""
        return None if self._rows is None else self[:]

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The pieces of a row."""
        return self.rows.tokens(batch_index)

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """The number of each piece's word in its text, or in the list that was given."""
        return self.rows.word_ids(batch_index)

    words = word_ids

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
        check_index("word", word)
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
        check_index("character", char)
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
        return self.rows.spans[self.rows.row(row)]

    def _of_token(self, values: list[int | None], token: int) -> int | None:
        check_index("piece", token)
        if not 0 <= token < len(values):
            raise InputError(f"there is no piece {token}; the row has {len(values)}")
        return values[token]


def _row_and(first: int, second: int | None) -> tuple[int, int]:
    """Transformers' arguments: (row, place), or the place alone in row 0."""
    return (0, first) if second is None else (first, second)


class BatchRow:
    """One row of a batch, as the objects of the library tokenizers."""

    def __init__(self, batch: BatchEncoding, number: int) -> None:
        self._batch = batch
        self._number = number

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.tokens})"

    @property
    def ids(self) -> list[int]:
        rows = self._batch.rows
        ids: list[int] = rows.ids[rows.row(self._number)].tolist()
        return ids + [rows.vocab.pad] * rows.padding(self._number)

    @property
    def type_ids(self) -> list[int]:
        rows = self._batch.rows
        first = 2 * rows.lead + int(rows.firsts[self._number])
        # (Without special pieces token types are 0, as a call has them.)
        second = (int(rows.seconds[self._number]) + 1) * rows.lead * rows.pairs
        return [0] * first + [1] * second + [0] * (len(self.ids) - first - second)

    @property
    def attention_mask(self) -> list[int]:
        padding = self._batch.rows.padding(self._number)
        return [1] * (len(self.ids) - padding) + [0] * padding

    @property
    def special_tokens_mask(self) -> list[int]:
        return [int(sequence is None) for sequence in self.sequence_ids]

    @property
    def offsets(self) -> list[tuple[int, int]]:
        spans = self._batch.rows.spans[self._batch.rows.row(self._number)].tolist()
        return [(begin, end) for begin, end in spans] + [(0, 0)] * self._batch.rows.padding(
            self._number
        )

    @property
    def tokens(self) -> list[str]:
        return self._batch.tokens(self._number)

    @property
    def word_ids(self) -> list[int | None]:
        return self._batch.word_ids(self._number)

    @property
    def sequence_ids(self) -> list[int | None]:
        return self._batch.sequence_ids(self._number)

    @property
    def n_sequences(self) -> int:
        return 1 + self._batch.rows.pairs

    def token_to_sequence(self, token_index: int) -> int | None:
        return self._batch.token_to_sequence(self._number, token_index)

    def token_to_word(self, token_index: int) -> int | None:
        return self._batch.token_to_word(self._number, token_index)

    def token_to_chars(self, token_index: int) -> CharSpan | None:
        return self._batch.token_to_chars(self._number, token_index)

    def word_to_tokens(self, word_index: int, sequence_index: int = 0) -> TokenSpan | None:
        return self._batch.word_to_tokens(self._number, word_index, sequence_index)

    def word_to_chars(self, word_index: int, sequence_index: int = 0) -> CharSpan | None:
        return self._batch.word_to_chars(self._number, word_index, sequence_index)

    def char_to_token(self, char_index: int, sequence_index: int = 0) -> int | None:
        return self._batch.char_to_token(self._number, char_index, sequence_index)

    def char_to_word(self, char_index: int, sequence_index: int = 0) -> int | None:
        return self._batch.char_to_word(self._number, char_index, sequence_index)
