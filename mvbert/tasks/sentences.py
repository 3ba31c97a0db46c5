"""Sentences of plain text: a sample without repetitions, a function of the texts and the seed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator

from mvbert.errors import InputError
from mvbert.text.readers import documents, find_texts

_END = re.compile(r"(?<=[.!?])[\"'”’)]*\s+(?=[\"'“‘(]*[A-Z0-9])")
WORDS = (3, 60)  # fewest and most of a sentence


def split_sentences(paragraph: str) -> list[str]:
    """Cuts a paragraph where a full stop, space and a capital meet."""
    return [part.strip() for part in _END.split(paragraph)]


def sentences_of(texts: Iterable[str], field: str) -> Iterator[str]:
    """The sentences of text files that are neither too short nor too long.

    Raises:
        InputError: a file cannot be read.
    """
    for file in find_texts(texts).files:
        for document in documents(file, field):
            for paragraph in document.split("\n"):
                for sentence in split_sentences(paragraph):
                    if WORDS[0] <= sentence.count(" ") + 1 <= WORDS[1]:
                        yield sentence


def sample_sentences(
    texts: Iterable[str], count: int, heldout: int, seed: int, field: str
) -> tuple[list[str], list[str]]:
    """Different sentences of text files: at most `count` to train on, and those held out.

    A sentence's place in the order is a hash of it and of the seed, so that the sample does not
    depend on the order of files.

    Raises:
        InputError: a file cannot be read, or there are not more than `heldout` sentences.
    """
    total = count + heldout
    sample: dict[bytes, str] = {}
    salt = seed.to_bytes(8, "little")
    for sentence in sentences_of(texts, field):
        data = sentence.encode("utf-8", "ignore")
        sample[hashlib.blake2b(data, digest_size=10, salt=salt).digest()] = sentence
        if len(sample) > 2 * total + 10_000:
            sample = {key: sample[key] for key in sorted(sample)[:total]}
    order = sorted(sample)[:total]
    if len(order) <= heldout:
        raise InputError(
            f"the text has {len(order)} different sentences of {WORDS[0]} to {WORDS[1]} words, not "
            f"more than the {heldout} that are held out; give more text, or set --heldout"
        )
    return [sample[key] for key in order[heldout:]], [sample[key] for key in order[:heldout]]
