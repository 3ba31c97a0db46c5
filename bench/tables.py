"""Results -> the README's section on speed and size, docs/benchmarks.md, and the plots of both.

    python bench/tables.py            # writes them
    python bench/tables.py --check    # exit code 1 if they are not what the results say

Of every bench and kind of device the last whole run counts: --quick ones only where there is no
other, ones that were cut short only where there is nothing else. What was not measured is an empty
cell. Plots need matplotlib (pip install 'mvbert[bench]').
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "benchmarks.md"
PLOTS = ROOT / "docs"
BEGIN, END = "<!-- bench -->\n", "<!-- /bench -->\n"

TITLES = {
    "tokenizer": "Text to ids",
    "vocab": "Vocabulary learning",
    "rows": "Training rows",
    "embedding": "Embedding, forward and backward",
    "loss": "Linear cross-entropy, forward and backward",
    "kl": "Divergence of two linear layers, forward and backward",
    "train_step": "Training step",
    "inference": "Inference",
}

# The shapes an H100 is aimed at; their cells stay empty until one has run them.
GPU_SHAPES = [(4096, 30522, 1024), (16384, 30522, 1024), (4096, 30522, 768), (16384, 30522, 768),
              (16384, 4928, 256), (32768, 4928, 256)]  # fmt: skip
# Of each the fastest of its settings; the one that only compiles plain PyTorch is none of CCE's.
GPU_PEERS = ["HF head, eager", "torch.compile max-autotune", "Liger", "CCE",
             "torch linear_cross_entropy"]  # fmt: skip
NOT_OF_CCE = "CCE torch_compile"


class Results:
    """The records that count."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.runs: dict[str, dict] = {}
        self.ended: set[tuple[str, str]] = set()
        records: list[dict] = []
        for file in sorted(folder.glob("*.jsonl")):
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                try:
                    record = json.loads(line)
                except ValueError as error:
                    sys.exit(f"{file}:{number} is not JSON: {error}")
                if record.get("record") == "run":
                    self.runs[record["run"]] = record
                elif record.get("record") == "end":
                    self.ended.add((record["run"], record["bench"]))
                elif record.get("record") == "result":
                    records.append(record)
        chosen: dict[tuple[str, str], str] = {}
        for record in records:
            key, run = (record["bench"], record["device"]), record["run"]
            if self.runs[run].get("only"):
                continue
            bench = record["bench"]
            if key not in chosen or self._rank(run, bench) >= self._rank(chosen[key], bench):
                chosen[key] = run
        self.records = [r for r in records if chosen.get((r["bench"], r["device"])) == r["run"]]

    def _rank(self, run: str, bench: str) -> tuple[bool, bool, str]:
        """Ended before cut short, whole before quick, later before earlier."""
        facts = self.runs[run]
        ended = (run, bench) in self.ended or not facts.get("ends")
        return ended, not facts["quick"], run

    def of(self, bench: str, device: str) -> list[dict]:
        return [r for r in self.records if (r["bench"], r["device"]) == (bench, device)]

    def run_of(self, records: Sequence[dict]) -> dict:
        return self.runs[records[0]["run"]]

    def digest(self, benches: Iterable[str]) -> str:
        """Of what a plot was drawn from."""
        text = json.dumps([r for r in self.records if r["bench"] in benches], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---- pieces of tables ----------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def figure(value: float | None, digits: int = 3) -> str:
    """So many digits, never in powers of ten; empty for nothing."""
    if value is None:
        return ""
    text = f"{value:.{digits}g}"
    return f"{float(text):,.0f}" if "e" in text or abs(float(text)) >= 100 else text


def span(ms: dict[str, float]) -> str:
    return f"{figure(ms['p50'])} ({figure(ms['p20'])}-{figure(ms['p80'])})"


def machine(run: dict) -> str:
    """The device and versions of a run, in a line."""
    what = run.get("gpu") or f"{run['processor']}, {run['threads']} threads"
    date = f"{run['run'][:4]}-{run['run'][4:6]}-{run['run'][6:8]}"
    quick = ", quick run" if run["quick"] else ""
    versions = [f"torch {run['torch']}", *(f"{n} {v}" for n, v in run["peers"].items())]
    commit = f"commit {run['commit']}, " if run["commit"] else ""
    return f"{what}; {', '.join(versions)}; {commit}{date}{quick}"


def by_case(records: Sequence[dict]) -> dict[str, dict[str, dict]]:
    """case -> provider -> record, in the order they came."""
    found: dict[str, dict[str, dict]] = {}
    for record in records:
        found.setdefault(record["case"], {})[record["provider"]] = record
    return found


def median(record: dict | None) -> float | None:
    """Milliseconds: the device's own where there is one."""
    if record is None or "ms" not in record:
        return None
    return record.get("device_ms", record["ms"])["p50"]


def times(record: dict | None, ours: dict | None) -> str:
    """How many times as long as ours."""
    theirs, own = median(record), median(ours)
    return "" if theirs is None or own is None else f"{theirs / own:.2f} x"


# ---- the README ----------------------------------------------------------------------------------


def tokenizer_tables(results: Results) -> str:
    records = results.of("tokenizer", "cpu")
    if not records:
        return ""
    run = results.run_of(records)
    text = next(r["text"] for r in records if "text" in r)
    parts = []
    for task in ("plain", "mixed"):
        cases = by_case([r for r in records if r["fields"]["task"] == task])
        providers = list(dict.fromkeys(p for found in cases.values() for p in found))
        heads = [name.split(" ", 1)[1] for name in cases]
        rows = []
        for provider in providers:
            found = [cases[case].get(provider, {}) for case in cases]
            if not any("items_s" in r for r in found):
                continue
            equal = next((r["equal"] for r in found if r.get("equal") is not None), None)
            share = [] if task == "mixed" else ["" if equal is None else f"{100 * equal:.4g} %"]
            rows.append([provider, *(figure(r.get("items_s")) for r in found), *share])
        share = [] if task == "mixed" else ["texts with equal ids"]
        parts.append(table([f"{task}, MB/s", *heads, *share], rows))
    return (
        f"**Tokenizers**, MB of text a second, on {text}; ids compared with those of transformers' "
        f"slow tokenizer before any clock. {machine(run)}.\n\n" + "\n".join(parts)
    )


def loss_table(results: Results) -> str:
    """Cross-entropy on this CPU: ours, and how long the others take."""
    records = results.of("loss", "cpu")
    if not records:
        return ""
    cases = by_case(records)
    peers = [p for p in dict.fromkeys(r["provider"] for r in records if "ms" in r) if p != "mvbert"]
    rows = []
    for case, found in cases.items():
        ours = found.get("mvbert", {})
        megabytes = [figure(found.get(p, {}).get("peak_mb")) for p in ("mvbert", "HF head, eager")]
        ratios = [times(found.get(p), ours) for p in peers]
        rows.append([case, figure(median(ours)), *ratios, *megabytes])
    head = ["CPU", "mvbert, ms", *peers, "MB, mvbert", "MB, HF head"]
    return (
        "**Linear cross-entropy on a CPU**, float32, forward and backward, on labelled rows only: "
        "our time, the others' as a multiple of it, and the memory one call needs beyond its "
        f"inputs. {machine(results.run_of(records))}.\n\n{table(head, rows)}"
    )


def fastest(found: dict[str, dict], peer: str) -> dict | None:
    """Of a peer's settings."""
    timed = [r for p, r in found.items() if p.startswith(peer) and p != NOT_OF_CCE and "ms" in r]
    return min(timed, key=median, default=None)


def gpu_loss_table(results: Results) -> str:
    """Against the floor and the peers on a GPU; empty cells where nothing was measured."""
    records = results.of("loss", "cuda")
    cases = by_case(records)
    rows = []
    for N, V, H in GPU_SHAPES:
        found = cases.get(f"N={N} V={V} H={H}", {})
        ours = found.get("mvbert", {})
        floor = ours.get("times_floor")
        rows.append([
            f"{N:,} x {V:,} x {H}", figure(ours.get("floor_ms")), figure(median(ours)),
            "" if floor is None else f"{floor:.2f} x", figure(ours.get("peak_mb")),
            *(times(fastest(found, peer), ours) for peer in GPU_PEERS),
        ])  # fmt: skip
    where = (
        machine(results.run_of(records)) + "." if records else "Not measured yet: no GPU so far."
    )
    head = ["GPU, N x V x H", "floor, ms", "mvbert, ms", "of floor", "MB", *GPU_PEERS]
    easier = sorted({peer for peer in GPU_PEERS for found in cases.values()
                     if (fastest(found, peer) or {}).get("note") == "no bias"})  # fmt: skip
    unequal = f" Without the bias, which it lacks: {', '.join(easier)}." if easier else ""
    return (
        "**Linear cross-entropy on a GPU**, bfloat16, forward and backward, random inputs; the "
        "floor is 6NVH floating-point operations at the measured rate of a large product. Device "
        "time; of each peer the fastest of its settings, as a multiple of ours."
        f"{unequal} {where}\n\n" + table(head, rows)
    )


def inference_table(results: Results) -> str:
    records = results.of("inference", "cpu")
    if not records:
        return ""
    providers = ["torch eager", "ONNX Runtime", "ONNX Runtime int8"]
    rows = []
    for case, found in by_case(records).items():
        if found[next(iter(found))]["fields"]["B"] != 1:
            continue
        sizes = [figure(found.get(p, {}).get("megabytes")) for p in providers[1:]]
        latency = [figure(median(found.get(p))) for p in providers]
        rows.append([case, *sizes, *latency])
    head = ["one row, one thread", "MB, float32", "MB, int8", *(f"{p}, ms" for p in providers)]
    return (
        "**Size against latency**: a row of 128 pieces through the student and through BERTs of "
        f"other shapes, one CPU thread. {machine(results.run_of(records))}.\n\n{table(head, rows)}"
        "\n![size against latency](docs/bench-inference.svg)\n"
    )


def rate_table(results: Results, bench: str, title: str) -> str:
    """Items a second of every provider, cases side by side."""
    records = [r for r in results.of(bench, "cpu") if "items_s" in r]
    if not records:
        return ""
    cases = by_case(records)
    rows = [
        [p, *(figure(found.get(p, {}).get("items_s")) for found in cases.values())]
        for p in dict.fromkeys(r["provider"] for r in records)
    ]
    head = [f"{records[0]['unit']} a second", *cases]
    return f"**{title}** on a CPU. {machine(results.run_of(records))}.\n\n{table(head, rows)}"


def readme_section(results: Results) -> str:
    parts = [
        "### Speed and size",
        "Medians of interleaved rounds, made by `python bench/run.py` (peers come with "
        "`pip install 'mvbert[bench]'`; what is absent is skipped and said so); every figure, peer "
        "and spread is in [docs/benchmarks.md](docs/benchmarks.md), every raw record in "
        "`bench/results/`. An empty cell was not measured. On a machine with a GPU, "
        "`bench/gpu_check.sh` builds, tests, benches and trains for nine minutes at most and "
        "prints every target beside what it measured.",
        tokenizer_tables(results),
        rate_table(results, "rows", "Training rows"),
        loss_table(results),
        rate_table(results, "train_step", "Training steps"),
        gpu_loss_table(results),
        inference_table(results),
    ]
    return "\n" + "\n\n".join(part.strip("\n") for part in parts if part) + "\n\n"


# ---- docs/benchmarks.md --------------------------------------------------------------------------


def page(results: Results) -> str:
    parts = [
        "# Benchmarks",
        "Written by `python bench/tables.py` from `bench/results/`; the ways of measuring are told "
        "in `bench/harness.py` and at the top of each `bench/bench_*.py`. Times are milliseconds a "
        "call: the median, and the 20th and 80th percentile of the rounds, which were interleaved "
        "over all providers. Peak: memory that one call needs beyond its inputs. The floor is the "
        "time of the least work at the rates that a large copy and a large matrix product of "
        "PyTorch had in the same run; on a CPU another library's product can be faster than that.",
        "![tokenizers](bench-tokenizer.svg)\n\n![cross-entropy](bench-loss.svg)\n\n"
        "![size against latency](bench-inference.svg)",
    ]
    for bench, title in TITLES.items():
        for device in ("cuda", "cpu"):
            records = results.of(bench, device)
            if records:
                parts.append(f"## {title}, {'GPU' if device == 'cuda' else 'CPU'}")
                parts.append(machine(results.run_of(records)) + ".")
                parts += [case_table(case, found) for case, found in by_case(records).items()]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def case_table(case: str, found: dict[str, dict]) -> str:
    """All that is known of a case, a provider a line."""
    columns: list[tuple[str, Callable[[dict], str]]] = [
        ("ms", lambda r: span(r["ms"])),
        ("device ms", lambda r: span(r["device_ms"]) if "device_ms" in r else ""),
        ("a second", lambda r: f"{figure(r['items_s'])} {r['unit']}" if "items_s" in r else ""),
        ("TFLOP/s", lambda r: figure(r.get("tflop_s"))),
        ("GB/s", lambda r: figure(r.get("gb_s"))),
        ("of floor", lambda r: f"{r['times_floor']:.2f} x" if "times_floor" in r else ""),
        ("peak MB", lambda r: figure(r.get("peak_mb"))),
        ("file MB", lambda r: figure(r.get("megabytes"))),
        ("equal ids", lambda r: f"{100 * r['equal']:.4g} %" if r.get("equal") is not None else ""),
        ("worst error", lambda r: f"{max(r['errors'].values()):.1e}" if r.get("errors") else ""),
        ("note", lambda r: r.get("note", "")),
    ]
    timed = [r for r in found.values() if "ms" in r]
    rows = [[r["provider"], *(cell(r) for _, cell in columns)] for r in timed]
    used = [i for i in range(len(columns) + 1) if any(row[i] for row in rows)]
    head = [case, *(name for name, _ in columns)]
    text = table([head[i] for i in used], ([row[i] for i in used] for row in rows)) if rows else ""
    ceiling = timed[0]["ceiling"] if timed else None
    if ceiling and "tflop_s" in timed[0]:
        text += (
            f"\nCeilings: {figure(ceiling['matmul_tflop_s'])} TFLOP/s, "
            f"{figure(ceiling['copy_gb_s'])} GB/s.\n"
        )
    others = [r for r in found.values() if "ms" not in r]
    for record in others:
        kind = next(k for k in ("skipped", "wrong", "failed") if k in record)
        text += f"\n- {record['provider']}: {kind}: {record[kind]}"
    return text


# ---- plots ---------------------------------------------------------------------------------------


def plots(results: Results) -> dict[str, Callable]:
    """File name -> (benches it shows, function that draws on axes)."""
    return {
        "bench-tokenizer.svg": (("tokenizer",), draw_tokenizer),
        "bench-loss.svg": (("loss",), draw_loss),
        "bench-inference.svg": (("inference",), draw_inference),
    }


def draw_tokenizer(axes, results: Results) -> None:
    cases = by_case(results.of("tokenizer", "cpu"))
    first = next(iter(cases.values()), {})
    bars = [(p, r["items_s"]) for p, r in first.items() if "items_s" in r]
    bars.sort(key=lambda bar: bar[1])
    colours = ["tab:orange" if name.startswith("mvbert") else "tab:blue" for name, _ in bars]
    axes.barh([name for name, _ in bars], [value for _, value in bars], color=colours)
    axes.set_xscale("log")
    axes.set_xlabel(f"MB of text a second: {next(iter(cases), 'not measured')}")


def draw_loss(axes, results: Results) -> None:
    device = "cuda" if results.of("loss", "cuda") else "cpu"
    cases = by_case([r for r in results.of("loss", device) if "times_floor" in r])
    providers = list(dict.fromkeys(p for found in cases.values() for p in found))
    height = 0.8 / max(1, len(providers))
    for number, provider in enumerate(providers):
        places = [i + height * number for i in range(len(cases))]
        values = [found.get(provider, {}).get("times_floor") or 0 for found in cases.values()]
        axes.barh(places, values, height=height, label=provider)
    axes.set_yticks([i + 0.4 for i in range(len(cases))], list(cases), fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel(f"times the floor, {'GPU' if device == 'cuda' else 'CPU'}")
    axes.legend(fontsize=6)


def draw_inference(axes, results: Results) -> None:
    records = [r for r in results.of("inference", "cpu") if "megabytes" in r and "ms" in r]
    records = [r for r in records if r["fields"]["B"] == 1]
    for provider in dict.fromkeys(r["provider"] for r in records):
        mine = [r for r in records if r["provider"] == provider]
        points = [(r["megabytes"], median(r)) for r in mine]
        axes.plot(*zip(*points, strict=True), marker="o", label=provider, linewidth=0.8)
    for record in records:
        if record["provider"] == "torch eager":
            name = record["fields"]["model"]
            axes.annotate(name, (record["megabytes"], median(record)), fontsize=7)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("MB of the file")
    axes.set_ylabel("ms for one row of 128 pieces, one thread")
    axes.legend(fontsize=7)


def draw(results: Results) -> None:
    """Writes every plot, marked with the digest of its records; the same results, the same file."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("plots need matplotlib; run: pip install 'mvbert[bench]'")
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "mvbert"
    from matplotlib import pyplot

    for name, (benches, function) in plots(results).items():
        figure_, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        function(axes, results)
        marks = {"Date": None, "Description": f"records {results.digest(benches)}"}
        figure_.savefig(PLOTS / name, metadata=marks)
        pyplot.close(figure_)


def stale_plots(results: Results) -> list[str]:
    found = []
    for name, (benches, _) in plots(results).items():
        file = PLOTS / name
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if f"records {results.digest(benches)}" not in text:
            found.append(f"docs/{name}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if stale")
    args = parser.parse_args()
    results = Results()
    readme = README.read_text(encoding="utf-8")
    if not re.search(f"{BEGIN}.*?{END}", readme, re.S):
        sys.exit(f"README.md has no lines {BEGIN.strip()} and {END.strip()}")
    section = readme_section(results)
    wanted = re.sub(f"{BEGIN}.*?{END}", lambda _: BEGIN + section + END, readme, flags=re.S)
    whole = page(results)
    if args.check:
        stale = ["README.md"] if wanted != readme else []
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != whole:
            stale.append("docs/benchmarks.md")
        stale += stale_plots(results)
        if stale:
            sys.exit(
                f"not what bench/results says: {', '.join(stale)}; run: python bench/tables.py"
            )
        return
    README.write_text(wanted, encoding="utf-8")
    PAGE.write_text(whole, encoding="utf-8")
    draw(results)


if __name__ == "__main__":
    main()
