"""The fused parts in plain PyTorch: the path for CPU tensors.

The losses go over chunks of rows:

    z = hidden @ weight.T + bias,   loss = f(z),   dz = df/dz

for a few hundred rows at a time, so that the logits of a chunk are all that is ever held. Rows
without a loss are left out before the first product. Where the upstream gradient of every row is
known beforehand (sum, mean) the gradients are made in the same pass, from the probabilities that
are still there: three matrix products in all, nothing recomputed.

What makes it fast on a CPU, each measured on two Zen 5 cores:

  * Products run over 2,048 columns of the vocabulary at a time, into rows of whole cache lines:
    200 GFLOP/s in float32 where one product over 30,522 columns makes 150.
  * A chunk's logits become dlogits in place, a few rows at a time in a float32 block that stays in
    cache: bias, softmax, loss, the sum over rows and the rounding cost half a nanosecond an entry.
  * dweight is added up in float32 slice by slice, while the slice is in cache; if all rows fit in
    one chunk it is written once, in its final dtype.

The dtype of `hidden` is the dtype of the products. The softmax and the sums over chunks are float32
(float64 for float64 input), whatever that dtype is. The losses are not differentiable: each op's
own file ties them into autograd. The embedding gathers rows by an operator with a backward of its
own, at the end of this file, and leaves the rest to torch.
"""

import math
from collections.abc import Iterator

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from mvbert.kernels.common import (
    LossOptions,
    Need,
    accumulator_dtype,
    gradients_like,
    pitch,
    split_heads,
)
from mvbert.kernels.mixed_embedding import EmbeddingInputs

# Logits of one chunk in bytes. Large enough for the products to run at full speed (hundreds of
# rows) and for the sum over chunks into dweight to stay a small part, small beside any model.
CHUNK_BYTES = 32 << 20
# Rows of logits in float32 that are worked on at once: two such blocks stay in a core's cache.
BLOCK_BYTES = 2 << 20
# Columns of the vocabulary in one product.
COLUMNS = 2048
# Relations at a time: few on a CPU, so that they stay near the processor, many on a GPU.
RELATIONS = {"cpu": 1 << 18, "cuda": 1 << 26}
# Tables from here on are not taken from the heap, where freed memory waits for the next of a size.
LARGE_BYTES = 8 << 20


