"""How everything here is measured: cases are data, providers are functions, one loop times them.

A bench is a file `bench_<name>.py` with one `BENCH`:

    BENCH = Bench("loss", cases=cases, inputs=inputs, work=work, check=check)

    @BENCH.provider("mvbert")
    def _(case, device):
        from mvbert.functional import linear_cross_entropy   # lazily: a missing peer is a skip

        return lambda x: linear_cross_entropy(x.hidden, x.weight, x.labels)

What the loop does for every case, the same for all providers:

1. Gate. Each provider runs once and `check` compares its output; a wrong one is not timed.
2. Warm-up by time, which also decides how many calls make one measurement.
3. Rounds. Providers take turns and every round starts with the next one, so that a busy machine
   slows all of them. Each measurement is several calls in a row over copies of the inputs that are
   together larger than the cache. Reported are the 20th, 50th and 80th percentile of the rounds.
   On a GPU all runs on one stream other than the default, which capturing a graph needs.
4. Memory. The peak that one call needs beyond its inputs: the CUDA allocator's figure, or,
   on a CPU, the rise of the resident set of a fresh process that does nothing else.

Rates stand beside ceilings measured in the same run (a large copy, a large matrix product); the
floor of a case is the time its least work takes at those ceilings. Every record is one JSON object
on a line, appended, never edited; a separate line describes the run it belongs to.
"""

import atexit
import contextlib
import gc
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import clocks
import memory
import reporting

from mvbert.files import data_folder

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DATA = data_folder()

# Distributions whose pip command is more than their name.
PIP = {
    "liger-kernel": "pip install --no-deps liger-kernel",
    "cut-cross-entropy": "pip install --no-deps cut-cross-entropy",
    "model2vec": "pip install --no-deps model2vec",  # else it takes transformers' huggingface_hub
    "transformers": "pip install 'mvbert[hf]'",
    "tokenizers": "pip install 'mvbert[hf]'",
}


class Skip(Exception):
    """A provider cannot run here, for the reason given."""


class NotApplicable(Exception):
    """A provider does not take part in this case: no record is made."""


def only_if(condition: bool) -> None:
    """Raises NotApplicable unless the provider takes part in the case."""
    if not condition:
        raise NotApplicable


class Wrong(Exception):
    """A provider's output is wrong, so it is not timed."""


class DeviceLost(Exception):
    """A provider's error lost the CUDA context for this process."""


@dataclass(frozen=True)
class Work:
    """The least work of one call; `unit` names what `items` counts."""

    flop: float = 0.0
    bytes: float = 0.0
    items: float = 0.0
    unit: str = ""


@dataclass(frozen=True)
class Provider:
    """One way to do the work.

    `make(case, device)` returns a function of one copy of the inputs. It may have a `close`, a
    `sample` (see `measure`), and, if it does only a part of the case's work, that `share`. It is
    `captured` if it replays a CUDA graph: the memory of one is taken before any call.
    """

    name: str
    make: Callable[[Any, str], Callable[[Any], Any]]
    needs: Sequence[str]  # distributions
    devices: Sequence[str]


@dataclass
class Bench:
    """Cases, inputs, least work, gate and providers of one subject.

    Args:
        name: the file is bench_<name>.py.
        cases: (device, quick) -> frozen dataclasses; their `label`, if any, is their name.
        inputs: (case, device, copy number) -> inputs; the same number gives the same inputs.
        work: (case, device) -> Work.
        check: (case, inputs, outputs) -> facts for the record; raises Wrong. None: no gate.
        dtype: (case, device) -> dtype name of the matrix products, for the ceiling.
        memory: whether to measure the peak memory of a call.
        seconds: what one measurement lasts at least, before --quick.
        threads: how many torch may use on a CPU; None: all.
        devices: where its providers run by default.
    """

    name: str
    cases: Callable[[str, bool], Sequence[Any]]
    inputs: Callable[[Any, str, int], Any]
    work: Callable[[Any, str], Work]
    check: Callable[[Any, Any, Any], dict] | None = None
    dtype: Callable[[Any, str], str] = lambda case, device: default_dtype(device)
    memory: bool = True
    seconds: float = 0.2
    threads: int | None = None
    devices: Sequence[str] = ("cpu", "cuda")
    providers: list[Provider] = field(default_factory=list)

    def add(
        self, name: str, make: Callable[..., Any], *, needs: Sequence[str] = (),
        devices: Sequence[str] = (), **options: Any,
    ) -> None:  # fmt: skip
        """Adds a provider; see `Provider`. `make` gets the options as well."""
        make = partial(make, **options)
        self.providers.append(Provider(name, make, needs, devices or self.devices))

    def provider(self, name: str, **options: Any) -> Callable[[Callable[..., Any]], None]:
        """`add` as a decorator."""
        return lambda make: self.add(name, make, **options)


