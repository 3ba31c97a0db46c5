"""docs/experiments/fewer_bits.py: how it rounds and packs, and a run on a toy."""

import importlib.util
import json

import numpy as np
import pytest
import torch

pytest.importorskip("onnx", reason="needs onnx")
pytest.importorskip("onnxruntime", reason="needs onnxruntime")

from mvbert.tasks.model import load_task_model
from mvbert.tasks.rows import TaskBatch


@pytest.fixture(scope="module")
def fewer_bits(root):
    path = root / "docs" / "experiments" / "fewer_bits.py"
    spec = importlib.util.spec_from_file_location("fewer_bits", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("block", [0, 8, 32])
@pytest.mark.parametrize("bits", [8, 5, 4, 3])
def test_rounding_is_to_the_nearest_step_of_a_block(fewer_bits, bits, block):
    weight = torch.randn(7, 20, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    values, scales = fewer_bits.rounded(weight, bits, block)
    width = block or 20
    assert values.shape == (7, -(-20 // width), width)
    most = 2 ** (bits - 1) - 1
    assert int(values.abs().max()) == most
    found = fewer_bits.restored(values, scales, 20)
    step = scales.repeat_interleave(width, 1)[:, :20]
    assert ((found - weight).abs() <= step * 0.5001).all()
    assert (found[2] == 0).all()
    for row, of_row in zip(weight, scales, strict=True):
        largest = [part.abs().max() / most for part in row.split(width)]
        assert torch.allclose(of_row, torch.stack(largest))


@pytest.mark.parametrize("bits", [8, 7, 4, 3])
def test_packing_keeps_every_number(fewer_bits, bits):
    most = 2 ** (bits - 1) - 1
    values = torch.randint(-most, most + 1, (5, 3, 7), dtype=torch.int8)
    data = fewer_bits.packed(values, bits)
    assert len(data) == -(-5 * 3 * 7 * bits // 8)
    places = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[: 105 * bits]
    numbers = places.reshape(105, bits) @ (1 << np.arange(bits))
    assert (numbers - 2 ** (bits - 1)).tolist() == values.flatten().tolist()


def test_arms_round_each_part_alone_and_both(fewer_bits):
    pairs = [(None, None), (8, 8), (4, 8), (8, 4), (4, 4)]
    assert fewer_bits.arms([8, 4]) == pairs


def test_a_toy(fewer_bits, task_data, bert, finetune, training_inputs, tmp_path):
    finetune(bert, "sst-2", task_data / "sst.tar.xz", tmp_path / "tuned", "--epochs", 1)
    out = tmp_path / "bits.jsonl"
    command = [str(tmp_path / "tuned"), str(task_data / "sst.tar.xz"), "-o", str(out)]
    command += ["--mlm", str(bert), "--corpus", str(training_inputs / "corpus")]
    command += ["--words", "64", "--row-length", "16"]
    command += ["--bits", "8", "4", "--block", "16", "--threads", "1"]
    assert fewer_bits.main(command) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["matrices"], r["tables"]) for r in records] == fewer_bits.arms([8, 4])
    exact, eight, *_, four = records
    model, _ = load_task_model(tmp_path / "tuned")
    numbers = sum(p.numel() for p in model.parameters())
    unused = sum(p.numel() for n, p in model.named_parameters() if n.startswith("bert.head."))
    # The folder of a classifier has no head of masked language modelling.
    assert exact["bytes"] == 4 * (numbers - unused)
    assert four["bytes"] < eight["bytes"] < exact["bytes"] / 2
    assert four["zipped"] < four["bytes"] * 1.01
    assert set(exact["score"]) == {"dev"}
    assert four["onnx_score"]["dev"].keys() <= four["score"]["dev"].keys()
    assert four["onnx_bytes"] < 20_000 + four["bytes"]
    assert "onnx_bytes" not in eight
    words = [record["bits_per_word"] for record in records]
    assert len({*words}) > 1
    assert abs(eight["bits_per_word"] - exact["bits_per_word"]) < 0.05


def test_the_graph_of_4_bits_has_the_rounded_weights(
    fewer_bits, task_data, bert, finetune, tmp_path
):
    finetune(bert, "sst-2", task_data / "sst.tar.xz", tmp_path / "tuned", "--epochs", 1)
    model, _ = load_task_model(tmp_path / "tuned")
    fewer_bits.write_rounded(tmp_path / "tuned", tmp_path / "rounded", 4, 4, 16)
    rounded, _ = load_task_model(tmp_path / "rounded")
    ids = torch.arange(5, 25).view(2, 10).int()
    mask = torch.arange(10) < torch.tensor([[10], [6]])
    batch = TaskBatch(ids, torch.zeros_like(ids), mask, torch.tensor([0, 10]), np.arange(2))
    found = fewer_bits.GraphModel(model, fewer_bits.nbits_graph(model, 16))(batch)
    with torch.no_grad():
        exact, expected = model(batch), rounded(batch)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, exact, atol=1e-3)


def test_what_is_refused(fewer_bits, tmp_path, capsys):
    command = [str(tmp_path), "data", "-o", str(tmp_path / "out")]
    for more, complaint in (
        (["--bits", "9"], "--bits is [9]; expected numbers from 2 to 8"),
        (["--block", "-1"], "--block is -1"),
        (["--mlm", "x"], "--mlm and --corpus go together"),
    ):
        assert fewer_bits.main([*command, *more]) == 2
        assert complaint in capsys.readouterr().err
