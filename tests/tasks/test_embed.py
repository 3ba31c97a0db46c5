"""Sentence vectors: losses are their formulas, the folder opens everywhere, a student learns."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mvbert import cli
from mvbert.config import EmbedConfig
from mvbert.errors import InputError
from mvbert.model.huggingface import read_shape
from mvbert.tasks import embed
from mvbert.tasks.formats import Examples, find_task
from mvbert.tasks.model import load_bert
from mvbert.tasks.rows import make_rows, read_batch
from mvbert.tasks.sentence_model import (
    SentenceStudent,
    load_sentence_model,
    vectors_of,
    write_sentence_model,
)
from mvbert.tasks.sentences import sample_sentences, split_sentences
from mvbert.training.device import Device

CPU = Device(torch.device("cpu"), None, "")
FAST = ["--device", "cpu", "--threads", 1, "--dtype", "float32", "--heldout", 20]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, bert):
    """A model of sentence vectors with random weights, 16 wide."""
    folder = tmp_path_factory.mktemp("teacher")
    model, vocab, _ = load_bert(bert, 0.0, False)
    student = SentenceStudent(model, 16, 3)
    write_sentence_model(folder, student, vocab, 32, "")
    return folder


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    """300 sentences of a few words, and others that are too short."""
    folder = tmp_path_factory.mktemp("text")
    draw = np.random.default_rng(0)
    words = ["the", "river", "water", "small", "model", "house", "old", "young", "great", "world"]
    lines = [" ".join(draw.choice(words, 5)).capitalize() + ". No. " for _ in range(300)]
    (folder / "a.txt").write_text("\n".join(lines[:150]) + "\n\n" + "\n".join(lines))
    return folder / "a.txt"


@pytest.fixture(scope="module")
def sts(tmp_path_factory):
    """Pairs in STS-B's format: the score is the share of words in common."""
    path = tmp_path_factory.mktemp("sts") / "dev.tsv"
    rows = [("old house", "old house", 5), ("old house", "old river", 3), ("water", "world", 0),
            ("great river", "small model", 0.5)]  # fmt: skip
    lines = ["sentence1\tsentence2\tscore", *("\t".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines))
    return path


def test_sentences_end_at_full_stops(prose):
    assert split_sentences('He said "No." Then he left. Was it 3.5? Yes! a') == [
        'He said "No.', "Then he left.", "Was it 3.5?", "Yes! a"
    ]  # fmt: skip
    train, heldout = sample_sentences([str(prose)], 100, 20, 0, "text")
    assert (len(train), len(heldout)) == (100, 20)
    assert len({*train, *heldout}) == 120
    assert all(s.endswith(".") and len(s.split()) == 5 for s in train)
    assert (train, heldout) == sample_sentences([str(prose)], 100, 20, 0, "text")
    assert heldout != sample_sentences([str(prose)], 100, 20, 1, "text")[1]
    everything, _ = sample_sentences([str(prose)], 10_000, 20, 0, "text")
    assert len({*everything}) == len(everything) > 200
    with pytest.raises(InputError, match="different sentences of 3 to 60 words, not more than the"):
        sample_sentences([str(prose)], 10, 400, 0, "text")


def test_the_losses_are_their_formulas():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 6, 8, generator=generator, dtype=torch.float64).unbind()
    a, b = F.normalize(ours, dim=-1), F.normalize(theirs, dim=-1)
    assert torch.allclose(embed.direction_loss(ours, theirs), 1 - (a * b).sum(-1).mean())
    total = 0.0
    for i in range(6):
        others = [j for j in range(6) if j != i]
        p = torch.stack([b[i] @ b[j] / 0.1 for j in others]).softmax(0)
        q = torch.stack([a[i] @ a[j] / 0.1 for j in others]).softmax(0)
        total += float((p * (p / q).log()).sum())
    assert float(embed.similarity_loss(ours, theirs, 0.1)) == pytest.approx(total / 6)
    assert float(embed.similarity_loss(theirs * 3, theirs, 0.1)) == pytest.approx(0.0, abs=1e-12)
    assert float(embed.similarity_loss(ours[:2], theirs[:2], 0.1)) == 0.0
    config = EmbedConfig(prefixes=(2, 4), similarity_weight=0.5, temperature=0.1)
    wanted = sum(
        embed.direction_loss(ours[:, :d], theirs[:, :d])
        + 0.5 * embed.similarity_loss(ours[:, :d], theirs, 0.1)
        for d in (2, 4, 8)
    )
    assert torch.allclose(embed.embed_loss(ours, theirs, config), wanted / 3)


