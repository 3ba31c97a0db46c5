"""The whole job: text and a teacher in, students out.

    corpus -> vocabulary -> Stage I -> Stage II, once per arm

Every step is a folder of the run; one that is whole and was made from the same inputs is not made
again, so the same command resumes where the last one stopped.
"""

from __future__ import annotations

import time
from pathlib import Path

from mvbert import checkpoint, demo, huggingface
from mvbert.config import (
    CorpusConfig,
    DistillConfig,
    RowConfig,
    Stage1Config,
    Stage2Config,
    VocabConfig,
    to_dict,
)
from mvbert.corpus import Corpus, run_corpus
from mvbert.errors import InputError
from mvbert.files import Json, read_json_object, sha256_file, write_json
from mvbert.fill import fill_masks
from mvbert.learner import run_vocab
from mvbert.progress import Progress
from mvbert.ranks import ranks
from mvbert.runs import describe_run, make_folder
from mvbert.stages import Stage1, Stage2, load_stage1
from mvbert.train import finished, train
from mvbert.vocab import Vocab

_COMMON = ("teacher", "corpus", "vocab", "row", "stage1")  # settings that all arms share

VOCAB_FILE = Path("student") / "vocab.txt"  # in the folder of the run
DOCSTRINGS = "docstrings"  # the embedded text, see mvbert.demo


def run_distill(config: DistillConfig) -> dict[str, Json]:
    """Runs every step that is not done yet.

    Returns:
        The report: what was learned in each step, sizes, the arms side by side, filled-in masks.

    Raises:
        InputError: wrong input, or `config.out` holds a run with other settings.
        Interrupted: asked to stop; a checkpoint was saved first.
    """
    started = time.perf_counter()
    progress = Progress("distill")
    out = Path(config.out)
    arms = config.arms or ("student",)  # without arms: stage2 as it stands
    teacher = huggingface.find_teacher(config.teacher)
    progress.note(f"teacher {config.teacher}: {_parameters(teacher) / 1e6:.2f} M parameters")
    among = ranks()

    def prepare() -> dict[str, Json]:
        make_folder(out)
        # Stage II is described by the run of each arm, so that arms can be added later.
        described = {k: v for k, v in to_dict(config).items() if k in _COMMON}
        described["stage1"] = config.stage1.described()
        describe_run(out / "distill.json", described)
        lowercase = Vocab.load(teacher).lowercase
        corpus_dir = make_corpus(config.corpus, out, lowercase, progress)
        return make_vocab(config.vocab, out, corpus_dir, teacher, progress)

    vocab_report = among.first(prepare)
    corpus = checked_corpus(out / "corpus")
    stage1 = run_stage1(
        config.stage1, config.row, corpus, teacher, out / VOCAB_FILE, out / "stage1"
    )
    stage1_model = out / "stage1" / "model"
    students = {
        name: run_stage2(
            config.arm(name),
            config.row,
            corpus,
            stage1_model,
            out / "arms" / name,
            title=f"stage 2 {name}",
        )
        for name in arms
    }

    def conclude() -> dict[str, Json]:
        report = _report(config, teacher, vocab_report, stage1, students)
        report["seconds"] = round(time.perf_counter() - started, 1)
        write_json(out / "report.json", report)
        return report

    return among.first(conclude)


