"""The tokenizers: ids, batches, offsets and files as Hugging Face's slow BertTokenizer has them."""

import collections
import contextlib
import copy
import itertools
import lzma
import mmap
import multiprocessing
import os
import pickle
import random
import re
import tarfile
import threading
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest

from mvbert import _core
from mvbert.errors import InputError
from mvbert.text import vocab as vocab_module
from mvbert.text.row_reference import draw, threshold
from mvbert.text.tokenizer import MixedTokenizer, WordPieceTokenizer
from mvbert.text.vocab import SPECIAL_PIECES, Vocab
from mvbert.text.wordpiece import basic_split, wordpiece

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PIECES = (
    *SPECIAL_PIECES, *LETTERS, *(f"##{c}" for c in LETTERS), "hello", "wor", "##ld", "##lds",
    ",", "!", "[", "]", "'", ".", "中", "é", "##é", "слов", "##о", "##ово", "сл", "##ing", "σ",
    "##σ", "\u1112", "##\u1161", "##\u11ab", "antidisestablish", "##mentarianism",
)  # fmt: skip
STUDENT = (*SPECIAL_PIECES, *LETTERS, *(f"##{c}" for c in LETTERS), "he", "##llo", ",", "!", "中")

TEXTS = [
    "Hello, worlds!", "", "   ", "héllo\u0301 wörld", "слово слово слов", "x中y 한",
    "antidisestablishmentarianism antidisestablishmentarianisms", "q" * 100, "q" * 101, "q" * 5000,
    "[MASK] hello[SEP]world [mask] [MASK[MASK]] [PAD][PAD]", "don't. stop.", "zero\u200bwidth\0nul",
    "hello " * 3000, "!" * 3000, "😀 unknown", "\ud800lone \udc00surrogate",
    "a\tb\nc\rd\u3000e\u2028f",
]  # fmt: skip


@pytest.fixture(scope="module", params=[True, False], ids=["uncased", "cased"])
def tokenizer(request):
    return WordPieceTokenizer(Vocab(PIECES, lowercase=request.param))


@pytest.fixture
def mixed():
    return MixedTokenizer(Vocab(PIECES), Vocab(STUDENT))


def plain_ids(vocab: Vocab, text: str) -> list[int]:
    """The definition, for text without special pieces."""
    words = basic_split(text, vocab.lowercase)
    return [vocab.ids[piece] for word in words for piece in wordpiece(word, vocab.ids)]


def test_ids_are_the_definitions(tokenizer):
    for text in TEXTS:
        if "[" in text:
            continue
        expected = plain_ids(tokenizer.vocab, text)
        assert tokenizer.encode(text, add_special_tokens=False) == expected
        assert tokenizer.encode(text) == [2, *expected, 3]
        assert tokenizer.encode(text, text) == [2, *expected, 3, *expected, 3]
        if not any("\ud800" <= char <= "\udfff" for char in text):
            assert tokenizer.encode(text.encode()) == [2, *expected, 3]


def test_special_pieces_in_text(tokenizer):
    ids = tokenizer.vocab.ids
    got = tokenizer.encode("a[MASK]b [mask [SEP]", add_special_tokens=False)
    expected = [ids["a"], ids["[MASK]"], ids["b"], ids["["], *plain_ids(tokenizer.vocab, "mask")]
    assert got == [*expected, ids["[SEP]"]]


def test_the_cache_changes_nothing():
    """More distinct words than it holds, of every length, twice over."""
    vocab = Vocab(PIECES)
    tokenizer = WordPieceTokenizer(vocab)
    random_ = random.Random(0)
    words = [
        "".join(random_.choices(LETTERS + "é中", k=random_.randint(1, 60))) for _ in range(4000)
    ]
    text = " ".join(words)
    expected = plain_ids(vocab, text)
    for _ in range(2):
        assert tokenizer.encode(text, add_special_tokens=False) == expected
    tokenizer._core.forget_words()
    assert tokenizer.encode(text, add_special_tokens=False) == expected
    many = " ".join(f"{n:x}" for n in range(200_000)).translate(
        str.maketrans("0123456789", "ghijklmnop")
    )
    first = tokenizer.encode(many, add_special_tokens=False)
    assert tokenizer.encode(many, add_special_tokens=False) == first
    assert first[:2000] == plain_ids(vocab, many[:9000])[:2000]


def test_batches(tokenizer):
    rows = [tokenizer.encode(text) for text in TEXTS]
    flat = tokenizer.encode_batch(TEXTS)
    assert [row.tolist() for row in flat] == rows
    assert flat.ids.dtype == np.int32
    assert len(flat) == len(TEXTS)
    padded = tokenizer.encode_batch(TEXTS, padding=True)
    width = max(map(len, rows))
    assert padded.input_ids.shape == (len(TEXTS), width)
    assert padded.input_ids.dtype == np.int64
    for row, ids, mask in zip(rows, padded.input_ids, padded.attention_mask, strict=True):
        assert ids.tolist() == row + [0] * (width - len(row))
        assert mask.tolist() == [1] * len(row) + [0] * (width - len(row))
    small = tokenizer.encode_batch(
        TEXTS, padding="max_length", max_length=8, truncation=True, dtype=np.int32
    )
    assert small.input_ids.shape == (len(TEXTS), 8)
    assert small.input_ids.dtype == np.int32
    assert len(tokenizer.encode_batch([])) == 0
    assert tokenizer.encode_batch([], padding=True).input_ids.shape == (0, 0)


