"""Text files: which there are, what they are packed in, and where a document ends.

| file | a document is |
| --- | --- |
| .txt | the text up to a blank line (a file without one is one document) |
| .jsonl | the string in one field of a line's object |
| .parquet | the string in one column of a row |

.txt and .jsonl may be packed as .gz, .xz or .zst. Everything is read as a stream: memory does not
depend on the size of a file, but for the longest line of a .jsonl and the row groups of a .parquet.
"""

import hashlib
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mvbert.errors import InputError, MissingExtra
from mvbert.files import sha256_file

KINDS = (".txt", ".jsonl", ".parquet")
PACKINGS = (".gz", ".xz", ".zst")
SUPPORTED = "*.txt, *.jsonl (each also .gz, .xz, .zst) and *.parquet"

CHUNK_BYTES = 1 << 20  # of plain text handed on at a time
PACKED_BYTES = 1 << 14  # of packed text unpacked at a time
RECORDS_BYTES = 1 << 18  # of records handed on at a time


def text_files(paths: Iterable[str | Path]) -> list[Path]:
    """The text files behind a list of files and folders.

    A folder stands for every supported file in it and below, in sorted order; hidden ones are left
    out. The order of the list is kept.

    Raises:
        InputError: a path is missing, an empty file, of an unsupported kind, or a folder without
            text.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [p for p in _walk(path) if file_kind(p) is not None]
            if not inside:
                raise InputError(f"the folder {path} holds no text; supported are {SUPPORTED}")
            files += inside
        elif not path.exists():
            raise InputError(f"{path} does not exist")
        elif file_kind(path) is None:
            raise InputError(f"{path}: unsupported kind of file; supported are {SUPPORTED}")
        else:
            files.append(path)
    for file in files:
        if file.is_file() and file.stat().st_size == 0:
            raise InputError(f"{file} is empty")
    return files


def file_kind(path: str | Path) -> tuple[str, str] | None:
    """(kind, packing) of a file by its name, such as (".txt", ".xz"); None if unsupported."""
    name, packing = str(path).lower(), ""
    for suffix in PACKINGS:
        if name.endswith(suffix):
            name, packing = name.removesuffix(suffix), suffix
    kind = os.path.splitext(name)[1]
    if kind not in KINDS or (kind == ".parquet" and packing):
        return None
    return kind, packing


class TextFile:
    """One file being read: its documents, and what was read of it so far.

    Exactly one of `chunks` and `records` may be called, once. `bytes_read` counts bytes on the
    disk, packed where the file is.
    """

    def __init__(self, path: str | Path, field: str = "text", errors: str = "strict"):
        """Args:
        field: the field of .jsonl objects, the column of .parquet files.
        errors: "strict" raises InputError for what is not UTF-8 in .jsonl, "replace" goes on.
        """
        kind = file_kind(path)
        if kind is None:
            raise InputError(f"{path}: unsupported kind of file; supported are {SUPPORTED}")
        self.path = Path(path)
        self.kind, self.packing = kind
        self.field = field
        self.errors = errors
        self.bytes_read = 0
        self._digest = hashlib.sha256()
        self._sha256: str | None = None

    @property
    def is_plain(self) -> bool:
        """True for text whose documents end at blank lines (`chunks`), False for `records`."""
        return self.kind == ".txt"

    @property
    def sha256(self) -> str:
        """Of the bytes on the disk. Precondition: everything has been read."""
        return self._sha256 or self._digest.hexdigest()

    def chunks(self) -> Iterator[bytes]:
        """The text of a .txt file, unpacked, in pieces that end anywhere."""
        with self._open() as raw:
            yield from self._unpack(raw)

    def records(self) -> Iterator[tuple[bytes | memoryview, np.ndarray]]:
        """The documents of a .jsonl or .parquet file, some at a time.

        Yields:
            Their UTF-8 end to end, and uint64 [documents] where each ends.
        """
        return self._parquet() if self.kind == ".parquet" else _batches(self._jsonl())

    # ---- bytes ---------------------------------------------------------------------------

    def _open(self) -> BinaryIO:
        try:
            return open(self.path, "rb", buffering=0)
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror or error}") from error

    def _read(self, raw: BinaryIO, size: int) -> bytes:
        try:
            data = raw.read(size)
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror or error}") from error
        self.bytes_read += len(data)
        self._digest.update(data)
        return data

    def _unpack(self, raw: BinaryIO) -> Iterator[bytes]:
        """Unpacked bytes; every packing may be several packed parts one after the other."""
        if not self.packing:
            while data := self._read(raw, CHUNK_BYTES):
                yield data
            return
        new = _unpacker(self.packing)
        unpacker = None
        try:
            while data := self._read(raw, PACKED_BYTES):
                while data:
                    if unpacker is None:
                        if self.packing != ".zst":
                            data = data.lstrip(b"\0")  # padding between parts
                            if not data:
                                break
                        unpacker = new()
                    text = unpacker.decompress(data)
                    if text:
                        yield text
                    data = b""
                    if unpacker.eof:
                        data, unpacker = unpacker.unused_data, None
        except _unpacking_errors() as error:
            raise InputError(
                f"{self.path} is not {self.packing}, or damaged near byte {self.bytes_read}: "
                f"{error}"
            ) from error
        if unpacker is not None:
            raise InputError(
                f"{self.path} is cut off: it ends after {self.bytes_read} bytes, in the middle of "
                "the packed text; was the download complete?"
            )

    # ---- records -------------------------------------------------------------------------

    def _jsonl(self) -> Iterator[bytes]:
        with self._open() as raw:
            lines = io.BufferedReader(_Stream(self._unpack(raw)), CHUNK_BYTES)
            offset = 0
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield self._field_of(line, f"{self.path}:{number}", offset)
                offset += len(line)

    def _field_of(self, line: bytes, where: str, offset: int) -> bytes:
        try:
            text = line.decode("utf-8-sig" if offset == 0 else "utf-8", self.errors)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{where}: not UTF-8 at byte {offset + error.start}; "
                'errors="replace" (--errors replace) goes on without what is not'
            ) from None
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
        except RecursionError:
            raise InputError(f"{where}: JSON that is nested too deeply") from None
        if not isinstance(record, dict):
            raise InputError(f"{where}: expected a JSON object, got {type(record).__name__}")
        if self.field not in record:
            names = ", ".join(map(repr, record)) or "none"
            raise InputError(
                f"{where}: no field {self.field!r} in this line; its fields: {names}; "
                "choose one with field= (--field)"
            )
        value = record[self.field]
        if not isinstance(value, str):
            raise InputError(
                f"{where}: field {self.field!r} holds {type(value).__name__}, expected a string"
            )
        # A lone surrogate (JSON can spell one) is no character; the splitter would delete it.
        return value.encode("utf-8", "ignore")

    def _parquet(self) -> Iterator[tuple[memoryview, np.ndarray]]:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise MissingExtra(f"{self.path}: reading .parquet", "pyarrow", "data") from None
        size = self.path.stat().st_size
        try:
            with pq.ParquetFile(self.path, memory_map=True) as file:
                names = file.schema_arrow.names
                if self.field not in names:
                    raise InputError(
                        f"{self.path}: no column {self.field!r}; its columns: "
                        f"{', '.join(map(repr, names))}; choose one with field= (--field)"
                    )
                kind = file.schema_arrow.field(self.field).type
                if pa.types.is_dictionary(kind):
                    kind = kind.value_type
                if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                    raise InputError(
                        f"{self.path}: column {self.field!r} holds {kind}, expected strings"
                    )
                rows = max(file.metadata.num_rows, 1)
                done = 0
                for batch in file.iter_batches(batch_size=1024, columns=[self.field]):
                    column = batch.column(0).cast(pa.large_string()).drop_null()
                    _, offsets, text = column.buffers()
                    ends = np.frombuffer(offsets, np.int64)[: column.offset + len(column) + 1]
                    ends = ends[column.offset :]
                    done += len(batch)
                    self.bytes_read = size * done // rows
                    if len(column):
                        # No buffer stands for no bytes.
                        bytes_ = memoryview(text if text is not None else b"")
                        yield bytes_[ends[0] : ends[-1]], (ends[1:] - ends[0]).astype(np.uint64)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{self.path} is not a whole .parquet file: {error}") from error
        self.bytes_read = size
        self._sha256 = sha256_file(self.path)


def documents(path: str | Path, field: str = "text", errors: str = "strict") -> Iterator[str]:
    """The documents of a file, one at a time: the plain definition of what a corpus is made of."""
    file = TextFile(path, field, errors)
    if not file.is_plain:
        for text, ends in file.records():
            begin = 0
            for end in map(int, ends):
                yield bytes(text[begin:end]).decode("utf-8", errors)
                begin = end
        return
    lines: list[bytes] = []
    for line in io.BufferedReader(_Stream(file.chunks()), CHUNK_BYTES):
        if line.strip(b" \t\r\n"):
            lines.append(line)
        elif lines:
            yield b"".join(lines).decode("utf-8", errors)
            lines = []
    if lines:
        yield b"".join(lines).decode("utf-8", errors)


class _Stream(io.RawIOBase):
    """An iterator of bytes as a file."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, out: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(out), len(self._rest))
        out[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def _batches(texts: Iterator[bytes]) -> Iterator[tuple[bytes, np.ndarray]]:
    """Joins records to pieces of about RECORDS_BYTES."""
    parts: list[bytes] = []
    size = 0
    for text in texts:
        parts.append(text)
        size += len(text)
        if size >= RECORDS_BYTES:
            yield b"".join(parts), np.cumsum([len(p) for p in parts], dtype=np.uint64)
            parts, size = [], 0
    if parts:
        yield b"".join(parts), np.cumsum([len(p) for p in parts], dtype=np.uint64)


def _walk(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry)
        else:
            yield entry


def _unpacker(packing: str) -> Callable[[], Any]:
    """Makes decompressors with decompress(data), eof and unused_data."""
    if packing == ".gz":
        return lambda: zlib.decompressobj(wbits=31)
    if packing == ".xz":
        return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ)
    try:
        import zstandard
    except ImportError:
        raise MissingExtra("reading .zst", "zstandard", "data") from None
    # The window that `zstd --long=31` packs with; the default refuses more than 128 MiB.
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj


def _unpacking_errors() -> tuple[type[Exception], ...]:
    try:
        import zstandard
    except ImportError:
        return (zlib.error, lzma.LZMAError)
    return (zlib.error, lzma.LZMAError, zstandard.ZstdError)
