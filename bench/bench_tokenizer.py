"""Text to piece ids: ours beside every WordPiece tokenizer that we could install.

Each tokenizer runs in a separate process with as many processors and threads as the case has; they
take turns. Before anything is timed, the ids of the first texts are compared, text by text, with
those of Hugging Face's slow BertTokenizer, the definition: each record has the share of equal
texts, and ours must all be equal. No other library tokenizes with two vocabularies, so mixed ids
have no reference: with student_prob 0 ours must be the teacher's.

Texts: `documents` are paragraphs joined to about 2,400 bytes, `short` the same split at 119 bytes.
The text is the first 12 MB of openstax.txt.xz in the data folder, or else of wiki-train-00.txt.xz
(docs/experiments/get_data.py downloads it), or else the docstrings of Python's standard library;
the record names it. Libraries below about 3 MB/s get a part of it. "Warm" times texts that were
tokenized before, "cold" clears the tokenizer's cache before each call. TF Text runs if
bench/.venv-tf has it.
"""

import json
import lzma
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import clocks
import harness
import reporting
from bench_corpus import teacher_vocab

TF_PYTHON = harness.ROOT / "bench" / ".venv-tf" / "bin" / "python"
TF_INSTALL = "python -m venv bench/.venv-tf && bench/.venv-tf/bin/pip install tensorflow-text"
SLOW = ("transformers slow", "google-research/bert", "HF twice, spliced", "HF words + dict")
CHECKED_BYTES = 1_000_000  # compared with the slow tokenizer


@dataclass(frozen=True)
class Case:
    """What is tokenized, on how many threads, with a warm or a cold cache."""

    texts: str  # documents or short
    threads: int
    state: str  # warm or cold
    task: str  # plain or mixed
    megabytes: float

    @property
    def label(self) -> str:
        return f"{self.task} {self.texts}, {reporting.threads(self.threads)}, {self.state}"


def cases(device: str, quick: bool) -> list[Case]:
    """Plain: one and two threads, warm and cold, long and short; mixed: warm and cold."""
    size = 3.0 if quick else 12.0
    result = [Case("documents", 1, "warm", "plain", size)]
    if not quick:
        result += [
            Case("documents", 1, "cold", "plain", size),
            Case("documents", 2, "warm", "plain", size),
            Case("short", 1, "warm", "plain", size),
        ]
    result.append(Case("documents", 1, "warm", "mixed", size))
    return result if quick else [*result, Case("documents", 1, "cold", "mixed", size)]


@dataclass(frozen=True)
class Material:
    """The files that every worker reads."""

    name: str
    texts: Path
    vocab: Path
    sizes: tuple[int, ...]  # bytes of each text

    def prefix(self, limit: float) -> tuple[int, int]:
        """How many first texts have at most `limit` bytes, and their bytes."""
        total = 0
        for count, size in enumerate(self.sizes):
            if total + size > limit:
                return max(1, count), max(total, size)
            total += size
        return len(self.sizes), total


@cache
def text() -> tuple[str, str]:
    """(name, text): a paragraph a line."""
    for name, file in (("openstax", "openstax.txt.xz"), ("Wikipedia", "wiki-train-00.txt.xz")):
        if (harness.DATA / file).exists():
            with lzma.open(harness.DATA / file, "rt", encoding="utf-8") as source:
                return name, source.read(12_000_000)
    from mvbert.text.docstrings import docstring_corpus

    path = harness.folder("tokenizer") / "stdlib.txt"
    docstring_corpus(path, ["stdlib"])
    return "docstrings of Python's standard library", path.read_text(encoding="utf-8")


@cache
def words() -> list[str]:
    """The text's words, cut at blanks."""
    return text()[1].split()


@cache
def vocabularies() -> Path:
    """Teacher's vocab.txt with the student's student.txt beside it, learned from the text."""
    from mvbert.text.corpus import Corpus, build_corpus
    from mvbert.text.learner import learn_vocab
    from mvbert.text.vocab import Vocab

    out = harness.folder("tokenizer")
    Vocab.load(teacher_vocab(), lowercase=True).save(out / "vocab.txt")
    (out / "text.txt").write_text(text()[1], encoding="utf-8")
    build_corpus([out / "text.txt"], out / "corpus")
    corpus = Corpus.open(out / "corpus")
    Vocab(tuple(learn_vocab(corpus.words, corpus.counts, 4928))).save(out / "student.txt")
    return out / "vocab.txt"


@cache
def material(kind: str, megabytes: float) -> Material:
    name, whole = text()
    lines = (line for line in whole.splitlines() if line)
    if kind == "short":
        texts = [line[a : a + 119] for line in lines for a in range(0, len(line), 119)]
    else:
        texts, block = [], []
        for line in lines:
            block.append(line)
            if sum(map(len, block)) >= 2400:
                texts.append(" ".join(block))
                block = []
    sizes = tuple(len(one.encode()) for one in texts)
    file = harness.folder("tokenizer") / f"{kind}-{megabytes:g}.json"
    draft = Material(name, file, vocabularies(), sizes)
    count, _ = draft.prefix(megabytes * 1e6)
    draft.texts.write_text(json.dumps(texts[:count]), encoding="utf-8")
    return Material(name, draft.texts, draft.vocab, sizes[:count])


