"""What the operators of this folder share: id checks, dispatch, fake gradients, backward of sums.

Each op stands at the end of its own file, with its fake kernel and its autograd. A loss over rows
has three:

    <loss>_sum            the scaled sum of the rows' losses, with the gradients made on the way;
                          backward only multiplies them by the incoming scalar
    <loss>_rows           the loss of each row
    <loss>_rows_backward  the gradients for given upstream gradients of the rows, recomputing logits

`backend` is "triton" (kernels of this folder) or "chunked" (plain PyTorch, chunked.py). All are
opaque to torch.compile, so a compiled model keeps one graph, whichever rows carry a loss.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mvbert.kernels.common import accumulator_dtype
from mvbert.kernels.linear import scale_exactly

# When True, ids and labels on a GPU are checked too, at the price of a host synchronisation a call.
CHECK_ON_GPU = False


def check_range(what: str, ids: Tensor, size: int, ignore_index: int | None = None) -> None:
    """ValueError unless every id lies in [0, size) or equals `ignore_index`."""
    if (ids.is_cuda and not CHECK_ON_GPU) or torch.compiler.is_compiling() or ids.numel() == 0:
        return
    bad = (ids < 0) | (ids >= size)
    if ignore_index is not None:
        bad &= ids != ignore_index
    if bad.any():
        allowance = "" if ignore_index is None else f" or be {ignore_index}"
        raise ValueError(
            f"{what} must lie in [0, {size}){allowance}, got {int(ids[bad][0])}: "
            "was it made with another vocabulary?"
        )


def run(implementation: Callable, hidden: Tensor, *arguments):
    """implementation(hidden, *arguments) with autocast off, on the device of `hidden`.

    The dtype of `hidden` already says what the products run in, and Triton launches on the current
    device.
    """
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        return implementation(hidden, *arguments)


# ---- fake kernels ------------------------------------------------------------------------------


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, need: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias), empty where not wanted."""
    return (
        hidden.new_empty(hidden.shape if need[0] else (0,)),
        weight.new_empty(weight.shape if need[1] else (0,)),
        hidden.new_empty(0) if bias is None or not need[2] else bias.new_empty(bias.shape),
    )


def rows_like(hidden: Tensor) -> Tensor:
    """[N] of the dtype that the losses of `hidden` [N, H] have."""
    return hidden.new_empty(hidden.shape[0], dtype=accumulator_dtype(hidden.dtype))


def sum_like(hidden: Tensor) -> Tensor:
    return rows_like(hidden).new_empty(())


# ---- sums and their backward -------------------------------------------------------------------


def total(loss: Tensor, scale: Tensor) -> Tensor:
    """The scaled sum; in float64, as a rounded 1 / count costs more than a division would."""
    return (loss.sum(dtype=torch.float64) * scale).to(loss.dtype)


def scaled(gradient: Tensor, dtotal: Tensor) -> Tensor | None:
    """gradient * dtotal; the gradient itself where that is 1 and can be looked at (eager, CPU)."""
    if gradient.ndim == 1 and gradient.numel() == 0:
        return None
    if type(dtotal) is Tensor and not (dtotal.is_cuda or torch.compiler.is_compiling()):
        return gradient if dtotal == 1 else gradient * dtotal
    if gradient.dtype == dtotal.dtype:
        return gradient * dtotal
    # Rounding the factor to 16 bits would scale the whole gradient wrongly by up to 2^-9.
    if not dtotal.is_cuda:
        return (gradient * dtotal.reshape(1)).to(gradient.dtype)
    return scale_exactly(gradient, dtotal)


def refuse_second_order(gradients: tuple[Tensor | None, ...]) -> None:
    if any(g is not None for g in gradients):
        raise RuntimeError("the fused losses have first derivatives only; use backend='reference'")


def save_gradients(ctx, inputs, output) -> None:
    """`setup_context` of a sum over rows, whose last outputs are its three gradients."""
    ctx.mark_non_differentiable(*(o for o in output if not o.is_floating_point()))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[-3:])


def sum_backward(ctx, dtotal: Tensor | None, *dgradients: Tensor | None):
    """Backward of a sum over rows, whose first inputs are hidden, weight and bias."""
    refuse_second_order(dgradients)
    others = (None,) * (len(ctx.needs_input_grad) - 3)
    if dtotal is None:
        return None, None, None, *others
    return *(scaled(g, dtotal) for g in ctx.saved_tensors), *others
