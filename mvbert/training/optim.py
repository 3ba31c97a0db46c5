"""The optimiser, its groups of parameters, and the learning rate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mvbert.config import EmbedConfig, TrainConfig
from mvbert.model.encoder import BertLayer
from mvbert.training.device import Device
from mvbert.training.muon import Muon


class Optimizer:
    """AdamW, and Muon for an encoder's matrices if the config says so, as one optimiser.

    AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) is torch's, fused. Learning rate and step
    count are on the device, and an update can be left out there, so a step never waits for the
    device.
    """

    def __init__(
        self, module: nn.Module, config: TrainConfig | EmbedConfig, device: Device
    ) -> None:
        self._lr = torch.tensor(config.lr, device=device.device)
        matrices = dict(_matrices(module)) if config.optimizer == "muon" else {}
        rest = [p for _, p in trained_parameters(module) if p not in matrices]
        groups = decay_groups(rest, config.weight_decay)
        betas = (config.beta1, config.beta2)
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=self._lr, betas=betas, eps=config.eps, fused=True)
        ]
        for parameter in rest:
            self._parts[0].state[parameter] = {
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
                "step": torch.zeros((), device=device.device),
            }
        if matrices:
            self._parts.append(
                Muon(
                    matrices.items(), self._lr, config.muon_lr_ratio, config.weight_decay,
                    device.autocast or torch.float32,
                )
            )  # fmt: skip

    def state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What the optimiser keeps of a parameter, by name; it all goes into checkpoints."""
        return next(part.state[parameter] for part in self._parts if parameter in part.state)

    def set_learning_rate(self, value: float) -> None:
        self._lr.fill_(value)

    def set_capturable(self, on: bool) -> None:
        """Sets torch's flag for captured updates, which warns if set for eager ones."""
        for part in self._parts:
            for group in part.param_groups:
                group["capturable"] = on

    def step(self, skip: Tensor) -> None:
        """Updates all parameters that have a gradient; nothing changes if `skip` [] is true."""
        for part in self._parts:
            part.found_inf = skip.float()  # type: ignore[attr-defined]
            part.step()


def _matrices(module: nn.Module) -> Iterator[tuple[Tensor, int]]:
    """The encoder layers' trained matrices and how many of equal height are stacked in each."""
    for layer in module.modules():
        if isinstance(layer, BertLayer):
            one_each = (layer.attention_output, layer.intermediate, layer.output)
            for linear, count in ((layer.qkv, 3), *((linear, 1) for linear in one_each)):
                if linear.weight.requires_grad:
                    yield linear.weight, count


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Groups for torch's optimisers: no weight decay on biases and LayerNorm, as in BERT."""
    parameters = list(parameters)
    decayed = {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay}
    plain = {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}
    return [group for group in (decayed, plain) if group["params"]]


def trained_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that require gradients, in a fixed order."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of `step`, from 0."""
    share = linear_schedule(step, config.steps, config.warmup, config.final_lr, config.cooldown)
    return config.lr * share


def linear_schedule(
    step: int, steps: int, warmup: float, final: float = 0.0, cooldown: float = 1.0
) -> float:
    """The share of the peak learning rate at `step`, from 0: linear warm-up, then linear decay.

    With a cooldown below 1 the rate is constant between the two: warm-up, stable, decay (Hu et al.
    2024, MiniCPM, arXiv 2404.06395).

    Args:
        warmup: share of the steps with a rising rate.
        final: share of the peak that the decay ends at.
        cooldown: share of the steps after the warm-up, the last ones, with a falling rate.
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    falling = cooldown * (steps - rising)
    left = min(1.0, (steps - step) / falling) if falling else 1.0
    return final + (1 - final) * left
