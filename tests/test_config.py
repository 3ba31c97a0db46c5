"""Configuration: TOML in, clear errors out."""

import pytest
import torch

from mvbert.config import DistillConfig, ModelConfig, Stage1Config, Stage2Config, student_shape
from mvbert.errors import InputError
from mvbert.model.masked_lm import MaskedLM
from mvbert.toml import from_dict, load_toml, to_dict


def test_the_papers_two_shapes_have_the_papers_parameter_counts():
    assert student_shape("6x256", 4928).encoder_parameters == 6_198_016
    assert student_shape("12x256", 4928).encoder_parameters == 10_936_576


def test_a_config_survives_the_way_through_plain_data():
    config = DistillConfig(arms={"a": {"lr": 0.1, "distill": ["hidden"]}}, sentences=("[MASK]",))
    assert from_dict(DistillConfig, to_dict(config), "x") == config
    assert config.arm("a") == Stage2Config(lr=0.1, distill=("hidden",))


def test_toml_is_read_with_types(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('out = "o"\n[stage1]\nlr = 1\nsteps = 7\n[arms.x]\nstart = "random"\n')
    config = load_toml(DistillConfig, path)
    assert config.stage1 == Stage1Config(lr=1.0, steps=7)
    assert config.arm("x").start == "random"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[stage1]\nstepz = 3\n", "stage1: unknown key 'stepz'"),
        ("[stage1]\nsteps = 1.5\n", "stage1.steps: must be int"),
        ("[stage1]\nsteps = true\n", "stage1.steps: must be int"),
        ("[stage1]\nsteps = 0\n", "steps must be at least 1"),
        ("[stage1]\nstudent_prob = 1.5\n", "student_prob must lie in [0, 1]"),
        ("[stage1]\nlr = nan\n", "must be finite"),
        ("[row]\nlength = 1\n", "row length must lie in [8, 65535]"),
        ('[stage2]\nstart = "paper"\n', "start must be stage1, random or the folder"),
        ('[stage2]\ndistill = ["logit"]\n', "distill must list logits, hidden, relations"),
        ('[stage2]\ndistill = ["hidden", "hidden"]\n', "lists a loss twice: hidden, hidden"),
        ("[stage2]\nhidden_layers = [2, 2]\n", "hidden_layers must be different"),
        ("[stage2]\nrelations_layer = -1\n", "relations_layer must not be negative"),
        ("[stage2]\nrelation_heads = 0\n", "relation_heads must be at least 1"),
        ('[stage2]\npositions = "some"\n', "must be one of sinusoidal, random"),
        ("[stage2]\nrows = 10\nmicro_rows = 3\n", "not a multiple of micro_rows"),
        ('[stage2]\nshape = "6x128"\n', "set stage1.embedding_size to 128"),
        ('[arms.a]\nshape = "6x250"\n', "student shape must be"),
        ('sentences = ["a"]\n', "no [MASK] in the sentence 'a'"),
        ("stage2 = 3\n", "must be a table"),
        ('[arms."a/b"]\n', "an arm's name"),
        ("[arms.a]\nnope = 1\n", "arms.a: unknown key 'nope'"),
        ("a = [", "not valid TOML"),
    ],
)
def test_wrong_toml_is_named(tmp_path, text, part):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load_toml(DistillConfig, path)
    assert part in str(error.value)
    assert str(path) in str(error.value) or "arms" in part


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nope.toml: no such file"):
        load_toml(DistillConfig, tmp_path / "nope.toml")


@pytest.mark.parametrize("name", ["6x250", "0x256", "6", "x256", "6x0", "6x256x2"])
def test_a_wrong_shape_is_named(name):
    with pytest.raises(InputError, match="student shape must be"):
        student_shape(name, 100)


def test_heads_must_divide_the_hidden_size():
    with pytest.raises(InputError, match="not a multiple"):
        ModelConfig(10, 10, 1, 3, 10)


def test_the_sizes_in_the_docs_are_those_of_the_models(root):
    table = (root / "docs" / "sizes.md").read_text().split("<!-- sizes -->")[1].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table if "x" in line[:8]]
    assert {"6x256", "12x256", "3x256", "6x128", "12x128"} <= {row[0] for row in rows}
    for shape, vocabulary, parameters, share, wide, narrow in rows:
        config = student_shape(shape, int(vocabulary.replace(",", "")))
        assert f"{config.encoder_parameters:,}" == parameters
        assert f"{config.vocab_size * config.hidden_size / config.encoder_parameters:.0%}" == share
        with torch.device("meta"):
            total = sum(p.numel() for p in MaskedLM(config).parameters())
        assert (f"{4 * total:,}", f"{total:,}") == (wide, narrow)
