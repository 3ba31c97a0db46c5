"""The Triton embedding against its definition, in the interpreter or on a GPU."""

import pytest
import torch

from mvbert import functional as MF

B, T, H, V_T, V_S, P = 3, 7, 20, 11, 5, 9
LONGEST = max(B * T, H)  # gradients are summed over pieces, statistics over a row


def ids_of(rows: int, columns: int, size: int, ends: tuple[int, ...]) -> torch.Tensor:
    ids = torch.randint(0, size, (rows, columns))
    flat = ids.view(-1)
    flat[: len(ends)] = torch.tensor(ends)
    return ids


@pytest.fixture
def tables(draw):
    def make(dtype, types=2, width=H):
        shapes = ((V_T, width), (V_S, width), (P, width), (types, width), (width,), (width,))
        return [draw(*s, dtype=dtype) for s in shapes]

    return make


@pytest.fixture
def both(device):
    """(kernel, reference) as functions of the six tables, for one set of ids."""
    ids = ids_of(B, T, V_T + V_S, (0, V_T - 1, V_T, V_T + V_S - 1)).to(device)
    ids[:, 3] = 4  # one id in every row: additions to one place

    def of(types=2, **options):
        kinds = (torch.arange(B * T).view(B, T) * 5 % 7 % types).to(torch.uint8).to(device)

        def run(backend):
            return lambda t, s, p, k, w, b: MF.mixed_embedding(
                ids, t, s, p, k, kinds, w, b, backend=backend, **options
            )

        return run("triton"), run("reference")

    return of


@pytest.mark.parametrize("width", [1, 20, 64, 130], ids=lambda w: f"H{w}")
def test_widths(width, dtype, tables, both, check_against):
    """One value, odd, a power of two, and just above one."""
    inputs = tables(dtype, width=width)
    if width == 1:
        # LayerNorm of one value is its bias; torch's own float16 is 14 % off, at eps = 1e-12.
        kernel, _ = both()
        assert torch.equal(kernel(*inputs), inputs[-1].expand(B, T, 1))
        return
    check_against(*both(), inputs, longest_sum=max(B * T, width))


@pytest.mark.parametrize("types", [1, 2, 3])
@pytest.mark.parametrize("deterministic", [False, True])
def test_types(types, deterministic, tables, both, check_against):
    """One type, the usual two (summed in registers), more (added with atomics)."""
    inputs = tables(torch.float32, types)
    check_against(*both(types, deterministic=deterministic), inputs, LONGEST)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("rows", [1, B])
def test_positions_of_the_caller(rows, deterministic, tables, both, check_against, device):
    positions = torch.randint(0, P, (rows, T)).to(device)
    functions = both(position_ids=positions, deterministic=deterministic)
    check_against(*functions, tables(torch.float32), LONGEST)


def test_frequent_ids_are_a_matter_of_speed(tables, both, check_against):
    check_against(*both(frequent_ids=(4, V_T)), tables(torch.float32), LONGEST)


def test_one_vocabulary_without_position_and_type(draw, check_against, device):
    ids = ids_of(B, T, V_S, (0, V_S - 1)).to(device)

    def of(backend):
        return lambda s, w, b: MF.mixed_embedding(
            ids, None, s, None, None, None, w, b, backend=backend
        )

    inputs = [draw(*s, dtype=torch.float32) for s in ((V_S, H), (H,), (H,))]
    check_against(of("triton"), of("reference"), inputs, LONGEST)


def test_not_contiguous(tables, check_against, device):
    """Tables and ids that are transposed or strided views, and an expanded upstream gradient."""
    ids = ids_of(T, B, V_T + V_S, (0, V_T + V_S - 1)).to(device)
    kinds = (torch.arange(2 * B * T, device=device) % 2).view(B, 2 * T)
    inputs = [x.detach().T.contiguous().T.requires_grad_() for x in tables(torch.float32)[:4]]
    vectors = [torch.randn(2 * H, device=device).requires_grad_() for _ in range(2)]

    def of(backend):
        return lambda t, s, p, k, w, b: MF.mixed_embedding(
            ids.T, t, s, p, k, kinds[:, ::2], w[::2], b[::2], backend=backend
        ).sum()

    # The output is one sum over everything.
    check_against(of("triton"), of("reference"), [*inputs, *vectors], longest_sum=B * T * H)


