"""Settings of a study: its arms, what is measured, and published results beside them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

from mvbert.config import FinetuneConfig, JobConfig, MeasureConfig, Stage1Config, Stage2Config
from mvbert.errors import InputError
from mvbert.tasks.formats import Task, find_task
from mvbert.toml import from_dict, to_dict

TABLES = ("vocab", "row", "stage1", "stage2")  # of a job, which an arm may change
MODELS = ("student", "teacher", "trimmed", "stage1")


@dataclass(frozen=True)
class StudyMeasureConfig(MeasureConfig):
    """What a study measures besides the held-out loss."""

    export: bool = False
    """Export a model of every arm to ONNX, for its bytes and its latency on one CPU thread."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Settings of fine-tuning that all tasks and arms share."""
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> data, task (default: the name) and the settings of finetune that differ."""


@dataclass(frozen=True)
class PublishedModel:
    """Results that somebody else published."""

    parameters: int = 0
    """Number of parameters."""
    source: str = ""
    """Where the results stand, and of which split they are."""
    scores: dict[str, Any] = field(default_factory=dict)
    """Task -> metric -> value, from 0 to 1; metrics as in the study's table."""

    def __post_init__(self) -> None:
        if self.parameters < 1 or not self.source:
            raise InputError("a published model needs parameters and its source")
        for task, metrics in self.scores.items():
            for metric, value in metrics.items() if isinstance(metrics, dict) else [("", None)]:
                if not isinstance(value, float) or not 0 <= value <= 1:
                    raise InputError(
                        f"scores.{task}.{metric} must be a number from 0 to 1, got {value!r}"
                    )


