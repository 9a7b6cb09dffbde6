"""The stages of a recipe: one table that says what each is called, takes and does.

A stage gets a `Job` and leaves what it made in the job's folder: `label` answers.jsonl,
`soft_labels` data.labels/, all others model/, and those that train metrics.jsonl and checkpoints/
as well.  A new stage is one entry here; recipe.py checks its section, pipeline.py runs and resumes
it, and report.py shows it without knowing more than this table says.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .checkpointing import write_text
from .choose import choose_layers
from .convert import convert
from .data import read_documents, sample_rows
from .distill import DistillConfig, SftConfig, distill, sft
from .history import History
from .label import label
from .preference import DPOConfig, dpo
from .soft_labels import is_labels, soft_labels
from .stepwise import AlignConfig, StepwiseConfig, align, stepwise
from .training import TrainingConfig

__all__ = ["STAGES", "Job", "Stage"]


@dataclass
class Job:
    """What a stage is given.

    Attributes
    ----------
    folder : Path, for what it makes
    teacher : model
    source : model that is converted; of the stages that make the student
    student : model to train, or None before there is one
    making : dict
        The recipe's [student] section.
    config : settings of a stage that trains, or None
    options : dict, what else its section says
    files : list of str, its data
    validation : data held back, a share of `files`, or None
    progress : bool or None
    """

    folder: Path
    teacher: Any
    source: Any
    student: Any
    making: dict[str, Any]
    config: Any
    options: dict[str, Any]
    files: list[str]
    validation: Any
    progress: bool | None


@dataclass(frozen=True)
class Stage:
    """One kind of stage.

    Attributes
    ----------
    name : str
        Of its section and folder.
    words : str
        What it does, for the report.
    config : class of its settings, or None where it does not train
    run : what does it
    options : keys of its section beside the settings
    required : those without which it cannot run
    makes_student : bool
        Whether a student leaves it that may differ from the one that came in.
    reads_data : bool
        Whether it cannot do without data.
    """

    name: str
    words: str
    config: type[TrainingConfig] | None
    run: Callable[[Job], History | None]
    options: tuple[str, ...] = ("files", "validation")
    required: tuple[str, ...] = ()
    makes_student: bool = True
    reads_data: bool = True

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys of its section."""
        own = () if self.config is None else tuple(field.name for field in fields(self.config))
        return (*own, *self.options)


# ---- what they do ------------------------------------------------------------------------------


def run_label(job: Job) -> None:
    """Appends to the answers that are there: a killed run goes on behind them."""
    settings = {key: value for key, value in job.options.items() if key != "prompts"}
    label(
        job.teacher,
        job.options["prompts"],
        job.folder / "answers.jsonl",
        resume=True,
        progress=bool(job.progress),
        **settings,
    )


def run_soft_labels(job: Job) -> None:
    """Goes on behind the parts that are there."""
    settings = {key: value for key, value in job.options.items() if key != "files"}
    soft_labels(
        job.teacher,
        job.files,
        job.folder / "data.labels",
        resume=True,
        progress=bool(job.progress),
        **settings,
    )


def conversion(job: Job) -> dict[str, Any]:
    """Arguments of `convert` and `stepwise` as [student] says them, and calibration tokens.

    Layers that are to be chosen by measurement ("auto:half") are measured here, once: layers.json
    keeps what was found, for the report and for a run that goes on.
    """
    names = ("mixer", "attention_layers", "init", "seed")
    found = {name: job.making[name] for name in names if name in job.making}
    found["calibration"] = calibration(job)
    words = found.get("attention_layers")
    if isinstance(words, str) and words.startswith("auto:"):
        path = job.folder / "layers.json"
        if not path.exists():
            settings = {name: found[name] for name in ("mixer", "init", "seed") if name in found}
            keep = share_or_count(words.removeprefix("auto:"))
            choice = choose_layers(job.source, found["calibration"], keep, **settings)
            write_text(path, json.dumps(choice.to_dict(), indent=1) + "\n")
        found["attention_layers"] = json.loads(path.read_text(encoding="utf-8"))["layers"]
    return found


def share_or_count(words: str) -> str | int | float:
    """4, 0.25 or "half", as choose_layers takes it."""
    for kind in (int, float):
        try:
            return kind(words)
        except ValueError:
            continue
    return words


def calibration(job: Job) -> Any:
    """Windows of the data for a calibrated start; None where the start is the published one."""
    if job.making.get("init", "auto") == "paper":
        return None
    documents = read_documents(
        job.files,
        job.source.tokenizer,
        vocab=job.source.config.vocab_size,
        skip_bad=True,
    )
    return sample_rows(
        documents,
        job.making.get("calibration_rows", 128),
        job.making.get("calibration_length", 256),
        job.making.get("seed", 0),
    )


def run_convert(job: Job) -> None:
    student = convert(job.source, **conversion(job))
    student.save(job.folder / "model")


def run_stepwise(job: Job) -> History:
    _, history = stepwise(
        job.source if job.student is None else job.student,
        job.teacher,
        job.files,
        job.config,
        job.folder,
        resume=True,
        validation=job.validation,
        progress=job.progress,
        **conversion(job),
    )
    return history


def training(train: Callable[..., History], *, taught: bool) -> Callable[[Job], History]:
    """A stage that is `train(student, data, config, folder, ...)`, or, taught, `train(student,
    teacher, data, ...)`. Data that hold the teacher's soft labels take the teacher's place."""

    def run(job: Job) -> History:
        teachers = [None if any(map(is_labels, job.files)) else job.teacher] if taught else []
        return train(
            job.student,
            *teachers,
            job.files,
            job.config,
            job.folder,
            resume=True,
            validation=job.validation,
            progress=job.progress,
        )

    return run


# ---- the table ---------------------------------------------------------------------------------


def keys_of(function: Callable[..., Any], *given: str) -> tuple[str, ...]:
    """A function's parameters but those that the stage itself gives."""
    return tuple(name for name in inspect.signature(function).parameters if name not in given)


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "label",
            "the teacher answers prompts",
            None,
            run_label,
            options=keys_of(label, "teacher", "output", "resume", "progress"),
            required=("prompts",),
            makes_student=False,
            reads_data=False,
        ),
        Stage(
            "soft_labels",
            "the teacher's likeliest tokens are stored, to distil from without it",
            None,
            run_soft_labels,
            options=(
                "files",
                *keys_of(soft_labels, "teacher", "data", "output", "resume", "progress"),
            ),
            makes_student=False,
        ),
        Stage(
            "convert", "attention becomes mixers", None, run_convert, options=(), reads_data=False
        ),
        Stage(
            "stepwise",
            "attention becomes mixers part by part, mixers trained in between",
            StepwiseConfig,
            run_stepwise,
        ),
        Stage(
            "align",
            "each mixer learns to give what its attention gave",
            AlignConfig,
            training(align, taught=True),
        ),
        Stage(
            "distill",
            "the student learns the teacher's distributions",
            DistillConfig,
            training(distill, taught=True),
        ),
        Stage(
            "sft", "the student learns answers word by word", SftConfig, training(sft, taught=False)
        ),
        Stage(
            "dpo",
            "the student learns to prefer the better of two answers",
            DPOConfig,
            training(dpo, taught=False),
            required=("files",),
        ),
    )
}
