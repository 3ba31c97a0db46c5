"""Learns a student vocabulary from a lexicon's (word, count) pairs.

The algorithm is described in csrc/vocab_learner.h and defined, plainly, in learner_reference.py.
"""

from collections.abc import Sequence

import numpy as np

from mvbert.errors import InputError

LEARNERS = ("topdown",)

# Words as a list of UTF-8 words, or flat: all bytes together and where each word ends, u64 [W].
Words = Sequence[bytes] | tuple[bytes, np.ndarray]


def learn_vocab(
    words: Words,
    counts: Sequence[int] | np.ndarray,
    size: int,
    *,
    learner: str = "topdown",
    coverage: float = 0.9999,
    threads: int = 0,
) -> list[str]:
    """Learns exactly `size` WordPiece pieces from distinct words and how often each occurs.

    The result depends on nothing but the words, their counts, `size` and `coverage`.

    Args:
        words: W distinct words as BERT's splitter makes them; the empty word (a lexicon's document
            mark) and words of count 0 take no part.
        counts: [W], integers.
        size: pieces wanted, the five special tokens included.
        learner: one of LEARNERS.
        coverage: share of character occurrences that single characters must cover, in (0, 1]; words
            with other characters become [UNK]. Below 1 it keeps rare foreign letters from filling a
            small vocabulary.
        threads: 0 for as many as the machine has.

    Returns:
        [PAD] [UNK] [CLS] [SEP] [MASK], then pieces by descending use, ties in byte order.

    Raises:
        InputError: `size` is below the alphabet or above what the words give, an argument is out of
            range, or a word is not one that the splitter makes.
    """
    if learner not in LEARNERS:
        raise InputError(f"learner must be one of {', '.join(LEARNERS)}, got {learner!r}")
    data, ends = flat_words(words)
    counts = check_counts(counts, len(ends))
    from mvbert import _tokenizer

    try:
        pieces, _, _, _ = _tokenizer.learn_vocab(data, ends, counts, size, coverage, threads)
    except ValueError as error:
        raise InputError(str(error)) from None
    return pieces


def flat_words(words: Words) -> tuple[bytes, np.ndarray]:
    """Words as all bytes together and the end of each, u64 [W]."""
    if isinstance(words, tuple) and len(words) == 2 and isinstance(words[1], np.ndarray):
        return bytes(words[0]), words[1].astype(np.uint64, copy=False)
    lengths = np.fromiter((len(word) for word in words), dtype=np.uint64, count=len(words))
    return b"".join(words), np.cumsum(lengths, dtype=np.uint64)


def check_counts(counts: Sequence[int] | np.ndarray, words: int) -> np.ndarray:
    """Counts as u64 [W]."""
    array = np.asarray(counts)
    if array.shape != (words,):
        raise InputError(f"counts must have one number a word: {words} words, got {array.shape}")
    if words and not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"counts must be integers, got {array.dtype}")
    if words and array.min() < 0:
        raise InputError(f"counts must be 0 or more, got {array.min()}")
    return array.astype(np.uint64, copy=False)
