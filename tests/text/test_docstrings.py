"""The demo's text and teacher: found in what is installed, cleaned, never imported."""

import sys

import pytest

from mvbert.errors import InputError
from mvbert.text import docstrings

MODULE = '''
"""Tools for the rivers of the world, written for readers of maps.

.. note:: The rivers are those of the year in which the map was drawn.

A second paragraph with ``code`` and :func:`~rivers.flow` and `a link <http://example.org/x>`_ in
it, spread over two lines [1]_.

    >>> flow(3)
    the output of the doctest is not a sentence of the text

.. code-block:: python

    this is the content of a block of code and it is not for readers

The sentence before a literal block is kept to the end::

    the literal block itself is dropped as it is code for the reader

========  ==========================================
name      the table of the names is not a paragraph
========  ==========================================
"""

raise RuntimeError("this module must be read, not imported")

LENGTH = 3
"""The length of the longest of the rivers, in units that are not named."""


def flow(speed: int) -> int:
    """Returns the flow of the river at the given speed.

    Parameters
    ----------
    speed : int, optional
        The speed of the water in the middle of the river.

    Args:
        width (float, optional): the width of the river where it is
            the widest, at the mouth.
        *rest: everything else that is known of the river

    :param depth: the depth of the river at the place of the bridge

    Examples
    --------
    - the first of the items of a list of two
    2. the second of the items of a list of two

    $$ the formula is not in the text of the corpus $$
    """


class River:
    """Returns the flow of the river at the given speed."""

    async def run(self):
        "Runs from the source to the mouth of the river."
        if self:

            def inner():
                """A function in a branch has a text for its readers, too."""


add_docstr(River, r"""add_docstr(x) -> y

The documentation of what is written in C is attached by a call.
""")
'''

PROSE = [
    "Tools for the rivers of the world, written for readers of maps.",
    "The rivers are those of the year in which the map was drawn.",
    "A second paragraph with code and flow and a link in it, spread over two lines.",
    "The sentence before a literal block is kept to the end:",
    "The length of the longest of the rivers, in units that are not named.",
    "The documentation of what is written in C is attached by a call.",
    "Returns the flow of the river at the given speed.",
    "The speed of the water in the middle of the river.",
    "the width of the river where it is the widest, at the mouth.",
    "everything else that is known of the river",
    "the depth of the river at the place of the bridge",
    "the first of the items of a list of two",
    "the second of the items of a list of two",
    "Runs from the source to the mouth of the river.",
    "A function in a branch has a text for its readers, too.",
]


@pytest.fixture
def rivers(tmp_path, monkeypatch):
    """A package of three files on the import path: one whole, one broken, one in a sub-package."""
    package = tmp_path / "path" / "rivers"
    (package / "sub").mkdir(parents=True)
    (package / "__init__.py").write_text(MODULE)
    (package / "broken.py").write_text(
        '"""The text of a file for another Python is left out."""\n)'
    )
    (package / "sub" / "deep.py").write_text(
        '"""Returns the flow of the river at the given speed.\n\nIt is in a module of its own."""'
    )
    monkeypatch.syspath_prepend(package.parent)
    return package


def test_the_prose_of_a_package(rivers, tmp_path):
    out = tmp_path / "text.txt"
    report = docstrings.docstring_corpus(out, ["rivers"])
    documents = out.read_text(encoding="utf-8").split("\n\n")
    assert documents[0].splitlines() == PROSE
    assert documents[1].splitlines() == ["It is in a module of its own."]
    assert report == {
        "path": str(out),
        "documents": 2,
        "paragraphs": len(PROSE) + 1,
        "words": len(out.read_text().split()),
        "bytes": out.stat().st_size,
        "packages": {"rivers": out.stat().st_size - 1},  # less the blank line between documents
    }
    assert "rivers" not in sys.modules


def test_a_module_may_be_a_package(tmp_path, monkeypatch):
    (tmp_path / "lone_river.py").write_text('"""The river that is alone in its folder."""')
    (tmp_path / "other.py").write_text('"""The file that is none of the business of the river."""')
    monkeypatch.syspath_prepend(tmp_path)
    docstrings.docstring_corpus(tmp_path / "text", ["lone_river"])
    assert (tmp_path / "text").read_text() == "The river that is alone in its folder.\n"


def test_the_same_packages_give_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        docstrings.docstring_corpus(tmp_path / name, ["asyncio", "logging", "asyncio"])
    first = (tmp_path / "first").read_bytes()
    assert first == (tmp_path / "second").read_bytes()
    assert len(first) > 50_000
    lines = [line for line in first.decode().splitlines() if line]
    assert len(lines) == len(set(lines)), "a paragraph came twice"
    assert not [line for line in lines if ">>>" in line or "``" in line]


def test_a_missing_package_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no_such_package.*pip install no_such_package"):
        docstrings.docstring_corpus(tmp_path / "text", ["no_such_package"])
    assert not (tmp_path / "text").exists()


def test_a_missing_folder_is_an_input_error(rivers, tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        docstrings.docstring_corpus(tmp_path / "missing" / "text", ["rivers"])


@pytest.mark.slow
def test_the_demo_has_its_megabytes(tmp_path):
    for package in ("torch", "sympy", "networkx"):
        pytest.importorskip(package)
    report = docstrings.docstring_corpus(tmp_path / "text")
    assert report["bytes"] > 8_000_000
    assert set(report["packages"]) == set(docstrings.PACKAGES)
    assert min(report["packages"].values()) > 500_000
