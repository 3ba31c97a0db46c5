"""The loop, the same for both stages; they differ in the task handed to it.

A run is a folder:

    run.json      what was asked for, with which versions, on which device
    log.jsonl     one object per logged step and per evaluation
    checkpoints/  step-XXXXXXXX, see mvbert.checkpoint
    model/        the result: the last checkpoint without its training state
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, Protocol

import torch
from torch import Tensor, nn

from mvbert import checkpoint
from mvbert.batches import Batch, Rows
from mvbert.config import TrainConfig
from mvbert.environment import environment
from mvbert.errors import InputError, Interrupted
from mvbert.files import (
    Json,
    atomic_folder,
    atomic_write,
    read_json_object,
    write_error,
    write_json,
)
from mvbert.model import DeviceBatch
from mvbert.optim import learning_rate, make_optimizer, set_learning_rate
from mvbert.progress import Progress

# Updates skipped in a row (loss or gradient not finite) after which a run stops.
MAX_SKIPPED = 10


class Task(Protocol):
    """What a stage hands to the loop."""

    module: nn.Module  # everything that trains; the model itself is `module.model`
    rows: Rows
    heldout: Rows

    def student_prob(self, step: int) -> float:
        """Chance of a student-cut word in the rows of `step`."""

    def losses(self, batch: DeviceBatch, masked: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to differentiate, already divided by `masked`, and sums to report."""

    def evaluate(self, batch: DeviceBatch) -> dict[str, Tensor]:
        """Sums over one held-out batch."""

    def summary(self, sums: dict[str, float]) -> dict[str, float]:
        """Means out of sums, by the names of the log."""

    def write_model(self, folder: Path) -> None:
        """Writes the model's files into an existing folder."""

    def read_model(self, folder: Path) -> None:
        """Loads what write_model wrote."""


@dataclass(frozen=True)
class Device:
    """Where and how a run computes, and why."""

    device: torch.device
    autocast: torch.dtype | None
    reason: str

    def cast(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)


def choose_device(config: TrainConfig) -> Device:
    """Reads `device` and `dtype`; `auto` takes CUDA, and bfloat16 where the hardware has it."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device must be auto, cpu or cuda[:N], got {config.device!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name}: this torch sees no CUDA device")
    if config.dtype == "float32":
        return Device(device, None, "float32: asked for")
    if config.dtype == "bfloat16":
        return Device(device, torch.bfloat16, "bfloat16 products, float32 weights: asked for")
    if device.type == "cuda":
        return Device(device, torch.bfloat16, "bfloat16 products, float32 weights: CUDA")
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return Device(
            device, torch.bfloat16, "bfloat16 products, float32 weights: the CPU has them"
        )
    return Device(device, None, "float32: this CPU has no bfloat16 products")


def train(
    task: Task, config: TrainConfig, out: Path, description: dict[str, Json], progress: Progress
) -> dict[str, Json]:
    """Runs a task to its last step, resuming from the newest whole checkpoint in `out`.

    Args:
        description: what the run is (inputs and their checksums, settings); a run folder that was
            made with another description is refused.

    Returns:
        The report: first and last held-out evaluation, steps, pieces seen, seconds.

    Raises:
        InputError: `out` holds another run, or a file cannot be written.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved first.
    """
    _make_folder(out)
    with _lock(out), _signals() as stop:
        return _train(task, config, out, description, progress, stop)


def _train(
    task: Task,
    config: TrainConfig,
    out: Path,
    description: dict[str, Json],
    progress: Progress,
    stop: _Stop,
) -> dict[str, Json]:
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    where = choose_device(config)
    _describe(out, description, where)
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
    log = _Log(out / "log.jsonl", keep_until=step if resumed is not None else -1)

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
        clock, waited = time.perf_counter(), 0.0
        while step < config.steps:
            before = time.perf_counter()
            rows = batch.result()
            waited += time.perf_counter() - before
            # The next rows are drawn while this step computes.
            batch = ahead.submit(_read, task, config, min(step + 1, config.steps - 1))

            torch.manual_seed((config.seed << 32) + step)  # dropout is a function of (seed, step)
            set_learning_rate(optimizer, learning_rate(step, config))
            skipped = _update(task, config, where, rows, optimizer, sums, skipped)
            step += 1

            last = step == config.steps
            if last or step % config.log_every == 0:
                seconds = time.perf_counter() - clock
                count = max(float(sums.values()["steps"]), 1.0)  # type: ignore[arg-type]
                record: dict[str, Json] = {
                    "step": step,
                    "pieces": step * pieces_per_step,
                    "lr": learning_rate(step - 1, config),
                    **task.summary(sums.take()),
                }
                # A resumed window's earlier steps were timed by the process that ran them.
                record["pieces_per_second"] = round(
                    min(count, config.log_every) * pieces_per_step / seconds
                )
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
                clock, waited = time.perf_counter(), 0.0
            if last or step % config.eval_every == 0:
                paused = time.perf_counter()
                evaluate()
                clock += time.perf_counter() - paused
            # Asked once: a signal that comes later is seen after the next step, which is saved.
            stopping = stop.asked
            if last or step % config.save_every == 0 or stopping:
                paused = time.perf_counter()
                save()
                clock += time.perf_counter() - paused
            progress.advance(step)
            if stopping and not last:
                raise Interrupted(
                    f"stopped at step {step}; run the same command to go on from there"
                )
    _write_result(task, out)
    return _report(out, config, pieces_per_step)


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
    for first in range(0, config.rows, micro):
        batch = DeviceBatch.of(rows, where.device, slice(first, first + micro))
        with where.cast():
            loss, parts = task.losses(batch, masked)
        loss.backward()
        sums.add(parts)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if config.grad_clip:
        nn.utils.clip_grads_with_norm_(parameters, config.grad_clip, norm)
    # The fused optimiser leaves everything as it was where found_inf is 1, without a host sync.
    bad = (~torch.isfinite(norm)).float()
    optimizer.found_inf = bad  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    sums.add({"steps": torch.ones(()), "grad_norm": norm, "skipped": bad})
    return (skipped + bad) * bad


@torch.no_grad()
def _evaluate(task: Task, config: TrainConfig, where: Device) -> dict[str, float]:
    """Held-out means over the same rows every time."""
    task.module.eval()
    sums = _Sums(where.device, {})
    micro = config.micro_rows or config.rows
    for first in range(0, config.eval_rows, micro):
        count = min(micro, config.eval_rows - first)
        rows = task.heldout.read(first, count, student_prob=task.student_prob(0), threads=1)
        with where.cast():
            sums.add(task.evaluate(DeviceBatch.of(rows, where.device)))
    return task.summary(sums.take())


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
    _refuse_other_run(out, description)
    if checkpoint.check_manifest(out / "model") is not None:
        return None
    length = description["row"]["length"]  # type: ignore[index,call-overload]
    return _report(out, config, config.rows * int(length))  # type: ignore[arg-type]


def read_log(out: Path) -> list[dict[str, Any]]:
    """All records of a run's log, oldest first."""
    path = out / "log.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: is {out} the folder of a run?") from None
    return [json.loads(line) for line in lines if line.endswith("}")]


