"""The models against plain definitions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mvbert.config import ModelConfig
from mvbert.model.embeddings import StudentTable, sinusoidal_start, spelled_rows, warm_start
from mvbert.model.encoder import EXPLICIT_LENGTH, Taps, attention
from mvbert.model.masked_lm import DeviceBatch, MaskedLM, MixedMaskedLM
from mvbert.text.batches import Batch

SHAPE = ModelConfig(60, 16, 2, 2, 32, max_position_embeddings=12)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def batch(rng, size: int, B: int = 3, T: int = 12, M: int = 2) -> Batch:
    labels = rng.integers(0, size, (B, M)).astype(np.int32)
    labels[0, 1] = -100
    return Batch(
        rng.integers(0, size, (B, T)).astype(np.int32),
        rng.integers(0, 2, (B, T)).astype(np.uint8),
        np.tile(np.arange(M, dtype=np.int32), (B, 1)),
        labels,
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("T", [5, EXPLICIT_LENGTH + 3])
def test_attention_is_torchs_with_its_gradient(generator, T, masked):
    qkv = torch.randn(3, 2, 2, T, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = None
    if masked:
        mask = torch.arange(T).expand(2, T) < torch.tensor([[3], [T]])
    ours = attention(qkv, mask, 0.0)
    theirs = F.scaled_dot_product_attention(
        *qkv, attn_mask=None if mask is None else mask[:, None, None, :]
    )
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    a, b = (torch.autograd.grad(out, qkv, weight)[0] for out in (ours, theirs))
    torch.testing.assert_close(a, b)


def test_attention_is_dropped_out_in_training_alone():
    model = MaskedLM(replace(SHAPE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5))
    model.init_weights(0)
    ids = torch.arange(12, dtype=torch.int32)[None]
    first, second = (model.train().encode(ids, ids * 0) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(model.eval().encode(ids, ids * 0), model.encode(ids, ids * 0))


def test_a_device_batch_points_into_the_flattened_rows():
    rows = batch(np.random.default_rng(0), 60)
    on_device = DeviceBatch.of(rows, torch.device("cpu"), slice(1, 3))
    flat = on_device.input_ids.flatten()[on_device.masked_index].reshape(2, 2)
    assert flat.tolist() == rows.input_ids[1:3][:, [0, 1]].tolist()
    assert on_device.labels.tolist() == rows.labels[1:3].flatten().tolist()


def test_mixed_loss_is_two_softmaxes_each_over_its_own_vocabulary():
    rng = np.random.default_rng(1)
    model = MixedMaskedLM(SHAPE, 20, 8).double().eval()
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.student.parameters():
            noise = torch.Generator().manual_seed(2)
            parameter.copy_(torch.randn(parameter.shape, generator=noise))
    data = DeviceBatch.of(batch(rng, 80, M=4), torch.device("cpu"))
    projection = model.student.projection
    rows = F.linear(model.student.table, projection.weight, projection.bias)
    table = torch.cat([model.embeddings.word.weight, rows])
    hidden = model.encode(data.input_ids, data.token_type_ids)
    embedded = (
        F.embedding(data.input_ids.long(), table)
        + model.embeddings.position.weight
        + model.embeddings.token_type(data.token_type_ids)
    )
    torch.testing.assert_close(hidden, model.encoder(model.embeddings.norm(embedded)))

    masked_hidden = model.masked_hidden(hidden, data.masked_index)
    with torch.no_grad():
        losses = sum(
            model.mixed_losses(masked_hidden, data.labels, model.student.rows(), reduction="none")
        )
    logits = F.linear(masked_hidden, table, torch.cat([model.head.bias, model.student.bias]))
    logits = logits.detach()
    for row, (label, loss) in enumerate(zip(data.labels.tolist(), losses, strict=True)):
        if label < 0:
            expected = torch.zeros(())
        elif label < 60:
            expected = F.cross_entropy(logits[row, :60], torch.tensor(label))
        else:
            expected = F.cross_entropy(logits[row, 60:], torch.tensor(label - 60))
        assert float(loss) == pytest.approx(float(expected), rel=1e-12)


def test_a_mixed_model_is_called_as_any_other():
    model = MixedMaskedLM(SHAPE, 20, 8).double().eval()
    model.init_weights(0)
    ids = torch.arange(50, 74, dtype=torch.int32).reshape(2, 12)  # of both vocabularies
    types, mask, taps = torch.zeros_like(ids), torch.arange(12).expand(2, 12) < 8, Taps([1])
    masked = model.encode(ids, types, mask, taps)
    short = model.encode(ids[:, :8], types[:, :8])
    torch.testing.assert_close(masked[:, :8], short)
    torch.testing.assert_close(
        model.encoder.layers[1](taps.hidden[1], taps.hidden[1], mask)[0], masked
    )


def test_every_parameter_of_stage_one_gets_a_gradient():
    model = MixedMaskedLM(SHAPE, 20, 8)
    model.init_weights(0)
    data = DeviceBatch.of(batch(np.random.default_rng(3), 80, B=8, M=8), torch.device("cpu"))
    rows = model.student.rows()
    hidden = model.encode(data.input_ids, data.token_type_ids, student_rows=rows)
    hidden = model.masked_hidden(hidden, data.masked_index)
    sum(model.mixed_losses(hidden, data.labels, rows)).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == ["pooler.weight", "pooler.bias"]


def test_initial_weights_are_a_function_of_the_seed():
    models = [MaskedLM(SHAPE) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        model.init_weights(seed)
    states = [nn.utils.parameters_to_vector(m.parameters()) for m in models]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_warm_start_keeps_rows_that_fit_and_the_best_part_of_others(generator):
    low_rank = torch.randn(40, 4, generator=generator) @ torch.randn(4, 16, generator=generator) + 3
    student = StudentTable(40, 4, 16)
    assert warm_start(student, low_rank) == pytest.approx(1.0)
    torch.testing.assert_close(student.rows(), low_rank, atol=1e-4, rtol=1e-4)

    full = torch.randn(40, 16, generator=generator)
    kept = warm_start(student, full)
    error = (student.rows() - full).square().sum() / (full - full.mean(0)).square().sum()
    assert kept == pytest.approx(1 - float(error.detach()), abs=1e-5)
    assert 4 / 16 < kept < 1


def test_warm_start_wider_than_the_teacher_is_exact(generator):
    rows = torch.randn(40, 6, generator=generator)
    student = StudentTable(40, 9, 6)
    assert warm_start(student, rows) == pytest.approx(1.0)
    torch.testing.assert_close(student.rows(), rows, atol=1e-5, rtol=1e-5)
    assert student.table[:, 6:].all()  # were they 0, as their projection is, they would stay so


def test_spelled_rows_take_the_shared_row_or_the_mean_of_the_spelling():
    ids = {"[UNK]": 0, "a": 1, "##b": 2, "##bc": 3, "x": 4}
    table = torch.arange(5.0)[:, None].expand(5, 2)
    rows, shared = spelled_rows(("x", "ab", "abc", "##bbc", "zz"), ids, table, 0)
    assert shared == 1
    assert rows[:, 0].tolist() == [4.0, 1.5, 2.0, 2.5, 0.0]


@pytest.mark.parametrize("H", [6, 7])
def test_sinusoidal_positions_have_the_spread_asked_for_and_tell_nearness(H):
    table = torch.empty(64, H)
    sinusoidal_start(table, 0.05)
    assert float(table.square().mean().sqrt()) == pytest.approx(0.05, rel=0.1)
    distance = (table[:, None] - table).norm(dim=-1)
    assert (distance[0, 1:4].diff() > 0).all()  # farther is more different
    if H % 2 == 0:  # a lone sine has no cosine beside it
        torch.testing.assert_close(distance.diagonal(1), distance[0, 1].expand(63))
