"""The work of gpu_check.sh, which says what it does: parts in turn, then the table of targets."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tables import NOT_OF_CCE, median

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
MEMORY = Path("/dev/shm")
SANITIZER_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])


@dataclass(frozen=True)
class Part:
    """A command and its time limit."""

    name: str
    command: list[str]
    seconds: float
    needs: str = ""  # another part, without which this one cannot run
    timed: bool = True  # what it measures is speed: nothing else may run meanwhile
    missing: str = ""  # why it cannot run here, if so


@dataclass
class Outcome:
    part: Part
    state: str  # ok, failed, late, skipped
    seconds: float
    tail: str


def parts(out: Path, work: Path, args: argparse.Namespace, cuda: bool) -> list[Part]:
    """First what is not timed, side by side; then the most important first."""
    toy = args.dry_run
    providers = ["mvbert", "eager", "HF head, eager", "torch eager"]
    options = ["--device", "cuda" if cuda else "cpu", "--quick"]
    options += ["--output", str(out / "results.jsonl")]
    # That one is plain PyTorch compiled, as another provider is: half a minute for nothing.
    options += ["--toy", "--only", *providers] if toy else ["--without", NOT_OF_CCE]

    def bench(*names: str) -> list[str]:
        return [PYTHON, "bench/run.py", *names, *options]

    stages = [PYTHON, "bench/gpu_stages.py"]
    tail = ["--toy"] if toy else []
    prepare = [*stages, "prepare", str(work), *tail]
    if args.text:
        prepare += ["--text", str(args.text.resolve())]
    if args.vocab:
        prepare += ["--vocab", str(args.vocab.resolve())]

    def train(stage: int, *options: str, name: str = "", seconds: float = 60) -> list[str]:
        report = ["--report", str(out / f"stage{stage}{name}.json")]
        return [*stages, "train", str(work), "--stage", str(stage), "--seconds", str(seconds),
                *options, *report, *tail]  # fmt: skip

    def profile(stage: int) -> list[str]:
        report = ["--report", str(out / f"profile{stage}.json")]
        return [*stages, "profile", str(work), "--stage", str(stage), *report, *tail]

    # A line a test: what failed is in the log also where the rest is late.
    tests = [PYTHON, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-W", "default"]
    tests += ["--no-header", "--tb=short"]
    side_by_side = ["-n", "12"] if find_spec("xdist") and not toy else []
    # The dry run has no device: it shows that the tests are found.
    graph = "tests/training/test_step.py::test_a_graph_on_a_gpu_gives_the_losses_of_eager_steps"
    kernels = [graph, "tests/kernels", "--ignore", "tests/kernels/test_aot.py", *side_by_side]
    one_compiler = ["env", "TORCHINDUCTOR_COMPILE_THREADS=1"]  # in each test process, not 16
    if not cuda:
        kernels = ["tests/kernels/test_gpu.py", "--collect-only"]
    # Small ragged shapes of every kernel: under the sanitizer real ones would take hours.
    files = ("layer_norm", "linear_cross_entropy", "linear_kl", "mixed_embedding", "relation_kl")
    small = [*tests, *(f"tests/kernels/test_{name}.py" for name in files), "-k"]
    names = "loss_and_gradients or test_types or against"
    small.append(f"({names}) and (bfloat16 or not float)")
    missing = ""
    if not cuda:
        small.append("--collect-only")
    else:
        sanitizer = shutil.which("compute-sanitizer", path=SANITIZER_PATH)
        missing = "" if sanitizer else "no compute-sanitizer here"
        # A separate allocation for every tensor: inside torch's pool nothing is out of bounds.
        # Requests that the driver refuses to the runtime are no errors.
        small = [
            "env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", sanitizer or "", "--tool", "memcheck",
            "--report-api-errors", "no", "--error-exitcode", "9", "--target-processes", "all",
            *small,
        ]  # fmt: skip
    text = "prepare text and teachers"
    # The dry run links beside the tree, where other tests may be using the module.
    place = ["--build-lib", str(work / "lib")] if toy else ["--inplace"]
    untimed = [
        Part("build", [PYTHON, "setup.py", "build_ext", *place], 120, timed=False),
        Part(text, prepare, 150, "build", timed=False),
        Part("gpu tests", [*one_compiler, *tests, *kernels], 150, timed=False),
        Part("memcheck", small, 150, timed=False, missing=missing),
    ]
    training = [
        Part("stage 2", train(2, seconds=45), 70, text),
        Part("stage 1", train(1), 100, text),
        Part("profile stage 2", profile(2), 45, text),
        Part("profile stage 1", profile(1), 60, text),
    ]
    compiled = train(2, "--compile", name="-compiled", seconds=45)
    # Most of these limits is for the search of torch.compile's max-autotune.
    limits = {"loss": 200, "embedding": 80, "train_step": 90, "relations": 45, "kl": 60,
              "inference": 90}  # fmt: skip
    if toy:  # one process for all benches: most of a toy's time goes into starting
        return [*untimed, Part("bench", bench(*limits), 240), *training]
    benches = {name: Part(f"bench {name}", bench(name), limit) for name, limit in limits.items()}
    return [
        *untimed, benches["loss"], training[0], training[1], benches["embedding"], *training[2:],
        benches["train_step"], benches["relations"], Part("stage 2 compiled", compiled, 75, text),
        benches["kl"], benches["inference"],
    ]  # fmt: skip


def choose(some: list[Part], only: list[str] | None) -> list[Part]:
    """The parts of these names and what they need; all of them if none is named. Always builds."""
    names = {"build", *(only or [part.name for part in some])}
    for part in reversed(some):
        if part.name in names:
            names.add(part.needs)
    return [part for part in some if part.name in names]


def chains(some: list[Part]) -> list[list[Part]]:
    """The parts as chains, each part behind the one that it needs."""
    by_name: dict[str, list[Part]] = {}
    for part in some:
        chain = by_name.get(part.needs, [])
        chain.append(part)
        by_name[part.name] = chain
    return list({id(chain): chain for chain in by_name.values()}.values())


def run(part: Part, seconds: float, log: Path, env: dict[str, str]) -> Outcome:
    """Runs a part with a time limit, its output to the log; its children end with it."""
    begin = time.monotonic()
    with log.open("ab") as out:
        out.write(f"\n===== {part.name}: {' '.join(part.command)}\n".encode())
        out.flush()
        start = out.tell()
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=seconds)
            state = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "late"
        with_children(process)
        process.wait()
    with log.open("rb") as text:
        text.seek(max(start, log.stat().st_size - 3000))
        tail = text.read().decode(errors="replace").strip()
    return Outcome(part, state, time.monotonic() - begin, tail)


def with_children(process: subprocess.Popen) -> None:
    """Ends what is left of the part's process group."""
    # On an interrupt pytest still prints what failed, and a training run's speed is still reported.
    for kind, wait in ((signal.SIGINT, 5.0), (signal.SIGKILL, 0.0)):
        try:
            os.killpg(process.pid, kind)
        except (ProcessLookupError, PermissionError):
            return
        deadline = time.monotonic() + wait
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)


