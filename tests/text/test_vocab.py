"""Vocabularies: reading every form, and a clear refusal of whatever is not one."""

import json
import pickle
import re

import pytest

from mvbert.errors import InputError
from mvbert.text.tokenizer import save_tokenizer_files
from mvbert.text.vocab import SPECIAL_PIECES, Vocab

PIECES = (*SPECIAL_PIECES, "a", "##b", "é", "中")


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def vocab_file(tmp_path):
    return write(tmp_path / "vocab.txt", "\n".join(PIECES) + "\n")


def test_reads_what_it_writes(tmp_path, vocab_file):
    vocab = Vocab.load(vocab_file)
    assert vocab.pieces == PIECES
    assert vocab.size == len(vocab) == 9
    assert (vocab.pad, vocab.unk, vocab.cls, vocab.sep, vocab.mask) == (0, 1, 2, 3, 4)
    assert vocab.ids["中"] == 8
    assert vocab.lowercase
    vocab.save(tmp_path / "again.txt")
    assert (tmp_path / "again.txt").read_bytes() == vocab_file.read_bytes()
    assert Vocab.load(tmp_path / "again.txt").sha256 == vocab.sha256
    assert len(vocab.sha256) == 64
    assert pickle.loads(pickle.dumps(vocab)) == vocab


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends(tmp_path, end):
    path = write(tmp_path / "vocab.txt", end.join(PIECES))  # the last line is not ended
    assert Vocab.load(path).pieces == PIECES
    path = write(tmp_path / "vocab.txt", end.join(PIECES) + end)
    assert Vocab.load(path).pieces == PIECES


@pytest.mark.parametrize("lowercase", [True, False])
def test_folder(tmp_path, lowercase):
    vocab = Vocab(PIECES, lowercase=lowercase)
    paths = save_tokenizer_files(vocab, tmp_path / "model")
    assert [path.name for path in paths] == ["vocab.txt", "tokenizer.json", "tokenizer_config.json"]
    folder = tmp_path / "model"
    assert {*folder.iterdir()} == {*paths}
    assert Vocab.load(folder) == vocab
    assert Vocab.load(folder / "vocab.txt") == vocab
    assert Vocab.load(folder / "tokenizer.json") == vocab
    assert Vocab.load(folder, lowercase=not lowercase).lowercase is not lowercase
    (folder / "vocab.txt").unlink()
    assert Vocab.load(folder) == vocab
    (folder / "tokenizer_config.json").unlink()
    assert Vocab.load(folder) == vocab  # tokenizer.json says it too
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"neither vocab\.txt nor tokenizer\.json"):
        Vocab.load(folder)


WRONG_TEXT = [
    ("", "is empty"),
    ("[PAD]\n[UNK]\n[CLS]\na\na\n[SEP]\n", "piece 'a' is there twice, at line 4 and line 5"),
    ("[PAD]\n[CLS]\n[SEP]\na\n", r"has no \[UNK\], \[MASK\]"),
    ("\n".join(PIECES) + "\n\n\n", "piece '' is there twice, at line 10 and line 11"),
    (b"\xef\xbb\xbf" + "\n".join(PIECES).encode(), "byte order mark"),
    ("\n".join(PIECES).encode("latin-1", "replace"), r"not UTF-8 \(byte 0xe9 at offset"),
    ("\n".join(PIECES).encode("utf-16"), "not UTF-8|binary file"),
    (b"\x7fELF\x02\x01\x01\x00", r"binary file \(NUL at byte 7\)"),
    (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "sentencepiece model"),
    ('{"version": "1.0", "model": {}}', "is JSON"),
    ("<unk>\t0\n<s>\t0\n\u2581a\t-1.5\n", r"columns \(tabs\)"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), WRONG_TEXT)
def test_wrong_text(tmp_path, content, message):
    path = write(tmp_path / "vocab.txt", content)
    with pytest.raises(InputError, match=message) as caught:
        Vocab.load(path)
    assert str(path) in str(caught.value)


