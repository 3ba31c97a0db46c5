"""Two linear layers and the divergence between their softmaxes, forward and backward.

tau^2 KL(teacher || student) at tau = 2, with gradients of the student's hidden, weight and bias but
not of the teacher's. All rows have a label. Liger's losses have no bias: they are compared with the
problem without one, as their records say.
"""

from dataclasses import dataclass

import harness
import torch
from torch import Tensor
from torch.nn import functional as F

TAU = 2.0


@dataclass(frozen=True)
class Case:
    """N rows, V classes, a student of width H under a teacher of width H_t."""

    N: int
    V: int
    H: int
    H_t: int


@dataclass
class Inputs:
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor  # [V]
    teacher_hidden: Tensor  # [N, H_t]
    teacher_weight: Tensor  # [V, H_t]
    teacher_bias: Tensor  # [V]

    def gradients(self, loss: Tensor, bias: bool = True) -> tuple[Tensor, ...]:
        """(loss, of hidden, of weight, of bias)"""
        inputs = (self.hidden, self.weight, self.bias)
        return loss, *torch.autograd.grad(loss, inputs if bias else inputs[:2])


def cases(device: str, quick: bool) -> list[Case]:
    """Stage II under teachers of large and small width; a student that kept BERT's vocabulary."""
    if device == "cuda":
        rows = (4096,) if quick else (1024, 4096, 16384)
    else:
        rows = (512,) if quick else (1024,)
    shapes = [(4928, 256, 1024), (4928, 256, 384), (30522, 256, 768)]
    return [Case(N, *shape) for shape in shapes[: 1 if quick else None] for N in rows]


def inputs(case: Case, device: str, copy: int) -> Inputs:
    """Random; the two sides differ, so the divergence is far from 0."""
    generator = torch.Generator().manual_seed(copy)
    dtype = getattr(torch, harness.default_dtype(device))

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device=device, dtype=dtype)

    def side(H: int) -> tuple[Tensor, ...]:
        return normal(case.N, H), normal(case.V, H, scale=H**-0.5), normal(case.V)

    return Inputs(*(x.requires_grad_() for x in side(case.H)), *side(case.H_t))


def work(case: Case, device: str) -> harness.Work:
    """Three products on the student's side, one on the teacher's."""
    return harness.Work(flop=2.0 * case.N * case.V * (3 * case.H + case.H_t))


def divergence(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The definition, over whole logits."""
    target = (teacher_logits / TAU).log_softmax(-1)
    log_p = (student_logits / TAU).log_softmax(-1)
    return TAU**2 * F.kl_div(log_p, target, reduction="batchmean", log_target=True)


def check(case: Case, x: Inputs, outputs: tuple[Tensor, ...]) -> dict:
    """Relative errors against float64; wrong above 4 % in bfloat16, 0.01 % in float32."""
    teacher = (x.teacher_hidden, x.teacher_weight, x.teacher_bias)

    def part(rows: slice, hidden: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        teacher_hidden, *layer = (t.double() for t in teacher[: 2 + len(bias)])
        student_logits = F.linear(hidden[rows], weight, *bias)
        teacher_logits = F.linear(teacher_hidden[rows], *layer)
        return divergence(student_logits, teacher_logits) * len(student_logits) / case.N

    bound = 4e-2 if x.hidden.dtype == torch.bfloat16 else 1e-4
    return harness.loss_errors(case, part, (x.hidden, x.weight, x.bias), outputs, bound)


BENCH = harness.Bench("kl", cases=cases, inputs=inputs, work=work, check=check)


@BENCH.provider("mvbert")
def _(case, device):
    from mvbert.functional import linear_kl

    return lambda x: x.gradients(
        linear_kl(
            x.hidden, x.weight, x.bias, x.teacher_hidden, x.teacher_weight, x.teacher_bias,
            temperature=TAU,
        )
    )  # fmt: skip


def eager(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias) -> Tensor:
    """As distillation scripts have it: both logits whole, the divergence in float32."""
    with torch.no_grad():
        teacher_logits = F.linear(teacher_hidden, teacher_weight, teacher_bias).float()
    return divergence(F.linear(hidden, weight, bias).float(), teacher_logits)


BENCH.add("eager", lambda case, device: lambda x: x.gradients(eager(*vars(x).values())))


@BENCH.provider("torch.compile max-autotune")
def _(case, device):
    compiled = torch.compile(eager, mode="max-autotune-no-cudagraphs", dynamic=False)
    return lambda x: x.gradients(compiled(*vars(x).values()))


@BENCH.provider("Liger fused_linear_kl_div", needs=["liger-kernel"], devices=["cuda"])
def _(case, device):
    from liger_kernel.ops.fused_linear_kl_div import LigerFusedLinearKLDivFunction

    def run(x: Inputs):
        target = (F.linear(x.teacher_hidden, x.teacher_weight).float() / TAU).softmax(-1)
        loss = LigerFusedLinearKLDivFunction.apply(
            x.hidden, x.weight, target.to(x.hidden.dtype), None, "batchmean", -100, TAU
        )
        return x.gradients(TAU**2 * (loss[0] if isinstance(loss, tuple) else loss), bias=False)

    return run


@BENCH.provider("Liger fused_linear_jsd", needs=["liger-kernel"], devices=["cuda"])
def _(case, device):
    """With beta 0 it is the divergence of the teacher from the student."""
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    def run(x: Inputs):
        loss = LigerFusedLinearJSDFunction.apply(
            x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, None, 0.0, -100, TAU
        )
        return x.gradients(TAU**2 * loss, bias=False)

    return run
