"""Rows: a pure function of the row number, pure tokenisations at 0 and 1, clear errors."""

import mmap
import os
import random
import threading
from dataclasses import fields

import numpy as np
import pytest
import torch

from mvbert.errors import InputError
from mvbert.text.batches import IGNORE_INDEX, Batch, Rows
from mvbert.text.corpus import Segmentation

FIELDS = tuple(field.name for field in fields(Batch))


class Vocab:
    pad, unk, cls, sep, mask = range(5)
    unread_ids = ()

    def __init__(self, size):
        self.size = size
        self.ids = {"[MASK]": self.mask}


def cut(ends, ids, size: int) -> Segmentation:
    return Segmentation(np.array(ends, np.uint32), np.array(ids, np.int32), Vocab(size))


def make(words: int, size: int, longest: int, seed: int) -> Segmentation:
    rng = random.Random(seed)
    ends, ids = [0], []
    for _ in range(words - 1):
        ids += [rng.randrange(5, size) for _ in range(rng.randint(1, longest))]
        ends.append(len(ids))
    return cut(ends, ids, size)


WORDS = 200
TEACHER, STUDENT = make(WORDS, 300, 2, 1), make(WORDS, 100, 5, 2)


@pytest.fixture(scope="module")
def stream():
    rng = random.Random(3)
    return np.array(
        [0 if rng.random() < 0.02 else rng.randrange(1, WORDS) for _ in range(40_000)], np.uint32
    )


@pytest.fixture(scope="module")
def rows(stream):
    return Rows(stream, teacher=TEACHER, student=STUDENT, T=48, seed=1)


def assert_same(a: Batch, b: Batch):
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def part(batch: Batch, start: int, end: int) -> Batch:
    return Batch(*(getattr(batch, name)[start:end] for name in FIELDS))


# ---- a row is a pure function of its number --------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 7, 0, 64])
def test_threads_do_not_change_rows(rows, threads):
    assert_same(rows.read(10, 1500, threads=threads), rows.read(10, 1500, threads=1))


def test_batch_split_and_order_do_not_change_rows(rows):
    whole = rows.read(rows.count - 50, 100)  # across an epoch's end
    for start in (90, 0, 37, 37):
        some = rows.read(rows.count - 50 + start, 10)
        assert_same(some, part(whole, start, start + 10))


