"""What every test shares: a clean import path, poisoned memory, real data, tiny inputs."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

ROOT = Path(__file__).resolve().parent.parent

# The folder kernels/ must never be found as `kernels`: that name is Hugging Face's, and
# transformers asks for it. So the root leaves the import path once mvbert itself has been found
# (where nothing is installed, it is found there). Child processes inherit PYTHONPATH as it came.
import mvbert  # noqa: E402, F401
from mvbert.files import data_folder  # noqa: E402

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

try:
    import torch
except ImportError:  # the text half of the package works, and is tested, without torch
    torch = None

# Triton reads this when it is first imported: without a device, kernels run in its interpreter.
if torch is not None and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Test processes side by side share the cores; a thread pool in each would only get in the way.
if torch is not None and "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# ---- hypothesis: same examples every time, no deadline on a shared machine -------------------

try:
    import hypothesis
except ImportError:  # tests that need it skip by pytest.importorskip
    pass
else:
    hypothesis.settings.register_profile(
        "mvbert", deadline=None, derandomize=True, database=None, print_blob=True
    )
    hypothesis.settings.load_profile("mvbert")


# ---- memory that nobody wrote is poison ------------------------------------------------------


def _called_from_package() -> bool:
    """Whether the caller of the patched function is a module of mvbert."""
    name = sys._getframe(2).f_globals.get("__name__", "")
    return name == "mvbert" or name.startswith("mvbert.")


def _poison_tensor(tensor):
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    if tensor.dtype == torch.bool:
        return tensor
    return tensor.fill_(torch.iinfo(tensor.dtype).max // 2)


def _poisoned_torch(original):
    def allocate(*args, **kwargs):
        # Inside torch.compile the allocation must stay the one the compiler knows.
        if torch.compiler.is_compiling() or not _called_from_package():
            return original(*args, **kwargs)
        return _poison_tensor(original(*args, **kwargs))

    return allocate


def _poisoned_numpy(original):
    def allocate(*args, **kwargs):
        array = original(*args, **kwargs)
        if _called_from_package():
            if array.dtype.kind in "fc":
                array.fill(float("nan"))
            elif array.dtype.kind in "iu":
                array.fill(numpy.iinfo(array.dtype).max // 2)
        return array

    return allocate


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory():
    """The package's new memory holds NaN, or indices out of range: what is never written shows."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like"):
            patch.setattr(numpy, name, _poisoned_numpy(getattr(numpy, name)))
        if torch is not None:
            for name in ("empty", "empty_like", "empty_strided"):
                patch.setattr(torch, name, _poisoned_torch(getattr(torch, name)))
            for name in ("new_empty", "new_empty_strided"):
                patch.setattr(torch.Tensor, name, _poisoned_torch(getattr(torch.Tensor, name)))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_power_cuts():
    """fsync returns at once: it is most of a small checkpoint's time, and no test cuts the power.

    Tests that look for its calls, or fork before one, put their own in its place.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


# ---- rounding errors -------------------------------------------------------------------------

# Numeric tests compare with float64, and bound the largest error by a model of rounding:
#
#     max |found - truth| <= ROUNDING * unit * max |truth|
#     unit = max(eps(dtype), eps(dtype of the sums) * sqrt(terms of the longest sum))
#
# Errors of a sum go up and down, so they grow as the root of its terms; sums of 16-bit dtypes are
# added in float32 and rounded once. What another library is off by is no bound: it differs from
# processor to processor. The norm is the largest element, so that one wrong element is seen however
# many right ones surround it.
#
# The largest error measured is given in docs/log.md, 2026-11-29, by op and processor: less than a
# quarter of the bound. tests/kernels/test_mutations.py holds what must be far above it.
ROUNDING = 8.0


def _share_of_bound(found, truth, longest_sum: int, dtype=None, norm=None) -> float:
    """The largest error of `found` over what rounding explains: above 1, it is something else.

    Args:
        found: any shape, any floating-point dtype; NaN and infinity fail at once.
        truth: the same shape, float64.
        longest_sum: terms of the longest sum behind an element.
        dtype: what was computed in, where `found` has another one by now.
        norm: what errors are relative to, where `truth` is a small difference of larger numbers.
    """
    dtype = dtype or found.dtype
    assert found.shape == truth.shape
    assert truth.dtype == torch.float64
    assert found.isfinite().all()
    if not found.numel():
        return 0.0
    sums = torch.promote_types(dtype, torch.float32)
    unit = max(torch.finfo(dtype).eps, torch.finfo(sums).eps * longest_sum**0.5)
    error = (found.double() - truth).abs().max().item()
    norm = norm or truth.abs().max().item() or 1.0
    return error / (ROUNDING * unit * norm)


@pytest.fixture(scope="session")
def share_of_bound():
    """share_of_bound(found, truth, longest_sum): the error in units of the bound of rounding."""
    return _share_of_bound


@pytest.fixture
def assert_rounded(record_property):
    """assert_rounded(found, truth, longest_sum): no error that rounding does not explain."""

    def check(found, truth, longest_sum: int, dtype=None, norm=None) -> None:
        share = _share_of_bound(found.detach(), truth.detach(), longest_sum, dtype, norm)
        record_property("share_of_bound", share)
        assert share <= 1, f"{share * ROUNDING:.3g} units of rounding, more than {ROUNDING}"

    return check


# ---- places ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root."""
    return ROOT


