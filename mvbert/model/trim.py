"""A model with another vocabulary and no training: its tables, biases and files, rewritten.

Pieces that both vocabularies have keep their rows; new ones get the mean of the rows of the pieces
they were spelled with. Tied and untied output layers and their biases follow. Works on the tensors
of a folder, so any model whose word table and output layer have the names below is read.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvbert.errors import InputError
from mvbert.files import read_json_object, sync_file, write_json
from mvbert.model.embeddings import spelled_rows
from mvbert.model.huggingface import write_tensors
from mvbert.model.weights import WEIGHTS, read_tensors, weight_files
from mvbert.text.tokenizer import save_tokenizer_files
from mvbert.text.tokenizer_files import read_model_inputs
from mvbert.text.vocab import Vocab

# What has a row or a number for each piece, in BERT, RoBERTa, DistilBERT, ELECTRA.
_OF_PIECES = re.compile(
    r"(^|.*\.)(word_embeddings\.weight|predictions\.(decoder\.)?(weight|bias)"
    r"|lm_head\.(decoder\.)?(weight|bias)|vocab_projector\.(weight|bias)"
    r"|generator_lm_head\.(weight|bias))$"
)
_TABLE = re.compile(r"(^|.*\.)embeddings\.word_embeddings\.weight$")
# Of a sentence-transformers folder, beside the model; folders of its modules are copied whole.
_COPIED = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
_MODULE = re.compile(r"\d+_\w+")


@dataclass(frozen=True)
class Trimmed:
    """What became of a model."""

    tensors: dict[str, Tensor]
    kept: int  # pieces that both vocabularies have
    rewritten: tuple[str, ...]  # tensors with another number of rows


def trim_tensors(tensors: Mapping[str, Tensor], old: Vocab, new: Vocab, folder: Path) -> Trimmed:
    """The tensors of a model for another vocabulary.

    Args:
        folder: for messages.

    Raises:
        InputError: no word table, or a tensor of as many rows that is not known here.
    """
    tables = [name for name in tensors if _TABLE.match(name)]
    if not tables:
        raise InputError(
            f"{folder} has no embeddings.word_embeddings.weight; only a BERT, or a model with its "
            "names, can be trimmed"
        )
    rows = len(tensors[tables[0]])
    if rows < old.size:
        raise InputError(
            f"{folder}: {tables[0]} has {rows} rows for a vocabulary of {old.size} pieces"
        )
    made: dict[str, Tensor] = {}
    rewritten = []
    kept = 0
    for name, tensor in tensors.items():
        if not (tensor.ndim and len(tensor) == rows):
            made[name] = tensor
            continue
        if not _OF_PIECES.match(name):
            # A hidden size may equal the number of pieces by chance only in toys: better refused.
            raise InputError(
                f"{folder}: {name} has a row for each of {rows} pieces, but is no part that "
                "trim knows"
            )
        flat = tensor.reshape(rows, -1)
        if not tensor.is_floating_point():
            raise InputError(f"{folder}: {name} is {tensor.dtype}, expected floating point")
        values, kept = spelled_rows(new.pieces, old.ids, flat.float(), old.unk)
        made[name] = values.to(tensor.dtype).reshape(new.size, *tensor.shape[1:]).contiguous()
        rewritten.append(name)
    return Trimmed(made, kept, tuple(rewritten))


def write_trimmed(folder: Path, out: Path, old: Vocab, new: Vocab) -> Trimmed:
    """Writes a model's folder with another vocabulary into the empty folder `out`."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        tensors |= read_tensors(path)
    with torch.no_grad():
        trimmed = trim_tensors(tensors, old, new, folder)
    # (PyTorch files may hold one tensor under two names, which safetensors refuses.)
    unshared = {name: tensor.clone() for name, tensor in trimmed.tensors.items()}
    write_tensors(out / WEIGHTS, unshared)
    config: dict[str, Any] = dict(read_json_object(folder / "config.json"))
    config |= {"vocab_size": new.size, "pad_token_id": new.pad}
    write_json(out / "config.json", config)
    length, inputs = read_model_inputs(folder)
    longest = int(config.get("max_position_embeddings", 512))
    save_tokenizer_files(new, out, min(length, longest), inputs)
    for path in sorted(folder.iterdir()):
        if path.name in _COPIED:
            shutil.copyfile(path, out / path.name)
            sync_file(out / path.name)
        elif path.is_dir() and _MODULE.fullmatch(path.name):
            shutil.copytree(path, out / path.name)
    return trimmed
