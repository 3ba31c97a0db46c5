"""Student layers started at the teacher's: exact where the map is the identity."""

import re
from dataclasses import replace

import pytest
import torch

from mvbert.config import ModelConfig
from mvbert.distillation import reader
from mvbert.errors import InputError
from mvbert.model import MaskedLM, MixedMaskedLM
from mvbert.projected_start import project_start

TEACHER = ModelConfig(40, 24, 4, 4, 48, max_position_embeddings=12)


def teacher_of(E: int) -> MixedMaskedLM:
    model = MixedMaskedLM(TEACHER, 30, E)
    model.init_weights(3)
    with torch.no_grad():
        generator = torch.manual_seed(4)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def student_of(**change) -> MaskedLM:
    model = MaskedLM(replace(TEACHER, vocab_size=30, **change))
    model.init_weights(5)
    return model


def start(student: MaskedLM, teacher: MixedMaskedLM) -> None:
    with torch.no_grad():
        student.embeddings.word.weight.copy_(teacher.student.table)
        student.head.bias.copy_(teacher.student.bias)
    project_start(student, teacher)


def test_under_the_identity_the_student_is_the_teacher():
    teacher, student = teacher_of(24), student_of()
    with torch.no_grad():
        teacher.student.projection.weight.copy_(torch.eye(24))
    start(student, teacher)
    ids = torch.randint(0, 30, (2, 9), generator=torch.manual_seed(0))
    model = reader(teacher).eval()
    student.eval()
    with torch.no_grad():
        # What the affine map adds to every word is in the student's positions.
        expected = model.encode(ids, ids % 2)
        found = student.encode(ids, ids % 2)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        wanted = model.logits(model.head(expected[0])).log_softmax(-1)
        got = student.logits(student.head(found[0])).log_softmax(-1)
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_every_second_layer_and_the_strongest_heads_and_neurons_are_taken():
    teacher = teacher_of(12)
    student = student_of(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=1, intermediate_size=20
    )
    with torch.no_grad():
        W = torch.linalg.qr(torch.randn(24, 12))[0]
        teacher.student.projection.weight.copy_(W)
        source = teacher.encoder.layers[1]
        source.qkv.weight.view(3, 4, 6, 24)[2, [0, 2]] *= 0.01  # heads 1 and 3 are left
        source.intermediate.weight[:28] *= 0.01  # neurons 28 to 47 are left
    start(student, teacher)
    layer = student.encoder.layers[0]
    x = torch.randn(5, 12)
    theirs = source.qkv(x @ W.T).view(5, 3, 4, 6)[:, :, [1, 3]]
    ours = layer.qkv(x).view(5, 3, 2, 6)
    torch.testing.assert_close(ours[:, 1:], theirs[:, 1:], atol=1e-5, rtol=1e-4)
    # A merged head's scores are the mean of its parts', each over its own root.
    score = (ours[:, 0] * ours[:, 1]).sum((1, 2)) / 12**0.5
    parts = (theirs[:, 0] * theirs[:, 1]).sum(2) / 6**0.5
    torch.testing.assert_close(score, parts.mean(1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        layer.intermediate(x), source.intermediate(x @ W.T)[:, 28:], atol=1e-5, rtol=1e-4
    )
    y = torch.randn(5, 20)
    wide = torch.cat([torch.zeros(5, 28), y], 1)
    torch.testing.assert_close(layer.output(y), source.output(wide) @ W, atol=1e-5, rtol=1e-4)
    last = student.encoder.layers[1].output.bias
    torch.testing.assert_close(
        last, teacher.encoder.layers[3].output.bias @ W, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("E", "change", "part"),
    [
        (12, {}, "a student 24 wide cannot start from a Stage I of width 12"),
        (24, {"num_attention_heads": 8}, "student heads of 3 cannot be made of teacher heads of 6"),
        (24, {"intermediate_size": 64}, "feed-forward 64 is wider than the teacher's 48"),
    ],
)
def test_what_cannot_be_projected_is_named(E, change, part):
    with pytest.raises(InputError, match=re.escape(part)):
        project_start(student_of(**change), teacher_of(E))
