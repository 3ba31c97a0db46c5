"""Hugging Face folders: read a BERT, write a BERT that AutoModel opens with no remote code.

A folder is read as transformers reads it or refused: docs/models.md says which is which. The
encoder keeps query, key and value as one matrix; on disk they are three, under transformers' names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mvbert.config import ModelConfig
from mvbert.errors import InputError
from mvbert.files import (
    Json,
    atomic_write,
    open_to_readers,
    read_json,
    read_json_object,
    sync_file,
    write_error,
    write_json,
)
from mvbert.model.masked_lm import LabelHead, MaskedLM
from mvbert.model.weights import PYTORCH_WEIGHTS, WEIGHTS, Weights, read_weights
from mvbert.text.hub import download, is_hub_name
from mvbert.text.tokenizer import save_tokenizer_files
from mvbert.text.vocab import Vocab
from mvbert.toml import to_dict

# Our name -> transformers', without the trailing .weight / .bias.
_GLOBAL_NAMES = {
    "embeddings.word": "bert.embeddings.word_embeddings",
    "embeddings.position": "bert.embeddings.position_embeddings",
    "embeddings.token_type": "bert.embeddings.token_type_embeddings",
    "embeddings.norm": "bert.embeddings.LayerNorm",
    "pooler": "bert.pooler.dense",
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
}
_LAYER_NAMES = {
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
_QKV = ("query", "key", "value")
_TABLE = "bert.embeddings.word_embeddings.weight"
_DECODER = "cls.predictions.decoder.weight"
_BIAS, _DECODER_BIAS = "cls.predictions.bias", "cls.predictions.decoder.bias"
# Ours, of one row for each piece.
_OF_PIECES = ("embeddings.word.weight", "head.bias", "head.decoder")

# Activations that transformers calls by other names, though they are one function.
_ACTIVATIONS = {
    "gelu_python": "gelu",
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "swish": "silu",
}

# Padding rows of a table: sizes are commonly rounded up, to multiples of at most 512.
_MOST_PADDING = 511

# What fine-tuning leaves: the layer that scores labels, whether of a text as a whole, its outputs.
_LABEL_HEADS: dict[str, tuple[str, bool, list[str]]] = {
    "BertForSequenceClassification": ("classifier", True, ["logits"]),
    "BertForMultipleChoice": ("classifier", True, ["logits"]),
    "BertForNextSentencePrediction": ("cls.seq_relationship", True, ["logits"]),
    "BertForTokenClassification": ("classifier", False, ["logits"]),
    "BertForQuestionAnswering": ("qa_outputs", False, ["start_logits", "end_logits"]),
}
# Before the names of labels of the text, in a token classifier that also has labels of words.
INTENT = "intent:"
_WITHOUT_LABELS = ("BertModel", "BertForMaskedLM", "BertForPreTraining", "BertLMHeadModel")


def transformers_names(name: str) -> list[str]:
    """The transformers names of one of our parameters: one, or three for qkv."""
    if name == "head.bias":
        return [_BIAS]
    if name == "head.decoder":
        return [_DECODER]
    stem, kind = name.rsplit(".", 1)
    layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(\w+)", stem)
    if layer is None:
        return [f"{_GLOBAL_NAMES[stem]}.{kind}"]
    prefix = f"bert.encoder.layer.{layer[1]}."
    if layer[2] == "qkv":
        return [f"{prefix}attention.self.{part}.{kind}" for part in _QKV]
    return [f"{prefix}{_LAYER_NAMES[layer[2]]}.{kind}"]


def to_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters of a MaskedLM under transformers' names (BertForMaskedLM plus pooler)."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        names = transformers_names(name)
        out.update(zip(names, value.chunk(len(names)), strict=True))
    if _DECODER in out:
        # transformers 4 reads one of the two, transformers 5 the other.
        out[_DECODER_BIAS] = out[_BIAS].clone()
    return {name: value.detach().cpu().contiguous() for name, value in out.items()}


def find_model(name: str, what: str = "model") -> Path:
    """Finds the folder of a BERT.

    Args:
        name: a folder, a run folder (for its result, model/), an installed Python package with a
            model in its files, or a name on the Hugging Face Hub.
        what: its name in messages.

    Raises:
        InputError: no such folder or package, and it cannot be downloaded from the Hub.
    """
    folder = Path(name)
    if folder.is_dir():
        if (folder / "config.json").exists():
            return folder
        if (folder / "modules.json").exists():
            raise _elsewhere(folder, what)
        return folder / "model" if (folder / "model").is_dir() else folder
    if folder.exists():
        raise InputError(f"{what} {name} is a file; expected a folder with config.json")
    if not is_hub_name(name):
        raise InputError(f"{what} {name}: no such folder, nor a name that the hub could know")
    packaged = _packaged_model(name)
    return _from_hub(name, what) if packaged is None else packaged


def _elsewhere(folder: Path, what: str) -> InputError:
    """The error for an older sentence-transformers folder, whose BERT is in a folder below."""
    path = folder / "modules.json"
    modules = read_json(path)
    first = modules[0] if isinstance(modules, list) and modules else None
    below = first.get("path") if isinstance(first, dict) else None
    return InputError(
        f"{what} {folder} has no config.json"
        + (f"; {path} has its first module in {below}: give {folder / below}" if below else "")
    )


_VOCABULARIES = {"vocab.txt", "tokenizer.json"}
_WEIGHT_FILES = {
    f"{name}{ending}" for name in (WEIGHTS, PYTORCH_WEIGHTS) for ending in ("", ".index.json")
}


def _packaged_model(name: str) -> Path | None:
    """The folder of an installed package's files that holds a model with a vocabulary."""
    try:
        files = metadata.files(name) or []
    except (metadata.PackageNotFoundError, ValueError):
        return None
    folders: dict[Path, set[str]] = {}
    for file in files:
        path = Path(str(file.locate()))
        if path.is_file():
            folders.setdefault(path.parent, set()).add(path.name)
    for folder, names in sorted(folders.items()):
        if "config.json" in names and names & _VOCABULARIES and names & _WEIGHT_FILES:
            return folder
    return None


