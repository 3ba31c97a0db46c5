"""A linear probe on SST-2: tests hidden states as sentence features, without fine-tuning.

A sentence's features are the mean of the last hidden states over its pieces. A logistic regression
is fitted on a sample of the training sentences and evaluated on the dev set. The student is frozen,
so accuracy is well below that of fine-tuning; it serves to compare students, and is deterministic.

SST-2: Socher et al. 2013; as GLUE's TSV files (Wang et al. 2018, arXiv 1804.07461).
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import torch
from torch import Tensor

from mvbert.errors import InputError
from mvbert.files import data_path
from mvbert.model.masked_lm import MaskedLM
from mvbert.study.measures import BATCH, padded
from mvbert.text.philox import permuted
from mvbert.text.tokenizer import WordPieceTokenizer
from mvbert.text.vocab import Vocab
from mvbert.training.device import Device

L2 = 1e-3  # on the mean loss; features have unit variance

Sentences = tuple[list[str], list[int]]


def read_sst2(path: Path) -> tuple[Sentences, Sentences]:
    """Reads training and dev sentences with their labels from a folder or a .tar archive of it.

    `data:NAME` is NAME in the data folder (mvbert.files.data_path).

    Raises:
        InputError: a file is missing, or a line is not a sentence, a tab and 0 or 1.
    """
    path, splits = data_path(path), {}
    for name in ("train.tsv", "dev.tsv"):
        source, text = _read(path, name)
        sentences, labels = [], []
        # Not splitlines: sentences contain other Unicode line breaks.
        lines = [line.removesuffix("\r") for line in text.rstrip("\r\n").split("\n")]
        if lines[0].split("\t") != ["sentence", "label"]:
            raise InputError(f"{source}:1: expected the columns sentence and label")
        for number, line in enumerate(lines[1:], 2):
            sentence, tab, label = line.rpartition("\t")
            if not tab or label not in ("0", "1"):
                raise InputError(f"{source}:{number}: expected a sentence, a tab, and 0 or 1")
            sentences.append(sentence)
            labels.append(int(label))
        splits[name] = (sentences, labels)
    return splits["train.tsv"], splits["dev.tsv"]


def _read(path: Path, name: str) -> tuple[str, str]:
    """The name (for messages) and the text of a file in the folder or archive."""
    try:
        if path.is_dir():
            return str(path / name), (path / name).read_bytes().decode("utf-8-sig")
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member) if Path(member.name).name == name else None
                if file is not None:
                    return f"{path}:{member.name}", file.read().decode("utf-8-sig")
    except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0].rstrip(":")  # tarfile adds a line per compression
        raise InputError(f"cannot read {path} as SST-2's folder or archive: {reason}") from None
    raise InputError(f"{path} has no {name}; expected SST-2's folder or a .tar archive of it")


def linear_probe(
    model: MaskedLM,
    vocab: Vocab,
    train: Sentences,
    dev: Sentences,
    device: Device,
    *,
    length: int,
    count: int = 0,
    seed: int = 0,
) -> float:
    """Dev accuracy of a logistic regression on the student's hidden states.

    Args:
        model: the student, on the device.
        length: maximum number of pieces per sentence.
        count: number of training sentences (0: all), sampled with `seed`.
    """
    sentences, labels = train
    if 0 < count < len(sentences):
        chosen = [permuted(i, len(sentences), 0, seed) for i in range(count)]
        sentences, labels = [sentences[i] for i in chosen], [labels[i] for i in chosen]
    tokenizer = WordPieceTokenizer(vocab)
    x = sentence_states(model, tokenizer, sentences, device, length)
    x_dev = sentence_states(model, tokenizer, dev[0], device, length)
    mean, spread = x.mean(0), x.std(0).clamp_min(1e-9)
    weights = fit_logistic((x - mean) / spread, torch.tensor(labels))
    scores = (x_dev - mean) / spread @ weights[:-1] + weights[-1]
    return float(((scores > 0).long() == torch.tensor(dev[1])).double().mean())


@torch.no_grad()
def sentence_states(
    model: MaskedLM,
    tokenizer: WordPieceTokenizer,
    sentences: list[str],
    device: Device,
    length: int,
) -> Tensor:
    """The mean last hidden state of each sentence's pieces, [sentences, H] float64."""
    model.eval()
    rows = [tokenizer.encode(sentence, add_special_tokens=False) for sentence in sentences]
    cls, sep, pad = tokenizer.vocab.cls, tokenizer.vocab.sep, tokenizer.vocab.pad
    rows = [[cls, *row[: length - 2], sep] for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    states = torch.empty(len(rows), model.config.hidden_size, dtype=torch.float64)
    for first in range(0, len(order), BATCH):
        part = order[first : first + BATCH]
        ids, mask = padded([rows[i] for i in part], pad, device.device)
        with device.cast():
            hidden = model.encode(ids, torch.zeros_like(ids), attention_mask=mask)
        inside = (mask & (ids != cls) & (ids != sep))[..., None]
        total = (hidden.double() * inside).sum(1) / inside.sum(1).clamp_min(1)
        states[part] = total.cpu()
    return states


def fit_logistic(x: Tensor, labels: Tensor) -> Tensor:
    """Weights and bias [H + 1] of a logistic regression, by L-BFGS in float64 from zero."""
    weights = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    target = labels.double()
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=200,
        tolerance_grad=1e-7,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores = x @ weights[:-1] + weights[-1]
        value = torch.nn.functional.binary_cross_entropy_with_logits(scores, target)
        value = value + L2 / 2 * weights[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()
