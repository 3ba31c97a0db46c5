"""What README and docs show can be done: examples run, commands are commands."""

import re
import shlex
from pathlib import Path

import pytest

from mvbert import unfuse


def blocks(page: str, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return [block for language, block in found if language in languages]


def test_the_examples_of_the_readme_run(root, training_inputs, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    bert = training_inputs / "teacher"
    for link, target in [
        (tmp_path / "my-bert", bert), (tmp_path / "corpus", training_inputs / "corpus"),
        (tmp_path / "vocab.txt", bert / "vocab.txt"), (tmp_path / "models", root / "models"),
    ]:  # fmt: skip
        link.symlink_to(target)
    monkeypatch.chdir(tmp_path)
    names = {"texts": ["one text", "and another"]}
    names["model"] = transformers.AutoModelForMaskedLM.from_pretrained(bert)
    examples = blocks((root / "README.md").read_text(encoding="utf-8"), "python")
    for example in examples:
        if '"models/' in example and not (root / "models").is_dir():
            continue  # a distribution of the source, which has no weights
        exec(compile(example, "README.md", "exec"), names)
    assert unfuse(names["model"])
    assert names["batch"].input_ids.shape[0] == 2
    if "fill" in names:
        assert names["fill"]("New [MASK] City")[0]["token_str"] == "york"


def commands(root: Path) -> list[tuple[str, str]]:
    """(page, what follows `mvbert`) of every whole command that is shown."""
    found = []
    for file in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        text = file.read_text(encoding="utf-8").replace("\\\n", " ")
        for block in blocks(text, "sh", ""):
            for line in re.findall(r"(?:^|do |-m )mvbert ([^#;\n]+)", block, re.MULTILINE):
                if "..." not in line:
                    found.append((file.name, line.replace("$n", "1000")))
    return found


def test_the_commands_shown_are_commands(root, tmp_path, monkeypatch):
    from mvbert import cli

    shown = commands(root)
    monkeypatch.chdir(tmp_path)  # with the students that a command continues
    for _, line in shown:
        for folder in re.findall(r"--start (\S+)", line):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    assert {line.split()[0] for _, line in shown} >= set(cli.VERBS)
    for page, line in shown:
        try:
            cli.parse(shlex.split(line))
        except SystemExit as leaving:
            pytest.fail(f"{page}: mvbert {line}: exit code {leaving.code}")
