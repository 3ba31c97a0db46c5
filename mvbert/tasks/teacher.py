"""Task distillation: the scores of a model that knows the task, for a student to learn.

The teacher has the same labels and any vocabulary: it reads the same texts in its own pieces. Its
scores are found once, for all runs: of a text one row of scores, of words those of each word's
first piece (Hinton, Vinyals and Dean 2015, arXiv 1503.02531; Turc et al. 2019, arXiv 1908.08962).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from mvbert.errors import InputError
from mvbert.files import atomic_write
from mvbert.model.masked_lm import MaskedLM
from mvbert.progress import Progress
from mvbert.tasks.formats import Examples, Task
from mvbert.tasks.model import Labels, TaskModel, load_task_model
from mvbert.tasks.rows import TaskRows, make_rows
from mvbert.tasks.score import scores_of
from mvbert.tasks.sources import TABLES, read_files, read_table
from mvbert.training.device import Device


class Teacher:
    """A fine-tuned model whose labels are those of the task.

    Attributes:
        vocab: its vocabulary.

    Raises:
        InputError: it scores something else.
    """

    def __init__(self, folder: Path, task: Task, labels: Labels, progress: Progress) -> None:
        self._model, self.vocab = load_task_model(folder, "teacher", progress)
        self._task, self._labels = task, labels
        self._order = _order(folder, self._model, labels, progress)

    @property
    def bert(self) -> MaskedLM:
        """Its encoder."""
        return self._model.bert

    def scores(
        self, examples: Examples, rows: TaskRows, device: Device
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Scores [places, labels] at the student's places, and which of them the teacher has.

        Args:
            rows: the student's rows of these examples.
        """
        room = self._model.bert.config.max_position_embeddings
        own = make_rows(self._task, examples, self.vocab, room)
        model = self._model.to(device.device)
        outputs = scores_of(model, own, self.vocab, device)[:, self._order]
        if not np.isfinite(outputs).all():
            raise InputError("the teacher's scores are not finite (NaN): its weights are corrupt")
        # Places by their row and word; a word behind the teacher's last position has none there.
        width = max(int(rows.words.max(initial=0)), int(own.words.max(initial=0))) + 2
        keys, own_keys = (_row_of_place(r) * width + r.words + 1 for r in (rows, own))
        at = np.searchsorted(own_keys, keys).clip(max=max(len(own_keys) - 1, 0))
        known = own_keys[at] == keys if len(own_keys) else np.zeros(len(keys), bool)
        scores = np.zeros((len(keys), self._labels.width), np.float32)
        scores[known] = outputs[at[known]]
        return scores, known


def _row_of_place(rows: TaskRows) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(rows)), np.diff(rows.place_ends))


def _order(folder: Path, model: TaskModel, labels: Labels, progress: Progress) -> list[int]:
    """The teacher's scores in the order of the student's labels."""
    source = model.labels
    if source.kind != labels.kind or source.width != labels.width:
        raise InputError(
            f"teacher {folder} scores {source.width} labels ({source.kind}), but the task has "
            f"{labels.width} ({labels.kind}); fine-tune it on this task first"
        )
    if source.names == labels.names:
        return list(range(source.width))
    if all(name == f"LABEL_{i}" for i, name in enumerate(source.names)):
        progress.note(
            f"teacher {folder} does not name its labels; taken as {', '.join(labels.names)}"
        )
        return list(range(source.width))
    missing = [name for name in labels.names if name not in source.names]
    if missing:
        raise InputError(
            f"teacher {folder} scores {', '.join(source.names[:3])}, but the task has "
            f"{', '.join(missing[:3])}: it was fine-tuned for another task"
        )
    return [source.names.index(name) for name in labels.names]


def read_unlabelled(task: Task, paths: tuple[str, ...]) -> Examples:
    """Texts without labels: lines of a .txt, or the task's columns of a table.

    Raises:
        InputError: a file cannot be read, has no text, or a .txt is to give pairs.
    """
    texts: list[object] = []
    pairs: list[str] | None = [] if task.pair else None
    for path in paths:
        for file in read_files(path):
            if file.suffix in TABLES:
                table = read_table(file, skip_broken=task.skip_broken)
                values: list[object] = table.column(task.text, "text")
                if pairs is not None:
                    pairs += table.column(task.pair, "second text")
            elif pairs is not None:
                raise InputError(f"{file.name}: pairs of texts need a table with two columns")
            else:
                values = [line for line in file.lines() if line.strip()]
            for text, number in zip(values, range(1, len(values) + 1), strict=True):
                if not isinstance(text, (str, list)):
                    raise InputError(f"{file.name}, row {number}: {text!r} is not a text")
            texts += values
    if not texts:
        raise InputError(f"{' '.join(paths)}: there is no text")
    if task.kind in ("tags", "joint"):
        words = [t if isinstance(t, list) else str(t).split() for t in texts]
        return Examples(words, None, None, None, [])
    return Examples([str(text) for text in texts], pairs, None, None, [])


# ---- the cache -----------------------------------------------------------------------------------


def cached_scores(
    path: Path, places: int, labels: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]] | None:
    """The scores that an earlier start of the same job found; None if there are none."""
    if not path.exists():
        return None
    try:
        saved = load_file(path)
        soft, known = saved["scores"], saved["known"]
    except (SafetensorError, KeyError, OSError):
        raise InputError(f"{path} is not complete; remove it to score the texts again") from None
    if soft.shape != (places, labels) or known.shape != (places,):
        raise InputError(f"{path} has scores of other texts; remove it to score them again")
    return soft, known.astype(bool)


def keep_scores(path: Path, soft: NDArray[np.float32], known: NDArray[np.bool_]) -> None:
    atomic_write(path, save({"scores": soft, "known": known.astype(np.uint8)}))
