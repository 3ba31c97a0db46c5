"""The two stages as tasks for the loop in mvbert.training.train.

Stage I: a teacher reads and predicts text tokenized with both vocabularies. Stage II: a student
trains on student pieces alone, starting from the Stage I embeddings, and, beyond the paper, is
distilled from the Stage I teacher on the same rows.

Source: Zhao, Gupta, Song, Zhou, "Extremely Small BERT Models from Mixed-Vocabulary Training",
EACL 2021, arXiv 1909.11687.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mvbert.config import ModelConfig, RowConfig, Stage1Config, Stage2Config, student_shape
from mvbert.errors import InputError
from mvbert.model import huggingface
from mvbert.model.card import model_card
from mvbert.model.embeddings import sinusoidal_start, spelled_rows, warm_start
from mvbert.model.flops import encoder_flops, head_flops
from mvbert.model.masked_lm import DeviceBatch, MaskedLM, MixedMaskedLM, masked_sums
from mvbert.model.weights import read_tensors, read_weights
from mvbert.progress import Progress
from mvbert.text.corpus import Corpus
from mvbert.text.stage_rows import stage_rows
from mvbert.text.vocab import Vocab
from mvbert.toml import to_dict
from mvbert.training.device import Device
from mvbert.training.distillation import Distillation, Teacher
from mvbert.training.machine import pass_rows

STUDENT_TABLE = "student.safetensors"
STUDENT_VOCAB = "student_vocab.txt"


class Stage1:
    """Mixed-vocabulary training of the teacher."""

    def __init__(
        self,
        config: Stage1Config,
        row: RowConfig,
        corpus: Corpus,
        teacher: Path,
        student_vocab: Vocab,
        progress: Progress,
    ) -> None:
        shape, self.teacher_vocab = huggingface.read_shape(teacher, cased=config.cased)
        self.student_vocab = student_vocab
        for vocab in (self.teacher_vocab, student_vocab):
            progress.note(vocab.doubt)
        check_lengths(row, shape)
        self._config = config
        shape = _with_dropout(shape, config.dropout)
        model = MixedMaskedLM(shape, student_vocab.size, config.embedding_size)
        model.init_weights(config.seed)
        weights = read_weights(teacher)
        _, missing = huggingface.load_masked_lm(teacher, model, weights=weights, seed=config.seed)
        if missing:
            progress.note(f"missing from the teacher, initialised randomly: {', '.join(missing)}")
        progress.note(weights.unread())
        table = model.embeddings.word.weight.detach()
        rows, shared = spelled_rows(
            student_vocab.pieces, self.teacher_vocab.ids, table, self.teacher_vocab.unk
        )
        progress.note(
            f"{shared} of {student_vocab.size} student pieces "
            f"({shared / student_vocab.size:.1%}) are in the teacher's vocabulary"
        )
        if config.warm_start:
            share = warm_start(model.student, rows)
            progress.note(
                f"warm start: {config.embedding_size} dimensions keep {share:.1%} of the variance"
            )
        else:
            # So that projected rows have the standard deviation of BERT's initial rows.
            generator = torch.Generator().manual_seed(config.seed + 1)
            with torch.no_grad():
                model.student.projection.weight.normal_(
                    0.0, config.embedding_size**-0.5, generator=generator
                )
        self.model = model
        self.module = nn.ModuleDict({"model": model})
        model.pooler.requires_grad_(False)  # the masked-language-model loss has no gradient for it
        self.teacher_size = shape.vocab_size
        masks = (self.teacher_vocab.mask, self.teacher_size + student_vocab.mask)
        model.embeddings.frequent_ids = masks
        self._row = row
        cuts = (corpus.segment(self.teacher_vocab), corpus.segment(student_vocab))
        self.rows, self.heldout = stage_rows(corpus, *cuts, row, config.seed, config.student_prob)
        self.student_prob = config.student_prob

    def losses(self, batch: DeviceBatch, masked: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        rows = self.model.student.rows()
        hidden = self.model.encode(batch.input_ids, batch.token_type_ids, student_rows=rows)
        masked_hidden = self.model.masked_hidden(hidden, batch.masked_index)
        teacher, student = self.model.mixed_losses(masked_hidden, batch.labels, rows)
        of_student = batch.labels >= self.teacher_size
        sums = {
            "teacher_sum": teacher.detach().double(),
            "teacher_count": ((batch.labels >= 0) & ~of_student).sum(),
            "student_sum": student.detach().double(),
            "student_count": of_student.sum(),
        }
        return (teacher + student) / masked, sums

    def evaluate(self, batch: DeviceBatch) -> dict[str, Tensor]:
        return self.losses(batch, (batch.labels >= 0).sum())[1]

    def summary(self, sums: dict[str, float]) -> dict[str, float | None]:
        both = sums["teacher_sum"] + sums["student_sum"]
        count = sums["teacher_count"] + sums["student_count"]
        return {
            "loss": _mean(both, count),
            "teacher_loss": _mean(sums["teacher_sum"], sums["teacher_count"]),
            "student_loss": _mean(sums["student_sum"], sums["student_count"]),
            **_step_means(sums),
        }

    def flops(self) -> float:
        shape, V, p = self.model.config, self.student_vocab.size, self._config.student_prob
        pieces = self._config.rows * self._row.length
        forward = (
            pieces * encoder_flops(shape, self.rows.T)
            + self._row.mask_prob * pieces * head_flops(shape, p * V + (1 - p) * self.teacher_size)
            + 2.0 * V * self._config.embedding_size * shape.hidden_size
        )
        return 3.0 * forward

    def write_model(self, folder: Path) -> None:
        """Writes the teacher as a Hugging Face folder, with the student's table and vocabulary."""
        huggingface.write_model(
            folder, self.model, self.teacher_vocab, model_card("stage1", self.model.config)
        )
        state = {n: p.detach().cpu().contiguous() for n, p in self.model.student.named_parameters()}
        huggingface.write_tensors(folder / STUDENT_TABLE, state)
        self.student_vocab.save(folder / STUDENT_VOCAB)

    def read_model(self, folder: Path) -> None:
        read_mixed(folder, self.model)


