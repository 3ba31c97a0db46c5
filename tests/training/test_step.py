"""A step replayed as a graph is the step run eagerly; FLOPs and peaks."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mvbert import functional
from mvbert.config import ModelConfig, RowConfig, Stage2Config, TrainConfig, student_shape
from mvbert.errors import InputError
from mvbert.kernels import ops
from mvbert.model import flops
from mvbert.progress import Progress
from mvbert.training import device, step, train
from mvbert.training.device import Device
from mvbert.training.stages import Stage2, load_stage1

# All that changes from step to step does: rows, dropout, learning rate, weights of losses.
CONFIG = Stage2Config(
    steps=12, rows=4, micro_rows=2, eval_rows=4, eval_every=6, save_every=12, log_every=1,
    dtype="float32", device="cpu", threads=1, lr=1e-2, shape="1x64", dropout=0.1,
    distill=("logits", "hidden", "relations", "sentence"), relation_heads=8, mlm_weight=0.1,
)  # fmt: skip

ROW = RowConfig(length=16)


def places(tree) -> set[int]:
    """Where the memory of all tensors in a tree begins."""
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


class RecordedGraph(TorchDispatchMode):
    """What a CUDA graph is, for a CPU: the kernels of a step, launched again on the same memory.

    Numbers that Python handed to a kernel are frozen; what Python did between kernels is not done
    again. An operation that would wait for the device, or whose shape depends on its input, fails.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.made: set[int] = set()
        self.replays = 0

    def capture(self, work: Callable[[], None]) -> None:
        with self:
            work()
        # Capturing runs nothing: what was changed is put back.
        for tensor, value in self.before.values():
            tensor.copy_(value)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*func.tags}
        if func is torch.ops.aten.index.Tensor:  # whose shape depends on masks only
            waits = {i.dtype for i in args[1] if i is not None} & {torch.bool, torch.uint8}
        assert not waits, f"{func} cannot be in a graph"
        assert func is not torch.ops.aten.lift_fresh.default, "a tensor made from Python numbers"
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(value)
        self._keep(kwargs.get("out"))
        result = func(*args, **kwargs)
        tensors = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.made |= places(tensors) - places((args, kwargs))
        self.calls.append((func, args, kwargs, tensors))
        return result

    def _keep(self, written) -> None:
        """Remembers what tensors from outside of the graph were before it."""
        for tensor in tree_leaves(written):
            if isinstance(tensor, torch.Tensor):
                where = tensor.untyped_storage().data_ptr()
                if where not in self.made and where not in self.before:
                    whole = tensor.new_empty(0).set_(tensor.untyped_storage())
                    self.before[where] = (whole, whole.clone())

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, tensors in self.calls:
            again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, torch.Tensor)]
            for old, new in zip(tensors, again, strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


@pytest.fixture
def stage2_run(training_inputs, corpus, numbers):
    """A function that runs Stage II in a folder; returns its log."""

    def run(out: Path, row: RowConfig = ROW, **settings) -> list[dict]:
        config = replace(CONFIG, **settings)
        where = Device.of(device.choose_device(config.device), "float32", "as set")
        loaded = load_stage1(training_inputs / "stage1")
        task = Stage2(config, row, corpus, loaded, where, Progress("test"))
        train.train(task, config, where, out, {}, Progress("test"))
        return numbers(out)

    return run


@pytest.fixture
def recorded(monkeypatch):
    """Makes runs replay recorded steps, with losses whose shapes are fixed, as on a GPU."""
    graph = RecordedGraph()
    monkeypatch.setattr(train, "choose_graph", lambda *_: (True, "recorded"))
    monkeypatch.setattr(train, "CudaGraph", lambda: graph)
    return graph


@pytest.fixture
def fixed_shapes(monkeypatch):
    """Losses in their definitions: on a CPU the others look at how many rows have a label."""
    monkeypatch.setattr(functional, "_backend", lambda *_: "reference")
    monkeypatch.setattr(ops, "check_range", lambda *_: None)


def test_a_run_of_replayed_steps_is_the_eager_run(stage2_run, tmp_path, fixed_shapes, request):
    """Nothing waits for the device, and all that changes from step to step reaches a replay."""
    eager = stage2_run(tmp_path / "eager")
    graph = request.getfixturevalue("recorded")
    assert stage2_run(tmp_path / "graph") == eager
    assert graph.replays == CONFIG.steps - step.WARM_UP


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_layers": (0, 1)},
        {"distill": ("relations",), "relations_layer": 1, "relations_weight": 2.0},
        {"optimizer": "muon"},
    ],
    ids=["all", "relations", "muon"],
)
def test_every_way_to_distil_fits_into_a_graph(stage2_run, tmp_path, fixed_shapes, request, change):
    eager = stage2_run(tmp_path / "eager", **change)
    graph = request.getfixturevalue("recorded")
    assert stage2_run(tmp_path / "graph", **change) == eager
    assert graph.replays == CONFIG.steps - step.WARM_UP


