"""`mvbert finetune`: it learns, resumes run by run, and its folder opens everywhere."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from mvbert import cli
from mvbert.config import FinetuneConfig, ModelConfig
from mvbert.errors import InputError
from mvbert.model.masked_lm import MaskedLM
from mvbert.tasks import finetune as job
from mvbert.tasks import loop
from mvbert.tasks.formats import find_task
from mvbert.tasks.model import Labels, TaskModel, load_bert, load_task_model
from mvbert.tasks.rows import TaskBatch, make_rows, read_batch
from mvbert.tasks.score import Split, scores_of
from mvbert.training.device import Device
from mvbert.training.optim import linear_schedule

CPU = Device(torch.device("cpu"), None, "")
LEARN = ("--epochs", 8, "--lr", 5e-3, "--batch", 8, "--dropout", 0)


def runs(out):
    return [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]


def without_clock(records):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, task_data, bert):
    """Models that learnt: sst (two seeds), joint, tags."""
    folder = tmp_path_factory.mktemp("tuned")
    options = ["--device", "cpu", "--threads", "1", "--dtype", "float32", *map(str, LEARN)]
    for task, data, more in (
        ("sst-2", "sst.tar.xz", ["--seeds", "2"]), ("joint", "snips", []), ("tags", "conll", []),
    ):  # fmt: skip
        command = ["finetune", bert, task, task_data / data, "-o", folder / task, *more, *options]
        assert cli.main([str(part) for part in command]) == 0
    return folder


def test_it_learns_and_reports_every_seed(tuned):
    result = json.loads((tuned / "sst-2" / "finetune.json").read_text())["result"]
    accuracy = result["dev"]["accuracy"]
    assert accuracy["min"] > 0.9
    assert len(accuracy["seeds"]) == 2
    assert accuracy["median"] == pytest.approx(sum(accuracy["seeds"]) / 2, abs=1e-5)
    assert "test" not in result, "GLUE's test set has no labels"
    records = runs(tuned / "sst-2")
    assert [r["seed"] for r in records] == [0, 1]
    assert records[0]["scores"] != records[1]["scores"] or records[0]["loss"] != records[1]["loss"]
    for record in records:
        assert record["score"] == max(record["scores"])
        assert record["epoch"] == 1 + record["scores"].index(record["score"])
    joint = json.loads((tuned / "joint" / "finetune.json").read_text())["result"]
    assert joint["dev"]["slot_f1"]["median"] > 0.9
    assert joint["dev"]["intent_accuracy"]["median"] > 0.9
    assert {*joint["test"]} == {*joint["dev"]}
    tags = json.loads((tuned / "tags" / "finetune.json").read_text())["result"]
    assert tags["test"]["f1"]["median"] > 0.9


def test_eval_says_what_the_run_said(tuned, task_data, verb):
    options = ("--device", "cpu", "--threads", 1, "--dtype", "float32")
    for task, data in (("sst-2", "sst"), ("joint", "snips"), ("tags", "conll")):
        report, _ = verb("eval", tuned / task, "--data", task_data / data, *options)
        best = max(runs(tuned / task), key=lambda r: r["score"])
        for split in ("dev", "test"):
            if split in best:
                found = {k: v for k, v in report[split].items() if k != "examples"}
                assert found == pytest.approx(best[split], abs=1e-5)
        assert report["dev"]["examples"] == 24
    other = task_data / "sst" / "dev.tsv"
    report, _ = verb("eval", tuned / "sst-2", "--task", "sst2", "--data", other, *options)
    assert report["dev"]["accuracy"] > 0.9


def test_transformers_opens_it_and_computes_the_same(tuned, task_data):
    transformers = pytest.importorskip("transformers")
    pipeline = transformers.pipeline("text-classification", str(tuned / "sst-2"), device="cpu")
    said = pipeline(["the great river of words", "a table of old words"])
    assert [s["label"] for s in said] == ["positive", "negative"]
    tags = transformers.pipeline(
        "token-classification", str(tuned / "tags"), aggregation_strategy="simple", device="cpu"
    )
    spans = tags("the river great water house")
    assert [(s["entity_group"], s["word"]) for s in spans] == [("x", "great water")]
    joint = transformers.pipeline("token-classification", str(tuned / "joint"), device="cpu")
    assert {s["entity"] for s in joint("great water house")} >= {"B-x", "I-x"}

    for task, kind in (("sst-2", "Sequence"), ("joint", "Token")):
        ours, vocab = load_task_model(tuned / task)
        theirs = getattr(transformers, f"AutoModelFor{kind}Classification").from_pretrained(
            tuned / task
        )
        examples = job.read_task(
            find_task(task), [str(task_data / {"sst-2": "sst"}.get(task, "snips"))]
        )
        rows = make_rows(find_task(task), examples["dev"], vocab, 32)
        scores = torch.from_numpy(scores_of(ours, rows, vocab, CPU))
        for i in range(5):
            ids = torch.from_numpy(rows.ids[rows.ends[i] : rows.ends[i + 1]]).long()[None]
            with torch.no_grad():
                logits = theirs(ids).logits[0]
            places = slice(rows.place_ends[i], rows.place_ends[i + 1])
            wanted = logits[None] if kind == "Sequence" else logits[rows.places[places]]
            assert torch.allclose(scores[places], wanted, atol=1e-4)


def test_export_takes_it(tuned, tmp_path, verb):
    pytest.importorskip("onnxruntime")
    for task in ("sst-2", "tags"):
        report, _ = verb("export", tuned / task, "-o", tmp_path / task)
        assert report["files"]["onnx/model.onnx"]["same_top1"] == 1.0


def test_the_folder_of_a_run_is_the_model_in_it(training_inputs, task_data, tmp_path, finetune):
    (tmp_path / "run").mkdir()
    shutil.copytree(training_inputs / "teacher", tmp_path / "run" / "model")
    report, _ = finetune(
        tmp_path / "run", "sst-2", task_data / "sst", tmp_path / "out", "--epochs", 1
    )
    assert report["model"].endswith("run/model")


@pytest.mark.parametrize("killed_in", [0, 1, 3])
def test_it_resumes_run_by_run(
    bert, task_data, tmp_path, finetune, monkeypatch, killed_in, command_line
):
    options = ("--epochs", 2, "--lr", 1e-3, 3e-3, "--batch", 8, "--seeds", 2)
    report, _ = finetune(bert, "tags", task_data / "conll", tmp_path / "whole", *options)
    fit, count = loop.Trainer.fit, 0

    def stopped(self, bert, run):
        nonlocal count
        count += 1
        if count > killed_in:
            raise KeyboardInterrupt
        return fit(self, bert, run)

    monkeypatch.setattr(loop.Trainer, "fit", stopped)
    command = ["finetune", bert, "tags", task_data / "conll", "-o", tmp_path / "cut", *options,
               "--device", "cpu", "--threads", 1, "--dtype", "float32"]  # fmt: skip
    code, _, said = command_line(*command)
    assert (code == 130) == (killed_in < 3), said
    assert not (tmp_path / "cut" / "config.json").exists() or killed_in == 3
    monkeypatch.setattr(loop.Trainer, "fit", fit)
    again, _ = finetune(bert, "tags", task_data / "conll", tmp_path / "cut", *options)
    assert without_clock(runs(tmp_path / "cut")) == without_clock(runs(tmp_path / "whole"))
    assert again["dev"] == report["dev"]
    assert again["test"] == report["test"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("cut", "whole")]
    assert weights[0] == weights[1]


def test_it_resumes_after_the_model_was_moved(
    bert, task_data, tmp_path, finetune, monkeypatch, command_line
):
    out, rmtree = tmp_path / "cut", shutil.rmtree
    options = ("--epochs", 1, "--batch", 8)

    def interrupted(path, *args, **kwargs):
        if path == out / job.KEPT:
            raise KeyboardInterrupt
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    command = ["finetune", bert, "tags", task_data / "conll", "-o", out, *options,
               "--device", "cpu", "--threads", 1, "--dtype", "float32"]  # fmt: skip
    code, _, said = command_line(*command)
    assert code == 130, said
    monkeypatch.undo()
    report, _ = finetune(bert, "tags", task_data / "conll", out, *options)
    assert report["dev"]
    assert not (out / job.KEPT).exists()


def test_a_grid_chooses_by_dev_and_scores_the_test_set_of_its_best_alone(
    bert, task_data, tmp_path, finetune
):
    out = tmp_path / "out"
    options = ("--epochs", 3, "--lr", 1e-5, 5e-3, "--batch", 8, "--seeds", 2)
    report, _ = finetune(bert, "tags", task_data / "conll", out, *options)
    records = runs(out)
    assert report["setting"]["lr"] == 5e-3
    assert [(r["lr"], r["seed"], "test" in r) for r in records] == [
        (1e-5, 0, False), (5e-3, 0, True), (5e-3, 1, True)
    ]  # fmt: skip
    before = (out / "runs.jsonl").read_bytes()
    more, _ = finetune(bert, "tags", task_data / "conll", out, *options)
    assert (out / "runs.jsonl").read_bytes() == before
    assert {**more, "seconds": 0} == {**report, "seconds": 0}
    more, _ = finetune(bert, "tags", task_data / "conll", out, *options[:-1], 3)
    assert len(runs(out)) == 4
    assert more["seeds"] == 3


def test_training_is_what_a_plain_loop_of_transformers_computes(bert, task_data, teacher_vocab):
    """Three updates without dropout: the weights of BertForSequenceClassification and AdamW."""
    transformers = pytest.importorskip("transformers")
    task = find_task("sst-2")
    examples = job.read_task(task, [str(task_data / "sst")])["train"].select(range(12))
    config = FinetuneConfig(batch=(4,), lr=(1e-3,), dropout=0.0, weight_decay=0.1, patience=0)
    labels = Labels("classes", ("negative", "positive"))
    split = Split(examples, make_rows(task, examples, teacher_vocab, 32))
    targets = loop.Targets(loop.targets_of(labels, split))
    trainer = loop.Trainer(
        task, labels, split.rows, targets, split, teacher_vocab, config, CPU, job.Progress("t")
    )
    model, _, _ = load_bert(bert, 0.0, False)
    start = TaskModel(model, labels)
    start.init_head(0)
    theirs = transformers.BertForSequenceClassification.from_pretrained(
        bert, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    with torch.no_grad():
        theirs.classifier.weight.copy_(start.head.scores.weight)
        theirs.classifier.bias.zero_()
        theirs.bert.pooler.dense.weight.copy_(model.pooler.weight)
        theirs.bert.pooler.dense.bias.copy_(model.pooler.bias)
    fitted = trainer.fit(model, loop.Run(4, 1e-3, 1, 0))
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, 3)
    theirs.train()
    total = 0.0
    for step, chosen in enumerate(loop.batches_of_epoch(split.rows.lengths, 4, 0, 0)):
        batch = read_batch(split.rows, chosen, 0, torch.device("cpu"))
        truth = torch.tensor([labels.names.index(examples.labels[i]) for i in chosen])
        mask = None if batch.mask is None else batch.mask.long()
        assert linear_schedule(step, 3, 0.0) == pytest.approx(schedule.get_last_lr()[0] / 1e-3)
        loss = theirs(batch.input_ids.long(), attention_mask=mask, labels=truth).loss
        total += float(loss.detach())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    # One epoch of three updates has a warm-up of round(0.3) = 0 steps.
    assert fitted.loss == pytest.approx(total / 3, rel=1e-5)
    theirs.eval()
    rows = split.rows
    ours = scores_of(fitted.model, rows, teacher_vocab, CPU)
    for i in range(len(rows)):
        ids = torch.from_numpy(rows.ids[rows.ends[i] : rows.ends[i + 1]]).long()[None]
        with torch.no_grad():
            wanted = theirs(ids).logits[0].numpy()
        assert np.abs(ours[i] - wanted).max() < 2e-3 * np.abs(wanted).max()


def test_early_stopping_keeps_the_best_epoch(bert, task_data, tmp_path, finetune, monkeypatch):
    scores = iter([0.5, 0.7, 0.6, 0.65, 0.9])
    monkeypatch.setattr(loop, "score_of", lambda task, metrics: next(scores))
    finetune(bert, "sst-2", task_data / "sst", tmp_path / "out", "--epochs", 5, "--patience", 2)
    (record,) = runs(tmp_path / "out")
    assert record["scores"] == [0.5, 0.7, 0.6, 0.65]
    assert record["epoch"] == 2


def test_tensors_that_are_not_used_are_named(
    tuned, bert, task_data, tmp_path, finetune, verb, with_extra
):
    start, teacher = with_extra(bert, "start"), with_extra(tuned / "sst-2", "teacher")
    _, said = finetune(
        start, "sst-2", task_data / "sst", tmp_path / "out", "--teacher", teacher, "--epochs", 1
    )
    for folder in (start, teacher):
        assert said.count(f"{folder}: 1 tensor is not used: extra") == 1
    _, said = verb("eval", teacher, "--data", task_data / "sst", "--dtype", "float32")
    assert f"{teacher}: 1 tensor is not used: extra" in said


def test_numbers_are_learnt(bert, task_data, tmp_path, finetune, verb):
    report, _ = finetune(
        bert, "number", task_data / "own", tmp_path / "out", "--label", "score", *LEARN
    )
    assert report["test"]["pearson"]["median"] > 0.7
    again, _ = verb("eval", tmp_path / "out", "--data", task_data / "own" / "test.jsonl",
                    "--dtype", "float32", "--threads", 1)  # fmt: skip
    assert again["test"]["pearson"] == pytest.approx(report["test"]["pearson"]["median"], abs=1e-4)


def test_extra_examples_are_trained_on_and_nothing_else(
    bert, task_data, tmp_path, finetune, refused, monkeypatch
):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.tsv").write_text("sentence\tlabel\na great river\t1\n")
    (tmp_path / "more" / "b.tsv").write_text("index\tlabel\tsentence\n0\t0\tan old table\n")
    seen = []
    fit = loop.Trainer.fit

    def spy(self, model, run):
        seen.append((len(self._rows), len(self._dev.rows), self._targets.hard[-2:].tolist()))
        return fit(self, model, run)

    monkeypatch.setattr(loop.Trainer, "fit", spy)
    command = (bert, "sst-2", task_data / "sst", tmp_path / "out", "--epochs", 1)
    _, said = finetune(*command, "--extra", tmp_path / "more")
    assert seen == [(98, 24, [1, 0])]
    assert "train: 98 examples" in said
    own = ["finetune", bert, "sst-2", task_data / "sst", "-o", tmp_path / "none", "--extra"]
    (tmp_path / "x.tsv").write_text("sentence\na river\n")
    refused([*own, tmp_path / "x.tsv"], "x.tsv", "need labels")
    (tmp_path / "x.txt").write_text("a river\n")
    refused([*own, tmp_path / "x.txt"], "x.txt has no table")
    snips = ["finetune", bert, "joint", task_data / "snips", "-o", tmp_path / "none", "--extra"]
    refused([*snips, tmp_path / "more"], "joint takes no extra examples")
    assert not (tmp_path / "none").exists()


def test_the_setting_of_the_grid():
    config = FinetuneConfig(grid=True)
    assert len(config.settings(3)) == 8
    assert {e for _, _, e in config.settings(3)} == {3}
    own = replace(config, lr=(1e-3,), epochs=(2, 4))
    assert own.settings(3) == [(b, 1e-3, e) for b in (16, 32) for e in (2, 4)]
    for name, values in (("lr", (0.0,)), ("batch", ()), ("epochs", (2, 2)), ("lr", (3.0,))):
        with pytest.raises(InputError, match=name):
            FinetuneConfig(**{name: values})


# ---- bad input -----------------------------------------------------------------------------------


@pytest.fixture
def refuse(refused, tmp_path, bert):
    """A function that asserts that fine-tuning on this data is refused."""

    def check(task, data, *named, model=bert, more=()):
        data = data if isinstance(data, list) else [data]
        out = tmp_path / "refused"
        return refused(["finetune", model, task, *data, "-o", out, "--threads", 1, *more], *named)

    return check


def table(path, *rows):
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    return path


def test_wrong_data_is_refused_before_anything_is_written(refuse, tmp_path, task_data):
    good = table(tmp_path / "train.tsv", ("a", "x"), ("b", "y"))
    refuse("sst2", tmp_path / "none", "does not exist")
    refuse("squad", good, "no task 'squad'")
    refuse("classes", good, "has no dev set")
    refuse("classes", [good, table(tmp_path / "e.tsv")], "the dev set is empty")
    refuse("classes", [table(tmp_path / "e.tsv"), good], "the train set is empty")
    one = table(tmp_path / "one.tsv", ("a", "x"), ("b", "x"))
    refuse("classes", [one, good], "the one class 'x'")
    other = table(tmp_path / "other.tsv", ("a", "p"), ("b", "q"))
    refuse("classes", [good, other], "no label of dev (p, q) is one of train (x, y)")
    refuse("classes", [good, good], "has no column body", "text, label", more=["--text", "body"])
    refuse("number", [good, good], "the score is 'x'")
    flat = table(tmp_path / "flat.tsv", ("a", "1"), ("b", "1"))
    refuse("number", [flat, flat], "all training examples have the score 1.0")
    refuse("tags", [task_data / "own" / "train.jsonl"] * 2, "has no column tokens")
    refuse("classes", [good, good, good, good], "got 4 paths")
    assert not (tmp_path / "refused").exists()


def test_wrong_settings_and_models(refuse, tmp_path, bert, task_data):
    sst = task_data / "sst"
    refuse("sst-2", sst, "length is 99", "32 positions", more=["--length", 99])
    refuse("sst-2", sst, "length must be at least 3", more=["--length", 2])
    refuse("sst-2", sst, "lr must be at most 1", more=["--lr", 2])
    refuse("sst-2", sst, "no such folder", model=tmp_path / "none")
    refuse("sst-2", sst, "seeds must be at least 1", more=["--seeds", 0])


def test_another_job_is_not_overwritten(bert, task_data, tmp_path, finetune, refused):
    out = tmp_path / "out"
    finetune(bert, "sst-2", task_data / "sst", out, "--epochs", 1)
    same = ["finetune", bert, "sst-2", task_data / "sst", "-o", out, "--threads", 1]
    refused([*same, "--epochs", 2], "holds a job with other settings (epochs: [1] there, [2] now)")
    refused([*same[:-3], bert, "--epochs", 1], "is the model itself")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    refused([*same[:-3], tmp_path / "full"], "is not empty and has no finetune.json")
    with open(out / "runs.jsonl", "a") as file:
        file.write('{"batch": 1}\n')
    refused([*same, "--epochs", 1], "runs.jsonl:2 is not the record of a run")


def test_both_texts_of_a_pair_get_the_only_token_type():
    shape = ModelConfig(40, 32, 1, 2, 64, max_position_embeddings=16, type_vocab_size=1)
    bert = MaskedLM(shape)
    bert.init_weights(0)
    model = TaskModel(bert, Labels("classes", ("no", "yes"))).eval()
    ids = torch.arange(5, 15, dtype=torch.int32)[None]
    second = torch.tensor([[0] * 6 + [1] * 4], dtype=torch.int32)
    batch = TaskBatch(ids, second, None, torch.tensor([0]), np.array([0]))
    with torch.no_grad():
        scores = model(batch)
        expected = model(replace(batch, token_type_ids=torch.zeros_like(second)))
    torch.testing.assert_close(scores, expected, rtol=0, atol=0)


def test_a_rate_that_is_too_high_ends_in_a_sentence(refuse, task_data, monkeypatch):
    def nan(self, model, batch):
        return sum(p.sum() for _, p in model.trained()) * float("nan")

    monkeypatch.setattr(loop.Trainer, "_loss", nan)
    refuse("sst-2", task_data / "sst", "the training loss is nan in epoch 1", "try a lower lr")


def test_scores_that_are_no_numbers(tuned, task_data, tmp_path, refused):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(tuned / "sst-2", tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["classifier.bias"][:] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    refused(["eval", broken, "--data", task_data / "sst"], "the model's scores are not finite")


def test_eval_of_another_task_is_refused(tuned, task_data, tmp_path, bert, refused):
    refused(["eval", tuned / "tags", "--task", "sst-2", "--data", task_data / "sst"],
            "scores tags of words, but sst-2 asks for classes of a text")  # fmt: skip
    own = table(tmp_path / "own.tsv", ("a", "p"), ("b", "q"))
    refused(["eval", tuned / "sst-2", "--task", "classes", "--data", own],
            "knows no label of own (p, q); it scores negative, positive")  # fmt: skip
    refused(["eval", bert, "--task", "sst-2", "--data", task_data / "sst"],
            "has no layer that scores labels")  # fmt: skip
    refused(["eval", tuned / "sst-2"], "give either --corpus or --data")
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors", "vocab.txt"):
        shutil.copy(tuned / "sst-2" / name, tmp_path / "bare")
    refused(["eval", tmp_path / "bare", "--data", own], "give --task")
