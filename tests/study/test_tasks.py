"""A toy study that fine-tunes: students, models that no arm trains, table and plots."""

import json
import random
import re
import shutil

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("seqeval")
pytest.importorskip("onnxruntime")
pytest.importorskip("matplotlib")

from mvbert import cli
from mvbert.errors import InputError
from mvbert.files import read_json_object
from mvbert.model import huggingface
from mvbert.study import task_report
from mvbert.study.settings import StudyConfig
from mvbert.tasks.finetune import run_finetune
from mvbert.text.vocab import Vocab
from mvbert.toml import load_toml

ARMS = """
eval_every = 4
[measure]
words = 0
export = true
[measure.finetune]
seeds = 2
epochs = [1]
batch = [16]
dtype = "float32"
device = "cpu"
threads = 1
[measure.tasks.polarity]
task = "sst-2"
data = ["sst"]
[measure.tasks.joint]
data = ["snips"]
epochs = [2]
[arms.teacher]
model = "teacher"
[arms.teacher.finetune]
lr = [1e-3]
[arms.trimmed]
model = "trimmed"
[arms.reader]
model = "stage1"
[arms.ours]
[arms.distilled.finetune]
teacher = "teacher"
[published."Somebody's"]
parameters = 14_500_000
source = "a paper, GLUE test"
[published."Somebody's".scores.polarity]
accuracy = 0.926
"""


@pytest.fixture
def settings(job_tables) -> str:
    return 'out = "study"\nteacher = "teacher"\nseeds = [0, 1]\n' + job_tables + ARMS


@pytest.fixture
def job(tmp_path, training_inputs, settings, monkeypatch):
    """A folder with settings, text, a teacher, and two tasks about one word in each sentence."""
    shutil.copytree(training_inputs, tmp_path, dirs_exist_ok=True)
    draw = random.Random(0)
    for split, count in (("train", 96), ("valid", 24), ("test", 24)):
        rows = [
            [*draw.choices(["the", "river", "of", "words"], k=draw.randint(1, 5)), word, "house"]
            for word in draw.choices(["great", "old"], k=count)
        ]
        folder = tmp_path / "snips" / split
        folder.mkdir(parents=True)
        (folder / "seq.in").write_text("".join(" ".join(row) + "\n" for row in rows))
        tags = [["B-x" if word == "great" else "O" for word in row] for row in rows]
        (folder / "seq.out").write_text("".join(" ".join(of) + "\n" for of in tags))
        good = [int("great" in row) for row in rows]
        (folder / "label").write_text("".join(("Bad\n", "Good\n")[of] for of in good))
        if split != "test":  # GLUE's has no labels
            lines = [f"{' '.join(row)}\t{of}\n" for row, of in zip(rows, good, strict=True)]
            (tmp_path / "sst").mkdir(exist_ok=True)
            name = {"valid": "dev"}.get(split, split)
            (tmp_path / "sst" / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(lines))
    (tmp_path / "study.toml").write_text(settings)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_study_fine_tunes_every_model_and_is_resumed(job, monkeypatch):
    report = cli.parse(["study", "study.toml"]).run()
    out = job / "study"
    lines = [json.loads(line) for line in (out / "models.jsonl").read_text().splitlines()]
    assert [(line["arm"], line["seed"]) for line in lines] == [
        ("teacher", None), ("trimmed", None), ("reader", None),
        ("ours", 0), ("ours", 1), ("distilled", 0), ("distilled", 1),
    ]  # fmt: skip
    by = {line["arm"]: line for line in lines}
    teacher = huggingface.read_model_config(job / "teacher")
    assert by["teacher"]["parameters"] == teacher.encoder_parameters
    assert by["teacher"]["vocab"] == teacher.vocab_size
    # The same encoder with the student's pieces: by rows of 32 smaller.
    fewer = (teacher.vocab_size - 90) * teacher.hidden_size
    for arm in ("trimmed", "reader"):
        assert by[arm]["vocab"] == 90
        assert by[arm]["parameters"] == teacher.encoder_parameters - fewer
    student = Vocab.load(out / "runs" / "ours" / "0" / "model")
    assert Vocab.load(next((out / "readers").iterdir())).pieces == student.pieces
    assert all(line["int8_bytes"] < line["float16_bytes"] for line in lines)
    assert all(line["float32_milliseconds"] > 0 for line in lines)

    # One student, fine-tuned in two ways: pre-trained once, exported once.
    assert sorted(p.name for p in (out / "runs").iterdir()) == ["ours"]
    names = sorted(p.name for p in (out / "exports").iterdir())
    assert names == ["ours.json", "reader.json", "teacher.json", "trimmed.json"]
    facts = read_json_object(out / "tuned" / "distilled" / "1" / "joint" / "finetune.json")
    assert facts["description"]["teacher"]
    assert facts["description"]["epochs"] == [2]
    assert by["distilled"]["tasks"]["joint"]["scores"] != by["ours"]["tasks"]["joint"]["scores"]
    assert by["teacher"]["tasks"]["polarity"]["setting"]["lr"] == 1e-3

    # The test set where it has labels, the dev set elsewhere; medians over both kinds of seeds.
    joint = [line["tasks"]["joint"]["scores"]["test"] for line in lines if line["arm"] == "ours"]
    every = sorted(s for of in joint for s in of["slot_f1"]["seeds"])
    assert len(every) == 4
    assert report["tasks"]["ours"]["joint"]["slot_f1"] == pytest.approx(
        (every[1] + every[2]) / 2, abs=1e-5
    )
    assert {*report["tasks"]["ours"]["joint"]} == {
        "intent_accuracy", "slot_f1", "sentence_accuracy"
    }  # fmt: skip
    table = (out / "tasks.md").read_text()
    assert "| polarity accuracy (dev) | joint intent accuracy (test) |" in table
    assert re.search(
        r"^\| teacher \| 1 x 2 \| [\d,]+ \| [\d,]+ \| [\d.]+ \| [\d.]+ \|", table, re.M
    )
    assert re.search(r"^\| ours \| 2 x 2 \| 90 \|", table, re.M)
    assert "| Somebody's | 14,500,000 | 92.6 |  |  |  | a paper, GLUE test |" in table
    assert "Training examples: polarity 96, joint 96." in table

    for axis in ("bytes", "latency"):
        drawn = (out / f"scores-{axis}.svg").read_text()
        assert drawn.count(">Somebody") == 1
        assert drawn.count(">distilled<") == 1

    # What fine-tuning keeps of a run that is not done is no run for `mvbert info`.
    kept = out / "tuned" / "ours" / "0" / "polarity" / ".best"
    kept.mkdir()
    (kept / "run.json").write_text("{}")
    assert len(cli.parse(["info", "study"]).run()["runs"]) == 3
    shutil.rmtree(kept)

    # The same command runs nothing again.
    monkeypatch.setattr("mvbert.tasks.loop.Trainer.fit", None)
    monkeypatch.setattr("mvbert.study.tuning.run_export", None)
    again = cli.parse(["study", "study.toml"]).run()
    assert {**again, "seconds": 0} == {**report, "seconds": 0}
    assert (out / "tasks.md").read_text() == table
    part = cli.parse(["study", "study.toml", "--arms", "distilled", "--tasks", "joint"]).run()
    assert [*part["tasks"]] == ["distilled"]
    assert [*part["tasks"]["distilled"]] == ["joint"]


