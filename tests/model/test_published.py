"""The students in models/: opened by transformers and by mvbert, and what they say."""

import pytest
import torch

from mvbert import WordPieceTokenizer
from mvbert.model import huggingface
from mvbert.model.fill import fill_masks
from mvbert.model.masked_lm import MaskedLM

STUDENT = "models/en-6x256"
SENTENCES = {  # each with the word that belongs in the place of [MASK]
    "He was born in New [MASK] City.": "york",
    "The president of the United [MASK] gave a speech.": "states",
    "World [MASK] II began in 1939.": "war",
    "The film was directed [MASK] Steven Spielberg.": "by",
}


@pytest.fixture(scope="module")
def folder(root):
    found = root / STUDENT
    if not found.is_dir():
        pytest.skip(f"{STUDENT} is in the repository, not in distributions")
    return found


def test_the_files_are_small_and_say_what_they_are(folder):
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
