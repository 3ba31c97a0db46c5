"""Corpus folders: equal to a plain count, whole or not there, checked when opened."""

import collections
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from mvbert import _core, files
from mvbert.errors import InputError, Interrupted
from mvbert.text import corpus_build, readers
from mvbert.text.corpus import Corpus, build_corpus, corpus_report, run_corpus
from mvbert.text.readers import documents, find_texts
from mvbert.text.tokenizer import save_tokenizer_files
from mvbert.text.vocab import SPECIAL_PIECES, Vocab
from mvbert.text.wordpiece import basic_split, wordpiece

AWKWARD = (
    # A line of white space alone is blank.
    "Title One\nThe caf\u00e9's r\u00e9sum\u00e9, \u4e2d\u6587 text.\r\n  \t\r\n"
    "Second\n\n\n\n\u0000\u0001\n\n"  # several blank lines, a document of deleted characters alone
    "Third\x0c page\n \x0b\n still third\n\n"  # a form feed or vertical tab is no white space
    "\ufeffFourth " + "x" * 150 + " " + "\u00e9" * 150 + " end\n \n"
    "Fifth without a newline at the end"
)


def plain_corpus(texts, lowercase=True, field="text", errors="strict"):
    """What a corpus holds, by the plain definitions: documents of words, none of them empty."""
    found = []
    for path in find_texts(texts).files:
        for document in documents(path, field, errors):
            words = [word[:101] for word in basic_split(document, lowercase)]
            if words:
                found.append(words)
    return found


def read_stream(corpus, ids):
    """The documents of a word stream."""
    found, words = [], []
    for i in ids:
        if i == 0:
            found.append(words)
            words = []
        else:
            words.append(corpus.words[i].decode())
    assert not words, "a stream ends with a document mark"
    return found


def check_lexicon(corpus):
    """Order, counts and the files' description of themselves."""
    counts = np.bincount(corpus.train, minlength=len(corpus.words))
    np.testing.assert_array_equal(counts, corpus.counts)
    assert corpus.words[0] == b""
    keys = [(-int(c), w) for c, w in zip(corpus.counts, corpus.words, strict=True)][1:]
    assert keys == sorted(keys)
    assert len(set(corpus.words)) == len(corpus.words)
    manifest = corpus.manifest
    assert manifest["distinct"] == len(corpus.words) - 1
    assert manifest["documents"] == counts[0]
    assert manifest["words"] == counts[1:].sum()
    assert manifest["heldout"]["documents"] == (corpus.heldout == 0).sum()
    assert manifest["heldout"]["words"] == (corpus.heldout != 0).sum()


@pytest.fixture
def awkward(tmp_path):
    path = tmp_path / "awkward.txt"
    path.write_bytes(AWKWARD.encode())
    return path


# ---- equality with the plain definition ------------------------------------------------------


@pytest.mark.parametrize("lowercase", [True, False], ids=["uncased", "cased"])
def test_words_documents_and_counts_are_those_of_the_plain_definition(awkward, tmp_path, lowercase):
    build_corpus([awkward], tmp_path / "c", lowercase=lowercase, heldout_share=0)
    corpus = Corpus.open(tmp_path / "c", verify="sha256")
    expected = plain_corpus([awkward], lowercase)
    assert len(expected) == 5
    assert read_stream(corpus, corpus.train) == expected
    assert len(corpus.heldout) == 0
    check_lexicon(corpus)
    plain = collections.Counter(word for words in expected for word in words)
    assert {w.decode(): int(c) for w, c in zip(corpus.words, corpus.counts, strict=True)} == {
        "": 5,
        **plain,
    }


def test_long_words_are_kept_cut_to_101_characters(awkward, tmp_path):
    build_corpus([awkward], tmp_path / "c", lowercase=False, heldout_share=0)
    words = Corpus.open(tmp_path / "c").words
    assert max(len(word.decode()) for word in words) == 101
    assert ("x" * 101).encode() in words
    assert ("\u00e9" * 101).encode() in words


def test_real_text_is_counted_as_the_plain_definition_counts_it(shared_file, tmp_path):
    page = tmp_path / "page.txt"
    text = shared_file("small-ccby.txt").read_bytes()
    page.write_bytes(text[: text.index(b"\n\n", 400_000)])
    build_corpus([page], tmp_path / "c", heldout_share=0)
    corpus = Corpus.open(tmp_path / "c")
    assert read_stream(corpus, corpus.train) == plain_corpus([page])
    check_lexicon(corpus)


