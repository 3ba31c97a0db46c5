"""Writes the tables of C++ and of mvbert/text from the Unicode Character Database.

    python csrc/make_unicode_tables.py

The data come from Python's own `unicodedata`, so the version is pinned by the interpreter that runs
this script: it refuses any but Unicode 14.0.0 (CPython 3.11). Both outputs are committed; the
library itself never asks `unicodedata`, so every Python version gives the same words.

The C++ file holds, for each mode (uncased, cased, lower-cased with accents), one entry a code point
that says what the word splitter does with it; the Python file holds the raw properties, from which
the plain definition in mvbert/text/wordpiece.py is written. Tests compare the two on every code
point.
"""

import sys
import textwrap
import unicodedata
from pathlib import Path

VERSION = "14.0.0"
ROOT = Path(__file__).resolve().parent.parent
LAST = 0x110000
BLOCK = 128
# The others (unassigned, private, surrogates) are dropped, and nothing else is true of them.
ASSIGNED = [c for c in range(LAST) if unicodedata.category(chr(c)) not in ("Cn", "Co", "Cs")]

# Kinds of an entry, as enum CharKind in csrc/unicode.h.
LETTER, DROP, SPACE, PUNCT, CJK, MAP_LETTER, MAP_PUNCT, MAP_CJK, GATHER, MARK, HANGUL = range(11)

CJK_RANGES = [
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
]  # fmt: skip


def is_cjk(c: int) -> bool:
    return any(a <= c <= b for a, b in CJK_RANGES)


def is_hangul(c: int) -> bool:
    return 0xAC00 <= c < 0xAC00 + 11172


def category(c: int) -> str:
    return unicodedata.category(chr(c))


def is_space(c: int) -> bool:
    """What separates words: BERT's whitespace plus what Python's str.split() adds to it."""
    return c in (0x20, 0x09, 0x0A, 0x0D) or category(c) in ("Zs", "Zl", "Zp")


def is_dropped(c: int) -> bool:
    return c not in (0x09, 0x0A, 0x0D) and (c in (0, 0xFFFD) or category(c).startswith("C"))


def is_punct(c: int) -> bool:
    ascii_punct = 33 <= c <= 47 or 58 <= c <= 64 or 91 <= c <= 96 or 123 <= c <= 126
    return ascii_punct or category(c).startswith("P")


def is_mark(c: int) -> bool:
    return category(c) == "Mn"


def nfd(s: str) -> str:
    return unicodedata.normalize("NFD", s)


def nfc(s: str) -> str:
    return unicodedata.normalize("NFC", s)


def decomposition(c: int) -> list[int]:
    """The canonical decomposition mapping of one step ([] if there is none); not Hangul's."""
    field = unicodedata.decomposition(chr(c))
    return [] if not field or field.startswith("<") else [int(x, 16) for x in field.split()]


def seconds_of_pairs() -> set[int]:
    """Code points that can combine with the one before them (NFC_Quick_Check=Maybe)."""
    seconds = set(range(0x1161, 0x1176)) | set(range(0x11A8, 0x11C3))
    for c in ASSIGNED:
        pair = decomposition(c)
        if len(pair) == 2 and nfc(nfd(chr(c))) == chr(c):
            seconds.add(pair[1])
    return seconds


class Pool:
    """Replacement strings, each stored once."""

    def __init__(self) -> None:
        self.bytes = bytearray()
        self.at: dict[bytes, int] = {}

    def entry(self, kind: int, text: str) -> int:
        """kind | length << 4 | offset << 8."""
        data = text.encode()
        assert 0 < len(data) < 16, data
        if data not in self.at:
            self.at[data] = len(self.bytes)
            self.bytes += data
        return kind | len(data) << 4 | self.at[data] << 8


def uncased_entry(c: int, pool: Pool) -> int:
    """Lower-case each character, clean, NFC, lower-case again, NFD, drop Mn, split."""
    lowered = chr(c).lower()
    # The order of cleaning and lower-casing does not matter, and nothing is left to lower after
    # the first pass: both are checked here, since the splitter relies on them.
    assert all(is_dropped(ord(x)) == is_dropped(c) for x in lowered)
    assert all(is_space(ord(x)) == is_space(c) for x in lowered)
    assert all(x.lower() == x for x in nfc(lowered)), hex(c)
    first = nfd(chr(c))[0]
    assert len(nfd(chr(c))) == 1 or chr(c).lower() == chr(c) or first.lower() != first, hex(c)
    if is_dropped(c):
        return DROP
    if is_space(c):
        return SPACE
    full = nfd(lowered)
    kept = [x for x in full if not is_mark(ord(x))]
    assert not any(is_space(ord(x)) or is_dropped(ord(x)) for x in full), hex(c)
    assert all(is_cjk(ord(x)) == is_cjk(c) for x in kept), hex(c)
    if not kept:
        return MARK
    if any(unicodedata.combining(x) for x in kept):
        assert not any(is_punct(ord(x)) for x in kept)
        return GATHER
    if is_cjk(c):
        assert len(kept) == 1
        assert not is_punct(ord(kept[0]))
        return CJK if kept[0] == chr(c) else pool.entry(MAP_CJK, kept[0])
    if is_hangul(c):
        return HANGUL
    if any(is_punct(ord(x)) for x in kept):
        assert len(kept) == 1, hex(c)
        return PUNCT if kept[0] == chr(c) else pool.entry(MAP_PUNCT, kept[0])
    return LETTER if kept == [chr(c)] else pool.entry(MAP_LETTER, "".join(kept))


