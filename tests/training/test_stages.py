"""What a stage makes of a batch and of itself: FLOPs, accuracy, rows, starts."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mvbert.config import RowConfig, Stage1Config, Stage2Config, TrainConfig, student_shape
from mvbert.model.card import model_card
from mvbert.model.flops import encoder_flops, head_flops
from mvbert.model.masked_lm import DeviceBatch
from mvbert.progress import Progress
from mvbert.training.device import Device
from mvbert.training.feed import Feed
from mvbert.training.ranks import Ranks
from mvbert.training.stages import Stage1, Stage2, load_stage1

ROW = RowConfig(length=16)
CPU = torch.device("cpu")
STAGE1 = Stage1Config(steps=4, rows=6, embedding_size=48, student_prob=0.25)
STAGE2 = Stage2Config(steps=4, rows=6, shape="1x64", dropout=0.0, distill=(), relation_heads=8)


@pytest.fixture(scope="module")
def stage1(training_inputs, corpus, student_vocab):
    teacher = training_inputs / "teacher"
    return lambda config: Stage1(config, ROW, corpus, teacher, student_vocab, Progress("test"))


@pytest.fixture(scope="module")
def stage2(training_inputs, corpus):
    def make(config, corpus=corpus) -> Stage2:
        where = Device(CPU, None, "as set")
        stage1 = load_stage1(training_inputs / "stage1")
        return Stage2(config, ROW, corpus, stage1, where, Progress("test"))

    return make


def test_flops_of_a_step(stage1, stage2, teacher_vocab, student_vocab):
    """A trained product counts three times, the frozen teacher's once."""
    pieces, V = 6 * 16, student_vocab.size
    task = stage1(STAGE1)
    shape = task.model.config
    classes = 0.25 * V + 0.75 * teacher_vocab.size
    forward = pieces * (encoder_flops(shape, 16) + 0.15 * head_flops(shape, classes))
    assert task.flops() == pytest.approx(3 * (forward + 2 * V * 48 * 32))
    own = student_shape("1x64", V)
    student = 3 * (encoder_flops(own, 16) + 0.15 * head_flops(own, V))
    assert stage2(STAGE2).flops() == pytest.approx(pieces * student)
    distilled = stage2(replace(STAGE2, distill=("logits", "hidden")))
    teacher = encoder_flops(shape, 16) + 0.15 * head_flops(shape, V)
    maps = 3 * 2 * 64 * 32
    assert distilled.flops() == pytest.approx(pieces * (student + teacher + maps))


def test_accuracy_is_the_share_of_pieces_that_come_first(stage2):
    task = stage2(STAGE2)
    batch = DeviceBatch.of(task.rows.read(0, 20), CPU)
    known = batch.labels[batch.labels >= 0]
    common = int(known.mode().values)
    with torch.no_grad():
        task.model.head.bias[common] += 100  # the one that it says everywhere
        sums = {name: float(value) for name, value in task.evaluate(batch).items()}
    right = int((known == common).sum())
    assert 0 < right < len(known)
    assert task.summary(sums)["accuracy"] == right / len(known)


def test_held_out_rows_are_drawn_apart_from_training_rows(stage2, corpus):
    same = SimpleNamespace(train=corpus.train, heldout=corpus.train, segment=corpus.segment)
    task = stage2(STAGE2, same)
    ids = [rows.read(0, 4).input_ids for rows in (task.rows, task.heldout)]
    assert not (ids[0] == ids[1]).all(1).any()


def test_the_masks_are_what_many_pieces_have(stage1, stage2):
    """Their gradient is summed apart, so it must be they that are named."""
    for task, masks in ((stage1(STAGE1), 2), (stage2(STAGE2), 1)):
        batch = DeviceBatch.of(task.rows.read(0, 200), CPU)
        named = torch.tensor(task.model.embeddings.frequent_ids)
        assert len(named) == masks
        masked = batch.input_ids.flatten()[batch.masked_index[batch.labels >= 0]]
        for id in named:
            assert 0.8 / masks / 3 < (masked == id).float().mean()
        assert torch.isin(masked, named).float().mean() == pytest.approx(0.8, abs=0.05)


def test_a_cold_student_table_is_as_spread_as_initial_rows_of_bert(stage1):
    rows = stage1(replace(STAGE1, warm_start=False)).model.student.rows()
    assert float(rows.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_a_feed_brings_its_rows_of_each_step_and_says_how_long_it_waited(stage2):
    task = stage2(STAGE2)
    with Feed(task, TrainConfig(rows=6, steps=4), Ranks(1, 2), CPU, 1) as feed:
        for step in (1, 2, 3):
            feed.fetch()
            expected = task.rows.read(6 * step + 3, 3)  # the second of two processes
            for name, tensor in feed.device.items():
                assert tensor.tolist() == getattr(expected, name).tolist(), (step, name)
        assert feed.take_wait() > 0
        assert feed.take_wait() == 0


def test_the_card_says_how_a_student_began():
    shape = student_shape("6x256", 4928)
    card = model_card("stage2", shape, replace(STAGE2, start="random", positions="random"), 32)
    assert "Its word embeddings were initialised randomly." in card
    assert "initialised randomly, the encoder" in card
    assert "trained with masked language modelling\nfor 4 steps of 6 rows of 32 pieces" in card
    config = replace(STAGE2, positions="sinusoidal", distill=("logits", "hidden"))
    card = model_card("stage2", shape, config, 32)
    assert "word embeddings were initialised from Stage I" in card
    assert "initialised as sinusoids" in card
    assert "and distillation (logits + hidden) from the Stage I teacher" in card
    assert "6 layers, hidden size 256" in card
    assert "6.20 M parameters" in card
    assert "The pooler was not trained" in card
    card = model_card("stage2", shape, replace(config, distill=("sentence",)), 32)
    assert "The pooler was trained, on the mean of the teacher's states." in card
