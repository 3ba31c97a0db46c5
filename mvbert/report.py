"""What people read at the end: the report of a distillation, and where a run stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mvbert import checkpoint
from mvbert.errors import InputError, MissingExtra
from mvbert.files import Json, atomic_file, read_json_object
from mvbert.runs import read_log


def print_distill_report(report: dict[str, Any]) -> None:
    """Sizes, what both stages learned, the arms side by side and filled-in sentences, to stdout."""
    console = Console(highlight=False, soft_wrap=True)
    learned = Table("Stage I, held-out loss (nats per masked piece)", "before", "after")
    for name, key in (
        ("teacher pieces", "stage1_teacher_loss"),
        ("student pieces", "stage1_student_loss"),
    ):
        before, after = report[key]
        learned.add_row(name, *("-" if x is None else f"{x:.3f}" for x in (before, after)))
    console.print(learned)

    arms = Table("Stage II student", "held-out loss", "masked pieces right", "pieces seen")
    for name, heldout in report["arms"].items():
        best = " (best)" if name == report["best"] and len(report["arms"]) > 1 else ""
        arms.add_row(
            name + best,
            f"{heldout['loss']:.3f}",
            f"{heldout['accuracy']:.1%}",
            f"{report['pieces'][name] / 1e6:.2f} M",
        )
    console.print(arms)

    sizes = Table("size", "parameters", "bytes (float32)")
    for name in ("teacher", "student"):
        sizes.add_row(
            name,
            f"{report[f'{name}_parameters'] / 1e6:.2f} M",
            f"{report[f'{name}_bytes'] / 1e6:.1f} MB",
        )
    console.print(sizes)
    for filled in report["filled"]:
        console.print(f"  {filled['sentence']}", markup=False)
        console.print(f"    Stage I teacher, student pieces: {filled['teacher']}", markup=False)
        console.print(f"    student:                         {filled['student']}", markup=False)


def run_info(folder: Path) -> dict[str, Json]:
    """Where a run stands: its stage, steps done and losses; of a job or study, every run in it.

    Raises:
        InputError: `folder` is not the folder of a run.
    """
    if not (folder / "run.json").is_file():
        runs = sorted(path.parent for path in folder.rglob("run.json"))
        if not runs:
            raise InputError(f"{folder}: no run.json in it; expected the folder of a training run")
        return {"runs": {str(run.relative_to(folder)): run_info(run) for run in runs}}
    run = read_json_object(folder / "run.json")
    description: Any = run.get("description")
    if not isinstance(description, dict) or "environment" not in run:
        raise InputError(f"{folder / 'run.json'} does not say what the run is: was it changed?")
    # A run that has only just started has no log.
    records = read_log(folder) if (folder / "log.jsonl").exists() else []
    trained = [r for r in records if "heldout" not in r]
    evaluated = [r for r in records if "heldout" in r]
    return {
        "stage": description["stage"],
        "steps": description["train"]["steps"],
        "step": max((r["step"] for r in records), default=0),
        "complete": (folder / "model" / "manifest.json").is_file(),
        "last": trained[-1] if trained else None,
        "heldout_first": evaluated[0]["heldout"] if evaluated else None,
        "heldout_last": evaluated[-1]["heldout"] if evaluated else None,
        "best_checkpoint": checkpoint.best(folder / "checkpoints"),
        "environment": run["environment"],
        "resumed": run.get("resumed", []),
    }


def plot_run(folder: Path, image: Path) -> None:
    """Draws a run's loss curves, training and held out, over the pieces seen.

    Raises:
        InputError: `folder` is not the folder of a run, or has nothing to draw.
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("plotting", "matplotlib", "study") from None
    records = read_log(folder)
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        heldout = record.get("heldout")
        for name, value in (heldout or record).items():
            if (name == "loss" or name.endswith("_loss")) and value is not None:
                pieces, values = curves.setdefault(
                    f"{name}, held out" if heldout else name, ([], [])
                )
                pieces.append(record["pieces"] / 1e6)
                values.append(value)
    if not curves:
        raise InputError(f"{folder / 'log.jsonl'} has no losses to draw yet")
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, (pieces, values) in curves.items():
        held = name.endswith("held out")
        axes.plot(pieces, values, label=name, marker="o" if held else None, linewidth=1 + held)
    axes.set(xlabel="pieces seen, millions", ylabel="nats", title=str(folder))
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(image) as file:
        figure.savefig(file, format="png", dpi=120)
