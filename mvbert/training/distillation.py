"""Distillation losses between the student and the Stage I teacher, on the same rows.

After Stage I the teacher reads student pieces: with the projected student table as its word table
it is an ordinary BERT with the student's vocabulary. So the usual losses apply position by
position, although teacher and student had different vocabularies:

    logits      tau^2 KL(teacher || student) over the student's vocabulary
                (Hinton, Vinyals, Dean 2015, arXiv 1503.02531)
    hidden      squared error between the student's mapped states and the teacher's normalised ones,
                layers matched by relative depth (Jiao et al. 2020, arXiv 1909.10351)
    relations   KL between softmax(Q Q^T), softmax(K K^T), softmax(V V^T) of one layer each, heads
                re-cut so that neither width nor number of heads has to match
                (MiniLMv2: Wang et al. 2021, arXiv 2012.15828)
    sentence    squared error between the student's mapped pooler output, of [CLS], and the mean of
                the teacher's states over the row, normalised. None of the others asks anything of
                [CLS], from which classes of texts are learnt; BERT had next-sentence prediction
                for it. It trains the pooler too.

Nothing here waits for the device and every shape is fixed, so a step with a teacher can be one CUDA
graph. Letters: B rows, T pieces per row, H width (H_s student, H_t teacher), R relation heads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvbert import functional
from mvbert.config import ModelConfig, Stage2Config
from mvbert.errors import InputError
from mvbert.model.encoder import Taps
from mvbert.model.flops import encoder_flops, head_flops
from mvbert.model.masked_lm import DeviceBatch, MaskedLM, MixedMaskedLM

DEEP = 12  # in teachers with more layers, the best layer for relations is not the last


class Teacher:
    """A Stage I teacher that reads student pieces: frozen, on the device, in the run's dtype.

    Args:
        autocast: the dtype of the run's matrix products, None for float32. Matrices are cast once;
            autocast caches casts only of tensors that need gradients, so it would repeat them.

    Attributes:
        microseconds: forward time per piece, set by `measure`; None before.
    """

    def __init__(
        self, mixed: MixedMaskedLM, device: torch.device, autocast: torch.dtype | None
    ) -> None:
        self.model = reader(mixed).requires_grad_(False).eval().to(device)
        self.microseconds: float | None = None
        if autocast is not None:
            for module in self.model.modules():
                if isinstance(module, nn.Linear):
                    module.to(autocast)

    @torch.no_grad()
    def read(self, batch: DeviceBatch, taps: Taps) -> Tensor:
        """Hidden states [B, T, H_t] of the last layer that `taps` needs; fills `taps`."""
        return self.model.encode(batch.input_ids, batch.token_type_ids, taps=taps)

    def measure(
        self, batch: DeviceBatch, taps: Taps, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Sets `microseconds`: the best of three passes, under autocast as in training."""
        device = batch.input_ids.device
        wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else (lambda: None)
        seconds = []
        for _ in range(3):
            wait()
            start = clock()
            self.read(batch, taps)
            wait()
            seconds.append(clock() - start)
        self.microseconds = 1e6 * min(seconds) / max(batch.input_ids.numel(), 1)


@torch.no_grad()
def reader(mixed: MixedMaskedLM, dropout: float = 0.0) -> MaskedLM:
    """Makes the teacher a BERT with the student's vocabulary and the projected table.

    Args:
        dropout: of the BERT that is made.
    """
    model = MaskedLM(
        replace(
            mixed.config,
            vocab_size=len(mixed.student.table),
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            tie_word_embeddings=True,
        )
    )
    source: dict[str, Tensor] = dict(mixed.named_parameters())
    source["embeddings.word.weight"] = mixed.student.rows()
    source["head.bias"] = mixed.student.bias
    for name, parameter in model.named_parameters():
        parameter.copy_(source[name])
    return model


