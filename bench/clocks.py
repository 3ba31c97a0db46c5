"""Seconds a call takes, and what this machine reaches at most."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Sample:
    """One measurement, per call: wall clock, and the device's or the processors' own time."""

    wall: float
    own: float


def measure(run: Callable[[Any], Any], copies: Sequence[Any], calls: int, device: str) -> Sample:
    """Seconds a call, over `calls` calls in a row.

    On a GPU the queue is filled before the first event, so that `own` is the device's time even
    where launching takes longer; what waits for the device inside a call (Liger, cut-cross-entropy)
    cannot run ahead, and its waiting is in `own`. `wall` is from an idle device until it is idle
    again. A provider that works in another process measures there: its `sample`.
    """
    if hasattr(run, "sample"):
        return run.sample(calls)
    if device != "cuda":
        wall, own = time.perf_counter(), time.process_time()
        for call in range(calls):
            run(copies[call % len(copies)])
        return Sample((time.perf_counter() - wall) / calls, (time.process_time() - own) / calls)
    import torch

    torch.cuda.synchronize()
    wall = time.perf_counter()
    for call in range(calls):
        run(copies[call % len(copies)])
    torch.cuda.synchronize()
    wall = (time.perf_counter() - wall) / calls
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    few = max(1, min(calls, 50))  # what fits into the launch queue
    torch.cuda._sleep(min(2_000_000 * few, 40_000_000))  # cycles: the host runs ahead
    first.record()
    for call in range(few):
        run(copies[call % len(copies)])
    last.record()
    torch.cuda.synchronize()
    return Sample(wall, first.elapsed_time(last) / 1e3 / few)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50, p80 in milliseconds (linear between neighbours), four digits."""
    return {f"p{at}": digits(1e3 * np.percentile(values, at)) for at in (20, 50, 80)}


def digits(value: float, count: int = 4) -> float:
    """`value` rounded to `count` significant digits: more would be noise."""
    return float(f"{value:.{count}g}")


@cache
def ceilings(device: str, dtype: str, threads: int, quick: bool, toy: bool) -> dict[str, float]:
    """What this machine reaches now: a copy in GB/s (read + written), a product in TFLOP/s."""
    import torch

    large = device == "cuda"
    source = torch.randn(2**29 if large else 2**25 >> 5 * toy, device=device)
    target = torch.empty_like(source)
    n = 8192 if large else 2048 >> 3 * toy
    left, right = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))

    def rate(run: Callable[[Any], Any], amount: float) -> float:
        calls = 10 if large else 1
        measure(run, [None], calls, device)
        samples = [measure(run, [None], calls, device) for _ in range(5 if quick else 9)]
        # The best: a ceiling is what the machine can do, not what was left of it just then. On a
        # CPU `own` is the sum over the cores.
        return digits(amount / min(sample.own if large else sample.wall for sample in samples))

    return {
        "copy_gb_s": rate(lambda _: target.copy_(source), 2 * source.nbytes / 1e9),
        "matmul_tflop_s": rate(lambda _: left @ right, 2 * n**3 / 1e12),
    }
