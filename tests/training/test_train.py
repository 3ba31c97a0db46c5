"""The loop: it learns, it resumes bit for bit, it refuses what does not fit."""

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mvbert import cli
from mvbert.config import RowConfig, Stage1Config, Stage2Config
from mvbert.errors import InputError, Interrupted, MissingExtra, OutOfTime
from mvbert.model import huggingface
from mvbert.model.masked_lm import DeviceBatch
from mvbert.model.weights import read_tensors
from mvbert.progress import Progress
from mvbert.text.batches import Rows
from mvbert.toml import to_dict
from mvbert.training import checkpoint, device, info, runs, train
from mvbert.training.device import Device
from mvbert.training.optim import learning_rate
from mvbert.training.stages import Stage1, Stage2, load_stage1
from mvbert.training.step import dropout_seed

ROW = RowConfig(length=16)
CPU = Device(torch.device("cpu"), None, "as set")
SMALL = {
    "steps": 6, "rows": 4, "eval_rows": 4, "eval_every": 3, "save_every": 2, "log_every": 2,
    "dtype": "float32", "threads": 1, "lr": 1e-3,
}  # fmt: skip
STAGE1 = Stage1Config(**SMALL, embedding_size=64, dropout=0.1)
STAGE2 = Stage2Config(**SMALL, shape="1x64", dropout=0.1, distill=(), relation_heads=8)


@pytest.fixture(scope="module")
def teacher(training_inputs) -> Path:
    return training_inputs / "teacher"


@pytest.fixture(scope="module")
def stage1_model(training_inputs) -> Path:
    return training_inputs / "stage1"


class Quiet(Progress):
    """Collects what it would print; may be told to do something after a step."""

    def __init__(self, after: dict | None = None) -> None:
        super().__init__("test")
        self.notes: list[str] = []
        self.after = after or {}

    def note(self, text: str) -> None:
        self.notes.append(text)

    def advance(self, step: int) -> None:
        self.after.pop(step, lambda: None)()


@pytest.fixture
def stage1(corpus, teacher, student_vocab):
    """A function that runs Stage I in a folder."""

    def run(out: Path, config: Stage1Config = STAGE1, after: dict | None = None):
        progress = Quiet(after)
        task = Stage1(config, ROW, corpus, teacher, student_vocab, progress)
        report = train.train(task, config, CPU, out, describe(config), progress)
        return task, report, progress

    return run


@pytest.fixture
def stage2(corpus, stage1_model):
    """A function that runs Stage II in a folder."""

    def run(
        out: Path,
        config: Stage2Config = STAGE2,
        after: dict | None = None,
        description: dict | None = None,
        row: RowConfig = ROW,
        deadline: float | None = None,
    ):
        progress = Quiet(after)
        task = Stage2(config, row, corpus, load_stage1(stage1_model), CPU, progress)
        described = description or describe(config)
        report = train.train(task, config, CPU, out, described, progress, deadline)
        return task, report, progress

    return run


def describe(config) -> dict:
    return {"train": to_dict(config), "row": to_dict(ROW)}


# ---- it learns ------------------------------------------------------------------------------


def test_every_trained_parameter_moves_in_two_steps(
    stage1, tmp_path, corpus, teacher, student_vocab
):
    config = replace(STAGE1, steps=2)
    before = Stage1(config, ROW, corpus, teacher, student_vocab, Quiet()).model.state_dict()
    task, _, _ = stage1(tmp_path, config)
    after = task.model.state_dict()
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert still == ["pooler.weight", "pooler.bias"]


def test_a_page_of_text_is_learned(stage1, tmp_path):
    _, report, _ = stage1(
        tmp_path, replace(STAGE1, steps=60, eval_every=60, save_every=60, lr=3e-3, rows=8)
    )
    first, last = report.heldout_first, report.heldout_last
    for name in ("teacher_loss", "student_loss"):
        assert last[name] < first[name] - 0.5


def test_the_student_learns_to_predict(stage2, tmp_path):
    _, report, _ = stage2(
        tmp_path, replace(STAGE2, steps=40, eval_every=40, save_every=40, lr=3e-3)
    )
    assert report.heldout_last["loss"] < report.heldout_first["loss"] - 0.3


