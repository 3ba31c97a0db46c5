"""The rows of both stages, for training and evaluation."""

from __future__ import annotations

import numpy as np

from mvbert.config import RowConfig
from mvbert.errors import InputError
from mvbert.text.batches import Rows
from mvbert.text.corpus import Corpus
from mvbert.text.lexicon import Segmentation

HELDOUT_SEED = 1 << 40  # held-out rows never share a key with training rows


def stage_rows(
    corpus: Corpus,
    teacher: Segmentation | None,
    student: Segmentation,
    row: RowConfig,
    seed: int,
    student_prob: float,
) -> tuple[Rows, Rows]:
    """Training rows and held-out rows."""
    rows = _rows(corpus.train, teacher, student, row, seed, student_prob)
    return rows, _heldout(corpus, teacher, student, row, student_prob)


def heldout_rows(corpus: Corpus, cut: Segmentation, row: RowConfig) -> Rows:
    """The held-out rows of Stage II, the same for every student with a vocabulary."""
    return _heldout(corpus, None, cut, row, 1.0)


def _heldout(
    corpus: Corpus,
    teacher: Segmentation | None,
    student: Segmentation,
    row: RowConfig,
    student_prob: float,
) -> Rows:
    try:
        return _rows(corpus.heldout, teacher, student, row, HELDOUT_SEED, student_prob)
    except InputError as error:
        raise InputError(f"held-out text: {error}") from None


def student_rows(stream: np.ndarray, student: Segmentation, row: RowConfig, seed: int) -> Rows:
    """The rows of Stage II."""
    return _rows(stream, None, student, row, seed, 1.0)


def _rows(
    stream: np.ndarray,
    teacher: Segmentation | None,
    student: Segmentation,
    row: RowConfig,
    seed: int,
    student_prob: float,
) -> Rows:
    return Rows(
        stream,
        teacher=teacher,
        student=student,
        T=row.length,
        mask_prob=row.mask_prob,
        pair_prob=row.pair_prob,
        student_prob=student_prob,
        seed=seed,
    )
