"""The optimiser against torch's, and updates that are left out."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from mvbert.config import ModelConfig, TrainConfig
from mvbert.model.encoder import BertEncoder
from mvbert.training.device import Device
from mvbert.training.muon import Muon
from mvbert.training.optim import Optimizer, trained_parameters

CPU = Device(torch.device("cpu"), None, "set by the test")
CONFIG = TrainConfig(lr=0.1, weight_decay=0.01, beta1=0.9, beta2=0.95, eps=1e-6)
MUON = replace(CONFIG, optimizer="muon", muon_lr_ratio=2.0)
KEEP, SKIP = torch.tensor(False), torch.tensor(True)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).double()


def encoder() -> nn.Module:
    """Two layers of a BERT, and a matrix that is not theirs."""
    torch.manual_seed(0)
    shape = ModelConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    return nn.ModuleDict({"encoder": BertEncoder(shape), "map": nn.Linear(8, 5)}).double()


def gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def test_adamw_is_torchs():
    ours, theirs = model(), model()
    optimizer = Optimizer(ours, CONFIG, CPU)
    optimizer.set_learning_rate(0.05)
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
        optimizer.step(skip=KEEP)
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_muon_moves_the_layers_matrices_and_adamw_the_rest():
    ours, matrices, rest = encoder(), encoder(), encoder()
    both = Optimizer(ours, MUON, CPU)
    alone = Optimizer(rest, CONFIG, CPU)
    layers = [matrices["encoder"].layers[i] for i in range(2)]
    given = [(layer.qkv.weight, 3) for layer in layers]
    for layer in layers:
        for linear in (layer.attention_output, layer.intermediate, layer.output):
            given.append((linear.weight, 1))
    lr = torch.tensor(0.1, dtype=torch.float64)
    muon = Muon(given, lr, 2.0, 0.01, torch.float64)
    for seed in range(3):
        for module in (ours, matrices, rest):
            gradients(module, seed)
        both.step(skip=KEEP)
        muon.step()
        alone.step(skip=KEEP)
    of_muon = {id(p) for p, _ in given}
    counted = 0
    for a, b, c in zip(ours.parameters(), matrices.parameters(), rest.parameters(), strict=True):
        counted += id(b) in of_muon
        # The direction's iteration runs in float32 in the run, in float64 here; a factor of 0.1
        # times 2.0 times 0.2 times 4 times three steps stands before its difference.
        torch.testing.assert_close(
            a, b if id(b) in of_muon else c, atol=2e-5 if id(b) in of_muon else 1e-12, rtol=0
        )
    assert counted == len(given) == 8


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("config", [CONFIG, MUON], ids=["adamw", "muon"])
def test_an_update_that_is_left_out_changes_nothing(bad, config):
    module, other = encoder(), encoder()
    optimizer, reference = Optimizer(module, config, CPU), Optimizer(other, config, CPU)
    for seed, spoiled in ((0, False), (1, True), (2, False)):
        gradients(module, seed)
        if spoiled:
            for parameter in module.parameters():
                parameter.grad.flatten()[0] = bad
        optimizer.step(skip=SKIP if spoiled else KEEP)
        if not spoiled:
            gradients(other, seed)
            reference.step(skip=KEEP)
    for (_, a), (_, b) in zip(trained_parameters(module), trained_parameters(other), strict=True):
        assert torch.equal(a, b)
        for key, value in optimizer.state(a).items():
            assert torch.equal(value, reference.state(b)[key]), key


@pytest.mark.parametrize("config", [CONFIG, MUON], ids=["adamw", "muon"])
def test_parameters_without_a_gradient_stay(config):
    module = encoder()
    optimizer = Optimizer(module, config, CPU)
    gradients(module, 0)
    still = module["encoder"].layers[1]
    for parameter in still.parameters():
        parameter.grad = None
    before = [p.clone() for p in still.parameters()]
    optimizer.step(skip=KEEP)
    assert all(torch.equal(a, b) for a, b in zip(before, still.parameters(), strict=True))


def test_a_frozen_matrix_gets_no_update_and_no_state():
    module = encoder()
    module["encoder"].layers[0].qkv.requires_grad_(False)
    optimizer = Optimizer(module, MUON, CPU)
    with pytest.raises(StopIteration):
        optimizer.state(module["encoder"].layers[0].qkv.weight)
