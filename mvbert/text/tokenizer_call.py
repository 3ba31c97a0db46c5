"""Calling a tokenizer as one calls those of transformers: options, texts, the batch they give."""

import itertools
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvbert import _core
from mvbert.cores import cores
from mvbert.errors import InputError
from mvbert.text.batch_encoding import UNREAD, BatchEncoding, EncodedRows, as_tensors, check_tensors
from mvbert.text.texts import (
    TEXT_TYPES,
    Text,
    check_flags,
    check_integer,
    check_length,
    check_texts,
    described,
    list_of_texts,
)
from mvbert.text.vocab import Vocab

if TYPE_CHECKING:
    from mvbert.text.token_names import TokenNames

TRUNCATIONS = ("longest_first", "only_first", "only_second")
UNKNOWN_LENGTH = 10**30  # model_max_length of transformers where no file says it


# ---- options ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class CallPlan:
    """What the options of a call mean, for any number of calls.

    Attributes:
        rows: how the core makes rows.
        columns: the names of what it makes of each row, in the batch's order.
        split: texts are lists of words.
        lead: special pieces before and after each text: 1 or 0.
        overflow: what is cut off makes further rows.
        offsets: the offsets of pieces are asked for.
        length: the lengths of rows are asked for.
        tensors: "np" or "pt", or None for lists.
        even: rows must be of one length by themselves.
        warning: what every such call warns of.
    """

    rows: _core.RowPlan
    columns: tuple[str, ...]
    split: bool
    lead: int
    overflow: bool
    offsets: bool
    length: bool
    tensors: str | None
    even: bool
    warning: str | None


def plan_call(
    vocab: Vocab,
    model_max_length: int,
    model_input_names: Sequence[str],
    add_special_tokens: bool,
    padding: bool | str,
    truncation: bool | str | None,
    max_length: int | None,
    stride: int,
    is_split_into_words: bool,
    pad_to_multiple_of: int | None,
    padding_side: str | None,
    return_tensors: str | None,
    return_token_type_ids: bool | None,
    return_attention_mask: bool | None,
    return_overflowing_tokens: bool,
    return_special_tokens_mask: bool,
    return_offsets_mapping: bool,
    return_length: bool,
) -> CallPlan:
    """What transformers makes of these options: `max_length` alone truncates, for example."""
    check_flags(
        add_special_tokens=add_special_tokens,
        is_split_into_words=is_split_into_words,
        return_overflowing_tokens=return_overflowing_tokens,
        return_special_tokens_mask=return_special_tokens_mask,
        return_offsets_mapping=return_offsets_mapping,
        return_length=return_length,
    )
    check_tensors(return_tensors)
    check_side(padding_side)
    check_integer("stride", stride, 0, 2**31)
    if max_length is not None:
        check_length(max_length)
    pad_to = padding_name(padding)
    if truncation is None:
        truncation = max_length is not None and padding is False
    cut = truncation_name(truncation)
    if pad_to_multiple_of is not None:
        check_integer("pad_to_multiple_of", pad_to_multiple_of, 1, 2**31)
    warning = None
    if max_length is None and (cut or pad_to == "max_length"):
        if model_max_length >= UNKNOWN_LENGTH:
            option = "truncation" if cut else "padding='max_length'"
            raise InputError(
                f"{option} needs max_length: no file of the tokenizer has a model_max_length"
            )
        max_length = model_max_length
    elif max_length is not None and pad_to == "longest" and not cut:
        warning = (
            "max_length is ignored, as padding is to the longest row and truncation is off; pass "
            "truncation=True to cut rows to it"
        )
        max_length = None
    check_multiple(cut, pad_to, max_length, pad_to_multiple_of)
    included = {
        "input_ids": True,
        "token_type_ids": _includes(return_token_type_ids, "token_type_ids", model_input_names),
        "attention_mask": _includes(return_attention_mask, "attention_mask", model_input_names),
        "special_tokens_mask": return_special_tokens_mask,
        "offset_mapping": return_offsets_mapping,
    }
    rows = _core.RowPlan(
        cls_sep=(vocab.cls, vocab.sep) if add_special_tokens else None,
        pad=vocab.pad,
        truncation=cut,
        max_length=max_length or 0,
        stride=stride if return_overflowing_tokens else None,
        padded=pad_to is not None or return_tensors is not None,
        width=max_length if pad_to == "max_length" else None,
        multiple=pad_to_multiple_of or 1 if pad_to else 1,
        spans=return_offsets_mapping,
        keep=True,
    )
    return CallPlan(
        rows=rows,
        columns=tuple(name for name, include in included.items() if include),
        split=is_split_into_words,
        lead=int(add_special_tokens),
        overflow=return_overflowing_tokens,
        offsets=return_offsets_mapping,
        length=return_length,
        tensors=return_tensors,
        even=return_tensors is not None and pad_to is None,
        warning=warning,
    )


