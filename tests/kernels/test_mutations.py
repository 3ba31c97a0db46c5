"""The bound of rounding errors is narrow: a definition with one mistake is far above it.

Mutants compute in float64, so nothing but its mistake keeps a mutant from the truth. Shapes and
longest sums are those of the kernels' own tests.
"""

import pytest
import torch
from torch.nn import functional as F

from mvbert import functional as MF
from mvbert.kernels.common import reduce_rows, split_heads
from mvbert.kernels.layer_norm import residual_layer_norm_reference
from mvbert.kernels.linear_cross_entropy import linear_cross_entropy_reference
from mvbert.kernels.linear_kl import linear_kl_reference
from mvbert.kernels.mixed_embedding import EmbeddingInputs, mixed_embedding_reference
from mvbert.kernels.relation_kl import relation_kl_reference

FAR = 10  # times the bound
HALF = torch.float16


@pytest.fixture(params=[torch.float32, HALF], ids=["float32", "float16"])
def exceeds(request, gradients, share_of_bound):
    """Asserts that a mutant's output, or one of its gradients, is refused by far in the dtype."""

    def check(mutant, truth, inputs, longest_sum: int) -> None:
        exact = [x.detach().double().requires_grad_() for x in inputs]

        # All inputs take part, so that there is a gradient of what a mutant forgets.
        def whole(*x):
            return mutant(*x) + 0 * sum(y.sum() for y in x)

        wrong, right = gradients(whole, exact), gradients(truth, exact)
        shares = [
            share_of_bound(a, b, longest_sum, request.param)
            for a, b in zip(wrong[0] + wrong[1], right[0] + right[1], strict=True)
        ]
        assert max(shares) > FAR, f"only {max(shares):.3g} times the bound"

    return check


def mutants(table: dict):
    return pytest.mark.parametrize("mutant", table.values(), ids=table.keys())


# ---- losses: N rows, V pieces -------------------------------------------------------------------

N, H, H_T, V = 13, 20, 12, 37


def cross_entropy(h, w, b, labels, smoothing=0.1, **options):
    options["label_smoothing"] = smoothing
    rows, *_ = linear_cross_entropy_reference(h, w, labels, b, **options)
    return reduce_rows(rows, labels != MF.IGNORE_INDEX, "mean")


def label_without_gradient(h, w, b, labels):
    logits = F.linear(h, w, b)
    picked = logits.gather(1, labels.clamp(min=0)[:, None])[labels >= 0].mean()
    return cross_entropy(h, w, b, labels) + 0.9 * (picked - picked.detach())


@mutants(
    {
        "the next label": lambda h, w, b, y: cross_entropy(h, w, b, (y + 1).where(y >= 0, y)),
        "no bias": lambda h, w, b, y: cross_entropy(h, w, None, y),
        "the second tile of pieces left out": lambda h, w, b, y: cross_entropy(
            h, w[:16], b[:16], y
        ),
        "the last column left out": lambda h, w, b, y: cross_entropy(h[:, :-1], w[:, :-1], b, y),
        "the last row left out": lambda h, w, b, y: cross_entropy(h[:-1], w, b, y[:-1]),
        "ignored rows counted": lambda h, w, b, y: cross_entropy(h, w, b, y.clamp(min=0)),
        "the mean over all rows": lambda h, w, b, y: cross_entropy(h, w, b, y) * (y >= 0).sum() / N,
        "no smoothing": lambda h, w, b, y: cross_entropy(h, w, b, y, smoothing=0.0),
        "no gradient of the label's logit": label_without_gradient,
    }
)
def test_linear_cross_entropy(mutant, draw, exceeds, device):
    labels = torch.randint(0, 15, (N,), device=device)
    labels[2:-1:3] = MF.IGNORE_INDEX
    exceeds(
        lambda h, w, b: mutant(h, w, b, labels),
        lambda h, w, b: cross_entropy(h, w, b, labels),
        [draw(*s, dtype=HALF) for s in ((N, H), (V, H), (V,))],
        longest_sum=V,
    )


