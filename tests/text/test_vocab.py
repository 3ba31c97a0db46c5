"""Vocabularies: reading every form, and a clear refusal of whatever is not one."""

import json
import pickle
import re

import pytest

from mvbert.errors import InputError
from mvbert.text.tokenizer import WordPieceTokenizer, save_tokenizer_files
from mvbert.text.vocab import SPECIAL_PIECES, AddedPiece, Vocab

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
    assert Vocab.load(folder / "tokenizer.json") == vocab
    assert Vocab.load(folder, lowercase=lowercase) == vocab
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"neither vocab\.txt nor tokenizer\.json"):
        Vocab.load(folder)


WRONG_TEXT = [
    ("", "is empty"),
    ("[PAD]\n[UNK]\n[CLS]\na\na\n[SEP]\n", "piece 'a' appears twice, at line 4 and line 5"),
    ("[PAD]\n[CLS]\n[MASK]\na\n", r"has no \[UNK\], \[SEP\]"),
    (b"\xef\xbb\xbf" + "\n".join(PIECES).encode(), "byte order mark"),
    ("\n".join(PIECES).encode("latin-1", "replace"), r"not UTF-8 \(byte 0xe9 at offset"),
    ("\n".join(PIECES).encode("utf-16"), "not UTF-8|binary file"),
    (b"\x7fELF\x02\x01\x01\x00", r"binary file \(NUL at byte 7\)"),
    (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "sentencepiece model"),
    ('{"version": "1.0", "model": {}}', "is JSON"),
    ("<unk>\t0\n<s>\t0\n\u2581a\t-1.5\n", r"columns \(tabs\)"),
]


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
    (
        edited(lambda t: t["normalizer"].update(lowercase=False, strip_accents=True)),
        "lowercase false",
    ),
    (
        edited(lambda t: t["normalizer"].update(handle_chinese_chars=False)),
        "chinese_chars is False",
    ),
    (edited(lambda t: t.update(normalizer=None)), "normalizer.type is None"),
    (edited(lambda t: t.update(pre_tokenizer={"type": "Whitespace"})), "pre_tokenizer.type is 'Wh"),
    (edited(lambda t: t.update(post_processor=None)), "post_processor.type is None; only"),
    (edited(lambda t: t.pop("post_processor")), "post_processor.type is None; only"),
    (
        edited(lambda t: t["post_processor"].update(type="RobertaProcessing")),
        "post_processor.type is 'RobertaProcessing'",
    ),
    (
        edited(lambda t: t["post_processor"]["single"].pop()),
        r"single is '\[CLS\]:0 \$A:0'; only '\[CLS\]:0 \$A:0 \[SEP\]:0'",
    ),
    (
        edited(lambda t: t["post_processor"]["pair"][3]["Sequence"].update(type_id=0)),
        r"pair is '\[CLS\]:0 \$A:0 \[SEP\]:0 \$B:0 \[SEP\]:1'; only",
    ),
    (edited(lambda t: t["post_processor"].update(pair=[1])), r"pair is '\[1\]'; only"),
    (
        edited(lambda t: t["post_processor"]["special_tokens"]["[SEP]"].update(ids=[4])),
        r"special_tokens\.\[SEP\]\.ids is \[4\]; only \[3\]",
    ),
    (
        edited(
            lambda t: t.update(
                post_processor={"type": "BertProcessing", "cls": ["[CLS]", 2], "sep": ["[SEP]", 4]}
            )
        ),
        r"post_processor\.sep is \['\[SEP\]', 4\]; only",
    ),
    (edited(lambda t: t.update(padding={"direction": "Left"})), r"padding\.direction is 'Left'"),
    (
        edited(lambda t: t.update(truncation={"direction": "Left"})),
        r"truncation\.direction is 'Left'",
    ),
    (edited(lambda t: t["model"]["vocab"].update(a=4)), "both have id 4"),
    (edited(lambda t: t["model"]["vocab"].update(a=99)), "'a' has id 99"),
    (edited(lambda t: t["model"]["vocab"].update(a="x")), "'a' has id 'x'"),
    (edited(lambda t: t["model"]["vocab"].update({"x\ny": 9})), "line break"),
    (
        edited(lambda t: t["added_tokens"].append({"id": 10, "content": "<new>"})),
        "id 10, expected 9",
    ),
    (edited(lambda t: t["added_tokens"].append({"content": "<new>"})), "has no id"),
    (edited(lambda t: t["added_tokens"].append({"id": 9, "content": "a b"})), "white space"),
    (
        edited(lambda t: t["added_tokens"].append({"id": 9, "content": "x", "lstrip": True})),
        "'x' has lstrip true",
    ),
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
        (
            {"do_lower_case": False, "strip_accents": True},
            "strip_accents is true and do_lower_case f",
        ),
        ({"tokenize_chinese_chars": False}, "tokenize_chinese_chars is False"),
        ({"do_basic_tokenize": False}, "do_basic_tokenize is False"),
        ({"never_split": ["a"]}, r"never_split is \['a'\]"),
        ({"padding_side": "left"}, "padding_side is 'left'; .* set it to \"right\""),
        ({"truncation_side": "left"}, "truncation_side is 'left'"),
        ({"bos_token": {"content": "<s>", "rstrip": True}}, "bos_token: '<s>' has rstrip true"),
        ({"eos_token": 3}, "eos_token: 3 is not an added token"),
        ({"cls_token": "<s>"}, "cls_token is '<s>'"),
        ({"sep_token": {"content": "</s>"}}, "sep_token is '</s>'"),
        (
            {"tokenizer_class": "BertJapaneseTokenizer"},
            "tokenizer_class is 'BertJapaneseTokenizer'",
        ),
        (
            {"added_tokens_decoder": {"x": {"content": "y"}}},
            r"added_tokens_decoder\.x: expected an id",
        ),
    ]:
        write(tmp_path / "tokenizer_config.json", json.dumps(settings))
        with pytest.raises(InputError, match=message):
            Vocab.load(tmp_path)


