"""Recipes: one TOML file that says what to distil, from what, through which stages, and where to.

    title = "Half the attention"      # of the report
    extends = "base.toml"             # or several: what is not said here is theirs

    [teacher]
    model = "../teacher"              # folder or Hub id

    [student]                         # made from `model`, else the teacher, by mil.convert
    mixer = "mamba2"
    attention_layers = "half"         # or a list of layers, "quarter", "eighth", "none"
    # trained = "../student"          # or instead: a student that is already there

    [data]
    files = ["chats.jsonl.gz"]
    validation = 0.02                 # a share to hold back, or files

    [training]                        # for every stage that trains; a stage may say otherwise
    sequence_length = 512

    [distill]                         # a stage: the settings of mil.DistillConfig
    learning_rate = 2e-3

    [sft]                             # another one, on data of its own
    files = ["answers.jsonl"]

    [report]                          # what is measured after each stage
    prompts = 32

    [output]
    folder = "run"

Each section that names a stage runs it; the stages and their order are those of `stages.STAGES`:
label, soft_labels, convert, stepwise, align, distill, sft, dpo.  ``stages = ["sft", "distill"]`` at
the top chooses among them, in that order.  A recipe without any stage distils.

Paths are relative to the file that names them, those of --set to the current folder.  Every key is
checked: a misspelt one is refused with the name that it may have meant, because a setting that is
silently ignored costs a run.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .convert import INITS, MIXERS
from .errors import ArgumentError, FileError, FormatError, NotFoundError, shorten
from .stages import STAGES, Stage
from .training import TrainingConfig, flag, one_of, whole

__all__ = ["Recipe", "StageSettings", "read_recipe"]

TOP = ("title", "extends", "stages")
REPORT: dict[str, tuple[type, Any, Any]] = {
    # Key: (kind, least, what it is when not said).
    "tokens": (int, 2, 32_768),
    "prompts": (int, 0, 24),
    "samples": (int, 0, 6),
    "max_new_tokens": (int, 1, 64),
    "every_stage": (bool, None, True),
}
# The stages that make a student, where none is trained already.
MAKERS = ("convert", "stepwise")

# What the values of [student] and [output] must be, beside paths and what the model itself decides.
RULES = {
    "mixer": one_of(*MIXERS),
    "init": one_of(*INITS),
    "seed": (whole(0), "a whole number of at least 0"),
    "calibration_rows": (whole(1), "a whole number of at least 1"),
    "calibration_length": (whole(2), "a whole number of at least 2"),
    "keep_checkpoints": (flag, "true or false"),
}
KEYS: dict[str, tuple[str, ...]] = {
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
    "training": tuple(field.name for field in fields(TrainingConfig)),
    **{name: stage.keys for name, stage in STAGES.items() if name != "convert"},
    "report": ("files", *REPORT),
    "output": ("folder", "keep_checkpoints"),
}

# Keys that hold a path or a list of paths, in any section.
MODELS = ("model", "trained")
FILES = ("files", "validation")


@dataclass(frozen=True)
class StageSettings:
    """One stage of a recipe.

    Attributes
    ----------
    stage : Stage
    config : TrainingConfig or None
        Of a stage that trains.
    options : dict
        What the section says beside that: `files`, `validation`, and all of a stage that does not
        train.
    """

    stage: Stage
    config: TrainingConfig | None
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.stage.name


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; models are not loaded yet.

    Attributes
    ----------
    path : Path
    title : str
    teacher, student, data, report, output : dict
        The file's sections, paths made absolute.
    stages : list of StageSettings
        In the order in which they run.
    """

    path: Path
    title: str
    teacher: dict[str, Any]
    student: dict[str, Any]
    data: dict[str, Any]
    report: dict[str, Any]
    output: dict[str, Any]
    stages: list[StageSettings]

    def __getitem__(self, name: str) -> StageSettings:
        """The stage with this name."""
        for settings in self.stages:
            if settings.name == name:
                return settings
        raise KeyError(name)


# ---- reading -----------------------------------------------------------------------------------


def read_recipe(
    path: str | os.PathLike, overrides: Iterable[str] = (), seed: int | None = None
) -> Recipe:
    """Reads and checks a recipe; `overrides` are "section.key=value" with TOML values.

    `seed` takes the place of all seeds: of the conversion, of training, of any section.

    Raises
    ------
    mil.ArgumentError, mil.FormatError, mil.FileError, mil.NotFoundError
        One line with the file, the section and the key.
    """
    path = Path(path)
    content = read_content(path, ())
    for text in overrides:
        section, key, value = parse_override(text)
        setting = {key: value} if section == "" else {section: {key: value}}
        check_keys(setting, "--set")
        merge(content, absolute(setting, Path("--set")))  # paths as seen from where we are
    where = str(path)
    sections = {name: dict(content.get(name, {})) for name in KEYS}
    if seed is not None:
        for name, said in sections.items():
            converted = name == "student" and "trained" not in said
            if converted or name == "training" or "seed" in said:
                said["seed"] = seed
    check_student(sections["student"], where)
    for name in ("student", "output"):
        check_values(name, sections[name], where)
    if "model" not in sections["teacher"]:
        raise ArgumentError(f"{where}: [teacher] needs 'model'")
    output = sections["output"]
    output.setdefault("folder", str(path.parent / "run"))
    title = content.get("title", path.stem)
    if not isinstance(title, str):
        raise ArgumentError(f"{where}: title: expected text, got {shorten(title)}")
    recipe = Recipe(
        path,
        title,
        sections["teacher"],
        sections["student"],
        sections["data"],
        report_settings(sections["report"], where),
        output,
        [
            stage_settings(STAGES[name], sections, where)
            for name in stage_names(content, sections["student"], where)
        ],
    )
    check_data(recipe)
    return recipe


