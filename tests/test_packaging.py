"""The package as a whole: the build is fresh, the link intact, the lists complete."""

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import mvbert


def source_hash(root: Path) -> str:
    """What CMakeLists.txt bakes into the module: SHA-256 over one "name digest" line a file."""
    names = [
        f"csrc/{f.name}" for f in (root / "csrc").iterdir() if f.suffix in {".cc", ".h", ".inc"}
    ]
    lines = [
        f"{name} {hashlib.sha256((root / name).read_bytes()).hexdigest()}\n"
        for name in sorted([*names, "CMakeLists.txt"])
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def imported_at_load(path: Path) -> set[str]:
    """The modules that importing a file imports at once (not inside functions)."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_the_extension_is_built_from_these_sources(root):
    from mvbert import _core

    hint = "the built extension is stale; run: python setup.py build_ext --inplace"
    assert _core.source_hash == source_hash(root), hint
    assert _core.__version__ == mvbert.__version__, hint


def test_the_link_to_kernels_is_a_link(root):
    link = root / "mvbert" / "kernels"
    if not link.is_symlink() and link.is_file():
        pytest.skip("this checkout has no symbolic links")
    assert os.readlink(link) == "../kernels"


def test_kernels_import_under_the_name_of_the_package(root):
    from mvbert import kernels

    assert kernels.__name__ == "mvbert.kernels"
    assert Path(kernels.__file__).resolve() == root / "kernels" / "__init__.py"


def test_the_test_folders_are_no_packages(root):
    """A tests/kernels/__init__.py would make `import kernels` find the tests."""
    assert not list((root / "tests").rglob("__init__.py"))


def test_every_package_is_listed_in_setup(root):
    listed = set(
        re.search(r"packages=\[(.*?)\]", (root / "setup.py").read_text(), re.S)[1].split('"')
    )
    folders = {
        ".".join(path.parent.relative_to(root).parts)
        for path in (root / "mvbert").rglob("*")
        if path.suffix in (".py", ".toml") and "kernels" not in path.parts
    }
    assert folders <= listed
    assert not [p for p in (root / "kernels").rglob("*.py") if p.parent != root / "kernels"]


LAUNCHES = {
    "import": ["-c", "import mvbert; print('mvbert', mvbert.__version__)"],
    "python -m": ["-m", "mvbert", "--version"],
    "torchrun -m": [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=1",
        "-m",
        "mvbert",
        "--version",
    ],
}


PLACES = ["parent", "clone", "elsewhere"]
STARTS = [(launch, place) for launch in LAUNCHES for place in PLACES if launch != "torchrun -m"]


@pytest.mark.parametrize(("launch", "place"), [*STARTS, ("torchrun -m", "parent")])
def test_mvbert_starts_in_any_folder(root, tmp_path, launch, place):
    """Above a clone named mvbert too: there Python could take the clone for a namespace package."""
    try:
        metadata.distribution("mvbert")
    except metadata.PackageNotFoundError:
        pytest.skip("needs mvbert to be installed: pip install -e .")
    if launch == "torchrun -m":
        pytest.importorskip("torch")
    (tmp_path / "mvbert" / "mvbert").mkdir(parents=True)  # as empty as an unbuilt clone looks
    (tmp_path / "elsewhere").mkdir()
    folder = {"parent": tmp_path, "clone": root, "elsewhere": tmp_path / "elsewhere"}[place]
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [sys.executable, *LAUNCHES[launch]],
        cwd=folder, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"mvbert {mvbert.__version__}"


def test_the_root_of_the_clone_is_not_on_the_path_of_an_editable_install(root, tmp_path):
    """What is on it is a folder with nothing but the package: `kernels` stays Hugging Face's."""
    code = "import sys, mvbert.files; print(mvbert.files.__file__); print(*sys.path[1:], sep='\\n')"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip("needs mvbert to be installed: pip install -e .")
    file, *path = done.stdout.splitlines()
    assert root not in [Path(entry).resolve() for entry in path]
    if root in Path(file).parents:
        assert Path(file) == root / "mvbert" / "files.py"


def test_importing_mvbert_is_cheap():
    """Neither torch nor the extension is loaded: either half works where the other is missing."""
    code = (
        "import sys, mvbert;"
        "heavy = {'torch', 'triton', 'transformers', 'mvbert._core'} & set(sys.modules);"
        "sys.exit(' '.join(sorted(heavy)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"import mvbert loads {done.stderr.strip()}"


@pytest.mark.parametrize("name", mvbert.__all__)
def test_every_public_name_is_there(name):
    if name in ("fuse", "unfuse"):
        pytest.importorskip("torch")
    assert getattr(mvbert, name).__name__ == name
    assert getattr(mvbert, name) is getattr(mvbert, name)


def test_extras_are_imported_lazily(root):
    """Optional packages are imported where they are used, so that none is needed to start."""
    optional = {"transformers", "tokenizers", "huggingface_hub", "tensorboard", "sentencepiece"}
    optional |= {"pyarrow", "zstandard", "sympy", "networkx", "hypothesis", "pytest", "matplotlib"}
    for path in sorted((root / "mvbert").rglob("*.py")):
        early = {name.split(".")[0] for name in imported_at_load(path)} & optional
        assert not early, f"{path.name} imports {early} at load"


def test_there_is_no_pickle(root):
    """Nothing that is loaded can run code: no pickle, no torch.save, torch.load of weights only."""
    for folder in ("mvbert", "kernels"):
        for path in sorted((root / folder).rglob("*.py")):
            source = path.read_text(encoding="utf-8")
            assert not re.search(r"^\s*(import|from) (pickle|dill|joblib|shelve)", source, re.M), (
                path
            )
            assert not re.search(r"torch\.save\(|allow_pickle=True", source), path
            for call in re.findall(r"torch\.load\([^`]*?\)", source):
                assert "weights_only=True" in call, path


def test_nothing_committed_names_a_private_place(root, git_files):
    """No absolute path of a home or work folder, and no registry host, is in the repository."""
    private = re.compile(rb"(?<![\w.])/(root|home/\w+|work)/\w|pypi\.org|download\.pytorch\.org")
    for name in git_files():
        path = root / name
        if path.is_symlink() or not path.is_file() or name == "tests/test_packaging.py":
            continue
        found = private.search(path.read_bytes())
        assert not found, f"{name} holds {found[0].decode()!r}"


ROOT = Path(__file__).resolve().parents[1]
CHECKS = (ROOT / ".ci" / "check").read_text().split("\n\n")[1].splitlines()


@pytest.mark.parametrize("command", CHECKS, ids=lambda command: " ".join(command.split()[:2]))
def test_the_checks_of_a_commit_pass(root, command):
    """What `make check` and pre-commit run; of mypy and clang-format `make test` brings neither."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if shutil.which(command.split()[0], path=path) is None:
        pytest.skip(f"needs {command.split()[0]} (extra dev)")
    done = subprocess.run(
        command, shell=True, cwd=root, env={**os.environ, "PATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_pre_commit_and_make_run_the_list_of_checks(root):
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load((root / ".pre-commit-config.yaml").read_text())
    assert [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]] == [".ci/check"]
    assert re.search(r"^check: .*\n\t@\.ci/check$", (root / "Makefile").read_text(), re.MULTILINE)
    assert [command.split()[0] for command in CHECKS] == ["ruff", "ruff", "clang-format", "mypy"]


def test_the_workflow_runs_commands_that_exist(root):
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((root / ".github" / "workflows" / "ci.yml").read_text())
    jobs = workflow["jobs"]
    lines = [
        line
        for job in jobs.values()
        for step in job["steps"]
        for line in step.get("run", "").splitlines()
    ]
    assert {".ci/run", "make check", "python -m build --sdist"} <= {*lines}
    makefile = (root / "Makefile").read_text()
    for line in lines:
        first, *rest = line.split()
        if first == "make":
            assert re.search(rf"^{rest[0]}:", makefile, re.MULTILINE), line
        elif first != "python":
            assert os.access(root / first, os.X_OK), line
    assert set(jobs["wheels"]["strategy"]["matrix"]["os"]) == {
        "ubuntu-24.04", "ubuntu-24.04-arm", "macos-15"
    }  # fmt: skip


def test_the_files_that_contributing_names_exist(root):
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:mvbert|kernels|bench|tests|docs|csrc)/[\w/.-]*\w", text))
    assert len(named) > 10
    missing = {name for name in named if not (root / name).exists()}
    assert missing == {"tests/kernels/__init__.py"}  # which must not exist


def test_the_commands_of_the_readme_exist(root):
    makefile = (root / "Makefile").read_text()
    targets = set(re.findall(r"^(?:\$ )?make (\w+)", (root / "README.md").read_text(), re.M))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target
    assert "make test" in (root / ".ci" / "run").read_text()


# ---- distributions: minutes, so only on request ------------------------------------------------


@pytest.fixture(scope="module")
def distributions(root, tmp_path_factory):
    """An sdist of the tree, and a wheel built from that sdist, without a network."""
    folder = tmp_path_factory.mktemp("dist")
    pytest.importorskip("build", reason="needs the package build (extra dev)")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is absent from the `packages` configuration" not in done.stdout + done.stderr
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_sdist_is_complete(root, git_files, distributions):
    with tarfile.open(distributions[0]) as sdist:
        held = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    left_out = {".gitignore", "mvbert/kernels"}
    wanted = [name for name in git_files() if not name.startswith("models/")]
    assert not [name for name in wanted if name not in held | left_out]
    # The kernels are there once, and weights are for those who clone.
    assert not [name for name in held if name.startswith(("mvbert/kernels/", "models/"))]


@pytest.mark.slow
def test_the_wheel_holds_the_kernels_under_mvbert_only(distributions):
    names = zipfile.ZipFile(distributions[1]).namelist()
    data = {"mvbert/presets/demo.toml", "mvbert/publish/sample.txt"}
    assert {"mvbert/kernels/__init__.py", *data} <= {*names}
    assert any(re.match(r"mvbert/_core\..*\.so$", name) for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"mvbert"}


@pytest.mark.slow
def test_the_wheel_works_in_a_clean_environment(distributions, tmp_path):
    """Installed without its dependencies, outside the tree: the package is whole."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", distributions[1]]
    env = {"PATH": os.environ["PATH"]}  # no PYTHONPATH: pip would find the tree's mvbert there
    subprocess.run(install, check=True, env=env)
    code = (
        "import mvbert, mvbert.kernels, mvbert._core as t; from importlib import metadata;"
        "assert t.__version__ == mvbert.__version__ == metadata.version('mvbert')"
    )
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "venv" / "bin" / "mvbert").exists()
