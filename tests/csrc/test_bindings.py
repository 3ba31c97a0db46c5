"""The edges of the bindings: buffers that are not contiguous, ids and sizes out of range."""

from functools import partial

import numpy as np
import pytest

from mvbert import _core

WORDS = np.zeros(1, np.uint64)  # the ends, or the counts, of one empty word
IDS = np.zeros(0, np.uint32)
TOTALS = dict.fromkeys(
    [
        *("bytes", "documents", "train_documents", "heldout_documents"),
        *("train_words", "heldout_words", "replaced"),
    ],
    0,
)
WORDPIECE = _core.WordPiece(["[UNK]", "a"], 0)
TOKENIZER = _core.Tokenizer(lowercase=True, teacher=WORDPIECE)


def builder() -> _core.CorpusBuilder:
    build = _core.CorpusBuilder(lowercase=True, heldout_share=0, seed=0, replace=False, threads=1)
    build.begin_source(0, "train")
    return build


FLAT = _core.RowPlan(cls_sep=None)
TAKES_BYTES = {
    "split": _core.split,
    "utf8_error": _core.utf8_error,
    "cut": WORDPIECE.cut,
    "encode_list": lambda data: TOKENIZER.encode_list(data, None, None),
    "encode_list, pair": lambda data: TOKENIZER.encode_list("", data, None),
    "encode_rows": lambda data: TOKENIZER.encode_rows([data], None, FLAT, 1),
    "encode_rows, pairs": lambda data: TOKENIZER.encode_rows([""], [data], FLAT, 1),
    "encode_texts": lambda data: TOKENIZER.encode_texts([data], False),
    "encode_long": lambda data: TOKENIZER.encode_long(data, False),
    "encode_words": lambda data: TOKENIZER.encode_words(data, False),
    "encode_spans": lambda data: TOKENIZER.encode_spans(data, False),
    "add_text": lambda data: builder().add_text(data),
    "add_documents": lambda data: builder().add_documents(data, WORDS),
    "restore": lambda data: builder().restore(data, IDS, TOTALS),
    "segment_lexicon": lambda data: _core.segment_lexicon(data, WORDS, WORDPIECE, 1),
    "learn_vocab": lambda data: _core.learn_vocab(data, WORDS + 1, WORDS + 1, 6, 1.0, 1),
}


@pytest.mark.parametrize("call", TAKES_BYTES)
def test_a_buffer_with_gaps_or_backwards_is_refused(call):
    text = b"a\na\na\n"
    for data in (
        memoryview(text)[::2],
        memoryview(text)[::-1],
        np.frombuffer(text, np.uint8)[::3],
        np.frombuffer(text, np.uint16),
        np.frombuffer(text, np.uint8).reshape(2, 3),
    ):
        with pytest.raises(TypeError, match="expected contiguous bytes"):
            TAKES_BYTES[call](data)


@pytest.mark.parametrize("call", TAKES_BYTES)
def test_a_contiguous_part_of_a_buffer_is_read(call):
    for data in (memoryview(b"__a\n__")[2:4], np.frombuffer(b"__a\n__", np.uint8)[2:4]):
        TAKES_BYTES[call](data)


def test_counts_outside_a_lexicon_are_refused():
    build = builder()
    build.add_text(b"a a b")
    build.flush()
    count = partial(np.array, dtype=np.uint32)
    with pytest.raises(ValueError, match="word id 3 of the stream lies outside the lexicon of 3"):
        build.count(count([1, 3]))
    with pytest.raises(ValueError, match="word id 9 of the stream lies outside the lexicon of 3"):
        build.lexicon(count([9]))
    with pytest.raises(ValueError, match="word id 2 occurs more often in the stream"):
        build.lexicon(count([2, 2, 2, 2]))


def test_a_width_that_overflows_is_refused():
    most = 2**64 - 1
    plan = _core.RowPlan(cls_sep=None, padded=True, width=most, multiple=8)
    with pytest.raises(ValueError, match=f"max_length {most} cannot be rounded up"):
        TOKENIZER.encode_rows(["a"], None, plan, 1)
    plan = _core.RowPlan(cls_sep=None, truncation="longest_first", max_length=most)
    assert TOKENIZER.encode_rows(["a a"], None, plan, 1).flat()[0].tolist() == [1, 1]


def test_rows_stay_what_they_were_after_their_texts_have_gone():
    text = bytearray(b"a a")
    texts = [text, "a"]
    rows = TOKENIZER.encode_rows(texts, None, _core.RowPlan(cls_sep=None, keep=True), 1)
    text[:] = b"aaaaa"
    texts.clear()
    assert rows.words().tolist() == [0, 1, 0]
    assert rows.spans().tolist() == [[0, 1], [2, 3], [0, 1]]
    assert rows.lists("input_ids") == [[1, 1], [1]]
    with pytest.raises(ValueError, match="there is no column 'labels'"):
        rows.lists("labels")


def test_words_that_are_not_those_of_their_texts_are_refused():
    for ends in ([1], [2, 1], [-1, 2], []):
        with pytest.raises(ValueError, match="the words of each text end must ascend to their num"):
            TOKENIZER.encode_rows(["a", "a"], None, FLAT, 1, np.array(ends, np.int64))


def test_lists_of_integers_become_one_array_filled_up():
    rows = [[1, -2, 2**62], [], [7]]
    found = _core.filled_rows(rows, 4, 9)
    assert found.dtype == np.int64
    assert found.tolist() == [[1, -2, 2**62, 9], [9] * 4, [7, 9, 9, 9]]
    assert _core.filled_rows([], 0, 0).shape == (0, 0)
    assert _core.filled_rows([[], []], 0, 0).shape == (2, 0)


@pytest.mark.parametrize(
    "row", [(1, 2), np.array([1]), [1.0], [True], [np.int64(1)], [None], ["a"], [2**63], [1, 2, 3]]
)
def test_what_is_no_list_of_few_integers_is_left_to_the_caller(row):
    assert _core.filled_rows([[1], row], 2, 0) is None
