"""Learns a student vocabulary from a lexicon's (word, count) pairs, and scores it.

`topdown` is the C++ learner: csrc/vocab_learner.h has the algorithm, learner_reference.py the plain
definition. `bpe` and `unigram` are sentencepiece's (learner_sentencepiece.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mvbert import _core
from mvbert.config import LEARNERS, VocabConfig
from mvbert.cores import cores
from mvbert.errors import InputError
from mvbert.files import Json
from mvbert.text.corpus import Corpus
from mvbert.text.lexicon import WordList
from mvbert.text.vocab import SPECIAL_PIECES, Vocab

# On 410 MB of English Wikipedia and 78 MB of books, single characters that cover 0.9999 of the text
# are 239 (412 pieces of 4,928) and leave 0.018 % of held-out words unknown, where BERT's own
# vocabulary leaves 0.011 %. 0.99999 spends 2,938 pieces to reach 0.006 %; all 5,005 characters do
# not fit. docs/log.md has the table.
COVERAGE = VocabConfig.coverage

# The words of a corpus; a list of UTF-8 words; or all bytes and where each word ends, u64 [W].
WordSource = WordList | Sequence[bytes] | tuple[bytes, np.ndarray]


def learn_vocab(
    words: WordSource,
    counts: Sequence[int] | np.ndarray,
    size: int,
    *,
    learner: str = VocabConfig.learner,
    coverage: float = COVERAGE,
    threads: int = 0,
) -> list[str]:
    """Learns exactly `size` WordPiece pieces from distinct words and how often each occurs.

    The result depends on the words, their counts, `size`, `learner` and `coverage` alone; bpe and
    unigram also on the version of sentencepiece.

    Args:
        words: W words from BERT's splitter; the empty word (a lexicon's document mark), words of
            count 0 and words of more than 100 characters (always [UNK]) are ignored.
        counts: [W], integers.
        size: vocabulary size, the five special tokens included.
        learner: one of mvbert.config.LEARNERS.
        coverage: share of character occurrences that single characters must cover, in (0, 1]; words
            with other characters become [UNK]. Below 1 it keeps rare foreign letters from filling a
            small vocabulary.
        threads: 0 uses all available cores.

    Returns:
        [PAD] [UNK] [CLS] [SEP] [MASK], then pieces by descending use, ties in byte order. All words
        of covered characters can be cut, and greedy cutting uses every piece of two characters or
        more.

    Raises:
        InputError: `size` is smaller than the alphabet or larger than the words allow, an argument
            is out of range, or a word cannot come from the splitter.
        MissingExtra: `learner` needs sentencepiece, which is not installed.
    """
    if learner not in LEARNERS:
        raise InputError(f"learner must be one of {', '.join(LEARNERS)}, got {learner!r}")
    if not 0 < coverage <= 1:
        raise InputError(f"coverage must be in (0, 1], got {coverage}")
    if size <= len(SPECIAL_PIECES):
        raise InputError(f"size must be above the {len(SPECIAL_PIECES)} special tokens, got {size}")
    threads = cores(threads)
    data, ends = flat_words(words)
    numbers = check_counts(counts, len(ends))
    if learner == "topdown":
        try:
            pieces, _, _, _ = _core.learn_vocab(data, ends, numbers, size, coverage, threads)
        except ValueError as error:
            raise InputError(str(error)) from None
        return pieces
    from mvbert.text.learner_sentencepiece import learn_with_sentencepiece

    lexicon = dict(zip(decoded(data, ends), numbers.tolist(), strict=True))
    return learn_with_sentencepiece(lexicon, size, model_type=learner, coverage=coverage)


def vocab_report(
    pieces: Sequence[str],
    words: WordSource,
    counts: Sequence[int] | np.ndarray,
    teacher_vocab: Vocab | Sequence[str] | None = None,
    *,
    threads: int = 0,
) -> dict[str, Any]:
    """Statistics of a vocabulary on a lexicon, compared with a teacher's vocabulary.

    Returns:
        `size`; `alphabet`, pieces of one character; and over all words, each as often as it occurs,
        `pieces_per_word`, `whole_words` (share cut into one known piece) and `unknown` (share that
        is [UNK]); `never_used`, pieces that no word is cut into, special tokens aside. `words` and
        `distinct` count what that was measured on. `teacher`, None without one, has the same of the
        teacher's vocabulary, and `shared` and `shared_share`: pieces that are in both, and their
        share of `size`.

    Raises:
        InputError: the words are not UTF-8, or a vocabulary has duplicates or no [UNK].
    """
    data, ends = flat_words(words)
    check_utf8(data, ends)
    # Ignores the document mark.
    numbers = np.where(word_lengths(ends) > 0, check_counts(counts, len(ends)), np.uint64(0))
    report: dict[str, Any] = {
        "words": int(numbers.sum()),
        "distinct": int(np.count_nonzero(numbers)),
        **_cut_report(tuple(pieces), data, ends, numbers, threads),
        "teacher": None,
    }
    if teacher_vocab is not None:
        teacher = tuple(teacher_vocab)
        shared = len(set(pieces) & set(teacher))
        report["teacher"] = {
            "shared": shared,
            "shared_share": shared / len(pieces),
            **_cut_report(teacher, data, ends, numbers, threads),
        }
    return report


def _cut_report(
    pieces: tuple[str, ...], data: Any, ends: np.ndarray, counts: np.ndarray, threads: int
) -> dict[str, Any]:
    if "[UNK]" not in pieces:
        raise InputError("the vocabulary has no [UNK]: is this a WordPiece vocabulary?")
    unk = pieces.index("[UNK]")
    try:
        wordpiece = _core.WordPiece(list(pieces), unk)
    except ValueError as error:
        raise InputError(str(error)) from None
    piece_ends, ids = _core.segment_lexicon(data, ends, wordpiece, cores(threads))
    lengths = word_lengths(piece_ends)
    # Sums of whole numbers in float64: exact up to 2^53.
    uses = np.bincount(ids, weights=np.repeat(counts, lengths), minlength=len(pieces))
    # A word that cannot be tokenized is the single piece [UNK].
    whole = counts[lengths == 1].sum() - uses[unk]
    total = max(int(counts.sum()), 1)
    used = {pieces[id] for id in np.flatnonzero(uses)}
    return {
        "size": len(pieces),
        "alphabet": sum(len(p.removeprefix("##")) == 1 for p in pieces),
        "pieces_per_word": float(uses.sum() / total),
        "whole_words": float(whole / total),
        "unknown": float(uses[unk] / total),
        "never_used": sum(p not in used for p in pieces if p not in SPECIAL_PIECES),
    }


def print_vocab_report(report: dict[str, Any]) -> None:
    """Prints the report as a table to stderr (stdout is for the JSON)."""
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    table = Table("vocabulary", "student", *(["teacher"] if report["teacher"] else []))
    columns = [report, report["teacher"]] if report["teacher"] else [report]
    for name, key, form in (
        ("pieces", "size", ","),
        ("single characters", "alphabet", ","),
        ("pieces per word", "pieces_per_word", ".4f"),
        ("whole words", "whole_words", ".2%"),
        ("unknown words", "unknown", ".4%"),
        ("never used", "never_used", ","),
    ):
        table.add_row(name, *(format(column[key], form) for column in columns))
    console.print(table)
    if report["teacher"]:
        shared, share = report["teacher"]["shared"], report["teacher"]["shared_share"]
        console.print(
            f"{shared:,} of {report['size']:,} student pieces ({share:.1%}) are in the teacher's"
        )


def run_vocab(
    corpus_dir: str | Path,
    out_path: str | Path,
    size: int,
    *,
    learner: str = VocabConfig.learner,
    teacher: str | Path | None = None,
    cased: bool = False,
    coverage: float = COVERAGE,
    overwrite: bool = False,
) -> dict[str, Json]:
    """Learns a vocabulary from a corpus and writes its vocab.txt; implements `mvbert vocab`.

    Args:
        corpus_dir: a folder made by build_corpus.
        out_path: the vocab.txt to write, atomically; its folder is made if missing.
        size, learner, coverage: arguments of learn_vocab.
        teacher: a folder or file with the teacher's vocabulary, for the report; its added pieces
            also become pieces of the student, after the special ones.
        cased: treat the teacher's vocabulary as cased, whatever its folder says.
        overwrite: replace an existing vocabulary.

    Returns:
        What vocab_report returns, with `output`, `sha256`, `learner`, `coverage` and `seconds`.

    Raises:
        InputError: bad arguments, only one of teacher and corpus is cased, or `out_path` holds
            another vocabulary.
    """
    out_path = Path(out_path)
    corpus = Corpus.open(corpus_dir)
    teacher_vocab = None
    if teacher is not None:
        teacher_vocab = Vocab.load(teacher, lowercase=False if cased else None)
        corpus.check_casing(teacher_vocab, "the teacher's vocabulary")
    if out_path.is_dir():
        raise InputError(f"{out_path} is a folder; give the path of the vocab.txt to write")
    started = time.perf_counter()
    options: dict[str, Any] = {"learner": learner, "coverage": coverage}
    added = [a.piece for a in teacher_vocab.added] if teacher_vocab is not None else []
    pieces = _learn_beside(added, corpus, size, options)
    seconds = time.perf_counter() - started
    vocab = Vocab(tuple(pieces), corpus.lowercase, corpus.strip_accents)
    _save(vocab, out_path, overwrite)
    report = {
        "output": str(out_path),
        "sha256": vocab.sha256,
        "learner": learner,
        "coverage": coverage,
        "seconds": round(seconds, 3),
        **vocab_report(pieces, corpus.words, corpus.counts, teacher_vocab),
    }
    print_vocab_report(report)
    return report


def _learn_beside(
    added: list[str], corpus: Corpus, size: int, options: dict[str, Any]
) -> list[str]:
    """`size` pieces: the special ones, those of `added`, and others that are learned."""
    least = max(size - len(added), 0)
    # Learned pieces may include some of `added`; then more must be learned.
    for count in range(least, size + 1):
        pieces = learn_vocab(corpus.words, corpus.counts, count, **options)
        learned = [piece for piece in pieces if piece not in added]
        if len(learned) == least:
            return [*learned[: len(SPECIAL_PIECES)], *added, *learned[len(SPECIAL_PIECES) :]]
    raise InputError(
        f"cannot learn {size} pieces that include the teacher's {len(added)} added ones; give "
        "another size"
    )


def _save(vocab: Vocab, path: Path, overwrite: bool) -> None:
    """Writes the vocabulary, unless it exists already; replaces another one if `overwrite`."""
    text = "".join(f"{piece}\n" for piece in vocab.pieces).encode()
    try:
        if path.exists():
            if path.read_bytes() == text:
                return
            if not overwrite:
                raise InputError(
                    f"{path} holds another vocabulary; give another path, or --overwrite to "
                    "replace it"
                )
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    vocab.save(path)


# ---- words as arrays --------------------------------------------------------------------------


def flat_words(words: WordSource) -> tuple[Any, np.ndarray]:
    """The bytes of all words, concatenated, and where each word ends, u64 [W]."""
    if isinstance(words, WordList):
        return words.data, words.ends
    if isinstance(words, tuple) and len(words) == 2 and isinstance(words[1], np.ndarray):
        return words[0], words[1].astype(np.uint64, copy=False)
    lengths = np.fromiter((len(word) for word in words), dtype=np.uint64, count=len(words))
    return b"".join(words), np.cumsum(lengths, dtype=np.uint64)


def word_lengths(ends: np.ndarray) -> np.ndarray:
    """The lengths of parts that end at `ends`."""
    return np.diff(ends, prepend=ends.dtype.type(0))


def check_counts(counts: Sequence[int] | np.ndarray, words: int) -> np.ndarray:
    """Counts as u64 [W]."""
    array = np.asarray(counts)
    if array.shape != (words,):
        raise InputError(f"counts must have one number per word: {words} words, got {array.shape}")
    if words and not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"counts must be integers, got {array.dtype}")
    if words and array.min() < 0:
        raise InputError(f"counts must be 0 or more, got {array.min()}")
    return array.astype(np.uint64, copy=False)


def check_utf8(data: Any, ends: np.ndarray) -> None:
    """Raises unless the bytes are UTF-8 and every word ends at the end of a character."""
    at = _core.utf8_error(data)
    if at is None:
        array = np.frombuffer(data, np.uint8)
        inner = ends[ends < len(array)].astype(np.int64)
        split = inner[(array[inner] & 0xC0) == 0x80]
        at = int(split[0]) if len(split) else None
    if at is not None:
        word = int(np.searchsorted(ends, at, side="right"))
        raise InputError(f"word {word} is not UTF-8 (byte {at} of all words)")


def decoded(data: Any, ends: np.ndarray) -> list[str]:
    """The words as str; also checks what the C++ learner checks."""
    check_utf8(data, ends)
    raw = bytes(data)
    words, begin = [], 0
    for index, end in enumerate(ends.tolist()):
        word = raw[begin:end].decode()
        begin = end
        if len(word) > 2 and word.startswith("##"):
            raise InputError(
                f"word {index} begins with '##', the mark of inner pieces: cut text with the BERT "
                "splitter, which isolates '#'"
            )
        if any(character in " \t\n\v\f\r" for character in word):
            raise InputError(f"word {index} holds white space: a vocab.txt cannot")
        words.append(word)
    return words
