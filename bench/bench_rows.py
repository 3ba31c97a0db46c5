"""Finished training rows (pieces, whole-word masks, labels) a second, against Hugging Face's way.

    python bench/bench_rows.py                              # text and vocabulary of ../shared/data
    python bench/bench_rows.py --text my.txt --teacher my/vocab.txt --seconds 2

Nothing is timed before it is right: rows must equal the plain definition (`mvbert.mixing`), and
unmasked teacher rows must hold the pieces that transformers' tokenizer gives for the same words.
Providers take turns, so that a busy machine is busy for all of them; the best and the middle of the
rounds are reported. The unit is pieces of finished rows, in millions a second of processor time
(what one core does, whatever else runs) and of wall clock.

Peers: "hf text" tokenizes text with the fast tokenizer, cuts rows of T and masks them with
DataCollatorForLanguageModeling; "hf pieces" and "hf words" start from rows that are cut already
(what a pre-tokenized data set holds, with special token mask and offsets, which spares the collator
work) and only collate, piece by piece or by whole words (then always [MASK]: it knows no 80/10/10
there). They use numpy tensors and one thread. "numpy" is the least that masking rows piece by piece
in numpy can be. Stdout: a table, and one JSON object as the last line.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mvbert import mixing
from mvbert.batches import Batch, Rows
from mvbert.corpus import Corpus, build_corpus
from mvbert.learner import learn_vocab
from mvbert.vocab import Vocab

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=DATA / "openstax.txt.xz")
    parser.add_argument("--teacher", type=Path, default=DATA / "vocab.txt")
    parser.add_argument("--size", type=int, default=4928, help="of the student vocabulary")
    parser.add_argument("--corpus", type=Path, help="an existing corpus folder instead of --text")
    parser.add_argument("--rows", type=int, default=1024, help="rows a call")
    parser.add_argument("--length", type=int, default=128, help="T, pieces a row")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.1, help="a provider and round, at least")
    return parser.parse_args()


# ---- correctness gate ------------------------------------------------------------------------


def check_definition(rows: Rows, stream, teacher, student, T: int) -> None:
    """Stops unless some rows equal the plain definition."""
    for number in (0, 1, rows.count - 1, rows.count, 10**12):
        batch = rows.read(number, 1)
        expected = mixing.row_reference(
            stream,
            number,
            teacher=teacher,
            student=student,
            stride=rows.stride,
            T=T,
            mask_prob=0.15,
            pair_prob=0.5,
            student_prob=0.5,
            seed=0,
        )
        for got, wanted in zip(vars(batch).values(), expected, strict=True):
            if got[0].tolist() != wanted:
                sys.exit(f"row {number} is not what mvbert.mixing says")


def check_tokenizer(corpus: Corpus, teacher, tokenizer, T: int) -> None:
    """Stops unless unmasked teacher rows are transformers' pieces of the same words."""
    rows = Rows(corpus.train, teacher=teacher, T=T, mask_prob=0.0, pair_prob=0.0)
    first = [mixing.row_start(n, rows.count, rows.stride, 0) for n in range(50)]
    for row, start in zip(rows.read(0, 50).input_ids, first, strict=True):
        words = corpus.train[start : start + T].tolist()
        text = " ".join(corpus.words[word].decode() for word in words if word)
        pieces = tokenizer(text, add_special_tokens=False)["input_ids"]
        ours = [int(i) for i in row[1:-1] if i != tokenizer.sep_token_id]
        if start + T <= len(corpus.train) and ours != pieces[: len(ours)]:
            sys.exit(f"the row that starts at word {start} is not what transformers makes of it")


# ---- providers -------------------------------------------------------------------------------


def ours(rows: Rows, count: int, student_prob: float, threads: int) -> Callable[[], int]:
    out = Batch.empty(count, rows.T, rows.capacity)
    start = 0

    def call() -> int:
        nonlocal start
        rows.read(start, count, student_prob=student_prob, threads=threads, out=out)
        start += count
        return count * rows.T

    return call


def numpy_mask(ids: np.ndarray, vocab: Vocab) -> Callable[[], int]:
    """80/10/10 piece by piece over rows that are cut already."""
    rng = np.random.default_rng(0)

    def call() -> int:
        draw = rng.random(ids.shape, dtype=np.float32)
        random = rng.integers(0, vocab.size, ids.shape, dtype=np.int32)
        np.where(draw < 0.15, ids, -100)
        out = np.where(draw < 0.12, np.int32(vocab.mask), ids)
        np.where((draw >= 0.12) & (draw < 0.135), random, out)
        return ids.size

    return call


def hf_text(texts: list[str], tokenizer, collator, T: int) -> Callable[[], int]:
    def call() -> int:
        pieces = tokenizer(texts, add_special_tokens=False)["input_ids"]
        flat = [piece for line in pieces for piece in line]
        cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        features = [
            {"input_ids": [cls, *flat[i : i + T - 2], sep]}
            for i in range(0, len(flat) - T + 3, T - 2)
        ]
        return collator(features)["input_ids"].size

    return call


