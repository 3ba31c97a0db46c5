"""KL between the self-relations of queries, keys and values, no T x T matrix in memory.

    s = x x^T / sqrt(d),  p = softmax(s),  q = the teacher's,  loss = sum q (log q - log p)
    ds = p - q,           dx_i = sum_j (ds_ij + ds_ji) x_j / sqrt(d)

for each of the 3 R vectors of width d that a piece has. s is symmetric, so the transpose of ds
needs no other tile: p_ji = exp(s_ij - top_j) / total_j. One kernel makes the statistics of all
rows, of student and teacher; a second makes s again, tile by tile, and from it loss and gradient.

Each row keeps two numbers, top and total, for p = exp(s - top) / total: an lse stored as one would
be rounded at the size of the scores, which a loss that may be far smaller would inherit.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mvbert.kernels import chunked, launch, ops
from mvbert.kernels.common import accumulator_dtype, split_heads, tl, triton, upcast


def relation_kl_reference(
    student: Tensor,  # [B, T, 3 H_s]
    teacher: Tensor,  # [B, T, 3 H_t]
    heads: int,
) -> Tensor:
    """KL between softmax(x x^T / sqrt(d)) of `heads` parts of queries, of keys, of values. -> []"""
    log_p, log_q = (
        F.log_softmax(upcast(x @ x.transpose(-1, -2)) * x.shape[-1] ** -0.5, -1)
        for x in (split_heads(student, heads), split_heads(teacher.detach(), heads))
    )
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


# ---- kernels -----------------------------------------------------------------------------------


@triton.jit
def load_vectors(x_ptr, t, T, parts, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Vectors t of one head, [len(t), BLOCK_D], 0 beyond T and D."""
    d = tl.arange(0, BLOCK_D)
    inside = (t < T)[:, None] & (d < D)[None, :]
    return tl.load(x_ptr + t[:, None] * (parts * D) + d[None, :], mask=inside, other=0.0)


