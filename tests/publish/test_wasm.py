"""The tokenizer as WebAssembly: built from these sources, small, and with Python's ids in Node."""

import gzip
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from mvbert.text.tokenizer import WordPieceTokenizer
from mvbert.text.vocab import Vocab

CASES = [(True, True), (True, False), (False, False)]


@pytest.fixture(scope="module")
def builder(root):
    """csrc/build_wasm.py as a module."""
    path = root / "csrc" / "build_wasm.py"
    spec = importlib.util.spec_from_file_location("build_wasm", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_node(script, *arguments) -> str:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    done = subprocess.run(
        [node, script, *map(str, arguments)], capture_output=True, text=True, check=False,
        timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_module_is_built_from_these_sources_and_small(builder):
    data = builder.TARGET.read_bytes()
    facts = json.loads(builder.TARGET.with_name("tokenizer.wasm.json").read_text())
    assert facts["sha256"] == hashlib.sha256(data).hexdigest()
    hint = "tokenizer.wasm is stale; run: python csrc/build_wasm.py"
    assert facts["sources"] == builder.source_hash(), hint
    assert len(gzip.compress(data, 9)) < 150_000


@pytest.mark.slow
def test_the_same_compiler_builds_the_same_module(builder, tmp_path):
    facts = json.loads(builder.TARGET.with_name("tokenizer.wasm.json").read_text())
    version = builder.compiler()
    if version is None:
        pytest.skip("needs em++ of Emscripten")
    if version != facts["compiler"]:
        pytest.skip(f"the module was built by {facts['compiler']}, here is {version}")
    builder.build(tmp_path / "tokenizer.wasm")
    assert (tmp_path / "tokenizer.wasm").read_bytes() == builder.TARGET.read_bytes()


def test_building_without_the_compiler(builder, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["build_wasm.py", "-o", str(tmp_path / "tokenizer.wasm")])
    with pytest.raises(SystemExit, match=r"needs em\+\+ of Emscripten"):
        builder.main()
    assert not any(tmp_path.iterdir())


def compare(root, vocab: Vocab, texts: list[str], folder) -> dict:
    """Encodes texts in Node, compares with Python, and returns what Node found."""
    vocab.save(folder / "vocab.txt")
    added = [
        {"piece": a.piece, "id": vocab.ids[a.piece], "normalized": a.normalized}
        for a in vocab.added
    ]
    accents = vocab.lowercase and not vocab.strip_accents
    options = {"cased": not vocab.lowercase, "keepAccents": accents, "added": added}
    pairs = texts[1:40]
    job = {"vocab": str(folder / "vocab.txt"), "options": options, "texts": texts, "pairs": pairs}
    (folder / "job.json").write_text(json.dumps(job))
    run_node(
        root / "tests" / "publish" / "encode.mjs",
        root / "mvbert" / "publish" / "page" / "tokenizer.mjs",
        folder / "job.json",
        folder / "result.json",
    )
    found = json.loads((folder / "result.json").read_text())
    python = WordPieceTokenizer(vocab)
    for text, ids, (span_ids, spans) in zip(texts, found["ids"], found["spans"], strict=True):
        assert ids == python.encode(text), text
        expected, places = python.offsets(text)
        assert span_ids == expected.tolist()
        # JavaScript counts units of UTF-16.
        units = np.cumsum([0, *(1 + (char > "\uffff") for char in text)])
        assert spans == units[places].reshape(-1).tolist(), text
    batch = python.encode_batch(
        texts[: len(pairs)], pairs, max_length=24, truncation=True, padding=True,
        pad_to_multiple_of=8,
    )  # fmt: skip
    rows, width = found["dims"]
    assert rows == len(pairs)
    assert width % 16 == 0
    for array, expected in zip(
        found["batch"], (batch.input_ids, batch.attention_mask, batch.token_type_ids), strict=True
    ):
        array = np.array(array).reshape(rows, width)
        assert np.array_equal(array[:, : expected.shape[1]], expected)
        assert not array[:, expected.shape[1] :].any()
    return found


@pytest.mark.parametrize(("lowercase", "strip_accents"), CASES, ids=str)
def test_ids_are_those_of_python(
    root, awkward_vocab, awkward_texts, tmp_path, lowercase, strip_accents
):
    """And every piece comes back as it is, those with a meaning in JavaScript among them."""
    vocab = awkward_vocab(lowercase, strip_accents)
    found = compare(root, vocab, awkward_texts(2000), tmp_path)
    assert found["pieces"] == list(vocab.pieces)
    assert found["back"] == [id if piece else -1 for id, piece in enumerate(vocab.pieces)]
    assert found["beyond"] == [None, None, None]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vocab.txt", "vocab-cased.txt", "vocab-multilingual-cased.txt"])
def test_ids_of_many_random_strings(root, shared_file, awkward_texts, tmp_path, name):
    vocab = Vocab.load(shared_file(name), lowercase=name == "vocab.txt")
    compare(root, vocab, awkward_texts(100_000 // 3 + 1), tmp_path)


REFUSALS = """
import { Tokenizer, TokenizerError } from '%s';
const good = '[PAD]\\n[UNK]\\n[CLS]\\n[SEP]\\na\\n';
const tokenizer = await Tokenizer.load({ vocab: good });
const calls = [
  () => Tokenizer.load({ vocab: 'a\\nb' }),
  () => Tokenizer.load({ vocab: new Uint8Array([0xff]) }),
  () => Tokenizer.load({}),
  () => Tokenizer.load({ vocab: good, added: [{ piece: 'x y', id: 5 }] }),
  () => Tokenizer.load({ vocab: good, added: [{ piece: 'x', id: 9 }] }),
  () => Tokenizer.load({ vocab: good, added: [{ piece: 'x\\0y', id: 5 }] }),
  () => Tokenizer.load({ vocab: good, wasm: new Uint8Array([0, 97, 115, 109]) }),
  () => tokenizer.encode(undefined),
  () => tokenizer.encodeSpans(null),
  () => tokenizer.encodeBatch(['a', 3]),
  () => tokenizer.encodeBatch(['a'], { pairs: [] }),
  () => tokenizer.encodeBatch(['a'], { truncation: 'toString' }),
  () => tokenizer.encodeBatch(['a'], { maxLength: 1 }),
  () => tokenizer.encodeBatch(['a'], { width: 1.5 }),
  () => tokenizer.encodeBatch(['a'], { width: 2 ** 40 }),
  () => tokenizer.encodeBatch(Array(4000).fill('a'), { width: 100000 }),
];
for (const call of calls) {
  try {
    await call();
    console.log('nothing');
  } catch (error) {
    console.log(`${error.name} ${error.status ?? ''}: ${error.message}`);
  }
}
console.log(tokenizer.encode('a a').join());
"""


def test_refusals(root, tmp_path):
    module = (root / "mvbert" / "publish" / "page" / "tokenizer.mjs").as_uri()
    (tmp_path / "refusals.mjs").write_text(REFUSALS % module)
    *shown, after = run_node(tmp_path / "refusals.mjs").splitlines()
    expected = [
        r"TokenizerError -3: the vocabulary has no \[PAD\], \[UNK\], \[CLS\], \[SEP\]; expected",
        r"TokenizerError -3: the vocabulary is not UTF-8 \(at byte 0\)",
        r"TypeError : vocab must be the bytes or the text of a vocab.txt",
        r"TokenizerError -3: added piece 'x y' is empty or has white space",
        r"TokenizerError -3: added piece 'x' has id 9, which is neither",
        r"TokenizerError -3: an added piece has NUL in it",
        r"CompileError : ",
        r"TypeError : a text must be a string, got undefined",
        r"TypeError : a text must be a string, got null",
        r"TypeError : a text must be a string, got number",
        r"TokenizerError -1: there are 1 texts and 0 pairs",
        r"TokenizerError -1: there is no truncation 'toString'",
        r"TokenizerError -5: max_length 1 leaves no room",
        r"TypeError : lengths must be whole numbers",
        r"TokenizerError -1: width and multiple must be below",
        r"TokenizerError -6: out of memory",
    ]
    assert len(shown) == len(expected)
    for line, pattern in zip(shown, expected, strict=True):
        assert re.match(pattern, line), line
    assert after == "2,4,4,3"  # it still works


def test_the_types_name_every_method(root):
    page = root / "mvbert" / "publish" / "page"
    written = re.findall(
        r"^  (?:get |static async )?([a-z]\w*)\(", (page / "tokenizer.mjs").read_text(), re.M
    )
    types = (page / "tokenizer.d.mts").read_text()
    body = types[types.index("export class Tokenizer {") :]
    declared = re.findall(r"^  (?:static |readonly )?([a-z]\w*)[(:]", body, re.M)
    assert {*written} - {"super", "if", "for"} == {*declared}
