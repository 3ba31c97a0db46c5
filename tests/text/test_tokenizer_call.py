"""Calling a tokenizer: what transformers' tokenizers answer, over options and awkward texts.

Ids, token types and masks are those of the slow tokenizer (transformers 4), or of the fast one
where 5 has no other; offsets, words and overflow are the fast one's, on texts that the two read
alike (tests/text/test_tokenizer.py counts the characters that they do not).
"""

import collections
import copy
import pickle
import random
import sys
import types
import warnings

import numpy as np
import pytest

from mvbert.errors import InputError, MissingExtra
from mvbert.text.batch_encoding import BatchEncoding
from mvbert.text.tokenizer import WordPieceTokenizer
from mvbert.text.vocab import SPECIAL_PIECES, AddedPiece, Vocab

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PIECES = (
    *SPECIAL_PIECES, *LETTERS, *(f"##{c}" for c in LETTERS), "hello", "wor", "##ld", "##lds", ",",
    "!", "[", "]", "'", ".", "中", "é", "##é", "слов", "##о", "##ово", "the", "##ing", "σ", "##σ",
    "\u1112", "##\u1161", "##\u11ab", "한", "##한", "<tag>",
)  # fmt: skip
ADDED = (AddedPiece("<tag>"),)


@pytest.fixture(scope="module", params=[True, False], ids=["uncased", "cased"])
def vocab(request):
    return Vocab(PIECES, lowercase=request.param, added=ADDED, base_size=len(PIECES) - 1)


@pytest.fixture(scope="module")
def ours(vocab):
    return WordPieceTokenizer(vocab, model_max_length=12)


@pytest.fixture(scope="module")
def fast(ours):
    """Transformers' fast tokenizer of the same vocabulary."""
    pytest.importorskip("transformers")
    return ours.as_hf()


@pytest.fixture(scope="module")
def slow(vocab, tmp_path_factory):
    """Transformers' slow tokenizer, or None under transformers 5, which has none."""
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) > 4:
        return None
    path = tmp_path_factory.mktemp("slow") / "vocab.txt"
    vocab.save(path)
    made = transformers.BertTokenizer(
        str(path), do_lower_case=vocab.lowercase, model_max_length=12,
        clean_up_tokenization_spaces=True,
    )  # fmt: skip
    made.add_special_tokens({"additional_special_tokens": ["<tag>"]})
    assert len(made) == vocab.size
    return made


WORDS = st.sampled_from(
    ["hello", "Worlds", "the", "x", "é", "e\u0301", "héllo\u0301", "中", "한국", "\u1112\u1161",
     "[MASK]", "[SEP]", "<tag>", "don't", "slowing", "СЛОВО", "a\u200bb", "\u00ad", "😀", "Σας",
     "q" * 101, "q" * 99, "!!", "a.b", "##ing", "[mask]", "İ", "\u0323\u0301a\u0301\u0323", ""]
)  # fmt: skip
SPACES = st.sampled_from([" ", "  ", "\n", "\t", "\u3000", "", "\u00a0", "\u2028"])


@st.composite
def texts_of(draw):
    parts = draw(st.lists(st.tuples(WORDS, SPACES), max_size=12))
    return "".join(part for pair in parts for part in pair)


# (The slow tokenizer fails on a list without words.)
WORD_LISTS = st.lists(st.one_of(WORDS, texts_of()), min_size=1, max_size=8)


@st.composite
def calls(draw, overflow=None):
    """(texts, pairs, options) that transformers answers and that are not refused here."""
    split = draw(st.booleans())
    text = WORD_LISTS if split else texts_of()
    count = draw(st.integers(0, 4))
    single = count == 0
    texts = draw(text) if single else draw(st.lists(text, min_size=count, max_size=count))
    pairs = None
    if draw(st.booleans()):
        pairs = draw(text) if single else draw(st.lists(text, min_size=count, max_size=count))
        if single and not pairs:  # the fast tokenizer takes an empty second text for none
            pairs = None
    options = {
        "is_split_into_words": split,
        "add_special_tokens": draw(st.booleans()),
        "padding": draw(st.sampled_from([False, True, "longest", "max_length", "do_not_pad"])),
        "truncation": draw(st.sampled_from([None, False, True, "longest_first"])),
        "max_length": draw(st.sampled_from([None, 4, 5, 8, 9, 16, 31])),
        "return_special_tokens_mask": draw(st.booleans()),
        "return_token_type_ids": draw(st.sampled_from([None, True, False])),
        "return_attention_mask": draw(st.sampled_from([None, True, False])),
    }
    if draw(st.booleans()):
        options["pad_to_multiple_of"] = 8
        if options["max_length"] is not None:
            options["max_length"] = 16
    if options["padding"] == "max_length" and not options["truncation"]:
        options["truncation"] = True
    if options["padding"] == "max_length" and options["max_length"] is None:
        options["max_length"] = 16
    if options["padding"] in (True, "longest") and not options["truncation"]:
        options["max_length"] = None
    if options["truncation"] and options["padding"] and "pad_to_multiple_of" in options:
        options["max_length"] = 16
    if not options["add_special_tokens"]:  # the slow refuses them, or has other ones than the fast
        options["return_token_type_ids"] = False if pairs is not None else None
    if overflow:
        options |= {"return_overflowing_tokens": True, "return_offsets_mapping": True,
                    "truncation": "longest_first",
                    "max_length": draw(st.sampled_from([8, 16]))}  # fmt: skip
        # (The fast tokenizer panics where the stride leaves no room for another piece.)
        options["stride"] = draw(st.integers(0, 1 if options["max_length"] == 8 else 4))
    return texts, pairs, options


