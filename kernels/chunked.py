"""Linear losses over chunks of rows: the path for CPU tensors, in plain PyTorch.

    z = hidden @ weight.T + bias,   loss = f(z),   dz = df/dz

for a few hundred rows at a time, so that the logits of a chunk are all that is ever held. Rows
without a loss are left out before the first product. Where the upstream gradient of every row is
known beforehand (sum, mean) the gradients are made in the same pass, from the probabilities that
are still there: three matrix products in all, nothing recomputed.

The dtype of `hidden` is the dtype of the products. The softmax and the sums over chunks are float32
(float64 for float64 input), whatever that dtype is. Nothing here is differentiable; `ops.py` ties
these functions into autograd.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Logits of one chunk in bytes. Large enough for the products to run at full speed (hundreds of
# rows) and for the sum over chunks into dweight to stay a small part, small beside any model.
CHUNK_BYTES = 32 << 20


@dataclass(frozen=True)
class Need:
    """Which gradients are wanted."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    def __bool__(self) -> bool:
        return self.hidden or self.weight or self.bias


def chunk_rows(V: int) -> int:
    """Rows of a chunk: as many as CHUNK_BYTES of float32 logits hold, within 64 .. 1024."""
    return max(64, min(1024, CHUNK_BYTES // (4 * V) // 16 * 16))


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class LinearChunks:
    """The three products of a linear layer, a chunk of rows at a time.

    Buffers are allocated once and used again for every chunk: a fresh [c, V] block per chunk would
    cost its page faults each time.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, need: Need
    ):
        self.hidden, self.need, self.rows = hidden, need, rows
        self.all_rows = rows.numel() == hidden.shape[0]
        self.weight_dtype, self.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        self.weight = weight.to(hidden.dtype)
        self.bias = None if bias is None else bias.to(hidden.dtype)
        V, H = weight.shape
        self.chunk = min(chunk_rows(V), max(rows.numel(), 1))
        accumulate = accumulator_dtype(hidden.dtype)
        self.logits_buffer = hidden.new_empty(self.chunk, V)
        self.probs_buffer = hidden.new_empty(self.chunk, V, dtype=accumulate)
        make = torch.empty_like if self.all_rows else torch.zeros_like
        self.dhidden = make(hidden, memory_format=torch.contiguous_format) if need.hidden else None
        self.dweight = hidden.new_zeros(V, H, dtype=accumulate) if need.weight else None
        self.dbias = hidden.new_zeros(V, dtype=accumulate) if need.bias else None
        self.product = None

    def chunks(self):
        for start in range(0, self.rows.numel(), self.chunk):
            yield slice(start, min(start + self.chunk, self.rows.numel()))

    def inputs(self, at: slice) -> Tensor:
        return self.hidden[at] if self.all_rows else self.hidden[self.rows[at]]

    def logits(self, x: Tensor) -> Tensor:
        out = self.logits_buffer[: x.shape[0]]
        if self.bias is None:
            return torch.mm(x, self.weight.t(), out=out)
        return torch.addmm(self.bias, x, self.weight.t(), out=out)

    def softmax(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(probabilities, log-sum-exp), accumulator dtype."""
        probs = torch.softmax(
            logits, 1, dtype=self.probs_buffer.dtype, out=self.probs_buffer[: logits.shape[0]]
        )
        # The largest probability is at least 1 / V, so its logarithm is always safe to take.
        largest, at = logits.max(1)
        lse = largest.to(probs.dtype) - probs.gather(1, at[:, None])[:, 0].log()
        return probs, lse

    def backward(self, at: slice, x: Tensor, dlogits: Tensor, coef: Tensor | None) -> None:
        """Adds the gradients of rows `at`, whose dloss/dlogits is `coef[:, None] * dlogits`."""
        if self.need.bias:
            if coef is None:
                self.dbias += dlogits.sum(0)
            else:
                self.dbias.addmv_(dlogits.t(), coef)
        if dlogits.dtype != x.dtype:
            dlogits = self.logits_buffer[: x.shape[0]].copy_(dlogits)
        if self.need.hidden:
            rows = at if self.all_rows else self.rows[at]
            dx = torch.mm(dlogits, self.weight)
            self.dhidden[rows] = dx if coef is None else dx * coef[:, None].to(dx.dtype)
        if self.need.weight:
            if coef is not None:
                x = x * coef[:, None].to(x.dtype)
            if self.dweight.dtype == x.dtype:
                self.dweight.addmm_(dlogits.t(), x)
            else:
                if self.product is None:
                    self.product = torch.empty_like(self.dweight, dtype=x.dtype)
                self.dweight += torch.mm(dlogits.t(), x, out=self.product)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """(dhidden, dweight, dbias) in the dtypes of the inputs; empty where not wanted."""
        nothing = self.hidden.new_empty
        return (
            nothing(0) if self.dhidden is None else self.dhidden,
            nothing(0) if self.dweight is None else self.dweight.to(self.weight_dtype),
            nothing(0) if self.dbias is None else self.dbias.to(self.bias_dtype),
        )


def cross_entropy(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N]
    ignore_index: int,
    label_smoothing: float,
    dloss: Tensor | None,  # [] or [N], upstream gradient of the losses; None: losses only
    dlse: Tensor | None,  # [N], upstream gradient of the rows' log-sum-exps
    need: Need,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [N], lse [N], dhidden, dweight, dbias); the last three empty unless needed."""
    rows = (labels != ignore_index).nonzero()[:, 0]
    linear = LinearChunks(hidden, weight, bias, rows, need)
    N, V, s = hidden.shape[0], weight.shape[0], label_smoothing
    loss = hidden.new_zeros(N, dtype=linear.probs_buffer.dtype)
    lse = torch.zeros_like(loss)
    for at in linear.chunks():
        picked = rows[at]
        target = labels[picked].long()[:, None]
        x = linear.inputs(at)
        z = linear.logits(x)
        z_target = z.gather(1, target)[:, 0].to(loss.dtype)
        z_mean = z.mean(1, dtype=loss.dtype) if s else 0.0
        if need:
            dz, row_lse = linear.softmax(z)
        else:
            row_lse = torch.logsumexp(z if z.dtype == loss.dtype else z.to(loss.dtype), 1)
        lse[picked] = row_lse
        loss[picked] = row_lse - (1 - s) * z_target - s * z_mean
        if not need:
            continue
        coef = dloss.expand(N)[picked]
        if dlse is None:
            dz.scatter_add_(1, target, dz.new_full((), s - 1).expand_as(target))
            if s:
                dz -= s / V
        else:
            # Two upstream gradients weigh the terms differently: scale here, not in the products.
            dz *= (coef + dlse[picked])[:, None]
            dz.scatter_add_(1, target, coef[:, None] * (s - 1))
            if s:
                dz -= coef[:, None] * (s / V)
            coef = None
        linear.backward(at, x, dz, coef)
    return loss, lse, *linear.gradients()


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
    rows = mask.nonzero()[:, 0]
    student = LinearChunks(hidden, weight, bias, rows, need)
    teacher = LinearChunks(teacher_hidden, teacher_weight, teacher_bias, rows, Need())
    loss = hidden.new_zeros(hidden.shape[0], dtype=student.probs_buffer.dtype)
    for at in student.chunks():
        picked = rows[at]
        x = student.inputs(at)
        z = student.logits(x)
        y = teacher.logits(teacher.inputs(at))
        if temperature != 1:
            z /= temperature
            y /= temperature
        p, lse = student.softmax(z)
        q, teacher_lse = teacher.softmax(y)
        # sum_v q_v (y_v - z_v) - teacher_lse + lse
        gap = (y.to(q.dtype) - z).mul_(q).sum(1)
        loss[picked] = temperature**2 * (gap - teacher_lse + lse)
        if need:
            student.backward(at, x, p.sub_(q), dloss.expand(loss.shape)[picked] * temperature)
    return loss, *student.gradients()


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
    mass = target_probs.sum(1)
    rows = (mass > 0).nonzero()[:, 0]
    linear = LinearChunks(hidden, weight, bias, rows, need)
    loss = hidden.new_zeros(hidden.shape[0], dtype=linear.probs_buffer.dtype)
    for at in linear.chunks():
        picked = rows[at]
        q = target_probs[picked].to(loss.dtype)
        ids = target_ids[picked].long().where(q > 0, 0)
        x = linear.inputs(at)
        z = linear.logits(x)
        if temperature != 1:
            z /= temperature
        p, lse = linear.softmax(z)
        gap = torch.special.xlogy(q, q) - q * z.gather(1, ids).to(loss.dtype)
        total = q.sum(1)
        loss[picked] = temperature**2 * (gap.sum(1) + total * lse)
        if need:
            dz = p.mul_(total[:, None]).scatter_add_(1, ids, -q)
            linear.backward(at, x, dz, dloss.expand(loss.shape)[picked] * temperature)
    return loss, *linear.gradients()
