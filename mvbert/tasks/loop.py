"""One run of fine-tuning: epochs of updates, the dev score after each, the best epoch's weights."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mvbert.config import FinetuneConfig
from mvbert.errors import InputError
from mvbert.files import Json
from mvbert.model.huggingface import INTENT
from mvbert.model.masked_lm import MaskedLM
from mvbert.progress import Progress
from mvbert.tasks.formats import Task
from mvbert.tasks.metrics import score_of
from mvbert.tasks.model import Labels, TaskModel
from mvbert.tasks.positions import Positions
from mvbert.tasks.rows import CLASS, TaskBatch, TaskRows, batches_of_epoch, read_batch
from mvbert.tasks.score import Split, evaluate
from mvbert.text.vocab import Vocab
from mvbert.toml import to_dict
from mvbert.training.device import Device
from mvbert.training.optim import decay_groups, linear_schedule

IGNORED = -100  # a place without a label


@dataclass(frozen=True)
class Run:
    """The setting of one run."""

    batch: int
    lr: float
    epochs: int
    seed: int

    @staticmethod
    def of(record: Mapping[str, Any]) -> Run:
        return Run(*(record[name] for name in ("batch", "lr", "epochs", "seed")))


@dataclass(frozen=True)
class Fitted:
    """A trained model with the weights of its best epoch, and how it went."""

    model: TaskModel
    metrics: dict[str, Json]  # of the dev set
    score: float
    epoch: int
    epochs: list[float]  # the dev score of each
    loss: float  # mean training loss of the last epoch
    seconds: float  # of training, without scoring

    def record(self, run: Run) -> dict[str, Any]:
        return {
            **to_dict(run),
            "score": round(self.score, 6),
            "epoch": self.epoch,
            "dev": self.metrics,
            "scores": [round(score, 6) for score in self.epochs],
            "loss": round(self.loss, 6),
            "seconds": round(self.seconds, 2),
        }


@dataclass(frozen=True)
class Targets:
    """What every place of the training rows is to give.

    Attributes:
        hard: [places], the number of its label, IGNORED where it has none; of numbers the score,
            NaN where it has none.
        soft: [places, labels], the teacher's scores, if there is a teacher.
        known: [places], where the teacher has some.
    """

    hard: np.ndarray
    soft: np.ndarray | None = None
    known: np.ndarray | None = None


class Trainer:
    """Trains models on the same rows."""

    def __init__(
        self, task: Task, labels: Labels, rows: TaskRows, targets: Targets, dev: Split,
        vocab: Vocab, config: FinetuneConfig, device: Device, progress: Progress,
        positions: Positions | None = None,
    ) -> None:  # fmt: skip
        self._task, self._labels, self._dev = task, labels, dev
        self._rows, self._targets = rows, targets
        self._vocab, self._config, self._device = vocab, config, device
        self._progress, self._positions = progress, positions

    def fit(self, bert: MaskedLM, run: Run) -> Fitted:
        """One run; `bert` is trained in place.

        Raises:
            InputError: loss or scores are not finite.
        """
        model = TaskModel(bert, self._labels)
        model.init_head(run.seed)
        model.to(self._device.device).train()
        lengths = self._rows.lengths
        per_epoch = -(-len(lengths) // run.batch)
        trained = [p for _, p in model.trained()]
        if self._positions is not None:
            trained += self._positions.start(run.seed, self._device.device)
        groups = decay_groups(trained, self._config.weight_decay)
        optimizer = torch.optim.AdamW(groups, fused=True)  # each step sets its rate
        best: dict[str, Tensor] = {}
        best_metrics: dict[str, Json] = {}
        scores: list[float] = []
        mean, seconds, step = math.nan, 0.0, 0
        with self._progress.steps(run.epochs * per_epoch, 0):
            for epoch in range(run.epochs):
                started = time.perf_counter()
                total = torch.zeros((), dtype=torch.float64, device=self._device.device)
                for numbers in batches_of_epoch(lengths, run.batch, run.seed, epoch):
                    rate = linear_schedule(step, run.epochs * per_epoch, self._config.warmup)
                    for group in optimizer.param_groups:
                        group["lr"] = run.lr * rate
                    batch = read_batch(self._rows, numbers, self._vocab.pad, self._device.device)
                    loss = self._loss(model, batch)
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(trained, self._config.clip)
                    optimizer.step()
                    optimizer.zero_grad()
                    total += loss.detach()
                    step += 1
                    self._progress.advance(step)
                mean = float(total) / per_epoch
                if not math.isfinite(mean):
                    raise InputError(
                        f"the training loss is {mean} in epoch {epoch + 1} with lr {run.lr:g}, "
                        f"seed {run.seed}; try a lower lr"
                    )
                seconds += time.perf_counter() - started
                metrics = evaluate(self._task, model, self._dev, self._vocab, self._device)
                scores.append(score_of(self._task, metrics))
                self._progress.note(
                    f"epoch {epoch + 1} of {run.epochs}: loss {mean:.4f}, dev {scores[-1]:.4f} "
                    f"({seconds:.0f} s)"
                )
                if scores[-1] > max(scores[:-1], default=-math.inf):
                    best_metrics = {**metrics}
                    best = {n: p.detach().clone() for n, p in model.trained()}
                stale_epochs = len(scores) - 1 - int(np.argmax(scores))
                if self._config.patience and stale_epochs >= self._config.patience:
                    break
        with torch.no_grad():
            for name, parameter in model.trained():
                parameter.copy_(best[name])
        number = int(np.argmax(scores)) + 1
        return Fitted(model, best_metrics, max(scores), number, scores, mean, seconds)

    def _loss(self, model: TaskModel, batch: TaskBatch) -> Tensor:
        """The mean loss of a batch's places, and of its positions."""
        positions = self._positions
        taps = None if positions is None else positions.student_taps()
        with self._device.cast():
            scores = model(batch, taps)
            more = 0.0 if positions is None or taps is None else positions(batch, taps)
        scores, targets = scores.float(), self._targets
        hard = torch.from_numpy(targets.hard[batch.numbers]).to(scores.device)
        if targets.soft is None or targets.known is None:
            loss = hard_loss(self._labels, scores, hard)
        else:
            soft = torch.from_numpy(targets.soft[batch.numbers]).to(scores.device)
            known = torch.from_numpy(targets.known[batch.numbers]).to(scores.device)
            weight = torch.where(known, self._config.teacher_weight, 0.0)
            loss = (1 - weight) * hard_loss(self._labels, scores, hard)
            loss = loss + weight * soft_loss(self._labels, scores, soft, self._config.temperature)
        # A sum over places and not their mean, so that a batch without any has loss 0.
        return loss.sum() / max(len(hard), 1) + more


