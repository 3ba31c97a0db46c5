"""Differential fuzz: C++ against transformers' slow BertTokenizer (4.x), and the plain definition.

    python tests/fuzz_tokenizer.py --vocab vocab.txt --seconds 1800 --seed 1 [--cased] [--plain]

Needs Python 3.11, whose unicodedata is the pinned 14.0.0. Prints the strings compared and every
difference; exits with 1 if there was one.
"""

import argparse
import random
import sys
import time
import unicodedata

from transformers import BertTokenizer

from mvbert.tokenizer import WordPieceTokenizer
from mvbert.wordpiece import basic_split, wordpiece


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
        list("<>=,.-' \u200b\u00ad\t\n\x00\x0b\u3000\u2028!aAeéÉσΣς"),
        ["[MASK]", "[SEP]", "[CLS]", "[", "]", "MASK", "the ", "ing", "##", " "],
        every[32:127],
        every[:0x3000],
        every,
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocab", required=True)
    parser.add_argument("--cased", action="store_true")
    parser.add_argument("--plain", action="store_true", help="also the plain definition (slow)")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if unicodedata.unidata_version != "14.0.0":
        sys.exit(f"needs Unicode 14.0.0 (Python 3.11), found {unicodedata.unidata_version}")
    ours = WordPieceTokenizer.from_pretrained(options.vocab, lowercase=not options.cased)
    slow = BertTokenizer(options.vocab, do_lower_case=not options.cased)
    random_ = random.Random(options.seed)
    pools = alphabets()
    compared = differences = 0
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        chosen = random_.sample(pools, random_.randint(1, 4))
        length = random_.randint(1, 30)
        text = "".join(random_.choice(random_.choice(chosen)) for _ in range(length))
        compared += 1
        wrong = ours.encode(text) != slow.encode(text)
        if options.plain and not any(piece in text for piece in slow.all_special_tokens):
            pieces = [
                piece
                for word in basic_split(text, not options.cased)
                for piece in wordpiece(word, ours.vocab.ids)
            ]
            ids = [ours.vocab.ids[piece] for piece in pieces]
            wrong |= ids != ours.encode(text, add_special_tokens=False)
        if wrong:
            differences += 1
            print(f"differs: {text!a}", flush=True)
    print(f"{compared} strings, {differences} differences, seed {options.seed}")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
