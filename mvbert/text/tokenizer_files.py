"""Reads the tokenizer files of a BERT folder as transformers does.

The definition is BertTokenizer of transformers 4.57 and 5: tokenizer_config.json says how text is
normalised (where it does not, text is lower-cased and loses its accents), and tokenizer.json, which
says it too, is not asked. Here all files are read, and a folder whose files contradict each other
is refused. docs/models.md has the table.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvbert.errors import InputError
from mvbert.files import Json, read_json_object, refuse_pointer

SPECIAL_PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
NEEDED_PIECES = SPECIAL_PIECES[:4]  # [MASK] is for masked language modelling alone
LIMIT = 2**31 - 1  # ids are int32 everywhere
MODEL_INPUTS = ("input_ids", "token_type_ids", "attention_mask")

# Classes that read text as BertTokenizer does, each with its fast form.
_BERT_CLASSES = (
    "BertTokenizer", "ConvBertTokenizer", "DistilBertTokenizer", "ElectraTokenizer",
    "MobileBertTokenizer", "SqueezeBertTokenizer",
)  # fmt: skip
# Those that take tokenizer.json for what it says.
_JSON_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
# BERT's rows, as tokenizers spells them.
_BERT_ROWS = {"single": "[CLS]:0 $A:0 [SEP]:0", "pair": "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"}


@dataclass(frozen=True)
class AddedPiece:
    """A piece that is looked for in text before the text is split into words.

    Args:
        piece: its text, without white space.
        normalized: whether it is looked for in normalised text, so that a tokenizer that
            lower-cases finds it in any case.
        special: whether it stands for no text, as [MASK] does, and decoding may leave it out.
    """

    piece: str
    normalized: bool = False
    special: bool = True


def read_tokenizer_files(
    path: Path, lowercase: bool | None, strip_accents: bool | None
) -> dict[str, Any]:
    """Reads the arguments of `Vocab` from a folder, a vocab.txt or a tokenizer.json.

    Args:
        lowercase, strip_accents: override the files.
    """
    _check_sides(path if path.is_dir() else path.parent)
    if not path.is_dir():
        return _read_file(path, lowercase, strip_accents)
    files = _Files(path)
    if files.txt is None and files.json is None:
        raise InputError(
            f"{path} has neither vocab.txt nor tokenizer.json; "
            "give a folder or a file with a WordPiece vocabulary"
        )
    lower, strip, assumed = files.casing(lowercase, strip_accents)
    return {
        **_with_added(files.pieces(), files.added(), files.source),
        "lowercase": lower,
        "strip_accents": strip,
        "assumed": assumed,
        "source": str(files.source),
    }


def read_model_inputs(path: Path) -> tuple[int, tuple[str, ...]]:
    """The longest row of a model and its inputs, by the tokenizer_config.json beside a vocabulary.

    As transformers reads them: 10^30 where no longest row is stated; DistilBERT has no token types.
    """
    config_path = (path if path.is_dir() else path.parent) / "tokenizer_config.json"
    config = _json(config_path)
    length = config.get("model_max_length")
    length = 10**30 if length is None else length
    if isinstance(length, bool) or not isinstance(length, int | float) or length < 1:
        raise InputError(f"{config_path}: model_max_length is {length!r}, expected a number")
    names = config.get("model_input_names")
    if names is None:
        distil = str(config.get("tokenizer_class")).startswith("DistilBert")
        return int(length), (MODEL_INPUTS[0], MODEL_INPUTS[2]) if distil else MODEL_INPUTS
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{config_path}: model_input_names is {names!r}, expected a list of names")
    return int(length), tuple(map(str, names))


def _read_file(path: Path, lowercase: bool | None, strip_accents: bool | None) -> dict[str, Any]:
    """Reads a tokenizer.json, or a vocab.txt with the casing in its tokenizer_config.json."""
    data = _read(path)
    strip: bool | None = None
    if path.suffix == ".json":
        tokenizer = _TokenizerJson(path)
        pieces = _with_added(tokenizer.pieces(), tokenizer.added(), path)
        configured: bool | None = tokenizer.lowercase
        strip = tokenizer.strip_accents
    else:
        pieces = {"pieces": _parse_vocab_txt(path, data)}
        configured, strip = _configured_casing(
            _json(path.parent / "tokenizer_config.json"), path.parent
        )
    if lowercase is not None:
        if strip_accents is None and lowercase and configured is not False:
            strip_accents = strip
        configured, strip = lowercase, strip_accents
    return {
        **pieces,
        "lowercase": True if configured is None else configured,
        "strip_accents": strip,
        "assumed": configured is None,
        "source": str(path),
    }


def _with_added(
    pieces: tuple[str, ...], entries: Iterable["_Entry"], source: Path
) -> dict[str, Any]:
    """Appends missing added pieces to the pieces of `source`, in the order of their ids."""
    ids = {piece: id for id, piece in enumerate(pieces)}
    merged: dict[str, _Entry] = {}
    for entry in entries:
        known = merged.setdefault(entry.content, entry)
        if known.id is None and entry.id is not None:
            merged[entry.content] = entry
        elif entry.id not in (None, known.id):
            raise InputError(
                f"{entry.source} gives {entry.content!r} the id {entry.id}, but {known.source} "
                f"gives {known.id}; make them agree"
            )
    next_id = len(pieces)
    more: list[str] = []
    added: list[AddedPiece] = []
    # Those without an id take the next free ones, after the others.
    for entry in sorted(merged.values(), key=lambda e: (e.id is None, e.id or 0)):
        expected = ids.get(entry.content, next_id)
        if entry.id not in (None, expected):
            if expected == next_id and entry.id is not None and entry.id < len(pieces):
                raise InputError(
                    f"{entry.source} gives {entry.content!r} the id {entry.id}, which is that of "
                    f"{pieces[entry.id]!r} in {source}"
                )
            raise InputError(
                f"{entry.source} gives {entry.content!r} the id {entry.id}, expected {expected}: "
                "the id of its piece, or the next one after the vocabulary"
            )
        if expected == next_id:
            more.append(entry.content)
            next_id += 1
        if entry.content not in SPECIAL_PIECES:
            added.append(AddedPiece(entry.content, entry.normalized, entry.special))
    return {
        "pieces": (*pieces, *more),
        "base_size": len(pieces),
        "added": tuple(sorted(added, key=lambda a: ids.get(a.piece, len(pieces)))),
    }


# ---- a folder --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """An added piece as some file has it; `id` None where the file leaves it open."""

    source: str  # file and key, for messages
    content: str
    id: int | None
    normalized: bool = False
    special: bool = True


class _Files:
    """The files of a tokenizer in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        txt = folder / "vocab.txt"
        self.txt = _parse_vocab_txt(txt, _read(txt)) if txt.exists() else None
        path = folder / "tokenizer.json"
        self.json = _TokenizerJson(path) if path.exists() else None
        self.source = txt if self.txt is not None else path
        self._config_path = folder / "tokenizer_config.json"
        self._config = _json(self._config_path)
        self._map_path = folder / "special_tokens_map.json"
        self._map = _json(self._map_path)
        self._class = self._check_class()
        self._check_settings()

    def _check_class(self) -> str:
        """The class of tokenizer, without what tells the fast ones from the others."""
        for path, data in (
            (self._config_path, self._config),
            (self._folder / "config.json", _json(self._folder / "config.json")),
        ):
            name = data.get("tokenizer_class")
            if name is None:
                continue
            known = str(name)
            if known not in _JSON_CLASSES:
                known = known.removesuffix("Fast")
            if known not in (*_BERT_CLASSES, *_JSON_CLASSES):
                raise InputError(
                    f"{path}: tokenizer_class is {name!r}; only BERT's own tokenizer is supported "
                    f"({', '.join(_BERT_CLASSES)})"
                )
            return known
        return _BERT_CLASSES[0]

    def _check_settings(self) -> None:
        for key, usual, reason in (
            ("do_basic_tokenize", True, "text is always split before WordPiece here"),
            ("never_split", [], "words that are never split are not supported"),
            ("tokenize_chinese_chars", True, "only true is supported"),
        ):
            value = self._config.get(key)
            if (usual if value is None else value) != usual:
                raise InputError(f"{self._config_path}: {key} is {value!r}; {reason}")
        for path, data in ((self._config_path, self._config), (self._map_path, self._map)):
            for piece in SPECIAL_PIECES:
                key = f"{piece[1:-1].lower()}_token"
                content = _content(data.get(key))
                if content is not None and content != piece:
                    raise InputError(
                        f"{path}: {key} is {content!r}; only {piece!r} is supported: rename the "
                        "piece in all files of the tokenizer"
                    )

    def pieces(self) -> tuple[str, ...]:
        """The pieces that words are cut into."""
        if self.txt is None:
            assert self.json is not None
            return self.json.pieces()
        if self.json is not None:
            self.json.check_same(self.source, self.txt)
        return self.txt

    def casing(
        self, lowercase: bool | None, strip_accents: bool | None
    ) -> tuple[bool, bool | None, bool]:
        """Whether text is lower-cased, loses its accents, and whether that was only assumed."""
        if lowercase is not None:
            if strip_accents is None and lowercase:
                strip_accents = _configured_casing(self._config, self._folder)[1]
            return lowercase, strip_accents, False
        lower, strip, assumed = self._tokenizer_casing()
        if self._lowercased_first():
            return True, strip if lower else False, False
        return lower, strip, assumed

    def _tokenizer_casing(self) -> tuple[bool, bool | None, bool]:
        configured, strip = _configured_casing(self._config, self._folder)
        if self.json is None:
            return configured is not False, strip, configured is None
        of_json = (self.json.lowercase, self.json.strip_accents)
        if self._class in _JSON_CLASSES and configured is None:
            return *of_json, False
        lower = configured is not False
        effective = (lower, lower if strip is None else strip)
        if of_json != effective:
            raise InputError(
                f"{self.json.path}: normalizer has lowercase {_word(of_json[0])} and strip_accents "
                f"{_word(of_json[1])}, but {self._config_path.name} makes it do_lower_case "
                f"{_word(effective[0])} and strip_accents {_word(effective[1])}"
                f"{' (the defaults)' if configured is None else ''}, which transformers follows; "
                "make them agree, or give --cased if the vocabulary is cased"
            )
        return *effective, False

    def _lowercased_first(self) -> bool:
        """Whether sentence-transformers lower-cases text before the tokenizer sees it."""
        path = self._folder / "sentence_bert_config.json"
        value = _json(path).get("do_lower_case")
        if value not in (None, True, False):
            raise InputError(f"{path}: do_lower_case is {value!r}, expected true or false")
        return bool(value)

    def added(self) -> Iterator[_Entry]:
        """Added pieces of all files, those first whose file says most of them."""
        path = self._config_path
        decoder = self._config.get("added_tokens_decoder") or {}
        if not isinstance(decoder, dict):
            raise InputError(f"{path}: added_tokens_decoder is {decoder!r}, expected an object")
        for id, token in decoder.items():
            source = f"{path}: added_tokens_decoder.{id}"
            if not id.isdecimal():
                raise InputError(f"{source}: expected an id")
            yield _entry(source, token, int(id))
        if self.json is not None:
            yield from self.json.added()
        entries = [*self._listed()]
        special = {*SPECIAL_PIECES, *(entry.content for entry in entries)}
        path = self._folder / "added_tokens.json"
        for content, value in _json(path).items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise InputError(f"{path}: {content!r} has the id {value!r}, expected a number")
            yield _Entry(str(path), content, value, content not in special, content in special)
        yield from entries

    def _listed(self) -> Iterator[_Entry]:
        """Special pieces that files list without an id, in transformers' order."""
        files = [(self._config_path, self._config), (self._map_path, self._map)]
        for key in ("bos_token", "eos_token"):
            stated = [_content(data[key]) for _, data in files if key in data]
            if len({*stated}) > 1:
                raise InputError(
                    f"{self._map_path}: {key} is {stated[1]!r}, but {self._config_path.name} has "
                    f"{stated[0]!r}; make them agree"
                )
        if "added_tokens_decoder" in self._config:  # transformers does not read the map then
            files.pop()
        for key in ("bos_token", "eos_token", "additional_special_tokens", "extra_special_tokens"):
            for path, data in files:
                tokens = data.get(key) or []
                if key in ("bos_token", "eos_token"):
                    tokens = [tokens] if tokens else []
                elif isinstance(tokens, dict):
                    tokens = list(tokens.values())
                if not isinstance(tokens, list):
                    raise InputError(f"{path}: {key} is {tokens!r}, expected a list")
                for token in tokens:
                    yield _entry(f"{path}: {key}", token, None)


