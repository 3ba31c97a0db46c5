"""Tiny tasks: a sentence is positive if it has a `good` word; a name is a span."""

import json
import random
import shutil
import tarfile

import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("seqeval")

from safetensors.torch import load_file, save_file

FAST = ("--device", "cpu", "--threads", 1, "--dtype", "float32")

GOOD, BAD = ["great", "light", "young"], ["old", "small", "water"]
OTHER = ["the", "river", "house", "words", "of", "is", "a", "table", "in"]


def sentences(count: int, seed: int) -> list[tuple[list[str], str]]:
    """Words, of which one decides the class: positive or negative."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        label = draw.choice(["positive", "negative"])
        words = draw.choices(OTHER, k=draw.randint(2, 6))
        words.insert(draw.randrange(len(words)), draw.choice(GOOD if label == "positive" else BAD))
        made.append((words, label))
    return made


def tagged(count: int, seed: int) -> list[tuple[list[str], list[str]]]:
    """Words with tags: a word of GOOD begins a span of kind x, a word of BAD after it goes on."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        words, tags = [], []
        for _ in range(draw.randint(2, 4)):
            if draw.random() < 0.4:
                words += [draw.choice(GOOD), draw.choice(BAD)]
                tags += ["B-x", "I-x"]
            else:
                words.append(draw.choice(OTHER))
                tags.append("O")
        made.append((words, tags))
    return made


SIZES = {"train": 96, "dev": 24, "test": 24}


@pytest.fixture(scope="session")
def task_data(tmp_path_factory):
    """A folder with sst/ and sst.tar.xz (SST-2's format), snips/, conll/ and own/ tables."""
    folder = tmp_path_factory.mktemp("tasks")
    for name in ("sst", "conll", "own", "snips"):
        (folder / name).mkdir()
    for seed, (split, count) in enumerate(SIZES.items()):
        rows = sentences(count, seed)
        digit = {"positive": "1", "negative": "0"}
        lines = [f"{' '.join(w)} \t{digit[label]}" for w, label in rows]
        head = "sentence\tlabel"
        if split == "test":
            head, lines = (
                "index\tsentence",
                [f"{i}\t{' '.join(w)}" for i, (w, _) in enumerate(rows)],
            )
        (folder / "sst" / f"{split}.tsv").write_text("\n".join([head, *lines]) + "\n")
        # The number: how many words the second text has.
        table = [
            {"text": " ".join(w), "other": w[0], "label": label, "score": len(w) / 2}
            for w, label in rows
        ]
        (folder / "own" / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in table))
        tags = tagged(count, seed)
        text = "\n\n".join("\n".join(f"{w} {t}" for w, t in zip(*r, strict=True)) for r in tags)
        (folder / "conll" / f"{split}.txt").write_text("-DOCSTART- O\n\n" + text + "\n")
        part = folder / "snips" / {"dev": "valid"}.get(split, split)
        part.mkdir()
        (part / "seq.in").write_text("".join(" ".join(w) + "\n" for w, _ in tags))
        (part / "seq.out").write_text("".join(" ".join(t) + " \n" for _, t in tags))
        intents = ["Named" if "B-x" in t else "Plain" for _, t in tags]
        (part / "label").write_text("\n".join(intents) + "\n")
    with tarfile.open(folder / "sst.tar.xz", "w:xz") as tar:
        tar.add(folder / "sst", "SST-2")
    return folder


@pytest.fixture(scope="session")
def bert(training_inputs):
    """A tiny BERT of 32 positions with random weights."""
    return training_inputs / "teacher"


@pytest.fixture
def with_extra(tmp_path):
    """A function that copies a model's folder and adds a tensor that nothing reads."""

    def copy(folder, name):
        copied = shutil.copytree(folder, tmp_path / name)
        weights = load_file(copied / "model.safetensors")
        weights["extra"] = weights[min(weights)][:1].clone()
        save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
        return copied

    return copy


@pytest.fixture
def finetune(verb):
    """A function that fine-tunes on one thread; returns the report and what is said."""

    def run(model, task, data, out, *more):
        data = data if isinstance(data, list) else [data]
        return verb("finetune", model, task, *data, "-o", out, *FAST, *more)

    return run
