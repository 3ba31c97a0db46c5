"""Word stream to finished training rows: pieces, whole-word masks, labels, in M pieces per second.

Ours must equal the plain definition (`mvbert.text.row_reference`) before it is timed, and unmasked
teacher rows must have the pieces that transformers' tokenizer gives for the same words. `mixed` is
Stage I, a coin for every word; `student` is Stage II, one vocabulary; `teacher` is what peers can
do too.

Peers: "HF text" tokenizes text with the fast tokenizer, cuts rows of T and masks them with
DataCollatorForLanguageModeling; "HF pieces" and "HF words" start from rows that are cut already
(a pre-tokenized data set, with special token mask and offsets, which saves the collator work) and
only collate, piece by piece or by whole words (then always [MASK]: 80/10/10 is not supported
there). They use numpy tensors. "numpy" is the least work that masking rows piece by piece in numpy
can be. Text: see bench_corpus.py.
"""

import os
from dataclasses import dataclass
from functools import cache

import harness
import numpy as np
import reporting
from bench_corpus import corpus, teacher_vocab

from mvbert.text import row_reference
from mvbert.text.batches import Batch, Rows
from mvbert.text.learner import learn_vocab
from mvbert.text.vocab import Vocab

T = 128
ROWS = 4096  # a call


@dataclass(frozen=True)
class Case:
    """Which vocabularies rows are cut with, on how many threads."""

    words: str  # mixed, student or teacher
    threads: int

    @property
    def label(self) -> str:
        return f"{self.words} rows, {reporting.threads(self.threads)}"


TEACHER_ALONE = Case("teacher", 1)  # what peers do too


def cases(device: str, quick: bool) -> list[Case]:
    names = ("mixed", "student", "teacher")
    return [Case(n, 1) for n in names] + [Case(n, 2) for n in names[:2] if not quick]


@cache
def segmentations() -> dict:
    """The lexicon cut by teacher and student, the latter learned from it."""
    student = Vocab(tuple(learn_vocab(corpus().words, corpus().counts, 4928)))
    student.save(harness.folder("rows") / "student.txt")
    teacher = Vocab.load(teacher_vocab(), lowercase=True)
    return {"teacher": corpus().segment(teacher), "student": corpus().segment(student)}


@cache
def rows(words: str, mask_prob: float = 0.15, pair_prob: float = 0.5) -> Rows:
    cuts = segmentations()
    if words != "mixed":
        cuts = {words: cuts[words]}
    return Rows(corpus().train, **cuts, T=T, mask_prob=mask_prob, pair_prob=pair_prob)


def work(case: Case, device: str) -> harness.Work:
    return harness.Work(items=ROWS * T / 1e6, unit="M pieces")


def check(case: Case, x, output) -> dict:
    lexicon = {"words": corpus().manifest["words"], "distinct": corpus().manifest["distinct"]}
    return {"rows": ROWS, "T": T, **lexicon}


BENCH = harness.Bench(
    "rows",
    cases=cases,
    inputs=lambda case, device, copy: None,
    work=work,
    check=check,
    memory=False,
    devices=("cpu",),
)


# ---- ours ----------------------------------------------------------------------------------------


@BENCH.provider("mvbert")
def _(case: Case, device: str):
    source = rows(case.words)
    check_definition(case.words)
    if reporting.version("transformers"):
        check_tokenizer()
    out = Batch.empty(ROWS, T, source.capacity)
    start = 0

    def run(x) -> Batch:
        nonlocal start
        start += ROWS
        return source.read(start - ROWS, ROWS, threads=case.threads, out=out)

    return run


@cache
def check_definition(words: str) -> None:
    """Raises unless some rows equal the plain definition."""
    source, cuts = rows(words), segmentations()
    for number in (0, 1, source.count - 1, source.count, 10**12):
        expected = row_reference.row_reference(
            corpus().train,
            number,
            teacher=cuts["teacher"] if words != "student" else None,
            student=cuts["student"] if words != "teacher" else None,
            stride=source.stride,
            T=T,
            mask_prob=0.15,
            pair_prob=0.5,
            student_prob=0.5,
            seed=0,
        )
        for array, truth in zip(vars(source.read(number, 1)).values(), expected, strict=True):
            if array[0].tolist() != truth:
                raise harness.Wrong(f"row {number} is not what mvbert.text.row_reference says")