def read_mixed(folder: Path, model: MixedMaskedLM) -> None:
    """Loads a folder written by Stage1.write_model into a model of its shape."""
    huggingface.load_masked_lm(folder, model, complete=True)
    tensors = read_tensors(folder / STUDENT_TABLE)
    with torch.no_grad():
        for name, parameter in model.student.named_parameters():
            if name not in tensors or tensors[name].shape != parameter.shape:
                raise InputError(
                    f"{folder / STUDENT_TABLE}: {name} must be {tuple(parameter.shape)}; "
                    "was it made with another student vocabulary or embedding size?"
                )
            parameter.copy_(tensors[name])


def load_stage1(folder: Path) -> tuple[MixedMaskedLM, Vocab]:
    """Loads the Stage I teacher and the student's vocabulary from a Stage I result."""
    if not (folder / STUDENT_TABLE).is_file():
        raise InputError(
            f"{folder} has no {STUDENT_TABLE}; expected the model/ folder of a Stage I run"
        )
    tensors = read_tensors(folder / STUDENT_TABLE)
    if "table" not in tensors or tensors["table"].ndim != 2:
        raise InputError(f"{folder / STUDENT_TABLE} has no student table")
    V, E = tensors["table"].shape
    shape, teacher_vocab = huggingface.read_shape(folder)
    vocab = Vocab.load(
        folder / STUDENT_VOCAB, teacher_vocab.lowercase, teacher_vocab.strip_accents
    ).with_added_of(teacher_vocab)
    if vocab.size != V:
        raise InputError(
            f"{folder}: {STUDENT_VOCAB} has {vocab.size} pieces, the student table {V} rows"
        )
    model = MixedMaskedLM(shape, V, E)
    read_mixed(folder, model)
    return model, vocab