def test_every_kind_of_file_gives_the_same_words(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    texts = ["One two.\n\nStill one.", "Two \u00e9 three", "", "\u0001", "Four"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"t": t}) + "\n" for t in texts))
    pq.write_table(pa.table({"t": texts}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        build_corpus([tmp_path / name], tmp_path / name[2:], field="t", heldout_share=0)
        corpus = Corpus.open(tmp_path / name[2:])
        expected = [basic_split(text) for text in texts]
        assert read_stream(corpus, corpus.train) == [words for words in expected if words]
        assert corpus.manifest["bytes"] == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("step", [1, 5, 1000])
def test_blocks_and_calls_may_end_anywhere(awkward, block_bytes, step):
    data = awkward.read_bytes() * 2
    builder = _core.CorpusBuilder(
        lowercase=True, heldout_share=0.4, seed=3, replace=False, threads=3, block_bytes=block_bytes
    )
    builder.begin_source(0, "draw")
    taken = ([], [])
    for at in range(0, len(data), step):
        builder.add_text(data[at : at + step])
        for part, new in zip(taken, builder.take(), strict=True):
            part += new
    builder.flush()
    for part, new in zip(taken, builder.take(), strict=True):
        part += new
    train, heldout = (np.concatenate(part) for part in taken)
    words, ends, counts, final_ids = builder.lexicon(train[:0])
    corpus = SimpleNamespace(words=_words(words, ends))
    path = awkward.with_name("twice.txt")
    path.write_bytes(data)
    # The draw counts documents without words too: the third and the eighth have none.
    draws = _core.heldout_draws(3, 12)
    numbers = [i for i in range(11) if i not in (2, 7)]
    found = plain_corpus([path])
    assert len(found) == len(numbers)
    held = [draws[i] < round(0.4 * 2**32) for i in numbers]
    assert 0 < sum(held) < len(held)
    for ids, want in ((train, False), (heldout, True)):
        assert read_stream(corpus, final_ids[ids]) == [
            d for d, h in zip(found, held, strict=True) if h == want
        ]
    np.testing.assert_array_equal(counts, np.bincount(final_ids[train], minlength=len(ends)))


def _words(data, ends):
    return [data[b:e].tobytes() for b, e in zip([0, *ends[:-1]], ends, strict=True)]


def test_the_corpus_does_not_depend_on_threads(shared_file, tmp_path):
    text = shared_file("small-pd.txt")
    manifests = [
        build_corpus([text], tmp_path / str(threads), heldout_share=0.3, threads=threads)
        for threads in (1, 2, 64)
    ]
    assert all(manifest == manifests[0] for manifest in manifests)


# ---- held-out text ---------------------------------------------------------------------------


def texts_of(tmp_path, count):
    path = tmp_path / "many.txt"
    path.write_text("\n\n".join(f"document number{i} has words" for i in range(count)))
    return path


def test_held_out_documents_are_a_draw_for_seed_and_number(tmp_path):
    path = texts_of(tmp_path, 2000)
    found = {}
    for seed in (0, 1):
        manifest = build_corpus([path], tmp_path / str(seed), heldout_share=0.1, seed=seed)
        corpus = Corpus.open(tmp_path / str(seed))
        assert manifest["heldout"]["by"] == "draw"
        found[seed] = read_stream(corpus, corpus.heldout)
        train = read_stream(corpus, corpus.train)
        assert sorted(train + found[seed]) == sorted(plain_corpus([path]))
        draws = _core.heldout_draws(seed, 2000)
        assert len(found[seed]) == (draws < round(0.1 * 2**32)).sum()
        assert 150 < len(found[seed]) < 250
        check_lexicon(corpus)
    assert found[0] != found[1]


def test_at_least_one_of_several_documents_is_held_out(tmp_path):
    path = texts_of(tmp_path, 5)
    manifest = build_corpus([path], tmp_path / "c", heldout_share=1e-9)
    corpus = Corpus.open(tmp_path / "c")
    chosen = int(np.argmin(_core.heldout_draws(0, 5)))
    expected = plain_corpus([path])
    assert read_stream(corpus, corpus.heldout) == [expected.pop(chosen)]
    assert read_stream(corpus, corpus.train) == expected
    assert manifest["heldout"] == {
        "documents": 1,
        "words": 4,
        "by": "document",
        "share": 1e-9,
        "seed": 0,
    }
    check_lexicon(corpus)


def test_of_one_document_the_tail_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(f"word{i}" for i in range(100)))
    manifest = build_corpus([tmp_path / "a.txt"], tmp_path / "c", heldout_share=0.095)
    corpus = Corpus.open(tmp_path / "c")
    assert read_stream(corpus, corpus.heldout) == [[f"word{i}" for i in range(90, 100)]]
    assert read_stream(corpus, corpus.train) == [[f"word{i}" for i in range(90)]]
    assert manifest["heldout"]["by"] == "tail"
    check_lexicon(corpus)


def test_one_word_is_not_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("word")
    manifest = build_corpus([tmp_path / "a.txt"], tmp_path / "c", heldout_share=0.5)
    assert (manifest["words"], manifest["heldout"]["words"]) == (1, 0)
    assert manifest["heldout"]["by"] == "none"
    corpus = Corpus.open(tmp_path / "c", verify="sha256")
    assert len(corpus.heldout) == 0


def test_held_out_texts_of_their_own(awkward, tmp_path):
    path = texts_of(tmp_path, 50)
    manifest = build_corpus([awkward], tmp_path / "c", heldout_share=0.5, heldout_texts=[path])
    corpus = Corpus.open(tmp_path / "c")
    assert read_stream(corpus, corpus.train) == plain_corpus([awkward])
    assert read_stream(corpus, corpus.heldout) == plain_corpus([path])
    assert manifest["heldout"]["by"] == "texts"
    assert [source["heldout"] for source in manifest["sources"]] == [False, True]
    only_held_out = corpus.counts[corpus.words[:].index(b"number49")]
    assert only_held_out == 0
    check_lexicon(corpus)


def test_a_text_cannot_be_held_out_and_not(awkward, tmp_path):
    (tmp_path / "sub").mkdir()
    os.link(awkward, tmp_path / "sub" / "hard.txt")
    for held, message in (
        (tmp_path / "sub", r"hard\.txt is given both as text and as held-out text"),
        (tmp_path / "copy.txt", r"copy\.txt is held out, but .*awkward\.txt has the same content"),
    ):
        (tmp_path / "copy.txt").write_bytes(awkward.read_bytes())
        with pytest.raises(InputError, match=message):
            build_corpus([awkward], tmp_path / "c", heldout_texts=[held])
    (tmp_path / "copy.txt").write_bytes(awkward.read_bytes().swapcase())  # of the same size only
    build_corpus([awkward], tmp_path / "c", heldout_texts=[tmp_path / "copy.txt"])


def test_a_share_that_holds_out_everything_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"all 3 documents of .*many\.txt are held out; lower"):
        build_corpus([texts_of(tmp_path, 3)], tmp_path / "c", heldout_share=0.9999999)
    assert os.listdir(tmp_path) == ["many.txt"]


