"""Parameter groups, optimisers and learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mvbert.config import TrainConfig

# What an optimiser keeps of a parameter, the same for both; a checkpoint holds it.
STATE = ("exp_avg", "exp_avg_sq", "step")


def make_optimizer(
    model: nn.Module, config: TrainConfig, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), fused, or LAMB.

    No weight decay on biases and LayerNorm, as in BERT. Learning rate and step count live on the
    device, and an update whose `found_inf` is 1 leaves everything as it was: nothing in a step
    waits for the device.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for _, parameter in trained_parameters(model):
        (decayed if parameter.ndim >= 2 else plain).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay, "adapt": True},
        {"params": plain, "weight_decay": 0.0, "adapt": False},
    ]
    groups = [group for group in groups if group["params"]]
    lr = torch.tensor(config.lr, device=device)
    betas = (config.beta1, config.beta2)
    if config.optimizer == "lamb":
        return Lamb(groups, lr=lr, betas=betas, eps=config.eps)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=config.eps, fused=True)


class Lamb(torch.optim.Optimizer):
    """LAMB, for large batches: Adam's direction, each matrix at a step in proportion to its norm.

    You et al. 2020, arXiv 1904.00962, algorithm 2, with its phi the identity:

        m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
        r = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay x
        x = x - lr (|x| / |r|) r

    The ratio is 1 where either norm is 0, and, as in the authors' code, for parameters that are
    left out of it (`adapt` False: biases and LayerNorm).
    """

    found_inf: Tensor | None = None  # 1.0: skip this update

    def __init__(
        self, groups: list[dict[str, Any]], lr: Tensor, betas: tuple[float, float], eps: float
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "adapt": True}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is not None:
                    self._update(x, x.grad, group)

    def _update(self, x: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[x]
        if not state:
            state["exp_avg"] = torch.zeros_like(x)
            state["exp_avg_sq"] = torch.zeros_like(x)
            state["step"] = torch.zeros((), device=x.device)
        m, v, t = (state[name] for name in STATE)
        beta1, beta2 = group["betas"]
        found = x.new_zeros(()) if self.found_inf is None else self.found_inf.to(x.dtype)
        good = 1 - found
        # A gradient that is not finite must not be multiplied by 0: it would stay what it is.
        grad = grad.where(good > 0, 0.0)
        t += good
        m.lerp_(grad, (1 - beta1) * good)
        v.lerp_(grad.square(), (1 - beta2) * good)
        count = t.clamp_min(1.0)
        direction = m / (1 - beta1**count) / ((v / (1 - beta2**count)).sqrt() + group["eps"])
        direction += group["weight_decay"] * x
        rate = group["lr"] * good
        if group["adapt"]:
            norm, size = x.norm(), direction.norm()
            rate = rate * (norm / size).where((norm > 0) & (size > 0), 1.0)
        x -= rate * direction


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
        group["lr"].fill_(value)
