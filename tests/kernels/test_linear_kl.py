"""The Triton divergence against its definition, in the interpreter or on a GPU."""

import pytest
import torch

from mvbert import functional as MF
from mvbert.kernels import launch

N, H, H_T, V = 13, 20, 12, 37


@pytest.fixture
def student(draw):
    def make(dtype):
        return [draw(*s, dtype=dtype) for s in ((N, H), (V, H), (V,))]

    return make


@pytest.fixture
def kl(draw, device):
    """The two functions of the student's tensors, for one teacher."""
    teacher = [
        # In steps that every dtype holds: what the kernel reads is what the truth is made of.
        draw(*s, dtype=torch.bfloat16, requires_grad=False).float()
        for s in ((N, H_T), (V, H_T), (V,))
    ]
    mask = (torch.arange(N, device=device) % 3) != 1

    def of(backend, mask=mask, **options):
        def run(h, w, b):
            given = [t.to(h.dtype) for t in teacher]
            return MF.linear_kl(
                h, w, b, *given, temperature=2.0, mask=mask, backend=backend, **options
            )

        return run

    return of


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_and_gradients(reduction, dtype, student, kl, check_against):
    options = {"reduction": reduction}
    check_against(
        kl("triton", **options), kl("reference", **options), student(dtype), longest_sum=V
    )


def test_gradcheck(student, kl):
    assert torch.autograd.gradcheck(kl("triton"), student(torch.float64), fast_mode=True)


def test_chunk_size_does_not_matter(student, kl, gradients, monkeypatch):
    inputs = student(torch.float64)
    monkeypatch.setattr(launch, "CHUNK_ROWS", 8192)
    whole = gradients(kl("triton"), inputs)
    monkeypatch.setattr(launch, "CHUNK_ROWS", 6)
    split = gradients(kl("triton"), inputs)
    for a, b in zip(whole[0] + whole[1], split[0] + split[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_nothing_counts(student, kl, device):
    inputs = student(torch.float32)
    loss = kl("triton", mask=torch.zeros(N, dtype=torch.bool, device=device))(*inputs)
    assert loss == 0
    for gradient in torch.autograd.grad(loss, inputs):
        assert (gradient == 0).all()


@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one(rows, draw, check_against):
    inputs = [draw(*s, dtype=torch.float32) for s in ((rows, H), (V, H), (V,))]
    teacher = [draw(*s, dtype=torch.float32).detach() for s in ((rows, H_T), (V, H_T), (V,))]

    def of(backend):
        return lambda h, w, b: MF.linear_kl(
            h, w, b, *(t.to(h.dtype) for t in teacher), backend=backend
        )

    if rows:
        check_against(of("triton"), of("reference"), inputs, longest_sum=V)
        return
    loss = of("triton")(*inputs)
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, inputs))


def test_not_contiguous(student, kl, check_against):
    """Every second column of a wider tensor, and a transposed weight."""
    h, w, b = student(torch.float32)
    h = torch.stack([h.detach(), h.detach()], 2).flatten(1).requires_grad_()
    w = w.detach().T.contiguous().requires_grad_()
    kernel, reference = kl("triton"), kl("reference")
    check_against(
        lambda h, w, b: kernel(h[:, ::2], w.T, b),
        lambda h, w, b: reference(h[:, ::2], w.T, b),
        [h, w, b],
        longest_sum=V,
    )


def test_own_teacher_is_at_distance_zero(student, device):
    h, w, b = student(torch.float32)
    loss = MF.linear_kl(h, w, b, h, w, b, temperature=3.0, backend="triton")
    assert abs(loss.item()) < 1e-6
    assert all(g.abs().max() < 1e-6 for g in torch.autograd.grad(loss, (h, w, b)))


def test_loss_scaling_keeps_float16_gradients(draw):
    """Gradients of a mean over many rows are below float16's smallest until the loss is scaled."""
    rows = 64
    h = draw(rows, H, dtype=torch.float16)
    w, b = draw(V, H, dtype=torch.float16), draw(V, dtype=torch.float16)
    near = [(x.detach().double() + 2e-4) for x in (h, w, b)]

    def loss(backend, h, w, b):
        return MF.linear_kl(h, w, b, *(x.to(h.dtype) for x in near), backend=backend)

    found = torch.autograd.grad(loss("triton", h, w, b) * 2.0**14, (h, w, b))
    for gradient in found:
        assert (gradient != 0).double().mean() > 0.9
