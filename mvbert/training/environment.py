"""The environment of a run: versions, device, command, commit."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from mvbert import __version__
from mvbert.files import Json
from mvbert.training.device import Device


def environment(device: Device, processes: int = 1) -> dict[str, Json]:
    """The environment to record with a run or a result."""
    facts: dict[str, Json] = {
        "mvbert": __version__,
        "commit": commit(),
        "command": shlex.join(sys.argv),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": str(device.device),
        "dtype": device.dtype,
        "dtype_reason": device.reason,
        "threads": torch.get_num_threads(),
        "processes": processes,
        "processor": processor(),
    }
    if device.device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device.device)
        facts["cuda"] = torch.version.cuda
    return facts


def commit() -> str | None:
    """The git commit of the running source tree, with + if it has changes; None outside git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def processor() -> str:
    """The processor's name from the system."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(root: Path, *args: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *args], capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()
