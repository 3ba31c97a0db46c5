"""Measures block sizes on the device at hand and keeps the best: kernels/tuned.json.

    python bench/tune.py                    measure, print, write nothing
    python bench/tune.py --write            and keep what was found
    python bench/tune.py --only logits --only V30522

Each kernel runs alone at a real shape, once per candidate; a candidate is skipped if its result
differs from that of the rule in kernels/launch.py or if it does not fit the device. Most of the
time is compilation, done beforehand by several processes, which fill Triton's cache.
"""

import argparse
import concurrent.futures
import datetime
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from mvbert.kernels import launch, layer_norm, linear_cross_entropy, mixed_embedding, relation_kl
from mvbert.kernels.common import LossOptions, Need
from mvbert.kernels.linear import LinearRows, list_rows
from mvbert.kernels.linear_cross_entropy import Means
from mvbert.kernels.mixed_embedding import EmbeddingInputs

# Widths, and pieces of a vocabulary.
BERT_LARGE, BERT_BASE, DEMO_TEACHER, STUDENT_WIDTH = 1024, 768, 384, 256
TEACHER, STUDENT = 30522, 4928

Blocks = dict[str, int]
UNFIT = (
    triton.runtime.errors.OutOfResources,
    triton.runtime.errors.PTXASError,
    triton.CompilationError,
)
# A closure that runs the kernel and returns what it computed.
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One kernel at one shape; `prepare` is called with the candidate in force."""

    kernel: str
    dtype: torch.dtype
    shape: tuple[int, ...]  # N, or B, first
    candidates: tuple[Blocks, ...]
    prepare: Callable[[], Run]

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        letters = {4: "BTSD", 3: "NVH", 2: "NH"}[len(self.shape)]
        sizes = " ".join(f"{a}{b}" for a, b in zip(letters, self.shape, strict=True))
        return f"{self.kernel} {dtype} {sizes}"


# ---- what is tried -----------------------------------------------------------------------------


def _tiles(names: str, *tiles: tuple[int, ...]) -> tuple[Blocks, ...]:
    return tuple(dict(zip(names.split(), tile, strict=True)) for tile in tiles)


PRODUCTS = _tiles(
    "BLOCK_M BLOCK_N BLOCK_K num_warps num_stages GROUP",
    (128, 256, 64, 8, 3, 8), (128, 256, 64, 8, 4, 8), (128, 256, 64, 8, 3, 16),
    (128, 256, 32, 8, 4, 8), (256, 128, 64, 8, 3, 8), (256, 128, 64, 8, 4, 8),
    (128, 128, 64, 8, 3, 8), (128, 128, 64, 8, 4, 8), (128, 128, 64, 8, 4, 16),
    (128, 128, 64, 4, 3, 8), (128, 128, 64, 4, 4, 8), (128, 128, 128, 8, 2, 8),
    (64, 256, 64, 4, 3, 8), (64, 256, 64, 4, 4, 8), (64, 128, 64, 4, 4, 8),
)  # fmt: skip
FLASH = _tiles(
    "BLOCK_M BLOCK_V num_warps num_stages",
    (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (64, 32, 4, 4), (32, 64, 4, 2),
    (64, 64, 8, 2), (64, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3),
)  # fmt: skip
RELATIONS = _tiles(
    "BLOCK_M BLOCK_N num_warps num_stages",
    (64, 32, 4, 1), (64, 32, 4, 2), (128, 32, 8, 1), (64, 64, 8, 1), (64, 16, 4, 1),
    (128, 32, 4, 1), (128, 64, 8, 1), (32, 32, 4, 1), (32, 64, 4, 1),
)  # fmt: skip
ELEMENTWISE = _tiles(
    "BLOCK_M BLOCK_V STEPS num_warps",
    (8, 512, 8, 4), (8, 512, 16, 4), (8, 512, 4, 4), (4, 512, 16, 4), (4, 1024, 16, 4),
    (8, 1024, 8, 8), (16, 512, 4, 8), (4, 512, 8, 2), (16, 256, 4, 4), (2, 1024, 16, 4),
)  # fmt: skip


def _with_splits(blocks: tuple[Blocks, ...], splits: tuple[int, ...]) -> tuple[Blocks, ...]:
    """The given tiles, and the first three of them with each number of parts too."""
    return blocks + tuple(b | {"splits": s} for b in blocks[:3] for s in splits)


def _rows(H: int, programs: tuple[int, ...] = ()) -> tuple[Blocks, ...]:
    tiles = [
        {"ROWS": rows, "num_warps": warps}
        for rows in (1, 2, 4, 8)
        for warps in (1, 2, 4, 8)
        if 4 <= rows * triton.next_power_of_2(H) // (32 * warps) <= 32
    ]
    return tuple(t | {"programs": p} for t in tiles for p in programs) or tuple(tiles)


# ---- how each kernel is run alone --------------------------------------------------------------


def _loss_inputs(N: int, V: int, H: int, dtype: torch.dtype, device: str):
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device}
    hidden = torch.randn(N, H, **options).to(dtype)
    weight = (torch.randn(V, H, **options) * 0.05).to(dtype)
    bias = torch.randn(V, **options).to(dtype)
    labels = torch.randint(0, V, (N,), **options)
    return hidden, weight, bias, labels


def loss_cases(N: int, V: int, H: int, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """The products and the pass between them, or the two kernels without logits."""
    inputs = _loss_inputs(N, V, H, dtype, device)
    return (_flash_cases if launch.flash(inputs[0]) else _product_cases)(*inputs)


def _flash_cases(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Iterator[Case]:
    (N, H), V = hidden.shape, len(weight)
    dtype, shape, one = hidden.dtype, (N, V, H), torch.ones((), device=hidden.device) / N

    def flash(need: Need) -> Callable[[], Run]:
        def run() -> Tensor:
            _, _, _, dhidden, dweight, _ = linear_cross_entropy.cross_entropy(
                hidden, weight, bias, labels, LossOptions(), one, None, need
            )
            return dweight if need.weight else dhidden

        return lambda: run

    # The other kernel runs too and is the same for every candidate.
    yield Case("flash_fwd", dtype, shape, _with_splits(FLASH, (1, 2, 4, 8)), flash(Need(True)))
    candidates = _with_splits(FLASH[::-1] + FLASH[:3], (2, 4, 8))
    yield Case("flash_dweight", dtype, shape, candidates, flash(Need(weight=True)))


def _product_cases(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Iterator[Case]:
    (N, H), V, device = hidden.shape, len(weight), hidden.device
    dtype, shape, one = hidden.dtype, (N, V, H), torch.ones((), device=device) / N

    def linear(library: bool = False) -> LinearRows:
        return LinearRows(hidden, weight, bias, *list_rows(labels, -100), library)

    def logits() -> Run:
        rows, lse = linear(), torch.zeros(N, device=device)
        target = torch.zeros_like(lse)

        def run() -> Tensor:
            rows.logits(0, lse=lse, store=True, labels=labels, target=target)
            return lse

        return run

    def dlogits() -> Run:
        rows, lse = linear(), torch.zeros(N, device=device)
        rows.logits(0, lse=lse, store=True, labels=labels, target=torch.zeros_like(lse))
        backup = rows.buffer.clone()

        def run() -> Tensor:
            return linear_cross_entropy.cross_entropy_dlogits(
                rows, 0, rows.buffer, labels, lse, one, None, LossOptions(), Means(lse, lse, lse),
                False, True,
            ).sum(0)  # fmt: skip

        run()
        rows.buffer.copy_(backup)
        return run

    def upstream(rows: LinearRows) -> Tensor:
        generator = torch.Generator(device).manual_seed(1)
        z = torch.randn(rows.chunk, rows.pitch, generator=generator, device=device).to(dtype)
        z[:, V:] = 0
        return z

    def dx(library: bool) -> Callable[[], Run]:
        def prepare() -> Run:
            rows = linear(library)
            z, out = upstream(rows), torch.empty_like(hidden)

            def run() -> Tensor:
                rows.dx(0, z, one, out)
                return out

            return run

        return prepare

    def dweight(start: int, library: bool) -> Callable[[], Run]:
        def prepare() -> Run:
            rows = linear(library)
            z, out = upstream(rows), rows.new_dweight(dtype)
            if start:
                # As in a second chunk: added to what is there, in float32.
                out = torch.zeros(V, H, device=device)
                rows.N = rows.N + start
            whole = torch.cat([rows.x, rows.x]) if start else rows.x

            def run() -> Tensor:
                rows.x = whole
                rows.dweight(start, z, one, out)
                return out

            return run

        return prepare

    yield Case("logits", dtype, shape, PRODUCTS, logits)
    yield Case("elementwise", dtype, shape, ELEMENTWISE, dlogits)
    yield Case("dx", dtype, shape, PRODUCTS, dx(False))
    yield Case("dweight", dtype, shape, PRODUCTS, dweight(0, False))
    yield Case("dweight_add", dtype, shape, PRODUCTS, dweight(N, False))
    if dtype == launch.LIBRARY_DTYPE:
        either = ({"library": 1}, {"library": 0})
        yield Case("dx_library", dtype, shape, either, dx(True))
        yield Case("dweight_library", dtype, shape, either, dweight(0, True))


def embedding_cases(B: int, T: int, H: int, V: int, dtype: torch.dtype, device: str):
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device}
    # Frequencies fall like 1 / rank, as words' do.
    rank = torch.exp(torch.rand(B, T, **options) * torch.log(torch.tensor(float(V)))).long() - 1
    ids = rank.clamp(0, V - 1).int()
    ids[torch.rand(B, T, **options) < 0.12] = 103 % V
    tables = [torch.randn(n, H, **options).to(dtype) for n in (V, 512, 2)]
    types = torch.zeros(B, T, dtype=torch.uint8, device=device)
    vector = torch.ones(H, dtype=dtype, device=device)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    upstream = torch.randn(B, T, H, **options).to(dtype)
    inputs = EmbeddingInputs(ids, tables[0], None, *tables[1:], types, None, vector, vector)

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        return mixed_embedding.mixed_embedding_fwd(inputs, 1e-12, 0.1, seed)

    def backward() -> Run:
        _, mean, rstd = forward()
        return lambda: mixed_embedding.mixed_embedding_bwd(
            upstream, inputs, mean, rstd, 0.1, seed, 0, [103 % V], False, [True, False, True, True]
        )[0]

    programs = tuple(launch.multiprocessors(torch.device(device)) * n for n in (4, 8, 16))
    shape = (B * T, H)
    yield Case("embedding_fwd", dtype, shape, _rows(H), lambda: lambda: forward()[0])
    yield Case("embedding_bwd", dtype, shape, _rows(H, programs), backward)


def layer_norm_cases(N: int, H: int, dtype: torch.dtype, device: str):
    generator = torch.Generator(device).manual_seed(0)
    # As in a step under autocast: what products read and write in `dtype`, sums in float32.
    r, dy, x = (torch.randn(N, H, generator=generator, device=device) for _ in range(3))
    x = x.to(dtype)
    vector = torch.ones(H, device=device)
    seed = torch.zeros(1, dtype=torch.int64, device=device)

    def forward():
        return layer_norm.residual_layer_norm_fwd(x, r, vector, vector, 1e-12, 0.1, seed, True)

    def backward() -> Run:
        _, _, total, mean, rstd = forward()
        return lambda: layer_norm.residual_layer_norm_bwd(
            dy, total, vector, mean, rstd, 0.1, seed, dtype, x
        )[1]

    programs = tuple(launch.multiprocessors(torch.device(device)) * n for n in (2, 4, 8))
    yield Case("layer_norm_fwd", r.dtype, (N, H), _rows(H), lambda: lambda: forward()[0])
    yield Case("layer_norm_bwd", r.dtype, (N, H), _rows(H, programs), backward)


def relation_cases(B: int, T: int, H: int, H_t: int, R: int, dtype: torch.dtype, device: str):
    generator = torch.Generator(device).manual_seed(0)
    x, y = (
        torch.randn(B, T, 3 * W, generator=generator, device=device).to(dtype) for W in (H, H_t)
    )
    shape = (B, T, H // R, H_t // R)

    def gradient() -> Tensor:
        return relation_kl.relation_kl(x, y, R, True)[1]

    yield Case("relation_kl", dtype, shape, RELATIONS, lambda: gradient)


def real_cases() -> Iterator[Case]:
    """The shapes of BERT-large, BERT-base, the demo's teacher and the student."""
    dtype, device = torch.bfloat16, "cuda"
    for N, V, H in (
        (4096, TEACHER, BERT_LARGE), (4096, TEACHER, BERT_BASE), (4096, TEACHER, DEMO_TEACHER),
        (4096, STUDENT, BERT_LARGE), (4096, STUDENT, STUDENT_WIDTH),
        (16384, STUDENT, STUDENT_WIDTH),
    ):  # fmt: skip
        yield from loss_cases(N, V, H, dtype, device)
    mixed = TEACHER + STUDENT
    for H, V in ((BERT_LARGE, mixed), (BERT_BASE, mixed), (STUDENT_WIDTH, STUDENT)):
        for tables in (torch.float32, dtype):  # the first is what training has
            yield from embedding_cases(256, 128, H, V, tables, device)
        yield from layer_norm_cases(32768, H, dtype, device)
    for H_t in (DEMO_TEACHER, BERT_BASE, BERT_LARGE):
        yield from relation_cases(256, 128, STUDENT_WIDTH, H_t, 32, dtype, device)