# ---- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": []}, "no text given"),
        ({"texts": ["missing.txt"]}, r"missing\.txt does not exist"),
        ({"heldout_texts": ["missing.txt"]}, r"missing\.txt does not exist"),
        ({"heldout_share": 1.0}, r"heldout_share must lie in \[0, 1\), got 1\.0"),
        ({"heldout_share": float("nan")}, "heldout_share must lie in"),
        ({"heldout_share": -0.1}, "heldout_share must lie in"),
        ({"errors": "ignore"}, "errors must be"),
        ({"threads": -1}, "threads must be 0"),
        ({"seed": -1}, "seed must lie in"),
        ({"seed": 2**64}, "seed must lie in"),
        (
            {"heldout_texts": ["awkward.txt"]},
            r"awkward\.txt is given both as text and as held-out text",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_bad_arguments(awkward, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        build_corpus(**{"texts": [awkward], "out": "c", **options})
    assert os.listdir(tmp_path) == ["awkward.txt"]


def test_ahead_hands_on_items_errors_and_the_end():
    ended = []

    def items(stop):
        try:
            yield from range(stop)
            raise InputError("no more")
        finally:
            ended.append(stop)

    ahead = corpus_build._prefetch(items(3))
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="no more"):
        next(ahead)
    left = corpus_build._prefetch(items(9))
    assert next(left) == 0
    left.close()
    assert list(corpus_build._prefetch(iter([]))) == []
    assert ended == [3, 9]


@pytest.mark.parametrize("data", [b" \n\t\r\n", b"\x00\x01", b"\xef\xbf\xbd"])
def test_a_text_without_a_word_is_refused(tmp_path, data):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.txt: no words found"):
        build_corpus([tmp_path / "a.txt"], tmp_path / "c")
    assert os.listdir(tmp_path) == ["a.txt"]


def test_text_that_is_not_utf8_is_refused_with_file_and_byte(awkward, tmp_path):
    good = b"some words here\n\n" * 100_000
    (tmp_path / "b.txt").write_bytes(good + b"caf\xe9 au lait\n\n" + good + b"\xff")
    with pytest.raises(InputError, match=rf"b\.txt: not UTF-8 at byte {len(good) + 3} of its text"):
        build_corpus([awkward, tmp_path / "b.txt"], tmp_path / "c")
    assert sorted(os.listdir(tmp_path)) == ["awkward.txt", "b.txt"]


def test_utf16_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("some text", encoding="utf-16")
    with pytest.raises(InputError, match=r"a\.txt is UTF-16LE, not UTF-8; convert it"):
        build_corpus([tmp_path / "a.txt"], tmp_path / "c")


def test_text_in_another_encoding_is_to_be_converted_not_patched(tmp_path):
    (tmp_path / "a.txt").write_bytes("un café crème\n\n".encode("latin-1") * 1000)
    with pytest.raises(InputError, match=r"looks like Latin-1; convert it: iconv") as refusal:
        build_corpus([tmp_path / "a.txt"], tmp_path / "c")
    assert "replace" not in str(refusal.value)


def test_replace_goes_on_without_what_is_not_utf8(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9 a\xf0\x9fu la\xc3\xa9it\n\n\xed\xa0\x80two\xff\xfe \xe4\xb8")
    manifest = build_corpus([path], tmp_path / "c", errors="replace", heldout_share=0)
    corpus = Corpus.open(tmp_path / "c")
    found = read_stream(corpus, corpus.train)
    assert found == [["caf", "au", "laeit"], ["two"]]
    assert found == plain_corpus([path], errors="replace")
    assert manifest["not_utf8"] == 6


def test_a_truncated_file_leaves_nothing(tmp_path):
    import gzip

    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"some text " * 1000)[:-20])
    with pytest.raises(InputError, match=r"a\.txt\.gz is truncated"):
        build_corpus([tmp_path / "a.txt.gz"], tmp_path / "c")
    assert os.listdir(tmp_path) == ["a.txt.gz"]


