"""KL of attention relations: kernels and chunks against the definition, in the interpreter or on a
GPU."""

import pytest
import torch

from mvbert import functional as MF
from mvbert.kernels import chunked
from mvbert.kernels.relation_kl import relation_kl_reference

# (B, T, H_s, H_t, R): heads narrower and wider than a tile; rows below, at and above one; one
# piece; one head of all.
SHAPES = [
    (2, 5, 12, 24, 6), (1, 16, 32, 16, 2), (2, 17, 20, 40, 1), (1, 70, 8, 8, 4), (3, 1, 4, 4, 2),
]  # fmt: skip


@pytest.fixture(params=SHAPES, ids=lambda s: "B{}-T{}-H{}-H_t{}-R{}".format(*s))
def shape(request):
    return request.param


@pytest.fixture
def relations(draw):
    """(the student's tensor, function of it by backend) for one teacher."""

    def make(shape, dtype):
        B, T, H, H_t, R = shape
        teacher = draw(B, T, 3 * H_t, dtype=torch.bfloat16, requires_grad=False)

        def of(backend):
            return lambda x: MF.relation_kl(x, teacher.to(x.dtype), R, backend=backend)

        return draw(B, T, 3 * H, dtype=dtype), of

    return make


@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_against_the_definition(backend, shape, dtype, relations, check_against):
    _, T, H, H_t, R = shape
    student, of = relations(shape, dtype)
    # A row of scores and its gradient are sums over T, a score over the width of a head.
    check_against(of(backend), of("reference"), [student], max(T, H // R, H_t // R))


def test_the_definition_is_what_is_meant():
    student, teacher = (torch.randn(2, 5, 3 * H, dtype=torch.float64) for H in (12, 24))
    total = 0.0
    for part in range(3):
        for head in range(6):
            x = student[..., part * 12 : part * 12 + 12][..., head * 2 : head * 2 + 2]
            y = teacher[..., part * 24 : part * 24 + 24][..., head * 4 : head * 4 + 4]
            p = (x @ x.mT / 2**0.5).softmax(-1)
            q = (y @ y.mT / 4**0.5).softmax(-1)
            total += (q * (q.log() - p.log())).sum(-1).mean() / 18
    torch.testing.assert_close(relation_kl_reference(student, teacher, 6), total)


@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_gradcheck(backend, relations):
    student, of = relations((2, 5, 8, 12, 4), torch.float64)
    assert torch.autograd.gradcheck(of(backend), student, fast_mode=True)


@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_equal_models_are_nothing_apart(backend, draw):
    x = draw(2, 7, 24, dtype=torch.float32)
    loss = MF.relation_kl(x, x, 4, backend=backend)
    assert abs(loss.item()) < 1e-6
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_vectors_of_very_different_lengths(backend, device, gradients):
    """A row of scores in the thousands beside one of none: no overflow, no lost gradient."""
    x = torch.randn(1, 9, 12, dtype=torch.float64, device=device)
    x = x * torch.logspace(-3, 1.5, 9, device=device)[None, :, None]
    y = x.flip(1).detach()
    found, wanted = (
        gradients(
            lambda s, b=b: MF.relation_kl(s, y.to(s.dtype), 2, backend=b),
            [x.clone().requires_grad_()],
        )
        for b in (backend, "reference")
    )
    for ours, truth in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("elements", [1, 3 * 4 * 25 * 2], ids=["a row", "two rows"])
def test_the_size_of_a_chunk_does_not_matter(elements, monkeypatch, device, relations, gradients):
    student, of = relations((3, 5, 8, 12, 4), torch.float64)
    whole = gradients(of("chunked"), [student])
    monkeypatch.setitem(chunked.RELATIONS, device, elements)
    torch.testing.assert_close(gradients(of("chunked"), [student]), whole)


@pytest.mark.parametrize("backend", ["triton", "chunked", "reference"])
def test_other_strides_and_no_gradient(backend, relations):
    student, of = relations((2, 5, 8, 12, 4), torch.float64)
    turned = student.detach().transpose(0, 1).contiguous().transpose(0, 1)
    loss = of(backend)(turned)
    torch.testing.assert_close(loss, of(backend)(student).detach())
    assert not loss.requires_grad


@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_no_rows(backend, device):
    x = torch.zeros(0, 5, 24, device=device, requires_grad=True)
    loss = MF.relation_kl(x, x.detach(), 4, backend=backend)
    loss.backward()
    assert loss.item() == 0
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("student", "teacher", "heads", "complaint"),
    [
        ((2, 5, 24), (2, 6, 24), 4, r"one B and one T, got \[2, 5, 24\] and \[2, 6, 24\]"),
        ((2, 5, 24), (2, 5, 30), 4, r"teacher \[B, T, 3 H\].* heads = 4, got \[2, 5, 30\]"),
        ((10, 24), (10, 24), 4, r"student \[B, T, 3 H\].* got \[10, 24\]"),
        ((2, 5, 24), (2, 5, 24), 0, "heads = 0"),
    ],
)
def test_what_does_not_fit_is_refused(student, teacher, heads, complaint):
    with pytest.raises(ValueError, match=complaint):
        MF.relation_kl(torch.zeros(student), torch.zeros(teacher), heads)
