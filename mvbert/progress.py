"""Progress output: notes, a progress bar on a terminal, held-out losses."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


def several_processes() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def leads() -> bool:
    """Whether this process prints for its run: rank 0 of torchrun, or the only process."""
    return os.environ.get("RANK", "0") == "0"


class Progress:
    """Writes to stderr, on rank 0 only; shows a bar only if stderr is a terminal."""

    def __init__(self, title: str, quiet: bool = False) -> None:
        self.title = title
        quiet = quiet or not leads()
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
        self._bar: RichProgress | None = None
        self._task: Any = None
        self._text = ""
        self._started = time.perf_counter()

    def note(self, text: str) -> None:
        """Prints one line that stays above the bar, unless it is empty."""
        if text:
            self._console.print(f"[{self.title}] {text}", markup=False)

    @contextlib.contextmanager
    def steps(self, total: int, done: int) -> Iterator[None]:
        """Shows a bar over optimiser steps."""
        self._started = time.perf_counter()
        if not (sys.stderr.isatty() and leads()):
            yield
            return
        with RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=self._console,
            transient=True,
        ) as self._bar:
            self._task = self._bar.add_task(self.title, total=total, completed=done, text="")
            yield
        self._bar = None

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=self._text)

    def trained(self, record: Mapping[str, Any]) -> None:
        """Shows a training record of the log beside the bar."""
        speed = record["pieces_per_second"] / 1e3
        self._text = (
            f"loss {_number(record['loss'])}  {speed:.1f} K pieces/s  MFU {record['mfu']:.1%}"
        )

    def evaluated(self, step: int, heldout: Mapping[str, float | None]) -> None:
        """Prints the result of a held-out evaluation."""
        parts = "  ".join(f"{name} {_number(value)}" for name, value in heldout.items())
        self.note(f"step {step}: held-out {parts}  ({time.perf_counter() - self._started:.0f} s)")


def duration(seconds: float) -> str:
    """Two units of time, rounded: 42 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    i = next(i for i, (size, _) in enumerate(units) if whole >= size)
    (large, name), (small, small_name) = units[i], units[i + 1]
    whole = round(whole / small) * small
    rest = whole % large // small
    return f"{whole // large} {name}" + (f" {rest} {small_name}" if rest else "")


def _number(value: float | None) -> str:
    """Four decimals, or a dash for None."""
    return "-" if value is None else f"{value:.4f}"