def padding_name(padding: bool | str) -> str | None:
    """ "longest", "max_length" or None for no padding."""
    names = {False: None, "do_not_pad": None, True: "longest"}
    if isinstance(padding, bool | str) and padding in (*names, "longest", "max_length"):
        return names.get(padding, padding)  # type: ignore[arg-type,return-value]
    raise InputError(
        f"padding is {padding!r}, expected True, False, 'longest', 'max_length' or 'do_not_pad'"
    )


def truncation_name(truncation: bool | str) -> str | None:
    """One of TRUNCATIONS, or None for no truncation."""
    names = {False: None, "do_not_truncate": None, True: "longest_first"}
    if isinstance(truncation, bool | str) and truncation in (*names, *TRUNCATIONS):
        return names.get(truncation, truncation)  # type: ignore[arg-type,return-value]
    raise InputError(
        f"truncation is {truncation!r}, expected True, False or one of {', '.join(TRUNCATIONS)}"
    )


def check_multiple(
    cut: str | None, pad_to: str | None, max_length: int | None, multiple: int | None
) -> None:
    """Refuses padded rows that may be longer than `max_length`."""
    if cut and pad_to and max_length is not None and max_length % (multiple or 1):
        raise InputError(
            f"max_length {max_length} is not a multiple of pad_to_multiple_of "
            f"{multiple}, so padded rows could be longer than it"
        )


def check_side(padding_side: str | None) -> None:
    if padding_side not in (None, "right"):
        raise InputError(
            f"padding_side is {padding_side!r}, expected 'right': rows are padded at their end; "
            "as_hf() gives a tokenizer that pads on the left"
        )


# ---- texts -----------------------------------------------------------------------------------


class Texts(NamedTuple):
    """One argument of a call: B texts, or the words of B texts one after another."""

    name: str
    texts: tuple[Text, ...]
    words: NDArray[np.int64] | None  # [B], where each text's words end

    def check(self) -> None:
        """Refuses the first that is no text, by its number."""
        if self.words is None:
            check_texts(self.name, self.texts)
            return
        begin = 0
        for number, end in enumerate(self.words.tolist()):
            check_texts(f"{self.name} {number}, word", self.texts[begin:end])
            begin = end


def _one_list(name: str, value: Any, split: bool) -> Texts:
    """Several texts."""
    if not split:
        return Texts(name, list_of_texts(name, value), None)
    rows: Sequence[Any] = list_of_texts(name, value)
    for number, row in enumerate(rows):
        if not isinstance(row, list | tuple):
            raise InputError(
                f"{name} {number} is {described(row)}, expected a list of words "
                "(is_split_into_words is true)"
            )
    ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
    return Texts(name, tuple(itertools.chain.from_iterable(rows)), ends)


def _is_single(name: str, value: Any, split: bool) -> bool:
    """Whether an argument is one text, not a list of them."""
    if not split:
        return isinstance(value, TEXT_TYPES)
    if isinstance(value, TEXT_TYPES):
        raise InputError(f"{name} is {described(value)}, expected a list of words, or of such")
    value = list_of_texts(name, value)
    return not value or not isinstance(value[0], list | tuple)


def read_texts(text: Any, text_pair: Any, split: bool) -> tuple[Texts, Texts | None, bool]:
    """The texts and pairs of a call, and whether they are several."""
    if type(text) is list and text and type(text[0]) is str and text_pair is None and not split:
        return Texts("text", tuple(text), None), None, True  # nearly always
    single = _is_single("text", text, split)
    if text_pair is not None:
        if _is_single("pair", text_pair, split) != single:
            one, several = ("text", "text_pair") if single else ("text_pair", "text")
            raise InputError(f"{one} is one text and {several} a list: give two of a kind")
    elif not single and not split:
        if text is None:
            raise InputError("text is None (NoneType), expected str, bytes or a list of them")
        text = list_of_texts("text", text)
        if text and isinstance(text[0], list | tuple):
            text, text_pair = _unzip(text)
    values = [("text", text)] + ([("pair", text_pair)] if text_pair is not None else [])
    texts = [_one_list(name, [value] if single else value, split) for name, value in values]
    return texts[0], texts[1] if len(texts) > 1 else None, not single


