"""One tokenizer in a separate process, for bench_tokenizer.py: commands in, JSON lines out.

    python bench/tokenizer_worker.py PEER VOCAB TEXTS.json

Needs neither torch nor (but for ours) mvbert, so that a peer with conflicting requirements can run
in another environment. The number of threads is set by the parent, before anything is
imported: variables of thread pools, and the processors this process may use.
"""

import hashlib
import itertools
import json
import os
import random
import sys
import time
from pathlib import Path

PEERS = {}


class Tokenizer:
    """A peer.

    `encode` takes a list of str and is what is timed; `ids` makes lists of its result, without
    [CLS] and [SEP]; `forget` empties what the tokenizer remembers of earlier texts, if it does.
    """

    def __init__(self, encode, ids=list, forget=None):
        self.encode, self.ids, self.forget = encode, ids, forget


def peer(name):
    """Registers a function (vocab file, threads) -> Tokenizer."""

    def register(function):
        PEERS[name] = function
        return function

    return register


def flat_lists(ids, offsets):
    return [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]


def student_of(vocab):
    """The student's vocabulary lies beside the teacher's."""
    return str(Path(vocab).with_name("student.txt"))


# ---- ours ----------------------------------------------------------------------------------------


def ours(make, **options):
    """A tokenizer of ours; making it again clears its cache."""
    tokenizer = make()

    def encode(texts):
        return tokenizer.encode_batch(texts, **options)

    def forget():
        nonlocal tokenizer
        tokenizer = make()

    return Tokenizer(encode, lambda batch: flat_lists(batch.ids, batch.offsets), forget)


@peer("mvbert")
def _(vocab, threads):
    from mvbert.text.tokenizer import WordPieceTokenizer
    from mvbert.text.vocab import Vocab

    pieces = Vocab.load(vocab, lowercase=True)
    return ours(lambda: WordPieceTokenizer(pieces), add_special_tokens=False, threads=threads)


def ours_called(vocab, threads, read, **options):
    """Our tokenizer called as transformers' are; `read` is what is asked of the batch."""
    from mvbert.text.tokenizer import WordPieceTokenizer
    from mvbert.text.vocab import Vocab

    pieces = Vocab.load(vocab, lowercase=True)
    tokenizer = WordPieceTokenizer(pieces)

    def encode(texts):
        batch = tokenizer(texts, add_special_tokens=False, threads=threads, **options)
        read(batch)
        return batch

    def forget():
        nonlocal tokenizer
        tokenizer = WordPieceTokenizer(pieces)

    return Tokenizer(encode, lambda batch: batch["input_ids"], forget)


@peer("mvbert called")
def _(vocab, threads):
    return ours_called(vocab, threads, lambda batch: None)


@peer("mvbert called, offsets")
def _(vocab, threads):
    return ours_called(vocab, threads, lambda batch: None, return_offsets_mapping=True)


@peer("mvbert called, words")
def _(vocab, threads):
    return ours_called(vocab, threads, lambda batch: batch.rows.words)


@peer("mvbert mixed")
def _(vocab, threads):
    from mvbert.text.tokenizer import MixedTokenizer
    from mvbert.text.vocab import Vocab

    both = [Vocab.load(path, lowercase=True) for path in (vocab, student_of(vocab))]
    return ours(lambda: MixedTokenizer(*both), student_prob=0.5, threads=threads)


# ---- Hugging Face --------------------------------------------------------------------------------


def hugging_face(vocab):
    """The library tokenizers alone: transformers takes few of its versions."""
    from tokenizers import BertWordPieceTokenizer

    return BertWordPieceTokenizer(vocab, lowercase=True)._tokenizer


@peer("HF encode_batch_fast")
def _(vocab, threads):
    tokenizer = hugging_face(vocab)
    return Tokenizer(
        lambda texts: [
            row.ids for row in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]
    )


@peer("transformers fast")
def _(vocab, threads):
    import transformers

    tokenizer = transformers.BertTokenizerFast(vocab, do_lower_case=True)
    tokenizer.model_max_length = 10**9
    options = dict.fromkeys(
        ("add_special_tokens", "return_attention_mask", "return_token_type_ids"), False
    )
    return Tokenizer(lambda texts: tokenizer(texts, **options)["input_ids"])


def one_by_one(tokenizer, ids=list):
    """A tokenizer with the interface of BERT's first one."""
    return Tokenizer(
        lambda texts: [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) for text in texts],
        ids,
    )


@peer("transformers slow")
def _(vocab, threads):
    import transformers

    tokenizer = transformers.BertTokenizer(vocab, do_lower_case=True)
    tokenizer.model_max_length = 10**9
    return one_by_one(tokenizer)


@peer("HF twice, spliced")
def _(vocab, threads):
    """Mixed tokenization with Hugging Face alone: ids by both vocabularies, chosen word by word."""
    teacher, student = hugging_face(vocab), hugging_face(student_of(vocab))
    size = teacher.get_vocab_size()
    coin = random.Random(0)

    def encode(texts):
        rows = []
        pairs = (
            tokenizer.encode_batch(texts, add_special_tokens=False)
            for tokenizer in (teacher, student)
        )
        for teacher_row, student_row in zip(*pairs, strict=True):
            words = {}
            for word, id in zip(student_row.word_ids, student_row.ids, strict=True):
                words.setdefault(word, []).append(id + size)
            row, last, keep = [], None, True
            for word, id in zip(teacher_row.word_ids, teacher_row.ids, strict=True):
                if word != last:
                    last, keep = word, coin.random() < 0.5
                    if not keep:
                        row += words[word]
                if keep:
                    row.append(id)
            rows.append(row)
        return rows

    return Tokenizer(encode)


