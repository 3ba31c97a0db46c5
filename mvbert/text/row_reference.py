"""Reference implementation of csrc/mixer in plain Python, used in tests.

A row is T pieces: [CLS], words of the stream, [SEP] last. Each word is cut by one of the two
vocabularies, whole words are masked, and every choice is a number of Philox4x32-10 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011) at a counter that says what is chosen. So a
row is a pure function of the seed, its number and the arguments.

Rows have global numbers: epoch = number // R, position = number % R. A permutation of [0, R) keyed
by the epoch turns the position into a row id; the row starts at word (row id) * S + (an offset of
the epoch in [0, S)) of the stream, continuing at the stream's beginning after its end.

All probabilities become integers before anything is drawn, and there is no floating-point number
after that: the same rows on every machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mvbert.text.philox import EPOCH_OFFSET, ROW, VOCABULARY, below, halves, permuted, philox4x32

if TYPE_CHECKING:
    from mvbert.text.lexicon import Segmentation

IGNORE_INDEX = -100


# ---- random numbers --------------------------------------------------------------------------


def draw(seed: int, purpose: int, number: int, index: int) -> int:
    """The 32-bit number `index` that row `number` has for `purpose` (VOCABULARY or ROW).

    64 numbers come from 16 blocks, first word of all 16, second word of all 16, and so on: this is
    how they lie in vector registers, so that C++ need not reorder them.
    """
    group, rest = divmod(index, 64)
    word, block = divmod(rest, 16)
    return philox4x32((16 * group + block, purpose, *halves(number)), halves(seed))[word]


# ---- probabilities to integers ---------------------------------------------------------------


def threshold(probability: float) -> int:
    """The integer of [0, 2^32] below which 32 random bits mean yes."""
    return round(probability * 2**32)


def capacity(T: int, mask_prob: float) -> int:
    """M, how many masked pieces a row has room for; 0 means that nothing is masked."""
    return max(1, round(mask_prob * T)) if mask_prob > 0 else 0


def mask_budget(pieces: int, T: int, mask_prob: float) -> int:
    """How many pieces a row with that many pieces of words may have masked."""
    return min(capacity(T, mask_prob), max(1, round(mask_prob * pieces)))


def row_stride(words: int, pieces: float, T: int) -> int:
    """S, the words from one row start to the next: those that fill a row in the mean.

    Args:
        words: entries of the stream, document marks included.
        pieces: what they are cut into, a document mark counting one.
    """
    return max(1, int((T - 2) * words / pieces))


# ---- where a row starts ----------------------------------------------------------------------


def row_start(number: int, count: int, stride: int, seed: int) -> int:
    """Offset in the stream of the first word of a row.

    Args:
        number: global number of the row.
        count: R, rows in an epoch.
        stride: S, words from one row start to the next.
    """
    epoch, position = divmod(number, count)
    offset = below(philox4x32((0, EPOCH_OFFSET, *halves(epoch)), halves(seed))[0], stride)
    return permuted(position, count, epoch, seed) * stride + offset


# ---- a row -----------------------------------------------------------------------------------


class _Side:
    """One vocabulary with its cut of the lexicon and its first id in the joint space."""

    def __init__(self, segmentation: Segmentation, base: int):
        vocab = segmentation.vocab
        self.ends, self.ids, self.base = segmentation.ends, segmentation.ids, base
        self.cls, self.sep, self.mask = base + vocab.cls, base + vocab.sep, base + vocab.mask
        special = {vocab.cls, vocab.sep, vocab.mask, vocab.unk, vocab.pad, *vocab.unread_ids}
        self.ordinary = [base + i for i in range(vocab.size) if i not in special]

    def pieces(self, word: int) -> list[int]:
        return [self.base + int(i) for i in self.ids[self.ends[word - 1] : self.ends[word]]]


def mask_words(
    row: list[int],
    words: list[tuple[int, int]],
    sides: Sequence[_Side],
    T: int,
    mask_prob: float,
    drawn: Callable[[int], int],
) -> tuple[list[int], list[int]]:
    """Masks words of a row in place; returns the masked positions and the ids before.

    Args:
        words: half-open ranges of the row's words.
        drawn: the row's random numbers by index.
    """
    # Whole words in a drawn order: the first steps of a Fisher-Yates shuffle.
    words = words.copy()
    budget = mask_budget(sum(b - a for a, b in words), T, mask_prob)
    masked: list[int] = []
    step = 0
    while budget and step < len(words):
        other = step + below(drawn(2 + 2 * step), len(words) - step)
        words[step], words[other] = words[other], words[step]
        a, b = words[step]
        if b - a <= budget:
            budget -= b - a
            masked += range(a, b)
        step += 1
    masked.sort()

    labels = [row[position] for position in masked]
    for j, position in enumerate(masked):
        own = sides[-1] if row[position] >= sides[-1].base else sides[0]
        tenth, rest = divmod(10 * drawn(3 + 2 * j), 2**32)
        if tenth < 8:
            row[position] = own.mask
        elif tenth == 8:
            row[position] = own.ordinary[below(rest, len(own.ordinary))]
    return masked, labels


def row_reference(
    stream: Sequence[int],
    number: int,
    *,
    teacher: Segmentation | None,
    student: Segmentation | None,
    stride: int,
    T: int,
    mask_prob: float,
    pair_prob: float,
    student_prob: float,
    seed: int,
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Row `number` of a stream of word ids.

    Args:
        stream: word ids, 0 for the end of a document; at least `stride` of them, one not 0.
        number: global number of the row.
        teacher, student: `Segmentation`s, or None for one of them.
        stride: S, words from one row start to the next.

    Returns:
        input_ids [T], token_type_ids [T], masked_positions [M], labels [M].
    """
    sides = [_Side(teacher, 0)] if teacher else []
    if student:
        sides.append(_Side(student, teacher.vocab.size if teacher else 0))
    entry_of_row = row_start(number, len(stream) // stride, stride, seed)

    def side(slot: int) -> _Side:
        """The vocabulary of [CLS] (slot 0), words and [SEP]s (1, 2, ...), the drawn [SEP] (T - 2),
        the last [SEP] (T - 1)."""
        bits = draw(seed, VOCABULARY, number, slot) if len(sides) == 2 else 0
        return sides[1] if len(sides) == 2 and bits < threshold(student_prob) else sides[0]

    def fill(room: int) -> tuple[list[int], list[tuple[int, int]]]:
        """The pieces between [CLS] and the last [SEP], and the words' half-open ranges."""
        row = [sides[0].cls]
        words: list[tuple[int, int]] = []
        entry, slot = entry_of_row, 0
        while len(row) < 1 + room:
            word = int(stream[entry % len(stream)])
            entry += 1
            if word == 0:
                # No [SEP] beside another special piece: not first, not twice, not before the last.
                if words and words[-1][1] == len(row) and len(row) < room:
                    slot += 1
                    row.append(side(slot).sep)
                continue
            slot += 1
            pieces = side(slot).pieces(word)[: 1 + room - len(row)]
            words.append((len(row), len(row) + len(pieces)))
            row += pieces
        return row[1:], words

    def boundaries(words: list[tuple[int, int]]) -> list[int]:
        """Starts of words of the row's middle half that follow a word."""
        return [
            start
            for (_, end), (start, _) in itertools.pairwise(words)
            if end == start and T <= 4 * start < 3 * T
        ]

    first_types = T
    row, words = fill(T - 3)
    places = boundaries(words)
    if places and draw(seed, ROW, number, 0) < threshold(pair_prob):
        at = places[below(draw(seed, ROW, number, 1), len(places))]
        row.insert(at - 1, side(T - 2).sep)
        words = [(a + (a >= at), b + (a >= at)) for a, b in words]
        first_types = at + 1
    else:
        row, words = fill(T - 2)
    row = [side(0).cls, *row, side(T - 1).sep]

    masked, labels = mask_words(
        row, words, sides, T, mask_prob, lambda index: draw(seed, ROW, number, index)
    )
    unused = capacity(T, mask_prob) - len(masked)
    return (
        row,
        [int(i >= first_types) for i in range(T)],
        masked + [0] * unused,
        labels + [IGNORE_INDEX] * unused,
    )