@pytest.mark.parametrize("threads", [0, 1, 2, 64])
def test_threads_change_nothing(tokenizer, threads):
    texts = TEXTS * 40
    expected = tokenizer.encode_batch(texts, threads=1)
    got = tokenizer.encode_batch(texts, threads=threads)
    assert np.array_equal(got.ids, expected.ids)
    assert np.array_equal(got.offsets, expected.offsets)


def test_what_cannot_get_into_a_row_is_not_read(tokenizer):
    """The ids of a cut text are the first of the whole one's, however it is cut into batches."""
    random_ = random.Random(3)
    texts = [text for text in TEXTS if len(text) > 20] + [
        "".join(random_.choices("ab é中!\u0301\u200b[", k=3000)) + "[SEP]x" * 50 for _ in range(20)
    ]
    whole = tokenizer.encode_batch(texts, add_special_tokens=False)
    for max_length in (0, 1, 2, 7, 50, 500, 5000):
        cut = tokenizer.encode_batch(
            texts, add_special_tokens=False, truncation=True, max_length=max_length
        )
        for row, expected in zip(cut, whole, strict=True):
            assert row.tolist() == expected[:max_length].tolist()


def test_batches_leave_the_interpreter_to_others(tokenizer):
    """Another thread goes on counting while a batch is encoded."""
    texts = ["hello worlds of letters " * 1000] * 100
    tokenizer.encode_batch(texts[:1])
    counted = [0]
    stop = threading.Event()

    def count():
        while not stop.is_set():
            counted[0] += 1

    counter = threading.Thread(target=count)
    counter.start()
    before = counted[0]
    for _ in range(20):
        tokenizer.encode_batch(texts, threads=1, truncation=True, max_length=10**6)
    during = counted[0] - before
    stop.set()
    counter.join()
    assert during > 1000


def test_wrong_options(tokenizer):
    for options, message in [
        ({"truncation": True}, "needs max_length"),
        ({"truncation": "shortest", "max_length": 4}, "truncation is 'shortest'"),
        ({"truncation": "only_second", "max_length": 4}, "needs pairs"),
        ({"padding": "max_length"}, "needs max_length"),
        ({"padding": True, "max_length": 4}, "max_length needs truncation"),
        ({"padding": "left"}, "padding is 'left'"),
        ({"padding": "max_length", "max_length": 3}, "row 0 has .* more than max_length 3"),
        ({"truncation": True, "max_length": 1}, "no room"),
        ({"truncation": True, "max_length": -1}, "max_length is -1"),
        ({"pairs": ["a"]}, "2 texts and 1 pairs"),
        ({"dtype": np.float32}, "dtype is float32, expected int32 or int64"),
        ({"padding": True, "pad_to_multiple_of": 0}, "pad_to_multiple_of is 0"),
        (
            {"padding": True, "truncation": True, "max_length": 9, "pad_to_multiple_of": 8},
            "max_length 9 is not a multiple",
        ),
        ({"threads": -1}, "threads must be 0 .*, got -1"),
    ]:
        with pytest.raises(InputError, match=message):
            tokenizer.encode_batch(["hello world", "a"], **options)
    # A text alone may not be cut to nothing, unless nothing fits.
    for length in (5, 6):
        with pytest.raises(InputError, match="cannot be cut"):
            tokenizer.encode_batch(["a b c"], ["d e f"], truncation="only_first", max_length=length)
    for length, texts in ((3, ("", "")), (7, ("a", "d e f"))):
        options = {"truncation": "only_first", "max_length": length}
        row = tokenizer.encode_batch(["a b c"], ["d e f"], **options)
        assert row.ids.tolist() == tokenizer.encode(*texts)
    with pytest.raises(InputError, match="list of texts"):
        tokenizer.encode_batch("hello")
    with pytest.raises(InputError, match="text 1 is not UTF-8: byte 0xff at offset 1"):
        tokenizer.encode_batch([b"a", b"b\xff"])
    with pytest.raises(InputError, match="pair 0 is not UTF-8"):
        tokenizer.encode_batch(["a"], [bytearray(b"\xff")])
    with pytest.raises(ValueError, match="not UTF-8: byte 0xff at offset 1"):
        tokenizer.encode(b"b\xff")
    with pytest.raises(InputError, match=r"text 0 is 1 \(int\), expected str or bytes"):
        tokenizer.encode_batch([1])


class Table:
    """What pandas' and polars' data frames are to who iterates them: names, or columns."""

    shape = (2, 1)

    def __iter__(self):
        return iter(["column"])


