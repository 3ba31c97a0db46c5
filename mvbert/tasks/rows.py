"""The examples of a task as rows of pieces, and batches of rows of one length.

Rows of equal length need no padding and no mask. A batch has rows of one length; what is left over
of each length, fewer than a batch, is put together by length and padded: 1 % of SST-2's pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvbert.errors import InputError
from mvbert.tasks.formats import Examples, Task
from mvbert.text.tokenizer import FlatBatch, WordPieceTokenizer
from mvbert.text.vocab import Vocab

CLASS = -1  # in TaskRows.words: the row as a whole, scored at its [CLS]


@dataclass(frozen=True)
class TaskRows:
    """Rows of pieces, one an example, and the places in them that are scored.

    Row i has ids[ends[i] : ends[i + 1]], and places[place_ends[i] : place_ends[i + 1]].

    Attributes:
        types: token types.
        places: positions in their row: [CLS] for a class or number, the first piece of a word.
        words: the word of each place, CLASS for [CLS].
        cut: rows that did not fit and lost their end.
        lost: words with a tag that have no piece in their row.
    """

    ids: NDArray[np.int32]
    types: NDArray[np.uint8]
    ends: NDArray[np.int64]
    places: NDArray[np.int64]
    words: NDArray[np.int64]
    place_ends: NDArray[np.int64]
    cut: int
    lost: int

    def __len__(self) -> int:
        return len(self.ends) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.ends)

    def note(self, length: int) -> str:
        """A sentence about what was cut; empty if nothing was."""
        if not self.cut and not self.lost:
            return ""
        parts = [f"{self.cut} rows were cut to {length} pieces"] * bool(self.cut)
        parts += [f"{self.lost} words have no piece in their row and count as wrong"] * bool(
            self.lost
        )
        return "; ".join(parts)


def join_rows(parts: Sequence[TaskRows]) -> TaskRows:
    """The rows of several, one after another."""

    def ends(name: str) -> NDArray[np.int64]:
        counts = [np.diff(getattr(part, name)) for part in parts]
        return np.concatenate([[0], np.cumsum(np.concatenate(counts))])

    def flat(name: str) -> NDArray:
        return np.concatenate([getattr(part, name) for part in parts])

    return TaskRows(
        flat("ids"), flat("types"), ends("ends"), flat("places"), flat("words"),
        ends("place_ends"), sum(p.cut for p in parts), sum(p.lost for p in parts),
    )  # fmt: skip


def make_rows(task: Task, examples: Examples, vocab: Vocab, length: int) -> TaskRows:
    """Tokenizes examples; rows have at most `length` pieces.

    Raises:
        InputError: the pair leaves no room for a word.
    """
    tokenizer = WordPieceTokenizer(vocab)
    if examples.tags is not None or task.kind in ("tags", "joint"):
        return _rows_of_words(examples.texts, tokenizer, length, task.kind == "joint")
    full = _encode(tokenizer, examples, None)
    batch = _encode(tokenizer, examples, length)
    count = len(examples)
    ones = np.arange(count + 1)
    return TaskRows(
        batch.ids, batch.token_type_ids, batch.offsets, np.zeros(count, np.int64),
        np.full(count, CLASS), ones, int((np.diff(full.offsets) > np.diff(batch.offsets)).sum()), 0,
    )  # fmt: skip


def _encode(tokenizer: WordPieceTokenizer, examples: Examples, length: int | None) -> FlatBatch:
    """A row per example; pairs lose pieces of the longer text first."""
    return tokenizer.encode_batch(
        examples.texts, examples.pairs, max_length=length, truncation=length is not None
    )


def _rows_of_words(
    sentences: Sequence[Sequence[str]], tokenizer: WordPieceTokenizer, length: int, whole: bool
) -> TaskRows:
    """Rows of words that are given, each tokenized alone; the first piece of each is scored."""
    words = [word for sentence in sentences for word in sentence]
    flat = tokenizer.encode_batch(words, add_special_tokens=False)
    cls, sep = tokenizer.vocab.cls, tokenizer.vocab.sep
    ids: list[int] = []
    ends, places, of_word, place_ends = [0], list[int](), list[int](), [0]
    cut = lost = number = 0
    for sentence in sentences:
        row = [cls]
        if whole:
            places.append(0)
            of_word.append(CLASS)
        full = False
        for i in range(len(sentence)):
            pieces = flat[number].tolist()
            number += 1
            room = length - 1 - len(row)
            full = full or len(pieces) > room
            pieces = pieces[: max(room, 0)]
            if not pieces:
                lost += 1
                continue
            places.append(len(row))
            of_word.append(i)
            row += pieces
        cut += full
        ids += [*row, sep]
        ends.append(len(ids))
        place_ends.append(len(places))
    return TaskRows(
        np.array(ids, np.int32), np.zeros(len(ids), np.uint8), np.array(ends),
        np.array(places, np.int64), np.array(of_word, np.int64), np.array(place_ends), cut, lost,
    )  # fmt: skip


# ---- batches -------------------------------------------------------------------------------------


def batches_of_epoch(
    lengths: NDArray[np.int64], size: int, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """Every row once, in batches of rows of one length but for what is left over, shuffled."""
    draw = np.random.default_rng((seed, epoch))
    order = draw.permutation(len(lengths))
    order = order[np.argsort(lengths[order], kind="stable")]
    batches, rest = [], []
    for group in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1):
        whole = len(group) // size * size
        batches += [*group[:whole].reshape(-1, size)]
        rest.append(group[whole:])
    remainder = np.concatenate(rest) if rest else order
    batches += [remainder[first : first + size] for first in range(0, len(remainder), size)]
    return [batches[i] for i in draw.permutation(len(batches))]


def batches_by_length(lengths: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """Every row once, shortest first: for scoring."""
    order = np.argsort(lengths, kind="stable")
    return [order[first : first + size] for first in range(0, len(order), size)]


@dataclass(frozen=True)
class TaskBatch:
    """Rows on the device.

    Attributes:
        mask: [B, T], False on padding; None if there is none.
        index: [N], the scored places, into B * T.
        numbers: [N], the numbers of these places in their TaskRows, on the host.
    """

    input_ids: Tensor  # [B, T] int32
    token_type_ids: Tensor  # [B, T] int32
    mask: Tensor | None
    index: Tensor
    numbers: NDArray[np.int64]


def read_batch(
    rows: TaskRows, row_numbers: NDArray[np.int64], pad: int, device: torch.device
) -> TaskBatch:
    """Rows by their numbers, padded to the longest of them."""
    lengths = rows.lengths[row_numbers]
    T = int(lengths.max())
    column = np.arange(T)
    inside = column < lengths[:, None]
    source = np.where(inside, rows.ends[row_numbers][:, None] + column, 0)
    ids = np.where(inside, rows.ids[source], pad).astype(np.int32)
    types = np.where(inside, rows.types[source], 0).astype(np.int32)
    numbers = np.concatenate(
        [np.arange(rows.place_ends[i], rows.place_ends[i + 1]) for i in row_numbers]
    )
    counts = np.diff(rows.place_ends)[row_numbers]
    index = np.repeat(np.arange(len(row_numbers)) * T, counts) + rows.places[numbers]
    mask = None if inside.all() else torch.from_numpy(inside).to(device)
    return TaskBatch(
        torch.from_numpy(ids).to(device), torch.from_numpy(types).to(device), mask,
        torch.from_numpy(index).to(device), numbers,
    )  # fmt: skip


def check_room(length: int, pairs: bool) -> None:
    """Raises InputError if a row of `length` pieces has no room for a text."""
    least = 5 if pairs else 3
    if length < least:
        raise InputError(f"length must be at least {least}, got {length}")
