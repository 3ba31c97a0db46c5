"""Folders that transformers opens: same logits, same names, and clear errors."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mvbert.config import ModelConfig
from mvbert.errors import InputError
from mvbert.files import read_json_object, write_json
from mvbert.model import huggingface
from mvbert.model.masked_lm import MaskedLM


@pytest.fixture
def model(student_vocab) -> MaskedLM:
    shape = ModelConfig(student_vocab.size, 32, 2, 2, 64, max_position_embeddings=24)
    # Settings that matter to the result, and that are no defaults.
    shape = replace(shape, layer_norm_eps=0.1, hidden_dropout_prob=0.3)
    model = MaskedLM(shape).eval()
    model.init_weights(3)
    with torch.no_grad():  # biases and norms away from 0 and 1, so that a swap shows
        for i, parameter in enumerate(model.parameters()):
            noise = torch.Generator().manual_seed(i)
            parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.1)
    return model


@pytest.fixture
def folder(tmp_path, model, student_vocab):
    path = tmp_path / "model"
    path.mkdir()
    huggingface.write_model(path, model, student_vocab, "# card\n")
    return path


def test_names_go_there_and_back(model):
    state = dict(model.named_parameters())
    back = huggingface.from_hugging_face(huggingface.to_hugging_face(state), state)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_a_folder_loads_to_the_same_model(folder, model):
    loaded, missing = huggingface.load_masked_lm(folder, complete=True)
    assert missing == []
    assert loaded.config.hidden_dropout_prob == 0.1  # for fine-tuning: the run's was its own
    for (name, a), b in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_transformers_gives_the_same_logits_and_hidden_states(folder, model, student_vocab):
    transformers = pytest.importorskip("transformers")
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, student_vocab.size, (2, 9)))
    types = torch.tensor([[0] * 5 + [1] * 4, [0] * 9])
    # In float64 on both sides: how a processor adds does not matter.
    model = model.double()
    hf = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval().double()
    with torch.no_grad():
        theirs = hf(input_ids=ids, token_type_ids=types).logits
        hidden = model.encode(ids, types)
        ours = model.logits(model.head(hidden))
    torch.testing.assert_close(ours, theirs)

    bare, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        out = bare.eval().double()(input_ids=ids, token_type_ids=types)
        pooled = torch.tanh(model.pooler(hidden[:, 0]))
    torch.testing.assert_close(out.last_hidden_state, hidden)
    torch.testing.assert_close(out.pooler_output, pooled)
    assert sum(p.numel() for p in bare.parameters()) == model.config.encoder_parameters


def test_transformers_gives_the_same_tokens(folder, student_vocab, text):
    transformers = pytest.importorskip("transformers")
    from mvbert.text.wordpiece import basic_split, wordpiece

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = student_vocab.ids
    expected = [ids[p] for w in basic_split(text) for p in wordpiece(w, ids)]
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
    assert tokenizer.mask_token_id == student_vocab.mask
    assert tokenizer.model_max_length == 512


def rewrite(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_old_names_and_a_bare_encoder_load(folder, model):
    def age(tensors):
        for name in list(tensors):
            value = tensors.pop(name)
            if name.startswith("cls.") or "pooler" in name:
                continue
            name = name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma")
            tensors[name.replace("LayerNorm.bias", "LayerNorm.beta")] = value

    rewrite(folder, age)
    loaded, missing = huggingface.load_masked_lm(folder)
    assert {name.split(".")[0] for name in missing} == {"head", "pooler"}
    assert torch.equal(loaded.encoder.layers[1].qkv.weight, model.encoder.layers[1].qkv.weight)
    assert torch.equal(loaded.embeddings.norm.weight, model.embeddings.norm.weight)


def test_weights_in_several_files_load(folder, model):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors").unlink()
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    loaded, missing = huggingface.load_masked_lm(folder, complete=True)
    assert missing == []
    assert torch.equal(loaded.head.bias, model.head.bias)
    before = huggingface.weights_id(folder)
    save_file({name: tensors[name] + 1 for name in part}, folder / file)
    assert huggingface.weights_id(folder) != before  # of the last file, too

    write_json(folder / "model.safetensors.index.json", {"weight_map": {"x": "../x.safetensors"}})
    with pytest.raises(InputError, match="outside its folder"):
        huggingface.load_masked_lm(folder)


def edit_config(folder, **changes):
    data = read_json_object(folder / "config.json")
    data.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in data.items() if v != "-"}))


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors in it"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "a pickle, which is not read",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                (f / "model.safetensors").read_bytes()[:-4]
            ),
            "not a complete safetensors file",
        ),
        (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
        (lambda f: edit_config(f, model_type="roberta"), "model_type is 'roberta'"),
        (lambda f: edit_config(f, hidden_size="-"), "hidden_size"),
        (lambda f: edit_config(f, hidden_act="mish"), "hidden_act must be"),
        (lambda f: edit_config(f, num_hidden_layers=3), "no weights for encoder.layers.2"),
        (lambda f: edit_config(f, intermediate_size=65), "config.json says"),
        (
            lambda f: edit_config(f, position_embedding_type="relative_key"),
            "only absolute position embeddings",
        ),
    ],
)
def test_a_wrong_folder_is_named(folder, spoil, part):
    spoil(folder)
    with pytest.raises(InputError) as error:
        huggingface.load_masked_lm(folder)
    assert part in str(error.value)
    assert str(folder) in str(error.value)


def test_a_vocabulary_of_another_size_is_refused(folder, student_vocab):
    (folder / "vocab.txt").write_text("\n".join([*student_vocab.pieces, "more"]) + "\n")
    with pytest.raises(InputError, match="do not match"):
        huggingface.load_vocab(folder, huggingface.read_model_config(folder))


def test_a_teacher_that_is_nowhere_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"teacher \./nobody/nothing|teacher nobody/nothing"):
        huggingface.find_teacher("nobody/nothing")
    file = tmp_path / "x.bin"
    file.write_bytes(b"")
    with pytest.raises(InputError, match="expected a folder"):
        huggingface.find_teacher(str(file))