@pytest.fixture(scope="session")
def git_files() -> Callable[..., list[str]]:
    """Lists the files that git knows, by paths from the root; takes options of `git ls-files`."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the git checkout")

    def listed(*options: str) -> list[str]:
        command = ["git", "ls-files", "-z", *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return [name for name in done.stdout.split("\0") if name]

    return listed


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real corpora and vocabularies; skips without it."""
    folder = data_folder()
    if not folder.is_dir():
        pytest.skip("needs the public data; run: python docs/experiments/get_data.py")
    return folder


@pytest.fixture(scope="session")
def shared_file(shared_data):
    """A function from a file name to its path in the shared data; skips naming a missing file."""

    def find(name: str) -> Path:
        path = shared_data / name
        if not path.exists():
            pytest.skip(f"needs {name} in the data folder (docs/experiments/get_data.py)")
        return path

    return find


# ---- children that are killed ----------------------------------------------------------------

# What Python tells audit hooks of before it happens; fsync is told of below.
FILE_OPERATIONS = {
    "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate",
    "shutil.rmtree", "tempfile.mkdtemp", "tempfile.mkstemp", "ctypes.dlopen", "fsync",
}  # fmt: skip


def _in_child(work: Callable[[], object], kill_at: int) -> bool:
    """Runs work in a fork that kills itself before its file operation number `kill_at`.

    Returns:
        Whether it was killed; False: it had fewer operations and is done.
    """
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the work failed by itself"
        return os.WIFSIGNALED(status)
    count = 0

    def told(event: str, _: object) -> None:
        nonlocal count
        if event in FILE_OPERATIONS:
            count += 1
            if count > kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    fsync = os.fsync

    def told_fsync(handle: int) -> None:
        told("fsync", None)
        fsync(handle)

    code = 1
    try:
        os.fsync = told_fsync
        sys.addaudithook(told)
        work()
        code = 0
    finally:
        os._exit(code)


@pytest.fixture
def in_child():
    """A function that runs work in a fork and kills it before a file operation of its own."""
    return _in_child


# ---- tiny inputs -----------------------------------------------------------------------------

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = list("abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'()-")
STUDENT_WORDS = ["the", "of", "and", "to", "in", "is", "##s", "##ing", "##ed", "##er", "##ion"]
TEACHER_WORDS = [
    *STUDENT_WORDS, "a", "river", "water", "small", "model", "models", "word", "words", "learn",
    "train", "teacher", "student", "table", "vocabulary", "sentence", "paper", "##ly", "##ment",
    "##est", "##able", "##ness", "book", "light", "house", "old", "young", "great", "world",
]  # fmt: skip

TEXT = """\
The small river runs past the old house, and the water is cold in winter.
A student learns the words of a language by reading great books slowly.

The teacher reads the same sentence twice: once in small pieces, once in large ones.
Every word of the paper is in the table; no word of the table is in the paper.
Training a small model is cheaper than training a large model, but it learns less.

Light from the young stars reaches the world after many years.
The vocabulary of a child grows by ten words a day, and nobody is teaching them.
"""

