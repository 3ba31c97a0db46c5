"""The loop, the same for both stages; they differ in the task handed to it.

A run lives in a folder, see mvbert.runs; it resumes from the newest whole checkpoint there.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from mvbert import checkpoint
from mvbert.batches import Batch, Rows
from mvbert.config import TrainConfig
from mvbert.corpus_folder import cores
from mvbert.device import Device, choose_device
from mvbert.environment import environment
from mvbert.errors import InputError, Interrupted
from mvbert.files import Json, atomic_folder
from mvbert.mixing import philox4x32
from mvbert.model import DeviceBatch
from mvbert.optim import learning_rate, make_optimizer, set_learning_rate
from mvbert.progress import Progress
from mvbert.runs import (
    Log,
    Stop,
    describe_run,
    lock,
    make_folder,
    read_log,
    stop_signals,
)

# Updates skipped in a row (loss or gradient not finite) after which a run stops.
MAX_SKIPPED = 10


class Task(Protocol):
    """What a stage hands to the loop."""

    module: nn.Module  # everything that trains; the model itself is `module.model`
    rows: Rows
    heldout: Rows

    def student_prob(self, step: int) -> float:
        """Chance of a student-cut word in the rows of `step`."""

    def begin(self, step: int) -> None:
        """Sets what changes from step to step, in memory that `losses` reads."""

    def losses(self, batch: DeviceBatch, masked: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to differentiate, already divided by `masked`, and sums to report."""

    def evaluate(self, batch: DeviceBatch) -> dict[str, Tensor]:
        """Sums over one held-out batch."""

    def summary(self, sums: dict[str, float]) -> dict[str, float | None]:
        """Means out of sums, by the names of the log; None where there was nothing to sum."""

    def write_model(self, folder: Path) -> None:
        """Writes the model's files into an existing folder."""

    def read_model(self, folder: Path) -> None:
        """Loads what write_model wrote."""


def train(
    task: Task, config: TrainConfig, out: Path, description: dict[str, Json], progress: Progress
) -> dict[str, Json]:
    """Runs a task to its last step, resuming from the newest whole checkpoint in `out`.

    Args:
        description: what the run is (inputs and their checksums, settings); a run folder that was
            made with another description is refused.

    Returns:
        The report: the result's folder, steps, pieces seen, first and last held-out evaluation.

    Raises:
        InputError: `out` holds another run, or a file cannot be written.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved first.
    """
    make_folder(out)
    with lock(out), stop_signals() as stop:
        return _train(task, config, out, description, progress, stop)


def _train(
    task: Task,
    config: TrainConfig,
    out: Path,
    description: dict[str, Json],
    progress: Progress,
    stop: Stop,
) -> dict[str, Json]:
    torch.set_num_threads(cores(config.threads))
    where = choose_device(config)
    facts = environment(where.device, where.reason)
    describe_run(out / "run.json", description, environment=facts)
    checkpoints = out / "checkpoints"
    module = task.module.to(where.device)
    optimizer = make_optimizer(module, config)
    pieces_per_step = config.rows * task.rows.T
    progress.note(f"device {where.device}, {where.reason}")
    progress.note(
        f"{config.steps} steps x {config.rows} rows x {task.rows.T} pieces = "
        f"{config.steps * pieces_per_step / 1e6:.2f} M pieces, "
        f"{config.steps * config.rows / task.rows.count:.2f} epochs of {task.rows.count} rows"
    )

    step = 0
    window: dict[str, Json] = {}
    resumed = checkpoint.newest(checkpoints, progress.note)
    if resumed is not None:
        task.read_model(resumed)
        step, window = checkpoint.load(resumed, module, optimizer)
        progress.note(f"resuming from {resumed.name}")
    sums = _Sums(where.device, window)
    log = Log(out / "log.jsonl", keep_until=step if resumed is not None else -1)

    def save() -> None:
        checkpoint.save(
            checkpoints, step, module, optimizer, sums.values(), task.write_model, config.keep_last
        )

    def evaluate() -> None:
        result = _evaluate(task, config, where)
        log.write({"step": step, "pieces": step * pieces_per_step, "heldout": result})
        progress.evaluated(step, result)

    skipped = torch.zeros((), device=where.device)  # updates skipped in a row, read late
    with log, ThreadPoolExecutor(1) as ahead, progress.steps(config.steps, step):
        if resumed is None:
            evaluate()
            save()
        batch = ahead.submit(_read, task, config, step)
        clock, waited, timed = time.perf_counter(), 0.0, step
        while step < config.steps:
            before = time.perf_counter()
            rows = batch.result()
            waited += time.perf_counter() - before
            # The next rows are drawn while this step computes.
            batch = ahead.submit(_read, task, config, min(step + 1, config.steps - 1))

            torch.manual_seed(_dropout_seed(config.seed, step))
            set_learning_rate(optimizer, learning_rate(step, config))
            task.begin(step)
            skipped = _update(task, config, where, rows, optimizer, sums, skipped)
            step += 1

            last = step == config.steps
            if last or step % config.log_every == 0:
                seconds = time.perf_counter() - clock
                record: dict[str, Json] = {
                    "step": step,
                    "pieces": step * pieces_per_step,
                    "lr": learning_rate(step - 1, config),
                    **task.summary(sums.take()),
                }
                record["pieces_per_second"] = round((step - timed) * pieces_per_step / seconds)
                record["data_wait"] = round(waited / seconds, 4)
                log.write(record)
                progress.trained(record)
                if skipped.item() >= MAX_SKIPPED:
                    raise InputError(
                        f"loss or gradient was not finite in {MAX_SKIPPED} steps in a row, "
                        f"up to step {step} "
                        f"(seed {config.seed}, rows {(step - MAX_SKIPPED) * config.rows} to "
                        f"{step * config.rows}); the last good checkpoint is in {checkpoints}; "
                        "try a lower lr"
                    )
                clock, waited, timed = time.perf_counter(), 0.0, step
            if last or step % config.eval_every == 0:
                paused = time.perf_counter()
                evaluate()
                clock += time.perf_counter() - paused
            # Asked once: a signal that comes later is seen after the next step, which is saved.
            stopping = stop.asked
            if last or step % config.save_every == 0 or stopping:
                paused = time.perf_counter()
                log.flush()
                save()
                clock += time.perf_counter() - paused
            progress.advance(step)
            if stopping and not last:
                raise Interrupted(
                    f"stopped at step {step}; run the same command to go on from there"
                )
    _write_result(task, out)
    if stop.asked:
        raise Interrupted(f"{out} is complete; run the same command to go on with what follows")
    return _report(out, config, pieces_per_step)


