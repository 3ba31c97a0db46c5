"""Embedding rows from two tables, plus position and type, normalised, with dropout: one pass.

    s = table[id] + position[t] + type[k],     table = [teacher; student], never joined
    y = dropout(weight * (s - mean) * rstd + bias)

Forward writes y and keeps mean and rstd of each row in float32, nothing else: backward gathers s
again (the tables stay in L2 far better than a saved copy) and draws the dropout mask again from its
seed. With r = rstd, u = (s - mean) r and g = dropout'(dy) weight:

    ds = r (g - mean(g) - u mean(g u))

Backward runs one program per position and share of the batch, so that the position's row, the two
types' rows, weight and bias sum in registers; so do the rows of `frequent` ids ([MASK] is an eighth
of all pieces: thousands of additions to one row). All other rows are added to the tables with
float32 atomics, or, deterministic, written out as ds [N, H] and summed by sorted id.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mvbert.kernels import launch
from mvbert.kernels.common import accumulator_dtype, tl, triton
from mvbert.kernels.dropout import dropout_factor


class EmbeddingInputs(NamedTuple):
    """The tensors a mixed embedding reads, in the order of the operator's arguments."""

    input_ids: Tensor  # [B, T], joint ids
    teacher_table: Tensor | None  # [V_t, H]
    student_rows: Tensor | None  # [V_s, H]
    position_table: Tensor | None  # [P, H]
    type_table: Tensor | None  # [S, H]
    token_type_ids: Tensor | None  # [B, T]; None: type 0
    position_ids: Tensor | None  # [B, T] or [1, T]; None: 0 .. T-1
    ln_weight: Tensor  # [H]
    ln_bias: Tensor  # [H]

    @property
    def tables(self) -> tuple[Tensor | None, ...]:
        """Teacher, student, position, type."""
        return self[1:5]

    @property
    def words(self) -> list[Tensor]:
        """The word tables there are, one or two."""
        return [table for table in self.tables[:2] if table is not None]


def mixed_embedding_reference(
    inputs: EmbeddingInputs, eps: float, padding_id: int | None = None
) -> Tensor:
    """LayerNorm(table[id] + position[t] + type[s]) with table = [teacher; student]. -> [B, T, H]"""
    ids, _, _, position_table, type_table, token_type_ids, position_ids, *norm = inputs
    rows = F.embedding(ids.long(), torch.cat(inputs.words), padding_idx=padding_id)
    if position_table is not None:
        if position_ids is None:
            position_ids = torch.arange(ids.shape[1], device=ids.device)[None]
        rows = rows + position_table[position_ids.long()]
    if type_table is not None:
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(ids)
        rows = rows + type_table[token_type_ids.long()]
    return F.layer_norm(rows, rows.shape[-1:], *norm, eps)


# ---- kernels -----------------------------------------------------------------------------------


