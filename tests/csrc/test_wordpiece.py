"""Cutting words into pieces: C++ against the plain definition, literals, Hugging Face."""

import random

import pytest

from mvbert import _core
from mvbert.text.wordpiece import basic_split, wordpiece

PIECES = [
    "[UNK]",
    "un",
    "##aff",
    "##able",
    "a",
    "##a",
    "##ab",
    "##abc",
    "é",
    "##é",
    "中",
    "##",
    "#",
]
IDS = {piece: id for id, piece in enumerate(PIECES)}

CUTS = [
    ("unaffable", ["un", "##aff", "##able"]),
    ("a", ["a"]),
    ("aaaa", ["a", "##a", "##a", "##a"]),
    ("aabcab", ["a", "##abc", "##ab"]),
    ("aab", ["a", "##ab"]),
    ("unx", ["[UNK]"]),  # nothing begins with x
    ("x", ["[UNK]"]),
    ("éé", ["é", "##é"]),
    ("\u00c3", ["[UNK]"]),  # shares its first byte with é
    ("中", ["中"]),
    ("a中", ["[UNK]"]),
    ("##aff", ["##aff"]),  # a word is looked up as it is spelled
    ("##", ["##"]),
    ("a##", ["[UNK]"]),
    ("a" * 100, ["a"] + ["##a"] * 99),
    ("a" * 101, ["[UNK]"]),
    ("é" * 100, ["é"] + ["##é"] * 99),  # 100 characters, 200 bytes
    ("é" * 101, ["[UNK]"]),
    ("a" * 10**6, ["[UNK]"]),
    ("", []),
]


@pytest.mark.parametrize(("word", "pieces"), CUTS)
def test_cuts(word, pieces):
    assert wordpiece(word, IDS) == pieces
    assert _core.WordPiece(PIECES, 0).cut(word) == [IDS[piece] for piece in pieces]


def test_longest_word_is_an_option():
    cutter = _core.WordPiece(PIECES, 0, max_chars=3)
    for word in ("aaa", "aaaa", "éé", "ééé", "éééé"):
        assert cutter.cut(word) == [IDS[piece] for piece in wordpiece(word, IDS, max_chars=3)]


def test_random_vocabularies():
    """Small alphabets make every prefix relation between pieces happen."""
    random_ = random.Random(0)
    for round_ in range(200):
        letters = "ab" if round_ % 2 else "aé\u0161中\U0001f600"
        pieces = {"[UNK]"}
        for _ in range(random_.randint(1, 40)):
            stem = "".join(random_.choice(letters) for _ in range(random_.randint(1, 6)))
            pieces.add(random_.choice(("", "##")) + stem)
        ids = {piece: id for id, piece in enumerate(sorted(pieces))}
        cutter = _core.WordPiece(list(ids), ids["[UNK]"])
        for _ in range(50):
            word = "".join(random_.choice(letters) for _ in range(random_.randint(1, 12)))
            assert cutter.cut(word) == [ids[piece] for piece in wordpiece(word, ids)]


def test_large_vocabulary():
    pieces = ["[UNK]", *(f"{n:x}" for n in range(200_000)), *(f"##{n:x}" for n in range(50_000))]
    ids = {piece: id for id, piece in enumerate(pieces)}
    cutter = _core.WordPiece(pieces, 0)
    assert len(cutter) == 250_001
    for word in ("1f", "30d3f", "30d40", "fffff", "0", "c34ffc34f0"):
        assert cutter.cut(word) == [ids[piece] for piece in wordpiece(word, ids)]


def test_wrong_vocabularies():
    with pytest.raises(ValueError, match="piece 'a' has two ids, 1 and 2"):
        _core.WordPiece(["[UNK]", "a", "a"], 0)
    for unk in (-1, 2):
        with pytest.raises(ValueError, match=rf"unk_id {unk} is not in \[0, 2\)"):
            _core.WordPiece(["[UNK]", "a"], unk)
    with pytest.raises(ValueError, match="the unknown piece '##u' continues a word"):
        _core.WordPiece(["a", "##u"], 1)
    with pytest.raises(ValueError, match="unk_id"):
        _core.WordPiece([], 0)


@pytest.mark.parametrize("name", ["vocab.txt", "vocab-cased.txt", "vocab-multilingual-cased.txt"])
def test_shared_vocabularies(name, shared_file):
    """Real pieces glued together at random, against the plain definition and Hugging Face."""
    pieces = shared_file(name).read_text(encoding="utf-8").split("\n")[:-1]
    ids = {piece: id for id, piece in enumerate(pieces)}
    cutter = _core.WordPiece(pieces, ids["[UNK]"])
    slow = slow_wordpiece(ids)
    random_ = random.Random(0)
    for _ in range(3000):
        glued = "".join(random_.choices(pieces, k=random_.randint(1, 4))).replace("##", "")
        for word in basic_split(glued, lowercase=name == "vocab.txt"):
            expected = wordpiece(word, ids)
            assert cutter.cut(word) == [ids[piece] for piece in expected], word
            if slow is not None:
                assert slow.tokenize(word) == expected


def slow_wordpiece(ids):
    try:
        from transformers.models.bert.tokenization_bert import WordpieceTokenizer
    except ImportError:
        return None
    return WordpieceTokenizer(ids, "[UNK]")
