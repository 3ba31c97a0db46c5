"""Compiles every kernel at the real shapes, without a device, and checks registers and spills.

    python bench/aot.py             compile, print, compare with aot.json
    python bench/aot.py --write     record the current state
    python bench/aot.py --arch 90 --only flash

The launchers run on `meta` tensors of the real shapes with the launch itself replaced by a
recorder, so what is compiled is exactly what would be launched: same block sizes, same
specialisation of arguments. Of the machine code it reads registers, stack (local memory: a spill),
shared memory, 16-byte loads and the matrix instruction.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from mvbert.kernels import (
    launch,
    layer_norm,
    linear_cross_entropy,
    linear_kl,
    mixed_embedding,
    relation_kl,
)
from mvbert.kernels.common import LossOptions, Need
from mvbert.kernels.mixed_embedding import EmbeddingInputs

RECORD = Path(__file__).parent / "aot.json"
ARCHS = (80, 90, 100)
TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One variant of a kernel: types, divisibility and constants of its arguments."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, int], ...]

    def compile(self, arch: int):
        names = self.kernel.arg_names
        return triton.compile(
            ASTSource(
                self.kernel,
                dict(self.signature),
                dict(self.constants),
                {(names.index(n),): [["tt.divisibility", 16]] for n in self.divisible},
            ),
            target=GPUTarget("cuda", arch, 32),
            options=dict(self.options),
        )


def record(launches: Callable[[], None]) -> list[Launch]:
    """The launches that `launches` makes, in order, without making them."""
    variants: list[Launch] = []

    def run(kernel, *args, grid, warmup, **kwargs):
        options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        signature, constants, divisible = {}, {}, []
        for parameter in kernel.params:
            name, value = parameter.name, arguments[parameter.name]
            if parameter.is_constexpr:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, Tensor):
                # The allocator aligns every block; views into one start where a row does.
                signature[name] = "*" + TYPES[value.dtype]
                divisible.append(name)
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif value == 1:
                signature[name], constants[name] = "constexpr", 1
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0:
                    divisible.append(name)
        variant = Launch(
            kernel, tuple(signature.items()), tuple(constants.items()), tuple(divisible),
            tuple(options.items()),
        )  # fmt: skip
        if variant not in variants:
            variants.append(variant)

    original, JITFunction.run = JITFunction.run, run
    try:
        launches()
    finally:
        JITFunction.run = original
    return variants


# ---- the real shapes ---------------------------------------------------------------------------


def meta(*shape: int, dtype=torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cross_entropy_case(
    N, H, V, rows: bool = False, smoothing=0.0, dtype=torch.bfloat16, mostly_labelled=False,
    weighted=False, softcap=0.0, z_loss=False, predict=False,
):  # fmt: skip
    hidden, weight, bias = (meta(*shape, dtype=dtype) for shape in ((N, H), (V, H), (V,)))
    labels = meta(N, dtype=torch.int64)
    up = meta(*([N] if rows else []), dtype=torch.float32)
    lse = meta(N, dtype=torch.float32) if rows else None
    options = LossOptions(
        -100, smoothing, meta(V, dtype=torch.float32) if weighted else None, softcap,
        meta(dtype=torch.float32) if z_loss else None, predict,
    )  # fmt: skip
    for upstream in ((up, lse, Need(True, True, True), mostly_labelled), (None, None, Need())):
        linear_cross_entropy.cross_entropy(hidden, weight, bias, labels, options, *upstream)


def kl_case(N: int, H: int, H_t: int, V: int):
    up, mask = meta(dtype=torch.float32), meta(N, dtype=torch.bool)
    linear_kl.kl(
        meta(N, H), meta(V, H), meta(V), meta(N, H_t), meta(V, H_t), meta(V), mask, 2.0, up,
        Need(True, True, True),
    )  # fmt: skip


def embedding_case(B: int, T: int, H: int, V_t: int, V_s: int):
    ids, types = meta(B, T, dtype=torch.int32), meta(B, T, dtype=torch.uint8)
    teacher = meta(V_t, H) if V_t else None
    student = meta(V_s, H) if V_s else None
    position, kind = meta(512, H), meta(2, H)
    vector, seed = meta(H), meta(1, dtype=torch.int64)
    inputs = EmbeddingInputs(ids, teacher, student, position, kind, types, None, vector, vector)
    _, mean, rstd = mixed_embedding.mixed_embedding_fwd(inputs, 1e-12, 0.1, seed)
    frequent = [103, V_t + 4] if V_t and V_s else [4]
    need = [table is not None for table in inputs.tables]
    mixed_embedding.mixed_embedding_bwd(
        meta(B, T, H), inputs, mean, rstd, 0.1, seed, 0, frequent, False, need
    )


def layer_norm_case(N: int, H: int):
    """As in a step under autocast: products in bfloat16, sums and parameters in float32."""
    x, seed = meta(N, H), meta(1, dtype=torch.int64)
    residual, vector = meta(N, H, dtype=torch.float32), meta(H, dtype=torch.float32)
    y, rounded, total, mean, rstd = layer_norm.residual_layer_norm_fwd(
        x, residual, vector, vector, 1e-12, 0.1, seed, both=True
    )
    layer_norm.residual_layer_norm_bwd(y, total, vector, mean, rstd, 0.1, seed, x.dtype, rounded)


def relations_case(B: int, T: int, H: int, H_t: int, heads: int):
    relation_kl.relation_kl(meta(B, T, 3 * H), meta(B, T, 3 * H_t), heads, True)


CASES: dict[str, Callable[[], None]] = {
    "loss N4096 H1024 V30522": lambda: cross_entropy_case(4096, 1024, 30522),
    "loss N16384 H768 V30522": lambda: cross_entropy_case(16384, 768, 30522),
    "loss N4096 H1024 V30522 mostly labelled": lambda: cross_entropy_case(
        4096, 1024, 30522, mostly_labelled=True
    ),
    "loss N4096 H1024 V4928": lambda: cross_entropy_case(4096, 1024, 4928),
    "loss N4096 H384 V30522": lambda: cross_entropy_case(4096, 384, 30522),
    "loss N4096 H256 V4928": lambda: cross_entropy_case(4096, 256, 4928),
    "loss N4096 H256 V4928 by row": lambda: cross_entropy_case(4096, 256, 4928, True, 0.1),
    "loss N4096 H1024 V30522 by row": lambda: cross_entropy_case(4096, 1024, 30522, True, 0.1),
    "loss N4096 H1024 V30522 fp32": lambda: cross_entropy_case(
        4096, 1024, 30522, dtype=torch.float32
    ),
    "loss N4096 H32 V4928 fp32": lambda: cross_entropy_case(4096, 32, 4928, dtype=torch.float32),
    "loss N4096 H256 V4928 fp16": lambda: cross_entropy_case(4096, 256, 4928, dtype=torch.float16),
    # Every option at once.
    "loss N4096 H1024 V30522 options": lambda: cross_entropy_case(
        4096, 1024, 30522, True, 0.1, weighted=True, softcap=30.0, z_loss=True, predict=True
    ),
    "loss N4096 H256 V4928 options": lambda: cross_entropy_case(
        4096, 256, 4928, True, 0.1, weighted=True, z_loss=True, predict=True
    ),
    "kl N4096 H256 H_t1024 V4928": lambda: kl_case(4096, 256, 1024, 4928),
    "embedding B256 T128 H1024 V30522+4928": lambda: embedding_case(256, 128, 1024, 30522, 4928),
    "embedding B256 T128 H768 V30522+4928": lambda: embedding_case(256, 128, 768, 30522, 4928),
    "embedding B256 T128 H256 V4928": lambda: embedding_case(256, 128, 256, 0, 4928),
    "layer norm N32768 H1024": lambda: layer_norm_case(32768, 1024),
    "layer norm N32768 H256": lambda: layer_norm_case(32768, 256),
    "relations B256 T128 H256 H_t1024 R32": lambda: relations_case(256, 128, 256, 1024, 32),
}


# ---- reading the machine code ------------------------------------------------------------------


def tool(name: str) -> str:
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return str(folder / name)


def resources(variant: Launch, arch: int) -> dict[str, object]:
    """Registers a thread, stack and shared memory in bytes, 16-byte loads, matrix unit."""
    compiled = variant.compile(arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [tool("cuobjdump"), "-res-usage", cubin.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    ptx = compiled.asm["ptx"]
    wide = len(re.findall(r"ld\.global[.\w:]*\.v4\.(?:b|u|f|s)32|ld\.global[.\w:]*\.v8\.b32", ptx))
    copies = len(re.findall(r"cp\.async\.c[ga][^;]*0x10, ", ptx)) + ptx.count(
        "cp.async.bulk.tensor"
    )
    matrix = "none"
    for name, mark in (("tcgen05", "tcgen05.mma"), ("wgmma", "wgmma.mma"), ("mma", "mma.sync")):
        if mark in ptx:
            matrix = name
            break
    return {
        "warps": compiled.metadata.num_warps,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "wide_loads": wide + copies,
        "matrix": matrix,
    }


def measure(archs=ARCHS, only: str = "", report=None) -> dict[str, dict[str, dict[str, object]]]:
    """{"case / kernel": {"sm_90": resources}} of every variant; equal variants are listed once."""
    table: dict[str, dict[str, dict[str, object]]] = {}
    for arch in archs:
        launch.META_CAPABILITY = arch // 10
        seen: set[Launch] = set()
        for case, launches in CASES.items():
            numbers: dict[str, int] = {}
            for variant in record(launches):
                name = variant.kernel.__name__
                numbers[name] = numbers.get(name, 0) + 1
                key = f"{case} / {name}" + (f" {numbers[name]}" if numbers[name] > 1 else "")
                if variant in seen or only not in key:
                    continue
                seen.add(variant)
                usage = resources(variant, arch)
                table.setdefault(key, {})[f"sm_{arch}"] = usage
                if report:
                    report(key, f"sm_{arch}", usage)
    return table


def regressions(current: dict, recorded: dict, same_compiler: bool) -> list[str]:
    """What got worse: any spill; more registers or shared memory (under the recorded compiler)."""
    worse = []
    for key, by_arch in current.items():
        for arch, usage in by_arch.items():
            if usage["stack"]:
                worse.append(f"{key} on {arch}: {usage['stack']} bytes of stack, a spill")
            old = recorded.get(key, {}).get(arch)
            if old is None:
                worse.append(f"{key} on {arch}: not in {RECORD.name}; record it with --write")
                continue
            if not same_compiler:
                continue
            for what in ("registers", "shared"):
                if usage[what] > old[what]:
                    worse.append(f"{key} on {arch}: {what} {usage[what]}, recorded {old[what]}")
            if usage["wide_loads"] < old["wide_loads"]:
                worse.append(
                    f"{key} on {arch}: {usage['wide_loads']} 16-byte loads, "
                    f"recorded {old['wide_loads']}"
                )
            if usage["matrix"] != old["matrix"]:
                worse.append(f"{key} on {arch}: {usage['matrix']}, recorded {old['matrix']}")
    return worse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--write", action="store_true", help="record the current state in aot.json")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHS, help="default: all")
    parser.add_argument("--only", default="", help="only kernels whose key holds this")
    args = parser.parse_args()

    def show(key, arch, r):
        print(
            f"{key:72} {arch:6} {r['warps']:3} warps {r['registers']:4} registers "
            f"{r['stack']:4} stack {r['shared']:7} shared {r['wide_loads']:3} wide  {r['matrix']}",
            flush=True,
        )

    table = measure(args.arch or ARCHS, args.only, show)
    if args.write:
        lines = [
            f"  {json.dumps(k)}: {{\n"
            + ",\n".join(f"    {json.dumps(a)}: {json.dumps(r)}" for a, r in v.items())
            + "\n  }"
            for k, v in table.items()
        ]
        head = f'  "triton": {json.dumps(triton.__version__)}'
        RECORD.write_text("{\n" + ",\n".join([head, *lines]) + "\n}\n", encoding="utf-8")
        return 0
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    worse = regressions(table, recorded, recorded["triton"] == triton.__version__)
    for line in worse:
        print(line, file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
