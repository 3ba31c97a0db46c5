"""Special pieces and conversions of a vocabulary under transformers' names."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mvbert.errors import InputError
from mvbert.text.texts import described
from mvbert.text.vocab import Vocab


@dataclass(frozen=True)
class AddedToken:
    """A special or an added piece, with transformers' names of what it is."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = True

    def __str__(self) -> str:
        return self.content


class TokenNames:
    """What every tokenizer of transformers answers about its vocabulary.

    Attributes:
        vocab: the vocabulary.
        model_max_length: the longest row the model takes; 10^30 where no file says it.
        model_input_names: the inputs that a call gives unless it says otherwise.
    """

    vocab: Vocab
    model_max_length: int
    model_input_names: list[str]  # as transformers has it: its pipelines add to it

    is_fast = True
    padding_side = truncation_side = "right"
    split_special_tokens = False
    clean_up_tokenization_spaces = True
    pad_token_type_id = 0
    pad_token, unk_token = "[PAD]", "[UNK]"
    cls_token, sep_token = "[CLS]", "[SEP]"
    bos_token = eos_token = None
    bos_token_id = eos_token_id = None

    @property
    def mask_token(self) -> str | None:
        """None if the vocabulary has none."""
        return "[MASK]" if "[MASK]" in self.vocab.ids else None

    @property
    def pad_token_id(self) -> int:
        return self.vocab.pad

    @property
    def unk_token_id(self) -> int:
        return self.vocab.unk

    @property
    def cls_token_id(self) -> int:
        return self.vocab.cls

    @property
    def sep_token_id(self) -> int:
        return self.vocab.sep

    @property
    def mask_token_id(self) -> int | None:
        return self.vocab.ids.get("[MASK]")

    @property
    def all_special_tokens(self) -> list[str]:
        """The special pieces, added ones last."""
        named = self._named_special
        return [*named, *(p for p in self.additional_special_tokens if p not in named)]

    @property
    def _named_special(self) -> list[str]:
        """Those with a name, in transformers' order."""
        names = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")
        return [piece for piece in names if piece in self.vocab.ids]

    @property
    def all_special_ids(self) -> list[int]:
        return [self.vocab.ids[piece] for piece in self.all_special_tokens]

    @property
    def additional_special_tokens(self) -> list[str]:
        """The special ones of the added pieces."""
        return [added.piece for added in self.vocab.added if added.special]

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        return [self.vocab.ids[piece] for piece in self.additional_special_tokens]

    @property
    def special_tokens_map(self) -> dict[str, Any]:
        names: dict[str, Any] = {f"{p[1:-1].lower()}_token": p for p in self._named_special}
        more = self.additional_special_tokens
        return {**names, "additional_special_tokens": more} if more else names

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Special and added pieces by their ids, in order."""
        tokens = {piece: AddedToken(piece) for piece in self.vocab.special_pieces}
        for a in self.vocab.added:
            tokens[a.piece] = AddedToken(a.piece, normalized=a.normalized, special=a.special)
        return {
            self.vocab.ids[p]: tokens[p] for p in sorted(tokens, key=self.vocab.ids.__getitem__)
        }

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """Their ids, in the same order."""
        return {token.content: id for id, token in self.added_tokens_decoder.items()}

    @property
    def do_lower_case(self) -> bool:
        return self.vocab.lowercase

    @property
    def max_len_single_sentence(self) -> int:
        """Pieces of a text that fit into a row."""
        return self.model_max_length - 2

    @property
    def max_len_sentences_pair(self) -> int:
        return self.model_max_length - 3

    @property
    def vocab_size(self) -> int:
        """Pieces that words are cut into; added ones past these do not count."""
        return self.vocab.base_size

    def __len__(self) -> int:
        """All pieces, added ones too."""
        return self.vocab.size

    def get_vocab(self) -> dict[str, int]:
        """Piece to id, added ones too."""
        return dict(self.vocab.ids)

    def get_added_vocab(self) -> dict[str, int]:
        """Special and added pieces to their ids."""
        names = (*self.vocab.special_pieces, *(a.piece for a in self.vocab.added))
        return {name: self.vocab.ids[name] for name in names}

    def convert_tokens_to_ids(self, tokens: str | Iterable[str] | None) -> Any:
        """The id of a piece, or the ids of several; [UNK]'s for one that does not exist."""
        if tokens is None:
            return None
        if isinstance(tokens, str):
            return self.vocab.ids.get(tokens, self.vocab.unk)
        try:
            return [self.vocab.ids.get(token, self.vocab.unk) for token in tokens]
        except TypeError:
            raise InputError(f"tokens is {described(tokens)}, expected pieces") from None

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The piece of an id, or the pieces of several.

        Args:
            ids: an integer, or a row of them.
            skip_special_tokens: of a row, leave out special pieces.

        Raises:
            InputError: an id outside the vocabulary.
        """
        if hasattr(ids, "tolist"):
            ids = ids.tolist()
        if not isinstance(ids, Iterable):
            return self._piece(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else ()
        return [self._piece(id) for id in ids if id not in skipped]

    def _piece(self, id: Any) -> str:
        if isinstance(id, bool) or not hasattr(id, "__index__") or not 0 <= id < self.vocab.size:
            raise InputError(f"id {id!r} is not in [0, {self.vocab.size})")
        return self.vocab.pieces[id]

    # transformers' collator for whole words asks by this name
    _convert_id_to_token = _piece

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        """The text of pieces: joined by spaces, but continued words."""
        if not isinstance(tokens, Iterable):
            raise InputError(f"tokens is {described(tokens)}, expected pieces")
        return " ".join(tokens).replace(" ##", "").strip()

    # ---- rows of ids ---------------------------------------------------------------------------

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return 3 if pair else 2

    def build_inputs_with_special_tokens(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """A row of ids that have no [CLS] and [SEP] yet."""
        _check_rows(token_ids_0, token_ids_1)
        row = [self.vocab.cls, *token_ids_0, self.vocab.sep]
        return row if token_ids_1 is None else [*row, *token_ids_1, self.vocab.sep]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """The token types of such a row."""
        _check_rows(token_ids_0, token_ids_1)
        first = [0] * (len(token_ids_0) + 2)
        return first if token_ids_1 is None else first + [1] * (len(token_ids_1) + 1)

    def get_special_tokens_mask(
        self,
        token_ids_0: Sequence[int],
        token_ids_1: Sequence[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 where a row has a special piece.

        Args:
            already_has_special_tokens: the row is whole; else it is what
                `build_inputs_with_special_tokens` makes of the arguments.
        """
        _check_rows(token_ids_0, token_ids_1)
        if already_has_special_tokens:
            special = set(self.all_special_ids)
            return [int(id in special) for id in token_ids_0]
        row = [1, *[0] * len(token_ids_0), 1]
        return row if token_ids_1 is None else [*row, *[0] * len(token_ids_1), 1]


def _check_rows(token_ids_0: object, token_ids_1: object) -> None:
    for name, row in (("token_ids_0", token_ids_0), ("token_ids_1", token_ids_1 or ())):
        if not (hasattr(row, "__len__") and isinstance(row, Iterable)):
            raise InputError(f"{name} is {described(row)}, expected a row of ids")
