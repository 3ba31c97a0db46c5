"""Finds and reads text files: formats, compression, document boundaries.

| file | a document is |
| --- | --- |
| .txt | the text up to a blank line (a file without one is one document) |
| .jsonl | the string in one field of a line's object |
| .parquet | the string in one column of a row |

.txt and .jsonl may be compressed as .gz, .xz or .zst. Everything is read as a stream: memory does
not depend on file size, except for the longest line of a .jsonl and the row groups of a .parquet.
"""

import codecs
import hashlib
import io
import json
import lzma
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mvbert import _core
from mvbert.errors import InputError, require_extra
from mvbert.files import LFS_POINTER, data_path, refuse_pointer, sha256_file

KINDS = (".txt", ".jsonl", ".parquet")
PACKINGS = (".gz", ".xz", ".zst")
SUPPORTED = "*.txt, *.jsonl (each also .gz, .xz, .zst) and *.parquet"

CHUNK_BYTES = 1 << 20  # of plain text passed on at a time
PACKED_BYTES = 1 << 14  # of packed text unpacked at a time
RECORDS_BYTES = 1 << 18  # of records passed on at a time


@dataclass(frozen=True)
class FoundTexts:
    """The text files to read, and counts of what was skipped.

    Attributes:
        files: each once, in the order of the paths given, sorted within a folder.
        left_out: counts by reason: "repeated" (the same file or folder by another path or a link),
            "empty", "unsupported" (another kind of file), "not_regular" (pipes, sockets, devices).
            Hidden files are not counted.
    """

    files: list[Path]
    left_out: dict[str, int]


def find_texts(paths: Iterable[str | Path]) -> FoundTexts:
    """Finds the text files in a list of files and folders, and checks that each can be read.

    A folder means every supported file in it, recursively, following links, skipping hidden ones.
    `data:NAME`: see mvbert.files.data_path.

    Raises:
        InputError: a path is missing, not a regular file, empty or of an unsupported kind; a folder
            has no text; or, also within a folder, a file cannot be read or a link is broken.
    """
    search = _Search()
    for path in [paths] if isinstance(paths, str | Path) else paths:
        search.add(data_path(path))
    return FoundTexts(search.files, search.left_out)


class _Search:
    """Collects text files and counts what is skipped."""

    def __init__(self) -> None:
        self.files: list[Path] = []
        self.left_out = dict.fromkeys(("repeated", "empty", "unsupported", "not_regular"), 0)
        self._seen: set[tuple[int, int]] = set()  # device and inode of files and folders

    def add(self, path: Path) -> None:
        """Adds a path given by the user."""
        status = _status(path)
        if stat.S_ISDIR(status.st_mode):
            counts = len(self.files), dict(self.left_out)
            self._folder(path, status)
            self._check_folder(path, *counts)
            return
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} is {_kind_of(status)}, expected a file or a folder")
        if file_kind(path) is None:
            raise InputError(f"{path}: unsupported kind of file; supported: {SUPPORTED}")
        if status.st_size == 0:
            raise InputError(f"{path} is empty")
        self._file(path, status)

    def _check_folder(self, path: Path, files: int, left_out: dict[str, int]) -> None:
        """Refuses a folder without text files."""
        if len(self.files) > files or self.left_out["repeated"] > left_out["repeated"]:
            return
        empty = self.left_out["empty"] - left_out["empty"]
        raise InputError(
            f"the folder {path} has no text files; "
            + (f"empty files: {empty}; " if empty else "")
            + f"supported: {SUPPORTED}"
        )

    def _folder(self, folder: Path, status: os.stat_result) -> None:
        if self._is_repeated(status):
            return
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            raise InputError(f"cannot read the folder {folder}: {error.strerror}") from error
        for name in names:
            if name.startswith("."):
                continue
            path = folder / name
            supported = file_kind(name) is not None
            if not supported and path.is_symlink() and not os.path.exists(path):
                self.left_out["unsupported"] += 1
                continue
            status = _status(path)
            if stat.S_ISDIR(status.st_mode):
                self._folder(path, status)
            elif not stat.S_ISREG(status.st_mode):
                self.left_out["not_regular"] += 1
            elif not supported:
                self.left_out["unsupported"] += 1
            elif status.st_size == 0:
                self.left_out["empty"] += 1
            else:
                self._file(path, status)

    def _file(self, path: Path, status: os.stat_result) -> None:
        if not self._is_repeated(status):
            with _open(path) as file:  # fail now, not hours later
                if status.st_size < 1 << 10:
                    refuse_pointer(path, file.read(len(LFS_POINTER)))
            self.files.append(path)

    def _is_repeated(self, status: os.stat_result) -> bool:
        identity = (status.st_dev, status.st_ino)
        repeated = identity in self._seen
        self._seen.add(identity)
        self.left_out["repeated"] += repeated
        return repeated


