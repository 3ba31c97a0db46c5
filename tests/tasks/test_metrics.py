"""Metrics are the libraries', and what a model never read counts as wrong."""

import numpy as np
import pytest

from mvbert.tasks.formats import Examples, find_task
from mvbert.tasks.metrics import joint_metrics, score_of, tag_metrics, text_metrics
from mvbert.tasks.model import Labels
from mvbert.tasks.rows import make_rows
from mvbert.tasks.score import Split, metrics_of
from mvbert.text.vocab import SPECIAL_PIECES, Vocab


def test_classes():
    truth, said = ["a", "a", "b", "c"], ["a", "b", "b", "b"]
    found = text_metrics(find_task("classes"), truth, said)
    f1 = (2 * 1 * 0.5 / 1.5, 2 * (1 / 3) * 1 / (4 / 3), 0.0)
    assert found == {"accuracy": 0.5, "f1_macro": pytest.approx(sum(f1) / 3)}
    said = ["equivalent", "not_equivalent", "equivalent", "equivalent"]
    truth = ["equivalent", "equivalent", "not_equivalent", "equivalent"]
    found = text_metrics(find_task("mrpc"), truth, said)
    assert found == {"accuracy": 0.5, "f1": pytest.approx(2 / 3)}
    assert score_of(find_task("mrpc"), found) == pytest.approx((0.5 + 2 / 3) / 2)
    found = text_metrics(find_task("cola"), ["x", "x", "y", "y"], ["x", "x", "y", "x"])
    assert found["matthews"] == pytest.approx((2 * 1 - 1 * 0) / (3 * 2 * 2 * 1) ** 0.5)


def test_numbers_and_a_constant_answer():
    task = find_task("sts-b")
    found = text_metrics(task, [0.0, 1.0, 5.0], [0.1, 0.2, 0.3])
    assert found["spearman"] == pytest.approx(1.0)
    assert 0.9 < found["pearson"] < 1
    assert text_metrics(task, [0.0, 1.0], [2.0, 2.0]) == {"pearson": 0.0, "spearman": 0.0}


def test_a_span_that_was_cut_off_is_missed():
    truth = [["B-x", "I-x", "O", "B-y"], ["O"]]
    said = [["B-x", "I-x", "O", None], [None]]
    found = tag_metrics(truth, said)
    assert found["precision"] == 1.0
    assert found["recall"] == 0.5
    assert found["accuracy"] == pytest.approx(3 / 5)  # an O that was not read is not right either
    half = tag_metrics([["B-x", "I-x"]], [["B-x", "O"]])
    assert half["f1"] == 0.0, "spans count as a whole"


def test_parts_of_speech_have_no_spans():
    found = tag_metrics([["NOUN", "VERB"]], [["NOUN", "NOUN"]])
    assert found == {"accuracy": 0.5}
    assert score_of(find_task("tags"), found) == 0.5


def test_a_sentence_is_right_if_its_intent_and_all_its_slots_are():
    found = joint_metrics(
        ["A", "A", "B"], ["A", "B", "B"],
        [["B-x"], ["O"], ["O", "B-x"]], [["B-x"], ["O"], ["O", "O"]],
    )  # fmt: skip
    assert found["intent_accuracy"] == pytest.approx(2 / 3)
    assert found["sentence_accuracy"] == pytest.approx(1 / 3)
    assert found["slot_recall"] == 0.5


def test_words_without_a_piece_in_the_row_are_missed():
    vocab = Vocab((*SPECIAL_PIECES, "a", "b", "c", "d", "##x"))
    sentences = [
        (["a", "b", "c"], ["B-s", "O", "B-s"]),
        (["\u200b", "b", "a"], ["B-s", "O", "B-s"]),  # the first word vanishes
        (["b", "b", "ax", "c", "\u200b", "a"], ["O", "O", "B-s", "O", "O", "B-s"]),  # cut
        (["d", "a"], ["B-never", "B-s"]),  # a slot that training never had
    ]
    words, tags = map(list, zip(*sentences, strict=True))
    examples = Examples(words, None, None, tags, [])
    task = find_task("slots")
    rows = make_rows(task, examples, vocab, 7)  # five pieces, [CLS] and [SEP]
    assert (rows.cut, rows.lost) == (1, 1 + 2)
    piece = rows.ids[np.repeat(rows.ends[:-1], np.diff(rows.place_ends)) + rows.places]
    # Says B-s of each a and c, O of all else: right wherever it is asked but for one c.
    wanted = np.isin(piece, [vocab.ids["a"], vocab.ids["c"]])
    scores = np.stack([wanted, ~wanted], 1).astype(np.float32)
    found = metrics_of(task, Labels("tags", ("B-s", "O")), Split(examples, rows), scores)
    right, said, known = 2 + 1 + 1 + 1, 2 + 1 + 2 + 1, 2 + 2 + 2 + 2
    assert found["f1"] == pytest.approx(2 * right / (said + known))


def test_an_intent_that_training_never_had_is_not_right():
    vocab = Vocab((*SPECIAL_PIECES, "a", "b"))
    examples = Examples(["a", "b"], None, ["Play", "Never"], None, [])
    task = find_task("intents")
    split = Split(examples, make_rows(task, examples, vocab, 8))
    scores = np.array([[1.0, 0.0]] * 2, np.float32)
    assert metrics_of(task, Labels("classes", ("Play", "Stop")), split, scores)["accuracy"] == 0.5
