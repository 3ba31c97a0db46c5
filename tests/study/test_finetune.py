"""docs/experiments/finetune.py: what it reads, and what it counts as missed."""

import importlib.util
import io
import tarfile
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from mvbert.text.tokenizer import WordPieceTokenizer
from mvbert.text.vocab import SPECIAL_PIECES, Vocab


@pytest.fixture(scope="module")
def finetune(root):
    """The script as a module."""
    path = root / "docs" / "experiments" / "finetune.py"
    spec = importlib.util.spec_from_file_location("finetune", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def archive(path, **files):
    with tarfile.open(path, "w") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name.replace("__", "/").replace("_", "."))
            data = text.encode()
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_rows_end_at_line_feeds_and_words_at_spaces(finetune, tmp_path):
    files = {
        "snips__test__seq_in": "\ufeffplay\u0085this \u2028 now\r\nfor\u00a0me \r\n\r\n",
        "snips__test__seq_out": "O B-x I-x\r\nB-y\r\n",
        "snips__test__label": "Play\nPlay",
    }
    path = archive(tmp_path / "snips.tar", **files)
    words = [["play\u0085this", "\u2028", "now"], ["for\u00a0me"]]
    assert finetune.examples("slots", path, "test") == [
        (words[0], ["O", "B-x", "I-x"]),
        (words[1], ["B-y"]),
    ]
    assert finetune.examples("intents", path, "test") == [(w, ["Play"]) for w in words]
    files["snips__test__seq_out"] = "O B-x I-x\nB-y O\n"
    with pytest.raises(SystemExit, match=r"test/seq\.out:2: 2 for 1 words"):
        finetune.examples("slots", archive(tmp_path / "bad.tar", **files), "test")
    sst2 = archive(
        tmp_path / "sst2.tar",
        **{"SST-2__dev_tsv": "\ufeffsentence\tlabel\na\u0085b\t1\nc\u2028d\t0\n\n"},
    )
    assert finetune.examples("sst2", sst2, "dev") == [(["a", "b"], ["1"]), (["c", "d"], ["0"])]


def test_words_without_a_piece_in_the_row_are_missed(finetune):
    vocab = Vocab((*SPECIAL_PIECES, "a", "b", "c", "d", "##x"))
    tokenizer = WordPieceTokenizer(vocab).as_hf()
    tokenizer.model_max_length = 7  # five pieces, [CLS] and [SEP]
    sentences = [
        (["a", "b", "c"], ["B-s", "O", "B-s"]),
        (["\u200b", "b", "a"], ["B-s", "O", "B-s"]),  # the first word vanishes
        (["b", "b", "ax", "c", "\u200b", "a"], ["O", "O", "B-s", "O", "O", "B-s"]),  # cut
        (["d", "a"], ["B-never", "B-s"]),  # a slot that training never had
    ]
    names = ["B-s", "O"]
    rows = finetune.encoded("slots", tokenizer, sentences, {"B-s": 0, "O": 1})

    def model(input_ids, attention_mask):
        """Says B-s of each a and c, O of all else: right wherever it is asked but for one c."""
        wanted = (input_ids == vocab.ids["a"]) | (input_ids == vocab.ids["c"])
        return SimpleNamespace(logits=torch.stack([wanted.float(), (~wanted).float()], -1))

    model.eval = lambda: None
    found = finetune.score("slots", model, tokenizer, sentences, rows, names)
    right, said, known = 2 + 1 + 1 + 1, 2 + 1 + 2 + 1, 2 + 2 + 2 + 2
    assert found == pytest.approx(2 * right / (said + known))


def test_an_intent_that_training_never_had_is_not_right(finetune):
    vocab = Vocab((*SPECIAL_PIECES, "a", "b"))
    tokenizer = WordPieceTokenizer(vocab).as_hf()
    sentences = [(["a"], ["Play"]), (["b"], ["Never"])]
    rows = finetune.encoded("intents", tokenizer, sentences, {"Play": 0, "Stop": 1})

    def model(input_ids, attention_mask):
        return SimpleNamespace(logits=torch.tensor([[1.0, 0.0]] * len(input_ids)))

    model.eval = lambda: None
    found = finetune.score("intents", model, tokenizer, sentences, rows, ["Play", "Stop"])
    assert found == 0.5
