"""Every wrong input is refused by the command line: exit code 2, one sentence, no traceback."""

import bz2
import gzip
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")

from mvbert import cli
from mvbert.text.vocab import Vocab

ROWS = ["--row.length", "16", "--rows", "4", "--eval-rows", "8", "--device", "cpu",
        "--threads", "1", "--dtype", "float32"]  # fmt: skip


# ---- whole inputs, made once ---------------------------------------------------------------------


def write_text(path: Path, documents: int, seed: int) -> Path:
    """Documents of one paragraph of made-up words, a few hundred different ones."""
    draw = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = [f"{a}{b}" for a in syllables[::7] for b in syllables[::3]]
    lines = [" ".join(draw.choices(words, k=30)) + "." for _ in range(documents)]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, training_inputs):
    """A folder with text.txt, corpus/, vocab.txt, teacher/ and a finished Stage I run, stage1/."""
    folder = tmp_path_factory.mktemp("whole")
    text = write_text(folder / "text.txt", 200, seed=1)
    heldout = write_text(folder / "heldout.txt", 20, seed=2)
    shutil.copytree(training_inputs / "teacher", folder / "teacher")
    corpus = ["corpus", text, "--heldout-text", heldout, "-o", folder / "corpus"]
    vocab = ["vocab", folder / "corpus", "--size", "100", "-o", folder / "vocab.txt"]
    for command in (corpus, vocab, stage1(folder, "stage1")):
        assert cli.main([str(part) for part in command]) == 0, command
    return folder


