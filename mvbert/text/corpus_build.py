"""Builds a corpus folder, atomically, from text files.

A build works in a hidden folder beside its target, `.<name>.partial-corpus`. At intervals it syncs
its files and writes a checkpoint, from which the same command resumes after an interruption. The
manifest is written last; then the folder is renamed into place.
"""

from __future__ import annotations

import contextlib
import fcntl
import filecmp
import hashlib
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mvbert import _core
from mvbert.config import CorpusConfig
from mvbert.cores import cores
from mvbert.errors import InputError
from mvbert.files import (
    check_new_folder,
    move_folder,
    partial_prefix,
    read_json_object,
    sha256_file,
    sync_folder,
    write_error,
    write_json,
)
from mvbert.text.corpus_folder import (
    FORMAT,
    LEXICON,
    MANIFEST,
    STREAMS,
    VERSION,
    Corpus,
    open_stream,
)
from mvbert.text.readers import TextFile, find_texts

STREAM_IDS = 1 << 18  # renumbered at a time
CHECKPOINT_BYTES = 1 << 30  # of text between two notes of how far a build is
CHECKPOINT = "checkpoint.json"
NEW_WORDS = "words.provisional"  # in the order of their provisional ids, one a line
LOCK = "lock"

T = TypeVar("T")
Progress = Callable[[int, int], None]  # bytes on the disk read so far, and in all


