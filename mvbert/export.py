"""A BERT as an ONNX graph, in float32 and in int8: for phones, browsers and cheap CPUs.

The graph is written node by node, in standard operators alone. Query, key and value are one matrix
product; the word table is one tensor, whether rows are read from it or it scores pieces too. In
int8 each row of the tables and each column of a matrix has a scale of its own, and the input of a
matrix is cut to 8 bits as it comes (DynamicQuantizeLinear). Why so, with figures: docs/export.md.

    OUT/onnx/model.onnx            float32
    OUT/onnx/model_quantized.onnx  int8
    OUT/config.json, vocab.txt, tokenizer.json, tokenizer_config.json

These are the names under which transformers.js and Optimum look.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvbert import __version__, huggingface
from mvbert.batches import Batch
from mvbert.config import ModelConfig, RowConfig
from mvbert.corpus import Corpus, build_corpus
from mvbert.demo import module_prose, module_sources
from mvbert.distill import checked_corpus
from mvbert.errors import InputError
from mvbert.files import (
    Json,
    atomic_folder,
    atomic_write,
    read_json_object,
    sync_folder,
    write_json,
)
from mvbert.model import DeviceBatch, MaskedLM
from mvbert.progress import Progress
from mvbert.stages import heldout_rows
from mvbert.tokenizer import save_tokenizer_files
from mvbert.vocab import Vocab

FLOAT, INT8 = "onnx/model.onnx", "onnx/model_quantized.onnx"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUTS = {"hidden": "last_hidden_state", "pooled": "sentence_embedding", "logits": "logits"}

# LayerNormalization came with opset 17, which ONNX Runtime reads since 1.12 (2022).
OPSET, IR_VERSION = 17, 8

# Beyond 7 bits a weight's product with an 8-bit input can leave the 16 bits in which x86 without
# VNNI adds two of them. Rows that are only read have no products.
MATRIX_BITS, TABLE_BITS = 7, 8

ROWS, PIECES = 64, 128  # of the check; the pieces of a timed row, too
CHECK_ROWS = 4  # of a pass: logits of all pieces are large
BOUND = 1e-4  # of the largest value: how far float32 may be from torch
TEXT_BYTES = 200_000  # of documentation strings, where no corpus is given


def needed() -> tuple[ModuleType, ModuleType]:
    """The packages onnx and onnxruntime.

    Raises:
        ImportError: one is missing; the message says which `pip install` brings them.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            f"an ONNX graph needs the package {error.name}; run: pip install mvbert[onnx]"
        ) from None
    return onnx, onnxruntime


# ---- the graph -----------------------------------------------------------------------------------