def hf_collate(ids: np.ndarray, tokenizer, collator, offsets: bool) -> Callable[[], int]:
    continues = np.array(
        [t.startswith("##") for t in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    )
    features = []
    for row in ids:
        feature = {
            "input_ids": row.tolist(),
            "special_tokens_mask": np.isin(row, tokenizer.all_special_ids).astype(int).tolist(),
        }
        if offsets:  # what joins pieces to words is that one begins where the other ends
            begin = 2 * np.arange(len(row))
            feature["offset_mapping"] = np.stack([begin - continues[row], begin + 1], 1).tolist()
        features.append(feature)
    return lambda: collator(features)["input_ids"].size


def add_hugging_face(providers: dict, corpus: Corpus, teacher, vocab_file: Path, ids, T: int):
    """Adds the peers, after the gate; says why where there are none."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        import transformers
    except ImportError:
        return {"skipped": "transformers is not installed"}
    fast = transformers.BertTokenizerFast(str(vocab_file), do_lower_case=corpus.lowercase)
    fast.model_max_length = 10**9
    check_tokenizer(corpus, teacher, fast, T)
    words = corpus.train[:40_000].tolist()
    text = " ".join(corpus.words[word].decode() if word else "\n" for word in words).split("\n")
    by_piece = transformers.DataCollatorForLanguageModeling(fast, return_tensors="np")
    by_word = transformers.DataCollatorForLanguageModeling(
        fast, whole_word_mask=True, mask_replace_prob=1, random_replace_prob=0, return_tensors="np"
    )
    providers["hf text"] = hf_text(text, fast, by_piece, T)
    providers["hf pieces"] = hf_collate(ids[:64], fast, by_piece, offsets=False)
    providers["hf words"] = hf_collate(ids[:64], fast, by_word, offsets=True)
    return {"transformers": transformers.__version__}


# ---- clock -----------------------------------------------------------------------------------


def rates(call: Callable[[], int], seconds: float) -> tuple[float, float]:
    """Million pieces a second of processor time and of wall clock, for so many seconds."""
    pieces, begin, cpu_begin = 0, time.perf_counter(), time.process_time()
    while (passed := time.perf_counter() - begin) < seconds:
        pieces += call()
    return pieces / (time.process_time() - cpu_begin) / 1e6, pieces / passed / 1e6


def machine() -> dict:
    name = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return {
        "cpu": name,
        "cores": len(os.sched_getaffinity(0)),
        "load": [round(x, 1) for x in os.getloadavg()],
    }


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        if args.corpus is None:
            args.corpus = Path(folder) / "corpus"
            build_corpus([args.text], args.corpus)
        corpus = Corpus.open(args.corpus)
        lexicon = (corpus.words.data.tobytes(), np.asarray(corpus.words.ends))
        pieces = learn_vocab(lexicon, np.asarray(corpus.counts), args.size)
        student_file = Path(folder) / "vocab.txt"
        student_file.write_text("\n".join(pieces) + "\n", encoding="utf-8")
        teacher = corpus.segment(Vocab.load(args.teacher))
        student = corpus.segment(Vocab.load(student_file))

        T = args.length
        rows = Rows(corpus.train, teacher=teacher, student=student, T=T)
        alone = Rows(corpus.train, student=student, T=T)
        check_definition(rows, corpus.train, teacher, student, T)
        unmasked = Rows(corpus.train, teacher=teacher, T=T, mask_prob=0.0).read(0, args.rows)
        providers = {
            "mixed": ours(rows, args.rows, 0.5, 1),
            "mixed, all threads": ours(rows, 16 * args.rows, 0.5, 0),
            "teacher words": ours(rows, args.rows, 0.0, 1),
            "student words": ours(rows, args.rows, 1.0, 1),
            "student alone": ours(alone, args.rows, 1.0, 1),
            "numpy": numpy_mask(unmasked.input_ids, teacher.vocab),
        }
        peers = add_hugging_face(providers, corpus, teacher, args.teacher, unmasked.input_ids, T)

        found: dict[str, list[tuple[float, float]]] = {name: [] for name in providers}
        for _ in range(args.rounds + 1):
            for name, call in providers.items():
                found[name].append(rates(call, args.seconds))
        results = {}
        heads = ("core best", "middle", "wall best", "middle")
        print(f"{'M pieces a second':>20}" + "".join(f"{head:>10}" for head in heads))
        for name, rounds in found.items():
            core, wall = zip(*rounds[1:], strict=True)  # the first round warms up
            row = {
                "core_best": max(core),
                "core_middle": statistics.median(core),
                "wall_best": max(wall),
                "wall_middle": statistics.median(wall),
            }
            results[name] = {key: float(f"{value:.3g}") for key, value in row.items()}
            print(f"{name:>20}" + "".join(f"{value:10.2f}" for value in row.values()))
        print(
            json.dumps(
                {
                    "bench": "rows",
                    "text": args.text.name if folder in str(args.corpus) else args.corpus.name,
                    "rows": rows.describe(),
                    "rows_a_call": args.rows,
                    "million_pieces_per_second": results,
                    "peers": peers,
                    **machine(),
                }
            )
        )


if __name__ == "__main__":
    main()
