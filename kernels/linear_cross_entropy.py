"""Softmax cross-entropy of a linear layer, logits never whole in memory.

    z = x @ weight.T + bias
    loss = lse - (1 - s) z[label] - s mean(z),      lse = log sum_v exp(z_v)
    dz = a (softmax(z) - (1 - s) onehot(label) - s / V) + g softmax(z)

with a = dloss and g = dlse of the row, s the label smoothing. Options that cost nothing where they
are not used: class weights c_v multiply what a piece has to do with the loss; a z-loss adds
k lse^2, so 2 k a lse to g; a softcap makes z = cap tanh(z / cap), and dz times 1 - (z / cap)^2.

Two strategies behind one function:

    materialised (H > launch.FLASH_WIDTH, or a softcap)   logits of up to launch.CHUNK_ROWS rows are
        written once, in the input's dtype and with a pitch that keeps every row aligned; turned
        into dz in place; multiplied twice. 6 N V H FLOP.
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
    LossOptions,
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
    class_weight: Tensor | None = None,  # [V]
    softcap: float = 0.0,  # 0: none
    z_loss: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-row softmax cross-entropy of the logits, their log-sum-exp, and the largest one's id.

    z = hidden @ weight.T + bias, capped: softcap * tanh(z / softcap)
    loss = (1 - s) c[label] (lse - z[label]) + s mean(c (lse - z)) + z_loss lse^2
    0, 0 and -1 on ignored rows. -> [N], [N], [N]
    """
    ops.check_range("labels", labels, weight.shape[0], ignore_index)
    logits = upcast(plain_linear(hidden, weight, bias))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    labelled = labels != ignore_index
    label = labels.long().where(labelled, 0)
    lse = torch.logsumexp(logits, 1)
    nll = lse[:, None] - logits
    if class_weight is not None:
        nll = nll * class_weight.to(logits.dtype)
    loss = (1 - label_smoothing) * nll.gather(1, label[:, None])[:, 0]
    loss = loss + label_smoothing * nll.mean(1) + z_loss * lse.square()
    zero = torch.zeros((), dtype=loss.dtype, device=loss.device)
    return (
        torch.where(labelled, loss, zero),
        torch.where(labelled, lse, zero),
        torch.where(labelled, logits.argmax(1), -1),
    )


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
    class_weight_ptr,  # [V] when WEIGHTED
    mean_class_weight_ptr,  # [1] when WEIGHTED and SMOOTHING > 0
    z_loss_ptr,  # [1] when Z_LOSS
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
    WEIGHTED: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
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
    if WEIGHTED:
        spread = tl.zeros((1,), ACC)
        if SMOOTHING > 0:
            even *= tl.load(class_weight_ptr + v, mask=v < V, other=0.0).to(ACC)[None, :]
            spread += SMOOTHING * tl.load(mean_class_weight_ptr).to(ACC)
    for step in range(STEPS):
        m = first + step * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = m < count
        rows = tl.load(rows_ptr + start + m, mask=inside, other=0)
        label = tl.load(labels_ptr + rows, mask=inside, other=-1).to(tl.int32)
        # Rows beyond the count have probability 0 and no label.
        lse = tl.load(lse_ptr + rows, mask=inside, other=float("inf"))
        at = logits_ptr + m.to(tl.int64)[:, None] * stride_z + v[None, :]
        mask = inside[:, None] & (v < stride_z)[None, :]
        # Loads are masked by the pitch, not by V, so that they stay 16 bytes wide.
        z = tl.load(at, mask=mask, other=0.0).to(ACC)
        p = exp(z - lse[:, None])
        if WEIGHTED:
            known = (label >= 0) & (label < V)
            own = top * tl.load(class_weight_ptr + label, mask=known, other=0.0).to(ACC)
            hard = tl.where(label[:, None] == v[None, :], own[:, None], 0.0)
        else:
            hard = tl.where(label[:, None] == v[None, :], top, 0.0)
        if SMOOTHING > 0:
            hard += tl.where(inside[:, None], even, 0.0)
        dz = p * (own + spread)[:, None] - hard if WEIGHTED else p - hard
        if Z_LOSS:
            slope = 2.0 * tl.load(z_loss_ptr).to(ACC) * tl.where(inside, lse, 0.0)
            dz += p * slope[:, None]
        if GRAD_PER_ROW:
            a = tl.load(dloss_ptr + rows, mask=inside, other=0.0)
            dz *= a[:, None]
            if HAS_DLSE:
                dz += p * tl.load(dlse_ptr + rows, mask=inside, other=0.0)[:, None]
        if SOFTCAP > 0:
            # Columns from V on are -inf.
            share = tl.where((v < V)[None, :], z / SOFTCAP, 1.0)
            dz *= 1.0 - share * share
        if SCALED:
            dz *= tl.load(dloss_ptr).to(ACC)
        if FILL:
            mask = (m < c)[:, None] & (v < stride_z)[None, :]
        tl.store(at, dz.to(logits_ptr.dtype.element_ty), mask=mask)
        if HAS_BIAS:
            column += dz
    if HAS_BIAS:
        at = dbias_ptr + tl.program_id(0).to(tl.int64) * stride_z + v
        tl.store(at, tl.sum(column, 0), mask=v < stride_z)


