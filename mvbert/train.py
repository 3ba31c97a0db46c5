"""The loop, the same for both stages; they differ in the task handed to it.

A run lives in a folder, see mvbert.runs; it resumes from the newest whole checkpoint there.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn, Protocol

import torch
from torch import Tensor, nn

from mvbert import checkpoint
from mvbert.batches import Rows
from mvbert.config import TrainConfig
from mvbert.corpus_folder import cores
from mvbert.device import Device, choose_device, choose_graph, give_memory_back, keep_memory
from mvbert.encoder import compile_layers
from mvbert.environment import environment
from mvbert.errors import InputError, Interrupted, OutOfTime
from mvbert.feed import Feed
from mvbert.files import Json, atomic_folder
from mvbert.journal import Journal
from mvbert.model import DeviceBatch
from mvbert.optim import make_optimizer
from mvbert.progress import Progress
from mvbert.ranks import Ranks, ranks
from mvbert.runs import (
    Log,
    Stop,
    describe_resume,
    describe_run,
    lock,
    make_folder,
    read_log,
    stop_signals,
)
from mvbert.speed import peak_flops
from mvbert.step import CudaGraph, Losses, Step, Sums

STARTED = time.monotonic()  # of the command, near enough


class Task(Protocol):
    """What a stage hands to the loop."""

    rows: Rows  # those of the steps that are being made
    late_rows: Rows | None  # longer ones, for the last steps
    late_start: int  # the first of these steps
    heldout: Rows

    @property
    def module(self) -> nn.Module:
        """Everything that trains; the model itself is `module.model`."""

    def student_prob(self, step: int) -> float:
        """Chance of a student-cut word in the rows of `step`."""

    def begin(self, step: int) -> None:
        """Sets what changes from step to step, in memory that `losses` reads."""

    def losses(self, batch: DeviceBatch, masked: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to differentiate, already divided by `masked`, and sums to report."""

    def evaluate(self, batch: DeviceBatch) -> dict[str, Tensor]:
        """Sums over one held-out batch."""

    def summary(self, sums: dict[str, float]) -> dict[str, float | None]:
        """Means out of sums, by the names of the log; None where there was nothing to sum."""

    def flops(self) -> float:
        """Floating-point operations of a step, see mvbert.speed."""

    def write_model(self, folder: Path) -> None:
        """Writes the model's files into an existing folder."""

    def read_model(self, folder: Path) -> None:
        """Loads what write_model wrote."""


@dataclass(frozen=True)
class Part:
    """Steps with rows of one length; all parts have the same number of pieces a step."""

    rows: Rows
    config: TrainConfig
    end: int  # the step after the last


def _parts(task: Task, config: TrainConfig, among: Ranks) -> list[Part]:
    """The steps by the length of their rows: one part, or a second one of longer rows."""
    if task.late_rows is None:
        return [Part(task.rows, config, config.steps)]
    T, late = task.rows.T, task.late_rows.T
    longer = config.rows * T // late
    if longer * late != config.rows * T or longer % among.count:
        raise InputError(
            f"steps of {config.rows} rows of {T} pieces cannot become whole rows of {late} for "
            f"{among.count} processes: make rows a multiple of {late // math.gcd(T, late)}"
        )
    micro = config.micro_rows and math.gcd(
        longer // among.count, max(config.micro_rows * T // late, 1)
    )
    return [
        Part(task.rows, config, task.late_start),
        Part(task.late_rows, replace(config, rows=longer, micro_rows=micro), config.steps),
    ]


def train(
    task: Task, config: TrainConfig, out: Path, description: dict[str, Json], progress: Progress
) -> dict[str, Json]:
    """Runs a task to its last step, resuming from the newest whole checkpoint in `out`.

    Started by torchrun, each process calls this alike; rank 0 writes, all return the report.

    Args:
        description: what the run is (inputs and their checksums, settings); a run folder that was
            made with another description is refused.

    Returns:
        The report: the result's folder, steps, pieces seen, first and last held-out evaluation.

    Raises:
        InputError: `out` holds another run, or a file cannot be written.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved first.
        OutOfTime: `config.max_hours` are over; a checkpoint was saved first.
    """
    among = ranks()
    with ExitStack() as stack:

        def claim() -> None:
            make_folder(out)
            stack.enter_context(lock(out))

        among.first(claim)
        stop = stack.enter_context(stop_signals())
        stack.callback(give_memory_back)
        return _Run(task, config, out, description, progress, stop, among).make()


