"""The whole pipeline: text and a teacher in, students out.

    corpus -> vocabulary -> Stage I -> Stage II, once per arm

With a time budget (`minutes`), all runs get fewer steps on a machine too slow for the full number.
Each part writes a folder; a complete folder made from the same inputs is reused, so the same
command resumes an interrupted job.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mvbert.config import DistillConfig, Stage1Config, Stage2Config, TrainConfig
from mvbert.files import Json, write_json
from mvbert.model import huggingface
from mvbert.model.fill import fill_masks
from mvbert.model.weights import WEIGHTS, weight_files
from mvbert.progress import Progress
from mvbert.text.corpus import Corpus
from mvbert.text.prepare import VOCAB_FILE, make_corpus, make_vocab
from mvbert.text.vocab import Vocab
from mvbert.toml import to_dict, to_report
from mvbert.training.budget import Cost, measure_cost, share_of_steps
from mvbert.training.device import Choice
from mvbert.training.distillation import reader
from mvbert.training.machine import decide_for_job, pass_products, set_up
from mvbert.training.ranks import join_ranks
from mvbert.training.run_stage import checked_corpus, load_student_vocab, run_stage1, run_stage2
from mvbert.training.runs import describe_run, make_folder
from mvbert.training.stages import Stage1, Stage2, load_stage1
from mvbert.training.train import RunReport

_COMMON = ("teacher", "corpus", "vocab", "row", "stage1")  # settings that all arms share


@dataclass(frozen=True)
class DistillReport:
    """What a complete job reports."""

    output: str
    """Folder of the best student."""
    best: str
    """Its arm."""
    student_parameters: int
    student_bytes: int
    teacher_parameters: int
    teacher_bytes: int
    vocab: dict[str, Json]
    stage1_student_loss: list[float | None]
    """Held-out, before and after, as the next."""
    stage1_teacher_loss: list[float | None]
    arms: dict[str, dict[str, float | None]]
    """Held-out means of each arm's last step."""
    pieces: dict[str, int]
    filled: list[dict[str, str]]
    """Sentences with their masks filled by both."""
    random_init_heldout_loss: float | None
    """Of the arm with this name, if there is one, as the next two."""
    paper_heldout_loss: float | None
    distilled_heldout_loss: float | None
    seconds: float


def run_distill(config: DistillConfig) -> DistillReport:
    """Runs every part that is not complete yet.

    Raises:
        InputError: bad input, or `config.out` holds a run with other settings.
        Interrupted: stopped by a signal; a checkpoint was saved first.
    """
    started = time.monotonic()
    config.corpus.check_text()
    progress = Progress("distill")
    out = Path(config.out)
    arms = config.arms or ("student",)  # without arms: one student, trained as stage2 says
    teacher = huggingface.find_model(config.teacher, "teacher")
    progress.note(f"teacher {config.teacher}: {_parameters(teacher) / 1e6:.2f} M parameters")
    ranks = join_ranks()

    def prepare() -> dict[str, Json]:
        make_folder(out)
        # Each arm's run describes its Stage II, so that arms can be added later.
        described = {k: v for k, v in to_dict(config).items() if k in _COMMON}
        described["stage1"] = config.stage1.described()
        describe_run(out / "distill.json", described)
        cased = config.stage1.cased
        vocab = Vocab.load(teacher, lowercase=False if cased else None)
        corpus_dir = make_corpus(config.corpus, out, vocab, progress)
        return make_vocab(config.vocab, out, corpus_dir, teacher, progress, cased)

    vocab_report = ranks.first(prepare)
    corpus = checked_corpus(out / "corpus")
    length, shape = config.row.length, huggingface.read_model_config(teacher)
    first = config.stage1.counted(length)
    second = {name: config.arm(name).counted(length) for name in arms}
    runs = [first, *second.values()]
    products = [product for run in runs for product in pass_products(run, config.row, shape)]
    dtype = decide_for_job(out, runs, products)

    def measure() -> dict[str, tuple[TrainConfig, Cost]]:
        return _measure(config, first, second, corpus, teacher, dtype)

    def left() -> float:
        return 60 * config.minutes - (time.monotonic() - started)

    share = share_of_steps(out, config.minutes, left, length, measure, progress.note)
    stage1 = run_stage1(
        first.shortened(share), config.row, corpus, teacher, out / VOCAB_FILE, out / "stage1",
        deadline=first.deadline(started), dtype=dtype,
    )  # fmt: skip
    stage1_model = out / "stage1" / "model"
    students = {
        name: run_stage2(
            arm.shortened(share), config.row, corpus, stage1_model, out / "arms" / name,
            f"stage 2 {name}", deadline=arm.deadline(started), dtype=dtype,
        )
        for name, arm in second.items()
    }  # fmt: skip

    def conclude() -> dict[str, Any]:
        report = _report(config, teacher, vocab_report, stage1, students, started)
        write_json(out / "report.json", to_report(report))
        return to_dict(report)

    return DistillReport(**ranks.first(conclude))


