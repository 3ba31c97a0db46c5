"""A linear layer and its cross-entropy, forward and backward: ours beside every peer.

Measures the decoder of a BERT's masked-language-model head on the rows that have a label: loss, and
the gradients of hidden, weight and bias. Every provider gets exactly those rows, so none spends
time on rows without a label, and ours is told so (`mostly_labelled`); `mvbert, rows may lack
labels` is what training runs, where some rows may have none. Peers run at the settings their
authors recommend; the names say which. Liger's is its Triton form; the one that needs
nvidia-cutlass-dsl is missing. cut-cross-entropy skips gradients that are small under a trained
model's sharp softmax: random logits have few of them, so it gains nothing from that here.
"""

from dataclasses import dataclass

import harness
import reporting
import torch
from torch import Tensor
from torch.nn import functional as F

WIDTHS = ((30522, 1024), (30522, 768), (4928, 256), (4928, 1024), (30522, 384))  # (V, H)


@dataclass(frozen=True)
class Case:
    """N labelled rows of width H, V classes."""

    N: int
    V: int
    H: int


@dataclass
class Inputs:
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor  # [V]
    labels: Tensor  # [N]

    def gradients(self, loss: Tensor, bias: bool = True) -> tuple[Tensor, ...]:
        """(loss, of hidden, of weight, of bias)"""
        inputs = (self.hidden, self.weight, self.bias)
        return loss, *torch.autograd.grad(loss, inputs if bias else inputs[:2])


def cases(device: str, quick: bool) -> list[Case]:
    """Stage I at large and base width, the student, its softmax in Stage I, the demo teacher."""
    if quick and device == "cuda":  # what the targets are about, the most telling first
        shapes = ((4096, 30522, 1024), (16384, 4928, 256), (4096, 30522, 768), (16384, 30522, 1024))
        return [Case(*shape) for shape in shapes]
    if quick:
        return [Case(1024, 4928, 256), Case(1024, 30522, 384)]
    if device == "cpu":  # four times the rows take four times as long: shown where that is short
        longer = [Case(4096, 4928, 256), Case(4096, 30522, 384)]
        return [*(Case(1024, V, H) for V, H in WIDTHS), *longer]
    rows = (1024, 4096, 16384, 32768)
    return [Case(N, V, H) for V, H in WIDTHS for N in rows]


def inputs(case: Case, device: str, copy: int) -> Inputs:
    """Random: hidden as after LayerNorm, logits and bias of unit variance."""
    generator = torch.Generator().manual_seed(copy)
    dtype = getattr(torch, harness.default_dtype(device))

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(*shape, generator=generator) * scale
        return x.to(device=device, dtype=dtype).requires_grad_()

    labels = torch.randint(0, case.V, (case.N,), generator=generator).to(device)
    return Inputs(
        normal(case.N, case.H), normal(case.V, case.H, scale=case.H**-0.5), normal(case.V), labels
    )


def work(case: Case, device: str) -> harness.Work:
    """Three products; every input read and every gradient written once."""
    size = 2 if device == "cuda" else 4
    tensors = case.N * case.H + case.V * case.H + case.V
    return harness.Work(flop=6.0 * case.N * case.V * case.H, bytes=2.0 * size * tensors)


def check(case: Case, x: Inputs, outputs: tuple[Tensor, ...]) -> dict:
    """Relative errors |out - truth| / |truth| of the loss and of each gradient.

    Above 2 % in bfloat16 or 0.01 % in float32 a result is wrong: no order of summation explains
    that. Smaller errors are in the record.
    """

    def part(rows: slice, hidden: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        logits = F.linear(hidden[rows], weight, *bias)
        return F.cross_entropy(logits, x.labels[rows], reduction="sum") / case.N

    bound = 2e-2 if x.hidden.dtype == torch.bfloat16 else 1e-4
    return harness.loss_errors(case, part, (x.hidden, x.weight, x.bias), outputs, bound)


BENCH = harness.Bench("loss", cases=cases, inputs=inputs, work=work, check=check)


# ---- ours ----------------------------------------------------------------------------------------


def ours(case, device, mostly_labelled: bool):
    from mvbert.functional import linear_cross_entropy

    return lambda x: x.gradients(
        linear_cross_entropy(x.hidden, x.weight, x.labels, x.bias, mostly_labelled=mostly_labelled)
    )


BENCH.add("mvbert", ours, mostly_labelled=True)
BENCH.add("mvbert, rows may lack labels", ours, mostly_labelled=False, devices=["cuda"])


# ---- PyTorch -------------------------------------------------------------------------------------


def eager(x: Inputs) -> Tensor:
    """As Hugging Face's head: logits whole, the loss over them in float32."""
    logits = F.linear(x.hidden, x.weight, x.bias)
    return F.cross_entropy(logits.float(), x.labels)


@BENCH.provider("HF head, eager")
def _(case, device):
    return lambda x: x.gradients(eager(x))


@BENCH.provider("torch.compile max-autotune")
def _(case, device):
    def head(hidden, weight, bias, labels):
        return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels)

    # Graph capture wants stable addresses, which rotating inputs do not have.
    compiled = torch.compile(head, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)
    return lambda x: x.gradients(compiled(x.hidden, x.weight, x.bias, x.labels))


