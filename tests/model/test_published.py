"""The students in models/: opened by transformers and by mvbert, and what they say."""

from itertools import combinations

import numpy as np
import pytest
import torch

from mvbert import WordPieceTokenizer
from mvbert.model import huggingface
from mvbert.model.fill import fill_masks
from mvbert.model.masked_lm import MaskedLM
from mvbert.tasks.sentence_model import load_sentence_model, vectors_of
from mvbert.training.device import Device

STUDENT, OF_SENTENCES = "models/en-6x256", "models/en-6x256-embed"
SENTENCES = {  # each with the word that belongs in the place of [MASK]
    "He was born in New [MASK] City.": "york",
    "The president of the United [MASK] gave a speech.": "states",
    "World [MASK] II began in 1939.": "war",
    "The film was directed [MASK] Steven Spielberg.": "by",
}


def published(root, name):
    found = root / name
    if not found.is_dir():
        pytest.skip(f"{name} is in the repository, not in distributions")
    return found


@pytest.fixture(scope="module")
def folder(root):
    return published(root, STUDENT)


@pytest.mark.parametrize("name", [STUDENT, OF_SENTENCES])
def test_the_files_are_small_and_say_what_they_are(root, name):
    folder = published(root, name)
    weights = folder / "model.safetensors"
    assert weights.stat().st_size < 12.6e6
    assert not [*folder.glob("*.bin"), *folder.glob("*.pt")]
    card = (folder / "README.md").read_text(encoding="utf-8")
    for heading in ("## Scores", "## Training", "## Data and licence", "## Limits"):
        assert heading in card


def test_mvbert_fills_in_what_one_expects(folder):
    shape, vocab = huggingface.read_shape(folder)
    model, missing = huggingface.load_masked_lm(folder, MaskedLM(shape))
    assert (shape.num_hidden_layers, shape.hidden_size, vocab.size) == (6, 256, 4928)
    assert not missing
    for sentence, word in SENTENCES.items():
        assert f"[{word}]" in fill_masks(model, vocab, sentence)


def test_transformers_opens_it_and_gives_the_same_scores(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder).float().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    shape, vocab = huggingface.read_shape(folder)
    ours = huggingface.load_masked_lm(folder, MaskedLM(shape))[0].eval()
    for sentence in SENTENCES:
        row = tokenizer(sentence, return_tensors="pt")
        ids = row["input_ids"]
        assert ids[0].tolist() == list(WordPieceTokenizer(vocab).encode(sentence))
        with torch.no_grad():
            logits = ours.logits(ours.masked_hidden(
                ours.encode(ids, torch.zeros_like(ids)), torch.arange(ids.numel())
            ))  # fmt: skip
            torch.testing.assert_close(logits, theirs(**row).logits[0], rtol=1e-4, atol=1e-4)


# Of each three the first two say the same.
ALIKE = [
    ("A man is playing a guitar.", "Someone plays an instrument.", "The stock market fell."),
    ("How do I cook rice?", "What is the way to prepare rice?", "The river froze in winter."),
    ("The president gave a speech.", "The head of state spoke.", "A dog runs in the park."),
]


def test_sentences_that_say_the_same_are_near(root):
    model = load_sentence_model(published(root, OF_SENTENCES))
    cpu = Device(torch.device("cpu"), None, "")
    for texts in ALIKE:
        same, first, second = (
            float(a @ b) for a, b in combinations(vectors_of(model, [*texts], cpu), 2)
        )
        assert same > max(first, second) + 0.2


def test_sentence_transformers_gives_the_same_vectors(root):
    library = pytest.importorskip("sentence_transformers")
    folder = published(root, OF_SENTENCES)
    texts = [text for texts in ALIKE for text in texts]
    theirs = library.SentenceTransformer(str(folder), device="cpu").encode(texts)
    ours = vectors_of(load_sentence_model(folder), texts, Device(torch.device("cpu"), None, ""))
    assert theirs.shape == (len(texts), 384)
    assert np.abs(theirs - ours).max() < 1e-4
