"""Types of the C++ core; what each name means stands in the header that declares it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__version__: str
source_hash: str

# ---- mixer -----------------------------------------------------------------------------------

# ends u32 [W], ids i32, size, cls, sep, mask, special ids
Segments = tuple[NDArray[np.uint32], NDArray[np.int32], int, int, int, int, list[int]]

def philox4x32(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...
def philox_blocks(
    first: Sequence[int], rest: Sequence[int], key: Sequence[int]
) -> list[tuple[str, list[int]]]: ...

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
