"""The stages before end-to-end distillation: attention replaced step by step, mixers aligned.

Replacing all attention at once leaves a model that has to learn everything anew.  `stepwise`
replaces a part of the layers, trains the mixers, replaces the next part, and so on:

    part 1 of 4   M . . . M . . .        M  a mixer, trained
    part 2 of 4   M . M . M . M .        .  attention, still the source's
    part 3 of 4   M M M . M M M .
    part 4 of 4   M M M M M M M M

Each part starts from the student of the part before it: mixers that are there keep their weights,
new ones start from the attention that they replace.  Norms, MLPs and embeddings stay frozen, and
the loss is 0.1 KL + 1 CE, as published (arXiv 2408.15237, section 4).

Which layers come first: the layers to be replaced, numbered 0, 1, 2, ..., are taken in the order of
their numbers' bits read backwards (0, 4, 2, 6, 1, 5, 3, 7 of eight).  Any beginning of that order
is spread over the whole depth, so that at every part attention stays within reach of every mixer.

`align` trains mixers on the teacher's own activations: each one to give what the attention that it
replaced gave, and then, where asked, the residual stream after each layer to be the teacher's.

>>> replacement_plan(range(8), 4)
[[0, 4], [2, 6], [1, 5], [3, 7]]
>>> student, history = mil.stepwise(llama, llama, "answers.jsonl")       # doctest: +SKIP
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpointing import sweep, write_text
from .convert import _measured_choice as measured_choice
from .convert import attention_choice, convert
from .data import Documents, hold_back, read_documents, sample_rows
from .distill import DistillConfig, distill, weights_hash
from .errors import ArgumentError, FormatError, shorten
from .history import History
from .model import Model, load
from .pairs import core_of, shared_vocabulary
from .training import RULES, check_identity, check_new_run, only_run, set_aside

__all__ = ["AlignConfig", "StepwiseConfig", "align", "replacement_plan", "stepwise"]

# Of the data, for the calibrated start of new mixers: windows and tokens in each.
CALIBRATION = (256, 256)


@dataclass(frozen=True, kw_only=True)
class StepwiseConfig(DistillConfig):
    """Settings of `mil.stepwise`: those of `mil.DistillConfig` with the published defaults.

    `epochs`, `max_steps`, warm-up and schedule are those of each part.

    Attributes
    ----------
    parts : int, "each", or lists of layers
        In how many parts the layers are replaced: 4 goes through a quarter, a half and three
        quarters of them; "each" takes one layer at a time; lists name the layers of each part.
    """

    parts: int | str | Sequence[Sequence[int]] = 4
    kl_weight: float = 0.1
    ce_weight: float = 1.0
    train: str = "mixers"
    learning_rate: float = 8e-5
    betas: tuple[float, float] = (0.9, 0.98)


@dataclass(frozen=True, kw_only=True)
class AlignConfig(DistillConfig):
    """Settings of `mil.align`: those of `mil.DistillConfig`, with no loss on the logits.

    The first `align_fraction` of the steps match each mixer's output to the attention's that it
    replaced, all layers at once on the teacher's activations. The rest, if any, match the residual
    stream after each layer (`hidden_weight`), where errors of earlier layers count too.
    """

    kl_weight: float = 0.0
    ce_weight: float = 0.0
    hidden_weight: float = 1.0
    align_fraction: float = 1.0
    train: str = "mixers"
    learning_rate: float = 1e-3


def good_parts(parts: Any) -> bool:
    if isinstance(parts, str):
        return parts == "each"
    if isinstance(parts, int):
        return not isinstance(parts, bool) and parts >= 1
    return len(parts) > 0 and all(
        len(part) > 0 and all(isinstance(layer, int) for layer in part) for part in parts
    )


RULES["parts"] = (good_parts, 'a whole number of at least 1, "each", or lists of layers')


def replacement_plan(
    replaced: Sequence[int], parts: int | str | Sequence[Sequence[int]]
) -> list[list[int]]:
    """The layers that each part replaces.

    >>> replacement_plan([0, 1, 2, 4, 5, 6], "each")
    [[0], [5], [2], [1], [6], [4]]
    >>> replacement_plan([0, 1, 2], 4)
    [[0], [2], [1]]
    >>> replacement_plan([0, 1, 2], [[2], [0, 1]])
    [[2], [0, 1]]
    """
    replaced = sorted(replaced)
    count = len(replaced)
    if not count:
        raise ArgumentError("stepwise: attention_layers leaves nothing to replace")
    if not isinstance(parts, (int, str)):
        named = [layer for part in parts for layer in part]
        if sorted(named) != replaced:
            raise ArgumentError(
                f"stepwise: parts {shorten(parts)} must name each layer to be replaced once: "
                f"{shorten(replaced)}"
            )
        return [sorted(part) for part in parts]
    bits = max(1, (count - 1).bit_length())
    order = sorted(range(count), key=lambda number: f"{number:0{bits}b}"[::-1])
    number_of_parts = count if parts == "each" else min(int(parts), count)
    ends = [round(part * count / number_of_parts) for part in range(number_of_parts + 1)]
    return [
        sorted(replaced[number] for number in order[begin:end])
        for begin, end in zip(ends[:-1], ends[1:], strict=True)
    ]


def stepwise(
    source: Model,
    teacher: Model,
    data: Any,
    config: StepwiseConfig | None = None,
    output_dir: str | os.PathLike | None = "run",
    resume: bool = False,
    *,
    mixer: str = "mamba2",
    attention_layers: Sequence[int] | str | float = "none",
    init: str = "auto",
    calibration: Any = None,
    seed: int = 0,
    validation: Any = None,
    progress: bool | None = None,
) -> tuple[Model, History]:
    """Replaces attention layers part by part, training the mixers in between.

    Parameters
    ----------
    source : model whose attention is replaced; it stays as it is
        A Transformer, or a hybrid that keeps attention layers.
    teacher : model with the same tokenizer; often `source` itself
    data, validation, progress : as for `mil.distill`
    config : StepwiseConfig
    output_dir : folder for part-1-of-4/ and so on, metrics.jsonl and the last student in model/;
        None writes nothing
    resume : bool
        Go on in the part, and at the step, where the run in `output_dir` stopped.
    mixer, attention_layers, init, seed
        As for `mil.convert`; `attention_layers` are those that stay attention in the end.
    calibration
        As for `mil.convert`; None takes windows of `data`, unless init="paper".

    Returns
    -------
    (student, history) : Model, History
        Steps and tokens of the history run on through the parts; "part" counts them from 1.

    Raises
    ------
    mil.ArgumentError, mil.FormatError, mil.FileError, mil.StateError, mil.NonFiniteError
        One line each; checkpoints written before stay whole.
    """
    config = StepwiseConfig() if config is None else config
    if not isinstance(config, StepwiseConfig):
        raise ArgumentError(f"config: expected mil.StepwiseConfig, got {type(config).__name__}")
    if not isinstance(source, Model):
        raise ArgumentError(f"stepwise: expected a model from mil.load, got {source!r}")
    documents, held = read_split(source, teacher, data, validation, config)
    if calibration is None and init != "paper":
        windows, length = CALIBRATION
        calibration = sample_rows(documents, windows, min(length, config.sequence_length), seed)
    layers = source.core.config["layers"]
    if isinstance(attention_layers, str) and attention_layers.startswith("auto:"):
        attention_layers = measured_choice(source, mixer, attention_layers, init, calibration, seed)
    kept = attention_choice(attention_layers, layers)
    replaced = [
        i for i, layer in enumerate(layers) if layer["mixer"] == "attention" and i not in kept
    ]
    plan = replacement_plan(replaced, config.parts)
    folder = None if output_dir is None else Path(output_dir)
    with only_run(folder):
        if folder is not None:
            start(
                folder,
                resume,
                {
                    "plan": plan,
                    "mixer": mixer,
                    "init": init,
                    "conversion's seed": seed,
                    **config.identity(),
                    "epochs": config.epochs,
                    "max_steps": config.max_steps,
                    "data": documents.fingerprint(),
                    "source": weights_hash(source.core),
                    "teacher": weights_hash(core_of(teacher)),
                },
                (source, teacher, data, validation),
            )
        student, history = source, History()
        for number, part in enumerate(plan, start=1):
            inside = None if folder is None else folder / f"part-{number}-of-{len(plan)}"
            if inside is not None and (inside / "model").is_dir():
                # Written last and renamed into place: this part is done.
                student = load(inside / "model", device=source.device)
                rows = History.read(inside)
            else:
                remaining = [i for i in student.config.attention_layers if i not in part]
                student = convert(
                    student,
                    mixer=mixer,
                    attention_layers=remaining,
                    init=init,
                    calibration=calibration,
                    seed=seed,
                )
                rows = distill(
                    student,
                    teacher,
                    documents,
                    config,
                    inside,
                    resume=True,
                    validation=held,
                    progress=progress,
                )
            history += following(history, rows, number)
        if folder is not None:
            write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))
            student.save(folder / "model")
        return student, history


def read_split(
    source: Model, teacher: Model, data: Any, validation: Any, config: StepwiseConfig
) -> tuple[Documents, Documents | None]:
    """Documents to train on and to hold back, read once for all parts."""
    core, _ = shared_vocabulary(source, teacher)

    def read(what: Any) -> Documents:
        return read_documents(
            what,
            source.tokenizer,
            vocab=core.config["vocab"],
            loss_on=config.loss_on,
            skip_bad=config.skip_bad,
        )

    return hold_back(read(data), validation, read)


def start(folder: Path, resume: bool, identity: dict[str, Any], inputs: Sequence[Any] = ()) -> None:
    """Prepares the run's folder: a new run, or one that goes on unchanged."""
    sweep(folder)
    record = folder / "run.json"
    identity = json.loads(json.dumps(identity))  # as it will be read back
    if resume and record.exists():
        try:
            then = json.loads(record.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FormatError(f"{record}: damaged ({error})") from None
        check_identity(folder, then, identity)
        return
    results = ["model", *sorted(path.name for path in folder.glob("part-*-of-*"))]
    companions = ["metrics.jsonl", "run.json"]
    check_new_run(folder, results, companions, inputs)
    set_aside(folder, results, companions)
    write_text(record, json.dumps(identity, indent=1) + "\n")


def following(history: History, rows: History, part: int) -> list[dict[str, Any]]:
    """The rows of a part, steps and tokens counted on from those before it."""
    last = history[-1] if history else {"step": 0, "tokens": 0}
    return [
        {
            **row,
            "step": row["step"] + last["step"],
            "tokens": row["tokens"] + last["tokens"],
            "part": part,
        }
        for row in rows
    ]


def align(
    student: Model,
    teacher: Model,
    data: Any,
    config: AlignConfig | None = None,
    output_dir: str | os.PathLike | None = "run",
    resume: bool = False,
    *,
    validation: Any = None,
    progress: bool | None = None,
) -> History:
    """Trains the mixers of `student` in place on the teacher's activations, layer by layer.

    The teacher must have the student's layers and width: each mixer sees what the attention of the
    same layer saw. Arguments and errors are those of `mil.distill`.
    """
    config = AlignConfig() if config is None else config
    if not isinstance(config, AlignConfig):
        raise ArgumentError(f"config: expected mil.AlignConfig, got {type(config).__name__}")
    return distill(
        student,
        teacher,
        data,
        config,
        output_dir,
        resume,
        validation=validation,
        progress=progress,
    )
