"""Tokenizers over the C++ core, and the files that Hugging Face's tokenizers open.

`WordPieceTokenizer` gives the ids of Hugging Face's slow BertTokenizer (transformers 4.57);
`MixedTokenizer` cuts each word by one of two vocabularies. Both are immutable: any number of
threads may use one, a forked child too, and no environment variable is needed.
"""

import json
import mmap
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mvbert import _core
from mvbert.cores import cores
from mvbert.errors import InputError, require_extra
from mvbert.files import Json, atomic_write, write_error, write_json
from mvbert.text.batch_encoding import BatchEncoding
from mvbert.text.hub import TOKENIZER_FILES, download, is_hub_name
from mvbert.text.readers import SAMPLE_BYTES, check_is_text
from mvbert.text.texts import (
    Text,
    check_flags,
    check_integer,
    check_length,
    check_size,
    check_text,
    check_texts,
    described,
    list_of_texts,
)
from mvbert.text.token_names import TokenNames
from mvbert.text.tokenizer_call import (
    UNKNOWN_LENGTH,
    call,
    check_multiple,
    check_side,
    pad,
    padding_name,
    plan_call,
    truncation_name,
)
from mvbert.text.tokenizer_files import MODEL_INPUTS, read_model_inputs
from mvbert.text.vocab import LIMIT, AddedPiece, Vocab

if TYPE_CHECKING:
    from transformers import BertTokenizerFast


@dataclass(frozen=True)
class FlatBatch:
    """Rows of different lengths, one after another."""

    ids: NDArray[np.int32]  # [N]; row i is ids[offsets[i] : offsets[i + 1]]
    offsets: NDArray[np.int64]  # [B + 1]
    token_type_ids: NDArray[np.uint8]  # [N]; 1 in the second text of a pair, with [SEP]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[np.int32]:
        row = range(len(self))[row]
        return self.ids[self.offsets[row] : self.offsets[row + 1]]


@dataclass(frozen=True)
class PaddedBatch:
    """Rows padded to one length T, under the names of Hugging Face's model inputs."""

    input_ids: NDArray[Any]  # [B, T]
    token_type_ids: NDArray[Any]  # [B, T]
    attention_mask: NDArray[Any]  # [B, T]; 0 where padded

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class MixedEncoding:
    """A text cut by two vocabularies. Ids from the teacher's size on are the student's."""

    ids: NDArray[np.int32]  # [n]
    word_starts: NDArray[np.int32]  # [words]; word w is ids[word_starts[w] : word_starts[w + 1]]
    from_student: NDArray[np.bool_]  # [words]


class MixedBatch:
    """Texts cut by two vocabularies, one after another; batch[i] is the `MixedEncoding` of text i.

    Word boundaries and the vocabulary of each word are computed on first use.

    Attributes:
        ids: [N] int32; text i is ids[offsets[i] : offsets[i + 1]].
        offsets: [B + 1] int64.
    """

    def __init__(
        self,
        ids: NDArray[np.int32],
        offsets: NDArray[np.int64],
        begins_word: NDArray[np.bool_],
        teacher_size: int,
    ) -> None:
        self.ids = ids
        self.offsets = offsets
        self._begins_word = begins_word  # by joint id
        self._teacher_size = teacher_size

    @cached_property
    def word_starts(self) -> NDArray[np.int64]:
        """[words], of all texts: word w is ids[word_starts[w] : word_starts[w + 1]]."""
        return np.flatnonzero(self._begins_word[self.ids])

    @cached_property
    def word_offsets(self) -> NDArray[np.int64]:
        """[B + 1]: text i has words [word_offsets[i], word_offsets[i + 1])."""
        return np.searchsorted(self.word_starts, self.offsets)

    @cached_property
    def from_student(self) -> NDArray[np.bool_]:
        """[words]: whether the word is tokenized with the student's vocabulary."""
        return self.ids[self.word_starts] >= self._teacher_size

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, text: int) -> MixedEncoding:
        text = range(len(self))[text]
        begin, end = self.offsets[text : text + 2]
        words = slice(*self.word_offsets[text : text + 2])
        return MixedEncoding(
            self.ids[begin:end],
            (self.word_starts[words] - begin).astype(np.int32),
            self.from_student[words],
        )