def build_corpus(
    texts: Iterable[str | Path],
    out: str | Path,
    *,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    heldout_share: float = CorpusConfig.heldout_share,
    heldout_texts: Iterable[str | Path] = (),
    field: str = CorpusConfig.field,
    errors: str = CorpusConfig.errors,
    threads: int = 0,
    seed: int = 0,
    overwrite: bool = False,
    resume: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Reads text files into a corpus folder, which appears at `out` when it is complete.

    Args:
        texts: files and folders (mvbert.text.readers lists the supported kinds).
        out: the folder. An existing corpus of the same texts and settings is kept.
        lowercase: lower-case the text, as for BERT's uncased vocabularies.
        strip_accents: remove accents from lower-cased text; None: the same as `lowercase`.
        heldout_share: share of documents to hold out, in [0, 1). The draw of a document depends
            only on (seed, its number). If none is drawn, the one with the smallest draw is held
            out; of a single document, the last share of its words.
        heldout_texts: files and folders to hold out; then none of `texts` is held out.
        field: field of .jsonl objects, column of .parquet files.
        errors: "strict" refuses invalid UTF-8, "replace" skips the invalid bytes.
        threads: threads that split text (0: all available cores). Does not change the corpus.
        seed: seed of the held-out draw.
        overwrite: replace an existing folder.
        resume: resume an interrupted build. Does not change the corpus.
        progress: called with (bytes read, total bytes), in file sizes.

    Returns:
        The manifest.

    Raises:
        InputError: a text or the folder cannot be used; only a checkpoint remains, if one was
            written, from which the same command resumes.
    """
    if errors not in ("strict", "replace"):
        raise InputError(f'errors must be "strict" or "replace", got {errors!r}')
    if not 0 <= heldout_share < 1:
        raise InputError(f"heldout_share must lie in [0, 1), got {heldout_share}")
    threads = cores(threads)
    if not 0 <= seed < 2**64:
        raise InputError(f"seed must lie in [0, 2^64), got {seed}")
    train, heldout = find_texts(texts), find_texts(heldout_texts)
    train_files, heldout_files = train.files, heldout.files
    if not train_files:
        raise InputError("no text given; give at least one file or folder")
    _check_disjoint(train_files, heldout_files)
    left_out = Counter(train.left_out) + Counter(heldout.left_out)
    settings: dict[str, Any] = {
        **_casing(lowercase, strip_accents),
        "field": field,
        "errors": errors,
        "heldout": {"share": 0.0 if heldout_files else float(heldout_share), "seed": seed},
    }
    out = Path(out)
    if not overwrite and _is_corpus(out):
        return _same_corpus(out, train_files, heldout_files, settings)
    with _partial_folder(out, overwrite, resume) as folder:
        build = _Build(folder, train_files, heldout_files, settings, threads, progress)
        build.read_texts()
        return build.finish(left_out)


# ---- the folder while it is made --------------------------------------------------------------


@contextlib.contextmanager
def _partial_folder(out: Path, overwrite: bool, resume: bool) -> Iterator[Path]:
    """Makes a hidden folder to fill that becomes `out` when the block ends.

    If it contains a checkpoint, it is kept when the process is killed, interrupted or fails, and
    the same command resumes from it.
    """
    check_new_folder(out, overwrite)
    folder = out.parent / partial_prefix(out, "corpus")
    remove = not folder.exists()  # not while another process uses it or it has a checkpoint
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / LOCK, "wb")  # noqa: SIM115 (held until the folder has moved)
        except OSError as error:
            raise write_error(folder, error) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                remove = False
                raise InputError(
                    f"another process is building {out}; wait until it finishes, or stop it"
                ) from None
            remove = True
            if not resume:
                _clear(folder)
            try:
                yield folder
                _clear(folder, {MANIFEST, *STREAMS, *LEXICON})
                (folder / LOCK).unlink()
                sync_folder(folder)
                move_folder(folder, out)
                remove = False
            except OSError as error:
                raise write_error(out, error) from error
    except BaseException as error:
        if remove and (folder / CHECKPOINT).is_file():
            remove = False
            if isinstance(error, InputError):
                raise InputError(
                    f"{error}; text read before that is kept, and the same command resumes there "
                    "if those files are unchanged"
                ) from error
        raise
    finally:
        if remove:
            shutil.rmtree(folder, ignore_errors=True)


def _clear(folder: Path, keep: set[str] | frozenset[str] = frozenset()) -> None:
    for path in folder.iterdir():
        if path.name != LOCK and path.name not in keep:
            path.unlink()


class _Writer:
    """A file being written, with its size and SHA-256; errors give its path."""

    def __init__(self, path: Path, mode: str = "wb", hashed: bool = True):
        self.path = path
        self.bytes = 0  # written by this object
        self._digest = hashlib.sha256() if hashed else None
        with self._errors():
            self._file = open(path, mode)  # noqa: SIM115 (closed by _writing)

    def write(self, data: np.ndarray | bytes) -> None:
        if isinstance(data, np.ndarray):
            data = np.ascontiguousarray(data, data.dtype.newbyteorder("<"))
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        with self._errors():
            self._file.write(view)
        self.bytes += len(view)
        if self._digest is not None:
            self._digest.update(view)

    def sync(self) -> None:
        with self._errors():
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with self._errors():
            self._file.close()

    def entry(self) -> dict[str, Any]:
        """The file's entry in the manifest."""
        assert self._digest is not None, "the file was to be hashed"
        return {"bytes": self.bytes, "sha256": self._digest.hexdigest()}

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise write_error(self.path, error) from error


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[_Writer]:
    """Opens a file to write that is synced to disk at the end."""
    with _closing(_Writer(path)) as writer:
        yield writer
        writer.sync()


@contextlib.contextmanager
def _closing(writer: _Writer) -> Iterator[_Writer]:
    try:
        yield writer
    except BaseException:
        with contextlib.suppress(InputError):  # report the first error
            writer.close()
        raise
    writer.close()


def _casing(lowercase: bool, strip_accents: bool | None) -> dict[str, bool]:
    """The manifest's normalisation; strip_accents only if not the default."""
    unusual = lowercase and strip_accents is False
    if strip_accents and not lowercase:
        raise InputError("strip_accents needs lowercase; cased text keeps its accents")
    return {"lowercase": lowercase, **({"strip_accents": False} if unusual else {})}


def _renumbered(stream: np.ndarray, final_ids: np.ndarray) -> Iterator[np.ndarray]:
    for at in range(0, len(stream), STREAM_IDS):
        yield final_ids.take(stream[at : at + STREAM_IDS])


def _prefetch(items: Iterator[T]) -> Iterator[T]:
    """Yields the items (none may be None) while another thread makes the next one."""
    with ThreadPoolExecutor(1) as worker:
        pending = worker.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = worker.submit(next, items, None)
            yield item


def _same_corpus(
    out: Path, train: list[Path], heldout: list[Path], settings: dict[str, Any]
) -> dict[str, Any]:
    """The manifest of the corpus at `out` if it has the same texts and settings, else None."""
    manifest = Corpus.open(out).manifest
    recorded = {
        **_casing(manifest["lowercase"], manifest.get("strip_accents")),
        "field": manifest.get("field"),
        "errors": manifest.get("errors"),
        "heldout": {key: manifest["heldout"].get(key) for key in ("share", "seed")},
    }
    other = [name for name in {**settings, **recorded} if settings.get(name) != recorded.get(name)]
    if not other:
        sources = [
            (source["name"], source["bytes"], source["heldout"]) for source in manifest["sources"]
        ]
        files = [
            (path.name, path.stat().st_size, is_heldout)
            for is_heldout, paths in ((False, train), (True, heldout))
            for path in paths
        ]
        if files != sources or any(
            sha256_file(path) != source["sha256"]
            for path, source in zip(train + heldout, manifest["sources"], strict=True)
        ):
            other = ["texts"]
    if other:
        raise InputError(
            f"{out} holds another corpus (different {', '.join(other)}); "
            "give another folder or allow overwriting"
        )
    return manifest


def _is_corpus(folder: Path) -> bool:
    try:
        return (folder / MANIFEST).is_file()
    except OSError as error:
        raise write_error(folder, error) from error


def _check_disjoint(train: list[Path], heldout: list[Path]) -> None:
    """Refuses a file, or a copy of it, in both the text and the held-out text."""
    by_size: dict[int, list[Path]] = {}
    for path in train if heldout else ():
        by_size.setdefault(path.stat().st_size, []).append(path)
    for file in heldout:
        for path in by_size.get(file.stat().st_size, ()):
            if path.samefile(file):
                raise InputError(f"{file} is given both as text and as held-out text; choose one")
            if filecmp.cmp(path, file, shallow=False):
                raise InputError(
                    f"{file} is held out, but {path} has the same content; remove one of them"
                )


def _some(paths: Sequence[Path]) -> str:
    names = ", ".join(map(str, paths[:3]))
    return names + (f" and {len(paths) - 3} more files" if len(paths) > 3 else "")


# ---- building ---------------------------------------------------------------------------------


class _Build:
    """One build: texts to provisional streams and a lexicon, then to the files of a corpus."""

    def __init__(
        self,
        folder: Path,
        train_files: list[Path],
        heldout_files: list[Path],
        settings: dict[str, Any],
        threads: int,
        progress: Progress | None,
    ):
        self.folder = folder
        self.paths = train_files + heldout_files
        self.first_heldout = len(train_files)
        self.settings = settings
        self.progress = progress or (lambda done, total: None)
        self.builder = _core.CorpusBuilder(
            lowercase=settings["lowercase"],
            strip_accents=settings.get("strip_accents", True),
            heldout_share=settings["heldout"]["share"],
            seed=settings["heldout"]["seed"],
            replace=settings["errors"] == "replace",
            threads=threads,
        )
        # What a checkpoint holds.
        self.sources: list[dict[str, Any]] = []  # read to the end
        self.skip = 0  # of the next source: bytes of plain text, or records, that are in already
        self.known_words = 1  # ids below are in NEW_WORDS
        self.state: dict[str, Any] = {
            "version": VERSION,
            "unicode": _core.unicode_version,
            "settings": settings,
            "texts": [
                [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns, heldout]
                for heldout, paths in ((False, train_files), (True, heldout_files))
                for path in paths
            ],
        }

    def provisional(self, name: str) -> Path:
        return self.folder / f"{name}.provisional"

    # ---- reading -------------------------------------------------------------------------

    def read_texts(self) -> None:
        """Converts all text to provisional word ids, in `<stream>.provisional`."""
        if not self._restore():
            _clear(self.folder)
        total = sum(path.stat().st_size for path in self.paths)
        done = sum(source["bytes"] for source in self.sources)
        train_part = "train" if self.first_heldout < len(self.paths) else "draw"
        with contextlib.ExitStack() as stack:
            streams = [
                stack.enter_context(_closing(_Writer(self.provisional(name), "ab", hashed=False)))
                for name in STREAMS
            ]
            new_words = stack.enter_context(
                _closing(_Writer(self.folder / NEW_WORDS, "ab", hashed=False))
            )
            noted = self.builder.totals()["bytes"]
            for number in range(len(self.sources), len(self.paths)):
                path = self.paths[number]
                heldout = number >= self.first_heldout
                file = TextFile(path, self.settings["field"], self.settings["errors"])
                base = self.builder.totals()["documents"] - (0 if file.is_plain else self.skip)
                self.builder.begin_source(
                    number, "heldout" if heldout else train_part, self.skip if file.is_plain else 0
                )
                for _ in self._feed(file, self.skip):
                    self._drain(streams)
                    self.progress(done + file.bytes_read, total)
                    taken_in = self.builder.totals()["bytes"]
                    if taken_in - noted >= CHECKPOINT_BYTES and self._checkpoint(
                        streams, new_words, file.is_plain, base
                    ):
                        noted = taken_in
                self.skip = 0
                done += file.bytes_read
                self.sources.append(
                    {
                        "name": path.name,
                        "bytes": file.bytes_read,
                        "sha256": file.sha256,
                        "heldout": heldout,
                        **({"nulls": file.nulls} if file.nulls else {}),
                        **({"not_utf8": file.replaced} if file.replaced else {}),
                    }
                )
            self.builder.flush()
            self._drain(streams)

    def _feed(self, file: TextFile, skip: int) -> Iterator[None]:
        """Feeds a file to the builder in blocks, skipping what a checkpoint already covers."""
        if file.is_plain:
            for text in _prefetch(file.chunks()):
                if skip < len(text):
                    self.builder.add_text(memoryview(text)[skip:])
                    skip = 0
                else:
                    skip -= len(text)
                yield
        else:
            for texts, ends in _prefetch(file.records()):
                if skip < len(ends):
                    begin = int(ends[skip - 1]) if skip else 0
                    self.builder.add_documents(memoryview(texts)[begin:], ends[skip:] - begin)
                    skip = 0
                else:
                    skip -= len(ends)
                yield

    def _drain(self, streams: Sequence[_Writer]) -> None:
        try:
            parts = self.builder.take()
        except _core.NotUtf8 as error:
            source, offset = error.args
            file = TextFile(self.paths[source])
            raise InputError(
                f"{file.path}: not UTF-8 at byte {offset} of its text; {file.advice(offset)}"
            ) from None
        for stream, pieces in zip(streams, parts, strict=True):
            for ids in pieces:
                stream.write(ids)

    # ---- checkpoints ---------------------------------------------------------------------

    def _checkpoint(
        self, streams: Sequence[_Writer], new_words: _Writer, plain: bool, base: int
    ) -> bool:
        """Syncs all files and writes a checkpoint; returns False inside a very long document."""
        paused = self.builder.pause()
        if paused is None:
            return False
        self._drain(streams)
        offset, documents, taken_in = paused
        words = self.builder.new_words(self.known_words)
        new_words.write(words)
        self.known_words += words.count(b"\n")
        for file in (*streams, new_words):
            file.sync()
        self.state |= {
            "sources": self.sources,
            "skip": offset if plain else documents - base,
            "totals": {**self.builder.totals(), "documents": documents, "bytes": taken_in},
            "files": {file.path.name: file.path.stat().st_size for file in (*streams, new_words)},
        }
        write_json(self.folder / CHECKPOINT, self.state)
        return True

    def _restore(self) -> bool:
        """Restores the checkpoint in the folder, if it belongs to the same build."""
        if not (self.folder / CHECKPOINT).is_file():
            return False
        state: dict[str, Any] = read_json_object(self.folder / CHECKPOINT)
        # Files not read yet may have been repaired since.
        read = len(state["sources"]) + (state["skip"] > 0)
        current, saved = ({**s, "texts": s["texts"][:read]} for s in (self.state, state))
        if any(saved.get(name) != value for name, value in current.items()):
            return False
        for name, size in state["files"].items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size < size:
                return False
            os.truncate(path, size)
        words = (self.folder / NEW_WORDS).read_bytes()
        train = open_stream(self.provisional("train.u32"))
        self.builder.restore(words, train, state["totals"])
        self.sources, self.skip = state["sources"], state["skip"]
        self.known_words += words.count(b"\n")
        return True

    # ---- finishing -----------------------------------------------------------------------

    def finish(self, left_out: Counter[str]) -> dict[str, Any]:
        """Writes the corpus files from the provisional ones, and the manifest last."""
        totals = self.builder.totals()
        if totals["train_words"] + totals["heldout_words"] == 0:
            raise InputError(f"{_some(self.paths)}: no words found")
        train, heldout = (open_stream(self.provisional(name)) for name in STREAMS)
        by_draw = self.first_heldout == len(self.paths)
        if by_draw and totals["train_words"] == 0 and totals["heldout_documents"] == 1:
            # The single document was drawn; hold out its tail instead.
            train, heldout = heldout, train
            totals["train_documents"], totals["heldout_documents"] = 1, 0
            self.builder.count(train)
        elif totals["train_words"] == 0:
            raise InputError(
                f"all {totals['heldout_documents']} documents of {_some(self.paths)} are held out; "
                "lower heldout_share (--heldout-share)"
            )
        begin, end, method = self._move(train, len(heldout), totals["train_documents"])
        moved = train[begin:end]
        # If the tail of a single document is held out, its train part also needs an end mark.
        mark = train[end - 1 : end] if method == "tail" else train[:0]
        data, ends, counts, final_ids = self.builder.lexicon(moved[: len(moved) - len(mark)])
        files = {}
        for name, parts in (
            ("train.u32", (train[:begin], mark, train[end:])),
            ("heldout.u32", (heldout, moved)),
        ):
            with _writing(self.folder / name) as file:
                for part in parts:
                    for ids in _prefetch(_renumbered(part, final_ids)):
                        file.write(ids)
            files[name] = file.entry()
        lexicon: tuple[np.ndarray, ...] = (data, ends, counts)
        for name, array in zip(LEXICON, lexicon, strict=True):
            with _writing(self.folder / name) as file:
                file.write(array)
            files[name] = file.entry()

        documents = int(counts[0])
        heldout_documents = totals["heldout_documents"] + (method in ("document", "tail"))
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            **_casing(self.settings["lowercase"], self.settings.get("strip_accents")),
            "unicode": _core.unicode_version,
            "documents": documents,
            "words": files["train.u32"]["bytes"] // 4 - documents,
            "distinct": len(counts) - 1,
            "bytes": totals["bytes"],
            "not_utf8": totals["replaced"] + self._sum("not_utf8"),
            "left_out": dict(left_out + Counter(nulls=self._sum("nulls"))),
            "heldout": {
                "documents": heldout_documents,
                "words": files["heldout.u32"]["bytes"] // 4 - heldout_documents,
                "by": method,
                **self.settings["heldout"],
            },
            "field": self.settings["field"],
            "errors": self.settings["errors"],
            "sources": self.sources,
            "files": files,
        }
        write_json(self.folder / MANIFEST, manifest)
        return manifest

    def _sum(self, name: str) -> int:
        return sum(source.get(name, 0) for source in self.sources)

    def _move(self, train: np.ndarray, heldout: int, documents: int) -> tuple[int, int, str]:
        """The range [begin, end) of the provisional train stream to hold out, and how.

        How documents are held out: "texts" (separate files), "draw", "document" (the smallest
        draw), "tail" (of a single document), "none".
        """
        if self.first_heldout < len(self.paths):
            return 0, 0, "texts"
        share, seed = self.settings["heldout"]["share"], self.settings["heldout"]["seed"]
        if share == 0:
            return 0, 0, "none"
        if heldout:
            return 0, 0, "draw"
        if documents == 1:
            words = len(train) - 1
            count = math.ceil(words * share)
            return (0, 0, "none") if count == words else (words - count, words + 1, "tail")
        index = int(np.argmin(_core.heldout_draws(seed, documents)))
        begin = 0
        for at in range(0, len(train), STREAM_IDS):
            for mark in np.flatnonzero(train[at : at + STREAM_IDS] == 0):
                if index == 0:
                    return begin, at + int(mark) + 1, "document"
                index -= 1
                begin = at + int(mark) + 1
        raise AssertionError("every train document has a mark")
