"""The C++ mixer against the plain definition of a row, and what every row must be."""

import random
from dataclasses import dataclass

import numpy as np
import pytest

from mvbert.text import philox, row_reference
from mvbert.text.batches import IGNORE_INDEX, Rows
from mvbert.text.corpus import Segmentation

FIELDS = ("input_ids", "token_type_ids", "masked_positions", "labels")


@dataclass(frozen=True)
class FakeVocab:
    size: int
    pad: int = 0
    unk: int = 1
    cls: int = 2
    sep: int = 3
    mask: int = 4
    unread_ids: tuple[int, ...] = ()

    @property
    def ids(self) -> dict[str, int]:
        return {"[MASK]": self.mask}

    @property
    def special(self) -> set[int]:
        return {self.pad, self.unk, self.cls, self.sep, self.mask, *self.unread_ids}


def segmentation(rng: random.Random, words: int, vocab: FakeVocab, longest: int):
    """Random pieces for every word, mostly few, never a special one but [UNK]."""
    ends, ids = [0], []
    pieces = [i for i in range(vocab.size) if i not in vocab.special - {vocab.unk}]
    for _ in range(words - 1):
        length = 1 if rng.random() < 0.5 else rng.randint(1, longest)
        ids += rng.choices(pieces, k=length)
        ends.append(len(ids))
    return Segmentation(np.array(ends, np.uint32), np.array(ids, np.int32), vocab)


def make_stream(rng: random.Random, length: int, words: int, mark_share: float) -> np.ndarray:
    stream = [0 if rng.random() < mark_share else rng.randrange(1, words) for _ in range(length)]
    stream[rng.randrange(length)] = 1
    return np.array(stream, np.uint32)


# Special ids need not be first; a piece that no text is cut into replaces no masked one.
SCATTERED = FakeVocab(size=40, pad=39, unk=0, cls=7, sep=8, mask=20, unread_ids=(11,))

# Each case: what it is there for, T, words, longest word, share of marks, mask, pair, student.
CASES = {
    "ordinary": (128, 500, 3, 0.02, 0.15, 0.5, 0.5),
    "smallest row": (8, 50, 3, 0.05, 0.15, 1.0, 0.5),
    "odd row, many marks": (37, 50, 5, 0.4, 0.3, 0.7, 0.5),
    "long words, skipped for the budget": (32, 80, 40, 0.02, 0.15, 0.5, 0.5),
    "words longer than a row": (16, 30, 150, 0.1, 0.5, 1.0, 0.3),
    "nothing masked": (64, 100, 3, 0.02, 0.0, 0.5, 0.5),
    "half masked": (64, 100, 2, 0.02, 0.5, 0.5, 0.5),
    "never pairs, teacher only": (64, 100, 3, 0.02, 0.15, 0.0, 0.0),
    "always pairs, student only": (64, 100, 3, 0.02, 0.15, 1.0, 1.0),
    "more than one group of numbers": (512, 400, 3, 0.01, 0.25, 0.5, 0.9),
    "nearly only marks": (12, 20, 2, 0.95, 0.2, 1.0, 0.5),
}


@pytest.mark.parametrize("sides", ["both", "teacher", "student"])
@pytest.mark.parametrize("case", CASES, ids=lambda name: name.replace(" ", "-"))
def test_equals_the_plain_definition(case, sides):
    T, words, longest, marks, mask_prob, pair_prob, student_prob = CASES[case]
    rng = random.Random(f"{case} {sides}")
    for trial in range(4):
        teacher = segmentation(rng, words, FakeVocab(60 + trial), longest)
        student = segmentation(rng, words, SCATTERED, longest + 1)
        stream = make_stream(rng, rng.choice([T, 3 * T + 1, 20 * T]), words, marks)
        seed = rng.getrandbits(64)
        given = {
            "teacher": teacher if sides != "student" else None,
            "student": student if sides != "teacher" else None,
        }
        options = {"T": T, "mask_prob": mask_prob, "pair_prob": pair_prob}
        rows = Rows(stream, **given, **options, student_prob=student_prob, seed=seed)
        for start, count in [(0, 5), (rng.randrange(5 * rows.count), 3), (2**64 - 2, 2)]:
            batch = rows.read(start, count)
            for i in range(count):
                expected = row_reference.row_reference(
                    stream,
                    start + i,
                    **given,
                    **options,
                    student_prob=student_prob,
                    stride=rows.stride,
                    seed=seed,
                )
                for name, values in zip(FIELDS, expected, strict=True):
                    assert getattr(batch, name)[i].tolist() == values, (name, trial, start + i)


