"""The whole job through the command line, on a tiny teacher and a page of text."""

import json

import pytest

from mvbert import huggingface
from mvbert.config import DistillConfig, ModelConfig, load_toml
from mvbert.model import MaskedLM
from mvbert.vocab import Vocab

SETTINGS = """
out = "run"
teacher = "teacher"
sentences = ["The [MASK] is cold."]
[corpus]
text = ["text.txt"]
heldout_share = 0.2
[vocab]
size = 90
[row]
length = 16
[stage1]
steps = 4
rows = 4
eval_rows = 4
embedding_size = 64
dropout = 0.0
threads = 1
[stage2]
shape = "1x64"
distill = []
steps = 4
rows = 4
eval_rows = 4
threads = 1
[arms.random]
start = "random"
[arms.paper]
[arms.distilled]
distill = ["hidden", "logits"]
"""


@pytest.fixture
def job(tmp_path, text, teacher_pieces):
    """A folder with settings, text and a teacher."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    vocab = Vocab(tuple(teacher_pieces))
    model = MaskedLM(ModelConfig(vocab.size, 32, 2, 2, 64, max_position_embeddings=20))
    model.init_weights(1)
    huggingface.write_model(folder, model, vocab, "")
    (tmp_path / "text.txt").write_text(text * 4)
    (tmp_path / "job.toml").write_text(SETTINGS)
    return tmp_path


def test_one_command_makes_students_and_a_second_one_finds_them(job, run_cli):
    first = run_cli("distill", "job.toml")
    assert first.returncode == 0, first.stderr
    report = json.loads(first.stdout.splitlines()[-1])
    for key in (
        "output", "student_parameters", "stage1_student_loss", "stage1_teacher_loss",
        "random_init_heldout_loss", "paper_heldout_loss", "distilled_heldout_loss", "seconds",
    ):  # fmt: skip
        assert key in report
    assert len(report["stage1_student_loss"]) == 2
    losses = {name: report["arms"][name]["loss"] for name in ("random", "paper", "distilled")}
    assert report["best"] == min(losses, key=losses.get)
    assert report["output"] == f"run/arms/{report['best']}/model"
    assert report["random_init_heldout_loss"] == losses["random"]
    assert report["filled"][0]["student"].startswith("The [")
    for part in ("Stage I, held-out loss", "distilled", "teacher"):
        assert part in first.stdout

    student, missing = huggingface.load_masked_lm(job / report["output"], complete=True)
    assert missing == []
    assert student.config.encoder_parameters == report["student_parameters"]
    assert Vocab.load(job / report["output"]).size == 90

    again = run_cli("distill", "job.toml")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("is complete") == 6  # corpus, vocabulary, Stage I, three arms
    repeated = json.loads(again.stdout.splitlines()[-1])
    assert {k: v for k, v in repeated.items() if k != "seconds"} == {
        k: v for k, v in report.items() if k != "seconds"
    }

    info = run_cli("info", "run/arms/paper")
    assert json.loads(info.stdout.splitlines()[-1])["complete"] is True


def test_the_steps_by_hand_are_the_same_as_the_whole(job, run_cli):
    whole = run_cli("distill", "job.toml")
    assert whole.returncode == 0, whole.stderr

    def run(*args):
        done = run_cli(*args)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    rows = ["--row.length", 16, "--steps", 4, "--rows", 4, "--eval-rows", 4, "--threads", 1]
    run("corpus", "text.txt", "-o", "corpus", "--heldout-share", 0.2)
    vocab = run("vocab", "corpus", "-o", "vocab.txt", "--size", 90, "--teacher", "teacher")
    assert vocab["output"] == "vocab.txt"
    run(
        "train", "--stage", 1, "--corpus", "corpus", "--teacher", "teacher", "--student-vocab",
        "vocab.txt", "-o", "one", *rows, "--embedding-size", 64, "--dropout", 0.0,
    )  # fmt: skip
    run(
        "train", "--stage=2", "--corpus", "corpus", "--stage1", "one", "-o", "two", *rows,
        "--shape", "1x64", "--distill", "hidden", "logits",
    )  # fmt: skip
    for name in ("model.safetensors", "vocab.txt", "tokenizer.json", "config.json"):
        ours = (job / "two" / "model" / name).read_bytes()
        assert ours == (job / "run" / "arms" / "distilled" / "model" / name).read_bytes(), name


def test_another_text_is_not_taken_for_the_first(job, run_cli, text):
    assert run_cli("distill", "job.toml").returncode == 0
    (job / "other.txt").write_text(text.replace("river", "water") * 5)
    other = run_cli("distill", "job.toml", "--text", "other.txt")
    assert other.returncode == 2
    assert "other settings (corpus.text" in other.stderr
    assert "Traceback" not in other.stderr
    again = run_cli("distill", "job.toml")  # and nothing of the first was touched
    assert again.stderr.count("is complete") == 6, again.stderr


def test_the_packaged_settings_are_valid():
    from mvbert.cli import DEMO

    config = load_toml(DistillConfig, DEMO)
    assert list(config.arms) == ["random", "paper", "distilled"]
    assert config.vocab.size == 4928
    assert config.arm("paper").distill == ()
    assert config.arm("distilled").distill == ("relations",)
    assert {config.arm(name).steps for name in config.arms} == {config.stage2.steps}


@pytest.mark.parametrize(
    ("args", "part"),
    [
        ((), "usage: mvbert VERB"),
        (("fly",), "unknown verb 'fly'"),
        (("train",), "needs --stage"),
        (("train", "--stage", "3"), "--stage must be 1 or 2"),
        (("distill", "nope.toml"), "nope.toml: no such file"),
        (("info", "nowhere"), "nowhere: no run.json"),
        (("vocab", "nowhere", "-o", "v.txt"), "nowhere"),
    ],
)
def test_wrong_arguments_are_named_in_a_sentence(run_cli, args, part):
    done = run_cli(*args)
    assert done.returncode == 2
    assert part in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_help_and_version(run_cli):
    for args in (("--help",), ("train", "--help"), ("train", "--stage", "2", "--help")):
        done = run_cli(*args)
        assert done.returncode == 0, done.stderr
        assert "usage" in done.stdout.lower()
    assert run_cli("--version").stdout.startswith("mvbert 0.")
