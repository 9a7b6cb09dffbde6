"""Running a recipe: every stage in turn, going on where a run stopped, and one report at the end.

    run/recipe.json          what the run began with: fingerprints of data and models
    run/STAGE/               what a stage makes: model/, metrics.jsonl, answers.jsonl
    run/STAGE/stage.json     written when the stage is done, last
    run/STAGE/kept.json      what its student keeps of the teacher (kept.py)
    run/model/               the last stage's student
    run/results.json         all figures of the report
    run/report.html          one file to read them in (report.py)

A stage always starts from the folder that the one before it left, never from what is in memory: a
run that was killed ends with the same bits as one that was not.  A stage that is done is not run
again; one that was cut off goes on from its own checkpoint.  What would make the two halves of such
a run differ is refused: other settings of a stage that is done or begun, another teacher, a data
file with other content.

Checkpoints of a stage are removed once it is done (`[output] keep_checkpoints = true` leaves them).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from . import _core
from ._version import __version__
from .checkpointing import sweep, write_text
from .data import TEXT_KEYS, Documents, expand_paths, read_documents, read_records
from .distill import DistillConfig, check_without_teacher, weights_hash
from .errors import ArgumentError, FileError, FormatError, StateError, listing, shorten
from .history import History
from .kept import Yardstick, prompts_of
from .label import PROMPT_KEYS
from .model import Model, load
from .pairs import shared_vocabulary
from .recipe import Recipe, StageSettings, read_recipe
from .report import write_report
from .stages import STAGES, Job, share_or_count
from .stepwise import StepwiseConfig, replacement_plan
from .training import check_new_run, jsonable, only_run, peak_memory, set_aside

__all__ = ["Run", "check_recipe", "run_recipe"]


# Data that stages make for those after them.
MADE = ("answers.jsonl", "answers.labels", "data.labels")

# What a run leaves in its folder; set_aside moves it in this order, so its record last.
RESULTS = (*STAGES, "model", "report.html")
COMPANIONS = ("results.json", "samples.json", "recipe.json")

# The key that every record of preferences has.
PAIR_KEYS = ("chosen",)


def run_recipe(
    recipe: str | os.PathLike | Recipe,
    output_dir: str | os.PathLike | None = None,
    resume: bool = False,
    *,
    overrides: Iterable[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    progress: bool | None = None,
    say: Callable[[str], Any] | None = None,
) -> dict[str, Any]:
    """Runs all stages of a recipe and writes a report.

    Parameters
    ----------
    recipe : path of a TOML file (see recipe.py), or what `read_recipe` made of it
    output_dir : instead of the recipe's [output] folder
    resume : bool
        Go on at the stage and step where the run in that folder stopped; without it an older run
        there is moved to previous-1/.
    overrides : "section.key=value", as for --set
    device, dtype : as for `mil.load`, where the recipe says nothing
    progress : bool or None
        Progress bars; None: on a terminal.
    say : called with a line of text when something begins or is done

    Returns
    -------
    dict
        As in results.json: "stages", a list with the figures of each; "output", the folder.

    Raises
    ------
    mil.ArgumentError, mil.FormatError, mil.FileError, mil.StateError, mil.NonFiniteError
        One line each; everything finished before stays.
    """
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe, overrides)
    folder = Path(output_dir) if output_dir is not None else Path(recipe.output["folder"])
    with only_run(folder):
        return Run(recipe, folder, device, dtype, progress, say or (lambda text: None)).run(resume)


class Run:
    """One run of a recipe in its folder."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        device: str,
        dtype: str,
        progress: bool | None,
        say: Callable[[str], Any],
    ):
        self.recipe, self.folder, self.progress, self.say = recipe, folder, progress, say
        self.device, self.dtype = device, dtype
        self._teacher: Model | None = None
        self._yardstick: Yardstick | None = None

    def run(self, resume: bool) -> dict[str, Any]:
        """All stages."""
        self.begin(resume)
        before: str | None = None
        count = len(self.recipe.stages)
        for number, settings in enumerate(self.recipe.stages, start=1):
            title = f"stage {number} of {count}: {settings.name}"
            if self.is_done(settings, before):
                self.say(f"{title}: done before")
            else:
                self.say(f"{title}: {settings.stage.words}")
                self.run_stage(settings, before)
            self.drop_checkpoints(self.folder / settings.name)
            if settings.stage.makes_student:
                before = settings.name
                self.measure(settings, last=number == count)
            self.write_results()
        results = self.write_results()
        if before is not None:
            self.publish(self.folder / before / "model")
        return results

    # -- what the run began with --

    def begin(self, resume: bool) -> None:
        """Writes what the run begins with, or checks that it is what it began with."""
        self.check_folder(resume)
        sweep(self.folder)
        path = self.folder / "recipe.json"
        now: dict[str, Any] = {
            "teacher": weights_hash(self.teacher.core),
            "files": {name: fingerprint(name) for name in self.all_files()},
        }
        if resume and path.exists():
            then = read_json(path)
            if then["teacher"] != now["teacher"]:
                raise StateError(
                    f"{self.folder}: cannot resume: the teacher {self.recipe.teacher['model']} is "
                    "another one than the run began with; use that, or another output folder"
                )
            for name, mark in now["files"].items():
                check_file(self.folder, name, then["files"].get(name, mark), mark)
            now = {**then, "files": {**now["files"], **then["files"]}}
            self.check_done()
        else:
            self.set_aside()
            now["begun"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        write_text(path, json.dumps(now, indent=1) + "\n")

    def check_done(self) -> None:
        """Refuses changed settings of stages that are done before anything is touched."""
        before: str | None = None
        for settings in self.recipe.stages:
            self.is_done(settings, before)
            before = settings.name if settings.stage.makes_student else before

    def check_folder(self, resume: bool) -> None:
        """Refuses a folder that a new run may not use, before anything is written there."""
        for place in (self.folder, *self.folder.parents):
            if os.path.exists(place) and not os.path.isdir(place):
                raise FileError(f"{place}: is a file; use another output folder (--output)")
        if not (resume and (self.folder / "recipe.json").exists()):
            models = [self.recipe.teacher["model"]]
            models += [self.recipe.student.get(key) for key in ("model", "trained")]
            check_new_run(self.folder, RESULTS, COMPANIONS, [*models, *self.all_files()])

    def set_aside(self) -> None:
        aside = set_aside(self.folder, RESULTS, COMPANIONS)
        if aside is not None:
            self.say(f"moved an earlier run to {aside}")

    def all_files(self) -> dict[str, tuple[str, ...]]:
        """Every data file that the recipe names, and keys of which its records have one."""
        found: dict[str, tuple[str, ...]] = {}
        sections: list[tuple[dict[str, Any], tuple[str, ...]]]
        sections = [(self.recipe.data, TEXT_KEYS), (self.recipe.report, TEXT_KEYS)]
        for settings in self.recipe.stages:
            pairs = "files" in settings.stage.required
            sections.append((settings.options, PAIR_KEYS if pairs else TEXT_KEYS))
        for section, keys in sections:
            for key in ("files", "validation", "prompts"):
                value = section.get(key, [])
                value = [value] if isinstance(value, str) else value
                for name in value if isinstance(value, list) else []:
                    found.setdefault(
                        os.path.abspath(name), PROMPT_KEYS if key == "prompts" else keys
                    )
        return found

    # -- models and data --

    @property
    def teacher(self) -> Model:
        if self._teacher is None:
            self._teacher = self.load_model(self.recipe.teacher)
        return self._teacher

    def load_model(self, section: dict[str, Any], key: str = "model") -> Model:
        return load(section[key], device=self.device, dtype=section.get("dtype", self.dtype))

    def source(self) -> Model:
        """The model that the student is made from."""
        making = self.recipe.student
        if "model" not in making and "dtype" not in making:
            return self.teacher
        return self.load_model({"model": self.recipe.teacher["model"], **making})

    def student(self, before: str | None) -> Model | None:
        """As the stage before left it; None where the first stage is to make one."""
        if before is not None:
            return load(self.folder / before / "model", device=self.device)
        if "trained" in self.recipe.student:
            return self.load_model(self.recipe.student, "trained")
        return None

    def files(self, settings: StageSettings) -> list[str]:
        """A stage's own data, else the teacher's answers if there are some, else those of all."""
        if settings.options.get("files"):
            return settings.options["files"]
        earlier = {}
        for stage in self.recipe.stages[: self.recipe.stages.index(settings)]:
            earlier[stage.name] = stage.options
        if settings.name == "distill" and "soft_labels" in earlier:
            return [str(self.folder / "soft_labels" / "data.labels")]
        if settings.name == "distill" and earlier.get("label", {}).get("top_logprobs"):
            return [str(self.folder / "label" / "answers.labels")]
        if "label" in earlier:
            return [str(self.folder / "label" / "answers.jsonl")]
        return self.recipe.data.get("files", [])

    def validation(self, settings: StageSettings) -> Any:
        """Held-out data of a stage: its own, or that of all where its data are of that kind."""
        common = self.recipe.data.get("validation")
        if "files" in settings.stage.required and not isinstance(common, float):
            common = None
        return settings.options.get("validation", common)

    # -- one stage --

    def identity(self, settings: StageSettings, before: str | None) -> dict[str, Any]:
        """What a stage that is done was told, to be compared when a run goes on."""
        config = settings.config
        found: dict[str, Any] = {"before": before, **settings.options}
        if settings.stage.makes_student and before is None:
            found.update(self.recipe.student)
        if config is not None:
            found.update(config.identity(), epochs=config.epochs, max_steps=config.max_steps)
            found["files"], found["validation"] = self.files(settings), self.validation(settings)
        for key in ("files", "validation", "prompts", "model", "trained"):
            if key in found:
                found[key] = basenames(found[key])
        return json.loads(json.dumps(found, default=jsonable))

    def is_done(self, settings: StageSettings, before: str | None) -> bool:
        path = self.folder / settings.name / "stage.json"
        if not path.exists():
            return False
        record = read_json(path)
        then, now = record["identity"], self.identity(settings, before)
        for key in [*now, *(key for key in then if key not in now)]:
            if then.get(key) != now.get(key):
                raise StateError(
                    f"{self.folder}: cannot resume: [{settings.name}] is done, its {key} was "
                    f"{shorten(then.get(key))}, is {shorten(now.get(key))} now; use what the run "
                    "began with, or another output folder"
                )
        for made, mark in record["made"].items():
            name = str(self.folder / settings.name / made)
            check_file(self.folder, name, mark, fingerprint(name))
        return True

    def run_stage(self, settings: StageSettings, before: str | None) -> None:
        folder = self.folder / settings.name
        sweep(folder)
        folder.mkdir(parents=True, exist_ok=True)
        student = self.student(before)
        job = Job(
            folder=folder,
            teacher=self.teacher,
            source=self.source() if student is None else student,
            student=student,
            making=self.recipe.student,
            config=settings.config,
            options=settings.options,
            files=self.files(settings),
            validation=self.validation(settings),
            progress=self.progress,
        )
        begin = time.perf_counter()
        history = settings.stage.run(job)
        record: dict[str, Any] = {
            "stage": settings.name,
            "identity": self.identity(settings, before),
            "seconds": round(time.perf_counter() - begin, 3),
            "peak_memory_bytes": peak_memory(),
            "made": {
                name: fingerprint(str(folder / name)) for name in MADE if (folder / name).exists()
            },
        }
        if history is not None:
            record |= training_figures(history)
        write_text(folder / "stage.json", json.dumps(record, indent=1) + "\n")

    def drop_checkpoints(self, folder: Path) -> None:
        """Of a stage that is done; also of one whose removal was cut off."""
        if self.recipe.output.get("keep_checkpoints", False):
            return
        for run in (folder, *folder.glob("part-*-of-*")):
            shutil.rmtree(run / "checkpoints", ignore_errors=True)

    # -- measuring --

    def measure(self, settings: StageSettings, last: bool) -> None:
        """What the student keeps of the teacher after this stage."""
        path = self.folder / settings.name / "kept.json"
        if not (last or self.recipe.report["every_stage"]):
            return
        if path.exists() and read_json(path)["how"] == self.how:
            return
        student = load(self.folder / settings.name / "model", device=self.device)
        begin = time.perf_counter()
        found = self.yardstick.measure(student)
        found["how"] = self.how
        found["attention_layers"] = list(student.config.attention_layers)
        found["seconds"] = round(time.perf_counter() - begin, 3)
        write_text(path, as_json(found))
        self.say(f"  kept of the teacher: {kept_words(found)}")

    @property
    def how(self) -> dict[str, Any]:
        """What figures depend on: where it changes, done stages are measured again."""
        report, data = self.recipe.report, self.recipe.data
        return {
            **{name: report[name] for name in ("tokens", "prompts", "max_new_tokens")},
            "text": basenames(report.get("files", data.get("validation"))),
        }

    @property
    def yardstick(self) -> Yardstick:
        if self._yardstick is None:
            report = self.recipe.report
            configs = [s.config for s in self.recipe.stages if s.config is not None]
            length = max((config.sequence_length for config in configs), default=2048)
            held = self.held_out()
            prompts = prompts_of(held, report["prompts"], length) if report["prompts"] else []
            self._yardstick = Yardstick(
                self.teacher,
                held,
                prompts,
                tokens=report["tokens"],
                max_new_tokens=report["max_new_tokens"],
                sequence_length=length,
                batch_size=max((config.batch_size for config in configs), default=8),
            )
        return self._yardstick

    @property
    def measured_on(self) -> str:
        """Where the held-out text comes from, in words."""
        if "files" in self.recipe.report:
            return "the files of [report]"
        validation = self.recipe.data.get("validation")
        if isinstance(validation, float):
            return f"{100 * validation:g} % of the data, held back from training"
        if validation is not None:
            return "the validation files"
        return "the training data (no validation was given, so these figures flatter)"

    def held_out(self) -> Documents:
        """The text that every stage is measured on, its answers marked."""
        report, data = self.recipe.report, self.recipe.data
        configs = [s.config for s in self.recipe.stages if s.config is not None]

        def read(files: list[str]) -> Documents:
            return read_documents(
                files,
                self.teacher.tokenizer,
                vocab=self.teacher.config.vocab_size,
                loss_on="marked",
                skip_bad=any(config.skip_bad for config in configs),
            )

        if "files" in report:
            return read(report["files"])
        validation = data.get("validation")
        if validation is None or isinstance(validation, float):
            files = data.get("files") or self.files(self.recipe.stages[-1])
            documents = read(files)
            return documents if validation is None else documents.split(validation)[1]
        return read(validation)

    # -- results --

    def write_results(self) -> dict[str, Any]:
        """results.json and the report, of all that is done so far."""
        results = {
            "title": self.recipe.title,
            "recipe": self.recipe.path.name,
            "output": str(self.folder),
            "begun": read_json(self.folder / "recipe.json").get("begun"),
            "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "teacher": model_facts(self.teacher, self.recipe.teacher["model"]),
            "student": self.recipe.student,
            "measured_on": self.measured_on,
            "report": {k: v for k, v in self.recipe.report.items() if k != "files"},
            "files": {
                os.path.basename(name): mark
                for name, mark in read_json(self.folder / "recipe.json")["files"].items()
            },
            "machine": machine(self.teacher.device),
            "stages": [],
        }
        for settings in self.recipe.stages:
            folder = self.folder / settings.name
            if not (folder / "stage.json").exists():
                break
            row = {**read_json(folder / "stage.json"), "words": settings.stage.words}
            for name in ("kept", "layers"):
                if (folder / f"{name}.json").exists():
                    row[name] = read_json(folder / f"{name}.json")
            if settings.config is not None:
                row["settings"] = {k: jsonable(v) for k, v in asdict(settings.config).items()}
                row["standard"] = {
                    k: jsonable(v) for k, v in asdict(settings.stage.config()).items()
                }
            results["stages"].append(row)
        if any("kept" in row for row in results["stages"]) and self.recipe.report["prompts"]:
            results["samples"] = self.samples()
        write_text(self.folder / "results.json", as_json(results))
        write_report(self.folder, results)
        return results

    def samples(self) -> list[dict[str, str]]:
        """Prompts with the teacher's answers; the students' are in kept.json."""
        path = self.folder / "samples.json"
        if not path.exists() or read_json(path)["how"] != self.how:
            samples = [
                {"prompt": text_of(self.teacher, prompt), "teacher": answer.text}
                for prompt, answer in zip(
                    self.yardstick.prompts, self.yardstick.answers, strict=True
                )
            ]
            found = {"how": self.how, "samples": samples}
            write_text(path, as_json(found))
        return read_json(path)["samples"]

    def publish(self, model: Path) -> None:
        """The last student at run/model, sharing its files where the file system can."""
        final, fresh = self.folder / "model", self.folder / ".model"
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            try:
                shutil.copytree(model, fresh, copy_function=os.link)
            except OSError:
                shutil.rmtree(fresh, ignore_errors=True)
                shutil.copytree(model, fresh)
            shutil.rmtree(final, ignore_errors=True)
            fresh.rename(final)
        except OSError as error:
            raise FileError(
                f"{final}: {error.strerror or error}; the trained model is in {model}"
            ) from None


# ---- files -------------------------------------------------------------------------------------


def fingerprint(name: str) -> dict[str, Any]:
    """Size and hash of a file, or of all files of a folder."""
    path = Path(name)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest, size = hashlib.blake2b(digest_size=16), 0
    try:
        for file in files:
            digest.update(str(file.relative_to(path)).encode())
            with open(file, "rb") as content:
                while block := content.read(1 << 22):
                    digest.update(block)
                    size += len(block)
    except FileNotFoundError:
        raise ArgumentError(f"{name}: no such data file") from None
    except OSError as error:
        raise FileError(f"{name}: {error.strerror or error}") from None
    return {"bytes": size, "hash": digest.hexdigest()}


def check_file(folder: Path, name: str, then: dict[str, Any], now: dict[str, Any]) -> None:
    if then == now:
        return
    sizes = (
        f"{then['bytes']:,} bytes then, {now['bytes']:,} now"
        if then["bytes"] != now["bytes"]
        else "the same size, other content"
    )
    raise StateError(
        f"{folder}: cannot resume: {name} has changed since the run began ({sizes}); put it back, "
        "or use another output folder"
    )


def as_json(value: Any) -> str:
    """With characters as they are. A name that is not UTF-8 holds lone surrogates, which UTF-8
    cannot; their Python escapes are JSON's as well."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise FormatError(f"{path}: damaged ({error})") from None


def basenames(value: Any) -> Any:
    """Names without folders: a run may be moved, its files' content is compared elsewhere."""
    if isinstance(value, list):
        return [os.path.basename(name) for name in value]
    return os.path.basename(value) if isinstance(value, str) else value


# ---- figures -----------------------------------------------------------------------------------


def training_figures(history: History) -> dict[str, Any]:
    """Sums over a stage's history, however often it was interrupted."""
    final = history.final
    seconds = sum(row.get("seconds", 0.0) for row in history)
    figures: dict[str, Any] = {
        "steps": final["step"],
        "tokens": final["tokens"],
        "training_seconds": round(seconds, 3),
        "tokens_per_second": round(final["tokens"] / seconds, 1) if seconds else None,
        "final": {k: v for k, v in final.items() if k not in ("seconds", "peak_memory_bytes")},
    }
    peaks = [row["peak_memory_bytes"] for row in history if "peak_memory_bytes" in row]
    if peaks:
        figures["peak_memory_bytes"] = max(peaks)
    return figures


def kept_words(found: dict[str, Any]) -> str:
    likelihood, generation = found["likelihood"], found["generation"]
    words = f"{100 * likelihood['kept']:.1f} % by likelihood (KL {likelihood['kl']:.3f})"
    if generation:
        words += f", {100 * generation['kept']:.1f} % by generation"
    return words


def model_facts(model: Model, name: str) -> dict[str, Any]:
    config = model.config
    return {
        "name": model.name or os.path.basename(name),
        "layers": config.num_layers,
        "hidden": config.hidden_size,
        "vocabulary": config.vocab_size,
        "parameters": model.num_parameters,
        "dtype": config.dtype,
        "attention_layers": list(config.attention_layers),
    }


def machine(device: str) -> dict[str, Any]:
    return {
        "device": device,
        "threads": _core.get_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {_core.cpu_info()['level']}",
        "mambainllama": __version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def text_of(model: Model, tokens: list[int]) -> str:
    if model.tokenizer is None:
        return " ".join(map(str, tokens))
    return model.tokenizer.decode(tokens, skip_special_tokens=False)


# ---- checking without running ------------------------------------------------------------------


def check_recipe(
    recipe: Recipe,
    device: str = "auto",
    dtype: str = "auto",
    output_dir: str | os.PathLike | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """What a recipe would do, without reading weights or training.

    Models that are folders are opened (their files are mapped, not read) and the conversion is
    checked against them; models of the Hub are not downloaded. Of each data file that is there, the
    first record is read. `output_dir` and `resume` are as for `run_recipe`.

    Returns
    -------
    dict
        "stages", their names; "missing", the files and models that are not here yet; "student",
        what the conversion would give where the models are here.

    Raises
    ------
    mil.Error
        Whatever would stop the run: one line.
    """
    folder = Path(recipe.output["folder"] if output_dir is None else output_dir)
    run = Run(recipe, folder, device, dtype, None, lambda text: None)
    run.check_folder(resume)
    missing = [name for name in run.all_files() if not os.path.exists(name)]
    for name, keys in run.all_files().items():
        if os.path.exists(name):
            look_into(name, keys)
    for settings in recipe.stages:
        made = [name for name in run.files(settings) if os.path.basename(name) in MADE]
        labelled = any(name.endswith(".labels") for name in made)
        if labelled and isinstance(settings.config, DistillConfig):
            check_without_teacher(settings.config)
    models = [recipe.teacher["model"]]
    models += [recipe.student[key] for key in ("model", "trained") if key in recipe.student]
    absent = [name for name in models if not os.path.isdir(name)]
    local = [name for name in absent if name.startswith((".", os.sep))]
    if local:
        raise ArgumentError(f"{recipe.path}: {local[0]}: no such model folder")
    found: dict[str, Any] = {
        "recipe": str(recipe.path),
        "title": recipe.title,
        "stages": [settings.name for settings in recipe.stages],
        "output": str(folder),
        "missing": [*absent, *missing],
        "student": None,
    }
    if not absent:
        found["student"] = planned_student(run)
    return found


def planned_student(run: Run) -> str:
    """The student that the conversion would make; refuses one that it would not."""
    from .convert import _check_convertible, attention_choice

    making = run.recipe.student
    if "trained" in making:
        student = run.load_model(making, "trained")
        check_pair(run.recipe, student, run.teacher)
        return repr(student)
    source = run.source()
    check_pair(run.recipe, source, run.teacher)
    words = making.get("attention_layers", "half")
    if isinstance(words, str) and words.startswith("auto:"):
        return measured_student(run, source, words.removeprefix("auto:"))
    kept = attention_choice(words, source.core.config["layers"])
    _check_convertible(source, making.get("mixer", "mamba2"), kept)
    for settings in run.recipe.stages:
        if isinstance(settings.config, StepwiseConfig):
            layers = [i for i in source.config.attention_layers if i not in kept]
            replacement_plan(layers, settings.config.parts)
    count = source.config.num_layers
    return f"{count - len(kept)} of {count} layers become {making.get('mixer', 'mamba2')} mixers"


def measured_student(run: Run, source: Model, words: str) -> str:
    """The same where measurement is to choose the layers that stay attention."""
    from .choose import _count
    from .convert import _check_convertible

    making, where = run.recipe.student, f"{run.recipe.path}: [student] attention_layers"
    if making.get("init", "auto") == "paper":
        raise ArgumentError(
            f'{where}="auto:{words}" measures on data, which init="paper" does without; choose '
            "another init, or name the layers"
        )
    here = len(source.config.attention_layers)
    try:
        count = _count(share_or_count(words), source.config.num_layers)
    except ArgumentError:
        count = -1
    if not 0 <= count <= here:
        raise ArgumentError(
            f'{where}="auto:{words}": expected a number from 0 to {here}, the attention layers of '
            "this model, or a share, as in auto:half"
        )
    _check_convertible(source, making.get("mixer", "mamba2"), [])
    if count == here and any(isinstance(s.config, StepwiseConfig) for s in run.recipe.stages):
        replacement_plan([], 1)  # says that nothing is left to replace
    return f"{words} of the layers stay attention, chosen by measurement"


def check_pair(recipe: Recipe, student: Model, teacher: Model) -> None:
    """Both have the same words and, where a stage compares layer by layer, the same layers."""
    shared_vocabulary(student, teacher)
    ours, theirs = student.config, teacher.config
    alike = (ours.num_layers, ours.hidden_size) == (theirs.num_layers, theirs.hidden_size)
    for settings in recipe.stages:
        for name in ("hidden_weight", "align_fraction"):
            weight: float = getattr(settings.config, name, 0.0)
            if weight and not alike:
                raise ArgumentError(
                    f"{recipe.path}: [{settings.name}] {name} compares layer by layer: the teacher "
                    f"has {theirs.num_layers} layers of {theirs.hidden_size}, the student "
                    f"{ours.num_layers} of {ours.hidden_size}"
                )


def look_into(name: str, keys: tuple[str, ...]) -> None:
    """Reads the first record of a data file, to see that it is one of the kind that is due."""
    for path in expand_paths([name]):
        if path.suffix in (".npy", ".npz"):
            continue
        for place, record in read_records(path, False, keys):
            if isinstance(record, Exception):
                raise FormatError(f"{place}: {record}")
            found = record if isinstance(record, Mapping) else ()
            if not any(key in found for key in keys):
                raise FormatError(
                    f"{place}: expected {' or '.join(map(repr, keys))}, found "
                    f"{listing(found, 5) or type(record).__name__}"
                )
            break
        else:
            raise FormatError(f"{path}: holds no record")