@pytest.fixture
def ground(whole, tmp_path):
    """A copy of the whole inputs to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "ground"))


def stage1(folder: Path, out: str, *more, steps: int = 2) -> list:
    inputs = ["--corpus", folder / "corpus", "--teacher", folder / "teacher"]
    inputs += ["--student-vocab", folder / "vocab.txt", "-o", folder / out]
    inputs += ["--embedding-size", "64"]
    return ["train", "--stage", "1", *inputs, *ROWS, "--steps", str(steps), *more]


def stage2(folder: Path, out: str, *more) -> list:
    inputs = ["--corpus", folder / "corpus", "--stage1", folder / "stage1", "-o", folder / out]
    return ["train", "--stage", "2", *inputs, *ROWS, "--steps", "2", "--shape", "1x64", *more]


# ---- corpus --------------------------------------------------------------------------------------


def corpus(folder: Path, *text, out: str = "new") -> list:
    return ["corpus", *text, "-o", folder / out]


def test_a_missing_text(tmp_path, refused):
    refused(corpus(tmp_path, tmp_path / "nowhere.txt"), "nowhere.txt")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", [b"", b"\n\n  \n", b"\xef\xbb\xbf"], ids=repr)
def test_an_empty_text(tmp_path, refused, content):
    (tmp_path / "empty.txt").write_bytes(content)
    refused(corpus(tmp_path, tmp_path / "empty.txt"), "empty.txt")
    assert not (tmp_path / "new").exists()


def test_an_empty_folder(tmp_path, refused):
    (tmp_path / "texts").mkdir()
    refused(corpus(tmp_path, tmp_path / "texts"), "texts")


def test_text_that_is_not_utf8_names_the_byte(tmp_path, refused):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"the caf\xe9 is closed\n" * 3)
    message = refused(corpus(tmp_path, path), "latin.txt", "iconv -f WINDOWS-1252")
    assert re.search(r"\bbyte (offset )?7\b", message), message
    assert not (tmp_path / "new").exists()


def test_errors_replace_goes_on(tmp_path, whole, verb):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"the caf\xe9 is closed\n\n" * 3)
    verb(*corpus(tmp_path, path), "--heldout-text", whole / "heldout.txt", "--errors", "replace")
    assert (tmp_path / "new" / "manifest.json").exists()


def test_the_byte_is_counted_from_the_start_of_the_file(tmp_path, refused):
    path = tmp_path / "late.txt"
    good = b"the river is small and the water is old\n" * 60_000  # several blocks of any reader
    path.write_bytes(good + b"\xff\n")
    message = refused(corpus(tmp_path, path), "late.txt")
    assert str(len(good)) in re.sub(r"(?<=\d)[,_](?=\d)", "", message), message


def test_a_compressed_text_that_is_cut_off(tmp_path, refused):
    whole = gzip.compress(b"".join(b"the river number %d is old\n" % i for i in range(5000)))
    (tmp_path / "cut.txt.gz").write_bytes(whole[: len(whole) // 2])
    refused(corpus(tmp_path, tmp_path / "cut.txt.gz"), "cut.txt.gz")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("suffix", ["gz", "xz", "zst", "parquet"])
def test_a_file_that_is_not_what_its_name_says(tmp_path, refused, suffix):
    if suffix in ("zst", "parquet"):
        pytest.importorskip({"zst": "zstandard", "parquet": "pyarrow"}[suffix])
    name = f"wrong.txt.{suffix}" if suffix != "parquet" else "wrong.parquet"
    (tmp_path / name).write_bytes(b"this is plain text and no archive at all\n" * 50)
    refused(corpus(tmp_path, tmp_path / name), name)


def test_an_unknown_kind_of_file(tmp_path, refused):
    (tmp_path / "text.bz2").write_bytes(bz2.compress(b"the river\n"))
    refused(corpus(tmp_path, tmp_path / "text.bz2"), "text.bz2")


def test_binary_input(tmp_path, refused):
    (tmp_path / "weights.txt").write_bytes(bytes(range(256)) * 40)
    refused(corpus(tmp_path, tmp_path / "weights.txt"), "weights.txt")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"body": "the river"}', "text"),
        ('{"text": 7}', "text"),
        ('{"text": "the ri', "JSON"),
        ('["text"]', "object"),
    ],
    ids=["no such field", "a number", "broken JSON", "no object"],
)
def test_a_jsonl_record_that_is_wrong(tmp_path, refused, line, said):
    path = tmp_path / "records.jsonl"
    path.write_text('{"text": "the water is old"}\n' * 2 + line + "\n")
    message = refused(corpus(tmp_path, path), "records.jsonl", said)
    assert re.search(r"\b3\b", message.split("records.jsonl", 1)[1]), f"no line number: {message}"


def test_a_parquet_file_without_the_column(tmp_path, refused):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"body": ["the river"]}), tmp_path / "t.parquet")
    refused(corpus(tmp_path, tmp_path / "t.parquet"), "t.parquet", "text", "body")


def test_a_corpus_is_not_overwritten(ground, refused):
    before = (ground / "corpus" / "manifest.json").read_bytes()
    refused(corpus(ground, ground / "text.txt", out="corpus"), "corpus")
    assert (ground / "corpus" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("share", ["-0.1", "1", "nan"])
def test_a_heldout_share_out_of_range(ground, refused, share):
    refused([*corpus(ground, ground / "text.txt"), f"--heldout-share={share}"], "held")


# ---- vocabulary ----------------------------------------------------------------------------------


def test_a_student_below_its_alphabet(ground, refused):
    refused(["vocab", ground / "corpus", "--size", "12", "-o", ground / "new.txt"], "12")
    assert not (ground / "new.txt").exists()


def test_a_student_above_what_the_words_give(ground, refused):
    refused(["vocab", ground / "corpus", "--size", "90000", "-o", ground / "new.txt"], "90000")


@pytest.mark.parametrize("name", ["nowhere", "text.txt", "teacher"])
def test_a_vocabulary_of_no_corpus(ground, refused, name):
    refused(["vocab", ground / name, "--size", "100", "-o", ground / "new.txt"], name)


def test_a_vocabulary_that_cannot_be_written(ground, refused):
    out = ground / "text.txt" / "new.txt"  # below a file
    refused(["vocab", ground / "corpus", "--size", "100", "-o", out], "cannot write")


def spoil_vocab(path: Path, kind: str) -> None:
    """Makes one of the wrong vocabularies out of a right one."""
    pieces = path.read_text().splitlines()
    if kind == "duplicate":
        pieces[90] = pieces[40]
    elif kind.startswith("no "):
        pieces.remove(kind.removeprefix("no "))
    elif kind == "empty line":
        pieces[50] = ""
    if kind == "empty":
        path.write_text("")
    elif kind == "binary":
        path.write_bytes(bytes(range(256)) * 30)
    elif kind == "json":
        path.write_text(json.dumps({"pieces": pieces}))
    elif kind == "not utf-8":
        path.write_bytes("\n".join(pieces).encode() + b"\ncaf\xe9\n")
    elif kind == "sentencepiece":
        path.write_text("".join(f"{p}\t{-i}\n" for i, p in enumerate(pieces)))
    elif kind == "missing":
        path.unlink()
    else:
        path.write_text("\n".join(pieces) + "\n")


KINDS = ["duplicate", "no [UNK]", "no [MASK]", "no [CLS]", "no [SEP]", "no [PAD]", "empty"]
KINDS += ["binary", "json", "not utf-8", "sentencepiece", "missing"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_vocabulary_that_is_wrong(ground, refused, kind):
    spoil_vocab(ground / "vocab.txt", kind)
    message = refused(stage1(ground, "new"), "vocab.txt")
    if kind == "duplicate":
        assert re.search(r"\b41\b.*\b91\b|\b91\b.*\b41\b", message), message
    if kind.startswith("no "):
        assert kind.removeprefix("no ") in message


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_teacher_vocabulary_that_is_wrong(ground, refused, kind):
    spoil_vocab(ground / "teacher" / "vocab.txt", kind)
    (ground / "teacher" / "tokenizer.json").unlink()
    refused(stage1(ground, "new"), "vocab.txt")


# ---- teacher -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_teacher_that_lacks_a_file(ground, refused, name):
    (ground / "teacher" / name).unlink()
    refused(stage1(ground, "new"), name, "teacher")


def test_a_teacher_without_a_vocabulary(ground, refused):
    for name in ("vocab.txt", "tokenizer.json"):
        (ground / "teacher" / name).unlink()
    refused(stage1(ground, "new"), "vocab.txt", "teacher")


def test_a_teacher_whose_weights_are_not_what_their_name_says(ground, refused):
    weights = ground / "teacher" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    refused(stage1(ground, "new"), "pytorch_model.bin", "not a complete PyTorch file")


@pytest.mark.parametrize("keep", [0, 7, 200, 5000])
def test_teacher_weights_that_are_cut_off(ground, refused, keep):
    weights = ground / "teacher" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    refused(stage1(ground, "new"), "model.safetensors")


def test_a_teacher_whose_vocabulary_and_table_disagree(ground, refused):
    path = ground / "teacher" / "vocab.txt"
    path.write_text(path.read_text() + "extra\n")
    (ground / "teacher" / "tokenizer.json").unlink()
    refused(stage1(ground, "new"), "teacher", "vocab")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "roberta"),
        ("hidden_size", 48),
        ("hidden_size", "32"),
        ("num_hidden_layers", 3),
        ("num_attention_heads", 7),
        ("num_attention_heads", 0),
        ("vocab_size", 3),
        ("max_position_embeddings", 8),
        ("hidden_act", "mish"),
        ("hidden_size", 10**12),
    ],
)
def test_a_teacher_with_a_wrong_configuration(ground, refused, key, value):
    path = ground / "teacher" / "config.json"
    config = json.loads(path.read_text())
    config[key] = value
    path.write_text(json.dumps(config))
    refused(stage1(ground, "new"))


def test_a_teacher_configuration_that_is_no_json(ground, refused):
    (ground / "teacher" / "config.json").write_text('{"model_type": "bert",')
    refused(stage1(ground, "new"), "config.json")


def test_a_teacher_that_is_nowhere(ground, refused, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = stage1(ground, "new")
    command[command.index("--teacher") + 1] = ground / "nowhere"
    refused(command, "nowhere")


# ---- things that do not belong together ----------------------------------------------------------


@pytest.mark.parametrize("short", ["text", "heldout"])
def test_a_text_smaller_than_one_row(ground, refused, verb, short):
    (ground / f"{short}.txt").write_text("the river is old.\n")
    made = corpus(ground, ground / "text.txt", out="corpus")
    verb(*made, "--heldout-text", ground / "heldout.txt", "--overwrite")
    refused(stage1(ground, "new", "--row.length", "32"), "row")


@pytest.mark.parametrize("kind", ["shorter", "changed", "missing", "empty"])
@pytest.mark.parametrize("name", ["train.u32", "heldout.u32", "lexicon.bytes", "lexicon.ends"])
def test_a_corpus_that_does_not_match_its_manifest(ground, refused, name, kind):
    path = ground / "corpus" / name
    data = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "shorter":
        path.write_bytes(data[:-8])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    refused(stage1(ground, "new"), name)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: {**m, "format": "another"},
        lambda m: {**m, "version": 99},
        lambda m: {k: v for k, v in m.items() if k != "files"},
        lambda m: {**m, "files": {"../text.txt": {"bytes": 1, "sha256": "0"}}},
        lambda m: [],
        lambda m: {**m, "distinct": 10**15},
        lambda m: {**m, "lowercase": "yes"},
    ],
    ids=["format", "version", "no files", "other files", "no object", "distinct", "lowercase"],
)
def test_a_manifest_that_is_wrong(ground, refused, spoil):
    path = ground / "corpus" / "manifest.json"
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    refused(stage1(ground, "new"), ground / "corpus")


def test_a_run_is_not_resumed_with_another_corpus(ground, refused, verb):
    write_text(ground / "text.txt", 210, seed=9)
    shutil.rmtree(ground / "corpus")
    made = corpus(ground, ground / "text.txt", out="corpus")
    verb(*made, "--heldout-text", ground / "heldout.txt")
    refused(stage1(ground, "stage1", steps=4), "stage1", "corpus")


def test_a_run_is_not_resumed_with_another_vocabulary(ground, refused, verb):
    verb("vocab", ground / "corpus", "--size", 96, "-o", ground / "vocab.txt", "--overwrite")
    refused(stage1(ground, "stage1", steps=4), "stage1", "vocab")


def test_a_run_is_not_resumed_with_another_teacher(ground, write_teacher, teacher_vocab, refused):
    shutil.rmtree(ground / "teacher")
    write_teacher(ground / "teacher", Vocab(teacher_vocab.pieces[:-3]))
    refused(stage1(ground, "stage1", steps=4), "stage1", "teacher")


def test_a_run_is_not_resumed_with_other_settings(ground, refused):
    refused(stage1(ground, "stage1", "--lr", "0.5", steps=4), "stage1", "lr")


def test_a_finished_run_may_be_given_more_steps(ground, refused, verb):
    out = ground / "stage1"
    report, said = verb(*stage1(ground, "stage1", steps=4))
    assert "steps raised from 2 to 4: from here on the learning rate follows the" in said
    assert "resuming from step-00000002" in said
    assert report["steps"] == 4
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in logged if "heldout" not in r] == [2, 4]
    assert logged[0]["heldout"] == report["heldout_first"]
    stood, _ = verb("info", out)
    assert (stood["steps"], stood["step"], stood["complete"]) == (4, 4, True)
    assert "is complete" in verb(*stage1(ground, "stage1", steps=4))[1]
    refused(stage1(ground, "stage1", steps=3), "stage1", "train.steps: 4 there, 3 now")
    refused(stage1(ground, "stage1", "--lr", "0.5", steps=6), "train.lr", "train.steps")


def test_a_finished_run_whose_log_was_emptied(ground, refused):
    (ground / "stage1" / "log.jsonl").write_text("")
    refused(stage1(ground, "stage1"), "log.jsonl has no evaluation")


def test_a_run_that_was_given_more_steps_and_stopped_is_not_complete(ground, verb):
    """The model in its folder is that of the steps before, until the new ones are done."""
    path = ground / "stage1" / "run.json"
    run = json.loads(path.read_text())
    run["description"]["train"]["steps"] = 4  # as it is from the start of the longer run on
    path.write_text(json.dumps(run))
    assert verb("info", ground / "stage1")[0]["complete"] is False
    report, said = verb(*stage1(ground, "stage1", steps=4))
    assert "is complete" not in said
    assert report["steps"] == 4
    assert verb("info", ground / "stage1")[0]["complete"] is True


def test_stage_two_needs_a_stage_one(ground, refused):
    shutil.rmtree(ground / "stage1")
    refused(stage2(ground, "new"), "stage1")
    shutil.copytree(ground / "teacher", ground / "stage1")
    refused(stage2(ground, "new"), "stage1")


def test_stage_two_with_another_width(ground, refused):
    refused(stage2(ground, "new", "--shape", "1x128"), "64", "128")


def test_stage_two_with_a_vocabulary_that_was_changed(ground, refused):
    path = ground / "stage1" / "model" / "student_vocab.txt"
    path.write_text(path.read_text() + "extra\n")
    refused(stage2(ground, "new"), "student_vocab.txt")


def test_a_cased_vocabulary_on_a_lower_cased_corpus(ground, refused):
    path = ground / "teacher" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "do_lower_case": False}))
    (ground / "teacher" / "tokenizer.json").unlink()
    refused(stage1(ground, "new"), "cased")


# ---- options and settings ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["fly"], "unknown verb 'fly'"),
        (["train"], "train needs --stage"),
        (["train", "--stage", "3"], "--stage must be 1 or 2"),
        (["distill", "nope.toml"], "nope.toml: no such file"),
        (["info", "nowhere"], "nowhere does not exist"),
        (["vocab", "nowhere", "-o", "v.txt"], "nowhere"),
    ],
)
def test_a_wrong_command(refused, command, said):
    refused(command, said)


@pytest.mark.parametrize(
    "more",
    [
        ["--steps", "0"],
        ["--rows", "-1"],
        ["--lr", "nan"],
        ["--lr", "inf"],
        ["--student-prob", "1.5"],
        ["--student-prob", "nan"],
        ["--row.length", "2"],
        ["--row.length", "100000"],
        ["--row.mask-prob", "1.5"],
        ["--row.mask-prob", "nan"],
        ["--device", "abacus"],
        ["--warmup", "nan"],
        ["--embedding-size", "0"],
    ],
    ids=" ".join,
)
def test_a_setting_out_of_range(ground, refused, more):
    message = refused(stage1(ground, "new", *more))
    assert re.search(more[0].split(".")[-1].strip("-").replace("-", "[-_ ]"), message)
    assert not (ground / "new" / "model").exists()


@pytest.mark.parametrize("more", [["--distill", "magic"], ["--shape", "6"], ["--shape", "0x64"]])
def test_a_stage_two_setting_out_of_range(ground, refused, more):
    refused(stage2(ground, "new", *more), more[1])


@pytest.mark.parametrize("more", [["--no-such-option"], ["--steps", "many"], ["--steps"]])
def test_wrong_options(ground, command_line, more):
    """The option parser's own refusal: exit code 2, names the option, no traceback."""
    code, out, err = command_line(*stage1(ground, "new", *more))
    assert code == 2
    assert more[0] in err
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("out = 'x'\nnonsense = 1\n", "nonsense"),
        ("[stage1]\nsteps = 'many'\n", "steps"),
        ("[stage1]\nsteps = -4\n", "steps"),
        ("[stage1\n", "settings.toml"),
        ("[arms.one]\nnonsense = 2\n", "nonsense"),
        ("[arms.'a/b']\nstart = 'random'\n", "a/b"),
        ("[vocab]\nlearner = 'magic'\n", "magic"),
        ("teacher = 3\n", "teacher"),
        ("[row]\nlength = 1\n", "length"),
        ("stage1 = 5\n", "stage1"),
    ],
)
def test_wrong_settings(tmp_path, refused, toml, said):
    (tmp_path / "settings.toml").write_text(toml)
    refused(["distill", tmp_path / "settings.toml", "-o", tmp_path / "out"], said)
    assert not (tmp_path / "out").exists()


