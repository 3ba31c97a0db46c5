"""FLOPs of models; FLOP/s of devices, their peaks and measured rates of matrix products.

Model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): the floating-point
operations that the mathematics of a step asks for, per second, over the device's peak. A matrix
product [m, k] x [k, n] is 2 m k n. Counted are matrix products alone; recomputation is not. The
gradients of a product are two more products of its size, so a trained product counts 3 times.

    encoder, per piece       L (2 (4 H^2 + 2 H I) + 4 T H)
    head, per masked piece   2 H^2 + 2 H V
    projecting a table       2 V E H
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

import torch

from mvbert.config import ModelConfig

# Dense bfloat16 with float32 sums, FLOP/s, from the vendors' data sheets. The first name that the
# device's name contains counts.
PEAKS = {
    "B200": 2250e12,
    "GH200": 989.4e12,
    "H200": 989.4e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
}


def encoder_flops(shape: ModelConfig, T: int) -> float:
    """Forward FLOPs of the encoder per piece, in a row of T."""
    H, I = shape.hidden_size, shape.intermediate_size
    return shape.num_hidden_layers * (2.0 * (4 * H * H + 2 * H * I) + 4.0 * T * H)


def head_flops(shape: ModelConfig, V: float) -> float:
    """Forward FLOPs of the head per masked piece: transform and softmax over V pieces."""
    H = shape.hidden_size
    return 2.0 * H * H + 2.0 * H * V


Product = tuple[int, int, int]  # m, k, n of a matrix product [m, k] x [k, n]


def encoder_products(shape: ModelConfig, pieces: int) -> list[Product]:
    """The matrix products of one layer for `pieces` pieces, forward."""
    H, I = shape.hidden_size, shape.intermediate_size
    return [(pieces, H, 3 * H), (pieces, H, H), (pieces, H, I), (pieces, I, H)]


MEASURED_FLOPS = 2e8  # about what one measured product has: more rows do not change its rate
FEWEST_ROWS = 64
ROUNDS = 3
# A dtype that has taken this many times as long as the other, and this long, has lost.
LOST_RATIO, LOST_SECONDS = 4.0, 0.25


def product_rates(
    products: Sequence[Product],
    gradients: bool,
    seconds: float = 0.2,
    clock: Callable[[], float] = time.thread_time,
) -> dict[torch.dtype, float]:
    """FLOP/s of these matrix products on one core of the CPU, in float32 and in bfloat16.

    The dtypes take turns, the best time of each product counts, and time is that of this thread, so
    that a busy neighbour does not decide between them: on several threads, each waits for all.
    Gradients are measured separately because a library may have fast code for one order of the
    operands only.

    Args:
        gradients: measure the two products of the backward pass too.
        seconds: after which no further round is made, once there were `ROUNDS`.
        clock: seconds.
    """
    dtypes = (torch.float32, torch.bfloat16)
    works: list[tuple[float, dict[torch.dtype, Callable[[], object]]]] = []
    for m, k, n in sorted({*products}, key=lambda product: product[1] * product[2]):
        m = min(m, max(FEWEST_ROWS, int(MEASURED_FLOPS / (2 * k * n))))
        calls = {dtype: _product_calls(m, k, n, dtype, gradients) for dtype in dtypes}
        for pair in zip(*calls.values(), strict=True):
            works.append((2.0 * m * k * n, dict(zip(dtypes, pair, strict=True))))

    def time_call(call: Callable[[], object]) -> float:
        start = clock()
        call()
        return clock() - start

    best: dict[torch.dtype, list[float]] = {dtype: [] for dtype in dtypes}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    end = clock() + seconds
    for _, work in works:
        for dtype in dtypes:
            # The first call also prepares code and memory.
            best[dtype].append(min(time_call(work[dtype]), time_call(work[dtype])))
        quick, slow = sorted(sum(best[dtype]) for dtype in dtypes)
        if slow > max(LOST_RATIO * quick, LOST_SECONDS):
            break
    else:
        rounds = 1
        while rounds < ROUNDS or clock() < end:
            for i, (_, work) in enumerate(works):
                for dtype in dtypes:
                    best[dtype][i] = min(best[dtype][i], time_call(work[dtype]))
            rounds += 1
    torch.set_num_threads(threads)
    flops = sum(flops for flops, _ in works[: len(best[torch.float32])])
    return {dtype: flops / sum(best[dtype]) for dtype in dtypes}


def _product_calls(
    m: int, k: int, n: int, dtype: torch.dtype, gradients: bool
) -> list[Callable[[], object]]:
    """y = x w^T and, with gradients, dx = dy w and dw = dy^T x, each into separate memory."""
    x, w = torch.ones(m, k, dtype=dtype), torch.ones(n, k, dtype=dtype)
    y, dx, dw = torch.ones(m, n, dtype=dtype), torch.empty_like(x), torch.empty_like(w)
    forward = functools.partial(torch.mm, x, w.t(), out=torch.empty_like(y))
    if not gradients:
        return [forward]
    return [
        forward,
        functools.partial(torch.mm, y, w, out=dx),
        functools.partial(torch.mm, y.t(), x, out=dw),
    ]


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype, threads: int) -> tuple[float, str]:
    """Peak FLOP/s of the device, and the source of the figure: data sheet or measurement.

    Args:
        dtype: dtype of the matrix products.
        threads: CPU threads, only a cache key.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, peak in PEAKS.items():
            if known in name:
                return peak, f"data sheet of {name}"
    return _measured(device, dtype), f"measured, {MEASURED_SIZE} x {MEASURED_SIZE} matrix product"


MEASURED_SIZE = 1024


def _measured(device: torch.device, dtype: torch.dtype, seconds: float = 0.1) -> float:
    """The best rate of a square matrix product, over a tenth of a second."""
    a = torch.ones(MEASURED_SIZE, MEASURED_SIZE, dtype=dtype, device=device)
    out = torch.empty_like(a)
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    best = float("inf")
    end = time.perf_counter() + seconds
    while True:
        wait()
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        wait()
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return 2.0 * MEASURED_SIZE**3 / best
