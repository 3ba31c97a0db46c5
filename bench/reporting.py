"""Records of results: the description of a run, one line a result, and how they are shown."""

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def run_record(benches: Sequence[Any], device: str, quick: bool, only: Sequence[str] = ()) -> dict:
    """Device, driver, versions, commit, clocks, load: what readers of a result ask first."""
    import torch

    from mvbert.training import environment

    now = datetime.now(timezone.utc)
    needs = sorted({name for bench in benches for p in bench.providers for name in p.needs})
    facts = {
        "record": "run",
        "ends": True,  # each bench has a line where it ended; without one it was cut short
        "run": f"{now:%Y%m%dT%H%M%SZ}-{os.getpid()}",
        "benches": [bench.name for bench in benches],
        "device": device,
        "quick": quick,
        "only": list(only),
        "commit": environment.commit() or os.environ.get("MVBERT_COMMIT"),
        "processor": environment.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": [round(value, 1) for value in os.getloadavg()],
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": version("triton"),
        "peers": {name: version(name) for name in needs if version(name)},
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
        facts["nvidia_smi"] = nvidia_smi()
    return facts


def version(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def nvidia_smi() -> dict[str, str] | None:
    """Driver, clocks, power and temperature now, or None where nvidia-smi does not answer."""
    names = ["driver_version", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu"]
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(names, (v.strip() for v in answer.splitlines()[0].split(",")), strict=False))


def threads(count: int) -> str:
    """A number of threads, for labels."""
    return f"{count} thread" + "s" * (count != 1)


def label(case: Any) -> str:
    """The name of a case in tables: its `label`, or else its fields."""
    own = getattr(case, "label", None)
    return own or " ".join(f"{name}={value}" for name, value in vars(case).items())


def reason(record: dict) -> str:
    for kind in ("skipped", "wrong", "failed"):
        if kind in record:
            hint = f" ({record['pip']})" if "pip" in record else ""
            return f"{kind}: {record[kind]}{hint}"
    return ""


def summary(record: dict) -> str:
    parts = (
        ("ms", "{ms[p50]:10.4g} ms ({ms[p20]:.4g} .. {ms[p80]:.4g})"),
        ("items_s", "{items_s:.4g} {unit}/s"),
        ("tflop_s", "{tflop_s:.4g} of {ceiling[matmul_tflop_s]:.4g} TFLOP/s"),
        ("gb_s", "{gb_s:.4g} of {ceiling[copy_gb_s]:.4g} GB/s"),
        ("times_floor", "{times_floor:.3g} x floor"),
        ("equal", "{equal:.2%} of texts equal"),
        ("peak_mb", "peak {peak_mb:.4g} MB"),
    )
    return "  ".join(
        text.format_map(record) for name, text in parts if record.get(name) is not None
    )


def appender(output: Path | None, run: dict) -> Callable[[dict], None]:
    """A function that appends a record to `output`, a .jsonl file or a folder of them.

    Records carry the number of their run; the line that describes it comes first in each file.
    """
    files: set[Path] = set()

    def emit(record: dict) -> None:
        if output is None:
            return
        file = output if output.suffix == ".jsonl" else output / f"{record['bench']}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as out:
            if file not in files:
                files.add(file)
                out.write(json.dumps(run) + "\n")
            out.write(json.dumps({**record, "run": run["run"]}) + "\n")

    return emit
