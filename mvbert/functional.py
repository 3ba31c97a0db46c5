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
import math
import warnings
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from mvbert.errors import InputError
from mvbert.kernels import chunked, layer_norm, ops
from mvbert.kernels import mixed_embedding as embedding
from mvbert.kernels.common import (
    IGNORE_INDEX,
    LossOptions,
    accumulator_dtype,
    reduce_rows,
    split_labels,
)
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
    "LossMetrics",
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
    _refuse_forward_mode("mixed_embedding", backend, *inputs.tables, ln_weight, ln_bias)
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
        raise InputError(
            "residual_layer_norm needs x and residual [.., H] alike, "
            f"got {_shape(x)} and {_shape(residual)}"
        )
    _check_norm("residual_layer_norm", ln_weight, ln_bias, H)
    _check_dropout("dropout_p", dropout_p)
    dropout_p = dropout_p if training else 0.0
    if _backend(backend, x) == "triton":
        _refuse_forward_mode("residual_layer_norm", "triton", x, residual, ln_weight, ln_bias)
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


class LossMetrics(NamedTuple):
    """What a loss knows of each row beside its gradient; none of it is differentiable."""

    # [..] int64: the piece with the largest logit, of equal ones the lowest id; -1 without a label.
    predicted: Tensor
    # [..] bool: whether it is the label.
    correct: Tensor
    # [..]: log-sum-exp of the logits, 0 without a label.
    lse: Tensor


