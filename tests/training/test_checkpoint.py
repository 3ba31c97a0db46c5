"""Checkpoints: whole or not there, whatever happens while they are written."""

import json
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from mvbert.config import TrainConfig
from mvbert.errors import InputError
from mvbert.model import huggingface
from mvbert.model.weights import read_tensors
from mvbert.training import checkpoint
from mvbert.training.device import Device
from mvbert.training.optim import Optimizer, trained_parameters

CONFIG = TrainConfig(keep_last=1, keep_best=0)
CPU = Device(torch.device("cpu"), None, "set by the test")


class Saved:
    """A model whose weights and moments are all one number."""

    def __init__(self) -> None:
        self.module = nn.Linear(3, 2)
        self.optimizer = Optimizer(self.module, CONFIG, CPU)
        for parameter in self.module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step(skip=torch.tensor(False))

    def fill(self, number: float) -> None:
        with torch.no_grad():
            for parameter in self.module.parameters():
                for tensor in (parameter, *self.optimizer.state(parameter).values()):
                    tensor.fill_(number)

    def save(
        self, folder: Path, step: int, number: float, config: TrainConfig = CONFIG, heldout=None
    ) -> None:
        self.fill(number)
        checkpoint.save(
            folder,
            {"step": step, "window": {"sum": number}, "heldout": heldout},
            self.module,
            self.optimizer,
            self.write_model,
            config.keep_last,
            config.keep_best,
        )

    def write_model(self, folder: Path) -> None:
        huggingface.write_tensors(folder / "model.safetensors", self.module.state_dict())

    def loaded(self, folder: Path) -> set[float]:
        """All numbers in a checkpoint; a whole one has a single one."""
        self.fill(-1)
        self.module.load_state_dict(read_tensors(folder / "model.safetensors"))
        step, state = checkpoint.load(folder, self.module, self.optimizer)
        assert step == int(folder.name[-8:])
        tensors = [p.detach() for p in self.module.parameters()]
        for _, parameter in trained_parameters(self.module):
            tensors += self.optimizer.state(parameter).values()
        return {state["window"]["sum"], *(float(x) for t in tensors for x in t.flatten())}


@pytest.mark.parametrize("again", [False, True], ids=["new-step", "same-step-again"])
def test_a_kill_before_any_file_operation_leaves_a_whole_checkpoint(tmp_path, in_child, again):
    saved = Saved()
    step = 1 if again else 2
    found, kills, killed = [], 0, True
    while killed:
        folder = tmp_path / str(kills)
        saved.save(folder, 1, 10.0)
        killed = in_child(lambda folder=folder: saved.save(folder, step, 20.0), kills)
        newest = checkpoint.newest(folder, pytest.fail)
        assert newest is not None, kills
        found.append(saved.loaded(newest))
        # Nothing is left that a later save does not clear away, and that save succeeds.
        saved.save(folder, 3, 30.0)
        assert [p.name for p in folder.iterdir()] == ["step-00000003"]
        kills += 1
    # All of the old one until the folder changes its name, all of the new one from there on.
    changed = found.index({20.0})
    assert found == [{10.0}] * changed + [{20.0}] * (len(found) - changed)
    assert changed > 20  # the hook has seen the operations before
    assert len(found) - changed > 3  # and after


def test_a_disk_that_is_full_anywhere_leaves_the_last_checkpoint(tmp_path):
    """Writing fails at a limit on the size of files, for every size up to the largest file."""
    saved = Saved()
    saved.save(tmp_path, 1, 1.0)
    sizes = {path.stat().st_size for path in (tmp_path / "step-00000001").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in sorted({0, 1, *sizes, *(size - 1 for size in sizes)})[:-1]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(InputError, match=r"cannot write .*step-00000002"):
                saved.save(tmp_path, 2, 2.0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"], limit
        assert saved.loaded(tmp_path / "step-00000001") == {1.0}
    saved.save(tmp_path, 2, 2.0)


def test_the_best_are_kept_besides_the_newest(tmp_path):
    saved = Saved()
    config = TrainConfig(keep_last=2, keep_best=2)
    losses = [3.0, 1.0, 2.0, None, 2.5, 1.5, None, 4.0]
    worthy = []
    for step, loss in enumerate(losses):
        worthy.append(checkpoint.is_best(tmp_path, loss, config.keep_best))
        saved.save(tmp_path, step, 0.0, config, loss)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == [f"step-{step:08d}" for step in (1, 5, 6, 7)]
    assert checkpoint.best(tmp_path) == "step-00000001"
    assert worthy == [True, True, True, False, False, True, False, False]
    assert not checkpoint.is_best(tmp_path, 0.0, 0)


@pytest.mark.parametrize("name", ["../b", "/etc/passwd", "a/../../b", "..", ".", "", "sub/a"])
def test_a_manifest_that_leaves_its_folder_is_refused(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (folder / "a", tmp_path / "b"):
        path.write_text("x")
    checkpoint.write_manifest(folder)
    assert checkpoint.check_manifest(folder) is None
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["a"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "outside the folder" in checkpoint.check_manifest(folder)


def test_a_link_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("x")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("x")
    checkpoint.write_manifest(folder)
    (folder / "a").unlink()
    (folder / "a").symlink_to(tmp_path / "out")
    assert "is missing" in checkpoint.check_manifest(folder)