def _measure(
    config: DistillConfig,
    first: Stage1Config,
    second: dict[str, Stage2Config],
    corpus: Corpus,
    teacher: Path,
    dtype: Choice | None,
) -> dict[str, tuple[TrainConfig, Cost]]:
    """Costs of Stage I and of each student; students are timed with an untrained Stage I model."""
    out, row, quiet = Path(config.out), config.row, Progress("", quiet=True)
    shape, teacher_vocab = huggingface.read_shape(teacher, cased=first.cased)
    vocab = load_student_vocab(out / VOCAB_FILE, corpus, teacher_vocab)
    stage1 = functools.cache(lambda: Stage1(first, row, corpus, teacher, vocab, quiet))
    device = set_up(first, out / "stage1", pass_products(first, row, shape), dtype)
    costs: dict[str, tuple[TrainConfig, Cost]] = {
        "stage1": (first, measure_cost(stage1, first, device))
    }
    for name, arm in second.items():
        device = set_up(arm, out / "arms" / name, pass_products(arm, row, shape), dtype)
        make = functools.partial(Stage2, arm, row, corpus, (stage1().model, vocab), device, quiet)
        costs[name] = (arm, measure_cost(make, arm, device))
    return costs


def _report(
    config: DistillConfig,
    teacher: Path,
    vocab_report: dict[str, Json],
    stage1: RunReport,
    students: dict[str, RunReport],
    started: float,
) -> DistillReport:
    """Losses of both stages, sizes, results per arm, filled-in masks."""
    stage1_model = Path(config.out) / "stage1" / "model"
    best = min(students, key=lambda name: students[name].loss)
    best_folder = Path(students[best].output)
    student, _ = huggingface.load_masked_lm(best_folder, complete=True)
    student_vocab = Vocab.load(best_folder)
    teacher_reader = reader(load_stage1(stage1_model)[0])
    losses = {name: run.loss for name, run in students.items()}
    return DistillReport(
        output=str(best_folder),
        best=best,
        student_parameters=student.config.encoder_parameters,
        student_bytes=(best_folder / WEIGHTS).stat().st_size,
        teacher_parameters=_parameters(teacher),
        teacher_bytes=sum(path.stat().st_size for path in weight_files(teacher)),
        vocab=vocab_report,
        stage1_student_loss=_before_after(stage1, "student_loss"),
        stage1_teacher_loss=_before_after(stage1, "teacher_loss"),
        arms={name: {**run.heldout_last} for name, run in students.items()},
        pieces={name: run.pieces for name, run in students.items()},
        filled=[
            {
                "sentence": sentence,
                "teacher": fill_masks(teacher_reader, student_vocab, sentence),
                "student": fill_masks(student, student_vocab, sentence),
            }
            for sentence in config.sentences
        ],
        random_init_heldout_loss=losses.get("random"),
        paper_heldout_loss=losses.get("paper"),
        distilled_heldout_loss=losses.get("distilled"),
        seconds=round(time.monotonic() - started, 1),
    )


def _before_after(run: RunReport, name: str) -> list[float | None]:
    return [run.heldout_first[name], run.heldout_last[name]]


def _parameters(folder: Path) -> int:
    """Number of parameters of a model folder's encoder and pooler."""
    return huggingface.read_model_config(folder).encoder_parameters


def print_distill_report(report: DistillReport) -> None:
    """Prints losses of both stages, results per arm, sizes and filled-in sentences to stdout."""
    console = Console(highlight=False, soft_wrap=True)
    losses = Table("Stage I held-out loss (nats per masked piece)", "before", "after")
    for name, both in (
        ("teacher pieces", report.stage1_teacher_loss),
        ("student pieces", report.stage1_student_loss),
    ):
        losses.add_row(name, *("-" if x is None else f"{x:.3f}" for x in both))
    console.print(losses)

    arms = Table("Stage II student", "held-out loss", "accuracy", "pieces seen")
    for name, heldout in report.arms.items():
        best = " (best)" if name == report.best and len(report.arms) > 1 else ""
        arms.add_row(
            name + best,
            f"{heldout['loss']:.3f}",
            f"{heldout['accuracy']:.1%}",
            f"{report.pieces[name] / 1e6:.2f} M",
        )
    console.print(arms)

    sizes = Table("size", "parameters", "bytes (float32)")
    for name, parameters, size in (
        ("teacher", report.teacher_parameters, report.teacher_bytes),
        ("student", report.student_parameters, report.student_bytes),
    ):
        sizes.add_row(name, f"{parameters / 1e6:.2f} M", f"{size / 1e6:.1f} MB")
    console.print(sizes)
    for filled in report.filled:
        console.print(f"  {filled['sentence']}", markup=False)
        console.print(f"    Stage I teacher, student pieces: {filled['teacher']}", markup=False)
        console.print(f"    student:                         {filled['student']}", markup=False)
