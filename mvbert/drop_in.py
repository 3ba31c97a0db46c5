"""fuse(model), unfuse(model): the fused layers inside a Hugging Face encoder, and out again.

    from mvbert import fuse
    fuse(model)          # BertForMaskedLM, XLMRobertaModel, DistilBertModel, ...

Parameters, buffers, state-dict keys and the classes of transformers stay as they are: an instance
is given a subclass of its own class with another `forward`, and later its own class back.
Embeddings become one pass; a language model in training computes its loss from the hidden states of
the labelled pieces, without the logits of the others. A call that the fused forward would not serve
exactly is the original forward's.
"""

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, NamedTuple

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


def _modernbert_head(model: Any, hidden: Tensor) -> Tensor:
    transformed: Tensor = model.head(hidden)
    return transformed


def _rembert_head(model: Any, hidden: Tensor) -> Tensor:
    head = model.cls.predictions
    normed: Tensor = head.LayerNorm(head.activation(head.dense(hidden)))
    return normed


def _no_head(model: Any, hidden: Tensor) -> Tensor:
    return hidden


def _albert_head(model: Any, hidden: Tensor) -> Tensor:
    head = model.predictions
    normed: Tensor = head.LayerNorm(head.activation(head.dense(hidden)))
    return normed


def _buffered_positions(module: Any, input_ids: Tensor) -> Tensor:
    """BERT reads positions from a buffer: 0, 1, .. unless somebody changed it. [1, T]."""
    buffer: Tensor = module.position_ids
    return buffer[:, : input_ids.shape[1]]


def _positions_after_padding(module: Any, input_ids: Tensor) -> Tensor:
    """RoBERTa counts pieces that are no padding, from padding_idx + 1 on. [B, T]."""
    mask = input_ids.ne(module.padding_idx).int()
    return mask.cumsum(1) * mask + module.padding_idx


def _buffered_types(module: Any, input_ids: Tensor, position_ids: Tensor) -> Tensor | None:
    """BERT reads types, too, from a buffer. [1, T] or [B, T]."""
    if not hasattr(module, "token_type_ids") or position_ids.ndim != 2:
        return None
    types: Tensor = module.token_type_ids
    if module._mvbert_version >= 5:
        # transformers 4 reads the buffer at 0 .. T-1.
        return types.expand(position_ids.shape[0], -1).gather(1, position_ids)
    return types[:, : input_ids.shape[1]]


