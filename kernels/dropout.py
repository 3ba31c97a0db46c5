"""Dropout masks: drawn inside a kernel from a seed, drawn on a CPU from torch's generator.

Either way an element is zeroed where 16 random bits are below round(2^16 p), and what is kept is
multiplied by what makes up for the zeros.
"""

import torch
from torch import Tensor

from mvbert.kernels.common import tl, triton


@triton.jit
def dropout_factor(seed, n, P: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr):
    """[ROWS, BLOCK_H]: 0 where dropped, 1 / (1 - p) where kept, of rows n.

    Philox with 7 rounds gives 4 words a call, each word two draws.
    """
    group = tl.arange(0, BLOCK_H // 8)
    offset = n[:, None] * (BLOCK_H // 8) + group[None, :]
    a, b, c, d = tl.randint4x(seed, offset, n_rounds=7)
    lane = tl.arange(0, 8)[None, None, :]
    low = tl.where(lane < 2, a[:, :, None], b[:, :, None])
    high = tl.where(lane < 6, c[:, :, None], d[:, :, None])
    word = tl.where(lane < 4, low, high)
    draw = tl.where(lane % 2 == 0, word, word >> 16) & 0xFFFF
    THRESHOLD: tl.constexpr = int(P * 65536 + 0.5)
    KEEP: tl.constexpr = 65536 / (65536 - int(P * 65536 + 0.5))
    return tl.where(draw.reshape(ROWS, BLOCK_H) >= THRESHOLD, KEEP, 0.0)


@torch.library.custom_op(
    "mvbert::dropout_factors", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def dropout_factors(x: Tensor, dropout_p: float) -> Tensor:
    """The same on a CPU, [..] as x: torch's own bernoulli_ takes eight times as long, a third of a
    layer's step."""
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    zeroed = min(round(dropout_p * 2**16), 2**16 - 1)
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= zeroed - 2**15
    return kept.to(x.dtype).mul_(2**16 / (2**16 - zeroed))


@dropout_factors.register_fake
def _(x, dropout_p):
    return torch.empty_like(x, memory_format=torch.contiguous_format)