def _unzip(rows: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Pairs given as a list of two texts each."""
    for number, row in enumerate(rows):
        if not isinstance(row, list | tuple) or len(row) != 2:
            raise InputError(
                f"text {number} is {described(row)}, expected a pair of texts as those before; "
                "for lists of words pass is_split_into_words=True"
            )
    return [row[0] for row in rows], [row[1] for row in rows]


# ---- the call --------------------------------------------------------------------------------


def call(
    plan: CallPlan, core: _core.Tokenizer, vocab: Vocab, text: Any, text_pair: Any, threads: int
) -> BatchEncoding:
    """`WordPieceTokenizer.__call__`, which says what the arguments mean."""
    if plan.warning is not None:
        warnings.warn(plan.warning, UserWarning, stacklevel=3)
    texts, others, several = read_texts(text, text_pair, plan.split)
    try:
        rows = core.encode_rows(
            texts.texts,
            None if others is None else others.texts,
            plan.rows,
            cores(threads) if several or threads else 1,
            texts.words,
            None if others is None else others.words,
        )
    except TypeError:
        texts.check()
        if others is not None:
            others.check()
        raise
    except ValueError as error:
        raise InputError(str(error)) from None
    # One text that cannot overflow has no list around it.
    first = not (several or plan.overflow)
    encoded = EncodedRows(vocab, rows, plan.lead, others is not None, first, plan.offsets)
    # Lists are made when they are read.
    values = _arrays(plan, rows) if plan.tensors else dict.fromkeys(plan.columns, UNREAD)
    if plan.length:
        values["length"] = _lengths(plan, rows)
    if plan.overflow:
        samples = rows.samples()
        values["overflow_to_sample_mapping"] = (
            as_tensors(samples, plan.tensors) if plan.tensors else samples.tolist()
        )
    return BatchEncoding(values, encoded)


def _arrays(plan: CallPlan, rows: _core.TokenRows) -> dict[str, Any]:
    """The columns as arrays or tensors."""
    if plan.even and len(rows) > 1:
        short = np.diff(rows.offsets()) < rows.width
        if short.any():
            raise InputError(
                f"row {int(short.argmax())} is shorter than others, so the rows are no array; pass "
                "padding=True with return_tensors, or return_tensors=None for lists"
            )
    ids, types, mask = rows.padded(True)
    arrays = {"input_ids": ids, "token_type_ids": types, "attention_mask": mask}
    if "special_tokens_mask" in plan.columns:
        arrays["special_tokens_mask"] = rows.padded_special()
    if plan.offsets:
        arrays["offset_mapping"] = rows.padded_spans()
    return {name: as_tensors(arrays[name], plan.tensors) for name in plan.columns}


def _lengths(plan: CallPlan, rows: _core.TokenRows) -> Any:
    if rows.width is None:
        return np.diff(rows.offsets()).tolist()
    lengths = np.full(len(rows), rows.width)
    return as_tensors(lengths, plan.tensors) if plan.tensors else lengths.tolist()


def _includes(option: bool | None, name: str, model_input_names: Sequence[str]) -> bool:
    if option is None:
        return name in model_input_names
    check_flags(**{f"return_{name}": option})
    return bool(option)


# ---- padding what was cut before --------------------------------------------------------------

_FILL = {"attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1}


def pad(
    tokenizer: "TokenNames",
    encoded_inputs: Any,
    padding: bool | str,
    max_length: int | None,
    pad_to_multiple_of: int | None,
    return_attention_mask: bool | None,
    return_tensors: str | None,
) -> BatchEncoding:
    """`WordPieceTokenizer.pad`, which says what the arguments mean."""
    check_tensors(return_tensors)
    inputs = _columns(encoded_inputs)
    if "input_ids" not in inputs:
        raise InputError(f"pad needs input_ids, got {', '.join(map(str, inputs)) or 'nothing'}")
    fills = {"input_ids": tokenizer.vocab.pad, **_FILL}
    for name in inputs.keys() & fills:
        _check_row(name, inputs[name], "a row of integers, or rows")
    single = not _is_rows(inputs["input_ids"])
    columns = {name: [values] if single else list(values) for name, values in inputs.items()}
    ids = columns["input_ids"]
    for name, values in columns.items():
        if len(values) != len(ids):
            raise InputError(f"{name} has {len(values)} rows and input_ids {len(ids)}")
        for number, row in enumerate(values if name in fills else ()):
            _check_row(f"{name} {number}", row, "a row of integers")
    if _includes(return_attention_mask, "attention_mask", tokenizer.model_input_names):
        columns.setdefault("attention_mask", [[1] * len(row) for row in ids])
    pad_to = padding_name(padding)
    width = 0
    if pad_to == "max_length":
        if max_length is None:
            if tokenizer.model_max_length >= UNKNOWN_LENGTH:
                raise InputError("padding='max_length' needs max_length")
            max_length = tokenizer.model_max_length
        check_length(max_length)
        width = max_length
    elif pad_to == "longest":
        width = max(map(len, ids), default=0)
    if pad_to_multiple_of is not None:
        check_integer("pad_to_multiple_of", pad_to_multiple_of, 1, 2**31)
        width += -width % pad_to_multiple_of
    result: dict[str, Any] = {}
    for name, values in columns.items():
        if return_tensors is None:
            if name in fills:
                values = [_widened(row, width, fills[name]) for row in values]
            plain = [_plain(row) for row in values]
            result[name] = plain[0] if single else plain
        elif name in fills and values and max(map(len, values)) <= width:
            result[name] = as_tensors(_filled(name, values, width, fills[name]), return_tensors)
        else:
            result[name] = as_tensors(_stacked(name, values), return_tensors)
    return BatchEncoding(result)


def _columns(inputs: Any) -> dict[str, Any]:
    """A mapping of lists, from one or from a list of mappings."""
    if isinstance(inputs, list | tuple):
        for number, row in enumerate(inputs):
            if not hasattr(row, "keys"):
                raise InputError(f"example {number} is {described(row)}, expected a mapping")
            if row.keys() != inputs[0].keys():
                raise InputError(
                    f"example {number} has {', '.join(map(str, row))} and example 0 "
                    f"{', '.join(map(str, inputs[0]))}: every example needs the same"
                )
        if not inputs:
            raise InputError("pad got an empty list, expected at least one example")
        return {name: [row[name] for row in inputs] for name in inputs[0]}
    if not hasattr(inputs, "keys"):
        raise InputError(f"pad got {described(inputs)}, expected a mapping or a list of mappings")
    return {name: inputs[name] for name in inputs}


def _check_row(name: str, row: Any, expected: str) -> None:
    if not hasattr(row, "__len__") or getattr(row, "ndim", 1) == 0:
        raise InputError(f"{name} is {described(row)}, expected {expected}")


def _is_rows(values: Any) -> bool:
    """Whether these are rows, not one row."""
    if hasattr(values, "ndim"):
        return values.ndim > 1
    return not len(values) or hasattr(values[0], "__len__")


def _array(row: Any) -> NDArray[Any]:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(row, torch.Tensor):
        row = row.detach().cpu().numpy()
    return np.asarray(row)


def _plain(row: Any) -> Any:
    return row.tolist() if hasattr(row, "tolist") else row


def _widened(row: Iterable[Any], width: int, fill: int) -> Any:
    if isinstance(row, list | tuple):
        return [*row, *[fill] * (width - len(row))]
    values = _array(row)
    return np.concatenate([values, np.full(max(0, width - len(values)), fill, values.dtype)])


def _filled(name: str, rows: list[Any], width: int, fill: int) -> NDArray[Any]:
    """Rows of at most `width` as an array, filled up: all at once, not row by row."""
    filled = _core.filled_rows(rows, width, fill)
    if filled is not None:
        return filled
    sizes = np.array([len(row) for row in rows])
    if all(isinstance(row, list) for row in rows):
        try:
            flat = np.array(list(itertools.chain.from_iterable(rows)))
        except ValueError:
            raise InputError(f"{name} has lists among integers, expected rows of them") from None
    else:
        flat = np.concatenate([_array(row) for row in rows])
    if not len(flat):
        flat = flat.astype(np.int64)
    if flat.dtype.kind not in "biu" or flat.ndim != 1:
        raise InputError(f"{name} has {flat.dtype} values, expected rows of integers")
    result = np.full((len(rows), width), fill, flat.dtype)
    result[np.arange(width) < sizes[:, None]] = flat
    return result


def _stacked(name: str, rows: list[Any]) -> NDArray[Any]:
    try:
        stacked = np.stack([_array(row) for row in rows]) if rows else np.zeros((0, 0), np.int64)
    except ValueError:
        raise InputError(
            f"{name} has rows of different lengths, which pad does not fill up; pad or remove it "
            "first, or pass padding=True"
        ) from None
    if stacked.dtype.kind not in "biuf":
        raise InputError(f"{name} has {stacked.dtype} values, expected numbers")
    return stacked
