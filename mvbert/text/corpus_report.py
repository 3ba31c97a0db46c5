"""Corpus statistics, as a table and as JSON: counts, and how vocabularies tokenize the text."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mvbert.errors import InputError, Interrupted
from mvbert.text.corpus_build import CHECKPOINT_BYTES, Progress, build_corpus
from mvbert.text.corpus_folder import Corpus
from mvbert.text.vocab import Vocab, case_name


def run_corpus(
    texts: Iterable[str | Path],
    out: str | Path,
    *,
    vocabs: Mapping[str, Vocab] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """`build_corpus` with a progress bar, then the report: what `mvbert corpus` does.

    Args:
        texts, out, options: arguments of build_corpus.
        vocabs: vocabularies by name, for pieces per word and unknown rate of each.

    Raises:
        InputError: as build_corpus raises it.
        Interrupted: Ctrl-C.
    """
    with _progress_bar("corpus") as progress:
        try:
            build_corpus(texts, out, progress=progress, **options)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted; {out} is not complete; run the same command again to resume from "
                f"the last checkpoint, if any (every {CHECKPOINT_BYTES >> 20} MiB of text)"
            ) from None
    corpus = Corpus.open(out)
    report = corpus_report(corpus, vocabs or {})
    print_corpus_report(report)
    for vocab in (vocabs or {}).values():
        if vocab.doubt:
            print(vocab.doubt, file=sys.stderr)
    return report


def run_corpus_info(folder: str | Path) -> dict[str, Any]:
    """Verifies a corpus against its manifest, then reports on it.

    Raises:
        InputError: not a corpus, or a file does not match the manifest.
    """
    corpus = Corpus.open(folder, verify="sha256")
    report = corpus_report(corpus, {})
    print_corpus_report(report)
    print("all files match the manifest", file=sys.stderr)
    return report


def load_vocabs(
    paths: Iterable[str | Path], lowercase: bool, strip_accents: bool
) -> dict[str, Vocab]:
    """Loads vocabularies to report on, by path.

    Raises:
        InputError: not a vocabulary, or its configuration has the other casing.
    """
    vocabs = {}
    for path in map(Path, paths):
        vocab = Vocab.load_for(path, lowercase, strip_accents)
        if (vocab.lowercase, vocab.strip_accents) != (lowercase, strip_accents):
            raise InputError(
                f"the vocabulary {path} is {vocab.casing} but the corpus is "
                f"{case_name(lowercase, strip_accents)}"
            )
        vocabs[str(path)] = vocab
    return vocabs


def corpus_report(corpus: Corpus, vocabs: Mapping[str, Vocab]) -> dict[str, Any]:
    """Counts of a corpus, and statistics of its train text in each vocabulary.

    Pieces per word and the unknown rate are over all word occurrences of the train stream;
    `unknown` is the share of words with an unknown piece, `shared` the share of a vocabulary's
    pieces that are also in each other one.
    """
    manifest = corpus.manifest
    report: dict[str, Any] = {
        "output": str(corpus.folder),
        **{k: manifest[k] for k in ("bytes", "documents", "words", "distinct", "lowercase")},
        "not_utf8": manifest["not_utf8"],
        "left_out": manifest.get("left_out", {}),
        "copies": len(manifest["sources"]) - len({s["sha256"] for s in manifest["sources"]}),
        "heldout": manifest["heldout"],
        "vocabularies": {},
    }
    for name, vocab in vocabs.items():
        cut = corpus.segment(vocab)
        counts = corpus.counts[1:].astype(np.float64)
        lengths = cut.lengths[1:]
        words = max(counts.sum(), 1.0)
        # A word that cannot be tokenized is the single unknown piece.
        first = cut.ids[cut.ends[:-1]]
        report["vocabularies"][name] = {
            "size": vocab.size,
            "pieces_per_word": float(counts @ lengths / words),
            "unknown": float(counts[first == vocab.unk].sum() / words),
            "whole_words": float(counts[(lengths == 1) & (first != vocab.unk)].sum() / words),
            "shared": {
                other: len(set(vocab.pieces) & set(others.pieces)) / vocab.size
                for other, others in vocabs.items()
                if other != name
            },
        }
    return report


def print_corpus_report(report: dict[str, Any]) -> None:
    """Prints the report as a table to stderr (stdout is for the JSON)."""
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    heldout = report["heldout"]
    table = Table("corpus", "train", "held out")
    table.add_row("documents", f"{report['documents']:,}", f"{heldout['documents']:,}")
    table.add_row("words", f"{report['words']:,}", f"{heldout['words']:,}")
    table.add_row("distinct words", f"{report['distinct']:,}", "")
    table.add_row("bytes of text", f"{report['bytes']:,}", "")
    console.print(table)
    if report["vocabularies"]:
        column = Column("vocabulary", overflow="fold")  # paths that differ at their ends
        table = Table(column, "pieces", "pieces per word", "whole words", "unknown")
        for name, cut in report["vocabularies"].items():
            table.add_row(
                name,
                f"{cut['size']:,}",
                f"{cut['pieces_per_word']:.4f}",
                f"{cut['whole_words']:.2%}",
                f"{cut['unknown']:.4%}",
            )
        console.print(table)
        for name, cut in report["vocabularies"].items():
            for other, share in cut["shared"].items():
                console.print(f"{share:.1%} of the pieces of {name} are in {other}", markup=False)
    share = heldout.get("share", 0.0)
    methods = {
        "texts": "separate files",
        "draw": f"a draw of {share:g} of the documents, seed {heldout.get('seed')}",
        "document": "the document with the smallest draw",
        "tail": f"the last {share:g} of the single document",
        "none": "nothing",
    }
    console.print(f"held out: {methods.get(heldout['by'], heldout['by'])}", markup=False)
    labels = {
        "repeated": "repeated files or folders",
        "empty": "empty files",
        "unsupported": "files of unsupported kinds",
        "not_regular": "pipes, sockets and devices",
        "nulls": "records whose text is null",
    }
    counts = report["left_out"].items()
    left_out = [f"{labels[reason]} ({count:,})" for reason, count in counts if count]
    if report["not_utf8"]:
        left_out.append(f"invalid UTF-8 sequences ({report['not_utf8']:,})")
    if left_out:
        console.print(f"skipped: {', '.join(left_out)}", markup=False)
    if report["copies"]:
        console.print(
            f"files that are copies of another one: {report['copies']:,}; their documents are in "
            "the corpus repeatedly, possibly both in train and held-out text"
        )


@contextlib.contextmanager
def _progress_bar(title: str) -> Iterator[Progress | None]:
    """Shows a progress bar over bytes, if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
