"""The Triton divergences against their definitions, in the interpreter or on a GPU."""

import pytest
import torch

from mvbert import functional as MF
from mvbert.kernels import launch

N, H, H_T, V, K = 13, 20, 12, 37, 5


@pytest.fixture
def student(draw):
    def make(dtype):
        return [draw(*s, dtype=dtype) for s in ((N, H), (V, H), (V,))]

    return make


@pytest.fixture
def dense(draw, device):
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


@pytest.fixture
def sparse(device):
    """One row without a target, one unused slot, one id listed twice, both ends of V."""
    ids = torch.randint(0, V, (N, K))
    ids[0, :2] = torch.tensor([0, V - 1])
    ids[4, 1] = ids[4, 0]
    probs = torch.rand(N, K)
    probs[3] = 0
    probs[5, 2] = 0
    ids, probs = ids.to(device), probs.to(device)

    def of(backend, **options):
        return lambda h, w, b: MF.sparse_linear_kl(
            h, w, b, ids, probs.to(h.dtype), temperature=2.0, backend=backend, **options
        )

    return of


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dense(reduction, dtype, student, dense, check_against):
    options = {"reduction": reduction}
    check_against(
        dense("triton", **options), dense("reference", **options), student(dtype), longest_sum=V
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_sparse(reduction, dtype, student, sparse, check_against):
    options = {"reduction": reduction}
    check_against(
        sparse("triton", **options), sparse("reference", **options), student(dtype), longest_sum=V
    )


def test_gradcheck(student, dense, sparse):
    assert torch.autograd.gradcheck(dense("triton"), student(torch.float64), fast_mode=True)
    assert torch.autograd.gradcheck(sparse("triton"), student(torch.float64), fast_mode=True)


def test_chunk_size_does_not_matter(student, dense, sparse, gradients, monkeypatch):
    inputs = student(torch.float64)
    for of in (dense, sparse):
        monkeypatch.setattr(launch, "CHUNK_ROWS", 8192)
        whole = gradients(of("triton"), inputs)
        monkeypatch.setattr(launch, "CHUNK_ROWS", 6)
        split = gradients(of("triton"), inputs)
        for a, b in zip(whole[0] + whole[1], split[0] + split[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_nothing_counts(student, dense, device):
    inputs = student(torch.float32)
    loss = dense("triton", mask=torch.zeros(N, dtype=torch.bool, device=device))(*inputs)
    assert loss == 0
    for gradient in torch.autograd.grad(loss, inputs):
        assert (gradient == 0).all()


@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one(rows, draw, check_against, device):
    inputs = [draw(*s, dtype=torch.float32) for s in ((rows, H), (V, H), (V,))]
    teacher = [draw(*s, dtype=torch.float32).detach() for s in ((rows, H_T), (V, H_T), (V,))]
    ids, q = torch.full((rows, K), V - 1, device=device), torch.ones(rows, K, device=device)

    def dense(backend):
        return lambda h, w, b: MF.linear_kl(
            h, w, b, *(t.to(h.dtype) for t in teacher), backend=backend
        )

    def sparse(backend):
        return lambda h, w, b: MF.sparse_linear_kl(h, w, b, ids, q.to(h.dtype), backend=backend)

    for of in (dense, sparse):
        if rows:
            check_against(of("triton"), of("reference"), inputs, longest_sum=V)
            continue
        loss = of("triton")(*inputs)
        assert loss == 0
        assert all((g == 0).all() for g in torch.autograd.grad(loss, inputs))


def test_no_target_at_all(student, device):
    inputs = student(torch.float32)
    none = torch.zeros(N, K, device=device)
    loss = MF.sparse_linear_kl(*inputs, none.long(), none, backend="triton")
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, inputs))


def test_not_contiguous(student, dense, sparse, check_against):
    """Every second column of a wider tensor, and a transposed weight."""
    h, w, b = student(torch.float32)
    h = torch.stack([h.detach(), h.detach()], 2).flatten(1).requires_grad_()
    w = w.detach().T.contiguous().requires_grad_()
    for of in (dense, sparse):
        kernel, reference = of("triton"), of("reference")
        check_against(
            lambda h, w, b, f=kernel: f(h[:, ::2], w.T, b),
            lambda h, w, b, f=reference: f(h[:, ::2], w.T, b),
            [h, w, b],
            longest_sum=V,
        )


def test_own_teacher_is_at_distance_zero(student, device):
    h, w, b = student(torch.float32)
    loss = MF.linear_kl(h, w, b, h, w, b, temperature=3.0, backend="triton")
    assert abs(loss.item()) < 1e-6
    assert all(g.abs().max() < 1e-6 for g in torch.autograd.grad(loss, (h, w, b)))


def test_loss_scaling_keeps_float16_gradients(draw, device):
    """Gradients of a mean over many rows are below float16's smallest until the loss is scaled."""
    rows = 64
    h = draw(rows, H, dtype=torch.float16)
    w, b = draw(V, H, dtype=torch.float16), draw(V, dtype=torch.float16)
    near = [(x.detach().double() + 2e-4) for x in (h, w, b)]
    exact = [x.detach().double().requires_grad_() for x in (h, w, b)]
    ids = torch.randint(0, V, (rows, K), device=device)
    q = torch.rand(rows, K, device=device)

    def dense(backend, h, w, b):
        return MF.linear_kl(h, w, b, *(x.to(h.dtype) for x in near), backend=backend)

    def sparse(backend, h, w, b):
        return MF.sparse_linear_kl(h, w, b, ids, (q * 1e-3).to(h.dtype), backend=backend)

    for loss in (dense, sparse):
        found = torch.autograd.grad(loss("triton", h, w, b) * 2.0**14, (h, w, b))
        truth = torch.autograd.grad(loss("reference", *exact) * 2.0**14, exact)
        for a, t in zip(found, truth, strict=True):
            # Logits near 30 in float16 are 2^-6 apart, so the dense divergence is mostly rounding.
            assert loss is dense or ((a.double() - t).norm() / t.norm()) < 2**-6
            assert (a != 0).double().mean() > 0.9