# fmt: off
@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = ..., *,
    ignore_index: int = ..., reduction: str = ..., label_smoothing: float = ...,
    class_weight: Tensor | None = ..., softcap: float | None = ..., z_loss: float = ...,
    shift: int = ..., num_items_in_batch: float | Tensor | None = ...,
    return_lse: Literal[False] = ..., return_metrics: Literal[False] = ...,
    mostly_labelled: bool = ..., backend: str = ...,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = ..., *,
    ignore_index: int = ..., reduction: str = ..., label_smoothing: float = ...,
    class_weight: Tensor | None = ..., softcap: float | None = ..., z_loss: float = ...,
    shift: int = ..., num_items_in_batch: float | Tensor | None = ...,
    return_lse: Literal[True], return_metrics: Literal[False] = ...,
    mostly_labelled: bool = ..., backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = ..., *,
    ignore_index: int = ..., reduction: str = ..., label_smoothing: float = ...,
    class_weight: Tensor | None = ..., softcap: float | None = ..., z_loss: float = ...,
    shift: int = ..., num_items_in_batch: float | Tensor | None = ...,
    return_lse: Literal[False] = ..., return_metrics: Literal[True],
    mostly_labelled: bool = ..., backend: str = ...,
) -> tuple[Tensor, LossMetrics]: ...
# fmt: on


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    shift: int = 0,
    num_items_in_batch: float | Tensor | None = None,
    return_lse: bool = False,
    return_metrics: bool = False,
    mostly_labelled: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, LossMetrics]:
    """Softmax cross-entropy of `hidden @ weight.T + bias` without ever holding the logits.

    As `F.cross_entropy` on those logits, except that the mean over no rows at all is 0, not NaN.

    Args:
        hidden: [.., H]; its dtype (under autocast, autocast's) is that of the products.
        weight: [V, H], of the dtype of `hidden` or wider.
        labels: [..], int32 or int64; rows with `ignore_index` cost nothing.
        bias: [V] or None.
        reduction: "mean" over the rows that have a label, "sum", or "none". "none" makes the
            logits again in backward, 2 N V H FLOP more, as forward cannot know what comes back for
            each row; on a CPU only if that differs between rows. `return_lse` always does.
        label_smoothing: share of the target spread evenly over V, in [0, 1).
        class_weight: [V] or None, as the `weight` of `F.cross_entropy`: "mean" divides by the sum
            of the labels' weights. Has no gradient.
        softcap: the logits are softcap * tanh(logits / softcap) first. On a GPU takes memory for
            the logits of 8,192 rows at any H.
        z_loss: adds z_loss * lse^2 to each row's loss, which class weights leave as it is, and in
            "mean" its mean over the rows that have a label.
        shift: the label of a position is the one `shift` to its right; labels are [.., T], and with
            reduction "none" losses [.., T - shift].
        num_items_in_batch: what sums are divided by, in place of the number of labels (or of their
            weights) of this call: for gradient accumulation. Only with reduction "mean".
        return_lse: also return log-sum-exp of each row's logits, differentiable, 0 on ignored rows.
        return_metrics: also return `LossMetrics`.
        mostly_labelled: few rows are ignored. A matter of speed only: on a GPU, bfloat16 products
            of wide rows then run over all rows in the vendor's library.
        backend: see the module's first lines.

    Returns:
        The loss, float32 (float64 for float64 input), [] or [..]; with `return_lse`
        (loss, lse [..]), with `return_metrics` (loss, LossMetrics).
    """
    name = "linear_cross_entropy"
    _check_loss(name, hidden, weight, bias, labels, reduction, label_smoothing, "..")
    _check_options(name, weight, labels, class_weight, softcap, z_loss, shift)
    _check_count(name, num_items_in_batch, reduction)
    if return_lse and return_metrics:
        raise InputError(f"{name}: return_metrics gives an lse too; leave out return_lse")
    _refuse_forward_mode(name, backend, hidden, weight, bias)
    shape = labels.shape
    if shift:
        labels = F.pad(labels[..., shift:], (0, shift), value=ignore_index)
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    backend = _backend(backend, hidden)
    labelled = labels != ignore_index
    if class_weight is not None:
        class_weight = class_weight.to(accumulator_dtype(hidden.dtype))
    scale, z_factor = _scales(
        reduction, hidden, labels, labelled, class_weight, z_loss, num_items_in_batch
    )
    options = LossOptions(
        ignore_index, float(label_smoothing), class_weight, float(softcap or 0), z_factor,
        return_metrics,
    )  # fmt: skip
    if backend == "reference":
        loss, lse, predicted = linear_cross_entropy_reference(
            hidden, weight, labels, bias, ignore_index=ignore_index,
            label_smoothing=label_smoothing, class_weight=class_weight, softcap=options.softcap,
            z_loss=0.0 if z_factor is None else z_factor,
        )  # fmt: skip
        loss = loss if scale is None else loss.sum() * scale
    elif scale is None or return_lse:
        loss, lse, predicted = _cross_entropy_rows(
            hidden, weight, bias, labels, options, return_lse, backend
        )
        loss = loss if scale is None else loss.sum() * scale
    else:
        loss, lse, predicted = _cross_entropy_sum(
            hidden, weight, bias, labels, scale, options, backend, mostly_labelled
        )

    def by_row(x: Tensor) -> Tensor:
        x = x.reshape(shape)
        return x[..., : shape[-1] - shift] if shift else x

    if reduction == "none":
        loss = by_row(loss)
    if return_metrics:
        metrics = (predicted, predicted == labels, lse.detach())
        return loss, LossMetrics(*(by_row(x) for x in metrics))
    return (loss, by_row(lse)) if return_lse else loss


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
    _check_loss(name, hidden, teacher_weight, teacher_bias, labels, reduction, label_smoothing, "N")
    _check_loss(name, hidden, student_weight, student_bias, labels, reduction, label_smoothing, "N")
    tables = teacher_weight, teacher_bias, student_weight, student_bias
    _refuse_forward_mode(name, backend, hidden, *tables)
    backend = _backend(backend, hidden)
    labelled = labels != ignore_index
    if backend == "reference":
        teacher, student = mixed_linear_cross_entropy_reference(
            hidden, teacher_weight, student_weight, labels, teacher_bias, student_bias,
            ignore_index=ignore_index, label_smoothing=label_smoothing,
        )  # fmt: skip
        return (
            reduce_rows(teacher, labelled, reduction),
            reduce_rows(student, labelled, reduction),
        )
    of_teacher, of_student = split_labels(labels, teacher_weight.shape[0], ignore_index)
    scale = _scale(labelled, reduction, hidden)
    options = LossOptions(ignore_index, float(label_smoothing))

    def loss(weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        if reduction == "none":
            return _cross_entropy_rows(hidden, weight, bias, labels, options, False, backend)[0]
        # Not mostly labelled: about half of the rows belong to either vocabulary.
        return _cross_entropy_sum(hidden, weight, bias, labels, scale, options, backend, False)[0]

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
        raise InputError(
            "linear_kl needs student_hidden [N, H_s] and teacher_hidden [N, H_t] of one N, got "
            f"{_shape(student_hidden)} and {_shape(teacher_hidden)}"
        )
    if student_weight.shape[0] != teacher_weight.shape[0]:
        raise InputError(
            "linear_kl needs student_weight [V, H_s] and teacher_weight [V, H_t] of one V, got "
            f"{_shape(student_weight)} and {_shape(teacher_weight)}: "
            "soft targets need one vocabulary"
        )
    _check_temperature(temperature)
    _check_reduction(reduction)
    if mask is None:
        mask = torch.ones(student_hidden.shape[0], dtype=torch.bool, device=student_hidden.device)
    elif mask.shape != student_hidden.shape[:1] or mask.dtype != torch.bool:
        raise InputError(
            f"linear_kl needs mask [N] bool with N = {student_hidden.shape[0]}, "
            f"got {_shape(mask)} {mask.dtype}"
        )
    _refuse_forward_mode(
        "linear_kl", backend, student_hidden, student_weight, student_bias,
        teacher_hidden, teacher_weight, teacher_bias,
    )  # fmt: skip
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
            raise InputError(
                f"relation_kl needs {name} [B, T, 3 H] of floating point with H a multiple of "
                f"heads = {heads}, got {_shape(x)} {x.dtype}"
            )
    if student.shape[:2] != teacher.shape[:2]:
        raise InputError(
            "relation_kl needs student and teacher of one B and one T, "
            f"got {_shape(student)} and {_shape(teacher)}"
        )
    _check_device("relation_kl", "teacher", teacher, student)
    _refuse_forward_mode("relation_kl", backend, student, teacher)
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
    options: LossOptions,
    with_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [N], lse [N], predicted [N]); 0, 0 and -1 on ignored rows."""
    hidden = _autocast(hidden)
    # Gradients made on the way fit any sum of rows, but neither a gradient of lse nor, without
    # looking at the upstream gradient, a GPU: those compute the logits again.
    one_pass = backend == "chunked" and not with_lse and hidden.dtype != torch.float16
    need = _need(hidden, weight, bias) if one_pass else [False, False, False]
    ignore_index, smoothing, class_weight, softcap, z_loss, predict = options
    loss, lse, predicted, *_ = linear_cross_entropy_rows(
        hidden, weight, bias, labels, class_weight, z_loss, ignore_index, smoothing, softcap,
        predict, need, backend,
    )  # fmt: skip
    return loss, lse, predicted


def _cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: Tensor,
    options: LossOptions,
    backend: str,
    mostly_labelled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(scaled sum [], lse [N], predicted [N])."""
    hidden = _autocast(hidden)
    if hidden.dtype == torch.float16:
        # A scaled loss keeps gradients in float16's range only if they are made after the scaling.
        # So too in linear_kl.
        loss, lse, predicted = _cross_entropy_rows(
            hidden, weight, bias, labels, options, False, backend
        )
        return loss.sum() * scale, lse, predicted
    ignore_index, smoothing, class_weight, softcap, z_loss, predict = options
    total, lse, predicted, *_ = linear_cross_entropy_sum(
        hidden, weight, bias, labels, scale, class_weight, z_loss, ignore_index, smoothing, softcap,
        predict, _need(hidden, weight, bias), backend, mostly_labelled,
    )  # fmt: skip
    return total, lse, predicted


