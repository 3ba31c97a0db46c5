"""The files of a task: a folder, an archive or single files; tables with named columns.

Rows end at line feeds only, as GLUE's files need: sentences contain other line breaks of Unicode.
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from mvbert.errors import InputError, require_extra
from mvbert.files import check_readable, data_path

TABLES = (".tsv", ".csv", ".jsonl", ".parquet")
_ARCHIVES = (".tar", ".tar.xz", ".tar.gz", ".tgz", ".tar.bz2", ".zip")


@dataclass(frozen=True)
class File:
    """A file of a task: its name for messages, its path inside folder or archive, its bytes."""

    name: str
    path: str
    data: bytes

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix.lower()

    def lines(self) -> list[str]:
        """The lines of a UTF-8 text, without their ends and without blank lines at the end."""
        try:
            text = self.data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{self.name} is not UTF-8 text (byte {error.start})") from None
        text = text.rstrip("\r\n")
        return [line.removesuffix("\r") for line in text.split("\n")] if text else []


def read_files(source: str) -> list[File]:
    """All files of a folder or archive, or one file. `data:NAME` is NAME in the data folder.

    Raises:
        InputError: it does not exist or cannot be read.
    """
    path = data_path(source)
    if path.is_dir():
        return [
            File(str(p), p.relative_to(path).as_posix(), p.read_bytes())
            for p in sorted(path.rglob("*"))
            if p.is_file() and not p.name.startswith(".") and _belongs(p.name)
        ]
    check_readable(path)
    if not path.name.lower().endswith(_ARCHIVES):
        return [File(str(path), path.name, path.read_bytes())]
    try:
        if path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as archive:
                names = [n for n in archive.namelist() if not n.endswith("/") and _belongs(n)]
                return [File(f"{path}:{n}", n, archive.read(n)) for n in names]
        files = []
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member) if _belongs(member.name) else None
                if content is not None:
                    files.append(File(f"{path}:{member.name}", member.name, content.read()))
        return files
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
        # tarfile's message has a line for each compression that it tried.
        reason = str(error).splitlines()[0].rstrip(":") if str(error) else "it is cut off"
        raise InputError(f"{path} is not a complete archive: {reason}") from None


def _belongs(name: str) -> bool:
    """Whether a file may be one of a task: weights and images beside it are not read."""
    path = PurePosixPath(name)
    return path.suffix.lower() not in (".safetensors", ".bin", ".png", ".pdf", ".zip", ".xz")


@dataclass(frozen=True)
class Table:
    """Columns of equal length; `places[i]` is where row i stands, for messages.

    Attributes:
        skipped: rows that were left out, which only QQP has.
    """

    name: str
    columns: dict[str, list[Any]]
    places: list[str]
    skipped: int = 0

    def column(self, names: tuple[str, ...], what: str) -> list[Any]:
        """The first of these columns that there is.

        Raises:
            InputError: there is none; the message lists those there are.
        """
        for name in names:
            if name in self.columns:
                return self.columns[name]
        raise InputError(
            f"{self.name} has no column {' or '.join(names)} ({what}); its columns: "
            f"{', '.join(map(str, self.columns)) or 'none'}"
        )


def read_table(file: File, header: tuple[str, ...] = (), skip_broken: bool = False) -> Table:
    """A .tsv (no quoting, as GLUE has it), .csv, .jsonl or .parquet file.

    Args:
        header: columns of a .tsv that has no header line.
        skip_broken: leave out rows with another number of columns instead of refusing the file.
    """
    if file.suffix == ".parquet":
        return _parquet(file)
    if file.suffix == ".jsonl":
        return _jsonl(file)
    if file.suffix == ".csv":
        rows = _csv(file)
    else:
        rows = [(i, line.split("\t")) for i, line in enumerate(file.lines(), 1)]
    if header:
        # CoLA's files have no header, but its test file has.
        if rows and rows[0][1][0] == "index":
            header = tuple(rows.pop(0)[1])
    elif rows:
        header = tuple(rows.pop(0)[1])
    if len({*header}) < len(header):
        raise InputError(f"{file.name}:1: two columns have one name: {', '.join(header)}")
    entries, skipped = [], 0
    for number, cells in rows:
        if len(cells) != len(header):
            if skip_broken:
                skipped += 1
                continue
            raise InputError(
                f"{file.name}:{number}: {len(cells)} columns, expected {len(header)} "
                f"({', '.join(header)})"
            )
        entries.append((number, cells))
    columns = {name: [cells[i] for _, cells in entries] for i, name in enumerate(header)}
    return Table(file.name, columns, [f"{file.name}:{number}" for number, _ in entries], skipped)


def _csv(file: File) -> list[tuple[int, list[str]]]:
    """Rows with the line where each ends; cells in quotes may have line breaks."""
    text = "\n".join(file.lines())
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        return [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise InputError(f"{file.name}:{reader.line_num}: not CSV: {error}") from None


def _jsonl(file: File) -> Table:
    columns: dict[str, list[Any]] = {}
    places: list[str] = []
    for number, line in enumerate(file.lines(), 1):
        place = f"{file.name}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{place}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f"{place}: expected a JSON object, got {type(row).__name__}")
        if not places:
            columns = {name: [] for name in row}
        if row.keys() != columns.keys():
            odd = sorted(row.keys() ^ columns.keys())
            raise InputError(f"{place}: not the fields of the first row ({', '.join(odd)} differ)")
        for name, value in row.items():
            columns[name].append(value)
        places.append(place)
    return Table(file.name, columns, places)


def _parquet(file: File) -> Table:
    with require_extra("data", f"{file.name}: reading .parquet"):
        import pyarrow
        import pyarrow.parquet as pq
    try:
        columns = pq.read_table(pyarrow.BufferReader(file.data)).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file.name} is not a complete .parquet file: {error}") from None
    count = len(next(iter(columns.values()), []))
    return Table(file.name, columns, [f"{file.name}, row {i + 1}" for i in range(count)])
