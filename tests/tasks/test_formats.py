"""Published formats are read as they are, and what is not in format is refused by file and line."""

import io
import sys
import tarfile
import types
import zipfile

import pytest

from mvbert.errors import InputError
from mvbert.tasks.formats import TASKS, find_task, read_examples, read_task
from mvbert.tasks.sources import File, read_table


def tar(path, **files):
    """An archive; in the names __ stands for / and _ for a dot."""
    with tarfile.open(path, "w") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name.replace("__", "/").replace("_", "."))
            data = text.encode()
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return str(folder)


# What GLUE ships, the first row of each, with the line breaks of Unicode that stand in sentences.
GLUE = {
    "sst-2": ("sentence\tlabel\na\u0085 b \t1\n", (["a\u0085 b "], None, ["positive"])),
    "cola": (
        "gj04\t0\t*\tThey drank the pub.\n",
        (["They drank the pub."], None, ["unacceptable"]),
    ),
    "mrpc": (
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\t" He said .\tHe "\r\n',
        (['" He said .'], ['He "'], ["equivalent"]),
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\ta?\tb?\t0\nbroken\trow\n",
        (["a?"], ["b?"], ["not_duplicate"]),
    ),
    "sts-b": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tm\tf\t2012\t1\tn\tn\ta\tb\t2.50\n",
        (["a"], ["b"], [2.5]),
    ),
    "mnli": (
        "index\tpromptID\tsentence1\tsentence2\tlabel1\tgold_label\n0\t1\ta\tb\tneutral\tneutral\n",
        (["a"], ["b"], ["neutral"]),
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel\n0\ta?\tb\tnot_entailment\n",
        (["a?"], ["b"], ["not_entailment"]),
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n",
        (["a"], ["b"], ["entailment"]),
    ),
    "wnli": ("index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n", (["a"], ["b"], ["entailment"])),
}


@pytest.mark.parametrize("name", GLUE)
def test_glue_as_it_ships(name, tmp_path):
    text, (texts, pairs, labels) = GLUE[name]
    folder = write(tmp_path / "data", train__tsv=text, dev__tsv=text, dev_ids__tsv="1\n")
    splits = read_task(find_task(name), [folder])
    assert {*splits} == {"train", "dev"}
    dev = splits["dev"]
    assert (dev.texts, dev.pairs, dev.labels, dev.tags) == (texts, pairs, labels, None)
    assert ("1 broken rows skipped" in dev.note) == (name == "qqp")


def test_every_task_of_glue_is_tested():
    assert {*GLUE} == {*TASKS} - {"intents", "slots", "joint", "tags", "classes", "number"}


def test_names_of_tasks_are_those_of_papers_and_of_programs():
    assert find_task("SST2").name == find_task("sst_2").name == "sst-2"
    assert find_task("stsb").name == find_task("STS-B").name == "sts-b"
    with pytest.raises(InputError, match="no task 'squad'; expected one of sst-2, cola"):
        find_task("squad")


def test_a_test_set_without_labels_is_left_out_and_both_of_mnli_are_read(tmp_path):
    head = "index\tsentence1\tsentence2"
    row = "0\ta\tb"
    folder = write(
        tmp_path / "MNLI",
        train_partial__tsv=f"{head}\tgold_label\n{row}\tneutral\n",
        dev_matched__tsv=f"{head}\tgold_label\n{row}\tneutral\n",
        dev_mismatched__tsv=f"{head}\tgold_label\n{row}\tentailment\n",
        test_matched__tsv=f"{head}\n{row}\n",
        diagnostic__tsv="x\ty\n",
    )
    splits = read_task(find_task("mnli"), [folder])
    assert {split: e.labels for split, e in splits.items()} == {
        "train": ["neutral"], "dev": ["neutral"], "dev_mismatched": ["entailment"]
    }  # fmt: skip


def test_a_folder_an_archive_a_zip_and_files_are_the_same(task_data, tmp_path):
    task = find_task("sst-2")
    splits = read_task(task, [str(task_data / "sst")])
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("train", "dev", "test"):
            archive.write(task_data / "sst" / f"{name}.tsv", f"SST-2/{name}.tsv")
            archive.writestr(f"SST-2/original/{name}.tsv", "another table of the same name\n")
    for where in (
        [str(task_data / "sst.tar.xz")],
        [str(tmp_path / "a.zip")],
        [str(task_data / "sst" / f"{name}.tsv") for name in ("train", "dev")],
    ):
        others = read_task(task, where)
        assert {*others} == {"train", "dev"}
        for split, examples in others.items():
            assert examples.texts == splits[split].texts
            assert examples.labels == splits[split].labels