# ---- targets -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A target, what was measured (None: nothing), and whether it was met."""

    what: str
    target: str
    measured: float | None
    passed: bool

    def row(self) -> list[str]:
        if self.measured is None:
            return [self.what, self.target, "-", "-"]
        return [self.what, self.target, f"{self.measured:.4g}", "PASS" if self.passed else "MISS"]


def at_most(what: str, limit: float, value: float | None) -> Target:
    return Target(what, f"<= {limit:g}", value, value is not None and value <= limit)


def at_least(what: str, limit: float, value: float | None) -> Target:
    return Target(what, f">= {limit:g}", value, value is not None and value >= limit)


def loss_targets(name: str, ours: dict, peers: dict[str, float]) -> list[Target]:
    """Targets of a loss; `peers` has the times of others as multiples of ours."""
    N, V, H = (ours["fields"][letter] for letter in "NVH")
    narrow = (V, H) == (4928, 256)
    best = min(peers.values(), default=None)
    rows = []
    if V == 30522 and H >= 768 and N >= 4096:
        rows.append(at_most(f"{name}: x floor", 1.36, ours.get("times_floor")))
        rows.append(at_least(f"{name}: x faster than best peer", 1.15, best))
        kernels = [p for p in peers if p.startswith(("Liger", "CCE")) and p != NOT_OF_CCE]
        slow = min((peers[p] for p in kernels), default=None)
        rows.append(at_least(f"{name}: x faster than Liger, CCE", 2, slow))
    elif narrow and N >= 16384:
        rows.append(at_most(f"{name}: x floor", 2.2, ours.get("times_floor")))
        rows.append(at_least(f"{name}: x faster than best peer", 1.3, best))
    if ours.get("peak_mb") is not None:
        # Gradients, their float32 sums, and the buffer: 8,192 rows of logits at most.
        gradients = (N * H + V * H + V) * (2 + 4) / 1e6
        buffer = 0.0 if narrow else min(N, 8192) * (V + 64) * 2 / 1e6
        rows.append(at_most(f"{name}: peak MB", round(gradients + buffer), ours["peak_mb"]))
    return rows


