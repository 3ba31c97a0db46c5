"""The page of `mvbert export --page`: its files, its server, and what it answers in Chromium."""

import http.client
import io
import json
import os
import re
import shutil
import stat
import tarfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx", reason="needs onnx")
pytest.importorskip("onnxruntime", reason="needs onnxruntime")

import torch
from safetensors.torch import load_file, save_file

from mvbert.config import ModelConfig
from mvbert.errors import InputError
from mvbert.model import huggingface
from mvbert.model.masked_lm import MaskedLM
from mvbert.publish import page
from mvbert.publish.export import Session
from mvbert.publish.serve import make_server
from mvbert.text.tokenizer import WordPieceTokenizer
from mvbert.text.vocab import Vocab

# ---- models --------------------------------------------------------------------------------------

LABELS = ["O", "B-city", "I-city", "B-time", "I-time"]
INTENTS = ["travel", "weather"]


@pytest.fixture(scope="module")
def models(training_inputs, awkward_vocab, tmp_path_factory) -> Path:
    """Folders of tiny models, weights far from nothing: fill, labels, slots, joint, awkward."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(3)
    for name in ("fill", "labels", "slots", "joint"):
        shutil.copytree(training_inputs / "teacher", folder / name)
        weights = load_file(folder / name / "model.safetensors")
        weights = {key: value + torch.randn_like(value) * 0.5 for key, value in weights.items()}
        config = json.loads((folder / name / "config.json").read_text())
        if name != "fill":
            head = "Sequence" if name == "labels" else "Token"
            labels = LABELS + [f"intent:{intent}" for intent in INTENTS] * (name == "joint")
            config["architectures"] = [f"BertFor{head}Classification"]
            config["id2label"] = {str(i): label for i, label in enumerate(labels)}
            weights["classifier.weight"] = torch.randn(len(labels), 32)
            weights["classifier.bias"] = torch.randn(len(labels))
            weights["bert.pooler.dense.weight"] = torch.randn(32, 32) * 0.2
            weights["bert.pooler.dense.bias"] = torch.randn(32)
        (folder / name / "config.json").write_text(json.dumps(config))
        save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
    vocab = awkward_vocab(True, True)
    model = MaskedLM(ModelConfig(vocab.size, 32, 1, 2, 64, max_position_embeddings=32))
    model.init_weights(1)
    with torch.no_grad():
        for rank, piece in enumerate(("__proto__", "</script>", "\ufeffx", "<new>")):
            model.head.bias[vocab.ids[piece]] = 20.0 - rank
    (folder / "awkward").mkdir()
    huggingface.write_model(folder / "awkward", model, vocab, "")
    return folder


@pytest.fixture(scope="module")
def no_runtime(tmp_path_factory) -> Path:
    """A folder with the names of onnxruntime-web's files, for pages that nobody opens."""
    folder = tmp_path_factory.mktemp("ort")
    for name in page.RUNTIME_FILES:
        (folder / name).write_text("")
    return folder


def command(model: Path, out: Path, ort: Path, corpus: Path, *more) -> list:
    text = corpus / "corpus"
    return ["export", model, "-o", out, "--page", "--ort", ort, "--corpus", text, *more]


# ---- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more", "task"),
    [("fill", [], "fill"), ("fill", ["--head", "pooled"], "search"), ("labels", [], "labels"),
     ("slots", [], "slots"), ("joint", [], "slots"), ("slots", ["--head", "pooled"], "search")],
)  # fmt: skip
def test_the_page_follows_from_the_head(
    models, no_runtime, training_inputs, tmp_path, verb, name, more, task
):
    site = tmp_path / "site"
    report, _ = verb(*command(models / name, site, no_runtime, training_inputs, *more))
    assert report["page"] == task
    config = json.loads((site / "page.json").read_text())
    assert config["task"] == task
    assert config["bytes"] == report["bytes"] == (site / "model.onnx").stat().st_size
    assert config["labels"] == (LABELS if name != "fill" and not more else [])
    assert config["intents"] == (INTENTS if name == "joint" else [])
    written = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    assert written == {*config["files"]}
    worker = (site / "sw.js").read_text()
    kept = json.loads(re.search(r"const FILES = (.*);", worker)[1])
    assert {*kept} == written - {"sw.js"} | {"./"}
    assert re.search(r"const VERSION = '[0-9a-f]{16}';", worker)
    verb(*command(models / name, site, no_runtime, training_inputs, *more, "--overwrite"))
    assert (site / "sw.js").read_text() == worker
    (no_runtime / "ort.wasm.min.mjs").write_text(f"// {name} {more}")
    verb(*command(models / name, site, no_runtime, training_inputs, *more, "--overwrite"))
    assert (site / "sw.js").read_text() != worker  # browsers that kept the old files take the new


