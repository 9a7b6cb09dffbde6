"""What a reader is told is there: words on everything public, and pages whose names exist."""

import inspect
import re
from pathlib import Path

import pytest

import mambainllama as mil
from mambainllama.cli import make_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "recipes/README.md", *ROOT.glob("docs/**/*.md")],
    key=lambda path: path.as_posix(),
)
SOURCES = ("mambainllama", "benchmarks", "tests", "csrc", "kernels", "recipes", "docs")


def own_members(thing):
    """Public methods and properties of a class."""
    for name, member in inspect.getmembers(thing):
        if not name.startswith("_") and (
            inspect.isfunction(member) or isinstance(member, property)
        ):
            yield name, member


@pytest.mark.parametrize("module", [mil, mil.ops, mil.evaluate], ids=lambda m: m.__name__)
def test_everything_public_has_words(module):
    bare = []
    for name in module.__all__:
        thing = getattr(module, name)
        if isinstance(thing, (int, str)):
            continue
        members = own_members(thing) if inspect.isclass(thing) else ()
        bare += [n for n, what in ((name, thing), *members) if not inspect.getdoc(what)]
    assert bare == []


def test_parameters_are_told():
    """Of functions, unless they say whose arguments theirs are."""
    untold = [
        f"{name}: {parameter}"
        for name in mil.__all__
        if inspect.isfunction(thing := getattr(mil, name))
        and "rguments" not in inspect.getdoc(thing)
        for parameter in inspect.signature(thing).parameters
        if not re.search(rf"\b{parameter}\b", inspect.getdoc(thing))
    ]
    assert untold == []


def commands_in(text):
    """Lines of shell blocks and of inline code."""
    for block in re.findall(r"```(?:sh)?\n(.*?)```", text, re.S) + re.findall(r"`([^`\n]+)`", text):
        yield from block.splitlines()


def faults_of(line, targets, verbs):
    """Make targets, verbs and options that a command line names and that do not exist."""
    if found := re.match(r"make ([a-z][\w-]*)", line):
        return [line] if found[1] not in targets else []
    found = re.match(r"mambainllama ([a-z]+)\b([^|#]*)", line)
    if not found:
        return []
    if found[1] not in verbs:
        return [line]
    options = re.findall(r"(?<![\w-])--[a-z][\w-]*", found[2])
    return [line] if set(options) - set(verbs[found[1]]._option_string_actions) else []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pages_name_what_exists(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    files = re.findall(rf"`((?:{'|'.join(SOURCES)})/[\w./-]+\.\w+)`", text)
    missing += [name for name in files if "/data/" not in name and not (ROOT / name).exists()]
    names = re.findall(r"\bmil\.([A-Za-z_]\w*)", text)
    missing += [f"mil.{name}" for name in names if not hasattr(mil, name)]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    verbs = make_parser()._subparsers._group_actions[0].choices
    for line in commands_in(text):
        missing += faults_of(line, targets, verbs)
    assert missing == []