@triton.jit
def relation_stats_kernel(
    x_ptr,  # [B, T, parts, D]
    stats_ptr,  # [B, parts, 2, T], written: top, total
    T,
    parts,
    D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(0)
    x_ptr += (head // parts).to(tl.int64) * T * parts * D + (head % parts) * D
    stats_ptr += head.to(tl.int64) * 2 * T
    i = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_i = load_vectors(x_ptr, i, T, parts, D, BLOCK_D)
    top = tl.full((BLOCK_M,), -float("inf"), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    for first in range(0, T, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        x_j = load_vectors(x_ptr, j, T, parts, D, BLOCK_D)
        s = tl.dot(x_i, tl.trans(x_j), tl.zeros((BLOCK_M, BLOCK_N), ACC), input_precision=PRECISION)
        s = tl.where((j < T)[None, :], s * D**-0.5, -float("inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(s - higher[:, None]), 1)
        top = higher
    tl.store(stats_ptr + i, top, mask=i < T)
    tl.store(stats_ptr + T + i, total, mask=i < T)


@triton.jit
def relation_kl_kernel(
    student_ptr,  # [B, T, parts, D_S]
    teacher_ptr,  # [B, T, parts, D_T]
    student_stats_ptr,  # [B, parts, 2, T]
    teacher_stats_ptr,  # [B, parts, 2, T]
    loss_ptr,  # [B, parts, row blocks], written: sums
    gradient_ptr,  # [B, T, parts, D_S], written when GRAD
    T,
    parts,
    GRAD: tl.constexpr,
    D_S: tl.constexpr,
    D_T: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    head = tl.program_id(0)
    row = (head // parts).to(tl.int64) * T
    of_student = row * parts * D_S + (head % parts) * D_S
    student_ptr += of_student
    teacher_ptr += row * parts * D_T + (head % parts) * D_T
    student_stats_ptr += head.to(tl.int64) * 2 * T
    teacher_stats_ptr += head.to(tl.int64) * 2 * T
    i = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_i = load_vectors(student_ptr, i, T, parts, D_S, BLOCK_S)
    y_i = load_vectors(teacher_ptr, i, T, parts, D_T, BLOCK_T)
    top_i = tl.load(student_stats_ptr + i, mask=i < T, other=0.0)[:, None]
    total_i = tl.load(student_stats_ptr + T + i, mask=i < T, other=1.0)[:, None]
    teacher_top_i = tl.load(teacher_stats_ptr + i, mask=i < T, other=0.0)[:, None]
    teacher_total_i = tl.load(teacher_stats_ptr + T + i, mask=i < T, other=1.0)[:, None]
    # log q - log p = (r - teacher_top) - (s - top) + gap
    gap = tl.log(total_i / teacher_total_i)
    # A division for each row or column, none for each entry.
    share_i, teacher_share_i = 1.0 / total_i, 1.0 / teacher_total_i
    loss = tl.zeros((BLOCK_M,), ACC)
    gradient = tl.zeros((BLOCK_M, BLOCK_S), ACC)
    for first in range(0, T, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        x_j = load_vectors(student_ptr, j, T, parts, D_S, BLOCK_S)
        y_j = load_vectors(teacher_ptr, j, T, parts, D_T, BLOCK_T)
        zero = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        s = tl.dot(x_i, tl.trans(x_j), zero, input_precision=PRECISION) * D_S**-0.5
        r = tl.dot(y_i, tl.trans(y_j), zero, input_precision=PRECISION) * D_T**-0.5
        s_i, r_i = s - top_i, r - teacher_top_i
        q = tl.exp(r_i) * teacher_share_i
        inside = (i < T)[:, None] & (j < T)[None, :]
        loss += tl.sum(tl.where(inside, q * ((r_i - s_i) + gap), 0.0), 1)
        if GRAD:
            # Columns beyond T meet vectors of zeros, rows beyond T are not stored.
            top_j = tl.load(student_stats_ptr + j, mask=j < T, other=0.0)[None, :]
            total_j = tl.load(student_stats_ptr + T + j, mask=j < T, other=1.0)[None, :]
            p_ji = tl.exp(s - top_j) * (1.0 / total_j)
            top_j = tl.load(teacher_stats_ptr + j, mask=j < T, other=0.0)[None, :]
            total_j = tl.load(teacher_stats_ptr + T + j, mask=j < T, other=1.0)[None, :]
            q_ji = tl.exp(r - top_j) * (1.0 / total_j)
            # Differences first: p and q are near each other, their sums are not near 0.
            slope = (tl.exp(s_i) * share_i - q) + (p_ji - q_ji)
            gradient = tl.dot(slope.to(x_j.dtype), x_j, gradient, input_precision=PRECISION)
    at = head.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(loss_ptr + at, tl.sum(loss, 0))
    if GRAD:
        d = tl.arange(0, BLOCK_S)
        out = gradient_ptr + of_student + i[:, None] * (parts * D_S) + d[None, :]
        gradient = (gradient * D_S**-0.5).to(gradient_ptr.dtype.element_ty)
        tl.store(out, gradient, mask=(i < T)[:, None] & (d < D_S)[None, :])


# ---- launchers ---------------------------------------------------------------------------------


def relation_kl(
    student: Tensor,  # [B, T, 3 H_s]
    teacher: Tensor,  # [B, T, 3 H_t]
    heads: int,
    need: bool,
) -> tuple[Tensor, Tensor]:
    """(sum over rows, positions, heads and the three [], its gradient [B, T, 3 H_s] or empty)."""
    B, T, _ = student.shape
    parts = 3 * heads
    student, teacher = student.contiguous(), teacher.contiguous()
    acc = accumulator_dtype(student.dtype)
    gradient = torch.empty_like(student) if need else student.new_empty(0)
    if not student.numel():
        return student.new_zeros((), dtype=acc), gradient
    widths = [x.shape[2] // parts for x in (student, teacher)]
    padded = [max(16, triton.next_power_of_2(d)) for d in widths]
    blocks = launch.relation_blocks(student, (B, T, *widths), max(padded))
    grid = (B * parts, triton.cdiv(T, blocks["BLOCK_M"]))
    shared = {"ACC": launch.accumulator(student), "PRECISION": launch.precision(student), **blocks}
    stats = []
    for x, d, block in zip((student, teacher), widths, padded, strict=True):
        stats.append(student.new_empty(B, parts, 2, T, dtype=acc))
        relation_stats_kernel[grid](x, stats[-1], T, parts, D=d, BLOCK_D=block, **shared)
    loss = student.new_empty(grid, dtype=acc)
    relation_kl_kernel[grid](
        student, teacher, *stats, loss, gradient if need else student, T, parts,
        GRAD=need, D_S=widths[0], D_T=widths[1], BLOCK_S=padded[0], BLOCK_T=padded[1], **shared,
    )  # fmt: skip
    return loss.sum(), gradient


# ---- operator ----------------------------------------------------------------------------------


IMPLEMENTATIONS = {"triton": relation_kl, "chunked": chunked.relation_kl}


@torch.library.custom_op("mvbert::relation_kl_sum", mutates_args=())
def relation_kl_sum(
    student: Tensor,  # [B, T, 3 H_s]
    teacher: Tensor,  # [B, T, 3 H_t]
    heads: int,
    need: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return ops.run(IMPLEMENTATIONS[backend], student, teacher, heads, need)


@relation_kl_sum.register_fake
def _(student, teacher, heads, need, backend):
    gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
    return ops.sum_like(student), gradient if need else student.new_empty(0)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(ctx, dtotal, *dgradients):
    ops.refuse_second_order(dgradients)
    gradient = None if dtotal is None else ops.scaled(*ctx.saved_tensors, dtotal)
    return gradient, None, None, None, None


relation_kl_sum.register_autograd(_backward, setup_context=_save)
