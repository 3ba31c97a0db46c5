"""Corpus folders: equal to a plain count, whole or not there, checked when opened."""

import collections
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from mvbert import corpus as corpus_module
from mvbert import files
from mvbert.corpus import Corpus, build_corpus
from mvbert.errors import InputError
from mvbert.readers import documents, text_files
from mvbert.wordpiece import basic_split, wordpiece

AWKWARD = (
    "Title One\nThe caf\u00e9's r\u00e9sum\u00e9, \u4e2d\u6587 text.\r\n  \t\r\n"  # blank: white space only
    "Second\n\n\n\n\u0000\u0001\n\n"  # several blank lines, a document of deleted characters alone
    "Third\x0c page\n \x0b\n still third\n\n"  # a form feed or vertical tab is no white space
    "\ufeffFourth " + "x" * 150 + " " + "\u00e9" * 150 + " end\n \n"
    "Fifth without a newline at the end"
)


def plain_corpus(texts, lowercase=True, field="text", errors="strict"):
    """What a corpus holds, by the plain definitions: documents of words, none of them empty."""
    found = []
    for path in text_files(texts):
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
