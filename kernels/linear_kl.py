"""KL divergence from a teacher's softmax to a linear layer's, neither's logits whole in memory.

    loss = tau^2 sum_v q_v (log q_v - log p_v),   p = softmax(z / tau),   z = x @ weight.T + bias
    dz   = a tau (p - q)

q = softmax(y / tau) of the teacher's own linear layer over the same vocabulary. Logits of up to
launch.CHUNK_ROWS rows of both models are written once, in the input's dtype; one kernel reads the
two, sums q (log q - log p) and leaves dz over the student's. The teacher side has no gradient.

log p = (z / tau - top) - log_sum with top the largest of the row: an lse stored as one number is
rounded at the size of the logits, which a loss that may be far smaller would inherit.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mvbert.kernels import chunked, ops
from mvbert.kernels.common import Need, tl, triton, upcast
from mvbert.kernels.common import linear as plain_linear
from mvbert.kernels.linear import Gradients, LinearRows, exp, list_rows, no_rows


def linear_kl_reference(
    student_hidden: Tensor,  # [N, H_s]
    student_weight: Tensor,  # [V, H_s]
    student_bias: Tensor | None,  # [V]
    teacher_hidden: Tensor,  # [N, H_t]
    teacher_weight: Tensor,  # [V, H_t]
    teacher_bias: Tensor | None,  # [V]
    mask: Tensor,  # [N], bool
    temperature: float,
) -> Tensor:
    """tau^2 KL(softmax(teacher / tau) || softmax(student / tau)), 0 where masked out. -> [N]"""
    with torch.no_grad():
        teacher = upcast(plain_linear(teacher_hidden, teacher_weight, teacher_bias)) / temperature
        log_q = F.log_softmax(teacher, 1)
    student = upcast(plain_linear(student_hidden, student_weight, student_bias)) / temperature
    log_p = F.log_softmax(student, 1)
    loss = temperature**2 * (log_q.exp() * (log_q - log_p)).sum(1)
    return loss * mask.to(loss.dtype)


# ---- kernels -----------------------------------------------------------------------------------


@triton.jit
def kl_dlogits_kernel(
    logits_ptr,  # [c, pitch], z / tau; written when GRAD: dz
    teacher_ptr,  # [c, pitch], y / tau
    rows_ptr,  # [N], int32
    count_ptr,  # [1], int32
    top_ptr,  # [N]
    log_sum_ptr,  # [N]
    teacher_top_ptr,  # [N]
    teacher_log_sum_ptr,  # [N]
    dloss_ptr,  # [N] when GRAD_PER_ROW
    gap_ptr,  # [c, column blocks], written: sum of q (log q - log p)
    dbias_ptr,  # [row blocks, pitch], written when HAS_BIAS
    start,
    c,
    V,
    stride_z,
    GRAD: tl.constexpr,
    GRAD_PER_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STEPS: tl.constexpr,
):
    block_v = tl.program_id(1)
    v = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
    count = min(tl.load(count_ptr) - start, c)
    first = tl.program_id(0) * BLOCK_M * STEPS
    column = tl.zeros((BLOCK_V,), ACC)
    for step in range(STEPS):
        m = first + step * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = m < count
        rows = tl.load(rows_ptr + start + m, mask=inside, other=0)
        top = tl.load(top_ptr + rows, mask=inside, other=0.0)
        log_sum = tl.load(log_sum_ptr + rows, mask=inside, other=0.0)
        teacher_top = tl.load(teacher_top_ptr + rows, mask=inside, other=0.0)
        teacher_log_sum = tl.load(teacher_log_sum_ptr + rows, mask=inside, other=0.0)
        at = m.to(tl.int64)[:, None] * stride_z + v[None, :]
        mask = inside[:, None] & (v < stride_z)[None, :]
        z = tl.load(logits_ptr + at, mask=mask, other=0.0).to(ACC)
        y = tl.load(teacher_ptr + at, mask=mask, other=0.0).to(ACC)
        # Columns from V on hold -inf, whose differences are NaN.
        real = inside[:, None] & (v < V)[None, :]
        log_p = (tl.where(real, z, 0.0) - top[:, None]) - log_sum[:, None]
        log_q = (tl.where(real, y, 0.0) - teacher_top[:, None]) - teacher_log_sum[:, None]
        p = exp(tl.where(real, log_p, -float("inf")))
        q = exp(tl.where(real, log_q, -float("inf")))
        gap = tl.sum(tl.where(real, q * (log_q - log_p), 0.0), 1)
        tl.store(gap_ptr + m.to(tl.int64) * tl.num_programs(1) + block_v, gap, mask=inside)
        if GRAD:
            dz = p - q
            if GRAD_PER_ROW:
                dz *= tl.load(dloss_ptr + rows, mask=inside, other=0.0)[:, None]
            tl.store(logits_ptr + at, dz.to(logits_ptr.dtype.element_ty), mask=mask)
            if HAS_BIAS:
                column += tl.sum(dz, 0)
    if HAS_BIAS:
        at = dbias_ptr + tl.program_id(0).to(tl.int64) * stride_z + v
        tl.store(at, column, mask=v < stride_z)


@triton.jit
def kl_loss_kernel(
    gap_ptr,  # [c, blocks]
    rows_ptr,  # [N], int32
    count_ptr,  # [1], int32
    loss_ptr,  # [N], written at rows
    start,
    c,
    blocks,
    temperature,
    BLOCK_T: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    if m >= min(tl.load(count_ptr) - start, c):
        return
    t = tl.arange(0, BLOCK_T)
    gap = tl.sum(tl.load(gap_ptr + m * blocks + t, mask=t < blocks, other=0.0), 0)
    row = tl.load(rows_ptr + start + m)
    tl.store(loss_ptr + row, temperature * temperature * gap)


# ---- launchers ---------------------------------------------------------------------------------


def scale_of(dloss: Tensor | None, temperature: float, linear: LinearRows) -> Tensor | None:
    """[1]: what all gradients are multiplied by; an upstream gradient by row is in dz already."""
    if dloss is None:
        return None
    one = torch.ones(1, dtype=linear.acc_dtype, device=dloss.device)
    return (one if dloss.ndim == 1 else dloss.to(one.dtype).reshape(1)) * temperature


def kl(
    hidden: Tensor,  # [N, H_s]
    weight: Tensor,  # [V, H_s]
    bias: Tensor | None,  # [V]
    teacher_hidden: Tensor,  # [N, H_t]
    teacher_weight: Tensor,  # [V, H_t]
    teacher_bias: Tensor | None,  # [V]
    mask: Tensor,  # [N], bool
    temperature: float,
    dloss: Tensor | None,  # [] or [N]
    need: Need,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tau^2 KL(teacher || student) of each row: (loss [N], dhidden, dweight, dbias)."""
    N = hidden.shape[0]
    if N == 0:
        return no_rows(hidden, weight, bias, need)
    rows, count = list_rows(mask.to(torch.int32), 0)
    student = LinearRows(hidden, weight, bias, rows, count)
    teacher = LinearRows(teacher_hidden.to(hidden.dtype), teacher_weight, teacher_bias, rows, count)
    dloss = None if dloss is None else dloss.contiguous()
    by_row = dloss is not None and dloss.ndim == 1
    scale = scale_of(dloss, temperature, student)
    gradients = Gradients(student, hidden, weight, bias, need, scale)
    loss = hidden.new_zeros(N, dtype=student.acc_dtype)
    top, log_sum = torch.empty_like(loss), torch.empty_like(loss)
    teacher_top, teacher_log_sum = torch.empty_like(loss), torch.empty_like(loss)
    for start in student.starts():
        options = {"store": True, "temperature": temperature}
        z = student.logits(start, lse=log_sum, top=top, **options)
        y = teacher.logits(start, lse=teacher_log_sum, top=teacher_top, **options)
        c = student.rows_from(start)
        grid, tile, partial = student.passes(c, need.bias)
        gap = loss.new_empty(c, grid[1])
        kl_dlogits_kernel[grid](
            z, y, rows, count, top, log_sum, teacher_top, teacher_log_sum,
            dloss if by_row else loss, gap, partial, start, c, student.V, student.pitch,
            GRAD=bool(need), GRAD_PER_ROW=by_row, HAS_BIAS=need.bias, ACC=student.common["ACC"],
            **tile,
        )  # fmt: skip
        kl_loss_kernel[(c,)](
            gap, rows, count, loss, start, c, grid[1], temperature,
            BLOCK_T=triton.next_power_of_2(grid[1]), num_warps=1,
        )  # fmt: skip
        gradients.add(start, z, partial)
    return loss, *gradients.all()


