"""The layout: which module may import which, and the list of files in the docs."""

import ast
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

# Lowest first. A module imports from its own row and from those before it.
GROUND = {"config", "toml", "errors", "files", "cores", "progress"}
ROWS = [GROUND, {"text"}, {"kernels", "functional", "layers", "drop_in"}, {"model"}, {"training"},
        {"tasks"}, {"publish"}, {"study"}, {"distill", "cli", "__main__"}]  # fmt: skip
NEUTRAL = {"__init__", "_core"}  # the version and the public names; the C++ core


def modules(root):
    """Every module of the package: its dotted name below mvbert, and its file."""
    for folder in ("mvbert", "kernels"):
        for path in sorted((root / folder).rglob("*.py")):
            if folder == "mvbert" and path.is_relative_to(root / "mvbert" / "kernels"):
                continue
            parts = path.relative_to(root / "mvbert" if folder == "mvbert" else root)
            yield ".".join(parts.with_suffix("").parts).removesuffix(".__init__"), path


def imports(path, known):
    """The modules of the package that a file imports anywhere, by their names below mvbert."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mvbert":
            base = node.module.removeprefix("mvbert").lstrip(".")
            for alias in node.names:
                deeper = f"{base}.{alias.name}".lstrip(".")
                yield deeper if deeper in known else base or "__init__"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "mvbert":
                    yield alias.name.removeprefix("mvbert").lstrip(".") or "__init__"


def height(name):
    top = name.split(".")[0]
    return next((i for i, row in enumerate(ROWS) if top in row), None)


@pytest.fixture(scope="module")
def graph(root):
    files = dict(modules(root))
    return {name: set(imports(path, files)) - NEUTRAL for name, path in files.items()}


def test_no_import_goes_up(graph):
    assert len(graph) > 50
    up = []
    for name, targets in graph.items():
        if name in NEUTRAL or name == "presets":
            continue
        assert height(name) is not None, f"{name} stands in no row of this test"
        up += [f"{name} -> {t}" for t in targets if height(t) is None or height(t) > height(name)]
    assert not up


def test_the_ground_imports_nothing_but_the_ground(graph):
    for name in GROUND:
        assert graph[name] <= GROUND, name


def test_no_imports_form_a_circle(graph):
    TopologicalSorter({n: t - {n} for n, t in graph.items()}).prepare()  # raises CycleError


def test_a_wrong_import_would_be_found(tmp_path):
    source = tmp_path / "a.py"
    source.write_text("def f():\n    from mvbert.training import train\n    import mvbert.cli\n")
    assert [*imports(source, {"training.train"})] == ["training.train", "cli"]
    assert height("training.train") > height("model.encoder") > height("text.vocab") > 0


def test_text_works_without_torch(root):
    """Each module of text/, imported where torch, triton and transformers are missing."""
    names = [name for name, _ in modules(root) if name.split(".")[0] == "text"]
    assert len(names) > 15
    code = (
        "import sys, importlib; sys.modules.update(torch=None, triton=None, transformers=None);"
        f"[importlib.import_module(f'mvbert.{{name}}') for name in {names}]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_file_tree_in_the_docs_is_the_tree(root, git_files):
    """Every file, or its folder, has a phrase in the list, and every phrase has its file."""
    page = (root / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = re.search(r"<!-- tree -->\n```\n(.*?)```", page, re.S)[1]
    folder, listed = "", []
    for line in filter(str.strip, tree.splitlines()):
        name = line.split()[0]
        folder = folder if line.startswith(" ") else ""
        listed.append(folder + name)
        folder = folder or name
    for name in listed:
        assert list(root.glob(name)), f"docs/architecture.md names {name}, which does not exist"
    # A folder whose files are named stands for none of them, a header for its .cc file.
    whole = tuple(
        name
        for name in listed
        if name.endswith("/") and not any(n != name and n.startswith(name) for n in listed)
    )
    covered = {str(path.relative_to(root)) for name in listed for path in root.glob(name)}
    for name in git_files("--cached", "--others", "--exclude-standard"):
        alone = name in covered or str(Path(name).with_suffix(".h")) in covered
        hidden = name.startswith(".") or name in ("README.md", "mvbert/kernels", "mvbert/py.typed")
        gone = not os.path.lexists(root / name)
        assert alone or hidden or gone or name.startswith(whole), f"the file tree lacks {name}"
