"""Choices shared by the launchers: block sizes, row chunks, pitches, precision.

Every choice is a small function of the shape and the dtype, made without looking at data and
without an autotuner in the user's first step. Rules that rest on arithmetic say so. What
`python bench/tune.py` measured on a device, kept in tuned.json, goes before the rules.
"""

import json
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mvbert.kernels.common import accumulator_dtype, tl, triton

# Logits are held for at most this many rows at once. Below 1,053 rows, adding a chunk to a float32
# dweight (8 bytes an element, 2 FLOP a row) would be bound by memory: 4 x 263 FLOP / byte.
CHUNK_ROWS = 8192

# Below this width, computing the logits twice is cheaper than writing and reading them: 2 H FLOP
# against 4 bytes. Equal at H = 527; the accumulator of a whole row of H must also fit in registers.
FLASH_WIDTH = 256

# Whose products may run over all rows in the vendor's library. float16 has no room for dz / N: its
# results are scaled instead, by kernels of our own.
LIBRARY_DTYPE = torch.bfloat16

# What `capability` says of meta tensors: bench/aot.py compiles for several.
META_CAPABILITY = 9

# What the tuner found, see bench/tune.py.
TUNED = Path(__file__).with_name("tuned.json")
# {kernel: blocks} that go before everything: the tuner tries its candidates through this.
FORCED: dict[str, dict[str, int]] = {}


def accumulator(x: Tensor) -> tl.dtype:
    """Triton's name of the dtype sums are kept in."""
    return tl.float64 if accumulator_dtype(x.dtype) == torch.float64 else tl.float32


def precision(x: Tensor) -> str:
    """`input_precision` of float32 products: as torch.set_float32_matmul_precision says."""
    if x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"


def flash(x: Tensor) -> bool:
    """Whether rows [N, H] take the form without logits: H <= FLASH_WIDTH in 16 bit.

    Without tensor cores a tile of that form spills kilobytes: wider types take it only where a
    small tile holds all of H.
    """
    return x.shape[1] <= (FLASH_WIDTH if x.element_size() == 2 else min(FLASH_WIDTH, 32))


