"""Atomic files and folders, checksums, JSON."""

import hashlib
import os
import re
import stat
from pathlib import Path

import pytest

from mvbert import files
from mvbert.errors import InputError


def write_half(path, error):
    with files.atomic_file(path) as file:
        file.write(b"half of the n")
        raise error


def fill_half(out, error):
    with files.atomic_folder(out, overwrite=True) as partial:
        (partial / "new").write_bytes(b"")
        raise error


def test_atomic_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    files.atomic_write(path, "één")
    files.atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Bytes are forced first, then the name is given, then that is forced."""
    done = []
    replace = os.replace
    named = lambda handle: Path(os.readlink(f"/proc/self/fd/{handle}"))  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(named(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append(b) or replace(a, b))
    files.atomic_write(tmp_path / "a.txt", b"1")
    partial, name, folder = done
    assert partial.parent == tmp_path
    assert partial.name != "a.txt"
    assert (name, folder) == (tmp_path / "a.txt", tmp_path)


def test_atomic_write_gives_the_mode_that_open_gives(tmp_path):
    files.atomic_write(tmp_path / "a", b"")
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_while_writing_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    with pytest.raises(error):
        write_half(path, error())
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_writing_into_a_missing_folder_names_the_file(tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*missing/a\.txt: No such file"):
        files.atomic_write(tmp_path / "missing" / "a.txt", b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_says_so_and_that_nothing_changed(tmp_path):
    try:
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")
    except OSError as error:
        message = str(files.write_error(tmp_path / "a", error))
    assert re.search(r"No space left.*unchanged.*free some space", message)


def test_atomic_folder_appears_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with files.atomic_folder(out) as partial:
        (partial / "a").write_bytes(b"1")
        assert not out.exists()
    assert (out / "a").read_bytes() == b"1"
    assert os.listdir(out.parent) == ["out"]
    assert stat.S_IMODE(out.stat().st_mode) & 0o500 == 0o500


def test_atomic_folder_refuses_one_that_exists_unless_told(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_bytes(b"")
    with pytest.raises(InputError, match="exists and is not empty"), files.atomic_folder(out):
        pass
    with files.atomic_folder(out, overwrite=True) as partial:
        (partial / "new").write_bytes(b"")
    assert os.listdir(out) == ["new"]
    assert os.listdir(tmp_path) == ["out"]


def test_atomic_folder_without_exchange(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_bytes(b"")
    with files.atomic_folder(out, overwrite=True) as partial:
        (partial / "new").write_bytes(b"")
    assert os.listdir(out) == ["new"]
    assert os.listdir(tmp_path) == ["out"]


def test_atomic_folder_keeps_the_old_one_after_a_failure(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_bytes(b"")
    with pytest.raises(RuntimeError):
        fill_half(out, RuntimeError())
    assert os.listdir(out) == ["mine"]
    assert os.listdir(tmp_path) == ["out"]


def test_atomic_folder_refuses_a_file(tmp_path):
    (tmp_path / "out").write_bytes(b"")
    with (
        pytest.raises(InputError, match="is not a folder"),
        files.atomic_folder(tmp_path / "out", overwrite=True),
    ):
        pass


def test_the_contents_of_a_folder_move_the_last_one_last(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    for path in (source / "sub" / "new", target / "sub" / "old", source / "a", source / "config",
                 source / "z", source / "note", target / "log", target / "a"):  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.parent.name)
    replace, moved = os.replace, []

    def fail_at_z(old, new):
        moved.append(Path(old).name)
        if moved.count("z") == 1 and moved[-1] == "z":
            raise OSError(28, "No space left on device")
        replace(old, new)

    monkeypatch.setattr(os, "replace", fail_at_z)
    with pytest.raises(InputError, match=re.escape(str(target))):
        files.move_contents(source, target, last="config", leave=["note"])
    assert (source / "config").exists()
    assert not (target / "config").exists()
    files.move_contents(source, target, last="config", leave=["note"])
    assert moved == ["a", "sub", "z", "z", "config"]
    assert not source.exists()
    assert {p.name for p in target.rglob("*")} == {"sub", "new", "a", "config", "z", "log"}
    assert (target / "a").read_text() == "source"


def test_sha256_file(tmp_path):
    data = os.urandom((1 << 20) + 17)  # more than one block
    (tmp_path / "a").write_bytes(data)
    assert files.sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_json_round_trip(tmp_path):
    value = {"name": "é", "list": [1, 2.5, None, True]}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == value
    assert files.read_json_object(tmp_path / "a.json") == value


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", float("nan"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1,\n "b": ', r"a\.json:2:\d+: not JSON .*cut off"),
        (b"\xff{}", r"a\.json is not UTF-8 text \(byte 0\)"),
        (b"[1]", r"holds a JSON list, expected an object"),
        (b"[" * 100_000, r"nested too deeply|not JSON"),
    ],
    ids=["cut", "binary", "list", "deep"],
)
def test_json_errors_name_the_file(tmp_path, data, message):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(InputError, match=message):
        files.read_json_object(tmp_path / "a.json")


def test_json_missing_file(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        files.read_json(tmp_path / "a.json")
