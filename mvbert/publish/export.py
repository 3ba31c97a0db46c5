"""Writes a BERT as a folder of ONNX files, after comparing them with torch.

    OUT/onnx/model.onnx            float32
    OUT/onnx/model_fp16.onnx       float16
    OUT/onnx/model_quantized.onnx  int8
    OUT/config.json, vocab.txt, tokenizer.json, tokenizer_config.json
    OUT/README.md, LICENSE         as in the model's folder
    OUT/modules.json, 1_Pooling/ ...  for sentence-transformers, where a graph has embeddings

transformers.js and Optimum look for these names.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvbert.config import ModelConfig, RowConfig
from mvbert.errors import InputError
from mvbert.files import (
    atomic_folder,
    atomic_write,
    check_outside,
    copy_card,
    read_json_object,
    sync_folder,
    write_json,
)
from mvbert.model import huggingface
from mvbert.model.masked_lm import DeviceBatch, LabelHead, MaskedLM
from mvbert.model.pooling import Pooling, read_pooling, write_pooling
from mvbert.model.weights import read_weights
from mvbert.progress import Progress
from mvbert.publish.calibration import largest_inputs
from mvbert.publish.onnx_graph import INPUTS, OUTPUTS, Precision, load_onnx, to_onnx
from mvbert.text.batches import Batch, Rows
from mvbert.text.corpus import Corpus, build_corpus
from mvbert.text.stage_rows import heldout_rows
from mvbert.text.tokenizer import save_tokenizer_files
from mvbert.text.vocab import Vocab

FLOAT, HALF, INT8 = "onnx/model.onnx", "onnx/model_fp16.onnx", "onnx/model_quantized.onnx"
PRECISION: dict[str, Precision] = {FLOAT: "float32", HALF: "float16", INT8: "int8"}
ROWS, PIECES = 64, 128  # shape of the comparison's batch; timed rows have PIECES too
SECONDS = 0.4  # of timing
CALIBRATION_ROWS = 16  # more rows on which the scales of int8 are measured
CHECK_ROWS = 4  # rows per forward pass; few, because logits of all pieces are large
INTENTS = "intent_logits"  # of a joint model, beside the logits of its words
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
        self.inputs = [value.name for value in self._session.get_inputs()]
        self.outputs = [value.name for value in self._session.get_outputs()]

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Any:
        """Integer inputs [B, T] -> outputs by name."""
        values = dict(zip(INPUTS, (input_ids, attention_mask, token_type_ids), strict=True))
        results = self._session.run(None, {n: values[n].long().numpy() for n in self.inputs})
        return {n: torch.from_numpy(x) for n, x in zip(self.outputs, results, strict=True)}

    def milliseconds(self, config: ModelConfig) -> float:
        """Median time per row of PIECES pieces."""
        T = min(PIECES, config.max_position_embeddings)
        ids = torch.arange(T)[None] * 7919 % config.vocab_size
        inputs = ids, torch.ones_like(ids), torch.zeros_like(ids)
        times: list[float] = []
        for _ in range(3):
            self(*inputs)
        while len(times) < 5 or (sum(times) < SECONDS and len(times) < 200):
            started = time.perf_counter()
            self(*inputs)
            times.append(time.perf_counter() - started)
        return float(np.median(times)) * 1e3


# ---- the comparison ------------------------------------------------------------------------------


def real_rows(vocab: Vocab, config: ModelConfig, corpus: Path | None) -> Batch:
    """Masked rows of a corpus's held-out text, or of SAMPLE: ROWS to compare on, then more.

    The others, CALIBRATION_ROWS, are for the scales of int8.
    """
    count = ROWS + CALIBRATION_ROWS
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
            return rows.read(0, count)
        return heldout_rows(opened, cut, row).read(0, count)


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
        batch: DeviceBatch,
        head: bool,
        labels: LabelHead | None,
        pooling: Pooling,
    ) -> None:
        self._model, self._head, self._labels = model.eval(), head, labels
        self._pooling = pooling
        inputs = batch
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
            also `right` and `right_torch`: the accuracies of both. Of sentence embeddings
            `same_neighbour`: the share of rows whose nearest other row is the same. Of a joint
            model also `same_intent`: the share of rows with the same intent.
            `alone`: the largest difference between a row's outputs alone and among padded rows,
            relative to the largest value.
        """
        sums = {name: [0.0] * 4 for name in session.outputs}
        chosen = same = right = right_torch = same_intent = 0
        embeddings: tuple[list[Tensor], list[Tensor]] = [], []
        alone = 0.0
        for first in range(0, len(self._ids), CHECK_ROWS):
            rows = slice(first, first + CHECK_ROWS)
            ids, mask, types = self._ids[rows], self._mask[rows], self._types[rows]
            outputs = session(ids, mask, types)
            if first not in self._hidden:
                embedded = self._model.embeddings(ids, types)
                self._hidden[first] = self._model.encoder(embedded, mask)
            expected = self._outputs(self._hidden[first], mask, session.outputs)
            if OUTPUTS["pooled"] in outputs:
                for found, values in zip(embeddings, (outputs, expected), strict=True):
                    found.append(values[OUTPUTS["pooled"]])
            if first == 0:
                alone = self._alone(session, outputs, (ids, mask, types))
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
            if INTENTS in outputs:
                intents = (values[INTENTS].argmax(-1) for values in (outputs, expected))
                same_intent += int(torch.eq(*intents).sum())
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
            "alone": alone,
        }
        if INTENTS in sums:
            result["same_intent"] = same_intent / len(self._ids)
        if embeddings[0]:
            ours, torchs = (_neighbours(torch.cat(found)) for found in embeddings)
            result["same_neighbour"] = float((ours == torchs).double().mean())
        if chosen:
            result["masked" if self._labels is None else "labels"] = chosen
            result["same_top1"] = same / chosen
            if self._labels is None:
                result |= {"right": right / chosen, "right_torch": right_torch / chosen}
        return result

    def _alone(
        self, session: Session, together: dict[str, Tensor], inputs: tuple[Tensor, ...]
    ) -> float:
        """The largest difference of rows that run one by one, without padding."""
        worst = 0.0
        for i, length in enumerate(inputs[1].sum(1).tolist()):
            for name, values in session(*(x[i : i + 1, :length] for x in inputs)).items():
                beside = together[name][i : i + 1]
                if not self._of_text(name):
                    beside = beside[:, :length]
                largest = float(beside.abs().max())
                worst = max(worst, float((values - beside).abs().max()) / max(largest, 1e-30))
        return worst

    def _of_text(self, name: str) -> bool:
        """Whether an output has one value per text instead of one per piece."""
        of_text = self._labels is not None and self._labels.of_text
        return name in (OUTPUTS["pooled"], INTENTS) or (name == OUTPUTS["logits"] and of_text)

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


