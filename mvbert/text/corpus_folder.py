"""Opens a corpus folder and checks it against its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mvbert import _core
from mvbert.cores import cores
from mvbert.errors import InputError
from mvbert.files import read_json_object, sha256_file
from mvbert.text.lexicon import Segmentation, WordList
from mvbert.text.vocab import Vocab, case_name

FORMAT = "mvbert-corpus"
VERSION = 1
MANIFEST = "manifest.json"
STREAMS = ("train.u32", "heldout.u32")
LEXICON = ("lexicon.bytes", "lexicon.ends", "lexicon.counts")


def open_stream(path: Path) -> np.ndarray:
    """Word ids as a read-only memory map (an empty file cannot be mapped)."""
    if path.stat().st_size == 0:
        return np.zeros(0, np.uint32)
    return np.memmap(path, np.dtype("<u4"), "r")


class Corpus:
    """An open corpus folder; streams and lexicon are memory-mapped."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        """Use `Corpus.open`."""
        self.folder = folder
        self.manifest = manifest
        self.train = open_stream(folder / "train.u32")
        self.heldout = open_stream(folder / "heldout.u32")
        data, ends, counts = (folder / name for name in LEXICON)
        self.words = WordList(np.memmap(data, np.uint8, "r"), np.memmap(ends, np.dtype("<u8"), "r"))
        self.counts = np.memmap(counts, np.dtype("<u8"), "r")

    @property
    def lowercase(self) -> bool:
        return self.manifest["lowercase"]

    @property
    def strip_accents(self) -> bool:
        """Whether accents were removed."""
        return self.manifest.get("strip_accents", self.lowercase)

    def __repr__(self) -> str:
        return (
            f"Corpus({str(self.folder)!r}, words={self.manifest['words']}, "
            f"distinct={self.manifest['distinct']})"
        )

    @classmethod
    def open(cls, folder: str | Path, verify: str = "sizes") -> Corpus:
        """Opens a corpus folder.

        Args:
            folder: a folder made by build_corpus.
            verify: "sizes" compares file sizes with the manifest; "sha256" also checksums, which
                reads all files.

        Raises:
            InputError: not a corpus, another format version, or a file is missing or does not match
                the manifest.
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

    def check_casing(self, vocab: Vocab, what: str = "the vocabulary") -> None:
        """Raises InputError unless a vocabulary normalises text as this corpus does."""
        if (vocab.lowercase, vocab.strip_accents) == (self.lowercase, self.strip_accents):
            return
        option = "without --cased" if vocab.lowercase else "with --cased"
        if vocab.lowercase and not vocab.strip_accents:
            option = "with --keep-accents"
        source = f" {vocab.source}" * (vocab.source != what)
        other = ", or read the vocabulary with --cased" * (vocab.assumed and not self.lowercase)
        raise InputError(
            f"{what}{source} is {vocab.casing} but the corpus {self.folder} is "
            f"{case_name(self.lowercase, self.strip_accents)}; build the corpus {option}{other}"
        )

    def segment(self, vocab: Vocab, threads: int = 0) -> Segmentation:
        """Tokenizes every word of the lexicon with a vocabulary; takes milliseconds to seconds.

        Raises:
            InputError: a cased vocabulary for an uncased corpus, or the other way round.
        """
        self.check_casing(vocab)
        wordpiece = _core.WordPiece(list(vocab.pieces), vocab.unk)
        ends, ids = _core.segment_lexicon(
            self.words.data, self.words.ends, wordpiece, cores(threads)
        )
        return Segmentation(ends, ids, vocab)


def _check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Refuses a manifest with missing values or values of the wrong type."""

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
        raise InputError(f"{path} is corrupt: {', '.join(bad)} missing or of the wrong type")
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
                f"{path} is corrupt: by its counts {name} has {size} bytes, "
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
            f"{path} does not match the SHA-256 in its manifest; build the corpus again"
        )