def plain(batch):
    return {name: batch[name] for name in batch}


def fast_reads_alike(ours, fast, texts, pairs, split):
    """Whether the two versions of BERT's splitter agree on every text."""
    for some in (texts, pairs):
        if some is None:
            continue
        flat = [some] if isinstance(some, str) else some
        for text in flat:
            for word in [text] if isinstance(text, str) else text:
                whole = fast(word, add_special_tokens=False, verbose=False)["input_ids"]
                if whole != ours.encode(word, add_special_tokens=False):
                    return False
    return True


@hypothesis.settings(max_examples=200, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(call=calls())
def test_rows_as_transformers(ours, slow, fast, call):
    texts, pairs, options = call
    if slow is None:
        hypothesis.assume(
            fast_reads_alike(ours, fast, texts, pairs, options["is_split_into_words"])
        )
        cut = options["truncation"] or options["max_length"]
        hypothesis.assume(pairs is None or not cut)  # the odd piece
    expected = plain((slow or fast)(texts, pairs, verbose=False, **options))
    assert plain(ours(texts, pairs, **options)) == expected
    assert plain(ours(texts, pairs, threads=3, **options)) == expected
    single = isinstance(texts, str) or (
        options["is_split_into_words"] and texts and isinstance(texts[0], str)
    )
    ids = [expected["input_ids"]] if single else expected["input_ids"]
    if len(set(map(len, ids))) == 1:
        arrays = ours(texts, pairs, return_tensors="np", **options)
        for name, values in expected.items():
            assert arrays[name].dtype == np.int64
            assert arrays[name].tolist() == ([values] if single else values)


@hypothesis.settings(max_examples=120, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(call=st.one_of(calls(overflow=True), calls()))
def test_offsets_words_and_overflow_as_transformers(ours, fast, call):
    texts, pairs, options = call
    hypothesis.assume(fast_reads_alike(ours, fast, texts, pairs, options["is_split_into_words"]))
    if pairs is not None and not options.get("return_overflowing_tokens"):
        # There the odd piece of a pair is the slow tokenizer's.
        options |= {"truncation": False, "max_length": None}
        if options["padding"] == "max_length":
            options["padding"] = True
    options["return_offsets_mapping"] = True
    expected = fast(texts, pairs, verbose=False, return_length=True, **options)
    got = ours(texts, pairs, return_length=True, **options)
    assert plain(got) == plain(expected)
    del options["return_offsets_mapping"]
    again = ours(texts, pairs, **options)
    batches = [got, again, pickle.loads(pickle.dumps(got))]
    if len({len(row.ids) for row in expected.encodings}) == 1:
        batches.append(ours(texts, pairs, return_tensors="np", **options))
        batches[-1]["input_ids"][:] = 0  # what becomes of the ids changes no word
    for batch in batches:
        for row in range(len(expected.encodings)):
            words = expected.word_ids(row)
            assert batch.word_ids(row) == words
            assert batch.sequence_ids(row) == expected.sequence_ids(row)
            if batch["input_ids"] is not batches[-1]["input_ids"]:
                assert batch.tokens(row) == expected.tokens(row)
            for token in range(len(words)):
                for name in ("token_to_word", "token_to_sequence", "token_to_chars"):
                    wanted = getattr(expected, name)(row, token)
                    assert getattr(batch, name)(row, token) == wanted, name
            for number in range(max([w for w in words if w is not None], default=0) + 2):
                for sequence in range(1 if pairs is None else 2):
                    for name in ("word_to_tokens", "word_to_chars"):
                        wanted = _asked(expected, name, row, number, sequence)
                        assert getattr(batch, name)(row, number, sequence) == wanted, name
            for char in range(0, 12, 3):
                for sequence in range(1 if pairs is None else 2):
                    for name in ("char_to_token", "char_to_word"):
                        wanted = _asked(expected, name, row, char, sequence)
                        assert getattr(batch, name)(row, char, sequence) == wanted, name


def _asked(batch, name, *place):
    try:
        return getattr(batch, name)(*place)
    except TypeError:  # transformers makes a span of None
        return None


@hypothesis.settings(max_examples=60, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(text=texts_of())
def test_conversions_as_transformers(ours, slow, fast, text):
    theirs = slow or fast
    hypothesis.assume(slow or fast_reads_alike(ours, fast, text, None, False))
    pieces = theirs.tokenize(text)
    assert ours.tokenize(text) == pieces
    ids = theirs.convert_tokens_to_ids(pieces)
    assert ours.convert_tokens_to_ids(pieces) == ids
    assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
    if slow or "<tag>" not in text:  # the object of transformers 5 does not count it as special
        assert ours.convert_ids_to_tokens(np.array(ids, int), skip_special_tokens=True) == (
            theirs.convert_ids_to_tokens(ids, skip_special_tokens=True)
        )
    if slow:
        for skip in (True, False):
            assert ours.decode(ids, skip) == slow.decode(ids, skip_special_tokens=skip)
            assert ours.batch_decode([ids, ids], skip) == [ours.decode(ids, skip)] * 2


def test_names_as_transformers(ours, fast):
    for name in ("pad", "unk", "cls", "sep", "mask"):
        for kind in ("token", "token_id"):
            assert getattr(ours, f"{name}_{kind}") == getattr(fast, f"{name}_{kind}")
    for name in ("vocab_size", "model_max_length", "padding_side", "truncation_side", "is_fast",
                 "pad_token_type_id"):  # fmt: skip
        assert getattr(ours, name) == getattr(fast, name), name
    assert ours.model_input_names == fast.model_input_names
    # (The object counts BERT's; a tokenizer of saved files counts special added pieces, too.)
    assert sorted(ours.all_special_ids) == sorted([*fast.all_special_ids, ours.vocab.ids["<tag>"]])
    assert set(ours.all_special_tokens) == {*fast.all_special_tokens, "<tag>"}
    assert ours.get_vocab() == fast.get_vocab()
    assert ours.get_added_vocab() == fast.get_added_vocab()
    assert len(ours) == len(fast)
    assert ours.num_special_tokens_to_add() == fast.num_special_tokens_to_add()
    assert ours.num_special_tokens_to_add(pair=True) == fast.num_special_tokens_to_add(pair=True)
    assert ours.convert_tokens_to_ids("hello") == fast.convert_tokens_to_ids("hello")
    assert ours.convert_tokens_to_ids("nowhere") == ours.unk_token_id
    assert ours.convert_tokens_to_ids(None) is None
    assert ours.convert_ids_to_tokens(5) == fast.convert_ids_to_tokens(5)
    row = ours("hello", "x")["input_ids"]
    for have in (True, False):
        assert ours.get_special_tokens_mask(row, already_has_special_tokens=have) == (
            [1, 0, 1, 0, 1] if have else [1, 0, 0, 0, 0, 0, 1]
        )
    assert ours.get_special_tokens_mask([7], [8, 9]) == [1, 0, 1, 0, 0, 1]
    assert ours.build_inputs_with_special_tokens([7], [8]) == [2, 7, 3, 8, 3]
    assert ours.create_token_type_ids_from_sequences([7], [8]) == [0, 0, 0, 1, 1]


@hypothesis.settings(max_examples=60, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    names=st.sets(st.sampled_from(["token_type_ids", "attention_mask", "special_tokens_mask"])),
    padding=st.sampled_from([True, "longest", "max_length", False]),
    multiple=st.sampled_from([None, 4]),
    as_list=st.booleans(),
    tensors=st.sampled_from([None, "np", "pt"]),
)
def test_pad_as_transformers(ours, fast, sizes, names, padding, multiple, as_list, tensors):
    if padding is False and len(set(sizes)) > 1:
        tensors = None
    examples = [
        {"input_ids": [*range(5, 5 + n)], **{k: [1] * n for k in sorted(names)}, "labels": n}
        for n in sizes
    ]
    if not as_list:
        examples = {k: [e[k] for e in examples] for k in examples[0]}
    options = {"padding": padding, "pad_to_multiple_of": multiple, "return_tensors": tensors}
    if padding == "max_length":
        options["max_length"] = 11
    hypothesis.assume(padding is not False or multiple is None)
    # (transformers asks the first examples that are not empty what kind they are.)
    hypothesis.assume(0 not in sizes)
    expected = fast.pad(copy.deepcopy(examples), **options)
    got = ours.pad(examples, **options)
    assert set(got) == set(expected)
    for name, values in expected.items():
        if tensors is None:
            assert got[name] == values, name
        else:
            assert got[name].dtype == values.dtype
            assert got[name].tolist() == values.tolist(), name


def test_a_batch_is_a_mapping(ours):
    torch = pytest.importorskip("torch")
    batch = ours(["hello", "hello worlds"], padding=True, return_tensors="pt")
    assert isinstance(batch, collections.abc.MutableMapping)
    assert list(batch) == ["input_ids", "token_type_ids", "attention_mask"]
    assert len(batch) == 3
    assert batch.input_ids is batch["input_ids"]
    assert batch.input_ids.dtype == torch.int64
    assert dict(**batch).keys() == batch.keys()
    shallow = copy.copy(batch)
    shallow["labels"] = 1
    assert shallow.pop("labels") == 1
    assert "labels" not in batch
    assert batch.to("cpu") is batch
    assert batch.to(torch.device("meta"), non_blocking=True)["input_ids"].device.type == "meta"
    # as transformers' Trainer makes another one
    other = type(batch)({name: value.shape for name, value in batch.items()})
    assert other["input_ids"] == (2, 5)
    with pytest.raises(InputError, match="not made by a tokenizer's call"):
        other.word_ids(0)
    with pytest.raises(AttributeError, match="has no 'nothing'"):
        batch.nothing  # noqa: B018
    with pytest.raises(KeyError, match="read by name"):
        batch[1.5]
    with pytest.raises(InputError, match="there is no row 2; the batch has 2"):
        batch.word_ids(2)
    with pytest.raises(InputError, match="there is no piece 9; the row has 5"):
        batch.token_to_word(0, 9)
    assert "input_ids" in repr(batch)
    lists = pickle.loads(pickle.dumps(ours(["hello"])))
    assert lists.data == {"input_ids": [[2, 57, 3]], "token_type_ids": [[0] * 3],
                          "attention_mask": [[1] * 3]}  # fmt: skip
    with pytest.raises(InputError, match="pickled without offsets"):
        lists.char_to_token(0)


@pytest.mark.parametrize("tensors", [None, "np"])
def test_a_list_may_change_after_the_call(ours, tensors):
    """Words and offsets are found later, of the texts as they were."""
    for split in (False, True):
        texts = [["hello", "x"], ["the"]] if split else ["hello x", "the"]
        pairs = [["x"], ["x"]] if split else ["worlds", bytearray(b"the")]
        options = {"padding": True, "return_tensors": tensors, "is_split_into_words": split}
        batch = ours(texts, pairs, **options)
        again = ours(texts, pairs, **options)
        expected = [again.word_ids(i) for i in (0, 1)], again.token_to_chars(0, 1)
        second = again.token_to_chars(1, 3)
        if split:
            texts[0][0] = pairs[0][0] = "y y y"
        else:
            texts[0] = pairs[0] = "y y y"
            pairs[1][:] = b"y y y y y"
        assert ([batch.word_ids(i) for i in (0, 1)], batch.token_to_chars(0, 1)) == expected
        texts.clear()
        pairs.clear()
        assert batch.token_to_chars(1, 3) == second
        assert batch.word_ids(1) == expected[0][1]


def test_a_call_encodes_once_and_decides_once(vocab):
    class Counted:
        def __init__(self, core):
            self.core = core
            self.calls = 0

        def encode_rows(self, *arguments):
            self.calls += 1
            return self.core.encode_rows(*arguments)

    tok = WordPieceTokenizer(vocab)
    tok._core = counted = Counted(tok._core)
    for tensors in (None, "np"):
        batch = tok(["hello x", "x"], ["the", "x"], padding=True, return_tensors=tensors)
        words = [None, 0, 1, None, 0, None]
        assert batch.word_ids(0) == words
        batch["input_ids"][0][:] = 0 if tensors else []  # changes no word and no piece
        assert batch.word_ids(0) == words
        assert batch.tokens(0) == ["[CLS]", "hello", "x", "[SEP]", "the", "[SEP]"]
        assert batch.sequence_ids(0) == [None, 0, 0, None, 1, None]
    assert counted.calls == 2
    tok(["hello"], padding=True, return_tensors="np")
    assert tok._plan_call.cache_info().misses == 2
    with pytest.raises(InputError, match="padding is 1"):  # True and 1 are one key
        tok(["hello"], padding=1, return_tensors="np")


def test_pairs_in_one_list(ours):
    """As rerankers call it."""
    pairs = [["hello", "worlds"], ("x", "")]
    assert plain(ours(pairs)) == plain(ours(["hello", "x"], ["worlds", ""]))
    with pytest.raises(InputError, match=r"text 1 is \('x',\).*expected a pair of texts"):
        ours([["hello", "worlds"], ("x",)])


def test_rows_of_two_pieces(ours, fast):
    """Spans are of two numbers, too."""
    options = {"padding": True, "add_special_tokens": False, "return_offsets_mapping": True}
    texts = ["hello x", "the"]
    assert plain(ours(texts, **options)) == plain(fast(texts, **options))


def test_lists_without_words(ours, fast):
    for texts in ([[]], [[], ["hello"]], [["hello"], [], []]):
        expected = fast(texts, is_split_into_words=True)
        got = ours(texts, is_split_into_words=True)
        assert plain(got) == plain(expected)
        assert [got.word_ids(i) for i in range(len(texts))] == [
            expected.word_ids(i) for i in range(len(texts))
        ]
    assert plain(ours([], is_split_into_words=True)) == plain(ours(""))


def test_bytes_and_arrays_of_texts(ours):
    expected = ours(["hello", "é"])
    assert plain(ours([b"hello", "é".encode()])) == plain(expected)
    assert plain(ours(np.array(["hello", "é"], object))) == plain(expected)
    assert plain(ours(iter(["hello", "é"]))) == plain(expected)
    assert plain(ours(b"hello")) == plain(ours("hello"))
    assert plain(ours([])) == {"input_ids": [], "token_type_ids": [], "attention_mask": []}
    assert ours([], return_tensors="np", padding=True)["input_ids"].shape == (0, 0)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (None, {}, "text is None .*expected str, bytes or a list"),
        (5, {}, "texts is int, expected a list of texts"),
        ({"a": "b"}, {}, "texts is dict"),
        (["a", None], {}, r"text 1 is None \(NoneType\), expected str or bytes; give a missing"),
        (["a", 5], {}, r"text 1 is 5 \(int\)"),
        (["a", b"\xff"], {}, "text 1 is not UTF-8: byte 0xff at offset 0"),
        ("a", {"text_pair": ["b"]}, "text is one text and text_pair a list"),
        (["a"], {"text_pair": "b"}, "text_pair is one text and text a list"),
        (["a"], {"text_pair": ["b", "c"]}, "1 texts and 2 pairs"),
        (["a"], {"text_pair": [None]}, "pair 0 is None"),
        ("a b", {"is_split_into_words": True}, "text is 'a b' .*expected a list of words"),
        ([["a"], "b"], {"is_split_into_words": True}, "text 1 is 'b' .*expected a list of words"),
        ([["a"], ["b", 7]], {"is_split_into_words": True}, r"text 1, word 1 is 7 \(int\)"),
        (["a", 7], {"is_split_into_words": True}, r"text 0, word 1 is 7 \(int\)"),
        ("a", {"padding": "left"}, "padding is 'left', expected True, False, 'longest'"),
        ("a", {"padding": 1}, "padding is 1"),
        ("a", {"truncation": "shortest"}, "truncation is 'shortest', expected True"),
        ("a b c", {"truncation": "only_second", "max_length": 4}, "row 0 cannot be cut"),
        ("a", {"max_length": "5"}, "max_length is '5', expected an integer"),
        ("a", {"max_length": 1}, "leaves no room for the 2 special tokens"),
        ("a", {"stride": -1}, "stride is -1, expected an integer"),
        ("a b c d", {"max_length": 4, "stride": 2, "return_overflowing_tokens": True},
         "stride is 2, but row 0 has room for 2 pieces of its first text"),
        ("a", {"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0"),
        ("a", {"padding": True, "truncation": True, "max_length": 9, "pad_to_multiple_of": 8},
         "max_length 9 is not a multiple of pad_to_multiple_of 8"),
        ("a", {"return_tensors": "tf"}, "return_tensors is 'tf', expected 'np', 'pt' or None"),
        (["a", "a b"], {"return_tensors": "np"}, "row 0 is shorter than others.*padding=True"),
        ("a", {"return_offsets_mapping": "yes"}, r"return_offsets_mapping is 'yes' \(str\)"),
        ("a", {"return_attention_mask": 1}, r"return_attention_mask is 1 \(int\), expected True"),
        ("a b c", {"padding": "max_length", "max_length": 3, "truncation": False},
         "row 0 has 5 pieces, more than max_length 3"),
        ("a", {"threads": -1}, "threads must be 0"),
        ("a", {"padding_side": "left"}, "padding_side is 'left', expected 'right'.*as_hf"),
        ("a", {"split_special_tokens": 1}, r"split_special_tokens is 1 \(int\)"),
        ("a", {"padding": ["longest"]}, r"padding is \['longest'\]"),
        (["a b c"], {"text_pair": ["d e f"], "truncation": "only_first", "max_length": 5},
         "row 0 cannot be cut"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value)[:40],
)  # fmt: skip
def test_what_is_refused(ours, texts, options, message):
    with pytest.raises(InputError, match=message):
        ours(texts, **options)


def test_lengths_that_no_file_says(vocab):
    unknown = WordPieceTokenizer(vocab)
    assert unknown.model_max_length == 10**30
    for options in ({"truncation": True}, {"padding": "max_length"}):
        with pytest.raises(InputError, match=r"needs max_length: no file .* model_max_length"):
            unknown("a", **options)
    with pytest.raises(InputError, match="padding='max_length' needs max_length"):
        unknown.pad({"input_ids": [[1]]}, padding="max_length")
    with pytest.warns(UserWarning, match="max_length is ignored"):
        assert len(unknown("a b c", padding=True, max_length=2)["input_ids"]) == 5


def test_only_one_text_is_cut(ours, fast):
    for cut in ("only_first", "only_second"):
        options = {"truncation": cut, "max_length": 8, "return_overflowing_tokens": True,
                   "return_offsets_mapping": True, "stride": 1}  # fmt: skip
        texts = (["x", "a b"], ["a b c d e f g h", "the"])
        texts = texts if cut == "only_second" else texts[::-1]
        expected = fast(*texts, verbose=False, **options)
        got = ours(*texts, **options)
        assert plain(got) == plain(expected)
        assert got["overflow_to_sample_mapping"] == [0, 0, 0, 1]
        assert [got.word_ids(i) for i in range(4)] == [expected.word_ids(i) for i in range(4)]


def test_pad_refuses(ours):
    for inputs, options, message in [
        ([], {}, "pad got an empty list"),
        (5, {}, r"pad got 5 \(int\), expected a mapping"),
        ([{"input_ids": [1]}, 5], {}, r"example 1 is 5 \(int\), expected a mapping"),
        ([{"input_ids": [1]}, {"labels": 1}], {}, "example 1 has labels and example 0 input_ids"),
        ({"labels": [[1]]}, {}, "pad needs input_ids, got labels"),
        ({"input_ids": 5}, {}, r"input_ids is 5 \(int\), expected a row of integers, or rows"),
        ({"input_ids": [[1], 2]}, {}, r"input_ids 1 is 2 \(int\), expected a row of integers"),
        ({"input_ids": [[1], None]}, {}, "input_ids 1 is None"),
        ({"input_ids": [[1]], "attention_mask": 1}, {}, "attention_mask is 1"),
        ({"input_ids": [2, [1]]}, {"return_tensors": "np"}, "input_ids has lists among integers"),
        ({"input_ids": [[1]]}, {"padding_side": "left"}, "padding_side is 'left', expected"),
        ({"input_ids": [[1], [2]], "labels": [1]}, {}, "labels has 1 rows and input_ids 2"),
        ({"input_ids": [[1], [2]], "labels": [[1], [2, 3]]}, {"return_tensors": "np"},
         "labels has rows of different lengths, which pad does not fill up"),
        ({"input_ids": [[1.5], [2, 3]]}, {"return_tensors": "np"},
         "input_ids has float64 values, expected rows of integers"),
        ({"input_ids": [[1]], "text": ["a"]}, {"return_tensors": "np"}, "text has <U1 values"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            ours.pad(inputs, **options)


def test_pad_takes_tensors_and_arrays(ours):
    torch = pytest.importorskip("torch")
    rows = [torch.tensor([5, 6]), np.array([5]), [5, 6, 7]]
    got = ours.pad([{"input_ids": row} for row in rows], return_tensors="pt")
    assert got["input_ids"].tolist() == [[5, 6, 0], [5, 0, 0], [5, 6, 7]]
    assert got["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert ours.pad([{"input_ids": row} for row in rows])["input_ids"] == (
        [[5, 6, 0], [5, 0, 0], [5, 6, 7]]
    )


def test_tokenizers_are_equal_by_what_they_do(ours, vocab):
    same = WordPieceTokenizer(
        Vocab(vocab.pieces, vocab.lowercase, added=ADDED, base_size=vocab.base_size), 12
    )
    assert same == ours
    assert hash(same) == hash(ours)
    assert pickle.loads(pickle.dumps(ours)) == ours
    assert WordPieceTokenizer(vocab, 13) != ours
    assert WordPieceTokenizer(Vocab(PIECES, not vocab.lowercase), 12) != ours
    assert ours != "tokenizer"


def test_files_say_lengths_and_inputs(ours, tmp_path):
    other = WordPieceTokenizer(ours.vocab, 77, ("input_ids", "attention_mask"))
    other.save_pretrained(tmp_path / "saved")
    again = WordPieceTokenizer.from_pretrained(tmp_path / "saved")
    assert again == other
    assert list(again("hello")) == ["input_ids", "attention_mask"]
    assert len(again(["x " * 99], truncation=True)["input_ids"][0]) == 77
    config = tmp_path / "saved" / "tokenizer_config.json"
    for text, length, names in [
        ('{"tokenizer_class": "DistilBertTokenizer", "model_max_length": 1e30, '
         '"do_lower_case": false, "strip_accents": null}',
         10**30, ["input_ids", "attention_mask"]),
    ]:  # fmt: skip
        config.write_text(text.replace("false", str(ours.vocab.lowercase).lower()))
        found = WordPieceTokenizer.from_pretrained(tmp_path / "saved")
        assert (found.model_max_length >= length, found.model_input_names) == (True, names)
    config.write_text('{"model_max_length": "long"}')
    with pytest.raises(InputError, match="model_max_length is 'long', expected a number"):
        WordPieceTokenizer.from_pretrained(tmp_path / "saved" / "vocab.txt")
    config.write_text('{"model_input_names": "input_ids"}')
    with pytest.raises(InputError, match="model_input_names is 'input_ids', expected a list"):
        WordPieceTokenizer.from_pretrained(tmp_path / "saved" / "vocab.txt")


def test_names_on_the_hub(ours, tmp_path, monkeypatch):
    ours.save_pretrained(tmp_path / "there")
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "no/where":
            raise OSError("no network\nmore")
        return str(tmp_path / "there")

    class Never(Exception):
        pass

    errors = types.ModuleType("huggingface_hub.errors")
    for name in ("HfHubHTTPError", "HFValidationError", "LocalEntryNotFoundError"):
        setattr(errors, name, Never)
    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download, hub.errors = snapshot_download, errors
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    monkeypatch.chdir(tmp_path)
    assert WordPieceTokenizer.from_pretrained("some/bert").vocab == ours.vocab
    assert asked == [("some/bert", ["*.json", "vocab.txt"])]
    with pytest.raises(InputError, match=r"no/where: no such folder.*\(no network\)"):
        WordPieceTokenizer.from_pretrained("no/where")
    with pytest.raises(InputError, match=r"missing\.txt does not exist"):
        WordPieceTokenizer.from_pretrained("missing.txt")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match="needs huggingface_hub"):
        WordPieceTokenizer.from_pretrained("some/bert")


def test_transformers_collators_take_it(ours):
    """Collators, and DataLoader workers that pickle what they make."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    texts = ["hello worlds", "x"]
    rows = [ours(text) for text in texts]
    expected = ours(texts, padding=True, return_tensors="pt")
    batch = transformers.DataCollatorWithPadding(ours)(rows)
    for name in expected:
        assert torch.equal(batch[name], expected[name])
    torch.manual_seed(0)
    masked = transformers.DataCollatorForLanguageModeling(ours, mlm_probability=0.5)(rows)
    kept = masked["labels"] == -100
    assert torch.equal(masked["input_ids"][kept], expected["input_ids"][kept])
    assert torch.equal(masked["labels"][~kept], expected["input_ids"][~kept])
    assert kept[:, 0].all()
    classes = transformers.DataCollatorForTokenClassification(ours)(
        [{**row, "labels": [1] * len(row["input_ids"])} for row in rows]
    )
    assert classes["labels"].tolist()[1][3:] == [-100] * (classes["labels"].shape[1] - 3)


def test_transformers_collator_for_whole_words_takes_it(ours, fast):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    if not hasattr(transformers, "DataCollatorForWholeWordMask"):
        pytest.skip("transformers 5 has no DataCollatorForWholeWordMask")
    made = []
    for tok in (ours, fast):
        rows = [tok("hello worlds slowing") for _ in range(4)]
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is for BertTokenizer, it says
            random.seed(0)
            made.append(transformers.DataCollatorForWholeWordMask(tok, mlm_probability=0.4)(rows))
    for name in ("input_ids", "labels"):
        assert torch.equal(made[0][name], made[1][name])
    assert (made[0]["labels"] != -100).any()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_pipelines_take_it(ours):
    """Question answering asks the most: rows by number, words, characters."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    if not hasattr(transformers, "QuestionAnsweringPipeline"):
        pytest.skip("this transformers has no such pipeline")
    torch.manual_seed(0)
    model = transformers.BertForQuestionAnswering(
        transformers.BertConfig(vocab_size=len(ours), hidden_size=16, num_hidden_layers=1,
                                num_attention_heads=1, intermediate_size=16)
    ).eval()  # fmt: skip
    fast = ours.as_hf()
    question, context = "x the", "hello worlds the slowing x " * 8
    made = [
        transformers.pipeline("question-answering", model=model, tokenizer=tok, device="cpu")(
            question=question, context=context, max_seq_len=24, doc_stride=8
        )
        for tok in (ours, fast)
    ]
    assert made[0] == pytest.approx(made[1])


def test_one_text_is_cut_as_transformers(ours, fast):
    """only_first and only_second of texts that they leave nothing of, or that have no second."""
    texts = [("x", None), ("x", "a"), ("x a", "the x"), ("the x a", "x")]
    for cut in ("only_first", "only_second"):
        for length in range(3, 9):
            for text, pair in texts:
                options = {"truncation": cut, "max_length": length}
                try:
                    expected = plain(fast(text, pair, **options))
                except Exception:
                    expected = None
                if expected is not None:
                    assert plain(ours(text, pair, **options)) == expected
                    continue
                with pytest.raises(InputError, match="row 0 cannot be cut"):
                    ours(text, pair, **options)


def test_older_names_of_a_call_as_transformers(ours, fast):
    torch = pytest.importorskip("torch")
    for call in (
        lambda tok: tok.encode("hello x", text_pair="x", add_special_tokens=False),
        lambda tok: tok.encode("hello worlds x", truncation=True, max_length=4),
        lambda tok: tok.encode("hello", "x", max_length=9, padding="max_length", truncation=True),
        lambda tok: tok.encode(["hello", "x"], is_split_into_words=True),
        lambda tok: tok.tokenize(["hello x", "the"], is_split_into_words=True),
        lambda tok: tok.tokenize("hello", pair="x", add_special_tokens=True),
        lambda tok: tok.tokenize("hello [MASK] <tag>", split_special_tokens=True),
        lambda tok: plain(tok("hello [MASK] <tag>", split_special_tokens=True)),
        lambda tok: plain(tok(["hello", "hello x"], padding=True, padding_side="right")),
        lambda tok: tok.pad([{"input_ids": [1]}, {"input_ids": [1, 2]}], True, None, None, "right",
                            None, None).data,
    ):  # fmt: skip
        assert call(ours) == call(fast)
    if hasattr(fast, "encode_plus"):  # transformers 5 has no such names
        for call in (
            lambda tok: plain(
                tok.encode_plus("hello " * 4, "x", True, truncation=True, max_length=6)
            ),
            lambda tok: plain(tok.batch_encode_plus(["hello x", "x"], padding=True)),
            lambda tok: plain(tok.batch_encode_plus([("hello x", "x")], return_length=True)),
        ):
            assert call(ours) == call(fast)
    for tok in (ours, fast):
        ids = tok.encode("hello", return_tensors="pt", max_length=2, truncation=True)
        assert torch.equal(ids, torch.tensor([[2, 3]]))
    with pytest.raises(InputError, match="pairs is str, expected a list"):
        ours.batch_encode_plus("hello")
    with pytest.raises(InputError, match=r"text is \['a'\] \(list\)"):
        ours.encode(["a"], padding=True)


def special_pieces(theirs):
    """The special added pieces of a tokenizer of transformers, by the name of 4 or of 5."""
    name = "additional_special_tokens"
    return getattr(theirs, name) if hasattr(theirs, name) else theirs.extra_special_tokens


def test_a_plain_added_piece_stays_whole(vocab, tmp_path):
    """split_special_tokens is about special pieces."""
    transformers = pytest.importorskip("transformers")
    added = (AddedPiece("<tag>", special=False),)
    tok = WordPieceTokenizer(Vocab(PIECES, vocab.lowercase, added=added, base_size=len(PIECES) - 1))
    tok.save_pretrained(tmp_path)
    fast = transformers.BertTokenizerFast.from_pretrained(tmp_path)
    text = "hello[MASK]<tag> x"
    for split in (False, True):
        assert tok.tokenize(text, split_special_tokens=split) == (
            fast.tokenize(text, split_special_tokens=split)
        )
    assert tok.additional_special_tokens == special_pieces(fast) == []
    _assert_added(tok, fast)


def _assert_added(ours, theirs):
    assert list(ours.added_tokens_decoder) == list(theirs.added_tokens_decoder)
    assert ours.added_tokens_encoder == theirs.added_tokens_encoder
    for id, expected in theirs.added_tokens_decoder.items():
        got = ours.added_tokens_decoder[id]
        assert str(got) == str(expected)
        for name in ("content", "single_word", "lstrip", "rstrip", "normalized", "special"):
            assert getattr(got, name) == getattr(expected, name), name


def test_further_names_as_transformers(ours, tmp_path):
    """Of the tokenizer of saved files, which knows its special added pieces."""
    transformers = pytest.importorskip("transformers")
    ours.save_pretrained(tmp_path)
    ours = WordPieceTokenizer.from_pretrained(tmp_path)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    names = ("bos_token", "eos_token", "bos_token_id", "eos_token_id", "split_special_tokens",
             "special_tokens_map", "max_len_single_sentence", "max_len_sentences_pair",
             "do_lower_case", "additional_special_tokens",
             "additional_special_tokens_ids")  # fmt: skip
    for name in names:
        if hasattr(fast, name):  # (5 has fewer)
            expected = getattr(fast, name)
            if name == "special_tokens_map" and special_pieces(fast):  # where 5 has them no more
                expected = {**expected, "additional_special_tokens": special_pieces(fast)}
            assert getattr(ours, name) == expected, name
    assert ours.name_or_path == str(fast.name_or_path) == str(tmp_path)
    _assert_added(ours, fast)
    assert pickle.loads(pickle.dumps(ours)).name_or_path == str(tmp_path)
    assert WordPieceTokenizer(ours.vocab, ours.model_max_length) == ours
    five = ours.vocab.ids["hello"]
    assert ours.decode(five) == ours.decode(np.int64(five)) == fast.decode(five) == "hello"
    assert ours.decode(token_ids=[five]) == fast.decode(token_ids=[five])


def test_wrong_types_are_refused_by_name(ours):
    batch = ours("hello")
    for call, message in [
        (lambda: ours.batch_decode(5), r"sequences is 5 \(int\), expected rows of ids"),
        (lambda: ours.convert_tokens_to_string(5), r"tokens is 5 \(int\), expected pieces"),
        (lambda: ours.get_special_tokens_mask(5), r"token_ids_0 is 5 \(int\), expected a row"),
        (lambda: ours.build_inputs_with_special_tokens([5], 6), r"token_ids_1 is 6 \(int\)"),
        (lambda: WordPieceTokenizer.from_pretrained(None), r"path is None .*expected a folder"),
        (lambda: WordPieceTokenizer.from_pretrained(5), r"path is 5 \(int\)"),
        (lambda: WordPieceTokenizer.from_pretrained("x", "yes"), r"lowercase is 'yes' \(str\)"),
        (lambda: batch.word_ids("x"), r"the row is 'x' \(str\), expected an integer"),
        (lambda: batch.word_ids(0.0), r"the row is 0.0 \(float\)"),
        (lambda: batch.token_to_sequence("x"), r"the piece is 'x' \(str\)"),
        (lambda: batch.word_to_tokens("x"), r"the word is 'x' \(str\)"),
        (lambda: batch.char_to_token("x"), r"the character is 'x' \(str\)"),
        (lambda: batch.convert_to_tensors("tf"), "return_tensors is 'tf'"),
        (lambda: ours(["a", "a x"]).convert_to_tensors("np"), "input_ids has rows of different"),
        (lambda: BatchEncoding({"a": "b"}).convert_to_tensors("np"), "a has <U1 values"),
    ]:
        with pytest.raises(InputError, match=message):
            call()


def test_rows_of_a_batch_as_transformers(ours, fast):
    for texts, pairs, options in [
        (["hello worlds", "x"], None, {"padding": True}),
        (["hello x", "x"], ["the", "slowing x"], {}),
        (["hello x the"], ["the x slowing"], {"padding": "max_length", "max_length": 8,
         "truncation": "only_second", "stride": 1, "return_overflowing_tokens": True}),
        ("hello", "x x", {}),
    ]:  # fmt: skip
        got, expected = ours(texts, pairs, **options), fast(texts, pairs, **options)
        assert got.n_sequences == expected.n_sequences
        assert got.is_fast
        assert got.words(0) == expected.word_ids(0)
        assert len(got.encodings) == len(got[0:]) == len(expected.encodings)
        for row, other in zip(got[:], expected[:], strict=True):
            for name in ("ids", "type_ids", "tokens", "offsets", "word_ids", "n_sequences",
                         "attention_mask", "special_tokens_mask", "sequence_ids"):  # fmt: skip
                assert getattr(row, name) == getattr(other, name), name
            assert len(row) == len(other)
            for place in range(len(other)):
                for name in ("token_to_sequence", "token_to_word", "token_to_chars"):
                    assert getattr(row, name)(place) == getattr(other, name)(place), name
                for sequence in range(other.n_sequences):
                    for name in ("word_to_tokens", "word_to_chars", "char_to_token",
                                 "char_to_word"):  # fmt: skip
                        assert getattr(row, name)(place, sequence) == (
                            getattr(other, name)(place, sequence)
                        ), name
        assert got[-1].ids == expected[-1].ids
    assert "hello" in repr(ours("hello")[0])


def test_a_batch_as_a_dictionary(ours, fast):
    torch = pytest.importorskip("torch")
    for tok in (ours, fast):
        batch = tok(["hello", "x x"], padding=True)
        assert (batch | {"x": 1})["x"] == 1
        assert ({"x": 1} | batch)["x"] == 1
        assert next(iter({"x": 1} | batch)) == "x"
        assert type(batch | {}) is type(batch)
        other = batch.copy()
        other["labels"] = [0, 1]
        assert "labels" not in batch
        assert other.convert_to_tensors(None) is other
        assert other["labels"] == [0, 1]
        assert other.convert_to_tensors("pt") is other
        assert {name: value.dtype for name, value in other.items()} == dict.fromkeys(
            [*batch, "labels"], torch.int64
        )
        assert other["input_ids"].tolist() == batch["input_ids"]
        one = tok("hello").convert_to_tensors("np", prepend_batch_axis=True)
        assert one["input_ids"].shape == (1, len(tok("hello")["input_ids"]))
        assert type(batch)({"a": [0.5]}).convert_to_tensors("pt")["a"].dtype == torch.float32
        plain_batch = type(batch)({"a": [1, 2, 3]})
        assert plain_batch[:2] == {"a": [1, 2]}
        assert plain_batch.n_sequences is None
        assert not plain_batch.is_fast
        with pytest.raises(KeyError):
            plain_batch[0]


def test_values_of_a_batch_are_its_own(ours):
    batch = BatchEncoding({"a": 1})
    batch["b"] = 2
    del batch["a"]
    assert plain(batch) == {"b": 2}
    assert batch == {"b": 2}
