"""Scales the steps of a job to a time budget.

The first steps of every run are timed before the job starts. If all steps would take too long, all
runs get the same share of theirs, so that students stay comparable. The share is saved: a resumed
job has the same steps, on any machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mvbert.config import TrainConfig
from mvbert.errors import InputError
from mvbert.files import Json, read_json_object, write_json
from mvbert.progress import duration
from mvbert.training.device import Device, choose_graph
from mvbert.training.feed import Feed
from mvbert.training.optim import Optimizer
from mvbert.training.ranks import join_ranks
from mvbert.training.step import WARM_UP, CudaGraph, Losses, Step
from mvbert.training.task import Task
from mvbert.training.train import heldout_means

PLAN_FILE = "plan.json"  # in the job's folder
FLOOR = 0.05  # the smallest share of the steps: fewer train nothing useful
# Share of the time left to plan for. The rest is for checkpoints, reports and slowdown: on a shared
# machine a demo took 11 % longer to train than its first steps promised (docs/log.md, 2026-12-01).
SLACK = 0.8
TIMED_STEPS = 3  # at least; more if they fit into TIMED_SECONDS
TIMED_SECONDS = 1.0


@dataclass(frozen=True)
class Cost:
    """Costs of a run on this machine, in seconds."""

    set_up: float
    step: float
    evaluation: float

    def fixed(self, config: TrainConfig) -> float:
        """Seconds that a run of `config` spends on set-up and evaluations."""
        return self.set_up + self.evaluation * (1 + -(-config.steps // config.eval_every))


def measure_cost(
    make: Callable[[], Task],
    config: TrainConfig,
    device: Device,
    clock: Callable[[], float] = time.perf_counter,
) -> Cost:
    """Times a run's set-up, its first steps and an evaluation; every rank must call it.

    Args:
        make: builds the task, which is trained during the timing.
    """
    start = clock()
    task = make()
    set_up = clock() - start
    ranks = join_ranks()

    def time_call(work: Callable[[], object]) -> float:
        start = clock()
        work()
        if device.device.type == "cuda":
            torch.cuda.synchronize(device.device)
        return clock() - start

    optimizer = Optimizer(task.module.to(device.device), config, device)
    graph = CudaGraph() if choose_graph(config, device.device, ranks.count)[0] else None
    warm_up = WARM_UP + 1 if graph else 1  # slower first steps, not counted
    seconds: list[float] = []
    with device.stream(), Feed(task, config, ranks, device.device, 0) as feed:
        losses = ranks.wrap(Losses(task))
        step = Step(task, losses, config, device, ranks, optimizer, {}, graph)
        for number in range(config.steps):
            seconds.append(time_call(lambda number=number: step(feed, number)))  # type: ignore[misc]
            done = seconds[warm_up:]
            enough = len(done) >= TIMED_STEPS and sum(done) >= TIMED_SECONDS
            if ranks.any(enough)[0]:  # all ranks must run the same number of steps
                break
        evaluation = time_call(lambda: heldout_means(task, config, device, ranks))
    return Cost(set_up, statistics.median(seconds[warm_up:] or seconds), evaluation)


def fitting_share(runs: Mapping[str, tuple[TrainConfig, Cost]], seconds: float) -> float:
    """The share of steps, in [FLOOR, 1], with which all runs together take `seconds`."""
    fixed = sum(cost.fixed(config) for config, cost in runs.values())
    steps = sum(cost.step * config.steps for config, cost in runs.values())
    return min(1.0, max(FLOOR, (seconds - fixed) / steps))


def share_of_steps(
    out: Path,
    minutes: float,
    time_left: Callable[[], float],
    row_length: int,
    measure: Callable[[], Mapping[str, tuple[TrainConfig, Cost]]],
    note: Callable[[str], None],
) -> float:
    """The share of steps that all runs of the job in `out` train; every rank must call it.

    A job that has started keeps its share: the one in PLAN_FILE, or 1 without that file.

    Args:
        minutes: the budget (0: none).
        time_left: returns the seconds left of the budget.
        measure: returns settings and costs of all runs by name; called only for a new job.

    Raises:
        InputError: PLAN_FILE is invalid.
    """
    ranks = join_ranks()

    def saved_share() -> float | None:
        path = out / PLAN_FILE
        if path.exists():
            share: Any = read_json_object(path).get("share")
            number = isinstance(share, (int, float)) and not isinstance(share, bool)
            if not number or not 0 < share <= 1:
                raise InputError(f"{path}: share must lie in (0, 1], got {share!r}")
            if share < 1:
                note(f"training {share:.0%} of the steps (from {path})")
            return float(share)
        if not minutes:
            return 1.0
        if any(out.rglob("run.json")):
            note(f"the job in {out} started without a time budget: training all steps")
            return 1.0
        return None

    share = ranks.first(saved_share)
    if share is not None:
        return share
    runs = measure()

    def decide() -> float:
        seconds = time_left()
        share = fitting_share(runs, SLACK * seconds)
        costs: dict[str, Json] = {name: asdict(cost) for name, (_, cost) in runs.items()}
        write_json(out / PLAN_FILE, {"share": share, "minutes": minutes, "seconds": costs})
        speeds = (f"{n} {c.rows * row_length / cost.step:,.0f}" for n, (c, cost) in runs.items())
        note(f"pieces/s in the first steps: {', '.join(speeds)}")
        note(_verdict(runs, share, f"the {duration(seconds)} left of {minutes:g} min"))
        return share

    return ranks.first(decide)


def _verdict(runs: Mapping[str, tuple[TrainConfig, Cost]], share: float, budget: str) -> str:
    """One sentence: how long the steps take, and how many will be trained."""

    def total(share: float) -> str:
        return duration(
            sum(cost.fixed(c) + cost.step * c.shortened(share).steps for c, cost in runs.values())
        )

    steps = ", ".join(f"{name} {c.shortened(share).steps:,}" for name, (c, _) in runs.items())
    if share == 1:
        return f"all steps take about {total(1.0)} of {budget}: {steps}"
    if share > FLOOR:
        return f"all steps would take {total(1.0)}; {share:.0%} of them fit {budget}: {steps}"
    return (
        f"even {share:.0%} of the steps take {total(share)}, more than {budget}, "
        f"but fewer would train nothing useful: {steps}"
    )