# ---- a world large enough for statistics -----------------------------------------------------

TEACHER_SIZE, STUDENT_SIZE = 90, 40


@pytest.fixture(scope="module")
def world():
    rng = random.Random(5)
    teacher = segmentation(rng, 300, FakeVocab(TEACHER_SIZE), 3)
    student = segmentation(rng, 300, SCATTERED, 5)
    return make_stream(rng, 30_000, 300, 0.03), teacher, student


@pytest.fixture(scope="module")
def rows(world):
    stream, teacher, student = world
    return Rows(stream, teacher=teacher, student=student, T=64, seed=11)


@pytest.fixture(scope="module")
def batch(rows):
    return rows.read(0, 8000)


@pytest.fixture(scope="module")
def unmasked(batch):
    ids = batch.input_ids.copy()
    row, slot = np.nonzero(batch.labels != IGNORE_INDEX)
    ids[row, batch.masked_positions[row, slot]] = batch.labels[row, slot]
    return ids


def assert_binomial(hits: int, trials: int, p: float):
    """Fails with a chance below 1e-9 if hits ~ Binomial(trials, p): Hoeffding's exact bound."""
    slack = (trials * np.log(2e9) / 2) ** 0.5
    assert abs(hits - trials * p) <= slack, (hits, trials, p)


SEPS = [3, TEACHER_SIZE + SCATTERED.sep]
CLSS = [2, TEACHER_SIZE + SCATTERED.cls]
MASKS = [4, TEACHER_SIZE + SCATTERED.mask]


def test_frame_of_a_row(batch, unmasked):
    assert np.isin(unmasked[:, 0], CLSS).all()
    assert np.isin(unmasked[:, -1], SEPS).all()
    assert not np.isin(unmasked[:, 1:], CLSS).any()
    assert not np.isin(unmasked, MASKS).any()
    sep = np.isin(unmasked, SEPS)
    assert not (sep[:, 1:] & sep[:, :-1]).any(), "two [SEP] in a row"
    assert not sep[:, 1].any(), "[SEP] right after [CLS]"


def test_pairs(batch, unmasked):
    types = batch.token_type_ids.astype(int)
    T = types.shape[1]
    assert (np.diff(types, axis=1) >= 0).all()
    pair = types[:, -1] == 1
    first = types[pair].argmax(axis=1)
    assert np.isin(unmasked[pair, first - 1], SEPS).all(), "type 1 starts only after a [SEP]"
    place = first - 1
    assert ((4 * place >= T) & (4 * place < 3 * T)).all()
    assert_binomial(int(pair.sum()), len(pair), 0.5)
    assert len(set(place.tolist())) == T // 2


def test_coin_of_words_and_special_pieces(unmasked):
    for ids in (CLSS, SEPS):
        teacher, student = ((unmasked == i).sum() for i in ids)
        assert_binomial(int(student), int(student + teacher), 0.5)


def test_budget_and_capacity(rows, batch, unmasked):
    used = (batch.labels != IGNORE_INDEX).sum(axis=1)
    words = (~np.isin(unmasked, SEPS + CLSS)).sum(axis=1)
    budget = np.array([row_reference.mask_budget(int(n), rows.T, 0.15) for n in words])
    assert (used <= budget).all()
    assert (used == budget).mean() > 0.95  # short words are there nearly always
    assert rows.capacity == round(0.15 * 64)
    unused = np.arange(rows.capacity) >= used[:, None]
    assert (batch.masked_positions[unused] == 0).all()
    assert (batch.labels[unused] == IGNORE_INDEX).all()
    assert (np.diff(batch.masked_positions, axis=1)[~unused[:, 1:]] > 0).all()