def cased_entry(c: int, pool: Pool, seconds: set[int]) -> int:
    """Clean, NFC, split. Whatever composition could touch is gathered and composed at run time."""
    if is_dropped(c):
        return DROP
    if is_space(c):
        return SPACE
    composed = nfc(chr(c))
    if is_cjk(c):
        assert len(composed) == 1
        assert unicodedata.combining(composed) == 0
        return CJK if composed == chr(c) else pool.entry(MAP_CJK, composed)
    if composed != chr(c) or unicodedata.combining(chr(c)) or c in seconds:
        # Gathered code points are emitted as letters or by their kind here, so a punctuation mark
        # must not itself be gathered unless it composes to something else.
        assert composed != chr(c) or not is_punct(c), hex(c)
        return GATHER
    return PUNCT if is_punct(c) else LETTER


def accented_entry(c: int, pool: Pool, seconds: set[int]) -> int:
    """Lower-case each character, clean, NFC, split: as cased, of what lower-casing makes of it."""
    lowered = nfc(chr(c).lower())
    if lowered == nfc(chr(c)):
        return cased_entry(c, pool, seconds)
    # Composition is left to the run time where it can touch what comes of one character; what a
    # character is lower-cased to begins with a letter that combines with nothing before it.
    assert not unicodedata.combining(lowered[0]), hex(c)
    assert ord(lowered[0]) not in seconds, hex(c)
    others = (is_cjk, is_punct, is_space, is_dropped)
    assert not any(is_other(ord(x)) for x in lowered for is_other in others), hex(c)
    return pool.entry(MAP_LETTER, lowered)


def two_stage(values: list[int]) -> tuple[list[int], list[int]]:
    blocks: dict[tuple[int, ...], int] = {}
    index = []
    for at in range(0, LAST, BLOCK):
        block = tuple(values[at : at + BLOCK])
        index.append(blocks.setdefault(block, len(blocks)))
    return index, [x for block in blocks for x in block]


def c_array(kind: str, name: str, values: list[int]) -> str:
    body = textwrap.fill(", ".join(str(x) for x in values), 99, break_long_words=False)
    return f"const {kind} {name}[{len(values)}] = {{\n{body}}};\n"


def ranges(predicate, codes=ASSIGNED) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    for c in codes:
        if predicate(c):
            if spans and spans[-1][1] == c - 1:
                spans[-1] = (spans[-1][0], c)
            else:
                spans.append((c, c))
    return spans


def py_text(name: str, comment: str, words: list[str]) -> str:
    body = textwrap.fill(" ".join(words), 99, break_long_words=False, break_on_hyphens=False)
    return f'{comment}\n{name} = """\n{body}\n"""\n'


def py_ranges(name: str, comment: str, predicate, codes=ASSIGNED) -> str:
    return py_text(name, comment, [f"{a:X}-{b:X}" for a, b in ranges(predicate, codes)])