def test_what_was_left_out_is_in_manifest_and_report(tmp_path, verb):
    texts, held = tmp_path / "texts", tmp_path / "held"
    for folder in (texts, held):
        folder.mkdir()
    (texts / "a.txt").write_bytes(b"one word\xff\n\ntwo words")
    (texts / "b.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": null}\n{"text": "c"}\n')
    (texts / "c.txt").symlink_to("a.txt")
    (texts / "copy.txt").write_bytes((texts / "a.txt").read_bytes())
    (texts / "again").symlink_to(".")
    (texts / "empty.txt").write_bytes(b"")
    (texts / "README.md").write_bytes(b"x")
    os.mkfifo(texts / "pipe.txt")
    (held / "d.txt").write_bytes(b"some words")
    (held / "empty.txt").write_bytes(b"")
    report, printed = verb(
        "corpus", texts, "--heldout-text", held, "-o", tmp_path / "c", "--errors", "replace"
    )
    left_out = {"repeated": 2, "empty": 2, "unsupported": 1, "not_regular": 1, "nulls": 1}
    assert report["left_out"] == left_out
    assert (report["not_utf8"], report["copies"]) == (3, 1)
    assert (
        "skipped: repeated files or folders (2), empty files (2), files of unsupported kinds (1), "
        "pipes, sockets and devices (1), records whose text is null (1), invalid UTF-8 "
        "sequences (3)"
    ) in printed
    assert "files that are copies of another one: 1" in printed


def test_a_corpus_from_before_left_out_was_counted_still_opens(built, tmp_path, verb):
    old = copy_of(built, tmp_path / "c")
    manifest = files.read_json_object(old / "manifest.json")
    del manifest["left_out"]
    files.write_json(old / "manifest.json", manifest)
    assert verb("info", old)[0]["left_out"] == {}


@pytest.mark.parametrize("name", [b"caf\xe9.txt", b"two\nlines.txt", b"\x1b[31mred.txt"], ids=repr)
def test_a_file_may_have_any_name(tmp_path, verb, refused, name):
    path = os.path.join(os.fsencode(tmp_path), name)
    with open(path, "wb") as file:
        file.write(b"some words")
    out = tmp_path / os.fsdecode(name).replace(".txt", "")
    # As Python hands them over: bytes that are not UTF-8 as lone surrogates.
    report, _ = verb("corpus", os.fsdecode(path), "-o", out)
    assert report["output"] == str(out)
    manifest = Corpus.open(out, verify="sha256").manifest
    assert os.fsencode(manifest["sources"][0]["name"]) == name
    assert build_corpus([os.fsdecode(path)], out) == manifest
    with open(path, "ab") as file:
        file.write(b"\xff")
    assert "\x1b" not in refused(["corpus", os.fsdecode(path), "-o", tmp_path / "c"], "not UTF-8")


# ---- the folder ------------------------------------------------------------------------------


def test_the_same_corpus_is_kept_and_another_refused(awkward, tmp_path):
    out = tmp_path / "c"
    manifest = build_corpus([awkward], out)
    before = (out / "manifest.json").stat().st_ino
    assert build_corpus([awkward], out) == manifest
    assert (out / "manifest.json").stat().st_ino == before
    with pytest.raises(
        InputError, match=r"c holds another corpus \(different lowercase, heldout\)"
    ):
        build_corpus([awkward], out, lowercase=False, seed=5)
    with awkward.open("r+b") as file:
        file.write(b"S")  # same size
    with pytest.raises(
        InputError, match=r"c holds another corpus \(different texts\); give another"
    ):
        build_corpus([awkward], out)
    assert (out / "manifest.json").stat().st_ino == before
    assert build_corpus([awkward], out, overwrite=True) != manifest
    Corpus.open(out, verify="sha256")
    assert sorted(os.listdir(tmp_path)) == ["awkward.txt", "c"]


def test_a_folder_of_something_else_is_refused(awkward, tmp_path):
    (tmp_path / "c").mkdir()
    build_corpus([awkward], tmp_path / "c")  # empty: fine
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.tex").write_bytes(b"")
    with pytest.raises(InputError, match=r"d exists and is not empty; give another path"):
        build_corpus([awkward], tmp_path / "d")
    (tmp_path / "f").write_bytes(b"")
    with pytest.raises(InputError, match=r"f is not a folder"):
        build_corpus([awkward], tmp_path / "f", overwrite=True)


