"""Training rows as numpy arrays: word stream and segmentations in, batches out."""

from __future__ import annotations

import operator
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mvbert.config import RowConfig, Stage1Config
from mvbert.cores import cores
from mvbert.errors import InputError
from mvbert.text import row_reference
from mvbert.text.row_reference import IGNORE_INDEX

if TYPE_CHECKING:
    from mvbert.text.lexicon import Segmentation

__all__ = ["IGNORE_INDEX", "Batch", "Rows"]

T_RANGE = (8, 65535)


@dataclass(frozen=True)
class Batch:
    """B rows of T pieces, at most M of a row masked.

    4 bytes per piece for its id, 1 for its type, and 8 per masked piece: 5 + 8 M / T bytes per
    piece go to a device, 6.2 for T = 128 and a mask_prob of 0.15. The embedding's backward needs no
    sort order from here: its kernel sums frequent ids in registers, and torch sorts on the device
    where the order of additions must be fixed.

    Attributes:
        input_ids: [B, T] int32, joint ids: below teacher_size a teacher piece, teacher_size + i
            student piece i; with one vocabulary its own ids.
        token_type_ids: [B, T] uint8, 1 after the drawn [SEP] of a pair.
        masked_positions: [B, M] int32, positions in the row, ascending; unused capacity 0.
        labels: [B, M] int32, joint ids; unused capacity IGNORE_INDEX.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    masked_positions: np.ndarray
    labels: np.ndarray

    @staticmethod
    def size(B: int, T: int, M: int) -> int:
        """Bytes of a batch."""
        return B * (5 * T + 8 * M)

    @staticmethod
    def empty(B: int, T: int, M: int) -> Batch:
        """Uninitialised arrays for `Rows.read(out=)`."""
        return Batch.over(np.empty(Batch.size(B, T, M), np.uint8), B, T, M)

    @staticmethod
    def over(buffer: Any, B: int, T: int, M: int) -> Batch:
        """Arrays in one buffer of the caller, for `Rows.read(out=)`.

        So a batch can be copied to a device at once, or shared with another process. The order is
        input_ids, masked_positions, labels, token_type_ids.

        Args:
            buffer: `Batch.size(B, T, M)` writable bytes, aligned to 4: a torch tensor on the CPU
                (pinned or shared), a numpy array, `SharedMemory.buf`, an `mmap`, a bytearray.

        Raises:
            InputError: of another size, read-only, not contiguous, not aligned, or no memory of
                this process.
        """
        size = Batch.size(B, T, M)
        torch = sys.modules.get("torch")
        try:
            if torch is not None and isinstance(buffer, torch.Tensor):
                buffer = buffer.numpy()  # the same memory
            raw = np.frombuffer(buffer, np.uint8)
        except (TypeError, ValueError, BufferError, RuntimeError) as error:
            raise InputError(f"a batch needs contiguous bytes in this process: {error}") from None
        if raw.size != size or not raw.flags.writeable or raw.ctypes.data % 4:
            raise InputError(
                f"a batch of B = {B}, T = {T}, M = {M} needs {size} writable bytes aligned to 4, "
                f"got {raw.size} bytes, {'writable' if raw.flags.writeable else 'read-only'}, "
                f"at address {raw.ctypes.data:#x}"
            )
        ids, positions, labels, types = np.split(raw, np.cumsum([4 * B * T, 4 * B * M, 4 * B * M]))
        return Batch(
            input_ids=ids.view(np.int32).reshape(B, T),
            token_type_ids=types.reshape(B, T),
            masked_positions=positions.view(np.int32).reshape(B, M),
            labels=labels.view(np.int32).reshape(B, M),
        )


class Rows:
    """The rows of a word stream, numbered through all epochs.

    Row n is a pure function of the seed, n and the arguments (`row_reference.row_reference` is that
    function in plain Python): there is no state to save, any row can be made again, and neither
    threads nor the way rows are read in batches change it. An object may be read from many threads.

    Args:
        stream: [L] uint32 word ids, 0 for the end of a document; may be a memory map.
        teacher, student: `Segmentation`s of the stream's lexicon, or None for one of the two. With
            one there is no coin, and ids are its vocabulary's own.
        T: pieces per row, 8 to 65535.
        mask_prob: share of a row's pieces that is masked, 0 (nothing) to 0.5.
        pair_prob: share of rows with a second [SEP] and token type 1 behind it.
        student_prob: probability that a word is tokenized with the student vocabulary. Here it sets
            the distance between row starts, so that an epoch reads each word about once; it is also
            the default of `read`.
        seed: 0 to 2^64 - 1.
        threads: for `read`, and for the scan of the stream here; 0 for all available cores.

    Attributes:
        count: R, rows in an epoch.
        capacity: M, the maximum number of masked pieces per row.
        stride: S, words between row starts.
    """

    def __init__(
        self,
        stream: np.ndarray,
        *,
        teacher: Segmentation | None = None,
        student: Segmentation | None = None,
        T: int = RowConfig.length,
        mask_prob: float = RowConfig.mask_prob,
        pair_prob: float = RowConfig.pair_prob,
        student_prob: float = Stage1Config.student_prob,
        seed: int = 0,
        threads: int = 0,
    ):
        from mvbert import _core

        if teacher is None and student is None:
            raise InputError("rows need a teacher segmentation, a student segmentation or both")
        if not T_RANGE[0] <= T <= T_RANGE[1]:
            raise InputError(f"T must lie in [{T_RANGE[0]}, {T_RANGE[1]}], got {T}")
        _check_probability("mask_prob", mask_prob, 0.5)
        _check_probability("pair_prob", pair_prob)
        _check_probability("student_prob", student_prob)
        if not 0 <= seed < 2**64:
            raise InputError(f"seed must lie in [0, 2^64), got {seed}")
        self._threads = cores(threads)
        stream = np.asarray(stream)  # a memory map stays one, without its class
        if stream.ndim != 1 or stream.dtype != np.uint32:
            raise InputError(
                "a word stream must be a one-dimensional uint32 array, got "
                f"{stream.dtype} {list(stream.shape)}"
            )
        stream = np.ascontiguousarray(stream)
        try:
            masked = mask_prob > 0
            table = _core.PieceTable(_segments(teacher, masked), _segments(student, masked))
            marks, first, second = table.measure(stream, self._threads)
        except ValueError as error:
            raise InputError(str(error)) from None
        words = len(stream)
        if marks == words:
            raise InputError("the word stream has no words")
        mean: float
        pieces = {"teacher": first, "student": second if teacher is not None else first}
        if teacher is None:
            mean = pieces["student"]
            del pieces["teacher"]
        elif student is None:
            mean = pieces["teacher"]
            del pieces["student"]
        else:
            mean = student_prob * pieces["student"] + (1 - student_prob) * pieces["teacher"]

        self.T = T
        self.capacity = row_reference.capacity(T, mask_prob)
        self.stride = row_reference.row_stride(words, mean, T)
        self.count = words // self.stride
        if self.count == 0:
            raise InputError(
                f"the word stream has {words} words, one row of T = {T} needs {self.stride}: "
                "give more text or a smaller T"
            )
        self._settings = {
            "mask_prob": mask_prob,
            "pair_prob": pair_prob,
            "student_prob": student_prob,
            "seed": seed,
        }
        self._totals = {
            "words": words - marks,
            "documents": marks,
            "pieces_per_word": {
                name: (total - marks) / (words - marks) for name, total in pieces.items()
            },
        }
        self._mixer = _core.Mixer(
            table,
            stream,
            seed=seed,
            T=T,
            stride=self.stride,
            pair_threshold=row_reference.threshold(pair_prob),
            capacity=self.capacity,
            budgets=[
                row_reference.mask_budget(n, T, mask_prob) if mask_prob > 0 else 0
                for n in range(T - 1)
            ],
        )

    def read(
        self,
        start: int,
        count: int,
        *,
        student_prob: float | None = None,
        threads: int | None = None,
        out: Batch | None = None,
    ) -> Batch:
        """Rows [start, start + count).

        Args:
            start: global number of the first row: epoch = number // R, position = number % R.
            count: B; 0 is legal.
            student_prob: probability that a word is tokenized with the student vocabulary; 0 and 1
                give pure tokenisations. None: the constructor's.
            threads: 0 for all available cores; None: the constructor's. Rows do not depend on it.
            out: where to write (`Batch.over` makes it of any memory); None for new arrays.
                Returned.
        """
        start, count = operator.index(start), operator.index(count)
        if start < 0 or count < 0 or start + count > 2**64:
            raise InputError(
                f"rows are numbered from 0 to 2^64 - 1, got start {start} and count {count}"
            )
        if student_prob is None:
            student_prob = self._settings["student_prob"]
        _check_probability("student_prob", student_prob)
        threads = self._threads if threads is None else cores(threads)
        if out is None:
            out = Batch.empty(count, self.T, self.capacity)
        else:
            _check_out("input_ids", out.input_ids, (count, self.T), np.int32)
            _check_out("token_type_ids", out.token_type_ids, (count, self.T), np.uint8)
            _check_out("masked_positions", out.masked_positions, (count, self.capacity), np.int32)
            _check_out("labels", out.labels, (count, self.capacity), np.int32)
        self._mixer.read(
            start,
            count,
            row_reference.threshold(student_prob),
            threads,
            out.input_ids,
            out.token_type_ids,
            out.masked_positions,
            out.labels,
        )
        return out

    def describe(self) -> dict:
        """Settings and statistics, for JSON."""
        return {
            "rows_per_epoch": self.count,
            "T": self.T,
            "masked_capacity": self.capacity,
            "words_per_row": self.stride,
            **self._totals,
            **self._settings,
        }


# ---- checks ----------------------------------------------------------------------------------


def _check_probability(name: str, value: float, most: float = 1.0) -> None:
    if not 0 <= value <= most:
        raise InputError(f"{name} must lie in [0, {most:g}], got {value}")


def _check_out(name: str, array: np.ndarray, shape: tuple[int, int], dtype: type) -> None:
    if not isinstance(array, np.ndarray):
        raise InputError(f"out.{name} must be a numpy array, got {type(array).__name__}")
    good = array.shape == shape and array.dtype == dtype
    if not good or not array.flags.carray:  # writable, aligned, C-contiguous
        raise InputError(
            f"out.{name} must be a writable aligned C-contiguous {np.dtype(dtype)} array "
            f"{list(shape)}, got {array.dtype} {list(array.shape)}"
        )


def _segments(segmentation: Segmentation | None, masked: bool) -> tuple[Any, ...] | None:
    """Converts a `Segmentation` to the tuple for `_core.PieceTable`; [MASK] may be missing."""
    if segmentation is None:
        return None
    vocab = segmentation.vocab
    mask = vocab.mask if masked or "[MASK]" in vocab.ids else vocab.unk
    return (
        np.ascontiguousarray(segmentation.ends, np.uint32),
        np.ascontiguousarray(segmentation.ids, np.int32),
        vocab.size,
        vocab.cls,
        vocab.sep,
        mask,
        [vocab.cls, vocab.sep, mask, vocab.unk, vocab.pad, *vocab.unread_ids],
    )
