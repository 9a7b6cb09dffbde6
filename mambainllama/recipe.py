"""Recipes: one TOML file that says what to distil, from what, with what, and where to.

    [teacher]
    model = "../teacher"              # folder or Hub id

    [student]                         # made from `model`, else the teacher, by mil.convert
    mixer = "mamba2"
    attention_layers = "half"         # or a list of layers, "quarter", "eighth", "none"
    # trained = "../student"          # or instead: a student that is already there

    [data]
    files = ["chats.jsonl.gz"]
    validation = 0.02                 # a share to hold back, or files

    [distill]                         # mil.DistillConfig
    learning_rate = 2e-3
    sequence_length = 512

    [output]
    folder = "run"

Paths are relative to the recipe.  Every key is checked: a misspelt one is refused with the name
that it may have meant, because a setting that is silently ignored costs a run.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .distill import DistillConfig
from .errors import ArgumentError, FileError, FormatError, NotFoundError, shorten

__all__ = ["Recipe", "read_recipe"]

KEYS = {
    "teacher": ("model", "dtype"),
    "student": (
        "model",
        "trained",
        "dtype",
        "mixer",
        "attention_layers",
        "init",
        "seed",
        "calibration_rows",
        "calibration_length",
    ),
    "data": ("files", "validation"),
    "distill": tuple(field.name for field in fields(DistillConfig)),
    "output": ("folder",),
}
REQUIRED = {"teacher": ("model",), "data": ("files",)}


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; models are not loaded yet.

    Attributes
    ----------
    teacher, student, data, output : dict
        The file's sections, paths made absolute.
    config : DistillConfig
    """

    teacher: dict[str, Any]
    student: dict[str, Any]
    data: dict[str, Any]
    output: dict[str, Any]
    config: DistillConfig


def read_recipe(path: str | os.PathLike, overrides: Iterable[str] = ()) -> Recipe:
    """Reads and checks a recipe; `overrides` are "section.key=value" with TOML values."""
    path = Path(path)
    try:
        content = parse_toml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such recipe") from None
    except UnicodeDecodeError:
        raise FormatError(f"{path}: not a text file") from None
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from None
    for text in overrides:
        section, key, value = parse_override(text)
        content.setdefault(section, {})[key] = value
    check_keys(content, str(path))
    sections = {name: dict(content.get(name, {})) for name in KEYS}
    for section, key in (("teacher", "model"), ("student", "model"), ("student", "trained")):
        if key in sections[section]:
            sections[section][key] = beside(
                path, sections[section][key], f"{path}: [{section}] {key}"
            )
    data = sections["data"]
    data["files"] = file_list(path, data["files"], "files")
    if not isinstance(data.get("validation", 0.5), float):
        data["validation"] = file_list(path, data["validation"], "validation")
    output = sections["output"]
    output["folder"] = str(path.parent / output.get("folder", "run"))
    try:
        config = DistillConfig(**sections["distill"])
    except ArgumentError as error:
        raise ArgumentError(f"{path}: [distill] {str(error).partition(': ')[2]}") from None
    return Recipe(sections["teacher"], sections["student"], data, output, config)


def parse_toml(text: str, where: str) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:
        try:
            import tomli as tomllib
        except ImportError:
            raise ArgumentError(
                f"{where}: recipes need Python 3.11, or tomli: pip install tomli"
            ) from None
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise FormatError(f"{where}: not TOML: {error}") from None


def parse_override(text: str) -> tuple[str, str, Any]:
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not dot or not key:
        raise ArgumentError(
            f"--set {shorten(text)}: expected section.key=value, as in distill.epochs=2"
        )
    try:
        parsed = parse_toml(f"value = {value}", "--set")["value"]
    except FormatError:
        parsed = value.strip()  # a bare word is a string
    return section, key, parsed


def check_keys(content: Mapping[str, Any], where: str) -> None:
    """Every section and key is known, and the required ones are there."""
    for section, keys in content.items():
        if section not in KEYS:
            raise ArgumentError(f"{where}: unknown section [{section}]{closest(section, KEYS)}")
        if not isinstance(keys, Mapping):
            raise ArgumentError(f"{where}: [{section}] must be a table of settings")
        for key in keys:
            if key not in KEYS[section]:
                raise ArgumentError(
                    f"{where}: unknown key {key!r} in [{section}]{closest(key, KEYS[section])}"
                )
    for section, keys in REQUIRED.items():
        for key in keys:
            if key not in content.get(section, {}):
                raise ArgumentError(f"{where}: [{section}] needs {key!r}")
    student = content.get("student", {})
    if "trained" in student and len(student) > 1 + ("dtype" in student):
        extra = next(key for key in student if key not in ("trained", "dtype"))
        raise ArgumentError(
            f"{where}: [student] has both 'trained' and {extra!r}: a trained student is not "
            "converted"
        )


def closest(word: str, words: Iterable[str]) -> str:
    words = list(words)
    match = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(words)}"


def beside(recipe: Path, value: Any, what: str) -> str:
    """A path as seen from the recipe, where there is one; else the words as they are (a Hub id)."""
    if not isinstance(value, str) or not value:
        raise ArgumentError(f"{what}: expected a path or a name, got {shorten(value)}")
    path = recipe.parent / value
    return str(path) if path.exists() else value


def file_list(recipe: Path, value: Any, key: str) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if (
        not isinstance(values, list)
        or not values
        or not all(isinstance(v, str) and v for v in values)
    ):
        raise ArgumentError(
            f"{recipe}: [data] {key}: expected a file or a list of files, got {shorten(value)}"
        )
    return [str(recipe.parent / name) for name in values]