def test_principal_directions_turn_and_sort():
    draw = np.random.default_rng(0)
    vectors = (draw.standard_normal((500, 6)) * [1, 5, 2, 0.1, 3, 4]).astype(np.float32)
    turn = embed.principal_directions(vectors)
    assert np.allclose(turn.T @ turn, np.eye(6), atol=1e-5)
    lengths = np.square(vectors @ turn).sum(0)
    assert (np.diff(lengths) < 0).all()


def test_shared_nearest():
    draw = np.random.default_rng(0)
    a = draw.standard_normal((40, 5))
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    assert embed.shared_nearest(a, a, 10) == 1.0
    b = draw.standard_normal((40, 5))
    wanted = 0
    for i in range(40):
        sets = []
        for v in (a, b):
            order = [j for j in np.argsort(-(v @ v[i])) if j != i]
            sets.append({*order[:10]})
        wanted += len(sets[0] & sets[1])
    assert embed.shared_nearest(a, b, 10) == pytest.approx(wanted / 400)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory, bert, teacher, prose, sts):
    """A student of other weights that learnt, with prefixes 4 and 8."""
    out = tmp_path_factory.mktemp("vectors") / "out"
    start = shutil.copytree(bert, out.parent / "start")
    command = ["finetune", start, "embed", prose, "--teacher", teacher, "-o", out, *FAST,
               "--epochs", 6, "--batch", 16, "--lr", 3e-3,
               "--prefixes", 4, 8, "--sts", sts]  # fmt: skip
    assert cli.main([str(part) for part in command]) == 0
    return out


def test_a_student_learns_the_teachers_vectors(vectors, teacher, prose):
    result = json.loads((vectors / "embed.json").read_text())["result"]
    assert [*result["widths"]] == ["4", "8", "16"]
    assert result["widths"]["16"]["nearest"] > 0.7  # by chance 10 of 19
    assert result["widths"]["16"]["sts_spearman"] > 0.7
    assert not (vectors / "vectors").exists()
    # Similarities, which no turn of the axes changes, are the teacher's.
    texts = sample_sentences([str(prose)], 100, 20, 0, "text")[1]
    ours, theirs = (vectors_of(load_sentence_model(f), texts, CPU) for f in (vectors, teacher))
    assert np.abs(ours @ ours.T - theirs @ theirs.T).mean() < 0.1


def test_sentence_transformers_opens_it(vectors, teacher):
    library = pytest.importorskip("sentence_transformers")
    texts = ["the old river", "a small model of the world and of great words", ""]
    for folder in (vectors, teacher):
        theirs = library.SentenceTransformer(str(folder), device="cpu")
        found = theirs.encode(texts, convert_to_numpy=True)
        ours = vectors_of(load_sentence_model(folder), texts, CPU)
        assert found.shape == (3, 16)
        assert np.abs(found - ours).max() < 1e-5
    short = library.SentenceTransformer(str(vectors), device="cpu", truncate_dim=4)
    assert short.encode(texts).shape == (3, 4)


def test_transformers_and_export_take_it(vectors, tmp_path, verb):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(vectors)
    assert model.config.vocab_size == read_shape(vectors)[1].size
    pytest.importorskip("onnxruntime")
    report, _ = verb("export", vectors, "-o", tmp_path / "web", "--head", "pooled")
    assert report["files"]["onnx/model.onnx"]["largest"]["sentence_embedding"] < 1e-4


