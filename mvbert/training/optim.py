"""Parameter groups, the optimiser and the learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mvbert.config import TrainConfig

# The optimiser's state per parameter, saved in checkpoints.
STATE = ("exp_avg", "exp_avg_sq", "step")


def make_optimizer(
    model: nn.Module, config: TrainConfig, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), fused.

    No weight decay on biases and LayerNorm, as in BERT. Learning rate and step count are on the
    device, and an update with `found_inf` 1 changes nothing, so a step never waits for the device.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for _, parameter in trained_parameters(model):
        (decayed if parameter.ndim >= 2 else plain).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    lr = torch.tensor(config.lr, device=device)
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=config.eps, fused=True)


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that require gradients, in a fixed order."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of `step` (from 0): linear warm-up, then linear decay to final_lr."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    left = (config.steps - step) / max(config.steps - warmup, 1)
    return config.lr * (config.final_lr + (1 - config.final_lr) * left)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"].fill_(value)
