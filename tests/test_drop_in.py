"""fuse and unfuse on tiny random models: same outputs, same gradients, same keys, round trip."""

import copy
import inspect
import pickle

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")
import transformers

from mvbert import InputError, fuse, unfuse

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


def make(family: str):
    torch.manual_seed(0)
    if family == "bert":
        model = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))
    elif family == "electra":
        config = transformers.ElectraConfig(**SMALL, embedding_size=16)
        model = transformers.ElectraForMaskedLM(config)
    elif family == "camembert":
        model = transformers.CamembertForMaskedLM(transformers.CamembertConfig(**SMALL))
    elif family == "xlm_roberta":
        model = transformers.XLMRobertaForMaskedLM(transformers.XLMRobertaConfig(**SMALL))
    elif family == "roberta":
        model = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SMALL))
    else:
        config = transformers.DistilBertConfig(
            vocab_size=97, dim=32, n_layers=2, n_heads=2, hidden_dim=48,
            max_position_embeddings=40, dropout=0.0, attention_dropout=0.0,
        )  # fmt: skip
        model = transformers.DistilBertForMaskedLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()  # zeros would hide a forgotten bias
    return model.double().train()  # in float64 no processor rounds what a test would see


def batch():
    ids = torch.randint(5, 97, (3, 12))
    ids[1, 9:] = 1  # RoBERTa's padding
    ids[2, 10:] = 0  # BERT's padding
    labels = torch.full_like(ids, -100)
    labels[:, 2:5] = torch.randint(0, 97, (3, 3))
    return ids, labels


@pytest.fixture(params=["bert", "camembert", "distilbert", "electra", "roberta", "xlm_roberta"])
def family(request):
    return request.param


def test_same_loss_and_gradients(family):
    plain, fused = make(family), make(family)
    replaced = fuse(fused)
    assert len(replaced) == 2
    ids, labels = batch()
    expected = plain(input_ids=ids, labels=labels)
    found = fused(input_ids=ids, labels=labels)
    torch.testing.assert_close(found.loss, expected.loss)
    assert found.logits is None
    expected.loss.backward()
    found.loss.backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), fused.named_parameters(), strict=True):
        if a.grad is None:
            assert b.grad is None or (b.grad == 0).all(), name
            continue
        torch.testing.assert_close(
            b.grad, a.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


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
        embeddings.word_embeddings = Adapted(embeddings.word_embeddings)
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
    fuse(model)
    model.requires_grad_(False)
    trained = next(p for n, p in model.named_parameters() if "layer.1" in n)
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


def test_positions_go_on_behind_what_was_read_before():
    plain, fused = (make("bert").bert.embeddings.eval() for _ in range(2))
    fuse(fused)
    ids, _ = batch()
    expected = plain(input_ids=ids, past_key_values_length=7)
    torch.testing.assert_close(fused(input_ids=ids, past_key_values_length=7), expected)
    assert not torch.allclose(fused(input_ids=ids), expected)


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
    as_tuple = fused(ids, labels=labels, return_dict=False)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[0], plain(ids, labels=labels).loss)


def test_embeddings_given_by_the_caller():
    plain, fused = make("bert").eval(), make("bert").eval()
    fuse(fused)
    inputs = torch.randn(2, 7, 32)
    torch.testing.assert_close(
        fused(inputs_embeds=inputs).logits, plain(inputs_embeds=inputs).logits
    )


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


def test_unknown_model_is_refused():
    with pytest.raises(
        InputError, match="fuse knows no layer of Linear: it replaces BertEmbeddings"
    ):
        fuse(torch.nn.Linear(2, 2))
