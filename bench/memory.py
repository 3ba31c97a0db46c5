"""The memory that one call needs beyond its inputs, at its peak."""

import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

RUN = Path(__file__).with_name("run.py")


def cuda_peak(run: Callable[[Any], Any], x: Any) -> float:
    """MB that one call needs beyond what is allocated before it, outputs included."""
    import torch

    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    output = run(x)
    torch.cuda.synchronize()
    del output
    return (torch.cuda.max_memory_allocated() - start) / 1e6


def cpu_peak_here(run: Callable[[Any], Any], x: Any) -> float:
    """MB by which one call raises this process's resident set at its peak.

    A first call loads code and starts threads. Linux only: the high-water mark is set back through
    /proc.
    """
    run(x)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    start = _resident()[0]
    output = run(x)
    peak = _resident()[1]
    del output
    return max(0, peak - start) / 1e3


def _resident() -> tuple[int, int]:
    """kB: resident now, and at the high-water mark."""
    status = Path("/proc/self/status").read_text()
    return tuple(int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("VmRSS", "VmHWM"))


def cpu_peak(bench: str, case_number: int, provider: str) -> float | None:
    """`cpu_peak_here` of a bench's provider in a fresh process.

    There freed memory goes back to the system at once.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, str(RUN), bench, "--device", "cpu"]
    command += ["--peak", str(case_number), provider]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    if done.returncode:
        print(f"    no peak memory: {done.stderr.strip().splitlines()[-1:]}", flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])["peak_mb"]
