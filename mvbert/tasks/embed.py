"""Distils sentence vectors from a teacher, on plain text (the verb `finetune MODEL embed`).

The student's mean hidden state goes through a linear map to the teacher's width. Learnt are the
direction of the teacher's vector (1 - cosine; Reimers and Gurevych 2020, arXiv 2004.09813, take the
squared error) and, within a batch, whom each sentence is similar to: the divergence between the
softmax of the teacher's and of the student's similarities. The pooler's output learns the same
through a map of its own, which is not kept: so that classes can be learnt from [CLS] later.

With prefixes (Matryoshka; Kusupati et al. 2022, arXiv 2205.13147) the vectors are in the teacher's
principal directions, largest first, and each prefix is trained like the whole. Without, they are in
the teacher's own coordinates, so that an index of the teacher's vectors still works.

    OUT/embed.json   settings and result
    OUT/vectors/     the teacher's vectors while the job runs
    OUT/modules.json ... a sentence-transformers folder, when it is done
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from mvbert.config import EmbedConfig
from mvbert.errors import InputError, require_extra
from mvbert.files import Json, atomic_file, atomic_folder, move_contents, write_json
from mvbert.model import huggingface
from mvbert.model.flops import encoder_products
from mvbert.model.weights import read_tensors, weights_id
from mvbert.progress import Progress
from mvbert.tasks.formats import Examples, find_task, read_examples
from mvbert.tasks.model import load_bert
from mvbert.tasks.rows import TaskRows, batches_of_epoch, make_rows, read_batch
from mvbert.tasks.sentence_model import (
    SentenceModel,
    SentenceStudent,
    load_sentence_model,
    vectors_of,
    write_sentence_model,
)
from mvbert.tasks.sentences import sample_sentences, sentences_of
from mvbert.toml import to_dict, to_report
from mvbert.training.device import Device
from mvbert.training.environment import environment
from mvbert.training.machine import recorded_choice, set_up_alone
from mvbert.training.optim import Optimizer, linear_schedule, trained_parameters
from mvbert.training.runs import lock, make_folder, recorded_job

DESCRIPTION, VECTORS = "embed.json", "vectors"
CHUNK = 8192  # sentences in a file of vectors
NEAREST = 10
PIECES = 2048  # about, of a forward pass


# ---- the losses ----------------------------------------------------------------------------------


def direction_loss(ours: Tensor, theirs: Tensor) -> Tensor:
    """1 - cosine, the mean over [B, D]."""
    return 1 - F.cosine_similarity(ours, theirs, dim=-1).mean()


def similarity_loss(ours: Tensor, theirs: Tensor, temperature: float) -> Tensor:
    """KL between the softmax of the similarities of each sentence to the others of the batch.

    Args:
        ours: [B, d], any d.
        theirs: [B, D].
    """
    B = len(ours)
    if B < 3:  # no two others to choose between
        return ours.sum() * 0.0
    others = ~torch.eye(B, dtype=torch.bool, device=ours.device)

    def logs(vectors: Tensor) -> Tensor:
        unit = F.normalize(vectors, dim=-1)
        return (unit @ unit.T / temperature)[others].view(B, B - 1).log_softmax(-1)

    return F.kl_div(logs(ours), logs(theirs), reduction="batchmean", log_target=True)


def embed_loss(ours: Tensor, theirs: Tensor, config: EmbedConfig) -> Tensor:
    """The mean over the whole vectors and each prefix."""
    total = torch.zeros((), device=ours.device)
    widths = [*config.prefixes, ours.shape[1]]
    for width in widths:
        total = total + direction_loss(ours[:, :width], theirs[:, :width])
        # The prefix is to find the neighbours that the teacher's whole vector has.
        similar = similarity_loss(ours[:, :width], theirs, config.temperature)
        total = total + config.similarity_weight * similar
    return total / len(widths)


def principal_directions(vectors: NDArray[Any]) -> NDArray[np.float32]:
    """An orthogonal matrix [D, D]; v @ it has the directions of most length first."""
    total = np.zeros((vectors.shape[1],) * 2)
    for first in range(0, len(vectors), CHUNK):
        part = vectors[first : first + CHUNK].astype(np.float64)
        total += part.T @ part
    return np.linalg.eigh(total)[1][:, ::-1].astype(np.float32)


# ---- measures ------------------------------------------------------------------------------------


def shared_nearest(ours: NDArray[Any], theirs: NDArray[Any], count: int = NEAREST) -> float:
    """The share of the `count` nearest sentences that two sets of unit vectors have in common."""
    count = min(count, len(ours) - 1)
    hits = 0
    for first in range(0, len(ours), 1024):
        nearest = []
        for vectors in (ours, theirs):
            similar = vectors[first : first + 1024] @ vectors.T
            rows = np.arange(len(similar))
            similar[rows, rows + first] = -np.inf
            nearest.append(np.argpartition(-similar, count - 1, axis=1)[:, :count])
        hits += sum(len({*a} & {*b}) for a, b in zip(*map(np.ndarray.tolist, nearest), strict=True))
    return hits / (len(ours) * count)


def sts_spearman(
    model: SentenceModel, examples: Examples, device: Device, widths: Sequence[int]
) -> dict[int, float]:
    """Spearman's correlation of the cosine with the scores of pairs, for each prefix."""
    with require_extra("finetune", "scoring similarities"):
        from scipy import stats
    assert examples.pairs is not None
    assert examples.labels is not None
    both = vectors_of(model, [*examples.texts, *examples.pairs], device)
    found = {}
    for width in widths:
        unit = _unit(both[:, :width])
        cosine = (unit[: len(examples)] * unit[len(examples) :]).sum(1)
        value = float(stats.spearmanr(cosine, examples.labels).statistic)
        found[width] = 0.0 if math.isnan(value) else value
    return found


