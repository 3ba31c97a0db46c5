"""Optimisers against their definitions, and updates that are left out."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from mvbert.config import TrainConfig
from mvbert.optim import make_optimizer, set_learning_rate

CPU = torch.device("cpu")
CONFIG = TrainConfig(lr=0.1, weight_decay=0.01, beta1=0.9, beta2=0.95, eps=1e-6)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).double()


def gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def lamb_reference(x, grads, lr, decay, adapt):
    """Algorithm 2 of arXiv 1904.00962 in float64, one parameter through all its gradients."""
    x, m, v = x.double(), 0.0, 0.0
    for t, g in enumerate(grads, 1):
        g = g.double()
        m = CONFIG.beta1 * m + (1 - CONFIG.beta1) * g
        v = CONFIG.beta2 * v + (1 - CONFIG.beta2) * g * g
        m_hat = m / (1 - CONFIG.beta1**t)
        v_hat = v / (1 - CONFIG.beta2**t)
        r = m_hat / (v_hat.sqrt() + CONFIG.eps) + decay * x
        ratio = x.norm() / r.norm() if adapt and x.norm() > 0 else 1.0
        x = x - lr * ratio * r
    return x


def test_lamb_is_its_definition():
    module = model()
    before = copy.deepcopy(list(module.parameters()))
    optimizer = make_optimizer(module, replace(CONFIG, optimizer="lamb"), CPU)
    grads = []
    for seed in range(5):
        gradients(module, seed)
        grads.append([p.grad.clone() for p in module.parameters()])
        optimizer.step()
    for i, (start, after) in enumerate(zip(before, module.parameters(), strict=True)):
        matrix = start.ndim == 2
        expected = lamb_reference(
            start.detach(), [g[i] for g in grads], CONFIG.lr, 0.01 if matrix else 0.0, matrix
        )
        # The rate and the corrections of bias are float32 numbers.
        torch.testing.assert_close(after.detach(), expected, rtol=1e-6, atol=1e-7)


def test_a_matrix_of_zeros_can_still_be_trained_by_lamb():
    module = nn.Linear(3, 2)
    nn.init.zeros_(module.weight)
    optimizer = make_optimizer(module, replace(CONFIG, optimizer="lamb"), CPU)
    gradients(module, 0)
    optimizer.step()
    assert (module.weight != 0).all()


def test_adamw_is_torchs():
    ours, theirs = model(), model()
    optimizer = make_optimizer(ours, CONFIG, CPU)
    set_learning_rate(optimizer, 0.05)
    plain = [p for p in theirs.parameters() if p.ndim < 2]
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": 0.01},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=0.05, betas=(0.9, 0.95), eps=1e-6, foreach=False,
    )  # fmt: skip
    for seed in range(5):
        gradients(ours, seed)
        gradients(theirs, seed)
        optimizer.step()
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["adamw", "lamb"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_update_that_is_left_out_changes_nothing(name, bad):
    module, other = model(), model()
    config = replace(CONFIG, optimizer=name)
    optimizer, reference = make_optimizer(module, config, CPU), make_optimizer(other, config, CPU)
    for seed, spoiled in ((0, False), (1, True), (2, False)):
        gradients(module, seed)
        optimizer.found_inf = torch.tensor(float(spoiled))
        if spoiled:
            for parameter in module.parameters():
                parameter.grad.flatten()[0] = bad
        optimizer.step()
        if not spoiled:
            gradients(other, seed)
            reference.step()
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, reference.state[b][key]), key
