"""The fused parts as functions: argument checks, choice of implementation, reduction.

`backend` is the same everywhere:

    auto       triton for CUDA tensors, chunked otherwise
    triton     the kernels of mvbert.kernels; CUDA tensors (or any, in Triton's interpreter)
    chunked    plain PyTorch over chunks of rows; any device
    reference  the definition: plain differentiable PyTorch, logits held whole

Letters: B rows of a batch, T pieces in a row, N rows with or without a label, H hidden width, E
embedding width of the student, V vocabulary size (V_t teacher, V_s student), P positions, S token
types.

Ids and labels of two vocabularies live in one space: below V_t a teacher piece, V_t + i student
piece i. They are checked on the CPU always, on a GPU when `check_on_gpu(True)` was called (it waits
for the device); unchecked, an id out of range gives NaN and never reads out of bounds.
"""

import importlib.util
import warnings
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from mvbert.kernels import definitions as plain
from mvbert.kernels import ops
from mvbert.kernels.definitions import IGNORE_INDEX, reduce_rows, split_labels

__all__ = [
    "IGNORE_INDEX",
    "check_on_gpu",
    "dropout",
    "linear_cross_entropy",
    "linear_kl",
    "mixed_embedding",
    "mixed_linear_cross_entropy",
    "project_rows",
    "project_table",
    "relation_kl",
    "residual_layer_norm",
    "residual_layer_norm_twice",
]

# Asked once: torch.compile of torch 2.11 cannot trace the question.
HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ("auto", "triton", "chunked", "reference")
REDUCTIONS = ("mean", "sum", "none")


def check_on_gpu(on: bool) -> None:
    """Whether ids and labels on a GPU are range-checked: for debugging, it waits for the device."""
    ops.CHECK_ON_GPU = bool(on)


# ---- embeddings --------------------------------------------------------------------------------


