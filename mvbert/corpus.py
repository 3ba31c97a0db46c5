"""Text, read once: a stream of word ids, and the lexicon of its distinct words with their counts.

Everything later works on these: a vocabulary is learnt from the lexicon, a vocabulary cuts the
lexicon (`Corpus.segment`), rows are gathered from the stream.

A corpus is a folder:

    manifest.json    what it was made from and with, counts, and size and SHA-256 of the other files
    train.u32        word ids, little-endian; id 0 ends a document
    heldout.u32      the same for the held-out documents
    lexicon.bytes    the normalised words, UTF-8, end to end, by word id
    lexicon.ends     uint64 [W], where each word ends in lexicon.bytes
    lexicon.counts   uint64 [W], how often each word is in train.u32

Ids are sorted by (count, high to low; bytes, low to high), after id 0, the empty word. A word of
more than 100 characters, which WordPiece turns into [UNK], is kept cut to 101.
"""

import contextlib
import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mvbert import _tokenizer
from mvbert.errors import InputError
from mvbert.files import (
    Json,
    atomic_folder,
    read_json_object,
    sha256_file,
    sync_file,
    write_error,
    write_json,
)
from mvbert.readers import TextFile, text_files

if TYPE_CHECKING:
    from mvbert.vocab import Vocab

FORMAT = "mvbert-corpus"
VERSION = 1
MANIFEST = "manifest.json"
STREAMS = ("train.u32", "heldout.u32")
LEXICON = ("lexicon.bytes", "lexicon.ends", "lexicon.counts")
STREAM_IDS = 1 << 20  # renumbered at a time

Progress = Callable[[int, int], None]  # bytes on the disk read so far, and in all


# ---- building ---------------------------------------------------------------------------------


def build_corpus(
    texts: Iterable[str | Path],
    out: str | Path,
    *,
    lowercase: bool = True,
    heldout_share: float = 0.01,
    heldout_texts: Iterable[str | Path] = (),
    field: str = "text",
    errors: str = "strict",
    threads: int = 0,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Json]:
    """Reads text files into a corpus folder, which appears at `out` when it is whole.

    Args:
        texts: files and folders (mvbert.readers says which).
        out: the folder. One that already holds the corpus of the same texts and settings is kept.
        lowercase: lower-case and strip accents, as for BERT's uncased vocabularies.
        heldout_share: of the documents, in [0, 1). A document is held out by a draw for (seed,
            its number) alone. If none is drawn, the one nearest to it is; of a single document,
            the last share of its words.
        heldout_texts: held-out files and folders; then none of `texts` is held out.
        field: the field of .jsonl objects, the column of .parquet files.
        errors: "strict" refuses text that is not UTF-8, "replace" goes on without those bytes.
        threads: that split text; 0 is one for each core. The corpus does not depend on it.
        seed: of the held-out draw.
        overwrite: replace what is at `out`.
        progress: called with (bytes read, bytes in all), of files as they are on the disk.

    Returns:
        The manifest.

    Raises:
        InputError: text or folder that cannot be used; nothing is left behind then.
    """
    if errors not in ("strict", "replace"):
        raise InputError(f'errors must be "strict" or "replace", got {errors!r}')
    if not 0 <= heldout_share < 1:
        raise InputError(f"heldout_share must lie in [0, 1), got {heldout_share}")
    if threads < 0:
        raise InputError(f"threads must be 0 (one for each core) or more, got {threads}")
    if not 0 <= seed < 2**64:
        raise InputError(f"seed must lie in [0, 2^64), got {seed}")
    train_files, heldout_files = text_files(texts), text_files(heldout_texts)
    if not train_files:
        raise InputError("no text given: name at least one file or folder")
    if heldout_files:
        heldout_share = 0.0
    settings: dict[str, Json] = {
        "lowercase": lowercase,
        "field": field,
        "errors": errors,
        "heldout": {"share": heldout_share, "seed": seed},
    }
    out = Path(out)
    if not overwrite and (out / MANIFEST).is_file():
        return _same_corpus(out, train_files, heldout_files, settings)

    with atomic_folder(out, overwrite=overwrite) as folder:
        build = _Build(folder, train_files, heldout_files, settings, cores(threads), progress)
        build.read_texts()
        manifest = build.finish()
    return manifest


