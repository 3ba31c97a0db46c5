"""The public functions on a CPU: chunked against the definitions, checks, torch.compile."""

import re
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from mvbert import functional as MF
from mvbert import layers
from mvbert.errors import InputError
from mvbert.kernels import chunked, linear_cross_entropy, linear_kl, ops


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of at most 5 rows, so that few rows make several chunks."""
    monkeypatch.setattr(chunked, "chunk_rows", lambda V, itemsize: 5)


def parameters(*shapes, dtype=torch.float64):
    return [torch.randn(s).to(dtype).requires_grad_() for s in shapes]


def labels_of(N, V):
    labels = torch.randint(0, V, (N,))
    labels[2::3] = MF.IGNORE_INDEX
    labels[:2] = torch.tensor([0, V - 1])
    return labels


@pytest.fixture
def same(assert_rounded):
    """same(function, inputs, longest_sum): function(backend, *inputs) and its gradients, chunked
    and by the definition, in float64."""

    def check(function, inputs, longest_sum: int) -> None:
        results = []
        for backend in ("chunked", "reference"):
            outputs = function(backend, *inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            total = sum(
                (o * torch.linspace(0.5, 1.5, o.numel()).view(o.shape)).sum() for o in outputs
            )
            results.append((*outputs, *torch.autograd.grad(total, inputs)))
        for found, truth in zip(*results, strict=True):
            assert_rounded(found, truth, longest_sum)

    return check


# ---- losses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("return_lse", [False, True])
def test_linear_cross_entropy(reduction, label_smoothing, return_lse, small_chunks, same):
    labels = labels_of(13, 37)
    options = {"reduction": reduction, "label_smoothing": label_smoothing, "return_lse": return_lse}
    same(
        lambda be, h, w, b: MF.linear_cross_entropy(h, w, labels, b, backend=be, **options),
        parameters((13, 20), (37, 20), (37,)),
        longest_sum=37,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_definition_is_torchs(reduction, label_smoothing):
    hidden, weight, bias = parameters((13, 20), (37, 20), (37,))
    labels = labels_of(13, 37)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    torch.testing.assert_close(
        MF.linear_cross_entropy(hidden, weight, labels, bias, backend="reference", **options),
        F.cross_entropy(hidden @ weight.T + bias, labels, **options),
    )


WEIGHTS = torch.linspace(0, 2, 37).double()
OPTIONS = {
    "softcap": {"softcap": 3.0},
    "z-loss": {"z_loss": 0.1},
    "weights": {"class_weight": WEIGHTS},
    "weights below 0": {"class_weight": WEIGHTS - WEIGHTS.mean()},
    "weights and z-loss": {"class_weight": WEIGHTS, "z_loss": 0.1},
    "all": {"class_weight": WEIGHTS, "z_loss": 0.1, "softcap": 3.0, "label_smoothing": 0.1},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@each_option
def test_options(options, reduction, return_lse, small_chunks, same):
    labels = labels_of(13, 37)
    same(
        lambda be, h, w, b: MF.linear_cross_entropy(
            h, w, labels, b, reduction=reduction, return_lse=return_lse, backend=be, **options
        ),
        parameters((13, 20), (37, 20), (37,)),
        longest_sum=37,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@each_option
def test_the_definition_of_options_is_torchs(options, reduction):
    hidden, weight, bias = parameters((13, 20), (37, 20), (37,))
    labels = labels_of(13, 37)
    logits = hidden @ weight.T + bias
    if cap := options.get("softcap"):
        logits = cap * torch.tanh(logits / cap)
    expected = F.cross_entropy(
        logits, labels, options.get("class_weight"), reduction=reduction,
        label_smoothing=options.get("label_smoothing", 0.0),
    )  # fmt: skip
    squares = logits.logsumexp(1).square().where(labels >= 0, 0) * options.get("z_loss", 0)
    expected = expected + {
        "mean": squares.sum() / (labels >= 0).sum(), "sum": squares.sum(), "none": squares,
    }[reduction]  # fmt: skip
    for backend in ("reference", "chunked"):
        found = MF.linear_cross_entropy(
            hidden, weight, labels, bias, reduction=reduction, backend=backend, **options
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_rows_of_texts(shift, backend):
    """[B, T, H] is [B T, H]; a shifted label is the one further right of the same text."""
    hidden, weight, bias = parameters((3, 5, 20), (37, 20), (37,))
    labels = labels_of(15, 37).view(3, 5)
    logits = (hidden @ weight.T + bias)[:, : 5 - shift].flatten(0, 1)
    target = labels[:, shift:].flatten()
    for reduction in ("mean", "none"):
        found, metrics = MF.linear_cross_entropy(
            hidden, weight, labels, bias, shift=shift, reduction=reduction, backend=backend,
            return_metrics=True,
        )  # fmt: skip
        expected = F.cross_entropy(logits, target, reduction=reduction)
        if reduction == "none":
            expected = expected.view(3, 5 - shift)
        torch.testing.assert_close(found, expected)
        largest = logits.argmax(1).where(target >= 0, -1)
        assert torch.equal(metrics.predicted, largest.view(3, 5 - shift))
        assert torch.equal(metrics.correct, (largest == target).view(3, 5 - shift))
        lse = logits.logsumexp(1).where(target >= 0, 0).view(3, 5 - shift)
        torch.testing.assert_close(metrics.lse, lse)
        assert not metrics.lse.requires_grad
        for x in (hidden, weight):
            torch.testing.assert_close(
                torch.autograd.grad(found.sum(), x, retain_graph=True)[0],
                torch.autograd.grad(expected.sum(), x, retain_graph=True)[0],
            )


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("count", [5, 2.5, torch.tensor(7), torch.tensor([7])])
def test_num_items_in_batch(count, backend):
    """The count divides sums, whatever the weights: accumulated losses add up to one batch's."""
    hidden, weight = parameters((13, 20), (37, 20))
    labels = labels_of(13, 37)
    for options in ({}, OPTIONS["all"]):
        found, total = (
            MF.linear_cross_entropy(hidden, weight, labels, backend=backend, **options | given)
            for given in ({"num_items_in_batch": count}, {"reduction": "sum"})
        )
        torch.testing.assert_close(found, total / float(count))
        torch.testing.assert_close(
            torch.autograd.grad(found, weight)[0],
            torch.autograd.grad(total, weight)[0] / float(count),
        )


