"""Progress of a run: stage, steps and losses, and plots of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mvbert.errors import InputError, require_extra
from mvbert.files import Json, atomic_file, read_json_object
from mvbert.training import checkpoint
from mvbert.training.runs import read_log


def run_info(folder: Path) -> dict[str, Json]:
    """Progress of a run (stage, steps, losses), or of every run of a job or study.

    Raises:
        InputError: `folder` is not a run folder, or a file of the run is corrupt.
    """
    if not folder.exists():
        raise InputError(f"{folder} does not exist")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file, expected the folder of a run, job, study or corpus")
    if not (folder / "run.json").is_file():
        folders = (path.parent for path in folder.rglob("run.json"))
        # Fine-tuning keeps its best model so far in a hidden folder, which is no run.
        runs = sorted(path for path in folders if not path.name.startswith("."))
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
        raise InputError(f"{folder / 'run.json'} does not describe a run; was it edited?") from None
    finished = (folder / "model" / "manifest.json").is_file()
    # Read before the log, which is written before a checkpoint.
    saved = max(checkpoint.evaluated_step(folder / "checkpoints"), 0 if finished else -1)
    # A run that has just started has neither.
    started = (folder / "log.jsonl").exists() or (folder / "checkpoints").exists()
    records = read_log(folder) if started else []
    trained = [r for r in records if "heldout" not in r]
    evaluated = [r for r in records if "heldout" in r]
    step = max((r["step"] for r in records), default=-1)
    if step < saved:
        raise InputError(
            f"{folder / 'log.jsonl'} is corrupt: it has no record of step {saved}, after which "
            f"{'the model' if finished else 'a checkpoint'} was written; restore the file"
        )
    # The model may be of fewer steps than the run has now.
    complete = finished and step >= facts["steps"]
    return {
        **facts,
        "step": max(step, 0),
        "complete": complete,
        "last": trained[-1] if trained else None,
        "heldout_first": evaluated[0]["heldout"] if evaluated else None,
        "heldout_last": evaluated[-1]["heldout"] if evaluated else None,
        "best_checkpoint": checkpoint.best(folder / "checkpoints"),
        "resumed": run.get("resumed", []),
    }


def plot_run(folder: Path, image: Path) -> None:
    """Plots a run's training and held-out losses against the pieces seen.

    Raises:
        InputError: `folder` is not a run folder, or its log has no losses.
        MissingExtra: matplotlib is not installed.
    """
    with require_extra("study", "plotting"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
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
        raise InputError(f"{folder / 'log.jsonl'} has no losses to plot yet")
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, (pieces, values) in curves.items():
        heldout = name.endswith("held out")
        marker = "o" if heldout else None
        axes.plot(pieces, values, label=name, marker=marker, linewidth=1 + heldout)
    axes.set(xlabel="pieces seen, millions", ylabel="nats", title=str(folder))
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(image) as file:
        figure.savefig(file, format="png", dpi=120)