def _unit(vectors: NDArray[Any]) -> NDArray[Any]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def run_embed_score(name: str, data: str, dtype: str, device: str, threads: int) -> dict[str, Json]:
    """Scores a model of sentence vectors on pairs in STS-B's format."""
    progress = Progress("eval")
    model = load_sentence_model(huggingface.find_model(name), progress)
    products = encoder_products(model.bert.config, PIECES)
    where = set_up_alone(device, dtype, threads, products, gradients=False)
    progress.note(f"device {where}; {model.pooling}")
    report: dict[str, Json] = {"model": name, "task": "embed", "data": data, "width": model.width}
    splits = read_examples(find_task("sts-b"), data)
    splits = {n: e for n, e in splits.items() if e.labelled and n != "train"}
    if not splits:
        raise InputError(f"{data} has no labelled pairs but those of training")
    for split, examples in splits.items():
        found = sts_spearman(model, examples, where, [model.width])[model.width]
        report[split] = {"examples": len(examples), "spearman": round(found, 5)}
        progress.note(f"{split}: Spearman {found:.4f}")
    return report


# ---- the job -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EmbedReport:
    """What a job reports."""

    output: str
    model: str
    teacher: str
    sentences: int
    """Sentences that were trained on."""
    widths: dict[str, dict[str, float]]
    """Measures of each prefix and of the whole vectors."""
    teacher_sts_spearman: float | None = None
    seconds: float = 0.0


def run_embed(
    name: str, texts: Sequence[str], out: Path, config: EmbedConfig, cased: bool = False
) -> EmbedReport:
    """Trains a student on sentences of text files; writes a sentence-transformers folder.

    Raises:
        InputError: bad input, or `out` holds another job.
    """
    started = time.perf_counter()
    progress = Progress("embed")
    if not config.teacher:
        raise InputError("embed needs --teacher, a model of sentence vectors")
    folder = huggingface.find_model(name)
    teacher_folder = huggingface.find_model(config.teacher, "teacher")
    pairs = _read_pairs(config.sts) if config.sts else None
    teacher = load_sentence_model(teacher_folder, progress)
    for prefix in config.prefixes:
        if prefix >= teacher.width:
            raise InputError(f"prefix {prefix} is not below the teacher's width, {teacher.width}")
    bert, vocab, _ = load_bert(folder, config.dropout, cased, config.seed, progress)
    room = bert.config.max_position_embeddings
    if config.length > room:
        raise InputError(f"length is {config.length}, but {folder} has {room} positions")
    length = config.length or min(128, room)
    make_folder(out)
    with lock(out):
        description = _describe(folder, teacher_folder, texts, cased, config)
        recorded: dict[str, Any] = recorded_job(out / DESCRIPTION, description)
        if "result" in recorded:
            progress.note(f"{out} is complete")
            return EmbedReport(**recorded["result"])
        device = set_up_alone(
            config.device,
            config.dtype,
            config.threads,
            encoder_products(bert.config, PIECES),
            gradients=True,
            recorded=recorded_choice(recorded.get("environment", {})),
        )
        progress.note(f"device {device}; {torch.get_num_threads()} threads")
        train, heldout = _read_sentences(texts, config, progress)
        facts: dict[str, Json] = {"description": description, "environment": environment(device)}
        write_json(out / DESCRIPTION, facts)
        theirs = _teacher_vectors(teacher, heldout + train, out / VECTORS, device, progress)
        theirs, asked = theirs[len(heldout) :], theirs[: len(heldout)].astype(np.float32)
        rows = make_rows(find_task("classes"), Examples(train, None, None, None, []), vocab, length)
        progress.note(rows.note(length))
        student = SentenceStudent(bert, teacher.width, config.seed).to(device.device)
        kept = out / ".training.safetensors"
        _train(student, rows, vocab.pad, theirs, config, device, progress, kept)
        with atomic_folder(out / ".model", overwrite=True) as partial:
            write_sentence_model(partial, student, vocab, length, _card(config, teacher.width))
        model = load_sentence_model(out / ".model")
        widths = [*config.prefixes, teacher.width]
        measured = _measure(model, heldout, asked, pairs, widths, device, progress)
        of_teacher = None
        if pairs is not None:
            of_teacher = sts_spearman(teacher, pairs, device, [teacher.width])[teacher.width]
        move_contents(out / ".model", out, last="modules.json")
        report = EmbedReport(
            output=str(out),
            model=str(folder),
            teacher=str(teacher_folder),
            sentences=len(train),
            widths=measured,
            teacher_sts_spearman=None if of_teacher is None else round(of_teacher, 5),
            seconds=round(time.perf_counter() - started, 1),
        )
        write_json(out / DESCRIPTION, {**facts, "result": to_report(report)})
        shutil.rmtree(out / VECTORS, ignore_errors=True)
        kept.unlink(missing_ok=True)
    return report