@pytest.mark.parametrize(
    "distill",
    [("logits",), ("hidden",), ("relations",), ("sentence",), ("logits", "hidden", "relations")],
)
def test_the_student_learns_what_the_teacher_says(stage2, tmp_path, distill, numbers):
    # Without its own loss, which pulls elsewhere: this teacher knows next to nothing.
    config = replace(
        STAGE2, steps=60, eval_every=60, save_every=60, log_every=20, lr=3e-3, distill=distill,
        mlm_weight=0.0,
    )  # fmt: skip
    task, _, _ = stage2(tmp_path, config)
    trained = [r for r in numbers(tmp_path) if "heldout" not in r]
    for name in distill:
        assert trained[-1][f"{name}_loss"] < 0.8 * trained[0][f"{name}_loss"]
    assert {f"{n}_loss" for n in distill} == {n for n in trained[0] if n.endswith("_loss")}
    for parameter in task.distillation.teacher.model.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad


def test_a_student_starts_from_the_stage_one_table(corpus, stage1_model):
    loaded = load_stage1(stage1_model)
    teacher, _ = loaded
    started = Stage2(STAGE2, ROW, corpus, loaded, CPU, Quiet()).model
    assert torch.equal(started.embeddings.word.weight, teacher.student.table)
    other = Stage2(replace(STAGE2, start="random"), ROW, corpus, loaded, CPU, Quiet()).model
    assert not torch.equal(other.embeddings.word.weight, teacher.student.table)
    # Only these differ (positions are as spread as the words are): the comparison is about them.
    told_apart = ("embeddings.word.weight", "embeddings.position.weight", "head.bias")
    for (name, a), b in zip(started.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) == (name not in told_apart), name