def test_without_prefixes_coordinates_are_the_teachers(
    bert, teacher, prose, tmp_path, verb, refused
):
    command = ["finetune", bert, "embed", prose, "--teacher", teacher, "-o", tmp_path / "out",
               *FAST, "--epochs", 3, "--batch", 16, "--lr", 3e-3]  # fmt: skip
    report, _ = verb(*command)
    assert [*report["widths"]] == ["16"]
    texts = sample_sentences([str(prose)], 100, 20, 0, "text")[1]
    ours, theirs = (
        vectors_of(load_sentence_model(f), texts, CPU) for f in (tmp_path / "out", teacher)
    )
    assert (ours * theirs).sum(1).mean() > 0.9
    again, said = verb(*command)
    assert again == report
    assert "is complete" in said
    refused([*command, "--seed", 1], "other settings (seed: 0 there, 1 now); give another --out")


def test_every_sentence_of_further_texts_is_trained_on(bert, teacher, prose, tmp_path, verb):
    also = tmp_path / "also.txt"
    also.write_text("The old house was small. No.\nA great river!\n\nA great river!\n")
    command = ["finetune", bert, "embed", prose, "--teacher", teacher, *FAST, "--sentences", 30]
    report, _ = verb(*command, "--also", also, prose, "-o", tmp_path / "out")
    sample, heldout = sample_sentences([str(prose)], 10_000, 20, 0, "text")
    assert report["sentences"] == len({*sample, *heldout}) - 20 + 2  # none twice, none held out


def test_the_pooler_learns_the_vectors_too(bert, teacher, prose, tmp_path, verb):
    texts = sample_sentences([str(prose)], 100, 20, 0, "text")[1]
    theirs = vectors_of(load_sentence_model(teacher), texts, CPU)
    rows = make_rows(find_task("classes"), Examples(texts, None, None, None, []),
                     load_bert(bert, 0.0, False)[1], 32)  # fmt: skip
    batch = read_batch(rows, np.arange(20), 0, CPU.device)
    errors = []
    for weight in (0, 1):
        out = tmp_path / str(weight)
        verb("finetune", bert, "embed", prose, "--teacher", teacher, *FAST, "-o", out,
             "--epochs", 6, "--batch", 16, "--lr", 3e-3, "--pooler-weight", weight)  # fmt: skip
        model = load_bert(out, 0.0, False)[0].eval()
        with torch.no_grad():
            hidden = model.encode(batch.input_ids, batch.token_type_ids, batch.mask)
            pooled = model.pooled(hidden[:, 0]).numpy().astype(np.float64)
        # The best affine map from the pooler's output to the teacher's vectors, on 20 texts.
        features = np.concatenate([pooled[:, :8], np.ones((20, 1))], 1)
        found = np.linalg.lstsq(features, theirs, rcond=None)[0]
        errors.append(np.square(features @ found - theirs).sum())
        initial = load_bert(bert, 0.0, False)[0].pooler.weight
        assert torch.equal(model.pooler.weight, initial) == (weight == 0)
    assert errors[1] < errors[0]


def test_the_teachers_vectors_are_made_once(bert, teacher, prose, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "CHUNK", 64)
    command = [
        "finetune",
        bert,
        "embed",
        prose,
        "--teacher",
        teacher,
        "-o",
        tmp_path / "out",
        *FAST,
    ]
    calls, find = [], embed.vectors_of

    def stopped(model, texts, device):
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return find(model, texts, device)

    monkeypatch.setattr(embed, "vectors_of", stopped)
    assert cli.main([str(part) for part in command]) == 130
    kept = {p.name: p.read_bytes() for p in (tmp_path / "out" / "vectors").iterdir()}
    assert len(kept) == 2
    monkeypatch.setattr(embed, "_train", lambda *_: None)  # as far as that
    assert cli.main([str(part) for part in command]) == 0
    assert calls[3] == 64
    total = sum(calls[3:-1])  # the last call is the student's, on what is held out
    assert total + 2 * 64 >= 250