def test_settings_that_are_not_utf8(tmp_path, refused):
    (tmp_path / "settings.toml").write_bytes(b"out = 'caf\xe9'\n")
    refused(["distill", tmp_path / "settings.toml"], "settings.toml")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "nowhere does not exist"),
        ("text.txt", "text.txt is a file, expected the folder of a run"),
        ("void", "void is empty; expected the folder of a run"),
        ("teacher", "teacher has no run.json in or below it; expected the folder of a run"),
    ],
)
def test_info_about_no_run(ground, refused, name, said):
    (ground / "void").mkdir()
    refused(["info", ground / name], said)


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda lines: [lines[0], '{"step": 1, "los', *lines[1:]], 2),
        (lambda lines: [*lines, "\0\0\0\0"], -1),
        (lambda lines: [*lines[:-1], '{"loss": 2.0}', ""], -1),
        (lambda lines: [*lines[:-1], '{"step": "x"}', lines[-1]], -1),
        (lambda lines: ["rubbish"], 1),
    ],
    ids=["cut in the middle", "zeros", "no step", "step of another kind", "all"],
)
def test_info_with_a_damaged_log_names_the_line(ground, refused, spoil, line):
    log = ground / "stage1" / "log.jsonl"
    lines = log.read_text().removesuffix("\n").split("\n")
    log.write_text("\n".join(spoil(lines)))
    if line < 0:
        line = len(lines) + (1 if "\0" in log.read_text() else 0)
    refused(
        ["info", ground / "stage1"], f"log.jsonl is corrupt at line {line}, which is not a record"
    )


