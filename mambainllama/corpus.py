"""English text that every CPython carries: its reference manual, docstrings and comments.

The demo and the script that trains its teacher need text without a download.  `pydoc_data.topics`
holds the parts of the reference manual that `help()` shows; the standard library's sources hold
thousands of docstrings and block comments, which are read here as text: nothing is imported and
nothing runs. Documents are cleaned (indentation, doctests, rulers), sorted and without duplicates:
the same Python gives the same corpus.  Another version gives a slightly different one, which is why
the packaged teacher records the version that it was trained with.

A document is held out when a hash of its text says so: the same text is held out everywhere.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

__all__ = ["documents", "is_held_out"]

# Tests, bundled wheels and generated tables are not prose; the manual is taken as it is.
LEFT_OUT = {
    "encodings",
    "pydoc_data",
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "_vendor",
    "_bundled",
}

MIN_CHARACTERS = 80
HELD_OUT = 20  # one document of so many


def documents() -> tuple[list[str], list[str]]:
    """(texts to train on, texts held out), each in the order of their text's hash."""
    found = {clean(text) for text in (*manual_topics(), *library_texts())}
    texts = sorted(
        (text for text in found if len(text) >= MIN_CHARACTERS and is_prose(text)), key=digest
    )
    return [t for t in texts if not is_held_out(t)], [t for t in texts if is_held_out(t)]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def is_held_out(text: str) -> bool:
    """Whether a document is kept back from training."""
    return int(digest(text)[:8], 16) % HELD_OUT == 0


def manual_topics() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from topics.values()


def library_texts() -> Iterator[str]:
    """Docstrings and block comments of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if LEFT_OUT.intersection(path.relative_to(root).parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, OSError):
            continue
        yield from docstrings(tree)
        yield from comments(source)


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Those of modules, classes and functions."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text


def comments(source: str) -> Iterator[str]:
    """Runs of lines that are only comments."""
    block: list[str] = []
    for line in [*source.splitlines(), ""]:
        line = line.strip()
        if line.startswith("#"):
            block.append(line.lstrip("#"))
        elif block:
            yield "\n".join(["", *block])
            block = []


def clean(text: str) -> str:
    """Plain lines: no common indentation, doctests or rulers, single blank lines, ASCII."""
    kept: list[str] = []
    example = False  # inside a doctest: its prompts, and its output up to a blank line
    for line in inspect.cleandoc(text).expandtabs(4).splitlines():
        line = line.rstrip()
        example = line.lstrip().startswith(">>>") or (example and line != "")
        if not example and not re.fullmatch(r"\s*[-=*~^_#+|]{3,}\s*", line):
            kept.append(line)
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()
    return text.encode("ascii", "ignore").decode()


def is_prose(text: str) -> bool:
    """Mostly letters and blanks: not a table, a grammar or a listing."""
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return letters >= 0.8 * len(text)