def _buffered_types_of_columns(module: Any, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Nystromformer reads that buffer at 0 .. T-1, whatever the positions. [1, T]."""
    buffer: Tensor = module.token_type_ids
    return buffer[:, : input_ids.shape[1]]


def _first_type(module: Any, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    return torch.zeros_like(input_ids[:1])


class Embeddings(NamedTuple):
    """The parts of an embedding module by name, and what a call that names no index gets."""

    positions: Callable[[Any, Tensor], Tensor] = _buffered_positions
    types: Callable[[Any, Tensor, Tensor], Tensor | None] = _buffered_types
    word: str = "word_embeddings"
    norm: str = "LayerNorm"
    dropout: str = "dropout"


_COLUMNS = Embeddings(types=_buffered_types_of_columns)
_ROBERTA_LIKE = Embeddings(_positions_after_padding)
_ONE_TYPE = Embeddings(types=_first_type)
# Key: the class below transformers.models. A module without a table of positions or types has none.
EMBEDDINGS = {
    "albert.modeling_albert.AlbertEmbeddings": Embeddings(),
    "bert.modeling_bert.BertEmbeddings": Embeddings(),
    "camembert.modeling_camembert.CamembertEmbeddings": _ROBERTA_LIKE,
    "convbert.modeling_convbert.ConvBertEmbeddings": _COLUMNS,
    # In transformers 4 and in 5.
    "data2vec.modeling_data2vec_text.Data2VecTextEmbeddings": _ROBERTA_LIKE,
    "data2vec.modeling_data2vec_text.Data2VecTextForTextEmbeddings": _ROBERTA_LIKE,
    "deberta_v2.modeling_deberta_v2.DebertaV2Embeddings": _ONE_TYPE,
    "distilbert.modeling_distilbert.Embeddings": Embeddings(),
    "electra.modeling_electra.ElectraEmbeddings": Embeddings(),
    "funnel.modeling_funnel.FunnelEmbeddings": Embeddings(norm="layer_norm"),
    "gte.modeling_gte.GteEmbeddings": _ONE_TYPE,
    "jina_embeddings_v3.modeling_jina_embeddings_v3.JinaEmbeddingsV3Embeddings": _ONE_TYPE,
    "modernbert.modeling_modernbert.ModernBertEmbeddings": Embeddings(
        word="tok_embeddings", norm="norm", dropout="drop"
    ),
    "mpnet.modeling_mpnet.MPNetEmbeddings": _ROBERTA_LIKE,
    "mra.modeling_mra.MraEmbeddings": _COLUMNS,
    "nomic_bert.modeling_nomic_bert.NomicBertEmbeddings": _ONE_TYPE,
    "nystromformer.modeling_nystromformer.NystromformerEmbeddings": _COLUMNS,
    "rembert.modeling_rembert.RemBertEmbeddings": _ONE_TYPE,
    "roberta.modeling_roberta.RobertaEmbeddings": _ROBERTA_LIKE,
    "roberta_prelayernorm.modeling_roberta_prelayernorm.RobertaPreLayerNormEmbeddings": (
        _ROBERTA_LIKE
    ),
    "roformer.modeling_roformer.RoFormerEmbeddings": _ONE_TYPE,
    "squeezebert.modeling_squeezebert.SqueezeBertEmbeddings": _ONE_TYPE,
    "xlm_roberta.modeling_xlm_roberta.XLMRobertaEmbeddings": _ROBERTA_LIKE,
    "xmod.modeling_xmod.XmodEmbeddings": _ROBERTA_LIKE,
    "yoso.modeling_yoso.YosoEmbeddings": _COLUMNS,
}


class Head(NamedTuple):
    """Where the parts of a language model are, and what it learns."""

    encoder: str
    # From the last hidden states [.., H] to what the decoder multiplies with its table.
    transform: Callable[[Any, Tensor], Tensor]
    decoder: str
    # "masked": each label's own piece; "counted": the same, in float32, and divided by the count
    # that the Trainer hands over; "causal": the next one, counted; "sentences": masked, and
    # whether the second sentence follows the first.
    objective: str


_BERT = ("bert", _bert_head, "cls.predictions.decoder")
_DISTILBERT = ("distilbert", _distilbert_head, "vocab_projector")
_ELECTRA = ("electra", _electra_head, "generator_lm_head")
_ROBERTA = ("roberta", _roberta_head, "lm_head.decoder")
LANGUAGE_MODELS = {
    "albert.modeling_albert.AlbertForMaskedLM": Head(
        "albert", _albert_head, "predictions.decoder", "masked"
    ),
    "bert.modeling_bert.BertForMaskedLM": Head(*_BERT, "masked"),
    "bert.modeling_bert.BertForPreTraining": Head(*_BERT, "sentences"),
    "bert.modeling_bert.BertLMHeadModel": Head(*_BERT, "causal"),
    "camembert.modeling_camembert.CamembertForCausalLM": Head(*_ROBERTA, "causal"),
    "camembert.modeling_camembert.CamembertForMaskedLM": Head(*_ROBERTA, "masked"),
    "convbert.modeling_convbert.ConvBertForMaskedLM": Head("convbert", *_ELECTRA[1:], "masked"),
    "data2vec.modeling_data2vec_text.Data2VecTextForMaskedLM": Head(
        "data2vec_text", *_ROBERTA[1:], "masked"
    ),
    "deberta_v2.modeling_deberta_v2.DebertaV2ForMaskedLM": Head("deberta", *_BERT[1:], "masked"),
    "distilbert.modeling_distilbert.DistilBertForMaskedLM": Head(*_DISTILBERT, "masked"),
    "electra.modeling_electra.ElectraForCausalLM": Head(*_ELECTRA, "causal"),
    "electra.modeling_electra.ElectraForMaskedLM": Head(*_ELECTRA, "masked"),
    "funnel.modeling_funnel.FunnelForMaskedLM": Head("funnel", _no_head, "lm_head", "masked"),
    "gte.modeling_gte.GteForMaskedLM": Head("gte", *_ROBERTA[1:], "masked"),
    "jina_embeddings_v3.modeling_jina_embeddings_v3.JinaEmbeddingsV3ForMaskedLM": Head(
        *_ROBERTA, "masked"
    ),
    "modernbert.modeling_modernbert.ModernBertForMaskedLM": Head(
        "model", _modernbert_head, "decoder", "counted"
    ),
    "mpnet.modeling_mpnet.MPNetForMaskedLM": Head("mpnet", *_ROBERTA[1:], "masked"),
    "mra.modeling_mra.MraForMaskedLM": Head("mra", *_BERT[1:], "masked"),
    "nomic_bert.modeling_nomic_bert.NomicBertForMaskedLM": Head("nomic_bert", *_BERT[1:], "masked"),
    "nystromformer.modeling_nystromformer.NystromformerForMaskedLM": Head(
        "nystromformer", *_BERT[1:], "masked"
    ),
    "rembert.modeling_rembert.RemBertForMaskedLM": Head(
        "rembert", _rembert_head, "cls.predictions.decoder", "masked"
    ),
    "roberta.modeling_roberta.RobertaForCausalLM": Head(*_ROBERTA, "causal"),
    "roberta.modeling_roberta.RobertaForMaskedLM": Head(*_ROBERTA, "masked"),
    "roberta_prelayernorm.modeling_roberta_prelayernorm.RobertaPreLayerNormForMaskedLM": Head(
        "roberta_prelayernorm", *_ROBERTA[1:], "masked"
    ),
    "roformer.modeling_roformer.RoFormerForMaskedLM": Head("roformer", *_BERT[1:], "masked"),
    "squeezebert.modeling_squeezebert.SqueezeBertForMaskedLM": Head(
        "transformer", *_BERT[1:], "masked"
    ),
    "xlm_roberta.modeling_xlm_roberta.XLMRobertaForCausalLM": Head(*_ROBERTA, "causal"),
    "xlm_roberta.modeling_xlm_roberta.XLMRobertaForMaskedLM": Head(*_ROBERTA, "masked"),
    "xmod.modeling_xmod.XmodForMaskedLM": Head(*_ROBERTA, "masked"),
    "yoso.modeling_yoso.YosoForMaskedLM": Head("yoso", *_BERT[1:], "masked"),
}

_NO_NORM = "has no LayerNorm in its embeddings"
_IMAGES = "reads images beside text"
_GENERATES = "has a decoder"
# Why a model is refused that has nothing of the tables above, by its folder in
# transformers.models: every other one that fills in masked pieces.
REFUSED = {
    "bart": f"BART {_GENERATES}",
    "big_bird": "BigBird's dropout comes before its LayerNorm",
    "bridgetower": f"BridgeTower {_IMAGES}",
    "deberta": "DeBERTa (version 1) has its own LayerNorm class",
    "deprecated": "transformers has deprecated it",
    "ernie": "ERNIE may add a table of tasks",
    "esm": "ESM's embeddings have no dropout, and LayerNorm by an option alone",
    "esmc": f"ESM C {_NO_NORM}",
    "eurobert": f"EuroBERT {_NO_NORM}",
    "flaubert": "FlauBERT adds its embeddings up in the model's own forward",
    "flava": f"FLAVA {_IMAGES}",
    "fnet": "FNet has a linear layer between LayerNorm and dropout",
    "ibert": "I-BERT quantises its embeddings",
    "layoutlm": "LayoutLM adds tables of places on a page",
    "longformer": "Longformer's output has global attentions, which the fused one has not",
    "luke": "LUKE reads and predicts entities beside pieces",
    "lxmert": f"LXMERT {_IMAGES}",
    "mbart": f"mBART {_GENERATES}",
    "megatron_bert": f"MegatronBERT {_NO_NORM}",
    "mobilebert": "MobileBERT joins three pieces in a row",
    "mvp": f"MVP {_GENERATES}",
    "neomme": f"NeoMME {_IMAGES}",
    "perceiver": f"Perceiver {_NO_NORM}",
    "reformer": f"Reformer {_NO_NORM}",
    "roc_bert": "RoCBERT mixes in shapes and pronunciations",
    "splinter": "Splinter predicts spans, not masked pieces",
    "tapas": "TAPAS adds a table for each of seven kinds of types",
    "ultrabert": f"UltraBERT {_NO_NORM}",
    "ultravbert": f"UltraVBERT {_IMAGES}",
    "vilt": f"ViLT {_IMAGES}",
    "visual_bert": f"VisualBERT {_IMAGES}",
    "wav2vec2": "wav2vec 2.0 reads sound",
    "xlm": "XLM adds its embeddings up in the model's own forward",
    "xlm_roberta_xl": f"XLM-RoBERTa-XL {_NO_NORM}",
}


# ---- the two fused layers ----------------------------------------------------------------------

# What a fused forward computes with. A call that sets anything else, in this version of
# transformers or the next, is the original forward's.
EMBEDDING_ARGUMENTS = frozenset({"input_ids", "token_type_ids", "position_ids", "mask"})
LOSS_ARGUMENTS = frozenset({
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "head_mask",
    "encoder_hidden_states", "encoder_attention_mask", "output_attentions", "output_hidden_states",
    "labels", "next_sentence_label", "num_items_in_batch", "return_dict", "use_cache",
})  # fmt: skip


class _Mixin:
    """Stands before the class of a module of transformers, whose attributes it therefore has."""

    _mvbert_original: type[nn.Module]
    _mvbert_signature: inspect.Signature
    # The major version of transformers.
    _mvbert_version: int

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

        def forward(self, *args: Any, **kwargs: Any) -> Any: ...

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled by its two classes: the fused one cannot be found by name."""
        return _blank, type(self).__bases__, super().__reduce_ex__(protocol)[2]  # type: ignore[index]


class FusedEmbeddings(_Mixin):
    """Mixed into the class of an embedding module: word + position + type, LayerNorm, dropout."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments = _arguments(self, args, kwargs, EMBEDDING_ARGUMENTS)
        if arguments is None or not _serves_embeddings(self):
            return super().forward(*args, **kwargs)
        mask = arguments.pop("mask", None)
        indices = _indices(self, **arguments)
        if indices is None or not (mask is None or mask.shape == indices[0].shape):
            return super().forward(*args, **kwargs)
        input_ids, position_ids, token_type_ids = indices
        names = EMBEDDINGS[_key(self._mvbert_original)]
        word, norm, dropout = (getattr(self, name) for name in names[2:])
        types: Any = getattr(self, "token_type_embeddings", None)
        position_table = None
        if position_ids is None:
            pass
        elif position_ids.shape[0] == 1:
            # The same rows for the whole batch: added up once, and their gradient is a sum over
            # the batch instead of a scatter.
            position_table = self.position_embeddings(position_ids)[0]
            position_ids = None
            if token_type_ids is not None and token_type_ids.shape[0] < input_ids.shape[0]:
                position_table = position_table + types(token_type_ids)[0]
                types = token_type_ids = None
        else:
            position_table = _without_padding_gradient(self.position_embeddings)
        if token_type_ids is not None:
            token_type_ids = token_type_ids.expand_as(input_ids)
        hidden = functional.mixed_embedding(
            input_ids,
            word.weight,
            None,
            position_table,
            None if types is None else _without_padding_gradient(types),
            token_type_ids,
            norm.weight,
            torch.zeros_like(norm.weight) if norm.bias is None else norm.bias,
            eps=norm.eps,
            dropout_p=dropout.p,
            training=dropout.training,
            position_ids=position_ids,
            padding_id=word.padding_idx,
        )
        # DeBERTa's. Before or after dropout, a product is the same.
        return hidden if mask is None else hidden * mask[..., None].to(hidden.dtype)


def _serves_embeddings(module: Any) -> bool:
    """Whether the parts of an embedding module are as transformers made them."""
    names = EMBEDDINGS[_key(module._mvbert_original)][2:]
    word, norm, dropout = (getattr(module, name) for name in names)
    others = (getattr(module, f"{name}_embeddings", None) for name in ("position", "token_type"))
    tables = [word, *(table for table in others if table is not None)]
    return (
        getattr(module, "position_embedding_type", "absolute") == "absolute"
        and all(_calls_only(table, nn.Embedding) for table in tables)
        and not any(t.max_norm is not None or t.scale_grad_by_freq or t.sparse for t in tables)
        and _calls_only(norm, nn.LayerNorm)
        and norm.normalized_shape == word.weight.shape[1:]
        and _calls_only(dropout, nn.Dropout)
        and dropout.p < 1
        and all(_stored_like(p, word.weight) for m in (*tables, norm) for p in m.parameters())
    )


def _indices(
    module: Any, input_ids: Any = None, token_type_ids: Any = None, position_ids: Any = None
) -> tuple[Tensor, Any, Any] | None:
    """Ids [B, T], positions [1, T], [B, T] or None and types [1, T], [B, T] or None of a call.

    Those that the call does not name are what the original forward would take. None: one of them
    has another shape, dtype or device.
    """
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
        return None
    B, T = input_ids.shape
    family = EMBEDDINGS[_key(module._mvbert_original)]
    if getattr(module, "position_embeddings", None) is None:
        position_ids = None
    elif position_ids is None:
        if not hasattr(module, "position_ids"):
            return None
        position_ids = family.positions(module, input_ids)
    types = getattr(module, "token_type_embeddings", None)
    if types is None:
        token_type_ids = None
    # A table of one row leaves nothing to look up.
    elif token_type_ids is None and types.num_embeddings > 1:
        token_type_ids = family.types(module, input_ids, position_ids)
        if token_type_ids is None:
            return None
    elif token_type_ids is not None and token_type_ids.shape != (B, T):
        return None
    for ids in (input_ids, position_ids, token_type_ids):
        if ids is not None and not (
            tuple(ids.shape) in ((B, T), (1, T))
            and ids.dtype in (torch.int32, torch.int64)
            and ids.device == getattr(module, family.word).weight.device
        ):
            return None
    return input_ids, position_ids, token_type_ids


class FusedLanguageModel(_Mixin):
    """Mixed into the class of a language model: in training, the loss without the logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments = _arguments(self, args, kwargs, LOSS_ARGUMENTS)
        if arguments is None or not _serves_loss(self, arguments):
            return super().forward(*args, **kwargs)
        encoder, transform, path, objective = LANGUAGE_MODELS[_key(self._mvbert_original)]
        labels = arguments.pop("labels")
        follows = arguments.pop("next_sentence_label", None)
        count = arguments.pop("num_items_in_batch", None)
        arguments["return_dict"] = True
        if objective == "causal":
            arguments["use_cache"] = False
            labels = nn.functional.pad(labels[:, 1:], (0, 1), value=functional.IGNORE_INDEX)
        elif objective != "counted":
            # The original's loss is the mean over the labels of this call, whatever the count.
            count = None
        outputs = getattr(self, encoder)(**arguments)
        hidden = outputs[0].flatten(0, 1)
        labels = labels.reshape(-1).to(hidden.device)
        if not hidden.is_cuda and not torch.compiler.is_compiling():
            # The head's transform, too, is only needed where there is a label. A GPU would have to
            # tell the host how many there are; there the loss alone skips the others.
            labelled = labels != functional.IGNORE_INDEX
            hidden, labels = hidden[labelled], labels[labelled]
        decoder = _find_module(self, path)
        loss = functional.linear_cross_entropy(
            transform(self, hidden), decoder.weight, labels, decoder.bias, num_items_in_batch=count
        )
        if objective in ("causal", "counted"):
            # Whatever the model's dtype, as in the original.
            loss = loss.float()
        values = {name: outputs.get(name) for name in ("hidden_states", "attentions")}
        if objective == "causal":
            values["cross_attentions"] = outputs.get("cross_attentions")
        if objective == "sentences":
            logits = self.cls.seq_relationship(outputs[1])
            loss = loss + nn.functional.cross_entropy(logits.view(-1, 2), follows.view(-1))
            values["seq_relationship_logits"] = logits
        return _output(objective)(loss=loss, **values)


def _serves_loss(model: Any, arguments: dict[str, Any]) -> bool:
    """Whether the fused loss is what the original forward would return for these arguments."""
    encoder, _, path, objective = LANGUAGE_MODELS[_key(model._mvbert_original)]
    config = model.config
    # DeBERTa's newer head multiplies with the table of its embeddings.
    if not hasattr(model, path.split(".")[0]):
        return False
    # ModernBERT's own ways to leave out labels that are ignored, and, in transformers 4, padding.
    flash = model._mvbert_version < 5 and "flash" in (config._attn_implementation or "")
    if getattr(config, "sparse_prediction", False) or (objective == "counted" and flash):
        return False
    # A tuple has no place for logits that are not there.
    as_tuple = not config.return_dict or getattr(config, "torchscript", False)
    if not model.training or not arguments.get("return_dict", not as_tuple):
        return False
    labels = arguments.get("labels")
    rows = arguments.get("input_ids", arguments.get("inputs_embeds"))
    decoder = _find_module(model, path)
    return (
        isinstance(labels, Tensor)
        and isinstance(rows, Tensor)
        and labels.dtype == torch.int64
        and labels.ndim == 2
        and labels.shape == rows.shape[:2]
        and ("next_sentence_label" in arguments) == (objective == "sentences")
        and ("use_cache" not in arguments or objective == "causal")
        and (objective not in COUNTED or model.loss_function is _counted_loss(objective))
        and _calls_only(decoder, nn.Linear)
        and decoder.weight.shape[0] == config.vocab_size
        and all(_stored_like(p, decoder.weight) for p in decoder.parameters())
        and all(
            _works_by_row(module, model._mvbert_original.__module__)
            for name, child in model.named_children()
            if name != encoder
            for module in child.modules()
        )
    )


# Objectives whose model calls a function of transformers that can be replaced.
COUNTED = {"causal": "ForCausalLMLoss", "counted": "ForMaskedLMLoss"}


def _counted_loss(objective: str) -> Any:
    from transformers.loss import loss_utils

    return getattr(loss_utils, COUNTED[objective])


def _output(objective: str) -> Any:
    """The class of what a model with this objective returns, for a call without logits."""
    from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, MaskedLMOutput
    from transformers.models.bert.modeling_bert import BertForPreTrainingOutput

    kind: Any = {
        "causal": CausalLMOutputWithCrossAttentions,
        "counted": MaskedLMOutput,
        "masked": MaskedLMOutput,
        "sentences": BertForPreTrainingOutput,
    }[objective]
    # A graph cannot make an object of a class of ours.
    return kind if torch.compiler.is_compiling() else _without_logits(kind)


@cache
def _without_logits(kind: Any) -> Any:
    """An output of transformers that, asked for its logits, names the option that keeps them."""
    name = "prediction_logits" if hasattr(kind, "prediction_logits") else "logits"
    sentence = (
        f"this output has no {name}: a fused model in training computes its loss without them; "
        "call fuse(model, keep_logits=True) to have them"
    )

    class Missing:
        def __get__(self, output: Any, owner: Any) -> Any:
            if output is None:
                return self
            raise AttributeError(sentence)

    def __post_init__(self: Any) -> None:
        kind.__post_init__(self)
        if vars(self).get(name) is None:
            vars(self).pop(name, None)

    def __getitem__(self: Any, key: Any) -> Any:
        if name in self.keys() or key == 0:
            return kind.__getitem__(self, key)
        if not isinstance(key, str):
            # What stands behind the logits would move up to their place.
            raise IndexError(sentence)
        if key == name:
            raise KeyError(sentence)
        return kind.__getitem__(self, key)

    def __reduce__(self: Any) -> Any:
        return kind, tuple(self.get(field.name) for field in fields(kind))

    members = {
        "__module__": kind.__module__,
        # Code that walks the fields, as FSDP's, asks for those that are there.
        "__dataclass_fields__": {f.name: f for f in fields(kind) if f.name != name},
        "__post_init__": __post_init__,
        "__getitem__": __getitem__,
        "__reduce__": __reduce__,
        name: Missing(),
    }
    return type(kind.__name__, (kind,), members)


def _works_by_row(module: Any, family: str) -> bool:
    """Whether a part of a head does the same for [N, H] as for [B, T, H], and has no hooks."""
    if _calls_only(module, nn.CrossEntropyLoss):
        options = (module.weight, module.ignore_index, module.reduction, module.label_smoothing)
        return options == (None, functional.IGNORE_INDEX, "mean", 0.0)
    kinds = (family, "transformers.activations", "torch.nn.modules.activation")
    if type(module).__module__ in kinds:
        return _calls_only(module, type(module))
    return _calls_only(module, nn.Linear) or _calls_only(module, nn.LayerNorm)


def _arguments(
    module: Any, args: tuple, kwargs: dict, served: frozenset[str]
) -> dict[str, Any] | None:
    """The arguments that a call of the original forward sets, by name; None: not all are `served`.

    Nor is any in forward-mode differentiation or a transform of torch.func.
    """
    signature = module._mvbert_signature
    if not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return None
    try:
        bound = dict(signature.bind(module, *args, **kwargs).arguments)
    except TypeError:
        return None
    bound.pop("self")
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
        elif bound.get(name) is parameter.default:
            bound.pop(name, None)
    bound = {name: value for name, value in bound.items() if value is not None}
    return bound if bound.keys() <= served else None


def _find_module(module: Any, path: str) -> Any:
    """The module that a dotted path leads to."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _calls_only(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` would do what `kind.forward` does with its parameters, and no more.

    An adapter puts another class in its place; gradient checkpointing, offloading and whoever looks
    at activations hang hooks on it.
    """
    return (
        type(module).forward is kind.forward
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not nn.modules.module._has_any_global_hook()
    )


def _stored_like(parameter: Tensor, other: Tensor) -> bool:
    """Whether a parameter is a plain tensor of another's dtype and device, with storage.

    Quantised and sharded tensors are classes of their own.
    """
    return (
        type(parameter) in (Tensor, nn.Parameter)
        and parameter.dtype == other.dtype
        and parameter.device == other.device
        and not parameter.is_meta
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


def _family(module: nn.Module) -> str:
    """The folder in transformers.models that a module's class is in."""
    path = type(module).__module__.split(".")
    return path[2] if path[:2] == ["transformers", "models"] and len(path) > 2 else ""


@cache
def _fused_class(cls: type, mixin: type) -> type:
    """A subclass of `cls` with the forward of `mixin`.

    Name and signature stay: configs save the one, and transformers' Trainer chooses columns by the
    other.
    """

    @wraps(cls.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return mixin.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    import transformers

    members = {
        "_mvbert_original": cls,
        "_mvbert_signature": inspect.signature(forward),
        "_mvbert_version": int(transformers.__version__.split(".")[0]),
        "__module__": cls.__module__,
        "forward": forward,
    }
    return type(cls.__name__, (mixin, cls), members)


def _check_module(name: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        shown = model.__name__ if isinstance(model, type) else f"{model!r:.40}"
        raise InputError(
            f"{name} needs a model of transformers, got {shown} ({type(model).__name__}); "
            "make one with from_pretrained(..)"
        )


def _blank(mixin: type, cls: type) -> Any:
    """An instance without attributes, for pickle."""
    return object.__new__(_fused_class(cls, mixin))


def fuse(model: nn.Module, *, keep_logits: bool = False) -> list[str]:
    """Puts the fused layers into a Hugging Face encoder, in place.

    Args:
        model: a model of transformers of a family in EMBEDDINGS (docs/fuse.md has the table), or a
            module that contains one. What is an adapter's, has hooks or options of its own is
            called as before, as is the original forward with arguments that the fused one has no
            place for.
        keep_logits: a language model given labels returns logits too, as before (its head is then
            left alone). Without, its output in training with labels has none, and an
            AttributeError that names this option when asked for them. That loss is float32, and 0
            where no piece has a label.

    Returns:
        The names of the modules that were replaced; "" is the model itself.

    Raises:
        InputError: not a module, or the model holds nothing that fuse supports.
    """
    _check_module("fuse", model)
    if keep_logits is not True and keep_logits is not False:
        raise InputError(f"keep_logits is {keep_logits!r}, expected True or False")
    replaced = []
    for name, module in model.named_modules():
        cls = type(module)
        if hasattr(cls, "_mvbert_original"):
            continue
        if _key(cls) in EMBEDDINGS:
            module.__class__ = _fused_class(cls, FusedEmbeddings)  # type: ignore[arg-type]
        elif _key(cls) in LANGUAGE_MODELS and not keep_logits:
            module.__class__ = _fused_class(cls, FusedLanguageModel)  # type: ignore[arg-type]
        else:
            continue
        replaced.append(name)
    if not replaced and not any(hasattr(type(m), "_mvbert_original") for m in model.modules()):
        names = sorted(key.rsplit(".", 1)[1] for key in (*EMBEDDINGS, *LANGUAGE_MODELS))
        reasons = {REFUSED[f] for f in map(_family, model.modules()) if f in REFUSED}
        reason = f" ({'; '.join(sorted(reasons))})" if reasons else ""
        raise InputError(
            f"fuse does not support {type(model).__name__}{reason}; supported: {', '.join(names)} "
            "of transformers and the models that contain one"
        )
    return replaced


def unfuse(model: nn.Module) -> list[str]:
    """Gives every fused module its own class back.

    Returns:
        The names of the modules that were restored.
    """
    _check_module("unfuse", model)
    names = []
    for name, module in model.named_modules():
        original = getattr(type(module), "_mvbert_original", None)
        if original is not None:
            module.__class__ = original
            names.append(name)
    return names
