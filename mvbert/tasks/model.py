"""A BERT with a layer that scores labels: loaded from any BERT, saved as transformers names it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvbert import functional
from mvbert.config import ModelConfig
from mvbert.errors import InputError
from mvbert.files import Json, read_json_object, write_json
from mvbert.model import huggingface
from mvbert.model.encoder import Taps
from mvbert.model.huggingface import INTENT
from mvbert.model.masked_lm import LabelHead, MaskedLM
from mvbert.model.weights import WEIGHTS, read_weights
from mvbert.progress import Progress
from mvbert.tasks.formats import Kind
from mvbert.tasks.rows import TaskBatch
from mvbert.text.tokenizer import save_tokenizer_files
from mvbert.text.vocab import Vocab
from mvbert.training.distillation import reader
from mvbert.training.stages import STUDENT_TABLE, load_stage1

_ARCHITECTURE = {
    "classes": "BertForSequenceClassification",
    "number": "BertForSequenceClassification",
    "tags": "BertForTokenClassification",
    "joint": "BertForTokenClassification",
}


@dataclass(frozen=True)
class Labels:
    """What a model's scores are of.

    A joint model (Chen, Zhuo and Wang 2019, arXiv 1902.10909) has one linear layer for all pieces:
    its first labels are the tags of words, the others, with INTENT in front, those of [CLS].
    """

    kind: Kind
    names: tuple[str, ...]  # empty for a number

    @property
    def width(self) -> int:
        return max(len(self.names), 1)

    @property
    def tags(self) -> int:
        """How many of the names are tags."""
        if self.kind != "joint":
            return len(self.names)
        return sum(not name.startswith(INTENT) for name in self.names)

    def part(self, of_word: bool) -> slice:
        """The labels of a word, or of a row as a whole."""
        if self.kind != "joint":
            return slice(0, self.width)
        return slice(0, self.tags) if of_word else slice(self.tags, self.width)


class TaskModel(nn.Module):
    """A BERT and its label head.

    Args:
        bert: the encoder; its masked-language-model head is not used.
    """

    def __init__(self, bert: MaskedLM, labels: Labels) -> None:
        super().__init__()
        self.bert, self.labels = bert, labels
        of_text = labels.kind in ("classes", "number")
        self.head = LabelHead(bert.config.hidden_size, labels.width, of_text, ["logits"])
        self.dropout = bert.config.hidden_dropout_prob

    def forward(self, batch: TaskBatch, taps: Taps | None = None) -> Tensor:
        """Scores of the labels at the batch's places, [N, labels]; fills `taps`."""
        types = batch.token_type_ids
        if self.bert.config.type_vocab_size == 1:  # both texts of a pair have it
            types = torch.zeros_like(types)
        hidden = self.bert.encode(batch.input_ids, types, batch.mask, taps)
        hidden = hidden.flatten(0, 1).index_select(0, batch.index)
        if self.head.of_text:
            hidden = self.bert.pooled(hidden)
        return self.head.scores(functional.dropout(hidden, self.dropout, self.training))

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that the task trains."""
        unused = ("bert.head.",) if self.head.of_text else ("bert.head.", "bert.pooler.")
        return [(n, p) for n, p in self.named_parameters() if not n.startswith(unused)]

    def init_head(self, seed: int) -> None:
        """Initial weights of the layer that scores labels, a function of the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        std = self.bert.config.initializer_range
        with torch.no_grad():
            self.head.scores.weight.normal_(0.0, std, generator=generator)
            self.head.scores.bias.zero_()