def _read_pairs(name: str) -> Examples:
    """Scored pairs of STS-B, of the dev set where there is one."""
    splits = read_examples(find_task("sts-b"), name)
    pairs = splits["dev"] if "dev" in splits else next(iter(splits.values()))
    if not pairs.labelled or not len(pairs):
        raise InputError(f"{name} has no labelled pairs")
    return pairs


def _describe(
    folder: Path, teacher: Path, texts: Sequence[str], cased: bool, config: EmbedConfig
) -> dict[str, Json]:
    """What must be the same to resume."""
    settings = to_dict(config)
    for later in ("teacher", "device", "threads", "dtype", "sts"):
        del settings[later]
    ids = {"model": weights_id(folder), "teacher": weights_id(teacher)}
    return {**ids, "texts": [*texts], "cased": cased, **settings}


def _read_sentences(
    texts: Sequence[str], config: EmbedConfig, progress: Progress
) -> tuple[list[str], list[str]]:
    """The sentences to train on, and those that are held out."""
    also = {*sentences_of(config.also, config.text)}  # before the sample, which takes longer
    train, heldout = sample_sentences(
        texts, config.sentences, config.heldout, config.seed, config.text
    )
    train += sorted(also - {*train, *heldout})
    progress.note(f"{len(train):,} sentences to train on, {len(heldout):,} held out")
    return train, heldout