@dataclass(frozen=True)
class StudyConfig(JobConfig):
    """A study: common settings, as for `mvbert distill`, and the arms that differ from them."""

    out: str = "runs/study"
    """Study folder."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of rows, masks, dropout and initial weights; every arm runs once with each."""
    stage1_seeds: bool = False
    """Also run Stage I with each seed, instead of once with stage1.seed."""
    baseline: str = ""
    """The arm to compare others with (empty: the first)."""
    measure: StudyMeasureConfig = field(default_factory=StudyMeasureConfig)
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> tables vocab, row, stage1, stage2 and finetune with the fields that differ, and
    model: student (default); or, not trained by the arm, teacher, trimmed (the teacher with the
    student's vocabulary, by `mvbert trim`) or stage1 (the Stage I teacher, reading student pieces).
    finetune.teacher is an arm whose fine-tuned model is the teacher on every task."""
    chosen: tuple[str, ...] = ()
    """The arms to run (empty: all)."""
    published: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> parameters, source and scores of models from the literature, for plots and table."""

    def __post_init__(self) -> None:
        if not self.arms:
            raise InputError("a study needs arms: [arms.NAME.stage2] and so on")
        if not self.seeds or len({*self.seeds}) < len(self.seeds):
            raise InputError(f"seeds must be different numbers, got {list(self.seeds)}")
        if self.baseline and self.baseline not in self.arms:
            raise InputError(f"the baseline {self.baseline!r} is not one of the arms")
        for name in self.chosen:
            if name not in self.arms:
                raise InputError(f"chosen: {name!r} is not one of the arms")
        settings = {}
        for name, tables in self.arms.items():
            if not re.fullmatch(r"[A-Za-z0-9_+-]+", name):
                raise InputError(
                    f"arm names may have letters, digits, +, - and _ only, got {name!r}"
                )
            self._check_tables(name, tables)
            setting = self.setting(name)
            if self.trained(name):
                settings[name] = setting
                try:
                    setting.check_start("student", setting.stage2)
                except InputError as error:
                    raise InputError(f"arms.{name}: {error}") from None
        if not settings:
            raise InputError("a study needs an arm with a student")
        first, *others = settings
        expected = _common_values(settings[first])
        for name in others:
            for key, value in _common_values(settings[name]).items():
                if value != expected[key]:
                    raise InputError(
                        f"arms must have the same {key}, but {first} has {expected[key]} and "
                        f"{name} has {value}"
                    )
        if self.measure.finetune.teacher:
            raise InputError("measure.finetune.teacher: a task's teacher is a setting of an arm")
        for name in self.measure.tasks:
            self.task(name)
            for arm in self.arms:
                self._check_teacher(arm, name)
        for name in self.published:
            self.published_model(name)

    def _check_tables(self, name: str, tables: dict[str, Any]) -> None:
        for table, values in tables.items():
            if table == "model" and values in MODELS:
                continue
            if table == "model":
                raise InputError(
                    f"arms.{name}.model must be one of {', '.join(MODELS)}, got {values!r}"
                )
            if table not in (*TABLES, "finetune") or not isinstance(values, dict):
                raise InputError(
                    f"arms.{name} may have tables {', '.join(TABLES)} and finetune, and model; "
                    f"got {table!r}"
                )
        measured = self.measure.tasks or self.measure.export
        if ("finetune" in tables and not self.measure.tasks) or not (
            self.trained(name) or measured
        ):
            raise InputError(
                f"arms.{name} has nothing to be fine-tuned on; add a table [measure.tasks.TASK]"
            )

    def _check_teacher(self, arm: str, task: str) -> None:
        teacher = self.tuning(arm, task).teacher
        if not teacher:
            return
        if teacher not in self.arms:
            raise InputError(f"arms.{arm}.finetune.teacher: {teacher!r} is not one of the arms")
        if self.tuning(teacher, task).teacher:
            raise InputError(
                f"arms.{arm}.finetune.teacher: the arm {teacher!r} has a teacher as well; expected "
                "an arm that learns from the labels alone"
            )

    def kind(self, name: str) -> str:
        """Which model an arm is about, one of MODELS."""
        return str(self.arms[name].get("model", "student"))

    def trained(self, name: str) -> bool:
        """Whether an arm has a student, one for each seed."""
        return self.kind(name) == "student"

    def student(self, name: str) -> str:
        """The arm whose students an arm has: the first with the same settings of both stages."""
        setting = self.setting(name)
        return next(a for a in self.arms if self.trained(a) and self.setting(a) == setting)

    def task(self, name: str) -> tuple[Task, tuple[str, ...]]:
        """A task of [measure.tasks] and its data.

        Raises:
            InputError: no such task, or it has no data.
        """
        values = self.measure.tasks[name]
        place = f"measure.tasks.{name}"
        if not isinstance(values, dict):
            raise InputError(f"{place} must be a table, got {values!r}")
        data = values.get("data")
        if not isinstance(data, (list, tuple)) or not all(isinstance(d, str) for d in data):
            raise InputError(f"{place}.data must be a list of files, folders or archives")
        if not data:
            raise InputError(f"{place}.data is empty; name a folder, an archive or files")
        try:
            return find_task(str(values.get("task", name))), tuple(data)
        except InputError as error:
            raise InputError(f"{place}: {error}; set task") from None

    def tuning(self, arm: str, task: str) -> FinetuneConfig:
        """The settings of fine-tuning an arm on a task; `teacher` is an arm."""
        values = to_dict(self.measure.finetune)
        own = {k: v for k, v in self.measure.tasks[task].items() if k not in ("task", "data")}
        values |= own | self.arms[arm].get("finetune", {})
        return from_dict(FinetuneConfig, values, f"arms.{arm} on {task}")

    def published_model(self, name: str) -> PublishedModel:
        values = self.published[name]
        return from_dict(PublishedModel, values, f"published.{name}")

    def setting(self, name: str, seed: int | None = None) -> JobConfig:
        """The settings of arm `name`, with its seed replaced by `seed` if given."""
        tables: dict[str, Any] = {}
        for table in TABLES:
            common = getattr(self, table)
            values = to_dict(common) | self.arms[name].get(table, {})
            tables[table] = from_dict(type(common), values, f"arms.{name}.{table}")
        for table in ("stage1", "stage2"):
            tables[table] = tables[table].counted(tables["row"].length)
        if seed is not None:
            tables["stage2"] = replace(tables["stage2"], seed=seed)
            if self.stage1_seeds:
                tables["stage1"] = replace(tables["stage1"], seed=seed)
        return JobConfig(self.teacher, self.corpus, **tables)

    def scaled(self, share: float) -> StudyConfig:
        """This study with the steps of both stages multiplied by `share`."""
        if not share > 0:
            raise InputError(f"scale must be above 0, got {share}")

        def shorter(values: dict[str, Any]) -> dict[str, Any]:
            steps = {
                key: max(1, round(values[key] * share))
                for key in ("steps", "eval_every", "save_every", "pieces")
                if values.get(key)
            }
            return {**values, **steps}

        arms = {
            name: {
                table: shorter(values) if table in ("stage1", "stage2") else values
                for table, values in tables.items()
            }
            for name, tables in self.arms.items()
        }
        return replace(
            self,
            arms=arms,
            stage1=from_dict(Stage1Config, shorter(to_dict(self.stage1)), "stage1"),
            stage2=from_dict(Stage2Config, shorter(to_dict(self.stage2)), "stage2"),
        )


def pieces_at(setting: JobConfig, step: int) -> int:
    """Number of pieces that Stage II has seen at `step`."""
    return step * setting.stage2.rows * setting.row.length


def _common_values(setting: JobConfig) -> dict[str, int]:
    """Values that must be the same in all arms of a study."""
    stage2 = setting.stage2
    return {
        "pieces": pieces_at(setting, stage2.steps),
        "stage2.eval_every": stage2.eval_every,
        "stage2.eval_rows": stage2.eval_rows,
    }