def cores(threads: int) -> int:
    """The number of threads that `threads` asks for: 0 is one for each core of this process."""
    return threads or len(os.sched_getaffinity(0))


def _same_corpus(
    out: Path, train: list[Path], heldout: list[Path], settings: dict[str, Json]
) -> dict[str, Json]:
    """The manifest of the corpus at `out`, if it was made from these texts with these settings."""
    manifest = Corpus.open(out).manifest
    changed = [
        name for name, value in settings.items() if (name, value) not in _settings(manifest).items()
    ]
    if not changed:
        sources = manifest.get("sources")
        ours = [
            {"name": p.name, "bytes": p.stat().st_size, "heldout": held}
            for held, paths in ((False, train), (True, heldout))
            for p in paths
        ]
        theirs = [{k: s.get(k) for k in ("name", "bytes", "heldout")} for s in sources]
        if ours != theirs or any(
            sha256_file(p) != s["sha256"] for p, s in zip(train + heldout, sources, strict=True)
        ):
            changed = ["texts"]
    if changed:
        raise InputError(
            f"{out} holds another corpus (other {', '.join(changed)}); "
            "give another folder or allow overwriting"
        )
    return manifest


def _settings(manifest: dict[str, Json]) -> dict[str, Json]:
    heldout = manifest["heldout"]
    return {
        "lowercase": manifest["lowercase"],
        "field": manifest.get("field"),
        "errors": manifest.get("errors"),
        "heldout": {"share": heldout["share"], "seed": heldout["seed"]},
    }


