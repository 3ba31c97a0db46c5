"""The folder that holds a corpus: what is in it, and what is checked when it is opened."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from mvbert import _tokenizer
from mvbert.batches import Batch, Rows
from mvbert.errors import InputError
from mvbert.files import read_json_object, sha256_file

if TYPE_CHECKING:
    from mvbert.vocab import Vocab

FORMAT = "mvbert-corpus"
VERSION = 1
MANIFEST = "manifest.json"
STREAMS = ("train.u32", "heldout.u32")
LEXICON = ("lexicon.bytes", "lexicon.ends", "lexicon.counts")


THREADS = 65536  # at most


def cores(threads: int = 0) -> int:
    """The number of threads that `threads` asks for: 0 is one for each available core.

    Available are the cores of the process's affinity mask, and of these no more than the CPU quota
    of its control group, as containers have one, rounded up.

    Raises:
        InputError: no integer, or out of range.
    """
    if not isinstance(threads, int | np.integer) or not 0 <= threads <= THREADS:
        raise InputError(
            f"threads must be 0 (all available cores) or a number up to {THREADS}, got {threads!r}"
        )
    if threads:
        return int(threads)
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, math.ceil(min(count, _cpu_quota())))


@functools.cache
def _cpu_quota(root: str = "/") -> float:
    """Cores that the control group of this process may keep busy; infinity where none says."""
    mounted = Path(root, "sys/fs/cgroup")
    parts: list[str] = []
    with contextlib.suppress(OSError):
        own = Path(root, "proc/self/cgroup").read_text().partition("0::/")[2]
        parts = own.partition("\n")[0].split("/")
    quota = math.inf
    for depth in range(len(parts) + 1):  # the least of the group and of those around it
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            limit = mounted.joinpath(*parts[:depth], "cpu.max").read_text()
            micros, period = map(int, limit.split())
            quota = min(quota, micros / period)
    with contextlib.suppress(OSError, ValueError):  # control groups of version 1
        micros, period = (
            int((mounted / "cpu" / f"cpu.cfs_{name}_us").read_text())
            for name in ("quota", "period")
        )
        quota = min(quota, micros / period if micros > 0 else math.inf)
    return quota


def open_stream(path: Path) -> np.ndarray:
    """Word ids as a read-only memory map (an empty file cannot be mapped)."""
    if path.stat().st_size == 0:
        return np.zeros(0, np.uint32)
    return np.memmap(path, np.dtype("<u4"), "r")


class Words(Sequence[bytes]):
    """The words of a lexicon by id, as bytes of UTF-8: a view, 0 is the empty word."""

    def __init__(self, data: np.ndarray, ends: np.ndarray):
        self.data = data  # uint8, the words end to end
        self.ends = ends  # uint64 [W]

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...

    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
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
    vocab: Vocab

    @property
    def lengths(self) -> np.ndarray:
        """uint32 [W]: how many pieces each word has."""
        return np.diff(self.ends, prepend=np.uint32(0))


class Corpus:
    """A corpus folder, opened: streams and lexicon are memory maps, nothing is read in."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        """Use `Corpus.open`."""
        self.folder = folder
        self.manifest = manifest
        self.train = open_stream(folder / "train.u32")
        self.heldout = open_stream(folder / "heldout.u32")
        data, ends, counts = (folder / name for name in LEXICON)
        self.words = Words(np.memmap(data, np.uint8, "r"), np.memmap(ends, np.dtype("<u8"), "r"))
        self.counts = np.memmap(counts, np.dtype("<u8"), "r")
        self._rows: tuple[object, Rows] | None = None  # of the last call of `rows`

    @property
    def lowercase(self) -> bool:
        return self.manifest["lowercase"]

    def __repr__(self) -> str:
        return (
            f"Corpus({str(self.folder)!r}, words={self.manifest['words']}, "
            f"distinct={self.manifest['distinct']})"
        )

    @classmethod
    def open(cls, folder: str | Path, verify: str = "sizes") -> Corpus:
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
        manifest: dict[str, Any] = read_json_object(folder / MANIFEST)
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

    def segment(self, vocab: Vocab, threads: int = 0) -> Segmentation:
        """Cuts every word of the lexicon with a vocabulary; takes milliseconds to seconds.

        Raises:
            InputError: a cased vocabulary for an uncased corpus, or the other way round.
        """
        if vocab.lowercase != self.lowercase:
            cased = {True: "uncased", False: "cased"}
            raise InputError(
                f"the vocabulary is {cased[vocab.lowercase]} but the corpus {self.folder} is "
                f"{cased[self.lowercase]}; build the corpus with lowercase={vocab.lowercase} "
                f"({'without' if vocab.lowercase else 'with'} --cased)"
            )
        wordpiece = _tokenizer.WordPiece(list(vocab.pieces), vocab.unk)
        ends, ids = _tokenizer.segment_lexicon(
            self.words.data, self.words.ends, wordpiece, cores(threads)
        )
        return Segmentation(ends, ids, vocab)

    def rows(
        self,
        seed: int,
        epoch: int,
        start: int,
        count: int,
        *,
        teacher: Vocab | None = None,
        student: Vocab | None = None,
        T: int = 128,
        student_prob: float = 0.5,
        mask_prob: float = 0.15,
        pair_prob: float = 0.5,
        threads: int = 0,
        out: Batch | None = None,
    ) -> Batch:
        """Rows [start, start + count) of an epoch of the train part: a pure function.

        `mvbert.batches.Rows` says what the arguments and the rows are. The lexicon is cut again
        when a call differs from the last in more than epoch, start, count, threads and out; who
        goes back and forth makes a `Rows` of each kind. Rows past the epoch's last are the next
        epoch's first.

        Raises:
            InputError: an argument out of range, or a vocabulary that does not fit the corpus.
        """
        if epoch < 0 or start < 0:
            raise InputError(f"epoch and start must be 0 or more, got {epoch} and {start}")
        key = (teacher, student, seed, T, student_prob, mask_prob, pair_prob)
        known = self._rows
        if known is not None and known[0] == key:
            rows = known[1]
        else:
            cuts = [None if v is None else self.segment(v, threads) for v in (teacher, student)]
            rows = Rows(
                self.train,
                teacher=cuts[0],
                student=cuts[1],
                T=T,
                mask_prob=mask_prob,
                pair_prob=pair_prob,
                student_prob=student_prob,
                seed=seed,
                threads=threads,
            )
            self._rows = key, rows
        return rows.read(epoch * rows.count + start, count, threads=threads, out=out)


def _check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Refuses a manifest whose values are not of the kinds that a corpus has."""

    def is_count(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    heldout: Any = manifest.get("heldout")
    files: Any = manifest.get("files")
    bad = [k for k in ("documents", "words", "distinct", "bytes") if not is_count(manifest.get(k))]
    if not isinstance(manifest.get("lowercase"), bool):
        bad.append("lowercase")
    sources = manifest.get("sources")
    if not isinstance(sources, list) or not all(
        isinstance(source, dict) and {"name", "bytes", "sha256", "heldout"} <= source.keys()
        for source in sources
    ):
        bad.append("sources")
    if not isinstance(heldout, dict) or not all(
        is_count(heldout.get(k)) for k in ("documents", "words")
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


def _check_file(path: Path, entry: dict[str, Any], verify: str) -> None:
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