class Worker:
    """A tokenizer's process."""

    def __init__(self, peer: str, case: Case, python: str = sys.executable) -> None:
        self.material = material(case.texts, case.megabytes)
        self.case = case
        self.texts = 0  # how many first texts a call gets; 0: all
        self.share = 1.0  # their share of the bytes
        threads = str(case.threads)
        pools = ("RAYON", "OMP", "OPENBLAS", "MKL")
        environment = {
            **os.environ,
            **{f"{pool}_NUM_THREADS": threads for pool in pools},
            "MVBERT_BENCH_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "true" if case.threads > 1 else "false",
            "HF_HUB_OFFLINE": "1",
        }
        worker = Path(__file__).with_name("tokenizer_worker.py")
        self.process = subprocess.Popen(
            [python, str(worker), peer, str(self.material.vocab), str(self.material.texts)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment,
        )  # fmt: skip
        self.remembers = self.answer()["remembers"]

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with {self.process.wait()}")
        facts = json.loads(line)
        if "failed" in facts:
            raise RuntimeError(facts["failed"])
        return facts

    def ask(self, **command) -> dict:
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def use(self, limit: float) -> None:
        """Calls get the first texts, at most `limit` bytes of them."""
        self.texts, size = self.material.prefix(limit)
        self.share = size / sum(self.material.sizes)

    def __call__(self, _) -> "Worker":
        return self

    def sample(self, calls: int) -> clocks.Sample:
        facts = self.ask(do="time", calls=calls, cold=self.case.state == "cold", texts=self.texts)
        return clocks.Sample(facts["wall"], facts["own"])

    def digests(self) -> list[str]:
        count, _ = self.material.prefix(CHECKED_BYTES)
        return self.ask(do="digests", texts=count)["digests"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


@cache
def definition(kind: str, megabytes: float) -> list[str]:
    """Digests of the slow tokenizer's ids of the first texts; [] if it is not installed."""
    version = reporting.version("transformers")
    if version is None or int(version.split(".")[0]) >= 5:
        return []
    worker = Worker("transformers slow", Case(kind, 1, "warm", "plain", megabytes))
    digests = worker.digests()
    worker.close()
    return digests


def inputs(case: Case, device: str, copy: int) -> Material:
    return material(case.texts, case.megabytes)


def work(case: Case, device: str) -> harness.Work:
    size = sum(material(case.texts, case.megabytes).sizes)
    return harness.Work(items=size / 1e6, unit="MB")


def check(case: Case, x: Material, worker: Worker) -> dict:
    """The share of texts whose ids are those of the definition; ours must have all."""
    facts: dict = {"text": x.name}
    if worker.texts:
        facts["megabytes"] = clocks.digits(worker.share * sum(x.sizes) / 1e6)
    if case.task == "mixed":
        return facts
    truth = definition(case.texts, case.megabytes)
    if not truth:
        return {**facts, "equal": None}
    digests = worker.digests()
    equal = sum(a == b for a, b in zip(digests, truth, strict=True))
    facts |= {"equal": clocks.digits(equal / len(truth), 6), "checked": len(truth)}
    if worker.ours and equal < len(truth):
        raise harness.Wrong(f"{len(truth) - equal} of {len(truth)} texts have other ids")
    return facts


BENCH = harness.Bench(
    "tokenizer", cases=cases, inputs=inputs, work=work, check=check, memory=False, seconds=0.5,
    devices=("cpu",),
)  # fmt: skip


def add(name: str, task: str = "plain", needs: tuple[str, ...] = ()) -> None:
    """Registers the worker's peer `name` for cases of `task`."""

    def make(case: Case, device: str) -> Worker:
        harness.only_if(case.task == task)
        python = sys.executable
        if name.startswith("TF Text"):
            if not TF_PYTHON.exists():
                raise harness.Skip(f"not installed; run: {TF_INSTALL}")
            python = str(TF_PYTHON)
        if (
            name == "transformers slow"
            and int(reporting.version("transformers").split(".")[0]) >= 5
        ):
            raise harness.Skip("gone from transformers 5; run: pip install 'transformers<5'")
        if name == "mvbert mixed":
            gate_mixed(case)
        worker = Worker(name, case, python)
        worker.ours = name.startswith("mvbert")
        if case.state == "cold" and not worker.remembers:
            worker.close()
            raise harness.NotApplicable
        if name in SLOW:
            worker.use(0.5e6)
        elif name.startswith(("HF", "transformers")):
            worker.use(2e6)
        return worker

    BENCH.add(name, make, needs=needs)


def gate_mixed(case: Case) -> None:
    """Raises unless mixed ids with student_prob 0 are the plain ones."""
    from mvbert.text.tokenizer import MixedTokenizer, WordPieceTokenizer
    from mvbert.text.vocab import Vocab

    x = material(case.texts, case.megabytes)
    teacher = Vocab.load(x.vocab, lowercase=True)
    student = Vocab.load(x.vocab.with_name("student.txt"), lowercase=True)
    texts = json.loads(x.texts.read_text(encoding="utf-8"))[:200]
    plain = WordPieceTokenizer(teacher).encode_batch(texts, add_special_tokens=False)
    mixed = MixedTokenizer(teacher, student).encode_batch(texts, student_prob=0.0)
    if plain.ids.tolist() != mixed.ids.tolist():
        raise harness.Wrong("with student_prob 0 the ids are not the teacher's")


add("mvbert")
add("mvbert called")
add("mvbert called, offsets")
add("mvbert called, words")
add("nanotoken", needs=("nanotoken",))
add("tokie", needs=("tokie", "tokenizers"))
add("TF Text FastBertTokenizer")
add("flash-tokenizer", needs=("flash-tokenizer",))
add("BlingFire", needs=("blingfire",))
add("HF encode_batch_fast", needs=("tokenizers",))
add("transformers fast", needs=("transformers",))
add("google-research/bert", needs=("flash-tokenizer",))
add("transformers slow", needs=("transformers",))
add("mvbert mixed", task="mixed")
add("HF words + dict", task="mixed", needs=("tokenizers",))
add("HF twice, spliced", task="mixed", needs=("tokenizers",))
