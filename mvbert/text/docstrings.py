"""The demo's text: the docstrings of installed Python packages, as prose.

They are read from source files (nothing is imported or downloaded) and stripped of code, tables and
markup.
"""

import ast
import gc
import importlib.util
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

from mvbert.errors import InputError
from mvbert.files import atomic_write

PACKAGES = ("stdlib", "torch", "numpy", "sympy", "networkx")


class TextReport(TypedDict):
    """Statistics of `docstring_corpus`; `packages` has the bytes of each package."""

    path: str
    documents: int
    paragraphs: int
    words: int
    bytes: int
    packages: dict[str, int]


def docstring_corpus(out_path: str | Path, packages: Sequence[str] = PACKAGES) -> TextReport:
    """Writes the docstrings of installed packages as a text file.

    One module is one document: a paragraph per line, a blank line between documents. Repeated
    paragraphs are skipped. The same installed packages give the same bytes. Takes half a minute,
    nearly all of it in Python's parser.

    Args:
        out_path: the file to write, atomically.
        packages: import names; "stdlib" stands for Python's own library.

    Raises:
        InputError: a package is not installed, or the file cannot be written.
    """
    seen: set[str] = set()
    documents: list[str] = []
    sizes: dict[str, int] = {}
    for package in packages:
        first = len(documents)
        for source in module_sources(package):
            fresh = [p for p in dict.fromkeys(module_prose(source)) if p not in seen]
            seen.update(fresh)
            if fresh:
                documents.append("\n".join(fresh) + "\n")
        sizes[package] = sum(len(document.encode()) for document in documents[first:])
    data = "\n".join(documents).encode()
    atomic_write(out_path, data)
    return {
        "path": str(out_path),
        "documents": len(documents),
        "paragraphs": len(seen),
        "words": sum(len(document.split()) for document in documents),
        "bytes": len(data),
        "packages": sizes,
    }


# ---- from packages to documentation strings ------------------------------------------------------

# Folders of other people's code inside a package's own folder.
NOT_OWN = frozenset({"site-packages", "dist-packages", "__pycache__"})
# Functions through which packages attach documentation to what is written in C.
ATTACHING = frozenset({"add_docstr", "_add_docstr", "add_newdoc", "add_docstr_all"})


def module_sources(package: str) -> list[Path]:
    """The Python files of a package (or "stdlib"), sorted, located without importing it."""
    if package == "stdlib":
        folder = Path(sysconfig.get_path("stdlib"))
    else:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise InputError(
                f"the demo's text needs the package {package}, which is not installed in "
                f"{sys.prefix}; run: pip install {package}, or give your own text with --text"
            )
        if spec.submodule_search_locations is None:
            return [Path(spec.origin)]  # a package of one module
        folder = Path(spec.origin).parent
    paths = (path.relative_to(folder) for path in folder.rglob("*.py"))
    own = [path for path in paths if NOT_OWN.isdisjoint(path.parts)]
    return [folder / path for path in sorted(own, key=Path.as_posix)]


def module_prose(source: Path) -> list[str]:
    """The prose paragraphs of one Python file; none if this Python cannot parse the file."""
    collecting = gc.isenabled()
    gc.disable()  # a tree is a million objects without a cycle: collecting doubles the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            tree = ast.parse(source.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []  # a file for another Python, or made to test parsers
    finally:
        if collecting:
            gc.enable()
    topics = source.name == "topics.py" and source.parent.name == "pydoc_data"
    strings = string_constants(tree) if topics else documentation_strings(tree)
    return [paragraph for text in strings for paragraph in prose(text)]


def documentation_strings(tree: ast.AST) -> Iterator[str]:
    """Every string that stands alone as a statement, or that is attached to a C function."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        nested: list[ast.AST] = []
        for field in ("body", "handlers", "orelse", "finalbody"):
            children = getattr(node, field, None)
            if isinstance(children, list):
                nested.extend(children)
        for child in nested:
            if not isinstance(child, ast.Expr):
                continue
            value = child.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value.value
            elif isinstance(value, ast.Call):
                name = getattr(value.func, "id", getattr(value.func, "attr", ""))
                if name in ATTACHING:
                    yield from string_constants(value)
        pending.extend(reversed(nested))


def string_constants(tree: ast.AST) -> Iterator[str]:
    """Every string constant inside a node, in order."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


# ---- from a documentation string to prose --------------------------------------------------------

# Directives whose content is prose; the content of all others is dropped.
PROSE_DIRECTIVES = re.compile("note|warning|tip|important|hint|caution|attention|danger|seealso")
DIRECTIVE = re.compile(r"\.\. ([\w:-]+)::\s*(.*)")
UNDERLINE = re.compile(r"([=\-~^\"'`#*+.])\1{2,}$")
FIELD = re.compile(r":\w+[^:`]*:\s+(.*)")  # :param name: description
ITEM = re.compile(
    r"(?:[-*+\u2022]|#\.|\(?(?:\d+|[a-zA-Z])[.)])\s+(.*)"
)  # - item, 1. item, (a) item
ARGUMENT = re.compile(
    r"\*{0,2}[\w.\[\]]+\s*(?:\([^)]*\))?\s*:\s+(\S.*)"
)  # name (type): description
TYPED_NAME = re.compile(r"[\w*`, .]+ : \S")  # name : type, NumPy's style
TABLE = re.compile(r"[|+]|\S {3,}\S|[=-]{3,} ")
HEADING = re.compile(r"[\w /]{1,30}:$")

