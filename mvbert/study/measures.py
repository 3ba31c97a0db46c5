"""Held-out bits per word: a measure that is comparable between vocabularies.

A masked language model does not give the probability of a text, and its loss per masked piece
depends on its vocabulary: smaller pieces are easier to guess. Here the unit is the word, and all
models predict the same words in the same contexts:

    bits(word) = - sum over its pieces i of log2 P(piece i | context, pieces before i)

Piece i is predicted with it and all later pieces of the word masked and the earlier ones visible,
one word at a time; the context is a fixed number of unmasked words of the same document on both
sides. This is the within-word left-to-right pseudo-log-likelihood (Salazar et al. 2020,
arXiv 1910.14659; Kauf and Ivanova 2023, arXiv 2305.10588), for single words.

Limits: bits of neighbouring words do not add up to bits of a text; the number of masks reveals how
many pieces the word has, which helps a vocabulary with small pieces more; words with an unknown
piece are skipped (the share is reported); punctuation counts as words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mvbert.errors import InputError
from mvbert.files import Json
from mvbert.model.masked_lm import MaskedLM
from mvbert.text.lexicon import Segmentation
from mvbert.training.device import Device

BATCH = 64  # rows per forward pass


@dataclass(frozen=True)
class Question:
    """One piece to predict: a row of ids, the position of the piece in it, and the piece."""

    ids: list[int]
    place: int
    piece: int
    word: int  # which of the chosen words it belongs to


@dataclass(frozen=True)
class MeasuredWords:
    """The words that a model has to predict, tokenized with its vocabulary.

    Attributes:
        questions: one per piece of each word.
        count: words that have questions.
        unknown: words skipped because they have an unknown piece or do not fit a row.
        trimmed: words whose context was truncated to fit a row.
        pieces: mean number of pieces per word.
    """

    questions: list[Question]
    count: int
    unknown: int
    trimmed: int
    pieces: float

    def facts(self) -> dict[str, Json]:
        """All fields except the questions, for JSON."""
        return {
            "words_asked": self.count,
            "words_unknown": self.unknown,
            "words_trimmed": self.trimmed,
            "pieces_per_word": round(self.pieces, 4),
        }


def choose_words(stream: np.ndarray, count: int) -> np.ndarray:
    """Positions of `count` evenly spaced words of a stream (all, if it has fewer)."""
    places = np.flatnonzero(stream)
    if not len(places):
        raise InputError("the held-out text has no words")
    count = min(count, len(places))
    return places[((np.arange(count) + 0.5) * len(places) / count).astype(np.int64)]


def make_questions(
    stream: np.ndarray, cut: Segmentation, places: np.ndarray, context: int, length: int
) -> MeasuredWords:
    """Questions for the words at `places` of a stream.

    Args:
        context: words on each side, fewer at the start or end of a document.
        length: T, the maximum row length; a context that does not fit loses its farthest words.
    """
    vocab = cut.vocab

    def pieces(word: int) -> list[int]:
        return cut.ids[cut.ends[word - 1] : cut.ends[word]].tolist()

    questions: list[Question] = []
    unknown = trimmed = total = 0
    for number, place in enumerate(places.tolist()):
        own = pieces(int(stream[place]))
        if vocab.unk in own or len(own) > length - 2:
            unknown += 1
            continue
        left = [pieces(word) for word in _document(stream[max(place - context, 0) : place][::-1])]
        right = [pieces(word) for word in _document(stream[place + 1 : place + 1 + context])]
        room = length - 2 - len(own)
        if sum(map(len, left + right)) > room:
            trimmed += 1
        while sum(map(len, left + right)) > room:
            longer = left if len(left) >= len(right) else right
            longer.pop()
        prefix = [piece for word in reversed(left) for piece in word]
        suffix = [piece for word in right for piece in word]
        total += len(own)
        for i, piece in enumerate(own):
            row = [vocab.cls, *prefix, *own[:i], *[vocab.mask] * (len(own) - i), *suffix, vocab.sep]
            questions.append(Question(row, 1 + len(prefix) + i, piece, number))
    count = len(places) - unknown
    return MeasuredWords(questions, count, unknown, trimmed, total / max(count, 1))


def _document(words: np.ndarray) -> list[int]:
    """The words up to the end of the document."""
    ends = np.flatnonzero(words == 0)
    return words[: ends[0] if len(ends) else len(words)].tolist()


@torch.no_grad()
def bits_per_word(
    model: MaskedLM, pad: int, words: MeasuredWords, device: Device
) -> dict[str, float]:
    """Measures bits per word.

    Args:
        model: a student, on the device.
        pad: the id of [PAD].

    Returns:
        bits_per_word; bits_error, its standard error over words; word_accuracy, the share of words
        all of whose pieces are the model's first choice.
    """
    if not words.count:
        raise InputError("the vocabulary cannot represent any of the held-out words")
    model.eval()
    bits = torch.zeros(max(q.word for q in words.questions) + 1, dtype=torch.float64)
    wrong = torch.zeros_like(bits)
    # Sorted by length, rows need hardly any padding.
    order = sorted(words.questions, key=lambda q: len(q.ids))
    for first in range(0, len(order), BATCH):
        part = order[first : first + BATCH]
        ids, mask = padded([q.ids for q in part], pad, device.device)
        with device.cast():
            hidden = model.encode(ids, torch.zeros_like(ids), attention_mask=mask)
            index = torch.tensor(
                [i * ids.shape[1] + q.place for i, q in enumerate(part)], device=device.device
            )
            labels = torch.tensor([q.piece for q in part], device=device.device)
            masked = model.masked_hidden(hidden, index)
            nats = model.losses(masked, labels).double().cpu()
            miss = (model.logits(masked).argmax(-1) != labels).double().cpu()
        word = torch.tensor([q.word for q in part])
        bits.index_add_(0, word, nats / math.log(2))
        wrong.index_add_(0, word, miss)
    measured = torch.zeros_like(bits, dtype=torch.bool)
    measured[[q.word for q in words.questions]] = True
    bits, wrong = bits[measured], wrong[measured]
    return {
        "bits_per_word": float(bits.mean()),
        "bits_error": float(bits.std(correction=0) / math.sqrt(len(bits))),
        "word_accuracy": float((wrong == 0).double().mean()),
    }


def padded(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pads rows to the longest one: ids [B, T] int32, and mask [B, T], False on padding."""
    ids = torch.full((len(rows), max(map(len, rows))), pad, dtype=torch.int32)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int32)
        mask[i, : len(row)] = True
    return ids.to(device), mask.to(device)
