"""An epoch of fine-tuning on sentences of SST-2, against transformers' Trainer.

The same BERT of 6 x 256, the same sentences, tokenized before the clock starts, 32 an update,
AdamW, clipping, a linear schedule, dropout 0.1, on the same cores. Ours is what `mvbert finetune`
does, with batches of one length (mvbert.tasks.rows). `Trainer` pads each batch of a random order to
its longest row, as its default collator does; `by length` has its group_by_length. On a CPU both
are timed in float32 and in bfloat16: which is faster depends on the processor. All run in this
process; ours makes malloc keep its memory, which the Trainer then has, too.

The gate: with a learning rate near 0 the mean loss of the epoch is that of the initial weights, but
for dropout.
"""

from dataclasses import dataclass, replace
from functools import cache, partial

import harness
import torch

from mvbert.config import FinetuneConfig, student_shape
from mvbert.model.flops import encoder_flops
from mvbert.model.huggingface import to_hugging_face
from mvbert.model.masked_lm import MaskedLM
from mvbert.progress import Progress
from mvbert.tasks.formats import Examples, find_task, read_task
from mvbert.tasks.loop import Run, Targets, Trainer, targets_of
from mvbert.tasks.model import labels_of
from mvbert.tasks.rows import make_rows
from mvbert.tasks.score import Split
from mvbert.text.vocab import Vocab
from mvbert.training.device import Device, keep_memory

LR = 1e-6
VOCAB = 4928  # a student's table; sentences are cut by BERT's vocabulary, its ids taken modulo this


@dataclass(frozen=True)
class Case:
    """N sentences, B an update."""

    N: int
    B: int

    @property
    def label(self) -> str:
        return f"SST-2: 6x256, {self.N} sentences, {self.B} an update"


def cases(device: str, quick: bool) -> list[Case]:
    return [Case(512 if quick else 2048, 32)]


@cache
def data(case: Case) -> tuple[Split, Vocab]:
    """The sentences as rows."""
    for name in ("glue-sst-2.tar.xz", "vocab.txt"):
        if not (harness.DATA / name).exists():
            raise harness.Skip(f"needs {name}; run: python docs/experiments/get_data.py sst-2")
    task = find_task("sst-2")
    examples: Examples = read_task(task, [str(harness.DATA / "glue-sst-2.tar.xz")])["train"]
    # Evenly over the file, so that lengths are those of the whole.
    numbers = [i * len(examples) // case.N for i in range(case.N)]
    examples = examples.select(numbers)
    vocab = Vocab.load(harness.DATA / "vocab.txt", lowercase=True)
    rows = make_rows(task, examples, vocab, 128)
    return Split(examples, replace(rows, ids=rows.ids % VOCAB)), vocab


def inputs(case: Case, device: str, copy: int) -> dict[str, int]:
    return {"seed": copy}


def work(case: Case, device: str) -> harness.Work:
    lengths = data(case)[0].rows.lengths
    shape = student_shape("6x256", VOCAB)
    flop = sum(3.0 * int(n) * encoder_flops(shape, int(n)) for n in lengths)
    return harness.Work(flop, items=case.N, unit="sentences")


def start(dropout: float = 0.1) -> MaskedLM:
    model = MaskedLM(student_shape("6x256", VOCAB, dropout))
    model.init_weights(0)
    return model


def check(case: Case, x: dict, loss: float) -> dict:
    """The mean loss of an epoch at a learning rate near 0: that of two classes unlearnt."""
    if not abs(loss - 0.69) < 0.1:
        raise harness.Wrong(f"mean loss {loss:.3f}, expected about ln 2")
    return {"pieces": len(data(case)[0].rows.ids), "loss": round(loss, 4)}


BENCH = harness.Bench(
    "finetune", cases=cases, inputs=inputs, work=work, check=check, memory=False, seconds=0.5,
    dtype=lambda case, device: "bfloat16",
)  # fmt: skip


def ours(case: Case, device: str, dtype: str):
    keep_memory()
    task = find_task("sst-2")
    split, vocab = data(case)
    two = split.examples.select(range(2))  # the dev set, which the Trainer has none of
    rows = make_rows(task, two, vocab, 128)
    few = Split(two, replace(rows, ids=rows.ids % VOCAB))
    config = FinetuneConfig(batch=(case.B,), lr=(LR,))
    labels = labels_of("classes", split.examples.labels, ())
    placement = Device.of(torch.device(device), dtype, "")
    trainer = Trainer(
        task, labels, split.rows, Targets(targets_of(labels, split)), few, vocab, config, placement,
        Progress("bench", quiet=True),
    )  # fmt: skip
    return lambda x: trainer.fit(start(), Run(case.B, LR, 1, x["seed"])).loss


def baseline(case: Case, device: str, dtype: str, by_length: bool = False):
    import accelerate  # noqa: F401 (Trainer needs it, and says so in a long message)
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        DataCollatorWithPadding,
        TrainingArguments,
    )
    from transformers import Trainer as HuggingFaceTrainer

    from mvbert.text.tokenizer import WordPieceTokenizer

    split, vocab = data(case)
    rows = split.rows
    number = {"negative": 0, "positive": 1}
    examples = [
        {"input_ids": rows.ids[rows.ends[i] : rows.ends[i + 1]].tolist(), "label": number[label]}
        for i, label in enumerate(split.examples.labels)
    ]
    tokenizer = WordPieceTokenizer(vocab).as_hf()
    shape = start().config
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=256, num_hidden_layers=6, num_attention_heads=4,
        intermediate_size=1024, layer_norm_eps=shape.layer_norm_eps, num_labels=2,
    )  # fmt: skip
    state = {n: p for n, p in start().named_parameters() if not n.startswith("head.")}
    folder = harness.folder("finetune")

    def run(x):
        model = BertForSequenceClassification(config)
        model.load_state_dict(to_hugging_face(state), strict=False)
        arguments = TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=case.B, learning_rate=LR,
            num_train_epochs=1, warmup_ratio=0.1, weight_decay=0.01, seed=x["seed"],
            bf16=dtype == "bfloat16", use_cpu=device == "cpu", group_by_length=by_length,
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=device == "cuda",
        )  # fmt: skip
        trainer = HuggingFaceTrainer(
            model, arguments, train_dataset=examples,
            data_collator=DataCollatorWithPadding(tokenizer),
        )  # fmt: skip
        return trainer.train().training_loss

    return run


HF = {"needs": ["transformers", "accelerate"]}
for dtype in ("float32", "bfloat16"):
    BENCH.add(f"mvbert {dtype}", partial(ours, dtype=dtype))
    BENCH.add(f"Trainer {dtype}", partial(baseline, dtype=dtype), **HF)
    BENCH.add(f"Trainer {dtype}, by length", partial(baseline, dtype=dtype, by_length=True), **HF)
