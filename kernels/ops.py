"""The fused losses as PyTorch operators: schema, fake kernel, autograd.

Three operators a loss:

    <loss>_sum            the scaled sum of the rows' losses, with the gradients made on the way;
                          backward only multiplies them by the incoming scalar
    <loss>_rows           the loss of each row, nothing kept
    <loss>_rows_backward  the gradients for given upstream gradients of the rows, recomputing logits

`backend` is "triton" (kernels of this folder) or "chunked" (plain PyTorch, chunked.py). All three
are opaque to torch.compile, so a compiled model keeps one graph, whichever rows carry a loss.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mvbert.kernels import chunked
from mvbert.kernels.chunked import Need, accumulator_dtype

# When True, ids and labels on a GPU are checked too, at the price of a host synchronisation a call.
CHECK_ON_GPU = False


def _run(backend: str, loss: str, hidden: Tensor, *arguments):
    """Calls the implementation of `loss` ("cross_entropy", "kl", "relation_kl").

    Autocast is off inside: the dtype of `hidden` already says what the products run in. Triton
    launches on the current device, which is therefore made that of `hidden`.
    """
    if backend == "chunked":
        implementation = chunked
    elif loss == "cross_entropy":
        from mvbert.kernels import linear_cross_entropy as implementation
    elif loss == "relation_kl":
        from mvbert.kernels import relation_kl as implementation
    else:
        from mvbert.kernels import linear_kl as implementation
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        return getattr(implementation, loss)(hidden, *arguments)


def check_range(
    what: str,
    ids: Tensor,
    size: int,
    ignore_index: int | None = None,
) -> None:
    """ValueError unless every id lies in [0, size) or equals `ignore_index`."""
    if ids.numel() == 0 or (ids.is_cuda and not CHECK_ON_GPU):
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


def _empty_gradients(hidden, weight, bias, need):
    """What the fake kernels hand out for (dhidden, dweight, dbias)."""
    return (
        hidden.new_empty(hidden.shape if need[0] else (0,)),
        weight.new_empty(weight.shape if need[1] else (0,)),
        hidden.new_empty(0) if bias is None or not need[2] else bias.new_empty(bias.shape),
    )


def _rows_like(hidden: Tensor, *others) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=accumulator_dtype(hidden.dtype))


def _sum_like(hidden, weight, bias, *others):
    need = next(x for x in others if isinstance(x, list))
    return _rows_like(hidden).new_empty(()), *_empty_gradients(hidden, weight, bias, need)


def _total(loss: Tensor, scale: Tensor) -> Tensor:
    """The scaled sum; in float64, as a rounded 1 / count costs more than a division would."""
    return (loss.sum(dtype=torch.float64) * scale).to(loss.dtype)


def _scaled(gradient: Tensor, dtotal: Tensor) -> Tensor | None:
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


@torch.library.custom_op("mvbert::scale", mutates_args=())
def scale_exactly(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor, computed in float32, in the dtype of x, in one pass (CUDA)."""
    from mvbert.kernels import linear

    with torch.cuda.device_of(x):
        return linear.scale(x, factor)


@scale_exactly.register_fake
def _(x, factor):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _refuse_second_order(gradients) -> None:
    if any(g is not None for g in gradients):
        raise RuntimeError("the fused losses have first derivatives only; use backend='reference'")


# ---- linear cross-entropy ----------------------------------------------------------------------


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
    dense: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_range("labels", labels, weight.shape[0], ignore_index)
    need = Need(*need)
    dloss = scale if need else None
    loss, _, *gradients = _run(
        backend, "cross_entropy", hidden, weight, bias, labels, ignore_index, label_smoothing,
        dloss, None, need, dense,
    )  # fmt: skip
    return _total(loss, scale), *gradients


def _save_gradients(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[-3:])


def _sum_backward(ctx, dtotal, *dgradients):
    _refuse_second_order(dgradients)
    others = (None,) * (len(ctx.needs_input_grad) - 3)
    if dtotal is None:
        return None, None, None, *others
    return *(_scaled(g, dtotal) for g in ctx.saved_tensors), *others


linear_cross_entropy_sum.register_fake(_sum_like)
linear_cross_entropy_sum.register_autograd(_sum_backward, setup_context=_save_gradients)


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
    check_range("labels", labels, weight.shape[0], ignore_index)
    need = Need(*need)
    one = torch.ones((), dtype=accumulator_dtype(hidden.dtype)) if need else None
    return _run(
        backend, "cross_entropy", hidden, weight, bias, labels, ignore_index, label_smoothing,
        one, None, need,
    )  # fmt: skip


