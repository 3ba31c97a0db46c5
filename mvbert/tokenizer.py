"""Tokenizers over the C++ core, and the files that Hugging Face's tokenizers open."""

import json
from pathlib import Path

from mvbert.files import Json, atomic_write, write_error, write_json
from mvbert.vocab import SPECIAL_PIECES, Vocab


def save_tokenizer_files(
    vocab: Vocab, folder: str | Path, model_max_length: int = 512
) -> tuple[Path, ...]:
    """Writes vocab.txt, tokenizer.json and tokenizer_config.json, each atomically.

    `AutoTokenizer.from_pretrained(folder)` of transformers 4 and 5 opens them; the folder needs a
    config.json with `"model_type": "bert"` only where transformers asks for one.

    Args:
        vocab: the vocabulary; `vocab.lowercase` decides lower-casing and accent stripping.
        folder: made if it is not there.
        model_max_length: the longest row the model takes, in pieces.

    Returns:
        The three paths.

    Raises:
        InputError: a file cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    paths = tuple(
        folder / name for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json")
    )
    vocab.save(paths[0])
    # One line: the vocabulary would otherwise be 30,000 lines of indentation.
    atomic_write(paths[1], json.dumps(_tokenizer_json(vocab), ensure_ascii=False) + "\n")
    write_json(
        paths[2],
        {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": vocab.lowercase,
            "strip_accents": None,
            "tokenize_chinese_chars": True,
            "model_max_length": model_max_length,
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
        },
    )
    return paths


def _tokenizer_json(vocab: Vocab) -> dict[str, Json]:
    def special(piece: str) -> dict[str, Json]:
        return {"id": piece, "ids": [vocab.ids[piece]], "tokens": [piece]}

    def sequence(name: str, type_id: int) -> dict[str, Json]:
        return {"Sequence": {"id": name, "type_id": type_id}}

    def token(piece: str, type_id: int) -> dict[str, Json]:
        return {"SpecialToken": {"id": piece, "type_id": type_id}}

    single = [token("[CLS]", 0), sequence("A", 0), token("[SEP]", 0)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": vocab.ids[piece],
                "content": piece,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for piece in sorted(SPECIAL_PIECES, key=vocab.ids.__getitem__)
        ],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": vocab.lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, sequence("B", 1), token("[SEP]", 1)],
            "special_tokens": {piece: special(piece) for piece in ("[CLS]", "[SEP]")},
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocab.ids,
        },
    }