class WordPieceTokenizer(TokenNames):
    """BERT's tokenizer, called as those of transformers are.

    >>> tokenizer = WordPieceTokenizer.from_pretrained("folder")
    >>> tokenizer.encode("Hello, [MASK]!")
    [101, 7592, 1010, 103, 999, 102]

    Special and added pieces inside text are recognised, as Hugging Face does; build corpora with
    `mvbert.text.corpus`, which does not.

    >>> tokenizer(["Hello!", "One more text"], padding=True, return_tensors="pt")["input_ids"]
    tensor([[ 101, 7592,  999,  102,    0], [ 101, 2028, 2062, 3793,  102]])

    Args:
        vocab: the vocabulary, with its normalisation.
        model_max_length: the longest row the model takes; what `truncation=True` cuts to.
        model_input_names: the inputs that a call gives unless it says otherwise.
        name_or_path: what it was opened from.
    """

    def __init__(
        self,
        vocab: Vocab,
        model_max_length: int = UNKNOWN_LENGTH,
        model_input_names: Sequence[str] = MODEL_INPUTS,
        name_or_path: str = "",
    ) -> None:
        self.vocab = vocab
        self.name_or_path = name_or_path
        self.model_max_length = model_max_length
        self.model_input_names = list(model_input_names)
        special = [AddedPiece(piece) for piece in vocab.special_pieces]
        self._core = _core_of(vocab, [*special, *vocab.added])
        # What options mean is decided once. (By their types, too: 1 is no True.)
        self._plan_call = lru_cache(64, typed=True)(partial(plan_call, vocab))
        self._plan_batch = lru_cache(64, typed=True)(partial(_plan_batch, vocab))

    @cached_property
    def _core_without_special(self) -> _core.Tokenizer:
        """For split_special_tokens: special pieces in texts are text, other added ones are not."""
        return _core_of(self.vocab, [added for added in self.vocab.added if not added.special])

    @classmethod
    def from_pretrained(
        cls, path: str | Path, lowercase: bool | None = None
    ) -> "WordPieceTokenizer":
        """Opens a folder with a vocabulary, a vocab.txt or a tokenizer.json; see `Vocab.load`.

        Args:
            path: one of these, or the name of a repository on the Hugging Face Hub.
            lowercase: overrides what the files say.
        """
        if not isinstance(path, str | os.PathLike):
            raise InputError(
                f"path is {described(path)}, expected a folder, a file, or a name on the Hugging "
                "Face Hub"
            )
        if lowercase is not None:
            check_flags(lowercase=lowercase)
        name = os.fspath(path)
        if not os.path.lexists(path) and is_hub_name(str(path)) and not Path(path).suffix:
            path = download(str(path), "tokenizer", list(TOKENIZER_FILES))
        vocab = Vocab.load(path, lowercase)
        return cls(vocab, *read_model_inputs(Path(path)), name)

    def save_pretrained(self, folder: str | Path) -> tuple[Path, ...]:
        """Writes the files that `AutoTokenizer` opens; see `save_tokenizer_files`."""
        return save_tokenizer_files(self.vocab, folder, self._known_length, self.model_input_names)

    @property
    def _known_length(self) -> int:
        """model_max_length, BERT's where no file says it."""
        return 512 if self.model_max_length >= UNKNOWN_LENGTH else self.model_max_length

    def __reduce__(self) -> tuple:
        return type(self), (*self._identity, self.name_or_path)

    @property
    def _identity(self) -> tuple:
        return self.vocab, self.model_max_length, self.model_input_names

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash((self.vocab.sha256, self.model_max_length))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.vocab.size} pieces, lowercase={self.vocab.lowercase})"

    def __call__(
        self,
        text: Any,
        text_pair: Any = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        split_special_tokens: bool = False,
        verbose: bool = True,
        threads: int = 0,
    ) -> BatchEncoding:
        """Rows for a model, as transformers' tokenizers give them; docs/tokenizer.md has a table.

        Args:
            text: a text, a list of B texts, or a list of B pairs; with is_split_into_words a list
                of words, or B of them.
            text_pair: the second text, or B of them.
            add_special_tokens: [CLS] at the beginning, [SEP] after each text.
            padding: False, True or "longest", or "max_length".
            truncation: False, True or "longest_first", "only_first", "only_second"; None: True if
                there is a max_length and no padding.
            max_length: None: model_max_length.
            stride: pieces that an overflowing row repeats of the one before.
            pad_to_multiple_of: rounds the padded length up.
            padding_side: "right", or None for the same.
            return_tensors: "np" or "pt" for int64 [B, T]; None for lists of ints.
            return_token_type_ids, return_attention_mask: None: as in model_input_names.
            return_overflowing_tokens: what truncation cuts off makes further rows.
            return_special_tokens_mask: 1 where [CLS], [SEP] or [PAD] was added.
            return_offsets_mapping: where each piece lies in its text or word, in characters.
            return_length: the length of each row.
            split_special_tokens: special pieces in texts are cut as other text is.
            verbose: for transformers' calls; it changes nothing.
            threads: 0 is one for each available core.

        Raises:
            InputError: an option or a combination that has no meaning, rows that cannot be cut or
                are no array, what is no text or not UTF-8 (the message has its number).
        """
        options = (
            self.model_max_length,
            tuple(self.model_input_names),
            add_special_tokens,
            padding,
            truncation,
            max_length,
            stride,
            is_split_into_words,
            pad_to_multiple_of,
            padding_side,
            return_tensors,
            return_token_type_ids,
            return_attention_mask,
            return_overflowing_tokens,
            return_special_tokens_mask,
            return_offsets_mapping,
            return_length,
        )
        try:
            plan = self._plan_call(*options)
        except TypeError:  # one that has no hash: its check has the words for it
            plan = plan_call(self.vocab, *options)
        core = self._core
        if split_special_tokens:
            check_flags(split_special_tokens=split_special_tokens)
            core = self._core_without_special
        return call(plan, core, self.vocab, text, text_pair, threads)

    def encode_plus(
        self, text: Any, text_pair: Any = None, add_special_tokens: bool = True, **options: Any
    ) -> BatchEncoding:
        """A call of one text, under its older name."""
        return self(text, text_pair, add_special_tokens=add_special_tokens, **options)

    def batch_encode_plus(
        self, batch_text_or_text_pairs: Any, add_special_tokens: bool = True, **options: Any
    ) -> BatchEncoding:
        """A call of a list of texts or of pairs, under its older name."""
        texts = list_of_texts("batch_text_or_text_pair", batch_text_or_text_pairs)
        return self(texts, add_special_tokens=add_special_tokens, **options)

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Rows of one length, of a mapping of rows or a list of mappings with a row each.

        input_ids, token_type_ids, attention_mask and special_tokens_mask are filled up; other
        values stay. An attention mask is added unless return_attention_mask says otherwise.
        """
        check_side(padding_side)
        return pad(
            self,
            encoded_inputs,
            padding,
            max_length,
            pad_to_multiple_of,
            return_attention_mask,
            return_tensors,
        )

    def tokenize(
        self, text: Any, pair: Any = None, add_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """The pieces of a text, or of a pair one after the other; options are those of a call."""
        if options:
            return self(text, pair, add_special_tokens=add_special_tokens, **options).tokens()
        ids = self.encode(text, pair, add_special_tokens)
        return [self.vocab.pieces[id] for id in ids]

    def encode(
        self, text: Any, text_pair: Any = None, add_special_tokens: bool = True, **options: Any
    ) -> Any:
        """The ids of a text, or of a pair of texts.

        Args:
            text: str (lone surrogates are deleted) or UTF-8 bytes.
            text_pair: a second text, after a [SEP].
            add_special_tokens: [CLS] at the beginning, [SEP] after each text.
            options: those of a call, whose input_ids these are then.

        Raises:
            InputError: an argument is not text, or what a call refuses.
            ValueError: bytes that are not UTF-8; the message has the offset.
        """
        if options:
            if not options.get("is_split_into_words"):
                check_text("text", text)
            return self(text, text_pair, add_special_tokens=add_special_tokens, **options)[
                "input_ids"
            ]
        special = (self.vocab.cls, self.vocab.sep) if add_special_tokens else None
        try:
            return self._core.encode_list(text, text_pair, special)
        except TypeError:
            check_text("text", text)
            if text_pair is not None:
                check_text("text_pair", text_pair)
            raise

    def offsets(self, text: Text) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The ids of a text, without [CLS] and [SEP], and where each piece lies in it.

        Returns:
            ids [n] and spans [n, 2]: piece i has its letters in text[spans[i, 0] : spans[i, 1]]
            (characters, not bytes). Deleted characters and stripped accents at a piece's edge are
            not in its span.

        Raises:
            InputError: a text of 2^31 characters or more, whose offsets would not fit into int32.
            ValueError: bytes that are not UTF-8.
        """
        check_size(text)
        return self._core.encode_spans(text, True)

    @overload
    def encode_batch(
        self,
        texts: Iterable[Text],
        pairs: Iterable[Text] | None = ...,
        *,
        max_length: int | None = ...,
        truncation: bool | str = ...,
        padding: Literal[False] = ...,
        pad_to_multiple_of: int | None = ...,
        add_special_tokens: bool = ...,
        threads: int = ...,
        dtype: DTypeLike = ...,
    ) -> FlatBatch: ...

    @overload
    def encode_batch(
        self,
        texts: Iterable[Text],
        pairs: Iterable[Text] | None = ...,
        *,
        max_length: int | None = ...,
        truncation: bool | str = ...,
        padding: Literal[True, "longest", "max_length"],
        pad_to_multiple_of: int | None = ...,
        add_special_tokens: bool = ...,
        threads: int = ...,
        dtype: DTypeLike = ...,
    ) -> PaddedBatch: ...

    @overload
    def encode_batch(
        self,
        texts: Iterable[Text],
        pairs: Iterable[Text] | None = ...,
        *,
        max_length: int | None = ...,
        truncation: bool | str = ...,
        padding: bool | str,
        pad_to_multiple_of: int | None = ...,
        add_special_tokens: bool = ...,
        threads: int = ...,
        dtype: DTypeLike = ...,
    ) -> FlatBatch | PaddedBatch: ...

    def encode_batch(
        self,
        texts: Iterable[Text],
        pairs: Iterable[Text] | None = None,
        *,
        max_length: int | None = None,
        truncation: bool | str = False,
        padding: bool | str = False,
        pad_to_multiple_of: int | None = None,
        add_special_tokens: bool = True,
        threads: int = 0,
        dtype: DTypeLike = np.int64,
    ) -> FlatBatch | PaddedBatch:
        """The ids of many texts as numpy arrays; the interpreter lock is free meanwhile.

        Args:
            texts: B texts.
            pairs: the second text of each row; an empty one still has its [SEP].
            max_length: the longest row, special tokens counted. What cannot get into a row is not
                read.
            truncation: False, or how rows are cut to `max_length`: True or "longest_first" takes
                from the longer text of a pair, "only_first" and "only_second" from one.
            padding: False gives a `FlatBatch`; True or "longest" pads to the longest row,
                "max_length" to `max_length`.
            pad_to_multiple_of: rounds the padded length up.
            add_special_tokens: [CLS] at the beginning, [SEP] after each text.
            threads: 0 is one for each available core.
            dtype: of a `PaddedBatch`: int64, which torch and Hugging Face use, or int32.

        Raises:
            InputError: an option or a combination that has no meaning, a table instead of a list,
                rows that cannot be cut, what is no text or not UTF-8 (the message has the text's
                number and the offset).
        """
        texts = list_of_texts("text", texts)
        pairs = None if pairs is None else list_of_texts("pair", pairs)
        options: Any = (
            max_length,
            truncation,
            padding,
            pad_to_multiple_of,
            add_special_tokens,
            dtype,
        )
        try:
            plan, wide = self._plan_batch(pairs is not None, *options)
        except TypeError:  # one that has no hash: its check has the words for it
            plan, wide = _plan_batch(self.vocab, pairs is not None, *options)
        try:
            rows = self._core.encode_rows(texts, pairs, plan, cores(threads))
        except TypeError:
            check_texts("text", texts)
            check_texts("pair", pairs or ())
            raise
        except ValueError as error:
            raise InputError(str(error)) from None
        if rows.width is None:
            return FlatBatch(*rows.flat())
        return PaddedBatch(*rows.padded(wide))

    def encode_file(self, path: str | Path, *, threads: int = 0) -> NDArray[np.int32]:
        """The ids of a UTF-8 text file as one text, without [CLS] and [SEP]; it is memory-mapped.

        Raises:
            InputError: the file cannot be read, is binary or is not UTF-8; the message has the
                offset or the encoding.
        """
        threads = cores(threads)
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise InputError(f"{path} is not a regular file")
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_size == 0:
                    return np.zeros(0, np.int32)
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                with mapped, memoryview(mapped) as data:
                    check_is_text(path, bytes(data[:SAMPLE_BYTES]))
                    return self._core.encode_long(data, True, threads)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{path} is {error}") from None

    def decode(
        self,
        token_ids: int | Sequence[int] | NDArray[Any],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        """The text of ids: pieces joined, as Hugging Face's slow tokenizer does.

        Args:
            token_ids: any integers of [0, size), or one.
            skip_special_tokens: leave out [PAD], [UNK], [CLS], [SEP], [MASK], special added ones.
            clean_up_tokenization_spaces: no space before punctuation and in English contractions;
                None: True.

        Raises:
            InputError: an id outside the vocabulary.
        """
        array = np.asarray(token_ids)
        if array.ndim == 0 and array.dtype.kind in "iu":
            token_ids = [int(array)]
        elif array.ndim != 1:
            raise InputError(
                f"token_ids has {array.ndim} dimensions, expected one row; use batch_decode() for "
                "several"
            )
        pieces = self.convert_ids_to_tokens(token_ids, skip_special_tokens)
        text = self.convert_tokens_to_string(pieces)
        if clean_up_tokenization_spaces is not False:
            for suffix in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
                text = text.replace(suffix, suffix.strip())
        return text

    def batch_decode(
        self,
        sequences: Iterable[Sequence[int] | NDArray[Any]],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """The texts of rows of ids; see `decode`."""
        if not isinstance(sequences, Iterable):
            raise InputError(f"sequences is {described(sequences)}, expected rows of ids")
        return [
            self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in sequences
        ]

    def as_hf(self) -> "BertTokenizerFast":
        """This vocabulary as transformers' own fast tokenizer, for code that asks for one.

        It is Hugging Face's implementation: its ids differ from this class's on some 760 characters
        newer than its Unicode tables, and on cased text with decomposed accents.
        """
        with require_extra("hf", "as_hf"):
            import tokenizers
            import transformers
        return transformers.BertTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(_tokenizer_json(self.vocab))),
            do_lower_case=self.vocab.lowercase,
            strip_accents=_unusual_accents(self.vocab),
            model_max_length=self._known_length,
        )


