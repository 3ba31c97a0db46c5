"""Runs one stage in its run folder: checks the folder, trains, reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mvbert.config import RowConfig, Stage1Config, Stage2Config, TrainConfig
from mvbert.errors import InputError
from mvbert.files import Json, sha256_file
from mvbert.model import huggingface
from mvbert.model.weights import weights_id
from mvbert.progress import Progress
from mvbert.text.corpus import Corpus
from mvbert.text.vocab import Vocab
from mvbert.toml import to_dict
from mvbert.training import checkpoint
from mvbert.training.device import Choice, Device
from mvbert.training.machine import pass_products, set_up
from mvbert.training.ranks import join_ranks
from mvbert.training.stages import Stage1, Stage2, load_stage1
from mvbert.training.task import Task
from mvbert.training.train import RunReport, finished, train


def checked_corpus(folder: Path) -> Corpus:
    """Opens a corpus after rank 0 has verified its checksums."""

    def check() -> None:
        Corpus.open(folder, verify="sha256")

    join_ranks().first(check)
    return Corpus.open(folder)


def load_student_vocab(vocab_file: Path, corpus: Corpus, teacher: Vocab) -> Vocab:
    """The student's vocabulary, with the corpus's normaliser and the teacher's added pieces.

    Raises:
        InputError: not a vocabulary, or its files state another normaliser.
    """
    vocab = Vocab.load_for(vocab_file, corpus.lowercase, corpus.strip_accents)
    corpus.check_casing(vocab, "the student's vocabulary")
    return vocab.with_added_of(teacher)


def run_stage1(
    config: Stage1Config,
    row: RowConfig,
    corpus: Corpus,
    teacher: Path,
    vocab_file: Path,
    out: Path,
    *,
    deadline: float | None = None,
    dtype: Choice | None = None,
) -> RunReport:
    """Runs Stage I in the run folder `out`; returns its report.

    Args:
        deadline: see mvbert.training.train.train.
        dtype: the job's decision for `dtype = auto`, see decide_for_job.
    """
    progress = Progress("stage 1")
    config = config.counted(row.length)
    shape, teacher_vocab = huggingface.read_shape(teacher, cased=config.cased)
    vocab = load_student_vocab(vocab_file, corpus, teacher_vocab)

    def describe() -> dict[str, Json]:
        return {
            "stage": 1,
            "corpus": corpus_id(corpus.folder),
            "teacher": weights_id(teacher),
            "teacher_vocab": teacher_vocab.sha256,
            "teacher_shape": to_dict(shape),
            "student_vocab": vocab.sha256,
            "row": to_dict(row),
            "train": config.described(),
        }

    def task(device: Device) -> Task:
        return Stage1(config, row, corpus, teacher, vocab, progress)

    return _run(task, describe, config, row, teacher, out, progress, deadline, dtype)


def run_stage2(
    config: Stage2Config,
    row: RowConfig,
    corpus: Corpus,
    stage1: Path,
    out: Path,
    title: str = "stage 2",
    *,
    deadline: float | None = None,
    dtype: Choice | None = None,
) -> RunReport:
    """Runs Stage II in the run folder `out`, from a result of Stage I; returns its report.

    Args:
        deadline, dtype: as for run_stage1.
    """
    progress = Progress(title)
    config = config.counted(row.length)

    def describe() -> dict[str, Json]:
        start: dict[str, Json] = {}
        if config.continues:
            start["start"] = weights_id(huggingface.find_model(config.start, "start"))
        return {
            "stage": 2,
            "corpus": corpus_id(corpus.folder),
            "stage1": stage1_id(stage1),
            **start,
            "row": to_dict(row),
            "train": config.described(),
        }

    def task(device: Device) -> Task:
        return Stage2(config, row, corpus, load_stage1(stage1), device, progress)

    return _run(task, describe, config, row, stage1, out, progress, deadline, dtype)


def _run(
    make_task: Callable[[Device], Task],
    describe: Callable[[], dict[str, Json]],
    config: TrainConfig,
    row: RowConfig,
    teacher: Path,
    out: Path,
    progress: Progress,
    deadline: float | None,
    dtype: Choice | None,
) -> RunReport:
    """Trains, unless the run folder already holds the complete result."""
    ranks = join_ranks()
    description = ranks.first(describe)

    def look() -> dict[str, Any] | None:
        report = finished(out, description, config, row)
        return None if report is None else asdict(report)

    if (values := ranks.first(look)) is not None:
        progress.note(f"{out} is complete")
        return RunReport(**values)
    products = pass_products(config, row, huggingface.read_model_config(teacher))
    device = set_up(config, out, products, dtype)
    return train(make_task(device), config, device, out, description, progress, deadline)


def corpus_id(folder: Path) -> str:
    """SHA-256 of a corpus's manifest, which covers all its files."""
    return sha256_file(folder / "manifest.json")


def stage1_id(folder: Path) -> str:
    """SHA-256 of a Stage I result's manifest, after checking the files against it."""
    problem = checkpoint.check_manifest(folder)
    if problem is not None:
        raise InputError(f"not a complete result of Stage I: {problem}")
    return sha256_file(folder / checkpoint.MANIFEST)