ROLE = re.compile(r":[\w:+-]+:`([^`]*)`")
LINK = re.compile(r"`([^`<]*?)\s*<[^`>]*>`_{0,2}")
QUOTED = re.compile(r"``([^`]*)``|`([^`]*)`_{0,2}")
EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}(\S|\S[^*]*?\S)\*{1,2}(?![\w*])")
FOOTNOTE = re.compile(r"\s*\[[#\w*-]+\]_")
ADDRESS = re.compile(r"<?\b(?:https?|ftp)://\S+")
LOOSE = re.compile(r" +([.,;:!?)])")

CODE = re.compile(r"[{}\\$^|@]|>>|<\w|\w\(\w*\)\.|_{3}|\.{4}")
PLAIN_WORD = re.compile(
    r"[(\"']*(?:[A-Z]?[a-z]+(?:['-][A-Za-z]?[a-z]+)*|[A-Z]+s?|\d+)[)\"'.,;:!?]*$"
)
FUNCTION_WORD = re.compile(
    r"[(\"']*(?:an?|and|are|as|at|be|but|by|can|do|does|for|from|ha[sv]e?|how|if|in|into|is|its?|may|must|no|not|"
    "of|on|or|should|than|that|the|their|then|there|these|they|this|to|used?|was|we|when|where|"
    r"which|will|with|you|your)[)\"'.,;:!?]*",
    re.IGNORECASE,
)


def prose(text: str) -> list[str]:
    """The paragraphs of a documentation string that are English sentences, markup removed."""
    candidates = (plain(" ".join(lines)) for lines in blocks(text))
    return [paragraph for paragraph in candidates if is_prose(paragraph)]


def blocks(text: str) -> Iterator[list[str]]:
    """The blocks of text of a documentation string: no doctests, directives, headings or tables."""
    block: list[str] = []
    start = 0  # the indent of the block's first line
    hanging = False  # the block began with an item or a name: later lines are indented further
    drop_indent: int | None = None  # lines indented more than this are dropped
    doctest = False
    for line in inspect.cleandoc(text).expandtabs().splitlines():
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if drop_indent is not None:
            if not stripped or indent > drop_indent:
                continue
            drop_indent = None
        if not stripped:
            doctest = False
        elif doctest:
            continue
        if not stripped or UNDERLINE.match(stripped):
            if stripped and block:
                block.pop()  # the heading over the line
            yield block
            block = []
            continue

        content: str | None = stripped
        fresh = True  # the line starts a block
        is_item = False
        if stripped.startswith((">>>", "... ", "In [", "$ ")):
            doctest, content = True, None
        elif match := DIRECTIVE.match(stripped):
            if PROSE_DIRECTIVES.fullmatch(match[1].lower()):
                content = match[2]
            else:
                drop_indent, content = indent, None
        elif stripped.startswith(".. ") or stripped in ("..", "::"):
            drop_indent, content = indent, None  # a comment, a footnote, a literal block
        elif TABLE.match(stripped) or TABLE.search(stripped) or HEADING.match(stripped):
            content = None
        elif match := FIELD.match(stripped) or ITEM.match(stripped):
            content, is_item = match[1], True
        elif TYPED_NAME.match(stripped):
            content = None
        elif match := ARGUMENT.match(stripped):
            content, is_item = match[1], True
        else:
            fresh = indent != start and not (hanging and indent > start)
        if fresh:
            yield block
            block, start, hanging = [], indent, is_item
        if content:
            literal = content.endswith("::")
            block.append(content[:-1] if literal else content)
            if literal:
                drop_indent = indent
    yield block


def plain(text: str) -> str:
    """One paragraph without reStructuredText's inline markup, addresses and footnotes."""
    text = ROLE.sub(lambda match: role_text(match[1]), text)
    text = LINK.sub(r"\1", text)
    text = QUOTED.sub(lambda match: match[1] or match[2] or "", text)
    text = EMPHASIS.sub(r"\1", text)
    text = FOOTNOTE.sub("", text)
    text = ADDRESS.sub("", text)
    return LOOSE.sub(r"\1", " ".join(text.split()))


def role_text(content: str) -> str:
    """The displayed text of :role:`content`."""
    if "<" in content:
        return content.split("<")[0].strip()
    return content.rsplit(".", 1)[-1] if content.startswith("~") else content


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as English sentences rather than code, names or formulas."""
    words = paragraph.split()
    if len(words) < 5 or CODE.search(paragraph):
        return False
    common = sum(FUNCTION_WORD.fullmatch(word) is not None for word in words)
    simple = sum(PLAIN_WORD.fullmatch(word) is not None for word in words)
    return common >= 0.1 * len(words) and simple >= 0.75 * len(words)
