"""The operators as torch.compile sees them, by torch's own checker, on the Triton kernels."""

import pytest
import torch

from mvbert.kernels import chunked, launch, layer_norm, mixed_embedding
from mvbert.kernels import linear_cross_entropy as loss
from mvbert.kernels.linear import scale_exactly
from mvbert.kernels.relation_kl import relation_kl_sum

TESTS = ("test_schema", "test_faketensor", "test_autograd_registration")


@pytest.mark.parametrize("need", [(True, True, True), (False, True, False)], ids=str)
@pytest.mark.parametrize("width", [0, 256], ids=["materialised", "flash"])
@pytest.mark.parametrize("all_options", [False, True], ids=["plain", "all options"])
def test_losses(all_options, need, width, draw, device, monkeypatch):
    monkeypatch.setattr(launch, "FLASH_WIDTH", width)
    h, w, b = (draw(*s, dtype=torch.float32) for s in ((5, 8), (11, 8), (11,)))
    labels = torch.tensor([0, 10, -100, 3, 4], device=device)
    scale = torch.tensor(0.25, device=device)
    # Class weights, z-loss, ignored label, smoothing, softcap, predictions.
    options = (None, None, -100, 0.1, 0.0, False)
    if all_options:
        z_loss = torch.tensor(0.1, device=device)
        options = (
            torch.rand(11, device=device),
            z_loss,
            -100,
            0.1,
            3.0 if width == 0 else 0.0,
            True,
        )
    check = torch.library.opcheck
    given, need = (h, w, b, labels), list(need)
    check(
        loss.linear_cross_entropy_sum,
        (*given, scale, *options, need, "triton", False),
        test_utils=TESTS,
    )
    check(
        loss.linear_cross_entropy_rows, (*given, *options, [False] * 3, "triton"), test_utils=TESTS
    )
    up = torch.rand(5, device=device)
    check(
        loss.linear_cross_entropy_rows_backward,
        (up, up, *given, *options[:2], [], *options[2:5], need, "triton"),
        test_utils=TESTS,
    )


@pytest.mark.parametrize("need", [True, False])
@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_relations(need, backend, draw):
    x, y = (draw(2, 5, 3 * H, dtype=torch.float32) for H in (8, 12))
    arguments = (x, y.detach(), 4, need, backend)
    torch.library.opcheck(relation_kl_sum, arguments, test_utils=TESTS)


@pytest.mark.parametrize("both", [False, True], ids=["one table", "two tables"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_embedding(both, dropout_p, draw, device):
    H = 12
    t, s, p, k, w, b = (
        draw(*shape, dtype=torch.float32) for shape in ((7, H), (5, H), (6, H), (2, H), (H,), (H,))
    )
    ids = torch.randint(0, 12 if both else 7, (2, 6), device=device)
    seed = torch.zeros(1, dtype=torch.int64, device=device) if dropout_p else None
    arguments = (
        ids, t, s if both else None, p, k, ids % 2, None, w, b, seed, 1e-12, dropout_p, 0, [3],
        False,
    )  # fmt: skip
    torch.library.opcheck(mixed_embedding.mixed_embedding, arguments, test_utils=TESTS)
    inputs = [None if x is None else x.detach() for x in arguments[:9]]
    hidden, mean, rstd = mixed_embedding.mixed_embedding(*inputs, *arguments[9:])
    need = [True, both, True, False]
    arguments = (hidden, inputs, seed, mean, rstd, dropout_p, 0, [3], False, need)
    torch.library.opcheck(mixed_embedding.mixed_embedding_backward, arguments, test_utils=TESTS)
    torch.library.opcheck(chunked.gather_rows, (ids, t, s if both else None, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_layer_norm(dropout_p, dtype, draw, device):
    x, r, w, b = (draw(*s, dtype=torch.float32) for s in ((5, 12), (5, 12), (12,), (12,)))
    x = x.detach().to(dtype).requires_grad_()
    seed = torch.zeros(1, dtype=torch.int64, device=device) if dropout_p else None
    for both in (False, True):
        arguments = (x, r, w, b, seed, 1e-12, dropout_p, both)
        torch.library.opcheck(layer_norm.residual_layer_norm, arguments, test_utils=TESTS)
    y, rounded, *kept = layer_norm.residual_layer_norm(x, r, w, b, seed, 1e-12, dropout_p, True)
    total, mean, rstd = (t.detach() for t in kept)
    for drounded in (None, torch.ones_like(rounded).detach()):
        torch.library.opcheck(
            layer_norm.residual_layer_norm_backward,
            (torch.ones_like(y).detach(), drounded, total, w, mean, rstd, seed, dropout_p, dtype),
            test_utils=TESTS,
        )


def test_scale(draw):
    x = draw(3, 1000, dtype=torch.float16).detach()
    factor = torch.tensor(1 / 3, dtype=torch.float32, device=x.device)
    assert torch.equal(scale_exactly(x, factor), (x.float() * factor).half())
    torch.library.opcheck(scale_exactly, (x, factor), test_utils=TESTS)
