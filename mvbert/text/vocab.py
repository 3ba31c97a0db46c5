"""A WordPiece vocabulary: pieces and their ids, read from vocab.txt or tokenizer.json."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from mvbert.errors import InputError
from mvbert.files import Json, atomic_write, read_json_object

SPECIAL_PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LIMIT = 2**31 - 1  # ids are int32 everywhere


@dataclass(frozen=True)
class Vocab:
    """An immutable vocabulary; piece i has id i.

    Args:
        pieces: every piece once, the five of `SPECIAL_PIECES` among them, none with a line break.
        lowercase: whether its text is lower-cased and loses its accents.

    Raises:
        InputError: a piece is there twice, has a line break, or a special piece is missing.
    """

    pieces: tuple[str, ...] = field(repr=False)
    lowercase: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "pieces", tuple(self.pieces))
        _check_pieces(self.pieces, "the vocabulary", "id", 0)

    @classmethod
    def load(cls, path: str | Path, lowercase: bool | None = None) -> "Vocab":
        """Reads a vocabulary.

        Args:
            path: a vocab.txt (one piece a line), a tokenizer.json, or a folder with either
                (vocab.txt is preferred).
            lowercase: None reads it from the folder's tokenizer_config.json (`do_lower_case`) or
                from the tokenizer.json; where neither says so it is True.

        Raises:
            InputError: no such file, not a vocabulary, duplicates, or a special piece is missing;
                the message names the file and the lines.
        """
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        if path.is_dir():
            names = ("vocab.txt", "tokenizer.json")
            found = [folder / name for name in names if (folder / name).exists()]
            if not found:
                raise InputError(
                    f"{folder} has neither vocab.txt nor tokenizer.json; "
                    "give a folder or a file with a WordPiece vocabulary"
                )
            path = found[0]
        data = _read(path)
        if path.suffix == ".json":
            pieces, said = _parse_tokenizer_json(path)
        else:
            pieces, said = _parse_vocab_txt(path, data), None
        if lowercase is None:
            lowercase = _configured_lowercase(folder)
        if lowercase is None:
            lowercase = True if said is None else said
        return cls(pieces, lowercase)

    def save(self, path: str | Path) -> None:
        """Writes the vocabulary as a vocab.txt, atomically.

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
        """SHA-256 of the vocab.txt that `save` writes (lower-casing is not part of it)."""
        return hashlib.sha256(self._bytes).hexdigest()

    @property
    def _bytes(self) -> bytes:
        return "".join(f"{piece}\n" for piece in self.pieces).encode()

    @property
    def size(self) -> int:
        return len(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)

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
        return self.ids["[MASK]"]


def _check_pieces(pieces: tuple[str, ...], source: str, unit: str, first_number: int) -> None:
    """Raises InputError unless `pieces` can be a vocabulary; places are "line 1" or "id 0" on."""

    def place(id: int) -> str:
        return f"{unit} {id + first_number}"

    if len(pieces) > LIMIT:
        raise InputError(f"{source} has {len(pieces)} pieces; ids are 32-bit, so at most {LIMIT}")
    first: dict[str, int] = {}
    for id, piece in enumerate(pieces):
        if not isinstance(piece, str):
            raise InputError(f"{source}: {place(id)} is {piece!r}, expected a string")
        if "\n" in piece or "\r" in piece:
            raise InputError(
                f"{source}: piece {piece!r} ({place(id)}) has a line break, which vocab.txt "
                "cannot hold"
            )
        if piece in first:
            raise InputError(
                f"{source}: piece {piece!r} is there twice, at {place(first[piece])} and "
                f"{place(id)}; remove one of them"
            )
        first[piece] = id
        try:
            piece.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{source}: piece {piece!r} ({place(id)}) has a lone surrogate, so it is not text"
            ) from None
    missing = [piece for piece in SPECIAL_PIECES if piece not in first]
    if missing:
        raise InputError(
            f"{source} has no {', '.join(missing)}; a BERT vocabulary has all of "
            f"{' '.join(SPECIAL_PIECES)}"
        )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist; expected a vocab.txt, a tokenizer.json or a folder with one "
            "(names on a hub are not looked up here)"
        ) from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def _parse_vocab_txt(path: Path, data: bytes) -> tuple[str, ...]:
    """The pieces of a vocab.txt: one a line; line ends are \\n, \\r\\n or \\r."""
    expected = "expected a vocab.txt: UTF-8 text, one piece a line"
    if not data:
        raise InputError(f"{path} is empty; {expected}")
    if data[:32].startswith(b"\n") and b"<unk>" in data[:64] and b"\x00" in data:
        raise InputError(f"{path} is a sentencepiece model, not a WordPiece vocabulary; {expected}")
    if b"\x00" in data:
        raise InputError(f"{path} is a binary file (NUL at byte {data.index(0)}); {expected}")
    if data.startswith(b"\xef\xbb\xbf"):
        raise InputError(f"{path} begins with a byte order mark; save it as UTF-8 without one")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        byte = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise InputError(f"{path} is not UTF-8 ({byte}); {expected}") from None
    if _is_json_object(text):
        raise InputError(
            f"{path} is JSON; {expected}, or a tokenizer.json under a name that ends in .json"
        )
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if lines[-1] == "":
        lines.pop()
    pieces = tuple(lines)
    if sum("\t" in piece for piece in pieces) > len(pieces) // 2:
        raise InputError(
            f"{path} has columns (tabs), like a sentencepiece .vocab or a table; {expected}"
        )
    _check_pieces(pieces, str(path), "line", 1)
    return pieces