@cache
def check_tokenizer() -> None:
    """Raises unless unmasked teacher rows are transformers' pieces of the same words."""
    tokenizer = fast_tokenizer()
    source, stream = rows("teacher", 0.0, 0.0), corpus().train
    first = [row_reference.row_start(n, source.count, source.stride, 0) for n in range(50)]
    for row, start in zip(source.read(0, 50).input_ids, first, strict=True):
        words = stream[start : start + T].tolist()
        line = " ".join(corpus().words[word].decode() for word in words if word)
        pieces = tokenizer(line, add_special_tokens=False)["input_ids"]
        ours = [int(i) for i in row[1:-1] if i != tokenizer.sep_token_id]
        if start + T <= len(stream) and ours != pieces[: len(ours)]:
            raise harness.Wrong(f"the row at word {start} is not what transformers makes of it")


# ---- peers ---------------------------------------------------------------------------------------


@cache
def fast_tokenizer():
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import transformers

    fast = transformers.BertTokenizerFast(str(teacher_vocab()), do_lower_case=True)
    fast.model_max_length = 10**9
    return fast


def of_rows(run, count: float):
    run.share = count / ROWS
    return run


@BENCH.provider("numpy")
def _(case: Case, device: str):
    harness.only_if(case == TEACHER_ALONE)
    ids = rows("teacher", 0.0).read(0, 1024).input_ids
    vocab = segmentations()["teacher"].vocab
    rng = np.random.default_rng(0)

    def run(x) -> np.ndarray:
        draw = rng.random(ids.shape, dtype=np.float32)
        random = rng.integers(0, vocab.size, ids.shape, dtype=np.int32)
        np.where(draw < 0.15, ids, -100)
        out = np.where(draw < 0.12, np.int32(vocab.mask), ids)
        return np.where((draw >= 0.12) & (draw < 0.135), random, out)

    return of_rows(run, 1024)


@BENCH.provider("HF text", needs=("transformers",))
def _(case: Case, device: str):
    harness.only_if(case == TEACHER_ALONE)
    import transformers

    fast = fast_tokenizer()
    collator = transformers.DataCollatorForLanguageModeling(fast, return_tensors="np")
    words = corpus().train[:40_000].tolist()
    lines = " ".join(corpus().words[word].decode() if word else "\n" for word in words)
    texts = lines.split("\n")

    def run(x):
        flat = [p for line in fast(texts, add_special_tokens=False)["input_ids"] for p in line]
        cls, sep = fast.cls_token_id, fast.sep_token_id
        return collator(
            [
                {"input_ids": [cls, *flat[i : i + T - 2], sep]}
                for i in range(0, len(flat) - T + 3, T - 2)
            ]
        )["input_ids"]

    return of_rows(run, len(run(None)))


def collate(case: Case, device: str, by_words: bool):
    """The collator over 64 rows that are cut already."""
    harness.only_if(case == TEACHER_ALONE)
    import transformers

    fast = fast_tokenizer()
    options = {}
    if by_words:
        options = {"whole_word_mask": True, "mask_replace_prob": 1, "random_replace_prob": 0}
    collator = transformers.DataCollatorForLanguageModeling(fast, return_tensors="np", **options)
    pieces = fast.convert_ids_to_tokens(range(len(fast)))
    continues = np.array([piece.startswith("##") for piece in pieces], np.int64)
    features = []
    for row in rows("teacher", 0.0).read(0, 64).input_ids:
        feature = {
            "input_ids": row.tolist(),
            "special_tokens_mask": np.isin(row, fast.all_special_ids).astype(int).tolist(),
        }
        if by_words:  # what joins pieces to words is that one begins where the other ends
            begin = 2 * np.arange(T)
            feature["offset_mapping"] = np.stack([begin - continues[row], begin + 1], 1).tolist()
        features.append(feature)
    return of_rows(lambda x: collator(features)["input_ids"], 64)


BENCH.add("HF pieces", collate, by_words=False, needs=["transformers"])
BENCH.add("HF words", collate, by_words=True, needs=["transformers"])
