"""Text files, or corpora, into a corpus folder: whole, or not there.

A build works in a hidden folder beside its place, `.<name>.partial-corpus`. Now and then it forces
what it has to the disk and notes how far it is; the same command after an interruption goes on from
there. The last thing written is the manifest; then the folder is renamed into place.
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
    """Reads text files into a corpus folder, which appears at `out` when it is whole.

    Args:
        texts: files and folders (mvbert.text.readers says which).
        out: the folder. One that already holds the corpus of the same texts and settings is kept.
        lowercase: lower-case, as for BERT's uncased vocabularies.
        strip_accents: whether lower-cased text loses its accents; None: as those of BERT's.
        heldout_share: of the documents, in [0, 1). A document is held out by a draw for (seed,
            its number) alone. If none is drawn, the one nearest to it is; of a single document,
            the last share of its words.
        heldout_texts: held-out files and folders; then none of `texts` is held out.
        field: the field of .jsonl objects, the column of .parquet files.
        errors: "strict" refuses text that is not UTF-8, "replace" goes on without those bytes.
        threads: that split text; 0 is one for each available core. Does not change the corpus.
        seed: of the held-out draw.
        overwrite: replace what is at `out`.
        resume: go on where the same build was killed or interrupted. The corpus is the same.
        progress: called with (bytes read, bytes in all), of files as they are on the disk.

    Returns:
        The manifest.

    Raises:
        InputError: text or folder that cannot be used; nothing is left behind then but a
            checkpoint, if there is one, from which the same command continues.
    """
    if errors not in ("strict", "replace"):
        raise InputError(f'errors must be "strict" or "replace", got {errors!r}')
    if not 0 <= heldout_share < 1:
        raise InputError(f"heldout_share must lie in [0, 1), got {heldout_share}")
    threads = cores(threads)
    if not 0 <= seed < 2**64:
        raise InputError(f"seed must lie in [0, 2^64), got {seed}")
    train_found, heldout_found = find_texts(texts), find_texts(heldout_texts)
    train_files, heldout_files = train_found.files, heldout_found.files
    if not train_files:
        raise InputError("no text given: name at least one file or folder")
    _check_apart(train_files, heldout_files)
    left_out = Counter(train_found.left_out) + Counter(heldout_found.left_out)
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


def merge_corpora(
    corpora: Sequence[str | Path],
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Joins corpora without their texts: the train streams one after the other, and the held-out.

    All of every corpus is compared with its manifest first. Memory is the merged lexicon and four
    bytes for each word of the parts' lexicons.

    Args:
        corpora: folders of at least two corpora, all cased or all uncased, of different texts.
        out: the folder to make.
        overwrite: replace what is at `out`.
        progress: called with (bytes of streams written, in all).

    Returns:
        The manifest.

    Raises:
        InputError: corpora that do not fit together or that are damaged; a folder that cannot be
            used.
    """
    if len(corpora) < 2:
        raise InputError(f"merging needs at least two corpora, got {len(corpora)}")
    parts = [Corpus.open(folder, verify="sha256") for folder in corpora]
    first = parts[0]
    for part in parts[1:]:
        for name in ("lowercase", "strip_accents", "unicode"):
            if part.manifest.get(name) != first.manifest.get(name):
                raise InputError(
                    f"{part.folder} has {name} {part.manifest.get(name)} but {first.folder} has "
                    f"{first.manifest.get(name)}; build them alike to merge them"
                )
    if len({part.folder.resolve() for part in parts}) < len(parts):
        raise InputError("a corpus is named twice; a merge counts each once")
    owner: dict[str, Path] = {}
    for part in parts:
        for source in part.manifest["sources"]:
            known = owner.setdefault(source["sha256"], part.folder)
            if known != part.folder:
                raise InputError(
                    f"{known} and {part.folder} both hold the text {source['name']}; "
                    "a merge counts each text once"
                )
    out = Path(out)
    with _partial_folder(out, overwrite, resume=False) as folder:
        data, ends, counts, maps = _core.merge_lexicons(
            [(part.words.data, part.words.ends, part.counts) for part in parts]
        )
        total = sum(part.train.nbytes + part.heldout.nbytes for part in parts)
        done = 0
        files = {}
        for name, streams in zip(
            STREAMS, ([p.train for p in parts], [p.heldout for p in parts]), strict=True
        ):
            with _writing(folder / name) as file:
                for stream, final_ids in zip(streams, maps, strict=True):
                    for ids in _ahead(_renumbered(stream, final_ids)):
                        file.write(ids)
                        done += ids.nbytes
                        if progress is not None:
                            progress(done, total)
            files[name] = file.entry()
        files |= _write_lexicon(folder, data, ends, counts)
        manifests = [part.manifest for part in parts]
        manifest: dict[str, Any] = {
            **_header(first.lowercase, first.strip_accents),
            "documents": sum(m["documents"] for m in manifests),
            "words": sum(m["words"] for m in manifests),
            "distinct": len(counts) - 1,
            "bytes": sum(m["bytes"] for m in manifests),
            "not_utf8": sum(m["not_utf8"] for m in manifests),
            "left_out": dict(sum((Counter(m.get("left_out")) for m in manifests), Counter())),
            "heldout": {
                "documents": sum(m["heldout"]["documents"] for m in manifests),
                "words": sum(m["heldout"]["words"] for m in manifests),
                "by": "merge",
            },
            "sources": [source for m in manifests for source in m["sources"]],
            "files": files,
        }
        write_json(folder / MANIFEST, manifest)
        return manifest


