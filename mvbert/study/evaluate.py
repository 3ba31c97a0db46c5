"""How good a BERT is on held-out text: the measures of a study, for any Hugging Face folder.

Loss and share right are of masked pieces of the model's own vocabulary, on the rows that the same
settings give in training; bits a word can be compared between vocabularies (mvbert.study.measures);
the probe says what hidden states know of a sentence (mvbert.study.probe).
"""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mvbert.config import MeasureConfig, RowConfig
from mvbert.cores import cores
from mvbert.errors import InputError
from mvbert.files import Json, read_json_object
from mvbert.model import huggingface
from mvbert.model.flops import Product, encoder_products, product_rates
from mvbert.model.masked_lm import DeviceBatch, MaskedLM, masked_sums
from mvbert.progress import Progress
from mvbert.study.measures import ask, bits_per_word, choose_words
from mvbert.study.probe import linear_probe, read_sst2
from mvbert.text.batches import Rows
from mvbert.text.stage_rows import heldout_rows
from mvbert.training.device import Device, choose_device, choose_dtype
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
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    threads: int = 0,
) -> dict[str, Json]:
    """Measures a model.

    Args:
        name: a BERT's folder, a run folder, or what mvbert.model.huggingface.find_model takes.
        cased: its vocabulary is cased, whatever the folder says or leaves out.
        eval_rows: held-out rows whose masked pieces are predicted.
        pass_rows: of them in one pass.
        seed: of the sentences that the probe is fitted on.
        dtype: of matrix products; auto: that of the run whose result the model is, else on a CPU
            the faster one.
        device: auto, cpu or cuda[:N].
        threads: of the CPU (0: torch's default).

    Returns:
        What a study records of a student, under the same names.

    Raises:
        InputError: no such BERT or corpus, or they do not go together.
    """
    started = time.perf_counter()
    progress = Progress("eval")
    sst2 = read_sst2(Path(measure.sst2)) if measure.sst2 else None
    folder = huggingface.find_model(name)
    shape, vocab = huggingface.read_shape(folder, cased=cased)
    weights = huggingface.read_weights(folder)
    model, missing = huggingface.load_masked_lm(folder, MaskedLM(shape), weights=weights)
    for note in (vocab.doubt, weights.unread()):
        if note:
            progress.note(note)
    predicts = not any(part.startswith("cls.") for part in missing)
    if not predicts and sst2 is None:
        raise InputError(
            f"{folder} has no masked-language-model head, so it predicts nothing: "
            "only --sst2 can measure it"
        )
    check_lengths(row, model.config)
    trained = _length_in_training(folder)
    if trained not in (None, row.length):
        progress.note(f"rows of {row.length} pieces; in training they had {trained}: --row.length")
    opened = checked_corpus(corpus)
    cut = opened.segment(vocab)
    torch.set_num_threads(cores(threads))
    where = _device(device, dtype, folder, encoder_products(model.config, pass_rows * row.length))
    progress.note(f"device {where}")
    model = model.to(where.device).eval()
    report: dict[str, Json] = {
        "model": str(folder),
        "corpus": str(corpus),
        "parameters": model.config.encoder_parameters,
        "vocab": vocab.size,
    }
    if predicts:
        rows = heldout_rows(opened, cut, row)
        if eval_rows > rows.count:
            progress.note(f"eval_rows {eval_rows}: the held-out text has {rows.count} rows")
        found = masked_measures(model, rows, eval_rows, pass_rows, where)
        progress.note(
            f"{found['loss']:.4f} nats a masked piece, "
            f"{found['accuracy']:.1%} of {found['masked']} said right"
        )
        report |= found
        if measure.words:
            places = choose_words(opened.heldout, measure.words)
            words = ask(opened.heldout, cut, places, measure.context, row.length)
            bits = bits_per_word(model, vocab.pad, words, where)
            progress.note(
                f"{bits['bits_per_word']:.3f} bits a word, standard error {bits['bits_error']:.3f} "
                f"({words.count} words; {words.unknown} left out as unknown)"
            )
            report |= bits | words.facts()
    else:
        progress.note(f"{folder} has no masked-language-model head: its states are measured alone")
    if sst2 is not None:
        accuracy = linear_probe(
            model, vocab, *sst2, where,
            length=row.length, count=measure.sentences, seed=seed,
        )  # fmt: skip
        progress.note(f"SST-2, linear probe: {accuracy:.1%}")
        report["sst2"] = accuracy
    report["seconds"] = round(time.perf_counter() - started, 1)
    return report


def _device(name: str, dtype: str, folder: Path, products: list[Product]) -> Device:
    """Where and in which dtype the model in `folder` is measured."""
    device = choose_device(name)
    began = dtype_of_run(folder.parent) if dtype == "auto" else None
    rates = partial(product_rates, products, gradients=False)
    return Device.of(device, *(began or choose_dtype(dtype, device, rates)))


def _length_in_training(folder: Path) -> int | None:
    """Pieces of the rows of the run whose result `folder` is; None where it is no run's."""
    path = folder.parent / "run.json"
    run: Any = read_json_object(path) if path.is_file() else {}
    try:
        return int(run["description"]["row"]["length"])
    except (KeyError, TypeError):
        return None


@torch.no_grad()
def masked_measures(
    model: MaskedLM, rows: Rows, eval_rows: int, pass_rows: int, where: Device
) -> dict[str, float]:
    """Loss and accuracy over the masked pieces of the first eval_rows rows, at most one epoch."""
    total = {"mlm_sum": 0.0, "count": 0.0, "right": 0.0}
    count = min(eval_rows, rows.count)
    for first in range(0, count, pass_rows):
        batch = rows.read(first, min(pass_rows, count - first))
        with where.cast():
            for name, value in masked_sums(model, DeviceBatch.of(batch, where.device)).items():
                total[name] += float(value)
    if not total["count"]:
        raise InputError("no held-out piece was masked: ask for more rows or a larger mask_prob")
    loss = total["mlm_sum"] / total["count"]
    if not math.isfinite(loss):
        raise InputError(f"the held-out loss is {loss}: the model's weights are spoiled")
    return {
        "rows": count,
        "masked": int(total["count"]),
        "loss": loss,
        "accuracy": total["right"] / total["count"],
    }
