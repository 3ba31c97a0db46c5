"""docs/experiments/get_data.py against a server on this machine, and the paths to its files."""

import hashlib
import http.server
import importlib.util
import io
import json
import lzma
import tarfile
import threading
import zipfile
from dataclasses import replace

import pytest

from mvbert.errors import InputError
from mvbert.files import data_folder, data_path
from mvbert.study.settings import StudyConfig
from mvbert.tasks.formats import find_task, read_task
from mvbert.text.readers import find_texts
from mvbert.toml import load_toml

PAIRS = "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n"
MNLI = (
    "index\tpromptID\tsentence1_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
    "0\t7\t( a )\tfirst\tsecond\tneutral\tcontradiction\n"
)
# Three pairs, of which the second is in the dev set.
MRPC = [f"{i % 2}\t{i}\t{i + 10}\tleft {i}\tright {i}\n" for i in range(3)]
MRPC_HEADER = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
SENTENCE = "A sentence of a book that is long enough to be kept, "
ARTICLE = "\n\n".join(
    ["Heading", *(f"The {n}th paragraph says something in a full sentence." for n in range(9))]
)


def read_sst2(path):
    return read_task(find_task("sst-2"), [str(path)])


class Publisher(http.server.ThreadingHTTPServer):
    """Serves `files`; `cut` holds the paths that are cut off half way, once each."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.cut, self.requests = {}, set(), []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        content, given = self.server.files.get(self.path), self.headers.get("Range", "")
        self.server.requests.append((self.path, given))
        if content is None:
            return self.send_error(404)
        start = int(given.removeprefix("bytes=").rstrip("-")) if given else 0
        if start >= len(content):
            return self.send_error(416)
        self.send_response(206 if given else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        rest = content[start:]
        if self.path in self.server.cut:
            self.server.cut.remove(self.path)
            rest = rest[: len(rest) // 2]
        self.wfile.write(rest)

    def log_message(self, *_):
        pass


def zipped(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return file.getvalue()


def book(title, year, *paragraphs):
    return (
        f"# Title: {title}\n\n## Author: X\n\n## Year: {year}\n\n-------\n\n## I\n\n"
        + "\n\n".join(paragraphs)
    )


def library(*books):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for number, text in enumerate(books):
            member = tarfile.TarInfo(f"books-1/X/{number}.md")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return file.getvalue()


def wikipedia():
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    titles = [f"Title {n}" for n in range(310)]
    texts = [ARTICLE.replace("The ", f"The {n}-") for n in range(310)]
    file = io.BytesIO()
    parquet.write_table(pa.table({"id": titles, "title": titles, "text": texts}), file)
    return file.getvalue()


@pytest.fixture
def get_data(root):
    spec = importlib.util.spec_from_file_location(
        "get_data", root / "docs" / "experiments" / "get_data.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def publisher(get_data):
    """A server with a small stand-in for every download, and get_data pointed at it."""
    with Publisher() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        small = [book(t, 1900, SENTENCE + t, "Short.") for t in get_data.SMALL_BOOKS]
        contents = {
            "vocab": [b"[PAD]\n", b"[UNK]\n", b"[CLS]\n"],
            "mrpc": [
                ("\ufeff" + MRPC_HEADER + "".join(MRPC)).encode(),
                ("\ufeff" + MRPC_HEADER + MRPC[0]).encode(),
                b"1\t11\n",
            ],
            "mnli": [
                zipped({f"MNLI/{p}.tsv": MNLI for p in ("train", "dev_matched", "dev_mismatched")})
            ],
            "snips": [f"{i}\n".encode() for i in range(9)],
            "books": [library(*reversed(small), book("New", 1950, SENTENCE), *others())],
        }
        for name, folder in [
            ("sst-2", "SST-2"), ("cola", "CoLA"), ("sts-b", "STS-B"), ("qqp", "QQP"),
            ("qnli", "QNLI"), ("rte", "RTE"),
        ]:  # fmt: skip
            text = "sentence\tlabel\ngood \t1\n" if name == "sst-2" else PAIRS
            members = {f"{folder}/{part}.tsv": text for part in ("train", "dev", "test")}
            contents[name] = [zipped(members | {f"{folder}/original/readme.txt": "no"})]
        if importlib.util.find_spec("pyarrow"):
            contents["wiki"] = [wikipedia()]
        for name, files in contents.items():
            sources = []
            for i, (content, source) in enumerate(
                zip(files, get_data.ITEMS[name].sources, strict=True)
            ):
                path = f"/{name}/{i}"
                server.files[path] = content
                sha256 = hashlib.sha256(content).hexdigest() if source.sha256 else ""
                sources.append(get_data.Source(server.url + path, len(content), sha256))
            get_data.ITEMS[name] = replace(get_data.ITEMS[name], sources=tuple(sources))
        server.names = [*contents]
        yield server
        server.shutdown()


def others():
    """Books by titles of which some are kept for training."""
    return [book(f"Book {n}", 1800 + n, f"> *{SENTENCE}*\n> {n}.", "1 2 3 " * 9) for n in range(9)]


def members(path):
    with tarfile.open(path) as archive:
        return {m.name: archive.extractfile(m).read().decode() for m in archive}


def lines_of(path):
    return lzma.decompress(path.read_bytes()).decode().split("\n")


def visible(folder):
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def test_everything_arrives_in_the_formats_that_mvbert_reads(get_data, publisher, tmp_path, capsys):
    assert get_data.main([*publisher.names, "--out", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert visible(tmp_path) == {*report["files"], "data.lock.json"}
    assert not (tmp_path / ".get_data").exists()

    assert (tmp_path / "vocab-cased.txt").read_text() == "[UNK]\n"
    splits = read_sst2(tmp_path / "glue-sst-2.tar.xz")
    for part in ("train", "dev"):
        assert (splits[part].texts, splits[part].labels) == (["good "], ["positive"])
    assert members(tmp_path / "glue-rte.tar.xz") == {
        f"RTE/{part}.tsv": PAIRS for part in ("train", "dev", "test")
    }
    selected = "index\tsentence1\tsentence2\tgold_label\n0\tfirst\tsecond\tcontradiction\n"
    assert members(tmp_path / "glue-mnli.tar.xz") == {
        f"MNLI/{part}.tsv": selected for part in ("train", "dev_matched", "dev_mismatched")
    }
    assert members(tmp_path / "glue-mrpc.tar.xz") == {
        "MRPC/train.tsv": MRPC_HEADER + MRPC[0] + MRPC[2],
        "MRPC/dev.tsv": MRPC_HEADER + MRPC[1],
        "MRPC/test.tsv": MRPC_HEADER + MRPC[0],
    }
    assert members(tmp_path / "snips.tar.xz")["snips/train/seq.out"] == "1\n"
    assert len(members(tmp_path / "snips.tar.xz")) == 9

    famous = (tmp_path / "small-pd.txt").read_text().split("\n\n")
    titles = [*get_data.SMALL_BOOKS]
    expected = [f"{title}\n{SENTENCE}{title}" for title in titles]
    assert famous == [*expected, ""]
    books = lines_of(tmp_path / "books-train-00.txt.xz")
    kept = [n for n in range(9) if f"Book {n}" in books]
    assert 0 < len(kept) < 9
    assert books[:2] == [f"Book {kept[0]}", f"{SENTENCE}{kept[0]}."]
    assert "New" not in books


def test_wikipedia_becomes_four_parts_and_a_heldout_file(get_data, publisher, tmp_path, capsys):
    pytest.importorskip("pyarrow")
    assert get_data.main(["wiki", "--out", str(tmp_path)]) == 0
    files = [tmp_path / name for name in get_data.ITEMS["wiki"].files]
    documents = ["\n".join(lines_of(path)).split("\n\n")[:-1] for path in files]
    assert [len(part) for part in documents] == [77, 77, 77, 77, 2]
    assert documents[0][0].split("\n")[:2] == [
        "Title 0",
        "The 0-0th paragraph says something in a full sentence.",
    ]
    titles = [document.split("\n")[0] for part in documents for document in part]
    assert sorted(titles) == sorted(f"Title {n}" for n in range(310))
    assert not any("Heading" in document for part in documents for document in part)
    assert find_texts(files).files == files


def test_a_download_that_is_cut_off_continues_where_it_was(get_data, publisher, tmp_path, capsys):
    publisher.cut.add("/sst-2/0")
    assert get_data.main(["sst-2", "--out", str(tmp_path)]) == 0
    half = len(publisher.files["/sst-2/0"]) // 2
    assert publisher.requests == [("/sst-2/0", ""), ("/sst-2/0", f"bytes={half}-")]
    assert read_sst2(tmp_path / "glue-sst-2.tar.xz")["train"].texts == ["good "]


def test_a_later_command_continues_what_an_earlier_one_left(get_data, publisher, tmp_path, capsys):
    content = publisher.files.pop("/sst-2/0")
    assert get_data.main(["sst-2", "--out", str(tmp_path)]) == 2
    (tmp_path / ".get_data" / "sst-2.0.part").write_bytes(content[:100])
    publisher.files["/sst-2/0"] = content
    assert get_data.main(["sst-2", "--out", str(tmp_path)]) == 0
    assert publisher.requests[-1] == ("/sst-2/0", "bytes=100-")


def test_a_part_that_is_the_whole_file_is_fetched_again(get_data, publisher, tmp_path, capsys):
    work = tmp_path / ".get_data"
    work.mkdir()
    (work / "sst-2.0.part").write_bytes(publisher.files["/sst-2/0"])
    assert get_data.main(["sst-2", "--out", str(tmp_path)]) == 0
    assert publisher.requests[-1] == ("/sst-2/0", "")


def test_a_download_without_a_fixed_hash_starts_again_instead_of_being_pieced_together(
    get_data, publisher, tmp_path, capsys
):
    publisher.cut.add("/books/0")
    assert get_data.main(["books", "--out", str(tmp_path)]) == 0
    assert publisher.requests == [("/books/0", ""), ("/books/0", "")]


def test_what_is_there_is_checked_and_not_downloaded_again(get_data, publisher, tmp_path, capsys):
    assert get_data.main(["sst-2", "--out", str(tmp_path)]) == 0
    asked = len(publisher.requests)
    assert get_data.main(["sst-2", "--out", str(tmp_path)]) == 0
    assert len(publisher.requests) == asked

    file = tmp_path / "glue-sst-2.tar.xz"
    recorded = json.loads((tmp_path / "data.lock.json").read_text())["files"][file.name]
    file.write_bytes(b"changed")
    assert get_data.main(["sst-2", "--out", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert str(file) in told
    assert recorded in told
    assert hashlib.sha256(b"changed").hexdigest() in told


def test_files_of_the_user_are_used_whole_or_not_at_all(get_data, publisher, tmp_path, capsys):
    (tmp_path / "glue-sst-2.tar.xz").write_bytes(b"mine")
    assert get_data.main(["sst-2", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "glue-sst-2.tar.xz").read_bytes() == b"mine"
    (tmp_path / "small-pd.txt").write_bytes(b"mine")
    assert get_data.main(["books", "--out", str(tmp_path)]) == 2
    assert "small-pd.txt was not made by this script, and books-train-00" in capsys.readouterr().err
    assert not publisher.requests


@pytest.mark.parametrize("name", ["sst-2", "books"], ids=["committed hash", "recorded hash"])
def test_a_download_with_another_hash_is_refused(get_data, publisher, tmp_path, capsys, name):
    """Of the books, whose hash nobody fixes, the one recorded by the first download holds."""
    path = f"/{name}/0"
    expected = hashlib.sha256(publisher.files[path]).hexdigest()
    if name == "books":
        assert get_data.main([name, "--out", str(tmp_path)]) == 0
        for file in get_data.ITEMS[name].files:
            (tmp_path / file).unlink()
    before = visible(tmp_path)
    publisher.files[path] = b"something else"
    assert get_data.main([name, "--out", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert publisher.url + path in told
    assert expected in told
    assert hashlib.sha256(b"something else").hexdigest() in told
    assert visible(tmp_path) == before
    assert not [*(tmp_path / ".get_data").iterdir()]


def test_a_missing_server_is_one_sentence_and_exit_code_2(get_data, publisher, tmp_path, capsys):
    source = get_data.Source("http://127.0.0.1:1/gone.zip", 1, "0" * 64)
    get_data.ITEMS["sst-2"] = replace(get_data.ITEMS["sst-2"], sources=(source,))
    assert get_data.main(["sst-2", "--out", str(tmp_path)]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: http://127.0.0.1:1/gone.zip cannot be downloaded: ")
    assert not visible(tmp_path)


def test_a_file_that_the_server_lacks_is_named(get_data, publisher, tmp_path, capsys):
    del publisher.files["/snips/4"]
    assert get_data.main(["snips", "--out", str(tmp_path)]) == 2
    assert f"error: {publisher.url}/snips/4: HTTP 404" in capsys.readouterr().err
    assert visible(tmp_path) <= {"data.lock.json"}


def test_an_archive_that_lacks_a_file_is_refused_and_leaves_nothing(
    get_data, publisher, tmp_path, capsys
):
    content = zipped({"SST-2/train.tsv": "sentence\tlabel\n"})
    publisher.files["/sst-2/0"] = content
    source = replace(get_data.ITEMS["sst-2"].sources[0], sha256=hashlib.sha256(content).hexdigest())
    get_data.ITEMS["sst-2"] = replace(get_data.ITEMS["sst-2"], sources=(source,))
    assert get_data.main(["sst-2", "--out", str(tmp_path)]) == 2
    assert "SST-2/dev.tsv" in capsys.readouterr().err
    assert visible(tmp_path) <= {"data.lock.json"}


def test_an_interrupted_conversion_leaves_nothing_and_needs_no_second_download(
    get_data, publisher, tmp_path, capsys
):
    whole = get_data.ITEMS["sst-2"]

    def interrupted(downloads, folder):
        (folder / "glue-sst-2.tar.xz").write_bytes(b"half")
        raise KeyboardInterrupt

    get_data.ITEMS["sst-2"] = replace(whole, convert=interrupted)
    assert get_data.main(["sst-2", "--out", str(tmp_path)]) == 130
    assert visible(tmp_path) == {"data.lock.json"}
    get_data.ITEMS["sst-2"] = whole
    assert get_data.main(["sst-2", "--out", str(tmp_path)]) == 0
    assert len(publisher.requests) == 1
    assert read_sst2(tmp_path / "glue-sst-2.tar.xz")["train"].texts == ["good "]


def test_an_unknown_name_is_refused(get_data, tmp_path, capsys):
    assert get_data.main(["sst2", "--out", str(tmp_path)]) == 2
    assert "'sst2' is not one of vocab, sst-2, cola" in capsys.readouterr().err
    assert not visible(tmp_path)


def test_every_hash_is_whole_and_every_download_is_encrypted(get_data):
    for item in get_data.ITEMS.values():
        for source in item.sources:
            assert source.url.startswith("https://")
            assert len(source.sha256) == 64 or not source.sha256
    unhashed = [s for item in get_data.ITEMS.values() for s in item.sources if not s.sha256]
    assert len(unhashed) == 1


# ---- the paths -----------------------------------------------------------------------------------


def test_data_paths_lead_to_the_folder_that_is_set(tmp_path, monkeypatch):
    monkeypatch.setenv("MVBERT_DATA", str(tmp_path))
    (tmp_path / "a.txt").write_text("text\n")
    assert data_path("data:a.txt") == tmp_path / "a.txt"
    assert find_texts(["data:a.txt"]).files == [tmp_path / "a.txt"]
    assert data_path("a.txt").parts == ("a.txt",)


def test_a_missing_data_file_names_the_script_that_brings_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MVBERT_DATA", str(tmp_path))
    for read in (find_texts, lambda paths: read_sst2(paths[0])):
        with pytest.raises(InputError, match=r"gone\.txt does not exist.*get_data\.py"):
            read(["data:gone.txt"])


@pytest.mark.parametrize("layout", ["beside", "inside", "wheel"])
def test_without_a_setting_data_is_beside_the_clone_or_in_it(tmp_path, monkeypatch, layout):
    monkeypatch.delenv("MVBERT_DATA", raising=False)
    clone = tmp_path / "clone"
    (clone / "mvbert").mkdir(parents=True)
    monkeypatch.setattr("mvbert.files.__file__", str(clone / "mvbert" / "files.py"))
    if layout != "wheel":
        (clone / "pyproject.toml").write_text("")
    if layout == "beside":
        (tmp_path / "shared" / "data").mkdir(parents=True)
    expected = {
        "beside": tmp_path / "shared" / "data", "inside": clone / "data", "wheel": tmp_path / "data"
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert data_folder().absolute() == expected[layout]


def test_every_file_of_the_studies_is_one_that_get_data_makes(
    root, get_data, tmp_path, monkeypatch
):
    monkeypatch.setenv("MVBERT_DATA", str(tmp_path))
    studies = sorted((root / "docs" / "experiments").glob("*.toml"))
    assert studies
    made = {file for item in get_data.ITEMS.values() for file in item.files}
    for file in made:
        (tmp_path / file).write_text("text\n")
    for study in studies:
        config = load_toml(StudyConfig, study)
        data = [path for name in config.measure.tasks for path in config.task(name)[1]]
        for path in [*config.corpus.text, *config.corpus.heldout_text, *data]:
            assert path.startswith("data:"), f"{study.name}: {path}"
            assert data_path(path).name in made