def test_a_large_model_is_named_as_such(
    models, no_runtime, training_inputs, tmp_path, verb, monkeypatch
):
    monkeypatch.setattr(page, "LARGE", 1000)
    _, shown = verb(*command(models / "fill", tmp_path / "site", no_runtime, training_inputs))
    assert "model.onnx has 0 MB, which is much for a phone to load" in shown


def test_the_page_names_no_other_server():
    for path in page.PAGE.iterdir():
        if path.suffix in (".html", ".css", ".js", ".mjs"):
            assert not re.search(r"(https?:)?//[\w-]+\.\w", path.read_text()), path.name


def test_added_pieces_of_the_page(awkward_vocab):
    options = page.tokenizer_options(awkward_vocab(True, False))
    assert options["cased"] is False
    assert options["keepAccents"] is True
    size = awkward_vocab(True, False).base_size
    assert options["added"] == [
        {"piece": "<new>", "id": size, "normalized": True},
        {"piece": "Added", "id": size + 1, "normalized": False},
    ]
    assert page.tokenizer_options(awkward_vocab(False, False))["keepAccents"] is False
    pieces = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "[MASK]")
    late = page.tokenizer_options(Vocab(pieces, base_size=5))
    assert late["added"] == [{"piece": "[MASK]", "id": 5, "normalized": False}]
    with pytest.raises(InputError, match="piece 'a' comes after the pieces of words"):
        page.tokenizer_options(Vocab(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"), base_size=4))


def test_models_without_a_page(models, no_runtime, training_inputs, tmp_path, refused):
    out = tmp_path / "site"
    for architecture, count, words in (
        ("BertForQuestionAnswering", 2, "answers questions"),
        ("BertForSequenceClassification", 1, "scores one number"),
    ):
        folder = shutil.copytree(models / "labels", tmp_path / architecture)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
        weights = load_file(folder / "model.safetensors")
        head = "qa_outputs" if count == 2 else "classifier"
        weights |= {f"{head}.weight": torch.zeros(count, 32), f"{head}.bias": torch.zeros(count)}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        refused(command(folder, out, no_runtime, training_inputs), words)
    fill = models / "fill"
    refused(command(fill, out, no_runtime, training_inputs, "--head", "hidden"), "--head hidden")
    refused(command(fill, out, no_runtime, training_inputs, "--head", "pooled", "logits"), "one of")
    refused(["export", fill, "--page"], "-o FOLDER")
    refused(["export", fill, "-o", out, "--serve"], "--serve is for --page")
    refused(["export", fill, "-o", out, "--ort", no_runtime], "--ort is for --page")
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    refused(command(fill, out, no_runtime, training_inputs), out, "exists and is not empty")
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


# ---- onnxruntime-web -----------------------------------------------------------------------------


def fake_npm(folder: Path, script: str) -> None:
    folder.mkdir()
    npm = folder / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)


def test_a_runtime_that_cannot_be_had(models, training_inputs, tmp_path, refused, monkeypatch):
    out = tmp_path / "site"
    call = ["export", models / "fill", "-o", out, "--page", "--corpus", training_inputs / "corpus"]
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    refused(call, "there is no npm; install Node.js; or fetch onnxruntime-web@", "--ort")
    fake_npm(tmp_path / "offline", "echo 'npm error ENOTFOUND registry' >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "offline"))
    refused(call, "npm cannot fetch", "ENOTFOUND", "is there a network?", "--ort")
    archive = tmp_path / "other.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo("package/dist/ort.wasm.min.mjs")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    fake_npm(tmp_path / "other", f'for last; do :; done; /bin/cp "{archive}" "$last/x.tgz"')
    monkeypatch.setenv("PATH", str(tmp_path / "other"))
    refused(call, "ort.wasm.min.mjs of onnxruntime-web@", "not have the known SHA-256", "--ort")
    refused([*call, "--ort", tmp_path], f"{tmp_path} has no ort.wasm.min.mjs", "onnxruntime-web")
    assert not out.exists()


# ---- the server ----------------------------------------------------------------------------------


@contextmanager
def served(site: Path):
    """The port of a server of a page."""
    server = make_server(site, 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def small_site(tmp_path) -> Path:
    """A page's folder with neighbours that must not be served."""
    site = tmp_path / "site"
    (site / "ort").mkdir(parents=True)
    files = {"index.html": "page", "ort/a.wasm": "module", "page.json": None}
    listing = json.dumps({"files": [*files]})
    for name, text in files.items():
        (site / name).write_text(listing if text is None else text)
    (site / "private.txt").write_text("secret")
    (tmp_path / "neighbour.txt").write_text("secret")
    (site / "link.txt").symlink_to(tmp_path / "neighbour.txt")
    return site


def ask(port: int, target: str, method: str = "GET", **headers) -> tuple[int, dict, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest(method, target, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def test_the_server_serves_the_page_alone(small_site):
    with served(small_site) as port:
        status, headers, body = ask(port, "/")
        assert (status, body) == (200, b"page")
        assert headers["Content-Type"] == "text/html; charset=utf-8"
        assert headers["X-Content-Type-Options"] == "nosniff"
        status, headers, body = ask(port, "/ort/a.wasm?v=1")
        assert (status, headers["Content-Type"], body) == (200, "application/wasm", b"module")
        status, headers, body = ask(port, "/index.html", "HEAD")
        assert (status, headers["Content-Length"], body) == (200, "4", b"")
        for target in (
            "/private.txt", "/link.txt", "/ort/", "/ort", "/../neighbour.txt",
            "/ort/../../neighbour.txt", "/%2e%2e/neighbour.txt", "/..%2fneighbour.txt",
            "//etc/passwd", "/etc/passwd", "../neighbour.txt", "/ort/%00a.wasm", "/index.html/",
            "\\..\\neighbour.txt", "*", f"http://localhost:{port}/../neighbour.txt",
        ):  # fmt: skip
            status, _, body = ask(port, target)
            assert status in (400, 404), target
            assert b"secret" not in body
        assert ask(port, "/", Host=f"localhost:{port}")[0] == 200
        for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", ""):
            assert ask(port, "/", Host=host)[0] == 403, host
        assert ask(port, "/", "POST")[0] == 501
        assert ask(port, "/")[2] == b"page"


def test_folders_that_are_not_served(small_site, tmp_path, refused):
    refused(["export", tmp_path, "--serve"], "has no page.json", "--page")
    refused(["export", "no-such-folder", "--serve"], "has no page.json")
    for files, words in (
        (["../neighbour.txt"], "is outside"),
        (["link.txt"], "is outside"),
        (["/etc/passwd"], "is outside"),
        (["missing.html"], "has no missing.html; export the page again"),
        ("index.html", "must be a list of names"),
    ):
        (small_site / "page.json").write_text(json.dumps({"files": files}))
        refused(["export", small_site, "--serve", "--port", "0"], words)


def test_a_port_that_is_taken(small_site, refused):
    with served(small_site) as port:
        refused(["export", small_site, "--serve", "--port", port], f"port {port}", "--port")
    refused(["export", small_site, "--serve", "--port", "70000"], "port 70000")


def test_serving_ends_with_a_report(small_site, verb, monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("socketserver.BaseServer.serve_forever", interrupt)
    report, shown = verb("export", small_site, "--serve", "--port", "0")
    assert report["served"] == str(small_site)
    assert re.fullmatch(r"http://localhost:\d+/", report["address"])
    assert report["address"] in shown


# ---- in a browser --------------------------------------------------------------------------------

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def runtime(tmp_path_factory) -> Path:
    """onnxruntime-web: the folder in MVBERT_ORT, or from npm."""
    if given := os.environ.get("MVBERT_ORT"):
        return Path(given)
    folder = tmp_path_factory.mktemp("runtime")
    try:
        page.copy_runtime(folder, None)
    except InputError as error:
        pytest.skip(f"needs onnxruntime-web: {error}")
    return folder


@pytest.fixture(scope="module")
def browser(runtime):
    from importlib import util

    program = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if program is None:
        pytest.skip(f"needs a browser: one of {', '.join(CHROMIUMS)}")
    spec = util.spec_from_file_location("browser", Path(__file__).with_name("browser.py"))
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    opened = module.Browser(program)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def sites(models, runtime, training_inputs, tmp_path_factory):
    """sites(name, *options): the folder of a model's page."""
    made: dict = {}

    def site(name: str, heads: tuple = ()) -> Path:
        if (name, heads) not in made:
            out = tmp_path_factory.mktemp("sites") / f"{name}{len(made)}"
            corpus = None if name == "awkward" else training_inputs / "corpus"
            page.run_page(str(models / name), out, heads=heads, ort=runtime, corpus=corpus)
            made[name, heads] = out
        return made[name, heads]

    return site


READY = "document.documentElement.dataset.ready === 'true'"
SCORES = """[...document.querySelectorAll('#results .score')].map((e) =>
    [e.querySelector('b').textContent, parseFloat(e.querySelector('span').textContent) / 100])"""
HITS = """[...document.querySelectorAll('.hit')].map((e) =>
    [e.querySelector('mark').textContent, Number(e.querySelector('small').textContent)])"""
HINT = "document.querySelector('#hint').textContent"


def start(browser, port: int) -> None:
    browser.problems.clear()
    browser.requests.clear()
    browser.open(f"http://localhost:{port}/")
    browser.wait(f"{READY} && document.querySelector('#results')?.childNodes.length > 0")


def write(browser, selector: str, text: str):
    """Types a text, waits for its answer, and returns what the page says about it."""
    browser.evaluate("document.querySelector('#results').replaceChildren()")
    browser.type(selector, text)
    browser.wait("document.querySelector('#results').childNodes.length > 0")
    return browser.evaluate(HINT)


class Python:
    """What the graph of a page says in ONNX Runtime."""

    def __init__(self, site: Path, vocab: Vocab) -> None:
        self._session = Session(site / "model.onnx")
        self._output = json.loads((site / "page.json").read_text())["output"]
        self.vocab = vocab
        self.tokenizer = WordPieceTokenizer(vocab)

    def __call__(self, text: str) -> tuple[list[int], torch.Tensor]:
        ids = self.tokenizer.encode(text)
        row = torch.tensor([ids])
        values = self._session(row, torch.ones_like(row), torch.zeros_like(row))
        self.intents = values.get("intent_logits")
        return ids, values[self._output][0]


# The browser's ONNX Runtime adds in another order, so an input of a matrix may be quantised one
# step of 255 away, and percentages on the page have one decimal.
NEAR = 0.02


def test_masks_are_filled_as_in_python(browser, sites, models, training_inputs):
    site = sites("fill")
    python = Python(site, Vocab.load(models / "fill"))
    with served(site) as port:
        start(browser, port)
        found = {}
        for text in ("The river is [MASK].", "The [MASK] house by the [MASK]", "[MASK]"):
            hint = write(browser, "#text", text)
            ids, logits = python(text)
            shares = [logits[i].softmax(-1) for i, id in enumerate(ids) if id == python.vocab.mask]
            shown = browser.evaluate(SCORES)
            assert len(shown) == 8 * len(shares)
            for mask, share in enumerate(shares):
                for piece, value in shown[8 * mask : 8 * mask + 8]:
                    assert abs(value - share[python.vocab.ids[piece]]) < NEAR, (text, piece)
                assert abs(shown[8 * mask][1] - share.max()) < NEAR
            assert hint == f"Likeliest: {', '.join(s[0] for s in shown[::8])}."
            found[text] = shares[0]
        first, *others = found.values()
        differences = [float((first - other).abs().max()) for other in others]
        assert min(differences) > 3 * NEAR, differences  # another text would be seen
        assert f"{len(ids)} pieces" in browser.evaluate("document.body.innerText")
        assert re.fullmatch(
            r"[\d.]+ ms", browser.evaluate("document.querySelector('#speed').textContent")
        )
        browser.type("#text", "no blank")
        browser.wait(f"{HINT}.startsWith('Put [MASK]')")
        # More pieces than the model has positions.
        browser.type("#text", "river " * 100 + "[MASK]")
        browser.wait("document.querySelector('#pieces').textContent.startsWith('32 pieces, the')")
        assert browser.problems == []


def test_the_page_by_keyboard(browser, sites):
    with served(sites("fill")) as port:
        start(browser, port)
        write(browser, "#text", "The river is [MASK].")
        browser.evaluate("document.querySelector('#text').focus()")
        browser.key("Tab")
        assert browser.evaluate("document.activeElement.id") == "insert"
        best = browser.evaluate(SCORES)[0][0]
        for _ in range(4):  # three examples, then the likeliest piece
            browser.key("Tab")
        assert browser.evaluate("document.activeElement.textContent").startswith(best)
        browser.key("Enter")
        text = f"The river is {best}." if best[:2] != "##" else f"The river is{best[2:]}."
        assert browser.evaluate("document.querySelector('#text').value") == text
        assert browser.evaluate("document.activeElement.id") == "text"


def test_the_page_to_a_screen_reader(browser, sites):
    with served(sites("fill")) as port:
        start(browser, port)
        browser.send("Accessibility.enable")
        nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
        browser.send("Accessibility.disable")
        named = [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node.get("ignored")
        ]
        assert ("textbox", "A sentence with [MASK]") in named
        assert ("heading", "fill") in named
        assert any(role == "status" for role, _ in named)
        assert not [role for role, name in named if role == "button" and not name.strip()]


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_does_not_scroll_sideways(browser, sites, width):
    with served(sites("fill")) as port:
        browser.screen(width)
        start(browser, port)
        browser.type("#text", "x" * 300 + " [MASK]")
        time.sleep(0.3)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        browser.screen(1280)


def test_labels_are_those_of_python(browser, sites, models):
    site = sites("labels")
    python = Python(site, Vocab.load(models / "labels"))
    with served(site) as port:
        start(browser, port)
        for text in ("The river is old.", "A house of words"):
            write(browser, "#text", text)
            share = python(text)[1].softmax(-1)
            shown = browser.evaluate(SCORES)
            assert sorted(label for label, _ in shown) == sorted(LABELS)
            assert all(abs(value - share[LABELS.index(label)]) < NEAR for label, value in shown)
        assert browser.problems == []


@pytest.mark.parametrize("name", ["slots", "joint"])
def test_slots_are_those_of_python(browser, sites, models, name):
    site = sites(name)
    python = Python(site, Vocab.load(models / name))
    with served(site) as port:
        start(browser, port)
        for text in ("The river is old, and the house by the river 😀 older.", "words"):
            hint = write(browser, "#text", text)
            ids, logits = python(text)
            spans = python.tokenizer.offsets(text)[1].tolist()
            slots, kind = [], "O"
            for i, (begin, end) in enumerate(spans):
                inside = python.vocab.pieces[ids[i + 1]].startswith("##")
                if inside and spans[i - 1][1] == begin:
                    if kind != "O":
                        slots[-1][2] = end
                    continue
                label = LABELS[int(logits[i + 1].argmax())]
                before, kind = kind, label.removeprefix("B-").removeprefix("I-")
                if kind != "O" and kind == before and label.startswith("I-"):
                    slots[-1][2] = end
                elif kind != "O":
                    slots.append([kind, begin, end])
            expected = [f"{kind}: {text[begin:end]}" for kind, begin, end in slots]
            if name == "joint":
                share = python.intents[0].softmax(-1)
                expected.insert(0, INTENTS[int(share.argmax())])
                shown = dict(browser.evaluate(SCORES.replace("results", "intents")))
                assert all(abs(shown[k] - v) < NEAR for k, v in zip(INTENTS, share, strict=True))
            assert hint == ("; ".join(expected) or "No labels.")
            shown = browser.evaluate("document.querySelector('#results').textContent")
            assert re.sub("city|time", "", shown) == text
        assert browser.problems == []


def test_search_finds_what_python_finds(browser, sites, models):
    site = sites("fill", ("pooled",))
    python = Python(site, Vocab.load(models / "fill"))
    paragraphs = ["The river is old.", "A house of words by the river", "and the and the"]
    with served(site) as port:
        start(browser, port)
        browser.type("#text", "\n\n".join(paragraphs))
        hint = write(browser, "#query", "old river")
        assert hint == "3 paragraphs, the closest first."
        hits = browser.evaluate(HITS)
        wanted = python("old river")[1]
        for paragraph, value in hits:
            cosine = torch.cosine_similarity(wanted, python(paragraph)[1], dim=0)
            assert abs(value - cosine) < NEAR
        assert sorted(paragraph for paragraph, _ in hits) == sorted(paragraphs)
        assert [value for _, value in hits] == sorted((v for _, v in hits), reverse=True)
        browser.type("#text", "")
        browser.wait(f"{HINT} === 'There is no text to search.'")
        assert browser.problems == []


def test_pieces_that_mean_something_to_javascript(browser, sites, awkward_vocab):
    with served(sites("awkward")) as port:
        start(browser, port)
        write(browser, "#text", "hello [MASK]")
        shown = [piece for piece, _ in browser.evaluate(SCORES)]
        assert shown[:4] == ["__proto__", "</script>", "\ufeffx", "<new>"]
        assert browser.problems == []


def test_the_page_works_without_a_network_once_loaded(browser, sites):
    with served(sites("fill")) as port:
        start(browser, port)
        assert {address.split("/")[2] for address in browser.requests if "//" in address} == {
            f"localhost:{port}"
        }
        browser.wait("document.querySelector('#offline').textContent === 'ready'")
    browser.send("Page.reload")
    browser.wait("performance.now() < 5000")
    browser.wait(f"{READY} && document.querySelector('#results')?.childNodes.length > 0")
    write(browser, "#text", "The river is [MASK].")
    assert len(browser.evaluate(SCORES)) == 8


def test_what_the_page_cannot_do_is_said_on_it(browser, sites, tmp_path):
    status = "document.querySelector('#status.error')?.textContent"
    site = shutil.copytree(sites("fill"), tmp_path / "corrupt")
    (site / "model.onnx").write_bytes(b"\x08\x08nonsense")
    with served(site) as port:
        browser.open(f"http://localhost:{port}/")
        assert browser.wait(status).startswith("The model did not load: ")
    (site / "vocab.txt").write_text("a\nb\n")
    with served(site) as port:
        browser.open(f"http://localhost:{port}/")
        assert "has no [PAD], [UNK], [CLS], [SEP]" in browser.wait(status)
    with served(sites("fill")) as port:
        script = browser.send(
            "Page.addScriptToEvaluateOnNewDocument", source="WebAssembly.validate = () => false"
        )
        browser.open(f"http://localhost:{port}/")
        assert "no WebAssembly with SIMD" in browser.wait(status)
        browser.send("Page.removeScriptToEvaluateOnNewDocument", identifier=script["identifier"])