class _Run:
    """A run on its way: where it stands, and what its steps are made with."""

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        out: Path,
        description: dict[str, Json],
        progress: Progress,
        stop: Stop,
        among: Ranks,
    ) -> None:
        _check_shares(config, among)
        torch.set_num_threads(config.threads or max(1, cores(0) // among.local_count))
        self._task, self._config, self._out, self._progress = task, config, out, progress
        self._stop, self._among = stop, among
        self._where = where = choose_device(config, among.local_rank, among.local_count)
        if where.device.type == "cpu":
            keep_memory()
        facts = environment(where.device, where.reason, among.count)
        among.first(lambda: describe_run(out / "run.json", description, environment=facts))
        self._checkpoints = out / "checkpoints"
        self._module = task.module.to(where.device)
        self._optimizer = make_optimizer(self._module, config, where.device)
        self._pieces_per_step = config.rows * task.rows.T
        self._peak, source = peak_flops(
            where.device, where.autocast or torch.float32, torch.get_num_threads()
        )
        if config.compile:
            compile_layers(self._module)
        self._graph, why = choose_graph(config, where.device, among.count)
        compiled = "; layers compiled" if config.compile else ""
        progress.note(f"device {where.device}, {where.reason}; {why}{compiled}")
        progress.note(f"peak {self._peak / 1e12:.3g} TFLOP/s ({source}), processes: {among.count}")
        progress.note(
            f"{config.steps} steps x {config.rows} rows x {task.rows.T} pieces = "
            f"{config.steps * self._pieces_per_step / 1e6:.2f} M pieces, "
            f"{config.steps * config.rows / task.rows.count:.2f} epochs of {task.rows.count} rows"
        )
        if config.eval_rows > task.heldout.count:
            progress.note(
                f"eval_rows {config.eval_rows}: the held-out text has {task.heldout.count} rows"
            )
        parts = _parts(task, config, among)
        for part in parts[1:]:
            progress.note(
                f"from step {parts[0].end} on {part.config.rows} rows x {part.rows.T} pieces a step"
            )
        self._step, self._state = self._resume()
        if self._state and self._step < config.steps:
            among.first(lambda: describe_resume(out / "run.json", self._step, facts))
        self._left = [part for part in parts if self._step < part.end] or parts[-1:]

    def _resume(self) -> tuple[int, dict[str, Json]]:
        """Goes back to the newest whole checkpoint; its step and state, or 0 and {}."""
        note = self._progress.note
        newest = self._among.first(lambda: checkpoint.newest_name(self._checkpoints, note))
        if newest is None:
            return 0, {}
        folder = self._checkpoints / newest
        self._task.read_model(folder)
        resumed = checkpoint.load(folder, self._module, self._optimizer)
        note(f"resuming from {newest}")
        # Before the next one is saved, which would be counted among them.
        self._among.first(lambda: checkpoint.drop_after(self._checkpoints, resumed[0]))
        return resumed

    def make(self) -> dict[str, Json]:
        """Makes the steps that are left and the result; returns the report."""
        among, config, out = self._among, self._config, self._out
        keep_until = self._step if self._state else -1
        log = Log(out / "log.jsonl", keep_until) if among.lead else None
        with (
            self._where.stream(),
            log or nullcontext(),
            self._progress.steps(config.steps, self._step),
            ExitStack() as self._feeds,
        ):
            self._losses = among.wrap(Losses(self._task))
            self._enter()
            self._journal = Journal(
                log, self._progress, self._task, self._left[0].config,
                self._feed, self._make, self._peak * among.count, self._step,
            )  # fmt: skip
            if not self._state:
                with self._journal.paused():
                    self._save(self._evaluate())
            while self._step < config.steps:
                if self._step == self._left[0].end:
                    self._follow()
                self._make(self._feed, self._step)
                self._step += 1
                self._after_step()
        among.first(lambda: _write_result(self._task, out))
        if among.any(self._stop.asked)[0]:
            raise Interrupted(f"{out} is complete; run the same command to go on with what follows")
        return among.first(lambda: _report(out, config, self._pieces_per_step))

    def _enter(self) -> None:
        """Prepares what makes the steps of the first part that is left."""
        part, task, among, where = self._left[0], self._task, self._among, self._where
        task.rows = part.rows
        ending = replace(part.config, steps=part.end)
        self._feed = self._feeds.enter_context(Feed(task, ending, among, where.device, self._step))
        captured = CudaGraph() if self._graph else None
        settings = (part.config, where, among, self._optimizer, self._state, captured)
        self._make = Step(task, self._losses, *settings)

    def _follow(self) -> None:
        """Goes on with the next part, from the last one's state as from a checkpoint."""
        self._journal.finish()
        self._state = self._make.state()
        del self._left[0]
        self._enter()
        self._journal.follow(self._feed, self._make, self._left[0].config)

    def _after_step(self) -> None:
        """Logs, evaluates and saves where that is due; leaves where that was asked for."""
        config, among, step = self._config, self._among, self._step
        self._journal.finish()  # a line begun earlier: the device has this step to do meanwhile
        last = step == config.steps
        if last or step % config.log_every == 0:
            self._journal.begin(step)
        # Asked once: a signal that comes later is seen after the next step, which is saved.
        asked, late = among.any(self._stop.asked, _late(config))
        evaluating = last or step % config.eval_every == 0
        must = last or asked or late
        saving = must or step % config.save_every == 0
        if evaluating or saving:
            self._journal.finish()
            with self._journal.paused():
                heldout = self._evaluate() if evaluating else None
                if saving or self._is_best(heldout):
                    self._save(heldout, must)
        self._progress.advance(step)
        if (asked or late) and not last:
            _leave(step, config, asked)

    def _evaluate(self) -> float | None:
        result = _evaluate(self._task, self._config, self._where, self._among)
        self._journal.evaluated(self._step, result)
        return result["loss"]

    def _is_best(self, heldout: float | None) -> bool:
        keep = self._config.keep_best
        return self._among.first(lambda: checkpoint.is_best(self._checkpoints, heldout, keep))

    def _save(self, heldout: float | None, must: bool = True) -> None:
        state = self._make.state()
        if state["skipped_in_a_row"] and heldout is None and not must:
            return  # the weights may be what spoils the losses: those from before are to be kept
        self._journal.flush()
        saved: dict[str, Json] = {"step": self._step, "heldout": heldout, **state}
        place = (self._checkpoints, saved, self._module, self._optimizer)
        self._among.first(lambda: checkpoint.save(*place, self._task.write_model, self._config))


def _late(config: TrainConfig) -> bool:
    return 0 < config.max_hours * 3600 <= time.monotonic() - STARTED


def _leave(step: int, config: TrainConfig, asked: bool) -> NoReturn:
    """Leaves a run that goes on another time."""
    if asked:
        raise Interrupted(f"stopped at step {step}; run the same command to go on from there")
    raise OutOfTime(
        f"{config.max_hours:g} hours are over at step {step}; "
        "run the same command to go on from there",
        step,
    )


def _check_shares(config: TrainConfig, among: Ranks) -> None:
    """Each process must have the same number of rows, in whole parts, and something to evaluate."""
    if config.rows % (among.count * (config.micro_rows or 1)):
        raise InputError(
            f"rows {config.rows} cannot be dealt out to {among.count} processes "
            f"in parts of micro_rows {config.micro_rows or 1}"
        )
    if config.eval_rows < among.count:
        raise InputError(f"eval_rows must be at least {among.count}, one for each process")


@torch.no_grad()
def _evaluate(
    task: Task, config: TrainConfig, where: Device, among: Ranks
) -> dict[str, float | None]:
    """Held-out means over the same rows every time, at most one epoch of them."""
    task.module.eval()
    sums = Sums(where.device)
    share = among.share(min(config.eval_rows, task.heldout.count))
    micro = config.micro_rows or config.rows // among.count
    for first in range(share.start, share.stop, micro):
        count = min(micro, share.stop - first)
        rows = task.heldout.read(first, count, student_prob=task.student_prob(0), threads=1)
        with where.cast():
            sums.add(task.evaluate(DeviceBatch.of(rows, where.device)))
    result = task.summary(sums.dict(among.sum_(sums.vector)))
    for name, value in result.items():
        if value is not None and not math.isfinite(value):
            raise InputError(f"the held-out {name} is {value}: the model's weights are spoiled")
    return result


def _write_result(task: Task, out: Path) -> None:
    with atomic_folder(out / "model", overwrite=True) as partial:
        task.write_model(partial)
        checkpoint.write_manifest(partial)


def _report(out: Path, config: TrainConfig, pieces_per_step: int) -> dict[str, Json]:
    evaluations = [line for line in read_log(out) if "heldout" in line]
    return {
        "output": str(out / "model"),
        "steps": config.steps,
        "pieces": config.steps * pieces_per_step,
        "heldout_first": evaluations[0]["heldout"],
        "heldout_last": evaluations[-1]["heldout"],
    }


def finished(
    out: Path, description: dict[str, Json], config: TrainConfig
) -> dict[str, Json] | None:
    """The report of a run that is already complete in `out`, or None."""
    if not (out / "model" / checkpoint.MANIFEST).is_file() or not (out / "run.json").is_file():
        return None
    describe_run(out / "run.json", description)
    if checkpoint.check_manifest(out / "model") is not None:
        return None
    length = description["row"]["length"]  # type: ignore[index,call-overload]
    return _report(out, config, config.rows * int(length))  # type: ignore[arg-type]