def test_objects_and_threads_of_python_do_not_change_rows(rows, stream):
    other = Rows(stream, teacher=TEACHER, student=STUDENT, T=48, seed=1)
    results = {}

    def read(i):
        results[i] = other.read(300 * i, 300)

    workers = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i in range(4):
        assert_same(results[i], rows.read(300 * i, 300))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_reading_after_fork(rows):
    expected = rows.read(0, 1000, threads=2).input_ids.astype(np.int64).sum()
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        total = rows.read(0, 1000, threads=2).input_ids.astype(np.int64).sum()
        os.write(send, str(total).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert int(os.read(receive, 100)) == expected
    os.close(receive)
    os.close(send)


def test_seed_and_epoch_and_row_change_rows(rows, stream):
    other = Rows(stream, teacher=TEACHER, student=STUDENT, T=48, seed=2)
    batch = rows.read(0, 20)
    for different in (other.read(0, 20), rows.read(rows.count, 20), rows.read(20, 20)):
        assert not (batch.input_ids == different.input_ids).all(axis=1).any()


def test_seeds_that_share_half_their_bits_differ(stream):
    a, b = (Rows(stream, teacher=TEACHER, seed=seed).read(0, 4) for seed in (5, 5 + 2**32))
    assert (a.input_ids != b.input_ids).any()


# ---- the coin's ends -------------------------------------------------------------------------


def pure(stream, first: int, segmentation, room: int) -> list[int]:
    """[CLS] words [SEP] of one vocabulary, no masks, no pair, written again without the mixer."""
    pieces = []
    entry = first
    while len(pieces) < room:
        word = stream[entry % len(stream)]
        if word:
            pieces += segmentation.ids[
                segmentation.ends[word - 1] : segmentation.ends[word]
            ].tolist()
        elif pieces and pieces[-1] != Vocab.sep and len(pieces) < room - 1:
            pieces.append(Vocab.sep)
        entry += 1
    return [Vocab.cls, *pieces[:room], Vocab.sep]


@pytest.mark.parametrize("student_prob", [0.0, 1.0])
def test_zero_and_one_are_the_pure_tokenisations(stream, student_prob):
    options = {"T": 40, "mask_prob": 0.0, "pair_prob": 0.0, "seed": 4}
    mixed = Rows(stream, teacher=TEACHER, student=STUDENT, **options)
    ids = mixed.read(0, 50, student_prob=student_prob).input_ids
    segmentation, base = (STUDENT, TEACHER.vocab.size) if student_prob else (TEACHER, 0)
    for row, first in zip(ids, mixed._mixer.starts(0, 50), strict=True):
        assert (row - base).tolist() == pure(stream, first, segmentation, 38)
    # With that vocabulary alone, ids are its own and the same words come out.
    alone = Rows(stream, **{"student" if student_prob else "teacher": segmentation}, **options)
    for row, first in zip(alone.read(0, 50).input_ids, alone._mixer.starts(0, 50), strict=True):
        assert row.tolist() == pure(stream, first, segmentation, 38)


def test_student_prob_is_the_share_of_student_words(stream):
    ends = np.arange(WORDS)
    a = cut(ends, np.full(WORDS - 1, 5), 10)
    b = cut(ends, np.full(WORDS - 1, 5), 20)
    rows = Rows(stream, teacher=a, student=b, mask_prob=0.0)
    for p in (0.1, 0.5, 0.9):
        ids = rows.read(0, 2000, student_prob=p).input_ids
        share, slack = (ids >= 10).mean(), (np.log(2e9) / 2 / ids.size) ** 0.5
        assert abs(share - p) <= slack


def test_joint_ids_up_to_the_last_of_31_bits(stream):
    """The usual rows with the ids of both vocabularies moved as far up as int32 goes."""
    size, ids = 2**31 - 1 - STUDENT.vocab.size, TEACHER.ids
    up = size - TEACHER.vocab.size
    wide = cut(TEACHER.ends, ids + up, size)
    rows, usual = (
        Rows(stream, teacher=teacher, student=STUDENT, T=48, seed=1).read(0, 200)
        for teacher in (wide, TEACHER)
    )
    for name in ("token_type_ids", "masked_positions"):
        np.testing.assert_array_equal(getattr(rows, name), getattr(usual, name))
    known = usual.labels != IGNORE_INDEX
    np.testing.assert_array_equal(rows.labels[known], usual.labels[known] + up)
    masked = np.zeros(rows.input_ids.shape, bool)
    for row, positions in zip(masked, rows.masked_positions, strict=True):
        row[positions] = True
    # [CLS], [SEP] and what stands at masked places may be lower pieces of the large vocabulary.
    plain = ~masked & (usual.input_ids % TEACHER.vocab.size >= 5)
    np.testing.assert_array_equal(rows.input_ids[plain], usual.input_ids[plain] + up)
    drawn = rows.input_ids[masked]
    assert drawn.min() >= 0
    assert ((drawn > 2**20) & (drawn < up)).any(), "no piece drawn from the large vocabulary"
    assert rows.input_ids.max() >= size
    wider = cut(TEACHER.ends, ids, size + 1)
    with pytest.raises(InputError, match=r"together have more than 2\^31 - 1 pieces"):
        Rows(stream, teacher=wider, student=STUDENT)


# ---- shapes, buffers, description ------------------------------------------------------------


def test_shapes_and_types(rows):
    batch = rows.read(0, 3)
    M = rows.capacity
    shapes = {name: (getattr(batch, name).shape, getattr(batch, name).dtype) for name in FIELDS}
    assert shapes == {
        "input_ids": ((3, 48), np.int32),
        "token_type_ids": ((3, 48), np.uint8),
        "masked_positions": ((3, M), np.int32),
        "labels": ((3, M), np.int32),
    }
    assert M == 7  # round(0.15 * 48)
    assert rows.read(7, 0).input_ids.shape == (0, 48)


def test_nothing_masked(stream):
    batch = Rows(stream, teacher=TEACHER, mask_prob=0.0).read(0, 10)
    assert batch.labels.shape == (10, 0)
    assert not (batch.input_ids == Vocab.mask).any()


def test_out_is_written_and_returned(rows):
    out = Batch.empty(20, 48, rows.capacity)
    assert rows.read(5, 20, out=out) is out
    assert_same(out, rows.read(5, 20))


def test_nothing_outside_out_is_written(rows):
    M = rows.capacity
    around = [np.full((6, n), 77, d) for n, d in [(48, "i4"), (48, "u1"), (M, "i4"), (M, "i4")]]
    rows.read(5, 4, out=Batch(*(array[1:5] for array in around)))
    for array, name in zip(around, FIELDS, strict=True):
        assert (array[[0, 5]] == 77).all(), name
        np.testing.assert_array_equal(array[1:5], getattr(rows.read(5, 4), name))


def memories(size: int):
    """(kind, memory, its bytes now) of every kind of memory that a caller may own."""
    array = np.zeros(size, np.uint8)
    yield "numpy", array, lambda: array.tobytes()
    tensor = torch.zeros(size, dtype=torch.uint8).share_memory_()
    yield "torch", tensor, lambda: bytes(tensor.tolist())
    plain = bytearray(size)
    yield "bytearray", plain, lambda: bytes(plain)
    mapped = mmap.mmap(-1, size)
    yield "mmap", mapped, lambda: mapped[:]


def test_rows_are_written_into_memory_of_any_kind(rows):
    B, M = 20, rows.capacity
    expected = rows.read(5, B)
    order = (expected.input_ids, expected.masked_positions, expected.labels)
    end_to_end = b"".join(a.tobytes() for a in (*order, expected.token_type_ids))
    assert len(end_to_end) == Batch.size(B, 48, M)
    for kind, memory, written in memories(len(end_to_end)):
        rows.read(5, B, out=Batch.over(memory, B, 48, M))
        assert written() == end_to_end, kind


def test_another_process_reads_rows_from_shared_memory(rows):
    from multiprocessing.shared_memory import SharedMemory

    size = Batch.size(8, 48, rows.capacity)
    shared = SharedMemory(create=True, size=size)
    try:
        child = os.fork()
        if child == 0:
            rows.read(3, 8, out=Batch.over(shared.buf[:size], 8, 48, rows.capacity), threads=2)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert_same(Batch.over(bytearray(shared.buf[:size]), 8, 48, rows.capacity), rows.read(3, 8))
    finally:
        shared.close()
        shared.unlink()


def test_at_most_eight_bytes_a_piece(rows):
    batch = rows.read(0, 10)
    size = sum(array.nbytes for array in vars(batch).values())
    assert size == Batch.size(10, 48, rows.capacity) <= 8 * batch.input_ids.size


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (bytes(640), "read-only"),
        (bytearray(639), "needs 640 writable bytes"),
        (bytearray(641), "needs 640 writable bytes"),
        (memoryview(bytearray(641))[1:], "aligned"),
        (np.zeros(1280, np.uint8)[::2], "contiguous"),
        (torch.zeros(640, dtype=torch.uint8, device="meta"), "in this process"),
        ([0] * 640, "in this process"),
    ],
    ids=["read-only", "short", "long", "unaligned", "strided", "elsewhere", "list"],
)
def test_memory_that_cannot_hold_a_batch(memory, message):
    with pytest.raises(InputError, match=message):
        Batch.over(memory, 2, 48, 10)