def test_the_recorder_sees_what_waits_for_the_device(stage2_run, tmp_path, recorded):
    with pytest.raises(AssertionError, match="cannot be in a graph"):
        stage2_run(tmp_path)  # losses for CPUs count their rows


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_on_a_gpu_gives_the_losses_of_eager_steps(stage2_run, tmp_path, losses):
    for name in ("off", "on"):
        stage2_run(tmp_path / name, cuda_graph=name, device="cuda", dtype="float32")
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), rel=1e-4)


def test_captured_on_the_current_stream_or_beside_the_default_one(monkeypatch):
    captured = []

    def graph(graph, *, stream, capture_error_mode):
        captured.append(stream)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: 0)
    for current in (7, 0):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda current=current: current)
        step.CudaGraph().capture(lambda: None)
    assert captured == [7, None]


def test_a_gpu_has_a_number(monkeypatch):
    """torch.cuda.set_device takes no other."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, number in (("auto", 0), ("cuda", 0), ("cuda:1", 1)):
        assert device.choose_device(name) == torch.device("cuda", number)
    assert device.choose_device("auto", 1, 2) == torch.device("cuda", 1)


def test_graphs_are_for_one_gpu():
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    auto, on, off = (TrainConfig(cuda_graph=value) for value in ("auto", "on", "off"))
    assert device.choose_graph(auto, gpu, 1)[0]
    assert not device.choose_graph(off, gpu, 1)[0]
    for where, processes, reason in ((cpu, 1, "no GPU"), (gpu, 2, "several processes")):
        chosen, why = device.choose_graph(auto, where, processes)
        assert not chosen
        assert reason in why
        with pytest.raises(InputError, match=reason):
            device.choose_graph(on, where, processes)


def test_flops_are_those_of_the_published_arithmetic():
    # 31.9 MFLOP a piece: 6 x 256, 4,928 pieces, rows of 128, head on 15 % (forward and backward).
    shape = student_shape("6x256", 4928)
    total = 3 * (flops.encoder_flops(shape, 128) + 0.15 * flops.head_flops(shape, 4928))
    assert total == pytest.approx(31.9e6, rel=2e-3)


def test_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    from mvbert.model.masked_lm import MaskedLM

    shape = ModelConfig(50, 32, 3, 4, 64, max_position_embeddings=16)
    model = MaskedLM(shape)
    ids = torch.zeros(2, 16, dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        hidden = model.encode(ids, ids)
        model.logits(model.masked_hidden(hidden, torch.arange(5)))
    ours = 32 * flops.encoder_flops(shape, 16) + 5 * flops.head_flops(shape, 50)
    assert counter.get_total_flops() == ours


def test_the_peak_of_a_cpu_is_measured_and_of_a_gpu_known(monkeypatch):
    peak, source = flops.peak_flops(torch.device("cpu"), torch.float32, 1)
    assert 1e8 < peak < 1e15
    assert source.startswith("measured")
    names = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H100 PCIe": 756e12}
    for i, (name, expected) in enumerate(names.items()):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        found = flops.peak_flops(torch.device(f"cuda:{i + 90}"), torch.bfloat16, 1)
        assert found == (expected, f"data sheet of {name}")


def test_sums_read_back_are_those_added():
    sums = step.Sums(torch.device("cpu"))
    for value in (1.0, 2.0):
        sums.add({"b": torch.tensor(value), "a": torch.tensor(10 * value)})
    assert sums.dict(sums.vector) == {"a": 30.0, "b": 3.0}
    pending = step.PendingSums(torch.cat([sums.vector, torch.tensor([4.0, 7.0])]), sums.names)
    assert pending.ready
    assert pending.wait() == ({"a": 30.0, "b": 3.0}, 4, 7)