@triton.jit
def mixed_embedding_fwd_kernel(
    ids_ptr,  # [N]
    types_ptr,  # [N] when TYPES > 0 and HAS_TYPE_IDS
    positions_ptr,  # [N] or [T] when HAS_POSITION_IDS
    teacher_ptr,  # [V_t, H]
    student_ptr,  # [V_s, H]
    position_ptr,  # [P, H]
    type_ptr,  # [S, H]
    weight_ptr,  # [H]
    bias_ptr,  # [H]
    seed_ptr,  # [1] when P_DROP > 0
    out_ptr,  # [N, H], written
    mean_ptr,  # [N], written
    rstd_ptr,  # [N], written
    N,
    T,
    H,
    V_T,
    V_S,
    positions,
    types,
    position_rows,
    eps,
    HAS_POSITION: tl.constexpr,
    HAS_POSITION_IDS: tl.constexpr,
    TYPES: tl.constexpr,
    HAS_TYPE_IDS: tl.constexpr,
    P_DROP: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    h = tl.arange(0, BLOCK_H)
    column = (h < H)[None, :]
    s = table_rows(ids_ptr, teacher_ptr, student_ptr, n, N, H, V_T, V_S, h, ACC)
    if HAS_POSITION:
        t = n % T
        if HAS_POSITION_IDS:
            t = tl.load(positions_ptr + n % position_rows, mask=n < N, other=0).to(tl.int64)
        s += side_rows(position_ptr, t, positions, n < N, H, h, ACC)
    if TYPES:
        k = tl.zeros((ROWS,), tl.int64)
        if HAS_TYPE_IDS:
            k = tl.load(types_ptr + n, mask=n < N, other=0).to(tl.int64)
        s += side_rows(type_ptr, k, types, n < N, H, h, ACC)
    mean = tl.sum(tl.where(column, s, 0.0), 1) / H
    s = tl.where(column, s - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(s * s, 1) / H + eps)
    weight = tl.load(weight_ptr + h, mask=h < H, other=0.0).to(ACC)
    bias = tl.load(bias_ptr + h, mask=h < H, other=0.0).to(ACC)
    y = s * rstd[:, None] * weight[None, :] + bias[None, :]
    if P_DROP > 0:
        y *= dropout_factor(tl.load(seed_ptr), n, P_DROP, ROWS, BLOCK_H)
    tl.store(mean_ptr + n, mean, mask=n < N)
    tl.store(rstd_ptr + n, rstd, mask=n < N)
    at = out_ptr + n.to(tl.int64)[:, None] * H + h[None, :]
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & column)


@triton.jit
def table_rows(ids_ptr, teacher_ptr, student_ptr, n, N, H, V_T, V_S, h, ACC: tl.constexpr):
    """[ROWS, BLOCK_H] of [teacher; student]; an id out of range gives NaN and reads nothing."""
    inside = n < N
    v = tl.load(ids_ptr + n, mask=inside, other=0).to(tl.int64)
    column = (h < H)[None, :]
    of_teacher = inside & (v >= 0) & (v < V_T)
    of_student = inside & (v >= V_T) & (v < V_T + V_S)
    x = tl.load(
        teacher_ptr + v[:, None] * H + h[None, :], mask=of_teacher[:, None] & column, other=0.0
    ).to(ACC)
    x += tl.load(
        student_ptr + (v - V_T)[:, None] * H + h[None, :],
        mask=of_student[:, None] & column,
        other=0.0,
    ).to(ACC)
    wrong = inside & (of_teacher == 0) & (of_student == 0)
    return tl.where(wrong[:, None], float("nan"), x)


@triton.jit
def side_rows(table_ptr, at, size, inside, H, h, ACC: tl.constexpr):
    """[ROWS, BLOCK_H] of a position or type table, NaN where `at` is out of range."""
    valid = inside & (at >= 0) & (at < size)
    x = tl.load(
        table_ptr + at.to(tl.int64)[:, None] * H + h[None, :],
        mask=valid[:, None] & (h < H)[None, :],
        other=0.0,
    ).to(ACC)
    return tl.where((inside & (valid == 0))[:, None], float("nan"), x)


@triton.jit
def add_rows(table_ptr, at, active, rows, H, h):
    """Adds [ROWS, BLOCK_H] to the rows `at` of a gradient, where active."""
    mask = active[:, None] & (h < H)[None, :]
    tl.atomic_add(table_ptr + at[:, None] * H + h[None, :], rows, mask=mask, sem="relaxed")


