"""A corpus: text as a stream of word ids, and the lexicon of distinct words with their counts.

Text is read once. Vocabularies are learned from the lexicon and tokenize it (`Corpus.segment`);
rows are gathered from the stream.

A corpus is a folder:

    manifest.json    sources, settings, counts, and size and SHA-256 of the other files
    train.u32        word ids, little-endian; id 0 ends a document
    heldout.u32      the same for the held-out documents
    lexicon.bytes    the normalised words, UTF-8, end to end, by word id
    lexicon.ends     uint64 [W], where each word ends in lexicon.bytes
    lexicon.counts   uint64 [W], how often each word is in train.u32

Ids are sorted by (count, high to low; bytes, low to high), after id 0, the empty word. A word of
more than 100 characters, which WordPiece turns into [UNK], is kept cut to 101.
"""

from mvbert.text.corpus_build import build_corpus
from mvbert.text.corpus_folder import Corpus
from mvbert.text.corpus_report import (
    corpus_report,
    load_vocabs,
    print_corpus_report,
    run_corpus,
    run_corpus_info,
)
from mvbert.text.lexicon import Segmentation, WordList

__all__ = [
    "Corpus",
    "Segmentation",
    "WordList",
    "build_corpus",
    "corpus_report",
    "load_vocabs",
    "print_corpus_report",
    "run_corpus",
    "run_corpus_info",
]