def test_a_name_as_long_as_the_file_system_takes(awkward, tmp_path, verb, refused):
    for length in (233, 251, 255):
        verb("corpus", awkward, "-o", tmp_path / ("c" * length))
        verb("corpus", awkward, "-o", tmp_path / ("c" * length), "--cased", "--overwrite")
    verb("vocab", tmp_path / ("c" * 255), "--size", 50, "-o", tmp_path / ("v" * 255))
    message = refused(["corpus", awkward, "-o", tmp_path / ("c" * 256)], "File name too long")
    assert "cannot write" in message
    assert sum(name.startswith(".") for name in os.listdir(tmp_path)) == 0
    refused(
        ["vocab", tmp_path / ("c" * 255), "--size", 50, "-o", tmp_path / ("v" * 256)], "too long"
    )
    refused(["info", tmp_path / ("c" * 256)], "File name too long")


def test_names_near_the_limit_do_not_share_a_partial_folder(tmp_path):
    a, b = (files.partial_prefix(tmp_path / ("c" * 250 + end), "corpus") for end in ("aa", "bb"))
    assert a != b
    assert max(map(len, (a, b))) <= 255 - 8


def test_two_builds_of_one_folder_at_once(awkward, tmp_path):
    with (
        corpus_build._partial_folder(tmp_path / "c", False, True),
        pytest.raises(InputError, match=r"another process is building .*c"),
    ):
        build_corpus([awkward], tmp_path / "c")


def copy_of(folder, to):
    shutil.copytree(folder, to)
    return to


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    (folder / "a.txt").write_bytes(AWKWARD.encode() * 20)
    build_corpus([folder / "a.txt"], folder / "c", heldout_share=0.3)
    return folder / "c"


ALL_FILES = ("train.u32", "heldout.u32", "lexicon.bytes", "lexicon.ends", "lexicon.counts")


@pytest.mark.parametrize("name", ALL_FILES)
def test_open_refuses_by_name_what_the_manifest_does_not_describe(built, tmp_path, name):
    escaped = name.replace(".", r"\.")
    bad = copy_of(built, tmp_path / "missing")
    (bad / name).unlink()
    with pytest.raises(InputError, match=rf"{escaped} is missing; build the corpus again"):
        Corpus.open(bad)
    bad = copy_of(built, tmp_path / "short")
    os.truncate(bad / name, (bad / name).stat().st_size - 1)
    with pytest.raises(InputError, match=rf"{escaped} has \d+ bytes, its manifest says \d+"):
        Corpus.open(bad)
    bad = copy_of(built, tmp_path / "changed")
    data = bytearray((bad / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bad / name).write_bytes(data)
    Corpus.open(bad)  # sizes alone do not tell
    with pytest.raises(InputError, match=rf"{escaped} does not match the SHA-256 in its manifest"):
        Corpus.open(bad, verify="sha256")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"format version 2, this program reads version 1"),
        ({"format": "zip"}, r"manifest\.json is not the manifest of a corpus"),
        ({"words": -1}, r"is corrupt: words missing or of the wrong type"),
        ({"words": True}, r"is corrupt: words missing or of the wrong type"),
        ({"words": 7}, r"is corrupt: by its counts train\.u32 has \d+ bytes"),
        ({"distinct": 7}, r"is corrupt: by its counts lexicon\.ends has 64 bytes"),
        ({"lowercase": 1}, r"is corrupt: lowercase missing"),
        ({"heldout": {}}, r"is corrupt: heldout missing"),
        ({"sources": [1]}, r"is corrupt: sources missing"),
        ({"files": {"../../etc/passwd": {}}}, r"is corrupt: files missing"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(map(str, value)),
)
def test_open_refuses_a_manifest_that_says_otherwise(built, tmp_path, change, message):
    bad = copy_of(built, tmp_path / "c")
    manifest = files.read_json_object(bad / "manifest.json")
    files.write_json(bad / "manifest.json", manifest | change)
    with pytest.raises(InputError, match=message):
        Corpus.open(bad)


def test_open_refuses_what_is_no_corpus(tmp_path):
    with pytest.raises(InputError, match=r"is not a corpus: it has no manifest\.json"):
        Corpus.open(tmp_path)
    with pytest.raises(InputError, match="verify must be"):
        Corpus.open(tmp_path, verify="fast")


def test_words_are_a_sequence(built):
    words = Corpus.open(built).words
    listed = list(words)
    assert [words[i] for i in range(len(words))] == listed == words[:]
    assert words[-1] == listed[-1]
    assert words[2:5] == listed[2:5]
    assert words[np.int64(3)] == listed[3]
    with pytest.raises(IndexError, match="word id must lie in"):
        words[len(words)]


def test_a_bar_is_drawn_on_a_terminal(root, awkward, tmp_path):
    terminal, stderr = os.openpty()
    command = [sys.executable, "-m", "mvbert", "corpus", str(awkward), "-o", str(tmp_path / "c")]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={**os.environ, "PYTHONPATH": str(root), "TERM": "xterm"},
    ) as process:
        os.close(stderr)
        shown = b""
        with contextlib.suppress(OSError):  # how a terminal ends
            while data := os.read(terminal, 1 << 16):
                shown += data
        os.close(terminal)
        assert json.loads(process.stdout.read())["documents"] > 0
    assert re.search(rb"corpus \S*\x1b.* bytes", shown)
    assert b"distinct words" in shown


