"""Checkpoints: folders written atomically, from which a run resumes bit for bit.

A checkpoint is a Hugging Face folder that also holds the training state:

    step-00000200/   config.json, model.safetensors, vocab.txt ...   the model, usable directly
                     training.safetensors   optimiser moments and parameters outside the model
                     training.json          step, held-out loss, running sums of the log
                     manifest.json          size and SHA-256 of every other file, written last

There is no generator state: rows, masks and dropout are functions of (seed, step).
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from mvbert.errors import InputError
from mvbert.files import PARTIAL, Json, atomic_folder, read_json_object, sha256_file, write_json
from mvbert.model.huggingface import write_tensors
from mvbert.model.weights import WEIGHTS, read_tensors
from mvbert.training.optim import Optimizer, trained_parameters

MANIFEST = "manifest.json"
TRAINING = "training.safetensors"
STATE = "training.json"
_STEP = re.compile(r"step-(\d{8})")


def write_manifest(folder: Path) -> None:
    """Writes the size and SHA-256 of every file in `folder`; without it a folder is incomplete."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"format": "mvbert-checkpoint", "version": 1, "files": files})


def check_manifest(folder: Path, needed: Iterable[str] = ()) -> str | None:
    """Compares a folder with its manifest; returns the first problem, or None if it is complete.

    Args:
        needed: files that must be listed.
    """
    try:
        manifest = read_json_object(folder / MANIFEST)
    except InputError as error:
        return str(error)
    files = manifest.get("files")
    if not isinstance(files, dict):
        return f"{folder / MANIFEST} does not list any files"
    for name in needed:
        if name not in files:
            return f"{folder / MANIFEST} does not list {name}"
    for name, entry in files.items():
        if Path(name).name != name or name in ("", ".", ".."):
            return f"{folder / MANIFEST} lists {name!r}, which is outside the folder"
        path = folder / name
        if path.is_symlink() or not path.is_file():
            return f"{path} is missing"
        if not isinstance(entry, dict) or path.stat().st_size != entry.get("bytes"):
            return f"{path} has {path.stat().st_size} bytes, which differs from the manifest"
        if sha256_file(path) != entry.get("sha256"):
            return f"{path} does not match the SHA-256 in the manifest"
    return None


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def save(
    checkpoints: Path,
    state: dict[str, Json],
    module: nn.Module,
    optimizer: Optimizer,
    write_model: Callable[[Path], None],
    keep_last: int,
    keep_best: int,
) -> None:
    """Writes a checkpoint, then removes all but the newest and the best ones.

    Also removes later ones: they are corrupt, or the run would have resumed from them.

    Args:
        keep_last: number of newest checkpoints to keep.
        keep_best: number of further checkpoints to keep, those with the lowest held-out loss.
        state: contents of training.json: the step, its held-out loss if evaluated, and the rest of
            the loop's state.
    """
    step = int(state["step"])  # type: ignore[arg-type]
    with atomic_folder(step_folder(checkpoints, step), overwrite=True) as partial:
        write_model(partial)
        write_tensors(partial / TRAINING, _training_tensors(module, optimizer))
        write_json(partial / STATE, state)
        write_manifest(partial)
    steps = _steps(checkpoints)
    earlier = [old for old in steps if old <= step]
    losses = {old: _heldout(checkpoints, old) for old in earlier}
    survivors = earlier[-keep_last:] + _best(losses)[:keep_best]
    for old in steps:
        if old not in survivors:
            shutil.rmtree(step_folder(checkpoints, old), ignore_errors=True)


def drop_after(checkpoints: Path, step: int) -> None:
    """Removes checkpoints later than the one that a run resumes from: they are corrupt."""
    for number in _steps(checkpoints):
        if number > step:
            shutil.rmtree(step_folder(checkpoints, number), ignore_errors=True)


def is_best(checkpoints: Path, heldout: float | None, keep_best: int) -> bool:
    """Whether a model with this held-out loss is among the `keep_best` best checkpoints."""
    if heldout is None or not keep_best:
        return False
    losses = {step: _heldout(checkpoints, step) for step in _steps(checkpoints)}
    best = _best(losses)[:keep_best]
    return len(best) < keep_best or heldout < max(losses[step] for step in best)


def best(checkpoints: Path) -> str | None:
    """The name of the checkpoint with the lowest held-out loss."""
    steps = _best({step: _heldout(checkpoints, step) for step in _steps(checkpoints)})
    return step_folder(checkpoints, steps[0]).name if steps else None


def evaluated_step(checkpoints: Path) -> int:
    """The last step whose checkpoint has a held-out loss, or -1."""
    steps = _steps(checkpoints)
    return max((s for s in steps if _heldout(checkpoints, s) < math.inf), default=-1)


def _best(losses: dict[int, float]) -> list[int]:
    """Steps sorted by held-out loss, lowest first, without those that have none."""
    return sorted((s for s, loss in losses.items() if loss < math.inf), key=lambda s: losses[s])


def _heldout(checkpoints: Path, step: int) -> float:
    """Held-out loss of a checkpoint, or infinity if it has none."""
    try:
        loss = read_json_object(step_folder(checkpoints, step) / STATE).get("heldout")
    except InputError:
        return math.inf
    return float(loss) if isinstance(loss, (int, float)) else math.inf


def newest_name(checkpoints: Path, warn: Callable[[str], None]) -> str | None:
    """The name of the newest complete checkpoint, or None."""
    folder = newest(checkpoints, warn)
    return None if folder is None else folder.name


def newest(checkpoints: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint, or None; skips corrupt ones and reports them to `warn`."""
    for stale in checkpoints.glob(f".*{PARTIAL}*"):
        shutil.rmtree(stale, ignore_errors=True)
    for step in reversed(_steps(checkpoints)):
        folder = step_folder(checkpoints, step)
        problem = check_manifest(folder, (WEIGHTS, TRAINING, STATE))
        if problem is None:
            return folder
        warn(f"skipping corrupt checkpoint {folder.name}: {problem}")
    return None


def load(folder: Path, module: nn.Module, optimizer: Optimizer) -> tuple[int, dict[str, Json]]:
    """Restores the training state (the task loads the model); returns step and state."""
    state = read_json_object(folder / STATE)
    if not isinstance(state.get("step"), int) or not isinstance(state.get("window"), dict):
        raise InputError(f"{folder / STATE} has no step or no window")
    tensors = read_tensors(folder / TRAINING)
    with torch.no_grad():
        for name, parameter in trained_parameters(module):
            if f"parameter.{name}" in tensors:
                parameter.copy_(tensors[f"parameter.{name}"])
            for key, value in optimizer.state(parameter).items():
                if f"{key}.{name}" not in tensors:
                    raise InputError(f"{folder / TRAINING} has no {key} of {name}")
                value.copy_(tensors[f"{key}.{name}"])
    return state["step"], state  # type: ignore[return-value]


def _training_tensors(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Optimiser moments by parameter name, and parameters that are not in the model files."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained_parameters(module):
        if not name.startswith("model."):
            tensors[f"parameter.{name}"] = parameter.detach().cpu().contiguous()
        for key, value in optimizer.state(parameter).items():
            tensors[f"{key}.{name}"] = value.detach().cpu().contiguous()
    return tensors


def _steps(checkpoints: Path) -> list[int]:
    """Steps of all checkpoint folders, complete or not, ascending."""
    if not checkpoints.is_dir():
        return []
    matches = (_STEP.fullmatch(path.name) for path in checkpoints.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in matches if match)
