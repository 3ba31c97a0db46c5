"""Differential fuzz: C++ against transformers' BertTokenizer (4.x), by random strings.

    python tests/fuzz_tokenizer.py --vocab data:vocab.txt --count 1000000 --seed 1
    python tests/fuzz_tokenizer.py --vocab data:vocab-cased.txt --cased --count 1000000
    python tests/fuzz_tokenizer.py --vocab data:vocab.txt --keep-accents --count 1000000
    python tests/fuzz_tokenizer.py --vocab data:vocab.txt --added --count 1000000

Strings are short and mean: characters that normal forms, cleaning and special pieces turn on. One
in a thousand is longer, and one in a thousand has a run of one character that fills buffers.
All strings' ids are compared in batches; of some also those of encode and of offsets, rows of
pairs, and (--plain) the definition in plain Python. A seed names its strings, whatever the number
of processes. Prints counts, and strings that differ; exits with 1 if one did. Needs Python 3.11,
whose unicodedata is the pinned 14.0.0.

The slow tokenizer is the measure, but for added pieces the fast one is (docs/models.md). Its words
are others than the slow one's in some strings; --added counts those and leaves them out: strings
of which, or of a character of which, tokenizers without added pieces give other ids already.
"""

import argparse
import multiprocessing
import random
import re
import sys
import time
import unicodedata
from collections.abc import Iterator

from mvbert.text.vocab import SPECIAL_PIECES

BATCH = 1000  # strings of one seed
# With --added: (piece, normalized). One is a word of the vocabulary, one a part of another.
ADDED = [("<ent>", False), ("[ENT]", False), ("covid-19", True), ("covid", True), ("Éa", True),
         ("中h", True), ("ing", True), ("=\u0338", False), ("the", False)]  # fmt: skip
MOST_PRINTED = 20  # strings that differ


def alphabets() -> list[list[str]]:
    """Characters that make normal forms hard, and ordinary ones."""
    every = [chr(code) for code in range(0x110000)]
    marks = [char for char in every if unicodedata.combining(char)]
    decomposed = [
        char
        for char in every
        if unicodedata.decomposition(char) and "<" not in unicodedata.decomposition(char)
    ]
    return [
        marks,
        [mark for mark in marks if unicodedata.category(mark) != "Mn"],
        decomposed,
        [part for char in decomposed for part in unicodedata.normalize("NFD", char)],
        [chr(code) for code in (*range(0x1100, 0x1200), *range(0xAC00, 0xAD00))],
        list("<>=,.-' \u200b\u00ad\t\n\x00\x0b\u3000\u2028!aAeéÉσΣςKİıßſ"),
        [
            *("[MASK]", "[SEP]", "[CLS]", "[UNK]", "[PAD]", "[", "]", "MASK", "[MA\u200bSK]"),
            *("[MAS\u212a]", "[mask]", " ", "the ", "ing", "##", "un", "\u200b", "中"),
        ],
        every[32:127],
        every[:0x3000],
        every,
    ]


def added_parts() -> list[str]:
    """Added pieces as they may stand in text: in other cases, in parts, with marks between."""
    found = [variant for piece, _ in ADDED for variant in (piece, piece.upper(), piece.lower())]
    found += [
        "<en",
        "t>",
        "covid-",
        "-19",
        "E\u0301a",
        "e\u0301A",
        "cov\u200bid",
        "中 h",
        "[EN\u200bT]",
    ]
    return [*found, " ", "a", "-", "\u0301", "x"]


def strings(pools: list[list[str]], seed: int) -> Iterator[str]:
    """The BATCH strings of a seed."""
    random_ = random.Random(seed)
    for _ in range(BATCH):
        chosen = random_.sample(pools, random_.randint(1, 4))
        kind = random_.random()
        length = 300 if kind < 0.001 else random_.randint(1, 12)
        text = "".join(random_.choice(random_.choice(chosen)) for _ in range(length))
        if kind > 0.999:
            at = random_.randint(0, length)
            run = random_.choice(random_.choice(chosen)) * random_.choice((100, 3000, 20000))
            text = text[:at] + run + text[at:]
        yield text