def embedding_targets(name: str, ours: dict, peers: dict[str, float]) -> list[Target]:
    share = ours["gb_s"] / ours["ceiling"]["copy_gb_s"]
    rows = [at_least(f"{name}: of copy bandwidth", 0.85, share)]
    for kind, names, goal in (("eager", ("eager", "HF"), 5), ("torch.compile", "torch.compile", 1)):
        value = min((v for p, v in peers.items() if p.startswith(names)), default=None)
        rows.append(at_least(f"{name}: x faster than {kind}", goal, value))
    return rows


def targets(out: Path) -> list[Target]:
    """The table: speed against the measured floor and against every peer, memory, training."""
    file = out / "results.jsonl"
    timings: dict[tuple, dict[str, dict]] = {}
    for record in map(json.loads, file.read_text().splitlines() if file.exists() else ()):
        if "ms" in record:
            timings.setdefault((record["bench"], record["case"]), {})[record["provider"]] = record
    rows: list[Target] = []
    aims = {"loss": loss_targets, "embedding": embedding_targets}
    for (bench, case), records in timings.items():
        if bench in aims and "mvbert" in records:
            own = median(records["mvbert"])
            peers = {p: median(r) / own for p, r in records.items() if not p.startswith("mvbert")}
            rows += aims[bench](f"{bench} {case}", records["mvbert"], peers)
    for stage, goals in (("2", (5e6, 9e6)), ("2-compiled", (5e6, 9e6)), ("1", (0.24e6,))):
        file = out / f"stage{stage}.json"
        facts = json.loads(file.read_text()) if file.exists() else {}
        for goal in goals:
            rows.append(at_least(f"stage {stage}: pieces/s", goal, facts.get("pieces_per_second")))
        rows.append(at_most(f"stage {stage}: share of waiting", 0.01, facts.get("data_wait")))
        mfu = facts.get("mfu")
        rows.append(Target(f"stage {stage}: MFU", "reported", mfu, mfu is not None))
    return rows


