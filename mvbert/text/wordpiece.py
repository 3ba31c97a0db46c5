"""Reference implementation of BERT's word splitting and WordPiece in plain Python.

`basic_split` gives the words that Hugging Face's slow BertTokenizer (transformers 4.57, itself
after google-research/bert's tokenization.py) hands to WordPiece, and `wordpiece` cuts one word as
it does; special tokens in the text are not special here. Unicode properties come from generated
tables (Unicode 14.0.0), not from the running Python, so every Python version gives the same words.
csrc/words.cc and csrc/wordpiece.cc are the fast forms; tests compare them.
"""

from bisect import bisect_right
from collections.abc import Container, Iterable, Mapping
from functools import cache, lru_cache

from mvbert.text import unicode_tables

CJK_RANGES = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip


def basic_split(text: str, lowercase: bool = True, strip_accents: bool | None = None) -> list[str]:
    """Splits text into normalised words.

    >>> basic_split("Héllo, WORLD")
    ['hello', ',', 'world']

    Args:
        text: any string; lone surrogates are deleted like other control characters.
        lowercase: lower-case, as for an uncased vocabulary.
        strip_accents: remove accents from lower-cased text; None: if it is lower-cased.

    Returns:
        The words: no empty string, no whitespace inside.
    """
    if lowercase:
        # Character by character, so a capital sigma at the end of a word becomes an ordinary one.
        text = "".join(_lower(char) for char in text)
    text = _clean(text)
    text = "".join(f" {char} " if _is_cjk(char) else char for char in text)
    if lowercase and strip_accents is not False:
        text = _nfd(text)
        # BertTokenizer composes first and then decomposes, which changes nothing: see the checks in
        # csrc/make_unicode_tables.py.
        text = "".join(char for char in text if not _in("NONSPACING", char))
    else:
        text = _nfc(text)
    words: list[str] = []
    inside = False
    for char in text:
        if _is_space(char):
            inside = False
        elif _is_punctuation(char):
            words.append(char)
            inside = False
        elif inside:
            words[-1] += char
        else:
            words.append(char)
            inside = True
    return words


def wordpiece(word: str, vocab: Mapping[str, int], max_chars: int = 100) -> list[str]:
    """Cuts a word into the longest pieces that match, from left to right.

    >>> wordpiece("unaffable", {"un": 0, "##aff": 1, "##able": 2})
    ['un', '##aff', '##able']

    Args:
        word: one word, as `basic_split` yields it.
        vocab: piece to id; only its keys are used.
        max_chars: the longest word, in code points, that is cut at all.

    Returns:
        The pieces; those after the first begin with "##". [UNK] where no piece matches somewhere,
        or where the word is too long.
    """
    if len(word) > max_chars:
        return ["[UNK]"]
    if not word:
        return []
    return longest_matches(word, vocab) or ["[UNK]"]


def longest_matches(word: str, pieces: Container[str], prefix: str = "") -> list[str]:
    """The longest pieces that match from left to right; [] where none matches somewhere.

    Args:
        prefix: of the first piece; "##" if the word continues another. That of all others is "##".
    """
    matches = []
    start = 0
    while start < len(word):
        for end in range(len(word), start, -1):
            piece = prefix + word[start:end]
            if piece in pieces:
                break
        else:
            return []
        matches.append(piece)
        start, prefix = end, "##"
    return matches


def _clean(text: str) -> str:
    """Deletes control characters and U+FFFD; makes whitespace a space."""
    chars = []
    for char in text:
        if char in "\t\n\r":
            chars.append(" ")
        elif char not in "\0\ufffd" and not _in("CONTROL", char):
            chars.append(char)
    return "".join(chars)


@lru_cache(maxsize=1 << 14)
def _is_cjk(char: str) -> bool:
    return any(first <= ord(char) <= last for first, last in CJK_RANGES)


def _is_space(char: str) -> bool:
    return _in("SPACE", char)


def _is_punctuation(char: str) -> bool:
    """Category P, and every ASCII symbol, even if Unicode calls it otherwise (such as $)."""
    return ("!" <= char <= "~" and not char.isalnum()) or _in("PUNCTUATION", char)


