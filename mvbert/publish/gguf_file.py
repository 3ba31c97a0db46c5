"""Writes a BERT as GGUF files, which llama.cpp and what is built on it open.

    OUT/model-f32.gguf   float32
    OUT/model-f16.gguf   float16 matrices and word table; the rest float32
    OUT/README.md, LICENSE  as in the model's folder

A file has the weights, the vocabulary and the pooling of a `bert` of llama.cpp. What that cannot
express is refused; docs/export.md says in what its tokenizer differs from ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from mvbert import _core
from mvbert.config import ModelConfig
from mvbert.errors import InputError, require_extra
from mvbert.files import Json, atomic_folder, check_outside, copy_card, sync_file
from mvbert.model import huggingface
from mvbert.model.masked_lm import MaskedLM
from mvbert.model.pooling import Pooling, read_pooling
from mvbert.model.weights import read_weights
from mvbert.progress import Progress
from mvbert.text.vocab import Vocab

FLOAT, HALF = "model-f32.gguf", "model-f16.gguf"
WORD_START = "\u2581"  # what llama.cpp puts before the first piece of a word
_POOLINGS = {"mean": "MEAN", "cls": "CLS"}
# Our names -> llama.cpp's, without the trailing .weight / .bias.
_GLOBAL_NAMES = {
    "embeddings.word": "token_embd",
    "embeddings.position": "position_embd",
    "embeddings.token_type": "token_types",
    "embeddings.norm": "token_embd_norm",
}
_LAYER_NAMES = {
    "qkv": ("attn_q", "attn_k", "attn_v"),
    "attention_output": ("attn_output",),
    "attention_norm": ("attn_output_norm",),
    "intermediate": ("ffn_up",),
    "output": ("ffn_down",),
    "output_norm": ("layer_output_norm",),
}
# Two-dimensional, yet llama.cpp adds their rows as float32.
_ALWAYS_FLOAT = ("position_embd.weight", "token_types.weight")


def load_gguf() -> ModuleType:
    """Imports gguf.

    Raises:
        MissingExtra: it is not installed.
    """
    with require_extra("gguf", "a GGUF file"):
        import gguf
    return gguf


def gguf_tokens(vocab: Vocab) -> tuple[list[str], list[str]]:
    """The pieces as llama.cpp's WordPiece looks them up, and their types (names of gguf.TokenType).

    It marks the first piece of a word (U+2581) instead of the others (##). A piece that no text
    reaches, or a continuation that its look-up would take for something else, gets a text that no
    text reaches there either.

    Raises:
        InputError: an added piece would be found in other places than by mvbert.
    """
    added = {extra.piece: extra for extra in vocab.added}
    for extra in vocab.added:
        if extra.normalized or _core.split(extra.piece, lowercase=False) == [extra.piece]:
            how = "in text of any case" if extra.normalized else "where it is a word"
            raise InputError(
                f"{vocab.source}: the added piece {extra.piece!r} is found {how}, which "
                "llama.cpp's WordPiece cannot do; only added pieces with punctuation in them, "
                "found as they are written, can be in a GGUF file"
            )
    unread = {*vocab.unread_ids}
    tokens: list[str] = []
    types: list[str] = []
    for id, piece in enumerate(vocab.pieces):
        if piece in vocab.special_pieces or (piece in added and added[piece].special):
            token, kind = piece, "CONTROL"
        elif piece in added:
            token, kind = piece, "USER_DEFINED"
        elif id in unread:
            token, kind = f"[unread{id}]", "UNUSED"
        elif piece.startswith("##") and len(piece) > 2:
            token, kind = piece[2:], "NORMAL"
            # A continuation ##▁a would begin words in "a".
            if token.startswith(WORD_START) or token in added or token in vocab.special_pieces:
                token = piece
        else:
            token, kind = WORD_START + piece, "NORMAL"
        tokens.append(token)
        types.append(kind)
    return tokens, types


def gguf_tensors(model: MaskedLM) -> dict[str, np.ndarray]:
    """The tensors of an encoder under llama.cpp's names, float32."""
    tensors: dict[str, np.ndarray] = {}
    for name, parameter in model.named_parameters():
        stem, kind = name.rsplit(".", 1)
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(\w+)", stem)
        if layer is not None:
            targets: Sequence[str] = [f"blk.{layer[1]}.{x}" for x in _LAYER_NAMES[layer[2]]]
        elif stem in _GLOBAL_NAMES:
            targets = [_GLOBAL_NAMES[stem]]
        else:  # the pooler and the head of masked language modelling
            continue
        for target, part in zip(targets, parameter.chunk(len(targets)), strict=True):
            tensors[f"{target}.{kind}"] = part.detach().float().numpy()
    return tensors


def write_gguf(
    path: Path, model: MaskedLM, vocab: Vocab, pooling: Pooling | None, name: str, half: bool
) -> None:
    """Writes one file.

    Args:
        pooling: None: the file says that hidden states are not pooled.
        name: the model's, for its metadata.
        half: whether matrices and the word table are float16.
    """
    gguf = load_gguf()
    config = model.config
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_name(name)
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    mode = "NONE" if pooling is None else _POOLINGS[pooling.mode]
    writer.add_pooling_type(gguf.PoolingType[mode])
    tokens, types = gguf_tokens(vocab)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType[kind] for kind in types])
    writer.add_token_type_count(config.type_vocab_size)
    writer.add_bos_token_id(vocab.cls)
    writer.add_sep_token_id(vocab.sep)
    writer.add_unk_token_id(vocab.unk)
    writer.add_pad_token_id(vocab.pad)
    if "[MASK]" in vocab.ids:
        writer.add_mask_token_id(vocab.mask)
    # Newer than the methods of gguf 0.19.
    writer.add_bool("tokenizer.ggml.normalizer.lowercase", vocab.lowercase)
    writer.add_bool("tokenizer.ggml.normalizer.strip_accents", vocab.strip_accents)
    for key, values in gguf_tensors(model).items():
        narrow = half and values.ndim == 2 and key not in _ALWAYS_FLOAT
        writer.add_tensor(key, values.astype(np.float16) if narrow else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    sync_file(path)


def run_gguf(
    name: str,
    out: Path,
    *,
    heads: Sequence[str] = (),
    float16: bool = False,
    cased: bool = False,
    overwrite: bool = False,
) -> dict[str, Json]:
    """Writes the files listed at the top of this module.

    Args:
        name: a name for mvbert.model.huggingface.find_model, e.g. a BERT's folder or a run folder.
        heads: ("pooled",) or ("hidden",); empty: pooled if the folder has a modules.json.
        float16: also write HALF.
        cased: treat its vocabulary as cased, whatever the folder says.

    Raises:
        InputError: the model does not exist, has parts that llama.cpp's `bert` lacks, or `out`
            exists or contains the model.
        MissingExtra: gguf is not installed.
    """
    load_gguf()
    progress = Progress("export")
    folder = huggingface.find_model(name)
    check_outside(out, folder)
    if len(heads) > 1 or "logits" in heads:
        raise InputError(
            f"--head is {' '.join(heads)}, which a GGUF file cannot give; expected pooled or hidden"
        )
    shape, vocab = huggingface.read_shape(folder, cased=cased)
    weights = read_weights(folder)
    if not heads and huggingface.load_label_head(folder, weights, shape) is not None:
        raise InputError(
            f"{folder} was fine-tuned for labels, which --gguf does not write; --head hidden or "
            "--head pooled writes its encoder alone"
        )
    if not heads:
        heads = ["pooled" if (folder / "modules.json").exists() else "hidden"]
        progress.note(f"outputs: {heads[0]} (default; see --head)")
    pooling = read_pooling(folder, shape.hidden_size) if "pooled" in heads else None
    _check_expressible(folder, shape, pooling)
    model, _ = huggingface.load_masked_lm(folder, MaskedLM(shape), weights=weights)
    progress.note(vocab.doubt)
    progress.note(weights.unread())
    if pooling is not None:
        progress.note(f"embedding: {pooling}")
    _check_finite(folder, model, float16)
    report: dict[str, Json] = {}
    with atomic_folder(out, overwrite=overwrite) as partial:
        for file in [FLOAT, *[HALF] * float16]:
            write_gguf(
                partial / file, model, vocab, pooling, Path(name).resolve().name, file == HALF
            )
            size = (partial / file).stat().st_size
            progress.note(f"{file}: {size / 1e6:.2f} MB")
            report[file] = {"bytes": size}
        copy_card(folder, partial)
    return {
        "output": str(out),
        "model": str(folder),
        "pooling": "none" if pooling is None else pooling.mode,
        "files": report,
    }


def _check_expressible(folder: Path, shape: ModelConfig, pooling: Pooling | None) -> None:
    """Raises InputError for what llama.cpp's `bert` does not compute."""
    if shape.hidden_act not in ("gelu", "gelu_new"):
        raise InputError(
            f"{folder / 'config.json'}: hidden_act is {shape.hidden_act!r}; a bert of llama.cpp "
            "has GELU alone, so this model cannot be a GGUF file"
        )
    if pooling is None:
        return
    if pooling.mode not in _POOLINGS:
        raise InputError(
            f"{folder}: the pooling is {pooling.mode}; a bert of llama.cpp pools by "
            f"{' or '.join(_POOLINGS)}; --head hidden writes the encoder alone"
        )
    if any(step.weight is not None for step in pooling.steps):
        raise InputError(
            f"{folder / 'modules.json'} has a dense layer after pooling, which a bert of llama.cpp "
            "does not have; --head hidden writes the encoder alone"
        )


def _check_finite(folder: Path, model: MaskedLM, float16: bool) -> None:
    """Raises InputError if the weights are corrupt or do not fit the files' types."""
    for key, values in gguf_tensors(model).items():
        largest = float(np.abs(values).max())  # NaN if there is one
        if not np.isfinite(largest):
            raise InputError(
                f"{folder}: the model's weights are corrupt ({key} has NaN or infinity)"
            )
        if float16 and values.ndim == 2 and largest > torch.finfo(torch.float16).max:
            raise InputError(
                f"{folder}: {key} has values up to {largest:.3g}, more than float16 holds; export "
                "without --float16"
            )
