"""The command line: which command is meant, and what its help and its errors name."""

import re

import pytest

from mvbert import cli

EMBED = ["--teacher", "t", "-o", "out"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["m", "embed", "text.txt", *EMBED],
        ["-o", "out", "m", "embed", "text.txt"],
        ["-o=out", "m", "embed", "text.txt"],
        ["--cased", "m", "embed", "text.txt", "-o", "out"],
        ["--no-cased", "m", "embed", "text.txt", "-o", "out"],
        ["m", "--pooler-weight", "0.5", "embed", "text.txt", *EMBED],
        ["m", "--pooler_weight", "0.5", "embed", "text.txt", *EMBED],
        ["--also", "a.txt", "b.txt", "--batch", "64", "m", "embed", "text.txt", *EMBED],
        ["--prefixes", "64", "128", "--lr", "1e-3", "m", "embed", "text.txt", *EMBED],
        ["embed", "embed", "embed", "-o", "embed"],
    ],
)
def test_embed_is_the_second_positional(arguments):
    command = cli.parse(["finetune", *arguments])
    assert isinstance(command, cli.EmbedCommand)
    assert command.model in ("m", "embed")
    assert command.text_files in (("text.txt",), ("embed",))


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("embed", "embed classes tr.tsv dv.tsv -o out"),
        ("m", "-o embed m classes tr.tsv dv.tsv"),
        ("embed", "--batch 16 32 -o out embed classes tr.tsv dv.tsv"),
        ("embed", "--seeds 3 embed --grid classes tr.tsv dv.tsv -o out"),
        ("m", "m --text embed classes tr.tsv dv.tsv -o out"),
        ("m", "m classes embed dv.tsv -o out"),
    ],
)
def test_embed_elsewhere_is_a_name(model, arguments):
    command = cli.parse(["finetune", *arguments.split()])
    assert isinstance(command, cli.FinetuneCommand)
    assert (command.model, command.task) == (model, "classes")


@pytest.mark.parametrize("stage", [["--stage", "2"], ["--stage=2"]])
def test_the_stage_may_stand_anywhere(stage):
    options = ["--corpus", "c", "--stage1", "s", "-o", "out"]
    for place in range(0, len(options) + 1, 2):
        command = cli.parse(["train", *options[:place], *stage, *options[place:]])
        assert isinstance(command, cli.Stage2Command)
        assert (str(command.corpus), str(command.stage1), str(command.out)) == ("c", "s", "out")


# ---- help and errors -----------------------------------------------------------------------------


def unboxed(text: str) -> str:
    """A help or an error of tyro on one line, without its boxes."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("corpus", "mvbert corpus [-h] [OPTIONS] TEXT [TEXT ...]"),
        ("vocab", "mvbert vocab [-h] [OPTIONS] CORPUS"),
        ("train --stage 1", "mvbert train --stage 1 [-h] [OPTIONS]"),
        ("train --lr 1 --stage=2", "mvbert train --stage 2 [-h] [OPTIONS]"),
        ("distill", "mvbert distill [-h] [OPTIONS] [SETTINGS]"),
        ("finetune", "mvbert finetune [-h] [OPTIONS] MODEL TASK DATA [DATA ...]"),
        ("finetune m sst-2", "mvbert finetune [-h] [OPTIONS] MODEL TASK DATA [DATA ...]"),
        ("finetune m embed", "mvbert finetune [-h] [OPTIONS] MODEL embed TEXT [TEXT ...]"),
        ("study", "mvbert study [-h] [OPTIONS] SETTINGS"),
        ("eval", "mvbert eval [-h] [OPTIONS] MODEL"),
        ("trim", "mvbert trim [-h] [OPTIONS] MODEL"),
        ("export", "mvbert export [-h] [OPTIONS] MODEL"),
    ],
)
@pytest.mark.parametrize("asked", ["-h", "--help"])
def test_a_help_names_its_command_and_positionals(command_line, command, usage, asked):
    code, out, err = command_line(*command.split(), asked)
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: {usage}\n")
    for name in re.findall(r" ([A-Z]{4,}|embed)\b", usage.partition("] ")[2]):
        if name != "OPTIONS":
            assert re.search(rf"^│ \[?{name}\b[^│]* \w+[,.; ]", out, re.MULTILINE), (
                "without a sentence"
            )
    assert "(default: )" not in out.partition(" options ")[0]  # of what must be given


@pytest.mark.parametrize(
    ("command", "helper"),
    [
        ("corpus text.txt", "mvbert corpus --help"),
        ("train --stage 1", "mvbert train --stage 1 --help"),
        ("train --stage 2 --lr high", "mvbert train --stage 2 --help"),
        ("finetune m sst-2 d", "mvbert finetune --help"),
        ("finetune m embed t", "mvbert finetune MODEL embed --help"),
        ("finetune m embed t -o out --grid", "mvbert finetune MODEL embed --help"),
    ],
)
def test_an_error_names_the_help_that_has_the_options(command_line, command, helper):
    code, out, err = command_line(*command.split())
    assert (code, out) == (2, "")
    assert re.search(rf"full helptext, run:? {helper}$", unboxed(err))


@pytest.mark.parametrize(
    ("command", "term", "explained"),
    [
        ("corpus", "held out", "held out (kept from training"),
        ("corpus", "pieces", "pieces (WordPiece tokens"),
        ("vocab", "pieces", "pieces (WordPiece tokens"),
        ("train --stage 1", "pieces", "pieces (WordPiece tokens"),
        ("train --stage 2", "held-out", "held-out text (kept from training"),
        ("distill", "arms", "arms: students that differ in their settings"),
        ("study", "arms", "different settings (arms)"),
        ("study", "hold out", "hold out (keep from training"),
        ("eval", "held-out", "held-out text (kept from training"),
        ("eval", "pieces", "pieces (WordPiece tokens"),
        ("trim", "pieces", "Pieces (WordPiece tokens"),
        ("trim", "held-out", "held-out text (kept from training"),
        ("finetune", "pieces", "pieces (WordPiece tokens"),
        ("finetune m embed", "pieces", "pieces (WordPiece tokens"),
    ],
)
def test_a_term_is_explained_where_a_help_first_uses_it(command_line, command, term, explained):
    text = unboxed(command_line(*command.split(), "--help")[1])
    before, found, _ = text.partition(explained)
    assert found
    # Names of options aside, as --pieces.
    before = re.sub(r"--[\w.-]+", "", before)
    assert term not in before.lower()