class MixedTokenizer:
    """Cuts each word of a text by the teacher's or by the student's vocabulary.

    Ids are in one space: below `teacher.size` a teacher's piece, `teacher.size + i` the student's
    piece i. Special pieces in text are not special; no [CLS] or [SEP] is added.

    Args:
        teacher, student: vocabularies (or tokenizers) with the same lower-casing.

    Raises:
        InputError: one lower-cases and the other does not, or the ids do not fit into 31 bits.
    """

    def __init__(
        self, teacher: Vocab | WordPieceTokenizer, student: Vocab | WordPieceTokenizer
    ) -> None:
        self.teacher = teacher.vocab if isinstance(teacher, WordPieceTokenizer) else teacher
        self.student = student.vocab if isinstance(student, WordPieceTokenizer) else student
        casings = [(v.lowercase, v.strip_accents) for v in (self.teacher, self.student)]
        if casings[0] != casings[1]:
            raise InputError(
                f"the teacher's vocabulary is {self.teacher.casing} and the student's "
                f"{self.student.casing}; both must normalise words alike"
            )
        if self.teacher.size + self.student.size > LIMIT:
            raise InputError("the two vocabularies have more than 2^31 - 1 pieces together")
        self._core = _core.Tokenizer(
            lowercase=self.teacher.lowercase,
            strip_accents=self.teacher.strip_accents,
            teacher=_core.WordPiece(list(self.teacher.pieces), self.teacher.unk),
            student=_core.WordPiece(list(self.student.pieces), self.student.unk),
        )
        # By joint id. No word begins with ##: # is punctuation, a word of its own.
        self._begins_word = np.array(
            [not piece.startswith("##") for v in (self.teacher, self.student) for piece in v]
        )

    def __reduce__(self) -> tuple:
        return type(self), (self.teacher, self.student)

    def encode(
        self, text: Text, *, student_prob: float = 0.5, seed: int = 0, number: int = 0
    ) -> MixedEncoding:
        """Cuts a text; the same arguments always give the same ids.

        Args:
            text: str or UTF-8 bytes.
            student_prob: the chance of each word to be cut by the student's vocabulary.
            seed: of [0, 2^64).
            number: the text's own number, of [0, 2^64): texts with different numbers have
                independent coins.

        Raises:
            InputError: an argument out of range, or a text of 2^31 characters or more.
            ValueError: bytes that are not UTF-8; the message has the offset.
        """
        check_size(text)
        coin = _coin(student_prob, seed, number)
        return MixedEncoding(*self._core.encode_words(text, False, *coin))

    def offsets(
        self, text: Text, *, student_prob: float = 0.5, seed: int = 0, number: int = 0
    ) -> tuple[MixedEncoding, NDArray[np.int32]]:
        """What `encode` gives, and where each piece lies in the text.

        Returns:
            The encoding and spans [n, 2], which mean what `WordPieceTokenizer.offsets` says.
        """
        encoding = self.encode(text, student_prob=student_prob, seed=seed, number=number)
        lengths = np.diff(encoding.word_starts, append=len(encoding.ids))
        spans = np.empty((len(encoding.ids), 2), np.int32)
        for student, core in enumerate((self._core, self._student_core)):
            # All words as one vocabulary cuts them; of these, the words that it is to cut.
            ids, all_spans = core.encode_spans(text, False)
            starts = np.flatnonzero(self._begins_word[ids + student * self.teacher.size])
            words = encoding.from_student == bool(student)
            all_lengths = np.diff(starts, append=len(ids))
            spans[np.repeat(words, lengths)] = all_spans[np.repeat(words, all_lengths)]
        return encoding, spans

    @cached_property
    def _student_core(self) -> _core.Tokenizer:
        """The student's pieces alone."""
        return _core.Tokenizer(
            lowercase=self.student.lowercase,
            strip_accents=self.student.strip_accents,
            teacher=_core.WordPiece(list(self.student.pieces), self.student.unk),
        )

    def encode_batch(
        self,
        texts: Iterable[Text],
        *,
        student_prob: float = 0.5,
        seed: int = 0,
        first_number: int = 0,
        threads: int = 0,
    ) -> MixedBatch:
        """Cuts texts; text i has number first_number + i. Threads do not change the result.

        Raises:
            InputError: an argument out of range, a table instead of a list, what is no text or not
                UTF-8 (the message has the text's number and the offset).
        """
        texts = list_of_texts("text", texts)
        coin = _coin(student_prob, seed, first_number)
        threads = cores(threads)
        try:
            arrays = self._core.encode_texts(texts, False, *coin, threads=threads)
        except TypeError:
            check_texts("text", texts)
            raise
        except ValueError as error:
            raise InputError(str(error)) from None
        return MixedBatch(*arrays, self._begins_word, self.teacher.size)


