"""The training log: a line is started when a step is launched and written when its sums arrive."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from mvbert.config import TrainConfig
from mvbert.errors import InputError
from mvbert.files import Json
from mvbert.progress import Progress, duration
from mvbert.training.feed import Feed
from mvbert.training.optim import learning_rate
from mvbert.training.runs import Log
from mvbert.training.step import Step
from mvbert.training.task import Task

# Updates skipped in a row (loss or gradient not finite) after which a run stops.
MAX_SKIPPED = 10

LONG = 60.0  # seconds of training from which on the remaining time is printed


class Journal:
    """The log of a run.

    pieces_per_second    pieces (rows have no padding), without evaluations and checkpoints
    mfu                  model FLOPs utilisation, see mvbert.model.flops
    data_wait            share of the time that this process waited for rows

    Args:
        log: None on ranks that do not write.
        peak: FLOP/s of all devices together.
        step: steps done so far.
    """

    def __init__(
        self,
        log: Log | None,
        progress: Progress,
        task: Task,
        config: TrainConfig,
        feed: Feed,
        stepper: Step,
        peak: float,
        step: int,
    ) -> None:
        self._log, self._progress, self._task, self._config = log, progress, task, config
        self._feed, self._stepper, self._peak = feed, stepper, peak
        self._pieces = config.rows * task.rows.T
        self._step = step  # of the last line
        self._clock = time.perf_counter()  # start of the next line's time
        self._line: Callable[[], None] | None = None
        self._lines = 0

    def begin(self, step: int) -> None:
        """Starts the line of `step`, the last one launched; on a CPU, also writes it."""
        pending, steps = self._stepper.take(), step - self._step
        self._step = step
        self._line = lambda: self._trained(step, steps, *pending.wait())
        if pending.ready:
            self.finish()

    def finish(self) -> None:
        """Writes the pending line, if any, after waiting for its sums.

        Raises:
            InputError: loss or gradient was not finite for MAX_SKIPPED steps in a row.
        """
        line, self._line = self._line, None
        if line is not None:
            line()

    def _trained(
        self, step: int, steps: int, sums: dict[str, float], in_a_row: int, skipped: int
    ) -> None:
        seconds = time.perf_counter() - self._clock
        self._clock += seconds
        record: dict[str, Json] = {
            "step": step,
            "pieces": step * self._pieces,
            "lr": learning_rate(step - 1, self._config),
            **self._task.summary(sums),
            "pieces_per_second": round(steps * self._pieces / seconds),
            "mfu": round(steps * self._task.flops() / seconds / self._peak, 4),
            "data_wait": round(self._feed.take_wait() / seconds, 4),
        }
        self._write(record)
        self._progress.trained(record)
        self._lines += 1
        time_left = (self._config.steps - step) * seconds / steps
        # The first line's steps are slower: they compile kernels and allocate memory.
        if self._lines == 2 and time_left >= LONG:
            self._progress.note(
                f"{record['pieces_per_second']:,} pieces/s: {duration(time_left)} for the "
                f"{self._config.steps - step:,} steps left, without evaluations and checkpoints"
            )
        if sums["skipped"]:
            self._progress.note(f"update skipped: {self._rows_of(skipped, skipped + 1)}")
        if in_a_row >= MAX_SKIPPED:
            raise InputError(
                f"loss or gradient was not finite in {in_a_row} steps in a row, "
                f"{self._rows_of(step - in_a_row, step)}; all of these updates were skipped, "
                f"and checkpoints before step {step - in_a_row} are good: try a lower lr"
            )

    def evaluated(self, step: int, result: dict[str, float | None]) -> None:
        """Writes the line of a held-out evaluation."""
        self._write({"step": step, "pieces": step * self._pieces, "heldout": result})
        self._progress.evaluated(step, result)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time of the block from the log's speed."""
        start = time.perf_counter()
        yield
        self._clock += time.perf_counter() - start

    def flush(self) -> None:
        if self._log is not None:
            self._log.flush()

    def _write(self, record: dict[str, Json]) -> None:
        if self._log is not None:
            self._log.write(record)

    def _rows_of(self, start: int, end: int) -> str:
        """Identifies the rows of steps [start, end), so that they can be reproduced."""
        first, config = start * self._config.rows, self._config
        return (
            f"steps {start} to {end} (seed {config.seed}, epoch {first // self._task.rows.count}, "
            f"rows {first} to {end * config.rows})"
        )
