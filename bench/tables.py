"""Results -> the README's headlines, docs/benchmarks.md, and its plots.

    python bench/tables.py            # writes them
    python bench/tables.py --check    # exit code 1 if they are not what the results say

The last complete run of each bench and kind of device counts; a --quick run only if there is no
other, an interrupted one only if there is nothing else. What was not measured is an empty cell.
Plots need matplotlib (pip install 'mvbert[bench]').
"""

import argparse
import ast
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

TITLES = {
    "tokenizer": "Text to ids",
    "vocab": "Vocabulary learning",
    "corpus": "Text files to a corpus",
    "rows": "Training rows",
    "collator": "Masking for other training loops",
    "embedding": "Embedding, forward and backward",
    "loss": "Linear cross-entropy, forward and backward",
    "kl": "Divergence of two linear layers, forward and backward",
    "relations": "Divergence of attention relations, forward and backward",
    "train_step": "Training step",
    "trainer": "Pretraining by transformers' Trainer",
    "finetune": "Fine-tuning",
    "inference": "Inference",
    "sentences": "Text to sentence vectors",
}

# The shapes with targets on an H100; their cells stay empty until one has run them.
GPU_SHAPES = [(4096, 30522, 1024), (16384, 30522, 1024), (4096, 30522, 768), (16384, 30522, 768),
              (16384, 4928, 256), (32768, 4928, 256)]  # fmt: skip
# Of each the fastest of its settings; the one that only compiles plain PyTorch is none of CCE's.
GPU_PEERS = ["HF head, eager", "torch.compile max-autotune", "Liger", "CCE",
             "torch linear_cross_entropy"]  # fmt: skip
NOT_OF_CCE = "CCE torch_compile"
# Reads and hashes the text, and nothing else: no peer, a floor.
FLOORS = {"sha256"}


Cases = dict[str, dict[str, dict]]  # case -> provider -> record, in the order they came


class Results:
    """The records that the tables show."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.runs: dict[str, dict] = {}
        ended: set[tuple[str, str]] = set()
        records: list[dict] = []
        for file in sorted(folder.glob("*.jsonl")):
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                try:
                    record = json.loads(line)
                except ValueError as error:
                    sys.exit(f"{file}:{number} is not JSON: {error}")
                if record["record"] == "run":
                    self.runs[record["run"]] = record
                elif record["record"] == "end":
                    ended.add((record["run"], record["bench"]))
                else:
                    records.append(record)
        # Complete before interrupted, full before quick, later before earlier.
        last: dict[tuple[str, str], tuple] = {}
        for record in records:
            key, run = (record["bench"], record["device"]), record["run"]
            facts = self.runs[run]
            if not facts["only"]:
                whole = (run, record["bench"]) in ended or not facts.get("ends")
                last[key] = max(last.get(key, ()), (whole, not facts["quick"], run))
        self.records = [
            r for r in records if last.get((r["bench"], r["device"]), [""])[-1] == r["run"]
        ]

    def all_of(self, bench: str, device: str = "cpu") -> list[dict]:
        """All records, also of providers that were skipped, wrong or failed."""
        return [r for r in self.records if (r["bench"], r["device"]) == (bench, device)]

    def timings(self, bench: str, device: str = "cpu") -> list[dict]:
        """The records of providers that were timed."""
        return [r for r in self.all_of(bench, device) if "ms" in r]

    def cases(self, bench: str, device: str = "cpu") -> Cases:
        return by_case(self.timings(bench, device))

    def machine(self, bench: str, device: str = "cpu") -> str:
        """The machine and versions of a bench, in a line."""
        run = self.runs[self.all_of(bench, device)[0]["run"]]
        what = run.get("gpu") or f"{run['processor']}, {run['cores']} cores"
        date = f"{run['run'][:4]}-{run['run'][4:6]}-{run['run'][6:8]}"
        quick = ", quick run" if run["quick"] else ""
        versions = [f"torch {run['torch']}", *(f"{n} {v}" for n, v in run["peers"].items())]
        commit = f"commit {run['commit']}, " if run["commit"] else ""
        return f"{what}; {', '.join(versions)}; {commit}{date}{quick}."

    def digest(self, bench: str) -> str:
        """A digest of the records that a plot shows."""
        text = json.dumps([r for r in self.records if r["bench"] == bench], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---- pieces of tables ----------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"


def joined(parts: Iterable[str]) -> str:
    """The parts that are not empty, with a blank line between."""
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def providers_of(cases: Cases) -> list[str]:
    return list(dict.fromkeys(p for records in cases.values() for p in records))


def figure(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, never in powers of ten; empty for None."""
    if value is None:
        return ""
    text = f"{value:.{digits}g}"
    return f"{float(text):,.0f}" if "e" in text or abs(float(text)) >= 100 else text


