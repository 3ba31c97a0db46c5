"""The report of a study's fine-tuned models: a table like the paper's, and scores against size.

Every figure is a median over all runs of an arm, students' seeds times seeds of fine-tuning, with
the lowest and the highest. Of a task with a labelled test set that set is reported, else the dev
set, which also chose the epoch and the setting.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mvbert.files import Json, atomic_file, atomic_write
from mvbert.progress import Progress
from mvbert.study.settings import StudyConfig
from mvbert.tasks.formats import find_task

Lines = list[dict[str, Any]]  # of models.jsonl
Column = tuple[str, str]  # a task and a metric

_DETAILS = ("precision", "recall", "slot_precision", "slot_recall", "slot_accuracy")
_NAMES = {
    "f1": "F1", "f1_macro": "macro F1", "slot_f1": "slot F1", "intent_accuracy": "intent accuracy",
    "sentence_accuracy": "sentence accuracy",
}  # fmt: skip
# Key of a line, column heading, unit.
_SIZES = [
    ("float16_bytes", "float16, MB", 1e6),
    ("int8_bytes", "int8, MB", 1e6),
    ("float32_milliseconds", "float32, ms", 1.0),
    ("int8_milliseconds", "int8, ms", 1.0),
]
_AXES = {
    "bytes": ("float16_bytes", 1e6, "float16 ONNX file, MB"),
    "latency": ("float32_milliseconds", 1.0, "one row on one CPU thread, float32, ms"),
}
_MISMATCHED = "_mismatched"


def write_task_report(out: Path, lines: Lines, config: StudyConfig) -> dict[str, Json]:
    """Writes tasks.md and, if matplotlib is installed, scores-bytes.svg and scores-latency.svg.

    Returns:
        Each arm's medians by task and metric.
    """
    arms: dict[str, Lines] = {}
    for line in lines:
        arms.setdefault(line["arm"], []).append(line)
    atomic_write(out / "tasks.md", table(arms, config))
    if importlib.util.find_spec("matplotlib") is None:
        Progress("study").note("skipping plots: they need matplotlib (pip install 'mvbert[study]')")
    elif config.measure.export and config.measure.tasks:
        for axis in _AXES:
            draw_scores(out / f"scores-{axis}.svg", axis, arms, config)
    report: dict[str, Json] = {}
    for arm, arm_lines in arms.items():
        medians: dict[str, Any] = {}
        for task, metric in columns(arms):
            medians.setdefault(task, {})[metric] = _median(values_of(arm_lines, (task, metric)))
        report[arm] = medians
    return report


# ---- what is reported ----------------------------------------------------------------------------


def reported_split(scores: dict[str, Any]) -> str:
    """The test set if it has labels, else the dev set."""
    return "test" if "test" in scores else "dev"


def columns(arms: dict[str, Lines]) -> list[Column]:
    """The tasks and metrics of the table; those of a mismatched set have _mismatched behind."""
    keys: dict[Column, None] = {}
    for lines in arms.values():
        for task, result in lines[0]["tasks"].items():
            split = reported_split(result["scores"])
            for end in ("", _MISMATCHED):
                for metric in result["scores"].get(split + end, {}):
                    if metric not in _DETAILS:
                        keys[task, metric + end] = None
    return [*keys]


def values_of(lines: Lines, column: Column) -> list[float]:
    """The metric of every run of an arm."""
    task, metric = column
    values: list[float] = []
    for line in lines:
        scores = line["tasks"].get(task, {}).get("scores", {})
        end = _MISMATCHED if metric.endswith(_MISMATCHED) else ""
        metrics = scores.get(reported_split(scores) + end, {}).get(metric.removesuffix(end), {})
        values += metrics.get("seeds", [])
    return values


def _median(values: list[float]) -> float | None:
    return round(statistics.median(values), 5) if values else None


# ---- the table -----------------------------------------------------------------------------------


def table(arms: dict[str, Lines], config: StudyConfig) -> str:
    """Sizes and scores of every arm, and published results in a second table."""
    shown = columns(arms)
    sizes = [size for size in _SIZES if all(size[0] in lines[0] for lines in arms.values())]
    heads = [*(name for _, name, _ in sizes), *(_heading(column, arms) for column in shown)]
    text = [
        "Median over all runs (lowest to highest), in percent; runs: students times seeds of "
        "fine-tuning. Parameters: encoder and pooler, as the paper counts them."
        + (
            " Bytes: ONNX files of the encoder. ms: one row of 128 pieces on one thread of this "
            "study's machine."
            if sizes
            else ""
        ),
        "",
        "| model | runs | vocabulary | parameters | " + " | ".join(heads) + " |",
        "|" + " --- |" * (4 + len(heads)),
    ]
    for arm, lines in arms.items():
        line = lines[0]
        seeds = max((len(values_of([line], column)) for column in shown), default=0)
        cells = [arm, f"{len(lines)} x {seeds}", f"{line['vocab']:,}", f"{line['parameters']:,}"]
        cells += [f"{line[key] / unit:.2f}" for key, _, unit in sizes]
        cells += [_cell(values_of(lines, column)) for column in shown]
        text.append("| " + " | ".join(cells) + " |")
    text += ["", *_notes(arms)]
    if config.published:
        text += ["", *_published(shown, config)]
    return "\n".join(text) + "\n"


def _heading(column: Column, arms: dict[str, Lines]) -> str:
    task, metric = column
    scores = next(
        lines[0]["tasks"][task]["scores"] for lines in arms.values() if task in lines[0]["tasks"]
    )
    split = reported_split(scores) + (_MISMATCHED if metric.endswith(_MISMATCHED) else "")
    plain = metric.removesuffix(_MISMATCHED)
    return f"{task} {_NAMES.get(plain, plain)} ({split.replace('_', ' ')})"


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    text = f"{100 * statistics.median(values):.1f}"
    if len(values) > 1:
        text += f" ({100 * min(values):.1f} to {100 * max(values):.1f})"
    return text


def _notes(arms: dict[str, Lines]) -> list[str]:
    """How many examples every task was trained on."""
    examples: dict[str, int] = {}
    for lines in arms.values():
        for task, result in lines[0]["tasks"].items():
            examples[task] = result["examples"]["train"]
    if not examples:
        return []
    counts = ", ".join(f"{task} {count:,}" for task, count in examples.items())
    return [f"Training examples: {counts}."]


def _published(chosen: list[Column], config: StudyConfig) -> list[str]:
    """Rows of published results under the same columns; what nobody published is left empty."""
    models = {name: config.published_model(name) for name in config.published}
    heads = [f"{task} {_NAMES.get(metric, metric.replace('_', ' '))}" for task, metric in chosen]
    text = [
        "Published, as cited; other data, training and splits:",
        "",
        "| model | parameters | " + " | ".join([*heads, "source"]) + " |",
        "|" + " --- |" * (3 + len(heads)),
    ]
    for name, model in models.items():
        values = [model.scores.get(task, {}).get(metric) for task, metric in chosen]
        cells = ["" if value is None else f"{100 * value:.1f}" for value in values]
        cells = [name, f"{model.parameters:,}", *cells, model.source]
        text.append("| " + " | ".join(cells) + " |")
    return text


# ---- the plots -----------------------------------------------------------------------------------


def draw_scores(path: Path, axis: str, arms: dict[str, Lines], config: StudyConfig) -> None:
    """Plots the main metric of every task against bytes or latency: ours and published models.

    Published models have 2 bytes a parameter in the one plot. In the other they are marks at the
    right edge: no latency on this machine is known of them.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    key, unit, label = _AXES[axis]
    tasks = [*dict.fromkeys(task for task, _ in columns(arms))]
    kinds = {task: lines[0]["tasks"][task]["task"] for task in tasks for lines in arms.values()}
    with matplotlib.rc_context({"svg.hashsalt": "mvbert", "svg.fonttype": "none"}):
        figure = Figure(figsize=(4.5 * len(tasks), 4), layout="constrained")
        panels = figure.subplots(1, len(tasks), squeeze=False)[0]
        for panel, task in zip(panels, tasks, strict=True):
            main = find_task(kinds[task]).main[-1]
            column = task, main if (task, main) in columns(arms) else "accuracy"
            for i, (arm, lines) in enumerate(arms.items()):
                values = [100 * value for value in values_of(lines, column)]
                if values:
                    middle = statistics.median(values)
                    spread = [[middle - min(values)], [max(values) - middle]]
                    panel.errorbar(
                        lines[0][key] / unit, middle, spread, marker="o", color=f"C{i}",
                        linestyle="", capsize=3, label=arm,
                    )  # fmt: skip
            for name in config.published:
                model = config.published_model(name)
                value = model.scores.get(task, {}).get(column[1])
                if value is None:
                    continue
                if axis == "bytes":
                    at = 2 * model.parameters / unit
                    panel.plot(at, 100 * value, marker="x", color="grey", linestyle="")
                    place: dict[str, Any] = {
                        "xy": (at, 100 * value), "ha": "center", "va": "bottom"
                    }  # fmt: skip
                else:
                    edge = panel.get_yaxis_transform()
                    panel.plot(
                        1.0, 100 * value, marker="<", color="grey", fillstyle="none",
                        transform=edge, clip_on=False,
                    )  # fmt: skip
                    place = {"xy": (0.97, 100 * value), "xycoords": edge, "ha": "right",
                             "va": "center"}  # fmt: skip
                panel.annotate(name, fontsize="x-small", color="grey", **place)
            panel.set_xscale("log")
            panel.set_xlabel(label)
            panel.set_ylabel(_heading(column, arms) + ", %")
            panel.grid(alpha=0.3)
        panels[0].legend(fontsize="small", title=_legend(axis) if config.published else None)
        with atomic_file(path) as file:
            figure.savefig(file, format="svg", metadata={"Date": None})


def _legend(axis: str) -> str:
    if axis == "bytes":
        return "x: published, 2 bytes a parameter"
    return "<: published, latency unknown"
