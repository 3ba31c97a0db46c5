"""Size against latency: the student beside teachers of BERT's shapes, as people run them.

Hugging Face folders with random weights (speed and size do not depend on them), written by mvbert;
hidden states of all positions out, on one thread where it is a CPU. Batches of 1 and 32 rows. ONNX
graphs are exported from the same folders by torch.onnx; int8 is ONNX Runtime's dynamic quantisation
of the weights. `megabytes` in the records is the size of the file that is loaded.
"""

import contextlib
import io
import logging
import math
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

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
    return [Case(model, 1, 128) for model in models] + [Case(model, 32, 128) for model in many]


@cache
def folder(model: str) -> Path:
    """A Hugging Face folder of that shape, weights random."""
    from mvbert.config import ModelConfig
    from mvbert.huggingface import write_model
    from mvbert.model import MaskedLM
    from mvbert.vocab import Vocab

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


@cache
def exported(model: str) -> Path:
    """model.onnx and int8.onnx of the folder's encoder."""
    import onnxruntime.quantization
    from transformers import AutoModel

    out = folder(model)
    bert = AutoModel.from_pretrained(out, attn_implementation="sdpa").eval()
    bert.config.use_cache = False
    ids = torch.ones(2, 16, dtype=torch.int64)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=512)
    dynamic = {0: batch, 1: length}

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = bert

        def forward(self, input_ids, attention_mask):
            return self.bert(input_ids, attention_mask=attention_mask).last_hidden_state

    logging.disable(logging.WARNING)  # the exporter's notes on what else it could export
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Encoder().eval(), (ids, torch.ones_like(ids)), str(out / "model.onnx"), dynamo=True,
            external_data=False, verbose=False, input_names=["input_ids", "attention_mask"],
            output_names=["hidden"],
            dynamic_shapes={"input_ids": dynamic, "attention_mask": dynamic},
        )  # fmt: skip
        onnxruntime.quantization.quantize_dynamic(
            out / "model.onnx", out / "int8.onnx",
            weight_type=onnxruntime.quantization.QuantType.QUInt8,
        )  # fmt: skip
    logging.disable(logging.NOTSET)
    return out


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
    return {**facts, "megabytes": harness.digits(megabytes)}


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


def with_onnx(case: Case, device: str, file: str, bound: float):
    import onnxruntime

    path = exported(case.model) / file
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    size = megabytes(path)

    def run(ids):
        feed = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
        return torch.from_numpy(session.run(None, feed)[0]), size, bound

    return run


ONNX = {
    "needs": ["onnxruntime", "onnx", "onnxscript", "transformers"],
    "devices": ["cpu"],
}
BENCH.add("ONNX Runtime", with_onnx, file="model.onnx", bound=1e-4, **ONNX)
BENCH.add("ONNX Runtime int8", with_onnx, file="int8.onnx", bound=math.inf, **ONNX)
