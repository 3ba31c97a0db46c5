"""The metrics of a task, by scikit-learn, scipy and seqeval, over everything that was asked.

A prediction of None (a word that the model never read) is wrong: of tags it counts as O, so that a
span which was cut off is missed. Labels are names, so one that training never had is wrong, too.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Sequence
from typing import Any

from mvbert.errors import InputError, require_extra
from mvbert.tasks.formats import POSITIVE, Task

OUTSIDE = "O"


def check_installed() -> None:
    """Raises MissingExtra if a library of metrics is not installed, before anything is trained."""
    with require_extra("finetune", "scoring a task"):
        for name in ("scipy.stats", "seqeval.metrics", "sklearn.metrics"):
            importlib.import_module(name)


def text_metrics(task: Task, truth: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
    """Metrics of one label a text: classes by name, or numbers."""
    if task.kind == "number":
        return _number_metrics(truth, predictions)
    from sklearn import metrics

    result = {"accuracy": float(metrics.accuracy_score(truth, predictions))}
    positive = POSITIVE.get(task.name)
    if positive is not None:
        result["f1"] = float(
            metrics.f1_score([t == positive for t in truth], [s == positive for s in predictions])
        )
    elif task.name == "cola":
        result["matthews"] = float(metrics.matthews_corrcoef(truth, predictions))
    elif task.name == "classes":
        labels = sorted({*truth})
        result["f1_macro"] = float(
            metrics.f1_score(truth, predictions, labels=labels, average="macro", zero_division=0.0)
        )
    return result


def _number_metrics(truth: Sequence[float], predictions: Sequence[float]) -> dict[str, float]:
    from scipy import stats

    with warnings.catch_warnings():
        # A model that gives one number to all has no correlation: that is 0, as in GLUE's scorer.
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        values = {
            "pearson": float(stats.pearsonr(truth, predictions).statistic),
            "spearman": float(stats.spearmanr(truth, predictions).statistic),
        }
    return {name: 0.0 if math.isnan(value) else value for name, value in values.items()}


def tag_metrics(
    truth: Sequence[Sequence[str]], predictions: Sequence[Sequence[str | None]]
) -> dict[str, float]:
    """F1, precision and recall of whole spans as conlleval counts them; accuracy of words.

    Tags without spans (parts of speech) have the accuracy alone.
    """
    from seqeval import metrics as spans
    from sklearn import metrics

    complete = [[OUTSIDE if tag is None else tag for tag in tags] for tags in predictions]
    result: dict[str, float] = {}
    flat = [tag for tags in truth for tag in tags]
    if has_spans(flat):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no span found: 0
            lists = [list(tags) for tags in truth], complete
            result["f1"] = float(spans.f1_score(*lists))
            result["precision"] = float(spans.precision_score(*lists))
            result["recall"] = float(spans.recall_score(*lists))
    # A word that was not read is wrong here even if its tag is O.
    read = [tag or "" for tags in predictions for tag in tags]
    result["accuracy"] = float(metrics.accuracy_score(flat, read))
    return result


def joint_metrics(
    intents: Sequence[str],
    predicted_intents: Sequence[str],
    tags: Sequence[Sequence[str]],
    predicted_tags: Sequence[Sequence[str | None]],
) -> dict[str, float]:
    """Intent accuracy, the metrics of slots, and the share of sentences with all of it right."""
    from sklearn import metrics

    slots = {f"slot_{name}": value for name, value in tag_metrics(tags, predicted_tags).items()}
    right = [
        a == b and list(t) == [OUTSIDE if tag is None else tag for tag in s]
        for a, b, t, s in zip(intents, predicted_intents, tags, predicted_tags, strict=True)
    ]
    return {
        "intent_accuracy": float(metrics.accuracy_score(intents, predicted_intents)),
        **slots,
        "sentence_accuracy": float(metrics.accuracy_score([True] * len(right), right)),
    }


def has_spans(tags: Sequence[str]) -> bool:
    """Whether tags say where spans begin and go on: B-, I- and so on, and O."""
    return any(tag[:2] in ("B-", "I-", "E-", "S-", "U-", "L-") for tag in tags)


def score_of(task: Task, metrics: dict[str, float]) -> float:
    """The number that chooses between epochs and settings: the mean of the task's main metrics."""
    main = [name for name in task.main if name in metrics] or ["accuracy"]
    values = [metrics[name] for name in main]
    if not all(map(math.isfinite, values)):
        raise InputError(f"{task.name}: the metrics are {metrics}: the model's outputs are corrupt")
    return sum(values) / len(values)
