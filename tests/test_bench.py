"""The benches themselves: what is wrong is not timed, tables are the results, late parts end."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs torch")


@pytest.fixture
def bench_path(root, monkeypatch):
    """bench/ is a folder of scripts: its modules are found as when run.py runs."""
    monkeypatch.syspath_prepend(str(root / "bench"))


@pytest.fixture
def harness(bench_path):
    import harness

    return harness


@pytest.fixture
def clocks(bench_path):
    import clocks

    return clocks


@pytest.fixture
def reporting(bench_path):
    import reporting

    return reporting


@dataclass(frozen=True)
class Case:
    N: int


@pytest.fixture
def bench(harness):
    """Doubling a tensor: right, wrong, raising, absent and elsewhere."""

    def check(case, x, out):
        if not torch.equal(out, 2 * x):
            raise harness.Wrong("not the double")
        return {"seen": True}

    bench = harness.Bench(
        "double",
        cases=lambda device, quick: [Case(64)],
        inputs=lambda case, device, copy: torch.full((case.N,), float(copy + 1)),
        work=lambda case, device: harness.Work(
            flop=case.N, bytes=8 * case.N, items=case.N, unit="values"
        ),
        check=check,
        memory=False,
    )
    bench.add("right", lambda case, device: lambda x: x * 2)
    bench.add("wrong", lambda case, device: lambda x: x * 3)
    bench.add("raising", lambda case, device: lambda x: 1 / 0)
    bench.add("absent", lambda case, device: None, needs=["no-such-package"])
    bench.add("elsewhere", lambda case, device: None, devices=["cuda"])
    return bench


def test_only_what_is_right_is_timed(harness, bench, tmp_path, reporting):
    file = tmp_path / "double.jsonl"
    run = reporting.run_record([bench], "cpu", quick=True)
    emit = reporting.appender(file, run)
    harness.run_bench(bench, harness.Settings("cpu", quick=True, toy=True), emit)
    first, *records = [json.loads(line) for line in file.read_text().splitlines()]
    assert first["record"] == "run"
    assert first["torch"] == torch.__version__
    found = {record["provider"]: record for record in records}
    assert all(record["run"] == first["run"] for record in records)
    assert found["right"]["seen"]
    ms = found["right"]["ms"]
    assert 0 < ms["p20"] <= ms["p50"] <= ms["p80"]
    assert found["right"]["items_s"] == pytest.approx(64e3 / ms["p50"], rel=1e-3)
    assert found["wrong"]["wrong"] == "not the double"
    assert found["raising"]["failed"].startswith("ZeroDivisionError")
    assert found["absent"]["pip"] == "pip install no-such-package"
    assert found["elsewhere"]["skipped"] == "runs on cuda only"
    assert [name for name, record in found.items() if "ms" in record] == ["right"]


def test_who_fails_while_timed_leaves_and_the_rest_goes_on(harness, bench):
    calls = []

    def third_call_fails(x):
        calls.append(x)
        if len(calls) == 3:
            raise RuntimeError("no more")
        return x * 2

    bench.add("failing later", lambda case, device: third_call_fails)
    how = harness.Settings("cpu", quick=True, toy=True, without=["wrong"])
    records = harness.run_bench(bench, how, lambda record: None)
    found = {record["provider"]: record for record in records}
    assert found["failing later"]["failed"] == "RuntimeError: no more"
    assert "ms" not in found["failing later"]
    assert found["wrong"]["skipped"] == "left out"
    assert found["right"]["ms"]["p50"] > 0


@pytest.fixture
def device(harness, monkeypatch, clocks, reporting):
    """What the harness asks of a GPU, answered by a made-up one, whose every call takes 2 ms."""

    class Device:
        lost = False
        stream: object = None

        def synchronize(self):
            if self.lost:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            assert made.stream is not None  # capturing needs another stream than the default one

        def elapsed_time(self, other):
            return 2.0

    @contextlib.contextmanager
    def stream(which):
        made.stream = which
        yield
        made.stream = None

    made = Device()
    answers = {
        "Stream": object, "stream": stream, "Event": Event, "_sleep": lambda cycles: None,
        "synchronize": lambda: made.synchronize(), "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None, "memory_allocated": lambda: 1_000_000,
        "max_memory_allocated": lambda: 4_000_000,
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    ceiling = {"matmul_tflop_s": 700.0, "copy_gb_s": 3000.0}
    monkeypatch.setattr(clocks, "ceilings", lambda *args: ceiling)
    monkeypatch.setattr(reporting, "nvidia_smi", lambda: {"clocks.sm": "1980 MHz"})
    return made


def run_on(device, harness, bench, **options):
    bench.memory = True
    how = harness.Settings("cuda", quick=True, toy=True, **options)
    records = harness.run_bench(bench, how, lambda record: None)
    return {record["provider"]: record for record in records}


def test_times_and_memory_of_a_device(device, harness, bench, clocks):
    def captured(x):
        return x * 2

    captured.captured = True
    bench.add("captured", lambda case, device: captured)
    found = run_on(device, harness, bench, only=["right", "captured"])
    right = found["right"]
    assert right["device_ms"]["p50"] == pytest.approx(2.0 / min(right["calls"], 50), rel=1e-3)
    assert right["peak_mb"] == 3.0
    assert right["nvidia_smi"] == {"clocks.sm": "1980 MHz"}
    assert "peak_mb" not in found["captured"]


def test_a_lost_device_is_told_from_a_failing_peer(device, harness, bench):
    found = run_on(device, harness, bench, without=["elsewhere"])
    assert found["raising"]["failed"].startswith("ZeroDivisionError")
    assert "ms" in found["right"]
    device.lost = True
    with pytest.raises(harness.DeviceLost, match="raising"):
        run_on(device, harness, bench, only=["raising", "absent"])


def test_errors_are_told_and_bounded(harness):
    calls = []

    def truth():
        calls.append(1)
        return [torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor(2.0)]

    bounds = {"out": 0.3, "loss": 0.01}
    right = torch.tensor([3.0, 5.0])
    facts = harness.relative_errors("key", truth, [right, torch.tensor(2.0)], bounds)
    assert facts == {"errors": {"out": 0.2, "loss": 0.0}}
    assert harness.relative_errors("key", truth, [right], bounds) == {"errors": {"out": 0.2}}
    assert len(calls) == 1
    for bad in (2.03, float("nan")):
        with pytest.raises(harness.Wrong, match="loss is off by"):
            harness.relative_errors("key", truth, [right, torch.tensor(bad)], bounds)


def test_percentiles(clocks):
    assert clocks.percentiles([3.0, 1.0, 2.0]) == {"p20": 1400.0, "p50": 2000.0, "p80": 2600.0}


def test_copies_outgrow_the_cache(harness, bench, monkeypatch):
    monkeypatch.setattr(harness, "cache_bytes", lambda device: 1000)
    copies = harness.input_copies(bench, Case(64), "cpu")  # 256 bytes each
    assert len(copies) == 8
    assert len({float(x[0]) for x in copies}) == 8


def test_every_provider_has_its_own_name(bench_path, root):
    import run

    for bench in map(run.load, run.names()):
        names = [provider.name for provider in bench.providers]
        assert len(names) == len(set(names)), bench.name
        for device in ("cpu", "cuda"):
            assert bench.cases(device, True), f"{bench.name} has no quick case for {device}"


def test_tables_are_what_the_results_say(root):
    done = subprocess.run(
        [sys.executable, "bench/tables.py", "--check"], cwd=root, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_tables_take_the_last_whole_run(bench_path, tmp_path):
    import tables

    def lines(run, quick, ms, only=()):
        record = {"record": "result", "bench": "loss", "device": "cpu", "case": "N=1", "run": run}
        record |= {"provider": "mvbert", "ms": {"p50": ms}}
        return [{"record": "run", "run": run, "quick": quick, "only": list(only)}, record]

    made = lines("1", False, 1.0) + lines("2", False, 2.0) + lines("3", True, 3.0)
    made += lines("4", False, 4.0, only=["mvbert"])
    made += [{**lines("5", False, 5.0)[0], "ends": True}, lines("5", False, 5.0)[1]]  # cut short
    (tmp_path / "loss.jsonl").write_text("\n".join(map(json.dumps, made)))
    (record,) = tables.Results(tmp_path).timings("loss")
    assert record["ms"]["p50"] == 2.0
    with (tmp_path / "loss.jsonl").open("a") as file:
        file.write('\n{"record": "end", "run": "5", "bench": "loss"}')
    (record,) = tables.Results(tmp_path).timings("loss")
    assert record["ms"]["p50"] == 5.0


def test_gpu_table_has_the_fastest_of_a_peer_and_says_what_it_lacks(bench_path, tmp_path):
    import tables

    case = {"bench": "loss", "device": "cuda", "case": "N=4096 V=30522 H=1024", "run": "20990101"}

    def record(provider, ms, **more):
        times = {"ms": {"p50": 9.0}, "device_ms": {"p50": ms}}
        return {"record": "result", "provider": provider, **case, **times, **more}

    run = {
        "record": "run", "run": "20990101", "quick": True, "only": [], "gpu": "a GPU",
        "torch": "2.11", "peers": {}, "commit": None,
    }  # fmt: skip
    made = [run, record("mvbert", 1.0), record("Liger", 4.0), record("Liger, large", 3.0)]
    made += [record("CCE", 2.0, note="no bias"), record("CCE torch_compile", 0.5)]
    (tmp_path / "h100.jsonl").write_text("\n".join(map(json.dumps, made)))
    text = tables.gpu_loss_table(tables.Results(tmp_path))
    assert "| 4,096 x 30,522 x 1024 |  | 1 |  |  |  |  | 3.00 x | 2.00 x |  |" in text
    assert "Without the bias, which it lacks: CCE." in text
    assert "a GPU; torch 2.11; 2099-01-01, quick run." in text


def test_who_is_faster_and_who_is_absent_is_said(bench_path, tmp_path):
    import tables

    def record(case, provider, ms=None, **more):
        times = {} if ms is None else {"ms": {"p50": ms}}
        return {
            "record": "result", "bench": "loss", "device": "cpu", "run": "1", "case": case,
            "provider": provider, **times, **more,
        }  # fmt: skip

    def results(*records):
        run = {"record": "run", "run": "1", "quick": False, "only": []}
        (tmp_path / "loss.jsonl").write_text("\n".join(map(json.dumps, [run, *records])))
        return tables.Results(tmp_path)

    def faster(*records):
        return tables.faster_peers(results(*records).cases("loss"))

    ours, slow = record("a", "mvbert", 2.0), record("a", "slow", 3.0)
    records = [record("a", "mvbert here not", skipped="not here"), ours, record("a", "quick", 1.0)]
    records += [slow, record("a", "sha256", 0.1), record("a", "gone", skipped="not here")]
    assert faster(ours) == ""
    assert "quick` in 1 of 1 cases, 2.00 x at most (a)." in faster(*records)
    records += [record("b", "mvbert", 2.0), record("b", "quick", 4.0), record("b", "slow", 1.0)]
    records += [record("b", "gone", skipped="not here"), record("b", "off", wrong="by 1")]
    assert faster(*records) == (
        "Faster than mvbert: `quick` in 1 of 2 cases, 2.00 x at most (a); `slow` in 1 of 2 cases, "
        "2.00 x at most (b)."
    )
    assert faster(ours, slow).endswith(": none of these peers.")
    cases = tables.by_case(results(*records, record("a", "off", 1.0)).all_of("loss"))
    assert tables.not_timed(cases) == (
        "- skipped: not here: mvbert here not; gone\n- wrong: by 1: off (b)"
    )


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (0.01234, "0.0123"), (12.34, "12.3"), (123456.0, "123,000")]
)
def test_figures(value, text, bench_path):
    import tables

    assert tables.figure(value) == text


# ---- gpu_check -----------------------------------------------------------------------------------


def test_parts_come_behind_what_they_need(bench_path):
    import gpu_check

    a, b, c = (gpu_check.Part(name, [], 1, needs) for name, needs in ("a ", "ba", "c "))
    build = gpu_check.Part("build", [], 1)
    assert gpu_check.chains([a, b, c]) == [[a, b], [c]]
    assert gpu_check.choose([build, a, b, c], ["b"]) == [build, a, b]
    assert gpu_check.choose([build, a, b, c], None) == [build, a, b, c]


def test_a_late_part_ends_with_its_children(bench_path, tmp_path):
    import gpu_check

    code = """if True:
        import subprocess
        child = subprocess.Popen(["sh", "-c", "trap '' INT; exec sleep 60"])
        print(child.pid, flush=True)
        try:
            child.wait()
        except KeyboardInterrupt:
            print("what there is")
    """
    part = gpu_check.Part("slow", [sys.executable, "-c", code], 60)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    begin = time.monotonic()
    outcome = gpu_check.run(part, 3, tmp_path / "log", dict(os.environ))
    signal.signal(signal.SIGINT, before)
    assert outcome.state == "late"
    assert time.monotonic() - begin < 20
    child, last_word = outcome.tail.split(maxsplit=1)
    assert last_word == "what there is"
    state = Path(f"/proc/{child}/stat")

    def gone() -> bool:
        try:
            return state.read_text().split()[2] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    # A signal is sent, not obeyed, when run returns; on its own the child would last a minute.
    while not gone() and time.monotonic() - begin < 30:
        time.sleep(0.05)
    assert gone()


def test_a_failing_part_says_why(bench_path, tmp_path):
    import gpu_check

    part = gpu_check.Part("bad", [sys.executable, "-c", "raise SystemExit('no such thing')"], 60)
    outcome = gpu_check.run(part, 60, tmp_path / "log", dict(os.environ))
    assert (outcome.state, outcome.tail) == ("failed", "no such thing")


def test_a_late_run_is_reported_by_its_log(bench_path, tmp_path, monkeypatch):
    import gpu_stages

    def interrupted(command, check):
        out = Path(command[command.index("-o") + 1])
        out.mkdir()
        lines = ['{"pieces_per_second": 7.0}', '{"heldout": 1}', '{"pieces_per_second": 9.0}']
        (out / "log.jsonl").write_text("\n".join([*lines, '{"pieces_per_sec']))
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_stages.subprocess, "run", interrupted)
    facts = gpu_stages.train(tmp_path, 2, 60, compiled=False, toy=False)
    assert facts["exit"] is None
    assert (facts["log_lines"], facts["pieces_per_second"]) == (2, 8.0)


def test_targets_are_passed_and_missed(bench_path, tmp_path):
    import gpu_check

    def record(provider, ms, **more):
        fields = {"N": 4096, "V": 30522, "H": 1024}
        return {
            "record": "result", "bench": "loss", "case": "N=4096 V=30522 H=1024", "fields": fields,
            "provider": provider, "ms": {"p50": 9 * ms}, "device_ms": {"p50": ms}, **more,
        }  # fmt: skip

    ours = record("mvbert", 1.3, times_floor=1.34, peak_mb=5000.0)
    peers = [record("Liger", 2.5), record("torch.compile max-autotune", 1.6)]
    peers += [record("CCE torch_compile", 1.8), record("mvbert, rows may lack labels", 0.1)]
    lines = [*map(json.dumps, [ours, *peers])]
    (tmp_path / "results.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "stage2.json").write_text('{"pieces_per_second": 6e6, "data_wait": 0.0}')
    found = {row.what: row for row in gpu_check.targets(tmp_path)}
    name = "loss N=4096 V=30522 H=1024"
    assert found[f"{name}: x floor"].row()[-1] == "PASS"
    assert found[f"{name}: x faster than best peer"].measured == pytest.approx(1.6 / 1.3)
    assert found[f"{name}: x faster than Liger, CCE"].row()[-1] == "MISS"
    assert found[f"{name}: peak MB"].row()[-1] == "MISS"
    assert [t.passed for t in gpu_check.targets(tmp_path) if t.what == "stage 2: pieces/s"] == [
        True,
        False,
    ]
    assert found["stage 1: pieces/s"].row()[-2:] == ["-", "-"]


@pytest.fixture
def gpu_train(root, training_inputs, tmp_path):
    """A function that runs bench/gpu_train.sh --dry-run and returns OUT and what was said."""

    def run(name: str, *more):
        out = tmp_path / name
        done = subprocess.run(
            ["bench/gpu_train.sh", out, "--teacher", training_inputs / "teacher",
             "--text", training_inputs / "text.txt", "--dry-run", *more],
            cwd=root, capture_output=True, text=True, timeout=600, check=False,
            env={**os.environ, "PYTHON": sys.executable},
        )  # fmt: skip
        return out, done

    return run


def test_a_student_trained_in_one_call_is_continued_in_the_next(gpu_train):
    first, done = gpu_train("first")
    assert done.returncode == 0, done.stdout + done.stderr
    made = {file.name: file.stat().st_size for file in first.iterdir()}
    assert {"student.tar.00", "SHA256SUMS", "report.json", "stage2.jsonl"} <= made.keys()
    assert len(made) <= 8
    assert max(made.values()) < 16 << 20
    second, done = gpu_train("second", "--start", first)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [
        [json.loads(line)["heldout"]["loss"] for line in lines if "heldout" in line]
        for lines in ((out / "stage2.jsonl").read_text().splitlines() for out in (first, second))
    ]
    assert losses[1][0] == losses[0][-1]

    part = first / "student.tar.00"
    part.write_bytes(part.read_bytes()[:-1])
    _, done = gpu_train("third", "--start", first)
    assert done.returncode != 0
    assert "student.tar.00 is missing or damaged" in done.stderr


@pytest.mark.slow  # it builds the C++ part and runs all benches: two minutes and a half
def test_dry_run(root, tmp_path):
    """Every part runs at toy size, here where there may be no GPU."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 8))) for _ in range(2000)]
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join(draw.choices(words, k=100)) for _ in range(200)))
    env = {**os.environ, "PYTHON": sys.executable}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        ["bench/gpu_check.sh", tmp_path / "out", "--dry-run", "--text", text],
        cwd=root, capture_output=True, text=True, timeout=900, env=env, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    made = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert len(made) <= 8
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {part["state"] for part in summary["parts"]} == {"ok"}
    assert summary["dry_run"]
