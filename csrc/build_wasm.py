"""Builds the tokenizer as WebAssembly: python csrc/build_wasm.py, with Emscripten's em++ on PATH.

Writes mvbert/publish/page/tokenizer.wasm and, beside it, tokenizer.wasm.json: the version of the
compiler and checksums of the sources and of the module. tests/publish/test_wasm.py compares them
with the sources that stand here, and rebuilds where it finds the same compiler.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "mvbert" / "publish" / "page" / "tokenizer.wasm"

# Everything from csrc/mvbert.h that JavaScript calls.
EXPORTS = (
    "malloc", "free", "mvbert_from_memory", "mvbert_size", "mvbert_piece", "mvbert_id",
    "mvbert_encode", "mvbert_encode_spans", "mvbert_encode_batch", "mvbert_batch_free",
    "mvbert_error_message",
)  # fmt: skip

# Without JavaScript of Emscripten's: the module asks for a function or two of WASI. With native
# exceptions and memory.copy, which browsers have had since 2022; without SIMD: it runs everywhere.
FLAGS = (
    "-std=c++17", "-O2", "-fwasm-exceptions", "-mbulk-memory", "-DNDEBUG", "-Wall", "-Wextra",
    "--no-entry", "-sSTANDALONE_WASM", "-sALLOW_MEMORY_GROWTH", "-sEXPORTED_FUNCTIONS="
    + ",".join(f"_{name}" for name in EXPORTS),
)  # fmt: skip


def sources() -> list[Path]:
    """The C library's sources, as CMakeLists.txt lists them."""
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    names = re.search(r"set\(C_SOURCES.*?foreach\(name (.*?)\)", text, re.S)
    if names is None:
        sys.exit("CMakeLists.txt lists no C_SOURCES")
    return [ROOT / "csrc" / f"{name}.cc" for name in names[1].split()]


def source_hash() -> str:
    """SHA-256 over the flags and the code the module is made from, without comments and layout."""
    files = {*sources()}
    pending = list(files)
    while pending:
        text = pending.pop().read_text(encoding="utf-8")
        for name in re.findall(r'^#include "(\w+\.(?:h|inc))"', text, re.M):
            header = ROOT / "csrc" / name
            if header not in files:
                files.add(header)
                pending.append(header)
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted(files):
        code = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.S)
        digest.update(f"\n{path.name} {''.join(code.split())}".encode())
    return digest.hexdigest()


def environment() -> dict[str, str]:
    """Without PYTHONSAFEPATH: em++ is a Python script that imports what lies beside it."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}


def compiler() -> str | None:
    """The first line of `em++ --version`; None if there is none."""
    try:
        done = subprocess.run(
            ["em++", "--version"], capture_output=True, text=True, check=True, env=environment()
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.splitlines()[0]


def build(target: Path) -> None:
    """Builds the module; the same compiler makes the same bytes of the same sources."""
    package = (ROOT / "mvbert" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.*)"$', package, re.M)
    if version is None:
        sys.exit("mvbert/__init__.py has no __version__")
    with tempfile.TemporaryDirectory() as scratch:
        info = Path(scratch, "build_info.cc")
        info.write_text(
            '#include "build_info.h"\nnamespace mvbert {\n'
            f'const char* const kVersion = "{version[1]}";\n'
            'const char* const kSourceHash = "";\n}\n'
        )
        command = ["em++", *FLAGS, f"-I{ROOT / 'csrc'}", *map(str, sources()), str(info)]
        subprocess.run([*command, "-o", str(target)], check=True, env=environment())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--out", type=Path, default=TARGET, help=f"default: {TARGET.name}")
    target = parser.parse_args().out
    version = compiler()
    if version is None:
        sys.exit("this needs em++ of Emscripten (Debian: apt-get install emscripten) on PATH")
    build(target)
    target.chmod(0o644)  # em++ makes it a program
    data = target.read_bytes()
    facts = {
        "compiler": version,
        "sources": source_hash(),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    target.with_name(target.name + ".json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"{target}: {len(data):,} bytes")


if __name__ == "__main__":
    main()
