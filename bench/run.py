"""Runs benches: ours beside every peer that is installed, each result appended as one JSON line.

    python bench/run.py                              # everything that runs on this machine
    python bench/run.py loss embedding --quick       # some, in a minute or two
    python bench/run.py tokenizer --only mvbert "HF encode_batch_fast" --no-output
    python bench/run.py --list

harness.py describes the method, bench/results has the records, tables.py writes the tables of the
README and the docs. The last line of stdout is one JSON object: what ran, was skipped or wrong.
"""

import argparse
import importlib
import json
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

import harness
import memory
import reporting

ORDER = ("tokenizer", "vocab", "rows", "collator", "embedding", "loss", "kl", "relations",
         "train_step", "trainer", "finetune", "inference", "sentences")  # fmt: skip


def names() -> list[str]:
    """The name of every bench_<name>.py beside this file, in the order of the data path."""
    return sorted(
        (file.stem.removeprefix("bench_") for file in Path(__file__).parent.glob("bench_*.py")),
        key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER),
    )


def load(name: str) -> harness.Bench:
    """Imports one bench: those of the kernels need no C++ extension."""
    return importlib.import_module(f"bench_{name}").BENCH


def main() -> None:
    # Before torch or a peer starts its threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    known = names()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="BENCH", help=", ".join(known))
    parser.add_argument("--list", action="store_true", help="cases and providers, nothing is run")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "PROVIDER"), help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--quick", action="store_true", help="fewer cases and shorter rounds")
    parser.add_argument("--only", nargs="+", default=(), metavar="PROVIDER")
    parser.add_argument(
        "--without", nargs="+", action="extend", default=[], metavar="PROVIDER",
        help="what to leave out",
    )  # fmt: skip
    parser.add_argument("--toy", action="store_true", help="one small case: does it run at all?")
    parser.add_argument("--budget", type=float, help="seconds for the rounds of one case")
    parser.add_argument(
        "--output", type=Path, default=harness.RESULTS,
        help="folder or .jsonl file to append to (default: bench/results)",
    )  # fmt: skip
    parser.add_argument("--no-output", action="store_true", help="write nothing")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in known]
    if unknown:
        parser.error(f"no bench is called {unknown[0]!r}; there are {', '.join(known)}")
    benches = [load(name) for name in args.names or known]
    if args.device is None or args.device == "cuda":
        import torch

        if args.device == "cuda" and not torch.cuda.is_available():
            parser.error("torch sees no CUDA device here")
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.list:
        for bench in benches:
            print(bench.name)
            for case in bench.cases(args.device, args.quick):
                print(f"    case      {reporting.label(case)}")
            for provider in bench.providers:
                needs = f"  needs {', '.join(provider.needs)}" if provider.needs else ""
                print(f"    provider  {provider.name}{needs}")
        return
    if args.peak:
        peak(benches[0], int(args.peak[0]), args.peak[1])
        return
    run = reporting.run_record(benches, args.device, args.quick, args.only)
    emit = reporting.appender(None if args.no_output else args.output, run)
    settings = harness.Settings(**{f.name: getattr(args, f.name) for f in fields(harness.Settings)})
    records = []
    for bench in benches:
        try:
            records += harness.run_bench(bench, settings, emit)
        except harness.DeviceLost as lost:
            restart(str(lost))
        emit({"record": "end", "bench": bench.name})
    print(json.dumps(outcome(run, records)))
    ours = [r for r in records if r["provider"].startswith("mvbert")]
    if any("wrong" in r or "failed" in r for r in ours):
        sys.exit("mvbert is wrong or failed somewhere above")


def restart(provider: str) -> NoReturn:
    """Restarts this command without a peer that lost the CUDA context."""
    if provider.startswith("mvbert"):
        sys.exit(f"{provider} lost the CUDA context")
    print(f"{provider} lost the CUDA context: restarting without it", flush=True)
    os.execv(sys.executable, [sys.executable, *sys.argv, "--without", provider])


def outcome(run: dict, records: list[dict]) -> dict:
    """Which providers were timed, and which were not and why."""
    missing = {}
    for record in records:
        if "ms" not in record:
            missing[f"{record['bench']}: {record['provider']}"] = reporting.reason(record)
    return {"run": run["run"], "timed": sum("ms" in r for r in records), "not timed": missing}


def peak(bench: harness.Bench, number: int, name: str) -> None:
    """The child process of `memory.cpu_peak`."""
    import torch

    torch.set_num_threads(bench.threads or torch.get_num_threads())
    case = bench.cases("cpu", False)[number]
    provider = next(provider for provider in bench.providers if provider.name == name)
    run = provider.make(case, "cpu")
    mb = memory.cpu_peak_here(run, bench.inputs(case, "cpu", 0))
    harness.close(run)
    print(json.dumps({"peak_mb": mb}))


if __name__ == "__main__":
    main()
