"""Divergence between the attention relations of two models (MiniLMv2), forward and backward.

KL between softmax(x x^T / sqrt(d)) of the teacher and of the student for every head of queries, of
keys and of values, with the gradient of the student's. Compared with plain PyTorch alone: no
library of fused losses has this loss.
"""

from dataclasses import dataclass

import harness
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Case:
    """B rows of T pieces, a student of width H under a teacher of width H_t, R relation heads."""

    B: int
    T: int
    H: int
    H_t: int
    R: int


@dataclass
class Inputs:
    student: Tensor  # [B, T, 3 H]
    teacher: Tensor  # [B, T, 3 H_t]

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return loss, *torch.autograd.grad(loss, [self.student])


def cases(device: str, quick: bool) -> list[Case]:
    """Stage II under the demo's teacher and under BERT large."""
    B = 256 if device == "cuda" else 16
    shapes = [(128, 256, 384, 32), (128, 256, 1024, 32), (512, 256, 1024, 32)]
    return [Case(B * 128 // T, T, *rest) for T, *rest in shapes[: 1 if quick else None]]


def inputs(case: Case, device: str, copy: int) -> Inputs:
    """Random; the two sides differ, so the divergence is far from 0."""
    generator = torch.Generator().manual_seed(copy)
    dtype = getattr(torch, harness.default_dtype(device))
    x, y = (
        torch.randn(case.B, case.T, 3 * W, generator=generator).to(device=device, dtype=dtype)
        for W in (case.H, case.H_t)
    )
    return Inputs(x.requires_grad_(), y)


def work(case: Case, device: str) -> harness.Work:
    """One product for the scores of either side, one for the gradient; each tensor travels once."""
    size = 2.0 if device == "cuda" else 4.0
    pieces, widths = case.B * case.T, 2 * case.H + case.H_t
    return harness.Work(
        flop=2.0 * pieces * case.T * 3 * widths, bytes=size * pieces * 3 * widths,
        items=pieces, unit="pieces",
    )  # fmt: skip


def relations(qkv: Tensor, case: Case) -> Tensor:
    """log softmax(x x^T / sqrt(d)), [3, B, R, T, T]."""
    B, T, W = qkv.shape
    x = qkv.view(B, T, 3, case.R, W // 3 // case.R).permute(2, 0, 3, 1, 4)
    scores = x @ x.mT
    wide = torch.promote_types(scores.dtype, torch.float32)
    return F.log_softmax(scores.to(wide) * x.shape[-1] ** -0.5, -1)


def eager(case: Case, student: Tensor, teacher: Tensor) -> Tensor:
    with torch.no_grad():
        target = relations(teacher, case)
    log_p = relations(student, case)
    return F.kl_div(log_p, target, reduction="sum", log_target=True) / log_p[..., 0].numel()


def check(case: Case, x: Inputs, outputs: tuple[Tensor, ...]) -> dict:
    """Relative errors against float64; wrong above 4 % in bfloat16, 0.01 % in float32."""

    def truth() -> list[Tensor]:
        wide = x.student.detach().double().requires_grad_()
        total = 0.0
        for b in range(case.B):  # scores in float64, a row at a time
            row = slice(b, b + 1)
            loss = eager(case, wide[row], x.teacher[row].double()) / case.B
            loss.backward()
            total += loss.detach()
        return [total, wide.grad]

    bound = 4e-2 if x.student.dtype == torch.bfloat16 else 1e-4
    return harness.relative_errors(case, truth, outputs, {"loss": bound, "student": bound})


BENCH = harness.Bench("relations", cases=cases, inputs=inputs, work=work, check=check)


@BENCH.provider("mvbert")
def _(case, device):
    from mvbert.functional import relation_kl

    return lambda x: x.gradients(relation_kl(x.student, x.teacher, case.R))


BENCH.add("eager", lambda case, device: lambda x: x.gradients(eager(case, x.student, x.teacher)))


@BENCH.provider("torch.compile max-autotune")
def _(case, device):
    compiled = torch.compile(eager, mode="max-autotune-no-cudagraphs", dynamic=False)
    return lambda x: x.gradients(compiled(case, x.student, x.teacher))
