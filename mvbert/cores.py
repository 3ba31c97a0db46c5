"""How many threads a number of threads means: one rule for every `threads` of the package."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from numbers import Integral
from pathlib import Path

from mvbert.errors import InputError

THREADS = 65536  # at most


def cores(threads: int = 0) -> int:
    """The number of threads that `threads` asks for: 0 is one for each available core.

    Available are the cores of the process's affinity mask, and of these no more than the CPU quota
    of its control group, as containers have one, rounded up.

    Raises:
        InputError: no integer, or out of range.
    """
    # (The type first: asking an abstract class costs more than a short text's pieces.)
    integer = type(threads) is int or isinstance(threads, Integral)
    if not integer or not 0 <= threads <= THREADS:
        raise InputError(
            f"threads must be 0 (all available cores) or a number up to {THREADS}, got {threads!r}"
        )
    if threads:
        return int(threads)
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, math.ceil(min(count, _cpu_quota())))


@functools.cache
def _cpu_quota(root: str = "/") -> float:
    """Cores that the control group of this process may keep busy; infinity where none says."""
    mounted = Path(root, "sys/fs/cgroup")
    parts: list[str] = []
    with contextlib.suppress(OSError):
        own = Path(root, "proc/self/cgroup").read_text().partition("0::/")[2]
        parts = own.partition("\n")[0].split("/")
    quota = math.inf
    for depth in range(len(parts) + 1):  # the least of the group and of those around it
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            limit = mounted.joinpath(*parts[:depth], "cpu.max").read_text()
            micros, period = map(int, limit.split())
            quota = min(quota, micros / period)
    with contextlib.suppress(OSError, ValueError):  # control groups of version 1
        micros, period = (
            int((mounted / "cpu" / f"cpu.cfs_{name}_us").read_text())
            for name in ("quota", "period")
        )
        quota = min(quota, micros / period if micros > 0 else math.inf)
    return quota
