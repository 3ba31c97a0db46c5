"""Writes a BERT as a folder of ONNX files, after comparing them with torch.

    OUT/onnx/model.onnx            float32
    OUT/onnx/model_quantized.onnx  int8
    OUT/config.json, vocab.txt, tokenizer.json, tokenizer_config.json

transformers.js and Optimum look for these names.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvbert.config import ModelConfig, RowConfig
from mvbert.errors import InputError
from mvbert.files import (
    Json,
    atomic_folder,
    atomic_write,
    read_json_object,
    sync_folder,
    write_json,
)
from mvbert.model import huggingface
from mvbert.model.masked_lm import DeviceBatch, LabelHead, MaskedLM
from mvbert.model.weights import read_weights
from mvbert.progress import Progress
from mvbert.publish.onnx_graph import INPUTS, OUTPUTS, load_onnx, to_onnx
from mvbert.publish.pooling import Pooling, read_pooling
from mvbert.text.batches import Batch, Rows
from mvbert.text.corpus import Corpus, build_corpus
from mvbert.text.stage_rows import heldout_rows
from mvbert.text.tokenizer import save_tokenizer_files
from mvbert.text.vocab import Vocab

FLOAT, INT8 = "onnx/model.onnx", "onnx/model_quantized.onnx"
ROWS, PIECES = 64, 128  # shape of the comparison's batch; timed rows have PIECES too
CHECK_ROWS = 4  # rows per forward pass; few, because logits of all pieces are large
BOUND = 1e-4  # maximum difference of float32 from torch, relative to the largest value
# Passages of eleven books of the public domain, to compare on if no corpus is given.
SAMPLE = Path(__file__).with_name("sample.txt")


# ---- running a graph -----------------------------------------------------------------------------


class Session:
    """An ONNX Runtime session on the CPU."""

    def __init__(self, file: bytes | Path, threads: int = 1) -> None:
        onnxruntime = load_onnx()[1]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(
            file, options, providers=["CPUExecutionProvider"]
        )
        self.outputs = [output.name for output in self._session.get_outputs()]

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Any:
        """Integer inputs [B, T] -> outputs by name."""
        inputs = zip(INPUTS, (input_ids, attention_mask, token_type_ids), strict=True)
        results = self._session.run(None, {name: x.long().numpy() for name, x in inputs})
        return {n: torch.from_numpy(x) for n, x in zip(self.outputs, results, strict=True)}

    def milliseconds(self, config: ModelConfig, seconds: float = 0.4) -> float:
        """Median time per row of PIECES pieces."""
        T = min(PIECES, config.max_position_embeddings)
        ids = torch.arange(T)[None] * 7919 % config.vocab_size
        inputs = ids, torch.ones_like(ids), torch.zeros_like(ids)
        times: list[float] = []
        for _ in range(3):
            self(*inputs)
        while len(times) < 5 or (sum(times) < seconds and len(times) < 200):
            started = time.perf_counter()
            self(*inputs)
            times.append(time.perf_counter() - started)
        return float(np.median(times)) * 1e3


# ---- the comparison ------------------------------------------------------------------------------


def real_rows(vocab: Vocab, config: ModelConfig, corpus: Path | None) -> Batch:
    """Masked rows of a corpus's held-out text, or of SAMPLE."""
    pairs = 0.5 if config.type_vocab_size > 1 else 0.0
    row = RowConfig(length=min(PIECES, config.max_position_embeddings), pair_prob=pairs)
    with tempfile.TemporaryDirectory() as scratch:
        if corpus is None:
            folder = Path(scratch, "corpus")
            build_corpus(
                [SAMPLE],
                folder,
                lowercase=vocab.lowercase,
                strip_accents=vocab.strip_accents,
                heldout_share=0.9,
            )
            opened = Corpus.open(folder)
        else:
            opened = Corpus.open(corpus, verify="sha256")
        cut = opened.segment(vocab)
        if "[MASK]" not in vocab.ids:  # a classifier's vocabulary: mask nothing
            rows = Rows(opened.heldout, student=cut, T=row.length, mask_prob=0, pair_prob=pairs)
            return rows.read(0, ROWS)
        return heldout_rows(opened, cut, row).read(0, ROWS)


