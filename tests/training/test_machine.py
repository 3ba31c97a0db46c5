"""What `dtype = auto` means: measured once, kept by the run, the same for all runs of a job.

Nothing here depends on the processor: rates are scripted, or the clock that measures them.
"""

import json
import time
from functools import partial

import pytest

pytest.importorskip("torch")

import torch

from mvbert.config import ModelConfig, RowConfig, Stage1Config, Stage2Config, TrainConfig
from mvbert.errors import InputError
from mvbert.model import flops
from mvbert.training import device, machine, ranks
from mvbert.training.device import choose_dtype

CPU = torch.device("cpu")
FAST = {torch.float32: 100e9, torch.bfloat16: 215e9}
SLOW = {torch.float32: 150e9, torch.bfloat16: 80e9}


@pytest.fixture
def rates(monkeypatch):
    """A function that scripts the measurement; returns a list of what is measured."""

    def script(found) -> list:
        measured = []

        def measure(products, gradients):
            measured.append(products)
            return found

        monkeypatch.setattr(machine, "product_rates", measure)
        return measured

    return script


# ---- the choice -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("float32", "bfloat16", "dtype"),
    [(150e9, 80e9, "float32"), (100e9, 119e9, "float32"), (100e9, 120e9, "bfloat16")],
    ids=["slower", "within-the-margin", "faster"],
)
def test_auto_takes_bfloat16_where_it_is_clearly_faster(float32, bfloat16, dtype):
    found = {torch.float32: float32, torch.bfloat16: bfloat16}
    chosen, reason = choose_dtype("auto", CPU, lambda: found)
    assert chosen == dtype
    figures = f"float32 {float32 / 1e9:.0f}, bfloat16 {bfloat16 / 1e9:.0f} GFLOP/s a core"
    assert reason == f"measured {figures}"
    assert figures in str(device.Device.of(CPU, chosen, reason))


def test_what_is_set_is_not_measured():
    for dtype in ("float32", "bfloat16"):
        assert choose_dtype(dtype, CPU, pytest.fail) == (dtype, "as set")


