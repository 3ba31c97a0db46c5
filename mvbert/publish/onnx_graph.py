"""Builds the ONNX graph of a BERT, in float32 or int8, from standard operators.

Query, key and value are one matrix product; the word table is one tensor, used for the embeddings
and, where tied, for the logits. In int8 each row of a table and each column of a matrix has its own
scale, and inputs of matrices are quantised dynamically (DynamicQuantizeLinear). docs/export.md has
the reasons, with measurements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from mvbert import __version__
from mvbert.errors import InputError, MissingExtra
from mvbert.model.masked_lm import LabelHead, MaskedLM
from mvbert.publish.pooling import Pooling

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUTS = {"hidden": "last_hidden_state", "pooled": "sentence_embedding", "logits": "logits"}

# LayerNormalization needs opset 17, which ONNX Runtime supports since 1.12 (2022).
OPSET, IR_VERSION = 17, 8

# With more than 7 bits, sums of two products of weights and 8-bit inputs can overflow the 16 bits
# that x86 without VNNI uses. Tables that are only looked up have no products.
MATRIX_BITS, TABLE_BITS = 7, 8


def load_onnx() -> tuple[ModuleType, ModuleType]:
    """Imports onnx and onnxruntime.

    Raises:
        MissingExtra: one is not installed.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise MissingExtra("an ONNX graph", str(error.name), "onnx") from None
    return onnx, onnxruntime


class _Graph:
    """Builds a graph; a call adds a node and returns the names of its outputs."""

    def __init__(self, int8: bool) -> None:
        self._helper = load_onnx()[0].helper
        self.int8 = int8
        self._nodes: list[Any] = []
        self._tensors: list[Any] = []
        self._count = 0
        self._quantised: dict[str, tuple[str, str, str]] = {}

    def __call__(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"v{self._count + i}" for i in range(outputs)]
        self._count += outputs
        self._nodes.append(self._helper.make_node(operator, inputs, names, **attributes))
        return names[0] if outputs == 1 else tuple(names)

    def constant(self, value: Any, dtype: type = np.float32) -> str:
        array: np.ndarray = np.ascontiguousarray(value, dtype)
        name = f"c{len(self._tensors)}"
        tensor = load_onnx()[0].numpy_helper.from_array(array.reshape(np.shape(value)), name)
        self._tensors.append(tensor)
        return name

    def floats(self, x: str) -> str:
        return self("Cast", x, to=load_onnx()[0].TensorProto.FLOAT)

    def table(self, rows: np.ndarray, bits: int) -> tuple[str, ...]:
        """Adds a table [V, H] for look-ups: float32, or int8 and scales [V, 1]."""
        if not self.int8:
            return (self.constant(rows),)
        values, scales = quantised(rows, bits)
        return self.constant(values, np.int8), self.constant(scales)

    def rows(self, table: tuple[str, ...], operator: str, *indices: str) -> str:
        """Rows of a table, by Gather or Slice."""
        parts = [self(operator, part, *indices) for part in table]
        return parts[0] if len(parts) == 1 else self("Mul", self.floats(parts[0]), parts[1])

    def linear(self, x: str, weight: np.ndarray, bias: np.ndarray) -> str:
        """x W^T + b for a weight [out, in]."""
        if not self.int8:
            return self.product(x, (self.constant(weight.T),), bias)
        values, scales = quantised(weight, MATRIX_BITS)
        matrix = self.constant(values.T, np.int8), self.constant(scales[:, 0])
        return self.product(x, matrix, bias)

    def product(self, x: str, matrix: tuple[str, ...], bias: np.ndarray) -> str:
        """x M + b for a matrix [in, out]: float32, or int8 and scales [out]."""
        if len(matrix) == 1:
            return self("Add", self("MatMul", x, *matrix), self.constant(bias))
        if x not in self._quantised:
            self._quantised[x] = self("DynamicQuantizeLinear", x, outputs=3)
        values, scale, zero = self._quantised[x]
        # The pattern of four nodes that ONNX Runtime fuses into one.
        sums = self("MatMulInteger", values, matrix[0], zero, self.constant(0, np.int8))
        scaled = self("Mul", self.floats(sums), self("Mul", scale, matrix[1]))
        return self("Add", scaled, self.constant(bias))

    def norm(self, x: str, weight: np.ndarray, bias: np.ndarray, eps: float) -> str:
        parameters = self.constant(weight), self.constant(bias)
        return self("LayerNormalization", x, *parameters, axis=-1, epsilon=eps)

    def activation(self, x: str, name: str) -> str:
        if name == "relu":
            return self("Relu", x)
        if name == "silu":
            return self("Mul", x, self("Sigmoid", x))
        half, one = self.constant(0.5), self.constant(1.0)
        if name == "gelu":
            inner = self("Erf", self("Div", x, self.constant(math.sqrt(2))))
        else:  # gelu_new
            cube = self("Mul", self("Mul", self("Mul", x, x), x), self.constant(0.044715))
            scaled = self("Mul", self("Add", x, cube), self.constant(math.sqrt(2 / math.pi)))
            inner = self("Tanh", scaled)
        return self("Mul", self("Mul", x, self("Add", inner, one)), half)

    def model(self, outputs: dict[str, tuple[str, list[str | int]]]) -> bytes:
        """Serialises the model; `outputs` maps each name to its value and shape."""
        onnx, helper = load_onnx()[0], self._helper
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
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="mvbert",
            producer_version=__version__,
        )
        onnx.checker.check_model(model)
        return model.SerializeToString()