def _measure(
    model: SentenceModel,
    heldout: list[str],
    theirs: NDArray[np.float32],
    pairs: Examples | None,
    widths: list[int],
    device: Device,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """By width: neighbours shared with the teacher's vectors, and the score of pairs if given."""
    ours = vectors_of(model, heldout, device)
    scores = {} if pairs is None else sts_spearman(model, pairs, device, widths)
    measured: dict[str, dict[str, float]] = {}
    for width in widths:
        of_width = {"nearest": round(shared_nearest(_unit(ours[:, :width]), theirs), 4)}
        if width in scores:
            of_width["sts_spearman"] = round(scores[width], 5)
        measured[str(width)] = of_width
        shown = ", ".join(f"{key} {value}" for key, value in of_width.items())
        progress.note(f"width {width}: {shown}")
    return measured


def _teacher_vectors(
    teacher: SentenceModel, texts: list[str], folder: Path, device: Device, progress: Progress
) -> NDArray[np.float16]:
    """The teacher's vectors; each file of them is made once."""
    make_folder(folder)
    parts = []
    progress.note(f"teacher: {len(texts):,} vectors of {teacher.width}")
    with progress.steps(len(texts), 0):
        for first in range(0, len(texts), CHUNK):
            some = texts[first : first + CHUNK]
            path = folder / f"{first // CHUNK:06}.npy"
            if not path.exists():
                found = vectors_of(teacher, some, device).astype(np.float16)
                with atomic_file(path) as file:
                    np.save(file, found, allow_pickle=False)
            try:
                part = np.load(path, allow_pickle=False)
            except (OSError, ValueError):
                part = np.zeros(0)
            if part.shape != (len(some), teacher.width):
                raise InputError(f"{path} is not complete; remove it and run the command again")
            parts.append(part)
            progress.advance(first + len(some))
    return np.concatenate(parts)


def _train(
    student: SentenceStudent,
    rows: TaskRows,
    pad: int,
    theirs: NDArray[np.float16],
    config: EmbedConfig,
    device: Device,
    progress: Progress,
    kept: Path,
) -> None:
    """Trains in place; `kept` has the state of twenty steps on the way, from which it continues."""
    per_epoch = -(-len(rows) // config.batch)
    steps = config.epochs * per_epoch
    parameters = [p for _, p in trained_parameters(student)]
    optimizer = Optimizer(student, config, device)
    never = torch.zeros((), dtype=torch.bool, device=device.device)
    rotation: Tensor | None = None
    if config.prefixes:
        rotation = torch.from_numpy(principal_directions(theirs)).to(device.device)
    every = max(1, steps // 20)
    first = _load_state(kept, student, optimizer)
    if first:
        progress.note(f"continues from step {first}")
    torch.manual_seed(config.seed + first)
    student.train()
    step, since, started = 0, torch.zeros((), device=device.device), time.perf_counter()
    with progress.steps(steps, first):
        for epoch in range(config.epochs):
            for chosen in batches_of_epoch(rows.lengths, config.batch, config.seed, epoch):
                if step < first:
                    step += 1
                    continue
                rate = config.lr * linear_schedule(step, steps, config.warmup)
                optimizer.set_learning_rate(rate)
                batch = read_batch(rows, chosen, pad, device.device)
                target = torch.from_numpy(theirs[chosen].astype(np.float32)).to(device.device)
                if rotation is not None:
                    target = target @ rotation
                with device.cast():
                    ours, of_pooler = student(batch)
                loss = embed_loss(ours.float(), target, config)
                if config.pooler_weight:
                    more = embed_loss(of_pooler.float(), target, config)
                    loss = loss + config.pooler_weight * more
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step(skip=never)
                student.zero_grad()
                since += loss.detach()
                step += 1
                progress.advance(step)
                if step % every == 0 or step == steps:
                    mean = float(since) / (step % every or every)
                    if not math.isfinite(mean):
                        raise InputError(f"the loss is {mean} at step {step}; try a lower lr")
                    seconds = time.perf_counter() - started
                    progress.note(f"step {step} of {steps}: loss {mean:.4f} ({seconds:.0f} s)")
                    since = torch.zeros_like(since)
                    _save_state(kept, student, optimizer, step)
    student.eval()


def _save_state(path: Path, student: SentenceStudent, optimizer: Optimizer, step: int) -> None:
    """Weights, moments and the number of steps, as safetensors."""
    tensors = {"step": torch.tensor(step)}
    for name, parameter in trained_parameters(student):
        tensors[name] = parameter.detach().cpu()
        for key, value in optimizer.state(parameter).items():
            tensors[f"{key}:{name}"] = value.detach().cpu()
    with atomic_file(path) as file:
        file.write(save(tensors))


def _load_state(path: Path, student: SentenceStudent, optimizer: Optimizer) -> int:
    """Sets what `_save_state` saved; returns the number of steps, 0 if there is nothing."""
    if not path.exists():
        return 0
    tensors = read_tensors(path)
    with torch.no_grad():
        for name, parameter in trained_parameters(student):
            parameter.copy_(tensors[name])
            for key, value in optimizer.state(parameter).items():
                value.copy_(tensors[f"{key}:{name}"])
    return int(tensors["step"])


def _card(config: EmbedConfig, width: int) -> str:
    prefixes = ""
    if config.prefixes:
        shorter = ", ".join(map(str, config.prefixes))
        prefixes = f"\nPrefixes of {shorter} are vectors, too (`truncate_dim`).\n"
    else:
        prefixes = (
            "\nVectors are in the teacher's coordinates: an index of its vectors still works.\n"
        )
    return f"""\
---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
---

# Sentence vectors distilled from {Path(config.teacher).name}

Unit vectors of {width}, from the mean hidden state through a linear map.
{prefixes}
```python
from sentence_transformers import SentenceTransformer

vectors = SentenceTransformer("THIS_FOLDER").encode(["A sentence.", "Another one."])
```
"""
