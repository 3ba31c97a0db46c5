"""The C++ programs beside this file, plain and under sanitizers, without Python in the process."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHECKS = sorted(path.stem for path in Path(__file__).parent.glob("*_check.cc"))
SANITIZERS = ["", "address,undefined", "thread"]


def _run(*command, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, **kwargs
    )


@pytest.fixture(scope="module", params=SANITIZERS, ids=["plain", "asan-ubsan", "tsan"])
def built(request, root, tmp_path_factory) -> Path:
    """A folder with all checks, built with one set of sanitizers."""
    for tool in ("cmake", "ninja"):
        if not shutil.which(tool):
            pytest.skip(f"needs {tool}")
    folder = tmp_path_factory.mktemp("checks")
    source = folder / "empty.cc"
    source.write_text("int main() {}\n")
    flag = [f"-fsanitize={request.param}"] if request.param else []
    if _run("c++", *flag, source, "-o", folder / "empty").returncode:
        pytest.skip(f"the compiler has no runtime for {request.param or 'C++'}")
    configure = _run(
        "cmake", "-S", root, "-B", folder, "-G", "Ninja", "-DMVBERT_PYTHON=OFF",
        "-DMVBERT_CHECKS=ON", f"-DMVBERT_SANITIZE={request.param}",
    )  # fmt: skip
    assert configure.returncode == 0, configure.stderr
    build = _run("cmake", "--build", folder)
    assert build.returncode == 0, build.stdout + build.stderr
    assert "warning:" not in build.stdout, build.stdout
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_check(built, check):
    result = _run(built / check, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_instructions_per_piece(built, tmp_path):
    """Instructions, unlike time, are the same on a busy machine; valgrind knows AVX2 at most."""
    if not shutil.which("valgrind"):
        pytest.skip("needs valgrind")
    if "SANITIZE:STRING=\n" not in (built / "CMakeCache.txt").read_text():
        pytest.skip("needs a build without sanitizers")
    rows = 2000
    result = _run(
        "valgrind", "--tool=callgrind", f"--callgrind-out-file={tmp_path / 'out'}",
        "--toggle-collect=mvbert::Mixer::Read(*", built / "mixer_check", rows,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    instructions = int(re.search(r"Collected : (\d+)", result.stderr)[1])
    assert 20 < instructions / (rows * 128) < 62  # 61 when this was written
