"""Stage I and Stage II for a minute each, and a profile of both: a part of gpu_check.

    python bench/gpu_stages.py prepare WORK [--text FILE] [--vocab FILE] [--toy]
    python bench/gpu_stages.py train WORK --stage 1 --seconds 60 --report OUT/stage1.json
    python bench/gpu_stages.py profile WORK --stage 2 --report OUT/profile2.json

The text is real; the Stage I teacher has BERT-large's shape and random weights, which cost as much
as trained ones. Stage II trains the 6 x 256 student by masked language modelling alone, from a
Stage I of two steps with a small teacher, so that it does not wait for the large one. All runs use
the command line.
"""

import argparse
import contextlib
import json
import lzma
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LARGE, SMALL = (24, 1024, 16), (2, 128, 2)  # layers, H, heads
NEVER = 10**9


def mvbert(*args) -> None:
    """`mvbert ARGS` in this process; raises SystemExit where that exits with anything but 0."""
    from mvbert.cli import main

    try:
        code = main([str(arg) for arg in args])
    except SystemExit as ended:
        code = ended.code
    if code:
        sys.exit(code)


def prepare(work: Path, text: Path | None, vocab: Path | None, toy: bool) -> None:
    """Corpus, vocabularies, a large and a small teacher, and a Stage I run of two steps."""
    work.mkdir(parents=True, exist_ok=True)
    if text is None:
        from mvbert.text.docstrings import docstring_corpus

        text = work / "docstrings.txt"
        docstring_corpus(text, ["stdlib"] if toy else ["stdlib", "torch", "numpy"])
    if toy:
        whole = lzma.open(text) if text.suffix == ".xz" else text.open("rb")  # noqa: SIM115
        with whole:
            beginning = whole.read(100_000).decode(errors="ignore")
        text = work / "toy.txt"
        text.write_text(beginning, encoding="utf-8")
    mvbert("corpus", text, "-o", work / "corpus", "--overwrite")
    size = ["--size", 300 if toy else 4928, "--overwrite"]
    mvbert("vocab", work / "corpus", "-o", work / "vocab.txt", *size)
    if vocab is None or toy:
        vocab = work / "teacher-vocab.txt"
        size[1] = 600 if toy else 8000  # what a few megabytes of text give
        mvbert("vocab", work / "corpus", "-o", vocab, *size)
    make_teacher(work / "large", SMALL if toy else LARGE, vocab)
    make_teacher(work / "small", SMALL, vocab)
    short = ["--steps", 2, "--rows", 8, "--eval-rows", 8]
    mvbert("train", *stage1(work, work / "small"), *short, "-o", work / "seed")


def make_teacher(folder: Path, shape: tuple[int, int, int], vocab_file: Path) -> None:
    """A Hugging Face folder of that shape with BERT's initial weights."""
    from mvbert.config import ModelConfig
    from mvbert.model.huggingface import write_model
    from mvbert.model.masked_lm import MaskedLM
    from mvbert.text.vocab import Vocab

    vocab = Vocab.load(vocab_file, lowercase=True)
    layers, H, heads = shape
    model = MaskedLM(ModelConfig(vocab.size, H, layers, heads, 4 * H))
    model.init_weights(0)
    folder.mkdir(exist_ok=True)
    write_model(folder, model, vocab, "")


def stage1(work: Path, teacher: Path) -> list:
    return ["--stage", 1, "--corpus", work / "corpus", "--teacher", teacher,
            "--student-vocab", work / "vocab.txt"]  # fmt: skip


def command(work: Path, stage: int, out: Path, toy: bool) -> list:
    """The arguments of `mvbert train` for a stage at full speed."""
    args = [*stage1(work, work / "large")] if stage == 1 else [
        "--stage", 2, "--corpus", work / "corpus", "--stage1", work / "seed", "--distill",
    ]  # fmt: skip
    rows = 4 if toy else {1: 256, 2: 1024}[stage]
    args += ["--rows", rows, "--eval-rows", 8, "--eval-every", NEVER, "--save-every", NEVER]
    args += ["--warmup", 0, "--row.length", 32 if toy else 128]
    return ["train", *args, "-o", out]


def train(work: Path, stage: int, seconds: float, compiled: bool, toy: bool) -> dict:
    """Trains for `seconds`, start-up included (a toy: 3 steps); returns the speeds of its log."""
    out = work / f"stage{stage}-{time.time_ns()}"
    limits = ["--max-hours", seconds / 3600, "--steps", NEVER, "--log-every", 10]
    if toy:
        limits = ["--steps", 3, "--log-every", 1]
    args = [*command(work, stage, out, toy), *limits, *["--compile"] * compiled]
    facts: dict = {"stage": stage, "compiled": compiled, "exit": None}
    with contextlib.suppress(KeyboardInterrupt):  # late: the log has what was measured so far
        done = subprocess.run([sys.executable, "-m", "mvbert", *map(str, args)], check=False)
        facts["exit"] = done.returncode
    log = out / "log.jsonl"
    whole = log.read_text().split("\n")[:-1] if log.exists() else []
    lines = [line for line in map(json.loads, whole) if "pieces_per_second" in line]
    facts["log_lines"] = len(lines)
    if lines:
        steady = lines[len(lines) // 3 :]  # compiling and capturing come first
        for name in ("pieces_per_second", "mfu", "data_wait"):
            values = [line[name] for line in steady if line.get(name) is not None]
            facts[name] = statistics.median(values) if values else None
        facts["first"], facts["last"] = lines[0], lines[-1]
    shutil.rmtree(out, ignore_errors=True)  # gigabytes, of a large teacher
    return facts


def profile(work: Path, stage: int, toy: bool) -> dict:
    """The kernels of a short run by time, the largest first."""
    import torch
    from torch.profiler import ProfilerActivity

    cuda = torch.cuda.is_available()
    out = work / f"profile{stage}-{time.time_ns()}"
    steps = 2 if toy else 24
    args = [*command(work, stage, out, toy), "--steps", steps, "--log-every", steps]
    kinds = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as profiler:
        mvbert(*args)
    attribute = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = [(e.key, getattr(e, attribute), e.count) for e in profiler.key_averages()]
    # The checkpoint's copies to the host are no part of a step.
    events = [e for e in events if e[1] > 0 and not e[0].startswith(("Memcpy DtoH", "Memcpy HtoD"))]
    shutil.rmtree(out, ignore_errors=True)
    total = sum(e[1] for e in events) or 1.0
    events.sort(key=lambda e: -e[1])
    top = [
        {"name": name[:120], "share": round(time / total, 4), "us": round(time), "calls": count}
        for name, time, count in events[:25]
    ]
    return {"stage": stage, "steps": steps, "us": round(total), "top": top}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("prepare", "train", "profile"))
    parser.add_argument("work", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--vocab", type=Path)
    parser.add_argument("--stage", type=int, choices=(1, 2))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    if args.what == "prepare":
        prepare(args.work, args.text, args.vocab, args.toy)
        return
    if args.what == "train":
        facts = train(args.work, args.stage, args.seconds, args.compile, args.toy)
    else:
        facts = profile(args.work, args.stage, args.toy)
    print(json.dumps(facts))
    if args.report:
        args.report.write_text(json.dumps(facts, indent=1) + "\n")
    if args.what == "train" and not facts["log_lines"]:
        sys.exit("the run logged nothing")


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