def test_the_same_code_as_finetune_does_it(job):
    cli.parse(["study", "study.toml", "--arms", "trimmed", "--tasks", "polarity"]).run()
    tuned = job / "study" / "tuned" / "trimmed" / "polarity"
    config = load_toml(StudyConfig, job / "study.toml").tuning("trimmed", "polarity")
    model = next((job / "study" / "trimmed").iterdir())
    alone = run_finetune(str(model), "sst-2", ["sst"], job / "alone", config)
    assert read_json_object(tuned / "finetune.json")["result"]["dev"] == alone.scores["dev"]


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ('model = "stage1"', 'model = "stage3"', "arms.reader.model must be one of student"),
        ('task = "sst-2"', 'task = "sst-3"', "measure.tasks.polarity: no task 'sst-3'"),
        ('data = ["sst"]', "data = []", "measure.tasks.polarity.data is empty"),
        ('data = ["sst"]', 'data = "sst"', "measure.tasks.polarity.data must be a list"),
        ("lr = [1e-3]", "rate = 1", "arms.teacher on polarity: unknown key 'rate'"),
        ('teacher = "teacher"\n[pub', 'teacher = "master"\n[pub', "'master' is not one of the"),
        ("lr = [1e-3]", 'teacher = "ours"', "the arm 'teacher' has a teacher as well"),
        ('data = ["sst"]', 'data = ["sst"]\nteacher = "ours"', "'ours' has a teacher as well"),
        ("seeds = [0, 1]", 'seeds = [0, 1]\nchosen = ["our"]', "'our' is not one of the arms"),
        ("[measure.finetune]", '[measure.finetune]\nteacher = "ours"', "a setting of an arm"),
        ("parameters = 14_500_000", "parameters = 0", "published.Somebody's: a published model"),
        ("accuracy = 0.926", "accuracy = 92.6", "scores.polarity.accuracy must be a number from 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, settings, old, new, part):
    assert old in settings
    (tmp_path / "study.toml").write_text(settings.replace(old, new))
    with pytest.raises(InputError, match=re.escape(part)):
        load_toml(StudyConfig, tmp_path / "study.toml")


def test_an_arm_without_a_student_needs_a_task(tmp_path, job_tables):
    text = job_tables + '[arms.a]\n[arms.b]\nmodel = "teacher"\n'
    (tmp_path / "study.toml").write_text(text)
    with pytest.raises(InputError, match=r"arms.b has nothing to be fine-tuned on"):
        load_toml(StudyConfig, tmp_path / "study.toml")


def test_missing_data_of_a_task_is_found_before_anything_is_trained(job):
    shutil.rmtree(job / "snips")
    with pytest.raises(InputError, match="snips does not exist"):
        cli.parse(["study", "study.toml"]).run()
    assert not (job / "study").exists()


def test_the_mismatched_set_has_a_column_of_its_own():
    def spread(*values):
        return {"accuracy": {"seeds": [*values]}}

    scores = {"dev": spread(0.8, 0.7, 0.75), "dev_mismatched": spread(0.6)}
    result = {"task": "mnli", "setting": {}, "examples": {"train": 9}, "scores": scores}
    lines = [{"arm": "a", "seed": 0, "tasks": {"mnli": result}}]
    arms = {"a": lines}
    chosen = task_report.columns(arms)
    assert chosen == [("mnli", "accuracy"), ("mnli", "accuracy_mismatched")]
    assert [task_report.values_of(lines, c) for c in chosen] == [[0.8, 0.7, 0.75], [0.6]]