def test_the_gradient_of_a_saturated_logit_is_the_definitions(assert_rounded):
    """Logits of up to ten times the cap, in float32."""
    hidden, weight = parameters((13, 20), (37, 20), dtype=torch.float32)
    labels = labels_of(13, 37)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    results = []
    for h, w, backend in ((hidden, weight, "chunked"), (*exact, "reference")):
        loss = MF.linear_cross_entropy(h, w, labels, softcap=1.0, backend=backend)
        results.append((loss, *torch.autograd.grad(loss, (h, w))))
    for found, truth in zip(*results, strict=True):
        assert_rounded(found, truth, longest_sum=37)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("way", ["torch.func", "forward_ad"])
@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_forward_mode_is_refused(backend, way):
    """Rather than a tangent that misses what goes through an operator; the definitions have one."""
    h, w, t, v = (x.detach() for x in parameters((6, 12), (7, 12), (6, 12), (12,)))
    ids, labels = torch.tensor([[0, 6, 3]]), torch.arange(6)
    calls = {
        "linear_cross_entropy": lambda be, x: MF.linear_cross_entropy(x, w, labels, backend=be),
        "mixed_linear_cross_entropy": lambda be, x: MF.mixed_linear_cross_entropy(
            x, w, w, labels, backend=be
        )[0],
        "linear_kl": lambda be, x: MF.linear_kl(x, w, None, t, w, None, backend=be),
        "relation_kl": lambda be, x: MF.relation_kl(x[None], t[None], 2, backend=be),
        "mixed_embedding": lambda be, x: MF.mixed_embedding(
            ids % 6, x, None, None, None, None, v, v, backend=be
        ),
        "residual_layer_norm": lambda be, x: MF.residual_layer_norm(x, t, v, v, backend=be),
    }
    for name, call in calls.items():

        def tangent(be, call=call):
            if way == "torch.func":
                return torch.func.jvp(lambda x: call(be, x), (h,), (t,))[1]
            with torch.autograd.forward_ad.dual_level():
                output = call(be, torch.autograd.forward_ad.make_dual(h, t))
                return torch.autograd.forward_ad.unpack_dual(output).tangent

        eps = 1e-6
        expected = (call("reference", h + eps * t) - call("reference", h - eps * t)) / (2 * eps)
        torch.testing.assert_close(tangent("reference"), expected, rtol=1e-5, atol=1e-7)
        if (name, backend) == ("residual_layer_norm", "chunked"):
            # No operator: plain PyTorch.
            torch.testing.assert_close(tangent(backend), expected, rtol=1e-5, atol=1e-7)
            continue
        with pytest.raises(NotImplementedError, match=f"{name} has no forward-mode derivative"):
            tangent(backend)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mixed_linear_cross_entropy(reduction, small_chunks, same):
    labels = torch.randint(0, 58, (17,))
    labels[:6] = torch.tensor([0, 36, 37, 57, -100, 37])
    same(
        lambda be, h, wt, ws, bt, bs: MF.mixed_linear_cross_entropy(
            h, wt, ws, labels, bt, bs, reduction=reduction, backend=be
        ),
        parameters((17, 20), (37, 20), (21, 20), (37,), (21,)),
        longest_sum=37,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_kl(reduction, small_chunks, same):
    teacher = [torch.randn(s, dtype=torch.float64) for s in ((13, 12), (37, 12), (37,))]
    mask = torch.arange(13) % 3 != 1
    same(
        lambda be, h, w, b: MF.linear_kl(
            h, w, b, *teacher, temperature=2.5, mask=mask, reduction=reduction, backend=be
        ),
        parameters((13, 20), (37, 20), (37,)),
        longest_sum=37,
    )


@pytest.mark.parametrize("upstream", ["equal", "different", "one row"])
def test_rows_take_any_upstream_gradient(upstream, monkeypatch, same):
    """Equal ones scale what forward made; others compute the logits again. Both are exact."""
    hidden, weight, bias = parameters((13, 20), (37, 20), (37,))
    labels = labels_of(13, 37)
    weights = {
        "equal": torch.full((13,), 0.3),
        "different": torch.linspace(0, 1, 13),
        "one row": F.one_hot(torch.tensor(1), 13),
    }[upstream].double()
    passes = []
    original = chunked.LinearChunks.logits
    monkeypatch.setattr(
        chunked.LinearChunks, "logits", lambda self, at: passes.append(1) or original(self, at)
    )
    same(
        lambda be, h, w, b: (
            MF.linear_cross_entropy(h, w, labels, b, reduction="none", backend=be) * weights
        ).sum(),
        (hidden, weight, bias),
        longest_sum=37,
    )
    assert len(passes) == (1 if upstream == "equal" else 2)


@pytest.mark.parametrize("N", [0, 5])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_labels_at_all(N, reduction):
    inputs = parameters((N, 20), (37, 20), (37,))
    labels = torch.full((N,), MF.IGNORE_INDEX)
    loss = MF.linear_cross_entropy(inputs[0], inputs[1], labels, inputs[2], reduction=reduction)
    assert (loss == 0).all()
    for gradient in torch.autograd.grad(loss.sum(), inputs):
        assert (gradient == 0).all()


def test_never_holds_the_logits(monkeypatch):
    """No buffer of N x V: the largest are one chunk, and two blocks of its rows in float32."""
    largest = []
    original = torch.Tensor.new_empty

    def new_empty(self, *shape, **options):
        made = original(self, *shape, **options)
        largest.append(made.numel())
        return made

    N, V = 500, 600
    monkeypatch.setattr(chunked, "chunk_rows", lambda V, itemsize: 64)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    inputs = parameters((N, 20), (V, 20), dtype=torch.float32)
    MF.linear_cross_entropy(*inputs, torch.randint(0, V, (N,))).backward()
    assert max(largest) == 2 * 64 * V


@pytest.mark.parametrize("rows", [1024, 32], ids=["one chunk", "several"])
def test_bfloat16_autocast_rounds_what_it_must(rows, monkeypatch, assert_rounded):
    monkeypatch.setattr(chunked, "chunk_rows", lambda V, itemsize: rows)
    N, H, V = 300, 64, 503
    # Numbers that bfloat16 holds; logits of about 1.
    inputs = parameters((N, H), (V, H), (V,), dtype=torch.bfloat16)
    inputs = [x.detach().float().requires_grad_() for x in inputs]
    with torch.no_grad():
        inputs[1] /= 8
    labels = labels_of(N, V)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = MF.linear_cross_entropy(exact[0], exact[1], labels, exact[2], backend="reference")
    h, w, b = inputs
    with torch.autocast("cpu", torch.bfloat16):
        loss = MF.linear_cross_entropy(h, w, labels, b)
    found = torch.autograd.grad(loss, inputs)
    assert [g.dtype for g in found] == [torch.float32] * 3
    for ours, right in zip(
        (loss, *found), (truth, *torch.autograd.grad(truth, exact)), strict=True
    ):
        assert_rounded(ours, right, longest_sum=V, dtype=torch.bfloat16)


@pytest.mark.parametrize("rows", [1024, 32], ids=["one chunk", "several"])
def test_memory_between_the_rows_of_logits_does_not_count(rows, monkeypatch):
    """Some processors' products read it, times zero, and zero times NaN is NaN."""
    monkeypatch.setattr(chunked, "chunk_rows", lambda V, itemsize: rows)
    N, H, V = 300, 64, 503
    hidden, weight = (x.detach() for x in parameters((N, H), (V, H), dtype=torch.bfloat16))
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        chunks = chunked.LinearChunks(
            hidden, weight, None, torch.arange(N), chunked.Need(True, True, False)
        )
        assert chunks.buffer.shape[1] > V
        assert not chunks.buffer[:, V:].any()
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        MF.linear_cross_entropy(*inputs, labels_of(N, V)).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.grad.isfinite().all() for x in inputs)


