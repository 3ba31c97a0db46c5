"""The work of gpu_train.sh, which says what it does: one job of `mvbert distill`, packed."""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from gpu_check import PYTHON, ROOT, device, environment

PART = 15 << 20  # bytes
SUMS = "SHA256SUMS"
PACKING = 0.4  # minutes kept for what comes after training

# Rates, rows and losses for a GPU; both numbers of pieces are the most that is trained.
JOB = """
teacher = {teacher}
out = {out}
minutes = {minutes}
[corpus]
text = {text}
heldout_text = {heldout}
heldout_share = 0.01
[vocab]
size = {vocab}
[row]
length = {length}
[stage1]
pieces = {stage1}
rows = {rows}
dtype = "{dtype}"
lr = 3e-4
dropout = 0.0
embedding_size = {H}
eval_every = 500
eval_rows = {eval_rows}
save_every = 1000000
[stage2]
pieces = {stage2}
shape = "{layers}x{H}"
start = {start}
rows = {rows}
dtype = "{dtype}"
lr = 2e-3
warmup = 0.02
relation_heads = {heads}
distill = ["relations", "logits", "hidden"]
eval_every = 2000
eval_rows = {eval_rows}
save_every = 1000000
"""
FULL = {"vocab": 4928, "length": 128, "rows": 512, "eval_rows": 2048,
        "layers": 6, "H": 256, "heads": 32, "dtype": "bfloat16"}  # fmt: skip
TOY = {
    "vocab": 90,
    "length": 16,
    "rows": 8,
    "eval_rows": 8,
    "layers": 1,
    "H": 64,
    "heads": 8,
    "dtype": "float32",
}


def job(args: argparse.Namespace, work: Path, minutes: float) -> str:
    """The settings of the job, as TOML."""
    start = "stage1"
    if args.start:
        start = str(unpack(args.start, work / "start"))
    teacher = Path(args.teacher).resolve() if Path(args.teacher).exists() else args.teacher
    values = {
        "teacher": str(teacher), "out": str(work / "run"), "minutes": minutes,
        "text": [str(file.resolve()) for file in args.text], "start": start,
        "heldout": [str(args.heldout.resolve())] if args.heldout else [],
        "stage1": 1024 if args.dry_run else args.stage1,
        "stage2": 2048 if args.dry_run else args.stage2,
    }  # fmt: skip
    sizes = TOY if args.dry_run else FULL
    return JOB.format(**{name: json.dumps(value) for name, value in values.items()}, **sizes)


def pack(folder: Path, out: Path) -> list[Path]:
    """A folder as student.tar.00, .01, ... in `out`, with their SHA-256."""
    whole = out / "student.tar"
    with tarfile.open(whole, "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, file.name)
    parts, sums = [], []
    with whole.open("rb") as stream:
        while data := stream.read(PART):
            parts.append(out / f"student.tar.{len(parts):02d}")
            parts[-1].write_bytes(data)
            sums.append(f"{hashlib.sha256(data).hexdigest()}  {parts[-1].name}\n")
    whole.unlink()
    (out / SUMS).write_text("".join(sums))
    return parts


def unpack(packed: Path, folder: Path) -> Path:
    """What `pack` left, as a folder again; refuses parts that are missing or damaged."""
    if not (packed / SUMS).is_file():
        sys.exit(f"{packed} has no {SUMS}; expected OUT of an earlier call")
    whole = folder.with_suffix(".tar")
    with whole.open("wb") as stream:
        for line in (packed / SUMS).read_text().splitlines():
            expected, name = line.split()
            part = packed / name
            data = part.read_bytes() if part.is_file() else b""
            if hashlib.sha256(data).hexdigest() != expected:
                sys.exit(f"{part} is missing or damaged: its SHA-256 is not that in {SUMS}")
            stream.write(data)
    with tarfile.open(whole) as tar:
        # (Filters came with Python 3.11.4 and 3.10.12; before, the attribute says nothing.)
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(folder)
    whole.unlink()
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench/gpu_train.sh", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--heldout", type=Path)
    parser.add_argument("--start", type=Path, help="OUT of an earlier call, to continue")
    parser.add_argument("--stage1", type=int, default=200_000_000, help="pieces")
    parser.add_argument("--stage2", type=int, default=3_000_000_000, help="pieces")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--dry-run", action="store_true", help="a toy, on a CPU too")
    args = parser.parse_args()
    begin = time.monotonic()
    cuda, name = device()
    if not cuda and not args.dry_run:
        sys.exit(f"no CUDA device ({name}); --dry-run shows that the rest works")
    args.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="mvbert-train-"))
    try:
        env = environment(work / "site")
        if not args.dry_run:
            build = [PYTHON, "setup.py", "build_ext", "--inplace"]
            subprocess.run(build, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
        minutes = args.minutes - PACKING - (time.monotonic() - begin) / 60
        (work / "job.toml").write_text(job(args, work, minutes))
        train = [PYTHON, "-m", "mvbert", "distill", str(work / "job.toml")]
        with (args.out / "log.txt").open("wb") as log:
            done = subprocess.run(train, cwd=work, env=env, stdout=log, stderr=subprocess.STDOUT)
        for stage, run in (("stage1", "stage1"), ("stage2", "arms/student")):
            if (work / "run" / run / "log.jsonl").is_file():
                shutil.copy(work / "run" / run / "log.jsonl", args.out / f"{stage}.jsonl")
        if done.returncode:
            print((args.out / "log.txt").read_text()[-4000:])
            sys.exit(f"mvbert distill ended with {done.returncode}")
        shutil.copy(work / "run" / "report.json", args.out)
        pack(work / "run" / "arms" / "student" / "model", args.out)
        report = json.loads((work / "run" / "report.json").read_text())
        print(f"{name}: {report['pieces']}, {report['arms']}, {time.monotonic() - begin:.0f} s")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