def _status(path: Path) -> os.stat_result:
    """The status of a path, following links.

    Raises:
        InputError: it does not exist or cannot be read.
    """
    try:
        return path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise InputError(
                f"{path} is a link to {os.readlink(path)}, which does not exist"
            ) from None
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def _kind_of(status: os.stat_result) -> str:
    """The kind of something that is neither a file nor a folder, for messages."""
    kinds = (
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    return next((name for test, name in kinds if test(status.st_mode)), "no regular file")


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


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
    """Reads one file: its documents, and counts of what was read so far.

    Exactly one of `chunks` and `records` may be called, once.

    Attributes:
        bytes_read: bytes read from the file, compressed if it is.
        nulls: records skipped because their text is null.
        replaced: invalid UTF-8 sequences skipped in .jsonl.
    """

    def __init__(self, path: str | Path, field: str = "text", errors: str = "strict"):
        """Args:
        field: field of .jsonl objects, column of .parquet files.
        errors: for invalid UTF-8 in .jsonl, "strict" raises InputError, "replace" skips it.
        """
        kind = file_kind(path)
        if kind is None:
            raise InputError(f"{path}: unsupported kind of file; supported: {SUPPORTED}")
        self.path = Path(path)
        self.kind, self.packing = kind
        self.field = field
        self.errors = errors
        self.bytes_read = 0
        self.nulls = 0
        self.replaced = 0
        self._digest = hashlib.sha256()
        self._sha256: str | None = None

    @property
    def is_plain(self) -> bool:
        """True for text whose documents end at blank lines (`chunks`), False for `records`."""
        return self.kind == ".txt"

    @property
    def sha256(self) -> str:
        """SHA-256 of the file. Precondition: everything has been read."""
        return self._sha256 or self._digest.hexdigest()

    def chunks(self) -> Iterator[bytes]:
        """The decompressed text of a .txt file, in blocks that end anywhere."""
        with _open(self.path) as raw:
            yield from self._checked(self._unpack(raw))

    def records(self) -> Iterator[tuple[bytes | memoryview, np.ndarray]]:
        """The documents of a .jsonl or .parquet file, some at a time.

        Yields:
            Their UTF-8 end to end, and uint64 [documents] where each ends.
        """
        return self._parquet() if self.kind == ".parquet" else _batches(self._jsonl())

    # ---- bytes ---------------------------------------------------------------------------

    def _read(self, raw: BinaryIO, size: int) -> bytes:
        try:
            data = raw.read(size)
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror or error}") from error
        self.bytes_read += len(data)
        self._digest.update(data)
        return data

    def _unpack(self, raw: BinaryIO) -> Iterator[bytes]:
        """Decompressed bytes; a file may be several compressed streams, concatenated."""
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
                f"{self.path} is not {self.packing}, or corrupt near byte {self.bytes_read}: "
                f"{error}"
            ) from error
        if unpacker is not None:
            raise InputError(
                f"{self.path} is truncated: it ends after {self.bytes_read} bytes, inside the "
                "compressed text; was the download complete?"
            )

    def _checked(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """Passes text through, unless its first bytes or its zeros show that it is not text."""
        done = 0
        for piece in _with_head(pieces):
            check_is_text(self.path, piece, done, packed=bool(self.packing))
            done += len(piece)
            yield piece

    def advice(self, offset: int) -> str:
        """Advice about text that is not UTF-8 at byte `offset` of a file."""
        if not self.is_plain:
            return REPLACE
        file = TextFile(self.path, self.field, self.errors)
        window, begin = b"", 0
        with _open(self.path) as raw:
            if not self.packing:
                begin = max(offset - SAMPLE_BYTES, 0)
                raw.seek(begin)
            for piece in file._unpack(raw):
                window += piece
                if begin + len(window) > offset + SAMPLE_BYTES:
                    break
                if len(window) > 4 * SAMPLE_BYTES:
                    begin += len(window) - 2 * SAMPLE_BYTES
                    window = window[-2 * SAMPLE_BYTES :]
        return _advice(window[max(offset - SAMPLE_BYTES - begin, 0) :][: 2 * SAMPLE_BYTES])

    # ---- records -------------------------------------------------------------------------

    def _jsonl(self) -> Iterator[bytes]:
        with _open(self.path) as raw:
            text = self._checked(self._unpack(raw))
            lines = io.BufferedReader(_Stream(text), CHUNK_BYTES)
            offset = 0
            for number, line in enumerate(lines, 1):
                # A byte-order mark begins every one of files that were concatenated.
                content = line.removeprefix(codecs.BOM_UTF8)
                if content.strip():
                    begin = offset + len(line) - len(content)
                    record = self._field_of(content, f"{self.path}:{number}", begin)
                    if record is not None:
                        yield record
                offset += len(line)

    def _field_of(self, line: bytes, place: str, offset: int) -> bytes | None:
        """The text of a record; None if it is null."""
        if self.errors == "replace":
            line, replaced = _replace_errors(line)
            self.replaced += replaced
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{place}: not UTF-8 at byte {offset + error.start}; {_advice(line)}"
            ) from None
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{place}: not JSON ({error.msg} at column {error.colno})") from None
        except RecursionError:
            raise InputError(f"{place}: JSON is nested too deeply") from None
        if not isinstance(record, dict):
            raise InputError(f"{place}: expected a JSON object, got {type(record).__name__}")
        if self.field not in record:
            names = ", ".join(map(repr, record)) or "none"
            raise InputError(
                f"{place}: no field {self.field!r} in this line; its fields: {names}; "
                "choose one with field= (--field)"
            )
        value = record[self.field]
        if value is None:
            self.nulls += 1
            return None
        if not isinstance(value, str):
            raise InputError(
                f"{place}: field {self.field!r} holds {type(value).__name__}, expected a string"
            )
        # A lone surrogate (JSON can spell one) is no character; the splitter would delete it.
        return value.encode("utf-8", "ignore")

    def _parquet(self) -> Iterator[tuple[memoryview, np.ndarray]]:
        with require_extra("data", f"{self.path}: reading .parquet"):
            import pyarrow as pa
            import pyarrow.parquet as pq
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
                views = [pa.string_view()] if hasattr(pa, "string_view") else []
                # A column without a single value has the type null.
                if kind not in (pa.string(), pa.large_string(), pa.null(), *views):
                    raise InputError(
                        f"{self.path}: column {self.field!r} holds {kind}, expected strings"
                    )
                rows = max(file.metadata.num_rows, 1)
                done = 0
                for batch in file.iter_batches(batch_size=1024, columns=[self.field]):
                    column = batch.column(0).cast(pa.large_string()).drop_null()
                    self.nulls += len(batch) - len(column)
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
            raise InputError(f"{self.path} is not a complete .parquet file: {error}") from error
        self.bytes_read = size
        self._sha256 = sha256_file(self.path)