# ---- measuring ---------------------------------------------------------------------------------


def on_device(run: Run) -> float:
    """Median microseconds, the cache emptied before each run."""
    return 1e3 * triton.testing.do_bench(run, warmup=10, rep=60, return_mode="median")


def try_one(case: Case, blocks: Blocks) -> Tensor:
    """What the case computes with these blocks; raises where they do not fit."""
    launch.FORCED.clear()
    if blocks:
        launch.FORCED[case.kernel] = blocks
    try:
        return case.prepare()().float()
    finally:
        launch.FORCED.clear()


def tune(case: Case, measure: Callable[[Run], float], report=print) -> dict | None:
    """The entry for tuned.json, or None where no candidate beats the rule by 2 %."""
    truth = try_one(case, {})
    best, times = None, {}
    for blocks in ({}, *case.candidates):
        try:
            output = try_one(case, blocks)
        except UNFIT as error:
            report(f"  {blocks}: {type(error).__name__}")
            continue
        error = ((output - truth).norm() / truth.norm().clamp_min(1e-30)).item()
        if not error < 2**-6:
            report(f"  {blocks}: WRONG by {error:.2g}")
            continue
        if blocks:
            launch.FORCED[case.kernel] = blocks
        try:
            microseconds = measure(case.prepare())
        finally:
            launch.FORCED.clear()
        times[json.dumps(blocks)] = microseconds
        report(f"  {microseconds:9.1f} us  {blocks or 'the rule'}")
        if blocks and microseconds < times.get(json.dumps(best or {}), float("inf")):
            best = blocks
    rule = times[json.dumps({})]
    if best is None or times[json.dumps(best)] > 0.98 * rule:
        report(f"{case.name}: {rule:.1f} us, the rule stands")
        return None
    report(f"{case.name}: {rule:.1f} -> {times[json.dumps(best)]:.1f} us  {best}")
    return {
        "kernel": case.kernel,
        "dtype": str(case.dtype).removeprefix("torch."),
        "shape": list(case.shape),
        "blocks": best,
        "us": round(times[json.dumps(best)], 1),
        "rule_us": round(rule, 1),
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
    }


