"""Masked batches for other people's training: transformers' Trainer, plain DataLoaders."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mvbert import _core
from mvbert.cores import cores
from mvbert.errors import InputError, MissingExtra
from mvbert.text.batch_encoding import BatchEncoding
from mvbert.text.masking import BEGINS, CONTINUES, SEPARATES, STAYS, budget
from mvbert.text.texts import check_flags, check_integer, described
from mvbert.text.tokenizer_call import as_tensors, check_tensors

if TYPE_CHECKING:
    from transformers import TrainerCallback


class MaskingCollator:
    """Pads rows of ids and masks them: [MASK] for most, another piece for some, labels for all.

    What is masked depends on the row's ids, the seed and the epoch, and on nothing else: neither on
    the number of DataLoader workers and threads nor on the order of rows. `set_epoch` draws anew;
    call it before each epoch, or give `callback()` to a Trainer.

    Args:
        tokenizer: a `WordPieceTokenizer`, or a BERT tokenizer of transformers.
        mlm_probability: the share of pieces that is masked.
        whole_word: mask the pieces of a word together.
        mask_replace_prob: the share of masked pieces that become [MASK].
        random_replace_prob: the share that become any piece; the rest stay as they are.
        pad_to_multiple_of: rounds the padded length up.
        return_tensors: "pt" or "np".
        seed: of [0, 2^64).
        threads: of one call; 0 is one for each available core.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        mlm_probability: float = 0.15,
        whole_word: bool = True,
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
        pad_to_multiple_of: int | None = None,
        return_tensors: str = "pt",
        seed: int = 0,
        threads: int = 1,
    ) -> None:
        shares = {
            "mlm_probability": mlm_probability,
            "mask_replace_prob": mask_replace_prob,
            "random_replace_prob": random_replace_prob,
            "mask_replace_prob + random_replace_prob": mask_replace_prob + random_replace_prob,
        }
        for name, value in shares.items():
            if not isinstance(value, Real) or not 0 <= value <= 1 + 1e-12:
                raise InputError(f"{name} is {value!r}, expected a number of [0, 1]")
        check_flags(whole_word=whole_word)
        check_integer("seed", seed, 0, 2**64)
        check_tensors(return_tensors)
        if return_tensors is None:
            raise InputError("return_tensors is None, expected 'pt' or 'np'")
        if getattr(tokenizer, "mask_token_id", None) is None:
            raise InputError("the tokenizer has no [MASK], which masked language modelling needs")
        self.tokenizer = tokenizer
        self.pad_to_multiple_of = pad_to_multiple_of
        self.return_tensors = return_tensors
        self._threads = cores(threads)
        self._probability = mlm_probability
        self._epoch = _shared_number(return_tensors)
        thresholds = (mlm_probability, mask_replace_prob, mask_replace_prob + random_replace_prob)
        piece, mask, other = (round(share * 2**32) for share in thresholds)
        self._options: dict[str, Any] = {
            "kinds": _kinds(tokenizer),
            "mask": tokenizer.mask_token_id,
            "by_word": whole_word,
            "piece_threshold": piece,
            "mask_threshold": mask,
            "other_threshold": min(other, 2**32),
            "seed": seed,
            "threads": self._threads,
        }

    def set_epoch(self, epoch: int) -> None:
        """Draws anew for an epoch, in DataLoader workers that live on, too."""
        check_integer("epoch", epoch, 0, 2**62)
        self._epoch[0] = epoch

    def callback(self) -> "TrainerCallback":
        """What sets the epoch in transformers' Trainer: `Trainer(..., callbacks=[callback])`."""
        try:
            from transformers import TrainerCallback
        except ImportError:
            raise MissingExtra("MaskingCollator.callback", "transformers", "hf") from None
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
            InputError: no rows of ids, or an id outside the vocabulary.
        """
        batch = {name: _array(name, value) for name, value in self._padded(features).items()}
        ids = np.array(batch["input_ids"], np.int64, order="C")  # a copy: the caller's stay
        if ids.ndim != 2:
            raise InputError(f"input_ids has {ids.ndim} dimensions, expected rows [B, T]")
        mask = batch.get("attention_mask")
        lengths = np.full(len(ids), ids.shape[1]) if mask is None else mask.sum(1, np.int64)
        if mask is not None and ids.shape[1] and (mask[:, 0] == 0)[lengths > 0].any():
            raise InputError("rows are padded on the left; pad them on the right")
        budgets = [budget(n, self._probability) for n in range(ids.shape[1] + 1)]
        try:
            labels = _core.mask_rows(
                ids, lengths, budgets=budgets, epoch=int(self._epoch[0]), **self._options
            )
        except ValueError as error:
            raise InputError(str(error)) from None
        for name in ("special_tokens_mask", "offset_mapping"):
            batch.pop(name, None)
        batch |= {"input_ids": ids, "labels": labels}
        return BatchEncoding(
            {name: as_tensors(value, self.return_tensors) for name, value in batch.items()}
        )

    def _padded(self, features: Any) -> Mapping[str, Any]:
        if isinstance(features, Mapping):
            if "input_ids" not in features:
                raise InputError(f"the batch has {', '.join(features)}, expected input_ids")
            return features
        if not isinstance(features, Sequence) or not len(features):
            raise InputError(f"got {described(features)}, expected a list of rows")
        if not isinstance(features[0], Mapping):
            features = [{"input_ids": row} for row in features]
        for number, row in enumerate(features):
            if not isinstance(row, Mapping) or "input_ids" not in row:
                raise InputError(f"row {number} is {described(row)}, expected input_ids")
        # Labels that a data set has, such as those of its own masking, are made anew.
        rows = [{k: v for k, v in row.items() if k not in ("labels", "offset_mapping")}
                for row in features]  # fmt: skip
        padded: Mapping[str, Any] = self.tokenizer.pad(
            rows, return_tensors="np", pad_to_multiple_of=self.pad_to_multiple_of
        )
        return padded


def _kinds(tokenizer: Any) -> NDArray[np.uint8]:
    """What each piece of a vocabulary is for masking."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    kinds = np.array([CONTINUES if p.startswith("##") else BEGINS for p in pieces], np.uint8)
    kinds[tokenizer.all_special_ids] = STAYS
    kinds[[tokenizer.cls_token_id, tokenizer.sep_token_id]] = SEPARATES
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
    try:
        import torch
    except ImportError:
        raise MissingExtra("return_tensors='pt'", "torch", "hf") from None
    return torch.zeros(1, dtype=torch.int64).share_memory_()