def table(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def top_kernels(out: Path) -> str:
    lines = []
    for stage in (2, 1):
        file = out / f"profile{stage}.json"
        if file.exists():
            lines.append(f"stage {stage}, kernels by time:")
            for row in json.loads(file.read_text())["top"][:12]:
                lines.append(f"  {row['share']:6.1%}  x{row['calls']:<6} {row['name'][:90]}")
    return "\n".join(lines)


def device() -> tuple[bool, str]:
    """(whether torch sees a GPU, what it is); asked in a child, so that no context stays here."""
    code = (
        "import torch; c = torch.cuda.is_available(); print(int(c), torch.__version__,"
        " torch.cuda.get_device_name() if c else 'no GPU')"
    )
    try:
        answer = subprocess.run(
            [PYTHON, "-c", code], capture_output=True, text=True, timeout=120, check=True
        ).stdout.split(maxsplit=1)
    except (subprocess.SubprocessError, OSError) as error:
        return False, f"torch does not start: {error}"
    return answer[0] == "1", answer[1].strip()


def environment(site: Path) -> dict[str, str]:
    """What the parts run in: they find the package, by a link in the folder `site`, and no more.

    With the root on the path, its folder kernels/ would be taken for Hugging Face's package.
    """
    site.mkdir()
    (site / "mvbert").symlink_to(ROOT / "mvbert")
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(site), *filter(None, [inherited])])
    return {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


def report(out: Path, name: str, dry_run: bool, outcomes: list[Outcome]) -> None:
    """Prints what came out on device `name`; adds it to log.txt, writes summary.json."""
    rows = targets(out)
    parts = [[o.part.name, o.state, f"{o.seconds:.0f}"] for o in outcomes]
    sections = [
        f"{name}, {time.strftime('%Y-%m-%d')}" + (", dry run" if dry_run else ""),
        table([["part", "state", "seconds"], *parts]),
        top_kernels(out),
        table([["target", "aim", "measured", ""], *(row.row() for row in rows)]),
    ]
    summary = "\n\n".join(filter(None, sections))
    print("\n" + summary)
    with (out / "log.txt").open("a", encoding="utf-8") as log:
        log.write("\n" + summary + "\n")
    facts = {
        "device": name,
        "dry_run": dry_run,
        "parts": [
            {"name": o.part.name, "state": o.state, "seconds": round(o.seconds, 1)}
            for o in outcomes
        ],
        "targets": [vars(row) for row in rows],
    }
    (out / "summary.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench/gpu_check.sh", description=__doc__)
    default = ROOT / "bench" / "results" / "scratch" / "gpu"
    parser.add_argument("out", nargs="?", type=Path, default=default)
    parser.add_argument("--dry-run", action="store_true", help="every part at toy size")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--vocab", type=Path)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", nargs="+", metavar="PART", help="these, and what they need")
    args = parser.parse_args()
    known = [part.name for part in parts(args.out, args.out, args, False)]
    for name in args.only or ():
        if name not in known:
            parser.error(f"no part is called {name!r}; there are {', '.join(known)}")
    patience = 5 if args.dry_run else 1  # a dry run may happen on a busy machine
    begin = time.monotonic()
    # A shell may have it ignored, which parts would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cuda, name = device()
    if not cuda and not args.dry_run:
        sys.exit(f"no CUDA device ({name}); --dry-run shows that every part would run")
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out.resolve()
    for old in ("log.txt", "results.jsonl", "stage1.json", "stage2.json", "profile1.json",
                "profile2.json", "stage2-compiled.json", "summary.json"):  # fmt: skip
        (out / old).unlink(missing_ok=True)
    # A run of a large teacher writes gigabytes; in memory, if there is enough.
    place = None
    if not args.dry_run and os.access(MEMORY, os.W_OK):
        place = MEMORY if shutil.disk_usage(MEMORY).free > 32 << 30 else None
    work = Path(tempfile.mkdtemp(prefix="mvbert-gpu-", dir=place))
    env = environment(work / "site")
    outcomes: list[Outcome] = []
    turn = threading.Lock()

    def go(part: Part, log: Path) -> None:
        seconds = begin + 60 * patience * args.minutes - time.monotonic() - 5
        broken = [o for o in outcomes if o.part.name == part.needs and o.state != "ok"]
        if part.missing or broken:
            outcome = Outcome(part, "skipped", 0.0, part.missing or f"needs {part.needs}")
        elif seconds < 10:
            outcome = Outcome(part, "skipped", 0.0, "no time left")
        else:
            outcome = run(part, min(patience * part.seconds, seconds), log, env)
        with turn:
            outcomes.append(outcome)
            print(f"{outcome.state:8} {outcome.seconds:6.1f} s  {part.name}", flush=True)
            if outcome.state != "ok":
                print("    " + "\n    ".join(outcome.tail.splitlines()[-12:]), flush=True)
            if log != out / "log.txt" and log.exists():
                with (out / "log.txt").open("ab") as whole:
                    whole.write(log.read_bytes())

    try:
        queue = choose(parts(out, work, args, cuda), args.only)

        def follow(chain: list[Part]) -> None:
            for part in chain:
                go(part, work / f"{part.name}.log")

        build, *rest = queue  # one of the GPU tests needs it too
        go(build, out / "log.txt")
        side_by_side = chains([part for part in rest if not part.timed])
        with ThreadPoolExecutor(max(1, len(side_by_side))) as pool:
            list(pool.map(follow, side_by_side))
        for part in queue:
            if part.timed:
                go(part, out / "log.txt")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    outcomes.sort(key=lambda outcome: queue.index(outcome.part))
    report(out, name, args.dry_run, outcomes)
    bad = [o.part.name for o in outcomes if o.state in ("failed", "late")]
    if bad:
        sys.exit(f"not whole: {', '.join(bad)}")


if __name__ == "__main__":
    main()
