"""The training loop, the same for both stages, which are tasks (mvbert.training.task).

After each step: log, evaluate, save or stop, where due. A run has a folder (mvbert.training.runs)
and resumes from its newest complete checkpoint.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from mvbert.config import RowConfig, TrainConfig
from mvbert.errors import InputError, Interrupted, OutOfTime
from mvbert.files import Json, atomic_folder
from mvbert.model.encoder import compile_layers
from mvbert.model.flops import peak_flops
from mvbert.model.masked_lm import DeviceBatch
from mvbert.progress import Progress
from mvbert.training import checkpoint
from mvbert.training.device import Device, choose_graph, give_memory_back
from mvbert.training.environment import environment
from mvbert.training.feed import Feed
from mvbert.training.journal import Journal
from mvbert.training.machine import pass_rows
from mvbert.training.optim import Optimizer
from mvbert.training.ranks import Ranks, join_ranks
from mvbert.training.runs import (
    Log,
    check_run,
    describe_resume,
    describe_run,
    lock,
    make_folder,
    read_log,
    stop_signals,
)
from mvbert.training.step import CudaGraph, Losses, Step, Sums
from mvbert.training.task import Task


def train(
    task: Task,
    config: TrainConfig,
    device: Device,
    out: Path,
    description: dict[str, Json],
    progress: Progress,
    deadline: float | None = None,
) -> RunReport:
    """Trains a task to its last step, resuming from the newest complete checkpoint in `out`.

    Under torchrun every rank must call it; rank 0 writes, all return the report.

    Args:
        device: the result of mvbert.training.machine.set_up.
        description: identifies the run (settings, inputs and their checksums); a run folder with
            another description is refused.
        deadline: when to save and stop, on the clock of time.monotonic; None: `config.max_hours`
            from now. A command with several runs passes the same deadline to all.

    Returns:
        The report, the same in all processes.

    Raises:
        InputError: `out` holds another run, or a file cannot be written.
        Interrupted: SIGINT or SIGTERM arrived; a checkpoint was saved first.
        OutOfTime: the deadline has passed; a checkpoint was saved first.
    """
    ranks = join_ranks()
    if deadline is None:
        deadline = config.deadline(time.monotonic())
    with ExitStack() as stack:

        def claim() -> None:
            make_folder(out)
            stack.enter_context(lock(out))

        ranks.first(claim)
        stop = stack.enter_context(stop_signals())
        stack.callback(give_memory_back)
        run = _prepare(task, config, device, out, description, progress, ranks)
        step, state = run.resume()
        log = Log(out / "log.jsonl", step if state else -1) if ranks.lead else None
        losses = ranks.wrap(Losses(task))
        stack.enter_context(device.stream())
        stack.enter_context(log or nullcontext())
        stack.enter_context(progress.steps(config.steps, step))
        feed = stack.enter_context(Feed(task, config, ranks, device.device, step))
        stepper = Step(task, losses, config, device, ranks, run.optimizer, state, run.graph)
        journal = Journal(log, progress, task, config, feed, stepper, run.peak, step)

        if not state:
            with journal.paused():
                run.save(step, run.evaluate(step, journal), stepper, journal)
        while step < config.steps:
            stepper(feed, step)  # asynchronous on a GPU
            step += 1
            journal.finish()  # writes the pending line while the device runs this step
            # Read once: a signal that arrives later is handled after the next step.
            interrupted, out_of_time = ranks.any(stop.requested, time.monotonic() >= deadline)
            actions = due(step, config, leaving=interrupted or out_of_time)
            if actions.log:
                journal.begin(step)
            if actions.evaluate or actions.save:
                journal.finish()
                with journal.paused():
                    heldout = run.evaluate(step, journal) if actions.evaluate else None
                    if actions.save or run.is_best(heldout):
                        run.save(step, heldout, stepper, journal, interrupted or out_of_time)
            progress.advance(step)
            if step < config.steps and interrupted:
                raise Interrupted(f"stopped at step {step}; run the same command again to resume")
            if step < config.steps and out_of_time:
                limit = f"time limit of {config.max_hours:g} h" if config.max_hours else "deadline"
                raise OutOfTime(
                    f"{limit} reached at step {step}; run the same command again to resume", step
                )
        ranks.first(run.write_result)
        if ranks.any(stop.requested)[0]:
            raise Interrupted(f"{out} is complete; run the same command again to continue")
        return RunReport(**ranks.first(lambda: asdict(_report(out, config, run.pieces_per_step))))


@dataclass(frozen=True)
class Actions:
    """Actions due after a step."""

    log: bool
    evaluate: bool
    save: bool


def due(step: int, config: TrainConfig, leaving: bool) -> Actions:
    """The actions due after `step` (from 1); `leaving`: the run stops after it."""
    last = step == config.steps
    return Actions(
        log=last or step % config.log_every == 0,
        evaluate=last or step % config.eval_every == 0,
        save=last or leaving or step % config.save_every == 0,
    )


# ---- a run and its folder ------------------------------------------------------------------------


def _prepare(
    task: Task,
    config: TrainConfig,
    device: Device,
    out: Path,
    description: dict[str, Json],
    progress: Progress,
    ranks: Ranks,
) -> _Run:
    """Builds the optimiser, describes the run in its folder, prints the choices made."""
    _check_shares(config, ranks)
    facts = environment(device, ranks.count)
    old_steps = ranks.first(lambda: describe_run(out / "run.json", description, environment=facts))
    module = task.module.to(device.device)
    peak, source = peak_flops(
        device.device, device.autocast or torch.float32, torch.get_num_threads()
    )
    if config.compile:
        compile_layers(module)
    graph, reason = choose_graph(config, device.device, ranks.count)
    compiled = "; layers compiled" if config.compile else ""
    progress.note(f"device {device}; {reason}{compiled}")
    progress.note(f"peak {peak / 1e12:.3g} TFLOP/s ({source}), processes: {ranks.count}")
    run = _Run(
        task=task,
        config=config,
        out=out,
        progress=progress,
        ranks=ranks,
        device=device,
        module=module,
        optimizer=Optimizer(module, config, device),
        graph=CudaGraph() if graph else None,
        peak=peak * ranks.count,
        facts=facts,
    )
    progress.note(
        f"{config.steps} steps x {config.rows} rows x {task.rows.T} pieces = "
        f"{config.steps * run.pieces_per_step / 1e6:.2f} M pieces, "
        f"{config.steps * config.rows / task.rows.count:.2f} epochs of {task.rows.count} rows"
    )
    if old_steps is not None:
        progress.note(
            f"steps raised from {old_steps} to {config.steps}: from here on the learning rate "
            f"follows the schedule of {config.steps} steps"
        )
    if config.eval_rows > task.heldout.count:
        progress.note(
            f"eval_rows is {config.eval_rows}, but the held-out text has {task.heldout.count} rows"
        )
    return run


def _check_shares(config: TrainConfig, ranks: Ranks) -> None:
    """Checks that ranks get equal numbers of rows, in whole micro batches, and held-out rows."""
    if config.rows % (ranks.count * (config.micro_rows or 1)):
        raise InputError(
            f"rows {config.rows} cannot be divided among {ranks.count} processes "
            f"in micro batches of {config.micro_rows or 1}"
        )
    if config.eval_rows < ranks.count:
        raise InputError(f"eval_rows must be at least {ranks.count}, one per process")


@dataclass(frozen=True)
class _Run:
    """The objects of a run and its folder."""

    task: Task
    config: TrainConfig
    out: Path
    progress: Progress
    ranks: Ranks
    device: Device
    module: nn.Module
    optimizer: Optimizer
    graph: CudaGraph | None
    peak: float  # FLOP/s of all devices together
    facts: dict[str, Json]  # the environment

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    @property
    def pieces_per_step(self) -> int:
        return self.config.rows * self.task.rows.T

    def resume(self) -> tuple[int, dict[str, Json]]:
        """Loads the newest complete checkpoint; returns its step and state, or 0 and {}."""
        note, first = self.progress.note, self.ranks.first
        newest = first(lambda: checkpoint.newest_name(self.checkpoints, note))
        if newest is None:
            return 0, {}
        folder = self.checkpoints / newest
        self.task.read_model(folder)
        step, state = checkpoint.load(folder, self.module, self.optimizer)
        note(f"resuming from {newest}")
        # Before the next checkpoint is saved, which would count as one of them.
        first(lambda: checkpoint.drop_after(self.checkpoints, step))
        if step < self.config.steps:
            first(lambda: describe_resume(self.out / "run.json", step, self.facts))
        return step, state

    def evaluate(self, step: int, journal: Journal) -> float | None:
        """Evaluates on held-out rows and logs the result; returns the loss."""
        result = heldout_means(self.task, self.config, self.device, self.ranks)
        for name, value in result.items():
            if value is not None and not math.isfinite(value):
                raise InputError(
                    f"the held-out {name} is {value}: the model's weights are corrupt; "
                    f"remove {self.out} and try a lower lr"
                )
        journal.evaluated(step, result)
        return result["loss"]

    def is_best(self, heldout: float | None) -> bool:
        keep = self.config.keep_best
        return self.ranks.first(lambda: checkpoint.is_best(self.checkpoints, heldout, keep))

    def save(
        self,
        step: int,
        heldout: float | None,
        stepper: Step,
        journal: Journal,
        leaving: bool = False,
    ) -> None:
        """Writes a checkpoint, unless updates are being skipped and no evaluation has succeeded.

        The weights may then be the cause of the infinite losses, so earlier checkpoints stay.
        """
        state = stepper.state()
        if state["skipped_in_a_row"] and heldout is None and not leaving:
            return
        journal.flush()
        saved: dict[str, Json] = {"step": step, "heldout": heldout, **state}
        place = (self.checkpoints, saved, self.module, self.optimizer)
        keep = (self.config.keep_last, self.config.keep_best)
        self.ranks.first(lambda: checkpoint.save(*place, self.task.write_model, *keep))

    def write_result(self) -> None:
        with atomic_folder(self.out / "model", overwrite=True) as partial:
            self.task.write_model(partial)
            checkpoint.write_manifest(partial)


@torch.no_grad()
def heldout_means(
    task: Task, config: TrainConfig, device: Device, ranks: Ranks
) -> dict[str, float | None]:
    """Held-out means by the names of the log, always over the same rows."""
    task.module.eval()
    sums = Sums(device.device)
    share = ranks.share(min(config.eval_rows, task.heldout.count))
    size = pass_rows(config)
    for first in range(share.start, share.stop, size):
        count = min(size, share.stop - first)
        rows = task.heldout.read(first, count, student_prob=task.student_prob, threads=1)
        with device.cast():
            sums.add(task.evaluate(DeviceBatch.of(rows, device.device)))
    return task.summary(sums.dict(ranks.sum_(sums.vector)))


# ---- the report ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunReport:
    """What a complete run reports."""

    output: str
    """Folder of the result."""
    steps: int
    pieces: int
    """Pieces of all training rows."""
    heldout_first: dict[str, float | None]
    """Held-out means before the first step, by the names of the log."""
    heldout_last: dict[str, float | None]
    """And after the last."""

    @property
    def loss(self) -> float:
        """The last held-out loss, in nats per masked piece."""
        loss = self.heldout_last["loss"]
        assert loss is not None  # the held-out text has masked pieces
        return loss


def _report(out: Path, config: TrainConfig, pieces_per_step: int) -> RunReport:
    evaluations = [line for line in read_log(out) if "heldout" in line]
    if not evaluations:
        raise InputError(f"{out / 'log.jsonl'} has no evaluation; restore it, or remove {out}")
    return RunReport(
        output=str(out / "model"),
        steps=config.steps,
        pieces=config.steps * pieces_per_step,
        heldout_first=evaluations[0]["heldout"],
        heldout_last=evaluations[-1]["heldout"],
    )


def finished(
    out: Path, description: dict[str, Json], config: TrainConfig, row: RowConfig
) -> RunReport | None:
    """The report of a run that is already complete in `out`, or None."""
    if not (out / "model" / checkpoint.MANIFEST).is_file() or not (out / "run.json").is_file():
        return None
    if check_run(out / "run.json", description) is not None:
        return None  # the run has more steps now
    if checkpoint.check_manifest(out / "model") is not None:
        return None
    if max((record["step"] for record in read_log(out)), default=0) < config.steps:
        return None  # the model is that of fewer steps
    return _report(out, config, config.rows * row.length)
