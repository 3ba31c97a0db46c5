"""Fits the steps of a job to the time that it may take on this machine.

The first steps of every run are timed before the job begins; if all steps would take too long, all
runs get the same share of theirs, so that students stay comparable. The decision is kept: a job
that is resumed, also on another machine, has the same steps.
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
from mvbert.training.optim import make_optimizer
from mvbert.training.ranks import join_ranks
from mvbert.training.step import WARM_UP, CudaGraph, Losses, Step
from mvbert.training.task import Task
from mvbert.training.train import heldout_means

PLAN_FILE = "plan.json"  # in the folder of a job
FLOOR = 0.1  # fewer steps than this share of them show nothing
SLACK = 0.9  # of the time left: checkpoints, reports and a machine that slows down need the rest
TIMED_STEPS = 3  # at least, and as many as fit into TIMED_SECONDS
TIMED_SECONDS = 1.0


@dataclass(frozen=True)
class Cost:
    """What a run costs on this machine, in seconds."""

    set_up: float
    step: float
    evaluation: float

    def fixed(self, config: TrainConfig) -> float:
        """Seconds of set-up and of the evaluations of a run of `config`."""
        return self.set_up + self.evaluation * (1 + -(-config.steps // config.eval_every))


def measure_cost(
    make: Callable[[], Task],
    config: TrainConfig,
    device: Device,
    clock: Callable[[], float] = time.perf_counter,
) -> Cost:
    """Times a run's set-up, its first steps and an evaluation; all processes of a run call this.

    Args:
        make: builds the task, which is trained for the steps that are timed.
    """
    start = clock()
    task = make()
    set_up = clock() - start
    ranks = join_ranks()

    def timed(work: Callable[[], object]) -> float:
        start = clock()
        work()
        if device.device.type == "cuda":
            torch.cuda.synchronize(device.device)
        return clock() - start

    optimizer = make_optimizer(task.module.to(device.device), config, device.device)
    graph = CudaGraph() if choose_graph(config, device.device, ranks.count)[0] else None
    unlike = WARM_UP + 1 if graph else 1  # the first steps, which prepare those that follow
    seconds: list[float] = []
    with device.stream(), Feed(task, config, ranks, device.device, 0) as feed:
        losses = ranks.wrap(Losses(task))
        step = Step(task, losses, config, device, ranks, optimizer, {}, graph)
        for number in range(config.steps):
            seconds.append(timed(lambda number=number: step(feed, number)))  # type: ignore[misc]
            done = seconds[unlike:]
            enough = len(done) >= TIMED_STEPS and sum(done) >= TIMED_SECONDS
            if ranks.any(enough)[0]:  # all processes make the same steps
                break
        evaluation = timed(lambda: heldout_means(task, config, device, ranks))
    return Cost(set_up, statistics.median(seconds[unlike:] or seconds), evaluation)


def fitting_share(runs: Mapping[str, tuple[TrainConfig, Cost]], seconds: float) -> float:
    """The share of their steps, from FLOOR to 1, that all runs together make in `seconds`."""
    fixed = sum(cost.fixed(config) for config, cost in runs.values())
    steps = sum(cost.step * config.steps for config, cost in runs.values())
    return min(1.0, max(FLOOR, (seconds - fixed) / steps))


def share_of_steps(
    out: Path,
    minutes: float,
    left: Callable[[], float],
    row_length: int,
    measure: Callable[[], Mapping[str, tuple[TrainConfig, Cost]]],
    note: Callable[[str], None],
) -> float:
    """The share of their steps that all runs of the job in `out` make; all processes call this.

    A job that has begun keeps its share: what PLAN_FILE says, or 1 where there is none.

    Args:
        minutes: the budget, 0: none.
        left: seconds that are left of it.
        measure: the settings and costs of all runs by name; called only if there is a decision to
            take.

    Raises:
        InputError: PLAN_FILE holds something else.
    """
    ranks = join_ranks()

    def begun() -> float | None:
        path = out / PLAN_FILE
        if path.exists():
            share: Any = read_json_object(path).get("share")
            number = isinstance(share, (int, float)) and not isinstance(share, bool)
            if not number or not 0 < share <= 1:
                raise InputError(f"{path}: share must lie in (0, 1], got {share!r}")
            if share < 1:
                note(f"{share:.0%} of the steps, as {path} says")
            return float(share)
        if not minutes:
            return 1.0
        if any(out.rglob("run.json")):
            note(f"the job in {out} began without a time budget: all steps are made")
            return 1.0
        return None

    share = ranks.first(begun)
    if share is not None:
        return share
    runs = measure()

    def decide() -> float:
        seconds = left()
        share = fitting_share(runs, SLACK * seconds)
        costs: dict[str, Json] = {name: asdict(cost) for name, (_, cost) in runs.items()}
        write_json(out / PLAN_FILE, {"share": share, "minutes": minutes, "seconds": costs})
        speeds = (f"{n} {c.rows * row_length / cost.step:,.0f}" for n, (c, cost) in runs.items())
        note(f"pieces/s in the first steps: {', '.join(speeds)}")
        note(_verdict(runs, share, f"the {duration(seconds)} left of {minutes:g} min"))
        return share

    return ranks.first(decide)


def _verdict(runs: Mapping[str, tuple[TrainConfig, Cost]], share: float, budget: str) -> str:
    """One sentence: how long the steps take, and how many of them are made."""

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
        f"but fewer would show nothing: {steps}"
    )
