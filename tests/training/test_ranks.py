"""A run of several processes: the same losses, one log, and an end when one of them dies."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mvbert.training import checkpoint
from mvbert.training.ranks import Ranks, _fresh_store

SETTINGS = [
    "--steps", 6, "--rows", 8, "--eval-rows", 10, "--eval-every", 3, "--save-every", 2,
    "--log-every", 2, "--dtype", "float32", "--device", "cpu", "--threads", 1, "--lr", 1e-3,
    "--row.length", 16, "--shape", "1x64", "--distill", "hidden", "logits",
]  # fmt: skip

# Python as torchrun starts it: one process ends itself as a broken machine would.
DIE = """
import os, signal, sys
from mvbert import cli
from mvbert.training import step
first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
if not first:  # as on two machines of which one has not noticed a restart
    os.environ["TORCHELASTIC_RESTART_COUNT"] = os.environ["RANK"]
update = step.Step.__call__

def dying(self, feed, number):
    if number == 3 and os.environ["RANK"] == "1" and first:
        os.kill(os.getpid(), signal.SIGKILL)
    update(self, feed, number)

step.Step.__call__ = dying
sys.exit(cli.main())
"""

# Rank 0 does, while the others wait for its checkpoint.
DIE_SAVING = """
import os, pathlib, signal, sys
from mvbert.training import checkpoint
from mvbert import cli
save = checkpoint.save

def dying(folder, state, *rest):
    if state["step"] == 4:
        pathlib.Path("death").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    save(folder, state, *rest)

checkpoint.save = dying
sys.exit(cli.main())
"""

# The first one, with a signal to torchrun itself, or to all of them as a terminal sends it.
ASK = {
    how: DIE.replace("os.kill(os.getpid(), signal.SIGKILL)", signal)
    for how, signal in (
        ("terminate", "os.kill(os.getppid(), signal.SIGTERM)"),
        ("ctrl-c", "[os.kill(p, signal.SIGINT) for p in (os.getpid(), os.getppid())]"),
    )
}


@pytest.fixture
def start(training_inputs, tmp_path):
    """A function that runs Stage II in N processes; returns what came out."""

    def run(
        out: str, processes: int, *options, torchrun: tuple = (), program: tuple = ("-m", "mvbert")
    ) -> subprocess.CompletedProcess:
        command = [sys.executable]
        if processes > 1:
            torchrun = ("--standalone", "--nproc-per-node", processes, *torchrun)
            command += ["-m", "torch.distributed.run", *torchrun]
        command += [
            *program, "train", "--stage", 2, "--corpus", training_inputs / "corpus",
            "--stage1", training_inputs / "stage1", "-o", tmp_path / out, *SETTINGS, *options,
        ]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if k != "PYTEST_XDIST_WORKER"}
        return subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            cwd=tmp_path,
            env={**environment, "OMP_NUM_THREADS": "1"},
        )

    return run


@pytest.fixture
def assert_the_same(losses):
    """A function that asserts that logs are alike to rounding, checkpoints the same."""

    def check(out: Path, reference: Path) -> None:
        assert losses(out) == pytest.approx(losses(reference), rel=2e-5, abs=1e-6)
        names = [sorted(p.name for p in (f / "checkpoints").iterdir()) for f in (out, reference)]
        assert names[0] == names[1]

    return check


def test_two_processes_learn_what_one_learns(start, tmp_path, assert_the_same):
    one = start("one", 1)
    assert one.returncode == 0, one.stderr
    two = start("two", 2, "--micro-rows", 2)  # so that gradients are accumulated as well
    assert two.returncode == 0, two.stderr
    assert_the_same(tmp_path / "two", tmp_path / "one")
    reports = [json.loads(done.stdout) for done in (one, two)]  # one line: rank 0's
    assert reports[0]["steps"] == reports[1]["steps"]
    run = json.loads((tmp_path / "two" / "run.json").read_text())
    assert run["environment"]["processes"] == 2
    assert two.stderr.count("step 6: held-out") == 1

    other = start("two", 2, "--micro-rows", 2, "--lr", 1)
    assert other.returncode != 0
    assert other.stderr.count("holds a run with other settings") == 1


@pytest.mark.slow
def test_four_processes_learn_what_one_learns(start, tmp_path, assert_the_same):
    late = ("--row.late-length", 32, "--row.late-share", 0.5)  # another length on the way
    for out, processes in (("one", 1), ("four", 4)):
        done = start(out, processes, *late)
        assert done.returncode == 0, done.stderr
    assert_the_same(tmp_path / "four", tmp_path / "one")


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_and_it_resumes(start, tmp_path, assert_the_same, losses):
    assert start("whole", 2).returncode == 0
    program = tmp_path / "dying.py"
    program.write_text(DIE)
    before = time.monotonic()
    died = start("died", 2, program=(program,))
    assert died.returncode != 0
    assert time.monotonic() - before < 60
    assert checkpoint.newest(tmp_path / "died" / "checkpoints", print).name == "step-00000003"
    assert not (tmp_path / "died" / "model").exists()

    # torchrun starts all of them again by itself where it is told to.
    again = start("elastic", 2, torchrun=("--max-restarts", 1), program=(program,))
    assert again.returncode == 0, again.stderr
    assert "resuming from step-00000003" in again.stderr
    assert losses(tmp_path / "elastic") == losses(tmp_path / "whole")

    # One process takes up what two have begun.
    alone = start("died", 1)
    assert alone.returncode == 0, alone.stderr
    assert_the_same(tmp_path / "died", tmp_path / "whole")


@pytest.mark.slow
def test_a_death_while_saving_ends_those_who_wait(start, tmp_path):
    program = tmp_path / "dying.py"
    program.write_text(DIE_SAVING)
    assert start("died", 2, program=(program,)).returncode != 0
    # torchrun would have killed after half a minute what does not end when it is told to.
    assert time.time() - (tmp_path / "death").stat().st_mtime < 20
    assert start("died", 2).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("how", ["terminate", "ctrl-c"])
def test_a_signal_to_torchrun_saves_first(start, tmp_path, how, losses):
    program = tmp_path / "asking.py"
    program.write_text(ASK[how])
    stopped = start("stopped", 2, program=(program,))
    assert stopped.returncode != 0
    assert stopped.stderr.count("mvbert: stopped at step") == 1, stopped.stderr
    assert "Traceback" not in stopped.stderr.split("mvbert: stopped at step")[0]
    newest = checkpoint.newest(tmp_path / "stopped" / "checkpoints", print)
    assert newest.name in stopped.stderr.replace("step ", "step-0000000")
    assert start("stopped", 2).returncode == 0
    assert start("whole", 2).returncode == 0
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_shares_are_all_rows_once():
    for count in (1, 2, 3, 7):
        shares = [Ranks(rank, count).share(20) for rank in range(count)]
        assert [row for share in shares for row in share] == list(range(20))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_needs_no_other():
    alone = Ranks()
    assert alone.lead
    assert alone.first(lambda: 5) == 5
    assert alone.any(True, False) == (True, False)


def test_what_an_earlier_start_left_in_the_store_is_not_read():
    """Machines may count restarts differently, and torchrun's store outlives all of them."""
    store, found = torch.distributed.HashStore(), []
    store.set("request/1", "a process that is gone")
    for start in range(3):
        with ThreadPoolExecutor(3) as pool:
            parts = list(pool.map(lambda rank: _fresh_store(store, rank, 3), range(3)))
        assert not parts[start].check(["key"])
        parts[start].set("key", str(start))
        found += [part.get("key") for part in parts]
    assert found == [b"0"] * 3 + [b"1"] * 3 + [b"2"] * 3
