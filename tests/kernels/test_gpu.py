"""What only a CUDA device shows: real shapes in every dtype, CUDA graphs, streams, no waiting.

The other tests of this folder run on the device too, where there is one.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from mvbert import functional as MF
from mvbert.kernels import launch
from mvbert.kernels.common import pitch

pytestmark = pytest.mark.gpu

ALL = [torch.bfloat16, torch.float16, torch.float32]


def small(draw, *shapes, dtype=torch.bfloat16):
    """Inputs for real widths: logits of the size a trained model has."""
    tensors = [draw(*shape, dtype=dtype) for shape in shapes]
    with torch.no_grad():
        tensors[1].mul_(0.0625)
    return tensors


def labels_of(N, V):
    labels = torch.randint(0, V, (N,))
    labels[2::7] = MF.IGNORE_INDEX
    labels[:2] = torch.tensor([0, V - 1])
    return labels.cuda()


def cross_entropy(labels, backend, **options):
    return lambda h, w, b: MF.linear_cross_entropy(h, w, labels, b, backend=backend, **options)


# ---- real shapes -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize(
    ("H", "V"), [(256, 4928), (1024, 4928), (384, 30522), (768, 30522), (1024, 30522)]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropy(H, V, reduction, dtype, draw, check_against):
    labels = labels_of(1229, V)
    inputs = small(draw, (1229, H), (V, H), (V,), dtype=dtype)
    check_against(
        cross_entropy(labels, "triton", reduction=reduction),
        cross_entropy(labels, "reference", reduction=reduction),
        inputs,
        longest_sum=V,
    )


@pytest.mark.parametrize("chunk", [512, 8192])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("H", "V"), [(1024, 4928), (768, 30522)])
def test_products_of_the_library(H, V, weights, chunk, draw, check_against, monkeypatch):
    """The library's products, alone and added in float32, into either dtype of the weight."""
    monkeypatch.setattr(launch, "CHUNK_ROWS", chunk)
    labels = labels_of(1229, V)
    h, w, b = small(draw, (1229, H), (V, H), (V,))
    w = w.detach().to(weights).requires_grad_()
    check_against(
        cross_entropy(labels, "triton", mostly_labelled=True),
        cross_entropy(labels, "reference"),
        [h, w, b],
        longest_sum=V,
    )


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_divergences(dtype, draw, check_against):
    N, H, H_t, V = 600, 256, 1024, 4928
    inputs = small(draw, (N, H), (V, H), (V,), dtype=dtype)
    teacher = [x.detach() for x in small(draw, (N, H_t), (V, H_t), (V,))]
    mask = labels_of(N, V) >= 0

    def of(backend):
        return lambda h, w, b: MF.linear_kl(
            h, w, b, *(t.to(h.dtype) for t in teacher), temperature=2.0, mask=mask, backend=backend
        )

    check_against(of("triton"), of("reference"), inputs, longest_sum=V)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize(("T", "H_t", "R"), [(128, 1024, 32), (100, 384, 32), (512, 768, 4)])
