"""The words of a lexicon, and their pieces in a vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import numpy as np

if TYPE_CHECKING:
    from mvbert.text.vocab import Vocab


class WordList(Sequence[bytes]):
    """The words of a lexicon by id, as bytes of UTF-8: a view, 0 is the empty word."""

    def __init__(self, data: np.ndarray, ends: np.ndarray):
        self.data = data  # uint8, the words end to end
        self.ends = ends  # uint64 [W]

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...

    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"word id must lie in [0, {count}), got {index}")
        index = int(index) % count
        begin = int(self.ends[index - 1]) if index else 0
        return self.data[begin : int(self.ends[index])].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        begin = 0
        for end in map(int, self.ends):
            yield self.data[begin:end].tobytes()
            begin = end


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The pieces of every word of a lexicon in one vocabulary.

    Word w has pieces ids[ends[w - 1] : ends[w]], with ends[-1] = 0; word 0, the end of a document,
    has none.
    """

    ends: np.ndarray  # uint32 [W]
    ids: np.ndarray  # int32, all pieces end to end
    vocab: Vocab

    @property
    def lengths(self) -> np.ndarray:
        """uint32 [W]: number of pieces per word."""
        return np.diff(self.ends, prepend=np.uint32(0))