@triton.jit
def mixed_embedding_bwd_kernel(
    dy_ptr,  # [N, H]
    ids_ptr,  # [N]
    types_ptr,  # [N] when TYPES > 0 and HAS_TYPE_IDS
    positions_ptr,  # [N] or [T] when HAS_POSITION_IDS
    teacher_ptr,  # [V_t, H]
    student_ptr,  # [V_s, H]
    position_ptr,  # [P, H]
    type_ptr,  # [S, H]
    weight_ptr,  # [H]
    seed_ptr,  # [1] when P_DROP > 0
    mean_ptr,  # [N]
    rstd_ptr,  # [N]
    dteacher_ptr,  # [V_t, H], added to when ADD_TEACHER
    dstudent_ptr,  # [V_s, H], added to when ADD_STUDENT
    dposition_ptr,  # [P, H], added to when ADD_POSITION
    dtype_ptr,  # [S, H], added to when ADD_TYPE
    ds_ptr,  # [N, H], written when STORE
    sums_ptr,  # [shares, T, 6, H], written: dweight, dbias, types 0 and 1, frequent ids 0 and 1
    B,
    T,
    H,
    V_T,
    V_S,
    positions,
    types,
    position_rows,
    padding_id,
    frequent_0,
    frequent_1,
    HAS_POSITION: tl.constexpr,
    HAS_POSITION_IDS: tl.constexpr,
    TYPES: tl.constexpr,
    HAS_TYPE_IDS: tl.constexpr,
    P_DROP: tl.constexpr,
    ADD_TEACHER: tl.constexpr,
    ADD_STUDENT: tl.constexpr,
    ADD_POSITION: tl.constexpr,
    ADD_TYPE: tl.constexpr,
    STORE: tl.constexpr,
    FREQUENT: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    position = tl.program_id(0)
    share = tl.program_id(1)
    N = B * T
    h = tl.arange(0, BLOCK_H)
    column = (h < H)[None, :]
    weight = tl.load(weight_ptr + h, mask=h < H, other=0.0).to(ACC)[None, :]
    dweight = tl.zeros((ROWS, BLOCK_H), ACC)
    dbias = tl.zeros((ROWS, BLOCK_H), ACC)
    type_0 = tl.zeros((ROWS, BLOCK_H), ACC)
    type_1 = tl.zeros((ROWS, BLOCK_H), ACC)
    sum_0 = tl.zeros((ROWS, BLOCK_H), ACC)
    sum_1 = tl.zeros((ROWS, BLOCK_H), ACC)
    for first in range(share * ROWS, B, tl.num_programs(1) * ROWS):
        b = first + tl.arange(0, ROWS)
        inside = b < B
        n = tl.where(inside, b * T + position, N)
        s = table_rows(ids_ptr, teacher_ptr, student_ptr, n, N, H, V_T, V_S, h, ACC)
        if HAS_POSITION:
            t = tl.zeros((ROWS,), tl.int64) + position
            if HAS_POSITION_IDS:
                t = tl.load(positions_ptr + n % position_rows, mask=inside, other=0).to(tl.int64)
            s += side_rows(position_ptr, t, positions, inside, H, h, ACC)
        if TYPES:
            k = tl.zeros((ROWS,), tl.int64)
            if HAS_TYPE_IDS:
                k = tl.load(types_ptr + n, mask=inside, other=0).to(tl.int64)
            s += side_rows(type_ptr, k, types, inside, H, h, ACC)
        mean = tl.load(mean_ptr + n, mask=inside, other=0.0)
        rstd = tl.load(rstd_ptr + n, mask=inside, other=0.0)
        at = n.to(tl.int64)[:, None] * H + h[None, :]
        mask = inside[:, None] & column
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(ACC)
        if P_DROP > 0:
            dy *= dropout_factor(tl.load(seed_ptr), n, P_DROP, ROWS, BLOCK_H)
        u = tl.where(mask, (s - mean[:, None]) * rstd[:, None], 0.0)
        dweight += dy * u
        dbias += dy
        g = dy * weight
        ds = g - (tl.sum(g, 1) / H)[:, None] - u * (tl.sum(g * u, 1) / H)[:, None]
        ds = tl.where(mask, ds * rstd[:, None], 0.0)
        if STORE:
            tl.store(ds_ptr + at, ds.to(ds_ptr.dtype.element_ty), mask=mask)
        if TYPES == 2:
            type_1 += tl.where((k == 1)[:, None], ds, 0.0)
            type_0 += tl.where((k == 0)[:, None], ds, 0.0)
        else:
            type_0 += ds
        if ADD_TYPE:
            add_rows(dtype_ptr, k, inside & (k >= 0) & (k < types), ds, H, h)
        if ADD_POSITION:
            add_rows(dposition_ptr, t, inside & (t >= 0) & (t < positions), ds, H, h)
        if ADD_TEACHER or ADD_STUDENT:
            v = tl.load(ids_ptr + n, mask=inside, other=0).to(tl.int64)
            active = inside & (v != padding_id)
            if FREQUENT:
                sum_0 += tl.where((active & (v == frequent_0))[:, None], ds, 0.0)
                sum_1 += tl.where((active & (v == frequent_1))[:, None], ds, 0.0)
                active = active & (v != frequent_0) & (v != frequent_1)
            if ADD_TEACHER:
                add_rows(dteacher_ptr, v, active & (v >= 0) & (v < V_T), ds, H, h)
            if ADD_STUDENT:
                of_student = active & (v >= V_T) & (v < V_T + V_S)
                add_rows(dstudent_ptr, v - V_T, of_student, ds, H, h)
    out = sums_ptr + (share.to(tl.int64) * T + position) * 6 * H + h
    tl.store(out, tl.sum(dweight, 0), mask=h < H)
    tl.store(out + H, tl.sum(dbias, 0), mask=h < H)
    tl.store(out + 2 * H, tl.sum(type_0, 0), mask=h < H)
    if TYPES == 2:
        tl.store(out + 3 * H, tl.sum(type_1, 0), mask=h < H)
    if FREQUENT:
        tl.store(out + 4 * H, tl.sum(sum_0, 0), mask=h < H)
        tl.store(out + 5 * H, tl.sum(sum_1, 0), mask=h < H)


# ---- launchers ---------------------------------------------------------------------------------


def _common(inputs: EmbeddingInputs):
    """(pointers to ids, to tables, sizes, flags) shared by both kernels."""
    ids = inputs.input_ids.contiguous()
    types, positions = inputs.token_type_ids, inputs.position_ids
    dummy = inputs.words[0]
    sizes = [0 if table is None else table.shape[0] for table in inputs.tables]
    flags = {
        "HAS_POSITION": inputs.position_table is not None,
        "HAS_POSITION_IDS": inputs.position_table is not None and positions is not None,
        "TYPES": min(sizes[3], 3),
        "HAS_TYPE_IDS": types is not None,
        "ACC": launch.accumulator(dummy),
    }
    index = [(ids if i is None else i).contiguous() for i in (ids, types, positions)]
    tables = [(dummy if table is None else table).contiguous() for table in inputs.tables]
    position_rows = ids.numel() if positions is None else positions.numel()
    return index, tables, (*sizes, position_rows), flags


def mixed_embedding_fwd(
    inputs: EmbeddingInputs,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,  # [1], int64
) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden [B, T, H], mean [B * T], rstd [B * T])."""
    (B, T), H = inputs.input_ids.shape, inputs.ln_weight.shape[0]
    N = B * T
    index, tables, sizes, flags = _common(inputs)
    out = tables[0].new_empty(B, T, H)
    mean = out.new_empty(N, dtype=accumulator_dtype(out.dtype))
    rstd = torch.empty_like(mean)
    if N:
        tile = launch.row_blocks("embedding_fwd", out, N, H)
        mixed_embedding_fwd_kernel[(triton.cdiv(N, tile["ROWS"]),)](
            *index, *tables, inputs.ln_weight.contiguous(), inputs.ln_bias.contiguous(),
            index[0] if seed is None else seed,
            out, mean, rstd, N, T, H, *sizes, eps, P_DROP=dropout_p, **flags, **tile,
        )  # fmt: skip
    return out, mean, rstd


def mixed_embedding_bwd(
    dhidden: Tensor,  # [B, T, H]
    inputs: EmbeddingInputs,
    mean: Tensor,  # [B * T]
    rstd: Tensor,  # [B * T]
    dropout_p: float,
    seed: Tensor | None,  # [1], int64
    padding_id: int,  # -1: none
    frequent_ids: list[int],
    deterministic: bool,
    need: list[bool],  # teacher_table, student_rows, position_table, type_table
) -> tuple[Tensor | None, ...]:
    """Gradients of the four tables, in the order of the arguments, of ln_weight and of ln_bias."""
    (B, T), H = inputs.input_ids.shape, inputs.ln_weight.shape[0]
    index, tables, sizes, flags = _common(inputs)
    grads = [
        mean.new_zeros(rows, H) if flag else None
        for rows, flag in zip(sizes[:4], need, strict=True)
    ]
    dteacher, dstudent, dposition, dtype = grads
    # Sums whose place depends on data need atomics; a fixed order needs them written out instead.
    by_position = flags["HAS_POSITION_IDS"] and dposition is not None
    by_type = flags["TYPES"] == 3 and dtype is not None
    store = deterministic and (need[0] or need[1] or by_position or by_type)
    frequent = [*frequent_ids, -1, -1][:2]
    if store:
        frequent = [-1, -1]
    ds = mean.new_empty(B * T if store else 0, H)
    tile = dict(launch.row_blocks("embedding_bwd", dhidden, B * T, H))
    programs = tile.pop("programs", launch.bwd_programs(mean.device))
    shares = max(1, min(triton.cdiv(B, tile["ROWS"]), programs // max(T, 1)))
    sums = mean.new_zeros(shares, T, 6, H)
    if B * T:
        mixed_embedding_bwd_kernel[(T, shares)](
            dhidden.contiguous(), *index, *tables, inputs.ln_weight.contiguous(),
            index[0] if seed is None else seed, mean, rstd,
            *(sums if grad is None else grad for grad in grads), ds, sums,
            B, T, H, *sizes, padding_id, *frequent,
            P_DROP=dropout_p, ADD_TEACHER=need[0] and not store, ADD_STUDENT=need[1] and not store,
            ADD_POSITION=by_position and not store, ADD_TYPE=by_type and not store,
            STORE=store, FREQUENT=frequent != [-1, -1], **flags, **tile,
        )  # fmt: skip
    total = sums.sum((0, 1))
    if dposition is not None and not flags["HAS_POSITION_IDS"]:
        dposition[:T] = sums[:, :, 2:4].sum((0, 2))
    if dtype is not None and flags["TYPES"] < 3:
        dtype.copy_(total[2 : 2 + flags["TYPES"]])
    if store:
        _sum_sorted(ds, index, sizes, by_position, by_type, grads, padding_id)
    else:
        for i, v in enumerate(frequent):
            for grad, base, rows in ((dteacher, 0, sizes[0]), (dstudent, sizes[0], sizes[1])):
                if grad is not None and base <= v < base + rows:
                    grad[v - base] += total[4 + i]
    vector = inputs.ln_weight.dtype
    return (
        *(None if g is None else g.to(t.dtype) for g, t in zip(grads, inputs.tables, strict=True)),
        total[0].to(vector, copy=True),
        total[1].to(vector, copy=True),
    )


def _sum_sorted(
    ds: Tensor,  # [N, H]
    index: list[Tensor],  # ids, types [N]; positions [N] or [T]
    sizes: tuple[int, ...],
    by_position: bool,
    by_type: bool,
    grads: list[Tensor | None],  # of the four tables, added to
    padding_id: int,
) -> None:
    """Adds rows of ds to the tables in a fixed order: torch sorts the ids."""
    dteacher, dstudent, dposition, dtype = grads
    ids, types, positions = (i.reshape(-1).long() for i in index)

    def add(grad, rows, active):
        # Other rows go to a row beyond the table, which is dropped.
        rows = torch.where(active, rows, grad.shape[0])
        grad.copy_(
            torch.ops.aten.embedding_dense_backward(ds, rows, grad.shape[0] + 1, -1, False)[:-1]
        )

    active = ids != padding_id
    if dteacher is not None:
        add(dteacher, ids, active & (ids < sizes[0]))
    if dstudent is not None:
        add(dstudent, ids - sizes[0], active & (ids >= sizes[0]))
    if by_position:
        positions = positions.repeat(ds.shape[0] // positions.numel())
        add(dposition, positions, positions >= 0)
    if by_type:
        add(dtype, types, types >= 0)


# ---- operator ----------------------------------------------------------------------------------


@torch.library.custom_op("mvbert::mixed_embedding", mutates_args=())
def mixed_embedding(
    input_ids: Tensor,
    teacher_table: Tensor | None,
    student_rows: Tensor | None,
    position_table: Tensor | None,
    type_table: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    seed: Tensor | None,  # [1]
    eps: float,
    dropout_p: float,
    padding_id: int,  # -1: none
    frequent_ids: list[int],
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = EmbeddingInputs(
        input_ids, teacher_table, student_rows, position_table, type_table, token_type_ids,
        position_ids, ln_weight, ln_bias,
    )  # fmt: skip
    with torch.cuda.device_of(input_ids):
        return mixed_embedding_fwd(inputs, eps, dropout_p, seed)


@mixed_embedding.register_fake
def _(*arguments):
    inputs = EmbeddingInputs(*arguments[:9])
    table = inputs.words[0]
    rows = table.new_empty(inputs.input_ids.numel(), dtype=accumulator_dtype(table.dtype))
    hidden = table.new_empty(*inputs.input_ids.shape, table.shape[1])
    return hidden, rows, torch.empty_like(rows)


@torch.library.custom_op("mvbert::mixed_embedding_backward", mutates_args=())
def mixed_embedding_backward(
    dhidden: Tensor,  # [B, T, H]
    inputs: list[Tensor | None],  # EmbeddingInputs
    seed: Tensor | None,  # [1]
    mean: Tensor,  # [B * T]
    rstd: Tensor,  # [B * T]
    dropout_p: float,
    padding_id: int,  # -1: none
    frequent_ids: list[int],
    deterministic: bool,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(dhidden):
        gradients = mixed_embedding_bwd(
            dhidden, EmbeddingInputs(*inputs), mean, rstd, dropout_p, seed, padding_id,
            frequent_ids, deterministic, need,
        )  # fmt: skip
    return tuple(dhidden.new_empty(0) if g is None else g for g in gradients)


@mixed_embedding_backward.register_fake
def _(dhidden, inputs, seed, mean, rstd, dropout_p, padding_id, frequent_ids, deterministic, need):
    inputs = EmbeddingInputs(*inputs)
    dtables = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if n else dhidden.new_empty(0)
        for t, n in zip(inputs.tables, need, strict=True)
    ]
    return *dtables, torch.empty_like(inputs.ln_weight), torch.empty_like(inputs.ln_weight)


def _save(ctx, inputs, output):
    *tensors, _, ctx.dropout_p, ctx.padding_id, ctx.frequent_ids, ctx.deterministic = inputs
    _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, mean, rstd)


def _backward(ctx, dhidden, dmean, drstd):
    if dhidden is None:
        return (None,) * 15
    *inputs, seed, mean, rstd = ctx.saved_tensors
    need = [bool(n) for n in ctx.needs_input_grad[1:5]]
    gradients = mixed_embedding_backward(
        dhidden, inputs, seed, mean, rstd, ctx.dropout_p, ctx.padding_id, ctx.frequent_ids,
        ctx.deterministic, need,
    )  # fmt: skip
    dtables = (g if n else None for g, n in zip(gradients[:4], need, strict=True))
    return None, *dtables, None, None, *gradients[4:], *(None,) * 6


mixed_embedding.register_autograd(_backward, setup_context=_save)
