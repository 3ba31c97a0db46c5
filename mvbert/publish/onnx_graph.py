"""Builds the ONNX graph of a BERT, in float32 or int8, from standard operators.

Query, key and value are one matrix product; the word table is one tensor, used for the embeddings
and, where tied, for the logits.

In int8 each row of a table and each column of a matrix has its own scale. What goes into a matrix
is quantised so that a text's outputs do not depend on padding or on other texts: after a LayerNorm
and after attention with one constant scale, measured on sample rows; elsewhere with a scale per
row. Zero stays exactly zero. docs/export.md has the reasons, with measurements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Literal

import numpy as np

from mvbert import __version__
from mvbert.errors import InputError, require_extra
from mvbert.model.masked_lm import LabelHead, MaskedLM
from mvbert.model.pooling import Pooling

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUTS = {"hidden": "last_hidden_state", "pooled": "sentence_embedding", "logits": "logits"}

# LayerNormalization needs opset 17, which ONNX Runtime supports since 1.12 (2022).
OPSET, IR_VERSION = 17, 8

# With more than 7 bits, sums of two products of weights and 8-bit inputs can overflow the 16 bits
# that x86 without VNNI uses. Tables that are only looked up have no products.
MATRIX_BITS, TABLE_BITS = 7, 8

# Inputs are stored as value / scale + zero in 0..255.
SYMMETRIC, AFTER_ACTIVATION = 128, 15  # zeros
MARGIN = 1.2  # of constant scales above the largest value measured
LOWEST = {"gelu": -0.1701, "gelu_new": -0.1701, "silu": -0.2785, "relu": 0.0}  # rounded down

Precision = Literal["float32", "float16", "int8"]
Outputs = dict[str, tuple[str, list[str | int]]]  # by name: the value, and its shape


def load_onnx() -> tuple[ModuleType, ModuleType]:
    """Imports onnx and onnxruntime.

    Raises:
        MissingExtra: one is not installed.
    """
    with require_extra("onnx", "an ONNX graph"):
        import onnx
        import onnxruntime
    return onnx, onnxruntime


class _Graph:
    """Builds a graph; a call adds a node and returns the names of its outputs."""

    def __init__(self, precision: Precision) -> None:
        self._helper = load_onnx()[0].helper
        self.int8 = precision == "int8"
        self.dtype: type = np.float16 if precision == "float16" else np.float32
        self._nodes: list[Any] = []
        self._tensors: list[Any] = []
        self._count = 0
        self._one: str | None = None

    def __call__(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"v{self._count + i}" for i in range(outputs)]
        self._count += outputs
        self._nodes.append(self._helper.make_node(operator, inputs, names, **attributes))
        return names[0] if outputs == 1 else tuple(names)

    def constant(self, value: Any, dtype: type | None = None) -> str:
        array: np.ndarray = np.ascontiguousarray(value, dtype or self.dtype)
        name = f"c{len(self._tensors)}"
        tensor = load_onnx()[0].numpy_helper.from_array(array.reshape(np.shape(value)), name)
        self._tensors.append(tensor)
        return name

    def floats(self, x: str) -> str:
        to = self._helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        return self("Cast", x, to=to)

    def table(self, rows: np.ndarray, bits: int) -> tuple[str, ...]:
        """Adds a table [V, H] for look-ups: floats, or int8 and scales [V, 1]."""
        if not self.int8:
            return (self.constant(rows),)
        values, scales = quantised(rows, bits)
        return self.constant(values, np.int8), self.constant(scales)

    def rows(self, table: tuple[str, ...], operator: str, *indices: str) -> str:
        """Rows of a table, by Gather or Slice."""
        parts = [self(operator, part, *indices) for part in table]
        return parts[0] if len(parts) == 1 else self("Mul", self.floats(parts[0]), parts[1])

    def linear(
        self,
        x: str,
        weight: np.ndarray,
        bias: np.ndarray,
        scale: float | None = None,
        lowest: float | None = None,
    ) -> str:
        """x W^T + b for a weight [out, in]; `scale` and `lowest` as in `product`."""
        if not self.int8:
            return self.product(x, (self.constant(weight.T),), bias)
        values, scales = quantised(weight, MATRIX_BITS)
        matrix = self.constant(values.T, np.int8), self.constant(scales[:, 0])
        return self.product(x, matrix, bias, scale, lowest)

    def product(
        self,
        x: str,
        matrix: tuple[str, ...],
        bias: np.ndarray,
        scale: float | None = None,
        lowest: float | None = None,
    ) -> str:
        """x M + b for a matrix [in, out]: floats, or int8 and scales [out].

        Args:
            scale: quantise x in int8 with this scale; None: with a scale per row.
            lowest: x is never below it, which leaves more steps to what is above zero.
        """
        if len(matrix) == 1:
            return self("Add", self("MatMul", x, *matrix), self.constant(bias))
        of_row: str | None = None
        if scale is not None:
            zero = self.constant(SYMMETRIC, np.uint8)
            values = self("QuantizeLinear", x, self.constant(scale), zero)
        else:
            values, of_row, zero, scale = self._quantised_rows(x, lowest)
        # The pattern of nodes that ONNX Runtime fuses into one; it multiplies the constants before.
        scales = self("Mul", self.constant(scale), matrix[1])
        sums = self("MatMulInteger", values, matrix[0], zero, self.constant(0, np.int8))
        y = self("Mul", self.floats(sums), self("Mul", self._variable_one(), scales))
        if of_row is not None:
            y = self("Mul", y, of_row)
        return self("Add", y, self.constant(bias))

    def _quantised_rows(self, x: str, lowest: float | None) -> tuple[str, str, str, float]:
        """Quantises x [.., in]: x = (values - zero) * scale * of_row, of_row [.., 1].

        Returns:
            values, of_row, zero, scale.
        """
        zero, magnitudes, floor = SYMMETRIC, self("Abs", x) if lowest is None else x, 1e-30
        if lowest is not None:
            zero = AFTER_ACTIVATION if lowest < 0 else 0
        steps = 255 - zero
        if lowest:  # large enough that `lowest` is not clipped
            floor = -lowest * steps / zero
        of_row = self("ReduceMax", magnitudes, axes=[-1], keepdims=1)
        of_row = self("Max", of_row, self.constant(floor))
        shares = self("Mul", x, self("Reciprocal", of_row))
        zero_name = self.constant(zero, np.uint8)
        values = self("QuantizeLinear", shares, self.constant(1 / steps), zero_name)
        return values, of_row, zero_name, 1 / steps

    def _variable_one(self) -> str:
        """1, computed, so that ONNX Runtime fuses products with it before it folds constants."""
        if self._one is None:
            size = self("Size", INPUTS[0])
            self._one = self.floats(self("Min", size, self.constant(1, np.int64)))
        return self._one

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

    def model(self, inputs: Sequence[str], outputs: Outputs) -> bytes:
        """Serialises the model; outputs are floats."""
        onnx, helper = load_onnx()[0], self._helper
        for name, (value, _) in outputs.items():
            to = onnx.TensorProto.FLOAT
            self._nodes.append(helper.make_node("Cast", [value], [name], to=to))
        int64, float_ = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
        graph = helper.make_graph(
            self._nodes,
            "bert",
            [helper.make_tensor_value_info(n, int64, ["batch", "length"]) for n in inputs],
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


def smoothed(largest: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, float]:
    """Moves range between the input channels of a matrix, so that one scale suits them all.

    SmoothQuant (Xiao et al. 2022, arXiv 2211.10438) with exponent 0.5: x / c has the channels'
    ranges nearer to each other, and W c those of the weights.

    Args:
        largest: [in], the largest absolute value of every channel of x.
        weight: [out, in].

    Returns:
        c [in], and the scale for x / c.
    """
    weights = np.abs(weight).max(0)
    usable = (largest > 1e-5) & (weights > 1e-5)
    ratio = np.sqrt(largest[usable] / weights[usable], dtype=np.float32)
    channels = np.ones(len(largest), np.float32)
    if len(ratio):
        channels[usable] = ratio / np.exp(np.log(ratio).mean())
    return channels, constant_scale(largest / channels)


def constant_scale(largest: np.ndarray) -> float:
    """The scale for inputs whose channels' largest absolute values are `largest`."""
    return max(float(largest.max()), 1e-20) * MARGIN / (SYMMETRIC - 1)