JOB_TABLES = """\
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
dtype = "float32"
[stage2]
shape = "1x64"
distill = []
steps = 4
rows = 4
eval_rows = 4
threads = 1
dtype = "float32"
"""


def _vocab(words: list[str]):
    from mvbert.text.vocab import Vocab

    pieces = [*SPECIALS, *LETTERS, *("##" + c for c in LETTERS), *words]
    return Vocab(tuple(dict.fromkeys(pieces)))


@pytest.fixture(scope="session")
def teacher_vocab():
    """A tiny teacher vocabulary."""
    return _vocab(TEACHER_WORDS)


@pytest.fixture(scope="session")
def student_vocab():
    """A tinier student vocabulary: every letter, few words."""
    return _vocab(STUDENT_WORDS)


@pytest.fixture(scope="session")
def text() -> str:
    """Three short documents, one paragraph a line, blank lines between documents."""
    return TEXT


@pytest.fixture(scope="session")
def write_teacher():
    """A function that writes a tiny BERT with random weights as a new Hugging Face folder."""
    from mvbert.config import ModelConfig
    from mvbert.model import huggingface
    from mvbert.model.masked_lm import MaskedLM

    def write(folder: Path, vocab) -> None:
        model = MaskedLM(ModelConfig(vocab.size, 32, 2, 2, 64, max_position_embeddings=32))
        model.init_weights(1)
        folder.mkdir()
        huggingface.write_model(folder, model, vocab, "")

    return write


@pytest.fixture(scope="session")
def job_tables() -> str:
    """Settings of a tiny job or study: all that is not about its arms; the last table is stage2."""
    return JOB_TABLES


@pytest.fixture(scope="session")
def training_inputs(tmp_path_factory, text, write_teacher, teacher_vocab, student_vocab) -> Path:
    """text.txt, corpus/, teacher/ and stage1/, the result of a Stage I that did not train; to read.

    Tests that change them take `job`.
    """
    from mvbert.config import RowConfig, Stage1Config
    from mvbert.progress import Progress
    from mvbert.text.corpus import Corpus, build_corpus
    from mvbert.training import checkpoint
    from mvbert.training.stages import Stage1

    folder = tmp_path_factory.mktemp("training")
    (folder / "text.txt").write_text(text * 4)
    build_corpus([folder / "text.txt"], folder / "corpus", heldout_share=0.2)
    write_teacher(folder / "teacher", teacher_vocab)
    task = Stage1(
        Stage1Config(embedding_size=64),
        RowConfig(length=16),
        Corpus.open(folder / "corpus"),
        folder / "teacher",
        student_vocab,
        Progress("test"),
    )
    torch.nn.init.normal_(task.model.student.bias, std=0.1)  # as trained: not all 0
    (folder / "stage1").mkdir()
    task.write_model(folder / "stage1")
    checkpoint.write_manifest(folder / "stage1")
    return folder


@pytest.fixture(scope="session")
def corpus(training_inputs):
    """The corpus of `training_inputs`, opened."""
    from mvbert.text.corpus import Corpus

    return Corpus.open(training_inputs / "corpus")


# ---- awkward text ------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def awkward_vocab():
    """awkward_vocab(lowercase, strip_accents): a vocabulary with two added pieces."""
    from mvbert.text.vocab import SPECIAL_PIECES, AddedPiece, Vocab

    letters = "abcdefghijklmnopqrstuvwxyz"
    added = (AddedPiece("<new>", normalized=True), AddedPiece("Added"))
    pieces = (
        *SPECIAL_PIECES, *letters, *(f"##{c}" for c in letters), "hello", "wor", "##ld", ",", "!",
        "[", "]", "中", "é", "##é", "слов", "##о", "σ", "##σ", "ᄒ", "##ᅡ", "##ᆫ", "__proto__",
        "constructor", "\ufeffx", "\u2028", "\\", "</script>", "😀", "", "<new>", "Added",
    )  # fmt: skip

    def make(lowercase: bool, strip_accents: bool) -> Vocab:
        size = len(pieces) - len(added)
        return Vocab(pieces, lowercase, strip_accents, added=added, base_size=size)

    return make


