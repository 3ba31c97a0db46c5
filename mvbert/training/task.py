"""The interface between a stage and the training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from mvbert.model.masked_lm import DeviceBatch
from mvbert.text.batches import Rows


class Task(Protocol):
    """A model, its rows and its losses: all that the loop, the feed and the log use of a stage."""

    rows: Rows
    """Training rows."""
    heldout: Rows
    """Held-out rows."""
    student_prob: float
    """Probability that a word of these rows is tokenized with the student vocabulary."""

    @property
    def module(self) -> nn.Module:
        """All trained modules; the model is `module.model`."""

    def losses(self, batch: DeviceBatch, masked: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, divided by `masked`, and sums for the log."""

    def evaluate(self, batch: DeviceBatch) -> dict[str, Tensor]:
        """Sums over one held-out batch."""

    def summary(self, sums: dict[str, float]) -> dict[str, float | None]:
        """Means by the names of the log; None where a count is 0."""

    def flops(self) -> float:
        """FLOPs of a step, see mvbert.model.flops."""

    def write_model(self, folder: Path) -> None:
        """Writes the model's files into an existing folder."""

    def read_model(self, folder: Path) -> None:
        """Loads what write_model wrote."""
