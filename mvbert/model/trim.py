"""A model with another vocabulary and no training: its tables, biases and files, rewritten.

Pieces that both vocabularies have keep their rows; new ones get the mean of the rows of the pieces
they were spelled with. Tied and untied output layers and their biases follow. Works on the tensors
of a folder, so any model whose word table and output layer have the names below is read.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvbert.errors import InputError
from mvbert.files import LICENCE_FILE, atomic_write, read_json_object, sync_file, write_json
from mvbert.model.embeddings import spelled_rows
from mvbert.model.huggingface import write_tensors
from mvbert.model.weights import WEIGHTS, read_tensors, weight_files
from mvbert.text.tokenizer import save_tokenizer_files
from mvbert.text.tokenizer_files import read_model_inputs
from mvbert.text.vocab import Vocab

# What has a row or a number for each piece, in BERT, ConvBERT, DistilBERT, ELECTRA, GTE, MPNet,
# NomicBERT and SqueezeBERT.
_OF_PIECES = re.compile(
    r"(^|.*\.)(word_embeddings\.weight|predictions\.(decoder\.)?(weight|bias)"
    r"|lm_head\.(decoder\.)?(weight|bias)|vocab_projector\.(weight|bias)"
    r"|generator_lm_head\.(weight|bias))$"
)
_TABLE = re.compile(r"(^|.*\.)embeddings\.word_embeddings\.weight$")
# Of a sentence-transformers folder, beside the model; folders of its modules are copied whole.
_COPIED = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
_MODULE = re.compile(r"\d+_\w+")
# Families of `fuse` whose tokenizer is another.
_NOT_WORDPIECE = {
    "albert": "SentencePiece",
    "camembert": "SentencePiece",
    "data2vec-text": "byte-level BPE",
    "deberta-v2": "SentencePiece",
    "funnel": "WordPiece with special pieces of its own",
    "jina_embeddings_v3": "SentencePiece",
    "modernbert": "byte-level BPE",
    "mra": "byte-level BPE",
    "nystromformer": "SentencePiece",
    "rembert": "SentencePiece",
    "roberta": "byte-level BPE",
    "roberta-prelayernorm": "byte-level BPE",
    "roformer": "WordPiece after a splitter of Chinese words",
    "xlm-roberta": "SentencePiece",
    "xmod": "SentencePiece",
    "yoso": "SentencePiece",
}
# MPNet's own special pieces, around those of BERT; its code takes the id of <pad> for granted.
_MPNET_FIRST, _MPNET_LAST = ("<s>", "<pad>", "</s>", "<unk>"), "<mask>"


@dataclass(frozen=True)
class Trimmed:
    """What became of a model."""

    tensors: dict[str, Tensor]
    shared: int  # pieces that both vocabularies have
    rewritten: tuple[str, ...]  # tensors with another number of rows


def read_vocab(folder: Path, cased: bool = False) -> Vocab:
    """The vocabulary of a model that can be trimmed.

    Args:
        cased: treat it as cased, whatever the folder says.

    Raises:
        InputError: its tokenizer is not WordPiece, or its files cannot be used.
    """
    family = _family(folder)
    if family in _NOT_WORDPIECE:
        raise InputError(
            f"{folder / 'config.json'}: model_type is {family!r}, whose tokenizer is "
            f"{_NOT_WORDPIECE[family]}; trim needs BERT's WordPiece (BERT, ConvBERT, DistilBERT, "
            "ELECTRA, GTE, MPNet, NomicBERT, SqueezeBERT)"
        )
    lowercase = False if cased else None
    if family != "mpnet":
        return Vocab.load(folder, lowercase=lowercase)
    # Its tokenizer reads text as BERT's does; the names of its special pieces differ.
    vocab = Vocab.load(folder / "vocab.txt", lowercase=lowercase)
    if vocab.pieces[:4] != _MPNET_FIRST or _MPNET_LAST not in vocab.ids:
        raise InputError(
            f"{vocab.source}: an MPNet vocabulary begins with {' '.join(_MPNET_FIRST)} and has "
            f"{_MPNET_LAST}; this one begins with {' '.join(vocab.pieces[:4])}"
        )
    return vocab


def fitted_vocab(folder: Path, new: Vocab) -> Vocab:
    """A new vocabulary with the special pieces that the model's family needs, at their ids."""
    if _family(folder) != "mpnet":
        return new
    own = {*_MPNET_FIRST, _MPNET_LAST}
    pieces = (*_MPNET_FIRST, *(p for p in new.pieces if p not in own), _MPNET_LAST)
    return replace(new, pieces=pieces, base_size=len(pieces))


