"""Task distillation: losses are their formulas, scores the teacher's, variants are seeded."""

import json
import shutil

import numpy as np
import pytest
import torch

from mvbert import cli
from mvbert.errors import InputError
from mvbert.files import read_json_object, write_json
from mvbert.progress import Progress
from mvbert.tasks import augment, loop
from mvbert.tasks.formats import Examples, find_task, read_task
from mvbert.tasks.model import Labels, load_bert, load_task_model
from mvbert.tasks.rows import make_rows
from mvbert.tasks.score import scores_of
from mvbert.tasks.teacher import Teacher, read_unlabelled
from mvbert.text.tokenizer import WordPieceTokenizer
from mvbert.training.device import Device

CPU = Device(torch.device("cpu"), None, "")
OPTIONS = ["--device", "cpu", "--threads", 1, "--dtype", "float32", "--dropout", 0]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, task_data, bert):
    """Teachers that know their task: sst-2, joint, number."""
    folder = tmp_path_factory.mktemp("teachers")
    for task, data, more in (
        ("sst-2", "sst", []), ("joint", "snips", []), ("number", "own", ["--label", "score"]),
    ):  # fmt: skip
        command = ["finetune", bert, task, task_data / data, "-o", folder / task, *more, *OPTIONS,
                   "--epochs", 4, "--lr", 5e-3, "--batch", 8]  # fmt: skip
        assert cli.main([str(part) for part in command]) == 0
    return folder


@pytest.fixture
def student(write_teacher, student_vocab, tmp_path):
    """A BERT of another vocabulary."""
    write_teacher(tmp_path / "student", student_vocab)
    return tmp_path / "student"


def test_the_losses_are_their_formulas():
    generator = torch.Generator().manual_seed(0)
    scores, teacher = torch.randn(2, 7, 3, generator=generator, dtype=torch.float64).unbind()
    classes = Labels("classes", ("a", "b", "c"))
    found = loop.soft_loss(classes, scores, teacher, 3.0)
    p, q = (teacher / 3).softmax(-1), (scores / 3).softmax(-1)
    assert torch.allclose(found, 9 * (p * (p / q).log()).sum(-1))
    assert torch.allclose(loop.soft_loss(classes, scores, scores, 2.0), torch.zeros(7).double())
    truth = torch.tensor([0, 1, 2, -100, 0, 0, 0])
    hard = loop.hard_loss(classes, scores, truth)
    assert hard[3] == 0
    assert hard[1] == pytest.approx(float(-scores[1].log_softmax(-1)[1]))
    number = Labels("number", ())
    found = loop.hard_loss(number, scores[:, :1], torch.tensor([1.0, float("nan")] + [0.0] * 5))
    assert found[1] == 0
    assert found[0] == pytest.approx((float(scores[0, 0]) - 1) ** 2)
    assert torch.equal(
        loop.soft_loss(number, scores[:, :1], teacher[:, :1], 9.0),
        (scores[:, 0] - teacher[:, 0]).square(),
    )


def test_scores_of_a_teacher_with_another_vocabulary(teachers, student_vocab):
    """Each place has the scores that the teacher gives to the same word, wherever it has one."""
    task = find_task("joint")
    model, vocab = load_task_model(teachers / "joint")
    # Another order of the labels, and words that one of the two has no piece of, or no place for.
    labels = Labels("joint", tuple(reversed(model.labels.names)))
    words = [["great", "old", "\u200b", "river"], ["house"], ["a"] * 40]
    examples = Examples(words, None, None, [["O"] * len(w) for w in words], [])
    rows = make_rows(task, examples, student_vocab, 64)
    teacher = Teacher(teachers / "joint", task, labels, Progress("test"))
    scores, known = teacher.scores(examples, rows, CPU)
    own = make_rows(task, examples, vocab, 32)
    full = scores_of(model, own, vocab, CPU)
    where = {}
    for row in range(3):
        for place in range(own.place_ends[row], own.place_ends[row + 1]):
            where[row, own.words[place]] = place
    for row in range(3):
        for place in range(rows.place_ends[row], rows.place_ends[row + 1]):
            at = where.get((row, rows.words[place]))
            assert known[place] == (at is not None)
            if at is not None:
                assert np.array_equal(scores[place], full[at][::-1])
    assert known.sum() == 4 + 2 + 31
    assert len(known) == 4 + 2 + 41


