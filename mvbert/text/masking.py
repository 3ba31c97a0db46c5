"""The definition of masking a row for masked language modelling; csrc/masking.h is the fast form.

Whole words, as BERT's own code and transformers' DataCollatorForWholeWordMask: words of a shuffle
are masked one after another, each if its pieces fit into what is left of the budget, 15 % of the
row's pieces. Or each piece by a coin, as transformers' DataCollatorForLanguageModeling.
"""

from collections.abc import Iterator, Sequence

from mvbert.text.philox import below, halves, philox4x32

MASKING = 7  # csrc/philox.h, `Purpose`
CONTINUES, BEGINS, SEPARATES, STAYS = range(4)  # csrc/masking.h, `PieceKind`
IGNORE_INDEX = -100


def budget(pieces: int, probability: float) -> int:
    """How many pieces of a row of so many are masked, as transformers counts."""
    return max(1, round(pieces * probability)) if pieces and probability > 0 else 0


def hash_of_row(ids: Sequence[int], epoch: int) -> int:
    """64 bits that name the row in an epoch."""
    value = epoch
    for id in ids:
        value = ((value << 5 | value >> 59) & (2**64 - 1)) ^ id
        value = value * 0x9E3779B97F4A7C15 & (2**64 - 1)
    return value ^ value >> 32


def draws(seed: int, row: int) -> Iterator[int]:
    """The 32-bit numbers of a row."""
    block = 0
    while True:
        yield from philox4x32((block, MASKING, *halves(row)), halves(seed))
        block += 1


def mask_row(
    ids: Sequence[int],
    kinds: Sequence[int],
    *,
    mask: int,
    by_word: bool,
    budget: int,
    piece_threshold: int,
    mask_threshold: int,
    other_threshold: int,
    seed: int,
    epoch: int,
) -> tuple[list[int], list[int]]:
    """A masked row and its labels.

    Args:
        ids: without padding.
        kinds: by id, CONTINUES, BEGINS, SEPARATES or STAYS.
        budget: pieces to mask, if `by_word`.
        piece_threshold: of 2^32, the chance of a piece to be masked, if not.
        mask_threshold, other_threshold: of 2^32, below the first a masked piece becomes [MASK],
            below the second another piece.
    """
    numbers = draws(seed, hash_of_row(ids, epoch))
    labels = [IGNORE_INDEX] * len(ids)
    if by_word:
        words: list[list[int]] = []
        open = False
        for place, id in enumerate(ids):
            if kinds[id] == SEPARATES:
                open = False
            elif kinds[id] == CONTINUES and open:
                words[-1].append(place)
            else:
                words.append([place])
                open = True
        step = 0
        while budget > 0 and step < len(words):
            other = step + below(next(numbers), len(words) - step)
            words[step], words[other] = words[other], words[step]
            if len(words[step]) <= budget:
                budget -= len(words[step])
                for place in words[step]:
                    if kinds[ids[place]] != STAYS:
                        labels[place] = ids[place]
            step += 1
    else:
        for place, id in enumerate(ids):
            if kinds[id] <= BEGINS and next(numbers) < piece_threshold:
                labels[place] = id
    masked = list(ids)
    for place, label in enumerate(labels):
        if label == IGNORE_INDEX:
            continue
        action, choice = next(numbers), next(numbers)
        if action < mask_threshold:
            masked[place] = mask
        elif action < other_threshold:
            masked[place] = below(choice, len(kinds))
    return masked, labels
