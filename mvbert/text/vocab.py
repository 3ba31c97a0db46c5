"""A WordPiece vocabulary: pieces and their ids, normalisation, added pieces."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

from mvbert import _core
from mvbert.errors import InputError
from mvbert.files import atomic_write
from mvbert.text.tokenizer_files import (
    LIMIT,
    NEEDED_PIECES,
    SPECIAL_PIECES,
    AddedPiece,
    check_pieces,
    read_tokenizer_files,
)

__all__ = ["LIMIT", "NEEDED_PIECES", "SPECIAL_PIECES", "AddedPiece", "Vocab", "case_name"]


def case_name(lowercase: bool, strip_accents: bool) -> str:
    """Names a normalisation: cased, uncased, or uncased with accents."""
    if not lowercase:
        return "cased"
    return "uncased" if strip_accents else "uncased with accents"


@dataclass(frozen=True)
class Vocab:
    """An immutable vocabulary; piece i has id i.

    Args:
        pieces: every piece once (but "", a blank line of a vocab.txt, which no text reaches), those
            of `NEEDED_PIECES` among them, none with a line break.
        lowercase: whether text is lower-cased.
        strip_accents: whether accents are removed; None: the same as `lowercase`.
        added: further pieces that are matched in text before it is split into words.
        base_size: words are tokenized into pieces [0, base_size) only; None: all pieces.
        assumed: whether `lowercase` is a default that no file states.
        source: the path, for messages.

    Raises:
        InputError: a piece appears twice or has a line break, a needed piece is missing, or accents
            are removed without lower-casing.
    """

    pieces: tuple[str, ...] = field(repr=False)
    lowercase: bool = True
    strip_accents: bool = None  # type: ignore[assignment]  # never None once it is made
    added: tuple[AddedPiece, ...] = ()
    base_size: int = None  # type: ignore[assignment]
    assumed: bool = field(default=False, compare=False)
    source: str = field(default="the vocabulary", compare=False)

    def __post_init__(self) -> None:
        for name, value in (
            ("pieces", tuple(self.pieces)),
            ("strip_accents", self.lowercase if self.strip_accents is None else self.strip_accents),
            ("base_size", len(self.pieces) if self.base_size is None else self.base_size),
        ):
            object.__setattr__(self, name, value)
        check_pieces(self.pieces, self.source, "id", 0)
        missing = [piece for piece in NEEDED_PIECES if piece not in self.ids]
        if missing:
            raise InputError(
                f"{self.source} has no {', '.join(missing)}; a BERT vocabulary has all of "
                f"{' '.join(NEEDED_PIECES)}"
            )
        if self.strip_accents and not self.lowercase:
            raise InputError(
                f"{self.source}: strip_accents is true although text is not lower-cased, which "
                "is not supported"
            )
        for added in self.added:
            if added.piece not in self.ids:
                raise InputError(f"{self.source}: added piece {added.piece!r} has no id")
            if not added.piece or any(char.isspace() for char in added.piece):
                raise InputError(
                    f"{self.source}: added piece {added.piece!r} is empty or has white space in "
                    "it, which is not supported"
                )

    @classmethod
    def load(
        cls, path: str | Path, lowercase: bool | None = None, strip_accents: bool | None = None
    ) -> "Vocab":
        """Reads a vocabulary; of a folder, as transformers reads it.

        Args:
            path: a folder with vocab.txt, tokenizer.json or both, and what else transformers keeps
                beside them; or one of these two files.
            lowercase: None reads it from the folder's tokenizer_config.json (`do_lower_case`), or
                from a tokenizer.json; where neither says so it is assumed to be True, as
                transformers does.
            strip_accents: the same of accents, where `lowercase` is given.

        Raises:
            InputError: no such file, not a vocabulary, duplicates, a needed piece is missing,
                files that contradict each other, or settings that would give other pieces than
                transformers; the message names the file and the key or line.
        """
        return cls(**read_tokenizer_files(Path(path), lowercase, strip_accents))

    @classmethod
    def load_for(cls, path: str | Path, lowercase: bool, strip_accents: bool) -> "Vocab":
        """Reads a vocabulary for text that is normalised so; what its files state still holds."""
        vocab = cls.load(path)
        if not vocab.assumed:
            return vocab
        # That accents stay may be stated although lower-casing is not.
        strip = strip_accents and vocab.strip_accents
        return replace(vocab, lowercase=lowercase, strip_accents=strip)

    def with_added_of(self, other: "Vocab") -> "Vocab":
        """This vocabulary with those added pieces of `other` that it contains."""
        return replace(self, added=tuple(a for a in other.added if a.piece in self.ids))

    @cached_property
    def unreachable(self) -> int:
        """Number of pieces that never occur because text is lower-cased or loses its accents."""
        return sum(map(self._is_lost, self.pieces[: self.base_size]))

    def _is_lost(self, piece: str) -> bool:
        letters = piece.removeprefix("##")
        if not self.lowercase or piece in SPECIAL_PIECES or not letters:
            return False
        if letters.isascii() and letters == letters.lower():
            return False
        is_word = _core.split(letters, lowercase=False) == [letters]
        return is_word and _core.split(letters, strip_accents=self.strip_accents) != [letters]

    @property
    def doubt(self) -> str:
        """A warning that pieces are never used, perhaps because the vocabulary is cased, or ""."""
        if not self.unreachable:
            return ""
        casing = "assumed uncased, as no file in its folder says" if self.assumed else "uncased"
        return (
            f"{self.source} is {casing}: {self.unreachable:,} of its {self.size:,} pieces have "
            "capitals or accents and are never used; if it is cased, use --cased"
        )

    @property
    def casing(self) -> str:
        """Its `case_name`; "assumed uncased" if no file states it."""
        name = case_name(self.lowercase, self.strip_accents)
        return f"assumed {name}" if self.assumed else name

    def save(self, path: str | Path) -> None:
        """Writes the pieces of words as a vocab.txt, atomically.

        Raises:
            InputError: the file cannot be written.
        """
        atomic_write(path, self._bytes)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Piece to id."""
        return {piece: id for id, piece in enumerate(self.pieces)}

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the vocab.txt that `save` writes, and of added pieces if there are any.

        Lower-casing is not part of it.
        """
        added = json.dumps([self.pieces[self.base_size :], [asdict(a) for a in self.added]])
        return hashlib.sha256(self._bytes + added.encode() * bool(self.added)).hexdigest()

    @property
    def _bytes(self) -> bytes:
        return "".join(f"{piece}\n" for piece in self.pieces[: self.base_size]).encode()

    @property
    def unread_ids(self) -> list[int]:
        """Ids that no word is tokenized into, without those of special pieces."""
        added = {piece.piece for piece in self.added}
        return [
            id
            for id, piece in enumerate(self.pieces)
            if not piece or piece in added or (id >= self.base_size and piece not in SPECIAL_PIECES)
        ]

    @property
    def size(self) -> int:
        return len(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)

    @property
    def special_pieces(self) -> tuple[str, ...]:
        """The SPECIAL_PIECES that it contains; [MASK] may be missing."""
        return tuple(piece for piece in SPECIAL_PIECES if piece in self.ids)

    @property
    def pad(self) -> int:
        return self.ids["[PAD]"]

    @property
    def unk(self) -> int:
        return self.ids["[UNK]"]

    @property
    def cls(self) -> int:
        return self.ids["[CLS]"]

    @property
    def sep(self) -> int:
        return self.ids["[SEP]"]

    @property
    def mask(self) -> int:
        """The id of [MASK]; raises InputError if the vocabulary has none."""
        if "[MASK]" not in self.ids:
            raise InputError(f"{self.source} has no [MASK], which masked language modelling needs")
        return self.ids["[MASK]"]
