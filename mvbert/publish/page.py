"""Writes a static page that runs a BERT in a browser: fills masks, labels text, or searches it.

    OUT/index.html, style.css, page.mjs, worker.mjs   the page, from page/ beside this file
    OUT/tokenizer.mjs, tokenizer.wasm                 the tokenizer (csrc/build_wasm.py)
    OUT/ort/                                          onnxruntime-web
    OUT/model.onnx, vocab.txt, page.json              the model in int8, and what the page shows
    OUT/sw.js                                         keeps all of it for use without a network

The page asks nothing of any other server. docs/export.md says what a host has to do (nothing).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvbert.config import ModelConfig
from mvbert.errors import InputError
from mvbert.files import (
    Json,
    atomic_folder,
    check_new_folder,
    read_json_object,
    sha256_file,
    sync_folder,
    write_json,
)
from mvbert.model import huggingface
from mvbert.model.huggingface import INTENT
from mvbert.model.weights import Weights, read_weights
from mvbert.progress import Progress
from mvbert.publish.export import INT8, run_export
from mvbert.publish.onnx_graph import OUTPUTS
from mvbert.text.vocab import Vocab

PAGE = Path(__file__).with_name("page")
PAGE_FILES = (
    "index.html", "style.css", "page.mjs", "worker.mjs", "tokenizer.mjs", "tokenizer.wasm",
)  # fmt: skip

# The release that npm is asked for, and SHA-256 of what is used of it.
RUNTIME = "onnxruntime-web"
RUNTIME_VERSION = "1.30.0"
RUNTIME_FILES = {
    "ort.wasm.min.mjs":
        "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    "ort-wasm-simd-threaded.mjs":
        "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    "ort-wasm-simd-threaded.wasm":
        "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}  # fmt: skip

LARGE = 100_000_000  # bytes of a model that a page should not ask a phone to load

EXAMPLES = {
    "fill": [
        "The old house stood by the [MASK].",
        "She opened the [MASK] and began to read.",
        "Water boils at a [MASK] temperature on a mountain.",
    ],
    "labels": ["A moving and often very funny film.", "Will it rain in Boston tomorrow?"],
    "slots": [
        "Book a table for two at an Italian restaurant in Boston.",
        "Play the latest album by Miles Davis.",
    ],
    "search": ["How do plants get energy?", "a journey by sea", "how to keep food fresh"],
}
TEXT = (PAGE / "sample.txt").read_text(encoding="utf-8").strip()


@dataclass(frozen=True)
class Task:
    """What a page does with a model.

    Args:
        name: a key of EXAMPLES.
        head: a key of OUTPUTS.
        labels: names of the labels it scores, for a joint model those of words.
        intents: of a joint model, names of the labels of a text, which come after the others.
        independent: whether several labels of a text may be right.
    """

    name: str
    head: str
    labels: tuple[str, ...] = ()
    intents: tuple[str, ...] = ()
    independent: bool = False


def page_task(folder: Path, shape: ModelConfig, weights: Weights, heads: Sequence[str]) -> Task:
    """The task that follows from a model's head, or from `heads` where given.

    Raises:
        InputError: no page is made for such a head.
    """
    if not {*heads} <= {"pooled", "logits"} or len(heads) > 1:
        raise InputError(f"--page shows one of pooled and logits, not --head {' '.join(heads)}")
    if "pooled" in heads:
        return Task("search", "pooled")
    labels = huggingface.load_label_head(folder, weights, shape)
    if labels is not None:
        config = read_json_object(folder / "config.json")
        count = labels.scores.out_features
        if len(labels.outputs) > 1:
            raise InputError(f"{folder} answers questions; --page has no such page yet")
        if count < 2:
            raise InputError(f"{folder} scores one number; --page needs two labels or more")
        given = config.get("id2label")
        given = given if isinstance(given, dict) else {}
        names = tuple(str(given.get(str(i), f"LABEL_{i}")) for i in range(count))
        if labels.of_text:
            independent = config.get("problem_type") == "multi_label_classification"
            return Task("labels", "logits", names, independent=independent)
        tags = tuple(name for name in names if not name.startswith(INTENT))
        intents = tuple(name.removeprefix(INTENT) for name in names[len(tags) :])
        return Task("slots", "logits", tags, intents)
    predicts = "cls.predictions.transform.dense.weight" in weights
    if heads or (predicts and not (folder / "modules.json").exists()):
        return Task("fill", "logits")
    return Task("search", "pooled")


def tokenizer_options(vocab: Vocab) -> dict[str, Json]:
    """The options of tokenizer.mjs for a vocabulary whose vocab.txt has the pieces of words.

    Raises:
        InputError: an id after these belongs to a piece that no text has.
    """
    normalized = {added.piece: added.normalized for added in vocab.added}
    after = vocab.pieces[vocab.base_size :]
    for piece in after:
        if piece not in normalized and piece not in vocab.special_pieces:
            raise InputError(
                f"{vocab.source}: piece {piece!r} comes after the pieces of words and is not an "
                "added piece, which the page's tokenizer does not support"
            )
    pieces = dict.fromkeys([*normalized, *(p for p in after if p not in normalized)])
    added = [
        {"piece": piece, "id": vocab.ids[piece], "normalized": normalized.get(piece, False)}
        for piece in pieces
    ]
    return {
        "cased": not vocab.lowercase,
        "keepAccents": vocab.lowercase and not vocab.strip_accents,
        "added": added,
    }


# ---- onnxruntime-web -----------------------------------------------------------------------------


def copy_runtime(target: Path, folder: Path | None) -> str:
    """Puts RUNTIME_FILES into `target`.

    Args:
        folder: where they are; None: npm fetches RUNTIME_VERSION, which must have the checksums
            above.

    Returns:
        Where they came from.

    Raises:
        InputError: they are not in the folder, there is no npm, or it cannot fetch them.
    """
    if folder is not None:
        place = folder / "dist" if (folder / "dist").is_dir() else folder
        for name in RUNTIME_FILES:
            if not (place / name).is_file():
                raise InputError(
                    f"{place} has no {name}; --ort takes the folder of npm's package {RUNTIME}"
                )
            shutil.copyfile(place / name, target / name)
        return str(folder)
    package = f"{RUNTIME}@{RUNTIME_VERSION}"
    advice = f"; or fetch {package} elsewhere and give its folder with --ort"
    npm = shutil.which("npm")
    if npm is None:
        raise InputError(
            f"--page needs {RUNTIME}, which npm fetches, and there is no npm; install Node.js"
            + advice
        )
    with tempfile.TemporaryDirectory() as scratch:
        command = [npm, "pack", package, "--prefer-offline", "--silent", "--pack-destination"]
        try:
            done = subprocess.run(
                [*command, scratch], capture_output=True, text=True, timeout=600, check=False
            )
        except subprocess.TimeoutExpired:
            raise InputError(f"npm took more than ten minutes to fetch {package}{advice}") from None
        archives = [*Path(scratch).glob("*.tgz")]
        if done.returncode != 0 or not archives:
            reason = " ".join((done.stderr or done.stdout).split())[-200:] or "no reason given"
            raise InputError(f"npm cannot fetch {package} ({reason}); is there a network?{advice}")
        with tarfile.open(archives[0]) as archive:
            for name, digest in RUNTIME_FILES.items():
                try:
                    member = archive.extractfile(f"package/dist/{name}")
                except KeyError:
                    member = None
                data = b"" if member is None else member.read()
                if hashlib.sha256(data).hexdigest() != digest:
                    raise InputError(f"{name} of {package} does not have the known SHA-256{advice}")
                (target / name).write_bytes(data)
    return package


# ---- the verb ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PageReport:
    """What an export of a page reports."""

    output: str
    model: str
    page: str
    """Name of the task."""
    bytes: int
    """Size of the model."""
    int8: dict[str, Any]
    """Of the model, as in ExportReport.files."""
    runtime: str
    """Where onnxruntime-web came from."""


def run_page(
    name: str,
    out: Path,
    *,
    heads: Sequence[str] = (),
    cased: bool = False,
    corpus: Path | None = None,
    ort: Path | None = None,
    overwrite: bool = False,
) -> PageReport:
    """Writes the files listed at the top of this module.

    Args:
        name, heads, cased, corpus, overwrite: as for run_export.
        ort: a folder with RUNTIME_FILES; None: npm fetches them.

    Raises:
        InputError: as run_export, there is no page for the model, or its runtime cannot be had.
    """
    progress = Progress("export")
    folder = huggingface.find_model(name)
    check_new_folder(out, overwrite)
    shape, vocab = huggingface.read_shape(folder, cased=cased)
    weights = read_weights(folder)
    task = page_task(folder, shape, weights, heads)
    options = tokenizer_options(vocab)
    if task.name == "fill":
        vocab.mask  # noqa: B018  # refuses a vocabulary without [MASK]
    progress.note(f"page: {task.name}")
    with atomic_folder(out, overwrite=overwrite) as partial:
        (partial / "ort").mkdir()
        runtime = copy_runtime(partial / "ort", ort)
        with tempfile.TemporaryDirectory() as scratch:
            graphs = Path(scratch, "graphs")
            report = run_export(
                name, graphs, heads=[task.head], int8=True, cased=cased, corpus=corpus
            )
            shutil.copyfile(graphs / INT8, partial / "model.onnx")
            shutil.copyfile(graphs / "vocab.txt", partial / "vocab.txt")
        for file in PAGE_FILES:
            shutil.copyfile(PAGE / file, partial / file)
        size = (partial / "model.onnx").stat().st_size
        if size > LARGE:
            progress.note(f"model.onnx has {size / 1e6:.0f} MB, which is much for a phone to load")
        files = sorted(str(p.relative_to(partial)) for p in partial.rglob("*") if p.is_file())
        files = [*files, "page.json", "sw.js"]
        write_json(
            partial / "page.json",
            {
                "name": Path(name).resolve().name if Path(name).is_dir() else name,
                "task": task.name,
                "output": OUTPUTS[task.head],
                "labels": list(task.labels),
                "intents": list(task.intents),
                "independent": task.independent,
                "maxLength": shape.max_position_embeddings,
                "tokenizer": options,
                "bytes": size,
                "runtimeBytes": sum(f.stat().st_size for f in (partial / "ort").iterdir()),
                "examples": EXAMPLES[task.name],
                "text": TEXT,
                "files": files,
            },
        )
        _write_worker(partial, files)
        sync_folder(partial / "ort")
    return PageReport(str(out), str(folder), task.name, size, report.files[INT8], runtime)


def _write_worker(site: Path, files: Sequence[str]) -> None:
    """Writes sw.js with the list of files, and a version that is another if one has changed."""
    kept = ["./", *(file for file in files if file != "sw.js")]
    source = (PAGE / "sw.js").read_text(encoding="utf-8")
    digests = "".join(sha256_file(site / (file if file != "./" else "index.html")) for file in kept)
    version = hashlib.sha256((source + digests).encode()).hexdigest()[:16]
    for before, after in (
        ("const VERSION = '';", f"const VERSION = '{version}';"),
        ("const FILES = [];", f"const FILES = {json.dumps(kept)};"),
    ):
        assert source.count(before) == 1
        source = source.replace(before, after)
    (site / "sw.js").write_text(source, encoding="utf-8")
