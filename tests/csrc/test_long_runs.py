"""Long runs of one kind of character: they end, and the ids and places after them are right."""

import numpy as np
import pytest

from mvbert import _core
from mvbert.text.tokenizer import MixedTokenizer, WordPieceTokenizer
from mvbert.text.vocab import SPECIAL_PIECES, Vocab
from mvbert.text.wordpiece import basic_split

PIECES = (*SPECIAL_PIECES, "a", "##a", "!", "\u4e2d", "[", "word")
UNK, CLS, SEP, MASK, A, MORE_A, MARK, IDEOGRAPH, BRACKET, WORD = range(1, 11)
BLANKS = [" ", "\t", "\n", "\r", " \n\t\r", "\u3000", "\u2028"]


@pytest.fixture(scope="module")
def tokenizer() -> WordPieceTokenizer:
    return WordPieceTokenizer(Vocab(PIECES))


@pytest.fixture(scope="module")
def cased() -> WordPieceTokenizer:
    return WordPieceTokenizer(Vocab(PIECES, lowercase=False))


# ---- blanks: 16,384 of them filled the buffer of words, and encode never returned ----------------


@pytest.mark.parametrize("length", [16383, 16384, 16385, 20000, 200000])
@pytest.mark.parametrize("blank", BLANKS, ids=ascii)
def test_any_number_of_blanks_has_no_ids(tokenizer, cased, blank, length):
    blanks = (blank * length)[:length]
    for each in (tokenizer, cased):
        assert each.encode(blanks) == [CLS, SEP]
        assert each.encode(blanks, "word") == [CLS, SEP, WORD, SEP]
        assert each.encode(blanks + "word" + blanks + "!", add_special_tokens=False) == [WORD, MARK]
        ids, spans = each.offsets(blanks + "word" + blanks + "!")
        assert ids.tolist() == [WORD, MARK]
        assert spans.tolist() == [[length, length + 4], [2 * length + 4, 2 * length + 5]]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("options", [{}, {"max_length": 4, "truncation": True}], ids=["all", "cut"])
def test_blanks_in_a_batch_change_no_other_row(tokenizer, options, threads):
    blanks = " " * 20000
    texts = ["word", blanks, blanks + "word", "word" + blanks, "", blanks + "a" + blanks + "!"]
    batch = tokenizer.encode_batch(texts, threads=threads, **options)
    assert [row.tolist() for row in batch] == [
        [CLS, *ids, SEP] for ids in ([WORD], [], [WORD], [WORD], [], [A, MARK])
    ]
    padded = tokenizer.encode_batch(texts, texts[::-1], padding=True, threads=threads)
    assert padded.attention_mask.sum(1).tolist() == [6, 3, 5, 5, 3, 6]


def test_the_mixed_tokenizer_finds_words_after_blanks(tokenizer):
    mixed = MixedTokenizer(tokenizer, tokenizer)
    blanks = "\n" * 20000
    for student_prob in (0, 0.5, 1):
        encoding = mixed.encode(blanks + "word" + blanks + "aa", student_prob=student_prob)
        assert (encoding.ids % len(PIECES)).tolist() == [WORD, A, MORE_A]
        assert encoding.word_starts.tolist() == [0, 1]
        batch = mixed.encode_batch([blanks, blanks + "word"], student_prob=student_prob)
        assert batch.offsets.tolist() == [0, 0, 1]


def test_a_file_of_blanks_has_no_ids(tokenizer, tmp_path):
    path = tmp_path / "text"
    path.write_text(" " * 3_000_000)
    assert tokenizer.encode_file(path).tolist() == []
    path.write_text(" " * 3_000_000 + "word")
    assert tokenizer.encode_file(path, threads=2).tolist() == [WORD]


# ---- everything else, at length ------------------------------------------------------------------

N = 50_000  # more than a buffer of words holds