# ---- interruptions ---------------------------------------------------------------------------

VERB = """
import sys
from mvbert import cli
from mvbert.text import corpus_build, readers
corpus_build.CHECKPOINT_BYTES = 3 << 16
readers.CHUNK_BYTES = readers.RECORDS_BYTES = 1 << 13
sys.exit(cli.main())
"""


def make_texts(tmp_path):
    """Documents of two kinds of file, one of them longer than a block."""
    lines = [f"document {i} " + " ".join(f"w{i * j % 977}" for j in range(60)) for i in range(3000)]
    (tmp_path / "a.txt").write_text("\n\n".join(lines[:1500]) + "\n" + "long text " * 120_000)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines[1500:]))
    return [tmp_path / "a.txt", tmp_path / "b.jsonl"]


def test_a_killed_verb_leaves_nothing_at_its_place_and_goes_on(root, tmp_path):
    texts = make_texts(tmp_path)
    build_corpus(texts, tmp_path / "whole", heldout_share=0.2)
    options = ["--out", tmp_path / "c", "--heldout-share", "0.2", "--threads", "2", "--resume"]
    command = [sys.executable, "-c", VERB, "corpus", *map(str, [*texts, *options])]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    checkpoint = tmp_path / ".c.partial-corpus" / "checkpoint.json"
    reached = set()
    for kill in range(60):
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
            # Let it get one checkpoint further, then kill it a little later each time.
            seen = checkpoint.read_bytes() if checkpoint.exists() else b""
            while process.poll() is None and (
                not checkpoint.exists() or checkpoint.read_bytes() == seen
            ):
                time.sleep(0.002)
            time.sleep(0.003 * (kill % 7))
            process.send_signal(signal.SIGKILL)
            process.wait()
        if (tmp_path / "c").exists():  # which it must not before it is whole
            break
        assert process.returncode == -signal.SIGKILL
        state = files.read_json_object(checkpoint)
        reached.add((len(state["sources"]), state["skip"]))
    else:
        pytest.fail("sixty kills, and no end")
    assert {source for source, _ in reached} == {0, 1}, "killed in both files"
    assert len(reached) > 2
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b.jsonl", "c", "whole"]
    for name in (*ALL_FILES, "manifest.json"):
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.fixture
def many_checkpoints(monkeypatch):
    monkeypatch.setattr(corpus_build, "CHECKPOINT_BYTES", 1 << 16)
    monkeypatch.setattr(readers, "CHUNK_BYTES", 1 << 13)
    monkeypatch.setattr(readers, "RECORDS_BYTES", 1 << 13)


@pytest.mark.parametrize("stop", [1, 30, 200, 250])
def test_an_interrupted_build_goes_on_to_the_same_corpus(tmp_path, many_checkpoints, stop):
    texts = make_texts(tmp_path)
    whole = build_corpus(texts, tmp_path / "whole", heldout_share=0.2)
    calls = 0

    def interrupt(done, total):
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_corpus(texts, tmp_path / "c", heldout_share=0.2, progress=interrupt)
    assert not (tmp_path / "c").exists()
    if stop > 1:
        assert (tmp_path / ".c.partial-corpus" / "checkpoint.json").exists()
    assert build_corpus(texts, tmp_path / "c", heldout_share=0.2) == whole
    assert not (tmp_path / ".c.partial-corpus").exists()


def test_another_build_does_not_go_on_from_a_checkpoint(tmp_path, many_checkpoints):
    texts = make_texts(tmp_path)

    def interrupt(done, total):
        if done * 4 > total:
            raise KeyboardInterrupt

    for other in ({"lowercase": False}, {"seed": 1}, {"resume": False}):
        with pytest.raises(KeyboardInterrupt):
            build_corpus(texts, tmp_path / "c", progress=interrupt)
        expected = build_corpus(texts, tmp_path / "expected", overwrite=True, **other)
        assert build_corpus(texts, tmp_path / "c", **other) == expected
        shutil.rmtree(tmp_path / "c")
    with pytest.raises(KeyboardInterrupt):
        build_corpus(texts, tmp_path / "c", progress=interrupt)
    data = texts[0].read_bytes()
    texts[0].write_bytes(b"D" + data[1:])
    os.utime(texts[0], ns=(1, 1))
    expected = build_corpus(texts, tmp_path / "expected", overwrite=True)
    assert build_corpus(texts, tmp_path / "c") == expected