# ---- choices and checks ------------------------------------------------------------------------


def _backend(backend: str, tensor: Tensor) -> str:
    """One of triton, chunked, reference; ValueError for anything that cannot be had."""
    if backend not in BACKENDS:
        raise InputError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        if tensor.is_cuda and not HAS_TRITON:
            warnings.warn("triton is not installed: the chunked path is used", stacklevel=3)
            return "chunked"
        return "triton" if tensor.is_cuda else "chunked"
    if backend == "triton" and not HAS_TRITON:
        raise InputError("backend 'triton' needs Triton, which is not installed")
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


def _scales(
    reduction: str,
    hidden: Tensor,
    labels: Tensor,
    labelled: Tensor,
    class_weight: Tensor | None,
    z_loss: float,
    num_items_in_batch: float | Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """What the sum over rows is multiplied by, and z_loss, on the device; None: nothing."""
    dtype, device = accumulator_dtype(hidden.dtype), hidden.device
    z_factor = torch.full((), z_loss, dtype=dtype, device=device) if z_loss else None
    if reduction == "none":
        return None, z_factor
    if num_items_in_batch is not None:
        count = torch.as_tensor(num_items_in_batch, dtype=dtype, device=device)
        return count.reshape(()).reciprocal(), z_factor
    scale = _scale(labelled, reduction, hidden)
    if class_weight is None or reduction == "sum":
        return scale, z_factor
    weights = class_weight[labels.where(labelled, 0)].where(labelled, 0)
    total = weights.sum().where(labelled.any(), 1)
    if z_factor is not None:
        # It stays a mean over labels, of whatever weight.
        z_factor = z_factor * scale * total
    return total.reciprocal(), z_factor


def _scale(mask: Tensor, reduction: str, hidden: Tensor) -> Tensor:
    """What the sum over rows is multiplied by, on the device. -> []"""
    dtype = accumulator_dtype(hidden.dtype)
    if reduction == "sum":
        return torch.ones((), dtype=dtype, device=hidden.device)
    return mask.sum().clamp(min=1).to(dtype).reciprocal()


def _seed(dropout_p: float, like: Tensor) -> Tensor | None:
    """[1], drawn on the device from torch's generator: what a kernel draws its mask from."""
    return torch.randint(0, 2**31 - 1, (1,), device=like.device) if dropout_p > 0 else None


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)