def test_wrong_pieces():
    for pieces, message in [
        ((*PIECES, "a"), "piece 'a' appears twice, at id 5 and id 9"),
        ((*PIECES, "x\ny"), "line break"),
        ((*PIECES, "\ud800"), "lone surrogate"),
        ((*PIECES, b"x"), "expected a string"),
        (PIECES[1:], re.escape("has no [PAD]")),
    ]:
        with pytest.raises(InputError, match=message):
            Vocab(pieces)
    with pytest.raises(InputError, match="strip_accents is true"):
        Vocab(PIECES, lowercase=False, strip_accents=True)
    with pytest.raises(InputError, match="added piece '<x>' has no id"):
        Vocab(PIECES, added=(AddedPiece("<x>"),))


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


# ---- as transformers reads a folder ------------------------------------------------------------

LONG = (*PIECES, "h", "##h", "he", "hé", "HE", "##y", "x", "<", ">", "ent", "[", "]", "covid", "19")
TEXT = "Hé hÉ <ent> <ENT> [MASK] covid19 CÓVID x<ent>y a中é [ENT] HE"


def folder_of(path, files: dict):
    """A tokenizer's folder out of names and what they hold."""
    path.mkdir(parents=True, exist_ok=True)
    files = {
        "vocab.txt": "".join(f"{p}\n" for p in LONG),
        "config.json": {"model_type": "bert"},
    } | files
    for name, content in files.items():
        if content is not None:
            write(path / name, content if isinstance(content, str) else json.dumps(content))
    return path


def tokenizer_json(tmp_path, vocab=None, **changes) -> dict:
    save_tokenizer_files(vocab or Vocab(LONG), tmp_path / "made")
    top = json.loads((tmp_path / "made" / "tokenizer.json").read_text())
    top["normalizer"].update(changes)
    return top


def added(content, **flags) -> dict:
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False,
            "normalized": False, "special": True} | flags  # fmt: skip


