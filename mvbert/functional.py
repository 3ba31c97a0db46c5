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

from mvbert.kernels import chunked, layer_norm, ops
from mvbert.kernels import mixed_embedding as embedding
from mvbert.kernels.common import IGNORE_INDEX, accumulator_dtype, reduce_rows, split_labels
from mvbert.kernels.dropout import dropout_factors
from mvbert.kernels.linear_cross_entropy import (
    linear_cross_entropy_reference,
    linear_cross_entropy_rows,
    linear_cross_entropy_sum,
    mixed_linear_cross_entropy_reference,
)
from mvbert.kernels.linear_kl import linear_kl_reference, linear_kl_rows, linear_kl_sum
from mvbert.kernels.mixed_embedding import EmbeddingInputs
from mvbert.kernels.relation_kl import relation_kl_reference, relation_kl_sum

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
    inputs = EmbeddingInputs(
        input_ids, teacher_table, student_rows, position_table, type_table, token_type_ids,
        position_ids, ln_weight, ln_bias,
    )  # fmt: skip
    _check_embedding(inputs, padding_id, frequent_ids)
    _check_dropout("dropout_p", dropout_p)
    backend = _backend(backend, input_ids)
    if backend == "reference":
        hidden = embedding.mixed_embedding_reference(inputs, eps, padding_id)
        return dropout(hidden, dropout_p, training)
    padding = -1 if padding_id is None else padding_id
    if backend == "chunked":
        return dropout(chunked.mixed_embedding(inputs, eps, padding), dropout_p, training)
    dropout_p = dropout_p if training else 0.0
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    hidden, *_ = embedding.mixed_embedding(
        *inputs, _seed(dropout_p, input_ids), float(eps), float(dropout_p), padding,
        list(frequent_ids), deterministic,
    )  # fmt: skip
    return hidden


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
    _check_dropout("p", p)
    if p == 0 or not training:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    return x * dropout_factors(x.detach(), p)


@overload
def residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float = ...,
    dropout_p: float = ...,
    training: bool = ...,
    *,
    also_in_x_dtype: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float = ...,
    dropout_p: float = ...,
    training: bool = ...,
    *,
    also_in_x_dtype: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


def residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    training: bool = False,
    *,
    also_in_x_dtype: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm(residual + dropout(x)).

    Args:
        x, residual: [.., H].
        ln_weight, ln_bias: [H].
        eps: LayerNorm's epsilon.
        dropout_p: probability of zeroing a value of x; only when `training`.
        training: whether dropout is active.
        also_in_x_dtype: also return the result in the dtype of x. For mixed precision: the next
            residual is the first, the next matrix product reads the second. Written by one kernel
            they cost less than a cast, and so do their gradients.
        backend: see the module's first lines.

    Returns:
        [.., H], dtype of `residual` from the kernel, elsewhere what torch promotes to; or two of
        them, one tensor twice where `residual` and x are alike in dtype.
    """
    H = x.shape[-1]
    if residual.shape != x.shape:
        raise ValueError(
            "residual_layer_norm needs x and residual [.., H] alike, "
            f"got {_shape(x)} and {_shape(residual)}"
        )
    _check_norm("residual_layer_norm", ln_weight, ln_bias, H)
    _check_dropout("dropout_p", dropout_p)
    dropout_p = dropout_p if training else 0.0
    if _backend(backend, x) == "triton":
        both = also_in_x_dtype and x.dtype != residual.dtype
        y, rounded, *_ = layer_norm.residual_layer_norm(
            x.reshape(-1, H), residual.reshape(-1, H), ln_weight, ln_bias, _seed(dropout_p, x),
            float(eps), float(dropout_p), both,
        )  # fmt: skip
        y = y.reshape(x.shape)
        rounded = rounded.reshape(x.shape) if both else y
    else:
        y = layer_norm.residual_layer_norm_reference(
            dropout(x, dropout_p), residual, ln_weight, ln_bias, eps
        )
        rounded = y.to(x.dtype)
    return (y, rounded) if also_in_x_dtype else y


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
    mostly_labelled: bool = ...,
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
    mostly_labelled: bool = ...,
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
    mostly_labelled: bool = False,
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
        mostly_labelled: few rows are ignored. A matter of speed only: on a GPU, bfloat16 products
            of wide rows then run over all rows in the vendor's library.
        backend: see the module's first lines.

    Returns:
        The loss, float32 (float64 for float64 input), [] or [N]; or (loss, lse [N]).
    """
    _check_loss("linear_cross_entropy", hidden, weight, bias, labels, reduction, label_smoothing)
    backend = _backend(backend, hidden)
    kept = labels != ignore_index
    if backend == "reference":
        loss, lse = linear_cross_entropy_reference(
            hidden, weight, labels, bias, ignore_index=ignore_index, label_smoothing=label_smoothing
        )
    elif reduction == "none" or return_lse:
        loss, lse = _cross_entropy_rows(
            hidden, weight, bias, labels, ignore_index, label_smoothing, return_lse, backend
        )
    else:
        scale = _scale(kept, reduction, hidden)
        return _cross_entropy_sum(
            hidden, weight, bias, labels, scale, ignore_index, label_smoothing, backend,
            mostly_labelled,
        )  # fmt: skip
    loss = reduce_rows(loss, kept, reduction)
    return (loss, lse) if return_lse else loss


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
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row over the vocabulary of its own label: two softmaxes.

    Args:
        hidden: [N, H].
        teacher_weight: [V_t, H].
        student_weight: [V_s, H], the projected student table.
        labels: [N], joint ids or `ignore_index`.
        teacher_bias: [V_t] or None.
        student_bias: [V_s] or None.
        ignore_index, reduction, label_smoothing, backend: as `linear_cross_entropy`; "mean" is over
            all rows that have a label, of either vocabulary.

    Returns:
        (loss of the teacher's pieces, loss of the student's), whose sum is the loss; float32
        (float64 for float64 input), [] or [N], 0 on the rows of the other vocabulary.
    """
    name = "mixed_linear_cross_entropy"
    _check_loss(name, hidden, teacher_weight, teacher_bias, labels, reduction, label_smoothing)
    _check_loss(name, hidden, student_weight, student_bias, labels, reduction, label_smoothing)
    backend = _backend(backend, hidden)
    kept = labels != ignore_index
    if backend == "reference":
        losses = mixed_linear_cross_entropy_reference(
            hidden, teacher_weight, student_weight, labels, teacher_bias, student_bias,
            ignore_index=ignore_index, label_smoothing=label_smoothing,
        )  # fmt: skip
        return reduce_rows(losses[0], kept, reduction), reduce_rows(losses[1], kept, reduction)
    of_teacher, of_student = split_labels(labels, teacher_weight.shape[0], ignore_index)
    scale = _scale(kept, reduction, hidden)

    def loss(weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        if reduction == "none":
            return _cross_entropy_rows(
                hidden, weight, bias, labels, ignore_index, label_smoothing, False, backend
            )[0]
        # Not mostly labelled: about half of the rows belong to either vocabulary.
        return _cross_entropy_sum(
            hidden, weight, bias, labels, scale, ignore_index, label_smoothing, backend, False
        )

    return (
        loss(teacher_weight, teacher_bias, of_teacher),
        loss(student_weight, student_bias, of_student),
    )


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
        loss = linear_kl_reference(
            student_hidden, student_weight, student_bias,
            teacher_hidden, teacher_weight, teacher_bias, mask, temperature,
        )  # fmt: skip
        return reduce_rows(loss, mask, reduction)
    teacher = (_autocast(teacher_hidden).detach(), teacher_weight.detach(), _detached(teacher_bias))
    student = (_autocast(student_hidden), student_weight, student_bias)
    scale = None if reduction == "none" else _scale(mask, reduction, student_hidden)
    if scale is None or student[0].dtype == torch.float16:
        loss = linear_kl_rows(*student, *teacher, mask, float(temperature), backend)
        return loss if scale is None else loss.sum() * scale
    return linear_kl_sum(
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
        return relation_kl_reference(student, teacher, heads)
    need = torch.is_grad_enabled() and student.requires_grad
    total = relation_kl_sum(student, teacher.detach(), heads, need, backend)[0]
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
    hidden = _autocast(hidden)
    # Gradients made on the way fit any sum of rows, but neither a gradient of lse nor, without
    # looking at the upstream gradient, a GPU: those compute the logits again.
    ahead = backend == "chunked" and not lse_wanted and hidden.dtype != torch.float16
    need = _need(hidden, weight, bias) if ahead else [False, False, False]
    loss, lse, *_ = linear_cross_entropy_rows(
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
    mostly_labelled: bool,
) -> Tensor:
    hidden = _autocast(hidden)
    if hidden.dtype == torch.float16:
        # A scaled loss keeps gradients in float16's range only if they are made after the scaling.
        # So too in linear_kl.
        loss, *_ = linear_cross_entropy_rows(
            hidden, weight, bias, labels, ignore_index, float(smoothing), [False] * 3, backend
        )
        return loss.sum() * scale
    need = _need(hidden, weight, bias)
    total: Tensor = linear_cross_entropy_sum(
        hidden, weight, bias, labels, scale, ignore_index, float(smoothing), need, backend,
        mostly_labelled,
    )[0]  # fmt: skip
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
    if backend == "triton" and not HAS_TRITON:
        raise ValueError("backend 'triton' needs Triton, which is not installed")
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
    dtype = accumulator_dtype(hidden.dtype)
    if reduction == "sum":
        return torch.ones((), dtype=dtype, device=hidden.device)
    return kept.sum().clamp(min=1).to(dtype).reciprocal()


def _seed(dropout_p: float, like: Tensor) -> Tensor | None:
    """[1], drawn on the device from torch's generator: what a kernel draws its mask from."""
    return torch.randint(0, 2**31 - 1, (1,), device=like.device) if dropout_p > 0 else None


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)


