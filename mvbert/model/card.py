"""The model card, written to every model folder as README.md."""

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
    """Markdown with front matter: shape and training of the model, with rows of `length`."""
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

A teacher after Stage I of mixed-vocabulary training: masked language modelling on text whose words
were tokenized at random with its own vocabulary or with a student's. As a Hugging Face model it is
an ordinary BERT with its own vocabulary. In addition, `student.safetensors` holds the student's
embeddings, the affine map to this model's width and the bias of the student's softmax, and
`student_vocab.txt` the student's pieces.
"""
    elif stage == "reader":
        body = f"""\
# A Stage I teacher that reads the student's pieces

{what}.

A teacher after Stage I of mixed-vocabulary training, with the projected table of the student's
pieces in place of its own: an ordinary BERT with the student's vocabulary.
"""
    else:
        assert stage2 is not None
        start = {
            "stage1": "Its word embeddings were initialised from Stage I.",
            "random": "Its word embeddings were initialised randomly.",
        }.get(stage2.start, "It continues an earlier student.")
        positions = "as sinusoids" if stage2.positions == "sinusoidal" else "randomly"
        initial = f" Its position\nembeddings were initialised {positions}, the encoder randomly."
        if stage2.continues:
            initial = ""
        losses = "masked language modelling"
        if stage2.distill:
            losses += f" and distillation ({' + '.join(stage2.distill)}) from the Stage I teacher"
        body = f"""\
# A small BERT from mixed-vocabulary training

{what}.

{start}{initial} It was trained with {losses}
for {stage2.steps} steps of {stage2.rows} rows of {length} pieces.
"""
    pooler = "The pooler was not trained; fine-tuning trains it."
    if stage2 is not None and "sentence" in stage2.distill:
        pooler = "The pooler was trained, on the mean of the teacher's states."
    return f"""{_FRONT}
{body}
Made with mvbert {__version__}. The method: {PAPER}.

## Use

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
model = AutoModelForMaskedLM.from_pretrained("THIS_FOLDER")
```

{pooler}
"""
