"""Learning vocabularies from Python: arguments, reports, sentencepiece, the verb's function."""

import json
import sys

import numpy as np
import pytest

from mvbert.errors import InputError, MissingExtra
from mvbert.text.corpus import Corpus, build_corpus
from mvbert.text.learner import learn_vocab, print_vocab_report, run_vocab, vocab_report
from mvbert.text.learner_reference import learn_vocab_reference
from mvbert.text.vocab import SPECIAL_PIECES, Vocab
from mvbert.text.wordpiece import wordpiece

TEXT = """The walker walks where walkers walked, and the talker talks while walking.
A singer sings of kings; the king is singing, talking and walking with the singers.

Naïve readers reading the readings read: reader, reads, re-read! 12 kings, 120 singers.
The walked walks were walkable, the talked talks talkable; no talk is a walk.
"""


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    source = tmp_path / "text.txt"
    source.write_text(TEXT * 3, encoding="utf-8")
    build_corpus([source], tmp_path / "corpus", heldout_share=0.2)
    return Corpus.open(tmp_path / "corpus")


def lexicon(corpus: Corpus) -> dict[str, int]:
    """The words of a corpus as str, without the document mark."""
    words = [word.decode() for word in corpus.words]
    return {w: int(n) for w, n in zip(words, corpus.counts, strict=True) if w and n}


# ---- learn_vocab ------------------------------------------------------------------------------


def test_three_ways_to_give_words_are_one(corpus):
    expected = learn_vocab_reference(lexicon(corpus), 60)
    words, ends = list(corpus.words), np.array(corpus.words.ends)
    assert learn_vocab(corpus.words, corpus.counts, 60, coverage=1.0) == expected
    assert learn_vocab(words, corpus.counts.tolist(), 60, coverage=1.0) == expected
    flat = (b"".join(words), ends)
    assert learn_vocab(flat, corpus.counts, 60, coverage=1.0, threads=3) == expected


@pytest.mark.parametrize("learner", ["bpe", "unigram"])
def test_sentencepiece_gives_exact_sizes_that_cut_everything(corpus, learner):
    pytest.importorskip("sentencepiece")
    words = lexicon(corpus)
    for size in (54, 56, 57):
        pieces = learn_vocab(corpus.words, corpus.counts, size, learner=learner, coverage=1.0)
        assert len(pieces) == len(set(pieces)) == size
        assert pieces[:5] == list(SPECIAL_PIECES)
        vocab = {piece: id for id, piece in enumerate(pieces)}
        used = set()
        for word in words:
            cut = wordpiece(word, vocab)
            assert cut != ["[UNK]"], word
            used.update(cut)
        assert {p for p in pieces[5:] if len(p.removeprefix("##")) > 1} <= used
    again = learn_vocab(corpus.words, corpus.counts, 57, learner=learner, coverage=1.0)
    assert again == pieces


def test_bpe_keeps_the_most_frequent_joins_that_are_used():
    pytest.importorskip("sentencepiece")
    # he begins 9 words, an stands in 8. Once man is a piece too, nothing is cut into ##an any more,
    # so the next join takes its place.
    counts = {"he": 5, "hen": 4, "man": 8}
    words, numbers = [word.encode() for word in counts], list(counts.values())
    letters = {"h", "##e", "##n", "m", "##a"}
    for size, joined in ((11, {"he"}), (12, {"he", "##an"}), (13, {"he", "man", "hen"})):
        pieces = learn_vocab(words, numbers, size, learner="bpe", coverage=1.0)
        assert set(pieces[5:]) == letters | joined


def test_a_word_with_sentencepieces_own_mark_is_no_blank():
    pytest.importorskip("sentencepiece")
    words = [b"walk", b"walks", b"talks", "a\u2581b".encode(), "\u2581".encode()]
    pieces = learn_vocab(words, [9, 8, 7, 3, 2], 18, learner="bpe", coverage=1.0)
    vocab = {piece: id for id, piece in enumerate(pieces)}
    assert wordpiece("a\u2581b", vocab) == ["a", "##\u2581", "##b"]
    assert wordpiece("\u2581", vocab) == ["\u2581"]