def _coin(student_prob: float, seed: int, number: int) -> tuple[int, int, int]:
    """The probability as an integer of [0, 2^32], the seed, the number."""
    if not isinstance(student_prob, Real) or not 0 <= student_prob <= 1:
        raise InputError(f"student_prob is {student_prob!r}, expected a number of [0, 1]")
    for name, value in (("seed", seed), ("number", number)):
        check_integer(name, value, 0, 2**64)
    return round(student_prob * 2**32), seed, number


def _core_of(vocab: Vocab, recognised: list[AddedPiece]) -> _core.Tokenizer:
    """The core's tokenizer that recognises these pieces in texts."""
    # Words are never cut into pieces that come after the base vocabulary.
    pieces = [p if id < vocab.base_size else "" for id, p in enumerate(vocab.pieces)]
    return _core.Tokenizer(
        lowercase=vocab.lowercase,
        strip_accents=vocab.strip_accents,
        teacher=_core.WordPiece(pieces, vocab.unk),
        special=[(piece.piece, vocab.ids[piece.piece], piece.normalized) for piece in recognised],
    )


def _plan_batch(
    vocab: Vocab,
    pairs: bool,
    max_length: int | None,
    truncation: bool | str,
    padding: bool | str,
    pad_to_multiple_of: int | None,
    add_special_tokens: bool,
    dtype: DTypeLike,
) -> tuple[_core.RowPlan, bool]:
    """What the options of `encode_batch` mean, and whether padded rows are int64."""
    cut = _truncation(truncation, max_length, pairs)
    pad_to = _padding(padding, max_length)
    if max_length is not None and cut is None and pad_to != "max_length":
        raise InputError("max_length needs truncation or padding='max_length'")
    wide = _is_int64(dtype)
    if pad_to_multiple_of is not None:
        check_integer("pad_to_multiple_of", pad_to_multiple_of, 1, 2**31)
    check_multiple(cut, pad_to, max_length, pad_to_multiple_of)
    plan = _core.RowPlan(
        cls_sep=(vocab.cls, vocab.sep) if add_special_tokens else None,
        pad=vocab.pad,
        truncation=cut,
        max_length=max_length or 0,
        padded=pad_to is not None,
        width=max_length if pad_to == "max_length" else None,
        multiple=pad_to_multiple_of or 1,
    )
    return plan, wide