def test_info_without_the_log_of_a_run_that_has_checkpoints(ground, refused):
    (ground / "stage1" / "log.jsonl").unlink()
    refused(["info", ground / "stage1"], "log.jsonl does not exist")


# ---- eval and export -----------------------------------------------------------------------------


def evaluated(folder: Path, model, *more) -> list:
    command = ["eval", model, "--corpus", folder / "corpus", "--row.length", "16"]
    return [*command, "--device", "cpu", "--threads", "1", "--dtype", "float32", *more]


def export(model, folder: Path, *more) -> list:
    pytest.importorskip("onnxruntime")
    return ["export", model, "--corpus", folder / "corpus", "-o", folder / "new", *more]


@pytest.mark.parametrize(
    "verb", [evaluated, lambda folder, model: export(model, folder)], ids=["eval", "export"]
)
def test_models_that_are_none(ground, refused, verb):
    refused(verb(ground, ground / "nowhere"), "nowhere", "no such folder")
    refused(verb(ground, ground / "text.txt"), "text.txt", "expected a folder")
    refused(verb(ground, ground / "corpus"), "config.json", "does not exist")
    config = ground / "teacher" / "tokenizer_config.json"
    config.write_text(config.read_text().replace("true", "false", 1))
    refused(verb(ground, ground / "teacher"), "tokenizer.json: normalizer has lowercase true")
    (ground / "teacher" / "tokenizer.json").unlink()
    refused(verb(ground, ground / "teacher"), "cased", ground / "corpus")
    weights = ground / "teacher" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    refused(verb(ground, ground / "teacher"), "model.safetensors")
    assert not (ground / "new").exists()