# ---- the run folder -------------------------------------------------------------------------


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(out, error) from error


def _describe(out: Path, description: dict[str, Json], where: Device) -> None:
    """Writes run.json on the first start; refuses a folder that another run was made in."""
    if (out / "run.json").exists():
        _refuse_other_run(out, description)
        return
    write_json(
        out / "run.json",
        {"description": description, "environment": environment(where.device, where.reason)},
    )


def _refuse_other_run(out: Path, description: dict[str, Json]) -> None:
    found = read_json_object(out / "run.json").get("description")
    wanted = json.loads(json.dumps(description))
    if found != wanted:
        names = _differences(found, wanted) if isinstance(found, dict) else ["description"]
        raise InputError(
            f"{out} holds a run with other settings ({', '.join(names[:4])}); give another --out, "
            "or remove that folder"
        )


def _differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """Names of the settings in which two nested objects differ."""
    names: list[str] = []
    for key in sorted({*a, *b}):
        if a.get(key) == b.get(key):
            continue
        if isinstance(a.get(key), dict) and isinstance(b.get(key), dict):
            names += _differences(a[key], b[key], f"{prefix}{key}.")
        else:
            names.append(f"{prefix}{key}: {a.get(key)!r} there, {b.get(key)!r} now")
    return names


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    """One process a run folder."""
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{out} is in use by another mvbert process") from None
        yield


class _Stop:
    asked = False


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    """Turns SIGINT and SIGTERM into a request that the loop sees after the running step."""
    stop = _Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        stop.asked = True

    try:
        old = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the caller deals with signals
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


# ---- sums and log ---------------------------------------------------------------------------


class _Sums:
    """Running sums kept on the device in float64, read when a log line is due."""

    def __init__(self, device: torch.device, values: dict[str, Json]) -> None:
        self._device = device
        self._sums = {
            name: torch.tensor(value, dtype=torch.float64, device=device)
            for name, value in values.items()
        }

    def add(self, parts: dict[str, Tensor]) -> None:
        for name, value in parts.items():
            value = value.detach().to(self._device, torch.float64)
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def values(self) -> dict[str, Json]:
        return {name: float(value) for name, value in self._sums.items()}

    def take(self) -> dict[str, float]:
        values = {name: float(value) for name, value in self._sums.items()}
        self._sums.clear()
        return values


class _Log:
    """log.jsonl; on resume, records after the checkpoint's step are dropped first."""

    def __init__(self, path: Path, keep_until: int) -> None:
        kept = []
        if keep_until >= 0 and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # the line a kill cut off
                    if json.loads(line)["step"] <= keep_until:
                        kept.append(line)
        atomic_write(path, "".join(line + "\n" for line in kept))
        self._path = path
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Json]) -> None:
        try:
            self._file.write(json.dumps(record, allow_nan=True) + "\n")
            self._file.flush()
        except OSError as error:
            raise write_error(self._path, error) from error

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def remove_checkpoints(out: Path) -> None:
    """Frees the space of a finished run's training state; its model stays."""
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


__all__ = [
    "Device",
    "Task",
    "choose_device",
    "finished",
    "read_log",
    "remove_checkpoints",
    "train",
]
