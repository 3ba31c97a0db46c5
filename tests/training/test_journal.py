"""The log: a line's speed is that of the steps since the last line, without pauses."""

from types import SimpleNamespace

import pytest

from mvbert.config import TrainConfig
from mvbert.progress import Progress
from mvbert.training import journal
from mvbert.training.journal import Journal


class Clock:
    """Seconds that pass when it is lines_of."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(journal, "time", made)
    return made


def test_speed_is_of_the_steps_of_a_line_and_of_training_alone(clock):
    lines: list[dict] = []
    sums = {"skipped": 0.0}
    task = SimpleNamespace(
        rows=SimpleNamespace(T=10, count=7), summary=lambda sums: {"loss": 1.0}, flops=lambda: 8e6
    )
    feed = SimpleNamespace(take_wait=lambda: 0.5)
    stepper = SimpleNamespace(take=lambda: SimpleNamespace(ready=True, wait=lambda: (sums, 0, -1)))
    log = SimpleNamespace(write=lines.append)
    config = TrainConfig(rows=6, steps=40, lr=1.0, warmup=0.0, final_lr=0.0)
    lines_of = Journal(log, Progress("test"), task, config, feed, stepper, 1e8, step=10)
    clock.now += 2.0
    lines_of.begin(15)
    clock.now += 1.0
    with lines_of.paused():
        clock.now += 50.0
        lines_of.evaluated(15, {"loss": 3.0})
    clock.now += 3.0
    lines_of.begin(17)
    first, heldout, second = lines
    assert (first["step"], first["pieces"], first["lr"]) == (15, 15 * 60, 26 / 40)
    assert (first["pieces_per_second"], first["mfu"], first["data_wait"]) == (150, 0.2, 0.25)
    assert heldout == {"step": 15, "pieces": 900, "heldout": {"loss": 3.0}}
    assert (second["step"], second["pieces_per_second"]) == (17, 30)
    assert (second["mfu"], second["data_wait"]) == (0.04, 0.125)


def test_the_second_line_of_a_long_run_says_how_long_it_will_take(clock):
    """The steps of the first one are slower: they compile kernels and allocate memory."""
    notes: list[str] = []
    progress = Progress("test")
    progress.note = notes.append
    sums = {"skipped": 0.0}
    task = SimpleNamespace(
        rows=SimpleNamespace(T=10, count=7), summary=lambda sums: {"loss": 1.0}, flops=lambda: 8e6
    )
    feed = SimpleNamespace(take_wait=lambda: 0.0)
    make = SimpleNamespace(take=lambda: SimpleNamespace(ready=True, wait=lambda: (sums, 0, -1)))
    for steps, expected in (
        (
            2030,
            [
                "600 pieces/s: 3 min 20 s for the 2,000 steps left, "
                "without evaluations and checkpoints"
            ],
        ),
        (629, []),  # less than a minute is not worth a line
    ):
        notes.clear()
        config = TrainConfig(rows=6, steps=steps, lr=1.0)
        told = Journal(None, progress, task, config, feed, make, 1e8, step=10)
        for step, seconds in ((20, 30.0), (30, 1.0), (40, 1.0)):
            clock.now += seconds
            told.begin(step)
        assert notes == expected