def test_a_file_that_is_bad_in_the_middle_of_a_build_does_not_cost_what_was_read(
    tmp_path, many_checkpoints, monkeypatch
):
    texts = make_texts(tmp_path)
    bad = tmp_path / "z.txt"
    bad.write_bytes(b"some words \xff\n")
    with pytest.raises(InputError, match=r"z\.txt: not UTF-8.* resumes there if those files"):
        build_corpus([*texts, bad], tmp_path / "c")
    assert (tmp_path / ".c.partial-corpus" / "checkpoint.json").exists()
    bad.write_bytes(b"some words again\n")
    whole = build_corpus([*texts, bad], tmp_path / "whole")
    begun = []
    begin = corpus_build.TextFile.__init__
    monkeypatch.setattr(
        corpus_build.TextFile,
        "__init__",
        lambda *a, **k: (begun.append(a[1].name), begin(*a, **k))[0],
    )
    assert build_corpus([*texts, bad], tmp_path / "c") == whole
    assert begun == ["b.jsonl", "z.txt"], "a.txt was read before"
    assert not (tmp_path / ".c.partial-corpus").exists()


def test_run_corpus_turns_ctrl_c_into_interrupted(awkward, tmp_path, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus_build._Build, "finish", interrupted)
    with pytest.raises(Interrupted, match="the same command again to resume"):
        run_corpus([awkward], tmp_path / "c")
    assert os.listdir(tmp_path) == ["awkward.txt"]


FULL_DISK = """
import resource, signal, sys
from mvbert.text import corpus_build
from mvbert.errors import InputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, 1 << 14))  # no file may grow past 16 KiB
try:
    corpus_build.build_corpus([sys.argv[2]], sys.argv[1], overwrite=True)
except InputError as error:
    print(error)
"""


def test_a_file_that_cannot_grow_is_named_and_the_old_corpus_stays(root, built, tmp_path):
    (tmp_path / "a.txt").write_text("some words " * 10_000)
    old = copy_of(built, tmp_path / "c")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(old), str(tmp_path / "a.txt")],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cannot write" in done.stdout
    assert "train.u32" in done.stdout
    assert "unchanged" in done.stdout
    Corpus.open(old, verify="sha256")
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "c"]


# ---- reports ---------------------------------------------------------------------------------


def test_the_verb_reports_on_vocabularies_and_info_on_a_corpus(
    awkward, tmp_path, verb, refused, student_vocab
):
    vocab, other, a = tmp_path / "vocab.txt", tmp_path / "other.txt", tmp_path / "a"
    student_vocab.save(vocab)
    other.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    options = ["--heldout-share", 0, "--no-resume", "--vocab", vocab, other]
    report, printed = verb("corpus", awkward, "--out", a, *options)
    assert report["vocabularies"][str(vocab)]["shared"] == {str(other): 5 / student_vocab.size}
    assert report["vocabularies"][str(other)]["shared"] == {str(vocab): 1.0}
    assert report["vocabularies"][str(other)]["unknown"] == 1.0
    assert f"100.0% of the pieces of {other} are in {vocab}" in printed

    corpus = Corpus.open(a, verify="sha256")
    check_lexicon(corpus)
    report, printed = verb("info", a)
    assert report == corpus_report(corpus, {})
    assert "all files match the manifest" in printed
    refused(["info", a, "--plot", "loss.png"])
    refused(["corpus", awkward, "--vocab", tmp_path / "none", "-o", tmp_path / "x"], "none")
    assert not (tmp_path / "x").exists()


def test_info_names_the_damaged_file(awkward, tmp_path, refused):
    build_corpus([awkward], tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    stream = np.memmap(tmp_path / "b" / "train.u32", np.uint32, "r+")
    stream[3] = 2 if stream[3] == 1 else 1
    stream.flush()
    refused(["info", tmp_path / "b"], "train.u32 does not match the SHA-256 in its manifest")
    (tmp_path / "a" / "lexicon.bytes").unlink()
    refused(["info", tmp_path / "a"], "lexicon.bytes is missing")


# ---- segmentation and report -----------------------------------------------------------------


def test_segmentation_is_wordpiece_of_every_word(built, student_vocab):
    corpus = Corpus.open(built)
    cut = corpus.segment(student_vocab, threads=3)
    assert cut.ends.dtype == np.uint32
    assert cut.ids.dtype == np.int32
    assert cut.ends[0] == 0
    begin = 0
    for word, end in zip(corpus.words, cut.ends, strict=True):
        pieces = [student_vocab.pieces[i] for i in cut.ids[begin:end]]
        assert pieces == (wordpiece(word.decode(), student_vocab.ids) if word else [])
        begin = end
    np.testing.assert_array_equal(np.cumsum(cut.lengths), cut.ends)


def test_segmentation_does_not_depend_on_threads(shared_file, tmp_path):

    vocab = Vocab.load(shared_file("vocab.txt"), lowercase=True)
    build_corpus([shared_file("small-ccby.txt")], tmp_path / "c")
    corpus = Corpus.open(tmp_path / "c")
    one = corpus.segment(vocab, threads=1)
    for threads in (2, 5, 64):
        other = corpus.segment(vocab, threads=threads)
        np.testing.assert_array_equal(one.ends, other.ends)
        np.testing.assert_array_equal(one.ids, other.ids)


def test_a_cased_vocabulary_does_not_fit_an_uncased_corpus(built, student_vocab):
    pieces, corpus = student_vocab.pieces, Corpus.open(built)
    for vocab, message in [
        (Vocab(pieces, False), r"is cased but the corpus .* is uncased; .* with --cased"),
        (Vocab(pieces, strip_accents=False), r"is uncased with accents but .* with --keep-accents"),
    ]:
        with pytest.raises(InputError, match=message):
            corpus.segment(vocab)


def test_accents_stay_in_a_corpus_that_keeps_them(tmp_path, command_line, verb, refused):
    text = tmp_path / "de.txt"
    text.write_text("Ärger über die Öfen, E\u0301COLE\n\nNoch ein Satz für die Übung.\n" * 9)
    out = tmp_path / "corpus"
    verb("corpus", text, "-o", out, "--keep-accents")
    corpus = Corpus.open(out, verify="sha256")
    assert (corpus.lowercase, corpus.strip_accents) == (True, False)
    assert {"ärger", "über", "école"} <= {word.decode() for word in corpus.words}
    verb("corpus", text, "-o", out, "--keep-accents")  # it is there already
    refused(["corpus", text, "-o", out], "different strip_accents")
    pieces = (*SPECIAL_PIECES, "ärger", "über")
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(pieces) + "\n")
    cut = corpus.segment(Vocab.load(vocab, True, False))
    assert {5, 6} <= set(cut.ids.tolist())
    with pytest.raises(InputError, match=r"assumed uncased but the corpus .* uncased with accents"):
        corpus.segment(Vocab.load(vocab))
    verb("corpus", text, "-o", tmp_path / "plain")
    verb("vocab", out, "-o", tmp_path / "learned.txt", "--size", 40)
    assert "ä" in (tmp_path / "learned.txt").read_text()