def _type(x: object) -> str:
    return type(x).__name__


def _is_number(x: object) -> bool:
    """Python's, numpy's and tensors of one; asked in a way that torch.compile can trace."""
    return hasattr(x, "__float__")


def _check_embedding(
    inputs: EmbeddingInputs, padding_id: int | None, frequent_ids: tuple[int, ...]
) -> None:
    name, ids = "mixed_embedding", inputs.input_ids
    if ids.ndim != 2:
        raise InputError(f"{name} needs input_ids [B, T], got {_shape(ids)}")
    _check_integers(name, "input_ids", ids)
    if not inputs.words:
        raise InputError(f"{name} needs a teacher_table [V_t, H], student_rows [V_s, H] or both")
    H = inputs.words[0].shape[-1]
    fields = ("teacher_table", "student_rows", "position_table", "type_table")
    for field, rows, table in zip(fields, ("V_t", "V_s", "P", "S"), inputs.tables, strict=True):
        if table is None:
            continue
        if table.ndim != 2 or table.shape[1] != H:
            raise InputError(f"{name} needs {field} [{rows}, H] with H = {H}, got {_shape(table)}")
        _check_device(name, field, table, ids)
    _check_norm(name, inputs.ln_weight, inputs.ln_bias, H)
    types, positions, position_table = (
        inputs.token_type_ids, inputs.position_ids, inputs.position_table
    )  # fmt: skip
    if types is not None and types.shape != ids.shape:
        raise InputError(
            f"{name} needs token_type_ids [B, T] like input_ids {_shape(ids)}, got {_shape(types)}"
        )
    B, T = ids.shape
    if positions is not None and tuple(positions.shape) not in ((B, T), (1, T)):
        raise InputError(
            f"{name} needs position_ids [B, T] or [1, T] with T = {T}, got {_shape(positions)}"
        )
    if position_table is not None and positions is None and position_table.shape[0] < T:
        raise InputError(
            f"{name} has {position_table.shape[0]} positions, too few for rows of T = {T}"
        )
    V = sum(table.shape[0] for table in inputs.words)
    if padding_id is not None and not 0 <= padding_id < V:
        raise InputError(f"padding_id must lie in [0, {V}), got {padding_id}")
    if len(frequent_ids) > 2:
        raise InputError(f"frequent_ids holds at most two ids, got {len(frequent_ids)}")
    ops.check_range("input_ids", ids, V)
    if position_table is not None and positions is not None:
        ops.check_range("position_ids", positions, position_table.shape[0])
    if inputs.type_table is not None and types is not None:
        ops.check_range("token_type_ids", types, inputs.type_table.shape[0])


