"""The Triton cross-entropy against its definition, in the interpreter or on a GPU."""

import pytest
import torch

from mvbert import functional as MF
from mvbert.kernels import launch

# N, H, V
SHAPES = [
    (1, 1, 1),  # the smallest there is: one row, one piece
    (13, 20, 37),  # odd everything, under one tile
    (33, 16, 48),  # a row above two tiles of rows; columns and width exact
    (70, 40, 131),  # several tiles each way, the large tile sizes, ragged ends
]


@pytest.fixture(params=["flash", "materialised"])
def strategy(request, monkeypatch):
    """Narrow rows take the flash form; forcing the width to 0 sends all through the other one."""
    monkeypatch.setattr(launch, "FLASH_WIDTH", 256 if request.param == "flash" else 0)
    return request.param


def make_labels(N: int, V: int, device: str) -> torch.Tensor:
    """Every third row ignored, the first and the last piece among the others."""
    labels = torch.randint(0, V, (N,))
    labels[2::3] = MF.IGNORE_INDEX
    labels[0] = V - 1
    labels[N // 2 if N // 2 % 3 != 2 else 0] = 0
    return labels.to(device)


def both(labels, **options):
    """(kernel, reference) as functions of (hidden, weight, bias)."""

    def of(backend):
        return lambda h, w, b: MF.linear_cross_entropy(h, w, labels, b, backend=backend, **options)

    return of("triton"), of("reference")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"N{s[0]}-H{s[1]}-V{s[2]}")
def test_loss_and_gradients(shape, strategy, dtype, draw, check_against, device):
    N, H, V = shape
    inputs = draw(N, H, dtype=dtype), draw(V, H, dtype=dtype), draw(V, dtype=dtype)
    check_against(*both(make_labels(N, V, device)), inputs, longest_sum=max(shape))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_reductions(reduction, label_smoothing, strategy, draw, check_against, device):
    inputs = [draw(*s, dtype=torch.float32) for s in ((13, 20), (37, 20), (37,))]
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    check_against(*both(make_labels(13, 37, device), **options), inputs, longest_sum=37)


def test_lse_is_differentiable(strategy, draw, check_against, device):
    inputs = [draw(*s, dtype=torch.float32) for s in ((13, 20), (37, 20), (37,))]
    options = {"return_lse": True, "label_smoothing": 0.2, "reduction": "none"}
    check_against(*both(make_labels(13, 37, device), **options), inputs, longest_sum=37)