def test_data_of_ones_own_in_every_format(tmp_path):
    csv = 'id,review,stars\n1,"good, ""very""\nso",1\n2,bad,0\n'
    tsv = 'id\treview\tstars\n1\tgood, "very"\t1\n'
    task = find_task("classes", "review", "", "stars")
    path = tmp_path / "x.csv"
    path.write_text(csv)
    (examples,) = read_examples(task, str(path)).values()
    assert examples.texts == ['good, "very"\nso', "bad"]
    assert examples.labels == ["1", "0"]
    path = tmp_path / "x.tsv"
    path.write_text(tsv)
    assert read_examples(task, str(path))["x"].texts == ['good, "very"']
    path = tmp_path / "x.jsonl"
    path.write_text('{"review": "a", "stars": 1}\n\n{"review": "b", "stars": true}\n')
    assert read_examples(task, str(path))["x"].labels == ["1", "1"]
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"review": ["a", "b"], "stars": [1, 2]}), path)
    assert read_examples(task, str(path))["x"].labels == ["1", "2"]


def test_snips_words_stand_between_spaces_and_lines_end_at_line_feeds(tmp_path):
    files = {
        "snips__train__seq_in": "\ufeffplay\u0085this \u2028 now\r\nfor\u00a0me \r\n\r\n",
        "snips__train__seq_out": "O B-x I-x\r\nB-y\r\n",
        "snips__train__label": "Play\nPlay",
    }
    where = tar(tmp_path / "snips.tar", **files)
    words = [["play\u0085this", "\u2028", "now"], ["for\u00a0me"]]
    joint = read_task(find_task("joint"), [where])["train"]
    assert joint.texts == words
    assert joint.tags == [["O", "B-x", "I-x"], ["B-y"]]
    assert joint.labels == ["Play", "Play"]
    slots = read_task(find_task("slots"), [where])["train"]
    assert (slots.texts, slots.labels) == (words, None)
    intents = read_task(find_task("intents"), [where])["train"]
    assert (intents.texts, intents.tags) == ([" ".join(w) for w in words], None)


def test_conll(tmp_path):
    path = tmp_path / "eng.testa"
    path.write_text(
        "-DOCSTART- -X- O O\n\n# sent_id = 1\nU.N. NNP I-NP B-ORG\n# # O O\n\n\nBlack\u00a0Sea\tO\n"
    )
    (tmp_path / "eng.train").write_text("a B-x\n")
    dev = read_task(find_task("tags"), [str(tmp_path)])["dev"]
    assert dev.texts == [["U.N.", "#"], ["Black\u00a0Sea"]]
    assert dev.tags == [["B-ORG", "O"], ["O"]]
    assert dev.places == [f"{path}:4", f"{path}:8"]


def test_tags_in_lists(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"tokens": ["a", "b"], "ner_tags": ["B-x", "O"]}\n')
    assert read_examples(find_task("tags"), str(path))["x"].tags == [["B-x", "O"]]


def test_names_of_hugging_faces_datasets(monkeypatch):
    class Rows(list):
        def __init__(self, rows):
            super().__init__(rows)
            names = ["not_equivalent", "equivalent"]
            self.column_names = [*rows[0]]
            self.features = {"label": types.SimpleNamespace(int2str=names.__getitem__)}

        def __getitem__(self, column):
            return [row[column] for row in self]

    def load(path, config):
        assert (path, config) == ("nyu-mll/glue", "mrpc")
        row = {"sentence1": "a", "sentence2": "b", "idx": 0}
        return {
            "train": Rows([{**row, "label": 1}]),
            "validation": Rows([{**row, "label": 0}]),
            "test": Rows([{**row, "label": -1}]),
        }

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    splits = read_task(find_task("mrpc"), ["datasets:nyu-mll/glue:mrpc"])
    assert {s: e.labels for s, e in splits.items()} == {
        "train": ["equivalent"],
        "dev": ["not_equivalent"],
    }
    assert splits["dev"].pairs == ["b"]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs datasets; run: pip install 'mvbert\[datasets\]'"):
        read_task(find_task("mrpc"), ["datasets:nyu-mll/glue:mrpc"])


@pytest.mark.parametrize(
    ("task", "name", "text", "message"),
    [
        ("sst-2", "x.tsv", "sentence\tlabel\na\n", r"x\.tsv:2: 1 columns, expected 2"),
        ("sst-2", "x.tsv", "text\tlabel\n", "no column sentence .text.; its columns: text, label"),
        ("sst-2", "x.txt", "a\n", r"expected one of \*\.tsv"),
        ("sts-b", "x.csv", "sentence1,sentence2,score\na,b,nan\n", ":2: the score is 'nan'"),
        ("sts-b", "x.csv", "sentence1,sentence2,score\na,b,x\n", ":2: the score is 'x'"),
        ("classes", "x.csv", "text\na\n", "no column label .label."),
        ("classes", "x.csv", 'text,label\n"a,1\n', "not CSV"),
        ("classes", "x.csv", "text,text\na,b\n", ":1: two columns have one name"),
        ("classes", "x.csv", "text,label\na,1\nb,\n", ":3: there is no label, though other rows"),
        ("classes", "x.jsonl", '{"text": 1, "label": "a"}', ":1: the text is 1, expected a string"),
        ("classes", "x.jsonl", '{"text": "a", "label": 0.5}', "take the task number"),
        ("classes", "x.jsonl", '{"text": "a", "label": 1}\n{"text": "a"}\n', ":2: not the fields"),
        ("classes", "x.jsonl", "[1]", ":1: expected a JSON object"),
        ("classes", "x.jsonl", '{"text": ', ":1: not JSON"),
        ("classes", "x.parquet", "PAR1", "not a complete .parquet"),
        ("tags", "x.txt", "word\n", ":1: expected a word and its tag, got 'word'"),
        ("tags", "x.jsonl", '{"tokens": ["a"], "tags": []}', ":1: 0 tags for 1 words"),
        ("tags", "x.jsonl", '{"tokens": "a", "tags": "O"}', ":1: expected a list of words"),
    ],
)
def test_what_is_not_in_format(task, name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_examples(find_task(task), str(tmp_path / name))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"seq_out": "O O\n"}, r"train/seq\.out:1: 2 tags for 1 words"),
        ({"seq_out": "O\nO\n"}, r"seq\.out has 2 lines, .*seq\.in 1"),
        ({"label": "A B\n"}, r"train/label:1: expected one intent"),
        ({"label": None}, "has no label, which joint needs"),
    ],
)
def test_intents_and_slots_that_do_not_fit(files, message, tmp_path):
    whole = {"seq_in": "word\n", "seq_out": "O\n", "label": "A\n"} | files
    parts = {f"a__train__{name}": text for name, text in whole.items() if text is not None}
    with pytest.raises(InputError, match=message):
        read_task(find_task("joint"), [tar(tmp_path / "x.tar", **parts)])


def test_folders_and_archives_that_hold_no_task(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_task(find_task("sst-2"), [str(tmp_path / "none")])
    (tmp_path / "cut.tar.xz").write_bytes(b"\xfd7zXZ\0\0\4")
    with pytest.raises(InputError, match="not a complete archive"):
        read_task(find_task("sst-2"), [str(tmp_path / "cut.tar.xz")])
    folder = write(tmp_path / "a", notes__tsv="a\n")
    with pytest.raises(InputError, match=r"called train, dev and test, got notes\.tsv"):
        read_task(find_task("sst-2"), [folder])
    folder = write(tmp_path / "b", train__tsv="a\n", train_2__tsv="a\n")
    with pytest.raises(InputError, match="several files of train"):
        read_task(find_task("sst-2"), [folder])
    with pytest.raises(InputError, match=r"seq\.in, seq\.out and label, which have no columns"):
        find_task("joint", "text")


def test_a_header_line_of_cola_is_none():
    task = find_task("cola")
    table = read_table(File("x", "test.tsv", b"index\tsentence\n0\ta\n"), task.header)
    assert table.columns == {"index": ["0"], "sentence": ["a"]}