def _truncation(truncation: bool | str, max_length: int | None, pairs: bool) -> str | None:
    name = truncation_name(truncation)
    if name is None:
        return None
    if max_length is None:
        raise InputError("truncation needs max_length")
    check_length(max_length)
    if name == "only_second" and not pairs:
        raise InputError("truncation='only_second' needs pairs")
    return name


def _padding(padding: bool | str, max_length: int | None) -> str | None:
    name = padding_name(padding)
    if name == "max_length":
        if max_length is None:
            raise InputError("padding='max_length' needs max_length")
        check_length(max_length)
    return name


def _is_int64(dtype: DTypeLike) -> bool:
    try:
        result = np.dtype(dtype)
    except TypeError:
        result = None
    if result not in (np.int32, np.int64):
        raise InputError(f"dtype is {result or repr(dtype)}, expected int32 or int64")
    return result == np.int64


def save_tokenizer_files(
    vocab: Vocab,
    folder: str | Path,
    model_max_length: int = 512,
    model_input_names: Sequence[str] = MODEL_INPUTS,
) -> tuple[Path, ...]:
    """Writes vocab.txt, tokenizer.json and tokenizer_config.json, each atomically.

    `AutoTokenizer.from_pretrained(folder)` of transformers 4 and 5 opens them; the folder needs a
    config.json with `"model_type": "bert"` only where transformers asks for one.

    Args:
        vocab: the vocabulary, with its normalisation.
        folder: made if it does not exist.
        model_max_length: the longest row the model takes, in pieces.
        model_input_names: the inputs that a call gives unless it says otherwise.

    Returns:
        The three paths.

    Raises:
        InputError: a file cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    paths = tuple(
        folder / name for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json")
    )
    vocab.save(paths[0])
    # One line: the vocabulary would otherwise be 30,000 lines of indentation.
    atomic_write(paths[1], json.dumps(_tokenizer_json(vocab), ensure_ascii=False) + "\n")
    tokens = _added_tokens(vocab)
    extra = [a.piece for a in vocab.added if a.special]
    write_json(
        paths[2],
        {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": vocab.lowercase,
            "strip_accents": _unusual_accents(vocab),
            "tokenize_chinese_chars": True,
            "model_max_length": model_max_length,
            **(
                {"model_input_names": list(model_input_names)}
                if tuple(model_input_names) != MODEL_INPUTS
                else {}
            ),
            **{f"{piece[1:-1].lower()}_token": piece for piece in vocab.special_pieces},
            "added_tokens_decoder": {str(token.pop("id")): token for token in tokens},
            **({"additional_special_tokens": extra} if extra else {}),
        },
    )
    return paths


def _unusual_accents(vocab: Vocab) -> bool | None:
    """strip_accents as transformers writes it: None where it is what lower-casing says."""
    return None if vocab.strip_accents == vocab.lowercase else vocab.strip_accents


def _added_tokens(vocab: Vocab) -> list[dict[str, Any]]:
    """Special and added pieces as transformers writes them, by their ids."""
    pieces = [AddedPiece(piece) for piece in vocab.special_pieces] + [*vocab.added]
    return [
        {
            "id": vocab.ids[added.piece],
            "content": added.piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": added.normalized,
            "special": added.special,
        }
        for added in sorted(pieces, key=lambda added: vocab.ids[added.piece])
    ]


def _tokenizer_json(vocab: Vocab) -> dict[str, Json]:
    def special(piece: str) -> dict[str, Json]:
        return {"id": piece, "ids": [vocab.ids[piece]], "tokens": [piece]}

    def sequence(name: str, type_id: int) -> dict[str, Json]:
        return {"Sequence": {"id": name, "type_id": type_id}}

    def token(piece: str, type_id: int) -> dict[str, Json]:
        return {"SpecialToken": {"id": piece, "type_id": type_id}}

    single = [token("[CLS]", 0), sequence("A", 0), token("[SEP]", 0)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocab),
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": _unusual_accents(vocab),
            "lowercase": vocab.lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, sequence("B", 1), token("[SEP]", 1)],
            "special_tokens": {piece: special(piece) for piece in ("[CLS]", "[SEP]")},
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {piece: id for piece, id in vocab.ids.items() if id < vocab.base_size},
        },
    }