@triton.jit
def mean_logits_kernel(
    logits_ptr,  # [c, pitch]
    class_weight_ptr,  # [V] when WEIGHTED
    rows_ptr,  # [N], int32
    count_ptr,  # [1], int32
    mean_ptr,  # [N], written at rows
    start,
    c,
    V,
    stride_z,
    WEIGHTED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """mean(c z) of each row, for the smoothed loss of logits that are no linear function of x."""
    m = tl.program_id(0).to(tl.int64)
    if m >= min(tl.load(count_ptr) - start, c):
        return
    total = tl.zeros((BLOCK_V,), ACC)
    for first in range(0, V, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        z = tl.load(logits_ptr + m * stride_z + v, mask=v < V, other=0.0).to(ACC)
        if WEIGHTED:
            z *= tl.load(class_weight_ptr + v, mask=v < V, other=0.0).to(ACC)
        total += z
    tl.store(mean_ptr + tl.load(rows_ptr + start + m), tl.sum(total, 0) / V)


@triton.jit
def row_loss(
    lse,
    target,  # z[label]
    mean,  # mean(c z) when SMOOTHING > 0
    class_weight_ptr,  # [V] when WEIGHTED
    mean_class_weight_ptr,  # [1] when WEIGHTED and SMOOTHING > 0
    z_loss_ptr,  # [1] when Z_LOSS
    label,  # in [0, V)
    SMOOTHING: tl.constexpr,
    WEIGHTED: tl.constexpr,
    Z_LOSS: tl.constexpr,
    ACC: tl.constexpr,
):
    loss = lse - target
    if WEIGHTED:
        loss *= (1.0 - SMOOTHING) * tl.load(class_weight_ptr + label).to(ACC)
        if SMOOTHING > 0:
            loss += SMOOTHING * (lse * tl.load(mean_class_weight_ptr).to(ACC) - mean)
    elif SMOOTHING > 0:
        loss += SMOOTHING * (target - mean)
    if Z_LOSS:
        loss += tl.load(z_loss_ptr).to(ACC) * lse * lse
    return loss


@triton.jit
def cross_entropy_loss_kernel(
    x_ptr,  # [N, H], gathered, when SMOOTHING
    mean_weight_ptr,  # [H], when SMOOTHING; with a SOFTCAP the means of the rows' logits [N]
    mean_bias_ptr,  # [1], when SMOOTHING
    class_weight_ptr,  # [V] when WEIGHTED
    mean_class_weight_ptr,  # [1] when WEIGHTED and SMOOTHING
    z_loss_ptr,  # [1] when Z_LOSS
    labels_ptr,  # [N]
    rows_ptr,  # [N], int32
    count_ptr,  # [1], int32
    lse_ptr,  # [N]
    target_ptr,  # [N]
    loss_ptr,  # [N], written at rows
    V,
    H,
    SMOOTHING: tl.constexpr,
    WEIGHTED: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The loss of a row; mean z = x . mean weight row + mean bias where no softcap bends it."""
    n = tl.program_id(0)
    if n >= tl.load(count_ptr):
        return
    row = tl.load(rows_ptr + n)
    label = tl.load(labels_ptr + row)
    valid = (label >= 0) & (label < V)
    mean = 0.0
    if SMOOTHING > 0:
        if SOFTCAP > 0:
            mean = tl.load(mean_weight_ptr + row)
        else:
            h = tl.arange(0, BLOCK_H)
            x = tl.load(x_ptr + n.to(tl.int64) * H + h, mask=h < H, other=0.0).to(ACC)
            mean = tl.sum(x * tl.load(mean_weight_ptr + h, mask=h < H, other=0.0).to(ACC))
            mean += tl.load(mean_bias_ptr).to(ACC)
    loss = row_loss(
        tl.load(lse_ptr + row), tl.load(target_ptr + row), mean, class_weight_ptr,
        mean_class_weight_ptr, z_loss_ptr, tl.where(valid, label, 0), SMOOTHING, WEIGHTED, Z_LOSS,
        ACC,
    )  # fmt: skip
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
    best_ptr,  # [splits, N], int32, written when PREDICT: where the largest logit is
    expect_ptr,  # [splits, N, H], written when GRAD: sum_{v != label} exp(z_v - max) weight[v]
    N,
    V,
    H,
    V_SPLIT,
    HAS_BIAS: tl.constexpr,
    GRAD: tl.constexpr,
    PREDICT: tl.constexpr,
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
    if PREDICT:
        best = tl.zeros((BLOCK_M,), tl.int32)
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
        skip = label[:, None] == v[None, :]
        if not EVEN_V:
            skip |= (v >= end)[None, :]
        z = tl.where(skip, -float("inf"), z)
        if PREDICT:
            tile_max, place = tl.max(z, 1, return_indices=True)
            best = tl.where(tile_max > row_max, start + place, best)
            new_max = tl.maximum(row_max, tile_max)
        else:
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
    if PREDICT:
        tl.store(best_ptr + at, best, mask=m < count)
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
    best_ptr,  # [splits, N], int32, when PREDICT
    expect_ptr,  # [splits, N, H] when GRAD
    x_ptr,  # [N, H], gathered
    weight_ptr,  # [V, H]
    bias_ptr,  # [V]
    mean_weight_ptr,  # [H], when SMOOTHING > 0
    mean_bias_ptr,  # [1], when SMOOTHING > 0
    class_weight_ptr,  # [V] when WEIGHTED
    mean_class_weight_ptr,  # [1] when WEIGHTED and SMOOTHING > 0
    z_loss_ptr,  # [1] when Z_LOSS
    labels_ptr,  # [N]
    rows_ptr,  # [N], int32
    count_ptr,  # [1], int32
    dloss_ptr,  # [1], or [N] when GRAD_PER_ROW
    dlse_ptr,  # [N] when HAS_DLSE
    loss_ptr,  # [N], written at rows
    lse_ptr,  # [N], written at rows
    predicted_ptr,  # [N], written at rows when PREDICT
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
    WEIGHTED: tl.constexpr,
    Z_LOSS: tl.constexpr,
    PREDICT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Joins the parts of a row and its label's logit: loss, lse, and with w the label's row

    dx = a (expect - rest w + s (w - mean w)) + g (expect + (1 - rest) w),
    rest the probability of all other pieces; with class weights c, m = (1 - s) c[label] + s mean c,
    dx = a (m (expect - rest w) + s (mean(c) w - mean(c w))) + ..
    What dweight needs of a row is listed side by side.
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
    mean = 0.0
    if SMOOTHING > 0:
        mean_weight = tl.load(mean_weight_ptr + h, mask=h < H, other=0.0).to(ACC)
        mean = tl.sum(x * mean_weight) + tl.load(mean_bias_ptr).to(ACC)
    loss = row_loss(
        lse, target, mean, class_weight_ptr, mean_class_weight_ptr, z_loss_ptr, label,
        SMOOTHING, WEIGHTED, Z_LOSS, ACC,
    )  # fmt: skip
    tl.store(lse_ptr + row, lse)
    tl.store(loss_ptr + row, tl.where(valid, loss, float("nan")))
    if PREDICT:
        # Of equal logits the one with the lowest id.
        best = tl.load(best_ptr + at, mask=split < splits, other=0).to(tl.int64)
        largest = tl.max(maxima, 0)
        best = tl.min(tl.where(maxima == largest, best, V), 0)
        own = (target > largest) | ((target == largest) & (label < best))
        tl.store(predicted_ptr + row, tl.where(own, label, best))
    if GRAD:
        expect = tl.load(
            expect_ptr + at[:, None] * H + h[None, :],
            mask=(split < splits)[:, None] & (h < H)[None, :],
            other=0.0,
        )
        expect = tl.sum(expect * fade[:, None], 0) / row_sum
        dx = expect - rest * w
        if WEIGHTED:
            mass = (1.0 - SMOOTHING) * tl.load(class_weight_ptr + label).to(ACC)
            if SMOOTHING > 0:
                spread = SMOOTHING * tl.load(mean_class_weight_ptr).to(ACC)
                dx = dx * (mass + spread) + spread * w - SMOOTHING * mean_weight
            else:
                dx *= mass
        elif SMOOTHING > 0:
            dx += SMOOTHING * (w - mean_weight)
        if Z_LOSS:
            dx += (expect + (1.0 - rest) * w) * (2.0 * tl.load(z_loss_ptr).to(ACC) * lse)
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
    class_weight_ptr,  # [V] when WEIGHTED
    mean_class_weight_ptr,  # [1] when WEIGHTED and SMOOTHING > 0
    z_loss_ptr,  # [1] when Z_LOSS
    dweight_ptr,  # [splits, V, H], written
    dbias_ptr,  # [splits, V], written
    V,
    H,
    ROWS_SPLIT,
    HAS_BIAS: tl.constexpr,
    GRAD_PER_ROW: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    SMOOTHING: tl.constexpr,
    WEIGHTED: tl.constexpr,
    Z_LOSS: tl.constexpr,
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
    if WEIGHTED and SMOOTHING > 0:
        even = tl.load(class_weight_ptr + v, mask=v < V, other=0.0).to(ACC)
        even *= tl.full((1,), SMOOTHING, ACC) / V
        spread = SMOOTHING * tl.load(mean_class_weight_ptr).to(ACC)
    if Z_LOSS:
        z_factor = 2.0 * tl.load(z_loss_ptr).to(ACC)
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
        if WEIGHTED:
            known = (label >= 0) & (label < V)
            mass = tl.load(class_weight_ptr + label, mask=known, other=0.0).to(ACC)
            if SMOOTHING > 0:
                mass = mass * (1.0 - SMOOTHING) + spread
                dz = tl.where(hit, spread - (mass * rest)[None, :], mass[None, :] * p)
                dz -= tl.where(inside[None, :], even[:, None], 0.0)
            else:
                dz = tl.where(hit, -rest[None, :], p) * mass[None, :]
        elif SMOOTHING > 0:
            even = tl.full((1,), SMOOTHING, ACC) / V
            top = tl.full((1,), 1.0 - SMOOTHING, ACC)
            dz = (
                tl.where(hit, (1.0 - top) - rest[None, :], p) - tl.where(inside, even, 0.0)[None, :]
            )
        else:
            dz = tl.where(hit, -rest[None, :], p)
        if Z_LOSS:
            dz += p * (z_factor * tl.where(inside, lse, 0.0))[None, :]
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
    options: LossOptions
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
    options: LossOptions,
    dloss: Tensor | None,  # [] or [N]
    dlse: Tensor | None,  # [N]
    need: Need,
    mostly_labelled: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [N], lse [N], predicted [N], dhidden, dweight, dbias), empty unless needed.

    `mostly_labelled`: few rows are ignored, so materialised products may run over all of them.
    """
    if hidden.shape[0] == 0:
        loss, *gradients = no_rows(hidden, weight, bias, need)
        return loss, torch.zeros_like(loss), labels.new_empty(0, dtype=torch.int64), *gradients
    loss = hidden.new_zeros(hidden.shape[0], dtype=accumulator_dtype(hidden.dtype))
    lse = torch.zeros_like(loss)
    labels = labels.contiguous()
    rows, count = list_rows(labels, options.ignore_index)
    dloss = dloss if dloss is None else dloss.contiguous()
    dlse = dlse if dlse is None else dlse.contiguous()
    batch = Batch(hidden, weight, bias, labels, options, rows, count, dloss, dlse, need, loss, lse)
    if launch.flash(hidden) and not options.softcap:
        return loss, lse, *flash(batch)
    return loss, lse, *materialised(batch, mostly_labelled)


class Means(NamedTuple):
    """Of all pieces, for the smoothed loss; weighted by class where classes have weights."""

    weight: Tensor  # [H]
    bias: Tensor  # [1]
    class_weight: Tensor  # [1]


def means(weight: Tensor, bias: Tensor | None, options: LossOptions) -> Means:
    """Not computed without smoothing."""
    if not options.label_smoothing:
        return Means(weight, weight, weight)
    acc = accumulator_dtype(weight.dtype)
    zero = torch.zeros(1, dtype=acc, device=weight.device)
    if options.class_weight is None:
        mean_bias = zero if bias is None else zero + bias.mean(dtype=acc)
        return Means(weight.mean(0, dtype=acc), mean_bias, zero)
    shares = options.class_weight.to(acc) / weight.shape[0]
    mean_bias = zero if bias is None else zero + torch.dot(shares, bias.to(acc))
    return Means(torch.mv(weight.t().to(acc), shares), mean_bias, zero + shares.sum())


def extras(options: LossOptions, mean: Means, unused: Tensor) -> tuple[tuple, dict[str, bool]]:
    """Pointers and flags of the options of a loss, as its kernels take them."""
    weighted, z_loss = options.class_weight is not None, options.z_loss is not None
    pointers = (
        options.class_weight.contiguous() if weighted else unused,
        mean.class_weight,
        options.z_loss if z_loss else unused,
    )
    return pointers, {"WEIGHTED": weighted, "Z_LOSS": z_loss}


def materialised(batch: Batch, mostly_labelled: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(predicted, dhidden, dweight, dbias), empty unless needed; fills loss and lse."""
    hidden, weight, bias, labels, options, rows, count, dloss, dlse, need, loss, lse = batch
    over_all_rows = mostly_labelled and hidden.dtype == launch.LIBRARY_DTYPE
    linear = LinearRows(
        hidden, weight, bias, rows, count, over_all_rows, options.softcap, options.predict
    )
    mean = means(linear.weight, bias, options)
    pointers, flags = extras(options, mean, lse)
    target = torch.empty_like(loss)
    by_row = dloss is not None and dloss.ndim == 1
    scale = torch.ones_like(lse[:1]) if by_row or (over_all_rows and dloss is not None) else dloss
    gradients = Gradients(linear, hidden, weight, bias, need, scale)
    # The mean of capped logits cannot be had from the mean of the rows of weight.
    bent = bool(options.softcap and options.label_smoothing)
    mean_logits = torch.empty_like(loss) if bent else mean.weight
    for start in linear.starts():
        store = bool(need) or bent
        z = linear.logits(start, lse=lse, store=store, labels=labels, target=target)
        if bent:
            c = linear.rows_from(start)
            mean_logits_kernel[(c,)](
                z, pointers[0], rows, count, mean_logits, start, c, linear.V, linear.pitch,
                WEIGHTED=flags["WEIGHTED"], ACC=linear.common["ACC"], BLOCK_V=1024, num_warps=4,
            )  # fmt: skip
        if need:
            partial = cross_entropy_dlogits(
                linear, start, z, labels, lse, dloss, dlse, options, mean, by_row, need.bias
            )
            gradients.add(start, z, partial)
    cross_entropy_loss_kernel[(linear.N,)](
        linear.x, mean_logits, mean.bias, *pointers, labels, rows, count, lse, target, loss,
        linear.V, linear.H, SMOOTHING=options.label_smoothing, SOFTCAP=options.softcap,
        ACC=linear.common["ACC"], BLOCK_H=triton.next_power_of_2(linear.H), num_warps=1, **flags,
    )  # fmt: skip
    return linear.predicted, *gradients.all()


def cross_entropy_dlogits(
    linear: LinearRows,
    start: int,
    z: Tensor,  # [c, pitch], logits, then dz
    labels: Tensor,  # [N]
    lse: Tensor,  # [N]
    dloss: Tensor,  # [] or, if by_row, [N]
    dlse: Tensor | None,  # [N]
    options: LossOptions,
    mean: Means,
    by_row: bool,
    has_bias: bool,
) -> Tensor:
    """Turns the chunk's logits into dz in place; sums of its columns [row blocks, pitch]."""
    pointers, flags = extras(options, mean, lse)
    c = linear.rows_from(start)
    busy = flags["WEIGHTED"] or flags["Z_LOSS"] or options.softcap > 0
    grid, tile, partial = linear.passes(c, has_bias, busy)
    cross_entropy_dlogits_kernel[grid](
        z, labels, linear.rows, linear.count, lse, dloss, lse if dlse is None else dlse,
        *pointers, partial, start, c, linear.V, linear.pitch,
        SMOOTHING=options.label_smoothing, SOFTCAP=options.softcap, GRAD_PER_ROW=by_row,
        HAS_DLSE=dlse is not None, HAS_BIAS=has_bias,
        SCALED=linear.over_all_rows and not by_row, FILL=linear.over_all_rows,
        ACC=linear.common["ACC"], **flags, **tile,
    )  # fmt: skip
    return partial


def flash(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(predicted, dhidden, dweight, dbias), empty unless needed; fills loss and lse."""
    hidden, weight, bias, labels, options, rows, count, dloss, dlse, need, loss, lse = batch
    dhidden = hidden.new_zeros(hidden.shape if need.hidden else 0)
    inputs = hidden, weight, bias
    N, H = hidden.shape
    V = weight.shape[0]
    x = gather_rows(hidden, rows, count)
    w = weight.to(hidden.dtype).contiguous()
    common = {"ACC": launch.accumulator(hidden), "PRECISION": launch.precision(hidden)}
    block_h = max(16, triton.next_power_of_2(H))
    has_bias = bias is not None
    mean = means(w, bias, options)
    pointers, flags = extras(options, mean, lse)
    flags["SMOOTHING"] = options.label_smoothing
    bias = w if bias is None else bias.contiguous()
    by_row = dloss is not None and dloss.ndim == 1

    blocks, splits = launch.flash_fwd_blocks(N, V, x)
    maxima = lse.new_empty(splits, N)
    sums = torch.empty_like(maxima)
    best = rows.new_empty(splits, N) if options.predict else rows
    predicted = rows.new_full((N if options.predict else 0,), -1, dtype=torch.int64)
    expect = lse.new_empty(splits, N if need.hidden else 0, H)
    v_split = triton.cdiv(triton.cdiv(V, splits), blocks["BLOCK_V"]) * blocks["BLOCK_V"]
    flash_fwd_kernel[(triton.cdiv(N, blocks["BLOCK_M"]), splits)](
        x, w, bias, labels, rows, count, maxima, sums, best, expect, N, V, H, v_split,
        HAS_BIAS=has_bias, GRAD=need.hidden, PREDICT=options.predict, EVEN_H=block_h == H,
        EVEN_V=V % blocks["BLOCK_V"] == 0, BLOCK_H=block_h, **common, **blocks,
    )  # fmt: skip
    listed = torch.empty_like(rows), torch.empty_like(lse), torch.empty_like(lse)
    flash_combine_kernel[(N,)](
        maxima, sums, best, expect, x, w, bias, mean.weight, mean.bias, *pointers, labels, rows,
        count, lse if dloss is None else dloss, lse if dlse is None else dlse, loss, lse, predicted,
        *listed, dhidden, N, V, H, splits, HAS_BIAS=has_bias, GRAD=need.hidden,
        GRAD_PER_ROW=by_row, HAS_DLSE=dlse is not None, PREDICT=options.predict,
        ACC=common["ACC"], BLOCK_S=triton.next_power_of_2(splits), BLOCK_H=block_h, num_warps=2,
        **flags,
    )  # fmt: skip
    if not (need.weight or need.bias):
        return predicted, *gradients_like(*inputs, dhidden, None, None)

    blocks, splits = launch.flash_dweight_blocks(
        N, V, x, options=flags["WEIGHTED"] or flags["Z_LOSS"]
    )
    dweight = lse.new_empty(splits, V, H)
    dbias = lse.new_empty(splits, V)
    rows_split = triton.cdiv(triton.cdiv(N, splits), blocks["BLOCK_M"]) * blocks["BLOCK_M"]
    flash_dweight_kernel[(triton.cdiv(V, blocks["BLOCK_V"]), splits)](
        x, w, bias, rows, count, *listed, dloss, lse if dlse is None else dlse, *pointers,
        dweight, dbias, V, H, rows_split, HAS_BIAS=has_bias, GRAD_PER_ROW=by_row,
        HAS_DLSE=dlse is not None, EVEN_H=block_h == H, BLOCK_H=block_h,
        **flags, **common, **blocks,
    )  # fmt: skip
    return predicted, *gradients_like(
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
    class_weight: Tensor | None,  # LossOptions from here on
    z_loss: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    predict: bool,
    need: list[bool],
    backend: str,
    mostly_labelled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(scaled sum, lse, predicted, dhidden, dweight, dbias), the latter four empty unless needed"""
    ops.check_range("labels", labels, weight.shape[0], ignore_index)
    options = LossOptions(ignore_index, label_smoothing, class_weight, softcap, z_loss, predict)
    loss, lse, predicted, *gradients = ops.run(
        IMPLEMENTATIONS[backend], hidden, weight, bias, labels, options,
        scale if any(need) else None, None, Need(*need), mostly_labelled,
    )  # fmt: skip
    return ops.total(loss, scale), lse, predicted, *gradients


def predicted_like(labels: Tensor, predict: bool) -> Tensor:
    return labels.new_empty(labels.shape if predict else (0,), dtype=torch.int64)


@linear_cross_entropy_sum.register_fake
def _(hidden, weight, bias, labels, scale, cw, z, ignore, smoothing, cap, predict, need, *_):
    return (
        ops.sum_like(hidden),
        ops.rows_like(hidden),
        predicted_like(labels, predict),
        *ops.empty_gradients(hidden, weight, bias, need),
    )


linear_cross_entropy_sum.register_autograd(ops.sum_backward, setup_context=ops.save_gradients)


@torch.library.custom_op("mvbert::linear_cross_entropy_rows", mutates_args=())
def linear_cross_entropy_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    class_weight: Tensor | None,
    z_loss: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    predict: bool,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, lse, predicted, and the gradients for an upstream gradient of 1, made on the way if
    needed)."""
    ops.check_range("labels", labels, weight.shape[0], ignore_index)
    options = LossOptions(ignore_index, label_smoothing, class_weight, softcap, z_loss, predict)
    one = torch.ones((), dtype=accumulator_dtype(hidden.dtype)) if any(need) else None
    return ops.run(
        IMPLEMENTATIONS[backend], hidden, weight, bias, labels, options, one, None, Need(*need)
    )


@linear_cross_entropy_rows.register_fake
def _(hidden, weight, bias, labels, cw, z, ignore, smoothing, cap, predict, need, backend):
    return (
        ops.rows_like(hidden),
        ops.rows_like(hidden),
        predicted_like(labels, predict),
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
    class_weight: Tensor | None,
    z_loss: Tensor | None,
    unit: list[Tensor],  # the gradients for dloss = 1, empty where there are none
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
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
    options = LossOptions(ignore_index, label_smoothing, class_weight, softcap, z_loss)
    _, _, _, *gradients = ops.run(
        IMPLEMENTATIONS[backend], hidden, weight, bias, labels, options, dloss, dlse, Need(*need)
    )
    return tuple(gradients)


@linear_cross_entropy_rows_backward.register_fake
def _(dloss, dlse, hidden, weight, bias, labels, cw, z, unit, ignore, smoothing, cap, need, _):
    return ops.empty_gradients(hidden, weight, bias, need)


def _save_rows(ctx, inputs, output):
    *tensors, ctx.ignore_index, ctx.label_smoothing, ctx.softcap, _, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, *output[3:])


def _rows_backward(ctx, dloss, dlse, _, *dgradients):
    ops.refuse_second_order(dgradients)
    if dloss is None and dlse is None:
        return (None,) * 12
    *tensors, dhidden, dweight, dbias = ctx.saved_tensors
    if dloss is None:
        dloss = torch.zeros_like(dlse)
    need = [bool(n) for n in ctx.needs_input_grad[:3]]
    gradients = linear_cross_entropy_rows_backward(
        dloss, dlse, *tensors, [dhidden, dweight, dbias], ctx.ignore_index, ctx.label_smoothing,
        ctx.softcap, need, ctx.backend,
    )  # fmt: skip
    return *(g if n else None for g, n in zip(gradients, need, strict=True)), *(None,) * 9


linear_cross_entropy_rows.register_autograd(_rows_backward, setup_context=_save_rows)
