"""fuse and unfuse on tiny random models: same outputs, same gradients, same keys, round trip."""

import copy
import dataclasses
import difflib
import importlib.util
import inspect
import math
import pickle
import random
import re

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")
import transformers

from mvbert import InputError, fuse, unfuse
from mvbert.drop_in import EMBEDDINGS, LANGUAGE_MODELS, REFUSED

# transformers' DeBERTa and ModernBERT import what torch has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
    # Funnel indexes with a list, which torch has deprecated, too.
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning"),
]

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


FAMILIES = {
    "albert": "Albert",
    "bert": "Bert",
    "camembert": "Camembert",
    "convbert": "ConvBert",
    "data2vec": "Data2VecText",
    "deberta_v2": "DebertaV2",
    "distilbert": "DistilBert",
    "electra": "Electra",
    "funnel": "Funnel",
    "gte": "Gte",
    "jina_embeddings_v3": "JinaEmbeddingsV3",
    "modernbert": "ModernBert",
    "mpnet": "MPNet",
    "nomic_bert": "NomicBert",
    "nystromformer": "Nystromformer",
    "rembert": "RemBert",
    "roberta": "Roberta",
    "roberta_prelayernorm": "RobertaPreLayerNorm",
    "roformer": "RoFormer",
    "squeezebert": "SqueezeBert",
    "xlm_roberta": "XLMRoberta",
    "xmod": "Xmod",
    "yoso": "Yoso",
}
FAMILIES = {  # transformers 5 has more
    folder: name for folder, name in FAMILIES.items() if hasattr(transformers, f"{name}Config")
}
# Beside SMALL, what a family has of its own; what it calls otherwise is in `make`.
OWN = {
    "albert": {"embedding_size": 16},
    # DeBERTa-v3 is configured like this.
    "deberta_v2": {
        "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
        "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False,
    },
    "electra": {"embedding_size": 16},
    "convbert": {"embedding_size": 16, "head_ratio": 1, "conv_kernel_size": 3},
    "gte": {"type_vocab_size": 2},
    "modernbert": {
        "embedding_dropout": 0.0, "mlp_dropout": 0.0, "attention_dropout": 0.0, "pad_token_id": 0,
        "attn_implementation": "eager", "reference_compile": False,
    },
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 24},
    "roformer": {"embedding_size": 16},
    "squeezebert": {"embedding_size": 32},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}  # fmt: skip
CAUSAL = {
    "bert": "BertLMHeadModel",
    "camembert": "CamembertForCausalLM",
    "electra": "ElectraForCausalLM",
    "roberta": "RobertaForCausalLM",
    "xlm_roberta": "XLMRobertaForCausalLM",
}


def config_of(family: str, **options):
    """Of a tiny model of a family."""
    sizes = SMALL
    if family == "distilbert":
        sizes = {
            "vocab_size": 97, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48,
            "max_position_embeddings": 40, "dropout": 0.0, "attention_dropout": 0.0,
        }  # fmt: skip
    if family == "funnel":
        sizes = {
            "vocab_size": 97, "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 48,
            "block_sizes": [1, 1], "hidden_dropout": 0.0, "attention_dropout": 0.0,
            "activation_dropout": 0.0,
        }  # fmt: skip
    config = getattr(transformers, f"{FAMILIES[family]}Config")
    return config(**sizes | OWN.get(family, {}) | options)