def options_of(names: str, V: int, device: str) -> dict:
    """The options of a loss by name; class weights between 1/2 and 3/2, one of them 0."""
    weights = 0.5 + torch.randint(0, 257, (V,)).to(device) / 256
    weights[V // 2] = 0
    known = {
        "smoothing": {"label_smoothing": 0.1},
        "softcap": {"softcap": 3.0},
        "z-loss": {"z_loss": 0.01},
        "weights": {"class_weight": weights},
    }
    return {k: v for name in names.split(" + ") for k, v in known[name].items()}


# A softcap always takes the form with logits.
CURVED = ["softcap", "softcap + smoothing", "softcap + z-loss + weights + smoothing"]
LINEAR = ["z-loss", "weights", "weights + smoothing", "z-loss + weights + smoothing"]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("names", LINEAR)
def test_options(names, reduction, strategy, draw, check_against, device):
    inputs = [draw(*s, dtype=torch.float32) for s in ((13, 20), (37, 20), (37,))]
    options = {"reduction": reduction} | options_of(names, 37, device)
    check_against(*both(make_labels(13, 37, device), **options), inputs, longest_sum=37)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("names", CURVED)
def test_softcap(names, reduction, dtype, draw, check_against, device):
    inputs = [draw(*s, dtype=dtype) for s in ((13, 20), (37, 20), (37,))]
    options = {"reduction": reduction} | options_of(names, 37, device)
    check_against(*both(make_labels(13, 37, device), **options), inputs, longest_sum=37)


def test_options_of_larger_tiles(strategy, dtype, draw, check_against, device):
    N, H, V = SHAPES[-1]
    inputs = [draw(*s, dtype=dtype) for s in ((N, H), (V, H), (V,))]
    options = options_of((CURVED if launch.FLASH_WIDTH == 0 else LINEAR)[-1], V, device)
    check_against(*both(make_labels(N, V, device), **options), inputs, longest_sum=V)


@pytest.mark.parametrize("names", [LINEAR[-1], CURVED[-1]])
def test_lse_is_differentiable_beside_other_options(names, strategy, draw, check_against, device):
    inputs = [draw(*s, dtype=torch.float32) for s in ((13, 20), (37, 20), (37,))]
    options = {"return_lse": True} | options_of(names, 37, device)
    check_against(*both(make_labels(13, 37, device), **options), inputs, longest_sum=37)


def test_a_small_logit_keeps_its_digits_under_a_large_cap(draw, check_against, device):
    """tanh(z / 10,000) of logits around 1 must not be a difference of two numbers near 1."""
    inputs = [draw(*s, dtype=torch.float32) for s in ((13, 20), (37, 20), (37,))]
    kernel = both(make_labels(13, 37, device), softcap=1e4)
    check_against(*kernel, inputs, longest_sum=37)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"N{s[0]}-H{s[1]}-V{s[2]}")
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("grad", [True, False])
def test_predictions(grad, softcap, shape, strategy, draw, device, gradients):
    """Largest logits of integers, among them ties: the lowest id counts, the label's or another."""
    N, H, V = shape
    hidden = torch.randint(-1, 2, (N, H)).float().to(device)
    weight = torch.randint(-1, 2, (V, H)).float().to(device).requires_grad_(grad)
    labels = make_labels(N, V, device)
    logits = hidden @ weight.detach().t()
    for n in range(0, N, 2):  # some of the labels are the largest, or one of several
        if labels[n] >= 0:
            labels[n] = (
                logits[n].argmax() if n % 4 else (logits[n] == logits[n].max()).nonzero()[-1, 0]
            )
    first = torch.stack([(row == row.max()).nonzero()[0, 0] for row in logits])
    for reduction in ("mean", "none"):
        loss, found = MF.linear_cross_entropy(
            hidden, weight, labels, softcap=softcap, reduction=reduction, backend="triton",
            return_metrics=True,
        )  # fmt: skip
        plain = MF.linear_cross_entropy(
            hidden, weight, labels, softcap=softcap, reduction=reduction, backend="triton"
        )
        assert torch.equal(loss, plain)
        kept = labels != MF.IGNORE_INDEX
        assert torch.equal(found.predicted, first.where(kept, -1))
        assert torch.equal(found.correct, kept & (first == labels))
        assert not found.lse.requires_grad
        assert loss.requires_grad == grad


@pytest.mark.parametrize("names", ["smoothing", LINEAR[-1], CURVED[-1]])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction, names, strategy, draw, device, check_against):
    """Along random directions; each element against the definition's own, in float64 too."""
    labels = make_labels(7, 19, device)
    inputs = [draw(*s, dtype=torch.float64) for s in ((7, 5), (19, 5), (19,))]
    kernel, reference = both(labels, reduction=reduction, **options_of(names, 19, device))
    assert torch.autograd.gradcheck(kernel, inputs, fast_mode=True)
    check_against(kernel, reference, inputs, longest_sum=19)