def span(ms: dict[str, float]) -> str:
    return f"{figure(ms['p50'])} ({figure(ms['p20'])}-{figure(ms['p80'])})"


def by_case(records: Iterable[dict]) -> Cases:
    cases: Cases = {}
    for record in records:
        cases.setdefault(record["case"], {})[record["provider"]] = record
    return cases


def median(record: dict | None) -> float | None:
    """Milliseconds: the device's own where there is one."""
    return record.get("device_ms", record["ms"])["p50"] if record else None


def times(record: dict | None, ours: dict | None) -> str:
    """Their time as a multiple of ours."""
    peer, own = median(record), median(ours)
    if peer is None or own is None:
        return ""
    ratio = peer / own
    return f"{ratio:.2f} x" if ratio < 10 else f"{ratio:,.0f} x"


def faster_peers(cases: Cases) -> str:
    """A sentence: which peers are faster, in how many cases and by how much."""
    wins: dict[str, list[tuple[float, str]]] = {}
    compared: dict[str, int] = {}
    for case, providers in cases.items():
        own = median(next((r for p, r in providers.items() if p.startswith("mvbert")), None))
        for provider, record in providers.items():
            if own is None or provider.startswith("mvbert"):
                continue
            compared[provider] = compared.get(provider, 0) + 1
            ratio = own / median(record)
            if ratio >= 1.005 and provider not in FLOORS:
                wins.setdefault(provider, []).append((ratio, case))
    if not compared:
        return ""
    faster = [
        f"`{provider}` in {len(ratios)} of {compared[provider]} cases, {max(ratios)[0]:.2f} x at "
        f"most ({max(ratios)[1]})"
        for provider, ratios in wins.items()
    ]
    return f"Faster than mvbert: {'; '.join(faster) or 'none of these peers'}."


def fastest(records: dict[str, dict], peer: str) -> dict | None:
    """The fastest of a peer's settings."""
    candidates = [r for p, r in records.items() if p.startswith(peer) and p != NOT_OF_CCE]
    return min(candidates, key=median, default=None)


def gpu_loss_table(results: Results) -> str:
    """Against the floor and the peers on a GPU; empty cells where nothing was measured."""
    title = "**Linear cross-entropy on a GPU**"
    cases = results.cases("loss", "cuda")
    if not cases:
        return (
            f"{title}: not measured yet. Where there is one, `bench/gpu_check.sh` builds, tests, "
            "benches and trains for nine minutes at most and prints every target beside what it "
            "measured."
        )
    rows = []
    for N, V, H in GPU_SHAPES:
        records = cases.get(f"N={N} V={V} H={H}", {})
        ours = records.get("mvbert", {})
        floor = ours.get("times_floor")
        rows.append([
            f"{N:,} x {V:,} x {H}", figure(ours.get("floor_ms")), figure(median(ours)),
            "" if floor is None else f"{floor:.2f} x", figure(ours.get("peak_mb")),
            *(times(fastest(records, peer), ours) for peer in GPU_PEERS),
        ])  # fmt: skip
    head = ["GPU, N x V x H", "floor, ms", "mvbert, ms", "of floor", "MB", *GPU_PEERS]
    easier = sorted({peer for peer in GPU_PEERS for records in cases.values()
                     if (fastest(records, peer) or {}).get("note") == "no bias"})  # fmt: skip
    unequal = f" Without the bias, which it lacks: {', '.join(easier)}." if easier else ""
    return (
        f"{title}, bfloat16, forward and backward, random inputs; the floor is 6NVH floating-point "
        "operations at the measured rate of a large product. Device time; of each peer the fastest "
        f"of its settings, as a multiple of ours.{unequal} {faster_peers(cases)} "
        f"{results.machine('loss', 'cuda')}\n\n{table(head, rows)}"
    )