def make(family: str, model: str = "", **options):
    """A tiny model of a family, its masked-language model unless another class is named."""
    torch.manual_seed(0)
    config = config_of(family, **options)
    model = getattr(transformers, model or f"{FAMILIES[family]}ForMaskedLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()  # zeros would hide a forgotten bias
    return model.double().train()  # in float64 no processor rounds what a test would see


def part(embeddings, name: str) -> str:
    """What a family's embedding module calls its part: "word", "norm" or "dropout"."""
    key = type(embeddings).__module__.removeprefix("transformers.models.")
    return getattr(EMBEDDINGS[f"{key}.{type(embeddings).__name__}"], name)


def batch():
    ids = torch.randint(5, 97, (3, 12))
    ids[1, 9:] = 1  # RoBERTa's padding
    ids[2, 10:] = 0  # BERT's padding
    labels = torch.full_like(ids, -100)
    labels[:, 2:5] = torch.randint(0, 97, (3, 3))
    return ids, labels


@pytest.fixture(params=list(FAMILIES))
def family(request):
    return request.param


def test_same_loss_and_gradients(family):
    plain, fused = make(family), make(family)
    replaced = fuse(fused)
    assert len(replaced) == 2
    ids, labels = batch()
    # transformers makes ModernBERT's logits float32.
    error = 1e-5 if family == "modernbert" else 1e-9
    assert_same_loss_and_gradients(plain, fused, error, input_ids=ids, labels=labels)


@pytest.mark.parametrize("count", [5, torch.tensor(7)], ids=["count", "count tensor"])
def test_modernberts_loss_is_divided_by_the_count(count):
    plain, fused = make("modernbert"), make("modernbert")
    fuse(fused)
    ids, labels = batch()
    arguments = {"input_ids": ids, "labels": labels, "num_items_in_batch": count}
    assert_same_loss_and_gradients(plain, fused, 1e-5, **arguments)


@pytest.mark.parametrize("given", [False, True], ids=["all", "mask"])
@pytest.mark.parametrize(
    "options",
    [
        {"position_biased_input": True, "type_vocab_size": 2},
        {"position_biased_input": False, "type_vocab_size": 2},
        {"position_biased_input": True, "type_vocab_size": 0, "embedding_size": 16},
        {"legacy": False, "tie_word_embeddings": False},
    ],
    ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()),
)
def test_debertas_options(options, given):
    plain, fused = (make("deberta_v2", **options) for _ in range(2))
    fuse(fused)
    ids, labels = batch()
    arguments = {"input_ids": ids, "labels": labels}
    if given:
        arguments["attention_mask"] = (ids != 0).long()
        arguments["token_type_ids"] = torch.randint(0, 2, ids.shape)
    expected, result = plain(**arguments), fused(**arguments)
    torch.testing.assert_close(result.loss, expected.loss)
    # The newer head multiplies with the table of the embeddings: it is called as before.
    assert ("logits" in result) == ("legacy" in options)
    expected.loss.backward()
    result.loss.backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), fused.named_parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("decoder", [True, False], ids=["decoder", "encoder"])
@pytest.mark.parametrize("count", [None, 5, torch.tensor(7)], ids=["mean", "count", "count tensor"])
@pytest.mark.parametrize("family", list(CAUSAL))
def test_same_loss_and_gradients_of_the_next_piece(family, count, decoder):
    plain, fused = (make(family, CAUSAL[family], is_decoder=decoder) for _ in range(2))
    assert len(fuse(fused)) == 2
    ids, labels = batch()
    # transformers makes these logits float32.
    assert_same_loss_and_gradients(
        plain, fused, 1e-5, input_ids=ids, labels=labels, num_items_in_batch=count
    )


def test_another_loss_function_of_a_causal_model_is_called():
    plain, fused = (make("bert", "BertLMHeadModel", is_decoder=True) for _ in range(2))
    fuse(fused)
    ids, labels = batch()
    for model in (plain, fused):
        model.loss_function = lambda logits, labels, vocab_size, **_: logits.square().mean()
    assert torch.equal(fused(ids, labels=labels).loss, plain(ids, labels=labels).loss)


def test_same_loss_and_gradients_with_the_next_sentence():
    plain, fused = (make("bert", "BertForPreTraining") for _ in range(2))
    assert fuse(fused) == ["", "bert.embeddings"]
    ids, labels = batch()
    arguments = {
        "input_ids": ids,
        "token_type_ids": torch.randint(0, 2, ids.shape),
        "labels": labels,
        "next_sentence_label": torch.tensor([0, 1, 1]),
    }
    assert_same_loss_and_gradients(plain, fused, **arguments)
    expected, result = plain(**arguments), fused(**arguments)
    torch.testing.assert_close(result.seq_relationship_logits, expected.seq_relationship_logits)
    # Half of the labels is no loss at all, as before.
    del arguments["next_sentence_label"]
    expected, result = plain(**arguments), fused(**arguments)
    assert result.loss is expected.loss is None
    torch.testing.assert_close(result.prediction_logits, expected.prediction_logits)


