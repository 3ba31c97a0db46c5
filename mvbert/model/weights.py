"""The tensors of a model folder, from safetensors or PyTorch files, under transformers' names.

Nothing in a file is executed: PyTorch files are read with `torch.load(weights_only=True)`, which
refuses everything but tensors. Messages name tensors as the file does.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mvbert.errors import InputError
from mvbert.files import check_readable, read_json_object, sha256_file

WEIGHTS = "model.safetensors"
PYTORCH_WEIGHTS = "pytorch_model.bin"

# What transformers keeps in some files although no model reads it, and the head of next-sentence
# prediction beside that of masked language modelling.
_NEVER_READ = re.compile(r".*\.(position_ids|token_type_ids)$|cls\.seq_relationship\.")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Weights:
    """The tensors of a model folder.

    Attributes:
        folder: the model folder.
        tensors: by transformers' names: `bert.` in front of a bare encoder's, no prefix of
            torch.compile or DataParallel, TensorFlow's gamma and beta renamed.
    """

    def __init__(self, folder: Path, files: Iterable[Path]) -> None:
        self.folder = folder
        self.tensors: dict[str, Tensor] = {}
        self._source: dict[str, tuple[Path, str]] = {}  # file and key of each tensor
        self._read: set[str] = set()
        for path in files:
            for key, tensor in read_tensors(path).items():
                name = _transformers_name(key)
                if name in self._source and self._source[name][1] != key:
                    raise InputError(
                        f"{path} has both {self._source[name][1]} and {key}, which are the same "
                        "tensor of a BERT; remove one of them"
                    )
                self.tensors[name] = tensor
                self._source[name] = path, key

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """A tensor, which counts as read from then on.

        Args:
            shape: the shape by config.json; None allows any.

        Raises:
            InputError: it has another shape, or is quantised or sparse.
        """
        tensor = self.tensors[name]
        self._read.add(name)
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise InputError(
                f"{self.place(name)} is {kind}; quantised or sparse weights are not supported; "
                "save the model in float32, float16 or bfloat16"
            )
        if shape is not None and tensor.shape != shape:
            raise InputError(
                f"{self.place(name)} is {tuple(tensor.shape)}, config.json implies {tuple(shape)}"
            )
        return tensor

    def place(self, name: str) -> str:
        """The file and the key of a tensor, for messages."""
        path, key = self._source[name]
        return f"{path}: {key}"

    def key(self, name: str) -> str:
        """The key that a file of these would have for a tensor that may be missing."""
        if name in self._source:
            return self._source[name][1]
        # As the files write the others: with their prefix, or without `bert.`.
        for known, (_, key) in self._source.items():
            if known.startswith("bert.") and name.startswith("bert."):
                tail = known.removeprefix("bert.").split(".")[0]
                return key[: key.index(tail)] + name.removeprefix("bert.")
        return name

    def missing(self, names: list[str]) -> InputError:
        """The error for missing tensors."""
        paths = {path for path, _ in self._source.values()}
        what = ", ".join(self.key(name) for name in names[:3])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        place = str(paths.pop()) if len(paths) == 1 else str(self.folder)
        example = next((key for _, key in self._source.values()), None)
        hint = f"; the first of its {len(self.tensors)} tensors is {example}" if example else ""
        return InputError(f"{place} has no {what}{more}, which config.json requires{hint}")

    def unread(self) -> str:
        """A sentence about tensors that were not read; empty if there are none."""
        keys = [
            key
            for name, (_, key) in self._source.items()
            if name not in self._read and not _NEVER_READ.match(name)
        ]
        if not keys:
            return ""
        tensors = "1 tensor is" if len(keys) == 1 else f"{len(keys)} tensors are"
        named = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
        return f"{self.folder}: {tensors} not used: {named}"


def read_weights(folder: Path) -> Weights:
    """Reads all tensors of a model folder.

    Raises:
        InputError: no weights, or a file is corrupt or holds more than tensors.
    """
    return Weights(folder, weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """The weight file or files of a model folder, in the order in which transformers looks.

    Raises:
        InputError: there are none, or the index names one that is not in the folder.
    """
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        base = read_json_object(adapter).get("base_model_name_or_path")
        raise InputError(
            f"{folder} is an adapter of {base}, not a model; merge it into that model and save it "
            "(PEFT's merge_and_unload and save_pretrained)"
        )
    for name in (WEIGHTS, PYTORCH_WEIGHTS):
        if os.path.lexists(folder / name):
            return [folder / name]
        index = folder / f"{name}.index.json"
        if os.path.lexists(index):
            return _indexed_files(index)
    raise InputError(f"{folder} has neither {WEIGHTS} nor {PYTORCH_WEIGHTS}")


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map is missing or empty")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise InputError(f"{index} names the file {name!r}, which is outside its folder")
        if not os.path.lexists(index.parent / name):
            raise InputError(f"{index} names {name}, which is missing")
    return [index.parent / name for name in names]


def weights_id(folder: Path) -> str:
    """The SHA-256 of a model folder's weights, or of those of its files one after the other."""
    sums = [sha256_file(path) for path in weight_files(folder)]
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors or PyTorch file.

    Raises:
        InputError: it cannot be read, is not complete, or holds more than tensors.
    """
    check_readable(path)
    if path.suffix != ".safetensors":
        return _read_pytorch(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a complete safetensors file: {error}") from None


def _read_pytorch(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged or hostile file may raise anything.
    except Exception as error:
        unsafe = re.search(r"(?i)unsupported (?:global:? (?:global )?|class )([\w.]+)", str(error))
        if unsafe:
            raise InputError(
                f"{path} contains {unsafe[1]}, which is not a tensor and could run code; "
                "save the weights as safetensors, or from a model you trust"
            ) from None
        # torch's message begins with advice to load the file unsafely.
        reason = str(error).split("WeightsUnpickler error:")[-1].strip()
        reason = (reason.splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{path} is not a complete PyTorch file: {reason}") from None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise InputError(
            f"{path} does not hold a model's state_dict (names and tensors); save the model with "
            "save_pretrained"
        )
    return state


def _transformers_name(key: str) -> str:
    """The transformers name of the tensor that a file names `key`."""
    name = key.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    if name.startswith(("embeddings.", "encoder.", "pooler.")):
        name = f"bert.{name}"
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )
