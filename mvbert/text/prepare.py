"""The first parts of a job: builds the corpus and learns the student vocabulary."""

from __future__ import annotations

from pathlib import Path

from mvbert.config import CorpusConfig, VocabConfig
from mvbert.files import Json, read_json_object, write_json
from mvbert.progress import Progress
from mvbert.text import docstrings
from mvbert.text.corpus import run_corpus
from mvbert.text.learner import run_vocab
from mvbert.text.vocab import Vocab

VOCAB_FILE = Path("student") / "vocab.txt"  # in the run folder
DOCSTRINGS = "docstrings"  # the embedded text, see mvbert.text.docstrings


def make_corpus(config: CorpusConfig, out: Path, vocab: Vocab, progress: Progress) -> Path:
    """Builds the corpus, unless it exists already; returns its folder.

    Normalises text as the teacher's vocabulary does.
    """
    folder = out / "corpus"
    if folder.exists():
        progress.note(f"{folder} is complete")
    texts = []
    for text in config.text:
        if text != DOCSTRINGS:
            texts.append(Path(text))
            continue
        texts.append(out / "text" / "docstrings.txt")
        if not texts[-1].exists():
            texts[-1].parent.mkdir(parents=True, exist_ok=True)
            stats = docstrings.docstring_corpus(texts[-1])
            megabytes = stats["bytes"] / 1e6
            progress.note(f"text: docstrings of installed packages, {megabytes:.1f} MB")
    run_corpus(
        texts,
        folder,
        lowercase=vocab.lowercase,
        strip_accents=vocab.strip_accents,
        heldout_share=config.heldout_share,
        heldout_texts=[Path(text) for text in config.heldout_text],
        field=config.field,
        errors=config.errors,
    )
    return folder


def make_vocab(
    config: VocabConfig,
    out: Path,
    corpus_dir: Path,
    teacher: Path,
    progress: Progress,
    cased: bool = False,
) -> dict[str, Json]:
    """Learns the vocabulary `out`/VOCAB_FILE, unless it exists already; returns its report."""
    vocab_file = out / VOCAB_FILE
    report_file = out / "student" / "report.json"  # written after the vocabulary
    if report_file.is_file():
        progress.note(f"{vocab_file} is complete")
        return read_json_object(report_file)
    report = run_vocab(
        corpus_dir,
        vocab_file,
        config.size,
        learner=config.learner,
        coverage=config.coverage,
        teacher=teacher,
        cased=cased,
        overwrite=True,
    )
    write_json(report_file, report)
    return report