def default_dtype(device: str) -> str:
    """bfloat16 on a GPU, float32 on a CPU."""
    return "bfloat16" if device == "cuda" else "float32"


@cache
def folder(name: str) -> Path:
    """A scratch folder of a bench, removed when this process ends."""
    scratch = tempfile.TemporaryDirectory(prefix=f"mvbert-bench-{name}-")
    atexit.register(scratch.cleanup)
    return Path(scratch.name)


# ---- gates ---------------------------------------------------------------------------------------

_truth: dict = {}  # of the last problem: what is checked is the same copy for all providers


def relative_errors(
    key: Any, truth: Callable[[], Sequence[Any]], outputs: Sequence[Any], bounds: dict[str, float]
) -> dict:
    """The facts {"errors": name -> |out - truth| / |truth|}; raises Wrong above a bound, or NaN.

    Args:
        key: says which problem it is; `truth()` gives what is right in float64, once a problem.
        outputs: tensors, perhaps fewer than there are bounds.
        bounds: name of each output -> the largest error.
    """
    if key not in _truth:
        _truth.clear()
        _truth[key] = truth()
    errors = {}
    for (name, bound), output, exact in zip(bounds.items(), outputs, _truth[key], strict=False):
        error = float((output.detach().double() - exact).norm() / exact.norm())
        errors[name] = clocks.digits(error, 2)
        if not error <= bound:
            raise Wrong(f"{name} is off by {error:.2g} relative, more than {bound:g}")
    return {"errors": errors}


def loss_errors(
    case: Any, part: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[Any], bound: float
) -> dict:
    """`relative_errors` of a loss over case.N rows and of the gradients of hidden, weight and bias.

    A peer without a bias has one output fewer: it is held to the problem without one.

    Args:
        part: `part(rows, *inputs)` is what the rows of a slice add to the loss.
        inputs: hidden, weight, bias.
    """
    count = len(outputs)
    names = ("loss", "hidden", "weight", "bias")[:count]

    def truth() -> list[Any]:
        wide = [x.detach().double().requires_grad_() for x in inputs[: count - 1]]
        total = 0.0
        for begin in range(0, case.N, 512):  # logits in float64, a few at a time
            loss = part(slice(begin, begin + 512), *wide)
            loss.backward()
            total = loss.detach() + total
        return [total, *(x.grad for x in wide)]

    facts = relative_errors((case, count), truth, outputs, dict.fromkeys(names, bound))
    return facts if "bias" in names else {**facts, "note": "no bias"}


# ---- the loop ------------------------------------------------------------------------------------


@dataclass
class Entry:
    """A provider, what it made of one case, and the measurements."""

    provider: Provider
    record: dict
    run: Any = None
    calls: int = 1
    seconds: float = 0.0  # a call takes about
    samples: list[clocks.Sample] = field(default_factory=list)


@dataclass(frozen=True)
class Settings:
    """How a bench is run.

    Args:
        device: cpu or cuda.
        quick: fewer cases, shorter measurements.
        only: names of providers; empty: all.
        without: names of providers to leave out.
        budget: seconds for the rounds of one case, 5 to 30 of them; None: 60, or 6 when quick.
        toy: the first case alone, shrunk, two rounds: to see that everything runs.
    """

    device: str
    quick: bool
    only: Sequence[str] = ()
    without: Sequence[str] = ()
    budget: float | None = None
    toy: bool = False


