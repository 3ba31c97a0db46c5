"""What the files of this folder share: Triton, dtypes, wanted gradients, labels, reductions."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

try:
    import triton
    import triton.language as tl
except ImportError:
    # Triton is a Linux package. Enough of it for the files that hold kernels to load.
    triton = SimpleNamespace(jit=lambda kernel: kernel)
    tl = SimpleNamespace(constexpr=None, dtype=None)

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Need:
    """Which gradients of a linear layer are wanted."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    def __bool__(self) -> bool:
        return self.hidden or self.weight or self.bias


class LossOptions(NamedTuple):
    """What a cross-entropy is of, beside hidden states, weights and labels."""

    ignore_index: int = IGNORE_INDEX
    label_smoothing: float = 0.0
    class_weight: Tensor | None = None  # [V]
    softcap: float = 0.0  # 0: none
    z_loss: Tensor | None = None  # [], the factor of lse^2 beside a row's cross-entropy
    predict: bool = False


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def upcast(x: Tensor) -> Tensor:
    return x.to(accumulator_dtype(x.dtype))


def pitch(V: int) -> int:
    """Elements from one row of logits to the next: whole 128-byte lines, whatever V and the dtype.

    A packed row of 30,522 bfloat16 begins on 4 bytes only; neither 16-byte loads nor bulk copies
    can read that.
    """
    return -(-V // 64) * 64


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`hidden @ weight.T + bias` in the dtype of `hidden`."""
    return F.linear(
        hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    )


def split_heads(qkv: Tensor, heads: int) -> Tensor:
    """[B, T, 3 H] -> [3, B, heads, T, H / heads], a view."""
    B, T, W = qkv.shape
    return qkv.view(B, T, 3, heads, W // 3 // heads).permute(2, 0, 3, 1, 4)


def split_labels(labels: Tensor, teacher_size: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Joint labels as (teacher labels, student labels), each ignored where the other one holds."""
    is_student = labels >= teacher_size
    return (
        torch.where(is_student, ignore_index, labels),
        torch.where(is_student, labels - teacher_size, ignore_index),
    )


def reduce_rows(loss: Tensor, mask: Tensor, reduction: str) -> Tensor:
    """mean over the rows of the mask (0 when there is none), sum, or the rows themselves."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / mask.sum().clamp(min=1).to(loss.dtype)


def gradients_like(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dhidden: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in the dtypes of the inputs; empty where there is none."""
    nothing = hidden.new_empty
    return (
        nothing(0) if dhidden is None else dhidden,
        nothing(0) if dweight is None else dweight.to(weight.dtype),
        nothing(0) if dbias is None else dbias.to(bias.dtype),
    )
