"""Pretraining by transformers' Trainer: text to ids, masked batches, training; the whole loop.

docs/examples has the same script twice: `transformers` with its tokenizer and collator, `mvbert`
with ours and a fused model, which is two imports and one call. Both read the same texts, cut to 128
pieces, and train a BERT of 6 x 256 with a vocabulary of 30,522, 32 rows a step, on the same cores.
On a CPU in float32, the Trainer's default, and with bf16=True.

The gate: both have the same ids, and losses that begin near ln 30,522 and fall.
"""

import importlib.util
import math
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import harness
from bench_corpus import teacher_vocab
from bench_tokenizer import words

SHAPE = {
    "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4,
    "intermediate_size": 1024,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Steps of B texts of 100 words, each read once and cut to T pieces."""

    steps: int
    B: int
    T: int

    @property
    def label(self) -> str:
        return f"6x256, {self.steps} steps of {self.B} x {self.T}"


def cases(device: str, quick: bool) -> list[Case]:
    return [Case(4 if quick else 16, 32, 128)]


def inputs(case: Case, device: str, copy: int) -> list[str]:
    texts = case.steps * case.B
    first = copy * texts * 100 % max(1, len(words()) - texts * 100)
    return [" ".join(words()[first + 100 * i : first + 100 * (i + 1)]) for i in range(texts)]


@cache
def rows(texts: tuple[str, ...], T: int) -> list[list[int]]:
    from mvbert import WordPieceTokenizer

    tokenizer = WordPieceTokenizer.from_pretrained(teacher_vocab())
    return tokenizer(list(texts), truncation=True, max_length=T)["input_ids"]


def work(case: Case, device: str) -> harness.Work:
    pieces = sum(map(len, rows(tuple(inputs(case, device, 0)), case.T)))
    return harness.Work(items=pieces, unit="pieces")


def check(case: Case, texts: list[str], out: dict[str, Any]) -> dict:
    if out["rows"] != rows(tuple(texts), case.T):
        raise harness.Wrong("other ids")
    first, last = out["losses"][0], out["losses"][-1]
    if not abs(first - math.log(30522)) < 0.5 or last > first + 0.1:
        raise harness.Wrong(f"losses from {first} to {last}, expected less and less than ln 30,522")
    return {"loss": last}


BENCH = harness.Bench(
    "trainer", cases=cases, inputs=inputs, work=work, check=check, memory=False, seconds=0.5
)


def pretrain(case: Case, device: str, script: str, bf16: bool):
    import accelerate  # noqa: F401 (Trainer needs it, and says so in a long message)

    path = harness.ROOT / "docs" / "examples" / f"pretrain_{script}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = harness.folder("trainer")
    (folder / "vocab.txt").write_bytes(teacher_vocab().read_bytes())
    return lambda texts: module.pretrain(folder, texts, case.steps, case.B, case.T, bf16, **SHAPE)


for bf16 in (False, True):
    for script in ("mvbert", "transformers"):
        BENCH.add(
            f"{script} {'bfloat16' if bf16 else 'float32'}",
            partial(pretrain, script=script, bf16=bf16),
            needs=["transformers", "accelerate"],
        )
