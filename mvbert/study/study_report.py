"""The report of a study: a table in Markdown and plotted curves."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mvbert.files import Json, atomic_file, atomic_write
from mvbert.progress import Progress

Records = list[dict[str, Any]]

# Key of a record, column heading, format.
_COLUMNS: list[tuple[str, str, Callable[[float], str]]] = [
    ("bits_per_word", "bits per word", "{:.3f}".format),
    ("loss", "held-out loss", "{:.3f}".format),
    ("accuracy", "accuracy", "{:.1%}".format),
    ("word_accuracy", "word accuracy", "{:.1%}".format),
]


def write_report(out: Path, records: Records, baseline: str) -> dict[str, Json]:
    """Writes table.md and, if matplotlib is installed, curves.svg and curves.png.

    Returns:
        Each arm's means over seeds at the last step.
    """
    last = last_points(records)
    atomic_write(out / "table.md", table(last, baseline))
    if importlib.util.find_spec("matplotlib") is None:
        Progress("study").note(
            "skipping curves: they need matplotlib (pip install 'mvbert[study]')"
        )
    elif records:
        draw_curves(out, records)
    return {
        arm: {
            key: _mean(points, key)
            for key, _, _ in _COLUMNS
            if all(key in point for point in points)
        }
        for arm, points in last.items()
    }


def last_points(records: Records) -> dict[str, Records]:
    """Each arm's records of the last step, one per seed."""
    step = max((r["step"] for r in records), default=0)
    out: dict[str, Records] = {}
    for record in records:
        if record["step"] == step:
            out.setdefault(record["arm"], []).append(record)
    return out


def table(last: dict[str, Records], baseline: str) -> str:
    """Means over seeds, their range, and the mean difference from the baseline, seed by seed."""
    if not last:
        return "No run is complete.\n"
    everything = [point for points in last.values() for point in points]
    columns = [c for c in _COLUMNS if all(c[0] in point for point in everything)]
    key = columns[0][0]
    base = {point["seed"]: point[key] for point in last.get(baseline, [])}
    lines = [
        f"After {everything[0]['pieces'] / 1e6:.2f} M pieces; mean over seeds (lowest to highest). "
        f"Difference: {columns[0][1]} minus that of `{baseline}` with the same seed. "
        "Loss: nats per masked piece. "
        "MFLOP per piece: student (forward and backward) + teacher (forward).",
        "",
        "| arm | seeds | vocabulary | "
        + " | ".join([columns[0][1], "difference", *(c[1] for c in columns[1:])])
        + " | MFLOP per piece |",
        "|" + " --- |" * (5 + len(columns)),
    ]
    for arm, points in last.items():
        cells = [arm, str(len(points)), f"{points[0]['vocab']:,}"]
        for name, _, text in columns:
            values = [point[name] for point in points]
            cell = text(_mean(points, name))
            if len(values) > 1:
                cell += f" ({text(min(values))} to {text(max(values))})"
            cells.append(cell)
            if name == key:
                paired = [p[key] - base[p["seed"]] for p in points if p["seed"] in base]
                cells.append(f"{sum(paired) / len(paired):+.3f}" if paired else "-")
        student, teacher = (points[0].get(f"{model}_mflop") for model in ("student", "teacher"))
        cost = "-" if student is None else f"{student:.1f}"
        cells.append(cost + (f" + {teacher:.1f}" if teacher else ""))
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *_fairness(everything)]
    return "\n".join(lines) + "\n"


def _fairness(points: Records) -> list[str]:
    """Notes under the table: whether runs are comparable, and the error of bits per word."""
    rows: dict[tuple[int, int], set[str]] = {}
    for point in points:
        rows.setdefault((point["vocab"], point["seed"]), set()).add(point["rows"])
    if all(len(ids) == 1 for ids in rows.values()):
        note = "Arms with the same vocabulary and seed saw the same rows (checksums agree)."
    else:
        note = (
            "Not all arms with the same vocabulary and seed saw the same rows (checksums differ)."
        )
    counts = sorted({point["words_asked"] for point in points if "words_asked" in point})
    if counts:
        count = " to ".join(f"{n:,}" for n in {counts[0]: 0, counts[-1]: 0})
        error = max(point["bits_error"] for point in points)
        note += (
            f" Bits per word: over {count} held-out words, standard error at most {error:.3f}; all"
            " arms predict the same words, so differences are more precise than that."
        )
    return [note]


def draw_curves(out: Path, records: Records) -> None:
    """Plots bits per word (or, without them, held-out loss) against pieces seen, a line per arm.

    Lines are means over seeds, bands the range.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    key = "bits_per_word" if all("bits_per_word" in r for r in records) else "loss"
    name = {"bits_per_word": "held-out bits per word", "loss": "held-out loss, nats"}[key]
    arms: dict[str, dict[int, list[float]]] = {}
    for record in records:
        if record["step"]:
            arms.setdefault(record["arm"], {}).setdefault(record["pieces"], []).append(record[key])
    with matplotlib.rc_context({"svg.hashsalt": "mvbert", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for arm, points in arms.items():
            x = [pieces / 1e6 for pieces in sorted(points)]
            values = [points[pieces] for pieces in sorted(points)]
            mean = [sum(v) / len(v) for v in values]
            (line,) = axes.plot(x, mean, marker="o", markersize=3, label=arm)
            if any(len(v) > 1 for v in values):
                axes.fill_between(
                    x, [min(v) for v in values], [max(v) for v in values],
                    color=line.get_color(), alpha=0.15, linewidth=0,
                )  # fmt: skip
        axes.set_xlabel("pieces seen in Stage II, millions")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        for kind, metadata in (("svg", {"Date": None}), ("png", {})):
            with atomic_file(out / f"curves.{kind}") as file:
                figure.savefig(file, format=kind, dpi=150, metadata=metadata)


def _mean(points: Records, key: str) -> float:
    return sum(point[key] for point in points) / len(points)