NEW = len(LONG)
AS_TRANSFORMERS = {
    "a vocab.txt alone": {},
    "cased": {"tokenizer_config.json": {"do_lower_case": False}},
    "accents kept": {"tokenizer_config.json": {"strip_accents": False}},
    "added_tokens.json": {"added_tokens.json": {"<ent>": NEW, "[ENT]": NEW + 1}},
    "added_tokens.json, cased": {
        "added_tokens.json": {"<ent>": NEW, "[ENT]": NEW + 1},
        "tokenizer_config.json": {"do_lower_case": False},
    },
    "added pieces of the vocabulary": {"added_tokens.json": {"ent": 18, "covid": 21}},
    "additional special tokens": {
        "tokenizer_config.json": {"additional_special_tokens": ["<ent>", "covid", "[ENT]"]}
    },
    "extra special tokens by name": {
        "tokenizer_config.json": {"extra_special_tokens": {"ent_token": "<ent>"}}
    },
    "bos and eos": {
        "tokenizer_config.json": {"bos_token": "<ent>", "eos_token": "h", "sep_token": "[SEP]"}
    },
    "bos and eos that are special already": {
        "tokenizer_config.json": {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    },
    "eos of special_tokens_map.json, before additional ones": {
        "tokenizer_config.json": {"additional_special_tokens": ["[ENT]"], "bos_token": None},
        "special_tokens_map.json": {"eos_token": added("<ent>")},
    },
    "a special_tokens_map.json beside added_tokens_decoder": {
        "tokenizer_config.json": {"added_tokens_decoder": {str(NEW): added("<ent>")}},
        "special_tokens_map.json": {"eos_token": "h", "additional_special_tokens": ["[ENT]"]},
    },
    "special_tokens_map.json": {
        "special_tokens_map.json": {"additional_special_tokens": ["<ent>"], "cls_token": "[CLS]"}
    },
    "added_tokens_decoder": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                **{str(i): added(p) for i, p in enumerate(SPECIAL_PIECES)},
                str(NEW): added("<ent>"),
                str(NEW + 1): added("CovID", normalized=True, special=False),
            }
        }
    },
    "blank lines": {"vocab.txt": "".join(f"{p}\n" for p in (*LONG[:9], "", "", *LONG[9:]))},
    "no [MASK]": {"vocab.txt": "".join(f"{p}\n" for p in LONG if p != "[MASK]")},
}


@pytest.mark.parametrize("files", AS_TRANSFORMERS.values(), ids=AS_TRANSFORMERS.keys())
def test_a_folder_is_read_as_transformers_reads_it(tmp_path, files):
    transformers = pytest.importorskip("transformers")
    folder = folder_of(tmp_path / "tokenizer", files)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = WordPieceTokenizer.from_pretrained(folder)
    text = TEXT
    if "[MASK]" not in ours.vocab.ids:  # transformers would give an id past the model's table
        text = text.replace("[MASK]", "")
    for variant in (text, text.upper(), text.lower(), text.replace(" ", "")):
        assert ours.encode(variant) == theirs(variant)["input_ids"], variant
    spans = ours.offsets(TEXT)
    assert spans[0].tolist() == ours.encode(TEXT, add_special_tokens=False)

    # What is written is read the same, by both.
    ours.save_pretrained(tmp_path / "again")
    assert Vocab.load(tmp_path / "again") == ours.vocab
    write(tmp_path / "again" / "config.json", json.dumps({"model_type": "bert"}))
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again(text)["input_ids"] == ours.encode(text)


