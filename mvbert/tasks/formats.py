"""Tasks in their published formats: GLUE, intents and slots, CoNLL's tags, tables of one's own.

sst-2 cola mrpc qqp sts-b mnli qnli rte wnli   GLUE (Wang et al. 2018, arXiv 1804.07461)
intents slots joint    seq.in, seq.out, label in train, valid and test (Goo et al. 2018)
tags                   a word and its tag on a line (CoNLL), or lists in columns of a table
classes number         a table with a text, perhaps a second one, and a label
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, Literal

from mvbert.errors import InputError, require_extra
from mvbert.tasks.sources import TABLES, File, Table, read_files, read_table

Kind = Literal["classes", "number", "tags", "joint"]

HUB = "datasets:"  # prefix of names that Hugging Face's `datasets` loads


@dataclass(frozen=True)
class Task:
    """What a task asks for, and how its files are read.

    Attributes:
        kind: classes or a number of a text or a pair; a tag of every word; joint: both a class of
            the sentence and tags.
        main: the metrics whose mean chooses between epochs and settings.
        text, pair, label: column names that it may have, in the order of preference.
        header: columns of a .tsv without a header line.
        names: what labels in the files mean.
        epochs: default number.
        skip_broken: leave out rows with another number of columns, as everybody does with QQP's.
    """

    name: str
    kind: Kind
    main: tuple[str, ...]
    text: tuple[str, ...] = ("sentence",)
    pair: tuple[str, ...] = ()
    label: tuple[str, ...] = ("label",)
    header: tuple[str, ...] = ()
    names: dict[str, str] = field(default_factory=dict)
    epochs: int = 3
    skip_broken: bool = False


_NLI = {"0": "entailment", "1": "neutral", "2": "contradiction"}
_BOTH = (("sentence1",), ("sentence2",))

TASKS = {
    task.name: task
    for task in (
        Task("sst-2", "classes", ("accuracy",), names={"0": "negative", "1": "positive"}),
        Task(
            "cola", "classes", ("matthews",), header=("source", "label", "star", "sentence"),
            names={"0": "unacceptable", "1": "acceptable"}, epochs=10,
        ),
        Task(
            "mrpc", "classes", ("accuracy", "f1"), ("#1 String", "sentence1"),
            ("#2 String", "sentence2"), ("Quality", "label"),
            names={"0": "not_equivalent", "1": "equivalent"}, epochs=10,
        ),
        Task(
            "qqp", "classes", ("accuracy", "f1"), ("question1",), ("question2",),
            ("is_duplicate", "label"), names={"0": "not_duplicate", "1": "duplicate"},
            skip_broken=True,
        ),
        Task("sts-b", "number", ("pearson", "spearman"), *_BOTH, ("score", "label"), epochs=10),
        Task(
            "mnli", "classes", ("accuracy",), ("sentence1", "premise"),
            ("sentence2", "hypothesis"), ("gold_label", "label"), names=_NLI,
        ),
        Task("qnli", "classes", ("accuracy",), ("question",), ("sentence",)),
        Task("rte", "classes", ("accuracy",), *_BOTH, epochs=10),
        Task(
            "wnli", "classes", ("accuracy",), *_BOTH,
            names={"0": "not_entailment", "1": "entailment"}, epochs=10,
        ),
        Task("intents", "classes", ("accuracy",), epochs=5),
        Task("slots", "tags", ("f1",), epochs=10),
        Task("joint", "joint", ("sentence_accuracy",), epochs=10),
        Task("tags", "tags", ("f1",), ("tokens",), label=("tags", "ner_tags"), epochs=5),
        Task("classes", "classes", ("accuracy",), ("text",), epochs=5),
        Task("number", "number", ("pearson", "spearman"), ("text",), epochs=5),
    )
}  # fmt: skip

POSITIVE = {"mrpc": "equivalent", "qqp": "duplicate"}  # the class whose F1 is reported


def find_task(name: str, text: str = "", pair: str = "", label: str = "") -> Task:
    """The task of this name; columns that are given replace its own.

    Raises:
        InputError: no such task.
    """
    spelled = {re.sub("[^a-z0-9]", "", key): key for key in TASKS}
    key = spelled.get(re.sub("[^a-z0-9]", "", name.lower()))
    if key is None:
        raise InputError(f"no task {name!r}; expected one of {', '.join(TASKS)} or embed")
    task = TASKS[key]
    if (text or pair or label) and key in ("intents", "slots", "joint"):
        raise InputError(f"{key} is read from seq.in, seq.out and label, which have no columns")
    return replace(
        task,
        text=(text,) if text else task.text,
        pair=(pair,) if pair else task.pair,
        label=(label,) if label else task.label,
    )


@dataclass(frozen=True)
class Examples:
    """The examples of one split.

    Attributes:
        texts: of each example a text, or its words where they have tags.
        pairs: the second texts.
        labels: classes or numbers; None if the split has none.
        tags: a tag of every word; None if the task has none.
        places: where each stands, for messages.
        note: what was left out.
    """

    texts: list[Any]
    pairs: list[str] | None
    labels: list[Any] | None
    tags: list[list[str]] | None
    places: list[str]
    note: str = ""

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def labelled(self) -> bool:
        return self.labels is not None or self.tags is not None

    def select(self, chosen: Sequence[int]) -> Examples:
        """Examples by their numbers."""

        def of(values: list[Any] | None) -> list[Any] | None:
            return None if values is None else [values[i] for i in chosen]

        return replace(
            self, texts=[self.texts[i] for i in chosen], pairs=of(self.pairs),
            labels=of(self.labels), tags=of(self.tags), places=[self.places[i] for i in chosen],
        )  # fmt: skip


# ---- splits --------------------------------------------------------------------------------------


def read_task(task: Task, where: Sequence[str]) -> dict[str, Examples]:
    """The splits of a task: train, dev and, where they have labels, further ones.

    Args:
        where: a folder, an archive or a name for `datasets`; or the files of train, dev and test.

    Raises:
        InputError: something is missing or is not as the task's format says.
    """
    if len(where) > 3:
        raise InputError(f"expected files of train, dev and test, got {len(where)} paths")
    if len(where) == 1 and where[0].startswith(HUB):
        return _from_hub(task, where[0].removeprefix(HUB))
    if len(where) == 1:
        return _of_files(task, read_files(where[0]), where[0])
    splits = {}
    for split, name in zip(("train", "dev", "test"), where, strict=False):
        files = read_files(name)
        if len(files) != 1:
            raise InputError(f"{name}: expected one file of {split}, got {len(files)} files")
        splits[split] = _read(task, files)
    return splits


def read_examples(task: Task, where: str) -> dict[str, Examples]:
    """The labelled splits of a folder, archive or `datasets` name, or the one of a file."""
    if where.startswith(HUB):
        return _from_hub(task, where.removeprefix(HUB))
    files = read_files(where)
    if len(files) == 1:
        return {PurePosixPath(files[0].path).stem: _read(task, files)}
    return _of_files(task, files, where)


def read_extra(task: Task, where: Sequence[str]) -> list[Examples]:
    """Further labelled examples: every table of these files, folders and archives.

    Raises:
        InputError: the task is not one of tables, there is no table, or one has no labels.
    """
    if task.name in _SEQUENCES:
        raise InputError(f"{task.name} takes no extra examples: they are read from tables alone")
    parts = []
    for path in where:
        files = [file for file in read_files(path) if file.suffix in TABLES]
        if not files:
            raise InputError(f"{path} has no table; expected *{', *'.join(TABLES)}")
        for file in files:
            parts.append(_read(task, [file]))
            if not parts[-1].labelled:
                raise InputError(f"{file.name}: extra training examples need labels")
    return parts


def join_examples(parts: Sequence[Examples]) -> Examples:
    """The examples of several sets of one task, one after another; all have labels."""

    def of(name: str) -> list[Any] | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else [value for part in values for value in part]

    notes = "; ".join(part.note for part in parts if part.note)
    return Examples(
        of("texts") or [], of("pairs"), of("labels"), of("tags"), of("places") or [], notes
    )


def _of_files(task: Task, files: list[File], where: str) -> dict[str, Examples]:
    """Puts the files of a folder or archive to the splits that their names say."""
    found: dict[str, list[File]] = {}
    for file in files:
        split = _split_of(task, file)
        if split:
            found.setdefault(split, []).append(file)
    parts = 1 if task.name not in _SEQUENCES else len(_SEQUENCES[task.name])
    splits = {}
    for split, several in found.items():
        depth = min(file.path.count("/") for file in several)  # not copies in folders further down
        several = [file for file in several if file.path.count("/") == depth]
        if len(several) > parts:
            raise InputError(
                f"{where} has several files of {split}: {several[0].path}, {several[1].path}; "
                "give the files of train, dev and test one by one"
            )
        examples = _read(task, several)
        if examples.labelled or split in ("train", "dev"):
            splits[split] = examples
    if not splits:
        kinds = "seq.in, seq.out and label in train, valid and test"
        if task.name not in _SEQUENCES:
            kinds = "files called train, dev and test"
        names = ", ".join(file.path for file in files[:4]) or "nothing"
        raise InputError(f"{where} is not {task.name}'s: expected {kinds}, got {names}")
    return splits


_SEQUENCES = {
    "intents": ("seq.in", "label"),
    "slots": ("seq.in", "seq.out"),
    "joint": ("seq.in", "seq.out", "label"),
}
_SPLITS = {"train": "train", "dev": "dev", "valid": "dev", "validation": "dev", "val": "dev",
           "testa": "dev", "test": "test", "testb": "test"}  # fmt: skip


def _split_of(task: Task, file: File) -> str:
    """The split that a file belongs to; empty if it belongs to none."""
    path = PurePosixPath(file.path)
    if task.name in _SEQUENCES:
        return _SPLITS.get(path.parent.name, "") if path.name in _SEQUENCES[task.name] else ""
    if task.kind != "tags" and path.suffix.lower() not in TABLES:
        return ""
    # train.tsv, train_partial.tsv, dev_matched.tsv, eng.testa, data-validation.jsonl
    match = re.fullmatch(
        r"(?:.*[._-])??(train|dev|validation|valid|val|testa|testb|test)(?:[_-](\w+))?",
        path.name if task.kind == "tags" and path.suffix[1:] in _SPLITS else path.stem,
        re.IGNORECASE,
    )
    if match is None or path.stem == "dev_ids":
        return ""
    split = _SPLITS[match[1].lower()]
    mismatched = split != "train" and (match[2] or "").lower() == "mismatched"
    return f"{split}_mismatched" if mismatched else split


def _read(task: Task, files: list[File]) -> Examples:
    """The examples of one split."""
    if task.name in _SEQUENCES:
        return _read_sequences(task, files)
    (file,) = files
    if task.kind == "tags" and file.suffix not in (".jsonl", ".parquet"):
        return _read_conll(file)
    if file.suffix not in TABLES:
        raise InputError(f"{file.name}: expected one of *{', *'.join(TABLES)}")
    return _of_table(task, read_table(file, task.header, task.skip_broken))


# ---- tables --------------------------------------------------------------------------------------


def _of_table(task: Task, table: Table) -> Examples:
    texts = table.column(task.text, "text")
    pairs = table.column(task.pair, "second text") if task.pair else None
    known = any(name in table.columns for name in task.label)
    # GLUE's test sets come without labels; of one's own files a missing column is a mistake.
    graded = known or task.name in ("classes", "number", "tags")
    labels = table.column(task.label, "label") if graded else None
    if task.kind == "tags":
        return _of_lists(table, texts, labels)
    for values, what in ((texts, "text"), (pairs, "second text")):
        for value, place in zip(values or (), table.places, strict=bool(values)):
            if not isinstance(value, str):
                raise InputError(f"{place}: the {what} is {value!r}, expected a string")
    if labels is not None:
        read = _number if task.kind == "number" else _class
        labels = [
            read(value, place, task) for value, place in zip(labels, table.places, strict=True)
        ]
        if all(label is None for label in labels):
            labels = None
        elif None in labels:
            place = table.places[labels.index(None)]
            raise InputError(f"{place}: there is no label, though other rows have one")
    note = f"{table.name}: {table.skipped} broken rows skipped" if table.skipped else ""
    return Examples(texts, pairs, labels, None, table.places, note)


def _number(value: Any, place: str, task: Task) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"{place}: the score is {value!r}, expected a number") from None
    if not math.isfinite(number):
        raise InputError(f"{place}: the score is {value!r}, expected a finite number")
    return number


def _class(value: Any, place: str, task: Task) -> str | None:
    if value is None or value == "" or (value == -1 and not isinstance(value, str)):
        return None  # `datasets` has -1 where there is no label
    if isinstance(value, (list, dict)):
        raise InputError(f"{place}: the label is {value!r}, expected a string or a number")
    if isinstance(value, float) and not value.is_integer():
        raise InputError(
            f"{place}: the label is {value!r}; for scores instead of classes, take the task number"
        )
    name = str(int(value)) if isinstance(value, (bool, float)) else str(value)
    return task.names.get(name, name)


def _of_lists(table: Table, texts: list[Any], tags: list[Any] | None) -> Examples:
    for words, of, place in zip(texts, tags or (), table.places, strict=True):
        if not isinstance(words, list) or not isinstance(of, list):
            raise InputError(f"{place}: expected a list of words and a list of tags")
        _check_tags(words, of, place)
    tags = [[str(tag) for tag in of] for of in tags or ()]
    return Examples([[str(w) for w in words] for words in texts], None, None, tags, table.places)


def _check_tags(words: Sequence[str], tags: Sequence[str], place: str) -> None:
    if len(words) != len(tags):
        raise InputError(f"{place}: {len(tags)} tags for {len(words)} words")


# ---- tags and intents ----------------------------------------------------------------------------


def _read_conll(file: File) -> Examples:
    """One word a line: the first column is the word, the last its tag; blank lines between."""
    words: list[list[str]] = []
    tags: list[list[str]] = []
    places: list[str] = []
    open_ = False
    for number, line in enumerate(file.lines(), 1):
        cells = line.split("\t") if "\t" in line else line.split(" ")
        cells = [cell for cell in cells if cell]
        if not line.strip() or cells[0] == "-DOCSTART-" or (line.startswith("# ") and not open_):
            open_ = False
            continue
        if len(cells) < 2:
            raise InputError(f"{file.name}:{number}: expected a word and its tag, got {line!r}")
        if not open_:
            words.append([])
            tags.append([])
            places.append(f"{file.name}:{number}")
        open_ = True
        words[-1].append(cells[0])
        tags[-1].append(cells[-1])
    return Examples(words, None, None, tags, places)


def _read_sequences(task: Task, files: list[File]) -> Examples:
    by_name = {PurePosixPath(file.path).name: file for file in files}
    for name in _SEQUENCES[task.name]:
        if name not in by_name:
            folder = files[0].name.rpartition("/")[0]
            raise InputError(f"{folder} has no {name}, which {task.name} needs")
    source = by_name["seq.in"]
    # Words stand between spaces; other white space belongs to a word.
    words = [[word for word in line.split(" ") if word] for line in source.lines()]
    places = [f"{source.name}:{i}" for i in range(1, len(words) + 1)]
    tags = labels = None
    for name, file in by_name.items():
        if name == "seq.in":
            continue
        lines = [[part for part in line.split(" ") if part] for line in file.lines()]
        if len(lines) != len(words):
            raise InputError(f"{file.name} has {len(lines)} lines, {source.name} {len(words)}")
        for number, (of, sentence) in enumerate(zip(lines, words, strict=True), 1):
            if name == "seq.out":
                _check_tags(sentence, of, f"{file.name}:{number}")
            elif len(of) != 1:
                raise InputError(f"{file.name}:{number}: expected one intent, got {of}")
        if name == "seq.out":
            tags = lines
        else:
            labels = [of[0] for of in lines]
    texts = [" ".join(sentence) for sentence in words] if tags is None else words
    return Examples(texts, None, labels, tags, places)


# ---- `datasets` ----------------------------------------------------------------------------------


def _from_hub(task: Task, name: str) -> dict[str, Examples]:
    """The splits of a data set that `datasets` loads: NAME or NAME:CONFIGURATION."""
    with require_extra("datasets", f"{HUB}{name}"):
        from datasets import load_dataset
    path, _, config = name.partition(":")
    try:
        parts = load_dataset(path, config or None)
    except Exception as error:  # whatever a repository, a network or a script raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"datasets cannot load {name}: {reason}") from None
    splits = {}
    for part, rows in parts.items():
        match = re.fullmatch(r"(train|validation|dev|test)(?:_(matched|mismatched))?", part)
        if match is None:
            continue
        split = _SPLITS[match[1]] + ("_mismatched" if match[2] == "mismatched" else "")
        columns = {column: list(rows[column]) for column in rows.column_names}
        for column, feature in rows.features.items():
            to_name: Callable[[int], str] | None = _names_of(feature)
            if to_name is not None:
                columns[column] = [_named(value, to_name) for value in columns[column]]
        places = [f"{HUB}{name}, {part} row {i}" for i in range(len(rows))]
        examples = _of_table(task, Table(f"{HUB}{name}", columns, places))
        if examples.labelled or split in ("train", "dev"):
            splits[split] = examples
    return splits


def _names_of(feature: Any) -> Callable[[int], str] | None:
    """What turns the numbers of a column of classes, or of lists of classes, to names."""
    inner = getattr(feature, "feature", feature)
    return getattr(inner, "int2str", None)


def _named(value: Any, to_name: Callable[[int], str]) -> Any:
    if isinstance(value, list):
        return [_named(item, to_name) for item in value]
    return to_name(value) if isinstance(value, int) and value >= 0 else value