def _entry(source: str, token: Json, id: int | None) -> _Entry:
    """An added piece that is written out as an object, or as its text alone."""
    content = _content(token)
    if content is None:
        raise InputError(f"{source}: {token!r} is not an added token")
    flags = token if isinstance(token, dict) else {}
    for flag in ("lstrip", "rstrip", "single_word"):
        if flags.get(flag):
            raise InputError(f"{source}: {content!r} has {flag} true; only false is supported")
    special = bool(flags.get("special", True))
    return _Entry(source, content, id, bool(flags.get("normalized", not special)), special)


def _content(token: Json) -> str | None:
    """The text of a token; transformers writes it alone or as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _word(value: bool) -> str:
    return "true" if value else "false"


def _json(path: Path) -> dict[str, Json]:
    """The object in a file, or {} where there is no such file."""
    return read_json_object(path) if path.exists() else {}


def _check_sides(folder: Path) -> None:
    """Raises InputError if its tokenizer_config.json pads or truncates rows on the left."""
    path = folder / "tokenizer_config.json"
    config = _json(path)
    for key in ("padding_side", "truncation_side"):
        if config.get(key) not in (None, "right"):
            raise InputError(
                f"{path}: {key} is {config[key]!r}; rows are padded and truncated on the right "
                f'only; set it to "right", or remove it'
            )


def _configured_casing(config: dict[str, Json], folder: Path) -> tuple[bool | None, bool | None]:
    """do_lower_case and strip_accents of a tokenizer_config.json; None where it says nothing."""
    values: list[bool | None] = []
    for key in ("do_lower_case", "strip_accents"):
        value = config.get(key)
        if value is not None and not isinstance(value, bool):
            path = folder / "tokenizer_config.json"
            raise InputError(f"{path}: {key} is {value!r}, expected true or false")
        values.append(value)
    if values == [False, True]:
        raise InputError(
            f"{folder / 'tokenizer_config.json'}: strip_accents is true and do_lower_case false; "
            "accents are stripped of lower-cased text only"
        )
    return values[0], values[1]


# ---- tokenizer.json --------------------------------------------------------------------------


class _TokenizerJson:
    """A Hugging Face tokenizer.json; settings that would give other pieces are refused by name.

    Attributes:
        lowercase, strip_accents: of its normaliser.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._top = top = read_json_object(path)
        model = top.get("model")
        if not isinstance(model, dict) or "vocab" not in model:
            raise InputError(f"{path} is JSON but not a tokenizer.json (it has no model.vocab)")
        kind = model.get("type", "WordPiece" if isinstance(model["vocab"], dict) else "Unigram")
        if kind != "WordPiece" or not isinstance(model["vocab"], dict):
            raise InputError(f"{path} is a {kind} tokenizer; expected WordPiece, as BERT uses it")
        self._vocab: dict[str, Any] = model["vocab"]
        normalizer, pre_tokenizer = top.get("normalizer"), top.get("pre_tokenizer")
        normal = normalizer if isinstance(normalizer, dict) else {}
        splitter = pre_tokenizer if isinstance(pre_tokenizer, dict) else {}
        sides: dict[str, Any] = {name: top.get(name) for name in ("truncation", "padding")}
        for name, value, expected in (
            ("model.unk_token", model.get("unk_token", "[UNK]"), "[UNK]"),
            ("model.continuing_subword_prefix", model.get("continuing_subword_prefix", "##"), "##"),
            ("model.max_input_chars_per_word", model.get("max_input_chars_per_word", 100), 100),
            ("normalizer.type", normal.get("type"), "BertNormalizer"),
            ("normalizer.clean_text", normal.get("clean_text", True), True),
            ("normalizer.handle_chinese_chars", normal.get("handle_chinese_chars", True), True),
            ("pre_tokenizer.type", splitter.get("type"), "BertPreTokenizer"),
            *(
                (f"{name}.direction", side.get("direction", "Right"), "Right")
                for name, side in sides.items()
                if isinstance(side, dict)
            ),
        ):
            if value != expected:
                raise InputError(f"{path}: {name} is {value!r}; only {expected!r} is supported")
        self.lowercase = normal.get("lowercase", True) is True
        strip = normal.get("strip_accents")
        self.strip_accents = self.lowercase if strip is None else strip is True
        if self.strip_accents and not self.lowercase:
            raise InputError(
                f"{path}: normalizer.strip_accents is true and lowercase false; accents are "
                "stripped of lower-cased text only"
            )
        self._check_rows()

    def _check_rows(self) -> None:
        """Raises InputError unless its post_processor puts [CLS] and [SEP] where BERT has them."""
        listed: Any = self._top.get("added_tokens")
        tokens = [t for t in listed if isinstance(t, dict)] if isinstance(listed, list) else []
        ids: dict[Any, Any] = {_content(token): token.get("id") for token in tokens}
        ids |= self._vocab
        value = self._top.get("post_processor")
        post: dict[str, Any] = value if isinstance(value, dict) else {}
        kind = post.get("type")
        rows: list[tuple[str, Any, Any]]
        if kind == "BertProcessing":
            rows = [
                (key, post.get(key), [piece, ids.get(piece)])
                for key, piece in (("cls", "[CLS]"), ("sep", "[SEP]"))
            ]
        elif kind == "TemplateProcessing":
            rows = [(key, _spelled(post.get(key)), row) for key, row in _BERT_ROWS.items()]
            specials = post.get("special_tokens")
            for piece in ("[CLS]", "[SEP]"):
                special = specials.get(piece) if isinstance(specials, dict) else None
                found = special.get("ids") if isinstance(special, dict) else None
                rows.append((f"special_tokens.{piece}.ids", found, [ids.get(piece)]))
        else:
            rows = [("type", kind, "TemplateProcessing")]
        for key, found, expected in rows:
            if found != expected:
                raise InputError(
                    f"{self.path}: post_processor.{key} is {found!r}; only {expected!r}, which "
                    "makes BERT's rows, is supported"
                )

    def pieces(self) -> tuple[str, ...]:
        """The pieces of its WordPiece model by their ids."""
        by_id: dict[int, str] = {}
        for piece, id in self._vocab.items():
            if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < len(self._vocab):
                raise InputError(
                    f"{self.path}: piece {piece!r} has id {id!r}; expected every id from 0 to "
                    f"{len(self._vocab) - 1} once"
                )
            if id in by_id:
                raise InputError(
                    f"{self.path}: pieces {by_id[id]!r} and {piece!r} both have id {id}"
                )
            by_id[id] = piece
        pieces = tuple(by_id[id] for id in range(len(by_id)))
        check_pieces(pieces, str(self.path), "id", 0)
        return pieces

    def check_same(self, source: Path, pieces: tuple[str, ...]) -> None:
        """Raises InputError unless its pieces are those of a vocab.txt."""
        ids = {piece: id for id, piece in enumerate(pieces)}
        if ids == self._vocab:
            return
        for piece in [*ids, *self._vocab]:
            own, other = self._vocab.get(piece), ids.get(piece)
            if own != other:
                raise InputError(
                    f"{source} and {self.path} are different vocabularies: piece {piece!r} has "
                    f"{'no id' if other is None else f'id {other}'} in the one and "
                    f"{'no id' if own is None else f'id {own}'} in the other; remove the wrong "
                    "file"
                )

    def added(self) -> Iterator[_Entry]:
        """Its added tokens."""
        tokens = self._top.get("added_tokens") or []
        if not isinstance(tokens, list):
            raise InputError(f"{self.path}: added_tokens is {tokens!r}, expected a list")
        for token in tokens:
            id = token.get("id") if isinstance(token, dict) else None
            if not isinstance(id, int) or isinstance(id, bool):
                raise InputError(f"{self.path}: added_tokens has {token!r}, which has no id")
            yield _entry(f"{self.path}: added_tokens", token, id)


