"""Where a run stands: its stage, steps and losses, and their curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mvbert.errors import InputError, MissingExtra
from mvbert.files import Json, atomic_file, read_json_object
from mvbert.training import checkpoint
from mvbert.training.runs import read_log


def run_info(folder: Path) -> dict[str, Json]:
    """Where a run stands: its stage, steps done and losses; of a job or study, every run in it.

    Raises:
        InputError: `folder` is not the folder of a run, or a file of the run is damaged.
    """
    if not folder.exists():
        raise InputError(f"{folder} does not exist")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file, expected the folder of a run, job, study or corpus")
    if not (folder / "run.json").is_file():
        runs = sorted(path.parent for path in folder.rglob("run.json"))
        if not runs:
            empty = "is empty" if not any(folder.iterdir()) else "has no run.json in or below it"
            raise InputError(
                f"{folder} {empty}; expected the folder of a run, job, study or corpus"
            )
        return {"runs": {str(run.relative_to(folder)): run_info(run) for run in runs}}
    run = read_json_object(folder / "run.json")
    try:
        description: Any = run["description"]
        facts = {
            "stage": description["stage"],
            "steps": description["train"]["steps"],
            "environment": run["environment"],
        }
    except (KeyError, TypeError):
        raise InputError(
            f"{folder / 'run.json'} does not say what the run is: was it changed?"
        ) from None
    # A run that has only just started has neither.
    started = (folder / "log.jsonl").exists() or (folder / "checkpoints").exists()
    records = read_log(folder) if started else []
    trained = [r for r in records if "heldout" not in r]
    evaluated = [r for r in records if "heldout" in r]
    step = max((r["step"] for r in records), default=0)
    # A model may be there of fewer steps than the run is to have now.
    whole = (folder / "model" / "manifest.json").is_file() and step >= facts["steps"]
    return {
        **facts,
        "step": step,
        "complete": whole,
        "last": trained[-1] if trained else None,
        "heldout_first": evaluated[0]["heldout"] if evaluated else None,
        "heldout_last": evaluated[-1]["heldout"] if evaluated else None,
        "best_checkpoint": checkpoint.best(folder / "checkpoints"),
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
