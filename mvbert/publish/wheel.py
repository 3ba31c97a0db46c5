"""A model's folder as a Python package of data files, for people without a hub.

    import NAME; NAME.path()   the folder: config.json, weights, vocabulary, licence, card

The wheel is written here, byte for byte the same for the same folder; no build tool runs.
"""

from __future__ import annotations

import base64
import hashlib
import keyword
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from mvbert import __version__
from mvbert.errors import InputError
from mvbert.files import LICENCE_FILE, Json, atomic_file, check_readable
from mvbert.model.huggingface import find_model
from mvbert.progress import Progress

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_VERSION = re.compile(r"\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?")
# Model cards name licences in lower case; a wheel's metadata wants SPDX's spelling.
_SPDX = ["Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "CC-BY-3.0", "CC-BY-4.0",
         "CC-BY-SA-3.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "GPL-3.0-only",
         "LGPL-3.0-only", "AGPL-3.0-only", "MPL-2.0", "ISC", "Unlicense"]  # fmt: skip
_INDEX_LIMIT = 100_000_000  # bytes that PyPI takes without asking

_INIT = '''\
"""{summary}"""

from pathlib import Path

__version__ = "{version}"


def path() -> Path:
    """The model's folder: configuration, weights, vocabulary, licence, card."""
    return Path(__file__).resolve().parent / "model"
'''


def run_wheel(
    name: str,
    out: Path,
    package: str,
    *,
    version: str = "0.1.0",
    licence: str | None = None,
    overwrite: bool = False,
) -> dict[str, Json]:
    """Writes OUT/PACKAGE-VERSION-py3-none-any.whl with all files of a model's folder.

    Args:
        name: a name for mvbert.model.huggingface.find_model, or a folder of `mvbert export`.
        package: what pip installs; imported with `_` for other signs.
        licence: SPDX identifier; None: the card's.

    Raises:
        InputError: the folder holds no model or no licence, the name cannot be a package's, or the
            wheel exists.
    """
    module = _module(package)
    if not _VERSION.fullmatch(version):
        raise InputError(f"--version is {version!r}, expected one like 0.1.0 (PEP 440)")
    folder = find_model(name)
    files = _files(folder)
    wheel = out / f"{module}-{version}-py3-none-any.whl"
    if wheel.exists() and not overwrite:
        raise InputError(f"{wheel} exists; give another --version or allow overwriting")
    card = _text(folder / "README.md") if "README.md" in files else ""
    licence = licence or _licence_of_card(card)
    licences = [file for file in files if "/" not in file and LICENCE_FILE.fullmatch(file)]
    if licence is None and not licences:
        raise InputError(
            f"{folder} has no file LICENSE, and no README.md that begins with a line license:; add "
            "one, or give --license"
        )
    progress = Progress("export")
    summary = f"The model {package}, as files"
    info = f"{module}-{version}.dist-info"
    texts = {
        f"{module}/__init__.py": _INIT.format(summary=summary, version=version),
        f"{module}/py.typed": "",
        f"{info}/METADATA": _metadata(package, version, summary, licence, licences, card),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: mvbert ({__version__})\n"
        "Root-Is-Purelib: true\nTag: py3-none-any\n",
    }
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(wheel) as handle, zipfile.ZipFile(handle, "w") as archive:
        record = [_add(archive, f"{module}/model/{file}", folder / file) for file in files]
        record += [_add(archive, f"{info}/licenses/{file}", folder / file) for file in licences]
        record += [_add(archive, path, text.encode()) for path, text in texts.items()]
        _add(archive, f"{info}/RECORD", "".join([*record, f"{info}/RECORD,,\n"]).encode())
    size = wheel.stat().st_size
    progress.note(f"{wheel}: {size / 1e6:.2f} MB, {len(files)} files; pip install {wheel}")
    if size > _INDEX_LIMIT:
        progress.note(f"PyPI takes up to {_INDEX_LIMIT // 10**6} MB unless a project asks for more")
    return {
        "output": str(wheel),
        "model": str(folder),
        "package": package,
        "module": module,
        "license": licence,
        "bytes": size,
        "files": [*files],
    }


def _module(package: str) -> str:
    """The name to import, which is also the one in the wheel's name."""
    module = re.sub(r"[-_.]+", "_", package).lower()
    if not _NAME.fullmatch(package) or not module.isidentifier():
        raise InputError(
            f"--wheel {package!r} cannot name a package; expected letters, digits and dashes, "
            "with a letter first"
        )
    if keyword.iskeyword(module) or module in sys.stdlib_module_names or module == "mvbert":
        raise InputError(f"--wheel {package}: Python already has a module {module}; choose another")
    return module


def _files(folder: Path) -> list[str]:
    """What goes into the package, in order: all files but hidden ones.

    Raises:
        InputError: the folder is no model's, or a file cannot be read.
    """
    found = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [p.as_posix() for p in found if not any(part.startswith(".") for part in p.parts)]
    if "config.json" not in files or not any(
        file.endswith((".safetensors", ".bin", ".onnx", ".gguf")) for file in files
    ):
        raise InputError(f"{folder} has no config.json with weights beside it; expected a model")
    for file in files:
        check_readable(folder / file)
        try:
            file.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"{folder}: the file name {file!r} is not UTF-8") from None
        if {*file} & {*',"\n\r'}:
            raise InputError(f"{folder}: the file name {file!r} has a sign that no wheel can list")
    return files


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})") from None


def _licence_of_card(card: str) -> str | None:
    """The licence in the front matter of a model card."""
    front = re.match(r"---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    found = re.search(r"^license:[ \t]*['\"]?([\w.+-]+)", front[1], re.MULTILINE) if front else None
    return found[1] if found else None


def _metadata(
    package: str, version: str, summary: str, licence: str | None, files: list[str], card: str
) -> str:
    fields = ["Metadata-Version: 2.4", f"Name: {package}", f"Version: {version}",
              f"Summary: {summary}", "Requires-Python: >=3.8"]  # fmt: skip
    if licence is not None:
        known = {name.lower(): name for name in _SPDX}.get(licence.lower())
        fields.append(f"License-Expression: {known}" if known else f"License: {licence}")
    fields += [f"License-File: {file}" for file in files]
    fields.append("Description-Content-Type: text/markdown")
    return "\n".join([*fields, "", card])


def _add(archive: zipfile.ZipFile, name: str, content: Path | bytes) -> str:
    """Adds a file; its line of RECORD."""
    entry = zipfile.ZipInfo(name)  # dated 1980, so that the bytes depend on the content alone
    entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
    digest, size = hashlib.sha256(), 0
    if isinstance(content, Path):
        entry.file_size = content.stat().st_size  # large files need another header
    with archive.open(entry, "w") as target:
        for block in _blocks(content):
            digest.update(block)
            size += len(block)
            target.write(block)
    code = base64.urlsafe_b64encode(digest.digest()).rstrip(b"=").decode()
    return f"{name},sha256={code},{size}\n"


def _blocks(content: Path | bytes) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with open(content, "rb") as file:
        while block := file.read(1 << 20):
            yield block
