"""The C and C++ programs beside this file: sanitized, counted by callgrind, emulated."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mvbert import _core

CHECKS = sorted(path.stem for path in Path(__file__).parent.glob("*_check.c*"))
SANITIZERS = ["address,undefined", "thread"]
QUICK = {"tokenizer_check": ["300"]}  # texts


def _run(*command, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, **kwargs
    )


def _configure(root, folder: Path, *options: str) -> None:
    for tool in ("cmake", "ninja"):
        if not shutil.which(tool):
            pytest.skip(f"needs {tool}")
    configure = _run(
        "cmake", "-S", root, "-B", folder, "-G", "Ninja", "-DMVBERT_PYTHON=OFF",
        "-DMVBERT_CHECKS=ON", "-DCMAKE_C_FLAGS=-Werror", "-DCMAKE_CXX_FLAGS=-Werror", *options,
    )  # fmt: skip
    assert configure.returncode == 0, configure.stderr


def _folder(root, name: str) -> Path:
    """Where one set of objects stays: a second run compiles what has changed."""
    folder = root / "build" / "checks" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _build(root, folder: Path, sanitize: str) -> Path:
    source = folder / "empty.cc"
    source.write_text("int main() {}\n")
    flag = [f"-fsanitize={sanitize}"] if sanitize else []
    if _run("c++", *flag, source, "-o", folder / "empty").returncode:
        pytest.skip(f"the compiler has no runtime for {sanitize or 'C++'}")
    _configure(root, folder, f"-DMVBERT_SANITIZE={sanitize}")
    build = _run("cmake", "--build", folder)
    assert build.returncode == 0, build.stdout + build.stderr
    return folder


@pytest.fixture(scope="module", params=SANITIZERS, ids=["asan-ubsan", "tsan"])
def sanitized(request, root) -> Path:
    """A folder with all checks, built with one set of sanitizers."""
    return _build(root, _folder(root, request.param.replace(",", "-")), request.param)


@pytest.fixture(scope="module")
def plain(root) -> Path:
    """A folder with all checks, built as users' builds are."""
    return _build(root, _folder(root, "plain"), "")


@pytest.mark.parametrize("check", CHECKS)
def test_sanitized(sanitized, check):
    result = _run(sanitized / check, *QUICK.get(check, []), timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_check(plain, check):
    result = _run(plain / check, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr


# ---- counted work, which unlike time is the same on a busy machine ----------------------------


def test_work_grows_as_the_text_does(root):
    """On long runs of every kind of character, and on one kind among another."""
    folder = _folder(root, "counted")
    _configure(root, folder)
    build = _run("cmake", "--build", folder, "--target", "linear_work")
    assert build.returncode == 0, build.stdout + build.stderr
    result = _run(folder / "linear_work", timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr


# ---- instructions, which unlike time are the same on a busy machine ------------------------------

# What was counted when this was written, with GCC 12 and AVX2 (which is all that valgrind knows, so
# machines with AVX-512 count the same). A change of more than a tenth is a change to look at: if it
# is meant, write the new number.
INSTRUCTIONS = {
    ("encode_check", "plain"): 26.3,  # a byte of text
    ("encode_check", "mixed"): 29.5,  # a byte of text
    ("encode_check", "spans"): 36.2,  # a byte of text
    ("mixer_check", "500"): 61.8,  # a piece
}
COLLECTED = {"encode_check": "*Measured*", "mixer_check": "mvbert::Mixer::Read(*"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "argument"),
    INSTRUCTIONS,
    ids=["encode-plain", "encode-mixed", "encode-spans", "mixer"],
)
def test_instructions(plain, check, argument, tmp_path):
    if not shutil.which("valgrind"):
        pytest.skip("needs valgrind")
    if "avx2" not in _core.instruction_sets():
        pytest.skip("needs a machine with AVX2, for which the numbers are")
    result = _run(
        "valgrind", "--tool=callgrind", f"--callgrind-out-file={tmp_path / 'out'}",
        f"--toggle-collect={COLLECTED[check]}", plain / check, argument,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    instructions = int(re.search(r"Collected : (\d+)", result.stderr)[1])
    units = int(re.match(r"\d+", result.stdout)[0])
    expected = INSTRUCTIONS[check, argument]
    assert 0.9 * expected < instructions / units < 1.1 * expected, instructions / units


# ---- NEON ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_neon(root):
    """The checks of the words and of the ids, built for AArch64 and run in an emulator."""
    for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64"):
        if not shutil.which(tool):
            pytest.skip(f"needs {tool}")
    folder = _folder(root, "neon")
    _configure(
        root, folder, "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        "-DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc", "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
    )  # fmt: skip
    build = _run("cmake", "--build", folder)
    assert build.returncode == 0, build.stdout + build.stderr
    emulate = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]
    for check in CHECKS:
        result = _run(*emulate, folder / check, *QUICK.get(check, []), timeout=600)
        assert result.returncode == 0, result.stdout + result.stderr
    result = _run(*emulate, folder / "encode_check", "plain", timeout=600)
    assert result.stdout.endswith(", neon\n")
