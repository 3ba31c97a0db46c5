"""Rows of the word, position and type tables, summed and normalised: forward and backward.

`mixed` cases take pieces of two vocabularies, half of them the student's, whose table of width 256
is projected on the way; the others are the embeddings of any BERT. Pieces are drawn with Zipf's
frequencies and 12 % of them are [MASK], as in masked language modelling. Gradients of all tables,
of the projection and of LayerNorm are computed. No dropout, so that outputs can be compared.
"""

from dataclasses import dataclass, field

import harness
import torch
from torch import Tensor
from torch.nn import functional as F

E = 256  # the student's width in mixed cases
MASK = 103
MASKED = 0.12  # share of pieces that are [MASK]


@dataclass(frozen=True)
class Case:
    """B rows of T pieces, V classes of width H; V_s > 0: a second vocabulary."""

    B: int
    T: int
    V: int
    H: int
    V_s: int = 0

    @property
    def label(self) -> str:
        kind = f"{self.V} + {self.V_s}" if self.V_s else f"{self.V}"
        return f"B={self.B} T={self.T} V={kind} H={self.H}"


@dataclass
class Inputs:
    input_ids: Tensor  # [B, T] int32, joint ids
    token_type_ids: Tensor  # [B, T] int32
    upstream: Tensor  # [B, T, H], the gradient that comes back
    table: Tensor  # [V, H]
    position: Tensor  # [T, H]
    token_type: Tensor  # [2, H]
    ln_weight: Tensor  # [H]
    ln_bias: Tensor  # [H]
    student: list[Tensor] = field(default_factory=list)  # [V_s, E], [H, E], [H]

    def parameters(self) -> list[Tensor]:
        tables = [self.table, self.position, self.token_type, self.ln_weight, self.ln_bias]
        return [*tables, *self.student]

    def gradients(self, out: Tensor) -> tuple[Tensor, ...]:
        """(out, of every parameter)"""
        return out, *torch.autograd.grad(out, self.parameters(), self.upstream)