def assert_same_loss_and_gradients(plain, fused, error=1e-9, **arguments):
    """`error` is of norms; what is 0 but for rounding is measured by the largest gradient."""
    expected, result = plain(**arguments), fused(**arguments)
    assert not any(name.endswith("logits") and "seq" not in name for name in result)
    torch.testing.assert_close(result.loss, expected.loss, rtol=error, atol=0)
    expected.loss.backward()
    result.loss.backward()
    largest = max(p.grad.norm() for p in plain.parameters() if p.grad is not None)
    for (name, a), (_, b) in zip(plain.named_parameters(), fused.named_parameters(), strict=True):
        if a.grad is None:
            assert b.grad is None or (b.grad == 0).all(), name
            continue
        difference, size = (b.grad - a.grad).norm(), a.grad.norm()
        assert difference <= error * (size + largest / 1000), (name, difference, size)


def test_logits_that_were_not_made_name_the_option_that_keeps_them():
    model = make("bert")
    fuse(model)
    ids, labels = batch()
    output = model(ids, labels=labels, output_hidden_states=True)
    sentence = "computes its loss without them; call fuse\\(model, keep_logits=True\\)"
    with pytest.raises(AttributeError, match=sentence):
        output.logits.argmax(-1)
    with pytest.raises(KeyError, match=sentence):
        output["logits"]
    for place in (1, -1, slice(1, None)):
        with pytest.raises(IndexError, match=sentence):
            output[place]
    assert getattr(output, "logits", None) is None
    assert output[0] is output["loss"] is output.loss
    assert len(output.hidden_states) == 3
    assert "logits" not in [field.name for field in dataclasses.fields(output)]
    # As accelerate, DistributedDataParallel and pickle take it apart and put it together.
    leaves, structure = torch.utils._pytree.tree_flatten(output)
    rebuilt = (
        torch.utils._pytree.tree_unflatten(leaves, structure),
        type(output)(dict(output)),
        copy.copy(output),
        pickle.loads(pickle.dumps(output)),
    )
    for twin in rebuilt:
        assert isinstance(twin, transformers.modeling_outputs.MaskedLMOutput)
        assert list(twin) == ["loss", "hidden_states"]
        assert torch.equal(twin.loss, output.loss)