def test_wrong_settings_of_eval(ground, refused):
    teacher = ground / "teacher"
    refused(evaluated(ground, teacher, "--row.length", "500"), "500", "32 positions")
    refused(evaluated(ground, teacher, "--eval-rows", "0"), "eval_rows", "0")
    refused(evaluated(ground, teacher, "--words", "-1"), "words", "-1")
    refused([*evaluated(ground, teacher), "--corpus", ground / "nowhere"], "nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--data d --row.length 64", "--row.length is for --corpus, not for --data"),
        ("--data d --row.mask-prob 0.2", "--row.mask-prob is for --corpus, not for --data"),
        ("--data d --words 9", "--words is for --corpus, not for --data"),
        ("--data d --eval-rows 9", "--eval-rows is for --corpus, not for --data"),
        ("--data d --cased", "--cased is for --corpus, not for --data"),
        ("--corpus c --task sst-2", "--task is for --data, not for --corpus"),
        ("--corpus c --length 64", "--length is for --data, not for --corpus"),
        ("--corpus c --text t", "--text is for --data, not for --corpus"),
        ("--corpus c --label l", "--label is for --data, not for --corpus"),
        ("--data d --task embed --length 64", "--length is not for --task embed, whose"),
        ("--data d --task embed --cased", "--cased is not for --task embed, whose"),
    ],
)
def test_options_of_the_other_kind_of_eval(tmp_path, monkeypatch, refused, options, message):
    monkeypatch.chdir(tmp_path)
    refused(["eval", "model", *options.split()], message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--serve --cased", "--cased is not for --serve alone: give --page -o FOLDER too"),
        ("-o new --port 80", "--port is for --page: give that too"),
        ("-o new --serve", "--serve is for --page: give that too"),
        ("-o new --version 3", "--version is for --wheel NAME: give that too"),
        ("-o new --license MIT", "--license is for --wheel NAME: give that too"),
        ("-o new --page --int8", "--int8 is not for --page"),
        ("-o new --wheel w --head hidden", "--head is not for --wheel, which packs"),
    ],
)
def test_options_of_another_kind_of_export(tmp_path, monkeypatch, refused, options, message):
    monkeypatch.chdir(tmp_path)
    refused(["export", "model", *options.split()], message)
    assert not (tmp_path / "new").exists()


