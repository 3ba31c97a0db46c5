"""The hot paths on a CPU under pytest-benchmark, for a look at one change:

    pytest bench/test_speed.py --benchmark-save before    # then change something
    pytest bench/test_speed.py --benchmark-compare

Not collected by the default run (pyproject.toml's testpaths). Comparisons with other libraries are
`bench/run.py`; what must not get slower is held by instruction counts, which a busy machine does
not change.
"""

import numpy as np
import pytest

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")

WORDS = ["the", "river", "runs", "past", "an", "old", "house", "and", "one", "student", "reads"]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
PIECES += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"] + WORDS


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """1,000 texts of 400 words with Zipf's frequencies over made words."""
    generator = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    made = ["".join(generator.choice(letters[:18], n)) for n in generator.integers(2, 9, 5000)]
    words = np.array(WORDS + made)
    drawn = np.minimum(generator.zipf(1.2, (1000, 400)) - 1, len(words) - 1)
    return [" ".join(words[row]) for row in drawn]


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    from mvbert.text.vocab import Vocab

    file = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    file.write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    return Vocab.load(file, lowercase=True)


def test_tokenizer(benchmark, texts, vocab):
    from mvbert.text.tokenizer import WordPieceTokenizer

    tokenizer = WordPieceTokenizer(vocab)
    batch = benchmark(tokenizer.encode_batch, texts, add_special_tokens=False, threads=1)
    assert len(batch) == len(texts)


def test_mixed_tokenizer(benchmark, texts, vocab):
    from mvbert.text.tokenizer import MixedTokenizer

    tokenizer = MixedTokenizer(vocab, vocab)
    batch = benchmark(tokenizer.encode_batch, texts, threads=1)
    assert batch.ids.max() >= vocab.size  # some words are the student's


@pytest.fixture(scope="module")
def rows(texts, vocab, tmp_path_factory):
    from mvbert.text.batches import Rows
    from mvbert.text.corpus import Corpus, build_corpus

    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    build_corpus([folder / "text.txt"], folder / "corpus")
    corpus = Corpus.open(folder / "corpus")
    cut = corpus.segment(vocab)
    return Rows(corpus.train, teacher=cut, student=cut, T=128)


def test_mixer(benchmark, rows):
    batch = benchmark(rows.read, 0, 512, threads=1)
    assert batch.input_ids.shape == (512, 128)


@pytest.mark.parametrize(("V", "H"), [(4928, 256), (30522, 384)])
def test_cross_entropy(benchmark, V, H):
    import torch

    from mvbert.functional import linear_cross_entropy

    torch.manual_seed(0)
    hidden, weight = torch.randn(1024, H), torch.randn(V, H) * H**-0.5
    bias, labels = torch.randn(V), torch.randint(0, V, (1024,))
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]

    def step():
        loss = linear_cross_entropy(hidden, weight, labels, bias)
        return loss, *torch.autograd.grad(loss, inputs)

    loss, *gradients = benchmark(step)
    assert loss.isfinite()
    assert all(g.shape == x.shape for g, x in zip(gradients, inputs, strict=True))