def load_bert(
    folder: Path, dropout: float, cased: bool, seed: int = 0, progress: Progress | None = None
) -> tuple[MaskedLM, Vocab, bool]:
    """The BERT in a folder, its vocabulary, and whether it has a masked-language-model head.

    A missing pooler is drawn from the seed. Of Stage I it is the teacher that reads student pieces.

    Args:
        progress: notes tensors that are not used.
    """
    if (folder / STUDENT_TABLE).is_file():
        mixed, vocab = load_stage1(folder)
        return reader(mixed, dropout), vocab, True
    shape, vocab = huggingface.read_shape(folder, cased=cased)
    shape = replace(shape, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    model = MaskedLM(shape)
    model.init_weights(seed)
    weights = read_weights(folder)
    model, missing = huggingface.load_masked_lm(folder, model, weights=weights)
    if progress is not None:
        progress.note(weights.unread())
    return model, vocab, not any(name.startswith("cls.") for name in missing)


def load_task_model(
    folder: Path, what: str = "model", progress: Progress | None = None
) -> tuple[TaskModel, Vocab]:
    """A model that was fine-tuned for labels, by this program or another.

    Args:
        progress: notes tensors that are not used.

    Raises:
        InputError: the folder's model scores no labels, or not those that its config.json names.
    """
    shape, vocab = huggingface.read_shape(folder)
    weights = read_weights(folder)
    bert, _ = huggingface.load_masked_lm(folder, MaskedLM(shape), weights=weights)
    head = huggingface.load_label_head(folder, weights, shape)
    if head is None or head.outputs != ["logits"]:
        raise InputError(
            f"{what} {folder} has no layer that scores labels of texts or words; fine-tune it first"
        )
    config = read_json_object(folder / "config.json")
    model = TaskModel(bert, _read_labels(folder, config, head))
    model.head.load_state_dict(head.state_dict())
    if progress is not None:
        progress.note(weights.unread())
    return model.eval(), vocab


def _read_labels(folder: Path, config: dict[str, Any], head: LabelHead) -> Labels:
    width = head.scores.out_features
    named = config.get("id2label") or {}
    if not named:
        named = {str(i): f"LABEL_{i}" for i in range(width)}
    values = [named.get(str(i)) for i in range(width)] if isinstance(named, dict) else []
    names = tuple(name for name in values if isinstance(name, str))
    if len(named) != width or len({*names}) != width:
        raise InputError(
            f"{folder / 'config.json'}: id2label names {len(named)} labels, but the weights score "
            f"{width}"
        )
    if head.of_text:
        number = width == 1 or config.get("problem_type") == "regression"
        return Labels("number", ()) if number and width == 1 else Labels("classes", names)
    joint = any(name.startswith(INTENT) for name in names)
    return Labels("joint" if joint else "tags", names)


def write_task_model(folder: Path, model: TaskModel, vocab: Vocab) -> None:
    """Writes config.json, weights and tokenizer files into an existing folder."""
    bert, labels = model.bert, model.labels
    state = {name.removeprefix("bert."): value for name, value in model.trained()}
    scores = {name: state.pop(f"head.{name}") for name in ("scores.weight", "scores.bias")}
    tensors = huggingface.to_hugging_face(state)
    for name, value in scores.items():
        tensors[name.replace("scores", "classifier")] = value.detach().cpu().contiguous()
    huggingface.write_tensors(folder / WEIGHTS, tensors)
    save_tokenizer_files(vocab, folder, bert.config.max_position_embeddings)
    write_json(folder / "config.json", _config(bert.config, vocab, labels))


def _config(shape: ModelConfig, vocab: Vocab, labels: Labels) -> dict[str, Json]:
    names = labels.names or ("LABEL_0",)
    facts = huggingface.config_json(shape, vocab, _ARCHITECTURE[labels.kind])
    facts["id2label"] = {str(i): name for i, name in enumerate(names)}
    facts["label2id"] = {name: i for i, name in enumerate(names)}
    if labels.kind in ("classes", "number"):
        one = labels.kind == "number"
        facts["problem_type"] = "regression" if one else "single_label_classification"
    return facts


def labels_of(kind: Kind, classes: Sequence[str], tags: Sequence[str]) -> Labels:
    """The labels of training examples, in a fixed order.

    Raises:
        InputError: there is only one.
    """
    for names, what in ((classes, "class"), (tags, "tag")):
        if len({*names}) == 1:
            raise InputError(
                f"all training examples have the one {what} {names[0]!r}: nothing can be learnt"
            )
    words = sorted({*tags})
    whole = sorted({*classes})
    if kind == "joint":
        return Labels(kind, (*words, *(INTENT + name for name in whole)))
    return Labels(kind, tuple(words if kind == "tags" else whole if kind == "classes" else ()))
