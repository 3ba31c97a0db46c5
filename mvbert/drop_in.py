"""fuse(model), unfuse(model): the fused layers inside a Hugging Face encoder, and out again.

    from mvbert import fuse
    fuse(model)          # BertForMaskedLM, XLMRobertaModel, DistilBertModel, ...

Parameters, buffers, state-dict keys and the classes of transformers stay as they are: an instance
is given a subclass of its own class with another `forward`, and later its own class back.
Embeddings become one pass; a masked-language model in training computes its loss from the hidden
states of the labelled pieces, without the logits of the others.
"""

import inspect
from collections.abc import Callable, Iterable
from functools import cache, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mvbert import functional
from mvbert.errors import InputError

__all__ = ["fuse", "unfuse"]


# ---- what differs between the families ---------------------------------------------------------


def _bert_head(model: Any, hidden: Tensor) -> Tensor:
    transformed: Tensor = model.cls.predictions.transform(hidden)
    return transformed


def _roberta_head(model: Any, hidden: Tensor) -> Tensor:
    head = model.lm_head
    normed: Tensor = head.layer_norm(nn.functional.gelu(head.dense(hidden)))
    return normed


def _electra_head(model: Any, hidden: Tensor) -> Tensor:
    predictions: Tensor = model.generator_predictions(hidden)
    return predictions


def _distilbert_head(model: Any, hidden: Tensor) -> Tensor:
    normed: Tensor = model.vocab_layer_norm(model.activation(model.vocab_transform(hidden)))
    return normed


def _counted_positions(module: Any, input_ids: Tensor, past: int) -> None:
    """BERT numbers positions 0, 1, .. itself."""


def _positions_after_padding(module: Any, input_ids: Tensor, past: int) -> Tensor:
    """RoBERTa counts pieces that are no padding, from padding_idx + 1 on."""
    kept = input_ids.ne(module.padding_idx).int()
    return (kept.cumsum(1) + past) * kept + module.padding_idx


# Key: the class below transformers.models. Value: how positions are numbered.
EMBEDDINGS: dict[str, Callable] = {
    "bert.modeling_bert.BertEmbeddings": _counted_positions,
    "camembert.modeling_camembert.CamembertEmbeddings": _positions_after_padding,
    "distilbert.modeling_distilbert.Embeddings": _counted_positions,
    "electra.modeling_electra.ElectraEmbeddings": _counted_positions,
    "roberta.modeling_roberta.RobertaEmbeddings": _positions_after_padding,
    "xlm_roberta.modeling_xlm_roberta.XLMRobertaEmbeddings": _positions_after_padding,
}
# Value: the encoder, the decoder, and the way from the one's last hidden states to the other.
_BERT = ("bert", "cls.predictions.decoder", _bert_head)
_ROBERTA = ("roberta", "lm_head.decoder", _roberta_head)
MASKED_LM: dict[str, tuple[str, str, Callable]] = {
    "bert.modeling_bert.BertForMaskedLM": _BERT,
    "camembert.modeling_camembert.CamembertForMaskedLM": _ROBERTA,
    "distilbert.modeling_distilbert.DistilBertForMaskedLM": (
        "distilbert", "vocab_projector", _distilbert_head,
    ),
    "electra.modeling_electra.ElectraForMaskedLM": (
        "electra", "generator_lm_head", _electra_head,
    ),
    "roberta.modeling_roberta.RobertaForMaskedLM": _ROBERTA,
    "xlm_roberta.modeling_xlm_roberta.XLMRobertaForMaskedLM": _ROBERTA,
}  # fmt: skip


# ---- the two fused layers ----------------------------------------------------------------------


class _Mixin:
    """Stands before the class of a module of transformers, whose attributes it therefore has."""

    _mvbert_original: type[nn.Module]

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

        def forward(self, *args: Any, **kwargs: Any) -> Any: ...

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled by its two classes: the fused one cannot be found by name."""
        return _blank, type(self).__bases__, super().__reduce_ex__(protocol)[2]  # type: ignore[index]


class FusedEmbeddings(_Mixin):
    """Mixed into the class of an embedding module: word + position + type, LayerNorm, dropout."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = _arguments(self._mvbert_original, self, args, kwargs)
        input_ids = given.get("input_ids")
        past = given.get("past_key_values_length") or 0
        absolute = getattr(self, "position_embedding_type", "absolute") == "absolute"
        if input_ids is None or not absolute or not _as_made(self.children()):
            return super().forward(*args, **kwargs)
        position_ids = given.get("position_ids")
        if position_ids is None:
            position_ids = EMBEDDINGS[_key(self._mvbert_original)](self, input_ids, past)
        if position_ids is None and past:
            position_ids = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
            position_ids = position_ids[None]
        types = getattr(self, "token_type_embeddings", None)
        return functional.mixed_embedding(
            input_ids,
            self.word_embeddings.weight,
            None,
            _without_padding_gradient(self.position_embeddings),
            None if types is None else types.weight,
            given.get("token_type_ids"),
            self.LayerNorm.weight,
            self.LayerNorm.bias,
            eps=self.LayerNorm.eps,
            dropout_p=self.dropout.p,
            training=self.training,
            position_ids=position_ids,
            padding_id=self.word_embeddings.padding_idx,
        )


