"""A toy study through the command line; what its report says; what it refuses."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from mvbert import cli
from mvbert.config import ModelConfig
from mvbert.errors import InputError
from mvbert.model.masked_lm import MaskedLM
from mvbert.study import measures, study_report
from mvbert.study.settings import StudyConfig
from mvbert.text.vocab import Vocab
from mvbert.toml import load_toml
from mvbert.training.device import Device

CPU = Device(torch.device("cpu"), None, "float32")

HEAD = """
out = "study"
teacher = "teacher"
seeds = [0, 1]
baseline = "paper"
"""
ARMS = """
eval_every = 2
log_every = 2
relation_heads = 8
[measure]
words = 40
context = 3
[arms.nokd.stage2]
start = "random"
[arms.paper.stage1]
warm_start = false
[arms.warm]
[arms.all.stage2]
distill = ["logits", "hidden", "relations"]
[arms.smaller.vocab]
size = 75
"""


@pytest.fixture
def settings(job_tables) -> str:
    return HEAD + job_tables + ARMS


@pytest.fixture
def job(tmp_path, training_inputs, settings):
    """A folder with settings, text and a teacher."""
    shutil.copytree(training_inputs, tmp_path, dirs_exist_ok=True)
    (tmp_path / "study.toml").write_text(settings)
    return tmp_path


@pytest.fixture
def study(job, monkeypatch):
    """A function that runs `mvbert study study.toml ARGS` in this process."""
    monkeypatch.chdir(job)
    return lambda *args: cli.parse(["study", "study.toml", *args]).run()


def results(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_study_that_is_stopped_goes_on_to_the_same_results(job, study):
    """Arms and seeds side by side, same rows, and a table and curves drawn from the results."""
    report = study()
    assert report["runs"] == 10
    found = results(job / "study")
    assert report["results"] == len(found) == 10 * 3
    assert [(r["arm"], r["seed"]) for r in found[:6]] == [("nokd", 0)] * 3 + [("paper", 0)] * 3
    assert [r["step"] for r in found[:3]] == [0, 2, 4]
    assert {r["pieces"] for r in found if r["step"] == 4} == {4 * 4 * 16}
    by = {(r["arm"], r["seed"]): r for r in found if r["step"] == 4}
    for seed in (0, 1):
        arms = ("nokd", "paper", "warm", "all")
        assert len({by[arm, seed]["rows"] for arm in arms}) == 1
    assert by["paper", 0]["rows"] not in (by["paper", 1]["rows"], by["smaller", 0]["rows"])
    assert by["paper", 0]["loss"] != by["warm", 0]["loss"]  # another Stage I
    assert by["all", 0]["teacher_mflop"] > 0
    assert by["all", 0]["student_mflop"] == by["nokd", 0]["student_mflop"]
    assert by["smaller", 0]["vocab"] == 75
    assert by["smaller", 0]["pieces_per_word"] > by["paper", 0]["pieces_per_word"]
    assert all(r["bits_per_word"] > 0 and r["words_asked"] <= 40 for r in found)
    made = sorted(p.name.split("-")[0] for p in (job / "study" / "stage1").iterdir())
    assert made == ["75", "90", "90"]  # cold, warm, and that of the smaller vocabulary

    table = (job / "study" / "table.md").read_text()
    assert re.search(
        r"^\| paper \| 2 \| 90 \| [\d.]+ \([\d.]+ to [\d.]+\) \| \+0.000 ", table, re.M
    )
    assert "saw the same rows (checksums agree)" in table
    pytest.importorskip("matplotlib")
    assert (job / "study" / "curves.svg").read_text().count(">nokd<") == 1
    assert (job / "study" / "curves.png").stat().st_size > 1000

    # The same, stopped after the second checkpoint that appears, then killed, then left alone.
    command = [sys.executable, "-m", "mvbert", "study", "study.toml", "-o", "broken"]
    for kill, wait in (
        (signal.SIGTERM, "nokd/0/checkpoints"),
        (signal.SIGKILL, "paper/1/checkpoints"),
    ):
        child = subprocess.Popen(command, cwd=job, stderr=subprocess.DEVNULL)
        while child.poll() is None and not (job / "broken" / "runs" / wait).is_dir():
            try:
                child.wait(0.01)
            except subprocess.TimeoutExpired:
                continue
        child.send_signal(kill)
        assert child.wait(60) != 0
    study("-o", "broken")
    assert results(job / "broken") == found
    assert (job / "broken" / "table.md").read_text() == table


def test_parts_of_a_study_can_be_run_apart(job, study):
    study("--arms", "warm", "nokd", "--seeds", "3", "--scale", "0.5")
    assert [(r["arm"], r["seed"], r["step"]) for r in results(job / "study")] == [
        (arm, 3, step) for arm in ("warm", "nokd") for step in (0, 1, 2)
    ]
    with pytest.raises(InputError, match=r"other settings \(stage1.eval_every"):
        study()
    with pytest.raises(InputError, match="has no arm 'none'; its arms: nokd, paper"):
        study("--arms", "none")


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        (
            "[arms.warm]",
            "[arms.warm.stage2]\nsteps = 5",
            "same pieces, but nokd has 256 and warm has 320",
        ),
        ("[arms.warm]", "[arms.warm.stage2]\neval_every = 1", "same stage2.eval_every"),
        ("[arms.warm]", "[arms.warm.stage3]\nx = 1", "may have tables vocab, row, stage1, stage2"),
        ("[arms.warm]", "[arms.warm.row]\nlenght = 1", "unknown key 'lenght'"),
        ("[arms.warm]", '[arms.warm.stage2]\nshape = "1x128"', "arms.warm: arm student: a 1x128"),
        ("[arms.warm]", '[arms."a b"]', "arm names may have letters"),
        ("[0, 1]", "[0, 0]", "seeds must be different"),
        ('"paper"', '"pepper"', "the baseline 'pepper' is not one of the arms"),
        ("words = 40", "words = -1", "words must not be negative"),
    ],
)
def test_a_study_that_compares_nothing_is_refused(tmp_path, settings, old, new, part):
    (tmp_path / "study.toml").write_text(settings.replace(old, new))
    with pytest.raises(InputError, match=re.escape(part)):
        load_toml(StudyConfig, tmp_path / "study.toml")


def test_the_studies_in_the_docs_are_valid(root):
    found = sorted((root / "docs" / "experiments").glob("*.toml"))
    assert found
    for path in found:
        config = load_toml(StudyConfig, path)
        assert len(config.seeds) >= 2
        assert config.baseline in config.arms


# ---- bits per word --------------------------------------------------------------------------


def test_words_are_chosen_at_even_distances():
    stream = np.array([0, 5, 6, 0, 7, 8, 9, 3, 0], np.uint32)
    assert measures.choose_words(stream, 3).tolist() == [2, 5, 7]
    assert measures.choose_words(stream, 99).tolist() == [1, 2, 4, 5, 6, 7]
    with pytest.raises(InputError, match="no words"):
        measures.choose_words(np.zeros(3, np.uint32), 2)


def test_a_word_is_asked_for_piece_by_piece_in_its_document(corpus, student_vocab):
    cut = corpus.segment(student_vocab)
    stream = np.asarray(corpus.heldout)
    places = measures.choose_words(stream, 1000)
    words = measures.make_questions(stream, cut, places, 2, 64)
    assert words.count == len(places) - words.unknown
    assert words.unknown == words.trimmed == 0
    texts = [corpus.words[int(stream[place])].decode() for place in places]
    for number in (0, 1, 7, len(places) - 1):
        own = [q for q in words.questions if q.word == number]
        pieces = [student_vocab.pieces[q.piece] for q in own]
        assert "".join(p.removeprefix("##") for p in pieces) == texts[number]
        for i, question in enumerate(own):
            row = [student_vocab.pieces[id] for id in question.ids]
            assert row[0] == "[CLS]"
            assert row[-1] == "[SEP]"
            assert row.count("[MASK]") == len(own) - i
            assert row[question.place] == "[MASK]"
            assert row[question.place - i : question.place] == pieces[:i]
            # Two words before and two after, none of another document.
            rest = row[1 : question.place - i] + row[question.place - i + len(own) : -1]
            shown = sum(not piece.startswith("##") for piece in rest)
            near = stream[max(places[number] - 2, 0) : places[number] + 3]
            assert shown <= 4
            if (near != 0).all() and len(near) == 5:
                assert shown == 4
    assert words.pieces == pytest.approx(len(words.questions) / words.count)


def test_a_context_that_does_not_fit_loses_its_farthest_words(corpus, student_vocab):
    stream = np.asarray(corpus.heldout)
    places = measures.choose_words(stream, 20)
    words = measures.make_questions(stream, corpus.segment(student_vocab), places, 30, 16)
    assert words.trimmed > 0
    assert max(len(q.ids) for q in words.questions) <= 16
    # What is too long for any row is left out, not cut.
    places = measures.choose_words(stream, 1000)
    tight = measures.make_questions(stream, corpus.segment(student_vocab), places, 30, 8)
    lengths = corpus.segment(student_vocab).lengths[stream[places]]
    assert tight.unknown == (lengths > 6).sum() > 0


def test_a_word_with_an_unknown_piece_is_left_out(corpus, student_vocab):
    vocab = Vocab(tuple(piece for piece in student_vocab.pieces if piece not in ("e", "##e")))
    stream = np.asarray(corpus.heldout)
    words = measures.make_questions(
        stream, corpus.segment(vocab), measures.choose_words(stream, 50), 2, 64
    )
    assert 0 < words.unknown < 50
    assert words.count + words.unknown == 50


def test_a_model_that_knows_nothing_needs_the_bits_of_every_piece(corpus, student_vocab):
    model = MaskedLM(ModelConfig(student_vocab.size, 16, 1, 1, 32)).double()
    model.init_weights(0)
    with torch.no_grad():
        model.embeddings.word.weight.zero_()  # all logits are alike
    stream = np.asarray(corpus.heldout)
    words = measures.make_questions(
        stream, corpus.segment(student_vocab), measures.choose_words(stream, 30), 3, 64
    )
    found = measures.bits_per_word(model, student_vocab.pad, words, CPU)
    expected = len(words.questions) / words.count * math.log2(student_vocab.size)
    assert found["bits_per_word"] == pytest.approx(expected, rel=1e-12)


def test_what_is_measured_is_the_definition(corpus, student_vocab):
    """Bits, their error over words and words right, question by question without padding."""
    model = MaskedLM(ModelConfig(student_vocab.size, 16, 2, 2, 32)).double()
    model.init_weights(0)
    stream = np.asarray(corpus.heldout)
    cut = corpus.segment(student_vocab)
    words = measures.make_questions(stream, cut, measures.choose_words(stream, 30), 3, 64)
    count = np.bincount([question.word for question in words.questions])
    with torch.no_grad():  # says a word of one piece everywhere
        model.head.bias[next(q.piece for q in words.questions if count[q.word] == 1)] = 2.0
    found = measures.bits_per_word(model, student_vocab.pad, words, CPU)
    bits, right = {}, {}
    for question in words.questions:
        ids = torch.tensor([question.ids])
        with torch.no_grad():
            hidden = model.encode(ids, torch.zeros_like(ids))
            scores = model.logits(model.masked_hidden(hidden, torch.tensor([question.place])))[0]
        own = -float(scores.double().log_softmax(0)[question.piece]) / math.log(2)
        bits[question.word] = bits.get(question.word, 0.0) + own
        first = int(scores.argmax()) == question.piece
        right[question.word] = right.get(question.word, True) and first
    values = np.array(list(bits.values()))
    assert found["bits_per_word"] == pytest.approx(values.mean(), rel=1e-9)
    assert found["bits_error"] == pytest.approx(values.std() / len(values) ** 0.5, rel=1e-9)
    assert found["word_accuracy"] == pytest.approx(np.mean(list(right.values())))
    assert 0 < found["word_accuracy"] < 1


# ---- the report -----------------------------------------------------------------------------


def test_the_table_compares_seed_by_seed():
    def point(arm, seed, bits, rows="a"):
        return {
            "arm": arm, "seed": seed, "step": 9, "pieces": 1_500_000, "vocab": 4928, "rows": rows,
            "bits_per_word": bits, "loss": 4.0, "accuracy": 0.25, "student_mflop": 30.0,
            "teacher_mflop": 21.0 if arm == "kd" else None, "words_asked": 2048,
            "bits_error": 0.2 if arm == "kd" else 0.1,
        }  # fmt: skip

    records = [
        point("base", 0, 9.0),
        point("kd", 0, 8.0),
        point("base", 1, 10.0),
        point("kd", 1, 8.5),
    ]
    table = study_report.table(study_report.last_points(records), "base")
    assert "| kd | 2 | 4,928 | 8.250 (8.000 to 8.500) | -1.250 | 4.000 (4.000 to 4.000) |" in table
    assert "| 30.0 + 21.0 |" in table
    assert "word accuracy" not in table  # not measured
    assert "over 2,048 held-out words, standard error at most 0.200" in table
    assert "checksums agree" in table
    # A baseline that lacks a seed is compared where it has one; other rows are told.
    table = study_report.table(
        study_report.last_points(
            [*records[:2], point("kd", 1, 8.5, rows="b"), point("new", 1, 5.0)]
        ),
        "base",
    )
    assert "| kd | 2 | 4,928 | 8.250 (8.000 to 8.500) | -1.000 |" in table
    assert "| new | 1 | 4,928 | 5.000 | - |" in table
    assert "checksums differ" in table
    assert study_report.table({}, "base") == "No run is complete.\n"


def test_curves_begin_behind_the_first_step(tmp_path):
    """What an untrained student needs would flatten all the rest."""
    pytest.importorskip("matplotlib")
    records = [
        {"arm": "a", "step": step, "pieces": 1e6 * step, "bits_per_word": bits}
        for step, bits in ((0, 7000.0), (1, 12.0), (2, 9.0))
    ]
    study_report.draw_curves(tmp_path, records)
    ticks = re.findall(r">([\d.]+)</text>", (tmp_path / "curves.svg").read_text())
    assert 9 <= max(map(float, ticks)) < 13
