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
    check_against(of("triton"), of("reference"), inputs)


def test_gradcheck_with_dropout(draw):
    inputs = [draw(*s, dtype=torch.float64) for s in ((5, 20), (5, 20), (20,), (20,))]

    def run(*inputs):
        torch.manual_seed(3)
        return of("triton", dropout_p=0.4, training=True)(*inputs)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_no_rows(draw):
    inputs = [draw(*s, dtype=torch.float32) for s in ((0, 20), (0, 20), (20,), (20,))]
    y = of("triton")(*inputs)
    assert y.shape == (0, 20)
    assert all((g == 0).all() for g in torch.autograd.grad(y.sum(), inputs))


def test_not_contiguous(draw, check_against):
    inputs = [draw(*s, dtype=torch.float32) for s in ((20, 9), (20, 9), (40,), (40,))]

    def strided(backend):
        return lambda x, r, w, b: of(backend)(x.T, r.T, w[::2], b[::2])

    check_against(strided("triton"), strided("reference"), inputs)
