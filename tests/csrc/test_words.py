"""Word splitting: C++ against the plain definition, literals and Hugging Face's slow tokenizer."""

import io
import lzma
import random
import runpy
import subprocess
import sys
import tarfile
import unicodedata
from collections.abc import Iterator
from functools import cache

import pytest

from mvbert import _core
from mvbert.text import unicode_tables
from mvbert.text.wordpiece import basic_split

# text, uncased words, cased words
AWKWARD = [
    ("", [], []),
    (" \t\r\n", [], []),
    ("Hello, World!", ["hello", ",", "world", "!"], ["Hello", ",", "World", "!"]),
    ("don't", ["don", "'", "t"], ["don", "'", "t"]),
    ("a$b+c=d^e`f|g~h<i>", list("a$b+c=d^e`f|g~h<i>"), list("a$b+c=d^e`f|g~h<i>")),
    ("..", [".", "."], [".", "."]),
    ("Ünïcödé", ["unicode"], ["Ünïcödé"]),
    ("U\u0308n", ["un"], ["Ün"]),  # decomposed: composed again when cased
    ("\u0301abc", ["abc"], ["\u0301abc"]),
    ("\u0301", [], ["\u0301"]),
    ("x \u0301\u0302 y", ["x", "y"], ["x", "\u0301\u0302", "y"]),
    ("中文字", ["中", "文", "字"], ["中", "文", "字"]),
    ("a中b", ["a", "中", "b"], ["a", "中", "b"]),
    ("中\u0301x", ["中", "x"], ["中", "\u0301x"]),  # nothing combines with an isolated ideograph
    ("\uf900\U0002f800", ["\u8c48", "\u4e3d"], ["\u8c48", "\u4e3d"]),  # compatibility ideographs
    ("\u2f00", ["\u2f00"], ["\u2f00"]),  # a radical is not one
    ("ひらがな カタカナ", ["ひらかな", "カタカナ"], ["ひらがな", "カタカナ"]),
    ("한국어", ["\u1112\u1161\u11ab\u1100\u116e\u11a8\u110b\u1165"], ["한국어"]),
    ("\u1112\u1161\u11ab", ["\u1112\u1161\u11ab"], ["한"]),
    ("zero\u200bwidth soft\u00adhyphen", ["zerowidth", "softhyphen"], ["zerowidth", "softhyphen"]),
    ("nul\0l \ufffd bell\a", ["null", "bell"], ["null", "bell"]),
    ("vt\x0bff\x0cdel\x7f", ["vtffdel"], ["vtffdel"]),
    ("nel\x85x", ["nelx"], ["nelx"]),
    ("a\u2028b\u2029c\u00a0d\u3000e", list("abcde"), list("abcde")),
    ("private\ue000use \u0378none", ["privateuse", "none"], ["privateuse", "none"]),
    ("ΣΑΣ", ["σασ"], ["ΣΑΣ"]),  # no final sigma: lower-cased character by character
    ("İstanbul Iı", ["istanbul", "iı"], ["İstanbul", "Iı"]),
    ("ß ẞ ﬁ", ["ß", "ß", "ﬁ"], ["ß", "ẞ", "ﬁ"]),
    ("\u212a\u2126\u212b", ["kωa"], ["KΩÅ"]),
    ("a\u037eb\u0387c\u1fefd", list("a;b·c`d"), list("a;b·c`d")),
    ("<\u0338 =\u0338", ["<", "="], ["≮", "≠"]),  # composition takes the punctuation away
    ("<\u200b\u0338x", ["<", "x"], ["≮x"]),
    ("≠", ["="], ["≠"]),
    ("«q» “r” …", list("«q»“r”…"), list("«q»“r”…")),
    ("😀x🇩🇪 👨‍👩‍👧", ["😀x🇩🇪", "👨👩👧"], ["😀x🇩🇪", "👨👩👧"]),
    ("[MASK] ##ing", ["[", "mask", "]", "#", "#", "ing"], ["[", "MASK", "]", "#", "#", "ing"]),
    ("\u302e\U0001d165 \U0001d165\u302e", ["\U0001d165\u302e"] * 2, ["\U0001d165\u302e"] * 2),
    ("\U0001d165\u0f75\u302e", ["\U0001d165\u302e"], ["\u0f71\u0f74\U0001d165\u302e"]),
    ("क़ि", ["कि"], ["\u0915\u093c\u093f"]),  # a composition exclusion
    ("\ud800a\udfffb", ["ab"], ["ab"]),  # lone surrogates are deleted
    ("\ud83d\ude00", [], []),  # so is a pair of them: it is no character of a str
]

