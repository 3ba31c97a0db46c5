"""Trims a model's vocabulary and measures what that costs (the verb `trim`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mvbert.config import MeasureConfig, RowConfig
from mvbert.cores import cores
from mvbert.errors import InputError
from mvbert.files import atomic_folder, atomic_write, check_new_folder, check_outside
from mvbert.model import huggingface
from mvbert.model.trim import fitted_vocab, read_vocab, write_trimmed
from mvbert.progress import Progress
from mvbert.study.evaluate import run_eval
from mvbert.text.corpus import Corpus
from mvbert.text.learner import learn_vocab
from mvbert.text.lexicon import Segmentation
from mvbert.text.texts import check_integer
from mvbert.text.vocab import Vocab
from mvbert.training.device import choose_device

MEASURED_WORDS = 1024  # for bits per word


@dataclass(frozen=True)
class TrimReport:
    """What a trim reports; None: not measured."""

    model: str
    out: str
    vocab_before: int
    vocab_after: int
    kept: int
    """Pieces that kept their rows."""
    new: int
    parameters_saved: int
    tensors: list[str]
    """Names of those that were rewritten."""
    # Of the corpus's words, each counted as often as it occurs.
    words: int | None = None
    changed_words: float | None = None
    """The share that is cut into other pieces."""
    unknown_words_before: float | None = None
    unknown_words_after: float | None = None
    pieces_per_word_before: float | None = None
    pieces_per_word_after: float | None = None
    # On held-out text, as run_eval measures it.
    loss_before: float | None = None
    accuracy_before: float | None = None
    bits_per_word_before: float | None = None
    bits_error_before: float | None = None
    loss_after: float | None = None
    accuracy_after: float | None = None
    bits_per_word_after: float | None = None
    bits_error_after: float | None = None


def run_trim(
    name: str,
    out: Path,
    *,
    vocab: Path | None = None,
    corpus: Path | None = None,
    size: int = 0,
    cased: bool = False,
    row: RowConfig | None = None,
    eval_rows: int = 256,
    device: str = "auto",
    threads: int = 0,
    overwrite: bool = False,
) -> TrimReport:
    """Writes a model with a smaller vocabulary.

    Args:
        name: a name for mvbert.model.huggingface.find_model.
        vocab: the pieces to keep or to add; None: learned from the corpus.
        corpus: a corpus; also what the change is measured on.
        size: pieces to learn.
        cased: treat the model's vocabulary as cased, whatever its folder says.
        eval_rows: held-out rows for the loss; 0 measures none.

    Raises:
        InputError: neither a vocabulary nor a corpus with a size, or what cannot be trimmed.
    """
    progress = Progress("trim")
    if (vocab is None) == (not size):
        raise InputError("give either --vocab, or --corpus with --size")
    if vocab is None and corpus is None:
        raise InputError("--size needs --corpus, whose words the pieces are learned from")
    check_integer("eval_rows", eval_rows, 0, 2**31)
    choose_device(device)  # refuses one that does not exist before anything is written
    check_new_folder(out, overwrite)
    folder = huggingface.find_model(name)
    check_outside(out, folder, corpus)
    old = read_vocab(folder, cased)
    progress.note(old.doubt)
    torch.set_num_threads(cores(threads))
    data = None if corpus is None else Corpus.open(corpus)
    if data is not None:
        data.check_casing(old, f"the vocabulary of {folder}")
    if vocab is not None:
        new = _read_new(vocab, old, folder)
    else:
        assert data is not None
        pieces = learn_vocab(data.words, data.counts, size, threads=cores(threads))
        new = Vocab(tuple(pieces), old.lowercase, old.strip_accents)
    new = fitted_vocab(folder, new)
    report = _trim(folder, out, old, new, overwrite, progress)
    if data is None:
        return report
    report = replace(report, **_words(data, data.segment(old, threads), data.segment(new, threads)))
    progress.note(
        f"{report.changed_words:.2%} of the text's words are cut into other pieces; "
        f"{report.pieces_per_word_before:.3f} -> {report.pieces_per_word_after:.3f} pieces per word"
    )
    if not eval_rows or not _predicts(folder):
        progress.note("no held-out loss: " + ("as asked" if not eval_rows else "no such head"))
        return report
    losses: dict[str, Any] = {}
    for suffix, model in (("before", folder), ("after", out)):
        measures = run_eval(
            str(model), data.folder, row or RowConfig(), MeasureConfig(words=MEASURED_WORDS),
            cased and suffix == "before", eval_rows=eval_rows, device=device, threads=threads,
        )  # fmt: skip
        for measure in ("loss", "accuracy", "bits_per_word", "bits_error"):
            losses[f"{measure}_{suffix}"] = measures[measure]
    report = replace(report, **losses)
    progress.note(
        f"held-out loss {report.loss_before:.4f} -> {report.loss_after:.4f} nats per masked "
        f"piece (each of its own vocabulary), {report.bits_per_word_before:.3f} -> "
        f"{report.bits_per_word_after:.3f} bits per word (comparable)"
    )
    return report


def _read_new(path: Path, old: Vocab, folder: Path) -> Vocab:
    """The vocabulary in a file, with the old one's added pieces."""
    new = Vocab.load_for(path, old.lowercase, old.strip_accents)
    if (new.lowercase, new.strip_accents) != (old.lowercase, old.strip_accents):
        raise InputError(
            f"the vocabulary {path} is {new.casing} but that of {folder} is {old.casing}"
        )
    return new.with_added_of(old)


