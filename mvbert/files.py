"""Atomic writes of files and folders, checksums, JSON.

Everything is written to a temporary name beside the target, synced to disk and renamed, so a crash
or a kill leaves the old file or the new one, never a partial one.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO

from mvbert.errors import InputError

# A JSON value as json.loads gives it; spelled out because recursive aliases need Python 3.12.
Json = dict | list | str | int | float | bool | None

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how a Git LFS pointer begins

# A file that stays with a model, whatever becomes of its weights.
LICENCE_FILE = re.compile(r"(licen[cs]e|copying|notice)\b.*", re.IGNORECASE)

PARTIAL = ".partial-"  # in the name of every unfinished file or folder
NAME_BYTES = 255  # the longest file name that file systems allow


def partial_prefix(path: Path, ending: str = "") -> str:
    """Prefix of the temporary name for `path`, with room for `ending` and a random suffix.

    A name near the file system's limit is shortened and made unique by a checksum.
    """
    name = os.fsencode(path.name)
    room = NAME_BYTES - len(f".{PARTIAL}{ending}") - 8
    if len(name) > room:
        name = name[: room - 9] + b"~" + hashlib.sha256(name).hexdigest()[:8].encode()
    return f".{os.fsdecode(name)}{PARTIAL}{ending}"


DATA = "data:"  # prefix of paths in the data folder


def data_folder() -> Path:
    """The folder where docs/experiments/get_data.py puts public data.

    MVBERT_DATA if set; else shared/data beside the clone if it exists; else data in the clone, or
    in the current folder if mvbert does not run from a clone.
    """
    if folder := os.environ.get("MVBERT_DATA"):
        return Path(folder)
    clone = Path(__file__).resolve().parents[1]
    if not (clone / "pyproject.toml").is_file():
        return Path("data")
    shared = clone.parent / "shared" / "data"
    return shared if shared.is_dir() else clone / "data"


def data_path(path: str | Path) -> Path:
    """Resolves `data:NAME` to NAME in `data_folder()`; returns other paths unchanged.

    Raises:
        InputError: the data folder has no such file.
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
    """The InputError for a failed write to `path`, with advice if the disk is full."""
    reason = error.strerror or str(error)
    return InputError(
        f"cannot write {path}: {reason}; existing files are unchanged"
        + ("; free some space and run the command again" if error.errno == errno.ENOSPC else "")
    )


