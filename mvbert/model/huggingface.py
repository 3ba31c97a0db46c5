"""Hugging Face folders: read a BERT, write a BERT that AutoModel opens with no remote code.

The encoder keeps query, key and value as one matrix; on disk they are three, under Hugging Face's
names. Files are safetensors, JSON and text: no pickle is read or written.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mvbert.config import ModelConfig, to_dict
from mvbert.errors import InputError
from mvbert.files import (
    atomic_write,
    read_json_object,
    sha256_file,
    sync_file,
    write_error,
    write_json,
)
from mvbert.model.masked_lm import LabelHead, MaskedLM
from mvbert.text import docstrings
from mvbert.text.tokenizer import save_tokenizer_files
from mvbert.text.vocab import Vocab

WEIGHTS = "model.safetensors"

# Our name -> Hugging Face's, without the trailing .weight / .bias.
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
_IGNORED = re.compile(
    r"cls\.predictions\.decoder\.|cls\.seq_relationship\.|.*\.position_ids$|.*\.token_type_ids$"
)

# What fine-tuning leaves: the layer that scores labels, whether of a text as a whole, its outputs.
_LABEL_HEADS: dict[str, tuple[str, bool, list[str]]] = {
    "BertForSequenceClassification": ("classifier", True, ["logits"]),
    "BertForTokenClassification": ("classifier", False, ["logits"]),
    "BertForQuestionAnswering": ("qa_outputs", False, ["start_logits", "end_logits"]),
}


def to_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters of a MaskedLM under Hugging Face's names (BertForMaskedLM plus pooler)."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "head.bias":
            out["cls.predictions.bias"] = value
            continue
        stem, kind = name.rsplit(".", 1)
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(\w+)", stem)
        if layer is None:
            out[f"{_GLOBAL_NAMES[stem]}.{kind}"] = value
        elif layer[2] == "qkv":
            for part, name in zip(value.chunk(3), _QKV, strict=True):
                out[f"bert.encoder.layer.{layer[1]}.attention.self.{name}.{kind}"] = part
        else:
            out[f"bert.encoder.layer.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{kind}"] = value
    return {name: value.detach().cpu().contiguous() for name, value in out.items()}


def from_hugging_face(hf: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The parameters called `names` out of Hugging Face's; those that are absent are left out."""
    out: dict[str, Tensor] = {}
    for name in names:
        if name == "head.bias":
            sources = ["cls.predictions.bias"]
        else:
            stem, kind = name.rsplit(".", 1)
            layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(\w+)", stem)
            if layer is None:
                sources = [f"{_GLOBAL_NAMES[stem]}.{kind}"]
            elif layer[2] == "qkv":
                prefix = f"bert.encoder.layer.{layer[1]}.attention.self."
                sources = [f"{prefix}{part}.{kind}" for part in _QKV]
            else:
                sources = [f"bert.encoder.layer.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{kind}"]
        found = [hf[source] for source in sources if source in hf]
        if len(found) == len(sources):
            out[name] = torch.cat(found) if len(found) > 1 else found[0]
    return out


def find_model(name: str) -> Path:
    """As find_teacher, for any BERT; the folder of a run gives that of its result, model/."""
    folder = find_teacher(name, "model")
    run = not (folder / "config.json").exists() and (folder / "model").is_dir()
    return folder / "model" if run else folder


def find_teacher(name: str, what: str = "teacher") -> Path:
    """The folder of a teacher: a local folder, the model inside a Python package, or a hub name.

    Args:
        what: what messages call it.

    Raises:
        InputError: there is no such folder and the name cannot be had from the hub.
    """
    if Path(name).is_dir():
        return Path(name)
    if name == docstrings.TEACHER:
        return docstrings.default_teacher()
    if Path(name).exists():
        raise InputError(
            f"{what} {name}: expected a folder with config.json, model.safetensors and vocab.txt"
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError:
        raise InputError(
            f"{what} {name}: no such folder; "
            "for a name on the Hugging Face hub run: pip install mvbert[hf]"
        ) from None
    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=["*.json", "*.safetensors", "vocab.txt"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{what} {name}: no such folder, and the Hugging Face hub did not give it ({reason})"
        ) from None


def read_model_config(folder: Path) -> ModelConfig:
    """The shape in a folder's config.json.

    Raises:
        InputError: not a BERT, or one with parts that are not supported here.
    """
    path = folder / "config.json"
    data = read_json_object(path)
    if data.get("model_type") != "bert":
        raise InputError(f"{path}: model_type is {data.get('model_type')!r}, expected 'bert'")
    if data.get("position_embedding_type", "absolute") != "absolute":
        raise InputError(f"{path}: only absolute position embeddings are supported")
    values = {f.name: data[f.name] for f in fields(ModelConfig) if f.name in data}
    try:
        return ModelConfig(**values)  # type: ignore[arg-type]
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except TypeError as error:
        raise InputError(f"{path}: {error}; is it the configuration of a BERT?") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors file or files of a model folder.

    Raises:
        InputError: there are none, or the index names one outside the folder.
    """
    index = folder / f"{WEIGHTS}.index.json"
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if index.is_file():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError(f"{index}: no weight_map in it")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name:
                raise InputError(f"{index}: file name {name!r} leaves the folder")
            if not (folder / name).is_file():
                raise InputError(f"{index} names {name}, which is not there")
        return [folder / name for name in names]
    if (folder / "pytorch_model.bin").exists():
        raise InputError(
            f"{folder}: has only pytorch_model.bin, a pickle, which is not read; "
            "save it as safetensors first (model.save_pretrained does)"
        )
    raise InputError(f"{folder}: no {WEIGHTS} in it")


def weights_id(folder: Path) -> str:
    """The SHA-256 of a model folder's weights, or of those of its files one after the other."""
    sums = [sha256_file(path) for path in weight_files(folder)]
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors file or files, under Hugging Face's names."""
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        weights.update(read_tensors(path))
    return {
        _modern_name(name): value for name, value in weights.items() if not _IGNORED.match(name)
    }


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file; InputError names the file if it is not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except SafetensorError as error:
        raise InputError(f"{path}: not a whole safetensors file: {error}") from None


def _modern_name(name: str) -> str:
    """Adds the `bert.` that bare encoders lack; renames TensorFlow's gamma and beta."""
    if name.startswith(("embeddings.", "encoder.", "pooler.")):
        name = f"bert.{name}"
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )


