"""The largest inputs of a model's matrix products on sample rows, for the scales of int8."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from mvbert.model.masked_lm import MaskedLM

ROWS_AT_ONCE = 4
MEASURED = ("qkv", "attention_output", "intermediate", "dense")  # by the end of the name


@torch.no_grad()
def largest_inputs(
    model: MaskedLM, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
) -> dict[str, np.ndarray]:
    """The largest absolute value of each input channel, over the pieces that count.

    Args:
        input_ids, attention_mask (bool), token_type_ids: [B, T].

    Returns:
        By name of the linear layer, [in]; "decoder" is the product with the head's matrix.
    """
    found: dict[str, np.ndarray] = {}

    def measure(name: str, x: Tensor) -> None:
        largest = x.abs().flatten(0, -2).amax(0).numpy()
        found[name] = np.maximum(found.get(name, 0), largest)

    def before(name: str, mask: Tensor, _: nn.Module, arguments: tuple[Tensor]) -> None:
        x = arguments[0]
        measure(name, x if x.ndim == 2 else x[mask])

    measured = {n: m for n, m in model.named_modules() if n.endswith(MEASURED)}
    for first in range(0, len(input_ids), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        mask = attention_mask[rows]
        hooks = [m.register_forward_pre_hook(partial(before, n, mask)) for n, m in measured.items()]
        try:
            embedded = model.embeddings(input_ids[rows], token_type_ids[rows])
            hidden = model.encoder(embedded, mask)
            measure("decoder", model.head(hidden[mask]))
        finally:
            for hook in hooks:
                hook.remove()
    return found