def check_readable(path: str | Path) -> None:
    """Raises InputError unless a file can be opened and is not a Git LFS pointer."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(LFS_POINTER))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    refuse_pointer(path, start)


def refuse_pointer(path: str | Path, start: bytes) -> None:
    """Raises InputError if a file that begins with `start` is a Git LFS pointer."""
    if start.startswith(LFS_POINTER):
        raise InputError(
            f"{path} is a Git LFS pointer, not the file itself; run git lfs pull in its folder"
        )


def sync_folder(folder: str | Path) -> None:
    """Syncs a folder's directory entries to disk (writers sync the files themselves)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Opens a binary file that appears at `path` only when the block ends without an error.

    Raises:
        InputError: the file cannot be written (no such folder, no permission, disk full).
    """
    path = Path(path)
    partial = None
    try:
        handle, partial = tempfile.mkstemp(prefix=partial_prefix(path), dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            open_to_readers(file.fileno())  # mkstemp makes private files
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
    """Replaces the file at `path` with `data` (text as UTF-8), or leaves it unchanged."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Makes a folder to fill that appears at `path` only when the block ends without an error.

    The block writes and syncs its files (`sync_file`); directory entries are synced here. With
    `overwrite`, an existing folder is exchanged with the new one in one step and then removed.

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
            raise InputError(f"another command wrote {path} meanwhile; give another path") from None
        raise write_error(path, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new_folder(path: Path, overwrite: bool) -> None:
    """Refuses a path where no folder can be made: a file, a link, a non-empty folder."""
    try:
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise InputError(f"{path} is not a folder; give another path")
        if path.exists() and not overwrite and any(path.iterdir()):
            raise InputError(
                f"{path} exists and is not empty; give another path or allow overwriting"
            )
    except OSError as error:
        raise write_error(path, error) from error


def check_outside(out: Path, *inputs: Path | None) -> None:
    """Refuses an input inside `out`, a folder that is replaced as a whole."""
    for path in inputs:
        if path is not None and path.resolve().is_relative_to(out.resolve()):
            raise InputError(f"{out} contains the input {path}; give another path")


def copy_card(folder: Path, target: Path) -> None:
    """Copies what stays with a model, whatever becomes of its weights: its card and licence."""
    for path in folder.iterdir():
        carried = path.name == "README.md" or LICENCE_FILE.fullmatch(path.name)
        if carried and path.is_file():
            atomic_write(target / path.name, path.read_bytes())


def move_folder(source: Path, target: Path) -> None:
    """Renames a folder to `target`, then removes the folder that it replaces."""
    if target.exists():
        if not _exchange(source, target):
            # No atomic exchange here: for an instant the old folder exists only as the backup.
            backup = Path(tempfile.mkdtemp(prefix=partial_prefix(target), dir=target.parent))
            os.rename(target, backup / target.name)
            try:
                os.rename(source, target)
            except OSError:
                os.rename(backup / target.name, target)
                raise
            source = backup
    else:
        os.rename(source, target)
    sync_folder(target.parent)
    shutil.rmtree(source, ignore_errors=True)


def move_contents(source: Path, target: Path, *, last: str, leave: Collection[str] = ()) -> None:
    """Moves what a folder holds into another, which has further files, then removes the folder.

    After an interruption the same call moves the rest.

    Args:
        last: the file without which no program opens the target; it is moved when the others are.
            Where it is not there, it was moved before an interruption.
        leave: names that are not moved.

    Raises:
        InputError: something cannot be moved.
    """
    try:
        names = {path.name for path in source.iterdir()} - {*leave}
        for name in sorted(names, key=lambda name: (name == last, name)):
            if (target / name).is_dir():
                shutil.rmtree(target / name)
            os.replace(source / name, target / name)
        sync_folder(target)
    except OSError as error:
        raise write_error(target, error) from error
    shutil.rmtree(source, ignore_errors=True)


def sync_file(path: str | Path) -> None:
    """Syncs a closed file's bytes to disk."""
    sync_folder(path)  # the same call for a file and for a folder


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file in hexadecimal; 1-2 GB/s on CPUs with SHA instructions."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def json_text(value: Json, *, indent: int | None = None, allow_nan: bool = True) -> str:
    """Serialises a value to JSON that can be encoded as UTF-8.

    File names that are not UTF-8 reach Python as lone surrogates; they are written as escapes.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=allow_nan)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_json(path: str | Path, value: Json) -> None:
    """Writes a value as indented JSON, atomically; refuses NaN and infinity."""
    atomic_write(path, json_text(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Json:
    """Reads a JSON file.

    Raises:
        InputError: the file is missing, not UTF-8 or not JSON; the message gives line and column.
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
        place = f"{path}:{error.lineno}:{error.colno}"
        raise InputError(f"{place}: not JSON ({error.msg}); is the file cut off?") from None
    except RecursionError:
        raise InputError(
            f"{path} is JSON nested too deeply; expected a file that mvbert wrote"
        ) from None


def read_json_object(path: str | Path) -> dict[str, Json]:
    """Reads a JSON file whose top level must be an object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def open_to_readers(file: Path | int) -> None:
    """Gives a file the mode that open() would have made it with."""
    os.chmod(file, 0o666 & ~_umask())


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _exchange(a: Path, b: Path) -> bool:
    """Exchanges two names atomically (Linux renameat2); False if the system does not support it."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    return renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0
