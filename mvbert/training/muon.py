"""Muon: each matrix moves along the orthogonal factor of its momentum.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks",
kellerjordan.github.io/posts/muon; scaled as in Liu et al. 2025, "Muon is Scalable for LLM
Training", arXiv 2502.16982, so that AdamW's learning rates and weight decay carry over.

torch.optim.Muon takes one matrix a parameter and a rate on the host, cannot skip an update on the
device, and multiplies matrix by matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

MOMENTUM = 0.95
ROUNDING = 1.02  # by which bfloat16 products may understate the norm of X X^T

# Odd polynomials a x + b x^3 + c x^5, applied one after another: at each step the one that brings
# the singular values nearest to 1 in the worst case, if those at the start lie in [0.003, 1]
# (Amsel et al. 2025, "The Polar Express", arXiv 2505.16932, algorithm 1). All end within
# [0.80, 1.20]. tests/training/test_muon.py derives them.
POLYNOMIALS = (
    (8.38367, -24.76591, 18.35708),
    (4.04342, -3.01140, 0.56951),
    (3.50557, -2.62665, 0.52572),
    (2.49012, -1.83428, 0.43683),
)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised.

    All matrices of one shape are orthogonalised in one batched product. Learning rate and the flag
    that leaves an update out are on the device, so that a step can be captured as a CUDA graph.

    Args:
        parameters: each with the number of matrices of equal height stacked in it.
        lr: rate, a tensor on the parameters' device; `lr_ratio` times that is used.
        dtype: of the matrix products.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[Tensor, int]],
        lr: Tensor,
        lr_ratio: float,
        weight_decay: float,
        dtype: torch.dtype,
    ) -> None:
        shapes: dict[tuple[int, int], list[Tensor]] = {}
        for parameter, count in parameters:
            rows, columns = parameter.shape
            shapes.setdefault((rows // count, columns), []).append(parameter)
        groups = [{"params": of_shape, "shape": shape} for shape, of_shape in shapes.items()]
        super().__init__(groups, {"lr": lr, "lr_ratio": lr_ratio, "weight_decay": weight_decay})
        self.dtype = dtype
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates parameters that have a gradient; none changes if the flag `found_inf` is 1."""
        skipped = getattr(self, "found_inf", torch.zeros(())) != 0
        for group in self.param_groups:
            rows, columns = group["shape"]
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            old = [self.state[p]["momentum"] for p in parameters]
            gradient, momentum = (
                torch.cat([t.view(-1, rows, columns) for t in tensors])
                for tensors in ([p.grad for p in parameters], old)
            )
            momentum = momentum.lerp(gradient, 1 - MOMENTUM)
            direction = orthogonal_factor(gradient.lerp(momentum, MOMENTUM), self.dtype)
            # The root mean square of a semi-orthogonal matrix is 1 / sqrt(max(rows, columns)), that
            # of AdamW's updates is 0.2 to 0.4.
            rate = group["lr"] * group["lr_ratio"]
            update = direction * (rate * 0.2 * math.sqrt(max(rows, columns)))
            decay = 1 - rate * group["weight_decay"]
            counts = [p.shape[0] // rows for p in parameters]
            for p, slot, moved, step in zip(
                parameters, old, momentum.split(counts), update.split(counts), strict=True
            ):
                slot.copy_(slot.where(skipped, moved.view_as(p)))
                p.copy_(p.where(skipped, p * decay - step.view_as(p)))


def orthogonal_factor(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[N, rows, columns] -> U V^T of each singular value decomposition U S V^T, roughly.

    Newton-Schulz iteration: singular values go to 1, but for those below 0.003 of the largest,
    which stay smaller; see POLYNOMIALS. A matrix of zeros stays one.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    # Once to keep the products in range, and once by the norm of X X^T, whose root is nearer to the
    # largest singular value than the norm of X is.
    x = (x / _norm(x, x.dtype)).to(dtype)
    for number, (a, b, c) in enumerate(POLYNOMIALS):
        gram = x @ x.mT
        if not number:
            size = ROUNDING * _norm(gram, matrices.dtype)
            x, gram = x * size.rsqrt().to(dtype), gram / size.to(dtype)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def _norm(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Frobenius norms [N, 1, 1], above 0."""
    return torch.linalg.matrix_norm(matrices, keepdim=True, dtype=dtype).clamp_min(1e-30)