def run_bench(bench: Bench, settings: Settings, emit: Callable[[dict], None]) -> list[dict]:
    """Measures every case and provider; `emit` gets each record as soon as its case is done.

    Raises:
        DeviceLost: a provider left the device unusable; the exception's argument is its name.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(bench.threads or threads)
    cases = bench.cases(settings.device, settings.quick)
    if settings.toy:
        cases = [shrunk(cases[0])]
    results: list[dict] = []
    stream: contextlib.AbstractContextManager = contextlib.nullcontext()
    if settings.device == "cuda":
        stream = torch.cuda.stream(torch.cuda.Stream())

    def keep(record: dict) -> None:
        results.append(record)
        emit(record)
        outcome = reporting.summary(record) if "ms" in record else reporting.reason(record)
        print(f"  {record['provider']:28} {outcome}", flush=True)

    with stream:
        for number, case in enumerate(cases):
            # What was compiled for another case would fill torch's caches; never between two
            # providers of a case, which would make the first compile again while it is timed.
            if "torch._dynamo" in sys.modules:
                torch.compiler.reset()
            run_case(bench, case, number, settings, keep)
            gc.collect()
            if settings.device == "cuda":
                torch.cuda.empty_cache()
    torch.set_num_threads(threads)
    return results


def run_case(bench: Bench, case: Any, number: int, settings: Settings, keep: Callable) -> None:
    """Measures the providers of one case; `keep` gets their records."""
    import torch

    device, quick, toy = settings.device, settings.quick, settings.toy
    work = bench.work(case, device)
    dtype = bench.dtype(case, device)
    ceiling = clocks.ceilings(device, dtype, torch.get_num_threads(), quick, toy)
    floor = max(
        work.flop / (ceiling["matmul_tflop_s"] * 1e12), work.bytes / (ceiling["copy_gb_s"] * 1e9)
    )
    base = {
        "record": "result", "bench": bench.name, "case": reporting.label(case),
        "fields": {**vars(case)}, "device": device, "dtype": dtype,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    print(f"{bench.name} {reporting.label(case)}", flush=True)
    copies = [bench.inputs(case, device, 0)] if toy else input_copies(bench, case, device)
    entries = [
        Entry(provider, {**base, "provider": provider.name})
        for provider in bench.providers
        if not settings.only or provider.name in settings.only
    ]

    def apply(step: Callable[[Entry], None], some: Sequence[Entry]) -> None:
        """Runs a step for every entry; one that fails is dropped, with the reason in its record."""
        for entry in some:
            try:
                step(entry)
            except Exception as error:  # a peer may fail in any way
                entries.remove(entry)
                close(entry.run)
                if isinstance(error, NotApplicable):
                    continue
                kind = {Skip: "skipped", Wrong: "wrong"}.get(type(error), "failed")
                entry.record[kind] = first_line(error) if kind == "failed" else str(error)
                entry.record.pop("ms", None)
                keep(entry.record)
                if kind == "failed":
                    check_device(device, entry.provider.name)

    apply(lambda entry: prepare(entry, bench, case, copies[0], settings), tuple(entries))
    # Tens of milliseconds are long for events, short for a clock on a busy host.
    target = bench.seconds / (1 if not quick else 10 if device == "cuda" else 4)
    apply(lambda entry: warm_up(entry, copies, device, target, quick), tuple(entries))
    # On a GPU a measurement goes over its calls twice: by the clock, and between events.
    passes = 2 if device == "cuda" else 1
    per_round = passes * sum(entry.calls * entry.seconds for entry in entries)
    budget = settings.budget or (6.0 if quick else 60.0)
    turns = 2 if toy else max(5, min(30, int(budget / max(per_round, 1e-9))))

    def sample(entry: Entry) -> None:
        entry.samples.append(clocks.measure(entry.run, copies, entry.calls, device))

    for turn in range(turns):
        shift = turn % max(1, len(entries))
        apply(sample, entries[shift:] + entries[:shift])
    smi = reporting.nvidia_smi() if device == "cuda" else None  # clocks just after load

    def complete(entry: Entry) -> None:
        finish(entry, work, ceiling, floor, device)
        if smi is not None:
            entry.record["nvidia_smi"] = smi
        if bench.memory and device == "cuda":
            if not getattr(entry.run, "captured", False):
                entry.record["peak_mb"] = clocks.digits(memory.cuda_peak(entry.run, copies[0]))
        elif bench.memory and not (quick or toy or hasattr(entry.run, "sample")):
            peak = memory.cpu_peak(bench.name, number, entry.provider.name)
            entry.record["peak_mb"] = None if peak is None else clocks.digits(peak)
        close(entry.run)
        keep(entry.record)

    apply(complete, tuple(entries))


def prepare(entry: Entry, bench: Bench, case: Any, inputs: Any, settings: Settings) -> None:
    """Makes an entry's provider and checks its output."""
    provider, device = entry.provider, settings.device
    if provider.name in settings.without:
        raise Skip("left out")
    if device not in provider.devices:
        raise Skip(f"runs on {', '.join(provider.devices)} only")
    missing = [name for name in provider.needs if reporting.version(name) is None]
    if missing:
        pip = dict.fromkeys(PIP.get(name, f"pip install {name}") for name in missing)
        entry.record["pip"] = "; ".join(pip)
        raise Skip(f"not installed: {', '.join(missing)}")
    entry.run = provider.make(case, device)
    outputs = entry.run(inputs)
    if bench.check is not None:
        entry.record.update(bench.check(case, inputs, outputs))