def _check_norm(name: str, ln_weight: Tensor, ln_bias: Tensor, H: int) -> None:
    for what, vector in (("ln_weight", ln_weight), ("ln_bias", ln_bias)):
        if vector.shape != (H,):
            raise InputError(f"{name} needs {what} [H] with H = {H}, got {_shape(vector)}")


def _check_dropout(name: str, p: float) -> None:
    if not 0 <= p < 1:
        raise InputError(f"{name} must lie in [0, 1), got {p}")


def _check_loss(
    name: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    reduction: str,
    label_smoothing: float,
    rows: str,
) -> None:
    _check_linear(name, hidden, weight, bias, (rows, "H"), ("V", "H"))
    if not isinstance(labels, Tensor):
        raise InputError(f"{name} needs labels as a tensor, got {_type(labels)}")
    if labels.shape != hidden.shape[:-1]:
        raise InputError(
            f"{name} needs labels [{rows}] like hidden [{rows}, H], here {_shape(hidden)[:-1]}, "
            f"got {_shape(labels)}"
        )
    _check_integers(name, "labels", labels)
    _check_device(name, "labels", labels, hidden)
    _check_reduction(reduction)
    _check_smoothing(label_smoothing)


def _check_smoothing(label_smoothing: float) -> None:
    if not _is_number(label_smoothing) or not 0 <= label_smoothing < 1:
        raise InputError(f"label_smoothing must lie in [0, 1), got {label_smoothing!r}")


def _check_options(
    name: str,
    weight: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    softcap: float | None,
    z_loss: float,
    shift: int,
) -> None:
    if class_weight is not None:
        check_class_weight(name, class_weight, weight.shape[0])
        _check_device(name, "class_weight", class_weight, labels)
    _check_terms(softcap, z_loss)
    if shift and labels.ndim < 2:
        raise InputError(f"shift needs labels [.., T], a row for each text, got {_shape(labels)}")
    if not isinstance(shift, int) or not 0 <= shift < max(1, labels.shape[-1]):
        raise InputError(
            f"shift must be a whole number in [0, T) with T = {labels.shape[-1]}, got {shift}"
        )


def _check_terms(softcap: float | None, z_loss: float) -> None:
    if softcap is not None and not (_is_number(softcap) and 0 < softcap < math.inf):
        raise InputError(f"softcap must be above 0, or None for no cap, got {softcap!r}")
    if not _is_number(z_loss) or not 0 <= z_loss < math.inf:
        raise InputError(f"z_loss must be 0 or more, got {z_loss!r}")