def test_eighty_ten_ten(batch, unmasked):
    row, slot = np.nonzero(batch.labels != IGNORE_INDEX)
    labels = batch.labels[row, slot]
    now = batch.input_ids[row, batch.masked_positions[row, slot]]
    student = labels >= TEACHER_SIZE
    assert ((now >= TEACHER_SIZE) == student).all(), "a masked piece keeps its vocabulary"
    assert not np.isin(labels, SEPS + CLSS + MASKS).any()
    masked = np.isin(now, MASKS)
    assert_binomial(int(masked.sum()), len(labels), 0.8)
    for side, size in ((~student, TEACHER_SIZE), (student, STUDENT_SIZE)):
        n, ordinary = int(side.sum()), size - 5
        # Drawn pieces are sometimes the old one.
        assert_binomial(int((now == labels)[side].sum()), n, 0.1 + 0.1 / ordinary)
        changed = now[side & ~masked & (now != labels)]
        counts = np.bincount(changed)
        special = SCATTERED.special if size == STUDENT_SIZE else FakeVocab(size).special
        base = TEACHER_SIZE if size == STUDENT_SIZE else 0
        assert (np.flatnonzero(counts) - base).tolist() == sorted(set(range(size)) - special)
        for count in counts[counts > 0]:
            assert_binomial(int(count), n, 0.1 / ordinary)


def test_whole_words_are_masked():
    """Every word has three pieces, so what is masked comes in threes (but for a cut last word)."""
    vocab = FakeVocab(500)
    words = 100
    ids = np.arange(5, 5 + 3 * (words - 1), dtype=np.int32)
    ends = np.array([0, *range(3, 3 * words, 3)], np.uint32)
    teacher = Segmentation(ends, ids, vocab)
    rng = random.Random(2)
    stream = make_stream(rng, 5000, words, 0.0)
    rows = Rows(stream, teacher=teacher, T=128, pair_prob=0.0, seed=3)
    batch = rows.read(0, 500)
    for labels in batch.labels:
        labels = labels[labels != IGNORE_INDEX] - 5
        first = labels[labels % 3 == 0]
        assert len(first) > 0
        whole = [i for f in first for i in (f, f + 1, f + 2)]
        assert labels.tolist() in (whole, whole[:-1], whole[:-2])


def test_every_word_is_equally_likely_to_be_masked():
    """One piece a word, no marks: all places have the same chance."""
    words = 20
    teacher = Segmentation(
        np.arange(words, dtype=np.uint32), np.arange(5, 4 + words, dtype=np.int32), FakeVocab(50)
    )
    stream = make_stream(random.Random(3), 2000, words, 0.0)
    rows = Rows(stream, teacher=teacher, T=32, mask_prob=0.15, pair_prob=0.0)
    batch = rows.read(0, 20_000)
    budget = row_reference.mask_budget(30, 32, 0.15)
    assert ((batch.labels != IGNORE_INDEX).sum(axis=1) == budget).all()
    places = np.bincount(batch.masked_positions[:, :budget].ravel(), minlength=32)
    assert places[0] == 0
    assert places[31] == 0
    for place in places[1:31]:
        assert_binomial(int(place), 20_000, budget / 30)


def test_an_epoch_is_a_permutation_of_row_starts(rows):
    for epoch in (0, 1, 5):
        starts = np.array(rows._mixer.starts(epoch * rows.count, rows.count))
        offsets = set((starts % rows.stride).tolist())
        assert len(offsets) == 1
        assert sorted(starts // rows.stride) == list(range(rows.count))
    assert rows._mixer.starts(0, rows.count) != rows._mixer.starts(rows.count, rows.count)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 17, 64, 65])
def test_order_is_uniform_even_for_few_rows(count):
    """Which row comes first is uniform over epochs."""
    first = [philox.permuted(0, count, epoch, seed=9) for epoch in range(600)]
    for row in range(count):
        assert_binomial(first.count(row), 600, 1 / count)
    assert sorted(philox.permuted(i, count, 4, 9) for i in range(count)) == list(range(count))


def test_a_binomial_bound_that_can_fail():
    with pytest.raises(AssertionError):
        assert_binomial(5400, 10_000, 0.5)