# lower-casing, stripping accents
CASINGS = ((True, True), (False, False), (True, False))

definition = cache(basic_split)  # for texts that several instruction sets split


@pytest.mark.parametrize(("text", "uncased", "cased"), AWKWARD)
def test_awkward_text(text, uncased, cased):
    for lowercase, expected in ((True, uncased), (False, cased)):
        assert basic_split(text, lowercase) == expected
        assert _core.split(text, lowercase) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Äpfel ÖL straße", ["äpfel", "öl", "straße"]),
        ("E\u0301x A\u200b\u030a", ["éx", "å"]),  # composed after lower-casing
        ("\u212b \u1fbb", ["å", "ά"]),  # lower-cased to what composes to something else
        ("İ İ\u0323", ["i̇", "ị̇"]),  # two letters of one, marks in canonical order
        ("ΣΑΣ", ["σασ"]),
        ("한국어 \u1112\u1161\u11ab", ["한국어", "한"]),
        ("ŁÓDŹ,中é", ["łódź", ",", "中", "é"]),
        ("<\u0338X", ["≮x"]),
    ],
)
def test_accents_stay_where_they_are_not_stripped(text, words):
    assert basic_split(text, True, False) == words
    assert _core.split(text, strip_accents=False) == words


@pytest.mark.parametrize("instruction_set", _core.instruction_sets())
def test_words_do_not_depend_on_place(instruction_set):
    """Every awkward text at every distance from a block's boundary, with others around it."""
    texts = [text for text, _, _ in AWKWARD if text]
    for lowercase, strip in CASINGS:
        for shift in range(70):
            joined = "x" * shift + "é".join(texts[shift % 7 :])
            words = _core.split(joined, lowercase, instruction_set, strip)
            assert words == definition(joined, lowercase, strip)


@pytest.mark.parametrize("instruction_set", _core.instruction_sets())
def test_every_way_to_read_ascii(instruction_set):
    """Random ASCII of every length to 200, sometimes with one other byte: all ways agree."""
    random_ = random.Random(3)
    usual = "abcXYZ019 \t\n\r.,-'$[]`{~"
    for length in range(200):
        for _ in range(10):
            text = random_.choices(
                usual if random_.random() < 0.7 else [chr(c) for c in range(128)], k=length
            )
            if length and random_.random() < 0.5:
                text[random_.randrange(length)] = random_.choice("é\u0338\x00\x7f\u200b中")
            text = "".join(text)
            for lowercase, strip in CASINGS:
                words = _core.split(text, lowercase, instruction_set, strip)
                assert words == definition(text, lowercase, strip), ascii(text)
    with pytest.raises(ValueError, match="no instruction set 'mmx'"):
        _core.split("", True, "mmx")


def every_code_point() -> Iterator[str]:
    """Alone, between letters and after a mark; surrogates too.

    Planes 4 to 13, in which nothing is assigned, and 15 and 16, for private use: in a row.
    """
    for first in range(0, 0x110000, 0x400):
        chars = [chr(c) for c in range(first, first + 0x400)]
        if 4 <= first >> 16 <= 13 or first >> 16 >= 15:
            yield f"a{''.join(chars)}b {chars[0]}"
        else:
            yield " ".join(f"a{char}b {char}" for char in chars)


