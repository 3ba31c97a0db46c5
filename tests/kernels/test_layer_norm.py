"""Residual + dropout + LayerNorm against its definition, in the interpreter or on a GPU."""

import pytest
import torch

from mvbert import functional as MF


def of(backend, **options):
    return lambda x, r, w, b: MF.residual_layer_norm(x, r, w, b, backend=backend, **options)


@pytest.mark.parametrize("shape", [(1, 8), (3, 5, 20), (9, 130)], ids=str)
def test_against_torch(shape, dtype, draw, check_against):
    """One row; batched and odd; wider than a power of two."""
    inputs = [draw(*s, dtype=dtype) for s in (shape, shape, shape[-1:], shape[-1:])]
    check_against(of("triton"), of("reference"), inputs, longest_sum=max(shape))


def test_gradcheck_with_dropout(draw):
    inputs = [draw(*s, dtype=torch.float64) for s in ((5, 20), (5, 20), (20,), (20,))]

    def run(*inputs):
        torch.manual_seed(3)
        return of("triton", dropout_p=0.4, training=True)(*inputs)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_a_residual_of_another_dtype(dropout_p, draw):
    """As under autocast: x is rounded, the residual and the result are float32."""
    x = draw(5, 20, dtype=torch.float16)
    rest = [draw(*s, dtype=torch.float32) for s in ((5, 20), (20,), (20,))]

    def gradients(x):
        torch.manual_seed(3)
        y = of("triton", dropout_p=dropout_p, training=True)(x, *rest)
        assert y.dtype == torch.float32
        upstream = torch.arange(100.0, device=y.device).view(5, 20).cos()
        return [y, *torch.autograd.grad(y, [x, *rest], upstream)]

    found, truth = gradients(x), gradients(x.detach().float().requires_grad_())
    assert found[1].dtype == torch.float16
    truth[1] = truth[1].half()
    for a, b in zip(found, truth, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("used", ["both", "first", "second", "neither"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_the_result_in_two_dtypes(dropout_p, used, draw):
    """The second is the first, rounded; their gradients add up before anything is rounded."""
    x = draw(5, 20, dtype=torch.float16)
    rest = [draw(*s, dtype=torch.float32) for s in ((5, 20), (20,), (20,))]
    options = {"dropout_p": dropout_p, "training": True, "backend": "triton"}
    upstream = torch.arange(100.0, device=x.device).view(5, 20)
    first = upstream.cos() * (used in ("both", "first"))
    second = upstream.sin().half() * (used in ("both", "second"))

    torch.manual_seed(3)
    y, rounded = MF.residual_layer_norm(x, *rest, also_in_x_dtype=True, **options)
    assert rounded.dtype == torch.float16
    assert torch.equal(rounded, y.half())
    total = 0 * x.float().sum()
    if used in ("both", "first"):
        total = total + (y * first).sum()
    if used in ("both", "second"):
        total = total + (rounded * second).sum()
    found = torch.autograd.grad(total, [x, *rest], allow_unused=used == "neither")

    torch.manual_seed(3)
    plain = MF.residual_layer_norm(x, *rest, **options)
    truth = torch.autograd.grad(plain, [x, *rest], first + second.float())
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a if a is not None else torch.zeros_like(b), b, rtol=0, atol=0)


def test_alike_in_dtype_it_is_one_tensor(draw):
    inputs = [draw(*s, dtype=torch.float32) for s in ((5, 20), (5, 20), (20,), (20,))]
    y, again = MF.residual_layer_norm(*inputs, also_in_x_dtype=True, backend="triton")
    assert again is y


def test_no_rows(draw):
    inputs = [draw(*s, dtype=torch.float32) for s in ((0, 20), (0, 20), (20,), (20,))]
    y = of("triton")(*inputs)
    assert y.shape == (0, 20)
    assert all((g == 0).all() for g in torch.autograd.grad(y.sum(), inputs))


def test_not_contiguous(draw, check_against):
    inputs = [draw(*s, dtype=torch.float32) for s in ((20, 9), (20, 9), (40,), (40,))]

    def strided(backend):
        return lambda x, r, w, b: of(backend)(x.T, r.T, w[::2], b[::2])

    check_against(strided("triton"), strided("reference"), inputs, longest_sum=20)
