"""Types of the C++ core; what each name means stands in the header that declares it."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__version__: str
source_hash: str

Buffer = bytes | bytearray | memoryview | NDArray[np.uint8]

# ---- words and pieces ------------------------------------------------------------------------

unicode_version: str

def split(
    text: str | Buffer,
    lowercase: bool = True,
    instruction_set: str | None = None,
    strip_accents: bool = True,
) -> list[str]: ...
def instruction_sets() -> list[str]: ...
def utf8_error(data: Buffer) -> int | None: ...

class WordPiece:
    def __init__(self, pieces: Sequence[str], unk_id: int, max_chars: int = 100) -> None: ...
    def cut(self, word: str | Buffer) -> list[int]: ...
    def __len__(self) -> int: ...

class Tokenizer:
    def __init__(
        self,
        *,
        lowercase: bool,
        strip_accents: bool = True,
        teacher: WordPiece,
        student: WordPiece | None = None,
        special: Sequence[tuple[str, int, bool]] = (),
    ) -> None: ...
    def encode_list(
        self, text: str | Buffer, pair: str | Buffer | None, cls_sep: tuple[int, int] | None
    ) -> list[int]: ...
    def encode_rows(
        self,
        texts: Iterable[str | Buffer],
        pairs: Iterable[str | Buffer] | None,
        plan: RowPlan,
        threads: int,
        text_words: NDArray[np.int64] | None = None,
        pair_words: NDArray[np.int64] | None = None,
    ) -> TokenRows: ...
    # ids, offsets [B + 1]
    def encode_texts(
        self,
        texts: Iterable[str | Buffer],
        find_special: bool,
        threshold: int = 0,
        seed: int = 0,
        first_number: int = 0,
        threads: int = 1,
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]: ...
    def encode_long(
        self, data: Buffer, find_special: bool, threads: int = 1
    ) -> NDArray[np.int32]: ...
    # ids, the start of each word's ids, whether the student cut it
    def encode_words(
        self,
        text: str | Buffer,
        find_special: bool,
        threshold: int = 0,
        seed: int = 0,
        number: int = 0,
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_]]: ...
    # ids, spans [n, 2]
    def encode_spans(
        self, text: str | Buffer, find_special: bool
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]: ...
    def forget_words(self) -> None: ...

class RowPlan:
    def __init__(
        self,
        *,
        cls_sep: tuple[int, int] | None,
        pad: int = 0,
        truncation: str | None = None,
        max_length: int = 0,
        stride: int | None = None,
        padded: bool = False,
        width: int | None = None,
        multiple: int = 1,
        spans: bool = False,
        keep: bool = False,
    ) -> None: ...

class TokenRows:
    def __len__(self) -> int: ...
    @property
    def width(self) -> int | None: ...
    def offsets(self) -> NDArray[np.int64]: ...
    # ids, offsets [B + 1], token types
    def flat(self) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.uint8]]: ...
    # input ids, token types, attention mask [B, width]
    def padded(self, wide: bool) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]: ...
    def samples(self) -> NDArray[np.int64]: ...
    def sizes(self, which: int) -> NDArray[np.int64]: ...
    def words(self) -> NDArray[np.int32]: ...
    def row_words(self, row: int) -> list[int | None]: ...
    def spans(self) -> NDArray[np.int32]: ...
    def padded_spans(self) -> NDArray[np.int64]: ...
    def padded_special(self) -> NDArray[np.int64]: ...
    def lists(self, column: str) -> list[list[Any]]: ...

# ---- lexicon ---------------------------------------------------------------------------------

class NotUtf8(ValueError):  # args: source, byte offset in its text
    ...

class CorpusBuilder:
    def __init__(
        self,
        *,
        lowercase: bool,
        strip_accents: bool = True,
        heldout_share: float,
        seed: int,
        replace: bool,
        threads: int,
        block_bytes: int = 1 << 20,
    ) -> None: ...
    # part: "draw", "train" or "heldout"
    def begin_source(self, source: int, part: str, offset: int = 0) -> None: ...
    def add_text(self, text: Buffer) -> None: ...
    def add_documents(self, text: Buffer, ends: NDArray[np.uint64]) -> None: ...
    def flush(self) -> None: ...
    def pause(self) -> tuple[int, int, int] | None: ...  # offset, documents, bytes
    def new_words(self, first: int) -> bytes: ...  # one a line
    def restore(self, words: Buffer, train: NDArray[np.uint32], totals: dict[str, int]) -> None: ...
    # pieces of the train and of the held-out stream, u32, provisional ids
    def take(self) -> tuple[list[NDArray[np.uint32]], list[NDArray[np.uint32]]]: ...
    def totals(self) -> dict[str, int]: ...
    def count(self, ids: NDArray[np.uint32]) -> None: ...
    # bytes u8, ends u64 [W], counts u64 [W], final id of each provisional one u32 [W]
    def lexicon(
        self, moved: NDArray[np.uint32]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint32]]: ...

def heldout_draws(seed: int, documents: int) -> NDArray[np.uint32]: ...

# ends u32 [W], ids i32
def segment_lexicon(
    bytes: Buffer, word_ends: NDArray[np.uint64], wordpiece: WordPiece, threads: int
) -> tuple[NDArray[np.uint32], NDArray[np.int32]]: ...

# ---- vocabulary learner ----------------------------------------------------------------------

# pieces, how often each is used, pieces of one character, the count that kept pieces reach
def learn_vocab(
    bytes: Buffer,
    ends: NDArray[np.uint64],
    counts: NDArray[np.uint64],
    size: int,
    coverage: float,
    threads: int,
) -> tuple[list[str], list[int], int, int]: ...

# ---- mixer -----------------------------------------------------------------------------------

# ends u32 [W], ids i32, size, cls, sep, mask, special ids
Segments = tuple[NDArray[np.uint32], NDArray[np.int32], int, int, int, int, list[int]]

def philox4x32(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...
def philox_blocks(
    first: Sequence[int], rest: Sequence[int], key: Sequence[int]
) -> list[tuple[str, list[int]]]: ...
def filled_rows(rows: list[list[int]], width: int, fill: int) -> NDArray[np.int64] | None: ...

# [B, T] by name, lengths [B]; None: a row is no list of integers, or no mapping of such lists
def padded_rows(
    rows: object, *, pad: int, type_pad: int, multiple: int, with_mask: bool
) -> tuple[dict[str, NDArray[np.int64]], NDArray[np.int64]] | None: ...
def lengths_of_mask(mask: NDArray[np.int64]) -> NDArray[np.int64] | None: ...

# masks [B, T] in place; labels [B, T]
def mask_rows(
    ids: NDArray[np.int64],
    lengths: NDArray[np.int64],
    *,
    kinds: NDArray[np.uint8],
    mask: int,
    by_word: bool,
    budgets: NDArray[np.uint32],
    piece_threshold: int,
    mask_threshold: int,
    other_threshold: int,
    seed: int,
    epoch: int,
    threads: int,
) -> NDArray[np.int64]: ...

class PieceTable:
    def __init__(self, teacher: Segments | None, student: Segments | None) -> None: ...
    def measure(self, stream: NDArray[np.uint32], threads: int) -> tuple[int, int, int]: ...

class Mixer:
    def __init__(
        self,
        table: PieceTable,
        stream: NDArray[np.uint32],
        seed: int,
        T: int,
        stride: int,
        pair_threshold: int,
        capacity: int,
        budgets: list[int],
    ) -> None: ...
    def read(
        self,
        start: int,
        count: int,
        student_threshold: int,
        threads: int,
        input_ids: NDArray[np.int32],
        token_type_ids: NDArray[np.uint8],
        masked_positions: NDArray[np.int32],
        labels: NDArray[np.int32],
    ) -> None: ...
    def starts(self, start: int, count: int) -> list[int]: ...
