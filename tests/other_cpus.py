"""Runs the tests as other x86 processors would, one setting after the other: `make test-cpus`.

    python tests/other_cpus.py                          all of `make test`, 8 times
    python tests/other_cpus.py tests/kernels -x         pytest's arguments: what to run

Each setting holds torch, oneDNN, MKL, OpenBLAS (under NumPy and so under Triton's interpreter) and
NumPy itself to the instructions of an older processor, with one and with two threads. Our own core
needs no setting: tests/csrc runs every instruction set that it can choose here. At the end, the
largest error that a file's tests met, as a share of the bound of rounding in tests/conftest.py.
"""

import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

from numpy._core._multiarray_umath import __cpu_dispatch__

# Their names are not the same in every version of NumPy.
DISPATCHED = [str(name) for name in __cpu_dispatch__]
AVX512 = [name for name in DISPATCHED if "AVX512" in name or name == "X86_V4"]

SETTINGS = {
    "as it is": {},
    "AVX-512 without bfloat16": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "OPENBLAS_CORETYPE": "SkylakeX",
        "MKL_CBWR": "AVX512",
    },
    "AVX2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
        "MKL_CBWR": "AVX2",
        "NPY_DISABLE_CPU_FEATURES": " ".join(AVX512),
    },
    "SSE4.1": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "OPENBLAS_CORETYPE": "Nehalem",
        "MKL_CBWR": "COMPATIBLE",
        "NPY_DISABLE_CPU_FEATURES": " ".join(DISPATCHED),
    },
}


def run(setting: dict[str, str], threads: int, arguments: list[str]) -> tuple[str, dict]:
    """(pytest's last line, file -> largest share of the bound) of a run."""
    # Test processes side by side take one thread each (tests/conftest.py).
    side_by_side = ["-n", str(os.cpu_count()), "--dist", "loadfile"] if threads == 1 else []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *side_by_side, *arguments,
             f"--junitxml={report}", "-o", "junit_family=xunit1"],
            env={**os.environ, **setting, "OMP_NUM_THREADS": str(threads)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            print(done.stdout, done.stderr, flush=True)
        if not report.exists():
            return f"pytest ended with code {done.returncode}", {}
        shares: dict[str, float] = defaultdict(float)
        for case in ElementTree.parse(report).iter("testcase"):
            for fact in case.iter("property"):
                if fact.get("name") == "share_of_bound":
                    file = case.get("file", "")
                    shares[file] = max(shares[file], float(fact.get("value", "nan")))
    return done.stdout.strip().splitlines()[-1].strip("= "), shares


def main(arguments: list[str]) -> int:
    failed = False
    for name, setting in SETTINGS.items():
        for threads in (1, 2):
            result, shares = run(setting, threads, arguments)
            failed |= "passed" not in result or "failed" in result or "error" in result
            print(f"{name}, {threads} thread{'s' * (threads > 1)}: {result}", flush=True)
            for file, share in sorted(shares.items()):
                print(f"    {share:6.1%} of the bound  {file}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
