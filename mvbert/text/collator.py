"""Masked batches for other people's training: transformers' Trainer, plain DataLoaders."""

import math
import sys
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mvbert import _core
from mvbert.cores import cores
from mvbert.errors import InputError, require_extra
from mvbert.text.batch_encoding import BatchEncoding, as_tensors, check_tensors
from mvbert.text.masking import BEGINS, CONTINUES, SEPARATES, STAYS, budget
from mvbert.text.texts import check_flags, check_integer, described
from mvbert.text.tokenizer import WordPieceTokenizer

if TYPE_CHECKING:
    from transformers import TrainerCallback

NOT_SET = -1  # for an epoch


class MaskingCollator:
    """Pads rows of ids and masks them: [MASK] for most, another piece for some, labels for all.

    Its arguments are those of transformers' DataCollatorForLanguageModeling, in its order.

    Until `set_epoch` is called every call draws anew, as in transformers. From then on, what is
    masked depends on the row's ids, the seed and the epoch, and on nothing else: neither on the
    number of DataLoader workers and threads nor on the order of rows. Call `set_epoch` before each
    epoch, or give `callback()` to a Trainer.

    Args:
        tokenizer: a `WordPieceTokenizer`, or a tokenizer of transformers.
        mlm: masked language modelling; the only value is True.
        whole_word_mask: mask the pieces of a word together; they begin with "##" from the second.
        mlm_probability: the share of pieces that is masked.
        mask_replace_prob: the share of masked pieces that become [MASK].
        random_replace_prob: the share that become any piece; the rest stay as they are.
        pad_to_multiple_of: rounds the length up to which rows are padded here.
        return_tensors: "pt" or "np".
        seed: of [0, 2^64); None is 0.
        threads: of one call; 0 is one for each available core.
        whole_word: the same as whole_word_mask.
    """

    def __init__(
        self,
        tokenizer: Any,
        mlm: bool = True,
        whole_word_mask: bool = False,
        mlm_probability: float = 0.15,
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
        pad_to_multiple_of: int | None = None,
        *,
        return_tensors: str = "pt",
        seed: int | None = None,
        threads: int = 1,
        whole_word: bool | None = None,
    ) -> None:
        check_flags(mlm=mlm)
        if not mlm:
            raise InputError(
                "mlm is False, which is not supported; use transformers' "
                "DataCollatorForLanguageModeling to train on the next piece"
            )
        if isinstance(whole_word_mask, float):  # a call written for transformers before 4.54
            raise InputError(
                f"whole_word_mask, the third argument, is {whole_word_mask}, expected True or "
                "False; give mlm_probability by name"
            )
        if whole_word is not None:
            check_flags(whole_word=whole_word)
            whole_word_mask = whole_word
        check_flags(whole_word_mask=whole_word_mask)
        shares = {
            "mlm_probability": mlm_probability,
            "mask_replace_prob": mask_replace_prob,
            "random_replace_prob": random_replace_prob,
        }
        for name, value in shares.items():
            _check_share(name, value)
        replaced = mask_replace_prob + random_replace_prob
        _check_share("mask_replace_prob + random_replace_prob", replaced)
        if pad_to_multiple_of is not None:
            check_integer("pad_to_multiple_of", pad_to_multiple_of, 1, 2**31)
        seed = 0 if seed is None else seed
        check_integer("seed", seed, 0, 2**64)
        check_tensors(return_tensors)
        if return_tensors is None:
            raise InputError("return_tensors is None, expected 'pt' or 'np'")
        if isinstance(tokenizer, type) or not hasattr(tokenizer, "convert_ids_to_tokens"):
            raise InputError(
                f"tokenizer is {described(tokenizer)}, expected a WordPieceTokenizer or a "
                "tokenizer of transformers"
            )
        if tokenizer.mask_token_id is None:
            raise InputError("the tokenizer has no [MASK], which masked language modelling needs")
        self.tokenizer = tokenizer
        self.pad_to_multiple_of = pad_to_multiple_of
        self.return_tensors = return_tensors
        self._threads = cores(threads)
        self._probability = mlm_probability
        self._epoch = _shared_number(return_tensors)
        self._epoch[0] = NOT_SET
        self._numbers = _Numbers(seed)
        self._budgets = np.zeros(0, np.uint32)
        kinds = _kinds(tokenizer)
        if whole_word_mask and not (kinds == CONTINUES).any():
            raise InputError(
                "whole_word_mask needs a WordPiece tokenizer: no piece of "
                f"{type(tokenizer).__name__} begins with ##, so its words are not known; use "
                "whole_word_mask=False"
            )
        piece, mask, other = (
            round(share * 2**32) for share in (mlm_probability, mask_replace_prob, replaced)
        )
        self._options: dict[str, Any] = {
            "kinds": kinds,
            "mask": tokenizer.mask_token_id,
            "by_word": whole_word_mask,
            "piece_threshold": piece,
            "mask_threshold": mask,
            "other_threshold": min(other, 2**32),
            "seed": seed,
            "threads": self._threads,
        }

    def set_epoch(self, epoch: int) -> None:
        """Masks as a row is masked in this epoch, in DataLoader workers that live on, too."""
        check_integer("epoch", epoch, 0, 2**62)
        self._epoch[0] = epoch

    def callback(self) -> "TrainerCallback":
        """What sets the epoch in transformers' Trainer: `Trainer(..., callbacks=[callback])`."""
        with require_extra("hf", "MaskingCollator.callback"):
            from transformers import TrainerCallback
        collator = self

        class SetEpoch(TrainerCallback):  # type: ignore[misc]
            def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                collator.set_epoch(math.floor((state.epoch or 0) + 1e-6))

        return SetEpoch()

    def __call__(self, features: Any) -> BatchEncoding:
        """Masks a batch.

        Args:
            features: a list of mappings with input_ids, a list of rows of ids, or a batch that is
                padded already, as a tokenizer gives it with return_tensors.

        Returns:
            The padded batch with labels [B, T]: the id where a piece is masked, -100 elsewhere.

        Raises:
            InputError: no rows of ids, an id outside the vocabulary, or an attention_mask that is
                not ones and then zeros.
        """
        batch, lengths = self._read(features) or self._checked(features)
        ids = batch["input_ids"]
        epoch = int(self._epoch[0])
        if epoch == NOT_SET:
            epoch = self._numbers.draw()
        try:
            labels = _core.mask_rows(
                ids, lengths, budgets=self._budgets_of(ids.shape[1]), epoch=epoch, **self._options
            )
        except ValueError as error:
            raise InputError(str(error)) from None
        batch["labels"] = labels
        return BatchEncoding(
            {name: as_tensors(value, self.return_tensors) for name, value in batch.items()}
        )

    def _budgets_of(self, width: int) -> NDArray[np.uint32]:
        """How many pieces of a row of n are masked, for n up to the width at least."""
        if len(self._budgets) <= width:
            budgets = [budget(n, self._probability) for n in range(width + 1)]
            self._budgets = np.array(budgets, np.uint32)
        return self._budgets

    def _read(self, features: Any) -> tuple[dict[str, Any], NDArray[np.int64]] | None:
        """The same as `_checked`, of rows that are lists of Python integers; None of others."""
        fills = _fills(self.tokenizer) if isinstance(features, list | tuple) else None
        if fills is None:
            return None
        return _core.padded_rows(features, multiple=self.pad_to_multiple_of or 1, **fills)

    def _checked(self, features: Any) -> tuple[dict[str, Any], NDArray[np.int64]]:
        """The padded batch, its ids a copy that may be written to, and the lengths of its rows.

        The definition: all that is refused is refused here.
        """
        batch = {name: _array(name, value) for name, value in self._padded(features).items()}
        ids = batch["input_ids"]
        if ids.ndim != 2:
            raise InputError(f"input_ids has {ids.ndim} dimensions, expected rows [B, T]")
        if ids.size and ids.dtype.kind not in "iu":
            raise InputError(f"input_ids has {ids.dtype} values, expected rows of integers")
        lengths = _lengths(batch.get("attention_mask"), ids.shape)
        batch["input_ids"] = np.array(ids, np.int64, order="C")
        for name in ("special_tokens_mask", "offset_mapping"):
            batch.pop(name, None)
        return batch, lengths

    def _padded(self, features: Any) -> Mapping[str, Any]:
        if isinstance(features, Mapping):
            if "input_ids" not in features:
                raise InputError(f"the batch has {', '.join(features)}, expected input_ids")
            return features
        if isinstance(features, str) or not isinstance(features, Sequence) or not len(features):
            raise InputError(f"got {described(features)}, expected a list of rows")
        rows = [_row(number, row) for number, row in enumerate(features)]
        padded: Mapping[str, Any] = self.tokenizer.pad(
            rows, return_tensors="np", pad_to_multiple_of=self.pad_to_multiple_of
        )
        return padded