def load_student(folder: Path, model: MaskedLM, vocab: Vocab) -> None:
    """Loads a student that a Stage II run is to continue into a model of its shape.

    Raises:
        InputError: the folder's model has another shape or another vocabulary.
    """
    shape, its_vocab = huggingface.read_shape(folder)
    expected, actual = to_dict(model.config), to_dict(shape)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):  # the run's own
        actual[name] = expected[name]
    differ = [
        f"{name} {actual[name]}, not {value}"
        for name, value in expected.items()
        if actual[name] != value
    ]
    if its_vocab.sha256 != vocab.sha256:
        differ.append("another vocabulary")
    if differ:
        raise InputError(f"start {folder}: this student has {', '.join(differ)}")
    huggingface.load_masked_lm(folder, model, complete=True)


class Stage2:
    """Trains the student on student pieces, with or without the Stage I teacher.

    Args:
        stage1: the result of `load_stage1`.
        device: the run's device and dtype, which the teacher uses too.
    """

    def __init__(
        self,
        config: Stage2Config,
        row: RowConfig,
        corpus: Corpus,
        stage1: tuple[MixedMaskedLM, Vocab],
        device: Device,
        progress: Progress,
    ) -> None:
        teacher, self.vocab = stage1
        shape = student_shape(config.shape, self.vocab.size, config.dropout)
        check_lengths(row, shape)
        self._config, self._row, self._pieces = config, row, config.rows * row.length
        self.model = MaskedLM(shape)
        self.model.init_weights(config.seed)
        self.model.embeddings.frequent_ids = (self.vocab.mask,)
        self.model.pooler.requires_grad_("sentence" in config.distill)
        if config.continues:
            load_student(huggingface.find_model(config.start, "start"), self.model, self.vocab)
        elif config.start == "stage1":
            E = teacher.student.table.shape[1]
            if shape.hidden_size != E:
                raise InputError(
                    f"a {config.shape} student cannot start from Stage I embeddings of width {E}: "
                    f"train Stage I with embedding_size {shape.hidden_size}, "
                    "or choose start = random"
                )
            with torch.no_grad():
                self.model.embeddings.word.weight.copy_(teacher.student.table)
                self.model.head.bias.copy_(teacher.student.bias)
        if config.positions == "sinusoidal" and not config.continues:
            tables = self.model.embeddings
            sinusoidal_start(tables.position.weight, float(tables.word.weight.detach().std()))
        self.module = nn.ModuleDict({"model": self.model})
        self._weights = {
            name: float(getattr(config, f"{name}_weight")) for name in ("mlm", *config.distill)
        }
        self.distillation: Distillation | None = None
        if config.distill:
            check_lengths(row, teacher.config)
            self.distillation = Distillation(
                config, shape, Teacher(teacher, device.device, device.autocast)
            )
            self.module["distillation"] = self.distillation
        cut = corpus.segment(self.vocab)
        self.student_prob = 1.0
        self.rows, self.heldout = stage_rows(corpus, None, cut, row, config.seed, 1.0)
        if self.distillation is not None:
            progress.note(f"distilling from the Stage I teacher: {' + '.join(config.distill)}")
            batch = self.rows.read(0, pass_rows(config))
            with device.cast():
                self.distillation.teacher.measure(
                    DeviceBatch.of(batch, device.device), self.distillation.teacher_taps()
                )
            costs = self._costs()
            progress.note(
                f"MFLOP per piece: student {costs['student_mflop']:.1f} (forward and backward), "
                f"teacher {costs['teacher_mflop']:.1f} (forward); "
                f"the teacher takes {costs['teacher_us_per_piece']:.3g} us per piece"
            )

    def losses(self, batch: DeviceBatch, masked: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        distillation = self.distillation
        taps = distillation.student_taps() if distillation is not None else None
        hidden = self.model.encode(batch.input_ids, batch.token_type_ids, taps=taps)
        masked_hidden = self.model.masked_hidden(hidden, batch.masked_index)
        mlm = self.model.losses(masked_hidden, batch.labels, "sum")
        sums = {"mlm_sum": mlm.detach().double(), "count": (batch.labels >= 0).sum()}
        losses = {"mlm": mlm / masked}
        if distillation is not None:
            assert taps is not None
            # Means over a part of the step's pieces are weighted by its share of them.
            share = batch.input_ids.numel() / self._pieces
            more, more_sums = distillation(
                batch, masked, share, self.model, hidden, masked_hidden, taps
            )
            losses |= more
            sums |= more_sums
        total = torch.stack([w * losses[name].float() for name, w in self._weights.items()]).sum()
        return total, sums

    def evaluate(self, batch: DeviceBatch) -> dict[str, Tensor]:
        return masked_sums(self.model, batch)

    def summary(self, sums: dict[str, float]) -> dict[str, float | None]:
        count = sums["count"]
        out = {"loss": _mean(sums["mlm_sum"], count)}
        if "right" in sums:
            out["accuracy"] = _mean(sums["right"], count)
        if "logits_sum" in sums:
            out["logits_loss"] = _mean(sums["logits_sum"], sums["logits_count"])
        for name in ("hidden", "relations", "sentence"):
            if f"{name}_sum" in sums:
                out[f"{name}_loss"] = _mean(sums[f"{name}_sum"], sums["updates"])
        if "steps" in sums:
            out.update(self._costs())
        return {**out, **_step_means(sums)}

    def _costs(self) -> dict[str, float | None]:
        """Costs per piece of the student and, if there is one, the teacher."""
        student, teacher = self._flops_per_piece()
        costs: dict[str, float | None] = {"student_mflop": round(student / 1e6, 3)}
        if self.distillation is not None:
            costs["teacher_mflop"] = round(teacher / 1e6, 3)
            costs["teacher_us_per_piece"] = self.distillation.teacher.microseconds
        return costs

    def flops(self) -> float:
        per_piece = sum(self._flops_per_piece())
        if self.distillation is not None:
            per_piece += 3.0 * self.distillation.map_flops()
        return self._pieces * per_piece

    def _flops_per_piece(self) -> tuple[float, float]:
        """FLOPs of the student (forward and backward) and of its teacher (forward)."""
        T, mask_prob = self.rows.T, self._row.mask_prob
        head = mask_prob * head_flops(self.model.config, self.vocab.size)
        student = 3.0 * (encoder_flops(self.model.config, T) + head)
        teacher = self.distillation.teacher_flops(T, mask_prob) if self.distillation else 0.0
        return student, teacher

    def write_model(self, folder: Path) -> None:
        card = model_card("stage2", self.model.config, self._config, self._row.length)
        huggingface.write_model(folder, self.model, self.vocab, card)

    def read_model(self, folder: Path) -> None:
        huggingface.load_masked_lm(folder, self.model, complete=True)


# ---- shared by both ---------------------------------------------------------------------------


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def _step_means(sums: dict[str, float]) -> dict[str, float | None]:
    """The loop's means of a training window: gradient norm and skipped updates."""
    if "steps" not in sums:
        return {}
    return {"grad_norm": _mean(sums["grad_norm"], sums["updates"]), "skipped": sums["skipped"]}


def check_lengths(row: RowConfig, shape: ModelConfig) -> None:
    """Refuses rows that are too long, or have too many segments, for the model."""
    if row.length > shape.max_position_embeddings:
        raise InputError(
            f"rows of {row.length} pieces do not fit the model's "
            f"{shape.max_position_embeddings} positions; choose a smaller row length"
        )
    if row.pair_prob > 0 and shape.type_vocab_size < 2:
        raise InputError(
            "the model has one token type, so rows cannot be pairs; set pair_prob to 0"
        )


def _with_dropout(shape: ModelConfig, dropout: float) -> ModelConfig:
    return replace(shape, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