@pytest.mark.parametrize("padding_id", [4, V_T + 1])
def test_padding_row_has_no_gradient(padding_id, tables, both, assert_rounded):
    inputs = tables(torch.float32)
    kernel, _ = both(padding_id=padding_id)
    plain, _ = both()
    found = torch.autograd.grad(kernel(*inputs).square().sum(), inputs[:2])
    truth = torch.autograd.grad(plain(*inputs).square().sum(), inputs[:2])
    table, row = (0, padding_id) if padding_id < V_T else (1, padding_id - V_T)
    assert (found[table][row] == 0).all()
    for a, b in zip(found, truth, strict=True):
        b = b.clone()
        if b.shape == truth[table].shape:
            b[row] = 0
        assert_rounded(a, b.double(), LONGEST)


def test_gradcheck_with_dropout(tables, both):
    inputs = tables(torch.float64)
    kernel, _ = both(dropout_p=0.4, training=True)

    def run(*tables):
        torch.manual_seed(3)  # the same mask each time: the seed is drawn from torch's generator
        return kernel(*tables)

    # On a GPU additions to a row come in any order.
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True, nondet_tol=1e-12)


def test_dropout_keeps_the_right_share(draw, device, assert_rounded):
    p = 0.3
    ids = torch.randint(0, V_T, (16, 16)).to(device)
    table, one = draw(V_T, 64, dtype=torch.float32), torch.ones(64, device=device)
    arguments = (ids, table, None, None, None, None, one, one * 9)
    kept = MF.mixed_embedding(*arguments, dropout_p=p, training=True, backend="triton")
    whole = MF.mixed_embedding(*arguments, dropout_p=p, training=False, backend="triton")
    dropped = kept == 0
    # 16,384 draws: five standard deviations.
    assert abs(dropped.double().mean().item() - p) < 5 * (p * (1 - p) / dropped.numel()) ** 0.5
    kept_share = 1 - round(p * 2**16) / 2**16  # masks are drawn by 16 bits
    assert_rounded(kept[~dropped], whole[~dropped].double() / kept_share, longest_sum=64)
    # No two values of a row may share a draw: columns are uncorrelated.
    assert torch.corrcoef(dropped.view(256, 64).T.double()).fill_diagonal_(0).abs().max() < 0.35
    again = MF.mixed_embedding(*arguments, dropout_p=p, training=True, backend="triton")
    assert not torch.equal(kept, again)


def test_id_out_of_range(draw, device):
    """Checked: refused. Unchecked, as on a GPU: NaN in that row and nowhere else."""
    from mvbert.kernels import mixed_embedding

    table, vector = draw(V_T, H, dtype=torch.float32), torch.ones(H, device=device)
    ids = torch.tensor([[0, V_T, -1, 2]], device=device)
    MF.check_on_gpu(True)
    try:
        with pytest.raises(ValueError, match=r"input_ids must lie in \[0, 11\), got 11"):
            MF.mixed_embedding(ids, table, None, None, None, None, vector, vector, backend="triton")
    finally:
        MF.check_on_gpu(False)
    inputs = mixed_embedding.EmbeddingInputs(ids, table.detach(), *[None] * 5, vector, vector)
    hidden, _, _ = mixed_embedding.mixed_embedding_fwd(inputs, 1e-12, 0.0, None)
    assert hidden.isnan().any(-1).tolist() == [[False, True, True, False]]


def test_no_rows(tables, device):
    inputs = tables(torch.float32)
    ids = torch.zeros(0, T, dtype=torch.int32, device=device)
    hidden = MF.mixed_embedding(ids, *inputs[:4], None, *inputs[4:], backend="triton")
    assert hidden.shape == (0, T, H)
    for gradient in torch.autograd.grad(hidden.sum(), inputs):
        assert (gradient == 0).all()
