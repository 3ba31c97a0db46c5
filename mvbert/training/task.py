"""What a stage hands to the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from mvbert.model.masked_lm import DeviceBatch
from mvbert.text.batches import Rows


class Task(Protocol):
    """A model, its rows and its losses; the loop, the feed and the log know no more of a stage."""

    rows: Rows
    """Training rows."""
    heldout: Rows
    """Held-out rows."""
    student_prob: float
    """Chance that a word of these rows is cut by the student vocabulary."""

    @property
    def module(self) -> nn.Module:
        """Everything that trains; the model itself is `module.model`."""

    def losses(self, batch: DeviceBatch, masked: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to differentiate, already divided by `masked`, and sums to report."""

    def evaluate(self, batch: DeviceBatch) -> dict[str, Tensor]:
        """Sums over one held-out batch."""

    def summary(self, sums: dict[str, float]) -> dict[str, float | None]:
        """Means out of sums, by the names of the log; None where there was nothing to sum."""

    def flops(self) -> float:
        """Floating-point operations of a step, see mvbert.model.flops."""

    def write_model(self, folder: Path) -> None:
        """Writes the model's files into an existing folder."""

    def read_model(self, folder: Path) -> None:
        """Loads what write_model wrote."""