@pytest.mark.parametrize("which", ["texts", "pairs", "mixed"])
@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("hello", r"is str, expected a list of texts; use encode\(\) for a single text"),
        (b"hello", "is bytes, expected a list of texts"),
        (memoryview(b"hello"), "is memoryview, expected a list of texts"),
        ({"a": "hello"}, "is dict, expected a list of texts"),
        (collections.UserDict(a="hello"), "is UserDict, expected a list of texts"),
        ({"hello"}, "is set, expected a list of texts, in order"),
        (Table(), "is Table of 2 dimensions, expected a list of texts; choose one column or row"),
        (np.array([["a", "b"]]), "is ndarray of 2 dimensions, expected a list of texts"),
        (np.array("hello"), "is ndarray of 0 dimensions, expected a list of texts"),
        (5, "is int, expected a list of texts"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_is_no_list_of_texts_is_refused(tokenizer, mixed, which, texts, message):
    calls = {
        "texts": lambda: tokenizer.encode_batch(texts),
        "pairs": lambda: tokenizer.encode_batch(["a"], texts),
        "mixed": lambda: mixed.encode_batch(texts),
    }
    with pytest.raises(InputError, match=message):
        calls[which]()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            None,
            r"2 is None \(NoneType\), expected str or bytes; give a missing text as an empty one",
        ),
        (float("nan"), r"2 is nan \(float\), expected str or bytes; give a missing text"),
        (7, r"2 is 7 \(int\), expected str or bytes$"),
        (["a", "b"], r"2 is \['a', 'b'\] \(list\), expected str or bytes$"),
        (np.zeros((2, 2), np.uint8), "2 is .*ndarray.*, expected str or bytes$"),
        (memoryview(b"abcdef")[::2], r"2 is .*memoryview.*, expected str or bytes$"),
        ("x" * 10**6, None),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_is_no_text_in_a_list_is_named_by_its_number(tokenizer, mixed, text, message):
    texts = ["a", b"b", text, "c", None]
    if message is None:
        texts, message = [*texts[:3], None], "3 is None"
    for made in (texts, iter(texts), np.fromiter(texts, object, len(texts))):
        with pytest.raises(InputError, match=f"^text {message}"):
            tokenizer.encode_batch(made)
    with pytest.raises(InputError, match=f"^pair {message}"):
        tokenizer.encode_batch(["a"] * len(texts), texts)
    with pytest.raises(InputError, match=f"^text {message}"):
        mixed.encode_batch(texts)


def test_one_text_that_is_none_is_refused(tokenizer, mixed):
    for encode in (tokenizer.encode, tokenizer.offsets, mixed.encode, mixed.offsets):
        with pytest.raises(InputError, match=r"text is None \(NoneType\), expected str or bytes$"):
            encode(None)
        with pytest.raises(InputError, match=r"text is .*list.*; use encode_batch\(\) for several"):
            encode(["a", "b"])
    with pytest.raises(InputError, match=r"pair is 7 \(int\), expected str or bytes"):
        tokenizer.encode("a", 7)


def test_an_error_of_the_callers_iterator_is_the_callers(tokenizer):
    def texts():
        yield "a"
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        tokenizer.encode_batch(texts())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"truncation": True, "max_length": "5"},
            r"max_length is '5', expected an integer of \[0, ",
        ),
        ({"padding": "max_length", "max_length": 5.0}, r"max_length is 5\.0, expected an integer"),
        ({"truncation": True, "max_length": True}, "max_length is True, expected an integer"),
        (
            {"padding": True, "pad_to_multiple_of": "8"},
            "pad_to_multiple_of is '8', expected an int",
        ),
        ({"threads": "2"}, r"threads must be 0 \(all available cores\) or a number .*, got '2'"),
        ({"threads": None}, "threads must be 0 .*, got None"),
        ({"padding": True, "dtype": "wide"}, "dtype is 'wide', expected int32 or int64"),
    ],
    ids=str,
)
def test_options_of_the_wrong_type(tokenizer, options, message):
    with pytest.raises(InputError, match=message):
        tokenizer.encode_batch(["a"], **options)


def test_integers_of_numpy_are_integers(tokenizer):
    batch = tokenizer.encode_batch(
        ["hello"], padding="max_length", max_length=np.int64(8), threads=np.int32(1)
    )
    assert batch.input_ids.shape == (1, 8)


