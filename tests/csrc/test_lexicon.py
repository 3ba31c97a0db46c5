"""The lexicon, the builder's blocks and states, and merging, below their Python manners."""

import collections
import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from mvbert import _core


def builder(**options):
    defaults = {"lowercase": True, "heldout_share": 0, "seed": 0, "replace": False, "threads": 2}
    return _core.CorpusBuilder(**{**defaults, **options})


def take(build, streams=None):
    """Adds what is ready to (train, heldout), lists of ids."""
    streams = streams or ([], [])
    for stream, pieces in zip(streams, build.take(), strict=True):
        for ids in pieces:
            stream += ids.tolist()
    return streams


def read(build, text, part="train"):
    build.begin_source(0, part)
    build.add_text(text)
    build.flush()
    return take(build)


def final(build, moved=()):
    """(words, counts, final ids) of a builder's lexicon."""
    data, ends, counts, final_ids = build.lexicon(np.array(moved, np.uint32))
    return words_of(data, ends), counts.tolist(), final_ids


def words_of(data, ends):
    return [data[b:e].tobytes().decode() for b, e in zip([0, *ends[:-1]], ends, strict=True)]


def arrays(counted):
    """A lexicon as arrays: the empty word, then the given (word, count) pairs."""
    words = ["", *(word for word, _ in counted)]
    counts = np.array([1, *(count for _, count in counted)], np.uint64)
    ends = np.cumsum([len(word.encode()) for word in words], dtype=np.uint64)
    return "".join(words).encode(), ends, counts


# ---- the order of ids ------------------------------------------------------------------------


def test_ids_go_by_count_then_by_bytes():
    build = builder()
    read(build, "b a \u00df bb b ab ba aaaaaaaaa aaaaaaaab aaaaaaaa\n\na b".encode())
    words, counts, _ = final(build)
    assert words == ["", "b", "a", "aaaaaaaa", "aaaaaaaaa", "aaaaaaaab", "ab", "ba", "bb", "\u00df"]
    assert counts == [2, 3, 2, 1, 1, 1, 1, 1, 1, 1]


def test_moved_words_leave_the_counts():
    build = builder()
    train, _ = read(build, b"a b b\n\nc b")
    words, counts, final_ids = final(build, moved=train[4:])
    assert words == ["", "b", "a", "c"]
    assert counts == [1, 2, 1, 0]
    assert [words[i] for i in final_ids[train]] == ["a", "b", "b", "", "c", "b", ""]


# ---- every path through the tables -----------------------------------------------------------

LENGTHS = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 99, 100, 101, 102, 5000]


@pytest.mark.parametrize("letter", ["x", "\u00df", "\U00010280"], ids=["1 byte", "2", "4"])
def test_words_of_every_length(letter):
    words = [letter * length for length in LENGTHS] + [letter * 16 + "y", letter * 17 + "y"]
    text = " ".join(words * 3).encode()
    build = builder()
    train, _ = read(build, text)
    found, counts, final_ids = final(build)
    cut = [word[:101] for word in words]
    assert [found[i] for i in final_ids[train]] == [*cut * 3, ""]
    plain = collections.Counter(cut * 3)
    assert dict(zip(found[1:], counts[1:], strict=True)) == plain


def test_more_distinct_words_than_a_worker_keeps():
    # 80,000 words overfill a worker's table; each comes twice, far apart and close together.
    generator = np.random.default_rng(0)
    numbers = np.concatenate([generator.permutation(80_000), np.repeat(np.arange(9), 1000)])
    text = (
        " ".join(f"w{i:x}" for i in numbers).encode()
        + b" "
        + b" ".join(f"w{i:x}".encode() for i in range(80_000))
    )
    for threads in (1, 3):
        build = builder(threads=threads, block_bytes=1 << 16)
        train, _ = read(build, text)
        words, counts, final_ids = final(build)
        plain = collections.Counter(text.decode().split())
        assert len(words) == 80_001
        assert dict(zip(words[1:], counts[1:], strict=True)) == plain
        ids = np.array(train[:-1])
        assert b" ".join(words[i].encode() for i in final_ids[ids]) == text


# ---- states to go on from --------------------------------------------------------------------


def test_a_restored_builder_goes_on_as_if_nothing_had_happened():
    text = "\n\n".join(f"one w{i} two w{i // 3}" for i in range(500)).encode()
    whole = builder(heldout_share=0.3)
    expected = read(whole, text, "draw")
    for stop in (0, 1, 100, 101, 3000, len(text)):
        first = builder(heldout_share=0.3, block_bytes=512)
        first.begin_source(0, "draw")
        first.add_text(text[:stop])
        offset, documents, taken_in = first.pause()
        assert offset <= stop
        assert taken_in == offset
        streams = take(first)
        second = builder(heldout_share=0.3)
        totals = {**first.totals(), "documents": documents, "bytes": taken_in}
        second.restore(first.new_words(1), np.array(streams[0], np.uint32), totals)
        second.begin_source(0, "draw", offset)
        second.add_text(text[offset:])
        second.flush()
        streams = take(second, streams)
        assert second.totals() == whole.totals()
        words, counts, final_ids = final(second)
        expected_words, expected_counts, expected_ids = final(whole)
        assert (words, counts) == (expected_words, expected_counts)
        for ids, wanted in zip(streams, expected, strict=True):
            assert [final_ids[i] for i in ids] == [expected_ids[i] for i in wanted]