def test_a_vocabulary_that_was_assumed_uncased_is_called_so(student_vocab, tmp_path):
    student_vocab.save(tmp_path / "vocab.txt")
    (tmp_path / "t.txt").write_text("One word.\n\nTwo Words.\n" * 5)
    build_corpus([tmp_path / "t.txt"], tmp_path / "c", lowercase=False)
    with pytest.raises(InputError, match=r"assumed uncased .* or read the vocabulary with --cased"):
        Corpus.open(tmp_path / "c").segment(Vocab.load(tmp_path / "vocab.txt"))


def test_the_report_counts_pieces_and_unknown_words(built, student_vocab):
    corpus = Corpus.open(built)
    report = corpus_report(corpus, {"tiny": student_vocab})
    words = [w for document in read_stream(corpus, corpus.train) for w in document]
    cuts = [wordpiece(word, student_vocab.ids) for word in words]
    tiny = report["vocabularies"]["tiny"]
    assert tiny["pieces_per_word"] == pytest.approx(sum(map(len, cuts)) / len(words))
    assert tiny["unknown"] == pytest.approx(cuts.count(["[UNK]"]) / len(words))
    whole = sum(len(cut) == 1 and cut != ["[UNK]"] for cut in cuts)
    assert tiny["whole_words"] == pytest.approx(whole / len(words))
    assert 0 < tiny["unknown"] < 1
    assert report["words"] == len(words)
    json.dumps(report, allow_nan=False)


def test_run_corpus_prints_a_table_and_returns_it(awkward, tmp_path, capsys, student_vocab):
    report = run_corpus(
        [awkward], tmp_path / "c", vocabs={"tiny": student_vocab}, heldout_share=0.5
    )
    assert report == corpus_report(Corpus.open(tmp_path / "c"), {"tiny": student_vocab})
    printed = capsys.readouterr()
    assert printed.out == ""
    for text in ("distinct words", "pieces per word", f"{report['words']:,}", "seed 0"):
        assert text in printed.err


def test_a_vocabulary_to_report_on_must_read_text_as_the_corpus_does(
    tmp_path, text, student_vocab, refused
):
    (tmp_path / "text.txt").write_text(text)
    cased = replace(student_vocab, lowercase=False, strip_accents=False)
    (tmp_path / "cased").mkdir()
    save_tokenizer_files(cased, tmp_path / "cased")
    command = ["corpus", tmp_path / "text.txt", "-o", tmp_path / "c", "--vocab", tmp_path / "cased"]
    refused(command, f"the vocabulary {tmp_path / 'cased'} is cased but the corpus is uncased")
    refused([*command[:-1], tmp_path / "cased" / "vocab.txt"], "is cased but the corpus is unc")
    assert not (tmp_path / "c").exists()


def test_a_cased_list_to_report_on_is_warned_of(tmp_path, text, student_vocab, verb):
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "list.txt").write_text("\n".join([*student_vocab.pieces, "The", "Über"]) + "\n")
    command = ["corpus", tmp_path / "text.txt", "--vocab", tmp_path / "list.txt", "-o"]
    _, said = verb(*command, tmp_path / "c")
    assert "list.txt is assumed uncased, as no file in its folder says: 2 of its" in said
    _, said = verb(*command, tmp_path / "cased", "--cased")
    assert "assumed" not in said
