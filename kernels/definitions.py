"""The plain PyTorch definition of every fused part: what the kernels compute, in the fewest words.

Nothing here is fast and logits are held whole. The tests hold the kernels and the row-chunked path
to these functions in float64; `backend="reference"` of `mvbert.functional` runs them.

Letters: N rows, H hidden width, E embedding width of the student, V vocabulary size, B rows of a
batch, T pieces in a row.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100


def project_table_reference(student_table: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[V_s, E] x [H, E] + [H] -> [V_s, H]: the student table at the teacher's width."""
    return F.linear(student_table, weight, bias)


def mixed_embedding_reference(
    input_ids: Tensor,  # [B, T], joint ids
    teacher_table: Tensor | None,  # [V_t, H]
    student_rows: Tensor | None,  # [V_s, H]
    position_table: Tensor | None,  # [P, H]
    type_table: Tensor | None,  # [S, H]
    token_type_ids: Tensor | None,  # [B, T]
    position_ids: Tensor | None,  # [B, T] or [1, T]
    ln_weight: Tensor,  # [H]
    ln_bias: Tensor,  # [H]
    eps: float,
    padding_id: int | None = None,
) -> Tensor:
    """LayerNorm(table[id] + position[t] + type[s]) with table = [teacher; student]. -> [B, T, H]"""
    tables = [table for table in (teacher_table, student_rows) if table is not None]
    rows = F.embedding(input_ids.long(), torch.cat(tables), padding_idx=padding_id)
    if position_table is not None:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        rows = rows + position_table[position_ids.long()]
    if type_table is not None:
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        rows = rows + type_table[token_type_ids.long()]
    return F.layer_norm(rows, rows.shape[-1:], ln_weight, ln_bias, eps)


def residual_layer_norm_reference(
    x: Tensor,
    residual: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """LayerNorm(residual + dropout(x)). [.., H] -> [.., H]"""
    return F.layer_norm(
        residual + F.dropout(x, dropout_p, training=dropout_p > 0),
        x.shape[-1:],
        ln_weight,
        ln_bias,
        eps,
    )


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
    logits = upcast(linear(hidden, weight, bias))
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
    """Each row against the vocabulary of its label, normalised over that vocabulary. -> [N], [N]"""
    teacher_labels, student_labels = split_labels(labels, teacher_weight.shape[0], ignore_index)
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    of_teacher = linear_cross_entropy_reference(
        hidden, teacher_weight, teacher_labels, teacher_bias, **options
    )
    of_student = linear_cross_entropy_reference(
        hidden, student_weight, student_labels, student_bias, **options
    )
    return of_teacher[0] + of_student[0], of_teacher[1] + of_student[1]


def linear_kl_reference(
    student_hidden: Tensor,  # [N, H_s]
    student_weight: Tensor,  # [V, H_s]
    student_bias: Tensor | None,  # [V]
    teacher_hidden: Tensor,  # [N, H_t]
    teacher_weight: Tensor,  # [V, H_t]
    teacher_bias: Tensor | None,  # [V]
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,  # [N], bool
) -> Tensor:
    """tau^2 KL(softmax(teacher / tau) || softmax(student / tau)), 0 where masked out. -> [N]"""
    with torch.no_grad():
        teacher = upcast(linear(teacher_hidden, teacher_weight, teacher_bias)) / temperature
        log_q = F.log_softmax(teacher, 1)
    log_p = F.log_softmax(
        upcast(linear(student_hidden, student_weight, student_bias)) / temperature, 1
    )
    loss = temperature**2 * (log_q.exp() * (log_q - log_p)).sum(1)
    return loss if mask is None else loss * mask.to(loss.dtype)


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


def split_heads(qkv: Tensor, heads: int) -> Tensor:
    """[B, T, 3 H] -> [3, B, heads, T, H / heads], a view."""
    B, T, W = qkv.shape
    return qkv.view(B, T, 3, heads, W // 3 // heads).permute(2, 0, 3, 1, 4)


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`hidden @ weight.T + bias` in the dtype of `hidden`."""
    return F.linear(
        hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    )


def split_labels(labels: Tensor, teacher_size: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Joint labels as (teacher labels, student labels), each ignored where the other one holds."""
    is_student = labels >= teacher_size
    return (
        torch.where(is_student, ignore_index, labels),
        torch.where(is_student, labels - teacher_size, ignore_index),
    )


def reduce_rows(loss: Tensor, kept: Tensor, reduction: str) -> Tensor:
    """mean over kept rows (0 when there is none), sum, or the rows themselves."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / kept.sum().clamp(min=1).to(loss.dtype)


def upcast(x: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()