# What is read of a model; PyTorch's files only where there are no safetensors.
_HUB_FILES = ["*.json", "*.safetensors", "vocab.txt"]
_HUB_PYTORCH_FILES = ["pytorch_model*.bin", "*/pytorch_model.bin"]


def _from_hub(name: str, what: str) -> Path:
    folder = download(name, what, _HUB_FILES)
    if not any(folder.glob("*.safetensors")):
        download(name, what, _HUB_FILES + _HUB_PYTORCH_FILES)
    return folder


def read_model_config(folder: Path) -> ModelConfig:
    """The shape in a folder's config.json.

    Raises:
        InputError: not a BERT, or one with parts that are not supported here; the message names the
            key.
    """
    path = folder / "config.json"
    data = read_json_object(path)
    if data.get("model_type") != "bert":
        raise InputError(
            f"{path}: model_type is {data.get('model_type')!r}, expected 'bert': what is read here "
            "is computed with BERT's layers, and another family's differ"
        )
    for key, usual, reason in (
        ("position_embedding_type", "absolute", "only absolute position embeddings are supported"),
        ("is_decoder", False, "a decoder reads from left to right only; expected an encoder"),
        ("add_cross_attention", False, "cross-attention is not supported"),
        ("pruned_heads", {}, "pruned heads are not supported"),
        ("quantization_config", None, "quantised weights are not supported"),
    ):
        # None and absent are the default, as an empty dictionary is.
        if (data.get(key) or usual) != usual:
            raise InputError(f"{path}: {key} is {data[key]!r}; {reason}")
    values: dict[str, Any] = {f.name: data[f.name] for f in fields(ModelConfig) if f.name in data}
    act = values.get("hidden_act")
    if isinstance(act, str):
        values["hidden_act"] = _ACTIVATIONS.get(act, act)
    try:
        return ModelConfig(**values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except TypeError as error:
        raise InputError(f"{path}: {error}; is it the configuration of a BERT?") from None


def read_shape(folder: Path, *, cased: bool = False) -> tuple[ModelConfig, Vocab]:
    """The shape and the vocabulary of a model folder; vocab_size is the number of pieces.

    A table may have more rows than there are pieces, so that its size suits tensor cores. What is
    loaded for this shape, and written, has no such rows.

    Args:
        cased: treat the vocabulary as cased, whatever the folder says.

    Raises:
        InputError: either cannot be used, or they do not match.
    """
    config = read_model_config(folder)
    vocab = Vocab.load(folder, lowercase=False if cased else None)
    if not vocab.size <= config.vocab_size <= vocab.size + _MOST_PADDING:
        raise InputError(
            f"{folder}: the vocabulary has {vocab.size} pieces but config.json says vocab_size "
            f"{config.vocab_size}; the vocabulary and the weights do not match"
        )
    return replace(config, vocab_size=vocab.size), vocab


def load_masked_lm(
    folder: Path,
    model: MaskedLM | None = None,
    *,
    weights: Weights | None = None,
    seed: int = 0,
    complete: bool = False,
) -> tuple[MaskedLM, list[str]]:
    """Loads a folder into a MaskedLM (or into `model`, of the same shape).

    Parameters that the folder lacks (a sentence encoder has no head, many files have no pooler)
    keep initial weights drawn from `seed`.

    Args:
        weights: the folder's, if they have been read already.
        complete: refuse a folder that lacks any parameter.

    Returns:
        The model and transformers' names of the parameters that were not in the folder.

    Raises:
        InputError: the folder lacks part of the encoder, a tensor has another shape than
            config.json says, or transformers 4 and 5 would read different ones.
    """
    config = read_model_config(folder)
    if model is None:
        model = MaskedLM(read_shape(folder)[0])
        model.init_weights(seed)
    if weights is None:
        weights = read_weights(folder)
    own = {n: p for n, p in model.named_parameters() if not n.startswith("student.")}
    stand_in = _output_layer(weights, config.tie_word_embeddings)
    missing: list[str] = []
    loaded: dict[str, Tensor] = {}
    for name, parameter in own.items():
        sources = [stand_in.get(source, source) for source in transformers_names(name)]
        absent = [source for source in sources if source not in weights]
        if absent:
            missing += absent
            continue
        rows = config.vocab_size if name in _OF_PIECES else len(parameter) // len(sources)
        parts = [weights.read(source, (rows, *parameter.shape[1:])) for source in sources]
        # Rows past the last piece's are padding.
        loaded[name] = torch.cat(parts) if len(parts) > 1 else parts[0][: len(parameter)]
    vital = [n for n in missing if complete or not n.startswith(("cls.", "bert.pooler."))]
    if vital:
        raise weights.missing(vital)
    with torch.no_grad():
        for name, value in loaded.items():
            own[name].copy_(value)
    return model, missing


def _output_layer(weights: Weights, tied: bool) -> dict[str, str]:
    """Tensors that stand in for missing ones: the decoder's for the tied table, its bias.

    Raises:
        InputError: two tensors that should be one differ, so that it depends on the version of
            transformers which of them is read.
    """
    stand_in: dict[str, str] = {}
    twins = [(_BIAS, _DECODER_BIAS), *[(_TABLE, _DECODER)] * tied]
    for name, twin in twins:
        if twin not in weights:
            continue
        value = weights.read(twin)
        if name not in weights:
            stand_in[name] = twin
            continue
        other = weights.read(name)
        if value.shape != other.shape or not torch.equal(value.double(), other.double()):
            tie = " although tie_word_embeddings is true" if name == _TABLE else ""
            raise InputError(
                f"{weights.place(twin)} differs from {weights.key(name)}{tie}, and transformers 4 "
                "and 5 read different ones; "
                + (
                    "set tie_word_embeddings to false in config.json if the model was trained so, "
                    if name == _TABLE
                    else ""
                )
                + "remove the wrong one and save the model again"
            )
    return stand_in


def load_label_head(folder: Path, weights: Weights, config: ModelConfig) -> LabelHead | None:
    """The head of a BERT that was fine-tuned for labels; None if it has none.

    Where config.json names no architecture, the names of the tensors decide.

    Raises:
        InputError: its weights are missing, do not fit, or do not say what they score.
    """
    architecture = _label_architecture(folder, weights)
    if architecture is None:
        return None
    name, of_text, outputs = _LABEL_HEADS[architecture]
    tensors = [f"{name}.weight", f"{name}.bias", *["bert.pooler.dense.weight"] * of_text]
    missing = [tensor for tensor in tensors if tensor not in weights]
    if missing:
        raise InputError(
            f"{folder} is a {architecture}, but its weights have no {weights.key(missing[0])}"
        )
    weight, bias = weights.read(f"{name}.weight"), weights.read(f"{name}.bias")
    fits = len(outputs) in (1, len(weight))
    if weight.shape[1:] != (config.hidden_size,) or bias.shape != weight.shape[:1] or not fits:
        raise InputError(
            f"{weights.place(f'{name}.weight')} of a {architecture} of hidden size "
            f"{config.hidden_size} is {tuple(weight.shape)}, its bias {tuple(bias.shape)}"
        )
    intents = 0 if of_text or len(outputs) > 1 else _intents(folder, len(weight))
    head = LabelHead(config.hidden_size, len(weight), of_text, outputs, intents)
    head.scores.load_state_dict({"weight": weight, "bias": bias})
    return head


def _intents(folder: Path, labels: int) -> int:
    """How many of a token classifier's labels are the text's: the last ones, named INTENT."""
    named = read_json_object(folder / "config.json").get("id2label")
    if not isinstance(named, dict):
        return 0
    of_text = [str(named.get(str(i))).startswith(INTENT) for i in range(labels)]
    intents = sum(of_text)
    if any(of_text[: labels - intents]):
        raise InputError(
            f"{folder / 'config.json'}: id2label has {INTENT!r} before the names of tags; expected "
            "the labels of words first, then those of the text"
        )
    if intents == labels:
        raise InputError(
            f"{folder / 'config.json'}: id2label has {INTENT!r} before all names, so that no label "
            'is of words; expected "architectures": ["BertForSequenceClassification"]'
        )
    return intents


def _label_architecture(folder: Path, weights: Weights) -> str | None:
    """Which of _LABEL_HEADS a folder is; None if it scores no labels."""
    path = folder / "config.json"
    named = read_json_object(path).get("architectures")
    for architecture in named if isinstance(named, list) else []:
        if architecture in _LABEL_HEADS:
            return architecture
        if architecture in _WITHOUT_LABELS:
            return None
    others = [name for name in weights.tensors if not name.startswith(("bert.", "cls."))]
    if "cls.seq_relationship.weight" in weights and _BIAS not in weights:
        others.append("cls.seq_relationship.weight")
    # What an unknown class does with its head is in its code, not in the names of its tensors.
    if named and others:
        raise InputError(
            f"{path}: architectures is {named!r}, whose head ({weights.key(others[0])}) is not "
            f"supported; expected one of {', '.join([*_LABEL_HEADS, *_WITHOUT_LABELS])}"
        )
    if "qa_outputs.weight" in weights:
        return "BertForQuestionAnswering"
    if "classifier.weight" in weights:
        # A sequence's labels need the pooler; transformers writes none for those of tokens.
        if "bert.pooler.dense.weight" not in weights:
            return "BertForTokenClassification"
        raise InputError(
            f"{path} names no architecture, and {weights.place('classifier.weight')} may "
            'score sequences or tokens; add "architectures": ["BertForSequenceClassification"] or '
            '["BertForTokenClassification"]'
        )
    if "cls.seq_relationship.weight" in others:
        return "BertForNextSentencePrediction"
    return None


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes one safetensors file and syncs it to disk."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        open_to_readers(path)  # some versions make private files
        sync_file(path)
    except OSError as error:
        raise write_error(path, error) from error
    except SafetensorError as error:
        raise InputError(f"cannot write {path}: {error}; existing files are unchanged") from error


def config_json(shape: ModelConfig, vocab: Vocab, architecture: str) -> dict[str, Json]:
    """The contents of config.json for one of transformers' BERT classes."""
    # Dropout is a setting of a run; a folder carries BERT's, for whoever fine-tunes it.
    shape = replace(
        shape, pad_token_id=vocab.pad, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1
    )
    return {
        "architectures": [architecture],
        "model_type": "bert",
        **to_dict(shape),
        "position_embedding_type": "absolute",
        "torch_dtype": "float32",
    }


def write_model(folder: Path, model: MaskedLM, vocab: Vocab, card: str) -> None:
    """Writes all files of a Hugging Face folder into an existing folder.

    config.json, model.safetensors, vocab.txt, tokenizer.json, tokenizer_config.json, README.md.
    """
    state = {n: p for n, p in model.named_parameters() if not n.startswith("student.")}
    write_tensors(folder / WEIGHTS, to_hugging_face(state))
    write_json(folder / "config.json", config_json(model.config, vocab, "BertForMaskedLM"))
    save_tokenizer_files(vocab, folder)
    atomic_write(folder / "README.md", card)