def test_missing_sentencepiece_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(MissingExtra, match=r"bpe learner needs .* pip install 'mvbert\[vocab\]'"):
        learn_vocab([b"walk", b"walks"], [3, 2], 15, learner="bpe")


@pytest.mark.parametrize("learner", ["topdown", "bpe", "unigram"])
@pytest.mark.parametrize(
    ("words", "counts", "size", "message"),
    [
        ([b"walk"], [3], 8, "size 8 is below the alphabet of 4 characters .* at least 9"),
        ([b"walk"], [3], 900, "size 900 is above the"),
        ([b"walk", b"##ab"], [3, 1], 30, "word 1 begins with '##'"),
        ([b"walk", b"a b"], [3, 1], 30, "word 1 holds white space"),
        ([b"walk", b"\xff"], [3, 1], 30, "word 1 is not UTF-8"),
        ([b"walk\xc3", b"\xa9"], [3, 1], 30, "word [01] is not UTF-8"),
        ([b""], [3], 30, "no word is left"),
    ],
    ids=["alphabet", "too-large", "hashes", "blank", "not-utf8", "halved-character", "no-word"],
)
def test_refuses_words(learner, words, counts, size, message):
    if learner != "topdown":
        pytest.importorskip("sentencepiece")
    with pytest.raises(InputError, match=message):
        learn_vocab(words, counts, size, learner=learner, coverage=1.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learner": "wordpiece"}, "learner must be one of topdown, bpe, unigram, got 'wordpiece'"),
        ({"coverage": 0.0}, r"coverage must be in \(0, 1\], got 0.0"),
        ({"coverage": float("nan")}, r"coverage must be in \(0, 1\], got nan"),
        ({"size": 5}, "size must be above the 5 special tokens, got 5"),
        ({"size": -1}, "size must be above the 5 special tokens, got -1"),
        ({"threads": -1}, "threads must be 0 .*, got -1"),
        ({"counts": [1, 2]}, r"one number per word: 1 words, got \(2,\)"),
        ({"counts": [0.5]}, "counts must be integers, got float64"),
        ({"counts": [-3]}, "counts must be 0 or more, got -3"),
    ],
)
def test_refuses_arguments(changed, message):
    arguments = {"words": [b"walk"], "counts": [3], "size": 9, **changed}
    with pytest.raises(InputError, match=message):
        learn_vocab(**arguments)


# ---- vocab_report -----------------------------------------------------------------------------

STUDENT = [*SPECIAL_PIECES, "walk", "##s", "w", "##a", "##l", "##k", "talk"]
TEACHER = [*SPECIAL_PIECES, "walk", "##s", "walks", "talk"]
LEXICON = {"": 100, "walk": 6, "walks": 3, "walka": 1, "sing": 2, "w" * 101: 1, "unseen": 0}


def test_report_counts_by_hand():
    words = [word.encode() for word in LEXICON]
    report = vocab_report(STUDENT, words, list(LEXICON.values()), TEACHER)
    assert report == {
        "words": 13,
        "distinct": 5,
        "size": 12,
        "alphabet": 5,
        "pieces_per_word": (6 + 3 * 2 + 1 * 2 + 2 + 1) / 13,
        "whole_words": 6 / 13,
        "unknown": 3 / 13,
        # w, ##l, ##k and talk
        "never_used": 4,
        "teacher": {
            "shared": 8,
            "shared_share": 8 / 12,
            "size": 9,
            "alphabet": 1,
            "pieces_per_word": (6 + 3 + 1 + 2 + 1) / 13,
            "whole_words": 9 / 13,
            "unknown": 4 / 13,
            # ##s and talk
            "never_used": 2,
        },
    }


def test_report_without_a_teacher_or_words():
    report = vocab_report(STUDENT, [b""], [3])
    assert report["teacher"] is None
    assert report["words"] == report["pieces_per_word"] == report["unknown"] == 0
    assert report["never_used"] == len(STUDENT) - len(SPECIAL_PIECES)