@pytest.mark.parametrize("apart", [1.0, 2.0**-4, 2.0**-8])
def test_a_divergence_of_near_models_has_the_error_of_its_terms(
    apart, share_of_bound, assert_rounded
):
    """Its value is far smaller than the logits, and than their log-sum-exp of about 8,000."""
    # In steps that keep the logits exact in float32.
    hidden = (torch.randn(200, 16) * 64).round() / 256
    near = hidden + apart * torch.randint(-1, 2, hidden.shape)
    weight = (torch.randn(64, 16) * 4).round() / 4
    bias = 8000 + (torch.randn(64) * 4).round() / 4
    tau = 2.0

    def of(dtype, backend):
        h, *given = (x.to(dtype) for x in (hidden, weight, bias, near, weight, bias))
        loss = MF.linear_kl(
            h.requires_grad_(), *given, temperature=tau, reduction="none", backend=backend
        )
        return loss.detach(), torch.autograd.grad(loss.sum(), h)[0]

    truth = of(torch.float64, "reference")
    # The terms: probabilities, times tau^2 and, in a gradient, times weights and tau.
    norms = [max(tau**2, truth[0].max().item()), tau * weight.abs().max().item()]
    for found, right, norm in zip(of(torch.float32, "chunked"), truth, norms, strict=True):
        assert_rounded(found, right, longest_sum=64, norm=norm)

    def rounded_lse(z):
        return z - z.logsumexp(1, keepdim=True)

    log_p, log_q = (rounded_lse((h @ weight.T + bias) / tau) for h in (hidden, near))
    mutant = tau**2 * (log_q.exp() * (log_q - log_p)).sum(1)
    assert share_of_bound(mutant, truth[0], 64, norm=norms[0]) > 10