class _Build:
    """One build: texts to provisional streams and a lexicon, then to the files of a corpus."""

    def __init__(
        self,
        folder: Path,
        train_files: list[Path],
        heldout_files: list[Path],
        settings: dict[str, Json],
        threads: int,
        progress: Progress | None,
    ):
        self.folder = folder
        self.paths = train_files + heldout_files
        self.first_heldout = len(train_files)
        self.settings = settings
        self.progress = progress or (lambda done, total: None)
        self.sources: list[dict[str, Json]] = []
        self.builder = _tokenizer.CorpusBuilder(
            lowercase=settings["lowercase"],
            heldout_share=settings["heldout"]["share"],
            seed=settings["heldout"]["seed"],
            replace=settings["errors"] == "replace",
            threads=threads,
        )

    def read_texts(self) -> None:
        """All text to word ids, as they come, in `<stream>.provisional`."""
        total = sum(path.stat().st_size for path in self.paths)
        done = 0
        with contextlib.ExitStack() as stack:
            streams = [
                stack.enter_context(_writing(self.provisional(name), hashed=False))
                for name in STREAMS
            ]
            train_part = "train" if self.first_heldout < len(self.paths) else "draw"
            for number, path in enumerate(self.paths):
                heldout = number >= self.first_heldout
                file = TextFile(path, self.settings["field"], self.settings["errors"])
                self.builder.begin_source(number, "heldout" if heldout else train_part)
                for _ in self._feed(file):
                    self._drain(streams)
                    self.progress(done + file.bytes_read, total)
                done += file.bytes_read
                self.sources.append(
                    {
                        "name": path.name,
                        "bytes": file.bytes_read,
                        "sha256": file.sha256,
                        "heldout": heldout,
                    }
                )
            self.builder.flush()
            self._drain(streams)
            self.progress(total, total)

    def provisional(self, name: str) -> Path:
        return self.folder / f"{name}.provisional"

    def _feed(self, file: TextFile) -> Iterator[None]:
        if file.is_plain:
            for text in file.chunks():
                self.builder.add_text(text)
                yield
        else:
            for text, ends in file.records():
                self.builder.add_documents(text, ends)
                yield

    def _drain(self, streams: Sequence["_Writer"]) -> None:
        try:
            parts = self.builder.take()
        except _tokenizer.NotUtf8 as error:
            source, offset = error.args
            raise InputError(
                f"{self.paths[source]}: not UTF-8 at byte {offset} of its text; convert it, or go "
                'on without what is not: errors="replace" (--errors replace)'
            ) from None
        for stream, pieces in zip(streams, parts, strict=True):
            for ids in pieces:
                stream.write(ids)

    def finish(self) -> dict[str, Json]:
        """The corpus files from the provisional ones; the manifest comes last."""
        totals = self.builder.totals()
        if totals["train_words"] + totals["heldout_words"] == 0:
            raise InputError(f"there is no word in {_some(self.paths)}")
        if totals["train_words"] == 0:
            raise InputError(
                f"all {totals['heldout_documents']} documents of {_some(self.paths)} are held out; "
                "lower heldout_share (--heldout-share)"
            )
        train, heldout = (_open_stream(self.provisional(name)) for name in STREAMS)
        begin, end, by = self._move(train, len(heldout))
        moved = train[begin:end]
        documents = {
            "train": totals["train_documents"],
            "heldout": totals["heldout_documents"],
        }
        # The tail of a single document leaves the document, and its mark, where it was.
        mark = np.zeros(1 if by == "tail" else 0, np.uint32)
        if by == "document":
            documents["train"] -= 1
        if end > begin:
            documents["heldout"] += 1
        data, ends, counts, final_ids = self.builder.lexicon(moved if by != "tail" else moved[:-1])

        files = {}
        ranges = {
            "train.u32": (train[:begin], mark, train[end:]),
            "heldout.u32": (heldout, moved),
        }
        ids = {}
        for name, parts in ranges.items():
            with _writing(self.folder / name) as file:
                for part in parts:
                    for at in range(0, len(part), STREAM_IDS):
                        file.write(final_ids[part[at : at + STREAM_IDS]])
            files[name] = file.entry()
            ids[name] = sum(map(len, parts))
        del train, heldout, moved, ranges, parts, part
        for name in STREAMS:
            self.provisional(name).unlink()
        for name, array in zip(LEXICON, (data, ends, counts), strict=True):
            with _writing(self.folder / name) as file:
                file.write(array)
            files[name] = file.entry()

        manifest: dict[str, Json] = {
            "format": FORMAT,
            "version": VERSION,
            "lowercase": self.settings["lowercase"],
            "unicode": _tokenizer.unicode_version,
            "documents": documents["train"],
            "words": ids["train.u32"] - documents["train"],
            "distinct": len(counts) - 1,
            "bytes": totals["bytes"],
            "not_utf8": totals["replaced"],
            "heldout": {
                "documents": documents["heldout"],
                "words": ids["heldout.u32"] - documents["heldout"],
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

    def _move(self, train: np.ndarray, heldout: int) -> tuple[int, int, str]:
        """What of the provisional train stream is to be held out too: [begin, end), why.

        The reason, or how documents were held out where nothing is to be done: "texts" (files of
        their own), "draw", "document" (the smallest draw), "tail" (of the one document), "none".
        """
        if self.first_heldout < len(self.paths):
            return 0, 0, "texts"
        share = self.settings["heldout"]["share"]
        if share == 0:
            return 0, 0, "none"
        if heldout:
            return 0, 0, "draw"
        documents = self.builder.totals()["train_documents"]
        if documents == 1:
            words = len(train) - 1
            held = math.ceil(words * share)
            return (0, 0, "none") if held == words else (words - held, words + 1, "tail")
        chosen = int(
            np.argmin(_tokenizer.heldout_draws(self.settings["heldout"]["seed"], documents))
        )
        begin = 0
        for at in range(0, len(train), STREAM_IDS):
            for mark in np.flatnonzero(train[at : at + STREAM_IDS] == 0):
                if chosen == 0:
                    return begin, at + int(mark) + 1, "document"
                chosen -= 1
                begin = at + int(mark) + 1
        raise AssertionError("every train document has a mark")


class _Writer:
    """A file being written, with its size and its SHA-256."""

    def __init__(self, path: Path, hashed: bool):
        self.path = path
        self._file = open(path, "wb")  # noqa: SIM115 (closed by _writing)
        self._digest = hashlib.sha256() if hashed else None
        self._bytes = 0

    def write(self, array: np.ndarray) -> None:
        data = memoryview(np.ascontiguousarray(array, array.dtype.newbyteorder("<"))).cast("B")
        self._file.write(data)
        self._bytes += len(data)
        if self._digest is not None:
            self._digest.update(data)

    def entry(self) -> dict[str, Json]:
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def _writing(path: Path, hashed: bool = True) -> Iterator[_Writer]:
    """A new file, forced to the disk at the end; an error names it."""
    try:
        writer = _Writer(path, hashed)
    except OSError as error:
        raise write_error(path, error) from error
    try:
        try:
            yield writer
        finally:
            writer.close()
        sync_file(path)
    except OSError as error:
        raise write_error(path, error) from error


def _open_stream(path: Path) -> np.ndarray:
    """Word ids as a read-only memory map (an empty file cannot be mapped)."""
    if path.stat().st_size == 0:
        return np.zeros(0, np.uint32)
    return np.memmap(path, np.dtype("<u4"), "r")


def _some(paths: Sequence[Path]) -> str:
    names = ", ".join(map(str, paths[:3]))
    return names + (f" and {len(paths) - 3} more files" if len(paths) > 3 else "")


# ---- using ------------------------------------------------------------------------------------


class Words(Sequence):
    """The words of a lexicon by id, as bytes of UTF-8: a view, 0 is the empty word."""

    def __init__(self, data: np.ndarray, ends: np.ndarray):
        self.data = data  # uint8, the words end to end
        self.ends = ends  # uint64 [W]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"word id must lie in [0, {count}), got {index}")
        index = int(index) % count
        begin = int(self.ends[index - 1]) if index else 0
        return self.data[begin : int(self.ends[index])].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        begin = 0
        for end in map(int, self.ends):
            yield self.data[begin:end].tobytes()
            begin = end


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The pieces of every word of a lexicon in one vocabulary.

    Word w has pieces ids[ends[w - 1] : ends[w]], with ends[-1] = 0; word 0, the end of a document,
    has none.
    """

    ends: np.ndarray  # uint32 [W]
    ids: np.ndarray  # int32, all pieces end to end
    vocab: "Vocab"

    @property
    def lengths(self) -> np.ndarray:
        """uint32 [W]: how many pieces each word has."""
        return np.diff(self.ends, prepend=np.uint32(0))


class Corpus:
    """A corpus folder, opened: streams and lexicon are memory maps, nothing is read in."""

    def __init__(self, folder: Path, manifest: dict[str, Json]):
        """Use `Corpus.open`."""
        self.folder = folder
        self.manifest = manifest
        self.train = _open_stream(folder / "train.u32")
        self.heldout = _open_stream(folder / "heldout.u32")
        data, ends, counts = (folder / name for name in LEXICON)
        self.words = Words(np.memmap(data, np.uint8, "r"), np.memmap(ends, np.dtype("<u8"), "r"))
        self.counts = np.memmap(counts, np.dtype("<u8"), "r")

    @property
    def lowercase(self) -> bool:
        return self.manifest["lowercase"]

    def __repr__(self) -> str:
        return (
            f"Corpus({str(self.folder)!r}, words={self.manifest['words']}, "
            f"distinct={self.manifest['distinct']})"
        )

    @classmethod
    def open(cls, folder: str | Path, verify: str = "sizes") -> "Corpus":
        """Opens a corpus folder.

        Args:
            folder: as build_corpus made it.
            verify: "sizes" compares the sizes of the files with the manifest, "sha256" their bytes
                too (reads all of them).

        Raises:
            InputError: not a corpus, of another format version, or a file that is missing or not
                the one the manifest describes, by name.
        """
        if verify not in ("sizes", "sha256"):
            raise InputError(f'verify must be "sizes" or "sha256", got {verify!r}')
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise InputError(
                f"{folder} is not a corpus: it has no {MANIFEST}; make one with `mvbert corpus`"
            )
        manifest = read_json_object(folder / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise InputError(f"{folder / MANIFEST} is not the manifest of a corpus")
        if manifest.get("version") != VERSION:
            raise InputError(
                f"{folder} is a corpus of format version {manifest.get('version')}, "
                f"this program reads version {VERSION}; build it again"
            )
        _check_manifest(folder / MANIFEST, manifest)
        for name in (*STREAMS, *LEXICON):
            _check_file(folder / name, manifest["files"][name], verify)
        return cls(folder, manifest)

    def segment(self, vocab: "Vocab", threads: int = 0) -> Segmentation:
        """Cuts every word of the lexicon with a vocabulary; takes milliseconds to seconds.

        Raises:
            InputError: a cased vocabulary for an uncased corpus, or the other way round.
        """
        if vocab.lowercase != self.lowercase:
            cased = {True: "uncased", False: "cased"}
            raise InputError(
                f"the vocabulary is {cased[vocab.lowercase]} but the corpus {self.folder} is "
                f"{cased[self.lowercase]}; build the corpus with lowercase={vocab.lowercase}"
            )
        wordpiece = _tokenizer.WordPiece(list(vocab.pieces), vocab.unk)
        ends, ids = _tokenizer.segment_lexicon(
            self.words.data, self.words.ends, wordpiece, cores(threads)
        )
        return Segmentation(ends, ids, vocab)


def _check_manifest(path: Path, manifest: dict[str, Json]) -> None:
    """Refuses a manifest whose values are not of the kinds that a corpus has."""

    def is_count(value: Json) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    heldout, files = manifest.get("heldout"), manifest.get("files")
    bad = [k for k in ("documents", "words", "distinct", "bytes") if not is_count(manifest.get(k))]
    if not isinstance(manifest.get("lowercase"), bool):
        bad.append("lowercase")
    if not isinstance(manifest.get("sources"), list):
        bad.append("sources")
    if not isinstance(heldout, dict) or not all(
        is_count(heldout.get(k)) for k in ("documents", "words", "seed")
    ):
        bad.append("heldout")
    if not isinstance(files, dict) or not all(
        isinstance(files.get(name), dict)
        and is_count(files[name].get("bytes"))
        and isinstance(files[name].get("sha256"), str)
        for name in (*STREAMS, *LEXICON)
    ):
        bad.append("files")
    if bad:
        raise InputError(f"{path} is damaged: {', '.join(bad)} missing or of the wrong kind")
    W = manifest["distinct"] + 1
    sizes = {
        "train.u32": 4 * (manifest["words"] + manifest["documents"]),
        "heldout.u32": 4 * (heldout["words"] + heldout["documents"]),
        "lexicon.ends": 8 * W,
        "lexicon.counts": 8 * W,
    }
    for name, size in sizes.items():
        if files[name]["bytes"] != size:
            raise InputError(
                f"{path} is damaged: by its counts {name} has {size} bytes, "
                f"by its list of files {files[name]['bytes']}"
            )


def _check_file(path: Path, entry: dict[str, Json], verify: str) -> None:
    if not path.is_file():
        raise InputError(f"{path} is missing; build the corpus again")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise InputError(
            f"{path} has {size} bytes, its manifest says {entry['bytes']}; build the corpus again"
        )
    if verify == "sha256" and sha256_file(path) != entry["sha256"]:
        raise InputError(
            f"{path} is not the file of its manifest (another SHA-256); build the corpus again"
        )


# ---- reporting --------------------------------------------------------------------------------


def run_corpus(
    texts: Iterable[str | Path],
    out: str | Path,
    *,
    vocabs: "Mapping[str, Vocab] | None" = None,
    **options,
) -> dict[str, Json]:
    """`build_corpus` with a progress bar, then the report: what `mvbert corpus` does.

    Args:
        texts, out, options: as build_corpus takes them.
        vocabs: vocabularies by name, for pieces per word and unknown rate in each.
    """
    with _progress_bar("corpus") as progress:
        build_corpus(texts, out, progress=progress, **options)
    corpus = Corpus.open(out)
    report = corpus_report(corpus, vocabs or {})
    print_corpus_report(report)
    return report


def corpus_report(corpus: Corpus, vocabs: Mapping[str, "Vocab"]) -> dict[str, Json]:
    """Counts of a corpus, and of its train part how each vocabulary cuts it.

    Pieces per word and the unknown rate are over the words of the train stream, each as often as it
    is there; `unknown` is the share of words with an unknown piece.
    """
    manifest = corpus.manifest
    report: dict[str, Json] = {
        "output": str(corpus.folder),
        **{k: manifest[k] for k in ("bytes", "documents", "words", "distinct", "lowercase")},
        "not_utf8": manifest["not_utf8"],
        "heldout": manifest["heldout"],
        "vocabularies": {},
    }
    for name, vocab in vocabs.items():
        cut = corpus.segment(vocab)
        counts = corpus.counts[1:].astype(np.float64)
        lengths = cut.lengths[1:]
        words = max(counts.sum(), 1.0)
        # A word that cannot be cut is the one unknown piece.
        first = cut.ids[cut.ends[:-1]]
        report["vocabularies"][name] = {
            "size": vocab.size,
            "pieces_per_word": float(counts @ lengths / words),
            "unknown": float(counts[first == vocab.unk].sum() / words),
            "whole_words": float(counts[(lengths == 1) & (first != vocab.unk)].sum() / words),
        }
    return report


def print_corpus_report(report: dict[str, Json]) -> None:
    """The report as a table, to stderr (stdout is for the JSON)."""
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    heldout = report["heldout"]
    table = Table("corpus", "train", "held out")
    table.add_row("documents", f"{report['documents']:,}", f"{heldout['documents']:,}")
    table.add_row("words", f"{report['words']:,}", f"{heldout['words']:,}")
    table.add_row("distinct words", f"{report['distinct']:,}", "")
    table.add_row("bytes of text", f"{report['bytes']:,}", "")
    console.print(table)
    if report["vocabularies"]:
        table = Table("vocabulary", "pieces", "pieces per word", "whole words", "unknown")
        for name, cut in report["vocabularies"].items():
            table.add_row(
                name,
                f"{cut['size']:,}",
                f"{cut['pieces_per_word']:.4f}",
                f"{cut['whole_words']:.2%}",
                f"{cut['unknown']:.4%}",
            )
        console.print(table)
    by = {
        "texts": "texts of their own",
        "draw": f"a draw of {heldout['share']:g} of the documents, seed {heldout['seed']}",
        "document": "the one document nearest to being drawn",
        "tail": f"the last {heldout['share']:g} of the one document",
        "none": "nothing",
    }
    console.print(f"held out: {by[heldout['by']]}", markup=False)
    if report["not_utf8"]:
        console.print(f"left out: {report['not_utf8']:,} runs of bytes that are not UTF-8")


@contextlib.contextmanager
def _progress_bar(title: str) -> Iterator[Progress | None]:
    """A bar over bytes on stderr, where that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
