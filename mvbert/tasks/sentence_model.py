"""A BERT of sentence vectors: read from a sentence-transformers folder, written as one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mvbert import __version__
from mvbert.errors import InputError
from mvbert.files import atomic_write, read_json_object, write_json
from mvbert.model import huggingface
from mvbert.model.masked_lm import MaskedLM
from mvbert.model.pooling import Pooling, Step, read_pooling, write_pooling
from mvbert.model.weights import WEIGHTS, read_weights
from mvbert.progress import Progress
from mvbert.tasks.formats import Examples, find_task
from mvbert.tasks.rows import TaskBatch, batches_by_length, make_rows, read_batch
from mvbert.text.tokenizer import save_tokenizer_files
from mvbert.text.vocab import Vocab
from mvbert.training.device import Device
from mvbert.training.distillation import state_map

PIECES = 4096  # about, of a forward pass


@dataclass(frozen=True)
class SentenceModel:
    """A finished model of sentence vectors.

    Attributes:
        length: most pieces of a row; a longer text is cut.
    """

    bert: MaskedLM
    vocab: Vocab
    pooling: Pooling
    length: int

    @property
    def width(self) -> int:
        return self.pooling.width(self.bert.config.hidden_size)


def load_sentence_model(folder: Path, progress: Progress | None = None) -> SentenceModel:
    """Reads a folder with modules.json, or any BERT, whose vectors are then means.

    Args:
        progress: notes tensors that are not used.

    Raises:
        InputError: it has no such model, or a module that is not supported.
    """
    shape, vocab = huggingface.read_shape(folder)
    weights = read_weights(folder)
    bert, _ = huggingface.load_masked_lm(folder, MaskedLM(shape), weights=weights)
    if progress is not None:
        progress.note(weights.unread())
    length = shape.max_position_embeddings
    path = folder / "sentence_bert_config.json"
    if path.exists():
        named = read_json_object(path).get("max_seq_length")
        if isinstance(named, int) and named > 2:
            length = min(length, named)
    return SentenceModel(bert.eval(), vocab, read_pooling(folder, shape.hidden_size), length)


@torch.no_grad()
def vectors_of(model: SentenceModel, texts: list[str], device: Device) -> NDArray[np.float32]:
    """Unit vectors of texts, [texts, width].

    Raises:
        InputError: they are not finite.
    """
    rows = make_rows(
        find_task("classes"), Examples(texts, None, None, None, []), model.vocab, model.length
    )
    vectors = np.zeros((len(texts), model.width), np.float32)
    bert = model.bert.to(device.device)
    longest = max(int(rows.lengths.max(initial=1)), 1)
    for numbers in batches_by_length(rows.lengths, max(1, PIECES // longest)):
        batch = read_batch(rows, numbers, model.vocab.pad, device.device)
        with device.cast():
            hidden = bert.encode(batch.input_ids, batch.token_type_ids, batch.mask).float()
        pooled = model.pooling(hidden, _counted(batch, hidden))
        vectors[numbers] = F.normalize(pooled.float(), dim=-1).cpu().numpy()
    if not np.isfinite(vectors).all():
        raise InputError("sentence vectors are not finite (NaN): the model's weights are corrupt")
    return vectors


def _counted(batch: TaskBatch, hidden: Tensor) -> Tensor:
    """The pieces that a pooling counts, [B, T]: those that are no padding."""
    return hidden.new_ones(hidden.shape[:2]) if batch.mask is None else batch.mask


class SentenceStudent(nn.Module):
    """A BERT in training, with linear maps to the teacher's width: from its mean hidden state, and,
    for training alone, from its pooler's output."""

    def __init__(self, bert: MaskedLM, width: int, seed: int) -> None:
        super().__init__()
        self.bert = bert
        bert.head.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        self.map = state_map(bert.config.hidden_size, width, generator)
        self.pooler_map = state_map(bert.config.hidden_size, width, generator)

    def forward(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """Vectors before normalisation, and what the pooler's output gives, [B, width] each."""
        hidden = self.bert.encode(batch.input_ids, batch.token_type_ids, batch.mask)
        mean = Pooling()(hidden, _counted(batch, hidden))
        return self.map(mean), self.pooler_map(self.bert.pooled(hidden[:, 0]))


def write_sentence_model(
    folder: Path, student: SentenceStudent, vocab: Vocab, length: int, card: str
) -> None:
    """Writes a sentence-transformers folder into an existing folder: mean, linear map, unit length.

    SentenceTransformer opens it with no code of ours.
    """
    bert = student.bert
    state = {n: p for n, p in bert.named_parameters() if not n.startswith("head.")}
    huggingface.write_tensors(folder / WEIGHTS, huggingface.to_hugging_face(state))
    save_tokenizer_files(vocab, folder, bert.config.max_position_embeddings)
    config = huggingface.config_json(bert.config, vocab, "BertModel")
    write_json(folder / "config.json", config)
    write_json(
        folder / "config_sentence_transformers.json",
        {"__version__": {"mvbert": __version__}, "similarity_fn_name": "cosine"},
    )
    weight, bias = (p.detach().cpu().contiguous() for p in student.map.parameters())
    pooling = Pooling("mean", (Step(weight, bias), Step()))
    write_pooling(folder, pooling, bert.config.hidden_size, length)
    atomic_write(folder / "README.md", card)