def _trim(
    folder: Path, out: Path, old: Vocab, new: Vocab, overwrite: bool, progress: Progress
) -> TrimReport:
    """Writes the model with the new vocabulary."""
    if "[MASK]" in old.ids and "[MASK]" not in new.ids:
        raise InputError(f"{new.source} has no [MASK], which the model's vocabulary has")
    missing = [a.piece for a in old.added if a.piece not in new.ids]
    if missing:
        progress.note(f"added pieces that the new vocabulary lacks: {', '.join(missing[:5])}")
    with atomic_folder(out, overwrite=overwrite) as partial:
        trimmed = write_trimmed(folder, partial, old, new)
        atomic_write(partial / "README.md", _card(folder, old, new, trimmed.shared))
    width = trimmed.tensors[trimmed.rewritten[0]].numel() // new.size
    progress.note(
        f"{old.size:,} pieces -> {new.size:,}, {trimmed.shared:,} of them the model's own; "
        f"word table: {(new.size - old.size) * width / 1e6:+.2f} M parameters"
    )
    return TrimReport(
        model=str(folder),
        out=str(out),
        vocab_before=old.size,
        vocab_after=new.size,
        kept=trimmed.shared,
        new=new.size - trimmed.shared,
        parameters_saved=(old.size - new.size) * width,
        tensors=list(trimmed.rewritten),
    )


def _words(corpus: Corpus, old: Segmentation, new: Segmentation) -> dict[str, Any]:
    """How many of a text's words change their pieces, each counted as often as it occurs."""
    counts = corpus.counts[1:].astype(np.int64)  # word 0 ends documents
    total = int(counts.sum())
    names = [np.array(s.vocab.pieces, object)[s.ids] for s in (old, new)]
    lengths = [s.lengths[1:].astype(np.int64) for s in (old, new)]
    same = lengths[0] == lengths[1]
    # Words with as many pieces as before are compared piece by piece.
    starts = [np.concatenate([[0], s.ends[:-1]])[1:].astype(np.int64) for s in (old, new)]
    for place in range(int(lengths[0][same].max(initial=0))):
        rows = np.flatnonzero(same & (lengths[0] > place))
        equal = names[0][starts[0][rows] + place] == names[1][starts[1][rows] + place]
        same[rows[~equal.astype(bool)]] = False
    unknown = [
        int(counts[(s.ids[start] == s.vocab.unk) & (length > 0)].sum())
        for s, start, length in zip((old, new), starts, lengths, strict=True)
    ]
    return {
        "words": total,
        "changed_words": float(counts[~same].sum() / total),
        "unknown_words_before": unknown[0] / total,
        "unknown_words_after": unknown[1] / total,
        "pieces_per_word_before": float((counts * lengths[0]).sum() / total),
        "pieces_per_word_after": float((counts * lengths[1]).sum() / total),
    }


def _predicts(folder: Path) -> bool:
    """Whether a folder is a BERT with the head of masked language modelling."""
    try:
        return not any(n.startswith("cls.") for n in huggingface.load_masked_lm(folder)[1])
    except InputError:  # another family, which `eval` does not read
        return False


def _card(folder: Path, old: Vocab, new: Vocab, rows: int) -> str:
    return f"""\
# {folder.name} with {new.size:,} word pieces

The model {folder.name} with its vocabulary of {old.size:,} pieces replaced by one of {new.size:,},
and no training: {rows:,} pieces kept their rows, {new.size - rows:,} new ones have the mean of the
rows of the pieces they were spelled with. Made by `mvbert trim`. The license is that of
{folder.name}.
"""