def _is_json_object(text: str) -> bool:
    if text.lstrip()[:1] != "{":
        return False
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False


def _parse_tokenizer_json(path: Path) -> tuple[tuple[str, ...], bool | None]:
    """The pieces of a Hugging Face tokenizer.json and whether it lower-cases (None: not said).

    Settings that would give other pieces than this library's are refused by name.
    """
    top = read_json_object(path)
    model = top.get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        raise InputError(f"{path} is JSON but not a tokenizer.json (it has no model.vocab)")
    kind = model.get("type", "WordPiece" if isinstance(model["vocab"], dict) else "Unigram")
    if kind != "WordPiece" or not isinstance(model["vocab"], dict):
        raise InputError(f"{path} is a {kind} tokenizer; expected WordPiece, as BERT uses it")
    settings = [
        ("model.unk_token", model.get("unk_token", "[UNK]"), "[UNK]"),
        ("model.continuing_subword_prefix", model.get("continuing_subword_prefix", "##"), "##"),
        ("model.max_input_chars_per_word", model.get("max_input_chars_per_word", 100), 100),
    ]
    normalizer = top.get("normalizer")
    lowercase = None
    if isinstance(normalizer, dict):
        settings.append(("normalizer.type", normalizer.get("type"), "BertNormalizer"))
        lowercase = normalizer.get("lowercase")
        strip = normalizer.get("strip_accents")
        settings += [
            ("normalizer.clean_text", normalizer.get("clean_text", True), True),
            ("normalizer.handle_chinese_chars", normalizer.get("handle_chinese_chars", True), True),
            ("normalizer.strip_accents", lowercase if strip is None else strip, lowercase),
        ]
    for name, value, expected in settings:
        if value != expected:
            raise InputError(f"{path}: {name} is {value!r}; only {expected!r} is supported")
    by_id = _pieces_by_id(path, model["vocab"])
    added = top.get("added_tokens") or []
    if not isinstance(added, list):
        raise InputError(f"{path}: added_tokens is {added!r}, expected a list")
    extra = [
        token.get("content")
        for token in added
        if isinstance(token, dict) and model["vocab"].get(token.get("content")) != token.get("id")
    ]
    if extra:
        raise InputError(
            f"{path} adds tokens that are not in its vocabulary ({extra[0]!r}, {len(extra)} in "
            "all); put them into the vocabulary first"
        )
    _check_pieces(by_id, str(path), "id", 0)
    return by_id, lowercase


def _pieces_by_id(path: Path, vocab: dict[str, Json]) -> tuple[str, ...]:
    pieces: dict[int, str] = {}
    for piece, id in vocab.items():
        if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < len(vocab):
            raise InputError(
                f"{path}: piece {piece!r} has id {id!r}; expected every id from 0 to "
                f"{len(vocab) - 1} once"
            )
        if id in pieces:
            raise InputError(f"{path}: pieces {pieces[id]!r} and {piece!r} both have id {id}")
        pieces[id] = piece
    return tuple(pieces[id] for id in range(len(vocab)))


def _configured_lowercase(folder: Path) -> bool | None:
    """`do_lower_case` of the folder's tokenizer_config.json, if it has one."""
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return None
    config = read_json_object(path)
    value = config.get("do_lower_case")
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{path}: do_lower_case is {value!r}, expected true or false")
    strip = config.get("strip_accents")
    if strip is not None and value is not None and strip != value:
        raise InputError(
            f"{path}: strip_accents is {strip} and do_lower_case is {value}; "
            "only both or neither is supported"
        )
    if config.get("tokenize_chinese_chars") is False:
        raise InputError(f"{path}: tokenize_chinese_chars is false; only true is supported")
    return value
