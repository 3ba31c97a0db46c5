"""Sentence embeddings as in sentence-transformers: pooling, dense layers, normalisation.

Read from a folder's modules.json, in which sentence-transformers lists its modules in order; other
modules are refused. Written the same way beside exported graphs. The same computation as ONNX nodes
is `_pooled` in onnx_graph.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvbert.errors import InputError
from mvbert.files import Json, read_json, read_json_object, sync_folder, write_json
from mvbert.model.huggingface import write_tensors
from mvbert.model.weights import WEIGHTS, read_weights

POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens")
ACTIVATIONS = {"Identity": None, "Tanh": torch.tanh}


@dataclass(frozen=True)
class Step:
    """A step after pooling: a dense layer, or normalisation if it has no weight."""

    weight: Tensor | None = None  # [out, in]
    bias: Tensor | None = None  # [out]
    activation: str = "Identity"


@dataclass(frozen=True)
class Pooling:
    """Computes a text's embedding from the hidden states of its pieces.

    Args:
        mode: one of POOLINGS.
        steps: the steps after pooling, in order.
    """

    mode: str = "mean"
    steps: tuple[Step, ...] = field(default=(), repr=False)

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden [B, T, H], mask [B, T] -> [B, width]."""
        counts = mask.to(hidden.dtype)[..., None]
        total = counts.sum(1).clamp_min(1.0)
        if self.mode == "cls":
            x = hidden[:, 0]
        elif self.mode == "max":
            x = hidden.masked_fill(counts == 0, -1e9).amax(1)
        else:
            root = total.sqrt() if self.mode == "mean_sqrt_len_tokens" else total
            x = (hidden * counts).sum(1) / root
        for step in self.steps:
            if step.weight is None:
                x = F.normalize(x, dim=-1)
                continue
            x = F.linear(x, step.weight, step.bias)
            function = ACTIVATIONS[step.activation]
            x = x if function is None else function(x)
        return x

    def width(self, hidden_size: int) -> int:
        """Length of the embedding."""
        widths = [len(step.weight) for step in self.steps if step.weight is not None]
        return [hidden_size, *widths][-1]

    def __str__(self) -> str:
        names = ["normalised" if s.weight is None else f"dense {len(s.weight)}" for s in self.steps]
        return ", ".join([self.mode, *names])


def read_pooling(folder: Path, hidden_size: int) -> Pooling:
    """The pooling of a sentence-transformers folder; the mean if no modules.json names it.

    Args:
        folder: the model's; older layouts have modules.json in the folder above.

    Raises:
        InputError: a module or a setting is not supported.
    """
    root, path = folder, folder / "modules.json"
    if not path.exists():
        folder = folder.resolve()
        root, path = folder.parent, folder.parent / "modules.json"
        if not path.exists() or all(root / _path(m) != folder for m in _modules(path)):
            return Pooling()
    mode: str | None = None
    steps: list[Step] = []
    width = hidden_size
    for module in _modules(path):
        kind = module["type"].rsplit(".", 1)[-1]
        part = root / _path(module)
        if kind in ("Transformer", "BERT") and mode is None and part == folder:
            continue
        if kind == "Pooling" and mode is None:
            mode = _mode(part / "config.json")
        elif kind == "Normalize" and mode is not None:
            steps.append(Step())
        elif kind == "Dense" and mode is not None:
            steps.append(_dense(part, width))
            width = len(steps[-1].weight)  # type: ignore[arg-type]
        elif kind != "Dropout":  # has no effect after training
            raise InputError(
                f"{path}: the module {module['type']} (path {module.get('path')!r}) is not "
                "supported at this position; expected Transformer, Pooling, then Dense, Normalize "
                "or Dropout"
            )
    return Pooling(mode or "mean", tuple(steps))


def _modules(path: Path) -> list[dict[str, Any]]:
    modules = read_json(path)
    if not isinstance(modules, list):
        raise InputError(f"{path}: expected a list of modules")
    for module in modules:
        if not isinstance(module, dict) or not isinstance(module.get("type"), str):
            raise InputError(f"{path}: {module!r} is not a module with a type")
    return modules


def _path(module: dict[str, Any]) -> str:
    return str(module.get("path") or "")


def _mode(path: Path) -> str:
    config = read_json_object(path)
    named = config.get("pooling_mode")
    flags = {
        key.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens"): key
        for key, value in config.items()
        if key.startswith("pooling_mode_") and value
    }
    configured = [named] if isinstance(named, str) else [*flags]
    known = {name.removesuffix("_tokens"): name for name in POOLINGS}
    modes = [known.get(str(name).removesuffix("_tokens"), "") for name in configured]
    if len(modes) != 1 or not modes[0]:
        what = ", ".join(map(str, configured)) or "none"
        raise InputError(
            f"{path}: the pooling is {what}; only one of {', '.join(known)} is supported"
        )
    return modes[0]


def _dense(folder: Path, width: int) -> Step:
    config: dict[str, Any] = read_json_object(folder / "config.json")
    name = str(config.get("activation_function", "Tanh")).rsplit(".", 1)[-1]
    if name not in ACTIVATIONS:
        raise InputError(
            f"{folder / 'config.json'}: activation_function is "
            f"{config.get('activation_function')!r}; only {' and '.join(ACTIVATIONS)} are supported"
        )
    weights = read_weights(folder)
    if "linear.weight" not in weights:
        raise weights.missing(["linear.weight"])
    weight = weights.read("linear.weight").float()
    if weight.ndim != 2 or weight.shape[1] != width:
        raise InputError(
            f"{weights.place('linear.weight')} is {tuple(weight.shape)}, expected [out, {width}]"
        )
    bias = weights.read("linear.bias", (len(weight),)).float() if "linear.bias" in weights else None
    return Step(weight, bias, name)


def write_pooling(folder: Path, pooling: Pooling, hidden_size: int, max_length: int) -> None:
    """Writes the files by which sentence-transformers pools as `pooling` does.

    Args:
        folder: the model's, existing.
        max_length: texts are cut to so many pieces.
    """
    kinds = ["Dense" if step.weight is not None else "Normalize" for step in pooling.steps]
    parts = [f"{i}_{kind}" for i, kind in enumerate(["Pooling", *kinds], 1)]
    modules: list[Json] = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(
            zip(["", *parts], ["Transformer", "Pooling", *kinds], strict=True)
        )
    ]
    write_json(folder / "modules.json", modules)
    write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False}
    )
    keys = {
        "cls": "cls_token",
        "max": "max_tokens",
        "mean": "mean_tokens",
        "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    }
    flags: dict[str, Json] = {
        f"pooling_mode_{key}": mode == pooling.mode for mode, key in keys.items()
    }
    width = hidden_size
    for path, step in zip(parts, [None, *pooling.steps], strict=True):
        (folder / path).mkdir()
        if step is None:
            write_json(
                folder / path / "config.json", {"word_embedding_dimension": hidden_size} | flags
            )
        elif step.weight is not None:
            tensors = {"linear.weight": step.weight}
            if step.bias is not None:
                tensors["linear.bias"] = step.bias
            write_tensors(folder / path / WEIGHTS, tensors)
            module = {"Identity": "linear.Identity", "Tanh": "activation.Tanh"}[step.activation]
            write_json(
                folder / path / "config.json",
                {
                    "in_features": width,
                    "out_features": len(step.weight),
                    "bias": step.bias is not None,
                    "activation_function": f"torch.nn.modules.{module}",
                },
            )
            width = len(step.weight)
        sync_folder(folder / path)
