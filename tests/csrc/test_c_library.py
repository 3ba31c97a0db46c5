"""The C library as users have it: installed, linked by pkg-config and CMake, and called."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mvbert.text.tokenizer import WordPieceTokenizer


def run(*command, **kwargs) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **kwargs
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(root, tmp_path_factory) -> Path:
    """A prefix with the library, moved after installing: nothing in it names its place."""
    for tool in ("cmake", "ninja", "cc", "c++"):
        if not shutil.which(tool):
            pytest.skip(f"needs {tool}")
    folder = tmp_path_factory.mktemp("c")
    options = ["-DMVBERT_PYTHON=OFF", "-DMVBERT_C=ON", "-DCMAKE_INSTALL_LIBDIR=lib"]
    run("cmake", "-S", root, "-B", folder / "build", "-G", "Ninja", *options)
    run("cmake", "--build", folder / "build", "--target", "shared", "static")
    run("cmake", "--install", folder / "build", "--prefix", folder / "first")
    return (folder / "first").rename(folder / "prefix")


@pytest.fixture(scope="module")
def vocab_file(awkward_vocab, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    awkward_vocab(True, True).save(path)
    return path


EXAMPLE = ["[CLS]", "hello", "wor", "##ld", "!", "[SEP]"]


def pieces_of_example(program: Path, vocab: Path, env=None) -> list[str]:
    shown = run(program, vocab, "Hello world!", env=env)
    return [line.split()[1] for line in shown.splitlines()]


@pytest.mark.parametrize("kind", ["shared", "static"])
def test_the_example_by_pkg_config(root, installed, vocab_file, tmp_path, kind):
    if not shutil.which("pkg-config"):
        pytest.skip("needs pkg-config")
    env = {"PKG_CONFIG_PATH": str(installed / "lib" / "pkgconfig"), "PATH": "/usr/bin:/bin"}
    flags = run("pkg-config", "--cflags", "mvbert", env=env).split()
    links = run("pkg-config", "--libs", *(["--static"] * (kind == "static")), "mvbert", env=env)
    links = links.split()
    if kind == "static":
        links[links.index("-lmvbert")] = "-l:libmvbert.a"
    else:
        links.append(f"-Wl,-rpath,{installed / 'lib'}")
    strict = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic"]
    source, program = root / "docs" / "examples" / "encode.c", tmp_path / "encode"
    run("cc", *strict, *flags, source, "-o", program, *links)
    assert pieces_of_example(program, vocab_file) == EXAMPLE
    missing = subprocess.run([program, "no.txt", ""], capture_output=True, text=True, check=False)
    assert missing.returncode == 1
    assert missing.stderr.startswith("cannot read no.txt: ")


@pytest.mark.parametrize("kind", ["shared", "static"])
def test_the_example_by_cmake(root, installed, vocab_file, tmp_path, kind):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(example LANGUAGES C CXX)\n"
        "find_package(mvbert 0.1 REQUIRED)\n"
        f"add_executable(encode {root / 'docs' / 'examples' / 'encode.c'})\n"
        f"target_link_libraries(encode PRIVATE mvbert::{kind})\n"
    )
    build = tmp_path / "build"
    run("cmake", "-S", tmp_path, "-B", build, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={installed}")
    run("cmake", "--build", build)
    assert pieces_of_example(build / "encode", vocab_file) == EXAMPLE


def test_the_shared_library_shows_its_interface_alone(root, installed):
    if not shutil.which("nm"):
        pytest.skip("needs nm")
    library = next((installed / "lib").glob("libmvbert.so.?"))
    shown = run("nm", "--dynamic", "--defined-only", library).splitlines()
    names = {line.split()[-1] for line in shown}
    header = (root / "csrc" / "mvbert.h").read_text()
    # The others are the standard library's, with our types among their parameters.
    ours = {name for name in names if re.match(r"mvbert_|_ZN?K?6mvbert", name)}
    assert ours == set(re.findall(r"^MVBERT_API .*?(mvbert_\w+)\(", header, re.MULTILINE))
    assert len(ours) == 13


class Added(ctypes.Structure):
    _fields_ = (("piece", ctypes.c_char_p), ("id", ctypes.c_int32), ("normalized", ctypes.c_int32))


class Options(ctypes.Structure):
    _fields_ = (
        ("cased", ctypes.c_int32),
        ("keep_accents", ctypes.c_int32),
        ("added", ctypes.POINTER(Added)),
        ("added_count", ctypes.c_size_t),
        ("reserved", ctypes.c_int32 * 8),
    )


@pytest.mark.parametrize(
    ("lowercase", "strip_accents"), [(True, True), (True, False), (False, False)], ids=str
)
def test_ids_are_those_of_python(
    installed, awkward_vocab, awkward_texts, tmp_path, lowercase, strip_accents
):
    library = ctypes.CDLL(str(next((installed / "lib").glob("libmvbert.so.?"))))
    library.mvbert_encode.restype = library.mvbert_encode_spans.restype = ctypes.c_int64
    library.mvbert_piece.restype = ctypes.c_char_p
    vocab = awkward_vocab(lowercase, strip_accents)
    python = WordPieceTokenizer(vocab)
    vocab.save(tmp_path / "vocab.txt")
    added = (Added * 2)(
        *(Added(a.piece.encode(), vocab.ids[a.piece], a.normalized) for a in vocab.added)
    )
    options = Options(not lowercase, lowercase and not strip_accents, added, 2)
    tokenizer = ctypes.c_void_p()
    path = str(tmp_path / "vocab.txt").encode()
    assert library.mvbert_open(path, ctypes.byref(options), ctypes.byref(tokenizer)) == 0
    assert library.mvbert_size(tokenizer) == vocab.size
    ids = np.zeros(50_000, np.int32)
    spans = np.zeros((50_000, 2), np.uint32)
    for text in awkward_texts(2000):
        if any("\ud800" <= char <= "\udfff" for char in text):
            continue  # no UTF-8
        data, size = text.encode(), ctypes.c_size_t(len(text.encode()))
        room = ctypes.c_size_t(len(ids))
        count = library.mvbert_encode(
            tokenizer, data, size, 1, ids.ctypes.data_as(ctypes.c_void_p), room
        )
        assert ids[:count].tolist() == python.encode(text), text
        count = library.mvbert_encode_spans(
            tokenizer, data, size, ids.ctypes.data_as(ctypes.c_void_p),
            spans.ctypes.data_as(ctypes.c_void_p), room,
        )  # fmt: skip
        expected_ids, expected = python.offsets(text)
        assert ids[:count].tolist() == expected_ids.tolist(), text
        assert spans[:count].tolist() == expected.tolist(), text
    assert library.mvbert_piece(tokenizer, vocab.size - 1) == b"Added"
    library.mvbert_free(tokenizer)
