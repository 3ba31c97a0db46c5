"""The losses against a teacher: their definitions, their gradients, and what the teacher reads."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mvbert.config import ModelConfig, Stage2Config
from mvbert.errors import InputError
from mvbert.model.encoder import Taps
from mvbert.model.masked_lm import DeviceBatch, MaskedLM, MixedMaskedLM
from mvbert.training import distillation
from mvbert.training.distillation import Distillation, Teacher

CPU = torch.device("cpu")
V_T, V_S, E = 50, 30, 16
TEACHER = ModelConfig(V_T, 24, 4, 2, 48, max_position_embeddings=12)
STUDENT = ModelConfig(
    V_S, 16, 2, 1, 32, 12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
)
ALL = Stage2Config(distill=("logits", "hidden", "relations", "sentence"), relation_heads=4, rows=3)


@pytest.fixture
def mixed() -> MixedMaskedLM:
    model = MixedMaskedLM(TEACHER, V_S, E)
    model.init_weights(3)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and spread that a test can see
            parameter.add_(torch.randn(parameter.shape, generator=torch.manual_seed(4)) * 0.3)
    return model.double()


@pytest.fixture
def student() -> MaskedLM:
    model = MaskedLM(STUDENT)
    model.init_weights(5)
    return model.double()


@pytest.fixture
def batch() -> DeviceBatch:
    generator = torch.manual_seed(6)
    ids = torch.randint(0, V_S, (3, 10), generator=generator, dtype=torch.int32)
    return DeviceBatch(
        ids,
        (torch.arange(10) > 6).int().expand(3, 10).contiguous(),
        torch.tensor([1, 4, 12, 17, 25, 0]),
        torch.tensor([3, 9, 29, 0, 11, -100]),
    )


def losses(config, student, mixed, batch, share=1.0):
    torch.manual_seed(0)
    part = Distillation(config, student.config, Teacher(mixed, CPU, None)).double()
    part.teacher.model.double()
    taps = part.student_taps()
    hidden = student.encode(batch.input_ids, batch.token_type_ids, taps=taps)
    masked = student.masked_hidden(hidden, batch.masked_index)
    found, sums = part(batch, int((batch.labels >= 0).sum()), share, student, hidden, masked, taps)
    return part, found, sums, hidden, taps


# ---- the teacher ----------------------------------------------------------------------------


def test_the_reader_is_the_mixed_teacher_on_student_pieces(mixed, batch):
    model = distillation.reader(mixed).double().eval()
    mixed.eval()
    with torch.no_grad():
        hidden = mixed.encode(batch.input_ids + V_T, batch.token_type_ids)
        masked = mixed.masked_hidden(hidden, batch.masked_index)
        ours = model.encode(batch.input_ids, batch.token_type_ids)
        torch.testing.assert_close(ours, hidden)
        torch.testing.assert_close(
            model.logits(model.masked_hidden(ours, batch.masked_index)),
            mixed.student_logits(masked),
        )


def test_the_teacher_is_rounded_once_to_what_autocast_would_give(mixed, batch):
    plain = distillation.reader(mixed).eval()
    teacher = Teacher(mixed, CPU, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = plain.encode(batch.input_ids, batch.token_type_ids)
        found = teacher.read(batch, Taps())
    assert teacher.model.encoder.layers[0].qkv.weight.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_the_teacher_measures_a_pass_when_asked_and_not_in_reading(mixed, batch, monkeypatch):
    teacher = Teacher(mixed, CPU, None)
    encode, passes = teacher.model.encode, []
    monkeypatch.setattr(
        teacher.model, "encode", lambda *args, **kwargs: passes.append(1) or encode(*args, **kwargs)
    )
    teacher.read(batch, Taps())
    assert len(passes) == 1
    assert teacher.microseconds is None
    seconds = iter([0, 5, 10, 13, 20, 29])  # the second of three passes is the best
    teacher.measure(batch, Taps(), clock=lambda: next(seconds))
    assert len(passes) == 4
    assert teacher.microseconds == 3e6 / 30


def test_layers_that_no_loss_needs_are_not_run(mixed, batch):
    teacher = Teacher(mixed, CPU, None)
    taps = Taps(hidden=[0, 2], qkv=[3], last=False)
    ran = []
    for number, layer in enumerate(teacher.model.encoder.layers, 1):
        layer.register_forward_hook(lambda *_, n=number: ran.append(n))
    teacher.read(batch, taps)
    assert ran == [1, 2, 3]
    whole = Taps(hidden=[2, 4], qkv=[1, 3])
    last = teacher.model.encode(batch.input_ids, batch.token_type_ids, taps=whole)
    assert torch.equal(whole.hidden[4], last)
    assert torch.equal(whole.hidden[2], taps.hidden[2])
    assert torch.equal(whole.qkv[3], taps.qkv[3])
    embedded = teacher.model.embeddings(batch.input_ids, batch.token_type_ids)
    assert torch.equal(taps.hidden[0], embedded)
    assert torch.equal(whole.qkv[1], teacher.model.encoder.layers[0].qkv(embedded))


# ---- the losses are what they say -----------------------------------------------------------


def test_the_logits_loss_is_the_divergence_at_the_masked_pieces(mixed, student, batch):
    config = replace(ALL, distill=("logits",), temperature=2.0)
    _, found, sums, hidden, _ = losses(config, student, mixed, batch)
    mixed.eval()
    theirs = mixed.encode(batch.input_ids + V_T, batch.token_type_ids)
    q = F.log_softmax(mixed.student_logits(mixed.masked_hidden(theirs, batch.masked_index)) / 2, 1)
    p = F.log_softmax(student.logits(student.masked_hidden(hidden, batch.masked_index)) / 2, 1)
    expected = 4 * (q.exp() * (q - p)).sum(1)[batch.labels >= 0]
    torch.testing.assert_close(found["logits"], expected.mean())
    torch.testing.assert_close(sums["logits_sum"], expected.sum())
    assert sums["logits_count"] == 5


def test_the_hidden_loss_matches_layers_by_relative_depth(mixed, student, batch, assert_rounded):
    config = replace(ALL, distill=("hidden",), hidden_layers=(0, 1, 2))
    part, found, _, _, taps = losses(config, student, mixed, batch)
    assert part.pairs == {0: 0, 1: 2, 2: 4}
    theirs = Taps(hidden=[0, 2, 4])
    reader = distillation.reader(mixed).double().eval()
    reader.encode(batch.input_ids, batch.token_type_ids, taps=theirs)
    errors = []
    for own, other in part.pairs.items():
        x = theirs.hidden[other]
        target = (x - x.mean(-1, keepdim=True)) / x.var(-1, correction=0, keepdim=True).sqrt()
        errors.append(((part.maps[str(own)](taps.hidden[own]) - target) ** 2).mean())
    # Normalised and summed in float32: 3 rows of 10 pieces of 24.
    assert_rounded(found["hidden"], torch.stack(errors).mean(), longest_sum=720)


def test_the_sentence_loss_is_of_the_pooler_and_the_mean_of_the_teacher_states(
    mixed, student, batch, assert_rounded
):
    config = replace(ALL, distill=("sentence",))
    part, found, sums, hidden, _ = losses(config, student, mixed, batch)
    reader = distillation.reader(mixed).double().eval()
    x = reader.encode(batch.input_ids, batch.token_type_ids).mean(1)
    target = (x - x.mean(-1, keepdim=True)) / x.var(-1, correction=0, keepdim=True).sqrt()
    pooled = torch.tanh(F.linear(hidden[:, 0], student.pooler.weight, student.pooler.bias))
    expected = ((part.maps["sentence"](pooled) - target) ** 2).mean()
    # Averaged over 10 pieces, normalised and summed in float32: 3 rows of 24.
    assert_rounded(found["sentence"], expected, longest_sum=720)
    assert torch.equal(sums["sentence_sum"], found["sentence"].detach())


@pytest.mark.parametrize(
    ("layers", "chosen", "expected"),
    [(6, 0, 6), (12, 0, 12), (24, 0, 21), (24, 24, 24), (24, 2, 2)],
)
def test_the_layer_of_relations(layers, chosen, expected):
    shape = replace(TEACHER, num_hidden_layers=layers)
    assert distillation.relations_layer(chosen, shape) == expected


# ---- what takes gradients -------------------------------------------------------------------


def test_every_loss_reaches_the_student_and_none_the_teacher(mixed, student, batch):
    part, found, _, _, _ = losses(ALL, student, mixed, batch)
    assert set(found) == {"logits", "hidden", "relations", "sentence"}
    maps = {f"maps.{name}.{which}" for name in ("2", "sentence") for which in ("weight", "bias")}
    assert set(dict(part.named_parameters())) == maps
    for name, loss in found.items():
        student.zero_grad(set_to_none=True)
        loss.backward(retain_graph=True)
        grads = {n for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
        assert "encoder.layers.0.qkv.weight" in grads, name
        assert ("head.dense.weight" in grads) == (name == "logits"), name
        assert ("pooler.weight" in grads) == (name == "sentence"), name
    assert all(p.grad is None for p in part.teacher.model.parameters())
    assert all(p.grad is not None for p in part.parameters())


def test_a_part_of_the_rows_counts_for_its_share(mixed, student, batch):
    whole = losses(ALL, student, mixed, batch)[1]
    half = losses(ALL, student, mixed, batch, share=0.5)[1]
    for name in ("hidden", "relations", "sentence"):
        torch.testing.assert_close(half[name], whole[name] / 2)


# ---- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"relation_heads": 5}, "relation_heads 5 must divide"),
        ({"relations_layer": 5}, "the teacher has 4 layers, got 5"),
        ({"hidden_layers": (3,)}, "the student has 2 layers, got 3"),
    ],
)
def test_what_does_not_fit_is_named(mixed, student, change, part):
    with pytest.raises(InputError, match=part):
        Distillation(replace(ALL, **change), student.config, Teacher(mixed, CPU, None))


def test_maps_are_drawn_by_the_seed(mixed, student):
    weights = [
        Distillation(replace(ALL, seed=seed), student.config, Teacher(mixed, CPU, None))
        .maps["2"]
        .weight
        for seed in (0, 0, 1)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
