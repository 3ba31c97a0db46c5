"""The model card of a fine-tuned model, written to its folder as README.md."""

from __future__ import annotations

from typing import Any

from mvbert import __version__
from mvbert.config import ModelConfig

_PIPELINE = {
    "classes": "text-classification",
    "number": "text-classification",
    "tags": "token-classification",
    "joint": "token-classification",
}
_JOINT = """
The layer that scores labels is one for all pieces: of a word's first piece the tags count, of
[CLS] the labels that begin with `intent:`.
"""


def task_card(task: str, shape: ModelConfig, kind: str, facts: dict[str, Any]) -> str:
    """Markdown with front matter: shape, scores, use."""
    scores = "\n".join(
        f"| {split} | {name} | {value:.4f} |"
        for split, metrics in facts.items()
        if isinstance(metrics, dict)
        for name, value in metrics.items()
    )
    use = f'pipeline("{_PIPELINE[kind]}", "THIS_FOLDER")'
    return f"""\
---
library_name: transformers
pipeline_tag: {_PIPELINE[kind]}
---

# A BERT fine-tuned for {task}

{shape.num_hidden_layers} layers, hidden size {shape.hidden_size}, {shape.vocab_size} word pieces:
{shape.encoder_parameters / 1e6:.2f} M parameters (encoder and pooler).
{_JOINT if kind == "joint" else ""}
| split | metric | value |
| --- | --- | --- |
{scores}

Made with mvbert {__version__}; settings and every run are in `finetune.json` and `runs.jsonl`.

```python
from transformers import pipeline

{use}
```
"""