def test_training_continues_where_it_was_stopped(bert, teacher, prose, tmp_path, monkeypatch):
    command = ["finetune", bert, "embed", prose, "--teacher", teacher, *FAST,
               "--epochs", 2, "--batch", 16, "-o"]  # fmt: skip
    assert cli.main([str(part) for part in [*command, tmp_path / "whole"]]) == 0
    save, steps = embed._save_state, []

    def stopped(path, student, optimizer, step):
        save(path, student, optimizer, step)
        steps.append(step)
        if step > 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(embed, "_save_state", stopped)
    cut = [str(part) for part in [*command, tmp_path / "cut"]]
    assert cli.main(cut) == 130
    assert not (tmp_path / "cut" / "modules.json").exists()
    monkeypatch.setattr(embed, "_save_state", lambda *given: steps.append(given[-1]))
    before = len(steps)
    assert cli.main(cut) == 0
    assert steps[before] == steps[before - 1] + 1
    for name in ("model.safetensors", "2_Dense/model.safetensors"):
        files = [(tmp_path / folder / name).read_bytes() for folder in ("cut", "whole")]
        assert files[0] == files[1], name
    assert not (tmp_path / "cut" / ".training.safetensors").exists()


def test_eval_scores_any_model_of_sentence_vectors(vectors, sts, verb):
    report, _ = verb("eval", vectors, "--task", "embed", "--data", sts, "--dtype", "float32")
    result = json.loads((vectors / "embed.json").read_text())["result"]
    assert report["dev"]["spearman"] == result["widths"]["16"]["sts_spearman"]


def test_tensors_that_are_not_used_are_named(bert, teacher, prose, sts, tmp_path, verb, with_extra):
    start, other = with_extra(bert, "start"), with_extra(teacher, "teacher")
    _, said = verb("finetune", start, "embed", prose, "--teacher", other, "-o", tmp_path / "out",
                   *FAST, "--epochs", 1)  # fmt: skip
    for folder in (start, other):
        assert said.count(f"{folder}: 1 tensor is not used: extra") == 1
    _, said = verb("eval", other, "--task", "embed", "--data", sts, "--dtype", "float32")
    assert f"{other}: 1 tensor is not used: extra" in said


def test_wrong_input(bert, teacher, prose, sts, tmp_path, refused):
    base = ["finetune", bert, "embed", prose, "-o", tmp_path / "out", *FAST]
    refused(base, "embed needs --teacher")
    refused([*base, "--teacher", tmp_path / "none"], "teacher", "no such folder")
    good = [*base, "--teacher", teacher]
    refused([*good, "--prefixes", 16], "prefix 16 is not below the teacher's width, 16")
    refused([*good, "--prefixes", 8, 4], "prefixes must be rising")
    refused([*good, "--length", 99], "length is 99", "32 positions")
    refused([*good, "--pooler-weight", -1], "pooler_weight must be 0 or more")
    refused([*good, "--muon-lr-ratio", 0], "muon_lr_ratio must be above 0")
    refused([*good, "--also", tmp_path / "none"], "none", "does not exist")
    refused([*good, "--heldout", 1], "heldout must be at least 2")
    refused([*good, "--sts", tmp_path / "none"], "does not exist")
    refused([*good, "--heldout", 5000], "not more than the 5000")
    refused(
        ["finetune", bert, "embed", tmp_path / "none.txt", "--teacher", teacher, "-o",
         tmp_path / "other", *FAST], "none.txt",
    )  # fmt: skip
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    refused(["finetune", bert, "embed", prose, "-o", tmp_path / "full", "--teacher", teacher,
             *FAST], "is not empty and has no embed.json")  # fmt: skip
    (tmp_path / "out" / "embed.json").write_text('{"description": {"seed": 1}}')
    refused(good, "holds a job with other settings (also: None there, [] now, ")
    refused(["eval", teacher, "--task", "embed", "--data", prose], "expected one of *.tsv")