def torch_native(case, device, rows: int | None = None):
    """torch.nn.functional.linear_cross_entropy, in chunks of `rows` rows."""
    if not hasattr(F, "linear_cross_entropy"):
        raise harness.Skip(f"torch {torch.__version__} has none; it came with 2.13")
    options = {} if rows is None else {"batch_chunk_size": min(rows, case.N)}
    settings = torch.nn.LinearCrossEntropyOptions(**options)
    return lambda x: x.gradients(
        F.linear_cross_entropy(x.hidden, x.weight, x.labels, linear_bias=x.bias, options=settings)
    )


BENCH.add("torch linear_cross_entropy", torch_native)
BENCH.add("torch linear_cross_entropy, chunks of 4096", torch_native, rows=4096)


# ---- Liger ---------------------------------------------------------------------------------------


def liger(case, device, accum_dtype=None, chunks: int | None = None):
    """`chunks`: how many times the logits that Liger's own rule allows in memory."""
    import inspect

    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    loss = LigerFusedLinearCrossEntropyFunction
    options = ["mean", None, False, accum_dtype]
    if chunks is not None:
        names = list(inspect.signature(loss.forward).parameters)
        if names[-1] != "chunk_mem_const":
            raise harness.Skip("this version of Liger has no chunk_mem_const")
        # Between the accumulator's dtype and the last: token scaling, accuracy, predictions,
        # implementation and its mode, all at their defaults.
        options += [False, False, False, None, None, chunks]

    def run(x: Inputs):
        result = loss.apply(x.hidden, x.weight, x.labels, x.bias, None, -100, 0.0, 0.0, *options)
        return x.gradients(result[0])

    return run


LIGER = {"needs": ["liger-kernel"], "devices": ["cuda"]}
FLOAT32 = {"accum_dtype": torch.float32}
BENCH.add("Liger", liger, **LIGER)
BENCH.add("Liger, float32 accumulation", liger, **FLOAT32, **LIGER)
BENCH.add("Liger, float32 accumulation, large chunks", liger, chunks=16, **FLOAT32, **LIGER)


# ---- cut cross-entropy ---------------------------------------------------------------------------


def cut(case, device, **options):
    """cut_cross_entropy with `options`; versions up to 25.1.1 have no bias."""
    import inspect

    import cut_cross_entropy

    if options["impl"] == "cce_exact" and not hasattr(
        cut_cross_entropy.LinearCrossEntropyImpl, "CCE_EXACT"
    ):
        raise harness.Skip(
            f"cut-cross-entropy {reporting.version('cut-cross-entropy')} has no cce_exact; run: "
            'pip install --no-deps "git+https://github.com/apple/ml-cross-entropy"'
        )
    loss = cut_cross_entropy.linear_cross_entropy
    if "bias" in inspect.signature(loss).parameters:
        return lambda x: x.gradients(loss(x.hidden, x.weight, x.labels, bias=x.bias, **options))
    return lambda x: x.gradients(loss(x.hidden, x.weight, x.labels, **options), bias=False)


CCE = {"needs": ["cut-cross-entropy"]}
BENCH.add("CCE", cut, impl="cce", devices=["cuda"], **CCE)
BENCH.add("CCE without filter", cut, impl="cce", filter_eps=None, devices=["cuda"], **CCE)
BENCH.add("CCE exact", cut, impl="cce_exact", devices=["cuda"], **CCE)
BENCH.add("CCE torch_compile", cut, impl="torch_compile", **CCE)