class Comparison:
    """Both tokenizers of one vocabulary."""

    def __init__(self, vocab: str, lowercase: bool, accents: bool, plain: bool) -> None:
        from transformers import BertTokenizer, logging

        from mvbert.text.tokenizer import WordPieceTokenizer
        from mvbert.text.vocab import Vocab

        logging.set_verbosity_error()  # about overflowing tokens, a line a pair
        strip = lowercase and not accents
        self.ours = WordPieceTokenizer(Vocab.load(vocab, lowercase, strip))
        self.slow = BertTokenizer(vocab, do_lower_case=lowercase, strip_accents=strip)
        self.plain = plain
        self.pools = alphabets()

    def differences(self, seed: int) -> tuple[list[str], int]:
        """What differs among the strings of a seed, in words; how many were left out."""
        texts = list(strings(self.pools, seed))
        slow = self.slow
        expected = [
            slow.build_inputs_with_special_tokens(slow.convert_tokens_to_ids(slow.tokenize(text)))
            for text in texts
        ]
        found = []
        batch = self.ours.encode_batch(texts, threads=1)
        for i, (text, ids) in enumerate(zip(texts, expected, strict=True)):
            if batch[i].tolist() != ids:
                found.append(f"ids in a batch: {text!a}")
            if i % 8 == 0 and self.ours.encode(text) != ids:
                found.append(f"ids: {text!a}")
            if i % 8 == 1 and self.ours.offsets(text)[0].tolist() != ids[1:-1]:
                found.append(f"ids with offsets: {text!a}")
            if i % 40 == 2:
                found += self._pair(text, texts[i - 1], 3 + seed % 20)
            if self.plain and i % 8 == 3:
                found += self._definition(text)
        return found, 0

    def _pair(self, text: str, pair: str, max_length: int) -> list[str]:
        options = {"max_length": max_length, "truncation": True, "padding": "max_length"}
        expected = self.slow([text], [pair], verbose=False, **options)
        got = self.ours.encode_batch([text], [pair], **options)
        same = all(getattr(got, name).tolist() == value for name, value in expected.items())
        return [] if same else [f"pair: {text!a}, {pair!a}, max_length {max_length}"]

    def _definition(self, text: str) -> list[str]:
        from mvbert.text.wordpiece import basic_split, wordpiece

        vocab = self.ours.vocab
        if "[" in text:
            return []  # special pieces are not special there
        words = basic_split(text, vocab.lowercase, vocab.strip_accents)
        ids = [vocab.ids[piece] for word in words for piece in wordpiece(word, vocab.ids)]
        if ids == self.ours.encode(text, add_special_tokens=False):
            return []
        return [f"plain definition: {text!a}"]


