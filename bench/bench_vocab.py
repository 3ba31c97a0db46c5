"""Vocabulary learners side by side: time, overlap with BERT's pieces, pieces per word.

    python bench/bench_vocab.py TEXT... --teacher vocab.txt [--size 4928] [--output results.jsonl]

Every learner gets the same text, BERT's splitting, lower case, and the same number of characters
for its alphabet. mvbert and sentencepiece learn from counted words, so the time to count them is a
line of its own; Hugging Face's WordPieceTrainer takes text and counts for itself. All vocabularies
are measured alike, by greedy cutting of the words of the text. Learners take turns, `--repeats`
times; the median is shown. The last line of stdout is the result as one JSON object, appended to
--output too.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mvbert
from mvbert.corpus import Corpus, build_corpus
from mvbert.corpus_folder import cores
from mvbert.learner import COVERAGE, learn_vocab, vocab_report
from mvbert.learner_reference import SPECIAL_TOKENS
from mvbert.readers import documents
from mvbert.vocab import Vocab


def hugging_face(texts: Sequence[Path], size: int, characters: int) -> list[str]:
    """WordPieceTrainer over the documents; the ids it gives, in order."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        limit_alphabet=characters,
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    found = (document for text in texts for document in documents(text, "text", "strict"))
    tokenizer.train_from_iterator(found, trainer)
    pieces = tokenizer.get_vocab()
    return sorted(pieces, key=pieces.__getitem__)


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--teacher", type=Path, required=True, help="a vocab.txt or its folder")
    parser.add_argument("--size", type=int, default=4928)
    parser.add_argument("--coverage", type=float, default=COVERAGE)
    parser.add_argument("--threads", type=int, default=0, help="0: one for each core")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    size, coverage, threads = arguments.size, arguments.coverage, arguments.threads

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        build_corpus(arguments.texts, Path(folder) / "corpus", heldout_share=0.0)
        counting = time.perf_counter() - started
        corpus = Corpus.open(Path(folder) / "corpus")
        words, counts = corpus.words, corpus.counts
        teacher = Vocab.load(arguments.teacher)
        first = learn_vocab(words, counts, size, coverage=coverage, threads=threads)
        characters = len({p.removeprefix("##") for p in first if len(p.removeprefix("##")) == 1})

        def ours(learner: str) -> Callable[[], list[str]]:
            return lambda: learn_vocab(
                words, counts, size, learner=learner, coverage=coverage, threads=threads
            )

        learners: dict[str, tuple[str | None, Callable[[], list[str]]]] = {
            "mvbert topdown": (None, ours("topdown")),
            "sentencepiece bpe": ("sentencepiece", ours("bpe")),
            "sentencepiece unigram": ("sentencepiece", ours("unigram")),
            "Hugging Face WordPieceTrainer": (
                "tokenizers",
                lambda: hugging_face(arguments.texts, size, characters),
            ),
        }
        seconds: dict[str, list[float]] = {name: [] for name in learners}
        pieces: dict[str, list[str]] = {}
        for _ in range(arguments.repeats):
            for name, (package, learn) in learners.items():
                if package is not None and version_of(package) is None:
                    continue
                started = time.perf_counter()
                pieces[name] = learn()
                seconds[name].append(time.perf_counter() - started)

        rows = []
        for name, (package, _) in learners.items():
            if name not in pieces:
                rows.append({"learner": name, "skipped": f"{package} is not installed"})
                continue
            report = vocab_report(pieces[name], words, counts, teacher)
            row = {
                "learner": name,
                "seconds": round(statistics.median(seconds[name]), 3),
                "counting_included": name.startswith("Hugging"),
                "version": version_of(package) if package else mvbert.__version__,
            }
            for key in ("size", "alphabet", "pieces_per_word", "whole_words", "unknown"):
                row[key] = report[key]
            row["never_used"] = report["never_used"]
            row["shared_share"] = report["teacher"]["shared_share"]
            rows.append(row)

        result = {
            "bench": "vocab",
            "texts": [text.name for text in arguments.texts],
            "words": corpus.manifest["words"],
            "distinct": corpus.manifest["distinct"],
            "counting_seconds": round(counting, 3),
            "coverage": coverage,
            "characters": characters,
            "threads": cores(threads),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            # Times are worth little where other work has the cores.
            "load": [round(load, 1) for load in os.getloadavg()],
            "learners": rows,
        }

    print(
        f"{result['words']:,} words, {result['distinct']:,} distinct; counted in {counting:.2f} s"
    )
    print(f"{'learner':32}{'seconds':>9}{'in BERT':>9}{'pieces/word':>13}{'whole':>8}"
          f"{'unknown':>10}{'unused':>8}")  # fmt: skip
    for row in rows:
        if "skipped" in row:
            print(f"{row['learner']:32}{row['skipped']}")
            continue
        print(f"{row['learner']:32}{row['seconds']:9.2f}{row['shared_share']:9.1%}"
              f"{row['pieces_per_word']:13.4f}{row['whole_words']:8.1%}{row['unknown']:10.4%}"
              f"{row['never_used']:8}")  # fmt: skip
    line = json.dumps(result)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