@linear_cross_entropy_rows.register_fake
def _(hidden, weight, bias, labels, ignore_index, label_smoothing, need, backend):
    gradients = _empty_gradients(hidden, weight, bias, need)
    return _rows_like(hidden), _rows_like(hidden), *gradients


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
    _, _, *gradients = _run(
        backend, "cross_entropy", hidden, weight, bias, labels, ignore_index, label_smoothing,
        dloss, dlse, Need(*need),
    )  # fmt: skip
    return tuple(gradients)


@linear_cross_entropy_rows_backward.register_fake
def _(dloss, dlse, hidden, weight, bias, labels, unit, ignore_index, smoothing, need, backend):
    return _empty_gradients(hidden, weight, bias, need)


def _save_cross_entropy_rows(ctx, inputs, output):
    hidden, weight, bias, labels, ctx.ignore_index, ctx.label_smoothing, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, labels, *output[2:])


def _cross_entropy_rows_backward(ctx, dloss, dlse, *dgradients):
    _refuse_second_order(dgradients)
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


linear_cross_entropy_rows.register_autograd(
    _cross_entropy_rows_backward, setup_context=_save_cross_entropy_rows
)


# ---- linear KL ---------------------------------------------------------------------------------


@torch.library.custom_op("mvbert::linear_kl_sum", mutates_args=())
def linear_kl_sum(
    hidden: Tensor,  # [N, H_s]
    weight: Tensor,  # [V, H_s]
    bias: Tensor | None,  # [V]
    teacher_hidden: Tensor,  # [N, H_t]
    teacher_weight: Tensor,  # [V, H_t]
    teacher_bias: Tensor | None,  # [V]
    mask: Tensor,  # [N], bool
    scale: Tensor,  # [], float32
    temperature: float,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need = Need(*need)
    dloss = scale if need else None
    loss, *gradients = _run(
        backend, "kl", hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask,
        temperature, dloss, need,
    )  # fmt: skip
    return _total(loss, scale), *gradients


linear_kl_sum.register_fake(_sum_like)
linear_kl_sum.register_autograd(_sum_backward, setup_context=_save_gradients)


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
    return _run(
        backend, "kl", hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask,
        temperature, None, Need(),
    )[0]  # fmt: skip


@torch.library.custom_op("mvbert::linear_kl_rows_backward", mutates_args=())
def linear_kl_rows_backward(
    dloss: Tensor,
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
    _, *gradients = _run(
        backend, "kl", hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask,
        temperature, dloss, Need(*need),
    )  # fmt: skip
    return tuple(gradients)


def _save_kl_rows(ctx, inputs, output):
    *tensors, ctx.temperature, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _register_rows(forward, backward) -> None:
    """Fakes and autograd of a divergence by rows."""

    def gradients(ctx, dloss):
        others = (None,) * (len(ctx.needs_input_grad) - 3)
        if dloss is None:
            return None, None, None, *others
        need = [bool(n) for n in ctx.needs_input_grad[:3]]
        found = backward(dloss, *ctx.saved_tensors, ctx.temperature, need, ctx.backend)
        return *(g if n else None for g, n in zip(found, need, strict=True)), *others

    forward.register_fake(_rows_like)
    backward.register_fake(lambda dloss, *given: _empty_gradients(*given[:3], given[-2]))
    forward.register_autograd(gradients, setup_context=_save_kl_rows)


_register_rows(linear_kl_rows, linear_kl_rows_backward)


# ---- KL of attention relations -----------------------------------------------------------------


@torch.library.custom_op("mvbert::relation_kl_sum", mutates_args=())
def relation_kl_sum(
    student: Tensor,  # [B, T, 3 H_s]
    teacher: Tensor,  # [B, T, 3 H_t]
    heads: int,
    need: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _run(backend, "relation_kl", student, teacher, heads, need)


@relation_kl_sum.register_fake
def _(student, teacher, heads, need, backend):
    gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
    return _rows_like(student).new_empty(()), gradient if need else student.new_empty(0)


def _save_relation_kl(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _relation_kl_backward(ctx, dtotal, *dgradients):
    _refuse_second_order(dgradients)
    gradient = None if dtotal is None else _scaled(*ctx.saved_tensors, dtotal)
    return gradient, None, None, None, None


relation_kl_sum.register_autograd(_relation_kl_backward, setup_context=_save_relation_kl)


# ---- mixed embedding ---------------------------------------------------------------------------


@torch.library.custom_op("mvbert::mixed_embedding", mutates_args=())
def mixed_embedding(
    input_ids: Tensor,  # [B, T]
    teacher_table: Tensor | None,  # [V_t, H]
    student_rows: Tensor | None,  # [V_s, H]
    position_table: Tensor | None,  # [P, H]
    type_table: Tensor | None,  # [S, H]
    token_type_ids: Tensor | None,  # [B, T]
    position_ids: Tensor | None,  # [B, T] or [1, T]
    ln_weight: Tensor,  # [H]
    ln_bias: Tensor,  # [H]
    seed: Tensor | None,  # [1]
    eps: float,
    dropout_p: float,
    padding_id: int,  # -1: none
    frequent_ids: list[int],
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from mvbert.kernels import mixed_embedding as kernels

    with torch.cuda.device_of(input_ids):
        return kernels.mixed_embedding_fwd(
            input_ids, teacher_table, student_rows, position_table, type_table, token_type_ids,
            position_ids, ln_weight, ln_bias, eps, dropout_p, seed,
        )  # fmt: skip


@mixed_embedding.register_fake
def _(input_ids, teacher_table, student_rows, position_table, type_table, token_type_ids,
      position_ids, ln_weight, ln_bias, seed, eps, dropout_p, padding_id, frequent_ids,
      deterministic):  # fmt: skip
    table = student_rows if teacher_table is None else teacher_table
    rows = table.new_empty(input_ids.numel(), dtype=accumulator_dtype(table.dtype))
    return table.new_empty(*input_ids.shape, table.shape[1]), rows, torch.empty_like(rows)


@torch.library.custom_op("mvbert::mixed_embedding_backward", mutates_args=())
def mixed_embedding_backward(
    dhidden: Tensor,  # [B, T, H]
    input_ids: Tensor,
    teacher_table: Tensor | None,
    student_rows: Tensor | None,
    position_table: Tensor | None,
    type_table: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    ln_weight: Tensor,
    seed: Tensor | None,
    mean: Tensor,  # [B * T]
    rstd: Tensor,  # [B * T]
    dropout_p: float,
    padding_id: int,
    frequent_ids: list[int],
    deterministic: bool,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from mvbert.kernels import mixed_embedding as kernels

    with torch.cuda.device_of(dhidden):
        gradients = kernels.mixed_embedding_bwd(
            dhidden, input_ids, teacher_table, student_rows, position_table, type_table,
            token_type_ids, position_ids, ln_weight, mean, rstd, dropout_p, seed, padding_id,
            frequent_ids, deterministic, need,
        )  # fmt: skip
    return tuple(dhidden.new_empty(0) if g is None else g for g in gradients)


@mixed_embedding_backward.register_fake
def _(dhidden, input_ids, teacher_table, student_rows, position_table, type_table, token_type_ids,
      position_ids, ln_weight, seed, mean, rstd, dropout_p, padding_id, frequent_ids,
      deterministic, need):  # fmt: skip
    tables = (teacher_table, student_rows, position_table, type_table)
    return (
        *(
            torch.empty_like(t, memory_format=torch.contiguous_format)
            if n
            else dhidden.new_empty(0)
            for t, n in zip(tables, need, strict=True)
        ),
        torch.empty_like(ln_weight),
        torch.empty_like(ln_weight),
    )


def _save_mixed_embedding(ctx, inputs, output):
    input_ids, *tables, token_type_ids, position_ids, ln_weight, _, seed = inputs[:10]
    _, ctx.dropout_p, ctx.padding_id, ctx.frequent_ids, ctx.deterministic = inputs[10:]
    _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        input_ids, *tables, token_type_ids, position_ids, ln_weight, seed, mean, rstd
    )


def _mixed_embedding_backward(ctx, dhidden, dmean, drstd):
    if dhidden is None:
        return (None,) * 15
    need = [bool(n) for n in ctx.needs_input_grad[1:5]]
    gradients = mixed_embedding_backward(
        dhidden, *ctx.saved_tensors, ctx.dropout_p, ctx.padding_id, ctx.frequent_ids,
        ctx.deterministic, need,
    )  # fmt: skip
    tables = (g if n else None for g, n in zip(gradients[:4], need, strict=True))
    return None, *tables, None, None, *gradients[4:], *(None,) * 6


mixed_embedding.register_autograd(_mixed_embedding_backward, setup_context=_save_mixed_embedding)


@torch.library.custom_op("mvbert::gather_rows", mutates_args=())
def gather_rows(
    input_ids: Tensor,  # [.., T]
    teacher_table: Tensor | None,  # [V_t, H]
    student_rows: Tensor | None,  # [V_s, H]
    padding_id: int,  # -1: none
) -> Tensor:
    """table[id] of table = [teacher; student], in plain PyTorch, without making that table."""
    if teacher_table is None or student_rows is None:
        table = student_rows if teacher_table is None else teacher_table
        # F.embedding would give a view, to which nothing could be added in place.
        out = table.new_empty(*input_ids.shape, table.shape[1])
        torch.index_select(table, 0, input_ids.flatten(), out=out.view(-1, table.shape[1]))
        return out
    V = teacher_table.shape[0]
    return torch.where(
        (input_ids >= V)[..., None],
        F.embedding((input_ids - V).clamp_(min=0), student_rows),
        F.embedding(input_ids.where(input_ids < V, 0), teacher_table),
    )


@gather_rows.register_fake
def _(input_ids, teacher_table, student_rows, padding_id):
    tables = [table for table in (teacher_table, student_rows) if table is not None]
    dtype = torch.promote_types(tables[0].dtype, tables[-1].dtype)
    return tables[0].new_empty(*input_ids.shape, tables[0].shape[1], dtype=dtype)


def _save_gather_rows(ctx, inputs, output):
    input_ids, *tables, ctx.padding_id = inputs
    ctx.sizes = [0 if table is None else table.shape[0] for table in tables]
    ctx.save_for_backward(input_ids)


def _gather_rows_backward(ctx, dout):
    """One sum of both tables' rows, as the ids number them; a table without need has none."""
    (ids,) = ctx.saved_tensors
    need = ctx.needs_input_grad[1:3]
    sizes = [V if n else 0 for V, n in zip(ctx.sizes, need, strict=True)]
    last = sum(sizes)  # one row more, for the pieces that give no gradient
    row = ids.long() - (0 if need[0] else ctx.sizes[0])
    row = torch.where((row < 0) | (row >= last) | (ids == ctx.padding_id), last, row)
    dout = dout.flatten(0, -2)
    total = chunked.zeros(dout, last + 1, dout.shape[1])
    total.scatter_add_(0, row.reshape(-1, 1).expand_as(dout), dout)
    tables = (g if n else None for g, n in zip(total[:last].split(sizes), need, strict=True))
    return None, *tables, None


gather_rows.register_autograd(_gather_rows_backward, setup_context=_save_gather_rows)


# ---- dropout ---------------------------------------------------------------------------------


@torch.library.custom_op(
    "mvbert::dropout_factors", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def dropout_factors(x: Tensor, dropout_p: float) -> Tensor:
    """What dropout multiplies x by, on a CPU: 0, or what makes up for the zeros; [..] as x.

    16 bits of torch's generator decide on each element: torch's own bernoulli_ takes eight times as
    long, a third of a layer's step. An element is zeroed with the probability round(2^16 p) / 2^16.
    """
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    zeroed = min(round(dropout_p * 2**16), 2**16 - 1)
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= zeroed - 2**15
    return kept.to(x.dtype).mul_(2**16 / (2**16 - zeroed))


@dropout_factors.register_fake
def _(x, dropout_p):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# ---- residual + dropout + LayerNorm ------------------------------------------------------------


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
    from mvbert.kernels import layer_norm

    with torch.cuda.device_of(x):
        return layer_norm.residual_layer_norm_fwd(
            x, residual, ln_weight, ln_bias, eps, dropout_p, seed, both
        )


@residual_layer_norm.register_fake
def _(x, residual, ln_weight, ln_bias, seed, eps, dropout_p, both):
    y = torch.empty_like(residual, memory_format=torch.contiguous_format)
    rounded = torch.empty_like(y, dtype=x.dtype) if both else x.new_empty(0)
    return y, rounded, torch.empty_like(y), _rows_like(y), _rows_like(y)


@torch.library.custom_op("mvbert::residual_layer_norm_backward", mutates_args=())
def residual_layer_norm_backward(
    dy: Tensor,
    drounded: Tensor | None,
    total: Tensor,
    ln_weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    dtype: torch.dtype,  # of x
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from mvbert.kernels import layer_norm

    with torch.cuda.device_of(dy):
        return layer_norm.residual_layer_norm_bwd(
            dy, total, ln_weight, mean, rstd, dropout_p, seed, dtype, drounded
        )


@residual_layer_norm_backward.register_fake
def _(dy, drounded, total, ln_weight, mean, rstd, seed, dropout_p, dtype):
    vectors = torch.empty_like(ln_weight), torch.empty_like(ln_weight)
    has_dx = dropout_p > 0 or dtype != total.dtype
    dx = torch.empty_like(total, dtype=dtype) if has_dx else total.new_empty(0)
    return dx, torch.empty_like(total), *vectors


def _save_residual_layer_norm(ctx, inputs, output):
    x, _, ln_weight, _, seed, _, ctx.dropout_p, _ = inputs
    ctx.dtype = x.dtype
    _, _, total, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, ln_weight, mean, rstd, seed)


def _residual_layer_norm_backward(ctx, dy, drounded, *others):
    if dy is None:
        dy, drounded = drounded, None
    if dy is None:
        return (None,) * 8
    dx, dresidual, *vectors = residual_layer_norm_backward(
        dy, drounded, *ctx.saved_tensors, ctx.dropout_p, ctx.dtype
    )
    # Without dropout two inputs of one dtype have one gradient, which is made once.
    made = ctx.dropout_p > 0 or ctx.dtype != dresidual.dtype
    return dx if made else dresidual, dresidual, *vectors, None, None, None, None


residual_layer_norm.register_autograd(
    _residual_layer_norm_backward, setup_context=_save_residual_layer_norm
)