CAP, Z = 3.0, 0.1


def with_options(h, w, b, labels, softcap=CAP, z_loss=Z, class_weight=None, divide_by=None):
    """The loss with every option, class weights of 1/2 and 3/2."""
    weights = 0.5 + (torch.arange(V, device=h.device) % 2) if class_weight is None else class_weight
    kept = labels >= 0
    options = {"class_weight": weights, "softcap": softcap}
    rows, lse, _ = linear_cross_entropy_reference(h, w, labels, b, label_smoothing=0.1, **options)
    own = weights[labels.clamp(min=0)].where(kept, 0)
    divide_by = own.sum() if divide_by is None else divide_by
    return rows.sum() / divide_by + z_loss * lse.square().sum() / kept.sum()


def straight(h, w, b, labels):
    """As if the cap had derivative 1."""
    z = F.linear(h, w, b)
    capped = (CAP * torch.tanh(z / CAP)).detach() + z - z.detach()
    eye, zero = torch.eye(V, dtype=z.dtype, device=z.device), torch.zeros_like(b)
    return with_options(capped, eye, zero, labels, softcap=0.0)


@mutants(
    {
        "no softcap": lambda h, w, b, y: with_options(h, w, b, y, softcap=0.0),
        "no derivative of the softcap": straight,
        "no z-loss": lambda h, w, b, y: with_options(h, w, b, y, z_loss=0.0),
        "lse for its square": lambda h, w, b, y: (
            with_options(h, w, b, y, z_loss=0.0)
            + Z * linear_cross_entropy_reference(h, w, y, b, softcap=CAP)[1].sum() / (y >= 0).sum()
        ),
        "no class weights": lambda h, w, b, y: with_options(
            h, w, b, y, class_weight=torch.ones(V, device=h.device)
        ),
        "the weight of the next class": lambda h, w, b, y: with_options(
            h, w, b, y, class_weight=0.5 + (torch.arange(V, device=h.device) + 1) % 2
        ),
        "the mean over labels": lambda h, w, b, y: with_options(
            h, w, b, y, divide_by=(y >= 0).sum()
        ),
    }
)
def test_options_of_linear_cross_entropy(mutant, draw, exceeds, device):
    labels = torch.randint(0, 15, (N,), device=device)
    labels[2:-1:3] = MF.IGNORE_INDEX
    exceeds(
        lambda h, w, b: mutant(h, w, b, labels),
        lambda h, w, b: with_options(h, w, b, labels),
        [draw(*s, dtype=HALF) for s in ((N, H), (V, H), (V,))],
        longest_sum=V,
    )


def kl(student, teacher, mask, tau=2.0):
    return linear_kl_reference(*student, *teacher, temperature=tau, mask=mask).sum() / mask.sum()


def fewer_pieces(h, w, b):
    return h, w[:-1], b[:-1]


def fewer_columns(h, w, b):
    return h[:, :-1], w[:, :-1], b


@mutants(
    {
        "student and teacher swapped": lambda s, t, m: kl(t, s, m),
        "no temperature": lambda s, t, m: kl(s, t, m, tau=1.0),
        "not multiplied by its square": lambda s, t, m: kl(s, t, m) / 4,
        "no mask": lambda s, t, m: kl(s, t, torch.ones_like(m)),
        "no bias of the student": lambda s, t, m: kl((*s[:2], None), t, m),
        "no bias of the teacher": lambda s, t, m: kl(s, (*t[:2], None), m),
        "the last piece left out": lambda s, t, m: kl(fewer_pieces(*s), fewer_pieces(*t), m),
        "the last column left out": lambda s, t, m: kl(fewer_columns(*s), t, m),
        "the teacher's last column left out": lambda s, t, m: kl(s, fewer_columns(*t), m),
    }
)
def test_linear_kl(mutant, draw, exceeds, device):
    student, teacher = (
        [draw(*s, dtype=HALF) for s in ((N, width), (V, width), (V,))] for width in (H, H_T)
    )
    teacher = [x.detach().double() for x in teacher]
    mask = torch.arange(N, device=device) % 3 != 1
    exceeds(
        lambda *s: mutant(s, teacher, mask), lambda *s: kl(s, teacher, mask), student, longest_sum=V
    )


