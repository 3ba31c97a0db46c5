"""KL divergence from a teacher's softmax to a linear layer's, neither's logits whole in memory.

    loss = tau^2 sum_v q_v (log q_v - log p_v),   p = softmax(z / tau),   z = x @ weight.T + bias
    dz   = a tau (p - q)

Dense: q = softmax(y / tau) of the teacher's own linear layer over the same vocabulary. Logits of up
to launch.CHUNK_ROWS rows of both models are written once, in the input's dtype; one kernel reads
the two, sums q (log q - log p) and leaves dz over the student's. The teacher side has no gradient.

Sparse: q is a list of (id, probability). Its entries are picked from the logits first; then all
columns become p sum(q), then the listed ones p sum(q) - q. An id may be listed twice.

log p = (z / tau - top) - log_sum with top the largest of the row: an lse stored as one number is
rounded at the size of the logits, which a loss that may be far smaller would inherit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvbert.kernels.chunked import Need
from mvbert.kernels.linear import Gradients, LinearRows, exp, list_rows, no_rows

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
    dloss_ptr,  # [N] when ROWS
    gap_ptr,  # [c, column blocks], written: sum of q (log q - log p)
    dbias_ptr,  # [row blocks, pitch], written when HAS_BIAS
    start,
    c,
    V,
    stride_z,
    GRAD: tl.constexpr,
    ROWS: tl.constexpr,
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
        both = inside[:, None] & (v < stride_z)[None, :]
        z = tl.load(logits_ptr + at, mask=both, other=0.0).to(ACC)
        y = tl.load(teacher_ptr + at, mask=both, other=0.0).to(ACC)
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
            if ROWS:
                dz *= tl.load(dloss_ptr + rows, mask=inside, other=0.0)[:, None]
            tl.store(logits_ptr + at, dz.to(logits_ptr.dtype.element_ty), mask=both)
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


@triton.jit
def sparse_kl_pick_kernel(
    logits_ptr,  # [c, pitch], z / tau
    ids_ptr,  # [N, K]
    probs_ptr,  # [N, K]
    rows_ptr,  # [N], int32
    count_ptr,  # [1], int32
    top_ptr,  # [N]
    log_sum_ptr,  # [N]
    picked_ptr,  # [c, K], written: log p at the ids
    mass_ptr,  # [N], written at rows: sum of q
    loss_ptr,  # [N], written at rows
    start,
    c,
    V,
    K,
    stride_z,
    temperature,
    ACC: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    if m >= min(tl.load(count_ptr) - start, c):
        return
    row = tl.load(rows_ptr + start + m).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    q = tl.load(probs_ptr + row * K + k, mask=k < K, other=0.0).to(ACC)
    v = tl.load(ids_ptr + row * K + k, mask=k < K, other=0)
    used = q > 0
    valid = (v >= 0) & (v < V)
    z = tl.load(logits_ptr + m * stride_z + v, mask=used & valid, other=0.0).to(ACC)
    z = tl.where(used & (valid == 0), float("nan"), z)
    log_q = tl.log(tl.where(used, q, 1.0))
    log_p = (z - tl.load(top_ptr + row)) - tl.load(log_sum_ptr + row)
    tl.store(picked_ptr + m * K + k, log_p, mask=k < K)
    loss = tl.sum(q * (log_q - log_p), 0)
    tl.store(mass_ptr + row, tl.sum(q, 0))
    tl.store(loss_ptr + row, temperature * temperature * loss)


@triton.jit
def sparse_kl_dlogits_kernel(
    logits_ptr,  # [c, pitch], z / tau, then written: a p sum(q)
    rows_ptr,  # [N], int32
    count_ptr,  # [1], int32
    top_ptr,  # [N]
    log_sum_ptr,  # [N]
    mass_ptr,  # [N]
    dloss_ptr,  # [N] when ROWS
    start,
    c,
    V,
    stride_z,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < min(tl.load(count_ptr) - start, c)
    rows = tl.load(rows_ptr + start + m, mask=inside, other=0)
    top = tl.load(top_ptr + rows, mask=inside, other=0.0)
    log_sum = tl.load(log_sum_ptr + rows, mask=inside, other=0.0)
    factor = tl.load(mass_ptr + rows, mask=inside, other=0.0)
    if ROWS:
        factor *= tl.load(dloss_ptr + rows, mask=inside, other=0.0)
    at = logits_ptr + m.to(tl.int64)[:, None] * stride_z + v[None, :]
    both = inside[:, None] & (v < stride_z)[None, :]
    z = tl.load(at, mask=both, other=0.0).to(ACC)
    z = tl.where(inside[:, None] & (v < V)[None, :], z, -float("inf"))
    p = exp((z - top[:, None]) - log_sum[:, None])
    tl.store(at, (p * factor[:, None]).to(logits_ptr.dtype.element_ty), mask=both)


@triton.jit
def sparse_kl_targets_kernel(
    dlogits_ptr,  # [c, pitch], written at the ids: a (p sum(q) - q)
    ids_ptr,  # [N, K]
    probs_ptr,  # [N, K]
    rows_ptr,  # [N], int32
    count_ptr,  # [1], int32
    mass_ptr,  # [N]
    picked_ptr,  # [c, K]
    dloss_ptr,  # [N] when ROWS
    start,
    c,
    V,
    K,
    stride_z,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """An id listed twice gets both shares, from both slots: equal values, so no race matters."""
    m = tl.program_id(0).to(tl.int64)
    if m >= min(tl.load(count_ptr) - start, c):
        return
    row = tl.load(rows_ptr + start + m).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    q = tl.load(probs_ptr + row * K + k, mask=k < K, other=0.0).to(ACC)
    v = tl.load(ids_ptr + row * K + k, mask=k < K, other=0)
    used = (q > 0) & (v >= 0) & (v < V)
    share = tl.zeros((BLOCK_K,), ACC)
    for first in range(0, K, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        q_j = tl.load(probs_ptr + row * K + j, mask=j < K, other=0.0).to(ACC)
        v_j = tl.load(ids_ptr + row * K + j, mask=j < K, other=0)
        share += tl.sum(tl.where(v[:, None] == v_j[None, :], q_j[None, :], 0.0), 1)
    log_p = tl.load(picked_ptr + m * K + k, mask=used, other=-float("inf"))
    dz = exp(log_p) * tl.load(mass_ptr + row) - share
    if ROWS:
        dz *= tl.load(dloss_ptr + row)
    tl.store(dlogits_ptr + m * stride_z + v, dz.to(dlogits_ptr.dtype.element_ty), mask=used)


@triton.jit
def column_sums_kernel(
    dlogits_ptr,  # [c, pitch]
    count_ptr,  # [1], int32
    out_ptr,  # [row blocks, pitch], written
    start,
    c,
    stride_z,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STEPS: tl.constexpr,
):
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    count = min(tl.load(count_ptr) - start, c)
    column = tl.zeros((BLOCK_V,), ACC)
    for step in range(STEPS):
        m = (tl.program_id(0) * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        at = dlogits_ptr + m.to(tl.int64)[:, None] * stride_z + v[None, :]
        inside = (m < count)[:, None] & (v < stride_z)[None, :]
        column += tl.sum(tl.load(at, mask=inside, other=0.0).to(ACC), 0)
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * stride_z + v, column, mask=v < stride_z)


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
            GRAD=bool(need), ROWS=by_row, HAS_BIAS=need.bias, ACC=student.common["ACC"], **tile,
        )  # fmt: skip
        kl_loss_kernel[(c,)](
            gap, rows, count, loss, start, c, grid[1], temperature,
            BLOCK_T=triton.next_power_of_2(grid[1]), num_warps=1,
        )  # fmt: skip
        gradients.add(start, z, partial)
    return loss, *gradients.all()


def sparse_kl(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    target_ids: Tensor,  # [N, K]
    target_probs: Tensor,  # [N, K]
    temperature: float,
    dloss: Tensor | None,  # [] or [N]
    need: Need,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tau^2 sum_k q_k (log q_k - log p[id_k]) of each row: (loss [N], dhidden, dweight, dbias)."""
    N, K = target_ids.shape
    if N == 0:
        return no_rows(hidden, weight, bias, need)
    target_ids, target_probs = target_ids.contiguous(), target_probs.contiguous()
    rows, count = list_rows((target_probs > 0).any(1).to(torch.int32), 0)
    linear = LinearRows(hidden, weight, bias, rows, count)
    dloss = None if dloss is None else dloss.contiguous()
    by_row = dloss is not None and dloss.ndim == 1
    gradients = Gradients(linear, hidden, weight, bias, need, scale_of(dloss, temperature, linear))
    loss = hidden.new_zeros(N, dtype=linear.acc_dtype)
    top, log_sum, mass = (torch.empty_like(loss) for _ in range(3))
    picked = loss.new_empty(linear.chunk, max(K, 1))
    block_k = triton.next_power_of_2(max(K, 1))
    for start in linear.starts():
        z = linear.logits(start, lse=log_sum, top=top, store=True, temperature=temperature)
        c = linear.rows_from(start)
        sparse_kl_pick_kernel[(c,)](
            z, target_ids, target_probs, rows, count, top, log_sum, picked, mass, loss,
            start, c, linear.V, K, linear.pitch, temperature,
            ACC=linear.common["ACC"], BLOCK_K=block_k, num_warps=1,
        )  # fmt: skip
        if not need:
            continue
        grid, tile, partial = linear.passes(c, need.bias)
        steps = tile.pop("STEPS")
        row_dloss = dloss if by_row else mass
        options = {"ROWS": by_row, "ACC": linear.common["ACC"]}
        sparse_kl_dlogits_kernel[triton.cdiv(c, tile["BLOCK_M"]), grid[1]](
            z, rows, count, top, log_sum, mass, row_dloss, start, c, linear.V, linear.pitch,
            **tile, **options,
        )  # fmt: skip
        sparse_kl_targets_kernel[(c,)](
            z, target_ids, target_probs, rows, count, mass, picked, row_dloss,
            start, c, linear.V, K, linear.pitch, BLOCK_K=block_k, BLOCK_J=16,
            num_warps=max(1, min(8, block_k // 64)), **options,
        )  # fmt: skip
        if need.bias:
            column_sums_kernel[grid](
                z, count, partial, start, c, linear.pitch, ACC=options["ACC"], STEPS=steps, **tile,
            )  # fmt: skip
        gradients.add(start, z, partial)
    return loss, *gradients.all()