@peer("HF words + dict")
def _(vocab, threads):
    """Hugging Face's normaliser and word splitter, then a Python dict of both cuts of each word."""
    teacher, student = hugging_face(vocab), hugging_face(student_of(vocab))
    normalize, split = teacher.normalizer.normalize_str, teacher.pre_tokenizer.pre_tokenize_str
    size = teacher.get_vocab_size()
    draw = random.Random(0).random
    known = [{}, {}]

    def cut(word, side):
        tokenizer = (teacher, student)[side]
        ids = [id + side * size for id in tokenizer.encode(word, add_special_tokens=False).ids]
        known[side][word] = ids
        return ids

    def encode(texts):
        rows = []
        for text in texts:
            row = []
            for word, _ in split(normalize(text)):
                side = draw() < 0.5
                row += known[side].get(word) or cut(word, side)
            rows.append(row)
        return rows

    def forget():
        known[:] = {}, {}

    return Tokenizer(encode, forget=forget)


# ---- others --------------------------------------------------------------------------------------


@peer("google-research/bert")
def _(vocab, threads):
    """Its tokenization.py, as flash-tokenizer ships it."""
    from flash_tokenizer.bert_tokenizer_original import OriginalBertTokenizer

    tokenizer = OriginalBertTokenizer(vocab, True, 10**9)
    return one_by_one(
        tokenizer, lambda rows: [[id for id in row if id not in (101, 102)] for row in rows]
    )


@peer("nanotoken")
def _(vocab, threads):
    import nanotoken

    tokenizer = nanotoken.Tokenizer.from_vocab(vocab)
    return Tokenizer(
        lambda texts: tokenizer.encode_batch(texts, add_special_tokens=False, parallel=threads > 1),
        lambda batch: flat_lists(batch.ids, batch.offsets),
        tokenizer.clear_cache,
    )


@peer("tokie")
def _(vocab, threads):
    import tempfile

    import numpy as np
    import tokie

    with tempfile.TemporaryDirectory() as folder:
        hugging_face(vocab).save(f"{folder}/tokenizer.json")
        tokenizer = tokie.Tokenizer.from_json(f"{folder}/tokenizer.json")

    def ids(result):
        flat, lengths = result
        return flat_lists(flat, np.concatenate(([0], np.cumsum(lengths.astype(np.int64)))))

    return Tokenizer(
        lambda texts: tokenizer.encode_batch_flat(texts, add_special_tokens=False), ids
    )


@peer("BlingFire")
def _(vocab, threads):
    """With the model it ships for BERT's uncased vocabulary: the ids are those of its vocab.txt."""
    from concurrent.futures import ThreadPoolExecutor

    import blingfire

    model = blingfire.load_model(str(Path(blingfire.__file__).with_name("bert_base_tok.bin")))
    pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def one(text):
        return blingfire.text_to_ids(model, text, len(text) + 2, 100, True)

    def encode(texts):
        return list(pool.map(one, texts, chunksize=64)) if pool else [one(text) for text in texts]

    return Tokenizer(encode, lambda rows: [row.tolist() for row in rows])


@peer("flash-tokenizer")
def _(vocab, threads):
    import flash_tokenizer

    tokenizer = flash_tokenizer.BertTokenizerFlash(vocab, model_max_length=10**7).tokenizer
    return Tokenizer(
        lambda texts: tokenizer.batch_encode(texts, "do_not_pad", -1, threads > 1),
        lambda rows: [row[1:-1] for row in rows],
    )


@peer("TF Text FastBertTokenizer")
def _(vocab, threads):
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf
    import tensorflow_text

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    pieces = Path(vocab).read_text(encoding="utf-8").splitlines()
    tokenizer = tensorflow_text.FastBertTokenizer(
        pieces, token_out_type=tf.int32, lower_case_nfd_strip_accents=True
    )

    def encode(texts):
        return [
            tokenizer.tokenize(tf.constant(texts[a : a + 1024])).merge_dims(1, -1)
            for a in range(0, len(texts), 1024)
        ]

    return Tokenizer(encode, lambda parts: [row for part in parts for row in part.to_list()])


# ---- commands ------------------------------------------------------------------------------------


def digest(ids):
    return hashlib.sha1(json.dumps([int(id) for id in ids]).encode()).hexdigest()[:12]


def main():
    name, vocab, texts_file = sys.argv[1:]
    threads = int(os.environ["MVBERT_BENCH_THREADS"])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps what a library prints out of the answers
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])

    def answer(**facts):
        print(json.dumps(facts), file=out, flush=True)

    try:
        tokenizer = PEERS[name](vocab, threads)
        answer(remembers=tokenizer.forget is not None)
        texts = json.loads(Path(texts_file).read_text(encoding="utf-8"))
        for line in sys.stdin:
            command = json.loads(line)
            some = texts[: command["texts"]] if command.get("texts") else texts
            if command["do"] == "digests":
                rows = tokenizer.ids(tokenizer.encode(some))
                answer(digests=[digest(row) for row in rows])
                continue
            wall = own = 0.0
            for _ in range(command["calls"]):
                if command["cold"]:
                    tokenizer.forget()
                begin, begin_own = time.perf_counter(), time.process_time()
                tokenizer.encode(some)
                own += time.process_time() - begin_own
                wall += time.perf_counter() - begin
            answer(wall=wall / command["calls"], own=own / command["calls"])
    except Exception as error:  # a peer may fail in any way: tell the parent
        answer(failed=f"{type(error).__name__}: {error}"[:300])


if __name__ == "__main__":
    main()