def check_class_weight(name: str, class_weight: Tensor, V: int | None = None) -> None:
    """Shape and dtype alone: any value goes, as in torch."""
    if not isinstance(class_weight, Tensor):
        raise InputError(
            f"{name} needs class_weight [V] as a tensor of floating point, "
            f"got {_type(class_weight)}"
        )
    shape = class_weight.shape
    if (
        len(shape) != 1
        or (V is not None and shape[0] != V)
        or not class_weight.dtype.is_floating_point
    ):
        size = "" if V is None else f" with V = {V}"
        raise InputError(
            f"{name} needs class_weight [V] of floating point{size}, "
            f"got {_shape(class_weight)} {class_weight.dtype}"
        )
    if class_weight.requires_grad:
        raise InputError(f"{name} makes no gradient of class_weight: hand it over detached")


def check_loss(
    reduction: str, label_smoothing: float, softcap: float | None, z_loss: float, shift: int
) -> None:
    """What `linear_cross_entropy` refuses of its options whatever the tensors."""
    _check_reduction(reduction)
    _check_smoothing(label_smoothing)
    _check_terms(softcap, z_loss)
    if not isinstance(shift, int) or shift < 0:
        raise InputError(f"shift must be a whole number of 0 or more, got {shift!r}")


def _check_count(name: str, count: float | Tensor | None, reduction: str) -> None:
    """A tensor's value is not looked at: that would wait for the device."""
    if count is None:
        return
    if reduction != "mean":
        raise InputError(
            f"{name}: num_items_in_batch is what 'mean' divides by; leave it out of {reduction!r}"
        )
    if isinstance(count, Tensor):
        if count.numel() != 1:
            raise InputError(f"num_items_in_batch must be one number, got {_shape(count)}")
    elif not _is_number(count) or not 0 < count < math.inf:
        raise InputError(f"num_items_in_batch must be above 0, got {count!r}")


def _refuse_forward_mode(name: str, backend: str, *tensors: Tensor | None) -> None:
    """An operator with a backward of its own would drop the tangents of its inputs in silence."""
    if backend == "reference" or torch.compiler.is_compiling():
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            f"{name} has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad); "
            "backend='reference' has"
        )


def _check_linear(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_letters: tuple[str, str],
    weight_letters: tuple[str, str],
) -> None:
    """x [N, H] (or [.., H]), weight [V, H], bias [V]: shapes, dtypes, devices that go together."""
    rows, width = x_letters
    out, _ = weight_letters
    for what, tensor in (("input", x), ("weight", weight), ("bias", bias)):
        if not (isinstance(tensor, Tensor) or (tensor is None and what == "bias")):
            raise InputError(f"{name} needs its {what} as a tensor, got {_type(tensor)}")
    dims = x.ndim if rows == ".." and x.ndim > 1 else 2
    if x.ndim != dims or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise InputError(
            f"{name} needs [{rows}, {width}] and a weight [{out}, {width}] of one {width}, "
            f"got {_shape(x)} and {_shape(weight)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(
            f"{name} needs a bias [{out}] with {out} = {weight.shape[0]}, got {_shape(bias)}"
        )
    for what, tensor in (("input", x), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if not tensor.dtype.is_floating_point:
            raise InputError(f"{name} needs a floating-point {what}, got {tensor.dtype}")
        _check_device(name, what, tensor, x)
    autocast = torch.is_autocast_enabled(x.device.type)
    if not autocast and x.dtype != weight.dtype and weight.dtype != torch.float32:
        raise InputError(
            f"{name} needs a weight of the input's dtype {x.dtype} or float32, got {weight.dtype}"
        )


def _check_device(name: str, what: str, tensor: Tensor, other: Tensor) -> None:
    if tensor.device != other.device:
        raise InputError(f"{name} needs {what} on {other.device}, got {tensor.device}")


def _check_integers(name: str, what: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.int32, torch.int64):
        raise InputError(f"{name} needs {what} of int32 or int64, got {tensor.dtype}")


def _check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise InputError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise InputError(f"temperature must be above 0, got {temperature}")