def chunk_rows(V: int, itemsize: int) -> int:
    """Rows of a chunk: as many as CHUNK_BYTES hold, within 64 .. 1024, where products are fast."""
    return max(64, min(1024, CHUNK_BYTES // (itemsize * pitch(V)) // 16 * 16))


def zeros(like: Tensor, *shape: int) -> Tensor:
    """Zeros of the dtype and on the device of `like`.

    Large ones on a CPU come from NumPy, which asks Linux for pages of 2 MB that are zero when they
    come: torch.zeros takes pages of 4 KB, and writes what is zero already.
    """
    size = math.prod(shape) * like.element_size()
    real = type(like) is Tensor and not torch.compiler.is_compiling()
    if like.is_cuda or size < LARGE_BYTES or not real:
        return like.new_zeros(shape)
    return torch.from_numpy(numpy.zeros(size, numpy.uint8)).view(like.dtype).view(shape)


class LinearChunks:
    """A linear layer and its two backward products, a chunk of rows at a time.

    Buffers are allocated once and used again for every chunk: a fresh [c, V] block per chunk would
    cost its page faults each time.
    """

    def __init__(
        self,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        rows: Tensor,  # the rows of `hidden` that count
        need: Need,
        scale: float = 1.0,  # what all gradients are multiplied by
        chunk: int | None = None,  # rows of a chunk; None: chosen here
    ):
        self.inputs = hidden, weight, bias
        self.hidden, self.need, self.rows, self.scale = hidden, need, rows, scale
        N = rows.numel()
        self.all_rows = hidden.shape[0] == N
        self.weight = weight.to(hidden.dtype)
        acc = accumulator_dtype(hidden.dtype)
        self.bias = None if bias is None else bias.to(acc)
        V, H = weight.shape
        self.V = V
        override, chunk = chunk, min(chunk_rows(V, hidden.element_size()), max(N, 1))
        # Summing over chunks in a wider dtype than the result's takes 4 V H bytes, and what is
        # held at the end 6: fewer bytes than the logits of all rows only from here on.
        wider = need.weight and weight.dtype != acc
        if wider and chunk + 2 * H >= N:
            chunk = max(N, 1)
        count = -(-N // chunk)
        # Chunks of one size; no small last one.
        self.chunk = override or (chunk if count <= 1 else min(chunk, -(-N // count // 16) * 16))
        self.buffer = hidden.new_empty(self.chunk, pitch(V))
        # bfloat16 products on AMX read past the end of a row, times zero: no NaN may be there.
        self.buffer[:, V:].zero_()
        block = max(1, min(self.chunk, BLOCK_BYTES // (4 * V)))
        self.blocks = hidden.new_empty(2, block, V, dtype=acc)
        make = torch.empty_like if self.all_rows else torch.zeros_like
        self.dhidden = make(hidden, memory_format=torch.contiguous_format) if need.hidden else None
        self.dweight = self.dbias = None
        if need.weight:
            dtype = weight.dtype if wider and count <= 1 else acc
            self.dweight = (hidden.new_empty if N else hidden.new_zeros)(V, H, dtype=dtype)
        if need.bias:
            self.dbias = hidden.new_zeros(V, dtype=acc)

    def chunks(self) -> Iterator[slice]:
        for start in range(0, self.rows.numel(), self.chunk):
            yield slice(start, min(start + self.chunk, self.rows.numel()))

    def columns(self) -> Iterator[slice]:
        for start in range(0, self.V, COLUMNS):
            yield slice(start, min(start + COLUMNS, self.V))

    def logits(self, at: slice) -> tuple[Tensor, Tensor]:
        """(inputs [c, H], logits [c, V] without the bias) of the chunk."""
        x = self.hidden[at] if self.all_rows else self.hidden[self.rows[at]]
        z = self.buffer[: x.shape[0]]
        for v in self.columns():
            torch.mm(x, self.weight[v].t(), out=z[:, v])
        return x, z[:, : self.V]

    def parts(self, z: Tensor) -> Iterator[slice]:
        """The chunk's rows, as many at a time as stay in cache."""
        step = self.blocks.shape[1]
        for start in range(0, z.shape[0], step):
            yield slice(start, min(start + step, z.shape[0]))

    def wide(self, z: Tensor, temperature: float = 1.0) -> Tensor:
        """Rows of (logits + bias) over the temperature, in the first block."""
        wide = self.blocks[0, : z.shape[0]]
        if self.bias is not None and z.dtype == wide.dtype:
            torch.add(z, self.bias, out=wide)
        else:
            wide.copy_(z)
            if self.bias is not None:
                wide += self.bias
        if temperature != 1:
            wide /= temperature
        return wide

    def softmax(self, wide: Tensor) -> Tensor:
        """In the second block."""
        return torch.softmax(wide, 1, out=self.blocks[1, : wide.shape[0]])

    def keep(self, z: Tensor, dz: Tensor) -> None:
        """Puts dlogits in the place of the logits, rounded, and adds them to dbias, unrounded."""
        if self.need.bias:
            self.dbias += dz.sum(0)
        z.copy_(dz)

    def backward(self, at: slice, x: Tensor, dz: Tensor) -> None:
        """Adds the gradients of the chunk, whose dlogits are `dz`."""
        if self.need.hidden:
            if self.all_rows:
                torch.mm(dz, self.weight, out=self.dhidden[at]).mul_(self.scale)
            else:
                self.dhidden[self.rows[at]] = torch.mm(dz, self.weight).mul_(self.scale)
        if self.need.weight:
            for v in self.columns():
                self._add(self.dweight[v], dz[:, v].t(), x, first=at.start == 0)

    def _add(self, total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
        """total (+)= scale * a @ b"""
        if total.dtype != a.dtype:
            product = torch.mm(a, b)
            if first:
                torch.mul(product, self.scale, out=total)
            else:
                total.add_(product, alpha=self.scale)
        elif first:
            torch.mm(a, b, out=total)
            if self.scale != 1:
                total *= self.scale
        else:
            total.addmm_(a, b, alpha=self.scale)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """(dhidden, dweight, dbias) in the dtypes of the inputs; empty where not wanted."""
        self.buffer = self.blocks = None  # not needed while a gradient is converted
        dbias = None if self.dbias is None else self.dbias.mul_(self.scale)
        return gradients_like(*self.inputs, self.dhidden, self.dweight, dbias)


# ---- losses ------------------------------------------------------------------------------------


def upstream(dloss: Tensor | None) -> tuple[float, Tensor | None]:
    """(the factor of all rows, or of each row) from an upstream gradient [] or [N]."""
    if dloss is None or dloss.ndim == 1:
        return 1.0, dloss
    return float(dloss), None


def cross_entropy(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N]
    options: LossOptions,
    dloss: Tensor | None,  # [] or [N], upstream gradient of the losses; None: losses only
    dlse: Tensor | None,  # [N], upstream gradient of the rows' log-sum-exps
    need: Need,
    mostly_labelled: bool = False,  # of no use here: ignored rows are left out anyway
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [N], lse [N], predicted [N], dhidden, dweight, dbias), empty unless needed."""
    ignore_index, s, class_weight, cap, z_loss, predict = options
    rows = (labels != ignore_index).nonzero()[:, 0]
    scale, dloss = upstream(dloss)
    linear = LinearChunks(hidden, weight, bias, rows, need, scale)
    N, V = hidden.shape[0], weight.shape[0]
    loss = hidden.new_zeros(N, dtype=linear.blocks.dtype)
    lse = torch.zeros_like(loss)
    predicted = rows.new_full((N if predict else 0,), -1)
    if class_weight is not None:
        # What label smoothing gives each piece, and all of them together.
        shares = class_weight.to(loss.dtype) * (s / V)
        spread = shares.sum()
    for at in linear.chunks():
        x, z = linear.logits(at)
        for part in linear.parts(z):
            index = rows[at][part]
            target = labels[index].long()[:, None]
            wide = linear.wide(z[part])
            if cap:
                wide.div_(cap).tanh_().mul_(cap)
            p = linear.softmax(wide)
            if predict:
                top, predicted[index] = wide.max(1)
            else:
                top = wide.amax(1)
            # The largest probability is at least 1 / V, so its logarithm is always safe to take.
            rest = -p.amax(1).log()
            lse[index] = top + rest
            gap = top - wide.gather(1, target)[:, 0]
            own = 1 - s
            if class_weight is not None:
                own = own * class_weight[target[:, 0]].to(loss.dtype)
                row = own * (gap + rest)
                if s:
                    row += spread * (top + rest) - torch.mv(wide, shares)
            elif s:
                row = (1 - s) * gap + s * (top - wide.mean(1)) + rest
            else:
                row = gap + rest
            if z_loss is not None:
                row += z_loss * lse[index].square()
            loss[index] = row
            if not need:
                continue
            a = 1.0 if dloss is None else dloss[index]
            # What the probabilities are multiplied by, what the label's is less, and each piece's.
            if class_weight is None:
                mass, even = a, s / V
            else:
                mass, even = a * (own + spread if s else own), shares
            if z_loss is not None:
                mass = mass + 2 * a * z_loss * lse[index]
            if dlse is not None:
                mass = mass + dlse[index]
            if isinstance(mass, Tensor):
                p *= mass[:, None]
            hard = torch.as_tensor(-a * own, dtype=p.dtype).expand(len(index))
            p.scatter_add_(1, target, hard[:, None])
            if s:
                p -= even if dloss is None else a[:, None] * even
            if cap:
                wide.div_(cap).square_()
                p.addcmul_(p, wide, value=-1)
            linear.keep(z[part], p)
        if need:
            linear.backward(at, x, z)
    return loss, lse, predicted, *linear.gradients()


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
    scale, dloss = upstream(dloss)
    student = LinearChunks(hidden, weight, bias, rows, need, scale * temperature)
    teacher = LinearChunks(
        teacher_hidden, teacher_weight, teacher_bias, rows, Need(), chunk=student.chunk
    )
    loss = hidden.new_zeros(hidden.shape[0], dtype=student.blocks.dtype)
    for at in student.chunks():
        x, z = student.logits(at)
        _, y = teacher.logits(at)
        for part in student.parts(z):
            index = rows[at][part]
            wide_z = student.wide(z[part], temperature)
            wide_y = teacher.wide(y[part], temperature)
            p, q = student.softmax(wide_z), teacher.softmax(wide_y)
            # Of log p and log q only differences: what two near models share is never rounded.
            rest = (q.amax(1) / p.amax(1)).log() - (wide_y.amax(1) - wide_z.amax(1))
            gap = wide_y.sub_(wide_z).mul_(q).sum(1)
            loss[index] = temperature**2 * (gap + rest).to(loss.dtype)
            if not need:
                continue
            dz = p.sub_(q)
            if dloss is not None:
                dz *= dloss[index][:, None]
            student.keep(z[part], dz)
        if need:
            student.backward(at, x, z)
    return loss, *student.gradients()


def relation_kl(
    student: Tensor,  # [B, T, 3 H_s]
    teacher: Tensor,  # [B, T, 3 H_t]
    heads: int,
    need: bool,
) -> tuple[Tensor, Tensor]:
    """(sum over rows, positions, heads and the three [], its gradient [B, T, 3 H_s] or empty)."""
    B, T, _ = student.shape
    acc = accumulator_dtype(student.dtype)
    # Vectors of one head after the other, [3 B heads, T, d].
    x, y = (split_heads(z.contiguous(), heads).flatten(0, 2) for z in (student, teacher))
    wide_x, wide_y = x.to(acc), y.to(acc)
    step = max(1, min(len(x), RELATIONS[student.device.type] // max(1, T * T)))
    blocks = wide_x.new_empty(4, step, T, T)
    total, by_head = wide_x.new_zeros(()), torch.empty_like(x)
    for first in range(0, len(x), step):
        part = slice(first, first + step)
        s, r, p, q = blocks[:, : len(x[part])]
        for scores, share, z in ((s, p, wide_x[part]), (r, q, wide_y[part])):
            scale = z.shape[-1] ** -0.5
            if x.dtype == acc:
                torch.bmm(z, z.mT, out=scores).mul_(scale)
            else:  # one pass less, which costs float32 its last digit
                torch.baddbmm(scores, z, z.mT, beta=0, alpha=scale, out=scores)
            torch.softmax(scores, -1, out=share)
        # log q - log p = (r - s) + lse_s - lse_r, and lse = top - log(largest share).
        rest = (q.amax(-1) / p.amax(-1)).log() - (r.amax(-1) - s.amax(-1))
        total += (r.sub_(s).mul_(q).sum(-1) + rest).sum()
        if need:
            # dL/dscores = p - q; a score x_i x_j belongs to both of its vectors.
            d = p.sub_(q).to(x.dtype)
            torch.bmm(d, x[part], out=by_head[part])
            torch.baddbmm(by_head[part], d.mT, x[part], out=by_head[part])
    if not need:
        return total, student.new_empty(0)
    gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
    by_head *= x.shape[-1] ** -0.5
    split_heads(gradient, heads).copy_(by_head.view(3, B, heads, T, x.shape[-1]))
    return total, gradient


# ---- embedding ---------------------------------------------------------------------------------


def mixed_embedding(inputs: EmbeddingInputs, eps: float, padding_id: int) -> Tensor:
    """LayerNorm(table[id] + position[t] + type[s]) -> [B, T, H]; padding_id -1: none."""
    ids, teacher, student, position_table, type_table, token_type_ids, position_ids, *norm = inputs
    B, T = ids.shape
    total = gather_rows(ids, teacher, student, padding_id)
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
    return F.layer_norm(total, total.shape[-1:], *norm, eps)


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
    total = zeros(dout, last + 1, dout.shape[1])
    total.scatter_add_(0, row.reshape(-1, 1).expand_as(dout), dout)
    tables = (g if n else None for g, n in zip(total[:last].split(sizes), need, strict=True))
    return None, *tables, None


gather_rows.register_autograd(_gather_rows_backward, setup_context=_save_gather_rows)
