"""Size against latency: the student beside teachers of BERT's shapes, in usual runtimes.

Hugging Face folders with random weights (speed and size do not depend on them), written by mvbert;
the output is the hidden states of all positions; one thread on a CPU. Batches of 1 and 32 rows of
128 pieces, and single rows of 16 and 32. The ONNX files are written by `mvbert export` for all
shapes, beside what ONNX Runtime's own quantiser makes of the same float32 file. `megabytes` in the
records is the size of the file that is loaded.
"""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import clocks
import harness
import torch

SHAPES = {  # (layers, H, heads, V)
    "student 6x256": (6, 256, 4, 4928),
    "student 12x256": (12, 256, 4, 4928),
    "MiniLM 6x384": (6, 384, 12, 30522),
    "BERT-base": (12, 768, 12, 30522),
    "BERT-large": (24, 1024, 16, 30522),
}


@dataclass(frozen=True)
class Case:
    """A model and a batch of B rows of T pieces."""

    model: str
    B: int
    T: int

    @property
    def label(self) -> str:
        return f"{self.model}, {self.B} x {self.T}"


def cases(device: str, quick: bool) -> list[Case]:
    models = list(SHAPES)
    if quick:
        return [Case(models[0], 1, 128), Case(models[3], 1, 128)]
    many = models if device == "cuda" else models[:3]  # a row of a large one takes long enough
    short = [Case(model, 1, T) for model in models[:3] for T in (16, 32)]
    rows = [Case(model, 1, 128) for model in models] + [Case(model, 32, 128) for model in many]
    return rows + short


@cache
def folder(model: str) -> Path:
    """A Hugging Face folder of that shape, weights random."""
    from mvbert.config import ModelConfig
    from mvbert.model.huggingface import write_model
    from mvbert.model.masked_lm import MaskedLM
    from mvbert.text.vocab import Vocab

    layers, H, heads, V = SHAPES[model]
    bert = MaskedLM(ModelConfig(V, H, layers, heads, 4 * H))
    bert.init_weights(0)
    out = harness.folder("inference") / model
    out.mkdir()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    lines = harness.folder("inference") / "vocab.txt"
    lines.write_text("\n".join([*specials, *(f"w{i}" for i in range(V - 5))]) + "\n")
    write_model(out, bert, Vocab.load(lines, lowercase=True), "")
    return out


def quantize(source: Path, file: Path) -> None:
    """Writes what ONNX Runtime's quantiser makes of a float32 file at its best settings."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, file, per_channel=True, reduce_range=True, weight_type=QuantType.QInt8)


@cache
def exported(model: str, kind: str) -> Path:
    """An ONNX file of the folder, hidden states out, of one thread.

    Args:
        kind: a precision of `mvbert export`, or "dynamic": see `quantize`; one scale for the inputs
            of a batch.
    """
    from mvbert.model.huggingface import load_masked_lm
    from mvbert.publish.calibration import largest_inputs
    from mvbert.publish.onnx_graph import to_onnx

    file = folder(model) / f"{kind}.onnx"
    if kind == "dynamic":
        quantize(exported(model, "float32"), file)
        return file
    bert, largest = load_masked_lm(folder(model))[0].eval(), None
    if kind == "int8":
        ids = inputs(Case(model, 16, 128), "cpu", 0)
        largest = largest_inputs(bert, ids, torch.ones_like(ids).bool(), torch.zeros_like(ids))
    file.write_bytes(to_onnx(bert, precision=kind, largest=largest))
    return file


def inputs(case: Case, device: str, copy: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(copy)
    V = SHAPES[case.model][3]
    return torch.randint(5, V, (case.B, case.T), generator=generator).to(device)


def work(case: Case, device: str) -> harness.Work:
    """Products of the layers, attention's included; the weights read once."""
    layers, H, _, _ = SHAPES[case.model]
    pieces = case.B * case.T
    flop = layers * (2.0 * pieces * 12 * H * H + 4.0 * pieces * case.T * H)
    weights = layers * 12 * H * H
    size = 2.0 if device == "cuda" else 4.0
    return harness.Work(flop=flop, bytes=size * weights, items=case.B, unit="rows")


def check(case: Case, x: torch.Tensor, outputs) -> dict:
    """Relative error of the hidden states against float64; int8 is only reported."""
    hidden, megabytes, bound = outputs

    def truth() -> list[torch.Tensor]:
        from transformers import AutoModel

        model = AutoModel.from_pretrained(folder(case.model)).double().eval()
        with torch.no_grad():
            return [model(x[:1].cpu()).last_hidden_state]

    facts = harness.relative_errors(case, truth, [hidden[:1].cpu()], {"hidden": bound})
    return {**facts, "megabytes": clocks.digits(megabytes)}


BENCH = harness.Bench(
    "inference", cases=cases, inputs=inputs, work=work, check=check, memory=False, threads=1
)


def megabytes(file: Path) -> float:
    return file.stat().st_size / 1e6


def with_torch(case: Case, device: str, dtype: torch.dtype, compiled: bool = False):
    from transformers import AutoModel

    out = folder(case.model)
    model = AutoModel.from_pretrained(out, attn_implementation="sdpa").eval().to(device, dtype)
    size = megabytes(out / "model.safetensors") * dtype.itemsize / 4
    call = model
    if compiled:
        call = torch.compile(model, mode="max-autotune-no-cudagraphs", dynamic=False)
    bound = 1e-4 if dtype == torch.float32 else 5e-2

    def run(ids):
        with torch.inference_mode():
            return call(ids).last_hidden_state, size, bound

    return run


CPU = {"needs": ["transformers"], "devices": ["cpu"], "dtype": torch.float32}
GPU = {"needs": ["transformers"], "devices": ["cuda"], "dtype": torch.bfloat16}
BENCH.add("torch eager", with_torch, **CPU)
BENCH.add("torch.compile max-autotune", with_torch, compiled=True, **CPU)
BENCH.add("torch eager bf16", with_torch, **GPU)
BENCH.add("torch.compile max-autotune bf16", with_torch, compiled=True, **GPU)


def with_onnx(case: Case, device: str, kind: str, bound: float):
    from mvbert.publish.export import Session

    file = exported(case.model, kind)
    session, size = Session(file), megabytes(file)

    def run(ids):
        hidden = session(ids, torch.ones_like(ids), torch.zeros_like(ids))["last_hidden_state"]
        return hidden, size, bound

    return run


ONNX = {"needs": ["onnxruntime", "onnx", "transformers"], "devices": ["cpu"]}
BENCH.add("ONNX Runtime", with_onnx, kind="float32", bound=1e-4, **ONNX)
BENCH.add("ONNX Runtime int8", with_onnx, kind="int8", bound=math.inf, **ONNX)
BENCH.add("ONNX Runtime's quantize_dynamic", with_onnx, kind="dynamic", bound=math.inf, **ONNX)