# ---- the folder while it is made --------------------------------------------------------------


@contextlib.contextmanager
def _partial_folder(out: Path, overwrite: bool, resume: bool) -> Iterator[Path]:
    """A hidden folder to fill that becomes `out` when the block ends.

    With a checkpoint in it, it stays where it is when the process is killed, interrupted or meets
    an error: the same command continues from there.
    """
    check_new_folder(out, overwrite)
    folder = out.parent / partial_prefix(out, "corpus")
    ours = not folder.exists()  # to remove: nobody else's, and no checkpoint in it
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
                ours = False
                raise InputError(
                    f"another process is building {out}; wait for it or end it"
                ) from None
            ours = True
            if not resume:
                _clear(folder)
            try:
                yield folder
                _clear(folder, {MANIFEST, *STREAMS, *LEXICON})
                (folder / LOCK).unlink()
                sync_folder(folder)
                move_folder(folder, out)
                ours = False
            except OSError as error:
                raise write_error(out, error) from error
    except BaseException as error:
        if ours and (folder / CHECKPOINT).is_file():
            ours = False
            if isinstance(error, InputError):
                raise InputError(
                    f"{error}; what was read before is kept, and the same command continues "
                    "there if those texts are unchanged"
                ) from error
        raise
    finally:
        if ours:
            shutil.rmtree(folder, ignore_errors=True)


def _clear(folder: Path, keep: set[str] | frozenset[str] = frozenset()) -> None:
    for path in folder.iterdir():
        if path.name != LOCK and path.name not in keep:
            path.unlink()


class _Writer:
    """A file being written, with its size and its SHA-256; an error names the file."""

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
        """What the manifest says of the file."""
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
    """A file to write, forced to the disk at the end."""
    with _closing(_Writer(path)) as writer:
        yield writer
        writer.sync()


@contextlib.contextmanager
def _closing(writer: _Writer) -> Iterator[_Writer]:
    try:
        yield writer
    except BaseException:
        with contextlib.suppress(InputError):  # the first error is the one to tell
            writer.close()
        raise
    writer.close()


def _casing(lowercase: bool, strip_accents: bool | None) -> dict[str, bool]:
    """How text is normalised; of accents only what is unusual."""
    unusual = lowercase and strip_accents is False
    if strip_accents and not lowercase:
        raise InputError("strip_accents needs lowercase: accents stay in cased text")
    return {"lowercase": lowercase, **({"strip_accents": False} if unusual else {})}


