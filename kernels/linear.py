"""A linear layer over the first `count` rows of a list, `count` staying on the device.

    logits = x @ weight.T + bias        [c, V], pitched, with the softmax's sums of every tile
    dx     = dlogits @ weight           [c, H]
    dweight (+)= dlogits.T @ x          [V, H]

Rows that carry a loss are gathered to the front once (`gather_rows`), their number is read by the
kernels themselves: tiles beyond it return at once, loops over rows end at it. Nothing waits for the
host, every shape is static, and a row without a loss costs nothing but its place in the buffer.

Letters in the products: M, N, K are rows, columns and depth of a tile's matrix product.
"""

import torch
from torch import Tensor

from mvbert.kernels import launch
from mvbert.kernels.common import Need, accumulator_dtype, gradients_like, pitch, tl, triton

# ---- kernels -----------------------------------------------------------------------------------


@triton.jit
def exp(x):
    """exp(x), 0 below the normal numbers: `tl.exp` spends three instructions more on those."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def tanh(x, ACC: tl.constexpr):
    """tanh(x) from exp; in float32 near 0, where that loses digits, from the series."""
    e = exp(-2.0 * tl.abs(x))
    ratio = (1.0 - e) / (1.0 + e)
    ratio = tl.where(x < 0, -ratio, ratio)
    if ACC == tl.float64:  # noqa: SIM300
        return ratio
    else:
        s = tl.minimum(x * x, 1.0)
        series = x + x * s * (
            -1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0)))
        )
        return tl.where(s < 0.0625, series, ratio)


@triton.jit
def list_rows_kernel(
    labels_ptr,  # [N]
    rows_ptr,  # [N], int32, written up to count
    count_ptr,  # [1], int32, written
    N,
    IGNORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the rows whose label is not IGNORE, in order, and their number."""
    count = 0
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        flag = (tl.load(labels_ptr + n, mask=n < N, other=IGNORE) != IGNORE).to(tl.int32)
        place = count + tl.cumsum(flag) - flag
        tl.store(rows_ptr + place, n, mask=flag != 0)
        count += tl.sum(flag)
    tl.store(count_ptr, count)


@triton.jit
def gather_rows_kernel(
    x_ptr,  # [N, H]
    rows_ptr,  # [N], int32
    count_ptr,  # [1], int32
    out_ptr,  # [N, H], written up to count, and zeros beyond it when FILL
    N,
    H,
    stride_n,
    FILL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    count = tl.load(count_ptr)
    if (not FILL) & (tl.program_id(0) * BLOCK_N >= count):
        return
    rows = tl.load(rows_ptr + n, mask=n < count, other=0).to(tl.int64)
    mask = (n < count)[:, None] & (h < H)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_n + h[None, :], mask=mask, other=0.0)
    if FILL:
        mask = (n < N)[:, None] & (h < H)[None, :]
    tl.store(out_ptr + n.to(tl.int64)[:, None] * H + h[None, :], x, mask=mask)


