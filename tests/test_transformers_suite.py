"""transformers' own modelling tests on fused models: whatever passes without fuse passes with it.

    git clone --depth 1 --branch v4.57.6 https://github.com/huggingface/transformers
    TRANSFORMERS_SOURCE=transformers pytest -m slow tests/test_transformers_suite.py

or, since the source archive has the tests of all models, though not those of single families:

    pip download --no-deps --no-binary :all: transformers==4.57.6
    tar xzf transformers-4.57.6.tar.gz
    TRANSFORMERS_SOURCE=transformers-4.57.6 pytest -m slow tests/test_transformers_suite.py

Each suite runs twice in a process of its own; in the second, this file is a plugin that fuses every
model as it is built. Take the source of the installed version: tests of another may not import.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = "TRANSFORMERS_SOURCE"
FAMILY = "MVBERT_FAMILY"
FUSE = "MVBERT_FUSE_EVERY_MODEL"
OUTCOMES = "MVBERT_TEST_OUTCOMES"
FAMILIES = (
    "albert", "bert", "camembert", "convbert", "data2vec", "deberta_v2", "distilbert", "electra",
    "funnel", "gte", "jina_embeddings_v3", "modernbert", "mpnet", "nomic_bert", "nystromformer",
    "rembert", "roberta", "roberta_prelayernorm", "roformer", "squeezebert", "xlm_roberta", "xmod",
    "yoso",
)  # fmt: skip
# Some of these tests draw random weights and fail now and then, fused or not.
TRIES = 4


def suite_of(family: str, tmp_path: Path) -> tuple[Path, str]:
    """Where the tests of a family are run, and their file."""
    if SOURCE not in os.environ:
        pytest.skip(f"needs the source of transformers, its folder in {SOURCE}")
    source = Path(os.environ[SOURCE]).resolve()
    suite = f"tests/models/{family}/test_modeling_{family}.py"
    if (source / suite).is_file():
        return source, suite
    # The tests of all models import those of generation and of exporters, which are left out.
    tests = tmp_path / "tests"
    shutil.copytree(source / "tests", tests, ignore=shutil.ignore_patterns("models"))
    for name, left_out in (
        ("generation/test_utils", "Generation"),
        ("exporters/test_export", "Export"),
    ):
        stub = tests / f"{name}.py"
        if not stub.exists():
            stub.parent.mkdir()
            stub.write_text(f"class {left_out}TesterMixin:\n    pass\n")
    for folder in (tests, *filter(Path.is_dir, tests.iterdir())):
        (folder / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("transformers_cases.py"), tests / "test_cases.py")
    return tmp_path, "tests/test_cases.py"


def passing(folder: Path, tests: list[str], family: str, tmp_path: Path, fused: bool) -> set[str]:
    """The ids of those of `tests` that pass."""
    report = tmp_path / "outcomes.txt"
    report.write_text("")
    here = Path(__file__)
    path = os.pathsep.join(filter(None, (str(here.parent), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, FUSE: str(int(fused)), OUTCOMES: str(report),
        FAMILY: family,
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", here.stem, "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *tests], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    # 1: some failed, as they do without a network.
    if done.returncode not in (0, 1):
        if module := re.search(r"ModuleNotFoundError: No module named '(.+)'", done.stdout):
            pytest.skip(f"the tests of transformers need {module[1]}")
        pytest.fail(done.stdout[-3000:] + done.stderr[-3000:])
    # A test with subtests reports under one id several times.
    results = [line.split(" ", 1) for line in report.read_text().splitlines()]
    failed = {test for outcome, test in results if outcome == "failed"}
    return {test for outcome, test in results if outcome == "passed"} - failed


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_what_passes_without_fuse_passes_with_it(family, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    folder, suite = suite_of(family, tmp_path)
    if not hasattr(transformers.models, family):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    plain = passing(folder, [suite], family, tmp_path, fused=False)
    if not plain:
        pytest.skip(f"no test of {suite} passes without a network")
    missing = plain - passing(folder, [suite], family, tmp_path, fused=True)
    print(f"{family}: {len(plain)} pass, {len(missing)} of them not at first when fused")
    for _ in range(TRIES):
        if not missing:
            return
        missing -= passing(folder, sorted(missing), family, tmp_path, fused=True)
    pytest.fail(f"{len(missing)} of {len(plain)} fail when fused: {', '.join(sorted(missing))}")


# ---- the plugin, in the process that runs transformers' tests ----------------------------------


def pytest_configure(config):
    if os.environ.get(FUSE) != "1":
        return
    from transformers import PreTrainedModel

    from mvbert import InputError, fuse

    finish = PreTrainedModel.post_init

    def finish_and_fuse(model):
        finish(model)
        try:
            fuse(model)
        except InputError:
            # Not of a family that fuse supports.
            return

    PreTrainedModel.post_init = finish_and_fuse


def pytest_runtest_logreport(report):
    if OUTCOMES in os.environ and (report.when == "call" or report.failed):
        with open(os.environ[OUTCOMES], "a") as file:
            file.write(f"{report.outcome} {report.nodeid}\n")
