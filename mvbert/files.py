"""Files that are either whole or not there: atomic writes, whole folders, checksums, JSON.

Everything is written beside its place, forced to the disk and renamed into place, so a crash or a
kill leaves the old file or the new one and never a part of one.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mvbert.errors import InputError

# A JSON value as json.loads gives it; spelled out because recursive aliases need Python 3.12.
Json = dict | list | str | int | float | bool | None

_LFS_POINTER = b"version https://git-lfs"

PARTIAL = ".partial-"  # in the name of everything that is not finished
NAME_BYTES = 255  # that a file system takes for one name


def partial_prefix(path: Path, ending: str = "") -> str:
    """The hidden name of what becomes `path`, with room for `ending` and a random suffix.

    A name near the limit of the file system is cut, and a checksum keeps it apart from others.
    """
    name = os.fsencode(path.name)
    room = NAME_BYTES - len(f".{PARTIAL}{ending}") - 8
    if len(name) > room:
        name = name[: room - 9] + b"~" + hashlib.sha256(name).hexdigest()[:8].encode()
    return f".{os.fsdecode(name)}{PARTIAL}{ending}"


DATA = "data:"  # a path that starts so is in the data folder


def data_folder() -> Path:
    """Where docs/experiments/get_data.py puts public data: MVBERT_DATA, or a folder of the clone.

    Without MVBERT_DATA: shared/data beside the clone where that exists, else data in the clone
    (in the current folder, if mvbert does not run from a clone).
    """
    if folder := os.environ.get("MVBERT_DATA"):
        return Path(folder)
    clone = Path(__file__).resolve().parents[1]
    if not (clone / "pyproject.toml").is_file():
        return Path("data")
    beside = clone.parent / "shared" / "data"
    return beside if beside.is_dir() else clone / "data"


def data_path(path: str | Path) -> Path:
    """The file that a path means: `data:NAME` is NAME in `data_folder()`.

    Raises:
        InputError: that folder has no such file.
    """
    if not str(path).startswith(DATA):
        return Path(path)
    file = data_folder() / str(path).removeprefix(DATA)
    if not file.exists():
        raise InputError(
            f"{path}: {file} does not exist; download it with docs/experiments/get_data.py, or set "
            "MVBERT_DATA to the folder that holds it"
        )
    return file


def write_error(path: Path, error: OSError) -> InputError:
    """What to tell a user when `path` cannot be written; a full disk says so."""
    reason = error.strerror or str(error)
    return InputError(
        f"cannot write {path}: {reason}; what was there before is unchanged"
        + ("; free some space and run the command again" if error.errno == errno.ENOSPC else "")
    )


def check_readable(path: str | Path) -> None:
    """Raises InputError unless a file can be opened and is no Git LFS pointer."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(_LFS_POINTER))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    refuse_pointer(path, start)


def refuse_pointer(path: str | Path, start: bytes) -> None:
    """Raises InputError if a file that begins with `start` is a Git LFS pointer."""
    if start.startswith(_LFS_POINTER):
        raise InputError(
            f"{path} is a Git LFS pointer, not the file itself; run git lfs pull in its folder"
        )


def sync_folder(folder: str | Path) -> None:
    """Forces the names in a folder to the disk (its files are forced by their writers)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file to write that appears at `path`, whole, when the block ends without an error.

    Raises:
        InputError: the file cannot be written (no such folder, no permission, disk full).
    """
    path = Path(path)
    partial = None
    try:
        handle, partial = tempfile.mkstemp(prefix=partial_prefix(path), dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            # mkstemp makes private files; a finished file has the mode that open() would give.
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        partial = None
        sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        if partial is not None:
            with contextlib.suppress(OSError):
                os.unlink(partial)


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Replaces the file at `path` by `data` (text as UTF-8), or leaves it as it was."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill that appears at `path`, whole, when the block ends without an error.

    The block writes and forces its own files (`sync_file`); names are forced here. With `overwrite`
    an existing folder changes places with the new one in one step and is then removed.

    Raises:
        InputError: `path` exists and `overwrite` is off, or the folder cannot be written.
    """
    path = Path(path)
    check_new_folder(path, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=partial_prefix(path), dir=path.parent))
        partial.chmod(0o777 & ~_umask())
    except OSError as error:
        raise write_error(path, error) from error
    try:
        yield partial
        sync_folder(partial)
        if overwrite:
            move_folder(partial, path)
        else:
            os.rename(partial, path)  # fails if another process has filled it meanwhile
            sync_folder(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise InputError(
                f"{path} was written by another command meanwhile; give another path"
            ) from None
        raise write_error(path, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new_folder(path: Path, overwrite: bool) -> None:
    """Refuses a path where no folder can be made: a file, a link, a full folder, a long name."""
    try:
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise InputError(f"{path} is not a folder; give another path")
        if path.exists() and not overwrite and any(path.iterdir()):
            raise InputError(
                f"{path} exists and is not empty; give another path or allow overwriting"
            )
    except OSError as error:
        raise write_error(path, error) from error


def move_folder(source: Path, target: Path) -> None:
    """Renames a whole folder into place; what was at `target` is removed after the change."""
    if target.exists():
        if not _exchange(source, target):
            # No exchange on this system: for an instant the old folder is only to be found aside.
            aside = Path(tempfile.mkdtemp(prefix=partial_prefix(target), dir=target.parent))
            os.rename(target, aside / target.name)
            try:
                os.rename(source, target)
            except OSError:
                os.rename(aside / target.name, target)
                raise
            source = aside
    else:
        os.rename(source, target)
    sync_folder(target.parent)
    shutil.rmtree(source, ignore_errors=True)


def sync_file(path: str | Path) -> None:
    """Forces a closed file's bytes to the disk."""
    sync_folder(path)  # the same call for a file and for a folder


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file's bytes in hexadecimal; about 1-2 GB/s where the CPU has SHA."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def json_text(value: Json, *, indent: int | None = None, allow_nan: bool = True) -> str:
    """A value as JSON that can be written as UTF-8.

    File names that are not UTF-8 reach Python as lone surrogates; JSON spells those as escapes.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=allow_nan)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_json(path: str | Path, value: Json) -> None:
    """Writes a value as indented JSON, atomically; NaN and infinity are refused."""
    atomic_write(path, json_text(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Json:
    """Reads a JSON file.

    Raises:
        InputError: the file is missing, not UTF-8 or not JSON; the message has the line and column.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        refuse_pointer(path, data)
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); expected JSON") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}:{error.colno}"
        raise InputError(f"{where}: not JSON ({error.msg}); is the file cut off?") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deeply to be one of our JSON files") from None


def read_json_object(path: str | Path) -> dict[str, Json]:
    """Reads a JSON file that must hold an object at the top."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def _umask() -> int:
    """The process's file creation mask (there is no call that only reads it)."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two names in one step (Linux renameat2); False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    return renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0