# ---- the README's headlines -------------------------------------------------------------------


# What; bench, case and provider of ours; peers by the name that they get, here or in another case.
STEP = "Stage II: 6x256, V = 4928, 32 x 128"
HEADLINES = [
    ("text to ids, one thread", "tokenizer", "plain documents, 1 thread, warm", "mvbert",
     {"nanotoken": "nanotoken", "TF Text": "TF Text FastBertTokenizer",
      "Hugging Face tokenizers": "HF encode_batch_fast"}),
    ("masked training rows, one thread", "rows", "teacher rows, 1 thread", "mvbert",
     {"numpy": "numpy", "transformers' collator": "HF words"}),
    ("training the student, 32 rows of 128 a step", "train_step", STEP, "mvbert",
     {"Hugging Face, bf16, torch.compile": "HF bf16, torch.compile", "its default": "HF"}),
    ("Hugging Face's step after `fuse(model)`, bf16", "train_step", STEP, "HF bf16, fuse()d",
     {"before": "HF bf16", "torch.compile": "HF bf16, torch.compile"}),
    ("cross-entropy, 30,522 pieces, width 384, 4,096 rows",
     "loss", "N=4096 V=30522 H=384", "mvbert",
     {"torch.compile": "torch.compile max-autotune", "Hugging Face": "HF head, eager"}),
]  # fmt: skip


def amount(record: dict) -> str:
    """The figures of a record in a headline."""
    parts = [figure(record[size]) + " MB" for size in ("megabytes", "peak_mb") if size in record]
    if "items_s" in record and record["unit"] in ("MB", "M pieces", "pieces"):
        return f"{figure(record['items_s'])} {record['unit']}/s"
    return ", ".join([*parts, f"{figure(median(record))} ms"])


def glance(results: Results) -> str:
    """The headlines, and what they were measured on."""
    rows = []
    for what, bench, case, provider, peers in HEADLINES:
        cases = results.cases(bench)
        ours = cases.get(case, {}).get(provider)
        others = []
        for name, source in peers.items():
            at, peer = (case, source) if isinstance(source, str) else source
            record = cases.get(at, {}).get(peer)
            if record and (ratio := times(record, ours)):
                others.append(f"{name} {amount(record)} (**{ratio}**)")
        if others:
            rows.append([what, amount(ours), "; ".join(others)])
    machine = results.machine("tokenizer").split(";")[0]
    gpu = "" if any(r["device"] == "cuda" for r in results.records) else ", no GPU so far"
    return (
        f"\n{table(['', 'mvbert', 'baseline (x slower than mvbert)'], rows)}\n"
        f"{machine}{gpu}. Every figure, including where others are faster: "
        "[docs/benchmarks.md](docs/benchmarks.md).\n\n"
    )


# ---- docs/benchmarks.md --------------------------------------------------------------------------