@pytest.fixture(scope="session")
def awkward_texts():
    """awkward_texts(count): that many random strings after those that are known to be awkward."""
    import random

    known = [
        "Hello, world!", "", "  ", "héllo\u0301 wörld", "слово слов", "x中y 한", "q" * 101,
        "b" * 5000, "[MASK] hello[SEP]world [mask] [MASK[MASK]]", "<NEW>x Added added",
        "zero\u200bwidth", "nul\0inside", "hello " * 3000, "😀 unknown 😀", "Σας ΟΔΟΣ",
        "a\tb\nc\rd\u3000e\u2028f", "ﬁ Ⅷ \ufb2c", "\ufeffx begins", "lone \ud800 surrogates \udc00",
        "\udc00\ud800", "e\u0301" * 50, "𝄞𝅘𝅥𝅮 clef", "İstanbul ı ẞ",
    ]  # fmt: skip
    random_ = random.Random(11)
    alphabet = [
        *"ab 中é\u0301\u200b\0[]!ΣσİҐ한\u0345\uffff\U0001d15e\n\ud83dabcdefghijklmnopqrstuvwxyz"
    ]
    alphabet += ["[MASK]", "<new>", "Added", "hello", " "]

    def make(count: int) -> list[str]:
        texts = []
        for _ in range(count):
            parts = random_.choices(alphabet, k=random_.randint(0, 40))
            parts += [chr(random_.randrange(0x20, 0x30000)) for _ in range(random_.randint(0, 5))]
            random_.shuffle(parts)
            # (Two surrogates side by side are one character in JavaScript: so they are here.)
            units = "".join(parts).encode("utf-16-le", "surrogatepass")
            texts.append(units.decode("utf-16-le", "surrogatepass"))
        return known + texts

    return make


# ---- the command line ------------------------------------------------------------------------


@pytest.fixture
def command_line(capfd):
    """A function that runs a command line in this process: (exit code, stdout, stderr)."""
    from mvbert import cli

    def run(*command) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            code = cli.main([str(part) for part in command])
        except SystemExit as stop:  # wrong options leave through the option parser
            code = stop.code
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def verb(command_line):
    """A function that runs a command line; returns its report and what it says on the way."""

    def run(*command) -> tuple[dict, str]:
        code, out, err = command_line(*command)
        assert code == 0, err
        return json.loads(out.splitlines()[-1]), err

    return run


@pytest.fixture
def refused(command_line):
    """A function that asserts a refusal in one sentence that holds every text named."""

    def check(command: list, *named) -> str:
        code, out, err = command_line(*command)
        assert code == 2, f"exit code {code}\n{out}\n{err}"
        assert "Traceback" not in out + err
        assert not out.strip(), "a refusal has no result"
        lines = err.strip().splitlines()
        assert lines[-1].startswith("mvbert: error: "), err
        assert sum(line.startswith("mvbert: error:") for line in lines) == 1
        for text in named:
            assert str(text) in lines[-1], f"{text!r} is not in: {lines[-1]}"
        return lines[-1]

    return check


# ---- what a run leaves -----------------------------------------------------------------------


def _numbers(out: Path) -> list[dict]:
    from mvbert.training import runs

    clock = ("pieces_per_second", "mfu", "data_wait", "teacher_us_per_piece")
    return [{k: v for k, v in r.items() if k not in clock} for r in runs.read_log(out)]


@pytest.fixture(scope="session")
def numbers():
    """A function from a run's folder to its log without what depends on the clock."""
    return _numbers


@pytest.fixture(scope="session")
def losses():
    """A function from a run's folder to all numbers of `numbers`, one after the other."""
    return lambda out: [v for r in _numbers(out) for v in r.get("heldout", r).values()]


@pytest.fixture(scope="session")
def assert_same_run():
    """A function that asserts that two runs wrote the same log and the same weights."""

    def weights(folder: Path) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in (folder / "model").glob("*.safetensors")}

    def check(out: Path, reference: Path) -> None:
        assert _numbers(out) == _numbers(reference), out
        assert weights(out) == weights(reference) != {}, out

    return check
