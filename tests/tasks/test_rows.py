"""Rows are those of transformers' tokenizer; batches take every row once, of one length."""

import numpy as np
import pytest
import torch

from mvbert.tasks.formats import Examples, find_task
from mvbert.tasks.rows import CLASS, batches_by_length, batches_of_epoch, make_rows, read_batch
from mvbert.text.tokenizer import WordPieceTokenizer


def examples(texts, pairs=None):
    return Examples(texts, pairs, None, None, [])


def test_rows_of_texts_and_pairs(teacher_vocab):
    pytest.importorskip("transformers")
    tokenizer = WordPieceTokenizer(teacher_vocab).as_hf()
    texts = ["the river", "", "a very long text about the world and its models"]
    pairs = ["water", "small house", "old"]
    for seconds in (None, pairs):
        rows = make_rows(find_task("classes"), examples(texts, seconds), teacher_vocab, 12)
        wanted = tokenizer(texts, seconds, truncation=True, max_length=12)
        for i in range(3):
            part = slice(rows.ends[i], rows.ends[i + 1])
            assert rows.ids[part].tolist() == wanted["input_ids"][i]
            assert rows.types[part].tolist() == wanted["token_type_ids"][i]
        assert rows.cut == 1 if seconds is None else rows.cut >= 1
        assert rows.words.tolist() == [CLASS] * 3
    assert "1 rows were cut to 12 pieces" in make_rows(
        find_task("classes"), examples(texts), teacher_vocab, 12
    ).note(12)


def test_rows_of_words(teacher_vocab):
    pytest.importorskip("transformers")
    tokenizer = WordPieceTokenizer(teacher_vocab).as_hf()
    sentences = [["the", "rivers", "xyz"], ["house"]]
    rows = make_rows(find_task("joint"), examples(sentences), teacher_vocab, 32)
    wanted = tokenizer(sentences, is_split_into_words=True)
    for i, words in enumerate(sentences):
        ids = rows.ids[rows.ends[i] : rows.ends[i + 1]]
        assert ids.tolist() == wanted["input_ids"][i]
        places = rows.places[rows.place_ends[i] : rows.place_ends[i + 1]].tolist()
        first = [wanted.word_ids(i).index(w) for w in range(len(words))]
        assert places == [0, *first]
    assert rows.words.tolist() == [CLASS, 0, 1, 2, CLASS, 0]


@pytest.mark.parametrize("count", [0, 1, 5, 1000])
def test_batches_take_every_row_once(count):
    lengths = np.random.default_rng(0).integers(3, 12, count)
    first = batches_of_epoch(lengths, 8, seed=1, epoch=0)
    assert sorted(i for b in first for i in b) == list(range(count))
    assert len(first) == -(-count // 8)
    again = batches_of_epoch(lengths, 8, seed=1, epoch=0)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    if count == 1000:
        mixed = [b for b in first if len({*lengths[b]}) > 1]
        assert len(mixed) <= 9, "of nine lengths at most 7 rows each are left over"
        other = batches_of_epoch(lengths, 8, seed=1, epoch=1)
        assert any((a != b).any() for a, b in zip(first, other, strict=True) if len(a) == len(b))
    by_length = batches_by_length(lengths, 8)
    assert sorted(i for b in by_length for i in b) == list(range(count))
    flat = [lengths[i] for b in by_length for i in b]
    assert flat == sorted(flat)


def test_a_batch_of_one_length_has_no_mask_and_another_is_padded(teacher_vocab):
    rows = make_rows(find_task("classes"), examples(["a", "the", "a a a"]), teacher_vocab, 32)
    cpu = torch.device("cpu")
    batch = read_batch(rows, np.array([1, 0]), 0, cpu)
    assert batch.mask is None
    assert batch.input_ids[0].tolist() == rows.ids[rows.ends[1] : rows.ends[2]].tolist()
    batch = read_batch(rows, np.array([2, 0]), 7, cpu)
    assert batch.mask.tolist() == [[True] * 5, [True, True, True, False, False]]
    assert batch.input_ids[1, 3:].tolist() == [7, 7]
    assert batch.index.tolist() == [0, 5]
    assert batch.numbers.tolist() == [2, 0]