def _check_embedding(
    inputs: EmbeddingInputs, padding_id: int | None, frequent_ids: tuple[int, ...]
) -> None:
    name, ids = "mixed_embedding", inputs.input_ids
    if ids.ndim != 2:
        raise ValueError(f"{name} needs input_ids [B, T], got {_shape(ids)}")
    _check_integers(name, "input_ids", ids)
    if not inputs.words:
        raise ValueError(f"{name} needs a teacher_table [V_t, H], student_rows [V_s, H] or both")
    H = inputs.words[0].shape[-1]
    fields = ("teacher_table", "student_rows", "position_table", "type_table")
    for field, rows, table in zip(fields, ("V_t", "V_s", "P", "S"), inputs.tables, strict=True):
        if table is None:
            continue
        if table.ndim != 2 or table.shape[1] != H:
            raise ValueError(f"{name} needs {field} [{rows}, H] with H = {H}, got {_shape(table)}")
        _check_device(name, field, table, ids)
    _check_norm(name, inputs.ln_weight, inputs.ln_bias, H)
    types, positions, position_table = (
        inputs.token_type_ids, inputs.position_ids, inputs.position_table
    )  # fmt: skip
    if types is not None and types.shape != ids.shape:
        raise ValueError(
            f"{name} needs token_type_ids [B, T] like input_ids {_shape(ids)}, got {_shape(types)}"
        )
    B, T = ids.shape
    if positions is not None and tuple(positions.shape) not in ((B, T), (1, T)):
        raise ValueError(
            f"{name} needs position_ids [B, T] or [1, T] with T = {T}, got {_shape(positions)}"
        )
    if position_table is not None and positions is None and position_table.shape[0] < T:
        raise ValueError(
            f"{name} has {position_table.shape[0]} positions, too few for rows of T = {T}"
        )
    V = sum(table.shape[0] for table in inputs.words)
    if padding_id is not None and not 0 <= padding_id < V:
        raise ValueError(f"padding_id must lie in [0, {V}), got {padding_id}")
    if len(frequent_ids) > 2:
        raise ValueError(f"frequent_ids holds at most two ids, got {len(frequent_ids)}")
    ops.check_range("input_ids", ids, V)
    if position_table is not None and positions is not None:
        ops.check_range("position_ids", positions, position_table.shape[0])
    if inputs.type_table is not None and types is not None:
        ops.check_range("token_type_ids", types, inputs.type_table.shape[0])


def _check_norm(name: str, ln_weight: Tensor, ln_bias: Tensor, H: int) -> None:
    for what, vector in (("ln_weight", ln_weight), ("ln_bias", ln_bias)):
        if vector.shape != (H,):
            raise ValueError(f"{name} needs {what} [H] with H = {H}, got {_shape(vector)}")


def _check_dropout(name: str, p: float) -> None:
    if not 0 <= p < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {p}")


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
