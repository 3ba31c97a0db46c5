"""Programs that run exported folders give the vectors that transformers computes from the model.

Each is skipped, with the reason, where it is not installed. transformers.js is looked for in the
folder MVBERT_NODE_MODULES, which `npm install @huggingface/transformers` fills.
"""

import importlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("onnx", reason="needs onnx")
pytest.importorskip("onnxruntime", reason="needs onnxruntime")

pytestmark = [
    pytest.mark.slow,
    # What the clients and their dependencies warn of is theirs.
    pytest.mark.filterwarnings("ignore"),
]

TEXTS = ["The old house by the river.", "Words", "A student learns the words of a paper."]
# Cosine with float32's vectors. The model has random weights, so that int8 is far from its worst.
INT8 = 0.995


def client(name: str):
    """A module; skips without it or where it does not import."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a client that does not fit the installed libraries
        pytest.skip(f"needs {name} ({type(error).__name__}: {str(error).splitlines()[0][:100]})")


@pytest.fixture(scope="module")
def source(tmp_path_factory, write_teacher, teacher_vocab) -> Path:
    """A sentence encoder: mean, dense, normalised; its weights far from nothing."""
    folder = tmp_path_factory.mktemp("clients") / "encoder"
    write_teacher(folder, teacher_vocab)
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(source, training_inputs) -> Path:
    """The export."""
    from mvbert.publish.export import run_export

    out = source.parent / "web"
    run_export(
        str(source), out, heads=["pooled"], int8=True, float16=True,
        corpus=training_inputs / "corpus",
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def wanted(source) -> np.ndarray:
    """Mean of the hidden states, [texts, H]."""
    tokens = transformers.AutoTokenizer.from_pretrained(source)(
        TEXTS, return_tensors="pt", padding=True
    )
    with torch.no_grad():
        hidden = transformers.AutoModel.from_pretrained(source).eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    return ((hidden * mask).sum(1) / mask.sum(1)).numpy()


def agree(found: np.ndarray, wanted: np.ndarray, file: str) -> None:
    found, wanted = (
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in (np.array(found), wanted)
    )
    cosines = (found * wanted).sum(1)
    assert found.shape == wanted.shape
    if file == "model_quantized":
        assert (cosines > INT8).all(), cosines
    else:
        bound = 1e-2 if file == "model_fp16" else 1e-5
        assert np.abs(found - wanted).max() < bound
    # Other texts' vectors are another matter.
    others = (found * np.roll(wanted, 1, axis=0)).sum(1)
    assert (cosines > others).all()


FILES = ["model", "model_fp16", "model_quantized"]


@pytest.mark.parametrize("file", FILES)
def test_sentence_transformers(file, folder, wanted):
    sentence_transformers = client("sentence_transformers")
    client("optimum.onnxruntime")
    model = sentence_transformers.SentenceTransformer(
        str(folder), backend="onnx", device="cpu", local_files_only=True,
        model_kwargs={"file_name": f"onnx/{file}.onnx", "provider": "CPUExecutionProvider"},
    )  # fmt: skip
    agree(model.encode(TEXTS), wanted, file)


@pytest.mark.parametrize("file", FILES)
def test_optimum(file, folder, wanted):
    optimum = client("optimum.onnxruntime")
    model = optimum.ORTModelForFeatureExtraction.from_pretrained(
        folder, subfolder="onnx", file_name=f"{file}.onnx"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(TEXTS, return_tensors="pt", padding=True)
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    agree(((hidden * mask).sum(1) / mask.sum(1)).detach().numpy(), wanted, file)


@pytest.mark.parametrize("file", FILES)
def test_fastembed(file, folder, wanted):
    fastembed = client("fastembed")
    description = client("fastembed.common.model_description")
    name = f"mvbert/{file}"
    fastembed.TextEmbedding.add_custom_model(
        model=name, pooling=description.PoolingType.MEAN, normalization=False,
        sources=description.ModelSource(hf=name), dim=wanted.shape[1],
        model_file=f"onnx/{file}.onnx",
    )  # fmt: skip
    model = fastembed.TextEmbedding(name, specific_model_path=str(folder), threads=1)
    agree(np.array([*model.embed(TEXTS)]), wanted, file)


SCRIPT = """
import { pipeline, env } from '@huggingface/transformers';
env.allowRemoteModels = false;
env.localModelPath = process.argv[2];
const texts = JSON.parse(process.argv[4]);
const extract = await pipeline('feature-extraction', 'web', { dtype: process.argv[3] });
const out = await extract(texts, { pooling: 'mean' });
const model = extract.model, inputs = extract.tokenizer(texts, { padding: true });
const { sentence_embedding } = await model(inputs);
console.log(JSON.stringify([out.tolist(), sentence_embedding.tolist()]));
"""


@pytest.mark.parametrize(
    ("file", "dtype"), [(FILES[0], "fp32"), (FILES[1], "fp16"), (FILES[2], "q8")]
)
def test_transformers_js(file, dtype, folder, wanted, tmp_path):
    modules = Path(os.environ.get("MVBERT_NODE_MODULES", ""))
    if shutil.which("node") is None:
        pytest.skip("needs node")
    if not (modules / "@huggingface" / "transformers").is_dir():
        pytest.skip("needs @huggingface/transformers in the folder MVBERT_NODE_MODULES")
    (tmp_path / "node_modules").symlink_to(modules)
    (tmp_path / "run.mjs").write_text(SCRIPT)
    done = subprocess.run(
        ["node", "run.mjs", str(folder.parent), dtype, json.dumps(TEXTS)],
        cwd=tmp_path, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for vectors in json.loads(done.stdout.splitlines()[-1]):
        agree(np.array(vectors), wanted, file)