@pytest.mark.parametrize(("has", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_is_asked_whether_it_has_bfloat16(monkeypatch, has, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    assert choose_dtype("auto", torch.device("cuda:0"), pytest.fail)[0] == dtype


def test_a_process_without_others_keeps_what_was_recorded(rates):
    measured = rates(FAST)
    alone = partial(machine.set_up_alone, "cpu", threads=1, products=[(1, 2, 3)], gradients=False)
    recorded = machine.recorded_choice({"dtype": "float32", "dtype_reason": "measured before"})
    assert str(alone("auto", recorded=recorded)) == "cpu, float32 products: measured before"
    assert alone("bfloat16", recorded=recorded).reason == "as set"
    assert measured == []
    assert alone("auto").dtype == "bfloat16"
    assert measured == [[(1, 2, 3)]]
    assert torch.get_num_threads() == 1
    with pytest.raises(InputError, match="device must be auto, cpu or cuda"):
        machine.set_up_alone("tpu", "auto", 1, [], gradients=False)


@pytest.mark.parametrize("facts", [{}, {"dtype": "float16"}, {"dtype": ["float32"]}])
def test_an_environment_without_a_known_dtype(facts):
    assert machine.recorded_choice(facts) is None


# ---- the measurement ------------------------------------------------------------------------


class Clock:
    """Seconds that pass in matrix products, by their dtype; remembers the products."""

    def __init__(self, monkeypatch, seconds) -> None:
        self.now, self.calls, self._seconds = 0.0, [], seconds
        monkeypatch.setattr(flops.torch, "mm", self.mm)

    def mm(self, a, b, out) -> None:
        assert a.dtype == b.dtype == out.dtype
        assert out.shape == (a.shape[0], b.shape[1])
        self.calls.append((a.dtype, *a.shape, b.shape[1]))
        self.now += self._seconds(a.dtype, len(self.calls))

    def __call__(self) -> float:
        return self.now


def test_a_rate_is_that_of_the_best_of_interleaved_rounds(monkeypatch):
    def seconds(dtype, call: int) -> float:
        busy = 9.0 if call in (1, 3, 6, 7) else 0.0  # a neighbour
        return busy + (0.02 if dtype == torch.float32 else 0.01)

    clock = Clock(monkeypatch, seconds)
    found = flops.product_rates([(8, 4, 6)], False, seconds=0.0, clock=clock)
    assert found == {
        torch.float32: pytest.approx(2 * 8 * 4 * 6 / 0.02),
        torch.bfloat16: pytest.approx(2 * 8 * 4 * 6 / 0.01),
    }
    turns = [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    assert [dtype for dtype, *_ in clock.calls] == turns + turns[1:3] * (flops.ROUNDS - 1)


def test_rates_are_of_one_core_and_the_threads_stay_as_they_were(monkeypatch):
    before, seen = torch.get_num_threads(), set()

    def seconds(*_) -> float:
        seen.add(torch.get_num_threads())
        return 0.01

    flops.product_rates([(8, 4, 6)], False, seconds=0.0, clock=Clock(monkeypatch, seconds))
    assert seen == {1}
    assert torch.get_num_threads() == before


def test_time_that_a_neighbour_takes_is_not_counted(monkeypatch):
    calls = flops._product_calls

    def interrupted(m, k, n, dtype, gradients):
        def call(work):
            time.sleep(0.02 if dtype == torch.float32 else 0.0)  # the processor went elsewhere
            work()

        return [partial(call, work) for work in calls(m, k, n, dtype, gradients)]

    monkeypatch.setattr(flops, "_product_calls", interrupted)
    found = flops.product_rates([(64, 256, 256)], False, seconds=0.0)
    assert 2 * 64 * 256 * 256 / found[torch.float32] < 0.02


def test_it_measures_for_as_long_as_it_may(monkeypatch):
    clock = Clock(monkeypatch, lambda *_: 0.01)
    flops.product_rates([(8, 4, 6)], False, seconds=1.0, clock=clock)
    assert clock.now == pytest.approx(1.0, abs=0.05)


def test_gradients_are_products_with_other_operands_transposed(monkeypatch):
    clock = Clock(monkeypatch, lambda *_: 0.01)
    flops.product_rates([(8, 4, 6)], True, seconds=0.0, clock=clock)
    forward, of_input, of_weight = (8, 4, 6), (8, 6, 4), (6, 8, 4)
    assert {tuple(shape) for _, *shape in clock.calls} == {forward, of_input, of_weight}


def test_large_products_are_measured_on_fewer_rows(monkeypatch):
    clock = Clock(monkeypatch, lambda *_: 1.0)
    flops.product_rates([(4096, 256, 1024), (4096, 1024, 4096)], False, 0.0, clock=clock)
    assert {m for _, m, _, _ in clock.calls} == {381, flops.FEWEST_ROWS}


def test_a_dtype_that_has_lost_is_not_measured_further(monkeypatch):
    """Where a processor has no bfloat16, a library may need a hundred times as long."""
    clock = Clock(monkeypatch, lambda dtype, _: 0.01 if dtype == torch.float32 else 1.0)
    products = [(8, 4, 6), (8, 6, 9), (8, 9, 12)]
    found = flops.product_rates(products, True, clock=clock)
    assert found[torch.float32] == pytest.approx(100 * found[torch.bfloat16])
    assert len(clock.calls) == 4


def test_the_products_are_those_of_the_run_at_its_micro_batch():
    teacher, row = ModelConfig(50, 48, 2, 2, 96), RowConfig(length=16)
    first = machine.pass_products(Stage1Config(rows=8, micro_rows=2), row, teacher)
    assert first == [(32, 48, 144), (32, 48, 48), (32, 48, 96), (32, 96, 48)]
    alone = Stage2Config(rows=8, shape="2x64", distill=())
    own = [(128, 64, 192), (128, 64, 64), (128, 64, 256), (128, 256, 64)]
    assert machine.pass_products(alone, row, teacher) == own
    both = machine.pass_products(Stage2Config(rows=8, shape="2x64"), row, teacher)
    assert both == own + [(128, k, n) for _, k, n in first]


# ---- it is kept -----------------------------------------------------------------------------


def begin(out, dtype: str, auto: bool = True, **facts) -> None:
    """The run.json of a run that began with `dtype`."""
    out.mkdir(parents=True, exist_ok=True)
    description = {"train": {"dtype": "auto" if auto else dtype.split()[0].rstrip(":")}}
    run = {"description": description, "environment": {"dtype": dtype, **facts}}
    (out / "run.json").write_text(json.dumps(run))


@pytest.mark.parametrize(
    ("written", "facts", "kept"),
    [
        ("bfloat16", {"dtype_reason": "measured A"}, ("bfloat16", "measured A")),
        (
            "bfloat16 products, float32 weights: the CPU has them",
            {},
            ("bfloat16", "the CPU has them"),
        ),
        (
            "float32: this CPU has no bfloat16 products",
            {},
            ("float32", "this CPU has no bfloat16 products"),
        ),
    ],
    ids=["now", "before-bfloat16", "before-float32"],
)
def test_a_run_keeps_the_dtype_it_began_with(tmp_path, rates, written, facts, kept):
    for found in (FAST, SLOW):
        measured = rates(found)
        begin(tmp_path, written, **facts)
        where = machine.set_up(TrainConfig(device="cpu", threads=1), tmp_path, [])
        assert (where.dtype, where.reason) == kept
        assert measured == []


def test_a_run_that_records_no_dtype_is_refused(tmp_path):
    config = TrainConfig(device="cpu", threads=1)
    for text, named in (
        ('{"description": {}}', "does not record the dtype"),
        ('{"environment": {"dtype": "float8"}}', "must be float32 or bfloat16, got 'float8'"),
    ):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(InputError, match=named):
            machine.set_up(config, tmp_path, [])


def test_a_stopped_run_goes_on_in_its_dtype_on_another_machine(
    training_inputs, tmp_path, verb, rates
):
    command = [
        "train", "--stage", 2, "--corpus", training_inputs / "corpus", "--stage1",
        training_inputs / "stage1", "-o", tmp_path / "run", "--shape", "1x64", "--steps", 3,
        "--rows", 4, "--row.length", 16, "--eval-rows", 4, "--device", "cpu", "--threads", 1,
    ]  # fmt: skip
    measured = rates(FAST)
    report, said = verb(*command, "--max-hours", 1e-9)
    assert report == {"complete": False, "step": 1}
    figures = "measured float32 100, bfloat16 215 GFLOP/s a core"
    assert f"device cpu, bfloat16 products, float32 weights: {figures}" in said
    assert len(measured) == 1
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["environment"]["dtype"] == "bfloat16"
    assert run["environment"]["dtype_reason"] == figures
    measured = rates(SLOW)
    report, said = verb(*command)
    assert report["steps"] == 3
    assert f"device cpu, bfloat16 products, float32 weights: {figures}" in said
    assert measured == []
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["resumed"] == [{"step": 1}]


def test_another_dtype_is_another_run(training_inputs, tmp_path, verb, refused, rates):
    rates(FAST)
    command = [
        "train", "--stage", 2, "--corpus", training_inputs / "corpus", "--stage1",
        training_inputs / "stage1", "-o", tmp_path / "run", "--shape", "1x64", "--steps", 1,
        "--rows", 4, "--row.length", 16, "--eval-rows", 4, "--device", "cpu", "--threads", 1,
    ]  # fmt: skip
    verb(*command)
    refused([*command, "--dtype", "bfloat16"], "train.dtype: 'auto' there, 'bfloat16' now")


def test_a_job_decides_once_for_all_of_its_runs(tmp_path, rates):
    auto, as_set = TrainConfig(device="cpu", threads=1), TrainConfig(device="cpu", dtype="float32")
    products = [(8, 4, 6)]
    measured = rates(FAST)
    job = machine.decide_for_job(tmp_path, [as_set, auto], products)
    assert job == ("bfloat16", "measured float32 100, bfloat16 215 GFLOP/s a core")
    measured = rates(SLOW)
    assert machine.decide_for_job(tmp_path, [as_set, auto], products) == job
    assert machine.set_up(auto, tmp_path / "a", [(1, 1, 1)], job).dtype == "bfloat16"
    assert machine.set_up(as_set, tmp_path / "b", [(1, 1, 1)], job).dtype == "float32"
    assert measured == []
    (tmp_path / machine.JOB_FILE).write_text('{"dtype": "float16", "reason": ""}')
    with pytest.raises(InputError, match=r"dtype\.json: expected dtype"):
        machine.decide_for_job(tmp_path, [auto], products)


def test_a_job_without_auto_on_a_cpu_measures_nothing(tmp_path, rates, monkeypatch):
    measured = rates(FAST)
    assert machine.decide_for_job(tmp_path, [TrainConfig(dtype="float32")], []) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert machine.decide_for_job(tmp_path, [TrainConfig(device="auto")], []) is None
    assert measured == []
    assert list(tmp_path.iterdir()) == []


def test_a_job_of_an_earlier_version_keeps_what_its_runs_have(tmp_path, rates):
    measured = rates(SLOW)
    begin(tmp_path / "arms" / "set", "float32: asked for", auto=False)
    begin(tmp_path / "stage1", "bfloat16 products, float32 weights: the CPU has them")
    config = TrainConfig(device="cpu", threads=1)
    kept = ("bfloat16", "the CPU has them")
    assert machine.decide_for_job(tmp_path, [config], []) == kept
    assert measured == []


def test_all_processes_take_what_rank_0_decides(tmp_path, rates, monkeypatch):
    """This one is rank 1, measures nothing and hears of it from the others."""
    heard = json.dumps({"value": ["bfloat16", "measured there"]}).encode()
    second = ranks.Ranks(1, 2, 1, 2, slow_group=object())
    monkeypatch.setattr(ranks.Ranks, "_broadcast", lambda self, text: heard)
    monkeypatch.setattr(machine, "join_ranks", lambda: second)
    measured = rates(SLOW)
    where = machine.set_up(TrainConfig(device="cpu", threads=1), tmp_path, [])
    assert (where.dtype, where.reason) == ("bfloat16", "measured there")
    assert measured == []