def test_report_equals_the_plain_definition(corpus):
    pieces = learn_vocab(corpus.words, corpus.counts, 60, coverage=0.97)
    vocab = {piece: id for id, piece in enumerate(pieces)}
    total = cut_total = whole = unknown = 0
    for word, count in lexicon(corpus).items():
        cut = wordpiece(word, vocab)
        total += count
        cut_total += count * len(cut)
        unknown += count * (cut == ["[UNK]"])
        whole += count * (len(cut) == 1 and cut != ["[UNK]"])
    report = vocab_report(pieces, corpus.words, corpus.counts, threads=2)
    assert report["words"] == total
    assert report["pieces_per_word"] == cut_total / total
    assert report["whole_words"] == whole / total
    assert report["unknown"] == unknown / total > 0


def test_report_refuses_what_is_no_vocabulary():
    with pytest.raises(InputError, match=r"no \[UNK\]"):
        vocab_report(["walk"], [b"walk"], [1])
    with pytest.raises(InputError, match="walk"):
        vocab_report(["[UNK]", "walk", "walk"], [b"walk"], [1])
    with pytest.raises(InputError, match="word 1 is not UTF-8"):
        vocab_report(STUDENT, [b"walk", b"\xff"], [1, 1])


def test_table_shows_both_vocabularies(capsys):
    words = [word.encode() for word in LEXICON]
    print_vocab_report(vocab_report(STUDENT, words, list(LEXICON.values()), TEACHER))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "8 of 12 student pieces (66.7%) are in the teacher's" in captured.err
    assert f"{17 / 13:.4f}" in captured.err
    assert f"{3 / 13:.4%}" in captured.err


# ---- run_vocab --------------------------------------------------------------------------------


def test_run_writes_the_vocabulary_and_reports(corpus, tmp_path):
    teacher = tmp_path / "teacher.txt"
    teacher.write_text("".join(f"{piece}\n" for piece in TEACHER))
    out = tmp_path / "student" / "vocab.txt"
    report = run_vocab(corpus.folder, out, 60, teacher=teacher)
    vocab = Vocab.load(out)
    assert list(vocab.pieces) == learn_vocab(corpus.words, corpus.counts, 60)
    assert [vocab.pad, vocab.unk, vocab.cls, vocab.sep, vocab.mask] == [0, 1, 2, 3, 4]
    assert report["output"] == str(out)
    assert report["sha256"] == vocab.sha256
    assert report["size"] == 60
    assert report["teacher"]["size"] == len(TEACHER)
    assert report["words"] == sum(lexicon(corpus).values())
    json.dumps(report, allow_nan=False)


def test_run_replaces_another_vocabulary_only_if_asked(corpus, tmp_path):
    out = tmp_path / "vocab.txt"
    run_vocab(corpus.folder, out, 60)
    first = out.read_bytes()
    stamp = out.stat().st_mtime_ns
    run_vocab(corpus.folder, out, 60)  # the same again is no conflict
    assert out.stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match=r"holds another vocabulary.*--overwrite"):
        run_vocab(corpus.folder, out, 61)
    assert out.read_bytes() == first
    run_vocab(corpus.folder, out, 61, overwrite=True)
    assert Vocab.load(out).size == 61
    with pytest.raises(InputError, match="is a folder"):
        run_vocab(corpus.folder, tmp_path, 60, overwrite=True)


def test_run_refuses_a_cased_teacher_for_an_uncased_corpus(corpus, tmp_path):
    teacher = tmp_path / "cased"
    teacher.mkdir()
    (teacher / "vocab.txt").write_text("".join(f"{piece}\n" for piece in TEACHER))
    (teacher / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    with pytest.raises(InputError, match=r"is cased but the corpus .* is uncased"):
        run_vocab(corpus.folder, tmp_path / "vocab.txt", 60, teacher=teacher)
    assert not (tmp_path / "vocab.txt").exists()


# ---- real text --------------------------------------------------------------------------------


def test_most_pieces_of_english_are_berts(shared_file, tmp_path):
    files = [shared_file(name) for name in ("small-ccby.txt", "small-pd.txt")]
    teacher = shared_file("vocab.txt")
    build_corpus(files, tmp_path / "corpus")
    report = run_vocab(tmp_path / "corpus", tmp_path / "vocab.txt", 4928, teacher=teacher)
    # 92.5 %, 1.2046 and 0.03 % when this was written; 92 % is the aim.
    assert report["teacher"]["shared_share"] >= 0.92
    assert report["pieces_per_word"] < 1.21
    assert report["unknown"] < 0.0004
    assert report["never_used"] == 0