def read_content(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """A recipe file's sections over those of the recipes that it extends, paths made absolute."""
    if path.resolve() in above:
        raise ArgumentError(f"{path}: extends itself")
    try:
        content = parse_toml(path.read_text(encoding="utf-8-sig"), str(path))
    except FileNotFoundError:
        by = f" (extended by {above[-1]})" if above else ""
        raise NotFoundError(f"{path}: no such recipe{by}") from None
    except UnicodeDecodeError:
        raise FormatError(f"{path}: not a text file") from None
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from None
    check_keys(content, str(path))
    bases = content.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ArgumentError(f"{path}: extends: expected a recipe or a list, got {shorten(bases)}")
    whole: dict[str, Any] = {}
    for base in bases:
        merge(whole, read_content(path.parent / base, (*above, path.resolve())))
    return merge(whole, absolute(content, path))


def merge(into: dict[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Adds keys to sections; what is said anew replaces what was said."""
    follow_data(into, new)
    for name, value in new.items():
        if isinstance(value, Mapping):
            into.setdefault(name, {}).update(value)
        else:
            into[name] = value
    # A trained student and one to be converted exclude each other: the later word counts.
    student, said = into.get("student", {}), new.get("student", {})
    if "trained" in said:
        into["student"] = {k: v for k, v in student.items() if k in ("trained", "dtype")}
        into["student"].update(said)
    elif "trained" in student and {"mixer", "attention_layers", "model"} & set(said):
        del student["trained"]
    return into


def follow_data(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Stages that name the files of [data] are to read those that [data] names anew."""
    old, files = into.get("data", {}).get("files"), new.get("data", {}).get("files")
    for name, section in into.items():
        if name != "data" and isinstance(section, dict) and old and files:
            if section.get("files") == old:
                section["files"] = files


def absolute(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The same sections with paths as seen from the recipe."""
    found: dict[str, Any] = {}
    for section, keys in content.items():
        if not isinstance(keys, Mapping):
            found[section] = keys
            continue
        found[section] = dict(keys)
        for key, value in keys.items():
            what = f"{path}: [{section}] {key}"
            if key in MODELS:
                found[section][key] = beside(path, value, what)
            elif key == "validation" and isinstance(value, float):
                if not 0 < value < 1:
                    raise ArgumentError(f"{what}={value}: expected files, or a share from 0 to 1")
            elif key in FILES:
                found[section][key] = file_list(path, value, what)
            elif (section, key) == ("label", "prompts"):
                files = file_list(path, value, what)
                if len(files) > 1:
                    raise ArgumentError(f"{what}: expected one file, got {shorten(value)}")
                found[section][key] = files[0]
            elif (section, key) == ("output", "folder"):
                if not isinstance(value, str) or not value:
                    raise ArgumentError(f"{what}: expected a folder, got {shorten(value)}")
                found[section][key] = str(path.parent / value)
    return found


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
    """(section, key, value) of "section.key=value"; the section of "stages=..." is ""."""
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if section in TOP and not dot:
        section, dot, key = "", ".", section
    if not equals or not dot or not key:
        raise ArgumentError(
            f"--set {shorten(text)}: expected section.key=value, as in distill.epochs=2"
        )
    if (section, key) == ("", "extends"):
        raise ArgumentError(
            f"--set {shorten(text)}: only a file can extend a recipe: write one that does"
        )
    try:
        parsed = parse_toml(f"value = {value}", "--set")["value"]
    except FormatError:
        parsed = value.strip()  # a bare word is a string
    return section, key, parsed


def beside(recipe: Path, value: Any, what: str) -> str:
    """A path as seen from the recipe, where there is one; else the words as they are (a Hub id)."""
    if not isinstance(value, str) or not value:
        raise ArgumentError(f"{what}: expected a path or a name, got {shorten(value)}")
    path = recipe.parent / value
    if value.startswith((".", "/")):
        return str(path.absolute())
    return str(path) if path.exists() else value


def file_list(recipe: Path, value: Any, what: str) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if (
        not isinstance(values, list)
        or not values
        or not all(isinstance(v, str) and v for v in values)
    ):
        raise ArgumentError(f"{what}: expected a file or a list of files, got {shorten(value)}")
    return [str(recipe.parent / name) for name in values]


# ---- checking ----------------------------------------------------------------------------------


def check_keys(content: Mapping[str, Any], where: str) -> None:
    """Every section and key is known."""
    for section, keys in content.items():
        if section in TOP and not isinstance(keys, Mapping):
            continue
        if section not in KEYS:
            raise ArgumentError(
                f"{where}: unknown section [{section}]{closest(section, [*KEYS, *TOP])}"
            )
        if not isinstance(keys, Mapping):
            raise ArgumentError(f"{where}: [{section}] must be a table of settings")
        for key in keys:
            if key not in KEYS[section]:
                raise ArgumentError(
                    f"{where}: unknown key {key!r} in [{section}]{closest(key, KEYS[section])}"
                )


def closest(word: str, words: Iterable[str]) -> str:
    words = list(words)
    match = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(words)}"


def check_student(student: Mapping[str, Any], where: str) -> None:
    if "trained" in student and len(student) > 1 + ("dtype" in student):
        extra = next(key for key in student if key not in ("trained", "dtype"))
        raise ArgumentError(
            f"{where}: [student] has both 'trained' and {extra!r}: a trained student is not "
            "converted"
        )


def check_values(section: str, said: Mapping[str, Any], where: str) -> None:
    for key, value in said.items():
        check, words = RULES.get(key, (None, ""))
        if check is not None and not check(value):
            raise ArgumentError(f"{where}: [{section}] {key}={shorten(value)}: expected {words}")


def stage_names(content: Mapping[str, Any], student: Mapping[str, Any], where: str) -> list[str]:
    """Which stages run, in order."""
    trained = "trained" in student
    if "stages" in content:
        names = content["stages"]
        if not isinstance(names, list) or not names or len(set(map(str, names))) < len(names):
            raise ArgumentError(
                f"{where}: stages: expected a list of different stages, got {shorten(names)}"
            )
        for name in names:
            if not isinstance(name, str) or name not in STAGES:
                raise ArgumentError(
                    f"{where}: stages: unknown stage {name!r}{closest(str(name), STAGES)}"
                )
        makers = [name for name in names if name in MAKERS]
        if not trained and not makers:
            first = 1 if names[0] == "label" else 0
            return [*names[:first], "convert", *names[first:]]
        made = next((name for name in names if STAGES[name].makes_student), "")
        if len(makers) > 1:
            raise ArgumentError(f"{where}: stages: {makers} both make the student: choose one")
        if not trained and made not in MAKERS:
            raise ArgumentError(f"{where}: stages: {made!r} has no student before {makers[0]!r}")
    else:
        names = [name for name in STAGES if name in content] or ["distill"]
        if "stepwise" not in names and not trained:
            names = [name for name in STAGES if name in (*names, "convert")]
    if trained and "convert" in names:
        raise ArgumentError(f"{where}: stages: a trained student is not converted")
    return list(names)


def stage_settings(stage: Stage, sections: Mapping[str, Any], where: str) -> StageSettings:
    """A stage's settings, those of [training] where it says nothing itself."""
    said = dict(sections.get(stage.name, {}))
    for key in stage.required:
        if key not in said:
            raise ArgumentError(f"{where}: [{stage.name}] needs {key!r}")
    common = {key: value for key, value in sections["training"].items() if key in stage.keys}
    if stage.config is None:
        return StageSettings(stage, None, {**common, **said})
    options = {key: said.pop(key) for key in list(said) if key in stage.options}
    try:
        config = stage.config(**{**common, **said})
    except ArgumentError as error:
        words = str(error).partition(": ")[2]
        raise ArgumentError(f"{where}: [{stage.name}] {words}") from None
    return StageSettings(stage, config, options)


def report_settings(said: Mapping[str, Any], where: str) -> dict[str, Any]:
    found = {key: default for key, (_, _, default) in REPORT.items()}
    for key, value in said.items():
        if key in REPORT:
            kind, least, _ = REPORT[key]
            if type(value) is not kind or (least is not None and value < least):
                words = "true or false" if kind is bool else f"a whole number of at least {least}"
                raise ArgumentError(f"{where}: [report] {key}={shorten(value)}: expected {words}")
        found[key] = value
    return found


def check_data(recipe: Recipe) -> None:
    """Every stage that trains has data: its own, a teacher's answers, or those of all."""
    labelled = False
    for settings in recipe.stages:
        labelled |= settings.name == "label"
        reads = settings.stage.reads_data or (
            settings.name == "convert" and recipe.student.get("init", "auto") != "paper"
        )
        if not reads or settings.options.get("files") or labelled:
            continue
        if "files" not in recipe.data:
            raise ArgumentError(
                f"{recipe.path}: [{settings.name}] has no data: [data] needs 'files'"
            )
