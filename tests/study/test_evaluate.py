"""`mvbert eval` says of a model what the run that made it and a study say."""

import math
import re
import shutil

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file, save_file

from mvbert.model.huggingface import load_masked_lm, read_shape
from mvbert.study.measures import bits_per_word, choose_words, make_questions
from mvbert.text.corpus import Corpus
from mvbert.training import machine, runs
from mvbert.training.device import Device

ROWS = ("--row.length", 16, "--eval-rows", 8, "--device", "cpu", "--threads", 1)


@pytest.fixture
def run_eval(verb):
    """A function that evaluates a model on a corpus; returns the report."""
    return lambda model, corpus, *more: verb("eval", model, "--corpus", corpus, *ROWS, *more)[0]


def test_it_says_what_the_run_said(training_inputs, tmp_path, run_eval, verb):
    corpus, out = training_inputs / "corpus", tmp_path / "run"
    verb(
        "train", "--stage", 2, "--corpus", corpus, "--stage1", training_inputs / "stage1",
        "-o", out, "--shape", "1x64", "--steps", 3, "--rows", 4, *ROWS, "--dtype", "float32",
    )  # fmt: skip
    report = run_eval(out, corpus, "--words", 20, "--context", 3)
    said = [line["heldout"] for line in runs.read_log(out) if "heldout" in line][-1]
    assert report["loss"] == pytest.approx(said["loss"], rel=1e-5)  # rows of a pass differ
    assert report["accuracy"] == said["accuracy"]
    assert report["rows"] == 8
    assert report["masked"] > 8

    opened = Corpus.open(corpus)
    model, _ = load_masked_lm(out / "model")
    _, vocab = read_shape(out / "model")
    cut, places = opened.segment(vocab), choose_words(opened.heldout, 20)
    words = make_questions(opened.heldout, cut, places, 3, 16)
    cpu = Device(torch.device("cpu"), None, "")
    wanted = bits_per_word(model, vocab.pad, words, cpu)["bits_per_word"]
    report, said = verb(
        "eval", out / "model", "--corpus", corpus, *ROWS, "--words", 20, "--context", 3,
        "--dtype", "float32", "--row.length", 12,
    )  # fmt: skip
    assert "rows of 12 pieces; trained with 16" in said
    report = run_eval(out / "model", corpus, "--words", 20, "--context", 3, "--dtype", "float32")
    assert report["bits_per_word"] == pytest.approx(wanted, rel=1e-5)
    assert report["words_asked"] == words.count


def test_rows_are_no_more_than_the_held_out_text_has(training_inputs, tmp_path, run_eval, verb):
    teacher, corpus = training_inputs / "teacher", training_inputs / "corpus"
    command = ("eval", teacher, "--corpus", corpus, *ROWS, "--words", 0, "--dtype", "float32")
    report, said = verb(*command, "--eval-rows", 10**6)
    count = report["rows"]
    assert 8 < count < 1000
    assert f"eval_rows is 1000000, but the held-out text has {count} rows" in said
    exact, said = verb(*command, "--eval-rows", count)
    assert "the held-out text has" not in said
    assert {**exact, "seconds": 0} == {**report, "seconds": 0}
    run, said = verb(
        "train", "--stage", 2, "--corpus", corpus, "--stage1", training_inputs / "stage1",
        "-o", tmp_path / "run", "--shape", "1x64", "--steps", 1, "--rows", 4, *ROWS,
        "--eval-rows", 10**6, "--dtype", "float32",
    )  # fmt: skip
    count = int(re.search(r"eval_rows is 1000000, but the held-out text has (\d+) rows", said)[1])
    report = run_eval(tmp_path / "run", corpus, "--words", 0, "--eval-rows", 10**6)
    assert report["rows"] == count
    assert report["loss"] == pytest.approx(run["heldout_last"]["loss"], rel=1e-6)


def test_a_teacher_is_asked_in_its_own_pieces(training_inputs, run_eval, teacher_vocab):
    options = ("--words", 0, "--dtype", "float32")
    report = run_eval(training_inputs / "teacher", training_inputs / "corpus", *options)
    assert report["vocab"] == teacher_vocab.size
    assert abs(report["loss"] - math.log(teacher_vocab.size)) < 1  # it never trained
    assert "bits_per_word" not in report


def test_a_model_is_measured_in_the_dtype_of_its_run_others_in_the_faster_one(
    training_inputs, tmp_path, verb, monkeypatch
):
    corpus, run = training_inputs / "corpus", tmp_path / "run"
    verb(
        "train", "--stage", 2, "--corpus", corpus, "--stage1", training_inputs / "stage1",
        "-o", run, "--shape", "1x64", "--steps", 1, "--rows", 4, *ROWS, "--dtype", "float32",
    )  # fmt: skip
    measured = []

    def rates(products, gradients):
        measured.append((products, gradients))
        return {torch.float32: 50e9, torch.bfloat16: 100e9}

    monkeypatch.setattr(machine, "product_rates", rates)
    options = ("--corpus", corpus, *ROWS, "--words", 0)
    _, said = verb("eval", run, *options)
    assert "device cpu, float32 products: as set" in said
    assert measured == []
    _, said = verb("eval", training_inputs / "teacher", *options)
    assert (
        "bfloat16 products, float32 weights: measured float32 50, bfloat16 100 GFLOP/s a core"
        in said
    )
    pieces = 32 * 16
    layer = [(pieces, 32, 96), (pieces, 32, 32), (pieces, 32, 64), (pieces, 64, 32)]
    assert measured == [(layer, False)]


@pytest.fixture
def headless(training_inputs, tmp_path):
    """A sentence encoder: the teacher without its masked-language-model head."""
    folder = shutil.copytree(training_inputs / "teacher", tmp_path / "encoder")
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("cls.")}
    assert 0 < len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_sentence_encoder_has_no_heldout_loss(headless, training_inputs, tmp_path, refused):
    corpus = training_inputs / "corpus"
    refused(["eval", headless, "--corpus", corpus], "no masked-language-model head", "fine-tune")
    out = tmp_path / "out"
    refused(["export", headless, "--head", "logits", "-o", out], "no head for masked language")
