"""Where a run computes, and what it asks of the system's memory."""

import subprocess
import sys

import pytest

pytest.importorskip("torch")

from mvbert.training import device

FAULTS = """
import resource, torch
from mvbert.training.device import give_memory_back, keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(30_000, 384)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
as_it_comes = faults()
keep_memory()
faults()  # the last that are met
kept = faults()
give_memory_back()
print(as_it_comes, kept, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_kept_memory_is_not_met_again_as_page_faults():
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    as_it_comes, kept, given_back = map(int, run.stdout.split())
    assert as_it_comes > 100_000
    assert kept < 100
    assert given_back > 10_000


def test_an_older_malloc_keeps_what_it_can(monkeypatch):
    """glibc up to 2.34 refuses thresholds of more than 32 MiB, and says so by a 0."""
    taken = {}

    class Old:
        @staticmethod
        def mallopt(parameter: int, value: int) -> int:
            if parameter == -3 and value > 32 << 20:
                return 0
            taken[parameter] = value
            return 1

    monkeypatch.setattr(device.ctypes, "CDLL", lambda _: Old)
    device.keep_memory()
    assert taken == {-3: 32 << 20, -1: -1}