@pytest.mark.parametrize(
    ("text", "uncased_ids", "cased_ids"),
    [
        pytest.param("!" * N, [MARK] * N, [MARK] * N, id="punctuation"),
        pytest.param("\u4e2d" * N, [IDEOGRAPH] * N, [IDEOGRAPH] * N, id="ideographs"),
        pytest.param("a" * N + " a", [UNK, A], [UNK, A], id="one endless word"),
        pytest.param("A" * N + " a", [UNK, A], [UNK, A], id="one endless word in capitals"),
        pytest.param("a \u0301" * N, [A] * N, [A] + [UNK] * N, id="accents alone"),
        pytest.param("\u0301" * N + "a", [A], [UNK], id="one endless run of accents"),
        pytest.param("a" + "\u0301" * N + " a", [A, A], [UNK, A], id="one letter, many accents"),
        pytest.param("a" + "\U0001d165" * N + "a", [UNK], [UNK], id="marks that stay"),
        pytest.param("\x01" * N + "a", [A], [A], id="controls"),
        pytest.param("a" + "\x00" * N + "a", [A, MORE_A], [A, MORE_A], id="controls in a word"),
        pytest.param("a" + "\u200b" * N + "a", [A, MORE_A], [A, MORE_A], id="deleted characters"),
        pytest.param("a" + "\ud800" * N + "a", [A, MORE_A], [A, MORE_A], id="lone surrogates"),
        pytest.param("[" * N, [BRACKET] * N, [BRACKET] * N, id="what special pieces begin with"),
        pytest.param("[MASK]" * N, [MASK] * N, [MASK] * N, id="special pieces"),
        pytest.param(
            "[MA\u200bSK] " * N, [BRACKET, UNK, UNK] * N, [MASK] * N, id="special, inside"
        ),
        pytest.param(
            "[" + "\u200b" * N + "MASK]", [BRACKET, UNK, UNK], [MASK], id="special, apart"
        ),
    ],
)
def test_a_long_run_of_one_kind(tokenizer, cased, text, uncased_ids, cased_ids):
    for each, ids in ((tokenizer, uncased_ids), (cased, cased_ids)):
        assert each.encode(text, add_special_tokens=False) == ids
        assert each.offsets(text)[0].tolist() == ids
        batch = each.encode_batch([text] * 2, add_special_tokens=False, threads=2)
        assert batch.ids.tolist() == ids * 2
        cut = each.encode_batch([text], add_special_tokens=False, max_length=2, truncation=True)
        assert cut.ids.tolist() == ids[:2]


def test_long_runs_of_marks_are_ordered_as_the_definition_has_it():
    # Classes 220, 230, 216 and 1: runs longer and shorter than what is sorted by insertion.
    for marks in (3, 4, 16, 17, 500):
        text = "a" + ("\u0301\u0323\u0321\u0338\U0001d165" * marks)[:marks] + "b"
        for lowercase in (True, False):
            assert _core.split(text, lowercase) == basic_split(text, lowercase)


# ---- the corpus ----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1000, 10**9])
@pytest.mark.parametrize(
    "run",
    [
        *(blank.encode() for blank in BLANKS),
        b"\x01",
        "\u200b".encode(),
        b"\xff",
        b"\x80",
        b"\xe4\xb8",
    ],
    ids=ascii,
)
def test_a_corpus_finds_the_words_around_a_long_run(run, step):
    builder = _core.CorpusBuilder(
        lowercase=True, heldout_share=0, seed=0, replace=True, threads=2, block_bytes=5000
    )
    text = run * N + b" word " + run * N + b" aa"
    builder.begin_source(0, "train")
    for at in range(0, len(text), step):
        builder.add_text(text[at : at + step])
    builder.flush()
    stream = np.concatenate(builder.take()[0])
    data, ends, counts, final_ids = builder.lexicon(np.zeros(0, np.uint32))
    # Blank lines part two documents, all else leaves one.
    marks = 2 if b"\n" in run else 1
    assert data.tobytes() == b"aaword"
    assert ends.tolist() == [0, 2, 6]
    assert counts.tolist() == [marks, 1, 1]
    assert final_ids[stream].tolist() == ([2, 0, 1, 0] if marks == 2 else [2, 1, 0])