class _Graph:
    """Nodes and tensors of a graph in the making; a call adds a node and gives its outputs."""

    def __init__(self, int8: bool) -> None:
        self._helper = needed()[0].helper
        self.int8 = int8
        self._nodes: list[Any] = []
        self._tensors: list[Any] = []
        self._count = 0
        self._cut: dict[str, tuple[str, str, str]] = {}

    def __call__(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"v{self._count + i}" for i in range(outputs)]
        self._count += outputs
        self._nodes.append(self._helper.make_node(operator, inputs, names, **attributes))
        return names[0] if outputs == 1 else tuple(names)

    def constant(self, value: Any, dtype: type = np.float32) -> str:
        array: np.ndarray = np.ascontiguousarray(value, dtype)
        name = f"c{len(self._tensors)}"
        tensor = needed()[0].numpy_helper.from_array(array.reshape(np.shape(value)), name)
        self._tensors.append(tensor)
        return name

    def floats(self, x: str) -> str:
        return self("Cast", x, to=needed()[0].TensorProto.FLOAT)

    def table(self, rows: np.ndarray, bits: int) -> tuple[str, ...]:
        """A table [V, H] to read rows from: itself, or its int8 and its scales [V, 1]."""
        if not self.int8:
            return (self.constant(rows),)
        values, scales = quantised(rows, bits)
        return self.constant(values, np.int8), self.constant(scales)

    def rows(self, table: tuple[str, ...], operator: str, *where: str) -> str:
        """Rows of a table, by Gather or Slice."""
        parts = [self(operator, part, *where) for part in table]
        return parts[0] if len(parts) == 1 else self("Mul", self.floats(parts[0]), parts[1])

    def linear(self, x: str, weight: np.ndarray, bias: np.ndarray) -> str:
        """x W^T + b of a weight [out, in]."""
        if not self.int8:
            return self.product(x, (self.constant(weight.T),), bias)
        values, scales = quantised(weight, MATRIX_BITS)
        matrix = self.constant(values.T, np.int8), self.constant(scales[:, 0])
        return self.product(x, matrix, bias)

    def product(self, x: str, matrix: tuple[str, ...], bias: np.ndarray) -> str:
        """x M + b of a matrix [in, out], or of its int8 and its scales [out]."""
        if len(matrix) == 1:
            return self("Add", self("MatMul", x, *matrix), self.constant(bias))
        if x not in self._cut:
            self._cut[x] = self("DynamicQuantizeLinear", x, outputs=3)
        values, scale, zero = self._cut[x]
        # The shape in which ONNX Runtime knows the four nodes and makes them one.
        sums = self("MatMulInteger", values, matrix[0], zero, self.constant(0, np.int8))
        scaled = self("Mul", self.floats(sums), self("Mul", scale, matrix[1]))
        return self("Add", scaled, self.constant(bias))

    def norm(self, x: str, weight: np.ndarray, bias: np.ndarray, eps: float) -> str:
        parameters = self.constant(weight), self.constant(bias)
        return self("LayerNormalization", x, *parameters, axis=-1, epsilon=eps)

    def activation(self, x: str, name: str) -> str:
        if name == "relu":
            return self("Relu", x)
        half, one = self.constant(0.5), self.constant(1.0)
        if name == "gelu":
            inner = self("Erf", self("Div", x, self.constant(math.sqrt(2))))
        else:  # gelu_new
            cube = self("Mul", self("Mul", self("Mul", x, x), x), self.constant(0.044715))
            scaled = self("Mul", self("Add", x, cube), self.constant(math.sqrt(2 / math.pi)))
            inner = self("Tanh", scaled)
        return self("Mul", self("Mul", x, self("Add", inner, one)), half)

    def model(self, outputs: dict[str, tuple[str, list[str | int]]]) -> bytes:
        """The finished model; `outputs` has the value and the shape of each name."""
        onnx, helper = needed()[0], self._helper
        for name, (value, _) in outputs.items():
            self._nodes.append(helper.make_node("Identity", [value], [name]))
        int64, float_ = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
        graph = helper.make_graph(
            self._nodes,
            "bert",
            [helper.make_tensor_value_info(n, int64, ["batch", "length"]) for n in INPUTS],
            [helper.make_tensor_value_info(n, float_, shape) for n, (_, shape) in outputs.items()],
            self._tensors,
        )
        made = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="mvbert",
            producer_version=__version__,
        )
        onnx.checker.check_model(made)
        return made.SerializeToString()


