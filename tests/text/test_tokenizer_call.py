"""Calling a tokenizer: what transformers' tokenizers answer, over options and awkward texts.

Ids, token types and masks are those of the slow tokenizer (transformers 4), or of the fast one
where 5 has no other; offsets, words and overflow are the fast one's, on texts that the two read
alike (tests/text/test_tokenizer.py counts the characters that they do not).
"""

import collections
import copy
import pickle
import sys
import types

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
    single = isinstance(texts, str) or (options["is_split_into_words"] and texts
                                        and isinstance(texts[0], str))  # fmt: skip
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
    assert list(ours.model_input_names) == fast.model_input_names
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
        batch[0]
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
        ("a", {"truncation": "only_second"}, "truncation='only_second' needs text_pair"),
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
    same = WordPieceTokenizer(Vocab(vocab.pieces, vocab.lowercase, added=ADDED,
                                    base_size=vocab.base_size), 12)  # fmt: skip
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
         10**30, ("input_ids", "attention_mask")),
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


def test_values_of_a_batch_are_its_own(ours):
    batch = BatchEncoding({"a": 1})
    batch["b"] = 2
    del batch["a"]
    assert plain(batch) == {"b": 2}
    assert batch == {"b": 2}
