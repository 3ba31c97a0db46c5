"""Optimisers against their definitions, and updates that are left out."""

import pytest
import torch
from torch import nn

from mvbert.config import TrainConfig
from mvbert.training.optim import make_optimizer, set_learning_rate

CPU = torch.device("cpu")
CONFIG = TrainConfig(lr=0.1, weight_decay=0.01, beta1=0.9, beta2=0.95, eps=1e-6)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).double()


def gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_update_that_is_left_out_changes_nothing(bad):
    module, other = model(), model()
    optimizer, reference = make_optimizer(module, CONFIG, CPU), make_optimizer(other, CONFIG, CPU)
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