def quantised(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight [out, in] as int8 of `bits` bits and one scale for each row, [out, 1]; 0 stays 0."""
    largest = np.abs(weight).max(1, keepdims=True)
    scales = np.where(largest > 1e-30, largest, 1.0) / (2 ** (bits - 1) - 1)
    return np.rint(weight / scales).astype(np.int8), scales.astype(np.float32)


def to_onnx(model: MaskedLM, heads: Sequence[str] = ("hidden",), int8: bool = False) -> bytes:
    """A model as an ONNX file.

    Args:
        heads: outputs, of OUTPUTS: hidden states [B, T, H]; their mean over the pieces that
            attention_mask lets count [B, H]; scores over the vocabulary of all pieces [B, T, V].
        int8: weights and tables as int8.

    Raises:
        InputError: the file would be larger than ONNX allows.
    """
    config, graph = model.config, _Graph(int8)
    value = {n: p.detach().cpu().float().numpy() for n, p in model.named_parameters()}
    if sum(array.nbytes for array in value.values()) >= 2**31:
        raise InputError("a model of 2 GB or more does not fit one ONNX file")
    H, A, eps = config.hidden_size, config.num_attention_heads, config.layer_norm_eps
    ids, mask, types = INPUTS

    def whole(*numbers: int) -> str:
        return graph.constant(numbers, np.int64)

    def linear(x: str, name: str) -> str:
        return graph.linear(x, value[f"{name}.weight"], value[f"{name}.bias"])

    def norm(x: str, name: str) -> str:
        return graph.norm(x, value[f"{name}.weight"], value[f"{name}.bias"], eps)

    bits = MATRIX_BITS if "logits" in heads else TABLE_BITS
    word = graph.table(value["embeddings.word.weight"], bits)
    position = graph.table(value["embeddings.position.weight"], TABLE_BITS)
    token_type = graph.constant(value["embeddings.token_type.weight"])
    length = graph("Slice", graph("Shape", ids), whole(1), whole(2))
    rows = graph("Add", graph.rows(word, "Gather", ids), graph("Gather", token_type, types))
    rows = graph("Add", rows, graph.rows(position, "Slice", whole(0), length, whole(0)))
    hidden = norm(rows, "embeddings.norm")

    counts = graph.floats(mask)
    # A large number, not infinity: a row without pieces gives some numbers and not NaN.
    absent = graph("Mul", graph("Sub", graph.constant(1.0), counts), graph.constant(-1e9))
    absent = graph("Unsqueeze", absent, whole(1, 2))
    apart, together = whole(0, 0, A, H // A), whole(0, 0, H)
    for number in range(config.num_hidden_layers):
        layer = f"encoder.layers.{number}"
        weight, bias = value[f"{layer}.qkv.weight"].copy(), value[f"{layer}.qkv.bias"].copy()
        weight[:H] *= (H // A) ** -0.5  # of the scores, without a node of its own
        bias[:H] *= (H // A) ** -0.5
        qkv = graph.linear(hidden, weight, bias)
        query, key, values = (
            graph("Transpose", graph("Reshape", part, apart), perm=order)
            for part, order in zip(
                graph("Split", qkv, whole(H, H, H), outputs=3, axis=-1),
                ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]),
                strict=True,
            )
        )
        scores = graph("Add", graph("MatMul", query, key), absent)
        context = graph("MatMul", graph("Softmax", scores, axis=-1), values)
        context = graph("Reshape", graph("Transpose", context, perm=[0, 2, 1, 3]), together)
        attended = linear(context, f"{layer}.attention_output")
        hidden = norm(graph("Add", attended, hidden), f"{layer}.attention_norm")
        expanded = graph.activation(linear(hidden, f"{layer}.intermediate"), config.hidden_act)
        contracted = linear(expanded, f"{layer}.output")
        hidden = norm(graph("Add", contracted, hidden), f"{layer}.output_norm")

    outputs: dict[str, tuple[str, list[str | int]]] = {}
    if "hidden" in heads:
        outputs[OUTPUTS["hidden"]] = hidden, ["batch", "length", H]
    if "pooled" in heads:
        counted = graph("Mul", hidden, graph("Unsqueeze", counts, whole(2)))
        total = graph("ReduceSum", counted, whole(1), keepdims=0)
        count = graph("Max", graph("ReduceSum", counts, whole(1)), graph.constant(1.0))
        outputs[OUTPUTS["pooled"]] = graph("Div", total, count), ["batch", H]
    if "logits" in heads:
        x = graph.activation(linear(hidden, "head.dense"), config.hidden_act)
        matrix = [graph("Transpose", word[0], perm=[1, 0])]  # once, when the file is opened
        if int8:
            matrix.append(graph("Reshape", word[1], whole(-1)))
        scores = graph.product(norm(x, "head.norm"), tuple(matrix), value["head.bias"])
        outputs[OUTPUTS["logits"]] = scores, ["batch", "length", config.vocab_size]
    return graph.model(outputs)


# ---- running it ----------------------------------------------------------------------------------


class Session:
    """An ONNX file, opened on the CPU."""

    def __init__(self, file: bytes | Path, threads: int = 1) -> None:
        onnxruntime = needed()[1]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(
            file, options, providers=["CPUExecutionProvider"]
        )
        self.outputs = [output.name for output in self._session.get_outputs()]

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Any:
        """Inputs [B, T] of whole numbers -> the outputs by their names."""
        given = zip(INPUTS, (input_ids, attention_mask, token_type_ids), strict=True)
        results = self._session.run(None, {name: x.long().numpy() for name, x in given})
        return {n: torch.from_numpy(x) for n, x in zip(self.outputs, results, strict=True)}

    def milliseconds(self, config: ModelConfig, seconds: float = 1.0) -> float:
        """The median time of one row of PIECES pieces."""
        T = min(PIECES, config.max_position_embeddings)
        ids = torch.arange(T)[None] * 7919 % config.vocab_size
        given = ids, torch.ones_like(ids), torch.zeros_like(ids)
        times: list[float] = []
        for _ in range(3):
            self(*given)
        while len(times) < 5 or (sum(times) < seconds and len(times) < 200):
            started = time.perf_counter()
            self(*given)
            times.append(time.perf_counter() - started)
        return float(np.median(times)) * 1e3


# ---- the check -----------------------------------------------------------------------------------


def real_rows(vocab: Vocab, config: ModelConfig, corpus: Path | None) -> Batch:
    """Masked rows of a corpus's held-out text, or of Python's own documentation strings."""
    pairs = 0.5 if config.type_vocab_size > 1 else 0.0
    row = RowConfig(length=min(PIECES, config.max_position_embeddings), pair_prob=pairs)
    with tempfile.TemporaryDirectory() as scratch:
        if corpus is None:
            text, size = [], 0
            for source in module_sources("stdlib"):
                text.append("\n".join(module_prose(source)))
                size += len(text[-1])
                if size > TEXT_BYTES:
                    break
            atomic_write(Path(scratch, "text.txt"), "\n\n".join(text))
            made = Path(scratch, "corpus")
            texts = [Path(scratch, "text.txt")]
            build_corpus(texts, made, lowercase=vocab.lowercase, heldout_share=0.9)
            opened = Corpus.open(made)
        else:
            opened = checked_corpus(corpus)
        return heldout_rows(opened, opened.segment(vocab), row).read(0, ROWS)


class Comparison:
    """What ONNX Runtime makes of rows, beside torch's own.

    Rows are cut to different lengths and padded, so that attention_mask counts.

    Args:
        model: in float32, on the CPU.
        head: whether the model can predict pieces; if not, only outputs are compared.
    """

    def __init__(self, model: MaskedLM, vocab: Vocab, batch: Batch, head: bool) -> None:
        self._model, self._head = model.eval(), head
        self._batch = DeviceBatch.of(batch, torch.device("cpu"))
        B, T = batch.input_ids.shape
        shortest = T // 2
        lengths = T - torch.arange(B) * 7 % (T - shortest + 1)
        self._mask = torch.arange(T) < lengths[:, None]
        self._ids = self._batch.input_ids.where(self._mask, vocab.pad)
        self._hidden: dict[int, Tensor] = {}  # torch's, by the first row of a pass

    @torch.no_grad()
    def __call__(self, session: Session) -> dict[str, Any]:
        """The session's distance from torch.

        Returns:
            largest: of each output, the largest difference over the largest value; error: the root
            of the mean square of the difference over that of the value; same_top1: the share of
            masked pieces for which both have the same first choice; right, right_torch: the share
            that either gets right. The last three where pieces can be predicted.
        """
        sums = {name: [0.0] * 4 for name in session.outputs}
        asked = same = right = right_torch = 0
        labels = self._batch.labels.view(len(self._ids), -1)
        places = self._batch.masked_index.view(len(self._ids), -1) % self._ids.shape[1]
        for first in range(0, len(self._ids), CHECK_ROWS):
            part = slice(first, first + CHECK_ROWS)
            ids, mask = self._ids[part], self._mask[part]
            types = self._batch.token_type_ids[part]
            found = session(ids, mask, types)
            if first not in self._hidden:
                rows = self._model.embeddings(ids, types)
                self._hidden[first] = self._model.encoder(rows, mask)
            wanted = self._outputs(self._hidden[first], mask, session.outputs)
            for name, total in sums.items():
                a, b = found[name], wanted[name]
                if name != OUTPUTS["pooled"]:
                    a, b = a[mask], b[mask]
                apart = (a - b).double()
                # NumPy's maximum keeps a NaN.
                total[0] = float(np.maximum(total[0], float(apart.abs().max())))
                total[1] = float(np.maximum(total[1], float(b.abs().max())))
                total[2] += float(apart.square().sum())
                total[3] += float(b.double().square().sum())
            if not self._head or not {OUTPUTS["hidden"], OUTPUTS["logits"]} & {*found}:
                continue
            row, column = torch.nonzero(
                (labels[part] >= 0) & mask.gather(1, places[part]), as_tuple=True
            )
            label, place = labels[part][row, column], places[part][row, column]
            ours, torchs = (
                self._choices(outputs, row, place).argmax(-1) for outputs in (found, wanted)
            )
            asked += len(label)
            same += int((ours == torchs).sum())
            right += int((ours == label).sum())
            right_torch += int((torchs == label).sum())
        result: dict[str, Any] = {
            "largest": {name: t[0] / max(t[1], 1e-30) for name, t in sums.items()},
            "error": {name: math.sqrt(t[2] / max(t[3], 1e-30)) for name, t in sums.items()},
        }
        if asked:
            result |= {
                "masked": asked,
                "same_top1": same / asked,
                "right": right / asked,
                "right_torch": right_torch / asked,
            }
        return result

    def _outputs(self, hidden: Tensor, mask: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """What the graph computes from torch's hidden states."""
        outputs = {OUTPUTS["hidden"]: hidden}
        if OUTPUTS["pooled"] in names:
            counted = hidden * mask[..., None]
            outputs[OUTPUTS["pooled"]] = counted.sum(1) / mask.sum(1, keepdim=True)
        if OUTPUTS["logits"] in names:
            outputs[OUTPUTS["logits"]] = self._model.logits(self._model.head(hidden))
        return outputs

    def _choices(self, outputs: dict[str, Tensor], row: Tensor, place: Tensor) -> Tensor:
        """Scores over the vocabulary; torch's head makes them of hidden states alone."""
        if OUTPUTS["logits"] in outputs:
            return outputs[OUTPUTS["logits"]][row, place]
        return self._model.logits(self._model.head(outputs[OUTPUTS["hidden"]][row, place]))


# ---- the verb ------------------------------------------------------------------------------------


def run_export(
    name: str,
    out: Path,
    *,
    heads: Sequence[str] = ("hidden",),
    int8: bool = False,
    corpus: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Json]:
    """Writes the folder of the module's first lines, checked before it appears.

    Args:
        name: a BERT's folder, the folder of a run, or what mvbert.huggingface.find_teacher takes.
        corpus: whose held-out text is used for the check.

    Raises:
        InputError: no such BERT, it lacks what a head needs, `out` is taken or holds what is read,
            or ONNX Runtime does not give torch's outputs.
        ImportError: onnx or onnxruntime is not installed.
    """
    onnxruntime = needed()[1]
    if not heads:
        raise InputError(f"a graph needs outputs: --head {' or '.join(OUTPUTS)}")
    progress = Progress("export")
    folder = huggingface.find_model(name)
    for read in (folder, corpus):  # `out` is replaced as a whole
        if read is not None and read.resolve().is_relative_to(out.resolve()):
            raise InputError(f"{out} holds {read}, which is read; give another path")
    model, missing = huggingface.load_masked_lm(folder)
    vocab = huggingface.load_vocab(folder, model.config)
    head = not any(part.startswith("head.") for part in missing)
    if "logits" in heads and not head:
        raise InputError(f"{folder} has no masked-language-model head, so there are no logits")
    heads = [known for known in OUTPUTS if known in heads]
    batch = real_rows(vocab, model.config, corpus)
    compare = Comparison(model, vocab, batch, head)
    files: dict[str, Json] = {}
    with atomic_folder(out, overwrite=overwrite) as partial:
        (partial / "onnx").mkdir()
        for file in [FLOAT, INT8] if int8 else [FLOAT]:
            data = to_onnx(model, heads, file == INT8)
            atomic_write(partial / file, data)
            session = Session(data)
            found = compare(session)
            worst = max(found["largest"].values())
            if file == FLOAT and not worst <= BOUND:
                if not math.isfinite(worst):
                    raise InputError(f"{folder}: the model's weights are spoiled: outputs are NaN")
                raise InputError(
                    f"ONNX Runtime {onnxruntime.__version__} is {worst:.1e} of the largest value "
                    f"away from torch's outputs of {folder}, more than {BOUND:.0e}: "
                    "nothing was written"
                )
            found |= {"bytes": len(data), "milliseconds": session.milliseconds(model.config)}
            progress.note(_line(file, found))
            files[file] = {
                key: _rounded(value) if isinstance(value, dict) else value
                for key, value in _rounded(found).items()
            }
        # Read and written, not copied: a config.json that is a link leads nowhere elsewhere.
        write_json(partial / "config.json", read_json_object(folder / "config.json"))
        save_tokenizer_files(vocab, partial, model.config.max_position_embeddings)
        sync_folder(partial / "onnx")
    return {
        "output": str(out),
        "model": str(folder),
        "outputs": [OUTPUTS[head] for head in heads],
        "files": files,
        "checked_on": str(corpus) if corpus is not None else "documentation strings of Python",
        "onnxruntime": onnxruntime.__version__,
    }


def _line(file: str, found: dict[str, Any]) -> str:
    """What people are told of one file."""
    text = f"{file}: {found['bytes'] / 1e6:.2f} MB, {found['milliseconds']:.2f} ms a row, 1 thread"
    if file == FLOAT:
        return f"{text}; {max(found['largest'].values()):.1e} of the largest value from torch's"
    for name, error in found["error"].items():
        text += f"; {name} {error:.1%} off (root mean square)"
    if "masked" in found:
        text += (
            f"; {found['same_top1']:.1%} of {found['masked']} masked pieces guessed alike, "
            f"{found['right']:.1%} of them right, in float32 {found['right_torch']:.1%}"
        )
    return text


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Four digits of every fraction."""
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}