def test_same_logits_without_labels(family):
    plain, fused = make(family).eval(), make(family).eval()
    fuse(fused)
    ids, _ = batch()
    torch.testing.assert_close(fused(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_evaluation_with_labels_has_logits(family):
    plain, fused = make(family).eval(), make(family).eval()
    fuse(fused)
    ids, labels = batch()
    expected, found = plain(input_ids=ids, labels=labels), fused(input_ids=ids, labels=labels)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logits, expected.logits)


def test_signature_stays(family):
    """transformers' Trainer keeps the columns of a data set that `forward` names."""
    model = make(family)
    before = inspect.signature(model.forward)
    fuse(model)
    assert inspect.signature(model.forward) == before


def test_hooks_are_called(family):
    model = make(family)
    fuse(model)
    ids, labels = batch()
    seen = []
    word, decoder = model.get_input_embeddings(), model.get_output_embeddings()
    for module in (word, decoder):
        module.register_forward_hook(lambda module, given, output: seen.append(module))
    assert model(input_ids=ids, labels=labels).logits.shape == (3, 12, 97)
    assert seen == [word, decoder]


def test_adapters_count(family):
    """A module that an adapter has put in a linear layer's or table's place is not passed by."""

    class Adapted(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.weight, self.bias = base.weight, getattr(base, "bias", None)

        def forward(self, x):
            return self.base(x) + 1

    def adapted():
        model = make(family)
        embeddings = dict(model.named_modules())[f"{model.base_model_prefix}.embeddings"]
        name = part(embeddings, "word")
        setattr(embeddings, name, Adapted(getattr(embeddings, name)))
        model.set_output_embeddings(Adapted(model.get_output_embeddings()))
        return model

    plain, fused = adapted(), adapted()
    assert len(fuse(fused)) == 2
    ids, labels = batch()
    expected = plain(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(fused(input_ids=ids, labels=labels).loss, expected)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # 5's new name
def test_gradient_checkpointing_of_a_frozen_model(family):
    """Reentrant checkpoints need the gradient that a hook asks of the word embeddings."""
    model = make(family)
    if not model.supports_gradient_checkpointing:
        pytest.skip(f"{FAMILIES[family]} has no gradient checkpointing")
    fuse(model)
    model.requires_grad_(False)
    *_, trained = (p for n, p in model.named_parameters() if "layer" in n and p.ndim == 2)
    trained.requires_grad_(True)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    ids, labels = batch()
    model(input_ids=ids, labels=labels).loss.backward()
    assert trained.grad.abs().sum() > 0


def test_same_keys_parameters_and_round_trip(family):
    model = make(family)
    ids, labels = batch()
    keys, parameters = list(model.state_dict()), list(map(id, model.parameters()))
    classes = [type(m) for m in model.modules()]
    before = model(input_ids=ids, labels=labels)
    replaced = fuse(model)
    assert list(model.state_dict()) == keys
    assert list(map(id, model.parameters())) == parameters
    assert fuse(model) == []  # a second time changes nothing
    assert unfuse(model) == replaced
    assert [type(m) for m in model.modules()] == classes
    after = model(input_ids=ids, labels=labels)
    assert torch.equal(before.loss, after.loss)
    assert torch.equal(before.logits, after.logits)


def embeddings_pair(family: str):
    """The same embedding module twice, plain and fused."""
    plain, fused = (
        dict(m.named_modules())[f"{m.base_model_prefix}.embeddings"]
        for m in (make(family), make(family))
    )
    fuse(fused)
    return plain, fused


def assert_equal_outputs_and_gradients(plain, fused, *args, **kwargs):
    expected, result = plain(*args, **kwargs), fused(*args, **kwargs)
    assert torch.equal(result, expected)
    weights = torch.randn_like(expected)
    for module, output in ((plain, expected), (fused, result)):
        module.zero_grad()
        (output * weights).sum().backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), fused.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert a.grad.layout == b.grad.layout, name
            assert torch.equal(a.grad.to_dense(), b.grad.to_dense()), name


def counted_from(module, length: int) -> dict[str, int]:
    """What transformers 4 or 5 calls the number of pieces already in the cache."""
    names = inspect.signature(module.forward).parameters
    return {name: length for name in ("cache_length", "past_key_values_length") if name in names}


@pytest.mark.parametrize("family", ["bert", "camembert", "electra", "roberta", "xlm_roberta"])
@pytest.mark.parametrize(
    "call",
    [
        lambda module, ids: {"input_ids": ids, **counted_from(module, 7)},
        lambda module, ids: {"input_ids": ids, "token_type_ids": torch.zeros_like(ids[:1])},
        lambda module, ids: {
            "input_ids": ids,
            "position_ids": torch.arange(12),
            "token_type_ids": torch.zeros_like(ids),
        },
        lambda module, ids: {
            "inputs_embeds": torch.randn(3, 12, module.word_embeddings.embedding_dim)
        },
        lambda module, ids: {
            "input_ids": ids,
            "inputs_embeds": module.word_embeddings(ids).detach() + 1,
        },
    ],
    ids=["cache length", "types 1xT", "positions T", "inputs_embeds", "ids and inputs_embeds"],
)
def test_a_call_that_the_fused_forward_does_not_serve_is_the_originals(family, call):
    plain, fused = embeddings_pair(family)
    ids, _ = batch()
    assert_equal_outputs_and_gradients(plain, fused, **call(plain, ids))


def test_an_unknown_argument_raises_as_without_fuse(family):
    ids, labels = batch()
    for plain, fused, arguments in (
        (*embeddings_pair(family), {"input_ids": ids, "unheard_of": 1}),
        (make(family), make(family), {"input_ids": ids, "labels": labels, "unheard_of": 1}),
    ):
        fuse(fused)
        errors = []
        for module in (plain, fused):
            try:
                module(**arguments)
            except TypeError as error:
                errors.append(str(error))
        # transformers 5 passes what it does not know on to the encoder.
        assert len(errors) in (0, 2)
        assert len(set(errors)) < 2


@pytest.mark.parametrize(
    ("table", "attribute", "value"),
    [
        ("word_embeddings", "max_norm", 0.05),
        ("position_embeddings", "max_norm", 0.05),
        ("word_embeddings", "scale_grad_by_freq", True),
        ("position_embeddings", "scale_grad_by_freq", True),
        ("word_embeddings", "sparse", True),
    ],
)
def test_an_embedding_with_an_option_is_called(family, table, attribute, value):
    plain, fused = embeddings_pair(family)
    name = part(plain, "word") if table == "word_embeddings" else table
    if getattr(plain, name, None) is None:
        pytest.skip(f"{FAMILIES[family]} has no {table}")
    for module in (plain, fused):
        setattr(getattr(module, name), attribute, value)
    ids, _ = batch()
    ids[:, 3] = ids[:, 4]
    assert_equal_outputs_and_gradients(plain, fused, ids)


@pytest.mark.parametrize("moved", ["dropout", "norm", "precision"])
def test_a_part_that_was_changed_counts(family, moved):
    plain, fused = embeddings_pair(family)
    ids, _ = batch()
    for module in (plain, fused):
        norm = part(plain, "norm")
        if moved == "dropout":
            dropout = getattr(module, part(plain, "dropout"))
            dropout.p = 0.5
            dropout.eval()
        elif moved == "norm":
            shape = getattr(module, norm).normalized_shape
            setattr(module, norm, torch.nn.LayerNorm(shape, bias=False, dtype=torch.float64))
        else:
            getattr(module, norm).float()
    if moved == "precision":
        with pytest.raises(RuntimeError) as expected:
            plain(ids)
        with pytest.raises(RuntimeError) as raised:
            fused(ids)
        assert str(raised.value) == str(expected.value)
    else:
        torch.testing.assert_close(fused(ids), plain(ids))


@pytest.mark.parametrize("replace", [False, True], ids=["in place", "replaced"])
@pytest.mark.parametrize("given", [False, True], ids=["counted", "position_ids"])
@pytest.mark.parametrize("family", ["bert", "electra", "distilbert"])
def test_changed_buffers_count(family, given, replace):
    """Positions and types that a user or a checkpoint has set, before and after fuse alike."""
    plain, fused = embeddings_pair(family)
    ids, _ = batch()
    arguments = {"position_ids": torch.randint(0, 40, (3, 12))} if given else {}
    if given and "position_ids" not in inspect.signature(plain.forward).parameters:
        pytest.skip("transformers 4's DistilBERT takes no position_ids")
    unchanged = plain(ids, **arguments)
    for module in (plain, fused):
        changed = {"position_ids": torch.arange(39, -1, -1)[None]}
        if hasattr(module, "token_type_ids"):
            changed["token_type_ids"] = (torch.arange(40) % 3 == 0).long()[None]
        for name, value in changed.items():
            if replace:
                setattr(module, name, value)
            else:
                setattr(module, name, getattr(module, name).clone())
                getattr(module, name).copy_(value)
    expected = plain(ids, **arguments)
    if not given or hasattr(plain, "token_type_ids"):
        assert not torch.allclose(expected, unchanged)
    torch.testing.assert_close(fused(ids, **arguments), expected)


def test_transforms_of_functions_work(family):
    """vmap, and forward-mode derivatives, which the fused operators have not."""
    plain, fused = (module.eval() for module in embeddings_pair(family))
    ids, _ = batch()
    ids[ids == 0] = 1
    results = []
    for module in (plain, fused):
        parameters = {name: p.detach() for name, p in module.named_parameters()}

        def output(values, rows, module=module):
            return torch.func.functional_call(module, values, (rows,))

        mapped = torch.func.vmap(lambda row, f=output, p=parameters: f(p, row[None]))(ids)
        tangent = torch.func.jvp(lambda v, f=output: f(v, ids), (parameters,), (parameters,))[1]
        results.append((mapped, tangent))
    for expected, result in zip(*results, strict=True):
        torch.testing.assert_close(result, expected)


def test_cached_decoding_goes_on_at_the_right_position():
    # float32: transformers 4 makes the mask of a decoder in it.
    model = make("bert", "BertLMHeadModel", is_decoder=True).float().eval()
    ids = torch.randint(5, 97, (2, 12))
    expected = model(ids).logits
    fuse(model)
    head = model(ids[:, :8], use_cache=True)
    cache = {k: v for k, v in head.items() if k in ("cache", "past_key_values")}
    mask = torch.ones_like(ids)
    result = model(ids[:, 8:], attention_mask=mask, use_cache=True, **cache).logits
    torch.testing.assert_close(result, expected[:, 8:])


def test_other_arguments_reach_the_encoder():
    plain, fused = make("bert"), make("bert")
    fuse(fused)
    ids, labels = batch()
    given = {
        "attention_mask": (ids != 0).long(),
        "token_type_ids": torch.randint(0, 2, ids.shape),
        "position_ids": torch.randint(0, 40, (1, 12)),
        "output_hidden_states": True,
    }
    expected = plain(ids, labels=labels, **given)
    found = fused(ids, labels=labels, **given)
    torch.testing.assert_close(found.loss, expected.loss)
    for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("way", ["argument", "configuration"])
def test_a_tuple_holds_the_logits(family, way):
    """Its places are numbers: without the logits, hidden states would stand where they stood."""
    plain, fused = make(family), make(family)
    fuse(fused)
    ids, labels = batch()
    arguments = {"labels": labels, "output_hidden_states": True}
    if way == "argument":
        arguments["return_dict"] = False
    else:
        plain.config.return_dict = fused.config.return_dict = False
    try:
        expected = plain(ids, **arguments)
    except AttributeError as error:  # ModernBERT's in transformers 5
        with pytest.raises(AttributeError, match=str(error)):
            fused(ids, **arguments)
        return
    torch.testing.assert_close(fused(ids, **arguments), expected)


def test_a_hook_inside_the_head_sees_every_row(family):
    model = make(family)
    fuse(model)
    ids, labels = batch()
    shapes = []
    decoder = model.get_output_embeddings()
    norms = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.LayerNorm) and not name.startswith(model.base_model_prefix)
    ]
    head = norms[0] if norms else decoder  # Funnel's head is its decoder
    head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    assert model(input_ids=ids, labels=labels).logits is not None
    assert shapes == [(3, 12, decoder.in_features if norms else decoder.out_features)]


