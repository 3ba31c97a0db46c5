"""The tuner's own logic, in the interpreter: it measures nothing here, times are made up."""

import dataclasses
import json

import pytest
import torch

from mvbert.kernels import launch

SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1, "GROUP": 2}


@pytest.fixture
def tune(root, monkeypatch):
    """bench/ is a folder of scripts: its modules are found as when one of them runs."""
    monkeypatch.syspath_prepend(str(root / "bench"))
    import tune

    return tune


@pytest.fixture
def cases(tune, device, monkeypatch):
    """The cases of one small loss, materialised and flash, by name of their kernel."""
    found = {}
    for width in (0, 256):
        monkeypatch.setattr(launch, "FLASH_WIDTH", width)
        for case in tune.loss_cases(13, 37, 24, torch.float32, device):
            found[case.kernel] = dataclasses.replace(case, candidates=(SMALL,))
    return found


@pytest.mark.parametrize("kernel", ["logits", "elementwise", "dx", "dweight", "dweight_add"])
def test_candidates_run_in_place_of_the_rule(kernel, tune, cases, monkeypatch):
    monkeypatch.setattr(launch, "FLASH_WIDTH", 0)
    blocks = {"BLOCK_M": 2, "BLOCK_V": 32, "STEPS": 1} if kernel == "elementwise" else SMALL
    case = dataclasses.replace(cases[kernel], candidates=(blocks,))
    seen = []
    original = launch.choose
    monkeypatch.setattr(
        launch, "choose", lambda k, *a: seen.append((k, original(k, *a))) or seen[-1][1]
    )
    monkeypatch.setattr(launch, "elementwise_blocks", lambda x, shape, V, *_: launch.choose(
        "elementwise", x, shape, {"BLOCK_M": 4, "BLOCK_V": 64, "STEPS": 2}))  # fmt: skip
    entry = tune.tune(case, lambda run: 10.0 if launch.FORCED else 20.0, lambda line: None)
    assert entry["blocks"] == blocks
    assert (entry["us"], entry["rule_us"], entry["shape"]) == (10.0, 20.0, [13, 37, 24])
    assert any(k == kernel and blocks.items() <= b.items() for k, b in seen)
    assert not launch.FORCED


def test_rule_stands_unless_clearly_beaten(tune, cases, monkeypatch):
    monkeypatch.setattr(launch, "FLASH_WIDTH", 0)
    assert tune.tune(cases["dx"], lambda run: 99.0 if launch.FORCED else 100.0, print) is None


def test_wrong_candidate_is_left_out(tune, cases, monkeypatch):
    case = cases["flash_fwd"]
    calls = []

    def prepare():
        calls.append(1)
        return lambda: torch.full((3,), 2.0 if launch.FORCED else 1.0)

    lines = []
    wrong = dataclasses.replace(case, prepare=prepare)
    assert tune.tune(wrong, lambda run: 1.0 if launch.FORCED else 100.0, lines.append) is None
    assert any("WRONG" in line for line in lines)


def test_kept_entries_are_found_again(tune, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "TUNED", tmp_path / "tuned.json")
    entry = {"kernel": "dx", "dtype": "bfloat16", "shape": [4096, 30522, 768], "blocks": SMALL}
    tune.keep("GPU A", [entry])
    tune.keep("GPU B", [entry | {"blocks": {"GROUP": 4}}])
    tune.keep("GPU A", [entry | {"blocks": {"GROUP": 16}}, entry | {"shape": [16384, 30522, 768]}])
    assert json.loads(launch.TUNED.read_text()).keys() == {"devices"}
    launch._tables.cache_clear()
    launch._measured.cache_clear()
    try:

        def found(device, *shape):
            entry = launch._measured(device, "dx", "bfloat16", shape)
            return entry and entry["blocks"]

        assert found("GPU A", 4000, 30522, 768) == {"GROUP": 16}
        assert found("GPU A", 30000, 30522, 768) == SMALL
        assert found("GPU B", 4096, 30522, 768) == {"GROUP": 4}
        assert found("GPU A", 512, 30522, 768) is None  # a quarter of the smallest is another case
        assert found("GPU A", 4096, 30522, 1024) is None
        assert found("GPU C", 4096, 30522, 768) is None
    finally:
        launch._tables.cache_clear()
        launch._measured.cache_clear()


def test_needs_a_device(tune, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["tune"])
    assert tune.main() == 2
    assert "measures a CUDA device" in capsys.readouterr().err