def test_relations(T, H_t, R, dtype, draw, check_against):
    teacher = draw(6, T, 3 * H_t, dtype=torch.bfloat16, requires_grad=False)

    def of(backend):
        return lambda x: MF.relation_kl(x, teacher.to(x.dtype), R, backend=backend)

    student = draw(6, T, 3 * 256, dtype=dtype)
    check_against(of("triton"), of("reference"), [student], longest_sum=max(T, 256 // R, H_t // R))


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("H", [256, 768, 1024])
@pytest.mark.parametrize("deterministic", [False, True])
def test_mixed_embedding(H, deterministic, dtype, draw, check_against):
    V_t, V_s, B, T = 30522, 4928, 32, 128
    ids = torch.randint(0, V_t + V_s, (B, T), device="cuda", dtype=torch.int32)
    ids[torch.rand(B, T, device="cuda") < 0.12] = 103
    kinds = torch.randint(0, 2, (B, T), device="cuda", dtype=torch.uint8)

    def of(backend):
        return lambda t, s, p, k, w, b: MF.mixed_embedding(
            ids, t, s, p, k, kinds, w, b, frequent_ids=(103, V_t + 4), padding_id=0,
            deterministic=deterministic, backend=backend,
        )  # fmt: skip

    shapes = ((V_t, H), (V_s, H), (512, H), (2, H), (H,), (H,))
    inputs = [draw(*s, dtype=dtype) for s in shapes]
    check_against(of("triton"), of("reference"), inputs, longest_sum=B * T)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("H", [256, 768, 1024])
def test_residual_layer_norm(H, dtype, draw, check_against):
    def of(backend):
        return lambda x, r, w, b: MF.residual_layer_norm(x, r, w, b, backend=backend)

    inputs = [draw(*s, dtype=dtype) for s in ((4099, H), (4099, H), (H,), (H,))]
    check_against(of("triton"), of("reference"), inputs, longest_sum=4099)


@pytest.mark.parametrize("H", [256, 1024])
def test_residual_layer_norm_in_two_dtypes(H, draw, assert_rounded):
    """As a step under autocast has it, against float64 on the same numbers."""
    x = draw(4099, H, dtype=torch.bfloat16)
    rest = [draw(*s, dtype=torch.float32) for s in ((4099, H), (H,), (H,))]
    y, rounded = MF.residual_layer_norm(x, *rest, also_in_x_dtype=True, backend="triton")
    assert torch.equal(rounded, y.bfloat16())
    wide = [t.detach().double().requires_grad_() for t in (x, *rest)]
    truth = MF.residual_layer_norm(*wide, backend="reference")
    assert_rounded(y, truth, longest_sum=H)
    first, second = torch.randn_like(y), torch.randn_like(rounded)
    found = torch.autograd.grad([y, rounded], [x, *rest], [first, second])
    expected = torch.autograd.grad(truth, wide, first.double() + second.double())
    for a, b in zip(found, expected, strict=True):
        assert_rounded(a, b, longest_sum=4099)


def test_more_logits_than_int32_counts(draw, monkeypatch, assert_rounded):
    """A chunk of N x V > 2^31: its last row is right only if no offset wraps."""
    N, V, H = 80_000, 30522, 384
    monkeypatch.setattr(launch, "CHUNK_ROWS", N)
    h, w = small(draw, (N, H), (V, H))
    labels = torch.randint(0, V, (N,), device="cuda")
    loss = MF.linear_cross_entropy(h, w, labels, reduction="none")
    exact = h[-3:].detach().double().requires_grad_()
    last = MF.linear_cross_entropy(
        exact, w.detach().double(), labels[-3:], reduction="none", backend="reference"
    )
    assert_rounded(loss[-3:], last, longest_sum=V, dtype=torch.bfloat16)
    dh = torch.autograd.grad(loss[-3:].sum(), h)[0]
    assert_rounded(dh[-3:], torch.autograd.grad(last.sum(), exact)[0], longest_sum=V)
    assert (dh[:-3] == 0).all()


# ---- graphs, streams, waiting ------------------------------------------------------------------


class Step(NamedTuple):
    """One whole op as a function of its float inputs; ids and labels are static."""

    function: Callable[..., torch.Tensor]
    inputs: list[torch.Tensor]
    random: bool = False  # whether it draws a dropout mask


@pytest.fixture(params=["flash", "materialised", "library", "embedding", "layer norm", "kl"])
def step(request, draw) -> Step:
    N, V = 512, 4928
    H = 256 if request.param == "flash" else 768
    labels = labels_of(N, V)
    if request.param in ("flash", "materialised", "library"):
        loss = cross_entropy(labels, "triton", mostly_labelled=request.param == "library")
        return Step(loss, small(draw, (N, H), (V, H), (V,)))
    dropout = {"dropout_p": 0.1, "training": True}
    if request.param == "embedding":
        ids = torch.randint(0, V, (4, 128), device="cuda")

        def embed(t, p, w, b):
            return MF.mixed_embedding(
                ids, t, None, p, None, None, w, b, frequent_ids=(4,), **dropout
            ).sum()

        inputs = [draw(*s, dtype=torch.bfloat16) for s in ((V, H), (512, H), (H,), (H,))]
        return Step(embed, inputs, random=True)
    if request.param == "layer norm":

        def norm(x, r, w, b):
            return MF.residual_layer_norm(x, r, w, b, **dropout).sum()

        inputs = [draw(*s, dtype=torch.bfloat16) for s in ((N, H), (N, H), (H,), (H,))]
        return Step(norm, inputs, random=True)
    teacher = [x.detach() for x in small(draw, (N, H), (V, H), (V,))]
    mask = labels >= 0
    return Step(
        lambda h, w, b: MF.linear_kl(h, w, b, *teacher, mask=mask, backend="triton"),
        small(draw, (N, H), (V, H), (V,)),
    )


def run(function, inputs):
    torch.cuda.manual_seed(0)
    out = function(*inputs)
    # Detached: a graph kept alive would hold the next one to the stream that this one ran on.
    return [out.detach(), *torch.autograd.grad(out, inputs)]


def same(found, truth):
    for a, b in zip(found, truth, strict=True):
        # Atomics add in any order: the last bit of a bfloat16 may differ.
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_waits_for_the_host(step):
    run(step.function, step.inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(step.function, step.inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_and_replayed_with_other_inputs(step):
    function, inputs, random = step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles; capture may not
        run(function, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*inputs)
        captured = [out, *torch.autograd.grad(out, inputs)]
    with torch.no_grad():
        for x in inputs:
            x.mul_(0.5).add_(0.125)
    torch.cuda.manual_seed(0)
    graph.replay()
    first = [x.clone() for x in captured]
    torch.cuda.manual_seed(0)
    graph.replay()
    same(captured, first)
    if not random:
        same(first, run(function, inputs))


def test_dropout_is_drawn_anew_at_each_replay(draw):
    ids = torch.randint(0, 100, (4, 128), device="cuda")
    table, one = draw(100, 256, dtype=torch.bfloat16), torch.ones(256, device="cuda").bfloat16()

    def embed():
        return MF.mixed_embedding(
            ids, table, None, None, None, None, one, one, dropout_p=0.5, training=True
        )

    embed()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = embed()
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first == 0, out == 0)


def test_any_stream(step):
    function, inputs, _ = step
    expected = run(function, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = run(function, inputs)
    stream.synchronize()
    same(found, expected)


def test_one_compiled_graph(step):
    """torch.compile makes one graph of it; dropout masks come from Inductor's own generator."""
    function, inputs, random = step
    compiled = torch.compile(function, fullgraph=True)
    found, expected = run(compiled, inputs), run(function, inputs)
    assert all(torch.isfinite(x).all() for x in found)
    if not random:
        same(found, expected)


def test_deterministic_to_the_bit(draw):
    ids = torch.randint(0, 50, (64, 128), device="cuda")  # many additions to each row
    tables = [draw(*s, dtype=torch.bfloat16) for s in ((50, 256), (512, 256), (256,), (256,))]

    def grads():
        t, p, w, b = tables
        out = MF.mixed_embedding(ids, t, None, p, None, None, w, b, deterministic=True)
        return torch.autograd.grad(out.square().sum(), tables)

    for a, b in zip(grads(), grads(), strict=True):
        assert torch.equal(a, b)
    labels = labels_of(1000, 4928)
    inputs = small(draw, (1000, 256), (4928, 256), (4928,))
    first = run(cross_entropy(labels, "triton"), inputs)
    for a, b in zip(first, run(cross_entropy(labels, "triton"), inputs), strict=True):
        assert torch.equal(a, b)


def test_unchecked_ids_read_nothing_out_of_bounds(draw):
    """Ids far outside would fault if they were followed."""
    table, one = draw(100, 256, dtype=torch.bfloat16), torch.ones(256, device="cuda").bfloat16()
    ids = torch.tensor([[0, 2**30, -(2**30), 99]], device="cuda")
    hidden = MF.mixed_embedding(ids, table, None, None, None, None, one, one)
    hidden.nan_to_num().sum().backward()
    assert hidden.isnan().any(-1).tolist() == [[False, True, True, False]]
    for H in (256, 768):
        h, w = small(draw, (3, H), (4928, H))
        labels = torch.tensor([1, 2**30, -(2**30)], device="cuda")
        loss = MF.linear_cross_entropy(h, w, labels, reduction="none")
        loss.nan_to_num().sum().backward()
        assert loss.isnan().tolist() == [False, True, True]
    torch.cuda.synchronize()


def test_memory_is_bounded(draw):
    """Inputs, gradients and one chunk of logits; never N x V in float32, twice, or copied."""
    N, V, H = 32768, 30522, 768
    inputs = small(draw, (N, H), (V, H), (V,))
    labels = labels_of(N, V)
    run(cross_entropy(labels, "triton"), inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(cross_entropy(labels, "triton"), inputs)
    buffer = launch.CHUNK_ROWS * pitch(V) * 2
    sums = 4 * V * H + 2 * (N + V) * H + 2 * N * H  # float32 dweight, both gradients, gathered rows
    assert torch.cuda.max_memory_allocated() - before < 1.25 * (buffer + sums)