def test_an_export_to_where_something_is(ground, refused):
    teacher = ground / "teacher"
    (ground / "new").mkdir()
    (ground / "new" / "thesis.txt").write_text("mine")
    refused(export(teacher, ground), "new", "not empty")
    refused([*export(teacher, ground)[:-1], ground / "text.txt"], "text.txt", "not a folder")
    assert (ground / "new" / "thesis.txt").read_text() == "mine"


# ---- a disk that is full, and signals: in processes of their own ---------------------------------


def start(command: list, cwd: Path, **kwargs) -> subprocess.Popen:
    full = [sys.executable, "-m", "mvbert", *map(str, command)]
    pipe = subprocess.PIPE
    # A shell lets what it starts in the background ignore Ctrl-C, and children inherit that.
    kwargs.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    return subprocess.Popen(full, cwd=cwd, stdout=pipe, stderr=pipe, text=True, **kwargs)


def finish(child: subprocess.Popen) -> None:
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    assert json.loads(out.splitlines()[-1])


def small_files(limit: int):
    """Lets a child process write no file beyond `limit` bytes, as if the disk were full."""

    def apply() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return apply


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("verb", ["corpus", "vocab", "train 1", "train 2", "export"])
def test_a_full_disk(ground, verb):
    """What was there is as it was, nothing half-made is left, and the sentence names the file."""
    command, limit = {
        "corpus": (corpus(ground, ground / "text.txt"), 2000),
        "vocab": (["vocab", ground / "corpus", "--size", "100", "-o", ground / "new"], 100),
        "train 1": (stage1(ground, "new"), 60_000),
        "train 2": (stage2(ground, "new"), 60_000),
        "export": (export(ground / "teacher", ground), 60_000),
    }[verb]
    before = files_below(ground)
    child = start(command, ground, preexec_fn=small_files(limit))
    out, err = child.communicate(timeout=120)
    assert child.returncode == 2, err
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("mvbert: error: cannot write"), err
    assert not out.strip()
    after = files_below(ground)
    assert {name: after.get(name) for name in before} == before
    for name in after.keys() - before.keys():
        assert "partial" not in name, f"left behind: {name}"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_result_that_cannot_be_printed(ground):
    """A full disk under stdout is an error too, not a silent success."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "mvbert", "info", str(ground / "stage1")]
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    """As in `mvbert corpus --help | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "mvbert", "corpus", "--help"]
    done = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False
    )
    os.close(writer)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_goes_on_as_if_it_had_not(ground, sent, assert_same_run):
    """Stopped three times at different moments, it ends with the losses of an unbroken run."""
    steps, more = 60, ["--log-every", "1", "--save-every", "7", "--eval-every", "20"]
    finish(start(stage1(ground, "unbroken", *more, steps=steps), ground))
    stops = 0
    for wait in (1, 11, 30, steps):
        child = start(stage1(ground, "broken", *more, steps=steps), ground)
        log = ground / "broken" / "log.jsonl"
        while child.poll() is None:
            time.sleep(0.01)
            if log.exists() and re.search(rf'"step": ?{wait}\b', log.read_text()):
                child.send_signal(sent)
                break
        out, err = child.communicate(timeout=120)
        assert "Traceback" not in err
        if child.returncode == 0:
            break
        stops += 1
        assert child.returncode == (130 if sent != signal.SIGKILL else -signal.SIGKILL), err
        assert not out.strip()
    assert stops >= 1
    finish(start(stage1(ground, "broken", *more, steps=steps), ground))
    assert_same_run(ground / "broken", ground / "unbroken")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_corpus_that_is_interrupted_leaves_nothing(tmp_path, sent):
    text = write_text(tmp_path / "text.txt", 150_000, seed=3)
    for _ in range(10):
        child = start(corpus(tmp_path, text), tmp_path)
        while child.poll() is None and len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.005)
        child.send_signal(sent)
        out, err = child.communicate(timeout=120)
        if child.returncode:
            break
        shutil.rmtree(tmp_path / "new")  # it was done before the signal came: once more
    assert child.returncode == 130, err
    assert "Traceback" not in err
    assert not out.strip()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.txt"]


def test_a_signal_while_a_thread_is_started_lets_it_begin(tmp_path):
    """Otherwise the lock that Thread.start holds is lost, and the end waits for the thread."""
    code = """if True:
        import os, signal, sys, threading, time
        from mvbert import cli
        enter = threading.Condition.__enter__
        def interrupted(self):
            held = enter(self)
            if sys._getframe(2).f_code is threading.Thread.start.__code__:
                os.kill(os.getpid(), signal.SIGTERM)
            return held
        threading.Condition.__enter__ = interrupted
        def work():
            threading.Thread(target=print, args=["begun"]).start()
            time.sleep(60)
        sys.exit(cli.guarded(work))
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=50
    )
    assert done.returncode == 130, done.stderr
    assert done.stdout == "begun\n"
    assert done.stderr.startswith("mvbert: interrupted;")


@pytest.mark.parametrize(("when", "sent"), [("importing", "SIGINT"), ("ending", "SIGTERM")])
def test_a_signal_outside_of_the_work_is_code_130_too(tmp_path, when, sent):
    """An import that swallows the interrupt, and one more signal while Python is torn down."""
    kill = f"os.kill(os.getpid(), signal.{sent})"
    (tmp_path / "importing.py").write_text(
        f"import os, signal\ntry:\n    {kill}\nexcept BaseException: pass"
    )
    (tmp_path / "ending.py").write_text(
        "import os, signal\nclass Late:\n"
        f"    def __del__(self, os=os, signal=signal):\n        {kill}\n"
        "late = Late()\ndef work():\n    raise KeyboardInterrupt"
    )
    code = (
        "import sys\nfrom mvbert import cli\n"
        f"def work():\n    import {when}\n    {when}.work()\nsys.exit(cli.guarded(work))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("interrupted;")) == (130, 1), done.stderr