class Distillation(nn.Module):
    """The losses of `config.distill`, with the trained linear maps of the hidden loss.

    Args:
        student: the student's shape.
    """

    def __init__(self, config: Stage2Config, student: ModelConfig, teacher: Teacher) -> None:
        super().__init__()
        self.config, self.teacher = config, teacher
        shape = teacher.model.config
        self.pairs = hidden_pairs(config, student, shape) if "hidden" in config.distill else {}
        self.relations_layer = relations_layer(config.relations_layer, shape)
        H_s, H_t = self._widths = student.hidden_size, shape.hidden_size
        if "relations" in config.distill and (
            H_s % config.relation_heads or H_t % config.relation_heads
        ):
            raise InputError(
                f"relation_heads {config.relation_heads} must divide the widths of student and "
                f"teacher, {H_s} and {H_t}"
            )
        self.maps = nn.ModuleDict()
        generator = torch.Generator().manual_seed(config.seed + 1)
        for name in (*map(str, self.pairs), *["sentence"] * ("sentence" in config.distill)):
            self.maps[name] = state_map(H_s, H_t, generator)
        self._last = student.num_hidden_layers

    def student_taps(self) -> Taps:
        """Taps of the student's forward pass that the losses need."""
        relations = "relations" in self.config.distill
        return Taps(hidden=self.pairs, qkv=[self._last] if relations else [])

    def teacher_taps(self) -> Taps:
        """Taps of the teacher's forward pass that the losses need."""
        relations = "relations" in self.config.distill
        return Taps(
            hidden=self.pairs.values(),
            qkv=[self.relations_layer] if relations else [],
            last=not {"logits", "sentence"}.isdisjoint(self.config.distill),
        )

    def forward(
        self,
        batch: DeviceBatch,
        masked: Tensor | int,
        share: float,
        student: MaskedLM,
        hidden: Tensor,
        masked_hidden: Tensor,
        taps: Taps,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The unweighted losses of a batch, and sums for the log.

        Args:
            masked: number of masked pieces in the whole step, of which this batch may be a part.
            share: this batch's share of the step's rows.
            hidden: [B, T, H_s], the student's last hidden states.
            masked_hidden: [N, H_s], the head's states at the masked pieces.
            taps: filled by the student's forward pass.
        """
        config = self.config
        teacher_taps = self.teacher_taps()
        teacher_hidden = self.teacher.read(batch, teacher_taps)
        losses: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        if "logits" in config.distill:
            total = self._logits(student, batch, masked_hidden, teacher_hidden)
            losses["logits"] = total / masked
            sums["logits_sum"] = total.detach()
            sums["logits_count"] = (batch.labels >= 0).sum()
        if "hidden" in config.distill:
            errors = [
                hidden_error(self.maps[str(s)](taps.hidden[s]), teacher_taps.hidden[t])
                for s, t in self.pairs.items()
            ]
            losses["hidden"] = torch.stack(errors).mean() * share
            sums["hidden_sum"] = losses["hidden"].detach()
        if "relations" in config.distill:
            losses["relations"] = share * functional.relation_kl(
                taps.qkv[self._last], teacher_taps.qkv[self.relations_layer], config.relation_heads
            )
            sums["relations_sum"] = losses["relations"].detach()
        if "sentence" in config.distill:
            mapped = self.maps["sentence"](student.pooled(hidden[:, 0]))
            losses["sentence"] = hidden_error(mapped, teacher_hidden.float().mean(1)) * share
            sums["sentence_sum"] = losses["sentence"].detach()
        return losses, sums

    def _logits(
        self, student: MaskedLM, batch: DeviceBatch, masked_hidden: Tensor, teacher_hidden: Tensor
    ) -> Tensor:
        """The sum of tau^2 KL over the masked pieces."""
        config, teacher = self.config, self.teacher.model
        student_head = (student.embeddings.word.weight, student.head.bias)
        teacher_head = (teacher.embeddings.word.weight, teacher.head.bias)
        with torch.no_grad():
            target = teacher.masked_hidden(teacher_hidden, batch.masked_index)
        return functional.linear_kl(
            masked_hidden, *student_head, target, *teacher_head,
            temperature=config.temperature, mask=batch.labels >= 0, reduction="sum",
        )  # fmt: skip

    def teacher_flops(self, T: int, mask_prob: float) -> float:
        """Forward FLOPs of the teacher per piece, in a row of T."""
        shape = self.teacher.model.config
        L = shape.num_hidden_layers
        flops = encoder_flops(shape, T) * self.teacher_taps().depth(L) / L
        if "relations" in self.config.distill:
            flops += 3 * 2.0 * T * shape.hidden_size
        if "logits" in self.config.distill:
            flops += mask_prob * head_flops(shape, shape.vocab_size)
        return flops

    def map_flops(self) -> float:
        """Forward FLOPs of the hidden loss's maps per piece.

        Not counted: the student's relations, under 1 % of its FLOPs in rows of 128, and the
        sentence loss, a map a row.
        """
        H_s, H_t = self._widths
        return 2.0 * H_s * H_t * len(self.pairs)


# ---- which layers ------------------------------------------------------------------------------


def hidden_pairs(
    config: Stage2Config, student: ModelConfig, teacher: ModelConfig
) -> dict[int, int]:
    """Maps student layers of the hidden loss to teacher layers at the same relative depth.

    Layers count from 1; 0 is the output of the embeddings.
    """
    L_s, L_t = student.num_hidden_layers, teacher.num_hidden_layers
    layers = config.hidden_layers or (L_s,)
    for layer in layers:
        if layer > L_s:
            raise InputError(f"hidden_layers: the student has {L_s} layers, got {layer}")
    return {layer: round(layer * L_t / L_s) for layer in layers}


def relations_layer(setting: int, teacher: ModelConfig) -> int:
    """The teacher layer of the relations loss.

    With 0 the last; in deep teachers the one at 7/8 of the depth, e.g. the 21st of 24, as
    MiniLMv2 found for BERT-large (section 4.2 there: upper-middle beats last).
    """
    L = teacher.num_hidden_layers
    layer = setting or (L if L <= DEEP else round(L * 7 / 8))
    if layer > L:
        raise InputError(f"relations_layer: the teacher has {L} layers, got {layer}")
    return layer


# ---- the losses --------------------------------------------------------------------------------


def state_map(H_s: int, H_t: int, generator: torch.Generator) -> nn.Linear:
    """A linear map from the student's width to the teacher's, untrained; about length-keeping."""
    linear = nn.Linear(H_s, H_t)
    with torch.no_grad():
        linear.weight.normal_(0.0, H_s**-0.5, generator=generator)
        linear.bias.zero_()
    return linear


def hidden_error(mapped: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error against the teacher's states, each normalised to mean 0, variance 1.

    Normalised, because a few directions with huge LayerNorm scales would dominate the error.
    [..., H_t] twice -> []
    """
    target = F.layer_norm(teacher.float(), teacher.shape[-1:])
    return (mapped.float() - target).square().mean()
