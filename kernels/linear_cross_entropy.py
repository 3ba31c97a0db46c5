"""Softmax cross-entropy of a linear layer, logits never whole in memory.

    z = x @ weight.T + bias
    loss = lse - (1 - s) z[label] - s mean(z),      lse = log sum_v exp(z_v)
    dz = a (softmax(z) - (1 - s) onehot(label) - s / V) + g softmax(z)

with a = dloss and g = dlse of the row, s the label smoothing. Two strategies behind one function:

    materialised (H > launch.FLASH_WIDTH)   logits of up to launch.CHUNK_ROWS rows are written once,
        in the input's dtype and with a pitch that keeps every row aligned; turned into dz in place;
        multiplied twice. 6 N V H FLOP.
    flash   no logits at all. Per block of rows, flash-attention style: the same tile of weight
        serves z and sum_v exp(z_v) weight[v], which is all that dx needs; a second kernel makes z
        again for dweight. 8 N V H FLOP, no traffic of size N x V.

The label's own column is left out of the flash form's running sum: dx = x's expected weight row
minus the label's row is then a sum of small terms and never a difference of two nearly equal ones.

Where the upstream gradient is one number for all rows (sum, mean), it scales the results rather
than dz: dz keeps its range in float16.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mvbert.kernels import chunked, launch, ops
from mvbert.kernels.common import (
    IGNORE_INDEX,
    Need,
    accumulator_dtype,
    gradients_like,
    split_labels,
    tl,
    triton,
    upcast,
)
from mvbert.kernels.common import linear as plain_linear
from mvbert.kernels.linear import Gradients, LinearRows, exp, gather_rows, list_rows, no_rows


def linear_cross_entropy_reference(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [N]
    bias: Tensor | None = None,  # [V]
    *,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Per-row softmax cross-entropy of `hidden @ weight.T + bias` and its log-sum-exp.

    loss = lse - (1 - s) z[label] - s mean(z); both are 0 on ignored rows. -> [N], [N]
    """
    ops.check_range("labels", labels, weight.shape[0], ignore_index)
    logits = upcast(plain_linear(hidden, weight, bias))
    kept = labels != ignore_index
    target = logits.gather(1, labels.long().where(kept, 0)[:, None])[:, 0]
    lse = torch.logsumexp(logits, 1)
    loss = lse - (1 - label_smoothing) * target - label_smoothing * logits.mean(1)
    zero = torch.zeros((), dtype=loss.dtype, device=loss.device)
    return torch.where(kept, loss, zero), torch.where(kept, lse, zero)


