"""Padding and masking 64 rows of about 128 pieces for somebody else's training loop, one thread.

A data set gives rows: `lists` of Python integers (input_ids, attention_mask and token_type_ids, as
transformers' tokenizers make them), `ids` the input_ids alone, `arrays` of numpy, or a `batch` that
a tokenizer has padded. Beside ours are DataCollatorForLanguageModeling, of pieces, and
DataCollatorForWholeWordMask of transformers. They take lists, the first with special_tokens_mask,
which is made before the clock starts; a row's dict is copied, since they change it.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import harness
from bench_corpus import teacher_vocab
from bench_tokenizer import words

ROWS = 64
CUT = {"truncation": True, "max_length": 128}


@dataclass(frozen=True)
class Case:
    form: str

    @property
    def label(self) -> str:
        return f"{ROWS} rows, {self.form}"


@dataclass(frozen=True)
class Inputs:
    """The same rows for ours and for transformers' collator."""

    rows: Any
    examples: list[dict]
    batch: Any  # padded, for the check


def cases(device: str, quick: bool) -> list[Case]:
    return [Case(form) for form in (("lists",) if quick else ("lists", "ids", "arrays", "batch"))]


@cache
def mvbert_tokenizer():
    from mvbert import WordPieceTokenizer
    from mvbert.text.vocab import Vocab

    return WordPieceTokenizer(Vocab.load(teacher_vocab(), lowercase=True))


@cache
def hf_tokenizer():
    import transformers

    return transformers.BertTokenizerFast(str(teacher_vocab()))


def inputs(case: Case, device: str, copy: int) -> Inputs:
    import numpy as np

    first = copy * ROWS * 100 % max(1, len(words()) - ROWS * 100)
    texts = [" ".join(words()[first + 100 * i : first + 100 * (i + 1)]) for i in range(ROWS)]
    batch = mvbert_tokenizer()(texts, **CUT, padding=True, return_tensors="pt")
    rows: Any = [dict(mvbert_tokenizer()(one, **CUT)) for one in texts]
    if case.form == "batch":
        rows = batch
    elif case.form == "ids":
        rows = [row["input_ids"] for row in rows]
    elif case.form == "arrays":
        rows = [{name: np.array(values) for name, values in row.items()} for row in rows]
    special = {**CUT, "return_special_tokens_mask": True}
    return Inputs(rows, [dict(hf_tokenizer()(one, **special)) for one in texts], batch)


def work(case: Case, device: str) -> harness.Work:
    pieces = int(inputs(case, device, 0).batch["attention_mask"].sum())
    return harness.Work(items=pieces / 1e6, unit="M pieces")


def check(case: Case, x: Inputs, out: Any) -> dict:
    """Some 15 % of the pieces have a label, what was there; the others are as they were."""
    labels, original = out["labels"], x.batch["input_ids"]
    masked = labels != -100
    if not (original == out["input_ids"].where(~masked, labels)).all():
        raise harness.Wrong("a label or a piece without a label is not the piece that was there")
    share = float(masked.sum() / x.batch["attention_mask"].sum())
    if not 0.1 < share < 0.2:
        raise harness.Wrong(f"{share:.1%} of the pieces are masked")
    return {}


BENCH = harness.Bench(
    "collator", cases=cases, inputs=inputs, work=work, check=check, memory=False, threads=1,
    devices=["cpu"],
)  # fmt: skip


def with_mvbert(case: Case, device: str, whole_word: bool):
    from mvbert import MaskingCollator

    collator = MaskingCollator(mvbert_tokenizer(), whole_word_mask=whole_word)
    return lambda x: collator(x.rows)


def with_transformers(case: Case, device: str, whole_word: bool):
    import transformers

    harness.only_if(case.form == "lists")
    name = "DataCollatorForWholeWordMask" if whole_word else "DataCollatorForLanguageModeling"
    collator = getattr(transformers, name)(hf_tokenizer())
    return lambda x: collator([dict(row) for row in x.examples])


BENCH.add("mvbert, words", with_mvbert, whole_word=True, needs=["transformers"])
BENCH.add("mvbert, pieces", with_mvbert, whole_word=False, needs=["transformers"])
BENCH.add("transformers, words", with_transformers, whole_word=True, needs=["transformers"])
BENCH.add("transformers, pieces", with_transformers, whole_word=False, needs=["transformers"])
