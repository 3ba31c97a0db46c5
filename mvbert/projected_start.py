"""Starts a student's layers at the teacher's, seen through the Stage I affine map.

Stage I finds W and b such that a student piece s is the teacher's W s + b. If the teacher's hidden
states h were W g too, a layer that reads h with A reads g with A W, and what it writes, B x, is
written to g as R B x, R the pseudo-inverse of W. That is the idea of the method's first version
(Zhao, Gupta, Song, Zhou 2019, arXiv 1909.11687v1), which trains the student under such a shared
projection; here it is only where the student starts. Exact where W is the identity, a guess
elsewhere: LayerNorm does not commute with W, and heads and neurons that the student has no room for
are left out, the weakest first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvbert.config import ModelConfig
from mvbert.encoder import BertLayer
from mvbert.errors import InputError
from mvbert.model import MaskedLM, MixedMaskedLM


@torch.no_grad()
def project_start(student: MaskedLM, teacher: MixedMaskedLM) -> None:
    """Sets all of the student but its word table, its softmax's bias and its pooler.

    Student layer i takes teacher layer round(i L_t / L_s): every k-th one.

    Raises:
        InputError: the student's width is not Stage I's, or its heads cannot be made of the
            teacher's.
    """
    W, b = teacher.student.projection.weight.double(), teacher.student.projection.bias.double()
    E = W.shape[1]
    own, other = student.config, teacher.config
    if own.hidden_size != E:
        raise InputError(
            f"a student {own.hidden_size} wide cannot start from a Stage I of width {E}: "
            f"train Stage I with embedding_size {own.hidden_size}, or choose encoder_start random"
        )
    _check_room(own, other)
    R = torch.linalg.pinv(W)  # [E, H]

    tables, source = student.embeddings, teacher.embeddings
    positions = min(len(tables.position.weight), len(source.position.weight))
    rows = (source.position.weight[:positions].double() + b) @ R.T
    tables.position.weight[:positions] = rows.to(tables.position.weight.dtype)
    types = min(len(tables.token_type.weight), len(source.token_type.weight))
    tables.token_type.weight[:types] = (source.token_type.weight[:types].double() @ R.T).float()
    _project_norm(tables.norm, source.norm, R)
    for i, layer in enumerate(student.encoder.layers, 1):
        taken = round(i * other.num_hidden_layers / own.num_hidden_layers) or 1
        _project_layer(layer, teacher.encoder.layers[taken - 1], W, R)  # type: ignore[arg-type]
    # The head's result is compared with rows W s + b: (W s + b) . h = s . W^T h + a constant.
    _set(student.head.dense, W.T @ teacher.head.dense.weight.double() @ W,
         W.T @ teacher.head.dense.bias.double())  # fmt: skip
    _project_norm(student.head.norm, teacher.head.norm, W.T)


def _check_room(own: ModelConfig, other: ModelConfig) -> None:
    """A student's head holds whole heads of the teacher, and there are enough of them."""
    width = own.hidden_size // own.num_attention_heads
    theirs = other.hidden_size // other.num_attention_heads
    if width % theirs or own.hidden_size > other.hidden_size:
        raise InputError(
            f"student heads of {width} cannot be made of teacher heads of {theirs} "
            f"({other.num_attention_heads} of them): choose encoder_start random"
        )
    if own.intermediate_size > other.intermediate_size:
        raise InputError(
            f"the student's feed-forward {own.intermediate_size} is wider than the teacher's "
            f"{other.intermediate_size}: choose encoder_start random"
        )


def _project_layer(layer: BertLayer, source: BertLayer, W: Tensor, R: Tensor) -> None:
    H = W.shape[0]
    d = H // source.heads
    qkv = source.qkv.weight.double().view(3, source.heads, d, H)
    qkv_bias = source.qkv.bias.double().view(3, source.heads, d)
    output = source.attention_output.weight.double().view(H, source.heads, d)
    # A head matters as much as its values and what is made of them.
    strength = qkv[2].flatten(1).norm(dim=1) * output.transpose(0, 1).flatten(1).norm(dim=1)
    count = layer.qkv.out_features // 3 // d
    heads = strength.topk(count).indices.sort().values
    merged = count // layer.heads  # teacher heads in one of the student's
    weight, bias = qkv[:, heads] @ W, qkv_bias[:, heads].clone()
    # Scores of a merged head are the mean of its parts' scores, each over its own sqrt(d).
    weight[0] *= merged**-0.5
    bias[0] *= merged**-0.5
    _set(layer.qkv, weight.flatten(0, 2), bias.flatten())
    _set(
        layer.attention_output,
        R @ output[:, heads].flatten(1),
        R @ source.attention_output.bias.double(),
    )
    _project_norm(layer.attention_norm, source.attention_norm, R)
    into, out = source.intermediate.weight.double(), source.output.weight.double()
    neurons = (into.norm(dim=1) * out.norm(dim=0)).topk(layer.intermediate.out_features)
    kept = neurons.indices.sort().values
    _set(layer.intermediate, into[kept] @ W, source.intermediate.bias[kept])
    _set(layer.output, R @ out[:, kept], R @ source.output.bias.double())
    _project_norm(layer.output_norm, source.output_norm, R)


def _project_norm(norm: nn.LayerNorm, source: nn.LayerNorm, R: Tensor) -> None:
    """The spread that R makes of independent coordinates with the source's spreads."""
    norm.weight.copy_((R.square() @ source.weight.double().square()).sqrt())
    norm.bias.copy_(R @ source.bias.double())


def _set(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