def _family(folder: Path) -> str:
    """The family of a model by its config.json, as transformers names it."""
    return str(read_json_object(folder / "config.json").get("model_type"))


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
    result: dict[str, Tensor] = {}
    rewritten = []
    shared = 0
    for name, tensor in tensors.items():
        if rows not in tensor.shape:
            result[name] = tensor
            continue
        if rows in tensor.shape[1:]:  # MobileBERT keeps a part of its output layer so
            raise InputError(
                f"{folder}: {name} is {list(tensor.shape)}, with a column for each of {rows} "
                "pieces; trim knows rows alone"
            )
        if not _OF_PIECES.match(name):
            # A hidden size may equal the number of pieces by chance only in toys: better refused.
            raise InputError(
                f"{folder}: {name} has a row for each of the {rows} pieces, and trim does not know "
                "whether to cut it"
            )
        flat = tensor.reshape(rows, -1)
        if not tensor.is_floating_point():
            raise InputError(f"{folder}: {name} is {tensor.dtype}, expected floating point")
        values, shared = spelled_rows(new.pieces, old.ids, flat.float(), old.unk)
        result[name] = values.to(tensor.dtype).reshape(new.size, *tensor.shape[1:]).contiguous()
        rewritten.append(name)
    return Trimmed(result, shared, tuple(rewritten))


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
    mpnet = _family(folder) == "mpnet"
    pad = new.ids["<pad>"] if mpnet else new.pad
    config |= {"vocab_size": new.size, "pad_token_id": pad}
    write_json(out / "config.json", config)
    if mpnet:
        _write_mpnet_tokenizer(folder, out, old, new)
    else:
        length, inputs = read_model_inputs(folder)
        # NomicBERT's name is GPT-2's.
        longest = int(config.get("max_position_embeddings", config.get("n_positions", 512)))
        save_tokenizer_files(new, out, min(length, longest), inputs)
    for path in sorted(folder.iterdir()):
        if path.name in _COPIED or (LICENCE_FILE.fullmatch(path.name) and path.is_file()):
            shutil.copyfile(path, out / path.name)
            sync_file(out / path.name)
        elif path.is_dir() and _MODULE.fullmatch(path.name):
            shutil.copytree(path, out / path.name)
    return trimmed


def _write_mpnet_tokenizer(folder: Path, out: Path, old: Vocab, new: Vocab) -> None:
    """Writes MPNet's tokenizer files: those of the folder with the new pieces and ids."""
    new.save(out / "vocab.txt")
    path = folder / "tokenizer_config.json"
    config: dict[str, Any] = dict(read_json_object(path)) if path.exists() else {}
    config |= {"tokenizer_class": "MPNetTokenizer", "do_lower_case": new.lowercase}
    if "added_tokens_decoder" in config:
        added = config["added_tokens_decoder"].values()
        config["added_tokens_decoder"] = {
            str(new.ids[token["content"]]): token for token in added if token["content"] in new.ids
        }
    write_json(out / path.name, config)
    path = folder / "tokenizer.json"
    if path.exists():
        top: dict[str, Any] = dict(read_json_object(path))
        if top.get("model", {}).get("vocab") != old.ids:
            raise InputError(
                f"{path} has other pieces than {old.source}; remove the wrong one of the two"
            )
        top["model"]["vocab"] = new.ids
        top["normalizer"]["lowercase"] = new.lowercase
        top["added_tokens"] = [
            token | {"id": new.ids[token["content"]]}
            for token in top.get("added_tokens", [])
            if token["content"] in new.ids
        ]
        atomic_write(out / path.name, json.dumps(top, ensure_ascii=False) + "\n")
    path = folder / "special_tokens_map.json"
    if path.exists():
        atomic_write(out / path.name, path.read_bytes())