@pytest.mark.parametrize("chunk", [5, 8, 12, 13])
@pytest.mark.parametrize("names", ["smoothing", CURVED[-1]])
def test_chunk_size_does_not_matter(names, chunk, monkeypatch, draw, gradients, device):
    """Sums over chunks: exact in every split, also with a last chunk of one row."""
    monkeypatch.setattr(launch, "FLASH_WIDTH", 0)
    labels = make_labels(13, 37, device)
    inputs = [draw(*s, dtype=torch.float64) for s in ((13, 20), (37, 20), (37,))]
    kernel, _ = both(labels, **options_of(names, 37, device))
    whole = gradients(kernel, inputs)
    monkeypatch.setattr(launch, "CHUNK_ROWS", chunk)
    split = gradients(kernel, inputs)
    for a, b in zip(whole[0] + whole[1], split[0] + split[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunk", [7, 8192])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("names", ["smoothing", CURVED[-1]])
def test_products_of_the_library(names, chunk, reduction, monkeypatch, draw, device, check_against):
    """Products over all rows by the library. On a GPU they are bfloat16's, which here is wrong."""
    monkeypatch.setattr(launch, "FLASH_WIDTH", 0)
    monkeypatch.setattr(launch, "CHUNK_ROWS", chunk)
    monkeypatch.setattr(launch, "LIBRARY_DTYPE", torch.float32)
    labels = make_labels(13, 37, device)
    inputs = [draw(*s, dtype=torch.float32) for s in ((13, 20), (37, 20), (37,))]
    called = []
    original = launch.library
    monkeypatch.setattr(launch, "library", lambda *a: called.append(a[0]) or original(*a))
    options = {"reduction": reduction} | options_of(names, 37, device)
    kernel, _ = both(labels, mostly_labelled=True, **options)
    _, reference = both(labels, **options)
    check_against(kernel, reference, inputs, longest_sum=37)
    assert set(called) == ({"dx", "dweight"} if reduction == "mean" else set())


def test_batch_split_does_not_matter(strategy, draw, device):
    hidden, weight = draw(14, 20, dtype=torch.float64), draw(37, 20, dtype=torch.float64)
    labels = make_labels(14, 37, device)
    kernel, _ = both(labels, reduction="none")
    first, _ = both(labels[:6], reduction="none")
    second, _ = both(labels[6:], reduction="none")
    parts = torch.cat([first(hidden[:6], weight, None), second(hidden[6:], weight, None)])
    torch.testing.assert_close(kernel(hidden, weight, None), parts, rtol=1e-12, atol=1e-14)


def test_no_rows(strategy, draw, device):
    hidden, weight, bias = (draw(*s, dtype=torch.float32) for s in ((0, 20), (37, 20), (37,)))
    labels = torch.zeros(0, dtype=torch.long, device=device)
    loss = MF.linear_cross_entropy(hidden, weight, labels, bias, backend="triton")
    loss.backward()
    assert loss == 0
    assert hidden.grad.shape == (0, 20)
    assert (weight.grad == 0).all()
    assert (bias.grad == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_all_rows_ignored(reduction, strategy, draw, device):
    """Nothing is NaN: the mean over no rows is 0."""
    inputs = [draw(*s, dtype=torch.float32) for s in ((5, 20), (37, 20), (37,))]
    labels = torch.full((5,), MF.IGNORE_INDEX, device=device)
    kernel, _ = both(labels, reduction=reduction)
    loss = kernel(*inputs)
    assert (loss == 0).all()
    for gradient in torch.autograd.grad(loss.sum(), inputs):
        assert (gradient == 0).all()


def test_no_row_ignored(strategy, draw, check_against, device):
    inputs = [draw(*s, dtype=torch.float32) for s in ((13, 20), (37, 20), (37,))]
    check_against(*both(torch.arange(13, device=device)), inputs, longest_sum=37)


def test_own_ignore_index(strategy, draw, check_against, device):
    """The ignored number may be a piece's own id (0 is [PAD])."""
    inputs = [draw(*s, dtype=torch.float32) for s in ((13, 20), (37, 20), (37,))]
    labels = make_labels(13, 37, device).clamp(min=0)
    check_against(*both(labels, ignore_index=0), inputs, longest_sum=37)


def test_non_contiguous(strategy, draw, check_against, device):
    base = [draw(*s, dtype=torch.float32) for s in ((20, 13), (20, 37), (74,))]
    labels = make_labels(26, 37, device)[::2]
    kernel, reference = both(labels)

    def strided(f):
        return lambda h, w, b: f(h.t(), w.t(), b[::2])

    check_against(strided(kernel), strided(reference), base, longest_sum=37)


def test_without_bias_and_int32_labels(strategy, draw, check_against, device):
    inputs = [draw(13, 20, dtype=torch.float32), draw(37, 20, dtype=torch.float32)]
    kernel, reference = both(make_labels(13, 37, device).int())
    check_against(
        lambda h, w: kernel(h, w, None), lambda h, w: reference(h, w, None), inputs, longest_sum=37
    )


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_only_requested_gradients(wanted, strategy, draw, device, monkeypatch):
    made = []
    original = launch.product_blocks

    def product_blocks(kernel, *arguments, **options):
        made.append(kernel)
        return original(kernel, *arguments, **options)

    monkeypatch.setattr(launch, "product_blocks", product_blocks)
    names = {"hidden": (13, 20), "weight": (37, 20), "bias": (37,)}
    inputs = {n: draw(*s, dtype=torch.float32, requires_grad=n == wanted) for n, s in names.items()}
    labels = make_labels(13, 37, device)
    loss = MF.linear_cross_entropy(
        inputs["hidden"], inputs["weight"], labels, inputs["bias"], backend="triton"
    )
    loss.backward()
    assert {n for n, x in inputs.items() if x.grad is not None} == {wanted}
    if strategy == "materialised":
        # The logits, and the one product that this gradient takes; bias needs none.
        assert made == ["logits", *{"hidden": ["dx"], "weight": ["dweight"], "bias": []}[wanted]]


def test_large_logits_do_not_overflow(strategy, draw, check_against, device):
    """Logits around +-1000: only differences from the maximum may be exponentiated."""
    inputs = [draw(13, 20, dtype=torch.float32), draw(37, 20, dtype=torch.float32)]
    with torch.no_grad():
        inputs[0].mul_(256)  # a power of two: the logits stay exact
    kernel, reference = both(make_labels(13, 37, device))
    check_against(
        lambda h, w: kernel(h, w, None), lambda h, w: reference(h, w, None), inputs, longest_sum=37
    )


def test_confident_rows_keep_their_gradient(draw, device, monkeypatch):
    """p[label] = 1 - 1e-6 in float16: the gradient is a sum of small terms, not 1 - 1."""
    monkeypatch.setattr(launch, "FLASH_WIDTH", 256)
    V, H = 37, 32
    weight = torch.eye(V, H, dtype=torch.float16, device=device)
    labels = torch.arange(5, device=device)
    hidden = (weight[:5] * 17.5).requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    kernel, reference = both(labels, reduction="sum")
    found = torch.autograd.grad(kernel(hidden, weight, None) * 4096, hidden)[0].double()
    truth = torch.autograd.grad(reference(exact, weight.double(), None) * 4096, exact)[0]
    assert truth.abs().max() > 1e-3
    # float16 holds 11 bits; a difference of two rounded probabilities would keep none.
    assert ((found - truth).norm() / truth.norm()) < 2**-7


def test_called_twice_and_retained_graph(strategy, draw, device, assert_rounded):
    inputs = [draw(*s, dtype=torch.float32) for s in ((13, 20), (37, 20), (37,))]
    kernel, _ = both(make_labels(13, 37, device))
    loss = kernel(*inputs)
    first = torch.autograd.grad(loss * 3, inputs, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, inputs)
    again = torch.autograd.grad(kernel(*inputs), inputs)
    for a, b, c, d in zip(first, kept, second, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(c, d)
        assert_rounded(a, 3 * c.double(), longest_sum=37)


def test_label_out_of_range_is_refused(strategy, draw):
    hidden, weight = draw(3, 20, dtype=torch.float32), draw(37, 20, dtype=torch.float32)
    labels = torch.tensor([0, 37, 1], device=hidden.device)
    MF.check_on_gpu(True)
    try:
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 37\).*got 37"):
            MF.linear_cross_entropy(hidden, weight, labels, backend="triton")
    finally:
        MF.check_on_gpu(False)


def test_unchecked_label_out_of_range_is_nan(strategy, draw, device):
    """On a GPU nothing looks at the labels beforehand: the loss says it, nothing reads beyond."""
    from mvbert.kernels import linear_cross_entropy
    from mvbert.kernels.common import LossOptions, Need

    hidden, weight = draw(3, 20, dtype=torch.float32), draw(37, 20, dtype=torch.float32)
    labels = torch.tensor([0, 37, -7], device=device)
    weights, z_loss = torch.ones(37, device=device), torch.zeros((), device=device)
    options = LossOptions(-100, 0.1, weights, 0.0, z_loss, True)
    loss, *_ = linear_cross_entropy.cross_entropy(
        hidden.detach(), weight.detach(), None, labels, options, None, None, Need()
    )
    assert loss.isnan().tolist() == [False, True, True]


def test_mixed(strategy, draw, check_against, device):
    """Both vocabularies, ids at both ends of both, one of them without a row in one batch."""
    V_t, V_s = 37, 21
    labels = torch.randint(0, V_t + V_s, (17,))
    labels[:6] = torch.tensor([0, V_t - 1, V_t, V_t + V_s - 1, -100, V_t])
    inputs = [
        draw(*s, dtype=torch.float32) for s in ((17, 20), (V_t, 20), (V_s, 20), (V_t,), (V_s,))
    ]

    def of(backend, labels):
        return lambda h, wt, ws, bt, bs: MF.mixed_linear_cross_entropy(
            h, wt, ws, labels, bt, bs, backend=backend, label_smoothing=0.1
        )

    for mixed in (labels.to(device), labels.clamp(max=V_t - 1).to(device)):
        check_against(of("triton", mixed), of("reference", mixed), inputs, longest_sum=V_t)
