"""Philox4x32-10: C++ and plain Python against the published vectors and each other."""

import random

import pytest

from mvbert import _core
from mvbert.text import philox

# Random123 1.14, tests/kat_vectors, the lines "philox4x32 10": counter, key, result.
KNOWN = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN, ids=["zeros", "ones", "pi"])
@pytest.mark.parametrize("generator", [_core.philox4x32, philox.philox4x32], ids=["cpp", "plain"])
def test_published_vectors(generator, counter, key, expected):
    assert list(generator(_words(counter), _words(key))) == _words(expected)


def test_every_instruction_set_writes_the_same_sixteen_blocks():
    rng = random.Random(1)
    for _ in range(20):
        first, rest, key = ([rng.getrandbits(32) for _ in range(n)] for n in (16, 3, 2))
        results = _core.philox_blocks(first, rest, key)
        assert results[0][0] == "plain"
        blocks = [philox.philox4x32([c, *rest], key) for c in first]
        expected = [block[word] for word in range(4) for block in blocks]
        for name, numbers in results:
            assert numbers == expected, name