class AddedComparison:
    """Our tokenizer and the fast one, each with and without ADDED."""

    def __init__(self, vocab: str, lowercase: bool, accents: bool, plain: bool) -> None:
        from transformers import AddedToken, BertTokenizerFast

        from mvbert.text.tokenizer import WordPieceTokenizer
        from mvbert.text.vocab import AddedPiece, Vocab

        strip = lowercase and not accents
        base = Vocab.load(vocab, lowercase, strip)
        new = [piece for piece, _ in ADDED if piece not in base.ids]
        added = tuple(AddedPiece(piece, normalized, False) for piece, normalized in ADDED)
        whole = Vocab((*base.pieces, *new), lowercase, strip, added, base.size)
        self.ours = [WordPieceTokenizer(base), WordPieceTokenizer(whole)]
        self.fast = [
            BertTokenizerFast(vocab, do_lower_case=lowercase, strip_accents=strip) for _ in range(2)
        ]
        self.fast[1].add_tokens([AddedToken(p, normalized=normalized) for p, normalized in ADDED])
        self.pools = [added_parts() for _ in range(5)] + alphabets()

    def differences(self, seed: int) -> tuple[list[str], int]:
        """What differs among the strings of a seed, in words; how many were left out."""
        # (The fast tokenizer takes no lone surrogates.)
        texts = [re.sub("[\ud800-\udfff]", "", text) for text in strings(self.pools, seed)]
        letters = sorted(set().union(*texts))
        probes = [probe for letter in letters for probe in (letter, f"a{letter}a")]
        other = {
            letters[i // 2]
            for i, (a, b) in enumerate(zip(*self._both(0, probes), strict=True))
            if a != b
        }
        plain, whole = (zip(*self._both(side, texts), strict=True) for side in (0, 1))
        found, left_out = [], 0
        for text, (a, b), (ids, expected) in zip(texts, plain, whole, strict=True):
            if a != b or not other.isdisjoint(text) or self._found_when_cleaned(text):
                left_out += 1
            elif ids != expected:
                found.append(f"ids in a batch: {text!a}")
            elif self.ours[1].offsets(text)[0].tolist() != expected[1:-1]:
                found.append(f"ids with offsets: {text!a}")
        return found, left_out

    def _found_when_cleaned(self, text: str) -> bool:
        """Whether cleaning makes a piece of cased text, which is found as by the slow tokenizer."""
        if self.ours[0].vocab.lowercase:
            return False
        kept = "".join(c for c in text if unicodedata.category(c)[0] != "C")
        cleaned = unicodedata.normalize("NFC", kept)
        pieces = [*SPECIAL_PIECES, *(piece for piece, normalized in ADDED if not normalized)]
        return any(cleaned.count(piece) != text.count(piece) for piece in pieces)

    def _both(self, side: int, texts: list[str]) -> tuple[list[list[int]], list[list[int]]]:
        ours = self.ours[side].encode_batch(texts, threads=1)
        return [row.tolist() for row in ours], self.fast[side](texts)["input_ids"]


_comparison: Comparison | AddedComparison


def _start(added: bool, *arguments) -> None:
    global _comparison
    _comparison = (AddedComparison if added else Comparison)(*arguments)


def _compare(seed: int) -> tuple[list[str], int]:
    return _comparison.differences(seed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocab", required=True)
    parser.add_argument("--cased", action="store_true")
    parser.add_argument("--keep-accents", action="store_true", help="under lower case")
    parser.add_argument("--added", action="store_true", help="with added pieces, as the fast one")
    parser.add_argument("--plain", action="store_true", help="also the plain definition (slow)")
    parser.add_argument("--count", type=int, default=100_000, help=f"rounded up to {BATCH}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    if unicodedata.unidata_version != "14.0.0":
        sys.exit(f"needs Unicode 14.0.0 (Python 3.11), found {unicodedata.unidata_version}")
    batches = -(-options.count // BATCH)
    seeds = [options.seed << 32 | i for i in range(batches)]
    from mvbert.files import data_path

    vocab = str(data_path(options.vocab))
    arguments = (options.added, vocab, not options.cased, options.keep_accents, options.plain)
    begin = shown = time.monotonic()
    compared = differences = left_out = 0
    with multiprocessing.get_context("spawn").Pool(options.processes, _start, arguments) as pool:
        for found, skipped in pool.imap(_compare, seeds):
            compared += BATCH - skipped
            left_out += skipped
            for what in found[: max(MOST_PRINTED - differences, 0)]:
                print(f"differs: {what}", flush=True)
            differences += len(found)
            if time.monotonic() - shown > 60:
                shown = time.monotonic()
                rate = compared / (shown - begin)
                print(f"{compared} strings, {differences} differences, {rate:.0f}/s", flush=True)
    skipped = f" ({left_out} left out)" if options.added else ""
    print(
        f"{compared} strings{skipped}, {differences} differences, seed {options.seed}, "
        f"{options.vocab}"
    )
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
