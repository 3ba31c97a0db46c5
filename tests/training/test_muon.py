"""Muon against its definition: momentum, orthogonal factor by SVD, scale and decay."""

import numpy as np
import pytest
import torch
from torch import nn

from mvbert.training.muon import MOMENTUM, POLYNOMIALS, ROUNDING, Muon, orthogonal_factor

LOWEST = 0.003  # singular values from here on, relative to the largest, end within REACHED of 1
REACHED = 0.2


def nearest_to_one(low: float, high: float) -> tuple[float, float, float]:
    """The odd quintic that is nearest to 1 on [low, high] in the worst case, by Remez' exchange."""
    inner = [(3 * low + high) / 4, (low + 3 * high) / 4]
    for _ in range(50):
        points = (low, *inner, high)
        system = np.array(
            [[x, x**3, x**5, sign] for x, sign in zip(points, (1, -1, 1, -1), strict=True)]
        )
        a, b, c, _ = np.linalg.solve(system, np.ones(4))
        root = np.sqrt(9 * b * b - 20 * a * c)
        inner = sorted(np.sqrt([(-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)]))
    return a, b, c


def test_polynomials_are_the_best_ones_in_turn():
    low, high = LOWEST, 1.0
    for found in POLYNOMIALS:
        best = nearest_to_one(low, high)
        assert found == pytest.approx(best, abs=1e-5)
        low = sum(k * low**n for k, n in zip(best, (1, 3, 5), strict=True))
        high = 2 - low
    assert 1 - REACHED < low < high < 1 + REACHED


def matrix(rows: int, columns: int, values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64))[0]
        for n in (rows, columns)
    )
    return (u * values) @ v.T


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (8, 32), (32, 8)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_singular_vectors_stay_and_singular_values_come_near_to_one(rows, columns, scale):
    # The iteration divides by at most 16^(1/4) times the largest singular value.
    values = torch.logspace(0, np.log10(2 * LOWEST), 8, dtype=torch.float64)
    given = torch.stack([matrix(rows, columns, values, seed) for seed in range(3)])
    found = orthogonal_factor((given * scale).float()).double()
    for a, b in zip(given, found, strict=True):
        u, _, vh = torch.linalg.svd(a, full_matrices=False)
        values_found = u[:, :8].T @ b @ vh[:8].T
        diagonal = values_found.diagonal()
        assert diagonal.min() > 1 - REACHED
        assert diagonal.max() < 1 + REACHED
        # Off the diagonal is rounding: float32 epsilon over the smallest relative singular value.
        assert (values_found - diagonal.diag()).abs().max() < 2**-23 / LOWEST * 10


def test_zeros_stay_zeros():
    assert torch.equal(orthogonal_factor(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6))


def test_an_update_is_its_definition():
    """w (1 - rate decay) - rate 0.2 sqrt(max(rows, columns)) U V^T, of each stacked matrix."""
    torch.manual_seed(0)
    stacked, single = (
        nn.Parameter(torch.randn(24, 8).double()),
        nn.Parameter(torch.randn(8, 32).double()),
    )
    plain = [[p.detach().clone() for p in stacked.split(8)], [single.detach().clone()]]
    momenta = [[torch.zeros_like(w) for w in parts] for parts in plain]
    lr = torch.tensor(0.02, dtype=torch.float64)
    optimizer = Muon([(stacked, 3), (single, 1)], lr, 3.0, 0.1, torch.float64)
    for _ in range(4):
        for p, weights, old in zip((stacked, single), plain, momenta, strict=True):
            p.grad = torch.randn_like(p)
            for i, g in enumerate(p.grad.split(8)):
                old[i] = MOMENTUM * old[i] + (1 - MOMENTUM) * g
                u, s, vh = torch.linalg.svd(
                    MOMENTUM * old[i] + (1 - MOMENTUM) * g, full_matrices=False
                )
                s = s / (ROUNDING * (s**4).sum() ** 0.5) ** 0.5
                for a, b, c in POLYNOMIALS:
                    s = a * s + b * s**3 + c * s**5
                rate = 0.02 * 3.0
                step = rate * 0.2 * max(g.shape) ** 0.5 * (u * s) @ vh
                weights[i] = weights[i] * (1 - rate * 0.1) - step
        optimizer.step()
    for p, weights in zip((stacked, single), plain, strict=True):
        torch.testing.assert_close(p, torch.cat(weights), atol=1e-12, rtol=0)
