"""What fewer bits in matrices and tables cost a fine-tuned model, in bytes and in its dev score.

    python docs/experiments/fewer_bits.py tuned data:glue-sst-2.tar.xz -o bits.jsonl
    python docs/experiments/fewer_bits.py tuned data:glue-sst-2.tar.xz --block 0 -o bits.jsonl
    python docs/experiments/fewer_bits.py tuned DATA --mlm student --corpus corpus -o bits.jsonl

Weights are rounded to BITS bits, symmetric, one float32 scale for each BLOCK of a row's numbers (0:
for each row), and everything is computed in float32: what is measured is the rounding of weights
alone. The folder with rounded weights is scored by `mvbert eval --data`, and with --mlm another
folder, rounded the same way, by `mvbert eval --corpus` (bits per word). Matrices are those of the
layers and the pooler, tables those of words and positions; the rest stays float32.

One JSON object a line, for each pair of bits:

    matrices, tables   bits; null: float32
    bytes, zipped      of the weights, packed, and after zlib's level 6
    zipped_bytes       the same with a byte for each number, as in the int8 graph of `mvbert export`
    score              the metrics of every labelled split
    bits_per_word      with --mlm

Where matrices and tables both have 4 bits and --block is a power of two from 16 on, the weights are
also written as an ONNX graph of MatMulNBits and GatherBlockQuantized, which ONNX Runtime runs:
`onnx_bytes`, `onnx_zipped` and `onnx_score`.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvbert.config import MeasureConfig, RowConfig
from mvbert.errors import InputError
from mvbert.files import read_json_object
from mvbert.model.huggingface import find_model, write_tensors
from mvbert.model.weights import WEIGHTS, read_tensors, read_weights, weight_files
from mvbert.publish.export import Session
from mvbert.publish.onnx_graph import OUTPUTS, load_onnx, to_onnx
from mvbert.study.evaluate import run_eval
from mvbert.tasks import score
from mvbert.tasks.formats import find_task, read_examples
from mvbert.tasks.model import TaskModel, load_task_model
from mvbert.tasks.rows import TaskBatch, make_rows
from mvbert.training.device import Device

MATRIX = re.compile(r"bert\.(encoder\.layer\.\d+\..*(?<!LayerNorm)|pooler\.dense)\.weight$")
# An untied table of the output layer is one of the head, which no fine-tuned folder has.
TABLE = re.compile(
    r"bert\.embeddings\.(word|position)_embeddings\.weight$|cls\.predictions\.decoder\.weight$"
)
BITS = (8, 7, 6, 5, 4, 3)


def rounded(weight: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """A matrix as whole numbers and scales.

    Args:
        weight: [rows, columns].
        bits: of a number, which lies in [-(2^(bits-1) - 1), 2^(bits-1) - 1].
        block: numbers of a row that share a scale; 0: the whole row.

    Returns:
        Whole numbers [rows, blocks, block] int8, the last block of a row filled up with 0, and
        scales [rows, blocks] float32.
    """
    rows, columns = weight.shape
    block = block or columns
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % block))
    parts = padded.reshape(rows, -1, block)
    most = 2 ** (bits - 1) - 1
    scales = parts.abs().amax(-1) / most
    values = (parts / scales.clamp_min(1e-30)[..., None]).round()
    return values.to(torch.int8), scales


def restored(values: Tensor, scales: Tensor, columns: int) -> Tensor:
    """The matrix [rows, columns] that whole numbers and scales stand for."""
    return (values * scales[..., None]).flatten(1)[:, :columns]


def packed(values: Tensor, bits: int) -> bytes:
    """Whole numbers, one after the other, of `bits` bits each; the last byte is filled up."""
    shifted = (values.flatten().numpy().astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    places = np.unpackbits(shifted[:, None], axis=1, bitorder="little")[:, :bits]
    return np.packbits(places.ravel(), bitorder="little").tobytes()


def zipped(data: bytes) -> int:
    return len(zlib.compress(data, 6))


def bits_of(name: str, matrices: int | None, tables: int | None) -> int | None:
    """The bits of a tensor; None: it stays as it is."""
    if MATRIX.match(name):
        return matrices
    return tables if TABLE.match(name) else None


def write_rounded(
    folder: Path, out: Path, matrices: int | None, tables: int | None, block: int
) -> tuple[bytes, bytes]:
    """Writes a model's folder with rounded weights.

    Returns:
        The weights that the task reads, packed, and with a byte for each rounded number.
    """
    shutil.copytree(
        folder, out, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.index*")
    )
    source = read_weights(folder)
    names = {source.key(name): name for name in source.tensors}
    tensors: dict[str, Tensor] = {}
    small, bytewise = [], []
    for path in weight_files(folder):
        for key, tensor in read_tensors(path).items():
            name = names[key]
            bits = bits_of(name, matrices, tables)
            if bits is not None:
                values, scales = rounded(tensor, bits, block)
                tensor = restored(values, scales, tensor.shape[1])
                small.append(packed(values, bits) + scales.numpy().tobytes())
                bytewise.append(values.numpy().tobytes() + scales.numpy().tobytes())
            elif tensor.is_floating_point():
                small.append(tensor.float().numpy().tobytes())
                bytewise.append(small[-1])
            tensors[key] = tensor.clone()
    write_tensors(out / WEIGHTS, tensors)
    return b"".join(small), b"".join(bytewise)


# ---- MatMulNBits ---------------------------------------------------------------------------------


def nbits_graph(model: TaskModel, block: int) -> bytes:
    """The ONNX graph of a model with its matrices and tables in 4 bits.

    Matrices are MatMulNBits, the tables of words and positions GatherBlockQuantized: operators of
    ONNX Runtime, not of ONNX. The whole numbers are those of `rounded`.
    """
    onnx, _ = load_onnx()
    graph = onnx.load_from_string(to_onnx(model.bert, ["logits"], labels=model.head))
    stored = {t.name: t for t in graph.graph.initializer}
    labels = tuple(model.head.scores.weight.shape)[::-1]
    word = (model.bert.config.vocab_size, model.bert.config.hidden_size)
    made: list[Any] = []

    def keep(name: str, array: np.ndarray, kind: int | None = None) -> str:
        if kind is None:
            made.append(onnx.numpy_helper.from_array(array, name))
        else:
            made.append(onnx.helper.make_tensor(name, kind, array.shape, array.ravel()))
        return name

    nodes: list[Any] = []
    for node in graph.graph.node:
        name = node.input[1] if node.op_type == "MatMul" else node.input[0]
        shape = tuple(stored[name].dims) if name in stored else ()
        table = (node.op_type == "Gather" and shape == word) or node.op_type == "Slice"
        matrix = node.op_type == "MatMul" and shape != labels
        if len(shape) != 2 or not (table or matrix):
            nodes.append(node)
            continue
        array = torch.from_numpy(onnx.numpy_helper.to_array(stored[name]).copy())
        values, scales = rounded(array if table else array.T, 4, block)
        of_scales = keep(f"{name}_scales", scales.numpy())
        if matrix:
            two = (values.numpy() + 8).astype(np.uint8)
            both = keep(f"{name}_4", two[..., ::2] | two[..., 1::2] << 4)
            nodes.append(onnx.helper.make_node(
                "MatMulNBits", [node.input[0], both, of_scales], node.output,
                domain="com.microsoft", K=shape[0], N=shape[1], bits=4, block_size=block,
            ))  # fmt: skip
            continue
        rows = node.input[1]
        if node.op_type == "Slice":  # the first rows of the table of positions
            start, step = (
                keep(f"{name}_{what}", np.array(number, np.int64))
                for what, number in (("start", 0), ("step", 1))
            )
            rows = f"{name}_rows"
            end = f"{name}_end"
            nodes.append(onnx.helper.make_node("Squeeze", [node.input[2]], [end]))
            nodes.append(onnx.helper.make_node("Range", [start, end, step], [rows]))
        whole = keep(f"{name}_4", values.flatten(1)[:, : shape[1]].numpy(), onnx.TensorProto.INT4)
        nodes.append(onnx.helper.make_node(
            "GatherBlockQuantized", [whole, rows, of_scales], node.output,
            domain="com.microsoft", block_size=block, gather_axis=0, quantize_axis=1,
        ))  # fmt: skip
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    rest = [tensor for name, tensor in stored.items() if name in used]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend([*rest, *made])
    graph.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return graph.SerializeToString()


class GraphModel(torch.nn.Module):
    """A graph in the place of the model that it was made of, for the scorer."""

    def __init__(self, model: TaskModel, graph: bytes) -> None:
        super().__init__()
        self.labels, self._session, self._of_text = model.labels, Session(graph), model.head.of_text

    def forward(self, batch: TaskBatch) -> Tensor:
        """Scores at the batch's places, [N, labels]."""
        ids = batch.input_ids
        mask = torch.ones_like(ids).bool() if batch.mask is None else batch.mask
        logits = self._session(ids, mask, batch.token_type_ids)[OUTPUTS["logits"]]
        # Of a text: its row. A text's place is that of its first piece.
        if self._of_text:
            return logits[batch.index // ids.shape[1]]
        return logits.flatten(0, 1)[batch.index]


def graph_scores(folder: Path, data: str, block: int) -> dict[str, Any]:
    """Bytes and metrics of `nbits_graph` of a fine-tuned folder."""
    model, vocab = load_task_model(folder)
    if model.labels.kind == "joint":
        raise InputError(f"{folder} is a joint model, whose graph has two outputs; use --block 0")
    graph = nbits_graph(model, block)
    described: Any = read_json_object(folder / "finetune.json")["description"]
    kept = described.get("columns", {})
    task = find_task(described["task"], *(kept.get(c, "") for c in ("text", "pair", "label")))
    length = int(described.get("length") or model.bert.config.max_position_embeddings)
    stand_in: Any = GraphModel(model, graph)
    found = {}
    for name, examples in read_examples(task, data).items():
        if examples.labelled and name != "train":
            split = score.Split(examples, make_rows(task, examples, vocab, length))
            cpu = Device.of(torch.device("cpu"), "float32", "as the graph")
            found[name] = score.evaluate(task, stand_in, split, vocab, cpu)
    return {"onnx_bytes": len(graph), "onnx_zipped": zipped(graph), "onnx_score": found}


# ---- the arms ------------------------------------------------------------------------------------


def arms(bits: list[int]) -> list[tuple[int | None, int | None]]:
    """Bits of matrices and of tables: float32, then each alone below 8, then both."""
    pairs: list[tuple[int | None, int | None]] = [(None, None)]
    for pair in [(b, 8) for b in bits] + [(8, b) for b in bits] + [(b, b) for b in bits]:
        if pair not in pairs:
            pairs.append(pair)
    return pairs


def measured(
    folder: Path, data: str, pair: tuple[int | None, int | None], args: argparse.Namespace
) -> dict[str, Any]:
    """The record of one arm."""
    matrices, tables = pair
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "model")
        small, bytewise = write_rounded(folder, out, matrices, tables, args.block)
        scored = score.run_score(str(out), "", data, dtype="float32", threads=args.threads)
        record = {
            "model": str(folder), "block": args.block, "matrices": matrices, "tables": tables,
            "bytes": len(small), "zipped": zipped(small), "zipped_bytes": zipped(bytewise),
            "score": {name: value for name, value in scored.items() if isinstance(value, dict)},
        }  # fmt: skip
        if pair == (4, 4) and args.block >= 16 and not args.block & (args.block - 1):
            # The graph rounds the weights itself.
            record |= graph_scores(folder, data, args.block)
        if args.mlm is not None:
            rounded_mlm = Path(scratch, "mlm")
            write_rounded(find_model(args.mlm), rounded_mlm, matrices, tables, args.block)
            measures = run_eval(
                str(rounded_mlm), args.corpus, RowConfig(length=args.row_length),
                MeasureConfig(words=args.words), dtype="float32", threads=args.threads,
            )  # fmt: skip
            record |= {name: measures[name] for name in ("bits_per_word", "bits_error")}
    return record


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder of `mvbert finetune`")
    parser.add_argument("data", help="as for `mvbert eval --data`")
    parser.add_argument("-o", "--out", type=Path, required=True, help="lines are appended to it")
    parser.add_argument("--bits", type=int, nargs="+", default=list(BITS))
    parser.add_argument("--block", type=int, default=32, help="numbers a scale; 0: a row")
    parser.add_argument("--mlm", help="a folder with a masked-language-model head")
    parser.add_argument("--corpus", type=Path, help="with --mlm")
    parser.add_argument("--words", type=int, default=MeasureConfig().words, help="with --mlm")
    parser.add_argument("--row-length", type=int, default=RowConfig().length, help="with --mlm")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        if not all(2 <= bits <= 8 for bits in args.bits):
            raise InputError(f"--bits is {args.bits}; expected numbers from 2 to 8")
        if args.block < 0:
            raise InputError(f"--block is {args.block}; expected 0 or more")
        if (args.mlm is None) != (args.corpus is None):
            raise InputError("--mlm and --corpus go together")
        folder = find_model(args.model)
        for pair in arms(args.bits):
            line = json.dumps(measured(folder, args.data, pair, args))
            print(line, flush=True)
            with args.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
    except InputError as error:
        print(f"fewer_bits: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