def edited(change):
    def edit(top):
        change(top)
        return json.dumps(top)

    return edit


WRONG_JSON = [
    (lambda top: "{", "not JSON"),
    (lambda top: "[]", "expected an object"),
    (lambda top: '{"a": 1}', "not a tokenizer.json"),
    (edited(lambda t: t["model"].update(type="BPE")), "is a BPE tokenizer"),
    (
        edited(lambda t: t["model"].update(type="Unigram", vocab=[["a", 0]])),
        "is a Unigram tokenizer",
    ),
    (edited(lambda t: t["model"].update(continuing_subword_prefix="@@")), "subword_prefix is '@@'"),
    (edited(lambda t: t["model"].update(max_input_chars_per_word=200)), "per_word is 200"),
    (edited(lambda t: t["normalizer"].update(type="NFKC")), "normalizer.type is 'NFKC'"),
    (edited(lambda t: t["normalizer"].update(strip_accents=False)), "strip_accents is False"),
    (edited(lambda t: t["model"]["vocab"].update(a=4)), "both have id 4"),
    (edited(lambda t: t["model"]["vocab"].update(a=99)), "'a' has id 99"),
    (edited(lambda t: t["model"]["vocab"].update(a="x")), "'a' has id 'x'"),
    (edited(lambda t: t["model"]["vocab"].update({"x\ny": 9})), "line break"),
    (edited(lambda t: t["added_tokens"].append({"id": 9, "content": "<new>"})), "'<new>'"),
]


@pytest.mark.parametrize(("edit", "message"), WRONG_JSON)
def test_wrong_json(tmp_path, edit, message):
    save_tokenizer_files(Vocab(PIECES), tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(edit(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        Vocab.load(path)
    assert str(path) in str(caught.value)


def test_wrong_places(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        Vocab.load(tmp_path / "nowhere.txt")
    with pytest.raises(InputError, match="does not exist"):
        Vocab.load(tmp_path / "nowhere.json")
    with pytest.raises(InputError, match="cannot write"):
        Vocab(PIECES).save(tmp_path / "no" / "vocab.txt")
    write(tmp_path / "file", "x")
    with pytest.raises(InputError, match="cannot write"):
        save_tokenizer_files(Vocab(PIECES), tmp_path / "file")


def test_wrong_config(tmp_path):
    save_tokenizer_files(Vocab(PIECES), tmp_path)
    for settings, message in [
        ({"do_lower_case": "yes"}, "do_lower_case is 'yes'"),
        ({"do_lower_case": True, "strip_accents": False}, "strip_accents"),
        ({"tokenize_chinese_chars": False}, "tokenize_chinese_chars"),
    ]:
        write(tmp_path / "tokenizer_config.json", json.dumps(settings))
        with pytest.raises(InputError, match=message):
            Vocab.load(tmp_path)


def test_wrong_pieces():
    for pieces, message in [
        ((*PIECES, "a"), "piece 'a' is there twice, at id 5 and id 9"),
        ((*PIECES, "x\ny"), "line break"),
        ((*PIECES, "\ud800"), "lone surrogate"),
        ((*PIECES, b"x"), "expected a string"),
        (PIECES[1:], re.escape("has no [PAD]")),
    ]:
        with pytest.raises(InputError, match=message):
            Vocab(pieces)


@pytest.mark.parametrize(
    ("name", "size"),
    [("vocab.txt", 30522), ("vocab-cased.txt", 28996), ("vocab-multilingual-cased.txt", 119547)],
)
def test_shared_vocabularies(name, size, shared_file, tmp_path):
    path = shared_file(name)
    vocab = Vocab.load(path, lowercase=name == "vocab.txt")
    assert (vocab.size, vocab.pad, vocab.unk, vocab.cls, vocab.sep, vocab.mask) == (
        size, 0, 100, 101, 102, 103,
    )  # fmt: skip
    vocab.save(tmp_path / "vocab.txt")
    assert (tmp_path / "vocab.txt").read_bytes() == path.read_bytes()