def test_a_student_is_continued_from_its_folder(stage2, corpus, stage1_model, tmp_path):
    before, report, _ = stage2(tmp_path / "first")
    config = replace(STAGE2, start=str(tmp_path / "first"))
    after = Stage2(config, ROW, corpus, load_stage1(stage1_model), CPU, Quiet())
    for (name, a), (_, b) in zip(
        before.model.named_parameters(), after.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    _, more, _ = stage2(tmp_path / "second", config)
    assert more.heldout_first["loss"] == report.heldout_last["loss"]


def test_a_student_of_another_shape_or_vocabulary_cannot_be_continued(
    stage2, corpus, stage1_model, tmp_path
):
    stage2(tmp_path / "first")
    loaded = load_stage1(stage1_model)
    start = str(tmp_path / "first")
    with pytest.raises(InputError, match="num_hidden_layers 1, not 2"):
        Stage2(replace(STAGE2, shape="2x64", start=start), ROW, corpus, loaded, CPU, Quiet())
    (tmp_path / "first/model/tokenizer.json").unlink()
    vocab = tmp_path / "first/model/vocab.txt"
    pieces = vocab.read_text().splitlines()
    pieces[-1], pieces[-2] = pieces[-2], pieces[-1]
    vocab.write_text("\n".join(pieces) + "\n")
    with pytest.raises(InputError, match="another vocabulary"):
        Stage2(replace(STAGE2, start=start), ROW, corpus, loaded, CPU, Quiet())


def test_a_student_of_another_width_cannot_start_from_stage_one(corpus, stage1_model):
    loaded = load_stage1(stage1_model)
    with pytest.raises(InputError, match="embedding_size 128, or choose start = random"):
        Stage2(replace(STAGE2, shape="1x128"), ROW, corpus, loaded, CPU, Quiet())


def test_rows_longer_than_the_positions_are_refused(corpus, teacher, student_vocab):
    with pytest.raises(InputError, match="rows of 33 pieces do not fit the model's 32 positions"):
        Stage1(STAGE1, RowConfig(length=33), corpus, teacher, student_vocab, Quiet())


def test_accumulated_micro_batches_give_the_whole_batch(stage2, tmp_path, assert_rounded):
    # A large eps, so that a step is about as wrong as its gradient: with a small one the last bit
    # of a gradient near 0 decides which way its parameter goes.
    whole = replace(
        STAGE2, dropout=0.0, distill=("logits", "hidden", "relations", "sentence"), rows=8, eps=1e-2
    )
    results = []
    for name, micro in (("a", 0), ("b", 2)):
        task, _, _ = stage2(tmp_path / name, replace(whole, micro_rows=micro))
        results.append(torch.nn.utils.parameters_to_vector(task.model.parameters()))
    # Gradients are summed over 8 rows of 16 pieces.
    assert_rounded(results[1], results[0].double(), longest_sum=8 * 16)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch.compile warns of itself
def test_compiled_layers_learn_what_eager_ones_do(stage1, tmp_path, numbers):
    """On a CPU with the same dropout, too."""
    curves = []
    for compiled in (False, True):
        stage1(tmp_path / str(compiled), replace(STAGE1, compile=compiled))
        curves.append([r.get("heldout", r)["loss"] for r in numbers(tmp_path / str(compiled))])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_warm_up_and_decay():
    config = Stage1Config(steps=100, warmup=0.1, final_lr=0.1, lr=1.0)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate(100, config) == pytest.approx(0.1)
    config = replace(config, cooldown=0.5)  # of the 90 steps after the warm-up
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[9] == rates[55] == pytest.approx(1.0)
    assert rates[56] < 1
    assert rates[78] == pytest.approx(0.1 + 0.9 * 22 / 45)
    assert rates[99] == pytest.approx(0.1 + 0.9 / 45)
    assert learning_rate(99, replace(config, cooldown=0.0)) == pytest.approx(1.0)


# ---- it resumes -----------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [1, 2, 4])  # the step after it is saved: off and on schedule
def test_a_stopped_run_goes_on_to_the_same_bits(stage1, tmp_path, stop_at, assert_same_run):
    stage1(tmp_path / "unbroken")
    broken = tmp_path / "broken"
    with pytest.raises(Interrupted, match="stopped at step"):
        stage1(
            broken,
            after={stop_at - 1: _terminate, stop_at: _terminate}
            if stop_at > 1
            else {1: _terminate},
        )
    assert not (broken / "model").exists()
    _, _, progress = stage1(broken)
    assert any("resuming from step-" in note for note in progress.notes)
    assert_same_run(broken, tmp_path / "unbroken")


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_distillation_resumes_to_the_same_bits(stage2, tmp_path, optimizer, assert_same_run):
    config = replace(
        STAGE2,
        distill=("hidden", "logits", "relations", "sentence"),
        hidden_layers=(0, 1),
        mlm_weight=0.2,
        logits_weight=0.5,
        optimizer=optimizer,
    )
    stage2(tmp_path / "unbroken", config)
    with pytest.raises(Interrupted):
        stage2(tmp_path / "broken", config, after={2: _terminate})
    stage2(tmp_path / "broken", config)
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken")


def test_run_json_records_each_resume(stage2, tmp_path, monkeypatch):
    description = {"stage": 2, **describe(STAGE2)}
    with pytest.raises(Interrupted):
        stage2(tmp_path, STAGE2, after={2: _terminate}, description=description)
    assert info.run_info(tmp_path)["resumed"] == []
    first = (tmp_path / "run.json").read_text()
    monkeypatch.setattr(sys, "argv", ["mvbert", "train", "--max-hours", "1"])
    with pytest.raises(Interrupted):
        stage2(tmp_path, STAGE2, after={4: _terminate}, description=description)
    stage2(tmp_path, STAGE2, description=description)
    again = {"command": "mvbert train --max-hours 1"}
    resumed = [{"step": 3, **again}, {"step": 5, **again}]
    assert info.run_info(tmp_path)["resumed"] == resumed
    run = json.loads((tmp_path / "run.json").read_text())
    assert run == {**json.loads(first), "resumed": resumed}  # how it began stays
    stage2(tmp_path, STAGE2, description=description)  # complete: nothing goes on
    assert info.run_info(tmp_path)["resumed"] == resumed


def test_steps_read_one_row_after_the_other(stage2, tmp_path, monkeypatch):
    read = []
    original = Rows.read

    def noted(self, start, count, **options):
        if options.get("out") is not None:
            read.append((self.T, start, count))
        return original(self, start, count, **options)

    monkeypatch.setattr(Rows, "read", noted)
    stage2(tmp_path)
    assert read == [(16, 4 * step, 4) for step in range(6)]


def test_a_damaged_checkpoint_is_named_and_passed_over(stage1, tmp_path, assert_same_run):
    stage1(tmp_path / "unbroken")
    broken = tmp_path / "broken"
    with pytest.raises(Interrupted):
        stage1(broken, after={4: _terminate})
    newest = broken / "checkpoints" / "step-00000005"
    assert newest.is_dir()
    data = bytearray((newest / "training.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "training.safetensors").write_bytes(bytes(data))
    emptied = broken / "checkpoints" / "step-00000007"
    shutil.copytree(newest, emptied)
    (emptied / "manifest.json").write_text('{"files": {}}')
    (broken / "checkpoints" / "step-00000009").mkdir()  # no manifest: never finished
    _, _, progress = stage1(broken)
    assert any("step-00000005" in n and "SHA-256" in n for n in progress.notes)
    assert any("step-00000007" in n and "does not list" in n for n in progress.notes)
    assert any("step-00000009" in n and "manifest.json" in n for n in progress.notes)
    assert any("resuming from step-00000004" in n for n in progress.notes)
    assert_same_run(broken, tmp_path / "unbroken")


def test_only_the_newest_checkpoints_are_kept(stage1, tmp_path):
    stage1(tmp_path)
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000006"]
    assert checkpoint.check_manifest(tmp_path / "model") is None


def test_a_damaged_later_checkpoint_does_not_push_out_whole_ones(stage1, tmp_path):
    config = replace(STAGE1, keep_last=2, keep_best=0)
    with pytest.raises(Interrupted):
        stage1(tmp_path, config, after={1: _terminate})
    for step in (3, 5):  # neither made again by a later save
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir()
    kept = []

    def look() -> None:
        kept.append(sorted(p.name[-1] for p in (tmp_path / "checkpoints").iterdir()))

    stage1(tmp_path, config, after={4: look, 6: look})
    assert kept == [["2", "4"], ["4", "6"]]


def test_a_signal_in_the_last_step_is_heard(stage1, tmp_path):
    with pytest.raises(Interrupted, match="is complete"):
        stage1(tmp_path, after={6: _terminate})
    assert train.finished(tmp_path, describe(STAGE1), STAGE1, ROW) is not None


def test_dropout_is_drawn_by_seed_step_and_rank():
    seeds = {
        dropout_seed(seed, step, rank)
        for seed in (0, 1, 2**32, 2**39)
        for step in range(9)
        for rank in range(2)
    }
    assert len(seeds) == 72
    for seed in seeds:
        torch.manual_seed(seed)  # within what the generator takes
    with pytest.raises(InputError, match=r"seed must lie in \[0, 2\^40\)"):
        Stage1Config(seed=2**40)


def test_a_finished_run_is_not_run_again(stage1, tmp_path):
    _, report, _ = stage1(tmp_path)
    assert train.finished(tmp_path, describe(STAGE1), STAGE1, ROW) == report
    (tmp_path / "model" / "vocab.txt").write_text("spoiled")
    assert train.finished(tmp_path, describe(STAGE1), STAGE1, ROW) is None


KILLER = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from mvbert.training import train
from mvbert.config import RowConfig, Stage2Config
from mvbert.toml import to_dict
from mvbert.text.corpus import Corpus
from mvbert.progress import Progress
from mvbert.training.device import Device
from mvbert.training.stages import Stage2, load_stage1

corpus, stage1, out = Corpus.open(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
kills = int(sys.argv[4])
CPU = Device(torch.device("cpu"), None, "as set")
row = RowConfig(length=16)
config = Stage2Config(
    steps=150, rows=4, eval_rows=4, eval_every=30, save_every=7, log_every=5, threads=1,
    dtype="float32", shape="1x64", dropout=0.1, distill=("logits", "hidden"),
)

def child():
    task = Stage2(config, row, corpus, load_stage1(stage1), CPU, Progress("child"))
    description = {"train": to_dict(config), "row": to_dict(row)}
    train.train(task, config, CPU, out, description, Progress("child"))

random.seed(0)
done = 0
while True:
    pid = os.fork()
    if pid == 0:
        os.close(2)
        os.open(os.devnull, os.O_WRONLY)
        child()
        os._exit(0)
    if done < kills:
        # From before the first checkpoint to somewhere in the steps after a resume.
        time.sleep(random.uniform(0.02, 1.2))
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        done += 1
        continue
    if status:
        sys.exit("the run failed by itself")
    print(done)
    sys.exit(0)
"""


@pytest.mark.slow
def test_twenty_random_kills_leave_the_same_bits(corpus, stage1_model, tmp_path, assert_same_run):
    for name, kills in (("unbroken", 0), ("killed", 25)):
        folders = [corpus.folder, stage1_model, tmp_path / name]
        done = subprocess.run(
            [sys.executable, "-c", KILLER, *map(str, folders), str(kills)],
            capture_output=True,
            text=True,
            timeout=600,
            check=True,
        )
        assert int(done.stdout) >= min(kills, 20)
    assert_same_run(tmp_path / "killed", tmp_path / "unbroken")


def test_tensorboard_gets_the_same_numbers(stage2, tmp_path, numbers):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stage2(tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for prefix, records in (("train", "loss"), ("heldout", "heldout")):
        logged = [r for r in numbers(tmp_path) if ("heldout" in r) == (records == "heldout")]
        told = {e.step: e.value for e in events.Scalars(f"{prefix}/loss")}
        assert told.keys() == {r["step"] for r in logged}
        for r in logged:
            loss = r["heldout"]["loss"] if records == "heldout" else r["loss"]
            assert told[r["step"]] == pytest.approx(loss)


def test_a_disk_filled_by_tensorboard_is_told_in_a_sentence(tmp_path, monkeypatch):
    """Its thread meets the error, a later call raises it."""
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(log: runs.Log) -> None:
        for step in range(40):
            log.write({"step": step, "pieces": 0, "loss": 1.0})
            log.flush()

    with runs.Log(tmp_path / "log.jsonl", -1) as log:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
        try:
            with pytest.raises(InputError, match=r"cannot write .*log\.jsonl"):
                fill(log)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "log.jsonl").stat().st_size < 2048  # it was not the log itself


# ---- it tells -------------------------------------------------------------------------------


def test_a_run_folder_explains_itself(stage2, tmp_path, numbers):
    config = replace(STAGE2, log_every=1)
    stage2(tmp_path, config, description={"stage": 2, **describe(config)})
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["description"]["train"]["lr"] == 1e-3
    for fact in ("mvbert", "commit", "command", "python", "torch", "device", "dtype", "processor"):
        assert fact in run["environment"], fact
    result = info.run_info(tmp_path)
    assert result["complete"]
    assert result["step"] == result["steps"] == 6
    heldout = [record["heldout"] for record in numbers(tmp_path) if "heldout" in record]
    assert (result["heldout_first"], result["heldout_last"]) == (heldout[0], heldout[-1])
    assert heldout[0] != heldout[-1]
    assert result["best_checkpoint"].startswith("step-")
    line = result["last"]
    assert line["pieces_per_second"] > 0
    assert 0 < line["mfu"] < 2  # a peak measured on a busy machine may be passed
    assert 0 <= line["data_wait"] <= 1


def test_info_in_every_state_of_a_run(tmp_path):
    run = tmp_path / "job" / "stage1"
    run.mkdir(parents=True)
    with pytest.raises(InputError, match=r"no run\.json"):
        info.run_info(tmp_path)
    described = {"description": {"stage": 1, "train": {"steps": 9}}, "environment": {}}
    (run / "run.json").write_text(json.dumps(described))
    assert info.run_info(run)["step"] == 0  # started, nothing logged yet
    line = b'{"step": 5, "pieces": 80, "loss": 2.0}\n'
    (run / "log.jsonl").write_bytes(line + b'{"step": 6, "pie')  # and killed
    assert info.run_info(run)["last"]["loss"] == 2.0
    assert info.run_info(tmp_path)["runs"]["job/stage1"]["step"] == 5
    (run / "log.jsonl").write_bytes(line + b'7\n\xff\x00\n{"step": 6, "pie')
    with pytest.raises(InputError, match=r"log\.jsonl is corrupt at line 2"):
        info.run_info(run)
    with runs.Log(run / "log.jsonl", 5):  # goes on
        assert (run / "log.jsonl").read_bytes() == line
    (run / "run.json").write_text("{}")
    with pytest.raises(InputError, match="does not describe a run"):
        info.run_info(run)


def test_a_log_that_lacks_what_was_saved_is_refused(stage2, tmp_path, refused):
    stage2(tmp_path, description={"stage": 2, **describe(STAGE2)})
    log = tmp_path / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    for left in (b"", lines[0][:-9], b"".join(lines[:-1])[:-9], b"".join(lines[:1])):
        log.write_bytes(left)
        refused(["info", tmp_path], f"{log} is corrupt: it has no record of step 6, after which")
    shutil.rmtree(tmp_path / "checkpoints")  # a user may: the model is there
    log.write_bytes(b"")
    refused(["info", tmp_path], "it has no record of step 0, after which the model was written")
    log.write_bytes(b"".join(lines))
    assert info.run_info(tmp_path)["complete"]


def test_loss_curves_are_drawn(stage2, tmp_path):
    pytest.importorskip("matplotlib")
    stage2(tmp_path / "run", description={"stage": 2, **describe(STAGE2)})
    assert cli.main(["info", str(tmp_path / "run"), "--plot", str(tmp_path / "loss.png")]) == 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "run" / "log.jsonl").write_text("")
    with pytest.raises(InputError, match="no losses to plot yet"):
        info.plot_run(tmp_path / "run", tmp_path / "loss.png")


def test_without_matplotlib_the_error_says_what_to_install(stage2, tmp_path, monkeypatch):
    stage2(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"pip install 'mvbert\[study\]'"):
        info.plot_run(tmp_path, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


# ---- it stops -------------------------------------------------------------------------------


def test_a_number_of_pieces_is_a_number_of_steps(stage2, tmp_path):
    config = replace(STAGE2, pieces=4 * 16 * 4 + 1).counted(ROW.length)
    assert config.steps == 5  # the last one is not cut
    _, report, _ = stage2(tmp_path, config)
    assert report.steps == 5
    assert report.pieces == 5 * 4 * 16
    assert STAGE2.counted(ROW.length) == STAGE2


def test_a_deadline_saves_and_ends(stage2, tmp_path, monkeypatch, assert_same_run):
    stage2(tmp_path / "unbroken")
    hours = replace(STAGE2, max_hours=1.0)
    assert hours.described() == STAGE2.described()  # another limit is the same run
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(train, "time", clock)
    # An hour of its own from the call on; what is left of the hour of the command.
    for name, deadline, left in (("own", None, 3600), ("shared", 5010.0, 10)):
        out, clock.now = tmp_path / name, 5000.0
        pass_time = partial(setattr, clock, "now", 5000.0 + left)
        with pytest.raises(OutOfTime, match="time limit of 1 h reached at step 4") as over:
            stage2(
                out, hours, after={3: pass_time}, description=STAGE2.described(), deadline=deadline
            )
        assert over.value.step == 4
        stage2(out, description=STAGE2.described(), deadline=math.inf)
        assert_same_run(out, tmp_path / "unbroken")


def test_a_deadline_without_hours_names_none(stage2, tmp_path):
    with pytest.raises(OutOfTime, match=r"^deadline reached at step 1; run the same command"):
        stage2(tmp_path, deadline=0.0)


def test_hours_count_from_the_call_not_from_the_import(stage2, tmp_path, monkeypatch):
    """As in a notebook or a server, which import mvbert long before they train."""
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: 1e9))
    stage2(tmp_path, replace(STAGE2, max_hours=0.1))


@pytest.mark.slow
def test_a_kill_anywhere_in_saving_changes_no_bit(stage2, in_child, tmp_path, assert_same_run):
    """From the middle of a run to its end: log, checkpoints, result, before each file operation."""
    torch.set_num_threads(1)
    stage2(tmp_path / "unbroken")
    with pytest.raises(Interrupted):
        stage2(tmp_path / "start", after={2: _terminate})
    kills, killed = 0, True
    while killed:
        out = tmp_path / str(kills)
        shutil.copytree(tmp_path / "start", out)
        killed = in_child(lambda out=out: stage2(out), kills)
        stage2(out)
        assert_same_run(out, tmp_path / "unbroken")
        shutil.rmtree(out)
        kills += 1
    assert kills > 100


# ---- it refuses -----------------------------------------------------------------------------


def test_a_folder_of_another_run_is_refused(stage1, tmp_path):
    stage1(tmp_path)
    with pytest.raises(InputError, match=r"other settings \(train\.lr: 0\.001 there, 0\.5 now\)"):
        stage1(tmp_path, replace(STAGE1, lr=0.5))


def test_a_run_folder_in_use_is_refused(stage1, tmp_path):
    with runs.lock(tmp_path), pytest.raises(InputError, match="in use by another"):
        stage1(tmp_path)


def test_not_finite_updates_are_skipped_then_stop_the_run(stage2, tmp_path, monkeypatch, numbers):
    config = replace(STAGE2, steps=40, save_every=4, eval_every=40, log_every=1)
    losses = Stage2.losses

    def spoiled(self, batch, masked):
        loss, sums = losses(self, batch, masked)
        return (loss * float("nan") if spoil(self) else loss), sums

    calls = {"n": 0}

    def spoil(task) -> bool:
        calls["n"] += 1
        return calls["n"] == 5 or calls["n"] > 20

    monkeypatch.setattr(Stage2, "losses", spoiled)
    with pytest.raises(
        InputError,
        match=r"not finite in 10 steps in a row, steps 20 to 30 .*epoch 1, rows 80 to 120\)"
        r".*checkpoints before step 20 are good",
    ):
        stage2(tmp_path, config)
    trained = {r["step"]: r for r in numbers(tmp_path) if "heldout" not in r}
    assert [step for step, r in trained.items() if r["skipped"]] == [5, *range(21, 31)]
    # A skipped step is in no mean: nothing is left where the line is about it alone.
    assert all((r["loss"] is None) == bool(r["skipped"]) for r in trained.values())
    assert all(math.isfinite(r["loss"]) for r in trained.values() if not r["skipped"])
    folder = checkpoint.newest(tmp_path / "checkpoints", print)
    assert folder is not None
    assert folder.name == "step-00000020"  # none since then: the weights may be the cause
    state = read_tensors(folder / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in state.values())


def test_skipped_updates_in_a_row_are_counted_across_a_resume(stage2, tmp_path, monkeypatch):
    config = replace(STAGE2, steps=40, save_every=40, log_every=40)
    losses = Stage2.losses

    def spoiled(self, batch, masked):
        loss, sums = losses(self, batch, masked)
        return loss * float("nan"), sums

    monkeypatch.setattr(Stage2, "losses", spoiled)
    with pytest.raises(Interrupted):
        stage2(tmp_path, config, after={5: _terminate})
    state = json.loads((tmp_path / "checkpoints" / "step-00000006" / "training.json").read_text())
    assert (state["skipped_in_a_row"], state["skipped_last"]) == (6, 5)
    with pytest.raises(InputError, match=r"not finite in 40 steps in a row, steps 0 to 40 "):
        stage2(tmp_path, config)


def test_the_rows_that_a_skipped_update_names_reproduce_it(stage2, tmp_path, monkeypatch):
    """A loss that is spoiled by what is in the rows is spoiled by the rows that are named."""
    config = replace(STAGE2, steps=12, log_every=3)
    losses = Stage2.losses
    task, _, _ = stage2(tmp_path / "whole", config)
    marked = torch.from_numpy(task.rows.read(7 * 4 + 2, 1).input_ids)  # a row of step 7

    def spoiled(self, batch, masked):
        loss, sums = losses(self, batch, masked)
        hit = (batch.input_ids == marked).all(1).any()
        return loss * torch.where(hit, float("nan"), 1.0), sums

    monkeypatch.setattr(Stage2, "losses", spoiled)
    task, _, progress = stage2(tmp_path / "spoiled", config)
    (note,) = [note for note in progress.notes if "skipped" in note]
    named = re.search(r"seed 0, epoch 0, rows (\d+) to (\d+)", note)
    assert named, note
    first, end = map(int, named.groups())
    rows = task.rows.read(first, end - first)
    batch = DeviceBatch.of(rows, torch.device("cpu"))
    assert (first, end) == (28, 32)
    assert torch.isnan(task.losses(batch, (batch.labels >= 0).sum())[0])


def test_a_full_disk_leaves_the_last_checkpoint_whole(stage1, tmp_path, monkeypatch, numbers):
    stage1(tmp_path / "unbroken")
    original = huggingface.save_file
    calls = {"n": 0}

    def full(tensors, path, metadata):
        calls["n"] += 1
        if calls["n"] > 6:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(tensors, path, metadata=metadata)

    monkeypatch.setattr(huggingface, "save_file", full)
    with pytest.raises(
        InputError, match=r"cannot write .*No space left on device.*free some space"
    ):
        stage1(tmp_path / "broken")
    left = sorted(p.name for p in (tmp_path / "broken" / "checkpoints").iterdir())
    assert left == ["step-00000000", "step-00000002"]
    monkeypatch.setattr(huggingface, "save_file", original)
    stage1(tmp_path / "broken")
    assert numbers(tmp_path / "broken") == numbers(tmp_path / "unbroken")


@pytest.mark.parametrize(
    ("name", "part"),
    [("tpu!", "device must be"), ("meta", "device must be"), ("cuda:99", "CUDA devices")],
)
def test_a_device_that_is_not_there_is_named(name, part):
    with pytest.raises(InputError, match=part):
        device.choose_device(name)


@pytest.mark.parametrize(
    ("step", "leaving", "expected"),
    [
        (1, False, (False, False, False)),
        (2, False, (True, False, False)),
        (3, False, (False, True, False)),
        (4, False, (True, False, True)),
        (5, True, (False, False, True)),
        (7, False, (True, True, True)),
    ],
)
def test_what_is_due_after_a_step(step, leaving, expected):
    config = Stage2Config(steps=7, log_every=2, eval_every=3, save_every=4)
    assert astuple(train.due(step, config, leaving)) == expected


def test_a_run_made_before_the_wings_resumes(root, tmp_path, verb, monkeypatch):
    """Corpus, teacher, vocabulary and checkpoint written by commit df2e3e2, stopped at step 4."""
    with tarfile.open(root / "tests" / "data" / "run-before-wings.tar.xz") as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # (new in 3.11.4)
        archive.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    first = (tmp_path / "stage1" / "run.json").read_text()
    report, notes = verb(
        "train", "--stage", 1, "--corpus", "corpus", "--teacher", "teacher", "-o", "stage1",
        "--student-vocab", "vocab.txt", "--row.length", 16, "--steps", 6, "--rows", 4,
        "--eval-rows", 4, "--eval-every", 3, "--save-every", 2, "--log-every", 2, "--threads", 1,
        "--dtype", "float32", "--lr", "1e-3", "--embedding-size", 16, "--dropout", 0.1,
    )  # fmt: skip
    assert "resuming from step-00000004" in notes
    assert report["heldout_first"]["loss"] == pytest.approx(4.871231760297503, rel=1e-6)
    # What the unbroken run came to, on another CPU: 2 steps of it are repeated here.
    assert report["heldout_last"]["loss"] == pytest.approx(4.835350036621094, rel=1e-4)
    run = json.loads((tmp_path / "stage1" / "run.json").read_text())
    assert run["description"] == json.loads(first)["description"]
    assert [resume["step"] for resume in run["resumed"]] == [4]


def test_a_retired_setting_that_did_something_is_named(tmp_path):
    written = {"stage": 2, "row": {"length": 16, "late_length": 32, "late_share": 0.5}}
    (tmp_path / "run.json").write_text(json.dumps({"description": written}))
    with pytest.raises(InputError, match=r"row\.late_length: 32 there"):
        runs.describe_run(tmp_path / "run.json", {"stage": 2, "row": {"length": 16}})
    written["row"]["late_length"] = 0
    (tmp_path / "run.json").write_text(json.dumps({"description": written}))
    runs.describe_run(tmp_path / "run.json", {"stage": 2, "row": {"length": 16}})


def test_a_stage_2_run_made_before_the_wings_is_the_same_run(tmp_path):
    """What commit df2e3e2 wrote of a run with that version's defaults; it had no sentence loss."""
    written = {
        "steps": 1000, "pieces": 0, "rows": 32, "micro_rows": 0, "optimizer": "adamw",
        "lr": 0.0005, "warmup": 0.1, "final_lr": 0.0, "weight_decay": 0.01, "beta1": 0.9,
        "beta2": 0.98, "eps": 1e-06, "grad_clip": 1.0, "eval_every": 200, "eval_rows": 128,
        "save_every": 200, "log_every": 20, "seed": 0, "dtype": "auto", "device": "auto",
        "threads": 0, "compile": False, "shape": "6x256", "start": "stage1",
        "positions": "sinusoidal", "distill": ["relations"], "temperature": 1.0,
        "logits_at": "masked", "logits_top_k": 0, "hidden_layers": [], "hidden_map": "linear",
        "relations_layer": 0, "relation_heads": 32, "mlm_weight": 1.0, "mlm_weight_end": -1.0,
        "logits_weight": 1.0, "logits_weight_end": -1.0, "hidden_weight": 1.0,
        "hidden_weight_end": -1.0, "relations_weight": 30.0, "relations_weight_end": -1.0,
        "dropout": 0.0,
    }  # fmt: skip
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"description": {"stage": 2, "train": written}}))
    now = {"stage": 2, "train": Stage2Config().described()}
    assert runs.describe_run(path, now) is None
    assert runs.describe_run(path, {**now, "train": Stage2Config(steps=2000).described()}) == 1000
    with pytest.raises(InputError, match=r"train\.relations_weight: 30\.0 there, 3\.0 now"):
        runs.describe_run(path, {**now, "train": Stage2Config(relations_weight=3.0).described()})