@triton.jit
def tile_of(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile (m, n) of a program: GROUP rows of tiles share their columns while those are in L2."""
    in_group = GROUP * tiles_n
    first = (pid // in_group) * GROUP
    height = min(tiles_m - first, GROUP)
    return first + (pid % in_group) % height, (pid % in_group) // height


@triton.jit
def logits_kernel(
    x_ptr,  # [N, H], gathered
    weight_ptr,  # [V, H]
    bias_ptr,  # [V]
    labels_ptr,  # [N]
    rows_ptr,  # [N], int32
    count_ptr,  # [1], int32
    logits_ptr,  # [c, pitch], written when STORE, -inf in the columns from V on
    tile_max_ptr,  # [c, tiles of V], written
    tile_sum_ptr,  # [c, tiles of V], written
    tile_best_ptr,  # [c, tiles of V], int32, written when PREDICT
    target_ptr,  # [N], written when PICK
    start,
    c,
    V,
    H,
    stride_v,
    stride_z,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    PICK: tl.constexpr,
    PREDICT: tl.constexpr,
    STORE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Rows [start, start + c) of logits, and max and sum of exp of every row of every tile.

    Nothing overlaps with what follows the products, so each instruction an element counts.
    """
    tiles_m = tl.cdiv(c, BLOCK_M)
    tiles_n = tl.cdiv(V, BLOCK_N)
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP)
    count = min(tl.load(count_ptr) - start, c)
    if tile_m * BLOCK_M >= count:
        return
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    v = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows and columns outside repeat the last one: no mask on them, the results are never stored.
    x_at = x_ptr + (start + tl.minimum(m, count - 1)).to(tl.int64)[:, None] * H + k[None, :]
    w_at = weight_ptr + tl.minimum(v, V - 1).to(tl.int64)[None, :] * stride_v + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for h in range(0, H, BLOCK_K):
        x = tl.load(x_at, mask=(h + k < H)[None, :], other=0.0)
        w = tl.load(w_at, mask=(h + k < H)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=ACC)
        x_at += BLOCK_K
        w_at += BLOCK_K
    # Columns from V on are struck out by what is added to them, or after the softcap.
    shift = tl.where(v < V, tl.zeros((BLOCK_N,), ACC), 0.0 if SOFTCAP > 0 else -float("inf"))
    if HAS_BIAS:
        shift += tl.load(bias_ptr + v, mask=v < V, other=0.0).to(ACC) * inv_temperature
    # The sums are of the logits as they are stored, so that probabilities made from them add to 1.
    acc = acc * inv_temperature + shift[None, :]
    if SOFTCAP > 0:
        acc = SOFTCAP * tanh(acc / SOFTCAP, ACC)
        acc = tl.where((v < V)[None, :], acc, -float("inf"))
    z = acc.to(logits_ptr.dtype.element_ty)
    acc = z.to(ACC)
    at = m.to(tl.int64) * tiles_n + tile_n
    if PREDICT:
        row_max, best = tl.max(acc, 1, return_indices=True)
        tl.store(tile_best_ptr + at, tile_n * BLOCK_N + best, mask=m < count)
    else:
        row_max = tl.max(acc, 1)
    row_sum = tl.sum(exp(acc - row_max[:, None]), 1)
    tl.store(tile_max_ptr + at, row_max, mask=m < count)
    tl.store(tile_sum_ptr + at, row_sum, mask=m < count)
    if PICK:
        rows = tl.load(rows_ptr + start + m, mask=m < count, other=0)
        label = tl.load(labels_ptr + rows, mask=m < count, other=-1)
        hit = label[:, None] == v[None, :]
        z_target = tl.sum(tl.where(hit, acc, 0.0), 1)
        in_tile = (label >= tile_n * BLOCK_N) & (label < min(tile_n * BLOCK_N + BLOCK_N, V))
        tl.store(target_ptr + rows, z_target, mask=(m < count) & in_tile)
    if STORE:
        z_at = logits_ptr + m.to(tl.int64)[:, None] * stride_z + v[None, :]
        tl.store(z_at, z, mask=(m < count)[:, None] & (v < stride_z)[None, :])


