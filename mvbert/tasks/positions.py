"""Task distillation position by position: from a teacher that reads the student's own pieces.

A teacher with the student's vocabulary reads the very rows that the student trains on, so that
each position has the teacher's states to learn besides the scores of labels:

    relations   KL between softmax(Q Q^T), softmax(K K^T), softmax(V V^T) of one layer each
    hidden      squared error between the student's mapped last states and the teacher's

as in Stage II (mvbert.training.distillation). With a vocabulary that the student has alone, the
teacher is the one of Stage I, fine-tuned on student pieces.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mvbert import functional
from mvbert.config import FinetuneConfig, ModelConfig
from mvbert.errors import InputError
from mvbert.model.encoder import Taps
from mvbert.model.masked_lm import MaskedLM
from mvbert.tasks.rows import TaskBatch, TaskRows
from mvbert.training.distillation import hidden_error, relations_layer, state_map

HEADS = 32  # relation heads, if both widths are multiples of it


class Positions(nn.Module):
    """The losses of `config.distill` between a student and its frozen teacher.

    Args:
        teacher: fine-tuned on the task, on the device.
        student: the student's shape.

    Attributes:
        map: of student states into the teacher's width, trained with the student; see `start`.
    """

    def __init__(self, config: FinetuneConfig, teacher: MaskedLM, student: ModelConfig) -> None:
        super().__init__()
        self.teacher = teacher.requires_grad_(False).eval()
        self._losses = config.distill
        self._weights = {"relations": config.relations_weight, "hidden": config.hidden_weight}
        self._widths = student.hidden_size, teacher.config.hidden_size
        common = math.gcd(*self._widths)
        self._heads = max(n for n in range(1, HEADS + 1) if common % n == 0)
        self._student_layer = student.num_hidden_layers
        self._hidden_layer = teacher.config.num_hidden_layers
        self._relations_layer = relations_layer(0, teacher.config)
        self.map: nn.Linear | None = None

    def check(self, rows: TaskRows) -> None:
        """Raises InputError if the teacher cannot read these rows."""
        shape = self.teacher.config
        longest, types = int(rows.lengths.max()), int(rows.types.max()) + 1
        if longest > shape.max_position_embeddings:
            raise InputError(
                f"the teacher has {shape.max_position_embeddings} positions, but a row has "
                f"{longest} pieces; give --length {shape.max_position_embeddings}, or --distill "
                "with no loss"
            )
        if types > shape.type_vocab_size:
            raise InputError(
                f"the teacher has {shape.type_vocab_size} token types, but the rows have {types}; "
                "give --distill with no loss"
            )

    def start(self, seed: int, device: torch.device) -> list[nn.Parameter]:
        """Draws the map's initial weights for one run; returns what is trained with the student."""
        if "hidden" not in self._losses:
            return []
        generator = torch.Generator().manual_seed(seed)
        self.map = state_map(*self._widths, generator).to(device)
        return [*self.map.parameters()]

    def student_taps(self) -> Taps:
        """Taps of the student's forward pass that the losses need."""
        return self._taps(self._student_layer, self._student_layer, last=True)

    def _taps(self, hidden: int, relations: int, last: bool) -> Taps:
        return Taps(
            hidden=[hidden] if "hidden" in self._losses else [],
            qkv=[relations] if "relations" in self._losses else [],
            last=last,
        )

    def forward(self, batch: TaskBatch, taps: Taps) -> Tensor:
        """The weighted sum of the losses, [] float32: each a mean over the batch's pieces.

        Args:
            taps: filled by the student's forward pass.
        """
        read = self._taps(self._hidden_layer, self._relations_layer, last=False)
        with torch.no_grad():
            self.teacher.encode(batch.input_ids, batch.token_type_ids, batch.mask, read)
        losses: dict[str, Tensor] = {}
        if "relations" in self._losses:
            losses["relations"] = relations_of_rows(
                taps.qkv[self._student_layer], read.qkv[self._relations_layer], batch.mask,
                self._heads,
            )  # fmt: skip
        if "hidden" in self._losses:
            assert self.map is not None
            student, teacher = taps.hidden[self._student_layer], read.hidden[self._hidden_layer]
            if batch.mask is not None:
                student, teacher = student[batch.mask], teacher[batch.mask]
            losses["hidden"] = hidden_error(self.map(student), teacher)
        return torch.stack([self._weights[n] * loss.float() for n, loss in losses.items()]).sum()


def relations_of_rows(student: Tensor, teacher: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    """functional.relation_kl of padded rows, in the mean over their pieces.

    Padding must have no share of a row's relations, so rows of one length are compared together.

    Args:
        student, teacher: [B, T, 3 H_s] and [B, T, 3 H_t].
        mask: bool [B, T], False on padding; None: there is none.
    """
    if mask is None:
        return functional.relation_kl(student, teacher, heads)
    lengths = mask.sum(1)
    total = torch.zeros((), device=student.device)
    for length in lengths.unique().tolist():
        rows = lengths == length
        value = functional.relation_kl(student[rows, :length], teacher[rows, :length], heads)
        total = total + value * (rows.sum() * length)
    return total / lengths.sum()