@pytest.mark.parametrize("kind", ["BertTokenizer", "PreTrainedTokenizerFast"])
def test_both_forms_of_berts_rows_are_read(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    top = tokenizer_json(tmp_path)
    forms = [
        {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        top["post_processor"] | {"special_tokens": {
            **top["post_processor"]["special_tokens"],
            "[MASK]": {"id": "[MASK]", "ids": [4], "tokens": ["[MASK]"]},
        }},
    ]  # fmt: skip
    for i, form in enumerate(forms):
        files = {
            "tokenizer.json": top | {"post_processor": form},
            "tokenizer_config.json": {"tokenizer_class": kind},
        }
        folder = folder_of(tmp_path / str(i), files)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        ours = WordPieceTokenizer.from_pretrained(folder)
        for texts in ((TEXT,), ("x", "he")):
            rows = theirs(*texts, return_token_type_ids=True)
            assert ours(*texts)["input_ids"] == rows["input_ids"]
            assert ours(*texts)["token_type_ids"] == rows["token_type_ids"]


def test_bos_and_eos_are_the_same_in_both_files(tmp_path):
    files = {
        "tokenizer_config.json": {"eos_token": "<ent>"},
        "special_tokens_map.json": {"eos_token": {"content": "</s>"}},
    }
    folder = folder_of(tmp_path, files)
    with pytest.raises(InputError, match=r"map\.json: eos_token is '</s>', but tokenizer_config"):
        Vocab.load(folder)
    write(folder / "special_tokens_map.json", json.dumps({"eos_token": {"content": "<ent>"}}))
    assert [a.piece for a in Vocab.load(folder).added] == ["<ent>"]


def test_a_vocab_txt_whose_folder_pads_on_the_left_is_refused(tmp_path, vocab_file):
    write(tmp_path / "tokenizer_config.json", json.dumps({"padding_side": "left"}))
    with pytest.raises(InputError, match="padding_side is 'left'"):
        WordPieceTokenizer.from_pretrained(vocab_file)


def test_tokens_added_by_transformers_are_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder_of(tmp_path / "bert", {}))
    theirs.add_tokens(["<ent>", "Éa", "covid"])
    theirs.add_special_tokens({"additional_special_tokens": ["[ENT]"]})
    theirs.save_pretrained(tmp_path / "more")
    ours = WordPieceTokenizer.from_pretrained(tmp_path / "more")
    assert len(ours) == len(theirs)
    for text in (TEXT, TEXT.upper(), "ea éA E\u0301a xÉay cov\u200bid Covid19 [ent]"):
        assert ours.encode(text) == theirs(text)["input_ids"], text
    assert ours.decode(ours.encode("x [ENT] <ent>"), skip_special_tokens=True) == "x <ent>"


def test_a_normalised_piece_is_found_before_words_are(tmp_path):
    vocab = Vocab(
        (*LONG, "covid-19", "中h"),
        added=(AddedPiece("covid-19", True), AddedPiece("中h", True)),
        base_size=len(LONG),
    )
    encode = WordPieceTokenizer(vocab).encode
    new = len(LONG)
    for text, ids in [
        ("CÓVID-19", [new]),
        ("xcovid-19y", [vocab.ids["x"], new, vocab.unk]),  # y is no piece but ##y
        ("covi\u00ad\u0301d-19", [new]),
        ("中H", [new + 1]),
        ("中 h", [vocab.ids["中"], vocab.ids["h"]]),
        ("covid -19", [vocab.ids["covid"], vocab.unk, vocab.ids["19"]]),
    ]:
        assert encode(text, add_special_tokens=False) == ids, text


def test_of_two_blank_lines_the_last_counts(tmp_path):
    path = write(tmp_path / "vocab.txt", "\n".join((*PIECES[:7], "", "", *PIECES[7:])) + "\n")
    vocab = Vocab.load(path)
    assert vocab.size == len(PIECES) + 2
    assert (vocab.ids[""], vocab.ids["中"]) == (8, 10)
    vocab.save(tmp_path / "again.txt")
    assert (tmp_path / "again.txt").read_bytes() == path.read_bytes()


def test_files_that_contradict_each_other_are_refused(tmp_path):
    cased = tokenizer_json(tmp_path, lowercase=False)
    accents = tokenizer_json(tmp_path, strip_accents=False)
    other = tokenizer_json(tmp_path)
    ids = other["model"]["vocab"]
    ids["he"], ids["hé"] = ids["hé"], ids["he"]
    short = tokenizer_json(tmp_path)
    del short["model"]["vocab"]["19"]
    for files, message in [
        ({"tokenizer.json": cased}, "lowercase false .* do_lower_case true .*the defaults"),
        ({"tokenizer.json": cased, "vocab.txt": None}, "lowercase false .* do_lower_case true"),
        ({"tokenizer.json": cased, "tokenizer_config.json": {"do_lower_case": True}}, "them agree"),
        (
            {"tokenizer.json": tokenizer_json(tmp_path),
             "tokenizer_config.json": {"do_lower_case": False}},
            "lowercase true .* do_lower_case false",
        ),
        ({"tokenizer.json": accents}, "strip_accents false.* strip_accents true"),
        ({"tokenizer.json": other}, "piece 'he' has id 11 in the one and id 12 in the other"),
        ({"tokenizer.json": short}, "piece '19' has id 22 in the one and no id in the other"),
        ({"added_tokens.json": {"<ent>": NEW + 3}}, f"the id {NEW + 3}, expected {NEW}"),
        ({"added_tokens.json": {"he": NEW}}, f"'he' the id {NEW}, expected 11"),
        (
            {"added_tokens.json": {"<ent>": NEW},
             "tokenizer_config.json": {"added_tokens_decoder": {str(NEW + 1): added("<ent>")}}},
            f"the id {NEW}, but .*added_tokens_decoder.{NEW + 1} gives {NEW + 1}",
        ),
        ({"config.json": {"tokenizer_class": "BertJapaneseTokenizer"}}, "BertJapaneseTokenizer"),
        ({"special_tokens_map.json": {"cls_token": "<s>"}}, "special_tokens_map.json: cls_token"),
        ({"vocab.txt": "version https://git-lfs.github.com/spec/v1\noid"}, "Git LFS pointer"),
    ]:  # fmt: skip
        folder = folder_of(tmp_path / "case", files)
        with pytest.raises(InputError, match=message):
            Vocab.load(folder)
        for file in folder.iterdir():
            file.unlink()
    # With --cased there is nothing to contradict.
    folder = folder_of(tmp_path / "case", {"tokenizer.json": cased})
    assert not Vocab.load(folder, lowercase=False).lowercase


def test_a_tokenizer_json_of_the_general_class_says_itself_what_it_does(tmp_path):
    files = {"tokenizer.json": tokenizer_json(tmp_path, lowercase=False), "vocab.txt": None,
             "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}}  # fmt: skip
    vocab = Vocab.load(folder_of(tmp_path / "case", files))
    assert not vocab.lowercase
    assert not vocab.assumed


def test_sentence_transformers_lower_cases_first(tmp_path):
    files = {"tokenizer_config.json": {"do_lower_case": False},
             "sentence_bert_config.json": {"do_lower_case": True}}  # fmt: skip
    vocab = Vocab.load(folder_of(tmp_path, files))
    assert (vocab.lowercase, vocab.strip_accents, vocab.assumed) == (True, False, False)
    assert not Vocab.load(tmp_path, lowercase=False).lowercase


def test_pieces_that_lower_casing_makes_unreachable_are_counted(tmp_path, shared_file):
    vocab = Vocab.load(folder_of(tmp_path, {}))
    assert vocab.assumed
    assert vocab.unreachable == 3  # é, hé, HE
    assert "assumed uncased" in vocab.doubt
    assert "3 of its 23 pieces have capitals or accents" in vocab.doubt
    assert not Vocab.load(tmp_path, lowercase=False).doubt
    assert Vocab.load(tmp_path, lowercase=True, strip_accents=False).unreachable == 1
    assert not Vocab.load(shared_file("vocab.txt")).doubt
    assert Vocab.load(shared_file("vocab-cased.txt")).unreachable == 8824


def test_the_mask_is_for_those_who_ask_for_it():
    vocab = Vocab(tuple(p for p in PIECES if p != "[MASK]"), source="x/vocab.txt")
    assert vocab.cls == 2
    with pytest.raises(InputError, match=r"x/vocab.txt has no \[MASK\]"):
        vocab.mask  # noqa: B018


@pytest.mark.parametrize("name", ["ConvBertTokenizer", "SqueezeBertTokenizer"])
def test_classes_that_are_berts_are_read_as_it(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    pieces = (*SPECIAL_PIECES, "a", "b", "##b", "##c", ",")
    Vocab(pieces).save(tmp_path / "vocab.txt")
    theirs = getattr(transformers, name).from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"]
    vocab = Vocab.load(tmp_path)
    assert (vocab.pieces, vocab.lowercase) == (pieces, True)
    ours = WordPieceTokenizer.from_pretrained(tmp_path)
    for text in ("A, bb abc", "\u00c1b[MASK]c", ""):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