# ---- operator ----------------------------------------------------------------------------------


IMPLEMENTATIONS = {"triton": kl, "chunked": chunked.kl}


@torch.library.custom_op("mvbert::linear_kl_sum", mutates_args=())
def linear_kl_sum(
    hidden: Tensor,  # [N, H_s]
    weight: Tensor,  # [V, H_s]
    bias: Tensor | None,  # [V]
    teacher_hidden: Tensor,  # [N, H_t]
    teacher_weight: Tensor,  # [V, H_t]
    teacher_bias: Tensor | None,  # [V]
    mask: Tensor,  # [N], bool
    scale: Tensor,  # [], float32: what the sum of the losses is multiplied by
    temperature: float,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    teacher = teacher_hidden, teacher_weight, teacher_bias
    loss, *gradients = ops.run(
        IMPLEMENTATIONS[backend], hidden, weight, bias, *teacher, mask, temperature,
        scale if any(need) else None, Need(*need),
    )  # fmt: skip
    return ops.total(loss, scale), *gradients


@linear_kl_sum.register_fake
def _(hidden, weight, bias, t_hidden, t_weight, t_bias, mask, scale, temperature, need, backend):
    return ops.sum_like(hidden), *ops.empty_gradients(hidden, weight, bias, need)


linear_kl_sum.register_autograd(ops.sum_backward, setup_context=ops.save_gradients)


@torch.library.custom_op("mvbert::linear_kl_rows", mutates_args=())
def linear_kl_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    mask: Tensor,
    temperature: float,
    backend: str,
) -> Tensor:
    teacher = teacher_hidden, teacher_weight, teacher_bias
    return ops.run(
        IMPLEMENTATIONS[backend], hidden, weight, bias, *teacher, mask, temperature, None, Need()
    )[0]


