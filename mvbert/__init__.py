"""mvbert: extremely small BERT models from mixed-vocabulary training.

The public names are loaded when first used, so that a part works where the others cannot: the
tokenizer without torch, the kernels without a compiler.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# An editable install finds the package by a link (setup.py). Modules are found behind it, so that
# tracebacks, debuggers and coverage name the files of the clone.
__path__ = [os.path.realpath(folder) for folder in __path__]

if TYPE_CHECKING:
    from mvbert.drop_in import fuse, unfuse
    from mvbert.errors import InputError
    from mvbert.text.batches import Rows
    from mvbert.text.collator import MaskingCollator
    from mvbert.text.corpus import Corpus
    from mvbert.text.tokenizer import MixedTokenizer, WordPieceTokenizer
    from mvbert.text.vocab import Vocab

_HOMES = {
    "Corpus": "text.corpus",
    "InputError": "errors",
    "MaskingCollator": "text.collator",
    "MixedTokenizer": "text.tokenizer",
    "Rows": "text.batches",
    "Vocab": "text.vocab",
    "WordPieceTokenizer": "text.tokenizer",
    "fuse": "drop_in",
    "unfuse": "drop_in",
}

__all__ = [
    "Corpus",
    "InputError",
    "MaskingCollator",
    "MixedTokenizer",
    "Rows",
    "Vocab",
    "WordPieceTokenizer",
    "fuse",
    "unfuse",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mvbert' has no attribute {name!r}")
    return getattr(import_module(f"mvbert.{_HOMES[name]}"), name)