# ---- relations: B rows of T pieces, R heads -----------------------------------------------------

B, T, R, W, W_T = 2, 17, 2, 20, 40


def relations(x, y, heads=R):
    return relation_kl_reference(x, y, heads)


def one_sided(x, y):
    """As if a score x_i x_j belonged to x_i alone: half of the gradient."""
    s, r = split_heads(x, R), split_heads(y, R)
    log_p = F.log_softmax(s @ s.mT.detach() * s.shape[-1] ** -0.5, -1)
    log_q = F.log_softmax(r @ r.mT * r.shape[-1] ** -0.5, -1)
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


@mutants(
    {
        "1/d for 1/sqrt(d)": lambda x, y: relations(x * (W / R) ** -0.25, y * (W_T / R) ** -0.25),
        "d of all heads": lambda x, y: relations(x * R**-0.25, y * R**-0.25),
        "one head of all": lambda x, y: relations(x, y, heads=1),
        "queries for values": lambda x, y: relations(
            x, torch.cat([y[..., : 2 * W_T], y[..., :W_T]], -1)
        ),
        "no gradient of values": lambda x, y: relations(
            torch.cat([x[..., : 2 * W], x[..., 2 * W :].detach()], -1), y
        ),
        "the last piece left out": lambda x, y: relations(x[:, :-1], y[:, :-1]),
        "the sum over rows": lambda x, y: relations(x, y) * B,
        "half of the gradient": one_sided,
    }
)
def test_relation_kl(mutant, draw, exceeds):
    teacher = draw(B, T, 3 * W_T, dtype=HALF).detach().double()
    exceeds(
        lambda x: mutant(x, teacher),
        lambda x: relations(x, teacher),
        [draw(B, T, 3 * W, dtype=HALF)],
        longest_sum=W_T // R,
    )


# ---- embeddings and layer norm ------------------------------------------------------------------

V_T, V_S, POSITIONS = 11, 5, 9
IDS = torch.tensor([[0, 10, 11, 4, 15, 3, 3], [1, 12, 2, 4, 7, 14, 0], [9, 13, 5, 4, 8, 6, 11]])
KINDS = (torch.arange(21).view(3, 7) > 11).long()


def embedding(ids, t, s, p, k, w, b, kinds=KINDS, positions=None):
    inputs = EmbeddingInputs(ids, t, s, p, k, kinds.to(ids.device), positions, w, b)
    return mixed_embedding_reference(inputs, eps=1e-12)


def norm(x, w, b, mean=True, divisor=0):
    if mean:
        x = x - x.mean(-1, keepdim=True)
    return x * (x.square().sum(-1, keepdim=True) / (x.shape[-1] - divisor)).rsqrt() * w + b


def added_once(ids, t, s, p, k, w, b):
    """As if of the pieces with one id only the first gave the table a gradient."""
    flat = ids.flatten().tolist()
    first = torch.tensor([flat.index(i) == n for n, i in enumerate(flat)], device=ids.device)
    rows = torch.cat([t, s])[ids]
    rows = rows.where(first.view(*ids.shape, 1), rows.detach())
    return norm(rows + p[: ids.shape[1]] + k[KINDS.to(ids.device)], w, b)


