"""Position by position: the losses are their definitions, and the teacher of Stage I gives them."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mvbert import functional
from mvbert.config import FinetuneConfig, ModelConfig
from mvbert.errors import InputError
from mvbert.model.encoder import Taps
from mvbert.model.masked_lm import MaskedLM
from mvbert.tasks.formats import find_task, read_task
from mvbert.tasks.model import load_bert, load_task_model
from mvbert.tasks.positions import Positions, relations_of_rows
from mvbert.tasks.rows import make_rows, read_batch
from mvbert.training.stages import load_stage1

CPU = torch.device("cpu")


def bert(hidden: int, layers: int, seed: int) -> MaskedLM:
    model = MaskedLM(ModelConfig(50, hidden, layers, 2, 2 * hidden, 32, hidden_dropout_prob=0.0,
                                 attention_probs_dropout_prob=0.0)).double()  # fmt: skip
    model.init_weights(seed)
    return model


@pytest.fixture
def batch(task_data, student_vocab):
    """Rows of several lengths, padded; ids below 50."""
    task = find_task("sst-2")
    rows = make_rows(task, read_task(task, [str(task_data / "sst")])["dev"], student_vocab, 32)
    rows.ids[:] %= 50
    chosen = np.arange(6)
    assert len({*rows.lengths[chosen]}) > 1
    return rows, chosen, read_batch(rows, chosen, 0, CPU)


def test_the_losses_are_those_of_every_row_alone(batch):
    """Of padded rows the mean over pieces of what each row has without padding."""
    rows, chosen, padded = batch
    student, teacher = bert(16, 2, 0), bert(24, 3, 1)
    config = FinetuneConfig(relations_weight=3.0, hidden_weight=0.5)
    positions = Positions(config, teacher, student.config)
    trained = positions.start(7, CPU)
    assert [p.shape for p in trained] == [(24, 16), (24,)]
    positions.map.double()
    taps = positions.student_taps()
    student.encode(padded.input_ids, padded.token_type_ids, padded.mask, taps)
    found = positions(padded, taps)

    relations = hidden = pieces = 0
    for number in chosen:
        alone = read_batch(rows, np.array([number]), 0, CPU)
        ours, theirs = Taps([2], [2]), Taps([3], [3])
        student.encode(alone.input_ids, alone.token_type_ids, taps=ours)
        teacher.encode(alone.input_ids, alone.token_type_ids, taps=theirs)
        count = alone.input_ids.shape[1]
        # Widths 16 and 24: eight relation heads are the most that cut both.
        relations += count * functional.relation_kl_reference(ours.qkv[2], theirs.qkv[3], 8)
        target = F.layer_norm(theirs.hidden[3], (24,))
        hidden += count * (positions.map(ours.hidden[2]) - target).square().mean()
        pieces += count
    expected = (3.0 * relations + 0.5 * hidden) / pieces
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    found.backward()
    assert positions.map.weight.grad.abs().max() > 0
    assert student.encoder.layers[0].qkv.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in teacher.parameters())


@torch.no_grad()
def test_a_teacher_that_is_the_student_has_no_relations_left(batch):
    _, _, padded = batch
    model = bert(16, 2, 0)
    taps = Taps([], [2])
    model.encode(padded.input_ids, padded.token_type_ids, padded.mask, taps)
    own = taps.qkv[2]
    assert relations_of_rows(own, own, padded.mask, 4).item() == pytest.approx(0.0, abs=1e-6)
    # What stands in padding has no share.
    other = own.masked_fill(~padded.mask[..., None], 9.0)
    assert relations_of_rows(own, other, padded.mask, 4).item() == pytest.approx(0.0, abs=1e-6)


def test_the_stage1_teacher_is_fine_tuned_on_student_pieces(training_inputs, student_vocab):
    model, vocab, head = load_bert(training_inputs / "stage1", 0.2, False)
    mixed, _ = load_stage1(training_inputs / "stage1")
    assert vocab.pieces == student_vocab.pieces
    assert head
    assert torch.equal(model.embeddings.word.weight, mixed.student.rows())
    assert model.config.hidden_dropout_prob == 0.2
    assert model.embeddings.dropout == 0.2
    assert torch.equal(model.pooler.weight, mixed.pooler.weight)


def test_a_student_learns_from_the_stage1_teacher_at_every_position(
    training_inputs, write_teacher, student_vocab, task_data, tmp_path, finetune, monkeypatch
):
    write_teacher(tmp_path / "student", student_vocab)
    sst, reader = task_data / "sst", tmp_path / "reader"
    options = ("--epochs", 3, "--lr", 3e-3, "--batch", 8)
    finetune(training_inputs / "stage1", "sst-2", sst, reader, *options)
    tuned, vocab = load_task_model(reader)
    assert vocab.pieces == student_vocab.pieces
    assert tuned.bert.config.hidden_size == 32

    seen = []
    forward = Positions.forward

    def spy(self, batch, taps):
        value = forward(self, batch, taps)
        seen.append(value.item())
        return value

    monkeypatch.setattr(Positions, "forward", spy)
    task = (tmp_path / "student", "sst-2", sst)
    many = (*options, "--teacher", reader)
    _, said = finetune(*task, tmp_path / "out", *many)
    assert "the teacher reads the same pieces: relations and hidden are learnt" in said
    assert np.mean(seen[-12:]) < 0.7 * np.mean(seen[:12])
    count = len(seen)
    finetune(*task, tmp_path / "scores", *many, "--distill")
    assert len(seen) == count

    # A teacher of another vocabulary gives its scores alone.
    finetune(training_inputs / "teacher", "sst-2", sst, tmp_path / "old", *options)
    _, said = finetune(*task, tmp_path / "last", *options, "--teacher", tmp_path / "old")
    assert "the teacher has another vocabulary: its scores alone are learnt" in said
    assert len(seen) == count


def test_the_same_seed_gives_the_same_run(training_inputs, task_data, tmp_path, finetune):
    sst = task_data / "sst"
    finetune(training_inputs / "stage1", "sst-2", sst, tmp_path / "reader", "--epochs", 1)
    records = []
    for name in ("a", "b"):
        finetune(
            training_inputs / "stage1", "sst-2", sst, tmp_path / name, "--epochs", 1, "--seeds", 2,
            "--teacher", tmp_path / "reader",
        )  # fmt: skip
        text = (tmp_path / name / "runs.jsonl").read_text()
        records.append(re.sub(r'"seconds": [\d.]+', "", text))
    assert records[0] == records[1]
    first, second = records[0].splitlines()
    assert first != second


def test_rows_that_the_teacher_has_no_position_for(batch):
    rows, _, _ = batch
    teacher = bert(16, 1, 0)
    positions = Positions(FinetuneConfig(), teacher, teacher.config)
    positions.check(rows)
    short = Positions(FinetuneConfig(), bert(16, 1, 0), teacher.config)
    short.teacher.config = replace(teacher.config, max_position_embeddings=4)
    with pytest.raises(InputError, match="the teacher has 4 positions, but a row has"):
        short.check(rows)
    rows.types[0] = 2
    with pytest.raises(InputError, match="the teacher has 2 token types, but the rows have 3"):
        positions.check(rows)
