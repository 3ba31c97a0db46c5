"""Choices shared by the launchers: block sizes, row chunks, pitches, precision.

Every choice is a small function of the shape, made without looking at data and without an autotuner
in the user's first step. Rules that rest on arithmetic say so; none has been timed yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Logits are held for at most this many rows at once. Below 1,053 rows, adding a chunk to a float32
# dweight (8 bytes an element, 2 FLOP a row) would be bound by memory: 4 x 263 FLOP / byte.
CHUNK_ROWS = 8192

# Below this width, computing the logits twice is cheaper than writing and reading them: 2 H FLOP
# against 4 bytes. Equal at H = 527; the accumulator of a whole row of H must also fit in registers.
FLASH_WIDTH = 256

# What `capability` says of meta tensors: kernels/aot.py compiles for several.
META_CAPABILITY = 9


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def accumulator(x: Tensor) -> tl.dtype:
    """Triton's name of the dtype sums are kept in."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def precision(x: Tensor) -> str:
    """`input_precision` of float32 products: as torch.set_float32_matmul_precision says."""
    if x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"


def pitch(V: int) -> int:
    """Elements from one row of logits to the next: whole 128-byte lines, whatever V is.

    A packed row of 30,522 bfloat16 begins on 4 bytes only; neither 16-byte loads nor bulk copies
    can read that.
    """
    return -(-V // 64) * 64


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        # meta: kernels/aot.py, as if on an H100. cpu: the interpreter, where few programs are best.
        return 132 if device.type == "meta" else 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def product_blocks(M: int, N: int, K: int, *, heavy: bool = False) -> dict[str, int]:
    """Tile, warps and stages of an [M, K] x [K, N] product.

    128 x 256 x 64 with 3 stages takes 144 KiB and half of the registers for its sums. A kernel
    whose last part is `heavy` (a softmax, an addition to what is there) spills at that size and
    takes 128 x 128.
    """
    if min(M, N) < 64 or K < 32:
        return {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
    if N < 256:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}
    if heavy:
        return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}
    return {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


def elementwise_blocks(V: int) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_V, STEPS) of a pass over logits: 64 rows of 512 columns a program."""
    if V < 512:
        return 4, 64, 2
    return 8, 512, 8


def flash_warps(x: Tensor) -> int:
    """One warp group on Hopper; elsewhere the same tile spills unless two share it."""
    return 4 if capability(x.device) == 9 else 8


def flash_fwd_blocks(N: int, V: int, x: Tensor) -> tuple[dict[str, int], int]:
    """Tile of the narrow forward kernel, and into how many parts V is split to fill the device."""
    if N < 64 or V < 64:
        return {"BLOCK_M": 16, "BLOCK_V": 16, "num_warps": 4, "num_stages": 2}, 2
    blocks = {"BLOCK_M": 64, "BLOCK_V": 64, "num_warps": flash_warps(x), "num_stages": 2}
    # Two programs share a multiprocessor: one does its softmax while the other multiplies.
    splits = 2 * multiprocessors(x.device) // triton.cdiv(N, 64)
    return blocks, max(1, min(8, splits))


def flash_dweight_blocks(N: int, V: int, x: Tensor) -> tuple[dict[str, int], int]:
    """Tile of the narrow dweight kernel, and into how many parts the rows are split."""
    if N < 64 or V < 64:
        return {"BLOCK_M": 16, "BLOCK_V": 16, "num_warps": 4, "num_stages": 2}, 2
    blocks = {"BLOCK_M": 64, "BLOCK_V": 64, "num_warps": flash_warps(x), "num_stages": 2}
    splits = 2 * multiprocessors(x.device) // triton.cdiv(V, 64)
    return blocks, max(1, min(8, splits, triton.cdiv(N, 64)))


def capability(device: torch.device) -> int:
    """Major compute capability of the device: 8 Ampere, 9 Hopper, 10 Blackwell."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0]
    return META_CAPABILITY


def bwd_programs(device: torch.device) -> int:
    """Programs of a backward kernel that sums in registers: four a multiprocessor."""
    return 4 * multiprocessors(device)