def hard_loss(labels: Labels, scores: Tensor, truth: Tensor) -> Tensor:
    """Of every place, [N]: cross-entropy or squared error; 0 where there is no label."""
    if labels.kind == "number":
        return (scores[:, 0] - truth).square().where(truth.isfinite(), 0.0)
    return F.cross_entropy(scores, truth, ignore_index=IGNORED, reduction="none")


def soft_loss(labels: Labels, scores: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Of every place, [N]: KL(teacher || student) at a temperature, times its square, so that the
    gradient keeps its size (Hinton et al. 2015); of numbers the squared error."""
    if labels.kind == "number":
        return (scores[:, 0] - teacher[:, 0]).square()
    log_p, log_q = ((x / temperature).log_softmax(-1) for x in (scores, teacher))
    return temperature**2 * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def targets_of(labels: Labels, split: Split) -> np.ndarray:
    """The label of every place of a split's rows: its number, or the score."""
    examples, rows = split.examples, split.rows
    if labels.kind == "number":
        return np.array(examples.labels, np.float32)
    number = {name: i for i, name in enumerate(labels.names)}
    if labels.kind == "classes":
        return np.array([number[name] for name in examples.labels or ()], np.int64)
    targets = np.full(len(rows.places), IGNORED, np.int64)
    assert examples.tags is not None
    for row in range(len(rows)):
        for place in range(rows.place_ends[row], rows.place_ends[row + 1]):
            word = rows.words[place]
            if word == CLASS:
                assert examples.labels is not None
                targets[place] = number[INTENT + examples.labels[row]]
            else:
                targets[place] = number[examples.tags[row][word]]
    return targets
