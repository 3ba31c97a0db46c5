"""How much work a step is, and how much of it a device could do: FLOPs, peaks, MFU.

Model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): the floating-point
operations that the mathematics of a step asks for, per second, over the device's peak. A matrix
product [m, k] x [k, n] is 2 m k n. Counted are matrix products alone; recomputation is not. The
gradients of a product are two more products of its size, so a trained product counts 3 times.

    encoder, a piece    L (2 (4 H^2 + 2 H I) + 4 T H)
    head, a masked piece    2 H^2 + 2 H V
    projecting a table    2 V E H
"""

from __future__ import annotations

import functools
import time

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
    """Of one piece of a row of T, forward."""
    H, I = shape.hidden_size, shape.intermediate_size
    return shape.num_hidden_layers * (2.0 * (4 * H * H + 2 * H * I) + 4.0 * T * H)


def head_flops(shape: ModelConfig, V: float) -> float:
    """Of one masked piece, transform and softmax over V pieces, forward."""
    H = shape.hidden_size
    return 2.0 * H * H + 2.0 * H * V


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype, threads: int) -> tuple[float, str]:
    """FLOP/s that the device can do, and how that is known: its data sheet, or a measurement.

    Args:
        dtype: of the matrix products.
        threads: of the CPU; not used but for remembering the answer.
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