def page(results: Results) -> str:
    parts = [
        "# Benchmarks",
        "Written by `python bench/tables.py` from `bench/results/`; `bench/harness.py` and the top "
        "of each `bench/bench_*.py` describe the method. Times are milliseconds a "
        "call: the median, and the 20th and 80th percentile of the rounds, which were interleaved "
        "over all providers. Peak: memory that one call needs beyond its inputs. The floor is the "
        "time of the least work at the rates that a large copy and a large matrix product of "
        "PyTorch had in the same run; on a CPU another library's product can be faster than that.",
        "![tokenizers](bench-tokenizer.svg)\n\n![cross-entropy](bench-loss.svg)\n\n"
        "![size against latency](bench-inference.svg)",
    ]
    for bench, title in TITLES.items():
        measured = [device for device in ("cuda", "cpu") if results.all_of(bench, device)]
        if measured:
            source = (ROOT / "bench" / f"bench_{bench}.py").read_text(encoding="utf-8")
            parts += [f"## {title}", ast.get_docstring(ast.parse(source))]
        for device in measured:
            parts.append(f"### {title}, {'GPU' if device == 'cuda' else 'CPU'}")
            cases = results.cases(bench, device)
            ceiling = ceilings(results.timings(bench, device))
            facts = [results.machine(bench, device), ceiling, faster_peers(cases)]
            parts.append(" ".join(filter(None, facts)))
            if (bench, device) == ("loss", "cuda"):
                parts.append(gpu_loss_table(results))
            parts += [case_table(case, records) for case, records in cases.items()]
            parts.append(not_timed(by_case(results.all_of(bench, device))))
    return joined(parts)


def ceilings(records: Sequence[dict]) -> str:
    """What this machine reached in the same run, if the bench has a floor."""
    rates = {(r["ceiling"]["matmul_tflop_s"], r["ceiling"]["copy_gb_s"])
             for r in records if "times_floor" in r}  # fmt: skip
    texts = [f"{figure(product)} TFLOP/s, {figure(copy)} GB/s" for product, copy in sorted(rates)]
    return f"Ceilings: {'; '.join(texts)}." if texts else ""


