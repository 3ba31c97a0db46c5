"""The test set-up itself: the import path is clean, and unwritten memory is poison."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest


def from_package(statement: str):
    """Evaluates a statement as if a module of the package had written it."""
    scope = {"__name__": "mvbert.pretended", "np": np}
    if "torch" in statement:
        scope["torch"] = pytest.importorskip("torch")
    return eval(statement, scope)


def test_the_root_does_not_shadow_kernels(root):
    spec = importlib.util.find_spec("kernels")
    assert spec is None or not str(spec.origin).startswith(str(root))


@pytest.mark.parametrize(
    "way", [["pytest"], ["-m", "pytest"], ["-P", "-m", "pytest"]], ids=" ".join
)
def test_however_pytest_is_called_the_root_is_off_the_path(root, way):
    if way == ["pytest"]:
        command = [sys.executable, "-c", "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"]
    elif "-P" in way and sys.version_info < (3, 11):
        pytest.skip("python -P came with Python 3.11")
    else:
        command = [sys.executable, *way]
    this = "tests/test_conftest.py::test_the_root_does_not_shadow_kernels"
    done = subprocess.run(
        [*command, "-q", this], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


@pytest.mark.parametrize(
    "statement",
    ["torch.empty(3)", "torch.empty_like(torch.zeros(2))", "torch.zeros(2).new_empty(4)"],
)
def test_the_package_gets_nan_from_torch(statement):
    assert from_package(statement).isnan().all()


def test_the_package_gets_indices_out_of_range_from_torch():
    assert (from_package("torch.empty(3, dtype=torch.int32)") == 2**30 - 1).all()


def test_the_package_gets_poison_from_numpy():
    assert np.isnan(from_package("np.empty(3)")).all()
    assert (from_package("np.empty(3, np.int32)") == 2**30 - 1).all()
    assert (from_package("np.empty_like(np.zeros(2, np.uint8))") == 127).all()