def test_offsets(tokenizer):
    text = "Héllo\u0301, wor\u200blds 中한 [MASK]x"
    ids, spans = tokenizer.offsets(text)
    assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False)
    pieces = [tokenizer.vocab.pieces[id] for id in ids]
    got = list(zip(pieces, (text[a:b] for a, b in spans), strict=True))
    if tokenizer.vocab.lowercase:
        assert got == [
            ("hello", "Héllo"), (",", ","), ("wor", "wor"), ("##lds", "lds"), ("中", "中"),
            ("\u1112", "한"), ("##\u1161", "한"), ("##\u11ab", "한"),
            ("[MASK]", "[MASK]"), ("x", "x"),
        ]  # fmt: skip
    else:
        assert got == [
            ("[UNK]", "Héllo\u0301"), (",", ","), ("wor", "wor"), ("##lds", "lds"), ("中", "中"),
            ("[UNK]", "한"), ("[MASK]", "[MASK]"), ("x", "x"),
        ]  # fmt: skip
    for text in TEXTS:
        ids, spans = tokenizer.offsets(text)
        assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False)
        assert spans.shape == (len(ids), 2)
        assert (spans[:, 0] < spans[:, 1]).all()
        assert spans.max(initial=0) <= len(text)
        assert (np.diff(spans[:, 0]) >= 0).all()


def test_offsets_of_composed_text():
    vocab = Vocab((*SPECIAL_PIECES, "é", "##é", "한", "x"), lowercase=False)
    ids, spans = WordPieceTokenizer(vocab).offsets("e\u0301\u200be\u0301 \u1112\u1161\u11abx x")
    assert [vocab.pieces[id] for id in ids] == ["é", "##é", "[UNK]", "x"]
    assert spans.tolist() == [[0, 2], [3, 5], [6, 10], [11, 12]]


def test_decode(tokenizer):
    ids = tokenizer.encode("hello, worlds!")
    assert tokenizer.decode(ids) == "[CLS] hello, worlds! [SEP]"
    assert tokenizer.decode(np.array(ids), skip_special_tokens=True) == "hello, worlds!"
    assert (
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        == "hello , worlds !"
    )
    assert tokenizer.decode([]) == ""
    for bad in (-1, len(PIECES), 1.5, True):
        with pytest.raises(InputError, match="is not in"):
            tokenizer.decode([bad])
    for bad in ([[1, 2]], None, np.zeros((2, 2), int)):
        with pytest.raises(InputError, match=r"ids has \d dimensions, expected one row"):
            tokenizer.decode(bad)


