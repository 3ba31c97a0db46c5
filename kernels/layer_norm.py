"""Residual + dropout + LayerNorm in one pass, the end of both halves of a BERT layer.

    s = residual + dropout(x)
    y = weight * (s - mean) * rstd + bias

Forward writes y, if wanted a second time in the dtype of x, which the next matrix product reads,
and, for backward, s in the input's dtype and mean and rstd in float32. Backward adds the gradients
of both and draws the dropout mask again; programs stride over the rows and keep the sums for weight
and bias in registers, so that the final reduction is over hundreds of rows and not over N.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mvbert.kernels import launch, ops
from mvbert.kernels.common import accumulator_dtype, tl, triton
from mvbert.kernels.dropout import dropout_factor


def residual_layer_norm_reference(
    x: Tensor,  # [.., H], after dropout
    residual: Tensor,  # [.., H]
    ln_weight: Tensor,  # [H]
    ln_bias: Tensor,  # [H]
    eps: float,
) -> Tensor:
    """LayerNorm(residual + x). -> [.., H]; the CPU path too, where torch's own pass is fast."""
    return F.layer_norm(residual + x, x.shape[-1:], ln_weight, ln_bias, eps)


# ---- kernels -----------------------------------------------------------------------------------


@triton.jit
def residual_layer_norm_fwd_kernel(
    x_ptr,  # [N, H]
    residual_ptr,  # [N, H]
    weight_ptr,  # [H]
    bias_ptr,  # [H]
    seed_ptr,  # [1] when P_DROP > 0
    y_ptr,  # [N, H], written
    rounded_ptr,  # [N, H], written when BOTH: y again
    sum_ptr,  # [N, H], written
    mean_ptr,  # [N], written
    rstd_ptr,  # [N], written
    N,
    H,
    eps,
    P_DROP: tl.constexpr,
    BOTH: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    h = tl.arange(0, BLOCK_H)
    column = (h < H)[None, :]
    mask = (n < N)[:, None] & column
    at = n.to(tl.int64)[:, None] * H + h[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    if P_DROP > 0:
        x *= dropout_factor(tl.load(seed_ptr), n, P_DROP, ROWS, BLOCK_H)
    s = x + tl.load(residual_ptr + at, mask=mask, other=0.0).to(ACC)
    # The statistics are of the sum as it is kept, so that backward sees the same numbers.
    stored_sum = s.to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + at, stored_sum, mask=mask)
    s = stored_sum.to(ACC)
    mean = tl.sum(s, 1) / H
    s = tl.where(column, s - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(s * s, 1) / H + eps)
    weight = tl.load(weight_ptr + h, mask=h < H, other=0.0).to(ACC)
    bias = tl.load(bias_ptr + h, mask=h < H, other=0.0).to(ACC)
    y = s * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(mean_ptr + n, mean, mask=n < N)
    tl.store(rstd_ptr + n, rstd, mask=n < N)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
    if BOTH:
        tl.store(rounded_ptr + at, y.to(rounded_ptr.dtype.element_ty), mask=mask)


@triton.jit
def residual_layer_norm_bwd_kernel(
    dy_ptr,  # [N, H]
    drounded_ptr,  # [N, H] when BOTH: added to dy
    sum_ptr,  # [N, H]
    weight_ptr,  # [H]
    seed_ptr,  # [1] when P_DROP > 0
    mean_ptr,  # [N]
    rstd_ptr,  # [N]
    dx_ptr,  # [N, H], written when HAS_DX
    dresidual_ptr,  # [N, H], written
    sums_ptr,  # [programs, 2, H], written: dweight, dbias
    N,
    H,
    P_DROP: tl.constexpr,
    HAS_DX: tl.constexpr,
    BOTH: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    h = tl.arange(0, BLOCK_H)
    column = (h < H)[None, :]
    weight = tl.load(weight_ptr + h, mask=h < H, other=0.0).to(ACC)[None, :]
    dweight = tl.zeros((ROWS, BLOCK_H), ACC)
    dbias = tl.zeros((ROWS, BLOCK_H), ACC)
    for first in range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS):
        n = first + tl.arange(0, ROWS)
        mask = (n < N)[:, None] & column
        at = n.to(tl.int64)[:, None] * H + h[None, :]
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(ACC)
        if BOTH:
            dy += tl.load(drounded_ptr + at, mask=mask, other=0.0).to(ACC)
        s = tl.load(sum_ptr + at, mask=mask, other=0.0).to(ACC)
        mean = tl.load(mean_ptr + n, mask=n < N, other=0.0)
        rstd = tl.load(rstd_ptr + n, mask=n < N, other=0.0)
        u = tl.where(mask, (s - mean[:, None]) * rstd[:, None], 0.0)
        dweight += dy * u
        dbias += dy
        g = dy * weight
        ds = g - (tl.sum(g, 1) / H)[:, None] - u * (tl.sum(g * u, 1) / H)[:, None]
        ds *= rstd[:, None]
        tl.store(dresidual_ptr + at, ds.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if P_DROP > 0:
            ds *= dropout_factor(tl.load(seed_ptr), n, P_DROP, ROWS, BLOCK_H)
        if HAS_DX:
            tl.store(dx_ptr + at, ds.to(dx_ptr.dtype.element_ty), mask=mask)
    out = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * H + h
    tl.store(out, tl.sum(dweight, 0), mask=h < H)
    tl.store(out + H, tl.sum(dbias, 0), mask=h < H)


# ---- launchers ---------------------------------------------------------------------------------


def residual_layer_norm_fwd(
    x: Tensor,  # [N, H]
    residual: Tensor,  # [N, H]
    ln_weight: Tensor,  # [H]
    ln_bias: Tensor,  # [H]
    eps: float,
    dropout_p: float,
    seed: Tensor | None,  # [1], int64
    both: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y [N, H], rounded, sum [N, H], mean [N], rstd [N]), y and sum in the dtype of `residual`.

    `rounded` is y [N, H] in the dtype of x when `both`, else empty.
    """
    N, H = x.shape
    x, residual = x.contiguous(), residual.contiguous()
    ln_weight, ln_bias = ln_weight.contiguous(), ln_bias.contiguous()
    y = torch.empty_like(residual)
    rounded = torch.empty_like(x) if both else x.new_empty(0)
    total = torch.empty_like(residual)
    mean = total.new_empty(N, dtype=accumulator_dtype(total.dtype))
    rstd = torch.empty_like(mean)
    if N:
        tile = launch.row_blocks("layer_norm_fwd", total, N, H)
        residual_layer_norm_fwd_kernel[(triton.cdiv(N, tile["ROWS"]),)](
            x, residual, ln_weight, ln_bias, x if seed is None else seed, y, rounded, total, mean,
            rstd, N, H, eps, P_DROP=dropout_p, BOTH=both, ACC=launch.accumulator(total), **tile,
        )  # fmt: skip
    return y, rounded, total, mean, rstd


def residual_layer_norm_bwd(
    dy: Tensor,  # [N, H]
    total: Tensor,  # [N, H]
    ln_weight: Tensor,  # [H]
    mean: Tensor,  # [N]
    rstd: Tensor,  # [N]
    dropout_p: float,
    seed: Tensor | None,
    dtype: torch.dtype,  # of x
    drounded: Tensor | None = None,  # [N, H]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, residual, ln_weight, ln_bias); that of x is empty where it is the second."""
    N, H = total.shape
    dresidual = torch.empty_like(total)
    has_dx = dropout_p > 0 or dtype != total.dtype
    dx = torch.empty_like(total, dtype=dtype) if has_dx else total.new_empty(0)
    tile = dict(launch.row_blocks("layer_norm_bwd", total, N, H))
    most = tile.pop("programs", launch.bwd_programs(total.device))
    programs = max(1, min(triton.cdiv(N, tile["ROWS"]), most))
    sums = mean.new_zeros(programs, 2, H)
    if N:
        residual_layer_norm_bwd_kernel[(programs,)](
            dy.contiguous(), total if drounded is None else drounded.contiguous(), total,
            ln_weight.contiguous(), total if seed is None else seed, mean, rstd, dx, dresidual,
            sums, N, H, P_DROP=dropout_p, HAS_DX=has_dx, BOTH=drounded is not None,
            ACC=launch.accumulator(total), **tile,
        )  # fmt: skip
    weight_sum, bias_sum = sums[:, 0].sum(0), sums[:, 1].sum(0)
    return dx, dresidual, weight_sum.to(ln_weight.dtype), bias_sum.to(ln_weight.dtype)


# ---- operator ----------------------------------------------------------------------------------


@torch.library.custom_op("mvbert::residual_layer_norm", mutates_args=())
def residual_layer_norm(
    x: Tensor,  # [N, H]
    residual: Tensor,  # [N, H], whose dtype the result has
    ln_weight: Tensor,  # [H]
    ln_bias: Tensor,  # [H]
    seed: Tensor | None,  # [1]
    eps: float,
    dropout_p: float,
    both: bool,  # the result in the dtype of x, too
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(x):
        return residual_layer_norm_fwd(x, residual, ln_weight, ln_bias, eps, dropout_p, seed, both)


@residual_layer_norm.register_fake
def _(x, residual, ln_weight, ln_bias, seed, eps, dropout_p, both):
    y = torch.empty_like(residual, memory_format=torch.contiguous_format)
    rounded = torch.empty_like(y, dtype=x.dtype) if both else x.new_empty(0)
    return y, rounded, torch.empty_like(y), ops.rows_like(y), ops.rows_like(y)


@torch.library.custom_op("mvbert::residual_layer_norm_backward", mutates_args=())
def residual_layer_norm_backward(
    dy: Tensor,  # [N, H]
    drounded: Tensor | None,  # [N, H]
    total: Tensor,  # [N, H]
    ln_weight: Tensor,  # [H]
    mean: Tensor,  # [N]
    rstd: Tensor,  # [N]
    seed: Tensor | None,  # [1]
    dropout_p: float,
    dtype: torch.dtype,  # of x
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(dy):
        return residual_layer_norm_bwd(
            dy, total, ln_weight, mean, rstd, dropout_p, seed, dtype, drounded
        )


@residual_layer_norm_backward.register_fake
def _(dy, drounded, total, ln_weight, mean, rstd, seed, dropout_p, dtype):
    vectors = torch.empty_like(ln_weight), torch.empty_like(ln_weight)
    has_dx = dropout_p > 0 or dtype != total.dtype
    dx = torch.empty_like(total, dtype=dtype) if has_dx else total.new_empty(0)
    return dx, torch.empty_like(total), *vectors


def _save(ctx, inputs, output):
    x, _, ln_weight, _, seed, _, ctx.dropout_p, _ = inputs
    ctx.dtype = x.dtype
    _, _, total, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, ln_weight, mean, rstd, seed)


def _backward(ctx, dy, drounded, *others):
    if dy is None:
        dy, drounded = drounded, None
    if dy is None:
        return (None,) * 8
    dx, dresidual, *vectors = residual_layer_norm_backward(
        dy, drounded, *ctx.saved_tensors, ctx.dropout_p, ctx.dtype
    )
    # Without dropout two inputs of one dtype have one gradient, which is made once.
    separate = ctx.dropout_p > 0 or ctx.dtype != dresidual.dtype
    return dx if separate else dresidual, dresidual, *vectors, None, None, None, None


residual_layer_norm.register_autograd(_backward, setup_context=_save)