def test_every_code_point():
    for text in every_code_point():
        for lowercase, strip in CASINGS:
            words = _core.split(text, lowercase, None, strip)
            assert words == basic_split(text, lowercase, strip), hex(ord(text[1]))


def test_every_code_point_as_hugging_face(slow_split):
    needs_unicode_14()
    for text in every_code_point():
        for lowercase, strip in CASINGS:
            words = _core.split(text, lowercase, None, strip)
            assert words == slow_split(text, lowercase, strip), hex(ord(text[1]))


def test_tables_are_of_the_pinned_version(root):
    assert _core.unicode_version == unicode_tables.VERSION == "14.0.0"
    if unicodedata.unidata_version != "14.0.0":
        pytest.skip("the generator needs Python 3.11, whose unicodedata is 14.0.0")
    names = [root / "csrc/unicode_tables.inc", root / "mvbert/text/unicode_tables.py"]
    before = [name.read_bytes() for name in names]
    code = (
        "import runpy, pathlib, sys; written = {};"
        "pathlib.Path.write_text = lambda path, text: written.update({str(path): text});"
        f"runpy.run_path({str(root / 'csrc/make_unicode_tables.py')!r}, run_name='__main__');"
        "bad = [p for p, t in written.items() if pathlib.Path(p).read_text() != t];"
        "sys.exit(str(bad) if bad or len(written) != 2 else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert before == [name.read_bytes() for name in names]


def random_text(random_, alphabets) -> str:
    pools = random_.sample(alphabets, random_.randint(1, 4))
    return "".join(random_.choice(random_.choice(pools)) for _ in range(random_.randint(1, 40)))


@pytest.fixture(scope="module")
def alphabets(root):
    """Those of the differential fuzzer."""
    return runpy.run_path(str(root / "tests" / "fuzz_tokenizer.py"))["alphabets"]()


def test_random_text(alphabets):
    random_ = random.Random(0)
    for _ in range(4000):
        text = random_text(random_, alphabets)
        for lowercase, strip in CASINGS:
            words = _core.split(text, lowercase, None, strip)
            assert words == basic_split(text, lowercase, strip), ascii(text)


def test_random_text_as_hugging_face(alphabets, slow_split):
    needs_unicode_14()
    random_ = random.Random(1)
    for _ in range(4000):
        text = random_text(random_, alphabets)
        for lowercase, strip in CASINGS:
            words = _core.split(text, lowercase, None, strip)
            assert words == slow_split(text, lowercase, strip), ascii(text)


def test_arbitrary_text():
    hypothesis = pytest.importorskip("hypothesis")
    strategies = pytest.importorskip("hypothesis.strategies")

    @hypothesis.settings(max_examples=300)
    @hypothesis.given(strategies.text(strategies.characters(exclude_categories=())))
    def check(text):
        for lowercase, strip in CASINGS:
            words = _core.split(text, lowercase, None, strip)
            assert words == basic_split(text, lowercase, strip)

    check()


def test_long_words_and_long_runs():
    for lowercase in (True, False):
        assert _core.split("x" * 10**6, lowercase) == ["x" * 10**6]
        assert _core.split("é" * 10**6, lowercase) == [("e" if lowercase else "é") * 10**6]
        assert _core.split("!" * 10**5, lowercase) == ["!"] * 10**5
        assert _core.split(" " * 10**6, lowercase) == []
        assert _core.split("a" + "\u200b" * 10**5 + "b", lowercase) == ["ab"]
        marks = "\u0323\u0301" * 10**5
        expected = "e" if lowercase else "\u1eb9" + "\u0323" * (10**5 - 1) + "\u0301" * 10**5
        assert _core.split("e" + marks, lowercase) == [expected]
        assert _core.split("\u302e\U0001d165" * 10**4, lowercase) == [
            "\U0001d165" * 10**4 + "\u302e" * 10**4
        ]


ILL_FORMED = [
    (b"\x80", 0), (b"ab\xff", 2), (b"ab\xc3", 2), (b"\xc0\xaf", 0), (b"a\xe0\x80\xaf", 1),
    (b"\xed\xa0\x80", 0), (b"\xf4\x90\x80\x80", 0), (b"\xf8\x88\x80\x80\x80", 0),
    (b"x" * 1000 + b"\xe4\xb8", 1000), ("é".encode() * 500 + b"\xc3(", 1000),
]  # fmt: skip


@pytest.mark.parametrize(("data", "offset"), ILL_FORMED)
def test_ill_formed_utf8(data, offset):
    assert _core.utf8_error(data) == offset
    with pytest.raises(ValueError, match=f"byte 0x{data[offset]:02x} at offset {offset}"):
        _core.split(data)


def test_utf8_validation_as_python():
    """Random damage to well-formed text: the same verdict and offset as Python's decoder."""
    random_ = random.Random(2)
    seen = 0
    for _ in range(20000):
        text = "".join(chr(random_.choice((random_.randrange(128), random_.randrange(0x800),
                                           random_.randrange(0xD800), 0x10FFFF)))
                       for _ in range(random_.randint(0, 90)))  # fmt: skip
        data = bytearray(text.encode())
        for _ in range(random_.randint(0, 2)):
            if data:
                data[random_.randrange(len(data))] = random_.randrange(256)
        try:
            data.decode()
            expected = None
        except UnicodeDecodeError as error:
            expected = error.start
            seen += 1
        assert _core.utf8_error(bytes(data)) == expected
    assert seen > 1000


def test_bytes_and_buffers():
    text = "Héllo, wörld 中"
    expected = _core.split(text)
    for data in (text.encode(), bytearray(text.encode()), memoryview(text.encode())):
        assert _core.split(data) == expected
    assert _core.split(b"") == []
    with pytest.raises(TypeError, match="expected str or bytes, got int"):
        _core.split(3)
    with pytest.raises(TypeError, match="contiguous"):
        _core.split(memoryview(b"abcdef")[::2])


def sample(path, size: int = 40_000) -> str:
    """The first bytes of a text or archive, cut at a line."""
    if path.name.endswith(".tar.xz"):
        with tarfile.open(path) as archive:
            member = next(m for m in archive.getmembers() if m.isfile() and m.size > 1000)
            data = archive.extractfile(member).read(size)
    else:
        opener = lzma.open if path.suffix == ".xz" else io.open
        with opener(path, "rb") as file:
            data = file.read(size)
    return data[: data.rfind(b"\n") + 1].decode()


def test_every_shared_file(shared_data, slow_split):
    for path in sorted(shared_data.iterdir()):
        if not path.name.startswith("vocab") and path.suffix in (".xz", ".txt"):
            text = sample(path)
            assert len(text) > 1000, path
            for lowercase, strip in CASINGS:
                words = _core.split(text, lowercase, None, strip)
                assert words == basic_split(text, lowercase, strip), path
                assert words == slow_split(text, lowercase, strip), path


@pytest.fixture(scope="module")
def slow_split():
    """Words as transformers' slow BertTokenizer makes them, special tokens left out of it."""
    transformers = pytest.importorskip("transformers")
    try:
        from transformers.models.bert.tokenization_bert import BasicTokenizer
    except ImportError:
        pytest.skip(f"needs transformers 4 (slow BertTokenizer), found {transformers.__version__}")
    tokenizers = {
        (lowercase, strip): BasicTokenizer(lowercase, strip_accents=strip)
        for lowercase, strip in CASINGS
    }

    def split(text: str, lowercase: bool, strip: bool) -> list[str]:
        # PreTrainedTokenizer.tokenize lower-cases each character before BasicTokenizer sees it.
        if lowercase:
            text = "".join(char.lower() for char in text)
        return tokenizers[lowercase, strip].tokenize(text)

    return split


def needs_unicode_14() -> None:
    if unicodedata.unidata_version != "14.0.0":
        pytest.skip(f"needs Python 3.11 (Unicode 14.0.0); this has {unicodedata.unidata_version}")