def test_a_hook_on_all_modules_is_called(family):
    model = make(family)
    fuse(model)
    ids, labels = batch()
    called = set()
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: called.add(module)
    )
    try:
        model(input_ids=ids, labels=labels)
    finally:
        handle.remove()
    assert {model.get_input_embeddings(), model.get_output_embeddings()} <= called


def test_an_option_of_the_loss_counts():
    plain, fused = make("distilbert"), make("distilbert")
    fuse(fused)
    ids, labels = batch()
    before = plain(ids, labels=labels).loss
    for model in (plain, fused):
        model.mlm_loss_fct = torch.nn.CrossEntropyLoss(label_smoothing=0.3)
    expected = plain(ids, labels=labels).loss
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(fused(ids, labels=labels).loss, expected)


def test_embeddings_from_the_caller_have_the_fused_loss(family):
    plain, fused = make(family), make(family)
    fuse(fused)
    ids, labels = batch()
    inputs = plain.get_input_embeddings()(ids).detach()
    result = fused(inputs_embeds=inputs, labels=labels)
    assert "logits" not in result
    torch.testing.assert_close(result.loss, plain(inputs_embeds=inputs, labels=labels).loss)


def test_keep_logits():
    model = make("bert")
    assert fuse(model, keep_logits=True) == ["bert.embeddings"]
    ids, labels = batch()
    assert model(input_ids=ids, labels=labels).logits.shape == (3, 12, 97)