def keep(device: str, entries: list[dict]) -> None:
    """Puts entries into tuned.json, in the place of older ones of the same kernel and shape."""
    devices = (
        json.loads(launch.TUNED.read_text("utf-8"))["devices"] if launch.TUNED.exists() else {}
    )

    def key(entry: dict) -> tuple:
        return entry["kernel"], entry["dtype"], tuple(entry["shape"])

    merged = {key(e): e for e in devices.get(device, [])} | {key(e): e for e in entries}
    devices[device] = [merged[k] for k in sorted(merged)]
    lines = [
        f"  {json.dumps(name)}: [\n"
        + ",\n".join(f"   {json.dumps(entry)}" for entry in group)
        + "\n  ]"
        for name, group in sorted(devices.items())
    ]
    launch.TUNED.write_text('{"devices": {\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")


def _select(only: list[str]) -> Iterator[Case]:
    for case in real_cases():
        if all(part in case.name for part in only):
            yield case


def _compile(only: list[str], share: int, processes: int) -> int:
    """Runs every `processes`-th candidate once, for the sake of Triton's cache."""
    count = 0
    for case in _select(only):
        for blocks in ({}, *case.candidates):
            count += 1
            if count % processes == share:
                try:
                    try_one(case, blocks)
                except UNFIT:
                    continue
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--write", action="store_true", help="keep the result in tuned.json")
    parser.add_argument("--only", action="append", default=[], help="part of a case's name")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("the tuner measures a CUDA device, and there is none here", file=sys.stderr)
        return 2
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        done = [pool.submit(_compile, args.only, share, args.jobs) for share in range(args.jobs)]
        counts = {future.result() for future in done}
    print(f"{counts.pop()} candidates compiled on {args.jobs} processes", flush=True)
    entries = []
    for case in _select(args.only):
        entry = tune(case, on_device, lambda line: print(line, flush=True))
        if entry is not None:
            entries.append(entry)
            if args.write:  # at once: the time on a device may end any moment
                keep(torch.cuda.get_device_name(), [entry])
    print(json.dumps({"device": torch.cuda.get_device_name(), "entries": entries}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