def mixed_linear_cross_entropy_reference(
    hidden: Tensor,  # [N, H]
    teacher_weight: Tensor,  # [V_t, H]
    student_weight: Tensor,  # [V_s, H]
    labels: Tensor,  # [N], joint ids
    teacher_bias: Tensor | None = None,  # [V_t]
    student_bias: Tensor | None = None,  # [V_s]
    *,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Each row against the vocabulary of its label: losses of the teacher's rows, of the student's.

    Both are 0 on the rows of the other one. -> [N], [N]
    """
    of_teacher, of_student = split_labels(labels, teacher_weight.shape[0], ignore_index)
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    return (
        linear_cross_entropy_reference(hidden, teacher_weight, of_teacher, teacher_bias, **options)[
            0
        ],
        linear_cross_entropy_reference(hidden, student_weight, of_student, student_bias, **options)[
            0
        ],
    )


# ---- kernels, materialised ---------------------------------------------------------------------


@triton.jit
def cross_entropy_dlogits_kernel(
    logits_ptr,  # [c, pitch], read, then written: dz
    labels_ptr,  # [N]
    rows_ptr,  # [N], int32
    count_ptr,  # [1], int32
    lse_ptr,  # [N]
    dloss_ptr,  # [N] when GRAD_PER_ROW, [1] when SCALED
    dlse_ptr,  # [N] when HAS_DLSE
    dbias_ptr,  # [row blocks, pitch], written when HAS_BIAS
    start,
    c,
    V,
    stride_z,
    GRAD_PER_ROW: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    FILL: tl.constexpr,
    SMOOTHING: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STEPS: tl.constexpr,
):
    """STEPS x BLOCK_M rows of BLOCK_V columns: logits to dz, and the columns' sums.

    FILL: rows beyond the count become zero, for a product over all rows of the chunk.
    """
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    count = min(tl.load(count_ptr) - start, c)
    first = tl.program_id(0) * BLOCK_M * STEPS
    column = tl.zeros((BLOCK_M, BLOCK_V), ACC)
    # Logits from V on are -inf: they have probability 0 and no share in what is spread evenly.
    even = tl.where(v < V, tl.full((1,), SMOOTHING, ACC) / V, 0.0)[None, :]
    top = tl.full((1,), 1.0 - SMOOTHING, ACC)
    for step in range(STEPS):
        m = first + step * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = m < count
        rows = tl.load(rows_ptr + start + m, mask=inside, other=0)
        label = tl.load(labels_ptr + rows, mask=inside, other=-1).to(tl.int32)
        # Rows beyond the count have probability 0 and no label.
        lse = tl.load(lse_ptr + rows, mask=inside, other=float("inf"))
        at = logits_ptr + m.to(tl.int64)[:, None] * stride_z + v[None, :]
        both = inside[:, None] & (v < stride_z)[None, :]
        # Loads are masked by the pitch, not by V, so that they stay 16 bytes wide.
        z = tl.load(at, mask=both, other=0.0).to(ACC)
        p = exp(z - lse[:, None])
        hard = tl.where(label[:, None] == v[None, :], top, 0.0)
        if SMOOTHING > 0:
            hard += tl.where(inside[:, None], even, 0.0)
        if GRAD_PER_ROW:
            a = tl.load(dloss_ptr + rows, mask=inside, other=0.0)
            dz = (p - hard) * a[:, None]
            if HAS_DLSE:
                dz += p * tl.load(dlse_ptr + rows, mask=inside, other=0.0)[:, None]
        else:
            dz = p - hard
        if SCALED:
            dz *= tl.load(dloss_ptr).to(ACC)
        if FILL:
            both = (m < c)[:, None] & (v < stride_z)[None, :]
        tl.store(at, dz.to(logits_ptr.dtype.element_ty), mask=both)
        if HAS_BIAS:
            column += dz
    if HAS_BIAS:
        at = dbias_ptr + tl.program_id(0).to(tl.int64) * stride_z + v
        tl.store(at, tl.sum(column, 0), mask=v < stride_z)


@triton.jit
def cross_entropy_loss_kernel(
    x_ptr,  # [N, H], gathered, when SMOOTHING
    mean_weight_ptr,  # [H], when SMOOTHING
    mean_bias_ptr,  # [1], when SMOOTHING
    labels_ptr,  # [N]
    rows_ptr,  # [N], int32
    count_ptr,  # [1], int32
    lse_ptr,  # [N]
    target_ptr,  # [N]
    loss_ptr,  # [N], written at rows
    V,
    H,
    SMOOTHING: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """loss = lse - z[label] + s (z[label] - mean z); mean z = x . mean weight row + mean bias."""
    n = tl.program_id(0)
    if n >= tl.load(count_ptr):
        return
    row = tl.load(rows_ptr + n)
    label = tl.load(labels_ptr + row)
    target = tl.load(target_ptr + row)
    loss = tl.load(lse_ptr + row) - target
    if SMOOTHING > 0:
        h = tl.arange(0, BLOCK_H)
        x = tl.load(x_ptr + n.to(tl.int64) * H + h, mask=h < H, other=0.0).to(ACC)
        mean = tl.sum(x * tl.load(mean_weight_ptr + h, mask=h < H, other=0.0).to(ACC))
        loss += SMOOTHING * (target - mean - tl.load(mean_bias_ptr).to(ACC))
    valid = (label >= 0) & (label < V)
    tl.store(loss_ptr + row, tl.where(valid, loss, float("nan")))


# ---- kernels, flash ----------------------------------------------------------------------------


@triton.jit
def flash_fwd_kernel(
    x_ptr,  # [N, H], gathered
    weight_ptr,  # [V, H]
    bias_ptr,  # [V]
    labels_ptr,  # [N]
    rows_ptr,  # [N], int32
    count_ptr,  # [1], int32
    max_ptr,  # [splits, N], written: the largest logit, the label's left out
    sum_ptr,  # [splits, N], written: sum_{v != label} exp(z_v - max)
    expect_ptr,  # [splits, N, H], written when GRAD: sum_{v != label} exp(z_v - max) weight[v]
    N,
    V,
    H,
    V_SPLIT,
    HAS_BIAS: tl.constexpr,
    GRAD: tl.constexpr,
    EVEN_H: tl.constexpr,
    EVEN_V: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    count = tl.load(count_ptr)
    first = tl.program_id(0) * BLOCK_M
    if first >= count:
        return
    split = tl.program_id(1)
    m = first + tl.arange(0, BLOCK_M)
    h = tl.arange(0, BLOCK_H)
    row = BLOCK_H if EVEN_H else H  # a constant where it can be: most of a loop is addresses else
    label = tl.load(labels_ptr + tl.load(rows_ptr + tl.minimum(m, count - 1))).to(tl.int32)
    # Rows beyond the end repeat the last one and are not stored.
    x_at = x_ptr + tl.minimum(m, count - 1).to(tl.int64)[:, None] * H + h[None, :]
    x = tl.load(x_at) if EVEN_H else tl.load(x_at, mask=(h < H)[None, :], other=0.0)
    # A finite floor: a part of V that holds the label alone has no other logit.
    row_max = tl.full((BLOCK_M,), -1e30, ACC)
    row_sum = tl.zeros((BLOCK_M,), ACC)
    if GRAD:
        expect = tl.zeros((BLOCK_M, BLOCK_H), ACC)
    begin = split * V_SPLIT
    end = min(begin + V_SPLIT, V)
    for start in range(begin, end, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        inside = v if EVEN_V else tl.minimum(v, end - 1)
        w_at = weight_ptr + inside[:, None] * row + h[None, :]
        w = tl.load(w_at) if EVEN_H else tl.load(w_at, mask=(h < H)[None, :], other=0.0)
        z = tl.dot(x, tl.trans(w), input_precision=PRECISION, out_dtype=ACC)
        if HAS_BIAS:
            z += tl.load(bias_ptr + inside).to(ACC)[None, :]
        struck = label[:, None] == v[None, :]
        if not EVEN_V:
            struck |= (v >= end)[None, :]
        z = tl.where(struck, -float("inf"), z)
        new_max = tl.maximum(row_max, tl.max(z, 1))
        fade = exp(row_max - new_max)
        p = exp(z - new_max[:, None])
        row_sum = row_sum * fade + tl.sum(p, 1)
        if GRAD:
            expect *= fade[:, None]
            expect = tl.dot(p.to(w.dtype), w, expect, input_precision=PRECISION, out_dtype=ACC)
        row_max = new_max
    at = split.to(tl.int64) * N + m
    tl.store(max_ptr + at, row_max, mask=m < count)
    tl.store(sum_ptr + at, row_sum, mask=m < count)
    if GRAD:
        out = expect_ptr + at[:, None] * H + h[None, :]
        if EVEN_H:
            tl.store(out, expect, mask=(m < count)[:, None])
        else:
            tl.store(out, expect, mask=(m < count)[:, None] & (h < H)[None, :])


@triton.jit
def flash_combine_kernel(
    max_ptr,  # [splits, N]
    sum_ptr,  # [splits, N]
    expect_ptr,  # [splits, N, H] when GRAD
    x_ptr,  # [N, H], gathered
    weight_ptr,  # [V, H]
    bias_ptr,  # [V]
    mean_weight_ptr,  # [H], when SMOOTHING > 0
    mean_bias_ptr,  # [1], when SMOOTHING > 0
    labels_ptr,  # [N]
    rows_ptr,  # [N], int32
    count_ptr,  # [1], int32
    dloss_ptr,  # [1], or [N] when GRAD_PER_ROW
    dlse_ptr,  # [N] when HAS_DLSE
    loss_ptr,  # [N], written at rows
    lse_ptr,  # [N], written at rows
    listed_label_ptr,  # [N], int32, written up to count, as the next two
    listed_lse_ptr,  # [N]
    listed_rest_ptr,  # [N]
    dx_ptr,  # [N, H], written at rows when GRAD
    N,
    V,
    H,
    splits,
    HAS_BIAS: tl.constexpr,
    GRAD: tl.constexpr,
    GRAD_PER_ROW: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    SMOOTHING: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Joins the parts of a row and its label's logit: loss, lse, and with w the label's row

    dx = a (expect - rest w + s (w - mean w)) + g (expect + (1 - rest) w),
    rest the probability of all other pieces. What dweight needs of a row is listed side by side.
    """
    n = tl.program_id(0).to(tl.int64)
    if n >= tl.load(count_ptr):
        return
    row = tl.load(rows_ptr + n).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    x = tl.load(x_ptr + n * H + h, mask=h < H, other=0.0).to(ACC)
    label = tl.load(labels_ptr + row).to(tl.int64)
    tl.store(listed_label_ptr + n, label.to(tl.int32))
    valid = (label >= 0) & (label < V)
    # A label out of range makes the loss NaN; here it must only not be followed.
    label = tl.minimum(tl.maximum(label, 0), V - 1)
    w = tl.load(weight_ptr + label * H + h, mask=h < H, other=0.0).to(ACC)
    target = tl.sum(x * w)
    if HAS_BIAS:
        target += tl.load(bias_ptr + label).to(ACC)
    split = tl.arange(0, BLOCK_S)
    at = split.to(tl.int64) * N + n
    maxima = tl.load(max_ptr + at, mask=split < splits, other=-1e30)
    row_max = tl.maximum(tl.max(maxima, 0), target)
    fade = exp(maxima - row_max)
    other = tl.sum(fade * tl.load(sum_ptr + at, mask=split < splits, other=0.0), 0)
    row_sum = other + exp(target - row_max)
    rest = other / row_sum
    lse = row_max + tl.log(row_sum)
    tl.store(listed_rest_ptr + n, rest)
    tl.store(listed_lse_ptr + n, lse)
    loss = lse - target
    if SMOOTHING > 0:
        mean_weight = tl.load(mean_weight_ptr + h, mask=h < H, other=0.0).to(ACC)
        loss += SMOOTHING * (target - tl.sum(x * mean_weight) - tl.load(mean_bias_ptr).to(ACC))
    tl.store(lse_ptr + row, lse)
    tl.store(loss_ptr + row, tl.where(valid, loss, float("nan")))
    if GRAD:
        expect = tl.load(
            expect_ptr + at[:, None] * H + h[None, :],
            mask=(split < splits)[:, None] & (h < H)[None, :],
            other=0.0,
        )
        expect = tl.sum(expect * fade[:, None], 0) / row_sum
        dx = expect - rest * w
        if SMOOTHING > 0:
            dx += SMOOTHING * (w - mean_weight)
        if GRAD_PER_ROW:
            dx *= tl.load(dloss_ptr + row)
            if HAS_DLSE:
                dx += (expect + (1.0 - rest) * w) * tl.load(dlse_ptr + row)
        else:
            dx *= tl.load(dloss_ptr).to(ACC)
        tl.store(dx_ptr + row * H + h, dx.to(dx_ptr.dtype.element_ty), mask=h < H)


@triton.jit
def flash_dweight_kernel(
    x_ptr,  # [N, H], gathered
    weight_ptr,  # [V, H]
    bias_ptr,  # [V]
    rows_ptr,  # [N], int32
    count_ptr,  # [1], int32
    label_ptr,  # [N], int32, listed
    lse_ptr,  # [N], listed
    rest_ptr,  # [N], listed: 1 - p[label], of which p[label] - 1 keeps no digit where p is near 1
    dloss_ptr,  # [1], or [N] when GRAD_PER_ROW
    dlse_ptr,  # [N] when HAS_DLSE
    dweight_ptr,  # [splits, V, H], written
    dbias_ptr,  # [splits, V], written
    V,
    H,
    ROWS_SPLIT,
    HAS_BIAS: tl.constexpr,
    GRAD_PER_ROW: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    SMOOTHING: tl.constexpr,
    EVEN_H: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """BLOCK_V rows of dweight over one share of the rows, z made again."""
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    split = tl.program_id(1)
    h = tl.arange(0, BLOCK_H)
    row = BLOCK_H if EVEN_H else H
    w_at = weight_ptr + tl.minimum(v, V - 1)[:, None] * row + h[None, :]
    w = tl.load(w_at) if EVEN_H else tl.load(w_at, mask=(h < H)[None, :], other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + tl.minimum(v, V - 1)).to(ACC)
    dweight = tl.zeros((BLOCK_V, BLOCK_H), ACC)
    dbias = tl.zeros((BLOCK_V,), ACC)
    begin = split * ROWS_SPLIT
    end = min(begin + ROWS_SPLIT, tl.load(count_ptr))
    for start in range(begin, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        inside = m < end
        # Rows beyond the end have probability 0, no label, and repeat the last row of x.
        label = tl.load(label_ptr + m, mask=inside, other=-1)
        lse = tl.load(lse_ptr + m, mask=inside, other=float("inf"))
        x_at = x_ptr + tl.minimum(m, end - 1).to(tl.int64)[:, None] * row + h[None, :]
        x = tl.load(x_at) if EVEN_H else tl.load(x_at, mask=(h < H)[None, :], other=0.0)
        # z is made transposed, [BLOCK_V, BLOCK_M]: dz is then the left operand as it stands.
        z = tl.dot(w, tl.trans(x), input_precision=PRECISION, out_dtype=ACC)
        if HAS_BIAS:
            z += bias[:, None]
        hit = v[:, None] == label[None, :]
        rest = tl.load(rest_ptr + m, mask=inside, other=0.0)
        p = exp(z - lse[None, :])
        if SMOOTHING > 0:
            even = tl.full((1,), SMOOTHING, ACC) / V
            top = tl.full((1,), 1.0 - SMOOTHING, ACC)
            dz = (
                tl.where(hit, (1.0 - top) - rest[None, :], p) - tl.where(inside, even, 0.0)[None, :]
            )
        else:
            dz = tl.where(hit, -rest[None, :], p)
        if GRAD_PER_ROW:
            rows = tl.load(rows_ptr + m, mask=inside, other=0)
            dz *= tl.load(dloss_ptr + rows, mask=inside, other=0.0)[None, :]
            if HAS_DLSE:
                dz += p * tl.load(dlse_ptr + rows, mask=inside, other=0.0)[None, :]
        dbias += tl.sum(dz, 1)
        dweight = tl.dot(dz.to(x.dtype), x, dweight, input_precision=PRECISION, out_dtype=ACC)
    if not GRAD_PER_ROW:
        scale = tl.load(dloss_ptr).to(ACC)
        dweight *= scale
        dbias *= scale
    at = split.to(tl.int64) * V + v
    out = dweight_ptr + at[:, None] * H + h[None, :]
    if EVEN_H:
        tl.store(out, dweight, mask=(v < V)[:, None])
    else:
        tl.store(out, dweight, mask=(v < V)[:, None] & (h < H)[None, :])
    if HAS_BIAS:
        tl.store(dbias_ptr + at, dbias, mask=v < V)


# ---- launchers ---------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What both strategies take."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    labels: Tensor  # [N]
    label_smoothing: float
    rows: Tensor  # [N], int32
    count: Tensor  # [1], int32
    dloss: Tensor | None  # [] or [N]
    dlse: Tensor | None  # [N]
    need: Need
    loss: Tensor  # [N], written at rows
    lse: Tensor  # [N], written at rows


def cross_entropy(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N]
    ignore_index: int,
    label_smoothing: float,
    dloss: Tensor | None,  # [] or [N]
    dlse: Tensor | None,  # [N]
    need: Need,
    mostly_labelled: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [N], lse [N], dhidden, dweight, dbias); the last three empty unless needed.

    `mostly_labelled`: few rows are ignored, so materialised products may run over all of them.
    """
    if hidden.shape[0] == 0:
        loss, *gradients = no_rows(hidden, weight, bias, need)
        return loss, torch.zeros_like(loss), *gradients
    loss = hidden.new_zeros(hidden.shape[0], dtype=accumulator_dtype(hidden.dtype))
    lse = torch.zeros_like(loss)
    labels = labels.contiguous()
    rows, count = list_rows(labels, ignore_index)
    dloss = dloss if dloss is None else dloss.contiguous()
    dlse = dlse if dlse is None else dlse.contiguous()
    batch = Batch(
        hidden, weight, bias, labels, label_smoothing, rows, count, dloss, dlse, need, loss, lse
    )
    if launch.flash(hidden):
        return loss, lse, *flash(batch)
    return loss, lse, *materialised(batch, mostly_labelled)


def means(weight: Tensor, bias: Tensor | None, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """(mean row of weight [H], mean bias [1]) for the smoothed loss; not computed without it."""
    if not label_smoothing:
        return weight, weight
    acc = accumulator_dtype(weight.dtype)
    mean_bias = torch.zeros(1, dtype=acc, device=weight.device)
    if bias is not None:
        mean_bias += bias.mean(dtype=acc)
    return weight.mean(0, dtype=acc), mean_bias


def materialised(batch: Batch, mostly_labelled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias), empty unless needed; fills loss and lse."""
    hidden, weight, bias, labels, label_smoothing, rows, count, dloss, dlse, need, loss, lse = batch
    over_all_rows = mostly_labelled and hidden.dtype == launch.LIBRARY_DTYPE
    linear = LinearRows(hidden, weight, bias, rows, count, over_all_rows)
    target = torch.empty_like(loss)
    by_row = dloss is not None and dloss.ndim == 1
    scale = torch.ones_like(lse[:1]) if by_row or (over_all_rows and dloss is not None) else dloss
    gradients = Gradients(linear, hidden, weight, bias, need, scale)
    for start in linear.starts():
        z = linear.logits(start, lse=lse, store=bool(need), labels=labels, target=target)
        if need:
            partial = cross_entropy_dlogits(
                linear, start, z, labels, lse, dloss, dlse, label_smoothing, by_row, need.bias
            )
            gradients.add(start, z, partial)
    mean = means(linear.weight, bias, label_smoothing)
    cross_entropy_loss_kernel[(linear.N,)](
        linear.x, *mean, labels, rows, count, lse, target, loss, linear.V, linear.H,
        SMOOTHING=label_smoothing, ACC=linear.common["ACC"],
        BLOCK_H=triton.next_power_of_2(linear.H), num_warps=1,
    )  # fmt: skip
    return gradients.all()


def cross_entropy_dlogits(
    linear: LinearRows,
    start: int,
    z: Tensor,  # [c, pitch], logits, then dz
    labels: Tensor,  # [N]
    lse: Tensor,  # [N]
    dloss: Tensor,  # [] or, if by_row, [N]
    dlse: Tensor | None,  # [N]
    label_smoothing: float,
    by_row: bool,
    has_bias: bool,
) -> Tensor:
    """Turns the chunk's logits into dz in place; sums of its columns [row blocks, pitch]."""
    c = linear.rows_from(start)
    grid, tile, partial = linear.passes(c, has_bias)
    cross_entropy_dlogits_kernel[grid](
        z, labels, linear.rows, linear.count, lse,
        dloss, lse if dlse is None else dlse, partial, start, c, linear.V, linear.pitch,
        SMOOTHING=label_smoothing, GRAD_PER_ROW=by_row, HAS_DLSE=dlse is not None,
        HAS_BIAS=has_bias, SCALED=linear.over_all_rows and not by_row, FILL=linear.over_all_rows,
        ACC=linear.common["ACC"], **tile,
    )  # fmt: skip
    return partial


def flash(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias), empty unless needed; fills loss and lse."""
    hidden, weight, bias, labels, label_smoothing, rows, count, dloss, dlse, need, loss, lse = batch
    dhidden = hidden.new_zeros(hidden.shape if need.hidden else 0)
    inputs = hidden, weight, bias
    N, H = hidden.shape
    V = weight.shape[0]
    x = gather_rows(hidden, rows, count)
    w = weight.to(hidden.dtype).contiguous()
    common = {"ACC": launch.accumulator(hidden), "PRECISION": launch.precision(hidden)}
    block_h = max(16, triton.next_power_of_2(H))
    has_bias = bias is not None
    mean = means(w, bias, label_smoothing)
    bias = w if bias is None else bias.contiguous()
    by_row = dloss is not None and dloss.ndim == 1

    blocks, splits = launch.flash_fwd_blocks(N, V, x)
    maxima = lse.new_empty(splits, N)
    sums = torch.empty_like(maxima)
    expect = lse.new_empty(splits, N if need.hidden else 0, H)
    v_split = triton.cdiv(triton.cdiv(V, splits), blocks["BLOCK_V"]) * blocks["BLOCK_V"]
    flash_fwd_kernel[(triton.cdiv(N, blocks["BLOCK_M"]), splits)](
        x, w, bias, labels, rows, count, maxima, sums, expect, N, V, H, v_split,
        HAS_BIAS=has_bias, GRAD=need.hidden, EVEN_H=block_h == H,
        EVEN_V=V % blocks["BLOCK_V"] == 0, BLOCK_H=block_h, **common, **blocks,
    )  # fmt: skip
    listed = torch.empty_like(rows), torch.empty_like(lse), torch.empty_like(lse)
    flash_combine_kernel[(N,)](
        maxima, sums, expect, x, w, bias, *mean, labels, rows, count,
        lse if dloss is None else dloss, lse if dlse is None else dlse, loss, lse, *listed,
        dhidden, N, V, H, splits, HAS_BIAS=has_bias,
        GRAD=need.hidden, GRAD_PER_ROW=by_row, HAS_DLSE=dlse is not None, SMOOTHING=label_smoothing,
        ACC=common["ACC"], BLOCK_S=triton.next_power_of_2(splits), BLOCK_H=block_h, num_warps=2,
    )  # fmt: skip
    if not (need.weight or need.bias):
        return gradients_like(*inputs, dhidden, None, None)

    blocks, splits = launch.flash_dweight_blocks(N, V, x)
    dweight = lse.new_empty(splits, V, H)
    dbias = lse.new_empty(splits, V)
    rows_split = triton.cdiv(triton.cdiv(N, splits), blocks["BLOCK_M"]) * blocks["BLOCK_M"]
    flash_dweight_kernel[(triton.cdiv(V, blocks["BLOCK_V"]), splits)](
        x, w, bias, rows, count, *listed, dloss, lse if dlse is None else dlse,
        dweight, dbias, V, H, rows_split,
        HAS_BIAS=has_bias, GRAD_PER_ROW=by_row, HAS_DLSE=dlse is not None,
        SMOOTHING=label_smoothing, EVEN_H=block_h == H, BLOCK_H=block_h, **common, **blocks,
    )  # fmt: skip
    return gradients_like(
        *inputs,
        dhidden,
        dweight.sum(0) if need.weight else None,
        dbias.sum(0) if need.bias else None,
    )


# ---- operator ----------------------------------------------------------------------------------


IMPLEMENTATIONS = {"triton": cross_entropy, "chunked": chunked.cross_entropy}


@torch.library.custom_op("mvbert::linear_cross_entropy_sum", mutates_args=())
def linear_cross_entropy_sum(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N]
    scale: Tensor,  # [], float32: what the sum of the losses is multiplied by
    ignore_index: int,
    label_smoothing: float,
    need: list[bool],
    backend: str,
    mostly_labelled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ops.check_range("labels", labels, weight.shape[0], ignore_index)
    loss, _, *gradients = ops.run(
        IMPLEMENTATIONS[backend], hidden, weight, bias, labels, ignore_index, label_smoothing,
        scale if any(need) else None, None, Need(*need), mostly_labelled,
    )  # fmt: skip
    return ops.total(loss, scale), *gradients


@linear_cross_entropy_sum.register_fake
def _(hidden, weight, bias, labels, scale, ignore, smoothing, need, backend, mostly_labelled):
    return ops.sum_like(hidden), *ops.empty_gradients(hidden, weight, bias, need)


linear_cross_entropy_sum.register_autograd(ops.sum_backward, setup_context=ops.save_gradients)


@torch.library.custom_op("mvbert::linear_cross_entropy_rows", mutates_args=())
def linear_cross_entropy_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, lse, and the gradients for an upstream gradient of 1, made on the way if needed)."""
    ops.check_range("labels", labels, weight.shape[0], ignore_index)
    one = torch.ones((), dtype=accumulator_dtype(hidden.dtype)) if any(need) else None
    return ops.run(
        IMPLEMENTATIONS[backend], hidden, weight, bias, labels, ignore_index, label_smoothing,
        one, None, Need(*need),
    )  # fmt: skip


@linear_cross_entropy_rows.register_fake
def _(hidden, weight, bias, labels, ignore_index, label_smoothing, need, backend):
    return (
        ops.rows_like(hidden),
        ops.rows_like(hidden),
        *ops.empty_gradients(hidden, weight, bias, need),
    )


@torch.library.custom_op("mvbert::linear_cross_entropy_rows_backward", mutates_args=())
def linear_cross_entropy_rows_backward(
    dloss: Tensor,  # [N]
    dlse: Tensor | None,  # [N]
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    unit: list[Tensor],  # the gradients for dloss = 1, empty where there are none
    ignore_index: int,
    label_smoothing: float,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if dlse is None and any(u.numel() for u in unit):
        # Rows that are summed or averaged later all have one upstream gradient. On a CPU that can
        # be looked at: the unit gradients then only need scaling.
        upstream = dloss[labels != ignore_index]
        if upstream.numel() == 0 or bool((upstream == upstream[0]).all()):
            factor = upstream[0] if upstream.numel() else dloss.new_zeros(())
            return tuple(u * factor.to(u.dtype) for u in unit)
    _, _, *gradients = ops.run(
        IMPLEMENTATIONS[backend], hidden, weight, bias, labels, ignore_index, label_smoothing,
        dloss, dlse, Need(*need),
    )  # fmt: skip
    return tuple(gradients)


@linear_cross_entropy_rows_backward.register_fake
def _(dloss, dlse, hidden, weight, bias, labels, unit, ignore_index, smoothing, need, backend):
    return ops.empty_gradients(hidden, weight, bias, need)


def _save_rows(ctx, inputs, output):
    hidden, weight, bias, labels, ctx.ignore_index, ctx.label_smoothing, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, labels, *output[2:])


def _rows_backward(ctx, dloss, dlse, *dgradients):
    ops.refuse_second_order(dgradients)
    if dloss is None and dlse is None:
        return (None,) * 8
    hidden, weight, bias, labels, *unit = ctx.saved_tensors
    if dloss is None:
        dloss = torch.zeros_like(dlse)
    need = [bool(n) for n in ctx.needs_input_grad[:3]]
    gradients = linear_cross_entropy_rows_backward(
        dloss, dlse, hidden, weight, bias, labels, unit, ctx.ignore_index, ctx.label_smoothing,
        need, ctx.backend,
    )  # fmt: skip
    return *(g if n else None for g, n in zip(gradients, need, strict=True)), *(None,) * 5


linear_cross_entropy_rows.register_autograd(_rows_backward, setup_context=_save_rows)
