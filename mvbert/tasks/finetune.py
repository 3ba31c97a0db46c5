"""Fine-tunes a BERT on a task (the verb `finetune`): a grid, then several seeds of its best point.

Every run trains from the same folder and keeps the weights of its best epoch on the dev set. The
test set, where there is one, is scored with the runs of the chosen setting only. A line of
runs.jsonl is a run that is done; the same command continues after it.

    OUT/finetune.json   settings and inputs, which must be the same to resume; dtype; the result
    OUT/runs.jsonl      one object per run
    OUT/augmented.jsonl variants of the training texts, if they were asked for
    OUT/config.json ... the best run's model, a Hugging Face folder, when all runs are done
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mvbert.config import FinetuneConfig
from mvbert.errors import InputError
from mvbert.files import (
    Json,
    atomic_folder,
    atomic_write,
    json_text,
    move_contents,
    read_json_object,
    write_json,
)
from mvbert.model import huggingface
from mvbert.model.flops import encoder_products
from mvbert.model.weights import weights_id
from mvbert.progress import Progress
from mvbert.tasks.augment import augmented
from mvbert.tasks.card import task_card
from mvbert.tasks.formats import Examples, Task, find_task, join_examples, read_extra, read_task
from mvbert.tasks.loop import IGNORED, Fitted, Run, Targets, Trainer, targets_of
from mvbert.tasks.metrics import check_installed, has_spans
from mvbert.tasks.model import Labels, labels_of, load_bert, load_task_model, write_task_model
from mvbert.tasks.positions import Positions
from mvbert.tasks.rows import TaskRows, check_room, join_rows, make_rows
from mvbert.tasks.score import Split, evaluate
from mvbert.tasks.teacher import Teacher, cached_scores, keep_scores, read_unlabelled
from mvbert.text.vocab import Vocab
from mvbert.toml import to_dict, to_report
from mvbert.training.device import Device
from mvbert.training.environment import environment
from mvbert.training.machine import recorded_choice, set_up_alone
from mvbert.training.runs import lock, make_folder, recorded_job

DESCRIPTION, RUNS, KEPT = "finetune.json", "runs.jsonl", ".best"
VARIANTS, SCORES = "augmented.jsonl", ".teacher.safetensors"

# What may change when a job is continued: more seeds, and how it is computed.
_LATER = ("seeds", "device", "threads", "dtype")


@dataclass(frozen=True)
class FinetuneReport:
    """What a job reports."""

    output: str
    model: str
    task: str
    setting: dict[str, float]
    """The chosen one: batch, lr, epochs."""
    seeds: int
    scores: dict[str, dict[str, dict[str, Any]]]
    """By split and metric: the median, the range and the value of each seed."""
    seconds: float | None = None

    def to_json(self) -> dict[str, Json]:
        """The report as plain data, in which splits are keys like the others."""
        flat: dict[str, Json] = {}
        for name, value in to_report(self).items():
            flat |= value if name == "scores" else {name: value}
        return flat


@dataclass(frozen=True)
class Columns:
    """Names of columns of one's own tables; empty: the task's."""

    text: str = ""
    pair: str = ""
    label: str = ""


def run_finetune(
    name: str,
    task_name: str,
    data: Sequence[str],
    out: Path,
    config: FinetuneConfig,
    columns: Columns = Columns(),
    *,
    cased: bool = False,
) -> FinetuneReport:
    """Trains and scores all runs that are not done yet; writes the best one's model.

    Args:
        name: a name for mvbert.model.huggingface.find_model, e.g. a BERT's folder or a run folder.
        data: see mvbert.tasks.formats.read_task.

    Raises:
        InputError: bad input, or `out` holds another job.
    """
    check_installed()
    started = time.perf_counter()
    progress = Progress("finetune")
    task = find_task(task_name, columns.text, columns.pair, columns.label)
    folder = huggingface.find_model(name)
    if folder.resolve() == out.resolve():
        raise InputError(f"{out} is the model itself; give another --out")
    splits = read_task(task, data)
    if config.extra and "train" in splits:
        splits["train"] = join_examples([splits["train"], *read_extra(task, config.extra)])
    labels = _check(task, splits, data, progress)
    make_folder(out)
    with lock(out):
        job = _Job(folder, task, labels, splits, out, config, progress, cased)
        described = job.describe(data, columns)
        records = job.run()
        report = job.finish(records, described)
    return replace(report, seconds=round(time.perf_counter() - started, 1))


def _check(
    task: Task, splits: Mapping[str, Examples], data: Sequence[str], progress: Progress
) -> Labels:
    """The labels of the training examples.

    Raises:
        InputError: a split is missing, empty or has no labels, or there is nothing to learn.
    """
    where = " ".join(data)
    for split in ("train", "dev"):
        if split not in splits:
            raise InputError(
                f"{where} has no {split} set; give a folder with files called train and dev, or "
                "the files of train, dev and test"
            )
        if not len(splits[split]):
            raise InputError(f"{where}: the {split} set is empty")
        if not splits[split].labelled:
            raise InputError(f"{where}: the {split} set has no labels")
    train = splits["train"]
    for split, examples in splits.items():
        progress.note(f"{split}: {len(examples):,} examples")
        progress.note(examples.note)
    tags = [tag for of in train.tags or () for tag in of]
    if train.tags is not None and not tags:
        raise InputError(f"{where}: the train set has no tag")
    if task.kind == "number":
        if len({*train.labels}) == 1:  # type: ignore[misc]
            raise InputError(
                f"{where}: all training examples have the score {train.labels[0]}"  # type: ignore[index]
            )
        return labels_of("number", (), ())
    labels = labels_of(task.kind, train.labels or (), tags)
    for split, examples in splits.items():
        asked = {*(examples.labels or ())} | {tag for of in examples.tags or () for tag in of}
        unknown = asked - {*(train.labels or ()), *tags}
        if unknown == asked:
            raise InputError(
                f"{where}: no label of {split} ({', '.join(sorted(map(str, asked))[:3])}) is one "
                f"of train ({', '.join(labels.names[:3])})"
            )
        if unknown:
            progress.note(
                f"{split} has labels that training lacks, which count as wrong: "
                f"{', '.join(sorted(map(str, unknown))[:5])}"
            )
    if task.name == "tags" and not has_spans(tags):
        progress.note("the tags name no spans (B-, I-, ...): the accuracy of words is reported")
    return labels


class _Job:
    """The runs of one command."""

    def __init__(
        self, folder: Path, task: Task, labels: Labels, splits: dict[str, Examples], out: Path,
        config: FinetuneConfig, progress: Progress, cased: bool,
    ) -> None:  # fmt: skip
        self._folder, self._task, self._labels, self._out = folder, task, labels, out
        self._config, self._progress, self._cased = config, progress, cased
        bert, self._vocab, head = load_bert(folder, config.dropout, cased, progress=progress)
        progress.note(self._vocab.doubt)
        shape = self._shape = bert.config
        paired = splits["train"].pairs is not None
        if config.length > shape.max_position_embeddings:
            raise InputError(
                f"length is {config.length}, but {folder} has {shape.max_position_embeddings} "
                "positions"
            )
        self._length = config.length or shape.max_position_embeddings
        check_room(self._length, paired)
        if paired and shape.type_vocab_size < 2:
            progress.note(f"{folder} has one token type: both texts of a pair get it")
        rows = {
            split: make_rows(task, examples, self._vocab, self._length)
            for split, examples in splits.items()
        }
        for split, of in rows.items():
            if note := of.note(self._length):
                progress.note(f"{split}: {note}")
        self._splits = {split: Split(examples, rows[split]) for split, examples in splits.items()}
        self._settings = config.settings(task.epochs)
        self._teacher, self._unlabelled, self._positions = None, None, False
        if config.teacher:
            teacher = huggingface.find_model(config.teacher, "teacher")
            self._teacher = Teacher(teacher, task, labels, progress), weights_id(teacher)
            self._positions = self._read_positions(self._teacher[0].vocab)
        if config.unlabelled:
            self._unlabelled = read_unlabelled(task, config.unlabelled)
            progress.note(f"unlabelled: {len(self._unlabelled):,} texts")
        if config.augment and not head:
            raise InputError(
                f"{folder} has no masked-language-model head, which augment samples words from"
            )
        self._device = self._choose_device(shape)
        progress.note(f"device {self._device}; {torch.get_num_threads()} threads")
        self._trainer: Trainer | None = None  # made when a run is to be trained

    def _read_positions(self, of_teacher: Vocab) -> bool:
        """Whether the teacher's states are learnt position by position; says so."""
        if not self._config.distill:
            return False
        ours, theirs = ((v.sha256, v.lowercase, v.strip_accents) for v in (self._vocab, of_teacher))
        if ours != theirs:
            self._progress.note("the teacher has another vocabulary: its scores alone are learnt")
            return False
        self._progress.note(
            f"the teacher reads the same pieces: {' and '.join(self._config.distill)} are learnt "
            "at every position"
        )
        return True

    def _choose_device(self, shape: Any) -> Device:
        path = self._out / DESCRIPTION
        facts: Any = read_json_object(path).get("environment", {}) if path.exists() else {}
        lengths = self._splits["train"].rows.lengths
        return set_up_alone(
            self._config.device,
            self._config.dtype,
            self._config.threads,
            encoder_products(shape, int(self._settings[0][0] * lengths.mean())),
            gradients=True,
            recorded=recorded_choice(facts),
        )

    def describe(self, data: Sequence[str], columns: Columns) -> dict[str, Json]:
        """Writes finetune.json, or refuses another job's."""
        settings = to_dict(self._config)
        for later in _LATER:
            del settings[later]
        description: dict[str, Any] = {
            "task": self._task.name,
            "columns": to_dict(columns),
            "data": [*data],
            "examples": {name: len(split.examples) for name, split in self._splits.items()},
            "labels": len(self._labels.names),
            "model": weights_id(self._folder),
            "cased": self._cased,
            **settings,
            "teacher": self._teacher[1] if self._teacher else "",
            "unlabelled_texts": len(self._unlabelled) if self._unlabelled else 0,
        }
        path = self._out / DESCRIPTION
        if recorded := recorded_job(path, description):
            return recorded
        facts: dict[str, Json] = {
            "description": description,
            "from": str(self._folder),
            "environment": environment(self._device),
        }
        write_json(path, facts)
        return facts

    def _make_trainer(self) -> Trainer:
        """The training rows and what they are to give: labels, and the teacher's scores."""
        train = self._splits["train"]
        rows = train.rows
        hard = targets_of(self._labels, train)
        targets = Targets(hard)
        if self._teacher is not None:
            parts = [train.examples]
            if self._unlabelled is not None:
                parts.append(self._unlabelled)
            if self._config.augment:
                # Dropout is off, and the weights are those of MODEL.
                bert, _, _ = load_bert(self._folder, 0.0, self._cased)
                parts.append(
                    augmented(
                        self._out / VARIANTS, train.examples, self._config.augment, 0, bert,
                        self._vocab, self._length, self._device, self._progress,
                    )
                )  # fmt: skip
            rows_of = [make_rows(self._task, part, self._vocab, self._length) for part in parts]
            rows = join_rows(rows_of)
            soft, known = self._teacher_scores(parts, rows_of)
            none = np.nan if self._labels.kind == "number" else IGNORED
            hard = np.concatenate([hard, np.full(len(soft) - len(hard), none, hard.dtype)])
            targets = Targets(hard, soft, known)
        positions = None
        if self._positions:
            assert self._teacher is not None
            teacher = self._teacher[0].bert.to(self._device.device)
            positions = Positions(self._config, teacher, self._shape)
            positions.check(rows)
        return Trainer(
            self._task, self._labels, rows, targets, self._splits["dev"], self._vocab,
            self._config, self._device, self._progress, positions,
        )  # fmt: skip

    def _teacher_scores(
        self, parts: list[Examples], rows: list[TaskRows]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The teacher's scores at all places; found once, kept in OUT until the job is done."""
        assert self._teacher is not None
        path = self._out / SCORES
        places = sum(len(of.places) for of in rows)
        kept = cached_scores(path, places, self._labels.width)
        if kept is not None:
            return kept
        self._progress.note(f"teacher: scoring {sum(map(len, parts)):,} texts")
        found = [
            self._teacher[0].scores(part, of, self._device)
            for part, of in zip(parts, rows, strict=True)
        ]
        soft, known = (np.concatenate(values) for values in zip(*found, strict=True))
        keep_scores(path, soft, known)
        return soft, known

    def run(self) -> list[dict[str, Any]]:
        """All runs; returns the records of the chosen setting, by seed."""
        records = _read_records(self._out / RUNS)
        for setting in self._settings if len(self._settings) > 1 else ():
            self._one(Run(*setting, 0), records, None)
        done = [r for r in records if _setting(r) in self._settings and r["seed"] == 0]
        chosen = _setting(max(done, key=lambda r: r["score"])) if done else self._settings[0]
        # Runs of a grid were not scored on the test set: that is for the chosen setting alone.
        final = [name for name in self._splits if name not in ("train", "dev")]
        for seed in range(self._config.seeds):
            self._one(Run(*chosen, seed), records, final)
        of_chosen = [r for r in records if _setting(r) == chosen]
        return sorted(of_chosen, key=lambda r: r["seed"])[: self._config.seeds]

    def _one(self, run: Run, records: list[dict[str, Any]], final: list[str] | None) -> None:
        """A run and its scores, unless they are recorded; `final`: further splits to score."""
        number = next((i for i, r in enumerate(records) if Run.of(r) == run), None)
        missing = [s for s in final or () if number is None or s not in records[number]]
        if number is not None and not missing:
            return
        if number is not None and self._kept_run() == run:
            model, _ = load_task_model(self._out / KEPT)
            model = model.to(self._device.device)
            record = records[number]
        else:
            fitted = self._fit(run)
            model, record = fitted.model, fitted.record(run)
            if record["score"] > max((r["score"] for r in records), default=-math.inf):
                self._keep(fitted, run)
        for split in final or ():
            record[split] = evaluate(
                self._task, model, self._splits[split], self._vocab, self._device
            )
        if number is None:
            records.append(record)
        else:
            records[number] = record
        atomic_write(self._out / RUNS, "".join(json_text(r) + "\n" for r in records))
        self._progress.note(_line(run, record))

    def _fit(self, run: Run) -> Fitted:
        if self._trainer is None:
            self._trainer = self._make_trainer()
        torch.manual_seed(run.seed)
        bert, _, _ = load_bert(self._folder, self._config.dropout, self._cased, run.seed)
        return self._trainer.fit(bert, run)

    def _keep(self, fitted: Fitted, run: Run) -> None:
        """Keeps the best run's model for the end, and for its score on the test set."""
        with atomic_folder(self._out / KEPT, overwrite=True) as partial:
            write_task_model(partial, fitted.model, self._vocab)
            write_json(partial / "run.json", to_dict(run))

    def _kept_run(self) -> Run | None:
        path = self._out / KEPT / "run.json"
        return Run.of(read_json_object(path)) if path.exists() else None

    def finish(self, records: list[dict[str, Any]], described: dict[str, Json]) -> FinetuneReport:
        """Moves the best model to its place; writes and returns the result."""
        report = FinetuneReport(
            output=str(self._out),
            model=str(self._folder),
            task=self._task.name,
            setting=dict(zip(("batch", "lr", "epochs"), _setting(records[0]), strict=True)),
            seeds=len(records),
            scores={
                split: {
                    name: _spread([r[split][name] for r in records]) for name in records[0][split]
                }
                for split in ("dev", *(s for s in self._splits if s not in ("train", "dev")))
            },
        )
        self._publish(records)
        write_json(self._out / DESCRIPTION, {**described, "result": report.to_json()})
        return report

    def _publish(self, records: list[dict[str, Any]]) -> None:
        """Moves the kept model's files to OUT."""
        kept, run = self._out / KEPT, self._kept_run()
        if run is None:
            return
        if (kept / "config.json").exists():  # not moved before an interruption
            record = next(r for r in records if Run.of(r) == run)
            shape = huggingface.read_model_config(kept)
            card = task_card(self._task.name, shape, self._labels.kind, record)
            atomic_write(kept / "README.md", card)
        move_contents(kept, self._out, last="config.json", leave=("run.json",))
        (self._out / SCORES).unlink(missing_ok=True)


def _setting(record: Mapping[str, Any]) -> tuple[int, float, int]:
    return record["batch"], record["lr"], record["epochs"]


def _line(run: Run, record: Mapping[str, Any]) -> str:
    scores = ", ".join(
        f"{split} {name} {value:.4f}"
        for split, metrics in record.items()
        if isinstance(metrics, dict)
        for name, value in metrics.items()
    )
    return (
        f"batch {run.batch}, lr {run.lr:g}, seed {run.seed}: {scores} (epoch "
        f"{record['epoch']} of {run.epochs}, {record['seconds']:.0f} s)"
    )


def _spread(values: list[float]) -> dict[str, Any]:
    return {
        "median": round(statistics.median(values), 5),
        "min": round(min(values), 5),
        "max": round(max(values), 5),
        "seeds": [round(value, 5) for value in values],
    }


def _read_records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            Run.of(record), record["score"], record["dev"]
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{path}:{number} is not the record of a run; delete that line"
            ) from None
        records.append(record)
    return records