class Comparison:
    """Compares outputs of ONNX Runtime with torch's on the same rows.

    Rows are truncated to different lengths and padded, so that attention_mask matters.

    Args:
        model: the model in float32, on the CPU.
        head: whether the model can predict pieces; if not, only outputs are compared.
        labels: the label head, if any; then nothing is masked.
        pooling: computes sentence embeddings.
    """

    def __init__(
        self,
        model: MaskedLM,
        vocab: Vocab,
        batch: Batch,
        head: bool,
        labels: LabelHead | None,
        pooling: Pooling,
    ) -> None:
        self._model, self._head, self._labels = model.eval(), head, labels
        self._pooling = pooling
        inputs = DeviceBatch.of(batch, torch.device("cpu"))
        B, T = batch.input_ids.shape
        shortest = T // 2
        lengths = T - torch.arange(B) * 7 % (T - shortest + 1)
        self._mask = torch.arange(T) < lengths[:, None]
        self._ids = inputs.input_ids.where(self._mask, vocab.pad)
        self._types = inputs.token_type_ids
        row, place = inputs.masked_index // T, inputs.masked_index % T
        masked = (inputs.labels >= 0) & self._mask[row, place]
        self._masked = row[masked], place[masked], inputs.labels[masked]
        if labels is not None:
            self._ids[self._masked[:2]] = self._masked[2].to(self._ids.dtype)
        self._hidden: dict[int, Tensor] = {}  # torch's, by first row

    @torch.no_grad()
    def __call__(self, session: Session) -> dict[str, Any]:
        """Compares a session with torch.

        Returns:
            By output, `largest`: the largest difference relative to the largest value, and `error`:
            the RMS of the difference relative to that of the value. If the outputs rank pieces or
            labels, `same_top1`: the share for which both have the same first choice; for pieces
            also `right` and `right_torch`: the accuracies of both.
        """
        sums = {name: [0.0] * 4 for name in session.outputs}
        chosen = same = right = right_torch = 0
        for first in range(0, len(self._ids), CHECK_ROWS):
            rows = slice(first, first + CHECK_ROWS)
            ids, mask, types = self._ids[rows], self._mask[rows], self._types[rows]
            outputs = session(ids, mask, types)
            if first not in self._hidden:
                embedded = self._model.embeddings(ids, types)
                self._hidden[first] = self._model.encoder(embedded, mask)
            expected = self._outputs(self._hidden[first], mask, session.outputs)
            for name, total in sums.items():
                a, b = outputs[name], expected[name]
                if not self._of_text(name):
                    a, b = a[mask], b[mask]
                difference = (a - b).double()
                # NumPy's maximum propagates NaN.
                total[0] = float(np.maximum(total[0], float(difference.abs().max())))
                total[1] = float(np.maximum(total[1], float(b.abs().max())))
                total[2] += float(difference.square().sum())
                total[3] += float(b.double().square().sum())
            if not self._chooses(session.outputs):
                continue
            here = (self._masked[0] >= first) & (self._masked[0] < rows.stop)
            row, place, label = (x[here] for x in self._masked)
            ours, torchs = (
                self._scores(values, mask, row - first, place).argmax(-1)
                for values in (outputs, expected)
            )
            chosen += len(ours)
            same += int((ours == torchs).sum())
            if self._labels is None:
                right += int((ours == label).sum())
                right_torch += int((torchs == label).sum())
        result: dict[str, Any] = {
            "largest": {name: t[0] / max(t[1], 1e-30) for name, t in sums.items()},
            "error": {name: math.sqrt(t[2] / max(t[3], 1e-30)) for name, t in sums.items()},
        }
        if chosen:
            result["masked" if self._labels is None else "labels"] = chosen
            result["same_top1"] = same / chosen
            if self._labels is None:
                result |= {"right": right / chosen, "right_torch": right_torch / chosen}
        return result

    def _of_text(self, name: str) -> bool:
        """Whether an output has one value per text instead of one per piece."""
        of_text = self._labels is not None and self._labels.of_text
        return name == OUTPUTS["pooled"] or (name == OUTPUTS["logits"] and of_text)

    def _outputs(self, hidden: Tensor, mask: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """The graph's outputs as torch computes them."""
        outputs = {OUTPUTS["hidden"]: hidden}
        if OUTPUTS["pooled"] in names:
            outputs[OUTPUTS["pooled"]] = self._pooling(hidden, mask)
        if self._labels is not None:
            outputs |= self._labels(self._model, hidden)
        elif OUTPUTS["logits"] in names:
            outputs[OUTPUTS["logits"]] = self._model.logits(self._model.head(hidden))
        return outputs

    def _chooses(self, names: Sequence[str]) -> bool:
        """Whether the outputs rank several labels or pieces."""
        if self._labels is not None:
            return OUTPUTS["logits"] in names and self._labels.scores.out_features > 1
        return self._head and bool({OUTPUTS["hidden"], OUTPUTS["logits"]} & {*names})

    def _scores(
        self, outputs: dict[str, Tensor], mask: Tensor, row: Tensor, place: Tensor
    ) -> Tensor:
        """Scores of labels, or of pieces at masked positions: [choices, labels or V]."""
        if self._labels is not None:
            scores = outputs[OUTPUTS["logits"]]
            return scores if self._labels.of_text else scores[mask]
        if OUTPUTS["logits"] in outputs:
            return outputs[OUTPUTS["logits"]][row, place]
        return self._model.logits(self._model.head(outputs[OUTPUTS["hidden"]][row, place]))


# ---- the verb ------------------------------------------------------------------------------------


def run_export(
    name: str,
    out: Path,
    *,
    heads: Sequence[str] = (),
    int8: bool = False,
    cased: bool = False,
    corpus: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Json]:
    """Writes the files listed at the top of this module, after comparing them with torch.

    Args:
        name: a name for mvbert.model.huggingface.find_model, e.g. a BERT's folder or a run folder.
        heads: keys of OUTPUTS; empty: logits if the model has a label head, else hidden states.
        cased: treat its vocabulary as cased, whatever the folder says.
        corpus: compare on its held-out text.

    Raises:
        InputError: the model does not exist or has no such head, `out` exists or contains an input,
            or the outputs of ONNX Runtime differ from torch's.
        MissingExtra: onnx or onnxruntime is not installed.
    """
    onnxruntime = load_onnx()[1]
    progress = Progress("export")
    folder = huggingface.find_model(name)
    for path in (folder, corpus):  # `out` is replaced as a whole
        if path is not None and path.resolve().is_relative_to(out.resolve()):
            raise InputError(f"{out} contains the input {path}; give another path")
    shape, vocab = huggingface.read_shape(folder, cased=cased)
    weights = read_weights(folder)
    model, missing = huggingface.load_masked_lm(folder, MaskedLM(shape), weights=weights)
    head = not any(part.startswith("cls.") for part in missing)
    explicit = bool(heads) and "logits" not in heads
    labels = None if explicit else huggingface.load_label_head(folder, weights, shape)
    pooling = read_pooling(folder, shape.hidden_size) if "pooled" in heads else Pooling()
    if not heads:
        heads = ["hidden"] if labels is None else ["logits"]
        progress.note(f"outputs: {heads[0]} (default; see --head)")
    heads = [key for key in OUTPUTS if key in heads]
    if "pooled" in heads:
        progress.note(f"sentence_embedding: {pooling}")
    for note in (vocab.doubt, weights.unread()):
        if note:
            progress.note(note)
    if "logits" in heads and not head and labels is None:
        raise InputError(
            f"{folder} has no head for masked language modelling, classification or question "
            "answering, so there are no logits"
        )
    rows = real_rows(vocab, model.config, corpus)
    compare = Comparison(model, vocab, rows, head, labels, pooling)
    files: dict[str, Json] = {}
    with atomic_folder(out, overwrite=overwrite) as partial:
        (partial / "onnx").mkdir()
        for file in [FLOAT, INT8] if int8 else [FLOAT]:
            data = to_onnx(model, heads, file == INT8, labels, pooling)
            atomic_write(partial / file, data)
            session = Session(data)
            result = compare(session)
            worst = max(result["largest"].values())
            if file == FLOAT and not worst <= BOUND:
                if not math.isfinite(worst):
                    raise InputError(f"{folder}: the model's weights are corrupt (outputs are NaN)")
                raise InputError(
                    f"outputs of ONNX Runtime {onnxruntime.__version__} for {folder} differ from "
                    f"torch's by {worst:.1e} of the largest value, more than {BOUND:.0e}; "
                    "nothing was written"
                )
            result |= {"bytes": len(data), "milliseconds": session.milliseconds(model.config)}
            progress.note(_summary(file, result))
            files[file] = {
                key: _rounded(value) if isinstance(value, dict) else value
                for key, value in _rounded(result).items()
            }
        # Read and written, not copied: config.json may be a relative link.
        config = read_json_object(folder / "config.json")
        write_json(partial / "config.json", config | {"vocab_size": vocab.size})
        save_tokenizer_files(vocab, partial, model.config.max_position_embeddings)
        sync_folder(partial / "onnx")
    return {
        "output": str(out),
        "model": str(folder),
        "outputs": session.outputs,
        "files": files,
        "checked_on": str(corpus) if corpus is not None else "documentation strings of Python",
        "onnxruntime": onnxruntime.__version__,
    }


def _summary(file: str, result: dict[str, Any]) -> str:
    """One line about a file: size, speed and difference from torch."""
    text = (
        f"{file}: {result['bytes'] / 1e6:.2f} MB, {result['milliseconds']:.2f} ms per row, 1 thread"
    )
    if file == FLOAT:
        worst = max(result["largest"].values())
        return f"{text}; differs from torch by {worst:.1e} of the largest value"
    for name, error in result["error"].items():
        text += f"; {name} differs by {error:.1%} (RMS)"
    if "masked" in result:
        text += (
            f"; same top-1 piece for {result['same_top1']:.1%} of {result['masked']} masked ones, "
            f"accuracy {result['right']:.1%}, in float32 {result['right_torch']:.1%}"
        )
    if "labels" in result:
        text += f"; same label for {result['same_top1']:.1%} of {result['labels']}"
    return text


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Rounds floats to four significant digits."""
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}
