"""The C++ top-down learner against its plain definition, and its promises one by one."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvbert import _core
from mvbert.text.learner_reference import cuts, learn_vocab_reference
from mvbert.text.vocab import SPECIAL_PIECES

# Every word has its last letter in common with many others, so suffixes matter.
WORDS = {
    "walk": 50, "walks": 30, "walked": 20, "walking": 25, "talk": 40, "talks": 10, "talked": 15,
    "talking": 35, "sing": 12, "singing": 9, "king": 22, "kings": 8, "a": 90, "the": 200,
    ".": 150, ",": 140, "étude": 3, "東": 7, "京": 6, "unwalkable": 1,
}  # fmt: skip


def learn(counts: dict[str, int], size: int, coverage: float = 1.0, threads: int = 1):
    """Calls the extension; returns (pieces, uses, alphabet, threshold)."""
    words = [word.encode() for word in counts]
    ends = np.cumsum([len(word) for word in words], dtype=np.uint64)
    numbers = np.array(list(counts.values()), dtype=np.uint64)
    return _core.learn_vocab(b"".join(words), ends, numbers, size, coverage, threads)


def random_lexicon(seed: int, words: int, letters: str = "abcdeé東😀") -> dict[str, int]:
    """Words of random letters with counts that fall off as in real text, ties included."""
    draw = random.Random(seed)
    lexicon: dict[str, int] = {}
    for rank in range(words):
        word = "".join(draw.choices(letters, k=draw.randint(1, 9)))
        lexicon.setdefault(word, 1 + words // (1 + rank))
    return lexicon


# From the alphabet alone (30) to all that the words give (45).
@pytest.mark.parametrize("size", [30, 31, 33, 36, 39, 44, 45])
def test_equals_the_definition(size: int):
    pieces = learn(WORDS, size)[0]
    assert pieces == learn_vocab_reference(WORDS, size)
    assert len(pieces) == len(set(pieces)) == size


@pytest.mark.parametrize("coverage", [1.0, 0.8, 0.7])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_definition_on_random_words(seed: int, coverage: float):
    lexicon = random_lexicon(seed, 400)
    for size in (21, 25, 40):
        assert learn(lexicon, size, coverage, threads=2)[0] == learn_vocab_reference(
            lexicon, size, coverage=coverage
        )


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(st.sampled_from("abcé東"), min_size=1, max_size=6),
        st.integers(0, 5),
        min_size=1,
        max_size=30,
    ),
    st.integers(5, 60),
    st.sampled_from([1.0, 0.8]),
)
def test_equals_the_definition_or_refuses_with_it(lexicon, size, coverage):
    if not any(lexicon.values()):
        lexicon["a"] = 1
    try:
        expected = learn_vocab_reference(lexicon, size, coverage=coverage)
    except ValueError:
        with pytest.raises(ValueError, match=f"size {size} is (below|above) the|no word is left"):
            learn(lexicon, size, coverage)
    else:
        assert learn(lexicon, size, coverage)[0] == expected


def test_known_vocabulary():
    # Round 0: low 7, lower 3, slow 3, newer 2, and as endings ##ow 10, ##er 5, and so on. With low
    # in the vocabulary no piece starts at ##ow any more; ##er stays, behind low and ##w.
    counts = {"low": 7, "lower": 3, "newer": 2, "slow": 3}
    pieces, uses, alphabet, threshold = learn(counts, 5 + 8 + 2)
    assert alphabet == 8
    assert threshold == 5
    assert pieces == [
        *SPECIAL_PIECES, "low", "##er", "##w", "##l", "##o", "s", "##e", "n", "##r", "l"
    ]  # fmt: skip
    assert uses == [0] * 5 + [10, 5, 5, 3, 3, 3, 2, 2, 0, 0]


@pytest.mark.parametrize("threads", [2, 3, 8, 64])
def test_threads_do_not_change_the_result(threads: int):
    lexicon = random_lexicon(7, 3000)
    assert learn(lexicon, 500, threads=threads) == learn(lexicon, 500, threads=1)


def test_order_of_words_does_not_change_the_result():
    lexicon = random_lexicon(8, 3000)
    turned = dict(sorted(lexicon.items(), key=lambda item: item[0][::-1]))
    assert learn(turned, 500) == learn(lexicon, 500)


def test_every_word_can_be_cut_and_every_piece_is_used():
    lexicon = random_lexicon(9, 3000)
    pieces, uses, alphabet, _ = learn(lexicon, 700)
    known = set(pieces)
    counted = 0
    for word, count in lexicon.items():
        counted += count * len(cuts(word, known))  # raises where the word cannot be cut
    assert sum(uses) == counted
    assert all(uses[len(SPECIAL_PIECES) :])
    assert uses[len(SPECIAL_PIECES) :] == sorted(uses[len(SPECIAL_PIECES) :], reverse=True)
    singles = [piece for piece in pieces[5:] if len(piece.removeprefix("##")) == 1]
    assert len(singles) == alphabet


def test_characters_get_only_the_forms_they_need():
    pieces = learn({"ab": 5, "東": 5, ",": 5}, 9)[0]
    assert set(pieces[5:]) == {"a", "##b", "東", ","}


def test_coverage_leaves_rare_characters_out():
    counts = {"ab": 500, "ba": 499, "x": 1}
    assert "x" in learn(counts, 10, coverage=1.0)[0]
    assert "x" not in learn(counts, 9, coverage=0.999)[0]


def test_words_that_cannot_be_cut_take_no_part():
    # 100 characters is WordPiece's limit; the document mark is the empty word.
    counts = {"": 9, "a" * 101: 10, "b" * 100: 1, "[MASK]": 50, "unseen": 0}
    assert learn(counts, 7)[0] == [*SPECIAL_PIECES, "##b", "b"]


@pytest.mark.parametrize(
    ("counts", "size", "message"),
    [
        (WORDS, 20, r"size 20 is below the alphabet of 19 characters .* at least 30, or lower"),
        (WORDS, 5000, r"size 5000 is above the 45 pieces that these words give"),
        ({}, 10, "no word is left"),
        ({"": 3}, 10, "no word is left"),
        ({"ok": 1, "##ab": 1}, 10, "word 1 begins with '##'"),
        ({"ok": 1, "a b": 1}, 10, "word 1 holds white space"),
        ({"a\nb": 1}, 10, "word 0 holds white space"),
    ],
    ids=["below-alphabet", "too-few-words", "no-word", "only-marks", "hashes", "blank", "newline"],
)
def test_refuses(counts: dict[str, int], size: int, message: str):
    with pytest.raises(ValueError, match=message):
        learn(counts, size)


@pytest.mark.parametrize(
    "word",
    [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xe2\x82", b"\xf4\x90\x80\x80", b"ab\x80"],
    ids=["byte", "overlong", "surrogate", "cut-off", "beyond-unicode", "stray"],
)
def test_refuses_words_that_are_not_utf8(word: bytes):
    both = np.array([2, 2 + len(word)], dtype=np.uint64)
    with pytest.raises(ValueError, match="word 1 is not UTF-8 at its byte"):
        _core.learn_vocab(b"ok" + word, both, np.ones(2, dtype=np.uint64), 10, 1.0, 1)


def test_refuses_arguments_out_of_range():
    one = np.ones(1, dtype=np.uint64)
    for coverage in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="coverage must be in"):
            _core.learn_vocab(b"a", one, one, 6, coverage, 1)
    for threads in (0, -1):
        with pytest.raises(ValueError, match=f"threads must be at least 1, got {threads}"):
            _core.learn_vocab(b"a", one, one, 6, 1.0, threads)
    with pytest.raises(ValueError, match="word 0 ends at byte 9, outside"):
        _core.learn_vocab(b"a", one * 9, one, 6, 1.0, 1)
    with pytest.raises(ValueError, match="equally long, got 1 ends and 2 counts"):
        _core.learn_vocab(b"a", one, np.ones(2, dtype=np.uint64), 6, 1.0, 1)