def test_a_memory_map_is_read_in_place(tmp_path, rows, stream):
    stream.tofile(tmp_path / "train.u32")
    mapped = np.memmap(tmp_path / "train.u32", np.uint32, mode="r")
    other = Rows(mapped, teacher=TEACHER, student=STUDENT, T=48, seed=1)
    assert_same(other.read(0, 100), rows.read(0, 100))


def test_describe(rows, stream):
    told = rows.describe()
    marks = int((stream == 0).sum())
    lengths = {
        n: np.diff(s.ends, prepend=0) for n, s in [("teacher", TEACHER), ("student", STUDENT)]
    }
    mean = sum(lengths[n][stream].sum() for n in lengths) / 2 + marks
    assert told["words_per_row"] == int(46 * len(stream) / mean) == rows.stride
    assert told["rows_per_epoch"] == len(stream) // rows.stride == rows.count
    assert told["documents"] == marks
    assert told["words"] == len(stream) - marks
    for name in lengths:
        expected = lengths[name][stream].sum() / (len(stream) - marks)
        assert told["pieces_per_word"][name] == pytest.approx(expected, rel=1e-12)


def test_a_stream_of_one_row(stream):
    rows = Rows(stream[:100], teacher=TEACHER, T=128)
    assert rows.count == 1
    batch = rows.read(0, 3)
    assert (batch.labels != IGNORE_INDEX).any()


# ---- bad input -------------------------------------------------------------------------------

