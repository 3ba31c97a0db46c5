"""The BERT encoder: post-norm transformer layers over full rows.

Devlin et al. 2019, arXiv 1810.04805. Query, key and value are one matrix product; attention is
torch's scaled_dot_product_attention, or two plain products where those are faster.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvbert import functional
from mvbert.config import ModelConfig

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}

# Up to this many pieces a row, a CPU does better with T x T scores in memory than with torch's
# scaled_dot_product_attention: 15 ms against 50 ms, forward and backward, for 32 rows of 128
# pieces, 4 heads of 64, bfloat16, one Zen 5 core, torch 2.13.
EXPLICIT_LENGTH = 512


def attention(qkv: Tensor, attention_mask: Tensor | None, dropout_p: float) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V.

    Args:
        qkv: [3, B, A, T, d], query, key and value; any strides.
        attention_mask: bool [B, T] (True: the position counts) or None.
        dropout_p: of the probabilities.

    Returns:
        [B, A, T, d].
    """
    mask = None if attention_mask is None else attention_mask[:, None, None, :]
    if qkv.device.type != "cpu" or qkv.shape[3] > EXPLICIT_LENGTH:
        # Taken apart as [B, T, 3, A, d], so that backward, which puts the three gradients together
        # in that order, need not copy them a second time for the product that made qkv.
        query, key, value = (x.transpose(1, 2) for x in qkv.permute(1, 3, 0, 2, 4).unbind(2))
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout_p
        )
    # Contiguous once: otherwise each product copies its operands.
    query, key, value = qkv.contiguous().unbind(0)
    scores = torch.matmul(query * qkv.shape[-1] ** -0.5, key.transpose(-1, -2))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.matmul(functional.dropout(scores.softmax(-1), dropout_p), value)


class Taps:
    """What to keep of a pass through an encoder's layers, and, after the pass, what was kept.

    Layers count from 1; 0 is what goes into the first.

    Args:
        hidden: layers whose hidden states [B, T, H] are wanted.
        qkv: layers whose queries, keys and values [B, T, 3 H] are wanted.
        last: whether the encoder's result is wanted; if not, layers above the others are not run.
    """

    def __init__(
        self, hidden: Iterable[int] = (), qkv: Iterable[int] = (), last: bool = True
    ) -> None:
        self.hidden: dict[int, Tensor] = dict.fromkeys(hidden)  # type: ignore[arg-type,assignment]
        self.qkv: dict[int, Tensor] = dict.fromkeys(qkv)  # type: ignore[arg-type,assignment]
        self._last = last

    def depth(self, layers: int) -> int:
        """How many of `layers` layers have to be run."""
        return layers if self._last else max([0, *self.hidden, *self.qkv])


class BertLayer(nn.Module):
    """Self-attention and feed-forward, each followed by residual and LayerNorm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        H, I = config.hidden_size, config.intermediate_size
        self.heads = config.num_attention_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.hidden_dropout = config.hidden_dropout_prob
        self.activation = ACTIVATIONS[config.hidden_act]
        self.qkv = nn.Linear(H, 3 * H)
        self.attention_output = nn.Linear(H, H)
        self.attention_norm = nn.LayerNorm(H, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(H, I)
        self.output = nn.Linear(I, H)
        self.output_norm = nn.LayerNorm(H, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        rounded: Tensor,
        attention_mask: Tensor | None = None,
        tap: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """hidden [B, T, H], and the same as matrix products read it -> the next of both.

        attention_mask is bool [B, T] or None (all positions count). Appends queries, keys and
        values [B, T, 3 H] to `tap`, if given.
        """
        B, T, H = hidden.shape
        flat = self.qkv(rounded)
        if tap is not None:
            tap.append(flat)
        # (3, B, A, T, H/A)
        qkv = flat.view(B, T, 3, self.heads, H // self.heads).permute(2, 0, 3, 1, 4)
        context = attention(qkv, attention_mask, self.attention_dropout if self.training else 0.0)
        context = context.transpose(1, 2).reshape(B, T, H)
        hidden, rounded = self._add(hidden, self.attention_output(context), self.attention_norm)
        expanded = self.activation(self.intermediate(rounded))
        return self._add(hidden, self.output(expanded), self.output_norm)

    def _add(self, hidden: Tensor, x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """The end of both halves: norm(hidden + dropout(x)), on a GPU in one pass."""
        return functional.residual_layer_norm(
            x, hidden, norm.weight, norm.bias, norm.eps, self.hidden_dropout, self.training,
            also_in_x_dtype=True,
        )  # fmt: skip


class BertEncoder(nn.Module):
    """A stack of layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None = None, taps: Taps | None = None
    ) -> Tensor:
        """hidden [B, T, H] -> [B, T, H] of the last layer run; fills `taps`."""
        rounded = hidden
        if taps is None:
            for layer in self.layers:
                hidden, rounded = layer(hidden, rounded, attention_mask)
            return hidden
        for number in range(taps.depth(len(self.layers)) + 1):
            if number:
                tap: list[Tensor] | None = [] if number in taps.qkv else None
                hidden, rounded = self.layers[number - 1](hidden, rounded, attention_mask, tap)
                if tap is not None:
                    taps.qkv[number] = tap[0]
            if number in taps.hidden:
                taps.hidden[number] = hidden
        return hidden


def compile_layers(module: nn.Module) -> None:
    """Compiles every BertLayer in a module, in place; as they are alike, once for all."""
    # On a CPU the compiler's own dropout is slower than all that compiling gains. Torch's it is
    # then, which draws what an eager step draws.
    on_cpu = next(module.parameters()).device.type == "cpu"
    options = {"fallback_random": True} if on_cpu else None
    for layer in module.modules():
        if isinstance(layer, BertLayer):
            layer.compile(dynamic=False, options=options)


@torch.no_grad()
def init_weights(module: nn.Module, std: float, generator: torch.Generator) -> None:
    """BERT's initial weights: normal(0, std) matrices, zero biases, unit LayerNorm."""
    for name, parameter in module.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        elif parameter.ndim < 2:
            parameter.zero_()
        else:
            parameter.normal_(0.0, std, generator=generator)
