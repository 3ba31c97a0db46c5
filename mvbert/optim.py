"""Parameter groups, optimiser and learning rate."""

import torch
from torch import nn

from mvbert.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019); no weight decay on biases and LayerNorm, as in BERT."""
    decayed, plain = [], []
    for _, parameter in trained_parameters(model):
        (decayed if parameter.ndim >= 2 else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that take gradients, in a fixed order."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of update number `step` (from 0): linear warm-up, then linear decay to final_lr."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    left = (config.steps - step) / max(config.steps - warmup, 1)
    return config.lr * (config.final_lr + (1 - config.final_lr) * left)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
