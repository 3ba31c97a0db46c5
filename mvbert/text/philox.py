"""Counter-based random numbers (Philox-4x32-10), the same bits as csrc/philox.h."""

from __future__ import annotations

import math
from collections.abc import Sequence

EPOCH_OFFSET, ROW_ORDER, VOCABULARY, ROW = 1, 2, 3, 4  # csrc/philox.h, `Purpose`

ORDER_ROUNDS = 6


def philox4x32(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Four 32-bit numbers of one 128-bit counter (four words) under a 64-bit key (two words).

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & 0xFFFFFFFF,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & 0xFFFFFFFF,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def halves(number: int) -> tuple[int, int]:
    return number & 0xFFFFFFFF, number >> 32


def below(bits: int, n: int) -> int:
    """A number of [0, n) from 32 random bits."""
    return (bits * n) >> 32


def permuted(position: int, count: int, epoch: int, seed: int) -> int:
    """The row id at a position of an epoch: a permutation of [0, count).

    A generalised Feistel network (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002)
    with Philox as round function: the number is x * b + y, with a * b hardly more than `count`; a
    result outside goes through again until it is inside.
    """
    a = math.isqrt(count - 1) + 1
    b = -(-count // a)
    value = position
    while True:
        x, y = divmod(value, b)
        for i in range(0, ORDER_ROUNDS, 2):
            x = (x + below(_order_bits(y, i, epoch, seed), a)) % a
            y = (y + below(_order_bits(x, i + 1, epoch, seed), b)) % b
        value = x * b + y
        if value < count:
            return value


def _order_bits(half: int, i: int, epoch: int, seed: int) -> int:
    return philox4x32((half, ROW_ORDER + 256 * i, *halves(epoch)), halves(seed))[0]