def not_timed(cases: Cases) -> str:
    """Providers without a time and why; the cases only if not all of them."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for case, records in cases.items():
        for provider, record in records.items():
            if "ms" not in record:
                kind = next(k for k in ("skipped", "wrong", "failed") if k in record)
                by_provider = reasons.setdefault(f"{kind}: {record[kind]}", {})
                by_provider.setdefault(provider, []).append(case)
    lines = []
    for reason, providers in reasons.items():
        items = [
            p if len(names) == sum(p in r for r in cases.values()) else f"{p} ({', '.join(names)})"
            for p, names in providers.items()
        ]
        lines.append(f"- {reason}: {'; '.join(items)}")
    return "\n".join(lines)


def case_table(case: str, records: dict[str, dict]) -> str:
    """All figures of a case, one provider per line."""
    is_text = any("equal" in r or "text" in r for r in records.values())
    columns: list[tuple[str, Callable[[dict], str]]] = [
        ("ms", lambda r: span(r["ms"])),
        ("device ms", lambda r: span(r["device_ms"]) if "device_ms" in r else ""),
        ("a second", lambda r: f"{figure(r['items_s'])} {r['unit']}" if "items_s" in r else ""),
        ("TFLOP/s", lambda r: figure(r.get("tflop_s"))),
        ("GB/s", lambda r: figure(r.get("gb_s"))),
        ("of floor", lambda r: f"{r['times_floor']:.2f} x" if "times_floor" in r else ""),
        ("peak MB", lambda r: figure(r.get("peak_mb"))),
        ("of MB" if is_text else "file MB", lambda r: figure(r.get("megabytes"))),
        ("pieces per word", lambda r: figure(r.get("pieces_per_word"), 4)),
        (
            "share in BERT's",
            lambda r: f"{100 * r['in_teacher']:.3g} %" if "in_teacher" in r else "",
        ),
        ("equal ids", lambda r: f"{100 * r['equal']:.4g} %" if r.get("equal") is not None else ""),
        ("worst error", lambda r: f"{max(r['errors'].values()):.1e}" if r.get("errors") else ""),
        ("least cosine", lambda r: figure(r.get("least_cosine"), 4)),
        ("note", lambda r: r.get("note", "")),
    ]
    rows = [[p, *(cell(r) for _, cell in columns)] for p, r in records.items()]
    used = [i for i in range(len(columns) + 1) if any(row[i] for row in rows)]
    head = [case, *(name for name, _ in columns)]
    return table([head[i] for i in used], ([row[i] for i in used] for row in rows))


# ---- plots ---------------------------------------------------------------------------------------


def draw_tokenizer(axes, results: Results) -> None:
    case, records = next(iter(results.cases("tokenizer").items()))
    bars = sorted((r["items_s"], p) for p, r in records.items())
    colours = ["tab:orange" if name.startswith("mvbert") else "tab:blue" for _, name in bars]
    axes.barh([name for _, name in bars], [value for value, _ in bars], color=colours)
    axes.set_xscale("log")
    axes.set_xlabel(f"MB of text a second: {case}")


def draw_loss(axes, results: Results) -> None:
    device = "cuda" if results.timings("loss", "cuda") else "cpu"
    cases = results.cases("loss", device)
    providers = providers_of(cases)
    height = 0.8 / len(providers)
    for number, provider in enumerate(providers):
        places = [i + height * number for i in range(len(cases))]
        values = [records.get(provider, {}).get("times_floor", 0) for records in cases.values()]
        axes.barh(places, values, height=height, label=provider)
    axes.set_yticks([i + 0.4 for i in range(len(cases))], list(cases), fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel(f"times the floor, {'GPU' if device == 'cuda' else 'CPU'}")
    axes.legend(fontsize=6)


def one_row(results: Results) -> list[dict]:
    """The records of inference with one row of 128 pieces."""
    records = results.timings("inference")
    return [r for r in records if (r["fields"]["B"], r["fields"]["T"]) == (1, 128)]


def draw_inference(axes, results: Results) -> None:
    records = one_row(results)
    for provider in dict.fromkeys(r["provider"] for r in records):
        points = [(r["megabytes"], median(r)) for r in records if r["provider"] == provider]
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


PLOTS = {"tokenizer": draw_tokenizer, "loss": draw_loss, "inference": draw_inference}


def plot_file(bench: str) -> Path:
    return ROOT / "docs" / f"bench-{bench}.svg"


def draw(results: Results) -> None:
    """Writes every plot, marked with the digest of its records; the same results, the same file."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("plots need matplotlib; run: pip install 'mvbert[bench]'")
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "mvbert"
    from matplotlib import pyplot

    for bench, function in PLOTS.items():
        figure_, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        function(axes, results)
        marks = {"Date": None, "Description": f"records {results.digest(bench)}"}
        figure_.savefig(plot_file(bench), metadata=marks)
        pyplot.close(figure_)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if stale")
    args = parser.parse_args()
    results = Results()
    readme = README.read_text(encoding="utf-8")
    begin, end = "<!-- glance -->\n", "<!-- /glance -->\n"
    marked = re.search(f"{begin}.*?{end}", readme, re.S)
    if not marked:
        sys.exit(f"README.md has no lines {begin.strip()} and {end.strip()}")
    readme = readme.replace(marked[0], begin + glance(results) + end)
    pages = {README: readme, PAGE: page(results)}
    if args.check:
        stale = [p for p, text in pages.items() if p.read_text(encoding="utf-8") != text]
        stale += [
            plot_file(bench)
            for bench in PLOTS
            if f"records {results.digest(bench)}" not in plot_file(bench).read_text()
        ]
        if stale:
            names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
            sys.exit(f"not what bench/results says: {names}; run: python bench/tables.py")
        return
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    draw(results)


if __name__ == "__main__":
    main()