@pytest.mark.parametrize("task", ["sst-2", "joint", "number"])
def test_a_student_learns_from_the_teacher_alone(
    task, teachers, student, bert, task_data, tmp_path, finetune
):
    """Wrong labels of weight 0: what is learnt is the teacher's."""
    data = task_data / {"sst-2": "sst", "joint": "snips", "number": "own"}[task]
    wrong = shutil.copytree(data, tmp_path / "wrong")
    if task == "sst-2":
        lines = (wrong / "train.tsv").read_text().splitlines()
        lines = [line[:-1] + str(i % 2) if i else line for i, line in enumerate(lines)]
        (wrong / "train.tsv").write_text("\n".join(lines))
    elif task == "number":
        rows = [json.loads(line) for line in (wrong / "train.jsonl").read_text().splitlines()]
        rows = [{**r, "score": i % 2} for i, r in enumerate(rows)]
        (wrong / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    else:
        text = (wrong / "train" / "label").read_text().splitlines()
        (wrong / "train" / "label").write_text("\n".join(reversed(text)))
    # The number depends on the length: the other vocabulary's rows would be cut.
    more, model = (["--label", "score"], bert) if task == "number" else ([], student)
    report, said = finetune(
        model, task, wrong, tmp_path / "out", *more, "--teacher", teachers / task,
        "--teacher-weight", 1, "--epochs", 8, "--lr", 5e-3, "--batch", 8, "--dropout", 0,
    )  # fmt: skip
    assert "teacher: scoring 96 texts" in said
    name = {"sst-2": "accuracy", "joint": "intent_accuracy", "number": "pearson"}[task]
    taught = read_json_object(teachers / task / "finetune.json")["result"]["dev"][name]["median"]
    assert report["dev"][name]["median"] > taught - 0.15
    assert not (tmp_path / "out" / ".teacher.safetensors").exists()


def test_unlabelled_texts_and_variants(teachers, bert, task_data, tmp_path, finetune, monkeypatch):
    """More rows, labelled by the teacher alone, made once, kept over an interruption."""
    (tmp_path / "more.txt").write_text("a great river\n\nan old table\n")
    (tmp_path / "more.csv").write_text("sentence\na small house\n")
    options = (
        "--teacher", teachers / "sst-2", "--unlabelled", tmp_path / "more.txt",
        tmp_path / "more.csv", "--augment", 2, "--epochs", 1, "--batch", 8,
    )  # fmt: skip
    out = tmp_path / "out"
    seen = []
    fit = loop.Trainer.fit

    def spy(self, model, run):
        seen.append((len(self._rows), self._targets))
        if len(seen) == 1:
            raise KeyboardInterrupt
        return fit(self, model, run)

    monkeypatch.setattr(loop.Trainer, "fit", spy)
    command = ["finetune", bert, "sst-2", task_data / "sst", "-o", out, *OPTIONS, *options]
    assert cli.main([str(part) for part in command]) == 130
    variants = (out / "augmented.jsonl").read_bytes()
    monkeypatch.setattr(augment.Filler, "variants", None)  # not made again
    monkeypatch.setattr(Teacher, "scores", None)
    assert cli.main([str(part) for part in command]) == 0
    assert (out / "augmented.jsonl").read_bytes() == variants
    (first, a), (second, b) = seen
    assert first == second == 96 + 3 + 2 * 96
    assert np.array_equal(a.soft, b.soft)
    assert b.known.all()
    assert (b.hard[96:] == loop.IGNORED).all()
    assert (b.hard[:96] != loop.IGNORED).all()
    assert b.soft.argmax(-1)[96:98].tolist() == [1, 0]


def test_variants_are_words_in_place_of_words(bert, teacher_vocab):
    model, _, head = load_bert(bert, 0.0, False)
    assert head
    filler = augment.Filler(model, teacher_vocab, 32, CPU)
    texts = ["the great river of models and words", "house", "", "\u200b"]
    once = filler.variants(texts, (0, 0, 0))
    assert once == filler.variants(texts, (0, 0, 0))
    assert once != filler.variants(texts, (0, 1, 0))
    tokenizer = WordPieceTokenizer(teacher_vocab)
    assert [len(words) for words in once] == [7, 1, 0, 1]
    assert once[1] != ["house"] or filler.variants(texts, (0, 1, 0))[1] != ["house"]
    changed = sum(a != b for a, b in zip(once[0], texts[0].split(), strict=True))
    assert 1 <= changed <= 6
    for word, before in zip(once[0], texts[0].split(), strict=True):
        for piece in tokenizer.encode(word, add_special_tokens=False):
            assert teacher_vocab.pieces[piece] not in ("[UNK]", "[CLS]", "[SEP]", "[MASK]")
        assert word
        assert not word.startswith("##"), before
    long = filler.variants(["the " * 100], (0, 0, 0))[0]
    assert len(long) == 100
    assert long[31:] == ["the"] * 69, "what does not fit a row stays"


def test_variants_are_drawn_from_what_the_model_finds_likely(bert, teacher_vocab):
    model, _, _ = load_bert(bert, 0.0, False)
    with torch.no_grad():
        model.head.bias.fill_(-50.0)
        for word in ("water", "##s"):
            model.head.bias[teacher_vocab.ids[word]] = 50.0
    filler = augment.Filler(model, teacher_vocab, 32, CPU)
    made = filler.variants(["house"] * 20 + ["models"] * 20, (0, 0, 0))
    assert {words[0] for words in made[:20]} == {"water"}
    cut = WordPieceTokenizer(teacher_vocab).encode("rivers", add_special_tokens=False)
    assert len(cut) == 2
    assert filler.variants(["rivers"], (0, 0, 0)) == [["waters"]]


# ---- bad input -----------------------------------------------------------------------------------


def test_teachers_of_other_tasks(teachers, bert, task_data, tmp_path, refused):
    sst = ["finetune", bert, "sst-2", task_data / "sst", "-o", tmp_path / "out", *OPTIONS]
    refused([*sst, "--teacher", bert], "teacher", "has no layer that scores labels")
    refused([*sst, "--teacher", teachers / "joint"], "(joint), but the task has 2 (classes)")
    other = shutil.copytree(teachers / "sst-2", tmp_path / "other")
    config = read_json_object(other / "config.json")
    write_json(other / "config.json", config | {"id2label": {"0": "spam", "1": "ham"}})
    refused([*sst, "--teacher", other], "scores spam, ham", "was fine-tuned for another task")
    write_json(other / "config.json", config | {"id2label": {"0": "spam"}})
    refused([*sst, "--teacher", other], "id2label names 1 labels, but the weights score 2")
    refused([*sst, "--augment", 1], "unlabelled and augment need a teacher")
    refused([*sst, "--teacher", tmp_path / "none"], "teacher", "no such folder")
    refused(
        [*sst, "--teacher", teachers / "sst-2", "--temperature", 0], "temperature must be above 0"
    )


def test_unlabelled_texts_that_are_none(teachers, bert, task_data, tmp_path, refused):
    sst = ["finetune", bert, "sst-2", task_data / "sst", "-o", tmp_path / "out", *OPTIONS,
           "--teacher", teachers / "sst-2", "--unlabelled"]  # fmt: skip
    (tmp_path / "empty.txt").write_text("\n\n")
    refused([*sst, tmp_path / "empty.txt"], "there is no text")
    (tmp_path / "x.csv").write_text("text\na\n")
    refused([*sst, tmp_path / "x.csv"], "has no column sentence")
    task = find_task("classes", pair="other")
    with pytest.raises(InputError, match="pairs of texts need a table"):
        read_unlabelled(task, (str(tmp_path / "empty.txt"),))


def test_variants_need_a_head(teachers, task_data, tmp_path, refused):
    refused(
        ["finetune", teachers / "sst-2", "sst-2", task_data / "sst", "-o", tmp_path / "out",
         *OPTIONS, "--teacher", teachers / "sst-2", "--augment", 1],
        "has no masked-language-model head",
    )  # fmt: skip


def test_a_teacher_without_names_is_taken_in_order(teachers, task_data, tmp_path, capfd):
    other = shutil.copytree(teachers / "sst-2", tmp_path / "other")
    config = read_json_object(other / "config.json")
    del config["id2label"], config["label2id"]
    write_json(other / "config.json", config)
    task = find_task("sst-2")
    train = read_task(task, [str(task_data / "sst")])["train"]
    labels = Labels("classes", ("negative", "positive"))
    scores = [
        Teacher(folder, task, labels, Progress("test")).scores(
            train, make_rows(task, train, load_task_model(folder)[1], 32), CPU
        )[0]
        for folder in (teachers / "sst-2", other)
    ]
    assert np.array_equal(*scores)
    assert "does not name its labels; taken as negative, positive" in capfd.readouterr().err
