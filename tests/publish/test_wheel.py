"""A model's folder as a package: pip installs it, Python and mvbert find the files."""

import base64
import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("torch")

from mvbert.model.huggingface import find_model
from mvbert.publish import wheel as wheels

CARD = """---
license: apache-2.0
library_name: transformers
---
# A tiny model
"""


@pytest.fixture
def model(training_inputs, tmp_path) -> Path:
    """A model with a card, a licence, and what does not belong into a package."""
    folder = shutil.copytree(training_inputs / "teacher", tmp_path / "model")
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("Do as you like.\n")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "big.safetensors").write_text("no")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


def install(wheel: str, folder: Path) -> Path:
    """Installs into a fresh environment; its packages' folder."""
    # (Its metadata: finding the module makes setuptools warn if distutils was imported before.)
    if not [*importlib.metadata.distributions(name="pip")]:
        pytest.skip("needs pip")
    venv.create(folder, with_pip=False)
    command = [sys.executable, "-m", "pip", "--python", str(folder), "install", "--no-index",
               "--no-deps", "--quiet", wheel]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("lib/python*/site-packages"))


def test_it_is_installed_and_loaded(model, tmp_path, verb, monkeypatch):
    command = ["export", model, "--wheel", "My.tiny-model", "-o", tmp_path / "dist"]
    report, shown = verb(*command, "--version", "1.2")
    assert report["output"] == str(tmp_path / "dist" / "my_tiny_model-1.2-py3-none-any.whl")
    assert report["bytes"] == Path(report["output"]).stat().st_size
    assert f"pip install {report['output']}" in shown
    packages = install(report["output"], tmp_path / "env")

    # In the fresh environment, which has neither mvbert nor torch.
    code = "import my_tiny_model as m; print(m.path(), m.__version__)"
    python = tmp_path / "env" / "bin" / "python"
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True)
    place, version = done.stdout.split()
    assert version == "1.2"
    installed = {p.relative_to(place).as_posix() for p in Path(place).rglob("*") if p.is_file()}
    assert installed == {*report["files"]} == {
        "1_Pooling/config.json", "LICENSE", "README.md", "config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "vocab.txt",
    }  # fmt: skip
    for file in installed:
        assert Path(place, file).read_bytes() == (model / file).read_bytes()

    # By its name it is a teacher or a model of every verb.
    monkeypatch.syspath_prepend(str(packages))
    assert find_model("my-tiny-model") == find_model("My.tiny-model") == Path(place)
    transformers = pytest.importorskip("transformers")
    assert transformers.AutoModel.from_pretrained(place).config.hidden_size == 32


def test_what_is_inside(model, tmp_path):
    report = wheels.run_wheel(str(model), tmp_path / "a", "tiny")
    again = wheels.run_wheel(str(model), tmp_path / "b", "tiny")
    first, second = Path(report["output"]), Path(again["output"])
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        metadata = archive.read("tiny-0.1.0.dist-info/METADATA").decode()
        record = archive.read("tiny-0.1.0.dist-info/RECORD").decode()
        for line in record.splitlines()[:-1]:
            name, digest, size = line.split(",")
            data = archive.read(name)
            assert int(size) == len(data)
            code = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            assert digest == f"sha256={code}"
    assert [line.split(",")[0] for line in record.splitlines()] == names
    assert len(names) == len({*names})
    head, _, body = metadata.partition("\n\n")
    assert "License-Expression: Apache-2.0" in head.splitlines()
    assert "License-File: LICENSE" in head.splitlines()
    assert body == CARD
    assert "tiny-0.1.0.dist-info/licenses/LICENSE" in names


def test_an_export_is_packed_too(training_inputs, model, tmp_path, verb):
    pytest.importorskip("onnx", reason="needs onnx")
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    corpus = training_inputs / "corpus"
    verb("export", model, "-o", tmp_path / "web", "--corpus", corpus)
    report, _ = verb("export", tmp_path / "web", "--wheel", "tiny-web", "-o", tmp_path / "dist")
    assert {"onnx/model.onnx", "README.md", "LICENSE", "config.json"} <= {*report["files"]}
    assert report["license"] == "apache-2.0"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--wheel", "0tiny"], "'0tiny' cannot name a package"),
        (["--wheel", "a/b"], "'a/b' cannot name a package"),
        (["--wheel", ""], "'' cannot name a package"),
        (["--wheel", "json"], "Python already has a module json"),
        (["--wheel", "class"], "Python already has a module class"),
        (["--wheel", "tiny", "--version", "one"], "--version is 'one', expected one like 0.1.0"),
        (["--wheel", "tiny", "--int8"], "--int8 is not for --wheel"),
        (["--version", "2.0"], "--version is for --wheel NAME"),
    ],
    ids=str,
)
def test_bad_options(options, complaint, model, tmp_path, refused):
    refused(["export", model, "-o", tmp_path / "dist", *options], complaint)
    assert not (tmp_path / "dist").exists()


def test_bad_folders(model, tmp_path, refused):
    command = ["export", model, "--wheel", "tiny", "-o", tmp_path / "dist"]
    (model / "LICENSE").unlink()
    (model / "README.md").write_text("# No licence here\n\nlicense: mit\n")
    refused(command, f"{model} has no file LICENSE", "give --license")
    (model / "README.md").write_bytes(b"\xff\xfe")
    refused([*command, "--license", "MIT"], "README.md is not UTF-8 text (byte 0)")
    (model / "README.md").write_text("")
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    refused([*command, "--license", "MIT"], "model.safetensors is a Git LFS pointer")
    (model / "model.safetensors").unlink()
    refused([*command, "--license", "MIT"], "has no config.json with weights beside it")
    assert not (tmp_path / "dist").exists()
    (model / "model.safetensors").write_bytes(weights)
    assert wheels.run_wheel(str(model), tmp_path / "dist", "tiny", licence="MIT")["bytes"] > 0
    refused([*command, "--license", "MIT"], "exists; give another --version or allow overwriting")
    wheels.run_wheel(str(model), tmp_path / "dist", "tiny", licence="MIT", overwrite=True)
