"""The whole job through the command line, on a tiny teacher and a page of text."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mvbert import cli, distill
from mvbert.config import DistillConfig
from mvbert.model import huggingface
from mvbert.text.tokenizer import WordPieceTokenizer
from mvbert.text.vocab import SPECIAL_PIECES, AddedPiece, Vocab
from mvbert.toml import load_toml
from mvbert.training import machine
from mvbert.training.budget import Cost
from mvbert.training.info import run_info

HEAD = """
out = "run"
minutes = 600
teacher = "teacher"
sentences = ["The [MASK] is cold."]
"""
ARMS = """
[arms.random]
start = "random"
[arms.paper]
[arms.distilled]
distill = ["hidden", "logits"]
"""


@pytest.fixture(scope="module")
def settings(job_tables) -> str:
    return HEAD + job_tables + ARMS


def mvbert(folder: Path, *args) -> subprocess.CompletedProcess:
    """Runs `python -m mvbert ARGS` in a folder."""
    command = [sys.executable, "-m", "mvbert", *map(str, args)]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )


def report_of(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def job(training_inputs, tmp_path_factory, settings) -> Path:
    """A folder with settings, text and a teacher."""
    folder = tmp_path_factory.mktemp("distill")
    shutil.copytree(training_inputs, folder, dirs_exist_ok=True)
    (folder / "job.toml").write_text(settings)
    return folder


@pytest.fixture(scope="module")
def whole(job) -> subprocess.CompletedProcess:
    """The job, done by one command."""
    return mvbert(job, "distill", "job.toml")


def test_one_command_makes_students_and_a_second_one_finds_them(job, whole, verb, monkeypatch):
    report = report_of(whole)
    for key in (
        "output", "student_parameters", "stage1_student_loss", "stage1_teacher_loss",
        "random_init_heldout_loss", "paper_heldout_loss", "distilled_heldout_loss", "seconds",
    ):  # fmt: skip
        assert key in report
    losses = {name: report["arms"][name]["loss"] for name in ("random", "paper", "distilled")}
    assert report["best"] == min(losses, key=losses.get)
    assert report["output"] == f"run/arms/{report['best']}/model"
    assert report["random_init_heldout_loss"] == losses["random"]
    assert f"{report['best']} (best)" in whole.stdout
    assert whole.stdout.count("(best)") == 1
    stage1 = run_info(job / "run" / "stage1")
    ends = [stage1[key]["student_loss"] for key in ("heldout_first", "heldout_last")]
    assert report["stage1_student_loss"] == ends
    assert ends[0] != ends[1]
    assert report["filled"][0]["student"].startswith("The [")
    for part in ("Stage I held-out loss", "distilled", "teacher"):
        assert part in whole.stdout

    student, missing = huggingface.load_masked_lm(job / report["output"], complete=True)
    assert missing == []
    assert student.config.encoder_parameters == report["student_parameters"]
    assert Vocab.load(job / report["output"]).size == 90

    monkeypatch.chdir(job)
    repeated, said = verb("distill", "job.toml")
    assert said.count("is complete") == 6  # corpus, vocabulary, Stage I, three arms
    assert {k: v for k, v in repeated.items() if k != "seconds"} == {
        k: v for k, v in report.items() if k != "seconds"
    }

    assert verb("info", "run/arms/paper")[0]["complete"] is True


@pytest.fixture
def budgeted(training_inputs, tmp_path, monkeypatch, verb, settings):
    """A function that runs the job with a budget of 800 minutes on a machine of a given speed."""
    shutil.copytree(training_inputs, tmp_path, dirs_exist_ok=True)
    settings = settings.replace("minutes = 600", "minutes = 800").replace("steps = 4", "steps = 10")
    (tmp_path / "job.toml").write_text(settings)
    monkeypatch.chdir(tmp_path)

    def run(seconds_a_step: float, *options) -> tuple[dict[str, int], str, int]:
        measured = []

        def measure(make, config, device) -> Cost:
            make()
            measured.append(config)
            return Cost(0.0, seconds_a_step, 0.0)

        monkeypatch.setattr(distill, "measure_cost", measure)
        _, said = verb("distill", "job.toml", *options)
        runs = run_info(Path("run"))["runs"]
        return {name: runs[name]["steps"] for name in runs}, said, len(measured)

    return run


RUNS = ("arms/distilled", "arms/paper", "arms/random", "stage1")


def test_a_slow_machine_makes_fewer_steps_the_same_for_all_students(budgeted):
    # 40 steps of 2,400 s are 1,600 minutes: 9/10 of the 800 are 45 % of them. (What the test itself
    # takes of the 800 must not count, on a slow machine either.)
    steps, said, measured = budgeted(2400.0)
    assert steps == dict.fromkeys(RUNS, 4)
    assert "all steps would take 1 d 3 h; 4" in said
    assert "left of 800 min: stage1 4, random 4, paper 4, distilled 4" in said
    assert measured == 4
    for options in ((), ("--minutes", 10000)):  # resumed: same decision, nothing is measured
        steps, said, measured = budgeted(0.001, *options)
        assert (steps, measured) == (dict.fromkeys(RUNS, 4), 0)
        assert said.count("is complete") == 6


def test_a_fast_machine_makes_all_steps(budgeted):
    steps, said, measured = budgeted(0.1)
    assert (steps, measured) == (dict.fromkeys(RUNS, 10), 4)
    assert "all steps take about" in said
    train = json.loads(Path("run/stage1/run.json").read_text())["description"]["train"]
    assert train["steps"] == 10


def test_the_budget_is_an_option_too(budgeted):
    steps, _, _ = budgeted(2400.0, "--minutes", 10000)
    assert steps == dict.fromkeys(RUNS, 10)


def test_all_runs_of_a_job_have_one_dtype(training_inputs, tmp_path, monkeypatch, verb, settings):
    shutil.copytree(training_inputs, tmp_path, dirs_exist_ok=True)
    (tmp_path / "job.toml").write_text(settings.replace('dtype = "float32"', ""))
    monkeypatch.chdir(tmp_path)
    found = iter([{torch.float32: 1e9, torch.bfloat16: 2e9}])
    monkeypatch.setattr(machine, "product_rates", lambda products, gradients: next(found))
    verb("distill", "job.toml")
    runs = run_info(Path("run"))["runs"]
    assert {runs[name]["environment"]["dtype"] for name in RUNS} == {"bfloat16"}


def test_the_steps_by_hand_are_the_same_as_the_whole(job, whole, verb, monkeypatch):
    report_of(whole)
    monkeypatch.chdir(job)
    rows = [
        "--row.length", 16, "--steps", 4, "--rows", 4, "--eval-rows", 4, "--threads", 1,
        "--dtype", "float32",
    ]  # fmt: skip
    verb("corpus", "text.txt", "-o", "hand/corpus", "--heldout-share", 0.2)
    vocab = ["vocab", "hand/corpus", "-o", "hand/v.txt", "--size", 90, "--teacher", "teacher"]
    assert verb(*vocab)[0]["output"] == "hand/v.txt"
    verb(
        "train", "--stage", 1, "--corpus", "hand/corpus", "--teacher", "teacher", "--student-vocab",
        "hand/v.txt", "-o", "hand/one", *rows, "--embedding-size", 64, "--dropout", 0.0,
    )  # fmt: skip
    verb(
        "train", "--stage=2", "--corpus", "hand/corpus", "--stage1", "hand/one", "-o", "hand/two",
        *rows, "--shape", "1x64", "--distill", "hidden", "logits",
    )  # fmt: skip
    for name in ("model.safetensors", "vocab.txt", "tokenizer.json", "config.json"):
        ours = (job / "hand" / "two" / "model" / name).read_bytes()
        assert ours == (job / "run" / "arms" / "distilled" / "model" / name).read_bytes(), name


def test_another_text_is_not_taken_for_the_first(job, whole, text, verb, refused, monkeypatch):
    report_of(whole)
    monkeypatch.chdir(job)
    (job / "other.txt").write_text(text.replace("river", "water") * 5)
    refused(["distill", "job.toml", "--text", "other.txt"], "other settings (corpus.text")
    _, said = verb("distill", "job.toml")  # and nothing of the first was touched
    assert said.count("is complete") == 6


def test_the_demo_trains_three_students_with_the_same_steps():
    config = load_toml(DistillConfig, cli.PRESETS / "demo.toml")
    assert list(config.arms) == ["random", "paper", "distilled"]
    assert config.vocab.size == 4928
    assert config.arm("paper").distill == ()
    assert config.arm("distilled").distill == ("relations",)
    assert {config.arm(name).steps for name in config.arms} == {config.stage2.steps}


@pytest.mark.parametrize("name", ["english", "english-cpu"])
def test_a_preset_wants_a_text(tmp_path, refused, name, monkeypatch):
    config = load_toml(DistillConfig, cli.PRESETS / f"{name}.toml")
    assert not config.corpus.text
    assert config.stage1.pieces < config.stage2.pieces
    monkeypatch.chdir(tmp_path)
    refused(["distill", "--preset", name, "-o", "out"], "no text to read: name files or folders")
    assert not (tmp_path / "out").exists()


def test_a_preset_trains_what_it_says_of_a_given_text_and_teacher(job, tmp_path, verb, monkeypatch):
    monkeypatch.chdir(job)
    small = (cli.PRESETS / "english-cpu.toml").read_text()
    for name, value in {"pieces": 512, "rows": 8, "size": 90, "length": 16, "eval_rows": 8}.items():
        small = re.sub(rf"(?m)^{name} = .*$", f"{name} = {value}", small)
    small = small.replace('"6x256"', '"1x64"').replace("[stage1]", "[stage1]\nembedding_size = 64")
    (tmp_path / "english-cpu.toml").write_text(
        small.replace("[stage2]", "[stage2]\nrelation_heads = 8")
    )
    monkeypatch.setattr(cli, "PRESETS", tmp_path)
    out = str(tmp_path / "out")
    verb(
        "distill",
        "--preset",
        "english-cpu",
        "--text",
        "text.txt",
        "--teacher",
        "teacher",
        "-o",
        out,
    )
    assert (tmp_path / "out/arms/student/model/config.json").is_file()


def test_settings_and_a_preset_are_not_given_together(job, refused, monkeypatch):
    monkeypatch.chdir(job)
    refused(["distill", "job.toml", "--preset", "english"], "not both")


def test_help_version_and_what_is_said_without_a_verb(tmp_path):
    for args in (("--help",), ("train", "--help"), ("train", "--stage", "2", "--help")):
        done = mvbert(tmp_path, *args)
        assert done.returncode == 0, done.stderr
        assert "usage" in done.stdout.lower()
    usage = mvbert(tmp_path, "--help").stdout
    train = mvbert(tmp_path, "train", "--help").stdout
    for stage, command in cli.TrainCommand.stages.items():
        assert f"--stage {stage}  {command.__doc__.splitlines()[0]}\n" in train
        assert f"Example: mvbert train --stage {stage} " in command.__doc__
    assert "mvbert train --stage 1 --help" in train
    for verb, command in cli.VERBS.items():
        assert f"  {verb:9} {command.__doc__.splitlines()[0]}\n" in usage
        assert verb == "train" or f"Example: mvbert {verb} " in command.__doc__
    assert mvbert(tmp_path, "--version").stdout.startswith("mvbert 0.")
    bare = mvbert(tmp_path)
    assert bare.returncode == 2
    assert "usage: mvbert VERB" in bare.stdout + bare.stderr


GERMAN = """\
Über den Öfen hängt die Übung, und ein Bär schläft neben der Tür im Haus.
Der Schüler lernt die Wörter der Sprache, indem er große Bücher liest.

