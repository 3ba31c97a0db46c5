"""Lexicon to vocabulary: time, overlap with BERT's pieces, pieces per word, by several learners.

Every learner gets the same text, BERT's splitting, lower case, and the same number of characters
for its alphabet. mvbert and sentencepiece learn from counted words; Hugging Face's WordPieceTrainer
takes text, so its time includes counting. All vocabularies are scored alike, by greedy tokenization
of the words of the text. The gate is the size, and for ours equality with the plain Python
definition on a smaller lexicon. Text: see bench_corpus.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import clocks
import harness
import reporting
from bench_corpus import beginning, corpus, teacher_vocab

from mvbert.text import learner_reference
from mvbert.text.learner import learn_vocab, vocab_report
from mvbert.text.readers import documents
from mvbert.text.vocab import SPECIAL_PIECES, Vocab


@dataclass(frozen=True)
class Case:
    """How much text the words are of, pieces wanted, threads."""

    megabytes: float
    size: int
    threads: int

    @property
    def label(self) -> str:
        return f"{self.size} pieces from {self.megabytes:g} MB, {reporting.threads(self.threads)}"


def cases(device: str, quick: bool) -> list[Case]:
    if quick:
        return [Case(4.0, 4928, 1)]
    return [Case(32.0, 4928, 1), Case(32.0, 4928, 2), Case(210.0, 4928, 2), Case(210.0, 30522, 2)]


def check(case: Case, x, pieces: list[str]) -> dict:
    """Scores the vocabulary."""
    if len(pieces) != case.size:
        raise harness.Wrong(f"{len(pieces)} pieces, not {case.size}")
    words = corpus(case.megabytes)
    report = vocab_report(pieces, words.words, words.counts, Vocab.load(teacher_vocab()))
    keys = ("alphabet", "pieces_per_word", "whole_words", "unknown", "never_used")
    return {
        "words": report["words"],
        "distinct": report["distinct"],
        **{key: clocks.digits(report[key], 6) for key in keys},
        "in_teacher": clocks.digits(report["teacher"]["shared_share"]),
    }


BENCH = harness.Bench(
    "vocab",
    cases=cases,
    inputs=lambda case, device, copy: None,
    work=lambda case, device: harness.Work(
        items=len(corpus(case.megabytes).words) / 1e3, unit="K distinct words"
    ),
    check=check,
    memory=False,
    devices=("cpu",),
)


def learned(case: Case, device: str, learner: str) -> Callable:
    """What `mvbert.text.learner` makes; but for ours, on one thread."""
    if learner == "topdown":
        check_definition()
    else:
        harness.only_if(case.threads == 1)
    words = corpus(case.megabytes)

    def run(x) -> list[str]:
        return learn_vocab(
            words.words, words.counts, case.size, learner=learner, threads=case.threads
        )

    return run


@cache
def check_definition() -> None:
    some = corpus(0.2)
    lexicon = {
        word.decode(): int(count)
        for word, count in zip(some.words, some.counts, strict=True)
        if word
    }
    plain = learner_reference.learn_vocab_reference(lexicon, 1000)
    if learn_vocab(some.words, some.counts, 1000, coverage=1.0) != plain:
        raise harness.Wrong("the pieces are not those of the plain definition")


BENCH.add("mvbert topdown", learned, learner="topdown")
BENCH.add("sentencepiece bpe", learned, learner="bpe", needs=["sentencepiece"])
BENCH.add("sentencepiece unigram", learned, learner="unigram", needs=["sentencepiece"])


@BENCH.provider("HF WordPieceTrainer", needs=("tokenizers",))
def _(case: Case, device: str):
    harness.only_if(case.threads == 1)
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    words = corpus(case.megabytes)
    first = learn_vocab(words.words, words.counts, case.size)
    characters = {p.removeprefix("##") for p in first if len(p.removeprefix("##")) == 1}
    path = beginning(case.megabytes).path

    def run(x) -> list[str]:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=case.size,
            limit_alphabet=len(characters),
            special_tokens=list(SPECIAL_PIECES),
            show_progress=False,
        )
        tokenizer.train_from_iterator(documents(path, "text", "strict"), trainer)
        pieces = tokenizer.get_vocab()
        return sorted(pieces, key=pieces.__getitem__)

    return run