def quantised(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantises a weight [out, in] to `bits` bits in int8, with a scale per row [out, 1]."""
    largest = np.abs(weight).max(1, keepdims=True)
    scales = np.where(largest > 1e-30, largest, 1.0) / (2 ** (bits - 1) - 1)
    return np.rint(weight / scales).astype(np.int8), scales.astype(np.float32)


def _pooled(graph: _Graph, pooling: Pooling, hidden: str, counts: str) -> str:
    """Adds the pooling of hidden states [B, T, H] with weights `counts` [B, T]."""
    one, two = (graph.constant((n,), np.int64) for n in (1, 2))
    each = graph("Unsqueeze", counts, two)
    if pooling.mode == "cls":
        x = graph("Gather", hidden, graph.constant(0, np.int64), axis=1)
    elif pooling.mode == "max":
        absent = graph("Mul", graph("Sub", graph.constant(1.0), each), graph.constant(-1e9))
        x = graph(
            "ReduceMax", graph("Add", graph("Mul", hidden, each), absent), axes=[1], keepdims=0
        )
    else:
        total = graph("ReduceSum", graph("Mul", hidden, each), one, keepdims=0)
        count = graph("Max", graph("ReduceSum", counts, one), graph.constant(1.0))
        if pooling.mode == "mean_sqrt_len_tokens":
            count = graph("Sqrt", count)
        x = graph("Div", total, count)
    for step in pooling.steps:
        if step.weight is None:
            length = graph("ReduceL2", x, axes=[-1], keepdims=1)
            x = graph("Div", x, graph("Max", length, graph.constant(1e-12)))
            continue
        weight = step.weight.numpy()
        bias = np.zeros(len(weight)) if step.bias is None else step.bias.numpy()
        x = graph.linear(x, weight, bias)
        if step.activation == "Tanh":
            x = graph("Tanh", x)
    return x


def to_onnx(
    model: MaskedLM,
    heads: Sequence[str] = ("hidden",),
    int8: bool = False,
    labels: LabelHead | None = None,
    pooling: Pooling | None = None,
) -> bytes:
    """Converts a model to an ONNX file.

    Args:
        heads: outputs, keys of OUTPUTS: hidden states [B, T, H]; sentence embeddings [B, width];
            logits over labels, if `labels` is given, else over the vocabulary [B, T, V].
        int8: quantise weights and tables to int8, except those of `labels`.
        labels: the label head, if any.
        pooling: makes the sentence embeddings; None for the mean.

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

    scored = "logits" in heads and labels is None and config.tie_word_embeddings
    bits = MATRIX_BITS if scored else TABLE_BITS
    word = graph.table(value["embeddings.word.weight"], bits)
    position = graph.table(value["embeddings.position.weight"], TABLE_BITS)
    token_type = graph.constant(value["embeddings.token_type.weight"])
    length = graph("Slice", graph("Shape", ids), whole(1), whole(2))
    rows = graph("Add", graph.rows(word, "Gather", ids), graph("Gather", token_type, types))
    rows = graph("Add", rows, graph.rows(position, "Slice", whole(0), length, whole(0)))
    hidden = norm(rows, "embeddings.norm")

    counts = graph.floats(mask)
    # A large number instead of infinity, so that a row without pieces does not give NaN.
    absent = graph("Mul", graph("Sub", graph.constant(1.0), counts), graph.constant(-1e9))
    absent = graph("Unsqueeze", absent, whole(1, 2))
    split_heads, merge_heads = whole(0, 0, A, H // A), whole(0, 0, H)
    # Labels of a text depend on its first piece only, so the last layer computes no other.
    first_only = labels is not None and labels.of_text and list(heads) == ["logits"]
    for number in range(config.num_hidden_layers):
        layer = f"encoder.layers.{number}"
        weight, bias = value[f"{layer}.qkv.weight"].copy(), value[f"{layer}.qkv.bias"].copy()
        weight[:H] *= (H // A) ** -0.5  # folds the scale of the scores into the weights
        bias[:H] *= (H // A) ** -0.5
        qkv = graph.linear(hidden, weight, bias)
        query, key, values = (
            graph("Transpose", graph("Reshape", part, split_heads), perm=order)
            for part, order in zip(
                graph("Split", qkv, whole(H, H, H), outputs=3, axis=-1),
                ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]),
                strict=True,
            )
        )
        if first_only and number == config.num_hidden_layers - 1:
            query = graph("Slice", query, whole(0), whole(1), whole(2))
            hidden = graph("Slice", hidden, whole(0), whole(1), whole(1))
        scores = graph("Add", graph("MatMul", query, key), absent)
        context = graph("MatMul", graph("Softmax", scores, axis=-1), values)
        context = graph("Reshape", graph("Transpose", context, perm=[0, 2, 1, 3]), merge_heads)
        attended = linear(context, f"{layer}.attention_output")
        hidden = norm(graph("Add", attended, hidden), f"{layer}.attention_norm")
        expanded = graph.activation(linear(hidden, f"{layer}.intermediate"), config.hidden_act)
        contracted = linear(expanded, f"{layer}.output")
        hidden = norm(graph("Add", contracted, hidden), f"{layer}.output_norm")

    outputs: dict[str, tuple[str, list[str | int]]] = {}
    if "hidden" in heads:
        outputs[OUTPUTS["hidden"]] = hidden, ["batch", "length", H]
    if "pooled" in heads:
        pooling = pooling or Pooling()
        pooled = _pooled(graph, pooling, hidden, counts)
        outputs[OUTPUTS["pooled"]] = pooled, ["batch", pooling.width(H)]
    if "logits" in heads and labels is not None:
        x, shape = hidden, ["batch", "length"]
        if labels.of_text:
            first = graph("Gather", hidden, graph.constant(0, np.int64), axis=1)
            x, shape = graph("Tanh", linear(first, "pooler")), ["batch"]
        weight, bias = (p.detach().cpu().float().numpy() for p in labels.scores.parameters())
        scores = graph.product(x, (graph.constant(weight.T),), bias)
        if len(labels.outputs) == 1:
            outputs[labels.outputs[0]] = scores, [*shape, len(bias)]
        else:
            for number, name in enumerate(labels.outputs):
                one = graph.constant(number, np.int64)
                outputs[name] = graph("Gather", scores, one, axis=-1), [*shape]
    elif "logits" in heads:
        x = graph.activation(linear(hidden, "head.dense"), config.hidden_act)
        decoder = word
        if not config.tie_word_embeddings:
            decoder = graph.table(value["head.decoder"], MATRIX_BITS)
        matrix = [
            graph("Transpose", decoder[0], perm=[1, 0])
        ]  # constant-folded when the file is opened
        if int8:
            matrix.append(graph("Reshape", decoder[1], whole(-1)))
        scores = graph.product(norm(x, "head.norm"), tuple(matrix), value["head.bias"])
        outputs[OUTPUTS["logits"]] = scores, ["batch", "length", config.vocab_size]
    return graph.model(outputs)
