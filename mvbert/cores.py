"""How many threads a number of threads means."""

from __future__ import annotations

import os


def cores(threads: int = 0) -> int:
    """The number of threads that `threads` asks for: 0 is one for each core of this process."""
    if threads:
        return threads
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
