"""Fills in masked words."""

from __future__ import annotations

import torch

from mvbert.errors import InputError
from mvbert.model.masked_lm import MaskedLM
from mvbert.text.tokenizer import WordPieceTokenizer
from mvbert.text.vocab import Vocab

MASK = "[MASK]"


@torch.no_grad()
def fill_masks(model: MaskedLM, vocab: Vocab, sentence: str) -> str:
    """Replaces every [MASK] of a sentence by the most likely piece.

    Args:
        model: a student, or a Stage I teacher as a reader of student pieces
            (mvbert.training.distillation.reader).
        vocab: its vocabulary.

    Raises:
        InputError: no [MASK] in the sentence, or more pieces than the model has positions.
    """
    if MASK not in sentence:
        raise InputError(f"no {MASK} in the sentence {sentence!r}")
    ids = WordPieceTokenizer(vocab).encode(sentence)
    if len(ids) > model.config.max_position_embeddings:
        raise InputError(
            f"a sentence of {len(ids)} pieces does not fit the model's "
            f"{model.config.max_position_embeddings} positions"
        )
    row = torch.tensor([ids])
    masked = (row[0] == vocab.mask).nonzero().flatten()
    was_training = model.training
    model.eval()
    hidden = model.masked_hidden(model.encode(row, torch.zeros_like(row)), masked)
    best = model.logits(hidden).argmax(-1)
    model.train(was_training)
    pieces = iter(vocab.pieces[i] for i in best.tolist())
    parts = sentence.split(MASK)
    return parts[0] + "".join(f"[{next(pieces)}]{part}" for part in parts[1:])