def _neighbours(embeddings: Tensor) -> Tensor:
    """The number of the nearest other row by cosine, [B, H] -> [B]."""
    unit = torch.nn.functional.normalize(embeddings.double(), dim=-1)
    return (unit @ unit.T).fill_diagonal_(-2).argmax(-1)


# ---- the verb ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gate:
    """What a smaller file must keep of the model's outputs; None: anything is written."""

    max_error: float | None = None
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("max-error", self.max_error), ("min-agreement", self.min_agreement)):
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"--{name} is {value}, expected a share between 0 and 1")

    def check(self, file: str, result: dict[str, Any]) -> None:
        """Raises InputError if a comparison's result is not good enough."""
        name, worst = max(result["error"].items(), key=lambda item: item[1])
        if self.max_error is not None and not worst <= self.max_error:
            raise InputError(
                f"{file}: {name} differs from torch's by {worst:.2%} (RMS), more than --max-error "
                f"{self.max_error:.2%}; nothing was written"
            )
        if self.min_agreement is None:
            return
        shares = {
            what: result[key]
            for key, what in (
                ("same_top1", "the same first choice"),
                ("same_intent", "the same intent"),
                ("same_neighbour", "the same nearest neighbour"),
            )
            if key in result
        }
        if not shares:
            raise InputError(
                f"--min-agreement: the outputs {', '.join(result['error'])} of this model rank "
                "nothing that could agree; use --max-error"
            )
        what, least = min(shares.items(), key=lambda item: item[1])
        if not least >= self.min_agreement:
            raise InputError(
                f"{file}: {least:.1%} have {what} as in torch, fewer than --min-agreement "
                f"{self.min_agreement:.1%}; nothing was written"
            )


@dataclass(frozen=True)
class ExportReport:
    """What an export reports."""

    output: str
    model: str
    inputs: list[str]
    outputs: list[str]
    files: dict[str, dict[str, Any]]
    """Of each graph: its bytes, milliseconds per row, and what it keeps of torch's outputs."""
    checked_on: str
    onnxruntime: str
    """The version that was compared with torch."""