@linear_kl_rows.register_fake
def _(hidden, *others):
    return ops.rows_like(hidden)


@torch.library.custom_op("mvbert::linear_kl_rows_backward", mutates_args=())
def linear_kl_rows_backward(
    dloss: Tensor,  # [N]
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    mask: Tensor,
    temperature: float,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    teacher = teacher_hidden, teacher_weight, teacher_bias
    _, *gradients = ops.run(
        IMPLEMENTATIONS[backend], hidden, weight, bias, *teacher, mask, temperature, dloss,
        Need(*need),
    )  # fmt: skip
    return tuple(gradients)


@linear_kl_rows_backward.register_fake
def _(dloss, hidden, weight, bias, t_hidden, t_weight, t_bias, mask, temperature, need, backend):
    return ops.empty_gradients(hidden, weight, bias, need)


def _save_rows(ctx, inputs, output):
    *tensors, ctx.temperature, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _rows_backward(ctx, dloss):
    if dloss is None:
        return (None,) * 9
    need = [bool(n) for n in ctx.needs_input_grad[:3]]
    gradients = linear_kl_rows_backward(
        dloss, *ctx.saved_tensors, ctx.temperature, need, ctx.backend
    )
    return *(g if n else None for g, n in zip(gradients, need, strict=True)), *(None,) * 6


linear_kl_rows.register_autograd(_rows_backward, setup_context=_save_rows)