def project_table(student_table: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The student table at the teacher's width, for input rows and tied output alike.

    Args:
        student_table: [V_s, E].
        weight: [H, E].
        bias: [H] or None.

    Returns:
        [V_s, H], `student_table @ weight.T + bias`.
    """
    _check_linear("project_table", student_table, weight, bias, ("V_s", "E"), ("H", "E"))
    return F.linear(student_table, weight, bias)


def project_rows(
    input_ids: Tensor,
    student_table: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    teacher_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """Only the student rows that a call reads, for calls with fewer pieces than V_s.

    Projecting a row costs the same wherever it comes from, so the table wins as soon as a batch has
    more than V_s pieces, these rows below that (fine-tuning, inference).

    Args:
        input_ids: [.., T] joint ids.
        student_table: [V_s, E].
        weight: [H, E].
        bias: [H] or None.
        teacher_size: V_t, where student ids begin.

    Returns:
        (student_rows [number of ids, H], input_ids [.., T]) to hand to `mixed_embedding` in place
        of the projected table and the ids.
    """
    _check_linear("project_rows", student_table, weight, bias, ("V_s", "E"), ("H", "E"))
    is_student = input_ids >= teacher_size
    own = torch.where(is_student, input_ids - teacher_size, 0).reshape(-1)
    rows = F.linear(F.embedding(own, student_table), weight, bias)
    numbered = torch.arange(own.numel(), device=own.device, dtype=input_ids.dtype)
    numbered = numbered.reshape(input_ids.shape) + teacher_size
    return rows, torch.where(is_student, numbered, input_ids)


def mixed_embedding(
    input_ids: Tensor,
    teacher_table: Tensor | None,
    student_rows: Tensor | None,
    position_table: Tensor | None,
    type_table: Tensor | None,
    token_type_ids: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    training: bool = False,
    *,
    position_ids: Tensor | None = None,
    padding_id: int | None = None,
    frequent_ids: tuple[int, ...] = (),
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """dropout(LayerNorm(table[id] + position[t] + type[s])) with table = [teacher; student].

    One vocabulary only: the other table is None and ids start at 0.

    Args:
        input_ids: [B, T], int32 or int64, joint ids.
        teacher_table: [V_t, H] or None.
        student_rows: [V_s, H] or None, from `project_table` (or a student's own table).
        position_table: [P, H] or None.
        type_table: [S, H] or None.
        token_type_ids: [B, T], any integer type; None: type 0.
        ln_weight, ln_bias: [H].
        eps: LayerNorm's epsilon.
        dropout_p: probability of zeroing an output value; only when `training`.
        training: whether dropout is active.
        position_ids: [B, T] or [1, T]; None: 0 .. T-1.
        padding_id: joint id whose row receives no gradient, as `nn.Embedding(padding_idx=..)`.
        frequent_ids: up to two joint ids ([MASK] of either vocabulary) that many pieces have; their
            gradient is summed apart. A matter of speed only.
        deterministic: gradients of the tables summed in a fixed order; None: as
            `torch.are_deterministic_algorithms_enabled()` says.
        backend: see the module's first lines.

    Returns:
        [B, T, H].
    """
    if input_ids.ndim != 2:
        raise ValueError(f"mixed_embedding needs input_ids [B, T], got {_shape(input_ids)}")
    _check_integers("mixed_embedding", "input_ids", input_ids)
    tables = [table for table in (teacher_table, student_rows) if table is not None]
    if not tables:
        raise ValueError(
            "mixed_embedding needs a teacher_table [V_t, H], student_rows [V_s, H] or both"
        )
    H = tables[0].shape[-1]
    for name, table, rows in (
        ("teacher_table", teacher_table, "V_t"),
        ("student_rows", student_rows, "V_s"),
        ("position_table", position_table, "P"),
        ("type_table", type_table, "S"),
    ):
        if table is None:
            continue
        if table.ndim != 2 or table.shape[1] != H:
            raise ValueError(
                f"mixed_embedding needs {name} [{rows}, H] with H = {H}, got {_shape(table)}"
            )
        _check_device("mixed_embedding", name, table, input_ids)
    for name, vector in (("ln_weight", ln_weight), ("ln_bias", ln_bias)):
        if vector.shape != (H,):
            raise ValueError(f"mixed_embedding needs {name} [H] with H = {H}, got {_shape(vector)}")
    if token_type_ids is not None and token_type_ids.shape != input_ids.shape:
        raise ValueError(
            f"mixed_embedding needs token_type_ids [B, T] like input_ids {_shape(input_ids)}, "
            f"got {_shape(token_type_ids)}"
        )
    B, T = input_ids.shape
    if position_ids is not None and tuple(position_ids.shape) not in ((B, T), (1, T)):
        raise ValueError(
            f"mixed_embedding needs position_ids [B, T] or [1, T] with T = {T}, "
            f"got {_shape(position_ids)}"
        )
    if position_table is not None and position_ids is None and position_table.shape[0] < T:
        raise ValueError(
            f"mixed_embedding has {position_table.shape[0]} positions, too few for rows of T = {T}"
        )
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    V = sum(table.shape[0] for table in tables)
    if padding_id is not None and not 0 <= padding_id < V:
        raise ValueError(f"padding_id must lie in [0, {V}), got {padding_id}")
    if len(frequent_ids) > 2:
        raise ValueError(f"frequent_ids holds at most two ids, got {len(frequent_ids)}")
    backend = _backend(backend, input_ids)
    if not torch.compiler.is_compiling():
        ops.check_range("input_ids", input_ids, V)
        if position_table is not None and position_ids is not None:
            ops.check_range("position_ids", position_ids, position_table.shape[0])
        if type_table is not None and token_type_ids is not None:
            ops.check_range("token_type_ids", token_type_ids, type_table.shape[0])
    if backend == "reference":
        hidden = plain.mixed_embedding_reference(
            input_ids, teacher_table, student_rows, position_table, type_table,
            token_type_ids, position_ids, ln_weight, ln_bias, eps, padding_id,
        )  # fmt: skip
        return dropout(hidden, dropout_p, training)
    if backend == "triton":
        dropout_p = dropout_p if training else 0.0
        seed = None
        if dropout_p > 0:
            seed = torch.randint(0, 2**31 - 1, (1,), device=input_ids.device)
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        return ops.mixed_embedding(
            input_ids, teacher_table, student_rows, position_table, type_table,
            token_type_ids, position_ids, ln_weight, ln_bias, seed, float(eps), float(dropout_p),
            -1 if padding_id is None else padding_id, list(frequent_ids), deterministic,
        )[0]  # fmt: skip
    total = ops.gather_rows(
        input_ids, teacher_table, student_rows, -1 if padding_id is None else padding_id
    )
    # In place: the gathered rows are nobody else's, and a fresh [B, T, H] costs its page faults.
    if position_table is not None:
        if position_ids is None:
            total += position_table[:T]
        else:
            total += F.embedding(position_ids.long(), position_table)
    if type_table is not None:
        if token_type_ids is None:
            total += type_table[0]
        else:
            # As a product: its gradient sums thousands of pieces into two rows at full speed.
            numbers = torch.arange(type_table.shape[0], device=total.device)
            one_hot = (token_type_ids[..., None] == numbers).to(total.dtype)
            total.baddbmm_(one_hot, type_table.to(total.dtype).expand(B, -1, -1))
    hidden = F.layer_norm(total, (H,), ln_weight, ln_bias, eps)
    return dropout(hidden, dropout_p, training)


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """torch's dropout; on a CPU drawn in an eighth of the time.

    Args:
        x: [..], floating point.
        p: probability of zeroing a value, in [0, 1); on a CPU rounded to a multiple of 2^-16. What
            is left is scaled so that the mean stays.
        training: whether dropout is active.

    Returns:
        [..], dtype of x.
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout needs p in [0, 1), got {p}")
    if p == 0 or not training:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    return x * ops.dropout_factors(x.detach(), p)


def residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    training: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """LayerNorm(residual + dropout(x)).

    Args:
        x, residual: [.., H].
        ln_weight, ln_bias: [H].
        eps: LayerNorm's epsilon.
        dropout_p: probability of zeroing a value of x; only when `training`.
        training: whether dropout is active.
        backend: see the module's first lines.

    Returns:
        [.., H], dtype of `residual` from the kernel, elsewhere what torch promotes to.
    """
    return _residual_layer_norm(
        x, residual, ln_weight, ln_bias, eps, dropout_p, training, backend, both=False
    )[0]


def residual_layer_norm_twice(
    x: Tensor,
    residual: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    training: bool = False,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`residual_layer_norm`, and the same again in the dtype of x.

    For mixed precision: the next residual is the first, the next matrix product reads the second.
    Written by one kernel they cost less than a cast, and so do their gradients.

    Returns:
        Two [.., H]; one tensor twice where `residual` and x are alike in dtype.
    """
    return _residual_layer_norm(
        x, residual, ln_weight, ln_bias, eps, dropout_p, training, backend, both=True
    )


def _residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dropout_p: float,
    training: bool,
    backend: str,
    both: bool,
) -> tuple[Tensor, Tensor]:
    H = x.shape[-1]
    if residual.shape != x.shape:
        raise ValueError(
            "residual_layer_norm needs x and residual [.., H] alike, "
            f"got {_shape(x)} and {_shape(residual)}"
        )
    for name, vector in (("ln_weight", ln_weight), ("ln_bias", ln_bias)):
        if vector.shape != (H,):
            raise ValueError(
                f"residual_layer_norm needs {name} [H] with H = {H}, got {_shape(vector)}"
            )
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    dropout_p = dropout_p if training else 0.0
    if _backend(backend, x) != "triton":
        y = F.layer_norm(residual + dropout(x, dropout_p), (H,), ln_weight, ln_bias, eps)
        return y, y.to(x.dtype) if both else y
    seed = torch.randint(0, 2**31 - 1, (1,), device=x.device) if dropout_p > 0 else None
    both = both and x.dtype != residual.dtype
    y, rounded, *_ = ops.residual_layer_norm(
        x.reshape(-1, H), residual.reshape(-1, H), ln_weight, ln_bias, seed, float(eps),
        float(dropout_p), both,
    )  # fmt: skip
    y = y.reshape(x.shape)
    return y, rounded.reshape(x.shape) if both else y


# ---- losses ------------------------------------------------------------------------------------


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = ...,
    *,
    ignore_index: int = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    return_lse: Literal[False] = ...,
    dense: bool = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = ...,
    *,
    ignore_index: int = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    return_lse: Literal[True],
    dense: bool = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    return_lse: bool = False,
    dense: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax cross-entropy of `hidden @ weight.T + bias` without ever holding the logits.

    As `F.cross_entropy` on those logits, except that the mean over no rows at all is 0, not NaN.

    Args:
        hidden: [N, H]; its dtype (under autocast, autocast's) is that of the products.
        weight: [V, H], of the dtype of `hidden` or wider.
        labels: [N], int32 or int64; rows with `ignore_index` cost nothing.
        bias: [V] or None.
        reduction: "mean" over the rows that have a label, "sum", or "none". "none" makes the
            logits again in backward, 2 N V H FLOP more, as forward cannot know what comes back for
            each row; on a CPU only if that differs between rows. `return_lse` always does.
        label_smoothing: share of the target spread evenly over V, in [0, 1).
        return_lse: also return log-sum-exp of each row's logits, differentiable, 0 on ignored rows.
        dense: few rows are ignored. A matter of speed only: on a GPU, bfloat16 products of wide
            rows then run over all rows in the vendor's library.
        backend: see the module's first lines.

    Returns:
        The loss, float32 (float64 for float64 input), [] or [N]; or (loss, lse [N]).
    """
    _check_loss("linear_cross_entropy", hidden, weight, bias, labels, reduction, label_smoothing)
    backend = _backend(backend, hidden)
    kept = labels != ignore_index
    if backend != "reference" and reduction != "none" and not return_lse:
        scale = _scale(kept, reduction, hidden)
        return _cross_entropy_sum(
            hidden, weight, bias, labels, scale, ignore_index, label_smoothing, backend, dense
        )
    loss, lse = _cross_entropy_rows(
        hidden, weight, bias, labels, ignore_index, label_smoothing, return_lse, backend
    )
    loss = reduce_rows(loss, kept, reduction)
    return (loss, lse) if return_lse else loss


@overload
def mixed_linear_cross_entropy(
    hidden: Tensor,
    teacher_weight: Tensor,
    student_weight: Tensor,
    labels: Tensor,
    teacher_bias: Tensor | None = ...,
    student_bias: Tensor | None = ...,
    *,
    ignore_index: int = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def mixed_linear_cross_entropy(
    hidden: Tensor,
    teacher_weight: Tensor,
    student_weight: Tensor,
    labels: Tensor,
    teacher_bias: Tensor | None = ...,
    student_bias: Tensor | None = ...,
    *,
    ignore_index: int = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    return_lse: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


def mixed_linear_cross_entropy(
    hidden: Tensor,
    teacher_weight: Tensor,
    student_weight: Tensor,
    labels: Tensor,
    teacher_bias: Tensor | None = None,
    student_bias: Tensor | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of each row over the vocabulary of its own label: two softmaxes.

    Args:
        hidden: [N, H].
        teacher_weight: [V_t, H].
        student_weight: [V_s, H], the projected student table.
        labels: [N], joint ids or `ignore_index`.
        teacher_bias: [V_t] or None.
        student_bias: [V_s] or None.
        ignore_index, reduction, label_smoothing, return_lse, backend: as `linear_cross_entropy`;
            "mean" is over all rows that have a label, of either vocabulary.

    Returns:
        As `linear_cross_entropy`.
    """
    name = "mixed_linear_cross_entropy"
    _check_loss(name, hidden, teacher_weight, teacher_bias, labels, reduction, label_smoothing)
    _check_loss(name, hidden, student_weight, student_bias, labels, reduction, label_smoothing)
    backend = _backend(backend, hidden)
    of_teacher, of_student = split_labels(labels, teacher_weight.shape[0], ignore_index)
    if backend != "reference" and reduction != "none" and not return_lse:
        scale = _scale(labels != ignore_index, reduction, hidden)
        summed = (scale, ignore_index, label_smoothing, backend)
        return _cross_entropy_sum(
            hidden, teacher_weight, teacher_bias, of_teacher, *summed
        ) + _cross_entropy_sum(hidden, student_weight, student_bias, of_student, *summed)
    rows = (ignore_index, label_smoothing, return_lse, backend)
    teacher = _cross_entropy_rows(hidden, teacher_weight, teacher_bias, of_teacher, *rows)
    student = _cross_entropy_rows(hidden, student_weight, student_bias, of_student, *rows)
    loss = reduce_rows(teacher[0] + student[0], labels != ignore_index, reduction)
    return (loss, teacher[1] + student[1]) if return_lse else loss


def linear_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """tau^2 KL(teacher || student) between two models' softmaxes over one vocabulary.

    The teacher side has no gradient. tau^2 keeps the size of the gradient when tau changes.

    Args:
        student_hidden: [N, H_s].
        student_weight: [V, H_s].
        student_bias: [V] or None.
        teacher_hidden: [N, H_t].
        teacher_weight: [V, H_t].
        teacher_bias: [V] or None.
        temperature: tau, > 0, both logits are divided by it.
        mask: [N] bool, the rows that count; None: all. For labels: `labels != IGNORE_INDEX`.
        reduction: "mean" over the rows that count, "sum", or "none".
        backend: see the module's first lines.

    Returns:
        float32 (float64 for float64 input), [] or [N].
    """
    for side, hidden, weight, bias in (
        ("student", student_hidden, student_weight, student_bias),
        ("teacher", teacher_hidden, teacher_weight, teacher_bias),
    ):
        _check_linear(f"linear_kl ({side})", hidden, weight, bias, ("N", "H"), ("V", "H"))
    if student_hidden.shape[0] != teacher_hidden.shape[0]:
        raise ValueError(
            "linear_kl needs student_hidden [N, H_s] and teacher_hidden [N, H_t] of one N, got "
            f"{_shape(student_hidden)} and {_shape(teacher_hidden)}"
        )
    if student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            "linear_kl needs student_weight [V, H_s] and teacher_weight [V, H_t] of one V, got "
            f"{_shape(student_weight)} and {_shape(teacher_weight)}: "
            "soft targets need one vocabulary"
        )
    _check_temperature(temperature)
    _check_reduction(reduction)
    if mask is None:
        mask = torch.ones(student_hidden.shape[0], dtype=torch.bool, device=student_hidden.device)
    elif mask.shape != student_hidden.shape[:1] or mask.dtype != torch.bool:
        raise ValueError(
            f"linear_kl needs mask [N] bool with N = {student_hidden.shape[0]}, "
            f"got {_shape(mask)} {mask.dtype}"
        )
    backend = _backend(backend, student_hidden)
    if backend == "reference":
        loss = plain.linear_kl_reference(
            student_hidden, student_weight, student_bias,
            teacher_hidden, teacher_weight, teacher_bias, temperature=temperature, mask=mask,
        )  # fmt: skip
        return reduce_rows(loss, mask, reduction)
    teacher = (_autocast(teacher_hidden).detach(), teacher_weight.detach(), _detached(teacher_bias))
    student = (_autocast(student_hidden), student_weight, student_bias)
    scale = None if reduction == "none" else _scale(mask, reduction, student_hidden)
    if scale is None or student[0].dtype == torch.float16:
        loss = ops.linear_kl_rows(*student, *teacher, mask, float(temperature), backend)
        return loss if scale is None else loss.sum() * scale
    return ops.linear_kl_sum(
        *student, *teacher, mask, scale, float(temperature), _need(*student), backend
    )[0]


def relation_kl(student: Tensor, teacher: Tensor, heads: int, *, backend: str = "auto") -> Tensor:
    """KL between the self-relations of queries, of keys and of values, in the mean.

    Each of the three is cut into `heads` parts x of width d; its relations are the rows of
    softmax(x x^T / sqrt(d)), a distribution over the T positions for each of the T positions. As
    heads are re-cut, neither widths nor numbers of heads of the two models have to match. MiniLMv2:
    Wang et al. 2021, arXiv 2012.15828.

    Relations of all rows are never held together, nor are their gradients.

    Args:
        student: [B, T, 3 H_s], queries, keys and values of a layer, one after the other.
        teacher: [B, T, 3 H_t]; has no gradient.
        heads: R, a divisor of H_s and of H_t.
        backend: see the module's first lines.

    Returns:
        [] float32 (float64 for float64 input): the mean over rows, positions, heads and the three.
    """
    for name, x in (("student", student), ("teacher", teacher)):
        if x.ndim != 3 or not x.dtype.is_floating_point or heads < 1 or x.shape[2] % (3 * heads):
            raise ValueError(
                f"relation_kl needs {name} [B, T, 3 H] of floating point with H a multiple of "
                f"heads = {heads}, got {_shape(x)} {x.dtype}"
            )
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            "relation_kl needs student and teacher of one B and one T, "
            f"got {_shape(student)} and {_shape(teacher)}"
        )
    _check_device("relation_kl", "teacher", teacher, student)
    backend = _backend(backend, student)
    if backend == "reference":
        return plain.relation_kl_reference(student, teacher, heads)
    need = torch.is_grad_enabled() and student.requires_grad
    total = ops.relation_kl_sum(student, teacher.detach(), heads, need, backend)[0]
    B, T = student.shape[:2]
    return total / max(3 * B * T * heads, 1)


def _cross_entropy_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    smoothing: float,
    lse_wanted: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(loss [N], lse [N]), 0 on ignored rows."""
    if backend == "reference":
        if not hidden.is_cuda and not torch.compiler.is_compiling():
            ops.check_range("labels", labels, weight.shape[0], ignore_index)
        return plain.linear_cross_entropy_reference(
            hidden, weight, labels, bias, ignore_index=ignore_index, label_smoothing=smoothing
        )
    hidden = _autocast(hidden)
    # Gradients made on the way fit any sum of rows, but neither a gradient of lse nor, without
    # looking at the upstream gradient, a GPU: those compute the logits again.
    ahead = backend == "chunked" and not lse_wanted and hidden.dtype != torch.float16
    need = _need(hidden, weight, bias) if ahead else [False, False, False]
    loss, lse, *_ = ops.linear_cross_entropy_rows(
        hidden, weight, bias, labels, ignore_index, float(smoothing), need, backend
    )
    return loss, lse


def _cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: Tensor,
    ignore_index: int,
    smoothing: float,
    backend: str,
    dense: bool = False,
) -> Tensor:
    hidden = _autocast(hidden)
    if hidden.dtype == torch.float16:
        # A scaled loss keeps gradients in float16's range only if they are made after the scaling.
        # So too in linear_kl.
        loss, *_ = ops.linear_cross_entropy_rows(
            hidden, weight, bias, labels, ignore_index, float(smoothing), [False] * 3, backend
        )
        return loss.sum() * scale
    need = _need(hidden, weight, bias)
    total: Tensor = ops.linear_cross_entropy_sum(
        hidden, weight, bias, labels, scale, ignore_index, float(smoothing), need, backend, dense
    )[0]
    return total


# ---- choices and checks ------------------------------------------------------------------------


def _backend(backend: str, tensor: Tensor) -> str:
    """One of triton, chunked, reference; ValueError for anything that cannot be had."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        if tensor.is_cuda and not HAS_TRITON:
            warnings.warn("triton is not installed: the chunked path is used", stacklevel=3)
            return "chunked"
        return "triton" if tensor.is_cuda else "chunked"
    return backend


def _autocast(hidden: Tensor) -> Tensor:
    """`hidden` in autocast's dtype where autocast is on: the products then run in it."""
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return hidden.to(torch.get_autocast_dtype(device))
    return hidden


def _need(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[bool]:
    if not torch.is_grad_enabled():
        return [False, False, False]
    return [hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad]


def _scale(kept: Tensor, reduction: str, hidden: Tensor) -> Tensor:
    """What the sum over rows is multiplied by, on the device. -> []"""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if reduction == "sum":
        return torch.ones((), dtype=dtype, device=hidden.device)
    return kept.sum().clamp(min=1).to(dtype).reciprocal()


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)


def _check_loss(
    name: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    reduction: str,
    label_smoothing: float,
) -> None:
    _check_linear(name, hidden, weight, bias, ("N", "H"), ("V", "H"))
    if labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"{name} needs labels [N] with N = {hidden.shape[0]} like hidden {_shape(hidden)}, "
            f"got {_shape(labels)}"
        )
    _check_integers(name, "labels", labels)
    _check_device(name, "labels", labels, hidden)
    _check_reduction(reduction)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")


def _check_linear(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_letters: tuple[str, str],
    weight_letters: tuple[str, str],
) -> None:
    """x [N, H], weight [V, H], bias [V]: shapes, dtypes and devices that go together."""
    rows, width = x_letters
    out, _ = weight_letters
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name} needs [{rows}, {width}] and a weight [{out}, {width}] of one {width}, "
            f"got {_shape(x)} and {_shape(weight)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name} needs a bias [{out}] with {out} = {weight.shape[0]}, got {_shape(bias)}"
        )
    for what, tensor in (("input", x), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} needs a floating-point {what}, got {tensor.dtype}")
        _check_device(name, what, tensor, x)
    autocast = torch.is_autocast_enabled(x.device.type)
    if not autocast and x.dtype != weight.dtype and weight.dtype != torch.float32:
        raise ValueError(
            f"{name} needs a weight of the input's dtype {x.dtype} or float32, got {weight.dtype}"
        )


def _check_device(name: str, what: str, tensor: Tensor, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} needs {what} on {other.device}, got {tensor.device}")


def _check_integers(name: str, what: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} needs {what} of int32 or int64, got {tensor.dtype}")


def _check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