def test_no_second_derivative_in_silence():
    hidden, weight = parameters((5, 20), (37, 20))
    loss = MF.linear_cross_entropy(hidden, weight, torch.arange(5))
    gradient = torch.autograd.grad(loss, hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(gradient.square().sum(), weight)


# ---- embeddings --------------------------------------------------------------------------------


@pytest.mark.parametrize("tables", ["both", "teacher", "student", "frozen teacher"])
@pytest.mark.parametrize("padding_id", [None, 3, -4])
@pytest.mark.parametrize("positions", [False, True])
def test_mixed_embedding(padding_id, positions, tables, monkeypatch, same):
    monkeypatch.setattr(chunked, "LARGE_BYTES", 0 if positions else 1 << 20)
    teacher, student = parameters((11, 20), (5, 20))
    V = {"teacher": 11, "student": 5}.get(tables, 16)
    ids = torch.randint(0, V, (7, 3)).t()
    ids[0, :4] = torch.tensor([0, 3, V - 4, V - 1])
    kinds = torch.randint(0, 2, (3, 7))
    options = {"padding_id": padding_id if padding_id is None else padding_id % V}
    if positions:
        options["position_ids"] = torch.randint(0, 9, (3, 7))
    known = {"teacher": [teacher, None], "student": [None, student]}.get(
        tables, [teacher.detach(), student]
    )
    wanted = [teacher, student] if tables == "both" else [t for t in known if t is not None][-1:]

    def embed(backend, *inputs):
        given = list(inputs[: len(wanted)]) if tables == "both" else known
        return MF.mixed_embedding(
            ids, *given, *inputs[len(wanted) : -2], kinds, *inputs[-2:], backend=backend, **options
        )

    same(embed, [*wanted, *parameters((9, 20), (2, 20), (20,), (20,))], longest_sum=21)


def test_gradients_of_tables_have_their_dtypes(monkeypatch, assert_rounded):
    """A table in float32 and rows that autocast made in bfloat16: summed in float32."""
    monkeypatch.setattr(chunked, "LARGE_BYTES", 0)
    (teacher,), (student,) = parameters((11, 20), dtype=torch.float32), parameters((5, 20))
    student = student.detach().bfloat16().requires_grad_()
    ids, one = torch.tensor([[0, 11, 11, 15], [11, 3, 12, 15]]), torch.ones(20)
    out = MF.mixed_embedding(ids, teacher, student, None, None, None, one, one)
    wide = [t.detach().double().requires_grad_() for t in (teacher, student)]
    true = MF.mixed_embedding(
        ids, *wide, None, None, None, one.double(), one.double(), backend="reference"
    )
    upstream = torch.randn_like(out)
    found = torch.autograd.grad(out, (teacher, student), upstream)
    expected = torch.autograd.grad(true, wide, upstream.double())
    assert out.dtype == torch.float32
    assert_rounded(out, true, longest_sum=20)
    for a, b, table in zip(found, expected, (teacher, student), strict=True):
        assert a.dtype == table.dtype
        assert_rounded(a, b, longest_sum=20)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_large_zeros(dtype, monkeypatch):
    monkeypatch.setattr(chunked, "LARGE_BYTES", 1)
    for shape in ((3, 5), (0, 5), (1, 1)):
        found = chunked.zeros(torch.ones(2, dtype=dtype), *shape)
        assert found.dtype == dtype
        assert torch.equal(found, torch.zeros(shape, dtype=dtype))


def test_projected_rows_are_the_projected_table():
    table, weight, bias, teacher = parameters((5, 4), (20, 4), (20,), (11, 20))
    ids = torch.tensor([[0, 10, 11, 15], [11, 3, 12, 15]])
    one = torch.ones(20, dtype=torch.float64)

    def embed(rows, ids):
        return MF.mixed_embedding(ids, teacher, rows, None, None, None, one, one)

    whole = embed(MF.project_table(table, weight, bias), ids)
    few = embed(*MF.project_rows(ids, table, weight, bias, teacher_size=11))
    torch.testing.assert_close(few, whole)
    inputs = (table, weight, bias, teacher)
    upstream = torch.randn_like(whole)
    for a, b in zip(
        torch.autograd.grad(few, inputs, upstream),
        torch.autograd.grad(whole, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


# ---- modules, torch.compile --------------------------------------------------------------------


def test_the_examples_of_the_losses_page_run(root):
    page = (root / "docs" / "losses.md").read_text(encoding="utf-8")
    labels = labels_of(5, 4928)
    hidden, weight, bias = parameters((5, 256), (4928, 256), (4928,), dtype=torch.float32)
    names = {"hidden": hidden, "weight": weight, "bias": bias, "labels": labels}
    names["input_ids"] = torch.tensor([[0, 30521, 30522, 35449]])
    function, metrics, module, embedding = re.findall(
        r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE
    )
    logits = F.linear(hidden, weight, bias)
    exec(function, names)
    torch.testing.assert_close(names["loss"], F.cross_entropy(logits, labels))
    assert weight.grad.any()
    exec(metrics, names)
    assert names["accuracy"] == (logits.argmax(1) == labels).sum() / (labels >= 0).sum()
    exec(module, names)
    kept = labels >= 0
    z_loss = 1e-4 * names["logits"].logsumexp(1)[kept].square().mean()
    torch.testing.assert_close(names["loss"], F.cross_entropy(names["logits"], labels) + z_loss)
    torch.testing.assert_close(
        names["smoothed"], F.cross_entropy(logits, labels, label_smoothing=0.1)
    )
    exec(embedding, names)
    assert names["states"].shape == (1, 4, 768)


def test_the_calls_of_others_are_ours():
    """Rows of the page's table whose right side is more than other names."""
    x, w = parameters((2, 7, 12), (11, 12))
    labels = labels_of(14, 11).view(2, 7)
    logits = x @ w.T
    loss_utils = pytest.importorskip("transformers.loss.loss_utils", reason="needs transformers")
    lce = MF.linear_cross_entropy
    for count in (None, 5):
        torch.testing.assert_close(
            lce(x, w, labels, shift=1, num_items_in_batch=count).float(),
            loss_utils.ForCausalLMLoss(logits, labels, 11, num_items_in_batch=count),
        )
    torch.testing.assert_close(
        lce(x, w, labels).float(), loss_utils.ForMaskedLMLoss(logits, labels, 11)
    )
    kept = labels != -100
    loss, metrics = lce(x, w, labels, z_loss=0.1, return_metrics=True)
    torch.testing.assert_close(loss - lce(x, w, labels), 0.1 * metrics.lse[kept].square().mean())
    rows = lce(x, w, labels, reduction="none")
    own = logits.detach().softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    expected = F.cross_entropy(logits.mT, labels, reduction="none") * own
    found = (rows * (-rows.detach()).exp()).sum()
    torch.testing.assert_close(found, expected.sum())
    torch.testing.assert_close(
        torch.autograd.grad(found, w)[0], torch.autograd.grad(expected.sum(), w)[0]
    )


def test_modules_alone():
    embedding = layers.MixedEmbedding(11, 5, 4, 20, max_positions=9, dropout=0.0).double()
    ids = torch.randint(0, 16, (2, 7))  # 14 pieces, 5 rows: the table is projected
    few = torch.tensor([[0, 15, 11]])  # 3 pieces: only they are
    for one in (ids, few):
        torch.testing.assert_close(embedding(one), embedding(one, None, embedding.student_rows()))
    hidden, labels = embedding(ids), torch.randint(0, 37, (2, 7))
    for softcap in (None, 2.0):
        options = {"reduction": "none", "softcap": softcap, "class_weight": WEIGHTS}
        head = layers.LinearCrossEntropy(20, 37, **options).double()
        logits = head(hidden).flatten(0, 1)
        expected = F.cross_entropy(logits, labels.flatten(), WEIGHTS, reduction="none")
        torch.testing.assert_close(head(hidden, labels).flatten(), expected)
        loss = layers.LinearCrossEntropyLoss(**options, return_metrics=True)
        found, metrics = loss(hidden, head.weight, labels, head.bias)
        torch.testing.assert_close(found.flatten(), expected)
        assert torch.equal(metrics.predicted.flatten(), logits.argmax(1))
        assert sorted(head.state_dict()) == ["bias", "loss.class_weight", "weight"]
    mean = layers.LinearCrossEntropyLoss()
    total = F.cross_entropy(F.linear(hidden, head.weight).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(
        mean(hidden, head.weight, labels, num_items_in_batch=7), total * 14 / 7
    )


def test_compiles_into_one_graph():
    """A whole mixed step, forward and backward, without a graph break."""
    inputs = parameters((11, 20), (5, 4), (20, 4), (20,), (20,), (20,))
    ids, labels = torch.randint(0, 16, (3, 7)), torch.randint(0, 16, (21,))
    labels[::4] = MF.IGNORE_INDEX

    def step(teacher, table, weight, bias, ln_weight, ln_bias):
        rows = MF.project_table(table, weight, bias)
        hidden = MF.mixed_embedding(ids, teacher, rows, None, None, None, ln_weight, ln_bias)
        hidden = hidden.flatten(0, 1)
        loss = sum(MF.mixed_linear_cross_entropy(hidden, teacher, rows, labels))
        loss = (
            loss
            + MF.linear_cross_entropy(hidden, teacher, labels.clamp(max=10), reduction="none").sum()
        )
        return loss + MF.linear_kl(hidden, teacher, None, hidden + 1, teacher, None)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, found = step(*inputs), compiled(*inputs)
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_a_gpu_is_asked_nothing_that_waits_or_cannot_be_compiled(monkeypatch):
    class OnGpu:
        is_cuda = True

        def numel(self):
            return 1

    def never(*_):
        raise AssertionError("asked")

    monkeypatch.setattr("importlib.util.find_spec", never)
    assert MF._backend("auto", OnGpu()) in ("triton", "chunked")
    ops.check_range("labels", OnGpu(), 3)  # it has no comparison to make


WITHOUT_TRITON = """
import importlib.util, sys
sys.modules["triton"] = None
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else found(name, *rest)
import torch
from mvbert import functional, layers
hidden, labels = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 6, -100])
functional.linear_cross_entropy(hidden, torch.randn(7, 5), labels).backward()
layers.MixedEmbedding(6, 3, 4, 8)(torch.tensor([[0, 8]])).sum().backward()
assert hidden.grad.any()
try:
    functional.linear_cross_entropy(hidden, torch.randn(7, 5), labels, backend="triton")
except ValueError as error:
    print(error)
"""


def test_without_triton_all_but_its_backend_works():
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_TRITON], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "backend 'triton' needs Triton, which is not installed\n"


def test_operators_are_well_formed():
    """Schema, fake kernels and autograd registration, by torch's own checker."""
    hidden, weight, bias = parameters((5, 8), (11, 8), (11,), dtype=torch.float32)
    labels, scale = torch.tensor([0, 10, -100, 3, 4]), torch.tensor(0.25)
    need, tests = (
        [True, True, True],
        ("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    options = (torch.rand(11), torch.tensor(0.1), -100, 0.1, 3.0, True)
    torch.library.opcheck(
        linear_cross_entropy.linear_cross_entropy_sum,
        (hidden, weight, bias, labels, scale, *options, need, "chunked", False),
        test_utils=tests,
    )
    torch.library.opcheck(
        linear_cross_entropy.linear_cross_entropy_rows,
        (hidden, weight, bias, labels, *options, need, "chunked"),
        test_utils=tests,
    )
    teacher, teacher_weight = torch.randn(5, 6), torch.randn(11, 6)
    mask = labels >= 0
    dense = (hidden, weight, bias, teacher, teacher_weight, None, mask)
    torch.library.opcheck(
        linear_kl.linear_kl_sum, (*dense, scale, 2.0, need, "chunked"), test_utils=tests
    )
    torch.library.opcheck(linear_kl.linear_kl_rows, (*dense, 2.0, "chunked"), test_utils=tests)


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "x"}, "reduction must be one of mean, sum, none, got 'x'"),
        ({"label_smoothing": 1.0}, "label_smoothing must lie in"),
        ({"softcap": -1}, "softcap must be above 0, or None for no cap, got -1"),
        ({"z_loss": -1.0}, "z_loss must be 0 or more"),
        ({"shift": -1}, "shift must be a whole number of 0 or more, got -1"),
        ({"class_weight": [1.0] * 20}, "class_weight .* got list"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_modules_refuse_options_when_they_are_made(options, message):
    with pytest.raises(InputError, match=message):
        layers.LinearCrossEntropyLoss(**options)
    with pytest.raises(InputError, match=message):
        layers.LinearCrossEntropy(8, 20, **options)


def test_a_layer_refuses_weights_of_other_classes():
    with pytest.raises(InputError, match=r"with V = 20, got \[3\] torch.float32"):
        layers.LinearCrossEntropy(8, 20, class_weight=torch.ones(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden": torch.randn(4, 3)},
            r"\[.., H\] and a weight \[V, H\] of one H, got \[4, 3\] and",
        ),
        (
            {"labels": torch.zeros(3, dtype=torch.long)},
            r"labels \[..\] like hidden \[.., H\], here \[4\], got \[3\]",
        ),
        ({"labels": torch.zeros(4)}, "labels of int32 or int64, got torch.float32"),
        ({"labels": torch.tensor([0, 1, 7, 2])}, r"labels must lie in \[0, 7\) or be -100, got 7"),
        (
            {"labels": torch.tensor([0, -1, 6, 2])},
            r"labels must lie in \[0, 7\) or be -100, got -1",
        ),
        ({"bias": torch.randn(6)}, r"bias \[V\] with V = 7, got \[6\]"),
        ({"weight": torch.randn(7, 5).half()}, "dtype torch.float32 or float32, got torch.float16"),
        ({"hidden": torch.ones(4, 5, dtype=torch.long)}, "floating-point input, got torch.int64"),
        (
            {"class_weight": torch.ones(6)},
            r"class_weight \[V\] of floating point with V = 7, got \[6\] torch.float32",
        ),
        ({"class_weight": torch.ones(7, dtype=torch.int64)}, r"got \[7\] torch.int64"),
        ({"class_weight": torch.ones(7, requires_grad=True)}, "no gradient of class_weight"),
        ({"class_weight": [1.0] * 7}, "class_weight .* as a tensor of floating point, got list"),
        ({"hidden": [1.0]}, "linear_cross_entropy needs its input as a tensor, got list"),
        ({"labels": [1]}, "linear_cross_entropy needs labels as a tensor, got list"),
        ({"bias": [1.0] * 7}, "linear_cross_entropy needs its bias as a tensor, got list"),
        ({"softcap": "30"}, "softcap must be above 0, or None for no cap, got '30'"),
        ({"z_loss": "1"}, "z_loss must be 0 or more, got '1'"),
        ({"label_smoothing": "1"}, r"label_smoothing must lie in \[0, 1\), got '1'"),
        ({"num_items_in_batch": "3"}, "num_items_in_batch must be above 0, got '3'"),
        ({"softcap": 0.0}, "softcap must be above 0, or None for no cap, got 0.0"),
        ({"softcap": float("nan")}, "softcap must be above 0, or None for no cap, got nan"),
        ({"z_loss": -0.1}, "z_loss must be 0 or more, got -0.1"),
        ({"shift": 1}, r"shift needs labels \[.., T\], a row for each text, got \[4\]"),
        (
            {"shift": 2, "hidden": torch.randn(2, 2, 5), "labels": torch.zeros(2, 2).long()},
            r"shift must be a whole number in \[0, T\) with T = 2, got 2",
        ),
        (
            {"shift": -1, "hidden": torch.randn(2, 2, 5), "labels": torch.zeros(2, 2).long()},
            r"shift must be a whole number in \[0, T\) with T = 2, got -1",
        ),
        (
            {"num_items_in_batch": 3, "reduction": "sum"},
            "num_items_in_batch is what 'mean' divides by; leave it out of 'sum'",
        ),
        ({"num_items_in_batch": 0}, "num_items_in_batch must be above 0, got 0"),
        ({"num_items_in_batch": torch.ones(2)}, r"must be one number, got \[2\]"),
        ({"return_lse": True, "return_metrics": True}, "leave out return_lse"),
        ({"reduction": "average"}, "reduction must be one of mean, sum, none, got 'average'"),
        ({"label_smoothing": 1.5}, r"label_smoothing must lie in \[0, 1\), got 1.5"),
        (
            {"backend": "cuda"},
            "backend must be one of auto, triton, chunked, reference, got 'cuda'",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_loss_arguments(change, message):
    arguments = {
        "hidden": torch.randn(4, 5), "weight": torch.randn(7, 5),
        "labels": torch.tensor([0, 1, 6, -100]), "bias": torch.randn(7),
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        MF.linear_cross_entropy(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(4, dtype=torch.long)}, r"input_ids \[B, T\], got \[4\]"),
        ({"input_ids": torch.tensor([[0, 9]])}, r"input_ids must lie in \[0, 9\), got 9"),
        ({"input_ids": torch.tensor([[0, -1]])}, r"input_ids must lie in \[0, 9\), got -1"),
        ({"student_rows": torch.randn(3, 4)}, r"student_rows \[V_s, H\] with H = 5, got \[3, 4\]"),
        ({"teacher_table": None, "student_rows": None}, "or both"),
        ({"position_table": torch.randn(1, 5)}, "has 1 positions, too few for rows of T = 2"),
        ({"token_type_ids": torch.tensor([[0, 2]])}, r"token_type_ids must lie in \[0, 2\), got 2"),
        ({"token_type_ids": torch.tensor([0, 1])}, r"token_type_ids \[B, T\] like input_ids"),
        ({"ln_weight": torch.ones(4)}, r"ln_weight \[H\] with H = 5, got \[4\]"),
        ({"padding_id": 9}, r"padding_id must lie in \[0, 9\), got 9"),
        ({"dropout_p": 1.0}, r"dropout_p must lie in \[0, 1\), got 1.0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_embedding_arguments(change, message):
    arguments = {
        "input_ids": torch.tensor([[0, 8]]), "teacher_table": torch.randn(6, 5),
        "student_rows": torch.randn(3, 5), "position_table": torch.randn(4, 5),
        "type_table": torch.randn(2, 5), "token_type_ids": torch.tensor([[0, 1]]),
        "ln_weight": torch.ones(5), "ln_bias": torch.ones(5),
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        MF.mixed_embedding(**arguments)


# ---- dropout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_zeroes_with_its_probability_and_keeps_the_mean(p, dtype):
    torch.manual_seed(int(10 * p))
    x = torch.ones(101, 10_007, dtype=dtype, requires_grad=True)  # not a multiple of four
    y = MF.dropout(x, p)
    y.backward(torch.full_like(y, 3.0))
    assert torch.equal(x.grad, 3 * y.detach())  # the same elements, in both directions
    assert y.dtype == dtype
    assert y.unique().numel() == 2
    assert y.max().item() == pytest.approx(
        1 / (1 - p), rel=2e-4 if dtype == torch.float32 else 4e-3
    )
    zeroed = (y == 0).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(zeroed.mean().item() - p) < 5 * deviation / zeroed.numel() ** 0.5 + 2**-17
    # No element knows of its neighbours, nor a row of the next: 4 elements are of one number.
    for shift in (1, 2, 3, 4, 10_007):
        flat = (zeroed.flatten() - p) / deviation
        assert abs((flat[shift:] * flat[:-shift]).mean().item()) < 5 / flat.numel() ** 0.5


def test_dropout_is_drawn_by_torchs_seed_and_only_in_training():
    x = torch.randn(3, 4, 5)[:, ::2].transpose(0, 1)  # not contiguous
    drawn = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        drawn.append(MF.dropout(x, 0.5))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[0], x * (2 * (drawn[0] != 0)))
    assert MF.dropout(x, 0.5, training=False) is x
    assert MF.dropout(x, 0.0) is x
    assert MF.dropout(torch.empty(0, 5), 0.5).shape == (0, 5)
    assert MF.dropout(x, 1 - 2**-20).isfinite().all()
    for p in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"p must lie in \[0, 1\), got {p}"):
            MF.dropout(x, p)


def test_compiled_dropout_is_one_graph_and_draws_what_eager_does():
    compiled = torch.compile(lambda x: MF.dropout(x, 0.3) * 2, fullgraph=True, backend="aot_eager")
    x, gradients = torch.randn(6, 7, requires_grad=True), []
    for run in (compiled, lambda x: MF.dropout(x, 0.3) * 2):
        torch.manual_seed(1)
        gradients += torch.autograd.grad(run(x).sum(), x)
    assert torch.equal(*gradients)
    assert (gradients[0] == 0).any()
