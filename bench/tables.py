"""Results -> the README's figures on speed and size, docs/benchmarks.md, and the plots of both.

    python bench/tables.py            # writes them
    python bench/tables.py --check    # exit code 1 if they are not what the results say

Of every bench and kind of device the last whole run counts: --quick ones only where there is no
other, ones that were cut short only where there is nothing else. What was not measured is an empty
cell. Plots need matplotlib (pip install 'mvbert[bench]').
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
PLOTS = ROOT / "docs"

TITLES = {
    "tokenizer": "Text to ids",
    "vocab": "Vocabulary learning",
    "corpus": "Text files to a corpus",
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
# Reads and hashes the text, and nothing else: no peer, a floor.
FLOORS = {"sha256"}


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
                    # As older records have it.
                    record["case"] = record["case"].replace(" 1 threads", " 1 thread")
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
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"


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
    what = run.get("gpu") or f"{run['processor']}, {run['cores']} cores"
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
    if theirs is None or own is None:
        return ""
    ratio = theirs / own
    return f"{ratio:.2f} x" if ratio < 10 else f"{ratio:,.0f} x"


def faster_peers(records: Sequence[dict]) -> str:
    """Who is faster than we are, in how many cases and by how much; a sentence."""
    cases = by_case(records)
    found: dict[str, list[tuple[float, str]]] = {}
    compared: dict[str, int] = {}
    for case, providers in cases.items():
        own = median(next((r for p, r in providers.items() if p.startswith("mvbert")), None))
        for provider, record in providers.items():
            theirs = median(record)
            if own is None or theirs is None or provider.startswith("mvbert"):
                continue
            compared[provider] = compared.get(provider, 0) + 1
            if own / theirs >= 1.005 and provider not in FLOORS:
                found.setdefault(provider, []).append((own / theirs, case))
    if not compared:
        return ""
    told = [
        f"`{provider}` in {len(where)} of {compared[provider]} cases, {max(where)[0]:.2f} x at "
        f"most ({max(where)[1]})"
        for provider, where in found.items()
    ]
    return f"Faster than mvbert: {'; '.join(told) or 'none of these peers'}."


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
        "slow tokenizer before any clock. Warm: a library has seen the text; cold: it forgets all "
        "before each call (empty: it remembers nothing). Mixed: each word cut by one of two "
        "vocabularies, by a coin; `HF words + dict` splits with Hugging Face's normaliser and "
        "splitter and looks words up in a dict, `HF twice, spliced` encodes with both vocabularies "
        f"and chooses. {faster_peers(records)} {machine(run)}.\n\n" + "\n".join(parts)
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
    unequal = {r["provider"] for r in records if r.get("note") == "no bias"}
    names = [f"{p} (no bias)" if p in unequal else p for p in peers]
    head = ["CPU", "mvbert, ms", *names, "MB, mvbert", "MB, HF head"]
    return (
        "**Linear cross-entropy on a CPU**, float32, forward and backward, on labelled rows only: "
        "our time, the others' as a multiple of it, and the memory one call needs beyond its "
        f"inputs. {faster_peers(records)} {machine(results.run_of(records))}.\n\n"
        + table(head, rows)
    )


def fastest(found: dict[str, dict], peer: str) -> dict | None:
    """Of a peer's settings."""
    timed = [r for p, r in found.items() if p.startswith(peer) and p != NOT_OF_CCE and "ms" in r]
    return min(timed, key=median, default=None)