def run_export(
    name: str,
    out: Path,
    *,
    heads: Sequence[str] = (),
    inputs: Sequence[str] = (),
    int8: bool = False,
    float16: bool = False,
    gate: Gate | None = None,
    cased: bool = False,
    corpus: Path | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Writes the files listed at the top of this module, after comparing them with torch.

    Args:
        name: a name for mvbert.model.huggingface.find_model, e.g. a BERT's folder or a run folder.
        heads: keys of OUTPUTS; empty: logits if the model has a label head, else hidden states.
            Sentence embeddings come with the hidden states.
        inputs: INPUTS, or the first two; empty: two if the model knows one token type, else three.
        gate: what int8 and float16 must keep.
        cased: treat its vocabulary as cased, whatever the folder says.
        corpus: compare on its held-out text.

    Raises:
        InputError: the model does not exist or has no such head, `out` exists or contains an input,
            or the outputs of ONNX Runtime differ from torch's.
        MissingExtra: onnx or onnxruntime is not installed.
    """
    onnxruntime = load_onnx()[1]
    progress = Progress("export")
    files = [FLOAT, *[HALF] * float16, *[INT8] * int8]
    if gate is not None and len(files) == 1:
        raise InputError("--max-error and --min-agreement need --int8 or --float16")
    folder = huggingface.find_model(name)
    check_outside(out, folder, corpus)
    source = _read_source(folder, heads, inputs, cased, progress)
    model, labels, pooling = source.model, source.labels, source.pooling
    compared, sample = _comparison_rows(source, corpus)
    compare = Comparison(model, source.vocab, compared, source.predicts, labels, pooling)
    largest = None
    if int8:
        counts = torch.ones_like(sample.input_ids, dtype=torch.bool)
        largest = largest_inputs(model, sample.input_ids, counts, sample.token_type_ids)
    measured: dict[str, dict[str, Any]] = {}
    with atomic_folder(out, overwrite=overwrite) as partial:
        (partial / "onnx").mkdir()
        for file in files:
            data = to_onnx(
                model, source.heads, PRECISION[file], labels, pooling, largest, source.inputs
            )
            atomic_write(partial / file, data)
            session = Session(data)
            result = compare(session)
            _check_difference(file, result, folder)
            if gate is not None and file != FLOAT:
                gate.check(file, result)
            result |= {"bytes": len(data), "milliseconds": session.milliseconds(model.config)}
            progress.note(_summary(file, result))
            measured[file] = _rounded(result)
        _write_beside(partial, source)
        sync_folder(partial / "onnx")
    return ExportReport(
        output=str(out),
        model=str(folder),
        inputs=[*source.inputs],
        outputs=session.outputs,
        files=measured,
        checked_on=str(corpus) if corpus is not None else "passages of English books",
        onnxruntime=onnxruntime.__version__,
    )


@dataclass(frozen=True)
class _Source:
    """A model's folder, and what graphs of it have."""

    folder: Path
    vocab: Vocab
    model: MaskedLM
    predicts: bool
    """Whether it has the head that predicts pieces."""
    labels: LabelHead | None
    pooling: Pooling
    heads: list[str]
    inputs: tuple[str, ...]


def _read_source(
    folder: Path, heads: Sequence[str], inputs: Sequence[str], cased: bool, progress: Progress
) -> _Source:
    """Reads the model; chooses outputs and inputs where `heads` or `inputs` are empty."""
    shape, vocab = huggingface.read_shape(folder, cased=cased)
    weights = read_weights(folder)
    model, missing = huggingface.load_masked_lm(folder, MaskedLM(shape), weights=weights)
    predicts = not any(part.startswith("cls.") for part in missing)
    explicit = bool(heads) and "logits" not in heads
    labels = None if explicit else huggingface.load_label_head(folder, weights, shape)
    pooling = read_pooling(folder, shape.hidden_size) if "pooled" in heads else Pooling()
    if not heads:
        heads = ["hidden"] if labels is None else ["logits"]
        progress.note(f"outputs: {heads[0]} (default; see --head)")
    if "pooled" in heads:  # what other programs look for in a sentence encoder
        heads = [*heads, "hidden"]
        progress.note(f"sentence_embedding: {pooling}")
    heads = [key for key in OUTPUTS if key in heads]
    inputs = _checked_inputs(inputs, shape)
    progress.note(vocab.doubt)
    progress.note(weights.unread())
    if "logits" in heads and not predicts and labels is None:
        raise InputError(
            f"{folder} has no head for masked language modelling, classification or question "
            "answering, so there are no logits"
        )
    return _Source(folder, vocab, model, predicts, labels, pooling, heads, inputs)


def _comparison_rows(source: _Source, corpus: Path | None) -> tuple[DeviceBatch, DeviceBatch]:
    """The rows to compare on, and those to measure the scales of int8 on."""
    rows = real_rows(source.vocab, source.model.config, corpus)
    compared, sample = (
        DeviceBatch.of(rows, torch.device("cpu"), part) for part in (slice(ROWS), slice(ROWS, None))
    )
    if INPUTS[2] not in source.inputs:
        for part in (compared, sample):
            part.token_type_ids.zero_()
    return compared, sample


def _check_difference(file: str, result: dict[str, Any], folder: Path) -> None:
    """Raises InputError if the float32 file differs from torch or outputs are not finite."""
    worst = max(result["largest"].values())
    if file == FLOAT and not worst <= BOUND:
        if not math.isfinite(worst):
            raise InputError(f"{folder}: the model's weights are corrupt (outputs are NaN)")
        raise InputError(
            f"outputs of ONNX Runtime {load_onnx()[1].__version__} for {folder} differ from "
            f"torch's by {worst:.1e} of the largest value, more than {BOUND:.0e}; "
            "nothing was written"
        )
    if not math.isfinite(worst):
        raise InputError(
            f"{file}: outputs are not finite, because the model's values exceed what "
            f"{PRECISION[file]} holds; nothing was written"
        )


def _write_beside(partial: Path, source: _Source) -> None:
    """Writes what other programs read beside the graphs: configuration, tokenizer, card."""
    folder, config = source.folder, source.model.config
    # Read and written, not copied: config.json may be a relative link.
    own = read_json_object(folder / "config.json")
    write_json(partial / "config.json", own | {"vocab_size": source.vocab.size})
    copy_card(folder, partial)
    length = config.max_position_embeddings
    save_tokenizer_files(source.vocab, partial, length)
    if "pooled" in source.heads:
        write_pooling(partial, source.pooling, config.hidden_size, _max_length(folder, length))


def _max_length(folder: Path, positions: int) -> int:
    """How many pieces of a text sentence-transformers reads in this folder."""
    path = folder / "sentence_bert_config.json"
    length = read_json_object(path).get("max_seq_length") if path.exists() else None
    return min(length, positions) if isinstance(length, int) and length > 0 else positions


def _checked_inputs(inputs: Sequence[str], shape: ModelConfig) -> tuple[str, ...]:
    """The graph's inputs in order."""
    if not inputs:
        return INPUTS if shape.type_vocab_size > 1 else INPUTS[:2]
    if {*inputs} not in ({*INPUTS}, {*INPUTS[:2]}):
        raise InputError(
            f"--inputs is {' '.join(inputs)}; expected {' '.join(INPUTS[:2])}, with or without "
            f"{INPUTS[2]}"
        )
    return tuple(name for name in INPUTS if name in inputs)


def _summary(file: str, result: dict[str, Any]) -> str:
    """One line about a file: size, speed and difference from torch."""
    text = (
        f"{file}: {result['bytes'] / 1e6:.2f} MB, {result['milliseconds']:.2f} ms per row, 1 thread"
    )
    if file == FLOAT:
        worst = max(result["largest"].values())
        return f"{text}; differs from torch by {worst:.1e} of the largest value"
    for name, error in result["error"].items():
        shown = f"{error:.2g}" if error < 0.005 else f"{error:.1%}"
        text += f"; {name} differs by {shown} (RMS)"
    text += f"; alone and among padded rows by {result['alone']:.1e}"
    if "same_neighbour" in result:
        text += f"; same nearest neighbour for {result['same_neighbour']:.1%}"
    if "masked" in result:
        text += (
            f"; same top-1 piece for {result['same_top1']:.1%} of {result['masked']} masked ones, "
            f"accuracy {result['right']:.1%}, in float32 {result['right_torch']:.1%}"
        )
    if "labels" in result:
        text += f"; same label for {result['same_top1']:.1%} of {result['labels']}"
    if "same_intent" in result:
        text += f", same intent for {result['same_intent']:.1%} of the rows"
    return text


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Rounds floats to four significant digits."""
    return {
        k: _rounded(v) if isinstance(v, dict) else float(f"{v:.4g}") if isinstance(v, float) else v
        for k, v in values.items()
    }
