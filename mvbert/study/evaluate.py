"""Evaluates a BERT on held-out text: the measures of a study, for any Hugging Face folder.

Loss and accuracy are over masked pieces of the model's vocabulary, on the same rows as in training
with the same settings; bits per word are comparable between vocabularies (mvbert.study.measures).
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch

from mvbert.config import MeasureConfig, RowConfig
from mvbert.errors import InputError
from mvbert.files import Json, read_json_object
from mvbert.model import huggingface
from mvbert.model.flops import encoder_products
from mvbert.model.masked_lm import DeviceBatch, MaskedLM, masked_sums
from mvbert.model.weights import read_weights
from mvbert.progress import Progress
from mvbert.study.measures import bits_per_word, choose_words, make_questions
from mvbert.text.batches import Rows
from mvbert.text.stage_rows import heldout_rows
from mvbert.training.device import Device
from mvbert.training.machine import set_up_alone
from mvbert.training.run_stage import checked_corpus
from mvbert.training.runs import dtype_of_run
from mvbert.training.stages import check_lengths


def run_eval(
    name: str,
    corpus: Path,
    row: RowConfig,
    measure: MeasureConfig,
    cased: bool = False,
    *,
    eval_rows: int = 512,
    pass_rows: int = 32,
    dtype: str = "auto",
    device: str = "auto",
    threads: int = 0,
) -> dict[str, Json]:
    """Evaluates a model.

    Args:
        name: a name for mvbert.model.huggingface.find_model, e.g. a BERT's folder or a run folder.
        cased: treat its vocabulary as cased, whatever the folder says.
        eval_rows: held-out rows to evaluate.
        pass_rows: rows per forward pass.
        dtype: dtype of matrix products; auto: as in the run that made the model, else on a CPU the
            faster one.
        device: auto, cpu or cuda[:N].
        threads: CPU threads (0: all available cores).

    Returns:
        The measures that a study records for a student, under the same names.

    Raises:
        InputError: the model or the corpus does not exist, or they do not match.
    """
    started = time.perf_counter()
    progress = Progress("eval")
    folder = huggingface.find_model(name)
    shape, vocab = huggingface.read_shape(folder, cased=cased)
    weights = read_weights(folder)
    model, missing = huggingface.load_masked_lm(folder, MaskedLM(shape), weights=weights)
    progress.note(vocab.doubt)
    progress.note(weights.unread())
    if any(part.startswith("cls.") for part in missing):
        raise InputError(
            f"{folder} has no masked-language-model head, so it has no held-out loss; fine-tune it "
            "on a task to score it (mvbert finetune)"
        )
    check_lengths(row, model.config)
    trained = _training_length(folder)
    if trained not in (None, row.length):
        progress.note(
            f"evaluating with rows of {row.length} pieces; trained with {trained} "
            "(set --row.length)"
        )
    data = checked_corpus(corpus)
    cut = data.segment(vocab)
    placement = set_up_alone(
        device,
        dtype,
        threads,
        encoder_products(model.config, pass_rows * row.length),
        gradients=False,
        recorded=dtype_of_run(folder.parent) if dtype == "auto" else None,
    )
    progress.note(f"device {placement}")
    model = model.to(placement.device).eval()
    report: dict[str, Json] = {
        "model": str(folder),
        "corpus": str(corpus),
        "parameters": model.config.encoder_parameters,
        "vocab": vocab.size,
    }
    rows = heldout_rows(data, cut, row)
    if eval_rows > rows.count:
        progress.note(f"eval_rows is {eval_rows}, but the held-out text has {rows.count} rows")
    measures = masked_measures(model, rows, eval_rows, pass_rows, placement)
    progress.note(
        f"loss {measures['loss']:.4f} nats per masked piece, accuracy "
        f"{measures['accuracy']:.1%} ({measures['masked']} masked pieces)"
    )
    report |= measures
    if measure.words:
        places = choose_words(data.heldout, measure.words)
        words = make_questions(data.heldout, cut, places, measure.context, row.length)
        bits = bits_per_word(model, vocab.pad, words, placement)
        progress.note(
            f"{bits['bits_per_word']:.3f} bits per word, standard error "
            f"{bits['bits_error']:.3f} ({words.count} words; skipped {words.unknown} unknown)"
        )
        report |= bits | words.facts()
    report["seconds"] = round(time.perf_counter() - started, 1)
    return report


def _training_length(folder: Path) -> int | None:
    """Row length of the run that made the model in `folder`; None if no run did."""
    path = folder.parent / "run.json"
    run: Any = read_json_object(path) if path.is_file() else {}
    try:
        return int(run["description"]["row"]["length"])
    except (KeyError, TypeError):
        return None


@torch.no_grad()
def masked_measures(
    model: MaskedLM, rows: Rows, eval_rows: int, pass_rows: int, device: Device
) -> dict[str, float]:
    """Loss and accuracy on masked pieces of the first eval_rows rows, at most one epoch."""
    total = {"mlm_sum": 0.0, "count": 0.0, "right": 0.0}
    count = min(eval_rows, rows.count)
    for first in range(0, count, pass_rows):
        batch = rows.read(first, min(pass_rows, count - first))
        with device.cast():
            for name, value in masked_sums(model, DeviceBatch.of(batch, device.device)).items():
                total[name] += float(value)
    if not total["count"]:
        raise InputError("no held-out piece was masked; use more rows or a larger mask_prob")
    loss = total["mlm_sum"] / total["count"]
    if not math.isfinite(loss):
        raise InputError(f"the held-out loss is {loss}: the model's weights are corrupt")
    return {
        "rows": count,
        "masked": int(total["count"]),
        "loss": loss,
        "accuracy": total["right"] / total["count"],
    }
