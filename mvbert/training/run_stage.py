"""One stage in its run folder: described, refused where it is another run, trained, reported."""

from __future__ import annotations

from pathlib import Path

from mvbert.config import RowConfig, Stage1Config, Stage2Config, to_dict
from mvbert.errors import InputError
from mvbert.files import Json, sha256_file
from mvbert.model import huggingface
from mvbert.progress import Progress
from mvbert.text.corpus import Corpus
from mvbert.text.vocab import Vocab
from mvbert.training import checkpoint
from mvbert.training.ranks import join_ranks
from mvbert.training.stages import Stage1, Stage2
from mvbert.training.train import finished, train


def checked_corpus(folder: Path) -> Corpus:
    """A corpus of which rank 0 has compared every byte with the manifest."""

    def check() -> None:
        Corpus.open(folder, verify="sha256")

    join_ranks().first(check)
    return Corpus.open(folder)


def run_stage1(
    config: Stage1Config,
    row: RowConfig,
    corpus: Corpus,
    teacher: Path,
    vocab_file: Path,
    out: Path,
) -> dict[str, Json]:
    """Stage I in the run folder `out`; returns its report (see mvbert.training.train.train)."""
    progress = Progress("stage 1")
    config = config.counted(row.length)
    vocab = Vocab.load(vocab_file, lowercase=corpus.lowercase)

    def describe() -> dict[str, Json]:
        return {
            "stage": 1,
            "corpus": corpus_id(corpus.folder),
            "teacher": huggingface.weights_id(teacher),
            "teacher_vocab": Vocab.load(teacher).sha256,
            "teacher_shape": to_dict(huggingface.read_model_config(teacher)),
            "student_vocab": vocab.sha256,
            "row": to_dict(row),
            "train": config.described(),
        }

    description = join_ranks().first(describe)
    if (report := join_ranks().first(lambda: finished(out, description, config))) is not None:
        progress.note(f"{out} is complete")
        return report
    task = Stage1(config, row, corpus, teacher, vocab, progress)
    return train(task, config, out, description, progress)


def run_stage2(
    config: Stage2Config,
    row: RowConfig,
    corpus: Corpus,
    stage1: Path,
    out: Path,
    title: str = "stage 2",
) -> dict[str, Json]:
    """Stage II in the run folder `out`, from the result of Stage I; returns its report."""
    progress = Progress(title)
    config = config.counted(row.length)

    def describe() -> dict[str, Json]:
        return {
            "stage": 2,
            "corpus": corpus_id(corpus.folder),
            "stage1": stage1_id(stage1),
            "row": to_dict(row),
            "train": config.described(),
        }

    description = join_ranks().first(describe)
    if (report := join_ranks().first(lambda: finished(out, description, config))) is not None:
        progress.note(f"{out} is complete")
        return report
    task = Stage2(config, row, corpus, stage1, progress)
    return train(task, config, out, description, progress)


def corpus_id(folder: Path) -> str:
    """The SHA-256 of a corpus's manifest, which holds those of all its files."""
    return sha256_file(folder / "manifest.json")


def stage1_id(folder: Path) -> str:
    """The SHA-256 of a Stage I result's manifest, which holds those of all its files; checked."""
    problem = checkpoint.check_manifest(folder)
    if problem is not None:
        raise InputError(f"not the whole result of Stage I: {problem}")
    return sha256_file(folder / checkpoint.MANIFEST)
