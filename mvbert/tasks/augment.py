"""Variants of training texts: words masked and sampled anew from a masked language model.

The idea is TinyBERT's (Jiao et al. 2020, arXiv 1909.10351, section 3.2); here the student's own
masked language model fills all masked words of a text at once. A word keeps its number of pieces,
a first piece begins a word and a later one goes on, so that words stay words. The teacher says what
a variant is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mvbert.errors import InputError
from mvbert.files import atomic_write, json_text
from mvbert.model.masked_lm import MaskedLM
from mvbert.progress import Progress
from mvbert.tasks.formats import Examples
from mvbert.tasks.rows import batches_by_length
from mvbert.text.tokenizer import WordPieceTokenizer
from mvbert.text.vocab import SPECIAL_PIECES, Vocab
from mvbert.training.device import Device

MASKED = 0.3  # share of words
CHOICES = 20  # pieces that are drawn from, the likeliest
PIECES = 4096  # about, of a forward pass


def augmented(
    path: Path, examples: Examples, count: int, seed: int, bert: MaskedLM, vocab: Vocab,
    length: int, device: Device, progress: Progress,
) -> Examples:  # fmt: skip
    """`count` variants of every example, from `path` if an earlier start of the job made them."""
    of_words = bool(examples.texts) and isinstance(examples.texts[0], list)
    if not path.exists():
        progress.note(f"augmenting: {count} variants of {len(examples):,} examples")
        columns = [examples.texts] if examples.pairs is None else [examples.texts, examples.pairs]
        filler = Filler(bert, vocab, length, device)
        rows: list[str] = []
        for number in range(count):
            copies = [filler.variants(texts, (seed, number, i)) for i, texts in enumerate(columns)]
            rows += [json_text(list(row)) + "\n" for row in zip(*copies, strict=True)]
        atomic_write(path, "".join(rows))
    try:
        saved = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        if len(saved) != count * len(examples):
            raise ValueError
    except ValueError:
        raise InputError(f"{path} is not complete; remove it to make the variants again") from None
    texts = [row[0] if of_words else " ".join(row[0]) for row in saved]
    pairs = None if examples.pairs is None else [" ".join(row[1]) for row in saved]
    return Examples(texts, pairs, None, None, [])


class Filler:
    """Masks words and samples others from a masked language model.

    Args:
        bert: with its masked-language-model head.
        length: most pieces of a row; words behind it stay as they are.
    """

    def __init__(self, bert: MaskedLM, vocab: Vocab, length: int, device: Device) -> None:
        self._bert, self._vocab, self._device = bert.to(device.device).eval(), vocab, device
        self._length, self._tokenizer = length, WordPieceTokenizer(vocab)
        continuation = torch.tensor([piece.startswith("##") for piece in vocab.pieces])
        self._continuation = continuation
        specials = {*SPECIAL_PIECES, ""}
        odd = torch.tensor(
            [p in specials or p.startswith("[unused") for p in vocab.pieces], dtype=torch.bool
        )
        # What may not begin a word, and what may not go on.
        self._barred = torch.stack([continuation | odd, ~continuation | odd]).to(device.device)

    def variants(
        self, texts: Sequence[str | list[str]], key: tuple[int, int, int]
    ) -> list[list[str]]:
        """One variant of each text, as words; a function of texts, model and key."""
        words = [list(t) if isinstance(t, list) else t.split() for t in texts]
        draw = np.random.default_rng(key)
        flat = self._tokenizer.encode_batch(
            [word for sentence in words for word in sentence], add_special_tokens=False
        )
        rows: list[NDArray[np.int64]] = []
        masks: list[list[tuple[int, slice]]] = []  # of each text: words, and where their pieces lie
        first = 0
        for sentence in words:
            row = [self._vocab.cls]
            able: list[tuple[int, slice]] = []
            for number in range(len(sentence)):
                pieces = flat[first + number].tolist()
                if len(row) + len(pieces) >= self._length:
                    break
                if pieces:
                    able.append((number, slice(len(row), len(row) + len(pieces))))
                row += pieces
            first += len(sentence)
            rows.append(np.array([*row, self._vocab.sep]))
            picks = [word for word in able if draw.random() < MASKED]
            if able and not picks:
                picks = [able[draw.integers(len(able))]]
            masks.append(picks)
        filled = self._fill(rows, masks, int(draw.integers(2**62)))
        for sentence, ids, picks in zip(words, filled, masks, strict=True):
            for word, places in picks:
                pieces = [self._vocab.pieces[i].removeprefix("##") for i in ids[places]]
                sentence[word] = "".join(pieces)
        return words

    @torch.no_grad()
    def _fill(
        self, rows: list[NDArray[np.int64]], masks: list[list[tuple[int, slice]]], seed: int
    ) -> list[NDArray[np.int64]]:
        """The rows with other pieces at the masked places, each of the kind it had."""
        generator = torch.Generator().manual_seed(seed)
        lengths = np.array([len(row) for row in rows])
        size = max(1, PIECES // max(int(lengths.max(initial=1)), 1))
        for numbers in batches_by_length(lengths, size):
            T = int(lengths[numbers].max())
            ids = torch.full((len(numbers), T), self._vocab.pad, dtype=torch.int32)
            places: list[tuple[int, int]] = []
            for i, number in enumerate(numbers):
                ids[i, : lengths[number]] = torch.from_numpy(rows[number])
                spans = [span for _, span in masks[number]]
                places += [(i, at) for span in spans for at in range(span.start, span.stop)]
            if not places:
                continue
            row, column = torch.tensor(places).unbind(1)
            continuation = self._continuation[ids[row, column].long()].to(self._device.device)
            ids[row, column] = self._vocab.mask
            inside = torch.arange(T) < torch.from_numpy(lengths[numbers])[:, None]
            ids, inside = ids.to(self._device.device), inside.to(self._device.device)
            with self._device.cast():
                hidden = self._bert.encode(ids, torch.zeros_like(ids), inside)
                index = (row * T + column).to(self._device.device)
                scores = self._bert.logits(self._bert.masked_hidden(hidden, index)).float()
            scores = scores.masked_fill(self._barred[continuation.long()], float("-inf"))
            best = scores.topk(min(CHOICES, scores.shape[1]), -1)
            choice = torch.multinomial(best.values.softmax(-1).cpu(), 1, generator=generator)
            pieces = best.indices.cpu().gather(1, choice)[:, 0]
            for (i, at), piece in zip(places, pieces.tolist(), strict=True):
                rows[numbers[i]][at] = piece
        return rows
