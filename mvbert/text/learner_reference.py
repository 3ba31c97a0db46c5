"""Reference implementation of csrc/vocab_learner in plain Python, used in tests.

It learns the same WordPiece pieces in the same order, a thousand times slower. The
rule is that of TensorFlow Text's `wordpiece_vocab` tool (described, with one difference that
csrc/vocab_learner.h explains, in its guide "Subword tokenizers"):

    round 0     count every suffix of every word, weighted by the word's count; a proper suffix
                counts as a "##" piece
    keep        the pieces whose count reaches a threshold, and every single character
    rounds 1-3  cut each word greedily with what was kept, count only the suffixes that start where
                a piece starts, keep again

Ours are the exact size, the alphabet by coverage, and that no piece goes unused.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from itertools import accumulate

from mvbert.text.vocab import SPECIAL_PIECES
from mvbert.text.wordpiece import longest_matches

MAX_WORD_CHARACTERS = 100  # longer words are [UNK] whatever the vocabulary
ROUNDS = 4


def learn_vocab_reference(
    counts: Mapping[str, int], size: int, *, coverage: float = 1.0
) -> list[str]:
    """Learns exactly `size` pieces from words and how often each occurs.

    Args:
        counts: words, as BERT's splitter makes them, with their counts.
        size: pieces wanted, the special tokens included.
        coverage: share of character occurrences that the single characters must cover, in (0, 1].

    Returns:
        The special tokens, then pieces by descending use, ties in code point order.

    Raises:
        ValueError: `size` is below the alphabet or above the pieces that the words give, or no
            word consists of covered characters.
    """
    words, alphabet = learnable_words(counts, coverage)
    if not words:
        raise ValueError("no word is left to learn pieces from")
    need = size - len(SPECIAL_PIECES) - len(alphabet)
    if need < 0:
        raise ValueError(f"size {size} is below the alphabet of {len(alphabet)} pieces")
    threshold = sum(words.values())
    unused: set[str] = set()
    while True:
        threshold = search(words, alphabet, unused, need, threshold)
        chosen = ranked(words, alphabet, unused, threshold)[:need]
        uses = piece_uses(words, alphabet | set(chosen))
        useless = [piece for piece in chosen if not uses[piece]]
        if not useless:
            break
        unused.update(useless)
    pieces = sorted(alphabet | set(chosen), key=lambda piece: (-uses[piece], piece))
    return [*SPECIAL_PIECES, *pieces]


def learnable_words(counts: Mapping[str, int], coverage: float) -> tuple[dict[str, int], set[str]]:
    """The words that take part, and the single characters in the forms that they need."""
    words = {
        word: count
        for word, count in counts.items()
        if 0 < len(word) <= MAX_WORD_CHARACTERS and count > 0 and word not in SPECIAL_PIECES
    }
    occurrences: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            occurrences[character] += count
    wanted = math.ceil(coverage * occurrences.total())
    characters, covered = set(), 0
    for character, count in sorted(occurrences.items(), key=lambda item: (-item[1], item[0])):
        if covered >= wanted:
            break
        covered += count
        characters.add(character)
    words = {word: count for word, count in words.items() if characters.issuperset(word)}
    alphabet = {word[0] for word in words} | {"##" + c for word in words for c in word[1:]}
    return words, alphabet


def search(
    words: Mapping[str, int], alphabet: set[str], unused: set[str], need: int, high: int
) -> int:
    """The largest threshold up to `high` that keeps `need` usable pieces or more, by bisection."""

    def enough(threshold: int) -> bool:
        return len(ranked(words, alphabet, unused, threshold)) >= need

    if need == 0 or enough(high):
        return high
    low, high = 0, high - 1
    while low < high:
        middle = low + (high - low + 1) // 2
        if enough(middle):
            low = middle
        else:
            high = middle - 1
    if low == 0:
        raise ValueError(f"the words give fewer than {need} pieces beside the alphabet")
    return low


def ranked(
    words: Mapping[str, int], alphabet: set[str], unused: set[str], threshold: int
) -> list[str]:
    """The pieces of two characters or more that are kept, by descending count."""
    counts = learn_at(words, alphabet, threshold)
    pieces = [p for p, n in counts.items() if n >= threshold and p not in alphabet | unused]
    return sorted(pieces, key=lambda piece: (-counts[piece], piece))


def learn_at(words: Mapping[str, int], alphabet: set[str], threshold: int) -> Counter[str]:
    """The last round's counts at one threshold."""
    kept: set[str] = set()
    counts: Counter[str] = Counter()
    for round_ in range(ROUNDS):
        counts = Counter()
        for word, count in words.items():
            for start in range(len(word)) if round_ == 0 else cuts(word, kept):
                counts[spell(word, start, len(word))] += count
        kept = alphabet | {piece for piece, count in counts.items() if count >= threshold}
    return counts


def piece_uses(words: Mapping[str, int], pieces: Collection[str]) -> Counter[str]:
    """How often each piece is used when the words are cut greedily."""
    uses: Counter[str] = Counter()
    for word, count in words.items():
        for piece in longest_matches(word, pieces):
            uses[piece] += count
    return uses


def cuts(word: str, pieces: Collection[str]) -> list[int]:
    """Where the pieces of a greedily cut word start."""
    first, *others = longest_matches(word, pieces)
    return [0, *accumulate((len(piece) - len("##") for piece in others), initial=len(first))][
        : 1 + len(others)
    ]


def spell(word: str, start: int, end: int) -> str:
    """The piece that covers word[start:end]."""
    return word[start:end] if start == 0 else "##" + word[start:end]