def _spelled(row: Any) -> str:
    """A row of TemplateProcessing as in _BERT_ROWS."""
    try:
        return " ".join(
            f"{'$' * (kind == 'Sequence')}{part['id']}:{part['type_id']}"
            for item in row
            for kind, part in item.items()
        )
    except (AttributeError, KeyError, TypeError):
        return repr(row)


# ---- vocab.txt -------------------------------------------------------------------------------


def check_pieces(pieces: tuple[str, ...], source: str, unit: str, first_number: int) -> None:
    """Raises InputError unless `pieces` can be those of a vocabulary; only "" may come twice.

    Args:
        unit: what a place is called in messages.
        first_number: that of the first piece.
    """

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
        if piece in first and piece:
            raise InputError(
                f"{source}: piece {piece!r} appears twice, at {place(first[piece])} and "
                f"{place(id)}; remove one of them"
            )
        first[piece] = id
        try:
            piece.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{source}: piece {piece!r} ({place(id)}) has a lone surrogate, so it is not text"
            ) from None


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist; expected a vocab.txt, a tokenizer.json or a folder with one "
            "(names on a hub are not looked up here)"
        ) from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    refuse_pointer(path, data)
    return data


def _parse_vocab_txt(path: Path, data: bytes) -> tuple[str, ...]:
    """The pieces of a vocab.txt: one per line; line ends are \\n, \\r\\n or \\r."""
    expected = "expected a vocab.txt: UTF-8 text, one piece per line"
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
    check_pieces(pieces, str(path), "line", 1)
    return pieces


def _is_json_object(text: str) -> bool:
    if text.lstrip()[:1] != "{":
        return False
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False