def test_files(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    text = "\n".join(text for text in TEXTS if "\ud800" not in text) * 130
    path.write_text(text, encoding="utf-8", newline="")
    assert path.stat().st_size > 3 << 20  # more than two parts
    expected = tokenizer.encode(text, add_special_tokens=False)
    for threads in (0, 3, 64):
        assert tokenizer.encode_file(path, threads=threads).tolist() == expected
    path.write_bytes(b"")
    assert tokenizer.encode_file(path).tolist() == []
    path.write_bytes(b"x" * (3 << 20))  # one word, no place to cut
    assert tokenizer.encode_file(path).tolist() == [tokenizer.vocab.unk]
    path.write_bytes(b"ab\xc3")
    with pytest.raises(InputError, match=r"text\.txt is not UTF-8: byte 0xc3 at offset 2"):
        tokenizer.encode_file(path)
    with pytest.raises(InputError, match="cannot read"):
        tokenizer.encode_file(tmp_path / "nowhere")
    path.write_bytes("some words".encode("utf-16-le") * 10)
    with pytest.raises(InputError, match=r"text\.txt looks like UTF-16LE, not UTF-8; convert it"):
        tokenizer.encode_file(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe is not a regular file"):
        tokenizer.encode_file(tmp_path / "pipe")


def test_many_python_threads(tokenizer):
    expected = [tokenizer.encode(text) for text in TEXTS]
    wrong = []

    def work():
        for _ in range(10):
            if [tokenizer.encode(text) for text in TEXTS] != expected:
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_large_batches_of_pairs_from_many_threads(tokenizer):
    """Several parts of a batch for each of the core's threads, calls of all sizes at once."""
    texts, pairs = TEXTS * 30, TEXTS[::-1] * 30
    assert sum(len(text.encode("utf-8", "ignore")) for text in texts) > 3 << 18
    rows = [tokenizer.encode(*both) for both in zip(TEXTS, TEXTS[::-1], strict=True)] * 30
    wrong = []

    def work(threads):
        for count in (len(texts), 5, len(texts) - 7):
            some = texts[:count], pairs[:count]
            flat = tokenizer.encode_batch(*some, threads=threads)
            padded = tokenizer.encode_batch(
                *some, threads=threads, padding=True, truncation=True, max_length=9000
            )
            for i, row in enumerate(rows[:count]):
                kept = padded.input_ids[i][padded.attention_mask[i] == 1].tolist()
                if flat[i].tolist() != row or kept != row:
                    wrong.append((threads, count, i))

    workers = [threading.Thread(target=work, args=(threads,)) for threads in (1, 2, 3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_goes_on(tokenizer):
    """A child forked after use, while threads of the parent have workers, encodes the same."""
    expected = tokenizer.encode_batch(TEXTS * 40, threads=2).ids.tolist()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def child():
        queue.put(tokenizer.encode_batch(TEXTS * 40, threads=2).ids.tolist())

    process = context.Process(target=child)
    process.start()
    assert queue.get(timeout=60) == expected
    process.join()
    assert process.exitcode == 0


def test_smallest_and_widest_vocabularies():
    """Three pieces, and ids that no packing of the cache holds."""
    wordpiece_ = _core.WordPiece(["[UNK]", "a", "##b"], 0)
    core = _core.Tokenizer(lowercase=True, teacher=wordpiece_)
    assert core.encode_list("ab A c abb", None, None) == [1, 2, 1, 0, 1, 2, 2]
    for fillers in (0xFFFF - 9, 0xFFFF - 8, 70_000, 1 << 20):
        pieces = [*(f"f{i}" for i in range(fillers)), "[UNK]", *"abcd", *("##a", "##b", "##cd")]
        teacher = _core.WordPiece(pieces, fillers)
        core = _core.Tokenizer(lowercase=True, teacher=teacher)
        mixed = _core.Tokenizer(lowercase=True, teacher=teacher, student=wordpiece_)
        for word in ("a", "b", "ab", "abab", "acdb", "ababab", "abababababab", "f1", "x" * 30):
            expected = teacher.cut(word)
            for _ in range(2):
                assert core.encode_list(f"{word} {word}", None, None) == expected * 2
                ids, _, _ = mixed.encode_words(word, False, 1 << 32)
                assert ids.tolist() == [id + len(pieces) for id in wordpiece_.cut(word)]
                ids, _, _ = mixed.encode_words(word, False, 0)
                assert ids.tolist() == expected


def test_words_of_a_million_letters(tokenizer, mixed):
    unk = tokenizer.vocab.unk
    for letters in ("x" * 10**6, "é" * 10**6, "x\0" * 10**6, "x\ud800" * 10**6):
        assert tokenizer.encode(letters, letters) == [2, unk, 3, unk, 3]
        assert tokenizer.encode_batch([letters] * 3, threads=2).ids.tolist() == [2, unk, 3] * 3
        ids, spans = tokenizer.offsets(letters)
        assert (ids.tolist(), spans.tolist()) == ([unk], [[0, len(letters.rstrip("\0\ud800"))]])
        encoding, spans = mixed.offsets(letters, student_prob=1)
        assert encoding.ids.tolist() == [len(PIECES) + mixed.student.unk]


def test_ids_and_places_are_of_31_bits(tokenizer, mixed):
    """What does not fit is refused before anything is made of it."""
    with pytest.raises(InputError, match="has 2147483648 pieces; ids are 32-bit, so at most"):
        vocab_module.check_pieces(range(2**31), "the vocabulary", "id", 0)
    sizes = [
        SimpleNamespace(size=size, lowercase=True, strip_accents=True)
        for size in (2**31 - 100, 100)
    ]
    with pytest.raises(InputError, match=r"more than 2\^31 - 1 pieces together"):
        MixedTokenizer(*sizes)
    with mmap.mmap(-1, 2**31) as nothing, memoryview(nothing) as text:  # never touched
        for read in (tokenizer.offsets, mixed.encode, mixed.offsets):
            with pytest.raises(InputError, match="has 2147483648 characters or bytes"):
                read(text)


@pytest.mark.slow
def test_a_line_of_a_gigabyte(tokenizer, tmp_path):
    """A file of one line and of one word: no place to cut, ids all the same."""
    path = tmp_path / "long.txt"
    line = b"hello worlds and a [MASK], " * (1 << 16)
    times = (1 << 30) // len(line)
    with open(path, "wb") as file:
        for _ in range(times):
            file.write(line)
    expected = np.array(tokenizer.encode(line, add_special_tokens=False), np.int32)
    got = tokenizer.encode_file(path, threads=2).reshape(times, len(expected))
    assert (got == expected).all()
    with open(path, "wb") as file:
        for _ in range(1 << 10):
            file.write(b"q" * (1 << 20))
    assert tokenizer.encode_file(path).tolist() == [tokenizer.vocab.unk]
    path.unlink()


def test_copies(tokenizer, mixed):
    for tool in (copy.copy, copy.deepcopy):
        assert tool(tokenizer).encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
        assert tool(mixed).encode(TEXTS[0]).ids.tolist() == mixed.encode(TEXTS[0]).ids.tolist()


def test_pickles(tokenizer, mixed):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.vocab == tokenizer.vocab
    assert again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    other = pickle.loads(pickle.dumps(mixed))
    assert other.encode(TEXTS[0]).ids.tolist() == mixed.encode(TEXTS[0]).ids.tolist()


# ---- two vocabularies ----------------------------------------------------------------------------


def mixed_definition(mixed, text, student_prob, seed, number):
    ids, starts, from_student = [], [], []
    for w, word in enumerate(basic_split(text)):
        student = draw(seed, 6, number, w) < threshold(student_prob)
        vocab, base = (mixed.student, mixed.teacher.size) if student else (mixed.teacher, 0)
        starts.append(len(ids))
        from_student.append(student)
        ids += [base + vocab.ids[piece] for piece in wordpiece(word, vocab.ids)]
    return ids, starts, from_student


@pytest.mark.parametrize("student_prob", [0, 0.25, 0.5, 1])
def test_mixed_ids_are_the_definitions(mixed, student_prob):
    for number, text in enumerate(TEXTS):
        for seed in (0, 2**64 - 1):
            got = mixed.encode(text, student_prob=student_prob, seed=seed, number=number)
            expected = mixed_definition(mixed, text, student_prob, seed, number)
            assert (
                got.ids.tolist(),
                got.word_starts.tolist(),
                got.from_student.tolist(),
            ) == expected


def test_mixed_batches(mixed):
    texts = TEXTS * 30
    for threads in (0, 5, 64):
        batch = mixed.encode_batch(texts, seed=7, first_number=2**40, threads=threads)
        assert len(batch) == len(texts)
        for i, text in enumerate(batch):
            expected = mixed.encode(texts[i], seed=7, number=2**40 + i)
            for name in ("ids", "word_starts", "from_student"):
                got, wanted = getattr(text, name), getattr(expected, name)
                assert got.dtype == wanted.dtype
                assert got.tolist() == wanted.tolist()
        assert batch.ids.tolist() == np.concatenate([text.ids for text in batch]).tolist()
        words = np.diff(batch.word_offsets)
        assert words.tolist() == [len(basic_split(text)) for text in TEXTS] * 30
        assert len(batch.word_starts) == len(batch.from_student) == words.sum()
        assert batch[-1].ids.tolist() == batch[len(texts) - 1].ids.tolist()
        with pytest.raises(IndexError):
            batch[len(texts)]
    empty = mixed.encode_batch([])
    assert (len(empty), empty.word_offsets.tolist(), empty.from_student.tolist()) == (0, [0], [])
    nothing = mixed.encode_batch(["", " "])
    assert [text.word_starts.tolist() for text in nothing] == [[], []]


@pytest.mark.parametrize("lowercase", [True, False])
def test_mixed_offsets(lowercase):
    """Those of each word's own vocabulary."""
    teacher, student = Vocab(PIECES, lowercase), Vocab(STUDENT, lowercase)
    mixed = MixedTokenizer(teacher, student)
    for student_prob in (0, 0.5, 1):
        for text in (text for text in TEXTS if "[" not in text):  # these are special in one of them
            encoding, spans = mixed.offsets(text, student_prob=student_prob, seed=3, number=8)
            expected = mixed.encode(text, student_prob=student_prob, seed=3, number=8)
            assert encoding.ids.tolist() == expected.ids.tolist()
            assert spans.shape == (len(expected.ids), 2)
            if student_prob != 0.5:
                alone = WordPieceTokenizer(student if student_prob else teacher)
                assert spans.tolist() == alone.offsets(text)[1].tolist()
            assert (spans[:, 0] < spans[:, 1]).all()
            assert (np.diff(spans[:, 0]) >= 0).all()
    encoding, spans = mixed.offsets("hello hello hello hello", seed=1)
    assert 0 < encoding.from_student.sum() < 4
    for word, student in enumerate(encoding.from_student):
        places = spans[(encoding.word_starts[word] <= np.arange(len(spans)))][: 1 + student]
        cut = [[0, 2], [2, 5]] if student else [[0, 5]]
        assert (places - 6 * word).tolist() == cut


def test_mixed_refuses(mixed):
    for options, message in [
        ({"student_prob": 1.5}, "student_prob is 1.5"),
        ({"student_prob": float("nan")}, "student_prob is nan"),
        ({"student_prob": "0.5"}, "student_prob is '0.5'"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, r"seed is 1\.5, expected an integer of \[0, 2\^64\)"),
        ({"number": 2**64}, "number is"),
    ]:
        with pytest.raises(InputError, match=message):
            mixed.encode("a", **options)
    with pytest.raises(InputError, match="text 1 is not UTF-8: byte 0xff at offset 1"):
        mixed.encode_batch(["a", b"b\xff"])
    with pytest.raises(InputError, match="list of texts"):
        mixed.encode_batch("hello")
    with pytest.raises(InputError, match="is uncased and the student's cased"):
        MixedTokenizer(Vocab(PIECES), Vocab(STUDENT, lowercase=False))


# ---- Hugging Face --------------------------------------------------------------------------------

SHARED = [("vocab.txt", True), ("vocab-cased.txt", False), ("vocab-multilingual-cased.txt", False)]


@pytest.fixture(scope="module", params=SHARED, ids=[name for name, _ in SHARED])
def pair(request, shared_file):
    """Our tokenizer and transformers' slow one, of the same vocabulary."""
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) > 4:
        pytest.skip(f"needs transformers 4 (slow BertTokenizer), found {transformers.__version__}")
    name, lowercase = request.param
    path = shared_file(name)
    slow = transformers.BertTokenizer(str(path), do_lower_case=lowercase)
    return WordPieceTokenizer.from_pretrained(path, lowercase), slow


def test_as_hugging_face(pair, shared_data):
    ours, slow = pair
    lines = (shared_data / "small-ccby.txt").read_text(encoding="utf-8").split("\n")[:120]
    lines += [text for text in TEXTS if len(text) < 1000]
    for line in lines:
        ids = ours.encode(line)
        assert ids == slow.encode(line, verbose=False)
        assert ours.decode(ids) == slow.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == slow.decode(
            ids, skip_special_tokens=True
        )
        assert ours.offsets(line)[0].tolist() == ids[1:-1]


def blocks_of(path):
    """The text of a file or of an archive's files, in whole lines of about 8 MB together."""
    with contextlib.ExitStack() as stack:
        if path.name.endswith(".tar.xz"):
            archive = stack.enter_context(tarfile.open(path))
            files = [archive.extractfile(member) for member in archive if member.isfile()]
        else:
            opener = lzma.open if path.suffix == ".xz" else open
            files = [stack.enter_context(opener(path, "rb"))]
        for file in files:
            while lines := file.readlines(8 << 20):
                yield b"".join(lines).decode()


@pytest.mark.slow
def test_every_shared_file_as_hugging_face(pair, shared_data):
    """All text there is. What stands between ASCII spaces is cut by itself in the definition."""
    ours, slow = pair
    known: dict[str, list[int]] = {}
    paths = [path for path in sorted(shared_data.iterdir()) if path.suffix in (".xz", ".txt")]
    for path in paths:
        for number, text in enumerate(blocks_of(path)):
            chunks = re.split("[ \t\r\n]+", text)
            for chunk in set(chunks) - known.keys():
                known[chunk] = slow.convert_tokens_to_ids(slow.tokenize(chunk))
            ids = itertools.chain.from_iterable(map(known.__getitem__, chunks))
            got = ours.encode_batch([text], add_special_tokens=False).ids
            assert np.array_equal(got, np.fromiter(ids, np.int32)), path
            if number == 0:
                whole = slow.encode(text[:20_000], add_special_tokens=False, verbose=False)
                assert ours.encode(text[:20_000], add_special_tokens=False) == whole
    assert len(paths) > 10
    assert len(known) > 10**6


def test_truncation_and_padding_as_hugging_face(pair):
    ours, slow = pair
    random_ = random.Random(1)
    words = ["the", "rain", "unaffable", "x", "é", "中", "[MASK]", ",", "antidisestablishment"]

    def text():
        return " ".join(random_.choices(words, k=random_.choice([0, 1, 2, 5, 9, 40])))

    for _ in range(60):
        texts = [text() for _ in range(random_.randint(1, 6))]
        pairs = [text() for _ in texts] if random_.random() < 0.6 else None
        options = {
            "max_length": random_.randint(3, 40),
            "truncation": random_.choice([True, "longest_first", "only_first", "only_second"]),
            "padding": random_.choice([True, "longest", "max_length"]),
            "pad_to_multiple_of": random_.choice([None, 8]),
            "add_special_tokens": random_.random() < 0.7,
        }
        if pairs is None and options["truncation"] == "only_second":
            continue
        if pairs is not None and options["truncation"] in ("only_first", "only_second"):
            options["max_length"] += 150  # room for the other text, which stays whole
        options["max_length"] += -options["max_length"] % (options["pad_to_multiple_of"] or 1)
        got = ours.encode_batch(texts, pairs, **options)
        expected = slow(texts, pairs, verbose=False, **options)
        assert got.input_ids.tolist() == expected["input_ids"], (texts, pairs, options)
        assert got.token_type_ids.tolist() == expected["token_type_ids"]
        assert got.attention_mask.tolist() == expected["attention_mask"]
        del options["padding"], options["pad_to_multiple_of"]
        flat = ours.encode_batch(texts, pairs, threads=2, **options)
        expected = slow(texts, pairs, verbose=False, **options)
        assert [row.tolist() for row in flat] == expected["input_ids"]
        types = np.split(flat.token_type_ids, flat.offsets[1:-1])
        assert [row.tolist() for row in types] == expected["token_type_ids"]


def test_empty_texts_as_hugging_face(pair):
    ours, slow = pair
    for texts in [("a", ""), ("", "a"), ("", ""), ("\u200b", " "), ("", None), ("a", None)]:
        for special in (True, False):
            expected = slow.encode(*texts, add_special_tokens=special)
            assert ours.encode(*texts, add_special_tokens=special) == expected


def test_special_pieces_with_deleted_characters_as_hugging_face(pair):
    """Cased text keeps such a piece whole where nothing but space and ideographs are around it."""
    ours, slow = pair
    parts = ["[MA\u200bSK]", "[MAS\u212a]", "[SEP]", "[", " ", "\u200b", "\u0301", "中", "x", "\0",
             "\u2028", "[UN\u00adK]"]  # fmt: skip
    random_ = random.Random(2)
    for _ in range(1500):
        text = "".join(random_.choices(parts, k=random_.randint(1, 6)))
        expected = slow.encode(text)
        assert ours.encode(text) == expected, ascii(text)
        ids, spans = ours.offsets(text)
        assert ids.tolist() == expected[1:-1]
        for id, (begin, end) in zip(ids, spans, strict=True):
            if ours.vocab.pieces[id] in SPECIAL_PIECES and id != ours.vocab.unk:
                assert text[begin] == "["
                assert text[end - 1] == "]"


def test_random_text_as_hugging_face(pair):
    if unicodedata.unidata_version != "14.0.0":
        pytest.skip("needs Python 3.11 (Unicode 14.0.0)")
    ours, slow = pair
    random_ = random.Random(0)
    usual = [*"abcdeé ,.!'-\u0301中한Σ[]", "[MASK]", "[SEP]", "##", " the ", "ing"]
    for _ in range(1500):
        text = "".join(
            random_.choice(usual) if random_.random() < 0.9 else chr(random_.randrange(0x110000))
            for _ in range(random_.randint(1, 40))
        )
        assert ours.encode(text) == slow.encode(text), ascii(text)


@pytest.mark.parametrize(("name", "lowercase"), SHARED[:2], ids=["uncased", "cased"])
def test_transformers_opens_it(name, lowercase, shared_file, shared_data, tmp_path):
    """`as_hf()` and what `AutoTokenizer` makes of a saved folder; of transformers 4 or 5."""
    transformers = pytest.importorskip("transformers")
    ours = WordPieceTokenizer.from_pretrained(shared_file(name), lowercase)
    ours.save_pretrained(tmp_path / "saved")
    assert WordPieceTokenizer.from_pretrained(tmp_path / "saved").vocab == ours.vocab
    lines = (shared_data / "small-ccby.txt").read_text(encoding="utf-8").split("\n")[:60]
    # (Of a pair, it is the other text that keeps the odd piece.)
    rows = {"truncation": True, "max_length": 12, "padding": "max_length"}
    expected = ours.encode_batch(lines, **rows)
    for theirs in (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "saved"),
        ours.as_hf(),
        pickle.loads(pickle.dumps(ours.as_hf())),
    ):
        assert theirs.is_fast
        assert (theirs.model_max_length, len(theirs)) == (512, len(ours))
        for piece in SPECIAL_PIECES:
            told = getattr(theirs, f"{piece.strip('[]').lower()}_token_id")
            assert told == ours.vocab.ids[piece]
        for line in filter(None, lines):  # transformers takes an empty second text for none
            ids = ours.encode(line, line[:50])
            assert theirs(line, line[:50], verbose=False)["input_ids"] == ids
        got = theirs(lines, return_token_type_ids=True, **rows)
        for field in ("input_ids", "token_type_ids", "attention_mask"):
            assert got[field] == getattr(expected, field).tolist()
        theirs.save_pretrained(tmp_path / "theirs")
        assert WordPieceTokenizer.from_pretrained(tmp_path / "theirs").vocab == ours.vocab


def test_the_page_is_true(root, shared_file, tmp_path, monkeypatch):
    """Runs the examples of docs/tokenizer.md."""
    pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_bytes(shared_file("vocab.txt").read_bytes())
    monkeypatch.chdir(tmp_path)
    page = (root / "docs" / "tokenizer.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 7
    names = {}
    for example in examples:
        exec(compile(example, "docs/tokenizer.md", "exec"), names)


@pytest.mark.slow
def test_the_page_counts_what_differs_from_the_fast_tokenizer(root, shared_file):
    """Over every code point, `a?b ?` under an uncased and a cased vocabulary."""
    pytest.importorskip("transformers")
    if unicodedata.unidata_version != "14.0.0":
        pytest.skip("needs Python 3.11 (Unicode 14.0.0)")
    page = (root / "docs" / "tokenizer.md").read_text(encoding="utf-8")
    row = re.search(r"^\| Hugging Face fast .*? \| (\d+) \| (\d+) \|", page, re.MULTILINE)
    codes = [*range(0xD800), *range(0xE000, 0xF0000)]
    texts = [f"a{chr(code)}b {chr(code)}" for code in codes]
    for name, lowercase, count in [
        ("vocab.txt", True, int(row[1])),
        ("vocab-multilingual-cased.txt", False, int(row[2])),
    ]:
        ours = WordPieceTokenizer.from_pretrained(shared_file(name), lowercase)
        batch = ours.encode_batch(texts, add_special_tokens=False)
        fast = ours.as_hf().backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        different = [
            code
            for i, code in enumerate(codes)
            if unicodedata.category(chr(code)) not in ("Cn", "Co")
            and batch[i].tolist() != fast[i].ids
        ]
        assert len(different) == count


def test_core_refuses_special_pieces_with_spaces():
    wordpiece_ = _core.WordPiece(["[UNK]", "a"], 0)
    for special in ([("a b", 0, False)], [("", 0, True)], [("x", 2, False)], [("x", -1, True)]):
        with pytest.raises(ValueError, match="special piece"):
            _core.Tokenizer(lowercase=True, teacher=wordpiece_, special=special)
