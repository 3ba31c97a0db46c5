"""Filling in masked words: the quickest look at what a model has learned."""

from __future__ import annotations

import torch

from mvbert.errors import InputError
from mvbert.model.masked_lm import MaskedLM, MixedMaskedLM
from mvbert.text.vocab import Vocab
from mvbert.text.wordpiece import basic_split, wordpiece

MASK = "[MASK]"


@torch.no_grad()
def fill_masks(model: MaskedLM, vocab: Vocab, sentence: str) -> str:
    """The sentence with the likeliest student piece in place of every [MASK].

    Args:
        model: a student, or a Stage I teacher, which then reads and predicts student pieces.
        vocab: the student's vocabulary.

    Raises:
        InputError: no [MASK] in the sentence, or more pieces than the model has positions.
    """
    if MASK not in sentence:
        raise InputError(f"no {MASK} in the sentence {sentence!r}")
    ids = [vocab.cls]
    for i, part in enumerate(sentence.split(MASK)):
        if i:
            ids.append(vocab.mask)
        for word in basic_split(part, lowercase=vocab.lowercase):
            ids += [vocab.ids[piece] for piece in wordpiece(word, vocab.ids)]
    ids.append(vocab.sep)
    if len(ids) > model.config.max_position_embeddings:
        raise InputError(
            f"a sentence of {len(ids)} pieces does not fit the model's "
            f"{model.config.max_position_embeddings} positions"
        )
    mixed = isinstance(model, MixedMaskedLM)
    row = torch.tensor([ids]) + (model.config.vocab_size if mixed else 0)
    masked = (torch.tensor(ids) == vocab.mask).nonzero().flatten()
    was_training = model.training
    model.eval()
    hidden = model.masked_hidden(model.encode(row, torch.zeros_like(row)), masked)
    logits = (
        model.student_logits(hidden) if isinstance(model, MixedMaskedLM) else model.logits(hidden)
    )
    model.train(was_training)
    found = iter(vocab.pieces[i] for i in logits.argmax(-1).tolist())
    parts = sentence.split(MASK)
    return parts[0] + "".join(f"[{next(found)}]{part}" for part in parts[1:])