def test_saved_model_is_plain(tmp_path):
    model = make("bert")
    fuse(model)
    model.save_pretrained(tmp_path)
    opened = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(opened) is transformers.BertForMaskedLM
    assert opened.config.architectures == ["BertForMaskedLM"]
    for key, value in model.state_dict().items():
        assert torch.equal(value, opened.state_dict()[key]), key


def test_copies_stay_fused():
    model = make("bert")
    fuse(model)
    ids, labels = batch()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(input_ids=ids, labels=labels).loss, model(ids, labels=labels).loss)
        assert unfuse(twin) == ["", "bert.embeddings"]


def test_the_example_of_the_page_runs(root):
    page = (root / "docs" / "fuse.md").read_text(encoding="utf-8")
    ids, labels = batch()
    names = {"input_ids": ids, "labels": labels}
    (example,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    exec(example, names)
    assert type(names["model"]) is transformers.BertForMaskedLM
    assert names["model"].get_input_embeddings().weight.grad.any()


def test_every_model_for_masked_pieces_is_served_or_refused_with_a_reason():
    """All that transformers' AutoModelForMaskedLM knows, in either version."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as NAMES

    served = {key.rsplit(".", 1)[1] for key in LANGUAGE_MODELS}
    served.add("ModernVBertForMaskedLM")  # contains a ModernBERT
    families = {key.split(".")[0] for key in EMBEDDINGS}
    assert not families & REFUSED.keys()
    assert families == {key.split(".")[0] for key in LANGUAGE_MODELS}
    unknown = []
    for name in NAMES.values():
        if isinstance(name, str) and name not in served and hasattr(transformers, name):
            family = getattr(transformers, name).__module__.split(".")[2]
            unknown += [name] if family not in REFUSED else []
    assert not unknown


def test_the_page_has_every_family(root):
    """docs/fuse.md: a row for each family that is served, a reason for each that is not."""
    page = (root / "docs" / "fuse.md").read_text(encoding="utf-8")
    for key in LANGUAGE_MODELS:
        name = key.rsplit(".", 1)[1]
        assert name in page or re.sub("For(MaskedLM|CausalLM)$", "", name) in page, name
    lines = page.splitlines()
    for family, reason in REFUSED.items():
        start = "Mega, Nezha and QDQBERT: " if family == "deprecated" else ""
        assert f"- {start}{reason}" in lines, reason


REFUSED_MODELS = {
    "big_bird": ("BigBird", {"attention_type": "original_full"}),
    "deberta": ("Deberta", {}),
    "ernie": ("Ernie", {"use_task_id": True}),
    "esm": ("Esm", {"pad_token_id": 1, "mask_token_id": 4}),
    "fnet": ("FNet", {}),
    "ibert": ("IBert", {}),
    "layoutlm": ("LayoutLM", {}),
    "longformer": ("Longformer", {"attention_window": 8}),
    "luke": ("Luke", {"entity_vocab_size": 7, "entity_emb_size": 8}),
    "megatron_bert": ("MegatronBert", {}),
    "mobilebert": ("MobileBert", {}),
    "roc_bert": ("RoCBert", {}),
    "splinter": ("Splinter", {}),
    "tapas": ("Tapas", {}),
    "xlm_roberta_xl": ("XLMRobertaXL", {}),
}


@pytest.mark.parametrize("family", REFUSED_MODELS)
def test_a_model_that_differs_is_refused_with_the_reason(family):
    name, options = REFUSED_MODELS[family]
    model = getattr(transformers, f"{name}Model")(
        getattr(transformers, f"{name}Config")(**SMALL | options)
    )
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(InputError, match=re.escape(f"{name}Model ({REFUSED[family]}); supported")):
        fuse(model)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_mra_is_served():
    """Its attention, which needs a GPU, takes rows of whole blocks of 32 pieces."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(transformers.MraForMaskedLM(transformers.MraConfig(**SMALL)))
    plain, fused = models
    assert fuse(fused) == ["", "mra.embeddings"]
    ids = torch.randint(5, 97, (2, 32))
    labels = torch.where(ids % 5 == 0, ids, -100)
    # (On a CPU its attention is zeros of float32.)
    assert_same_loss_and_gradients(plain.train(), fused.train(), 1e-4, input_ids=ids, labels=labels)


def test_what_is_no_model_is_refused():
    for model, shown in [
        (None, r"None \(NoneType\)"),
        ("bert", r"'bert' \(str\)"),
        (transformers.BertModel, r"BertModel \(type\)"),
    ]:
        for function in (fuse, unfuse):
            message = f"^{function.__name__} needs a model of transformers, got {shown}"
            with pytest.raises(InputError, match=message):
                function(model)
    model = make("bert")
    with pytest.raises(InputError, match="keep_logits is 'no', expected True or False"):
        fuse(model, keep_logits="no")
    assert unfuse(model) == []


def test_unknown_model_is_refused():
    with pytest.raises(
        InputError,
        match="fuse does not support Linear; supported: AlbertEmbeddings, AlbertForMaskedLM",
    ):
        fuse(torch.nn.Linear(2, 2))


# ---- transformers' Trainer ---------------------------------------------------------------------


def trained(family: str, fused: bool, folder, kind=None, **options):
    """(losses logged, evaluation, weights) after three steps of the Trainer."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    model = make(family)
    if options.get("bf16"):
        model.float()
    if fused:
        assert fuse(model)
    torch.manual_seed(1)
    rows = []
    for _ in range(8):
        ids, labels = batch()
        rows += [{"input_ids": i, "labels": y} for i, y in zip(ids[:1], labels[:1], strict=True)]
    rows[0]["labels"][:] = -100  # texts with different numbers of labels
    rows[0]["labels"][1] = 7

    def accuracy(evaluated):
        kept = evaluated.label_ids != -100
        right = evaluated.predictions.argmax(-1) == evaluated.label_ids
        return {"accuracy": float(right[kept].mean())}

    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, per_device_train_batch_size=2, max_steps=3, learning_rate=0.01,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, seed=0, **options,
    )  # fmt: skip
    kind = kind or transformers.Trainer
    trainer = kind(
        model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=accuracy
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, trainer.evaluate(), model.state_dict()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("bert", {}),
        ("bert", {"label_smoothing_factor": 0.1}),
        ("bert", {"gradient_accumulation_steps": 2}),
        ("modernbert", {"gradient_accumulation_steps": 2}),
        ("bert", {"bf16": True}),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x) or "default",
)
def test_the_trainer_trains_as_without_fuse(family, options, tmp_path):
    """Losses, token accuracy, weights; in bfloat16 up to its rounding."""
    (losses, evaluation, weights), (plain_losses, plain_evaluation, plain_weights) = (
        trained(family, fused, tmp_path, **options) for fused in (True, False)
    )
    assert len(losses) == 3
    error = 2**-6 if "bf16" in options else 1e-4
    assert losses == pytest.approx(plain_losses, rel=error)
    assert evaluation["eval_loss"] == pytest.approx(plain_evaluation["eval_loss"], rel=error)
    if "bf16" in options:
        return  # AdamW's first steps are as large for a gradient of 1e-9 as for one of 1
    assert evaluation["eval_accuracy"] == plain_evaluation["eval_accuracy"]
    for name, value in weights.items():
        if "key.bias" not in name:  # whose gradient is nothing but rounding
            torch.testing.assert_close(value, plain_weights[name], rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_loss_computed_from_logits_meets_the_sentence(tmp_path):
    class FromLogits(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            outputs = model(**inputs)
            loss = torch.nn.functional.cross_entropy(outputs.logits.mT, inputs["labels"])
            return (loss, outputs) if return_outputs else loss

    with pytest.raises(AttributeError, match=r"call fuse\(model, keep_logits=True\)"):
        trained("bert", True, tmp_path, FromLogits)


# ---- a whole script ----------------------------------------------------------------------------


def script(root, name):
    """A script of docs/examples as a module."""
    path = root / "docs" / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_script_changes_in_two_imports_and_a_fuse(root):
    before, after = (
        (root / "docs" / "examples" / f"pretrain_{name}.py").read_text().splitlines()
        for name in ("transformers", "mvbert")
    )
    changed = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    assert sorted(changed) == [
        "+     fuse(model)",
        "+ from mvbert import MaskingCollator as DataCollatorForLanguageModeling",
        "+ from mvbert import fuse, WordPieceTokenizer as BertTokenizerFast",
        "- from transformers import BertTokenizerFast",
        "- from transformers import DataCollatorForLanguageModeling",
    ]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_both_scripts_run_with_equal_ids_and_losses(root, tmp_path, monkeypatch):
    """Ids with transformers' tokenizer; losses, fused or not, on the same masked rows."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    words = ["the", "a", "river", "ring", "##s", "##ing", "water", "is", "in", "big", "."]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join(special + words) + "\n")
    draw = random.Random(0)
    texts = [
        " ".join(
            draw.choices(["the", "Rivers", "a", "ringing", "is", "in", "big", "dog", "."], k=k)
        )
        for k in range(4, 36)
    ]
    shape = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    options = {"steps": 10, "batch": 8, "length": 24}  # more than two passes
    before = script(root, "pretrain_transformers").pretrain(tmp_path, texts, **options, **shape)
    ours = script(root, "pretrain_mvbert")
    after = ours.pretrain(tmp_path, texts, **options, **shape)
    assert after["rows"] == before["rows"]
    assert max(map(len, after["rows"])) == 24
    for report in (before, after):
        assert len(report["losses"]) == 10
        assert report["losses"] == pytest.approx([math.log(16)] * 10, abs=0.7)
        assert report["pieces_s"] > 0
    monkeypatch.setattr(ours, "fuse", lambda model: [])
    unfused = ours.pretrain(tmp_path, texts, **options, **shape)
    assert unfused["losses"] == pytest.approx(after["losses"], rel=1e-4)