class _Numbers:
    """Numbers that take the place of an epoch as long as nobody has set one: one for each call.

    In a DataLoader's worker they begin with torch's seed of the worker, which differs between
    workers and between passes; a worker that lives on continues.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._worker: int | None = None
        self._generator = np.random.default_rng([seed])

    def draw(self) -> int:
        data = sys.modules.get("torch.utils.data")  # not imported: this is no worker
        info = data.get_worker_info() if data else None
        worker = None if info is None else info.seed
        if worker != self._worker:  # the generator is that of the process that made this one
            self._worker = worker
            self._generator = np.random.default_rng([self._seed, worker or 0])
        return int(self._generator.integers(2**62))


def _check_share(name: str, value: Any) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) <= 1 + 1e-12:
        raise InputError(f"{name} is {value!r}, expected a number of [0, 1]")


def _row(number: int, given: Any) -> Mapping[str, Any]:
    """A row as `pad` takes it, without labels: those of its own masking are made anew."""
    row: Mapping[str, Any] = given if isinstance(given, Mapping) else {"input_ids": given}
    ids: Any = row.get("input_ids")
    if not isinstance(ids, list) and (isinstance(ids, str | bytes) or np.ndim(ids) != 1):
        raise InputError(
            f"row {number} is {described(given)}, expected input_ids, or the list of them"
        )
    for name in ("attention_mask", "token_type_ids", "special_tokens_mask"):
        if name in row and len(row[name]) != len(ids):
            raise InputError(
                f"row {number} has {len(ids)} input_ids and {name} of {len(row[name])}"
            )
    return {k: v for k, v in row.items() if k not in ("labels", "offset_mapping")}


def _lengths(mask: NDArray[Any] | None, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """How many pieces each row has before its padding."""
    rows, width = shape
    if mask is None:
        return np.full(rows, width)
    if mask.shape != shape or mask.dtype.kind not in "biuf":
        raise InputError(
            f"attention_mask is {list(mask.shape)} of {mask.dtype}, expected numbers "
            f"{list(shape)} as input_ids"
        )
    if mask.dtype == np.int64 and mask.flags.c_contiguous:
        found = _core.lengths_of_mask(mask)
        if found is not None:
            return found
    lengths: NDArray[np.int64] = mask.sum(1, np.int64)
    wrong = (mask != (np.arange(width) < lengths[:, None])).any(1)
    if wrong.any():
        row = int(wrong.argmax())
        if mask[row, 0] == 0:
            raise InputError("rows are padded on the left; pad them on the right")
        raise InputError(
            f"attention_mask of row {row} is {described(mask[row].tolist())}, expected ones for "
            "its pieces and then zeros for padding"
        )
    return lengths


def _fills(tokenizer: Any) -> dict[str, Any] | None:
    """What the core needs to pad as `tokenizer.pad` does; None if that is no `pad` we know."""
    cls = type(tokenizer)
    names = tokenizer.model_input_names
    if getattr(cls, "pad", None) is WordPieceTokenizer.pad:
        type_pad = 0
    else:
        module = sys.modules.get("transformers.tokenization_utils_base")
        base = getattr(module, "PreTrainedTokenizerBase", None)
        if base is None or not issubclass(cls, base) or cls.pad is not base.pad:
            return None
        if cls._pad is not base._pad or tokenizer.padding_side != "right":
            return None
        if names[0] != "input_ids" or "attention_mask" not in names:
            return None
        type_pad = tokenizer.pad_token_type_id
    if tokenizer.pad_token_id is None:
        return None
    with_mask = "attention_mask" in names
    return {"pad": tokenizer.pad_token_id, "type_pad": type_pad, "with_mask": with_mask}


def _kinds(tokenizer: Any) -> NDArray[np.uint8]:
    """What each piece of a vocabulary is for masking."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    # An id that no piece has is None in transformers.
    continues = [piece is not None and piece.startswith("##") for piece in pieces]
    kinds = np.where(continues, CONTINUES, BEGINS).astype(np.uint8)
    kinds[tokenizer.all_special_ids] = STAYS
    for id in (tokenizer.cls_token_id, tokenizer.sep_token_id):
        if id is not None:
            kinds[id] = SEPARATES
    return kinds


def _array(name: str, value: Any) -> NDArray[Any]:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    try:
        return np.asarray(value)
    except ValueError:
        raise InputError(
            f"{name} has rows of different lengths; give a list of mappings, which is padded here"
        ) from None


def _shared_number(return_tensors: str) -> Any:
    """One integer, in memory that DataLoader workers share where torch can do so."""
    if return_tensors == "np":
        return np.zeros(1, np.int64)
    with require_extra("hf", "return_tensors='pt'"):
        import torch
    return torch.zeros(1, dtype=torch.int64).share_memory_()