def cases(device: str, quick: bool) -> list[Case]:
    """Stage I at large width; large, base and the student alone; rows of 128 and of 512."""
    pieces = 32768 if device == "cuda" else 4096
    all_cases = [
        Case(pieces // T, T, V, H, V_s)
        for V, H, V_s in ((30522, 1024, 4928), (30522, 1024, 0), (30522, 768, 0), (4928, 256, 0))
        for T in (128, 512)
    ]
    if quick:
        return [all_cases[0], all_cases[2], all_cases[-2]]
    return all_cases if device == "cuda" else all_cases[::2]


def zipf(V: int) -> Tensor:
    """The frequency of each of V pieces, the most frequent first."""
    share = 1 / (torch.arange(V, dtype=torch.float64) + 10)
    return share / share.sum()


def inputs(case: Case, device: str, copy: int) -> Inputs:
    generator = torch.Generator().manual_seed(copy)
    dtype = getattr(torch, harness.default_dtype(device))

    def normal(*shape: int, scale: float = 0.02, mean: float = 0.0) -> Tensor:
        x = torch.randn(*shape, generator=generator) * scale + mean
        return x.to(device=device, dtype=dtype).requires_grad_()

    def draw(V: int) -> Tensor:
        pieces = case.B * case.T
        ranks = torch.multinomial(zipf(V), pieces, replacement=True, generator=generator)
        order = torch.randperm(V, generator=generator)
        return order[ranks].reshape(case.B, case.T)

    ids = draw(case.V)
    if case.V_s:
        other = case.V + draw(case.V_s)
        ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.5, other, ids)
    masked = torch.rand(ids.shape, generator=generator) < MASKED
    ids = torch.where(masked, torch.where(ids >= case.V, case.V + 4, MASK), ids).int().to(device)
    types = (torch.arange(case.T) >= case.T // 2).int().expand(case.B, -1).contiguous().to(device)
    H = case.H
    student = [normal(case.V_s, E), normal(H, E), normal(H)] if case.V_s else []
    return Inputs(
        ids, types, normal(case.B, case.T, H, scale=1.0).detach(), normal(case.V, H),
        normal(case.T, H), normal(2, H), normal(H, mean=1.0), normal(H), student,
    )  # fmt: skip


def work(case: Case, device: str) -> harness.Work:
    """Least traffic: output and upstream gradient once, tables read and their gradients written.

    Only the rows of pieces that occur are read of the word table, but its gradient is whole. The
    student's table counts at its width E, the products of its projection as floating-point work.
    """
    size = 2 if device == "cuda" else 4
    pieces, H = case.B * case.T, case.H
    rest = (case.T + 4) * H + (case.V_s * E + H * E + H if case.V_s else 0)
    draws = pieces * (1 - MASKED) * (0.5 if case.V_s else 1.0)
    read = float((1 - (1 - zipf(case.V)) ** draws).sum()) * H + rest
    traffic = size * (2 * pieces * H + read + case.V * H + rest) + 8 * pieces
    return harness.Work(bytes=traffic, flop=6.0 * case.V_s * E * H, items=pieces, unit="pieces")


def plain(input_ids, token_type_ids, table, position, token_type, ln_weight, ln_bias, *student):
    """As Hugging Face's BertEmbeddings; a second vocabulary is appended to the first."""
    if student:
        table = torch.cat([table, F.linear(*student)])
    rows = F.embedding(input_ids, table) + F.embedding(token_type_ids, token_type)
    rows = rows + position[: input_ids.shape[1]]
    return F.layer_norm(rows, ln_weight.shape, ln_weight, ln_bias, 1e-12)


def gathers(input_ids, token_type_ids, table, position, token_type, ln_weight, ln_bias, *student):
    """The same without a joint table: a gather from each vocabulary, then a choice."""
    V = table.shape[0]
    is_student = input_ids >= V
    rows = torch.where(
        is_student[..., None],
        F.embedding(torch.where(is_student, input_ids - V, 0), F.linear(*student)),
        F.embedding(torch.where(is_student, 0, input_ids), table),
    )
    rows = rows + F.embedding(token_type_ids, token_type) + position[: input_ids.shape[1]]
    return F.layer_norm(rows, ln_weight.shape, ln_weight, ln_bias, 1e-12)


def check(case: Case, x: Inputs, outputs: tuple[Tensor, ...]) -> dict:
    """Relative errors against float64; wrong above 3 % in bfloat16, 0.01 % in float32."""

    def truth() -> list[Tensor]:
        wide = [p.detach().double().requires_grad_() for p in x.parameters()]
        out = plain(x.input_ids.long(), x.token_type_ids.long(), *wide)
        return [out.detach(), *torch.autograd.grad(out, wide, x.upstream.double())]

    names = ("out", "table", "position", "token_type", "ln_weight", "ln_bias")
    names += ("student", "projection", "projection_bias")
    bound = 3e-2 if x.table.dtype == torch.bfloat16 else 1e-4
    return harness.relative_errors(case, truth, outputs, dict.fromkeys(names, bound))


BENCH = harness.Bench("embedding", cases=cases, inputs=inputs, work=work, check=check)


@BENCH.provider("mvbert")
def _(case, device):
    from mvbert.functional import mixed_embedding, project_table

    frequent = (MASK, case.V + 4) if case.V_s else (MASK,)

    def run(x: Inputs):
        rows = project_table(*x.student) if x.student else None
        out = mixed_embedding(
            x.input_ids, x.table, rows, x.position, x.token_type, x.token_type_ids,
            x.ln_weight, x.ln_bias, frequent_ids=frequent,
        )  # fmt: skip
        return x.gradients(out)

    return run


def of_torch(case, device, function, compiled: bool = False):
    harness.only_if(function is plain or case.V_s > 0)
    if compiled:
        function = torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)
    return lambda x: x.gradients(function(x.input_ids, x.token_type_ids, *x.parameters()))


BENCH.add("eager", of_torch, function=plain)
BENCH.add("eager, two gathers", of_torch, function=gathers)
BENCH.add("torch.compile max-autotune", of_torch, function=plain, compiled=True)
BENCH.add("torch.compile max-autotune, two gathers", of_torch, function=gathers, compiled=True)


@BENCH.provider("HF BertEmbeddings", needs=["transformers"])
def _(case, device):
    harness.only_if(case.V_s == 0)
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertEmbeddings

    config = BertConfig(
        vocab_size=case.V, hidden_size=case.H, max_position_embeddings=case.T,
        hidden_dropout_prob=0.0, pad_token_id=None,
    )  # fmt: skip
    module = BertEmbeddings(config).to(device)

    def run(x: Inputs):
        values = (x.table, x.position, x.token_type, x.ln_weight, x.ln_bias)
        names = (
            "word_embeddings.weight", "position_embeddings.weight",
            "token_type_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias",
        )  # fmt: skip
        out = torch.func.functional_call(
            module,
            dict(zip(names, values, strict=True)),
            kwargs={"input_ids": x.input_ids, "token_type_ids": x.token_type_ids},
        )
        return x.gradients(out)

    return run