def load_vocab(folder: Path, config: ModelConfig) -> Vocab:
    """The vocabulary of a model folder, checked against the size of its table."""
    vocab = Vocab.load(folder)
    if vocab.size != config.vocab_size:
        raise InputError(
            f"{folder}: the vocabulary has {vocab.size} pieces but the table has "
            f"{config.vocab_size} rows; vocab.txt and model.safetensors do not belong together"
        )
    return vocab


def load_masked_lm(
    folder: Path, model: MaskedLM | None = None, *, seed: int = 0, complete: bool = False
) -> tuple[MaskedLM, list[str]]:
    """Loads a folder into a MaskedLM (or into `model`, of the same shape).

    Parameters that the folder lacks (a sentence encoder has no head, many files have no pooler)
    keep initial weights drawn from `seed`.

    Args:
        complete: refuse a folder that lacks any parameter.

    Returns:
        The model and the names of parameters that were not in the folder.
    """
    if model is None:
        model = MaskedLM(read_model_config(folder))
        model.init_weights(seed)
    own = {n: p for n, p in model.named_parameters() if not n.startswith("student.")}
    found = from_hugging_face(read_weights(folder), own)
    for name, value in found.items():
        if value.shape != own[name].shape:
            raise InputError(
                f"{folder}: {name} is {tuple(value.shape)}, "
                f"config.json says {tuple(own[name].shape)}"
            )
    missing = [name for name in own if name not in found]
    vital = [n for n in missing if complete or not n.startswith(("head.", "pooler."))]
    if vital:
        raise InputError(f"{folder}: {WEIGHTS} has no weights for {', '.join(vital[:5])}")
    with torch.no_grad():
        for name, value in found.items():
            own[name].copy_(value)
    return model, missing


def load_label_head(folder: Path, config: ModelConfig) -> LabelHead | None:
    """The head of a BERT that was fine-tuned for labels; None if config.json names no such BERT.

    Raises:
        InputError: its weights are absent or do not fit.
    """
    architectures = read_json_object(folder / "config.json").get("architectures")
    named = architectures if isinstance(architectures, list) else []
    for architecture in named:
        if architecture not in _LABEL_HEADS:
            continue
        name, of_text, outputs = _LABEL_HEADS[architecture]
        weights = read_weights(folder)
        for needed in (f"{name}.weight", f"{name}.bias", *["bert.pooler.dense.weight"] * of_text):
            if needed not in weights:
                raise InputError(f"{folder} is a {architecture}, but {WEIGHTS} has no {needed}")
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        fits = len(outputs) in (1, len(weight))
        if weight.shape[1:] != (config.hidden_size,) or bias.shape != weight.shape[:1] or not fits:
            raise InputError(
                f"{folder}: {name} of a {architecture} of hidden size {config.hidden_size} is "
                f"{tuple(weight.shape)}, its bias {tuple(bias.shape)}"
            )
        head = LabelHead(config.hidden_size, len(weight), of_text, outputs)
        head.scores.load_state_dict({"weight": weight, "bias": bias})
        return head
    return None


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes one safetensors file and forces it to the disk."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        sync_file(path)
    except OSError as error:
        raise write_error(path, error) from error
    except SafetensorError as error:
        raise InputError(
            f"cannot write {path}: {error}; what was there before is unchanged"
        ) from error


def write_model(folder: Path, model: MaskedLM, vocab: Vocab, card: str) -> None:
    """Writes all files of a Hugging Face folder into an existing folder.

    config.json, model.safetensors, vocab.txt, tokenizer.json, tokenizer_config.json, README.md.
    """
    state = {n: p for n, p in model.named_parameters() if not n.startswith("student.")}
    write_tensors(folder / WEIGHTS, to_hugging_face(state))
    # Dropout is a setting of a run; a folder carries BERT's, for whoever fine-tunes it.
    config = replace(
        model.config,
        pad_token_id=vocab.pad,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    write_json(
        folder / "config.json",
        {
            "architectures": ["BertForMaskedLM"],
            "model_type": "bert",
            **to_dict(config),
            "position_embedding_type": "absolute",
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
        },
    )
    save_tokenizer_files(vocab, folder)
    atomic_write(folder / "README.md", card)