def documents(path: str | Path, field: str = "text", errors: str = "strict") -> Iterator[str]:
    """The documents of a file, one at a time: the reference definition, used in tests."""
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


# ---- what is not UTF-8 -------------------------------------------------------------------

HEAD_BYTES = 8  # that identify a file's kind
SAMPLE_BYTES = 1 << 16  # on each side of a byte that is not UTF-8

MAGIC = (
    (b"\x1f\x8b\x08", "gzip"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh91AY&", "bzip2"),
    (b"PK\x03\x04", "a zip archive"),
    (b"PAR1", "parquet"),
    (b"%PDF-", "PDF"),
)
BYTE_ORDER_MARKS = (  # UTF-32's begin like UTF-16's
    (codecs.BOM_UTF32_LE, "UTF-32LE"),
    (codecs.BOM_UTF32_BE, "UTF-32BE"),
    (codecs.BOM_UTF16_LE, "UTF-16LE"),
    (codecs.BOM_UTF16_BE, "UTF-16BE"),
)
REPLACE = 'errors="replace" (--errors replace) skips such bytes'


def check_is_text(path: str | Path, piece: bytes, offset: int = 0, packed: bool = False) -> None:
    """Refuses text whose first bytes or zeros show it to be compressed, binary, UTF-16 or UTF-32.

    Args:
        piece: some of the file's text, from byte `offset` on; at 0 with HEAD_BYTES of it.
        packed: whether it was unpacked.
    """
    for magic, name in MAGIC if offset == 0 else ():
        if piece.startswith(magic):
            raise InputError(
                f"{path} is compressed more than once: decompressed, it is {name} again"
                if packed
                else f"{path} is {name}, not text; its name should say so"
            )
    for mark, encoding in BYTE_ORDER_MARKS if offset == 0 else ():
        if piece.startswith(mark):
            raise InputError(f"{path} is {encoding}, not UTF-8; {_convert(encoding)}")
    looks_like = _of_zeros(piece, offset)
    if looks_like == "":
        raise InputError(
            f"{path} is binary, not text: {piece.count(0)} of {len(piece)} bytes are zero"
        )
    if looks_like:
        raise InputError(f"{path} looks like {looks_like}, not UTF-8; {_convert(looks_like)}")


def _convert(encoding: str) -> str:
    return f"convert it: iconv -f {encoding} -t UTF-8"


def _with_head(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The pieces, the first at least HEAD_BYTES long unless all together are shorter."""
    head = b""
    for piece in pieces:
        head += piece
        if len(head) >= HEAD_BYTES:
            break
    if head:
        yield head
    yield from pieces


def _of_zeros(text: bytes, offset: int) -> str | None:
    """The encoding that zero bytes at regular places show; "" for binary; None for text."""
    if 0 not in text:  # memchr, 25 times as fast as counting
        return None
    zeros = text.count(0)
    # Broken programs leave a few in text; the splitter deletes them.
    if zeros < 4 or zeros * 50 < len(text):
        return None
    parts = [text[(i - offset) % 4 :: 4] for i in range(4)]
    share = [part.count(0) / max(len(part), 1) for part in parts]
    full = [s > 0.9 for s in share]
    if full in ([False, False, True, True], [False, True, True, True]):
        return "UTF-32LE"
    if full in ([True, True, False, False], [True, True, True, False]):
        return "UTF-32BE"
    even, odd = share[0] + share[2], share[1] + share[3]
    if min(even, odd) * 8 < max(even, odd):
        encoding = "UTF-16LE" if odd > even else "UTF-16BE"
        units = text[offset % 2 :].decode(encoding, "replace")
        if sum(c < " " and c not in "\t\n\f\r" for c in units) * 8 < len(units):
            return encoding
    return ""


def _advice(sample: bytes) -> str:
    """Advice about bytes that are not UTF-8, from the bytes around them."""
    good, runs = _replace_errors(sample)
    several = sum(byte >= 0xC0 for byte in good) - good.count(REPLACEMENT)
    high = sum(byte >= 0x80 for byte in sample)
    controls = sum(byte < 0x20 and byte not in b"\t\n\v\f\r\x1b" for byte in sample)
    if controls * 40 > len(sample):
        return "it looks like a binary file"
    if several > runs:
        return f"the rest is UTF-8, so it is corrupt there; {REPLACE}"
    if high * 5 < len(sample):
        return f"it looks like Latin-1; {_convert('WINDOWS-1252')}"
    return "it is in another encoding; convert it: iconv -f ENCODING -t UTF-8"


REPLACEMENT = "\ufffd".encode()


def _replace_errors(text: bytes) -> tuple[bytes, int]:
    """Replaces each run of invalid bytes by U+FFFD; also returns the number of runs.

    A run is a byte that begins no character, with the continuation bytes after it, as the C++ core
    counts them.
    """
    parts: list[bytes | memoryview] = []
    begin = runs = 0
    view = memoryview(text)
    while (at := _core.utf8_error(view[begin:])) is not None:
        parts += [view[begin : begin + at], REPLACEMENT]
        begin += at + 1
        while begin < len(text) and text[begin] & 0xC0 == 0x80:
            begin += 1
        runs += 1
    return b"".join([*parts, view[begin:]]), runs


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


def _unpacker(packing: str) -> Callable[[], Any]:
    """Makes decompressors with decompress(data), eof and unused_data."""
    if packing == ".gz":
        return lambda: zlib.decompressobj(wbits=31)
    if packing == ".xz":
        return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ)
    with require_extra("data", "reading .zst"):
        import zstandard
    # The window that `zstd --long=31` packs with; the default refuses more than 128 MiB.
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj


def _unpacking_errors() -> tuple[type[Exception], ...]:
    try:
        import zstandard
    except ImportError:
        return (zlib.error, lzma.LZMAError)
    return (zlib.error, lzma.LZMAError, zstandard.ZstdError)