def test_there_is_no_pause_in_a_document_longer_than_a_block():
    build = builder(block_bytes=64)
    build.begin_source(0, "train")
    build.add_text(b"short\n\n")
    assert build.pause() == (7, 1, 7)
    build.add_text(b"long words " * 50)
    assert build.pause() is None
    build.add_text(b"\n\n")
    assert build.pause() == (559, 2, 559)
    assert take(build)[0].count(0) == 2


@pytest.mark.parametrize(
    ("words", "train", "message"),
    [
        (b"a\nb", [], "a line break after it"),
        (b"a\n\nb\n", [], "every word must have bytes"),
        (b"a\na\n", [], "a word occurs twice"),
        (b"a\n", [1, 2], "word id 2 of the stream lies outside the lexicon of 2"),
    ],
)
def test_a_state_that_cannot_be_is_refused(words, train, message):
    build = builder()
    with pytest.raises(ValueError, match=message):
        build.restore(words, np.array(train, np.uint32), build.totals())


# ---- threads that cannot be had --------------------------------------------------------------

FEW_THREADS = """
import resource, threading
import numpy as np
from mvbert import _core

with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (9 << 29), -1))  # four stacks of a GiB and a half

stop = threading.Event()
others = [threading.Thread(target=stop.wait) for _ in range(16)]
try:
    for started, other in enumerate(others):
        other.start()
except RuntimeError:
    pass
stop.set()
for other in others[:started]:
    other.join()
assert 0 < started < 15, started

text = b" ".join(b"w%x" % (i * i % 99991) for i in range(200_000))
for threads in (1, 16):
    builder = _core.CorpusBuilder(
        lowercase=True, heldout_share=0, seed=0, replace=False, threads=threads, block_bytes=9999
    )
    builder.begin_source(0, "train")
    builder.add_text(text)
    builder.flush()
    ids = np.concatenate(builder.take()[0])
    data, ends, counts, final_ids = builder.lexicon(ids[:0])
    pieces, *_ = _core.learn_vocab(data, ends, counts, 500, 1.0, threads)
    wordpiece = _core.WordPiece(pieces, 1)
    cut = _core.segment_lexicon(data, ends, wordpiece, threads)
    result = [final_ids[ids], data, ends, counts, *cut, np.array(pieces)]
    if threads == 1:
        expected = result
assert all(np.array_equal(a, b) for a, b in zip(expected, result, strict=True))
print("same")
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_with_fewer_threads_than_asked_for(root):
    """Where no more threads can be had, those that are there do the work."""

    def large_stacks():
        _, most = resource.getrlimit(resource.RLIMIT_STACK)
        resource.setrlimit(resource.RLIMIT_STACK, (1 << 30, most))

    done = subprocess.run(
        [sys.executable, "-c", FEW_THREADS],
        env={**os.environ, "PYTHONPATH": str(root), "OPENBLAS_NUM_THREADS": "1"},
        preexec_fn=large_stacks,
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == ("same\n", 0), done.stderr


# ---- bad calls -------------------------------------------------------------------------------


def test_not_utf8_names_source_and_byte_of_the_first_error():
    build = builder(block_bytes=16, threads=4)
    build.begin_source(0, "train")
    build.add_text(b"good text here\n\n")
    build.begin_source(7, "train")
    build.add_text(b"  \n more good text\n\n" * 20 + b"b\xc3d and \xff")
    build.flush()
    with pytest.raises(_core.NotUtf8) as error:
        build.take()
    assert error.value.args == (7, 401)


def test_bad_arguments():
    with pytest.raises(ValueError, match="threads must be at least 1"):
        builder(threads=0)
    with pytest.raises(ValueError, match=r"heldout_share must lie in \[0, 1\)"):
        builder(heldout_share=1.0)
    build = builder()
    with pytest.raises(ValueError, match="part must be draw, train or heldout, got test"):
        build.begin_source(0, "test")
    with pytest.raises(ValueError, match="the ends of the documents must ascend"):
        build.add_documents(b"abc", np.array([2, 1], np.uint64))
    with pytest.raises(TypeError, match="contiguous bytes"):
        build.add_text(np.zeros((2, 2), np.uint8))


def test_segmenting_refuses_ends_outside_the_bytes():
    wordpiece = _core.WordPiece(["[UNK]", "a"], 0)
    with pytest.raises(ValueError, match="word 1 ends at 9"):
        _core.segment_lexicon(b"aa", np.array([1, 9], np.uint64), wordpiece, 1)
    with pytest.raises(ValueError, match="threads must be at least 1"):
        _core.segment_lexicon(b"aa", np.array([1, 2], np.uint64), wordpiece, 0)
    ends, ids = _core.segment_lexicon(b"", np.zeros(0, np.uint64), wordpiece, 4)
    assert (len(ends), len(ids)) == (0, 0)


def test_held_out_draws_are_philox_of_seed_and_document():
    draws = _core.heldout_draws(0x0123456789ABCDEF, 5)
    held_out = 5  # the purpose in csrc/philox.h
    for document, draw in enumerate(draws):
        counter = (document, held_out, 0, 0)
        assert draw == _core.philox4x32(counter, (0x89ABCDEF, 0x01234567))[0]