class FusedMaskedLM(_Mixin):
    """Mixed into the class of a masked-language model: in training, the loss without the logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = _arguments(self._mvbert_original, self, args, kwargs)
        labels = given.pop("labels", None)
        encoder, path, head = MASKED_LM[_key(self._mvbert_original)]
        *_, decoder = passed_by = _along(self, path)
        if labels is None or not self.training or not _as_made(passed_by):
            return super().forward(*args, **kwargs)
        return_dict = given.pop("return_dict", None)
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        given = {name: value for name, value in given.items() if value is not None}
        outputs = getattr(self, encoder)(**given, return_dict=True)
        hidden = outputs[0].flatten(0, 1)
        labels = labels.reshape(-1).to(hidden.device)
        if not hidden.is_cuda and not torch.compiler.is_compiling():
            # The head's transform, too, is only needed where there is a label. A GPU would have to
            # tell the host how many there are; there the loss alone skips the others.
            kept = labels != functional.IGNORE_INDEX
            hidden, labels = hidden[kept], labels[kept]
        loss = functional.linear_cross_entropy(
            head(self, hidden), decoder.weight, labels, decoder.bias
        )
        from transformers.modeling_outputs import MaskedLMOutput

        output = MaskedLMOutput(
            loss=loss,  # type: ignore[arg-type]
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )
        return output if return_dict else output.to_tuple()


def _arguments(original: type[nn.Module], module: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a call of `original.forward` by name, those of its ** included."""
    signature = _signature(original)  # type: ignore[arg-type]
    bound = dict(signature.bind(module, *args, **kwargs).arguments)
    bound.pop("self")
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    return bound


@cache
def _signature(original: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(original.forward)


def _along(module: Any, path: str) -> list[Any]:
    """The modules that a dotted path goes through, `module` left out."""
    return [module := getattr(module, name) for name in path.split(".")]


def _as_made(modules: Iterable[nn.Module]) -> bool:
    """Whether using their parameters is all that calling them would do.

    An adapter puts another class in their place; gradient checkpointing, offloading and whoever
    looks at activations hang hooks on them.
    """
    return all(
        type(m).__module__.startswith(("torch.nn.modules.", "transformers.models."))
        and "forward" not in vars(m)
        and not (m._forward_hooks or m._forward_pre_hooks)
        and not (m._backward_hooks or m._backward_pre_hooks)
        for m in modules
    )


def _without_padding_gradient(table: nn.Embedding) -> Tensor:
    """The table's weight; the row that `padding_idx` names, if any, receives no gradient."""
    if table.padding_idx is None or not table.weight.requires_grad or not torch.is_grad_enabled():
        return table.weight
    rows = torch.arange(table.num_embeddings, device=table.weight.device)
    return torch.where((rows == table.padding_idx)[:, None], table.weight.detach(), table.weight)


# ---- in and out --------------------------------------------------------------------------------


def _key(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}".removeprefix("transformers.models.")


@cache
def _fused_class(cls: type, mixin: type) -> type:
    """A subclass of `cls` with the forward of `mixin`.

    Name and signature stay: configs save the one, and transformers' Trainer chooses columns by the
    other.
    """

    @wraps(cls.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return mixin.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    members = {"_mvbert_original": cls, "__module__": cls.__module__, "forward": forward}
    return type(cls.__name__, (mixin, cls), members)


def _blank(mixin: type, cls: type) -> Any:
    """An instance without attributes, for pickle."""
    return object.__new__(_fused_class(cls, mixin))


def fuse(model: nn.Module, *, keep_logits: bool = False) -> list[str]:
    """Puts the fused layers into a Hugging Face encoder, in place.

    Args:
        model: a Bert*, Camembert*, DistilBert*, Electra*, Roberta* or XLMRoberta* model of
            transformers, or a module that contains one. What is an adapter's or has hooks is
            called as before.
        keep_logits: a masked-language model given labels returns logits too, as before (its head is
            then left alone). Without, its output has `logits=None` in training with labels.

    Returns:
        The names of the modules that were replaced; "" is the model itself.

    Raises:
        InputError: nothing in the model is known.
    """
    replaced = []
    for name, module in model.named_modules():
        cls = type(module)
        if hasattr(cls, "_mvbert_original"):
            continue
        if _key(cls) in EMBEDDINGS:
            module.__class__ = _fused_class(cls, FusedEmbeddings)  # type: ignore[arg-type]
        elif _key(cls) in MASKED_LM and not keep_logits:
            module.__class__ = _fused_class(cls, FusedMaskedLM)  # type: ignore[arg-type]
        else:
            continue
        replaced.append(name)
    if not replaced and not any(hasattr(type(m), "_mvbert_original") for m in model.modules()):
        known = ", ".join(sorted(key.rsplit(".", 1)[1] for key in (*EMBEDDINGS, *MASKED_LM)))
        raise InputError(
            f"fuse knows no layer of {type(model).__name__}: it replaces {known} of transformers"
        )
    return replaced


def unfuse(model: nn.Module) -> list[str]:
    """Gives every fused module its own class back.

    Returns:
        The names of the modules that were restored.
    """
    restored = []
    for name, module in model.named_modules():
        original = getattr(type(module), "_mvbert_original", None)
        if original is not None:
            module.__class__ = original
            restored.append(name)
    return restored