Zwei Äpfel fallen auf die Straße, und der Müller hört es nicht.
"""


def test_accents_and_added_pieces_reach_the_student(
    tmp_path, verb, refused, write_teacher, settings
):
    """From a teacher that keeps accents and has added pieces to a folder transformers opens."""
    transformers = pytest.importorskip("transformers")
    letters = sorted(set(GERMAN.lower()) - {" ", "\n"})
    words = (*SPECIAL_PIECES, *letters, *("##" + c for c in letters), "der", "die", "über")
    added = (AddedPiece("<ent>"), AddedPiece("Covid", normalized=True, special=False))
    vocab = Vocab(
        (*words, "<ent>", "Covid"), strip_accents=False, added=added, base_size=len(words)
    )
    write_teacher(tmp_path / "teacher", vocab)
    (tmp_path / "text.txt").write_text(GERMAN * 6)
    settings = settings.replace(ARMS, "[arms.paper]\n")
    for old, new in [
        ("size = 90", "size = 80"),
        ('out = "run"', f'out = "{tmp_path}/run"'),
        ('"teacher"', f'"{tmp_path}/teacher"'),
        ('"text.txt"', f'"{tmp_path}/text.txt"'),
    ]:
        settings = settings.replace(old, new)
    (tmp_path / "job.toml").write_text(settings)
    report, _ = verb("distill", tmp_path / "job.toml")

    pieces = (tmp_path / "run" / "student" / "vocab.txt").read_text().splitlines()
    assert len(pieces) == 80
    assert pieces[:7] == [*SPECIAL_PIECES, "<ent>", "Covid"]
    assert "ü" in pieces
    folder = Path(report["output"])
    ours = WordPieceTokenizer.from_pretrained(folder)
    assert not ours.vocab.strip_accents
    assert ours.vocab.added == added
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("Über <ent> die COVID-Tür", "x<ent>y covid [MASK]"):
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert {5, 6} <= set(ours.encode(text))
    shape, stage1 = huggingface.read_shape(tmp_path / "run" / "stage1" / "model")
    assert stage1 == vocab
    assert shape.vocab_size == len(words) + 2
    model, missing = huggingface.load_masked_lm(folder, complete=True)
    assert not missing
    assert model.config.vocab_size == 80

    # A corpus without accents is another text.
    verb("corpus", tmp_path / "text.txt", "-o", tmp_path / "plain")
    command = [
        "vocab",
        tmp_path / "plain",
        "-o",
        tmp_path / "v.txt",
        "--teacher",
        tmp_path / "teacher",
    ]
    refused(command, "uncased with accents but the corpus", "--keep-accents")


def test_a_cased_teacher_whose_folder_does_not_say_so(tmp_path, verb, refused, training_inputs):
    """It is read as transformers reads it, with a warning; --cased reads it as cased."""
    teacher = shutil.copytree(training_inputs / "teacher", tmp_path / "teacher")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (teacher / name).unlink()
    pieces = (teacher / "vocab.txt").read_text().splitlines()
    changed = [p.capitalize() if len(p) > 3 and p.isalpha() else p for p in pieces]
    (teacher / "vocab.txt").write_text("\n".join(changed) + "\n")
    count = sum(a != b for a, b in zip(pieces, changed, strict=True))
    assert count > 5
    train = ["--row.length", 16, "--steps", 1, "--rows", 2, "--eval-rows", 2, "--threads", 1,
             "--embedding-size", 64, "--device", "cpu", "--dtype", "float32"]  # fmt: skip
    corpus = training_inputs / "corpus"
    shutil.copy(training_inputs / "stage1" / "student_vocab.txt", tmp_path / "student.txt")
    command = ["train", "--stage", 1, "--corpus", corpus, "--teacher", teacher, "--student-vocab"]
    command += [tmp_path / "student.txt", *train, "-o", tmp_path / "run"]
    _, said = verb(*command)
    assert f"assumed uncased, as no file in its folder says: {count} of its" in said
    refused([*command[:-1], tmp_path / "other", "--cased"], "is cased but the corpus", "is uncased")

    cased = tmp_path / "cased"
    verb("corpus", training_inputs / "text.txt", "-o", cased, "--cased", "--heldout-share", 0.2)
    command[4], command[-1] = cased, tmp_path / "cased-run"
    refused(command, "assumed uncased but the corpus", "or read the vocabulary with --cased")
    _, said = verb(*command, "--cased")
    assert "assumed" not in said
    tokenizer = json.loads((tmp_path / "cased-run" / "model" / "tokenizer_config.json").read_text())
    assert tokenizer["do_lower_case"] is False
    verb("vocab", cased, "-o", tmp_path / "v.txt", "--size", 110, "--teacher", teacher, "--cased")
    rows = ["--row.length", 16, "--eval-rows", 4, "--device", "cpu", "--words", 5]
    verb("eval", teacher, "--corpus", cased, "--cased", *rows)
    verb("export", teacher, "-o", tmp_path / "out", "--corpus", cased, "--cased")


def test_a_cased_student_vocabulary_under_an_uncased_teacher_is_warned_of(
    tmp_path, verb, refused, training_inputs
):
    pieces = (training_inputs / "stage1" / "student_vocab.txt").read_text().splitlines()
    (tmp_path / "student.txt").write_text("\n".join([*pieces, "The", "Über"]) + "\n")
    command = [
        "train", "--stage", 1, "--corpus", training_inputs / "corpus", "--teacher",
        training_inputs / "teacher", "--student-vocab", tmp_path / "student.txt", "--steps", 1,
        "--row.length", 16, "--rows", 2, "--eval-rows", 2, "--threads", 1, "--device", "cpu",
        "--embedding-size", 64, "--dtype", "float32", "-o", tmp_path / "run",
    ]  # fmt: skip
    _, said = verb(*command)
    warning = (
        "student.txt is assumed uncased, as no file in its folder says: "
        f"2 of its {len(pieces) + 2} pieces have capitals"
    )
    assert warning in said
    # What a file states is not read as the corpus is.
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"do_lower_case": False}))
    command[-1] = tmp_path / "other"
    wrong = f"the student's vocabulary {tmp_path / 'student.txt'} is cased but the corpus"
    refused(command, wrong, "is uncased")
    config.write_text(json.dumps({"strip_accents": False}))
    refused(command, "is assumed uncased with accents but the corpus", "is uncased")
    assert not (tmp_path / "other" / "run.json").exists()