# ---- Unicode properties and normal forms, from the generated tables -----------------------------


def _code(hexadecimal: str) -> int:
    return int(hexadecimal, 16)


@cache
def _starts_ends(name: str) -> tuple[list[int], list[int]]:
    pairs = [item.split("-") for item in getattr(unicode_tables, name).split()]
    return [_code(first) for first, _ in pairs], [_code(last) for _, last in pairs]


@lru_cache(maxsize=1 << 14)
def _in(name: str, char: str) -> bool:
    """Whether a character lies in one of the named ranges."""
    starts, ends = _starts_ends(name)
    at = bisect_right(starts, ord(char)) - 1
    return at >= 0 and ord(char) <= ends[at]


@cache
def _mapping(name: str) -> dict[str, str]:
    mapping = {}
    for item in getattr(unicode_tables, name).split():
        source, _, target = item.partition(":")
        mapping[chr(_code(source))] = "".join(chr(_code(part)) for part in target.split("+"))
    return mapping


def _lower(char: str) -> str:
    return _mapping("LOWER").get(char, char)


@cache
def _combining_classes() -> dict[str, int]:
    classes: dict[str, int] = {}
    for item in unicode_tables.COMBINING.split():
        value, _, spans = item.partition(":")
        for span in spans.split(","):
            first, last = map(_code, span.split("-"))
            classes.update((chr(code), int(value)) for code in range(first, last + 1))
    return classes


@cache
def _compositions() -> dict[tuple[str, str], str]:
    excluded = {chr(_code(item)) for item in unicode_tables.COMPOSITION_EXCLUDED.split()}
    return {
        (pair[0], pair[1]): char
        for char, pair in _mapping("DECOMPOSITION").items()
        if len(pair) == 2 and char not in excluded
    }


def _decompose(char: str) -> str:
    """The full canonical decomposition (The Unicode Standard, sections 3.7 and 3.12)."""
    syllable = ord(char) - 0xAC00
    if 0 <= syllable < 11172:
        lead, rest = divmod(syllable, 588)
        vowel, tail = divmod(rest, 28)
        return chr(0x1100 + lead) + chr(0x1161 + vowel) + (chr(0x11A7 + tail) if tail else "")
    step = _mapping("DECOMPOSITION").get(char)
    return char if step is None else "".join(map(_decompose, step))


def _nfd(text: str) -> str:
    if text.isascii():
        return text
    return "".join(_ordered(part for char in text for part in _decompose(char)))


def _ordered(text: Iterable[str]) -> list[str]:
    """Sorts each run of combining characters by combining class, stably."""
    classes = _combining_classes()
    result: list[str] = []
    run: list[str] = []
    for char in text:
        if char in classes:
            run.append(char)
            continue
        result += sorted(run, key=classes.__getitem__)
        run = []
        result.append(char)
    return result + sorted(run, key=classes.__getitem__)


def _compose_pair(first: str, second: str) -> str | None:
    lead, vowel = ord(first) - 0x1100, ord(second) - 0x1161
    if 0 <= lead < 19 and 0 <= vowel < 21:
        return chr(0xAC00 + (lead * 21 + vowel) * 28)
    syllable, tail = ord(first) - 0xAC00, ord(second) - 0x11A7
    if 0 <= syllable < 11172 and syllable % 28 == 0 and 0 < tail < 28:
        return chr(ord(first) + tail)
    return _compositions().get((first, second))


def _nfc(text: str) -> str:
    if text.isascii():
        return text
    classes = _combining_classes()
    result: list[str] = []
    starter = -1  # where the last starter stands in `result`
    last_class = 0
    for char in _nfd(text):
        char_class = classes.get(char, 0)
        adjacent = starter == len(result) - 1
        if starter >= 0 and (adjacent or 0 < last_class < char_class):
            composite = _compose_pair(result[starter], char)
            if composite is not None:
                result[starter] = composite
                continue
        if char_class == 0:
            starter = len(result)
        last_class = char_class
        result.append(char)
    return "".join(result)
