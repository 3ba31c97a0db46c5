# ruff: noqa: I001 (the imports that differ between the two scripts stand apart)
"""Pretrains a small BERT on the lines of a text file: pieces a second, losses.

    python pretrain_transformers.py MODEL TEXT [STEPS]

MODEL is a folder with a tokenizer. pretrain_mvbert.py is this script with two other imports and a
`fuse`; tests/test_drop_in.py compares and runs both.
"""

import json
import sys
import tempfile
import time

import torch
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments, set_seed
from mvbert import fuse, WordPieceTokenizer as BertTokenizerFast
from mvbert import MaskingCollator as DataCollatorForLanguageModeling


def pretrain(folder, texts, steps=100, batch=32, length=128, bf16=False, **shape):
    """Trains on `texts`; returns their rows, the loss of every step and pieces a second."""
    set_seed(0)
    start = time.perf_counter()
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    encoded = tokenizer(texts, truncation=True, max_length=length, return_special_tokens_mask=True)
    rows = [{name: encoded[name][i] for name in encoded} for i in range(len(texts))]
    collator = DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm_probability=0.15)
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **shape))
    fuse(model)
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out, max_steps=steps, per_device_train_batch_size=batch, bf16=bf16, logging_steps=1,
            use_cpu=not torch.cuda.is_available(),  # else bf16 asks for a GPU
            remove_unused_columns=False, save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, data_collator=collator, train_dataset=rows, processing_class=tokenizer
        )
        trainer.train()
    seconds = time.perf_counter() - start
    pieces = sum(len(row["input_ids"]) for row in rows) / len(rows) * batch * steps
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"rows": encoded["input_ids"], "losses": losses, "pieces_s": pieces / seconds}


if __name__ == "__main__":
    with open(sys.argv[2], encoding="utf-8") as file:
        lines = [line for line in file.read().split("\n") if line]
    small = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
    report = pretrain(sys.argv[1], lines, *map(int, sys.argv[3:]), intermediate_size=1024, **small)
    print(json.dumps({"loss": report["losses"][-1], "pieces_s": round(report["pieces_s"])}))