# ---- the device --------------------------------------------------------------------------------


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        # meta: bench/aot.py, as if on an H100. cpu: the interpreter, where few programs are best.
        return 132 if device.type == "meta" else 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def capability(device: torch.device) -> int:
    """Major compute capability of the device: 8 Ampere, 9 Hopper, 10 Blackwell."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0]
    return META_CAPABILITY


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return 163 << 10 if META_CAPABILITY == 8 else 227 << 10


# ---- what was measured -------------------------------------------------------------------------


@cache
def _tables() -> dict[str, list[dict]]:
    return json.loads(TUNED.read_text(encoding="utf-8"))["devices"] if TUNED.exists() else {}


@cache
def _measured(device: str, kernel: str, dtype: str, shape: tuple[int, ...]) -> dict | None:
    """The entry of this device, kernel, dtype and shape, N the nearest; shape = (N, *others)."""
    entries = [
        entry
        for entry in _tables().get(device, [])
        if (entry["kernel"], entry["dtype"], *entry["shape"][1:]) == (kernel, dtype, *shape[1:])
        and entry["shape"][0] <= 4 * shape[0]
    ]
    return min(entries, key=lambda entry: abs(entry["shape"][0] - shape[0]), default=None)


def choose(kernel: str, x: Tensor, shape: tuple[int, ...], rule: dict[str, int]) -> dict[str, int]:
    """Blocks of a kernel: forced, else measured on this device at this shape, else by the rule."""
    if kernel in FORCED:
        return rule | FORCED[kernel]
    if x.is_cuda and _tables():
        name = torch.cuda.get_device_name(x.device)
        entry = _measured(name, kernel, str(x.dtype).removeprefix("torch."), shape)
        if entry is not None:
            return rule | entry["blocks"]
    return rule


# ---- the rules ---------------------------------------------------------------------------------


def product_blocks(
    kernel: str, x: Tensor, shape: tuple[int, ...], M: int, N: int, K: int, *,
    heavy: bool = False, options: bool = False,
) -> dict[str, int]:  # fmt: skip
    """Tile, warps and stages of an [M, K] x [K, N] product in the dtype of x.

    128 x 256 x 64 with 3 stages takes 144 KiB and half of the registers for its sums. A kernel
    whose last part is `heavy` (a softmax, an addition to what is there) takes 128 x 128; that of
    the logits on Hopper one warp group, so that another program multiplies during its softmax;
    with `options` (softcap, predictions) that would spill.
    """
    if min(M, N) < 64 or K < 32:
        blocks = (16, 16, 16, 4, 2)
    elif x.element_size() == 8:
        blocks = (32, 32, 16, 4, 2)
    elif x.element_size() == 4:
        # No tensor cores unless TF32 is allowed: a tile that leaves registers for both operands.
        blocks = (64, 64, 16, 4, 3)
    elif N < 256:
        blocks = (64, 64, 32, 4, 3)
    elif heavy:
        shared = kernel == "logits" and capability(x.device) == 9 and not options
        blocks = (128, 128, 64, 4, 3) if shared else (128, 128, 64, 8, 4)
    else:
        blocks = (128, 256, 64, 8, 3)
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    rule = dict(zip(names, blocks, strict=True)) | {"GROUP": 8}
    stage = (rule["BLOCK_M"] + rule["BLOCK_N"]) * rule["BLOCK_K"] * x.element_size()
    rule["num_stages"] = max(1, min(rule["num_stages"], shared_memory(x.device) // stage))
    return rule if options else choose(kernel, x, shape, rule)


def elementwise_blocks(
    x: Tensor, shape: tuple[int, ...], V: int, options: bool = False
) -> dict[str, int]:
    """A pass over logits: STEPS x BLOCK_M rows of BLOCK_V columns a program, 64 x 512.

    `options`: of the loss, a few registers more, on twice as many threads.
    """
    if V < 512:
        return {"BLOCK_M": 4, "BLOCK_V": 64, "STEPS": 2, "num_warps": 4}
    rule = {"BLOCK_M": 8, "BLOCK_V": 512, "STEPS": 8, "num_warps": 4}
    if options:
        return rule | {"num_warps": 8}
    return choose("elementwise", x, shape, rule)


def flash_warps(x: Tensor) -> int:
    """One warp group on Hopper; elsewhere the same tile spills unless two share it."""
    return 4 if capability(x.device) == 9 else 8


def flash_fwd_blocks(N: int, V: int, x: Tensor) -> tuple[dict[str, int], int]:
    """Tile of the flash forward kernel, and into how many parts V is split to fill the device."""
    if N < 64 or V < 64 or x.element_size() > 2:
        return {"BLOCK_M": 16, "BLOCK_V": 16, "num_warps": 4, "num_stages": 2}, 2
    rule = {"BLOCK_M": 64, "BLOCK_V": 64, "num_warps": flash_warps(x), "num_stages": 2}
    blocks = dict(choose("flash_fwd", x, (N, V, x.shape[1]), rule))
    # Two programs share a multiprocessor: one does its softmax while the other multiplies.
    splits = 2 * multiprocessors(x.device) // triton.cdiv(N, blocks["BLOCK_M"])
    return blocks, blocks.pop("splits", max(1, min(8, splits)))


def flash_dweight_blocks(
    N: int, V: int, x: Tensor, options: bool = False
) -> tuple[dict[str, int], int]:
    """Tile of the flash dweight kernel, and into how many parts the rows are split.

    `options`: of the loss, a few registers more than one warp group has.
    """
    if N < 64 or V < 64 or x.element_size() > 2:
        return {"BLOCK_M": 16, "BLOCK_V": 16, "num_warps": 4, "num_stages": 2}, 2
    rule = {"BLOCK_M": 64, "BLOCK_V": 64, "num_warps": flash_warps(x), "num_stages": 2}
    if options:
        blocks = rule | {"num_warps": 8}
    else:
        blocks = dict(choose("flash_dweight", x, (N, V, x.shape[1]), rule))
    splits = 2 * multiprocessors(x.device) // triton.cdiv(V, blocks["BLOCK_V"])
    return blocks, blocks.pop("splits", max(1, min(8, splits, triton.cdiv(N, 64))))


def relation_blocks(x: Tensor, shape: tuple[int, ...], width: int) -> dict[str, int]:
    """Tile of relations between vectors padded to `width`; shape = (B, T, d_s, d_t).

    Half a dozen tiles of float32 live at once: 64 x 64 spill, 64 x 32 take half of the registers.
    """
    if shape[1] < 64 or width > 256 or x.element_size() == 8:
        rule = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    elif x.element_size() == 4:
        rule = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    else:
        rule = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    return choose("relation_kl", x, shape, rule)


def row_blocks(kernel: str, x: Tensor, N: int, H: int) -> dict[str, int]:
    """Rows a program reads at once, and warps: 8 values a thread, one 16-byte load in 16 bit."""
    block_h = max(8, triton.next_power_of_2(H))
    rows = max(1, 1024 // block_h) if block_h >= 64 else 2
    warps = max(1, min(16, rows * block_h // 256))
    rule = {"ROWS": rows, "BLOCK_H": block_h, "num_warps": warps}
    return choose(kernel, x, (N, H), rule)


def library(kernel: str, x: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a product over all rows ("dx" or "dweight") goes to the vendor's library."""
    return bool(choose(kernel + "_library", x, shape, {"library": 1})["library"])


def bwd_programs(device: torch.device) -> int:
    """Programs of a backward kernel that sums in registers: four a multiprocessor."""
    return 4 * multiprocessors(device)
