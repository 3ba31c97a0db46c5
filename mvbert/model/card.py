"""The model card that stands beside every model as README.md."""

from __future__ import annotations

from mvbert import __version__
from mvbert.config import ModelConfig, Stage2Config

PAPER = (
    "Sanqiang Zhao, Raghav Gupta, Yang Song, Denny Zhou: *Extremely Small BERT Models from "
    "Mixed-Vocabulary Training*, EACL 2021, [arXiv 1909.11687](https://arxiv.org/abs/1909.11687)"
)

_FRONT = """\
---
library_name: transformers
pipeline_tag: fill-mask
tags:
- bert
- masked-language-modeling
- mixed-vocabulary-training
---
"""


def model_card(
    stage: str, shape: ModelConfig, stage2: Stage2Config | None = None, length: int = 0
) -> str:
    """Markdown with front matter: what the model is and how it was made, on rows of `length`."""
    what = (
        f"{shape.num_hidden_layers} layers, hidden size {shape.hidden_size}, "
        f"{shape.num_attention_heads} heads, feed-forward {shape.intermediate_size}, "
        f"{shape.vocab_size} word pieces: {shape.encoder_parameters / 1e6:.2f} M parameters "
        "(encoder and pooler)"
    )
    if stage == "stage1":
        body = f"""\
# A BERT that reads two vocabularies

{what}.

A teacher after Stage I of mixed-vocabulary training: it went on training with masked language
modelling on text whose words were cut at random with its own vocabulary or with a student's. As a
Hugging Face model it is an ordinary BERT with its own vocabulary. Beside it, `student.safetensors`
holds the student's table, the affine map into this model's width and the bias of the student's
softmax; `student_vocab.txt` the student's pieces.
"""
    else:
        assert stage2 is not None
        start = {
            "stage1": "Its embeddings started from the table that Stage I made.",
            "random": "Its embeddings started at random.",
        }[stage2.start]
        positions = "sine waves" if stage2.positions == "sinusoidal" else "random"
        began = f"Its positions\nstarted at {positions}, the encoder at random."
        losses = "masked language modelling"
        if stage2.distill:
            losses += f" and distillation ({' + '.join(stage2.distill)}) from the Stage I teacher"
        body = f"""\
# A small BERT from mixed-vocabulary training

{what}.

{start} {began} It was trained with {losses}
for {stage2.steps} steps of {stage2.rows} rows of {length} pieces.
"""
    return f"""{_FRONT}
{body}
Made with mvbert {__version__}. The method: {PAPER}.

## Use

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
model = AutoModelForMaskedLM.from_pretrained("THIS_FOLDER")
```

The pooler was not trained; fine-tuning trains it.
"""