def _report(
    config: DistillConfig,
    teacher: Path,
    vocab_report: dict[str, Json],
    stage1: dict[str, Json],
    students: dict[str, dict[str, Json]],
) -> dict[str, Json]:
    """What was learned in each step, sizes, the arms side by side, filled-in masks."""
    stage1_model = Path(config.out) / "stage1" / "model"
    best = min(students, key=lambda name: students[name]["heldout_last"]["loss"])  # type: ignore[index,call-overload]
    best_folder = Path(str(students[best]["output"]))
    student, _ = huggingface.load_masked_lm(best_folder, complete=True)
    student_vocab = Vocab.load(best_folder)
    stage1_teacher, _ = load_stage1(stage1_model)
    report: dict[str, Json] = {
        "output": str(best_folder),
        "best": best,
        "student_parameters": student.config.encoder_parameters,
        "student_bytes": (best_folder / huggingface.WEIGHTS).stat().st_size,
        "teacher_parameters": _parameters(teacher),
        "teacher_bytes": sum(path.stat().st_size for path in huggingface.weight_files(teacher)),
        "vocab": vocab_report,
        "stage1_student_loss": _before_after(stage1, "student_loss"),
        "stage1_teacher_loss": _before_after(stage1, "teacher_loss"),
        "arms": {name: run["heldout_last"] for name, run in students.items()},  # type: ignore[dict-item]
        "pieces": {name: run["pieces"] for name, run in students.items()},
        "filled": [
            {
                "sentence": sentence,
                "teacher": fill_masks(stage1_teacher, student_vocab, sentence),
                "student": fill_masks(student, student_vocab, sentence),
            }
            for sentence in config.sentences
        ],
    }
    for key, name in (("random_init", "random"), ("paper", "paper"), ("distilled", "distilled")):
        if name in students:
            report[f"{key}_heldout_loss"] = students[name]["heldout_last"]["loss"]  # type: ignore[index,call-overload]
    return report


def make_corpus(config: CorpusConfig, out: Path, lowercase: bool, progress: Progress) -> Path:
    """Reads the text, or finds that a corpus of just this text is there; returns its folder."""
    folder = out / "corpus"
    if folder.exists():
        progress.note(f"{folder} is complete")
    texts = []
    for text in config.text:
        if text != DOCSTRINGS:
            texts.append(Path(text))
            continue
        texts.append(out / "text" / "docstrings.txt")
        if not texts[-1].exists():
            texts[-1].parent.mkdir(parents=True, exist_ok=True)
            found = demo.docstring_corpus(texts[-1])
            megabytes = found["bytes"] / 1e6
            progress.note(f"text: docstrings of the installed packages, {megabytes:.1f} MB")
    run_corpus(
        texts,
        folder,
        lowercase=lowercase,
        heldout_share=config.heldout_share,
        heldout_texts=[Path(text) for text in config.heldout_text],
        field=config.field,
        errors=config.errors,
    )
    return folder


def make_vocab(
    config: VocabConfig, out: Path, corpus_dir: Path, teacher: Path, progress: Progress
) -> dict[str, Json]:
    """Learns the vocabulary `out`/VOCAB_FILE, unless that is done; returns its report."""
    vocab_file = out / VOCAB_FILE
    report_file = out / "student" / "report.json"  # written after the vocabulary
    if report_file.is_file():
        progress.note(f"{vocab_file} is complete")
        return read_json_object(report_file)
    report = run_vocab(
        corpus_dir,
        vocab_file,
        config.size,
        learner=config.learner,
        coverage=config.coverage,
        teacher=teacher,
        overwrite=True,
    )
    write_json(report_file, report)
    return report


def _before_after(run: dict[str, Json], name: str) -> list[Json]:
    return [run["heldout_first"][name], run["heldout_last"][name]]  # type: ignore[index,call-overload]


def _parameters(folder: Path) -> int:
    """Parameters of a model folder's encoder and pooler."""
    return huggingface.read_model_config(folder).encoder_parameters


def checked_corpus(folder: Path) -> Corpus:
    """A corpus of which rank 0 has compared every byte with the manifest."""

    def check() -> None:
        Corpus.open(folder, verify="sha256")

    ranks().first(check)
    return Corpus.open(folder)


def run_stage1(
    config: Stage1Config,
    row: RowConfig,
    corpus: Corpus,
    teacher: Path,
    vocab_file: Path,
    out: Path,
) -> dict[str, Json]:
    """Stage I in the run folder `out`; returns its report (see mvbert.train.train)."""
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

    description = ranks().first(describe)
    if (report := ranks().first(lambda: finished(out, description, config))) is not None:
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

    description = ranks().first(describe)
    if (report := ranks().first(lambda: finished(out, description, config))) is not None:
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