def gpu_loss_table(results: Results) -> str:
    """Against the floor and the peers on a GPU; empty cells where nothing was measured."""
    title = "**Linear cross-entropy on a GPU**"
    records = results.of("loss", "cuda")
    if not records:
        return (
            f"{title}: not measured yet. Where there is one, `bench/gpu_check.sh` builds, tests, "
            "benches and trains for nine minutes at most and prints every target beside what it "
            "measured."
        )
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
    head = ["GPU, N x V x H", "floor, ms", "mvbert, ms", "of floor", "MB", *GPU_PEERS]
    easier = sorted({peer for peer in GPU_PEERS for found in cases.values()
                     if (fastest(found, peer) or {}).get("note") == "no bias"})  # fmt: skip
    unequal = f" Without the bias, which it lacks: {', '.join(easier)}." if easier else ""
    return (
        f"{title}, bfloat16, forward and backward, random inputs; the floor is 6NVH floating-point "
        "operations at the measured rate of a large product. Device time; of each peer the fastest "
        f"of its settings, as a multiple of ours.{unequal} {faster_peers(records)} "
        f"{machine(results.run_of(records))}.\n\n" + table(head, rows)
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


# What stands beside our rows and steps.
WHAT = {
    "rows": {
        "mvbert": "word ids to rows, whole words masked",
        "numpy": "masks rows that are cut already, piece by piece: the least numpy can do",
        "HF words": "transformers' collator: masks whole words in rows that are cut already",
        "HF pieces": "transformers' collator: masks pieces in rows that are cut already",
        "HF text": "transformers' fast tokenizer, rows cut, its collator: masks pieces",
    },
    "train_step": {
        "mvbert": "masked language modelling in mvbert's loop",
        "mvbert compiled": "the same with `--compile`",
        "mvbert mixed": "Stage I: two vocabularies, one projected",
        "HF": "the step of transformers' Trainer, at its defaults: float32",
        "HF bf16": "with bf16, as ours",
        "HF bf16, torch.compile": "and torch.compile",
        "HF bf16, fuse()d": "not compiled, but after `mvbert.fuse(model)`",
    },
}


def rows_table(results: Results) -> str:
    """Teacher rows, which peers make too; the others, which none does, in a sentence."""
    records = [r for r in results.of("rows", "cpu") if "items_s" in r]
    cases = by_case(records)
    raced = next((case for case, found in cases.items() if len(found) > 1), None)
    if raced is None:
        return ""
    fast_first = sorted(cases[raced].values(), key=median)
    rows = [
        [r["provider"], figure(r["items_s"]), WHAT["rows"].get(r["provider"], "")]
        for r in fast_first
    ]
    alone = [f"{c}: {figure(f['mvbert']['items_s'])}" for c, f in cases.items() if c != raced]
    return (
        f"**Training rows** on a CPU: rows of {records[0]['T']} pieces, masked. Rows that no peer "
        f"makes, in M pieces a second: {'; '.join(alone)}. {machine(results.run_of(records))}."
        f"\n\n{table([raced, 'M pieces a second', 'what it does'], rows)}"
    )


def step_table(results: Results) -> str:
    """Pieces a second of every provider, both stages side by side."""
    records = [r for r in results.of("train_step", "cpu") if "items_s" in r]
    if not records:
        return ""
    cases = by_case(records)
    rows = [
        [p, *(figure(found.get(p, {}).get("items_s")) for found in cases.values()), what]
        for p, what in WHAT["train_step"].items()
    ]
    return (
        f"**Training steps** on a CPU, pieces a second. {faster_peers(records)} "
        f"{machine(results.run_of(records))}.\n\n{table(['', *cases, 'what it is'], rows)}"
    )


def other_parts(results: Results) -> str:
    """What has no table in the README, in a sentence each."""
    told = [
        f"- {TITLES[bench]}, {len(by_case(records))} cases. {faster_peers(records)}"
        for bench in ("corpus", "vocab", "embedding", "kl")
        if (records := results.of(bench, "cpu"))
    ]
    return (
        "**The other parts** on a CPU, tables in [docs/benchmarks.md](docs/benchmarks.md):\n\n"
        + "\n".join(told)
    )


def readme_section(results: Results) -> str:
    parts = [
        "### Speed and size",
        "Medians of interleaved rounds, made by `python bench/run.py` (peers come with "
        "`pip install 'mvbert[bench]'`; what is absent is skipped and said so); every figure, peer "
        "and spread is in [docs/benchmarks.md](docs/benchmarks.md), every raw record in "
        "`bench/results/`. An empty cell was not measured.",
        tokenizer_tables(results),
        rows_table(results),
        loss_table(results),
        step_table(results),
        other_parts(results),
        gpu_loss_table(results),
        inference_table(results),
    ]
    return "\n" + "\n\n".join(part.strip("\n") for part in parts if part) + "\n\n"


# ---- the README's first screen -------------------------------------------------------------------


# What; bench, case and provider of ours; peers by the name that they get, here or in another case.
INT8, STEP = "ONNX Runtime int8", "Stage II: 6x256, V = 4928, 32 x 128"
HEADLINES = [
    ("6 x 256 student, int8: its file, one row of 128 pieces on one thread",
     "inference", "student 6x256, 1 x 128", INT8,
     {"BERT-base": ("BERT-base, 1 x 128", INT8), "MiniLM 6x384": ("MiniLM 6x384, 1 x 128", INT8)}),
    ("text to ids, one thread", "tokenizer", "plain documents, 1 thread, warm", "mvbert",
     {"nanotoken": "nanotoken", "TF Text": "TF Text FastBertTokenizer",
      "Hugging Face tokenizers": "HF encode_batch_fast"}),
    ("text to ids of two vocabularies, one thread",
     "tokenizer", "mixed documents, 1 thread, warm", "mvbert mixed",
     {"Hugging Face's splitter and a dict": "HF words + dict"}),
    ("text files to word ids on the disk, hashed", "corpus", "text to corpus, 2 threads", "mvbert",
     {"`datasets.map`, which also cuts the words": "datasets map"}),
    ("4,928 pieces learned from 32 MB of text, one thread",
     "vocab", "4928 pieces from 32 MB, 1 thread", "mvbert topdown",
     {"sentencepiece bpe": "sentencepiece bpe"}),
    ("masked training rows, one thread", "rows", "teacher rows, 1 thread", "mvbert",
     {"masking them in numpy": "numpy", "in transformers' collator": "HF words"}),
    ("training the student, 32 rows of 128 a step", "train_step", STEP, "mvbert",
     {"Hugging Face, bf16, torch.compile": "HF bf16, torch.compile",
      "Hugging Face's default": "HF"}),
    ("Hugging Face's own step after `fuse(model)`, bf16", "train_step", STEP, "HF bf16, fuse()d",
     {"before": "HF bf16", "after torch.compile instead": "HF bf16, torch.compile"}),
    ("cross-entropy over 30,522 pieces, width 384, 4,096 rows",
     "loss", "N=4096 V=30522 H=384", "mvbert",
     {"torch.compile": "torch.compile max-autotune", "Hugging Face": "HF head, eager"}),
]  # fmt: skip


def amount(record: dict) -> str:
    """What a headline says of a record."""
    parts = [figure(record[size]) + " MB" for size in ("megabytes", "peak_mb") if size in record]
    if "items_s" in record and record["unit"] in ("MB", "M pieces", "pieces"):
        return f"{figure(record['items_s'])} {record['unit']}/s"
    return ", ".join([*parts, f"{figure(median(record))} ms"])


def glance(results: Results) -> str:
    """The headlines, and what they were measured on."""
    rows = []
    for what, bench, case, provider, peers in HEADLINES:
        cases = by_case(results.of(bench, "cpu"))
        ours = cases.get(case, {}).get(provider)
        others = []
        for name, where in peers.items():
            at, peer = (case, where) if isinstance(where, str) else where
            record = cases.get(at, {}).get(peer)
            if record and (ratio := times(record, ours)):
                others.append(f"{name} {amount(record)} (**{ratio}**)")
        if others:
            rows.append([what, amount(ours), "; ".join(others)])
    run = results.run_of(results.of("tokenizer", "cpu"))
    gpu = "" if any(r["device"] == "cuda" for r in results.records) else ", no GPU so far"
    return (
        f"\n{table(['', 'mvbert', 'others, and how many times as long they take'], rows)}\n"
        f"{run['processor']}, {run['cores']} cores{gpu}; everything measured, also where others "
        "are faster: [speed and size](#speed-and-size).\n\n"
    )


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
    explained = ""
    for bench, title in TITLES.items():
        for device in ("cuda", "cpu"):
            records = results.of(bench, device)
            if not records:
                continue
            if explained != bench:
                explained = bench
                source = (ROOT / "bench" / f"bench_{bench}.py").read_text(encoding="utf-8")
                parts += [f"## {title}", ast.get_docstring(ast.parse(source)) or ""]
            parts.append(f"### {title}, {'GPU' if device == 'cuda' else 'CPU'}")
            cases = by_case(records)
            said = [f"{machine(results.run_of(records))}.", ceiling(records), faster_peers(records)]
            parts.append(" ".join(filter(None, said)))
            parts += [case_table(case, found) for case, found in cases.items()]
            parts.append(not_timed(cases))
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def ceiling(records: Sequence[dict]) -> str:
    """What this machine reached in the same run, if the bench has a floor."""
    rates = {(r["ceiling"]["matmul_tflop_s"], r["ceiling"]["copy_gb_s"])
             for r in records if "times_floor" in r}  # fmt: skip
    told = [f"{figure(product)} TFLOP/s, {figure(copy)} GB/s" for product, copy in sorted(rates)]
    return f"Ceilings: {'; '.join(told)}." if told else ""


def not_timed(cases: dict[str, dict[str, dict]]) -> str:
    """Who has no time and why; the cases only where it is not all."""
    found: dict[str, dict[str, list[str]]] = {}
    for case, records in cases.items():
        for provider, record in records.items():
            if "ms" not in record:
                kind = next(k for k in ("skipped", "wrong", "failed") if k in record)
                why = found.setdefault(f"{kind}: {record[kind]}", {})
                why.setdefault(provider, []).append(case)
    lines = []
    for why, providers in found.items():
        names = [
            p if len(where) == sum(p in r for r in cases.values()) else f"{p} ({', '.join(where)})"
            for p, where in providers.items()
        ]
        lines.append(f"- {why}: {'; '.join(names)}")
    return "\n".join(lines)


def case_table(case: str, found: dict[str, dict]) -> str:
    """All that is known of a case, a provider a line."""
    is_text = any("equal" in r or "text" in r for r in found.values())
    columns: list[tuple[str, Callable[[dict], str]]] = [
        ("ms", lambda r: span(r["ms"])),
        ("device ms", lambda r: span(r["device_ms"]) if "device_ms" in r else ""),
        ("a second", lambda r: f"{figure(r['items_s'])} {r['unit']}" if "items_s" in r else ""),
        ("TFLOP/s", lambda r: figure(r.get("tflop_s"))),
        ("GB/s", lambda r: figure(r.get("gb_s"))),
        ("of floor", lambda r: f"{r['times_floor']:.2f} x" if "times_floor" in r else ""),
        ("peak MB", lambda r: figure(r.get("peak_mb"))),
        ("of MB" if is_text else "file MB", lambda r: figure(r.get("megabytes"))),
        ("pieces a word", lambda r: figure(r.get("pieces_per_word"), 4)),
        (
            "share in BERT's",
            lambda r: f"{100 * r['in_teacher']:.3g} %" if "in_teacher" in r else "",
        ),
        ("equal ids", lambda r: f"{100 * r['equal']:.4g} %" if r.get("equal") is not None else ""),
        ("worst error", lambda r: f"{max(r['errors'].values()):.1e}" if r.get("errors") else ""),
        ("note", lambda r: r.get("note", "")),
    ]
    timed = [r for r in found.values() if "ms" in r]
    rows = [[r["provider"], *(cell(r) for _, cell in columns)] for r in timed]
    used = [i for i in range(len(columns) + 1) if any(row[i] for row in rows)]
    head = [case, *(name for name, _ in columns)]
    return table([head[i] for i in used], ([row[i] for i in used] for row in rows)) if rows else ""


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
    readme = wanted = README.read_text(encoding="utf-8")
    for name, section in (("glance", glance(results)), ("bench", readme_section(results))):
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
        marked = re.search(f"{begin}.*?{end}", wanted, re.S)
        if not marked:
            sys.exit(f"README.md has no lines {begin.strip()} and {end.strip()}")
        wanted = wanted.replace(marked[0], begin + section + end)
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