BAD = {
    "no segmentation": ({"teacher": None, "student": None}, "at least one|segmentation"),
    "T too small": ({"T": 7}, r"T must lie in \[8, 65535\], got 7"),
    "T too large": ({"T": 65536}, "got 65536"),
    "mask_prob": ({"mask_prob": 0.6}, r"mask_prob must lie in \[0, 0.5\], got 0.6"),
    "negative mask_prob": ({"mask_prob": -0.1}, "mask_prob"),
    "NaN": ({"pair_prob": float("nan")}, r"pair_prob must lie in \[0, 1\], got nan"),
    "student_prob": ({"student_prob": 1.5}, "student_prob"),
    "seed": ({"seed": 2**64}, r"seed must lie in \[0, 2\^64\)"),
    "threads": ({"threads": -1}, "threads"),
    "two lexicons": ({"student": make(WORDS + 1, 100, 5, 2)}, "200 and 201 words"),
    "another lexicon": (
        {"teacher": make(WORDS - 10, 300, 2, 1), "student": make(WORDS - 10, 100, 5, 2)},
        "entry [0-9]+ is word [0-9]+, the segmentation has 190 words",
    ),
    "another vocabulary": (
        {"teacher": cut(TEACHER.ends, TEACHER.ids + 5, 300)},
        r"teacher ids must lie in \[0, 300\), got 30",
    ),
    "a word without pieces": (
        {"student": cut([0, 2, 2], [7, 8], 10), "teacher": None},
        "no pieces for word 2",
    ),
    "ends that fall": (
        {"student": cut([0, 2, 1], [7, 8], 10), "teacher": None},
        "ends word 2 at piece 1",
    ),
    "ends behind the ids": (
        {"student": cut([0, 2, 5], [7, 8], 10), "teacher": None},
        "ends word 2 at piece 5",
    ),
    "only special pieces": (
        {"student": cut([0, 1], [1], 5), "teacher": None},
        "only special pieces",
    ),
}


@pytest.mark.parametrize("case", BAD, ids=lambda name: name.replace(" ", "-"))
def test_bad_arguments(stream, case):
    changed, message = BAD[case]
    with pytest.raises(InputError, match=message):
        Rows(stream, **{"teacher": TEACHER, "student": STUDENT, **changed})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros(500, np.uint32), "has no words"),
        (np.ones(50, np.uint32), "has 50 words, one row of T = 128 needs"),
        (np.zeros(0, np.uint32), "has no words"),
        (np.ones(500, np.int64), "uint32"),
        (np.ones((50, 50), np.uint32), "one-dimensional"),
    ],
    ids=["only-marks", "short", "empty", "int64", "two-dimensional"],
)
def test_bad_streams(bad, message):
    with pytest.raises(InputError, match=message):
        Rows(bad, teacher=TEACHER)


def test_the_first_wrong_entry_is_named_for_any_thread_count(stream):
    long = np.tile(stream, 80)  # several shares of 2^20 entries
    long[[1_500_000, 2_900_000]] = WORDS + 3
    for threads in (1, 3):
        with pytest.raises(InputError, match="entry 1500000 is word 203"):
            Rows(long, teacher=TEACHER, threads=threads)


def test_bad_reads(rows):
    for start, count in [(-1, 1), (0, -1), (2**64, 1), (2**64 - 1, 2)]:
        with pytest.raises(InputError, match="numbered from 0"):
            rows.read(start, count)
    with pytest.raises(InputError, match="student_prob"):
        rows.read(0, 1, student_prob=-0.1)
    good = Batch.empty(4, 48, rows.capacity)
    with pytest.raises(InputError, match=r"out\.input_ids"):
        rows.read(0, 5, out=good)
    tensors = Batch(*map(torch.from_numpy, vars(good).values()))
    with pytest.raises(InputError, match=r"out\.input_ids must be a numpy array, got Tensor"):
        rows.read(0, 4, out=tensors)
    frozen = Batch.empty(4, 48, rows.capacity)
    frozen.labels.flags.writeable = False
    with pytest.raises(InputError, match=r"out\.labels must be a writable"):
        rows.read(0, 4, out=frozen)
    strided = Batch(
        good.input_ids, np.empty((4, 96), np.uint8)[:, ::2], *list(vars(good).values())[2:]
    )
    with pytest.raises(InputError, match=r"out\.token_type_ids"):
        rows.read(0, 4, out=strided)