def write_cpp() -> None:
    pool = Pool()
    seconds = seconds_of_pairs()
    uncased, cased, accented = [DROP] * LAST, [DROP] * LAST, [DROP] * LAST
    combining, mark = [0] * LAST, [0] * LAST
    for c in ASSIGNED:
        uncased[c] = uncased_entry(c, pool)
    for c in ASSIGNED:
        cased[c] = cased_entry(c, pool, seconds)
    for c in ASSIGNED:
        accented[c] = accented_entry(c, pool, seconds)
        combining[c] = unicodedata.combining(chr(c))
        mark[c] = int(is_mark(c))
    # The gathered path decomposes without lower-casing: what is gathered uncased has no upper case.
    decomposed = []
    for c in ASSIGNED:
        if is_hangul(c):
            continue
        if nfd(chr(c)) != chr(c):
            decomposed.append((c, nfd(chr(c))))
        assert uncased[c] & 15 not in (GATHER, MARK) or nfd(chr(c).lower()) == nfd(chr(c))
    pairs = []
    for c in ASSIGNED:
        step = decomposition(c)
        if len(step) == 2 and nfc(nfd(chr(c))) == chr(c):
            pairs.append((step[0], step[1], c))
    pairs.sort()

    out = [
        f"// Made by csrc/make_unicode_tables.py from Unicode {VERSION}. Do not edit.\n",
        f'constexpr char kUnicodeVersionText[] = "{VERSION}";\n',
    ]
    for name, values in (("kUncased", uncased), ("kCased", cased), ("kAccented", accented)):
        index, blocks = two_stage(values)
        out.append(c_array("std::uint16_t", f"{name}Index", index))
        out.append(c_array("std::uint32_t", f"{name}Blocks", blocks))
    index, blocks = two_stage([m << 8 | k for m, k in zip(mark, combining, strict=True)])
    out.append("// Canonical combining class in the low byte, 0x100 for general category Mn.\n")
    out.append(c_array("std::uint16_t", "kCombiningIndex", index))
    out.append(c_array("std::uint16_t", "kCombiningBlocks", blocks))
    out.append(c_array("std::uint8_t", "kPool", list(pool.bytes)))
    flat, rows = [], []
    for c, text in decomposed:
        rows.append(f"{{{c}, {len(flat)}, {len(text)}}}")
        flat += [ord(x) for x in text]
    body = textwrap.fill(", ".join(rows), 99, break_long_words=False)
    out.append("// Code point, offset into kDecompositionText, length. Sorted. Hangul left out.\n")
    out.append(f"const Decomposition kDecompositions[{len(rows)}] = {{\n{body}}};\n")
    out.append(c_array("std::uint32_t", "kDecompositionText", flat))
    body = textwrap.fill(
        ", ".join(f"{{{a}, {b}, {c}}}" for a, b, c in pairs), 99, break_long_words=False
    )
    out.append("// First, second, composite. Sorted by (first, second). Hangul left out.\n")
    out.append(f"const Composition kCompositions[{len(pairs)}] = {{\n{body}}};\n")
    (ROOT / "csrc/unicode_tables.inc").write_text("".join(out))


def write_python() -> None:
    lower = [f"{c:X}:{'+'.join(f'{ord(x):X}' for x in chr(c).lower())}"
             for c in ASSIGNED if chr(c).lower() != chr(c)]  # fmt: skip
    steps = [
        f"{c:X}:{'+'.join(f'{x:X}' for x in decomposition(c))}"
        for c in ASSIGNED
        if decomposition(c)
    ]
    excluded = [
        f"{c:X}" for c in ASSIGNED if len(decomposition(c)) == 2 and nfc(nfd(chr(c))) != chr(c)
    ]
    classes = []
    combining = [unicodedata.combining(chr(c)) for c in range(LAST)]
    for value in sorted(set(combining) - {0}):
        spans = ranges(lambda c, v=value: combining[c] == v, [c for c in ASSIGNED if combining[c]])
        classes.append(f"{value}:{','.join(f'{a:X}-{b:X}' for a, b in spans)}")
    note = "# Inclusive ranges of code points, hexadecimal"
    out = [
        f'"""Unicode {VERSION} properties for mvbert.text.wordpiece.\n\n'
        'Made by csrc/make_unicode_tables.py; do not edit.\n"""\n',
        f'VERSION = "{VERSION}"\n',
        py_ranges("CONTROL", f"{note}: general category C (Cc, Cf, Cn, Co, Cs).",
                  lambda c: category(c).startswith("C"), range(LAST)),
        py_ranges("SPACE", f"{note}: general category Z.", lambda c: category(c).startswith("Z")),
        py_ranges("PUNCTUATION", f"{note}: general category P.",
                  lambda c: category(c).startswith("P")),
        py_ranges("NONSPACING", f"{note}: general category Mn.", is_mark),
        py_text("COMBINING", "# Canonical combining class: ranges.", classes),
        py_text("LOWER", "# Code point: full lower case, where it differs.", lower),
        py_text("DECOMPOSITION", "# Code point: canonical decomposition, one step.", steps),
        py_text("COMPOSITION_EXCLUDED", "# Pairs that NFC never composes again.", excluded),
    ]  # fmt: skip
    (ROOT / "mvbert/text/unicode_tables.py").write_text("\n".join(out))


if __name__ == "__main__":
    if unicodedata.unidata_version != VERSION:
        sys.exit(
            f"unicodedata is {unicodedata.unidata_version}; the tables are pinned to {VERSION}:"
            " run it with CPython 3.11"
        )
    write_cpp()
    write_python()