def _header(lowercase: bool, strip_accents: bool | None) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        **_casing(lowercase, strip_accents),
        "unicode": _core.unicode_version,
    }


def _renumbered(stream: np.ndarray, final_ids: np.ndarray) -> Iterator[np.ndarray]:
    for at in range(0, len(stream), STREAM_IDS):
        yield final_ids.take(stream[at : at + STREAM_IDS])


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, none of them None; while one is used, another thread makes the next."""
    with ThreadPoolExecutor(1) as worker:
        coming = worker.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = worker.submit(next, items, None)
            yield item


def _write_lexicon(
    folder: Path, data: np.ndarray, ends: np.ndarray, counts: np.ndarray
) -> dict[str, Any]:
    """Writes the three files; returns what the manifest says of them."""
    files = {}
    for name, array in zip(LEXICON, (data, ends, counts), strict=True):
        with _writing(folder / name) as file:
            file.write(array)
        files[name] = file.entry()
    return files


def _same_corpus(
    out: Path, train: list[Path], heldout: list[Path], settings: dict[str, Any]
) -> dict[str, Any]:
    """The manifest of the corpus at `out`, if it was made from these texts with these settings."""
    manifest = Corpus.open(out).manifest
    theirs = {
        **_casing(manifest["lowercase"], manifest.get("strip_accents")),
        "field": manifest.get("field"),
        "errors": manifest.get("errors"),
        "heldout": {key: manifest["heldout"].get(key) for key in ("share", "seed")},
    }
    other = [name for name in {**settings, **theirs} if settings.get(name) != theirs.get(name)]
    if not other:
        sources = [
            (source["name"], source["bytes"], source["heldout"]) for source in manifest["sources"]
        ]
        ours = [
            (path.name, path.stat().st_size, held)
            for held, paths in ((False, train), (True, heldout))
            for path in paths
        ]
        if ours != sources or any(
            sha256_file(path) != source["sha256"]
            for path, source in zip(train + heldout, manifest["sources"], strict=True)
        ):
            other = ["texts"]
    if other:
        raise InputError(
            f"{out} holds another corpus (other {', '.join(other)}); "
            "give another folder or allow overwriting"
        )
    return manifest


def _is_corpus(folder: Path) -> bool:
    try:
        return (folder / MANIFEST).is_file()
    except OSError as error:
        raise write_error(folder, error) from error


def _check_apart(train: list[Path], heldout: list[Path]) -> None:
    """Refuses a text that is held out and not: the same file, or a copy of it."""
    by_size: dict[int, list[Path]] = {}
    for path in train if heldout else ():
        by_size.setdefault(path.stat().st_size, []).append(path)
    for held in heldout:
        for path in by_size.get(held.stat().st_size, ()):
            if path.samefile(held):
                raise InputError(f"{held}: given as text and as held-out text; choose one")
            if filecmp.cmp(path, held, shallow=False):
                raise InputError(
                    f"{held} is held out, but {path} has the same bytes; leave one of them out"
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
        """All text to word ids, as they come, in `<stream>.provisional`."""
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
                before = self.builder.totals()["documents"] - (0 if file.is_plain else self.skip)
                self.builder.begin_source(
                    number, "heldout" if heldout else train_part, self.skip if file.is_plain else 0
                )
                for _ in self._feed(file, self.skip):
                    self._drain(streams)
                    self.progress(done + file.bytes_read, total)
                    taken_in = self.builder.totals()["bytes"]
                    if taken_in - noted >= CHECKPOINT_BYTES and self._checkpoint(
                        streams, new_words, file.is_plain, before
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
        """Hands a file to the builder piece by piece, but for what is in already."""
        if file.is_plain:
            for text in _ahead(file.chunks()):
                if skip < len(text):
                    self.builder.add_text(memoryview(text)[skip:])
                    skip = 0
                else:
                    skip -= len(text)
                yield
        else:
            for texts, ends in _ahead(file.records()):
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

    # ---- going on after an interruption --------------------------------------------------

    def _checkpoint(
        self, streams: Sequence[_Writer], new_words: _Writer, plain: bool, before: int
    ) -> bool:
        """Notes how far the build is, all of it on the disk; False inside a very long document."""
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
            "skip": offset if plain else documents - before,
            "totals": {**self.builder.totals(), "documents": documents, "bytes": taken_in},
            "files": {file.path.name: file.path.stat().st_size for file in (*streams, new_words)},
        }
        write_json(self.folder / CHECKPOINT, self.state)
        return True

    def _restore(self) -> bool:
        """Goes back to the checkpoint in the folder, if it is one of this very build."""
        if not (self.folder / CHECKPOINT).is_file():
            return False
        state: dict[str, Any] = read_json_object(self.folder / CHECKPOINT)
        # What was not read yet may have been mended since.
        read = len(state["sources"]) + (state["skip"] > 0)
        ours, theirs = ({**s, "texts": s["texts"][:read]} for s in (self.state, state))
        if any(theirs.get(name) != value for name, value in ours.items()):
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
        """The corpus files from the provisional ones; the manifest comes last."""
        totals = self.builder.totals()
        if totals["train_words"] + totals["heldout_words"] == 0:
            raise InputError(f"there is no word in {_some(self.paths)}")
        train, heldout = (open_stream(self.provisional(name)) for name in STREAMS)
        by_draw = self.first_heldout == len(self.paths)
        if by_draw and totals["train_words"] == 0 and totals["heldout_documents"] == 1:
            # The one document was drawn: it is cut like one that was not.
            train, heldout = heldout, train
            totals["train_documents"], totals["heldout_documents"] = 1, 0
            self.builder.count(train)
        elif totals["train_words"] == 0:
            raise InputError(
                f"all {totals['heldout_documents']} documents of {_some(self.paths)} are held out; "
                "lower heldout_share (--heldout-share)"
            )
        begin, end, by = self._move(train, len(heldout), totals["train_documents"])
        moved = train[begin:end]
        # The tail of a single document leaves the document, and so a mark, in the train part.
        mark = train[end - 1 : end] if by == "tail" else train[:0]
        data, ends, counts, final_ids = self.builder.lexicon(moved[: len(moved) - len(mark)])
        files = {}
        for name, parts in (
            ("train.u32", (train[:begin], mark, train[end:])),
            ("heldout.u32", (heldout, moved)),
        ):
            with _writing(self.folder / name) as file:
                for part in parts:
                    for ids in _ahead(_renumbered(part, final_ids)):
                        file.write(ids)
            files[name] = file.entry()
        files |= _write_lexicon(self.folder, data, ends, counts)

        documents = int(counts[0])
        heldout_documents = totals["heldout_documents"] + (by in ("document", "tail"))
        manifest: dict[str, Any] = {
            **_header(self.settings["lowercase"], self.settings.get("strip_accents")),
            "documents": documents,
            "words": files["train.u32"]["bytes"] // 4 - documents,
            "distinct": len(counts) - 1,
            "bytes": totals["bytes"],
            "not_utf8": totals["replaced"] + self._sum("not_utf8"),
            "left_out": dict(left_out + Counter(nulls=self._sum("nulls"))),
            "heldout": {
                "documents": heldout_documents,
                "words": files["heldout.u32"]["bytes"] // 4 - heldout_documents,
                "by": by,
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
        """What of the provisional train stream is to be held out too: [begin, end), why.

        The reason, or how documents were held out where nothing is to be done: "texts" (files of
        their own), "draw", "document" (the smallest draw), "tail" (of the one document), "none".
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
            held = math.ceil(words * share)
            return (0, 0, "none") if held == words else (words - held, words + 1, "tail")
        chosen = int(np.argmin(_core.heldout_draws(seed, documents)))
        begin = 0
        for at in range(0, len(train), STREAM_IDS):
            for mark in np.flatnonzero(train[at : at + STREAM_IDS] == 0):
                if chosen == 0:
                    return begin, at + int(mark) + 1, "document"
                chosen -= 1
                begin = at + int(mark) + 1
        raise AssertionError("every train document has a mark")
