"""Filled-in masks: the likeliest piece at every mask."""

from dataclasses import replace

import pytest
import torch

from mvbert.config import ModelConfig
from mvbert.errors import InputError
from mvbert.model.fill import fill_masks
from mvbert.model.masked_lm import MixedMaskedLM
from mvbert.training.distillation import reader

SENTENCE = "The [MASK] is cold and [MASK]."


@pytest.fixture
def teacher(teacher_vocab, student_vocab) -> MixedMaskedLM:
    shape = ModelConfig(teacher_vocab.size, 32, 2, 2, 64, max_position_embeddings=24)
    model = MixedMaskedLM(replace(shape, hidden_dropout_prob=0.5), student_vocab.size, 16)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(i))
    return model


def test_every_mask_gets_the_likeliest_piece(teacher, student_vocab):
    student = reader(teacher).eval()
    for layer in student.encoder.layers:  # so that a pass in training mode would differ
        layer.hidden_dropout = 0.5
    words = "the [MASK] i ##s c ##o ##l ##d and [MASK] .".replace("i ##s", "is").split()
    ids = torch.tensor([[student_vocab.ids[p] for p in ("[CLS]", *words, "[SEP]")]])
    with torch.no_grad():
        hidden = student.encode(ids, torch.zeros_like(ids))
        places = (ids[0] == student_vocab.mask).nonzero().flatten()
        best = student.logits(student.masked_hidden(hidden, places)).argmax(-1)
    first, second = (student_vocab.pieces[i] for i in best.tolist())
    expected = f"The [{first}] is cold and [{second}]."
    for training in (False, True, True):  # twice: dropout would give something else each time
        student.train(training)
        assert fill_masks(student, student_vocab, SENTENCE) == expected
        assert student.training == training


def test_sentences_that_cannot_be_filled(teacher, student_vocab):
    with pytest.raises(InputError, match=r"no \[MASK\] in the sentence 'cold'"):
        fill_masks(reader(teacher), student_vocab, "cold")
    with pytest.raises(InputError, match="a sentence of 25 pieces does not fit the model's 24"):
        fill_masks(reader(teacher), student_vocab, "[MASK]" + " a" * 22)