@triton.jit
def lse_kernel(
    tile_max_ptr,  # [c, tiles]
    tile_sum_ptr,  # [c, tiles]
    tile_best_ptr,  # [c, tiles], when PREDICT
    rows_ptr,  # [N], int32
    count_ptr,  # [1], int32
    logits_ptr,  # [c, pitch], when PICK
    labels_ptr,  # [N], when PICK
    lse_ptr,  # [N], written at rows; when SPLIT: lse - largest logit
    top_ptr,  # [N], written at rows when SPLIT: the largest logit
    target_ptr,  # [N], written at rows when PICK: the label's logit
    predicted_ptr,  # [N], written at rows when PREDICT
    start,
    c,
    tiles,
    V,
    stride_z,
    SPLIT: tl.constexpr,
    PICK: tl.constexpr,
    PREDICT: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    if m >= min(tl.load(count_ptr) - start, c):
        return
    t = tl.arange(0, BLOCK_T)
    tile_max = tl.load(tile_max_ptr + m * tiles + t, mask=t < tiles, other=-float("inf"))
    tile_sum = tl.load(tile_sum_ptr + m * tiles + t, mask=t < tiles, other=0.0)
    row_max = tl.max(tile_max, 0)
    row_sum = tl.sum(tile_sum * exp(tile_max - row_max), 0)
    row = tl.load(rows_ptr + start + m)
    if PICK:
        label = tl.load(labels_ptr + row)
        z_at = logits_ptr + m * stride_z + label
        z_target = tl.load(z_at, mask=(label >= 0) & (label < V), other=0.0)
        tl.store(target_ptr + row, z_target.to(target_ptr.dtype.element_ty))
    if PREDICT:
        # Of equal logits the one with the lowest id.
        best = tl.load(tile_best_ptr + m * tiles + t, mask=t < tiles, other=0)
        best = tl.min(tl.where(tile_max == row_max, best, 2147483647), 0)
        tl.store(predicted_ptr + row, best.to(tl.int64))
    if SPLIT:
        tl.store(top_ptr + row, row_max)
        tl.store(lse_ptr + row, tl.log(row_sum))
    else:
        tl.store(lse_ptr + row, row_max + tl.log(row_sum))


@triton.jit
def dx_kernel(
    dlogits_ptr,  # [c, pitch], zero in the columns from V on
    weight_ptr,  # [V, H]
    rows_ptr,  # [N], int32
    count_ptr,  # [1], int32
    scale_ptr,  # [1]
    dx_ptr,  # [N, H], written at rows
    start,
    c,
    V,
    H,
    stride_v,
    stride_z,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(c, BLOCK_M), tl.cdiv(H, BLOCK_N), GROUP)
    count = min(tl.load(count_ptr) - start, c)
    if tile_m * BLOCK_M >= count:
        return
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    h = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    z_at = dlogits_ptr + tl.minimum(m, count - 1).to(tl.int64)[:, None] * stride_z + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for v in range(0, V, BLOCK_K):
        dz = tl.load(z_at + v, mask=(v + k < stride_z)[None, :], other=0.0)
        w_at = weight_ptr + (v + k).to(tl.int64)[:, None] * stride_v + h[None, :]
        w = tl.load(w_at, mask=(v + k < V)[:, None] & (h < H)[None, :], other=0.0)
        acc = tl.dot(dz, w, acc, input_precision=PRECISION, out_dtype=ACC)
    acc *= tl.load(scale_ptr).to(ACC)
    rows = tl.load(rows_ptr + start + m, mask=m < count, other=0).to(tl.int64)
    at = dx_ptr + rows[:, None] * H + h[None, :]
    tl.store(at, acc.to(dx_ptr.dtype.element_ty), mask=(m < count)[:, None] & (h < H)[None, :])


@triton.jit
def dweight_kernel(
    dlogits_ptr,  # [c, pitch]
    x_ptr,  # [N, H], gathered
    count_ptr,  # [1], int32
    scale_ptr,  # [1]
    dweight_ptr,  # [V, H], written, or added to when ADD
    start,
    c,
    V,
    H,
    stride_z,
    ADD: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(V, BLOCK_M), tl.cdiv(H, BLOCK_N), GROUP)
    count = min(tl.load(count_ptr) - start, c)
    if ADD and count <= 0:
        return
    v = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    h = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for n in range(0, count, BLOCK_K):
        z_at = dlogits_ptr + (n + k).to(tl.int64)[:, None] * stride_z + v[None, :]
        dz = tl.load(z_at, mask=(n + k < count)[:, None] & (v < stride_z)[None, :], other=0.0)
        x_at = x_ptr + (start + n + k).to(tl.int64)[:, None] * H + h[None, :]
        x = tl.load(x_at, mask=(n + k < count)[:, None] & (h < H)[None, :], other=0.0)
        acc = tl.dot(tl.trans(dz), x, acc, input_precision=PRECISION, out_dtype=ACC)
    acc *= tl.load(scale_ptr).to(ACC)
    inside = (v < V)[:, None] & (h < H)[None, :]
    at = dweight_ptr + v.to(tl.int64)[:, None] * H + h[None, :]
    if ADD:
        acc += tl.load(at, mask=inside, other=0.0).to(ACC)
    tl.store(at, acc.to(dweight_ptr.dtype.element_ty), mask=inside)


@triton.jit
def spread_rows_kernel(
    dx_ptr,  # [c, H]: dlogits @ weight over the first V_WHOLE columns
    dlogits_ptr,  # [c, pitch]
    weight_ptr,  # [V, H]
    rows_ptr,  # [N], int32
    count_ptr,  # [1], int32
    scale_ptr,  # [1]
    out_ptr,  # [N, H], written at rows
    start,
    c,
    V,
    H,
    stride_v,
    stride_z,
    V_WHOLE,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Adds the last few columns' share of dx, scales, and puts the rows where they belong."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    count = min(tl.load(count_ptr) - start, c)
    if tl.program_id(0) * BLOCK_N >= count:
        return
    inside = n < count
    mask = inside[:, None] & (h < H)[None, :]
    dx = tl.load(dx_ptr + n.to(tl.int64)[:, None] * H + h[None, :], mask=mask, other=0.0).to(ACC)
    for v in range(V_WHOLE, V):
        dz = tl.load(dlogits_ptr + n.to(tl.int64) * stride_z + v, mask=inside, other=0.0).to(ACC)
        w_at = weight_ptr + tl.cast(v, tl.int64) * stride_v + h
        dx += dz[:, None] * tl.load(w_at, mask=h < H, other=0.0).to(ACC)[None, :]
    dx *= tl.load(scale_ptr).to(ACC)
    rows = tl.load(rows_ptr + start + n, mask=inside, other=0).to(tl.int64)
    at = out_ptr + rows[:, None] * H + h[None, :]
    tl.store(at, dx.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def scale_kernel(
    x_ptr,  # [size]
    factor_ptr,  # [1]
    out_ptr,  # [size], written
    size,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(ACC)
    x *= tl.load(factor_ptr).to(ACC)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=at < size)


# ---- launchers ---------------------------------------------------------------------------------


def scale(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor, the factor not rounded to the dtype of x first, as torch's own product would."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        scale_kernel[(triton.cdiv(x.numel(), 4096),)](
            x, factor, out, x.numel(), ACC=launch.accumulator(x), BLOCK=4096, num_warps=8
        )
    return out


def product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """out (+)= a @ b by the library, 16-bit operands, `out` of their dtype or float32."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif not a.is_cuda:  # the interpreter: a CPU has no such product
        wide = torch.mm(a.to(out.dtype), b.to(out.dtype))
        out.add_(wide) if add else out.copy_(wide)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def list_rows(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(rows [N] int32, count [1] int32): the rows that have a label, first in the list."""
    N = labels.shape[0]
    rows = torch.empty(N, dtype=torch.int32, device=labels.device)
    count = torch.empty(1, dtype=torch.int32, device=labels.device)
    block = min(4096, triton.next_power_of_2(max(N, 16)))
    list_rows_kernel[(1,)](labels, rows, count, N, IGNORE=ignore_index, BLOCK=block, num_warps=8)
    return rows, count


def gather_rows(x: Tensor, rows: Tensor, count: Tensor, fill: bool = False) -> Tensor:
    """[N, H] whose first `count` rows are x[rows]; the others are 0 if `fill`, else never read."""
    N, H = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    out = x.new_empty(N, H)
    grid, blocks = row_blocks(N, H)
    gather_rows_kernel[grid](x, rows, count, out, N, H, x.stride(0), FILL=fill, **blocks)
    return out


def row_blocks(N: int, H: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and blocks of a pass over rows [N, H]."""
    block_h = min(1024, triton.next_power_of_2(H))
    blocks = {"BLOCK_N": 8, "BLOCK_H": block_h, "num_warps": 4}
    return (triton.cdiv(N, 8), triton.cdiv(H, block_h)), blocks


class LinearRows:
    """One linear layer over the listed rows: buffers, and the three products chunk by chunk."""

    def __init__(
        self,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        rows: Tensor,  # [N], int32
        count: Tensor,  # [1], int32
        over_all_rows: bool = False,
        softcap: float = 0.0,
        predict: bool = False,
    ):
        """`over_all_rows`: backward's products run over all N rows, through the vendor's library if
        that is the faster one. dlogits must then be scaled, and zero in the rows beyond `count`.

        `softcap`: logits are softcap * tanh(logits / softcap). `predict`: `logits` notes the place
        of each row's largest in `predicted`."""
        self.rows, self.count, self.over_all_rows = rows, count, over_all_rows
        self.x = gather_rows(hidden, rows, count, fill=over_all_rows)
        weight = weight.to(hidden.dtype)
        self.weight = weight if weight.stride(1) == 1 else weight.contiguous()
        self.bias = None if bias is None else bias.contiguous()
        self.N, self.H = hidden.shape
        self.V = weight.shape[0]
        self.chunk = min(launch.CHUNK_ROWS, self.N)
        self.pitch = pitch(self.V)
        self.acc_dtype = accumulator_dtype(hidden.dtype)
        self.shape = (self.N, self.V, self.H)
        self.common = {"ACC": launch.accumulator(hidden), "PRECISION": launch.precision(hidden)}
        self.blocks = launch.product_blocks(
            "logits", self.x, self.shape, self.chunk, self.V, self.H, heavy=True,
            options=softcap > 0 or predict,
        )  # fmt: skip
        self.softcap = softcap
        self.tiles = triton.cdiv(self.V, self.blocks["BLOCK_N"])
        self.tile_max = hidden.new_empty(self.chunk, self.tiles, dtype=self.acc_dtype)
        self.tile_sum = torch.empty_like(self.tile_max)
        self.tile_best = torch.empty_like(self.tile_max, dtype=torch.int32) if predict else None
        self.predicted = self.rows.new_full((self.N if predict else 0,), -1, dtype=torch.int64)
        self.buffer = self.whole_dweight = None

    def starts(self) -> range:
        return range(0, self.N, self.chunk)

    def rows_from(self, start: int) -> int:
        """c, the rows of the chunk that begins there."""
        return min(self.chunk, self.N - start)

    def passes(
        self, c: int, sums: bool, options: bool = False
    ) -> tuple[tuple[int, int], dict[str, int], Tensor]:
        """Grid and blocks of a pass over logits [c, V], and room for the sums of its columns."""
        tile = launch.elementwise_blocks(self.x, self.shape, self.V, options)
        rows = triton.cdiv(c, tile["BLOCK_M"] * tile["STEPS"])
        partial = self.tile_max.new_empty(rows if sums else 0, self.pitch)
        return (rows, triton.cdiv(self.pitch, tile["BLOCK_V"])), tile, partial

    def logits(
        self,
        start: int,
        *,
        lse: Tensor,
        store: bool,
        top: Tensor | None = None,
        labels: Tensor | None = None,
        target: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Fills the buffer with rows [start, start + chunk) and `lse`, `target` at those rows.

        Given `top`, it takes the largest logit of each row and `lse` only what is above that.
        """
        if store and self.buffer is None:
            self.buffer = self.x.new_empty(self.chunk, self.pitch)
        logits = self.buffer if store else self.x
        written = self.tiles * self.blocks["BLOCK_N"]
        if store and written < self.pitch:  # small tiles do not reach the pitch
            logits[:, written:] = -float("inf")
        c = self.rows_from(start)
        grid = (triton.cdiv(c, self.blocks["BLOCK_M"]) * self.tiles,)
        logits_kernel[grid](
            self.x, self.weight, self.x if self.bias is None else self.bias,
            self.rows if labels is None else labels, self.rows, self.count, logits,
            self.tile_max, self.tile_sum, self.rows if self.tile_best is None else self.tile_best,
            self.tile_max if target is None else target, start, c, self.V, self.H,
            self.weight.stride(0), self.pitch, 1.0 / temperature,
            HAS_BIAS=self.bias is not None, PICK=labels is not None and not store,
            PREDICT=self.tile_best is not None, STORE=store, SOFTCAP=self.softcap, **self.common,
            **self.blocks,
        )  # fmt: skip
        lse_kernel[(c,)](
            self.tile_max, self.tile_sum, self.rows if self.tile_best is None else self.tile_best,
            self.rows, self.count, logits, self.rows if labels is None else labels, lse,
            lse if top is None else top, lse if target is None else target, self.predicted,
            start, c, self.tiles, self.V, self.pitch, SPLIT=top is not None,
            PICK=labels is not None and store, PREDICT=self.tile_best is not None,
            BLOCK_T=triton.next_power_of_2(self.tiles), num_warps=1,
        )  # fmt: skip
        return logits

    def dx(self, start: int, dlogits: Tensor, scale: Tensor, out: Tensor) -> None:
        """out[rows] = scale * dlogits @ weight, for the rows of this chunk."""
        c = self.rows_from(start)
        if self.over_all_rows and launch.library("dx", self.x, self.shape):
            # Whole 16-byte columns for the library; the last few are added while spreading rows.
            whole = self.V // 8 * 8
            dx = torch.mm(dlogits[:c, :whole], self.weight[:whole])
            grid, blocks = row_blocks(c, self.H)
            spread_rows_kernel[grid](
                dx, dlogits, self.weight, self.rows, self.count, scale, out, start, c, self.V,
                self.H, self.weight.stride(0), self.pitch, whole, ACC=self.common["ACC"], **blocks,
            )  # fmt: skip
            return
        blocks = launch.product_blocks("dx", self.x, self.shape, c, self.H, self.V)
        grid = (triton.cdiv(c, blocks["BLOCK_M"]) * triton.cdiv(self.H, blocks["BLOCK_N"]),)
        dx_kernel[grid](
            dlogits, self.weight, self.rows, self.count, scale, out, start, c, self.V, self.H,
            self.weight.stride(0), self.pitch, **self.common, **blocks,
        )  # fmt: skip

    def dweight(self, start: int, dlogits: Tensor, scale: Tensor, out: Tensor) -> None:
        """out (+)= scale * dlogits.T @ x, added from the second chunk on."""
        c = self.rows_from(start)
        if self.whole_dweight is not None:
            # All columns of the pitch, whole 16-byte rows for the library; from V on they are zero.
            product(dlogits[:c].t(), self.x[start : start + c], self.whole_dweight, add=start > 0)
            return
        kernel = "dweight_add" if start > 0 else "dweight"
        blocks = launch.product_blocks(
            kernel, self.x, self.shape, self.V, self.H, c, heavy=start > 0
        )
        grid = (triton.cdiv(self.V, blocks["BLOCK_M"]) * triton.cdiv(self.H, blocks["BLOCK_N"]),)
        dweight_kernel[grid](
            dlogits, self.x, self.count, scale, out, start, c, self.V, self.H, self.pitch,
            ADD=start > 0, **self.common, **blocks,
        )  # fmt: skip

    def new_dweight(self, dtype: torch.dtype) -> Tensor:
        """[V, H] to sum dweight in: accumulator dtype, or the final one for a single chunk."""
        if self.chunk < self.N:
            dtype = self.acc_dtype
        if self.over_all_rows and launch.library("dweight", self.x, self.shape):
            self.whole_dweight = self.x.new_empty(self.pitch, self.H, dtype=dtype)
            return self.whole_dweight[: self.V]
        return self.x.new_empty(self.V, self.H, dtype=dtype)


class Gradients:
    """The gradients of a loss, added up over the chunks of its rows."""

    def __init__(
        self,
        linear: LinearRows,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        need: Need,
        scale: Tensor | None,  # [1], multiplies all of them
    ):
        self.linear, self.need, self.scale = linear, need, scale
        self.inputs = hidden, weight, bias
        self.dhidden = hidden.new_zeros(hidden.shape if need.hidden else 0)
        self.dweight = linear.new_dweight(weight.dtype) if need.weight else None
        self.dbias = None

    def add(self, start: int, dlogits: Tensor, partial: Tensor) -> None:
        """`partial` [row blocks, pitch]: sums of the columns of dlogits."""
        if self.need.bias:
            column = partial.sum(0)[: self.linear.V] * self.scale
            self.dbias = column if self.dbias is None else self.dbias + column
        if self.need.hidden:
            self.linear.dx(start, dlogits, self.scale, self.dhidden)
        if self.need.weight:
            self.linear.dweight(start, dlogits, self.scale, self.dweight)

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        return gradients_like(*self.inputs, self.dhidden, self.dweight, self.dbias)


def no_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, need: Need
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, dhidden, dweight, dbias) for N = 0."""
    inputs, flags = (hidden, weight, bias), (need.hidden, need.weight, need.bias)
    zeros = [torch.zeros_like(x) if n else None for x, n in zip(inputs, flags, strict=True)]
    loss = hidden.new_zeros(0, dtype=accumulator_dtype(hidden.dtype))
    return loss, *gradients_like(*inputs, *zeros)


# ---- operator ----------------------------------------------------------------------------------


@torch.library.custom_op("mvbert::scale", mutates_args=())
def scale_exactly(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor, computed in float32, in the dtype of x, in one pass (CUDA)."""
    with torch.cuda.device_of(x):
        return scale(x, factor)


@scale_exactly.register_fake
def _(x, factor):
    return torch.empty_like(x, memory_format=torch.contiguous_format)