class _Bert:
    """Adds the parts of a BERT to a graph.

    Args:
        largest: for int8, what `calibration.largest_inputs` measured.
    """

    def __init__(
        self, model: MaskedLM, precision: Precision, largest: Mapping[str, np.ndarray] | None
    ) -> None:
        if precision == "int8" and largest is None:
            raise ValueError("an int8 graph needs the largest inputs of its products")
        self.graph, self.config = _Graph(precision), model.config
        self._largest = largest if precision == "int8" else None
        self._value = {n: p.detach().cpu().float().numpy() for n, p in model.named_parameters()}
        if sum(array.nbytes for array in self._value.values()) >= 2**31:
            raise InputError("a model of 2 GB or more does not fit one ONNX file")

    def _integers(self, *numbers: int) -> str:
        return self.graph.constant(numbers, np.int64)

    def _linear(self, x: str, name: str) -> str:
        """A linear layer after a LayerNorm."""
        weight, scale = self._value[f"{name}.weight"], None
        if self._largest is not None:
            channels, scale = smoothed(self._largest[name], weight)
            x = self.graph("Mul", x, self.graph.constant(1 / channels))
            weight = weight * channels
        return self.graph.linear(x, weight, self._value[f"{name}.bias"], scale)

    def _norm(self, x: str, name: str) -> str:
        weight, bias = (self._value[f"{name}.{part}"] for part in ("weight", "bias"))
        return self.graph.norm(x, weight, bias, self.config.layer_norm_eps)

    def word_table(self, scored: bool) -> tuple[str, ...]:
        """The word table; `scored`: it is also the matrix of the logits, where tied."""
        bits = MATRIX_BITS if scored and self.config.tie_word_embeddings else TABLE_BITS
        return self.graph.table(self._value["embeddings.word.weight"], bits)

    def embeddings(self, word: tuple[str, ...], inputs: Sequence[str]) -> str:
        """Hidden states [B, T, H] before the first layer."""
        graph, (ids, _, types) = self.graph, INPUTS
        position_rows, type_rows = (
            self._value[f"embeddings.{n}.weight"] for n in ("position", "token_type")
        )
        if types not in inputs:
            position_rows = position_rows + type_rows[:1]
        position = graph.table(position_rows, TABLE_BITS)
        length = graph("Slice", graph("Shape", ids), self._integers(1), self._integers(2))
        rows = graph.rows(word, "Gather", ids)
        if types in inputs:
            rows = graph("Add", rows, graph("Gather", graph.constant(type_rows), types))
        start, axis = self._integers(0), self._integers(0)
        rows = graph("Add", rows, graph.rows(position, "Slice", start, length, axis))
        return self._norm(rows, "embeddings.norm")

    def encoder(self, hidden: str, first_only: bool) -> str:
        """Hidden states after the last layer; `first_only`: only those of first pieces."""
        graph, H, A = self.graph, self.config.hidden_size, self.config.num_attention_heads
        # A large number instead of infinity, so that a row without pieces does not give NaN.
        large = -3e4 if graph.dtype is np.float16 else -1e9
        absent = graph("Sub", graph.constant(1.0), graph.floats(INPUTS[1]))
        absent = graph("Mul", absent, graph.constant(large))
        absent = graph("Unsqueeze", absent, self._integers(1, 2))
        shapes = self._integers(0, 0, A, H // A), self._integers(0, 0, H)
        last = self.config.num_hidden_layers - 1
        for number in range(last + 1):
            layer = f"encoder.layers.{number}"
            hidden = self._layer(layer, hidden, absent, shapes, first_only and number == last)
        return hidden

    def _layer(
        self, layer: str, hidden: str, absent: str, shapes: tuple[str, str], first_only: bool
    ) -> str:
        """One layer; `absent` is added to scores, `shapes` are those of split and merged heads."""
        graph, H, activation = self.graph, self.config.hidden_size, self.config.hidden_act
        after, scale = self._fold_scales(layer)
        qkv = self._linear(hidden, f"{layer}.qkv")
        query, key, values = (
            graph("Transpose", graph("Reshape", part, shapes[0]), perm=order)
            for part, order in zip(
                graph("Split", qkv, self._integers(H, H, H), outputs=3, axis=-1),
                ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]),
                strict=True,
            )
        )
        if first_only:
            query = graph("Slice", query, *(self._integers(n) for n in (0, 1, 2)))
            hidden = graph("Slice", hidden, *(self._integers(n) for n in (0, 1, 1)))
        scores = graph("Add", graph("MatMul", query, key), absent)
        context = graph("MatMul", graph("Softmax", scores, axis=-1), values)
        context = graph("Reshape", graph("Transpose", context, perm=[0, 2, 1, 3]), shapes[1])
        bias = self._value[f"{layer}.attention_output.bias"]
        attended = graph.linear(context, after, bias, scale)
        hidden = self._norm(graph("Add", attended, hidden), f"{layer}.attention_norm")
        expanded = graph.activation(self._linear(hidden, f"{layer}.intermediate"), activation)
        weight, bias = (self._value[f"{layer}.output.{part}"] for part in ("weight", "bias"))
        contracted = graph.linear(expanded, weight, bias, lowest=LOWEST[activation])
        return self._norm(graph("Add", contracted, hidden), f"{layer}.output_norm")

    def _fold_scales(self, layer: str) -> tuple[np.ndarray, float | None]:
        """Folds the scale of a layer's scores into its weights, and for int8 that of the result.

        Returns:
            The matrix after attention [H, H], and the scale of its inputs.
        """
        H, A = self.config.hidden_size, self.config.num_attention_heads
        weight, bias = (self._value[f"{layer}.qkv.{part}"].copy() for part in ("weight", "bias"))
        self._value |= {f"{layer}.qkv.weight": weight, f"{layer}.qkv.bias": bias}
        weight[:H] *= (H // A) ** -0.5
        bias[:H] *= (H // A) ** -0.5
        after, scale = self._value[f"{layer}.attention_output.weight"], None
        if self._largest is not None:
            # What is moved from the attention's result is moved into the values' weights.
            channels, scale = smoothed(self._largest[f"{layer}.attention_output"], after)
            after = after * channels
            weight[2 * H :] /= channels[:, None]
            bias[2 * H :] /= channels
        return after, scale

    def piece_scores(self, hidden: str, word: tuple[str, ...]) -> str:
        """Logits over the vocabulary [B, T, V]."""
        graph, config = self.graph, self.config
        x = graph.activation(self._linear(hidden, "head.dense"), config.hidden_act)
        x = self._norm(x, "head.norm")
        decoder = word
        if not config.tie_word_embeddings:
            decoder = graph.table(self._value["head.decoder"], MATRIX_BITS)
        # Constant-folded when the file is opened.
        matrix = [graph("Transpose", decoder[0], perm=[1, 0])]
        scale = None
        if self._largest is not None:
            matrix.append(graph("Reshape", decoder[1], self._integers(-1)))
            scale = constant_scale(self._largest["decoder"])
        return graph.product(x, tuple(matrix), self._value["head.bias"], scale)

    def label_scores(self, labels: LabelHead, hidden: str) -> Outputs:
        """The outputs of a label head, in floats."""
        graph, value = self.graph, self._value
        x, shape = hidden, ["batch", "length"]
        if labels.of_text:
            first = graph("Gather", hidden, graph.constant(0, np.int64), axis=1)
            pooled = graph.linear(first, value["pooler.weight"], value["pooler.bias"])
            x, shape = graph("Tanh", pooled), ["batch"]
        weight, bias = (p.detach().cpu().float().numpy() for p in labels.scores.parameters())
        scores = graph.product(x, (graph.constant(weight.T),), bias)
        if labels.intents:
            tags = len(bias) - labels.intents
            ends = (graph.constant((n,), np.int64) for n in (0, tags, len(bias), 2))
            start, middle, end, last = ends
            first = graph("Gather", scores, graph.constant(0, np.int64), axis=1)
            axis = graph.constant((1,), np.int64)
            return {
                "logits": (graph("Slice", scores, start, middle, last), [*shape, tags]),
                "intent_logits": (
                    graph("Slice", first, middle, end, axis),
                    ["batch", labels.intents],
                ),
            }
        if len(labels.outputs) == 1:
            return {labels.outputs[0]: (scores, [*shape, len(bias)])}
        return {
            name: (graph("Gather", scores, graph.constant(number, np.int64), axis=-1), [*shape])
            for number, name in enumerate(labels.outputs)
        }


def _pooled(graph: _Graph, pooling: Pooling, hidden: str, counts: str) -> str:
    """Adds the pooling of hidden states [B, T, H] with weights `counts` [B, T], both float32."""
    if pooling.mode == "cls":
        x = graph("Gather", hidden, graph.constant(0, np.int64), axis=1)
    elif pooling.mode == "max":
        each = graph("Unsqueeze", counts, graph.constant((2,), np.int64))
        absent = graph("Mul", graph("Sub", graph.constant(1.0), each), graph.constant(-1e9))
        x = graph(
            "ReduceMax", graph("Add", graph("Mul", hidden, each), absent), axes=[1], keepdims=0
        )
    else:
        # A product, because its sums do not depend on how many zeros follow, as ReduceSum's do;
        # of two equal rows, because ONNX Runtime adds up differently where there is only one.
        one = graph.constant((1,), np.int64)
        twice = graph("Unsqueeze", counts, one)
        total = graph("MatMul", graph("Concat", twice, twice, axis=1), hidden)
        total = graph("Gather", total, graph.constant(0, np.int64), axis=1)
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
    precision: Precision = "float32",
    labels: LabelHead | None = None,
    pooling: Pooling | None = None,
    largest: Mapping[str, np.ndarray] | None = None,
    inputs: Sequence[str] = INPUTS,
) -> bytes:
    """Converts a model to an ONNX file.

    Args:
        heads: outputs, keys of OUTPUTS: hidden states [B, T, H]; sentence embeddings [B, width];
            logits over labels, if `labels` is given, else over the vocabulary [B, T, V].
        precision: float16 computes in float16, pooling apart; int8 stores weights and tables in
            int8, except those of `labels`, and multiplies them as integers. Outputs are float32.
        labels: the label head, if any.
        pooling: makes the sentence embeddings; None for the mean.
        largest: for int8, what `calibration.largest_inputs` measured.
        inputs: INPUTS, or without the last one: then all pieces are of the first token type.

    Raises:
        InputError: the file would be larger than ONNX allows.
    """
    bert = _Bert(model, precision, largest)
    graph, H = bert.graph, model.config.hidden_size
    word = bert.word_table(scored="logits" in heads and labels is None)
    # Labels of a text depend on its first piece only, so the last layer computes no other.
    first_only = labels is not None and labels.of_text and [*heads] == ["logits"]
    hidden = bert.encoder(bert.embeddings(word, inputs), first_only)
    outputs: Outputs = {}
    if "hidden" in heads:
        outputs[OUTPUTS["hidden"]] = hidden, ["batch", "length", H]
    if "logits" in heads and labels is not None:
        outputs |= bert.label_scores(labels, hidden)
    elif "logits" in heads:
        scores = bert.piece_scores(hidden, word)
        outputs[OUTPUTS["logits"]] = scores, ["batch", "length", model.config.vocab_size]
    if "pooled" in heads:
        pooling = pooling or Pooling()
        graph.dtype = np.float32  # sums over a long text are too coarse in float16
        pooled = _pooled(graph, pooling, graph.floats(hidden), graph.floats(INPUTS[1]))
        outputs[OUTPUTS["pooled"]] = pooled, ["batch", pooling.width(H)]
    ordered = {name: outputs[name] for name in OUTPUTS.values() if name in outputs}
    return graph.model(inputs, ordered | outputs)