@mutants(
    {
        "the next id": lambda ids, t, *rest: embedding((ids + 1) % (V_T + V_S), t, *rest),
        "the next student row": lambda ids, t, s, *rest: embedding(ids, t, s.roll(1, 0), *rest),
        "the next position": lambda ids, *x: embedding(
            ids, *x, positions=torch.arange(1, 8, device=ids.device)[None]
        ),
        "no position": lambda ids, t, s, p, *rest: embedding(ids, t, s, None, *rest),
        "one type": lambda ids, *x: embedding(ids, *x, kinds=0 * KINDS),
        "the types swapped": lambda ids, *x: embedding(ids, *x, kinds=1 - KINDS),
        "no bias": lambda ids, *x: embedding(ids, *x[:-1], 0 * x[-1]),
        "an id that is repeated is added once": added_once,
    }
)
def test_mixed_embedding(mutant, draw, exceeds, device):
    shapes = ((V_T, H), (V_S, H), (POSITIONS, H), (2, H), (H,), (H,))
    ids = IDS.to(device)
    exceeds(
        lambda *x: mutant(ids, *x),
        lambda *x: embedding(ids, *x),
        [draw(*s, dtype=HALF) for s in shapes],
        longest_sum=IDS.numel(),
    )


@mutants(
    {
        "no mean taken off": lambda x, r, w, b: norm(x + r, w, b, mean=False),
        "twice the variance": lambda x, r, w, b: norm(x + r, w, b, divisor=-H),
        "the last column without gradient": lambda x, r, w, b: norm(
            torch.cat([(x + r)[:, :-1], (x + r)[:, -1:].detach()], -1), w, b
        ),
        "no residual": lambda x, r, w, b: norm(x, w, b),
        "the residual counted twice": lambda x, r, w, b: norm(x + 2 * r, w, b),
        "no weight": lambda x, r, w, b: norm(x + r, 1, b),
        "no bias": lambda x, r, w, b: norm(x + r, w, 0),
        "mean and variance without gradient": lambda x, r, w, b: (
            ((x + r) - (x + r).mean(-1, True).detach())
            * (x + r).var(-1, correction=0, keepdim=True).rsqrt().detach() * w + b
        ),
    }
)  # fmt: skip
def test_residual_layer_norm(mutant, draw, exceeds):
    exceeds(
        mutant,
        lambda *x: residual_layer_norm_reference(*x, eps=1e-12),
        [draw(*s, dtype=HALF) for s in ((N, H), (N, H), (H,), (H,))],
        longest_sum=H,
    )


# ---- dropout and the projected table ------------------------------------------------------------


@mutants(
    {
        "kept values not scaled": lambda x, kept, p: x * kept,
        "scaled by 1/p": lambda x, kept, p: x * kept / p,
        "kept for dropped": lambda x, kept, p: x * ~kept / (1 - p),
        "the mask rolled by one": lambda x, kept, p: x * kept.roll(1, 0) / (1 - p),
        "no mask in the gradient": lambda x, kept, p: (
            (x * kept / (1 - p)).detach() + (x - x.detach()) / (1 - p)
        ),
    }
)
def test_dropout(mutant, draw, exceeds, device):
    p, kept = 0.3, torch.rand(N, H, device=device) > 0.3
    exceeds(
        lambda x: mutant(x, kept, p),
        lambda x: x * kept / (1 - p),
        [draw(N, H, dtype=HALF)],
        longest_sum=1,
    )


@mutants(
    {
        "no bias": lambda s, w, b: F.linear(s, w),
        "the last column left out": lambda s, w, b: F.linear(s[:, :-1], w[:, :-1], b),
        "the bias of the next column": lambda s, w, b: F.linear(s, w, b.roll(1)),
        "scaled by 1/sqrt(E)": lambda s, w, b: F.linear(s * 6**-0.5, w, b),
    }
)
def test_project_table(mutant, draw, exceeds):
    exceeds(
        mutant,
        MF.project_table,
        [draw(*s, dtype=HALF) for s in ((V_S, 6), (H, 6), (H,))],
        longest_sum=H,
    )
