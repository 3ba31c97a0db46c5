"""A time budget: the first steps are timed, and all runs of a job get the same share of theirs."""

import itertools

import pytest

pytest.importorskip("torch")

import torch

from mvbert.config import RowConfig, Stage2Config, TrainConfig
from mvbert.errors import InputError
from mvbert.progress import Progress, duration
from mvbert.training import budget
from mvbert.training.budget import FLOOR, SLACK, Cost, fitting_share, share_of_steps
from mvbert.training.device import Device
from mvbert.training.stages import Stage2, load_stage1

CPU = Device(torch.device("cpu"), None, "as set")
FIRST = TrainConfig(steps=150, rows=64, eval_every=50)
SECOND = TrainConfig(steps=800, rows=32, eval_every=200)


def costs(slower: float) -> dict[str, tuple[TrainConfig, Cost]]:
    """Stage I and two students: 50 s of set-up and evaluations, 200 s of steps, times `slower`."""
    first, second = Cost(10.0, 0.4, 2.5), Cost(5.0, 0.0875, 1.0)
    runs = {"stage1": (FIRST, first), "a": (SECOND, second), "b": (SECOND, second)}
    return {
        name: (config, Cost(slower * c.set_up, slower * c.step, slower * c.evaluation))
        for name, (config, c) in runs.items()
    }


def test_a_fast_machine_makes_all_steps():
    fixed = 10 + 2.5 * 4 + 2 * (5 + 1.0 * 5)
    assert fitting_share(costs(1.0), fixed + 200) == 1
    assert fitting_share(costs(1.0), 1e9) == 1


def test_a_slow_machine_makes_as_many_as_fit():
    runs = costs(4.0)
    share = fitting_share(runs, 400.0)
    assert FLOOR < share < 1
    used = sum(
        cost.fixed(config) + share * config.steps * cost.step for config, cost in runs.values()
    )
    assert used == pytest.approx(400.0)


def test_no_run_gets_fewer_steps_than_the_floor():
    assert fitting_share(costs(100.0), 400.0) == FLOOR
    assert fitting_share(costs(1.0), -5.0) == FLOOR


def test_a_share_of_a_run_is_a_number_of_steps():
    assert SECOND.shortened(1.0) is SECOND
    assert SECOND.shortened(0.43).steps == 344
    by_pieces = TrainConfig(pieces=6400, rows=4).counted(16)
    assert by_pieces.shortened(0.5).counted(16).steps == 50
    assert TrainConfig(steps=3).shortened(0.1).steps == 1


class Job:
    """A job in a folder on a machine; counts measurements and collects notes."""

    def __init__(self, out, slower: float, minutes: float = 9.0, left: float = 500.0) -> None:
        self.measured, self.notes = 0, []
        self._runs = costs(slower)
        out.mkdir(exist_ok=True)
        self.share = share_of_steps(
            out, minutes, lambda: left, 32, self._measure, self.notes.append
        )

    def _measure(self):
        self.measured += 1
        return self._runs


def test_what_was_measured_is_told(tmp_path):
    fast = Job(tmp_path / "fast", 1.0)
    assert fast.share == 1
    assert fast.notes == [
        "pieces/s in the first steps: stage1 5,120, a 11,703, b 11,703",
        "all steps take about 4 min of the 8 min 20 s left of 9 min: stage1 150, a 800, b 800",
    ]
    slow = Job(tmp_path / "slow", 4.0)
    assert slow.share == fitting_share(costs(4.0), SLACK * 500)
    assert slow.notes[1] == (
        "all steps would take 16 min; 30% of them fit the 8 min 20 s left of 9 min: "
        "stage1 45, a 240, b 240"
    )
    hopeless = Job(tmp_path / "hopeless", 100.0)
    assert hopeless.share == FLOOR
    assert "even 5% of the steps take" in hopeless.notes[1]
    assert "stage1 8, a 40, b 40" in hopeless.notes[1]


@pytest.mark.parametrize("slower", [1.0, 4.0])
def test_a_resumed_job_keeps_its_steps_on_any_machine(tmp_path, slower):
    began = Job(tmp_path, slower)
    assert began.measured == 1
    for minutes in (9.0, 1.0, 0.0):  # another budget is too late, and none is no other job
        again = Job(tmp_path, 50.0, minutes)
        assert (again.share, again.measured) == (began.share, 0)
        assert again.notes == (
            [] if slower == 1 else [f"training 30% of the steps (from {tmp_path}/plan.json)"]
        )


def test_a_job_without_a_budget_measures_nothing(tmp_path):
    job = Job(tmp_path, 50.0, minutes=0.0)
    assert (job.share, job.measured, job.notes) == (1.0, 0, [])
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_began_without_a_budget_makes_all_steps(tmp_path):
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "run.json").write_text("{}")
    job = Job(tmp_path, 50.0)
    assert (job.share, job.measured) == (1.0, 0)
    assert "started without a time budget" in job.notes[0]


@pytest.mark.parametrize("share", ['"half"', "0", "1.5", "true", "null"])
def test_a_damaged_plan_is_refused(tmp_path, share):
    (tmp_path / "plan.json").write_text(f'{{"share": {share}}}')
    with pytest.raises(InputError, match=r"plan\.json: share must lie in \(0, 1\], got"):
        Job(tmp_path, 1.0)


def test_the_median_of_the_first_steps_counts_but_not_the_first(training_inputs, corpus):
    """The clock: set-up 7 s, steps of 100, 2, 3 and 50 s, an evaluation of 5 s."""
    config = Stage2Config(
        steps=9, rows=4, eval_rows=4, threads=1, shape="1x64", distill=(), dtype="float32"
    )
    lasting = [7, 100, 2, 3, 50, 5]
    times = iter(itertools.accumulate(x for seconds in lasting for x in (1000, seconds)))
    stage1 = load_stage1(training_inputs / "stage1")
    cost = budget.measure_cost(
        lambda: Stage2(config, RowConfig(length=16), corpus, stage1, CPU, Progress("", quiet=True)),
        config,
        CPU,
        clock=lambda: next(times),
    )
    assert cost == Cost(set_up=7, step=3, evaluation=5)
    assert next(times, None) is None


def test_a_duration_has_two_units():
    for seconds, text in (
        (0.4, "0 s"), (59.6, "1 min"), (61, "1 min 1 s"), (3599.7, "1 h"), (7500, "2 h 5 min"),
        (3630, "1 h"), (90000, "1 d 1 h"), (86399, "24 h"),
    ):  # fmt: skip
        assert duration(seconds) == text, seconds
