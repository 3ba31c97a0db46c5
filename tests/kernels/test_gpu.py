"""What only a GPU can show of every fused op: bfloat16, CUDA graphs, no wait for the device.

The same ops, small, are also what `compute-sanitizer` runs in bench/gpu_check.sh (-k small).
"""

import pytest
import torch

from mvbert import functional as MF

SIZES = {
    # N rows, H, V, V_s, T: ragged against every tile; then a Stage I step's own.
    "small": (37, 72, 331, 53, 9),
    "real": (1229, 768, 30522, 4928, 128),
}


def cross_entropy(draw, N, H, V, V_s, T, **options):
    labels = labels_of(N, V)
    inputs = [draw(N, H), scaled(draw(V, H)), draw(V)]
    return (
        inputs,
        lambda backend: (
            lambda h, w, b: MF.linear_cross_entropy(h, w, labels, b, backend=backend, **options)
        ),
    )


def narrow_cross_entropy(draw, N, H, V, V_s, T):
    """The student's own: a width that takes the form without logits."""
    return cross_entropy(draw, N, min(H, 256), V_s, V_s, T)


def smoothed_rows(draw, N, H, V, V_s, T):
    return cross_entropy(draw, N, H, V_s, V_s, T, reduction="none", label_smoothing=0.1)


def mixed_cross_entropy(draw, N, H, V, V_s, T):
    labels = labels_of(N, V + V_s)
    inputs = [draw(N, H), scaled(draw(V, H)), scaled(draw(V_s, H)), draw(V), draw(V_s)]
    return (
        inputs,
        lambda backend: (
            lambda h, wt, ws, bt, bs: MF.mixed_linear_cross_entropy(
                h, wt, ws, labels, bt, bs, backend=backend
            )
        ),
    )


def kl(draw, N, H, V, V_s, T):
    teacher = [draw(N, H), scaled(draw(V_s, H)), draw(V_s)]
    mask = torch.arange(N, device="cuda") % 3 != 1
    inputs = [draw(N, min(H, 256)), scaled(draw(V_s, min(H, 256))), draw(V_s)]

    def of(backend):
        def run(h, w, b):
            given = [t.detach().to(h.dtype) for t in teacher]
            return MF.linear_kl(h, w, b, *given, temperature=2.0, mask=mask, backend=backend)

        return run

    return inputs, of


def sparse_kl(draw, N, H, V, V_s, T):
    ids = torch.randint(0, V, (N, 5)).cuda()
    probs = torch.rand(N, 5).cuda()
    inputs = [draw(N, H), scaled(draw(V, H)), draw(V)]
    return (
        inputs,
        lambda backend: (
            lambda h, w, b: MF.sparse_linear_kl(
                h, w, b, ids, probs.to(h.dtype), temperature=2.0, backend=backend
            )
        ),
    )


def embedding(draw, N, H, V, V_s, T, **options):
    """Two vocabularies, both ends of both, many pieces of one id."""
    ids = torch.randint(0, V + V_s, (4, T))
    ids[0, :4] = torch.tensor([0, V - 1, V, V + V_s - 1])
    ids[1:, ::7] = 4
    ids = ids.cuda()
    types = (torch.arange(4 * T, device="cuda").view(4, T) % 2).to(torch.uint8)
    inputs = [draw(*s) for s in ((V, H), (V_s, H), (T, H), (2, H), (H,), (H,))]
    return (
        inputs,
        lambda backend: (
            lambda t, s, p, k, w, b: MF.mixed_embedding(
                ids, t, s, p, k, types, w, b, backend=backend, **options
            )
        ),
    )


def deterministic_embedding(draw, N, H, V, V_s, T):
    return embedding(draw, N, H, V, V_s, T, deterministic=True, frequent_ids=(4,))


def one_table(draw, N, H, V, V_s, T):
    """What Stage II and a fused Hugging Face BERT run."""
    inputs = embedding(draw, N, H, V, V_s, T)[0][1:]
    ids = torch.randint(0, V_s, (4, T)).cuda()
    types = torch.zeros(4, T, dtype=torch.int32, device="cuda")
    return (
        inputs,
        lambda backend: (
            lambda s, p, k, w, b: MF.mixed_embedding(
                ids, None, s, p, k, types, w, b, backend=backend
            )
        ),
    )


def layer_norm(draw, N, H, V, V_s, T):
    inputs = [draw(*s) for s in ((N, H), (N, H), (H,), (H,))]
    return (
        inputs,
        lambda backend: lambda x, r, w, b: MF.residual_layer_norm(x, r, w, b, backend=backend),
    )


OPS = [
    cross_entropy, narrow_cross_entropy, smoothed_rows, mixed_cross_entropy, kl, sparse_kl,
    embedding, deterministic_embedding, one_table, layer_norm,
]  # fmt: skip


def labels_of(N: int, V: int) -> torch.Tensor:
    """Every third row ignored, the first and the last piece among the others."""
    labels = torch.randint(0, V, (N,))
    labels[2::3] = MF.IGNORE_INDEX
    labels[:2] = torch.tensor([V - 1, 0])
    return labels.cuda()


def scaled(weight: torch.Tensor) -> torch.Tensor:
    """Logits of a trained head are of the order of 1, whatever the width."""
    with torch.no_grad():
        weight.mul_(weight.shape[1] ** -0.5)
    return weight


def step(function, inputs, upstream):
    """[output, gradients]: what a training step asks of an op, nothing made on the host."""
    output = function(*inputs)
    return [output, *torch.autograd.grad(output, inputs, upstream)]


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach().double()
    assert torch.isfinite(found).all()
    return ((found - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


@pytest.fixture(params=OPS, ids=lambda op: op.__name__)
def op(request, draw):
    """op(size): (inputs, kernel, reference), bfloat16."""

    def make(size: str):
        def of_dtype(*shape):
            return draw(*shape, dtype=torch.bfloat16)

        inputs, of = request.param(of_dtype, *SIZES[size])
        return inputs, of("triton"), of("reference")

    return make


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
def test_against_float64(size, op, check_against):
    inputs, kernel, reference = op(size)
    check_against(kernel, reference, inputs)


@pytest.mark.gpu
def test_cuda_graph(op):
    """A captured step, replayed over other inputs, gives what an eager step gives for them."""
    inputs, kernel, _ = op("small")
    upstream = torch.rand_like(kernel(*inputs))
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            step(kernel, inputs, upstream)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(kernel, inputs, upstream)
    with torch.no_grad():
        for x in inputs:
            x.copy_(x.flip(0) * 0.5)
    graph.replay()
    torch.cuda.synchronize()
    # Atomic additions of float32 come in another order: less than a unit of bfloat16.
    for ours, wanted in zip(found, step(kernel, inputs, upstream), strict=True):
        assert error(ours, wanted) <= torch.finfo(torch.bfloat16).eps


@pytest.mark.gpu
def test_no_host_synchronisation(op):
    inputs, kernel, _ = op("small")
    upstream = torch.rand_like(kernel(*inputs))
    step(kernel, inputs, upstream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(kernel, inputs, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # the compiler's own modules warn of each other
def test_compiled_whole(op):
    """torch.compile takes the op into one graph and changes nothing."""
    inputs, kernel, _ = op("small")
    upstream = torch.rand_like(kernel(*inputs))
    torch.compiler.reset()
    compiled = torch.compile(kernel, fullgraph=True)
    for ours, wanted in zip(
        step(compiled, inputs, upstream), step(kernel, inputs, upstream), strict=True
    ):
        assert error(ours, wanted) <= torch.finfo(torch.bfloat16).eps