def shrunk(case: Any) -> Any:
    """The case with 4 rows of 32 pieces, other whole numbers of 512 at most.

    A vocabulary has to hold an alphabet.
    """
    numbers = {n: v for n, v in vars(case).items() if isinstance(v, int) and v is not True}
    limits = {"B": 4, "T": 32}
    return replace(case, **{n: min(value, limits.get(n, 512)) for n, value in numbers.items()})


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def check_device(device: str, name: str) -> None:
    """Raises DeviceLost where the failure of provider `name` took the device along."""
    if device != "cuda":
        return
    import torch

    try:
        torch.cuda.synchronize()
    except Exception as error:
        raise DeviceLost(name) from error


def close(run) -> None:
    """Closes what a provider started, if it has a `close`."""
    if hasattr(run, "close"):
        run.close()


def warm_up(entry: Entry, copies, device: str, target: float, quick: bool) -> None:
    """Runs for a while; sets how long a call takes and how many calls make one measurement."""
    if device == "cuda":
        # A step is captured at its fourth call, which must not pass for its time.
        for call in range(5):
            entry.run(copies[call % len(copies)])
    begin = time.perf_counter()
    entry.seconds = math.inf
    while True:
        entry.seconds = min(entry.seconds, clocks.measure(entry.run, copies, 1, device).wall)
        if time.perf_counter() - begin > (0.2 if quick else 0.5):
            break
    entry.calls = max(1, min(10_000, round(target / max(entry.seconds, 1e-7))))


def finish(entry: Entry, work: Work, ceiling: dict, floor: float, device: str) -> None:
    """Turns the measurements into the record's figures."""
    share = getattr(entry.run, "share", 1.0)
    wall = [sample.wall / share for sample in entry.samples]
    own = [sample.own / share for sample in entry.samples]
    record = entry.record
    record["ms"] = clocks.percentiles(wall)
    record["device_ms" if device == "cuda" else "processor_ms"] = clocks.percentiles(own)
    record["rounds"], record["calls"] = len(wall), entry.calls
    record["ceiling"] = ceiling
    best = record["device_ms" if device == "cuda" else "ms"]["p50"] / 1e3
    if work.flop:
        record["tflop_s"] = clocks.digits(work.flop / best / 1e12)
    if work.bytes:
        record["gb_s"] = clocks.digits(work.bytes / best / 1e9)
    if floor:
        record["floor_ms"] = clocks.digits(1e3 * floor)
        record["times_floor"] = clocks.digits(best / floor)
    if work.items:
        record["items_s"] = clocks.digits(1e3 * work.items / record["ms"]["p50"])
        record["unit"] = work.unit


def input_copies(bench: Bench, case: Any, device: str) -> list[Any]:
    """Copies of the inputs that together outgrow the cache twice; at most 16."""
    first = bench.inputs(case, device, 0)
    size = max(1, tensor_bytes(first))
    count = min(16, max(1, math.ceil(2 * cache_bytes(device) / size)))
    return [first, *(bench.inputs(case, device, copy) for copy in range(1, count))]


def tensor_bytes(x: Any) -> int:
    """The bytes of every tensor or array in a structure of dataclasses, lists, tuples, dicts."""
    if hasattr(x, "nbytes"):
        return x.nbytes
    if isinstance(x, dict):
        x = x.values()
    elif not isinstance(x, (list, tuple)):
        x = vars(x).values() if hasattr(x, "__dict__") else ()
    return sum(map(tensor_bytes, x))


def cache_bytes(device: str) -> int:
    """The last cache before memory."""
    if device == "cuda":
        import torch

        return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
    largest = 0
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = size.read_text().strip()
        largest = max(largest, int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    # A virtual machine may show a large shared cache of which it has a small part.
    return min(largest or 32 << 20, 64 << 20)
