"""BPE and unigram vocabularies from sentencepiece, turned into WordPiece's ## form.

Both give fewer pieces per word than the top-down learner, but fewer of them are in BERT's own
vocabulary, and neither was trained for greedy matching: pieces that it never uses are replaced.
"""

import io
from collections.abc import Mapping

from mvbert.errors import InputError, require_extra
from mvbert.text.learner_reference import learnable_words, piece_uses
from mvbert.text.vocab import SPECIAL_PIECES

BOUNDARY = "\u2581"  # sentencepiece's mark at the start of a word


def learn_with_sentencepiece(
    counts: Mapping[str, int], size: int, *, model_type: str, coverage: float
) -> list[str]:
    """Learns exactly `size` pieces; arguments and result as learn_vocab's.

    Args:
        model_type: "bpe" or "unigram".
    """
    words, alphabet = learnable_words(counts, coverage)
    if not words:
        raise InputError(
            "no word is left to learn pieces from: the lexicon is empty, or coverage too low"
        )
    need = size - len(SPECIAL_PIECES) - len(alphabet)
    if need < 0:
        characters = len({piece.removeprefix("##") for piece in alphabet})
        raise InputError(
            f"size {size} is below the alphabet of {characters} characters ({len(alphabet)} "
            f"pieces: alone or first, and inside words); use at least "
            f"{len(SPECIAL_PIECES) + len(alphabet)}, or a lower coverage"
        )
    spare = need // 8 + 16  # for pieces that greedy matching never uses
    candidates = [
        piece for piece in train(words, need + spare, model_type) if piece not in alphabet
    ]
    while True:
        chosen = candidates[:need]
        if len(chosen) < need:
            raise InputError(
                f"size {size} is above the {len(chosen) + len(alphabet) + len(SPECIAL_PIECES)} "
                f"pieces that {model_type} finds in these words; use a smaller size, or more text"
            )
        uses = piece_uses(words, alphabet | set(chosen))
        unused = {piece for piece in chosen if not uses[piece]}
        if not unused:
            break
        candidates = [piece for piece in candidates if piece not in unused]
    pieces = sorted(alphabet | set(chosen), key=lambda piece: (-uses[piece], piece))
    return [*SPECIAL_PIECES, *pieces]


def train(words: Mapping[str, int], wanted: int, model_type: str) -> list[str]:
    """At least `wanted` pieces of two characters or more, best first, in ## form; fewer if
    sentencepiece finds no more."""
    with require_extra("vocab", f"the {model_type} learner"):
        import sentencepiece
    # Its own mark inside a word would read as a space.
    lines = [f"{word}\t{count}" for word, count in words.items() if BOUNDARY not in word]
    characters = {character for word in words for character in word}
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            input_format="tsv",
            model_type=model_type,
            # Beside the pieces wanted: the unknown piece, the mark, and each character alone and
            # behind the mark.
            vocab_size=wanted + 2 + 2 * len(characters),
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="identity",
            # The splitter has made the words: no further rules on what may stand together.
            split_by_unicode_script=False,
            split_by_number=False,
            bos_id=-1,
            eos_id=-1,
            # Partial sums of the unigram learner are added up by thread: a fixed number gives the
            # same pieces on every machine.
            num_threads=16,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(f"sentencepiece could not train on these words: {error}") from error
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = []
    for id in range(processor.get_piece_size()):
        piece = processor.id_to_piece(id)
        if processor.is_unknown(id):
            continue
        text = piece.removeprefix(BOUNDARY)
        if len(text) > 1:
            pieces.append(text if piece.startswith(BOUNDARY) else "##" + text)
    return pieces