def _dropout_seed(seed: int, step: int) -> int:
    """32 bits of (seed, step): all that torch's generator on a CPU takes in."""
    return philox4x32((step, 0, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))[0]


def _read(task: Task, config: TrainConfig, step: int) -> Batch:
    """The rows of one step: a function of the seed and the step alone."""
    return task.rows.read(
        step * config.rows, config.rows, student_prob=task.student_prob(step), threads=1
    )


def _update(
    task: Task,
    config: TrainConfig,
    where: Device,
    rows: Batch,
    optimizer: torch.optim.Optimizer,
    sums: _Sums,
    skipped: Tensor,
) -> Tensor:
    """Forward, backward and one optimiser step; returns how many updates in a row were skipped."""
    task.module.train()
    masked = int((rows.labels >= 0).sum())
    micro = config.micro_rows or config.rows
    step_sums = _Sums(where.device, {})
    for first in range(0, config.rows, micro):
        batch = DeviceBatch.of(rows, where.device, slice(first, first + micro))
        with where.cast():
            loss, parts = task.losses(batch, masked)
        loss.backward()
        step_sums.add(parts)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if config.grad_clip:
        nn.utils.clip_grads_with_norm_(parameters, config.grad_clip, norm)
    # The fused optimiser leaves everything as it was where found_inf is 1, without a host sync.
    bad = (~torch.isfinite(norm)).float()
    optimizer.found_inf = bad  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    step_sums.add({"grad_norm": norm, "updates": 1 - bad})
    # A skipped step counts as skipped and nowhere else.
    sums.add({name: value.where(bad == 0, 0.0) for name, value in step_sums.tensors.items()})
    sums.add({"steps": torch.ones_like(bad), "skipped": bad})
    return (skipped + bad) * bad


@torch.no_grad()
def _evaluate(task: Task, config: TrainConfig, where: Device) -> dict[str, float | None]:
    """Held-out means over the same rows every time."""
    task.module.eval()
    sums = _Sums(where.device, {})
    micro = config.micro_rows or config.rows
    for first in range(0, config.eval_rows, micro):
        count = min(micro, config.eval_rows - first)
        rows = task.heldout.read(first, count, student_prob=task.student_prob(0), threads=1)
        with where.cast():
            sums.add(task.evaluate(DeviceBatch.of(rows, where.device)))
    result = task.summary(sums.take())
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


class _Sums:
    """Running sums kept on the device in float64, read when a log line is due."""

    def __init__(self, device: torch.device, values: dict[str, Json]) -> None:
        self._device = device
        self.tensors = {
            name: torch.tensor(value, dtype=torch.float64, device=device)
            for name, value in values.items()
        }

    def add(self, parts: dict[str, Tensor]) -> None:
        for name, value in parts.items():
            value = value.detach().to(self._device, torch.float64)
            self.tensors[name] = self.tensors[name] + value if name in self.tensors else value

    def values(self) -> dict[str, Json]:
        return {name: float(value) for name, value in self.tensors.items()}

    def take(self) -> dict[str, float]:
        values = {name: float(value) for name, value in self.tensors.items()}
        self.tensors.clear()
        return values
