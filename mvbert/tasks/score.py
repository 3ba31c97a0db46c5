"""Scores a fine-tuned model: predictions of every example, and the task's metrics of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mvbert.errors import InputError
from mvbert.files import Json, read_json_object
from mvbert.model import huggingface
from mvbert.model.flops import encoder_products
from mvbert.model.huggingface import INTENT
from mvbert.progress import Progress
from mvbert.tasks.formats import Examples, Task, find_task, read_examples
from mvbert.tasks.metrics import check_installed, joint_metrics, tag_metrics, text_metrics
from mvbert.tasks.model import Labels, TaskModel, load_task_model
from mvbert.tasks.rows import CLASS, TaskRows, batches_by_length, make_rows, read_batch
from mvbert.text.vocab import Vocab
from mvbert.training.device import Device
from mvbert.training.machine import set_up_alone

PIECES = 4096  # about, of a forward pass


@dataclass(frozen=True)
class Split:
    """Examples and their rows."""

    examples: Examples
    rows: TaskRows


@torch.no_grad()
def scores_of(
    model: TaskModel, rows: TaskRows, vocab: Vocab, device: Device
) -> NDArray[np.float32]:
    """The scores of the labels at every place of `rows`, [places, labels]."""
    was_training = model.training
    model.eval()
    scores = np.zeros((len(rows.places), model.labels.width), np.float32)
    for numbers in batches_by_length(
        rows.lengths, max(1, PIECES // max(int(rows.lengths.max()), 1))
    ):
        batch = read_batch(rows, numbers, vocab.pad, device.device)
        with device.cast():
            outputs = model(batch)
        scores[batch.numbers] = outputs.float().cpu().numpy()
    model.train(was_training)
    return scores


def evaluate(
    task: Task, model: TaskModel, split: Split, vocab: Vocab, device: Device
) -> dict[str, float]:
    """The task's metrics over all examples of a split.

    Raises:
        InputError: a score is not finite.
    """
    scores = scores_of(model, split.rows, vocab, device)
    if not np.isfinite(scores).all():
        raise InputError(
            "the model's scores are not finite (NaN): its weights are corrupt, or the learning "
            "rate was too high"
        )
    return metrics_of(task, model.labels, split, scores)


def metrics_of(
    task: Task, labels: Labels, split: Split, scores: NDArray[np.float32]
) -> dict[str, float]:
    """The task's metrics of these scores."""
    examples, rows = split.examples, split.rows
    predictions: list[Any]
    if labels.kind == "number":
        predictions = scores[:, 0].astype(float).tolist()
        return text_metrics(task, examples.labels or [], predictions)
    if labels.kind == "classes":
        predictions = [labels.names[i] for i in scores.argmax(1)]
        return text_metrics(task, examples.labels or [], predictions)
    words = labels.part(True)
    tag = scores[:, words].argmax(1)
    tags: list[list[str | None]] = [[None] * len(truth) for truth in examples.tags or ()]
    intents: list[str] = []
    for row in range(len(rows)):
        for place in range(rows.place_ends[row], rows.place_ends[row + 1]):
            word = rows.words[place]
            if word == CLASS:
                best = labels.tags + scores[place, labels.part(False)].argmax()
                intents.append(labels.names[best].removeprefix(INTENT))
            else:
                tags[row][word] = labels.names[tag[place]]
    if labels.kind == "tags":
        return tag_metrics(examples.tags or [], tags)
    return joint_metrics(examples.labels or [], intents, examples.tags or [], tags)


# ---- the verb `eval` with a task -----------------------------------------------------------------


def run_score(
    name: str,
    task_name: str,
    data: str,
    columns: Sequence[str] = ("", "", ""),
    *,
    length: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    threads: int = 0,
) -> dict[str, Json]:
    """Scores a fine-tuned model on the labelled splits of a folder or archive, or on one file.

    Args:
        name: a name for mvbert.model.huggingface.find_model.
        task_name: empty: as in the folder's finetune.json.
        columns: of text, pair and label; empty: as there, or the task's own.

    Raises:
        InputError: the model has no label head, or another task's.
    """
    check_installed()
    progress = Progress("eval")
    folder = huggingface.find_model(name)
    model, vocab = load_task_model(folder, progress=progress)
    recorded: Any = {}
    if (folder / "finetune.json").exists():
        recorded = read_json_object(folder / "finetune.json").get("description") or {}
    if not task_name and "task" not in recorded:
        raise InputError(f"{folder} does not say what it was fine-tuned for; give --task")
    defaults = recorded.get("columns", {}) if recorded.get("task") else {}
    names = [
        column or defaults.get(key, "")
        for column, key in zip(columns, ("text", "pair", "label"), strict=True)
    ]
    task = find_task(task_name or str(recorded["task"]), *names)
    if task.kind != model.labels.kind:
        raise InputError(
            f"{folder} scores {_KINDS[model.labels.kind]}, but {task.name} asks for "
            f"{_KINDS[task.kind]}"
        )
    splits = {n: e for n, e in read_examples(task, data).items() if e.labelled and n != "train"}
    if not splits:
        raise InputError(f"{data} has no labelled examples but those of training")
    room = model.bert.config.max_position_embeddings
    if length > room:
        raise InputError(f"length is {length}, but {folder} has {room} positions")
    length = length or int(recorded.get("length") or 0) or room
    products = encoder_products(model.bert.config, PIECES)
    placement = set_up_alone(device, dtype, threads, products, gradients=False)
    progress.note(f"device {placement}")
    model = model.to(placement.device)
    report: dict[str, Json] = {"model": str(folder), "task": task.name, "data": data}
    for split, examples in splits.items():
        if not len(examples):
            raise InputError(f"{data}: {split} has no examples")
        _check_labels(folder, model.labels, examples, split, progress)
        rows = make_rows(task, examples, vocab, length)
        if note := rows.note(length):
            progress.note(f"{split}: {note}")
        metrics = evaluate(task, model, Split(examples, rows), vocab, placement)
        progress.note(", ".join([split, *(f"{n} {value:.4f}" for n, value in metrics.items())]))
        report[split] = {"examples": len(examples), **{n: round(v, 5) for n, v in metrics.items()}}
    return report


_KINDS = {
    "classes": "classes of a text",
    "number": "a number",
    "tags": "tags of words",
    "joint": "classes of a text and tags of its words",
}


def _check_labels(
    folder: Path, labels: Labels, examples: Examples, split: str, progress: Progress
) -> None:
    if labels.kind == "number":
        return
    names = {*(examples.labels or ()), *(tag for tags in examples.tags or () for tag in tags)}
    unknown = sorted(names - {name.removeprefix(INTENT) for name in labels.names})
    if len(unknown) == len(names):
        raise InputError(
            f"{folder} knows no label of {split} ({', '.join(unknown[:3])}); it scores "
            f"{', '.join(labels.names[:3])}, ...: is this another task's data?"
        )
    if unknown:
        progress.note(f"{split}: labels the model lacks count as wrong: {', '.join(unknown[:5])}")
