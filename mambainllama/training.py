"""The training loop that every stage shares: steps, metrics, evaluation, checkpoints, resuming.

A stage (distillation, fine-tuning) is a `Task`: it says what one micro-batch adds to the gradients
and which numbers to report.  The loop does the rest, and promises

- the same bits after a resume as without the interruption: a step depends on its number, the
  weights, the moments and the data, all of which a checkpoint holds exactly;
- a last good checkpoint whatever happens: SIGKILL, a full disk, a loss that is no longer finite;
- that Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TextIO

import numpy as np

from . import _core
from .average import Average
from .checkpointing import (
    latest_checkpoint,
    read_record,
    restore,
    sweep,
    tidy,
    write_checkpoint,
    write_text,
)
from .data import Batch, Batches
from .dtypes import to_float32
from .errors import ArgumentError, FileError, NonFiniteError, StateError, shorten
from .history import History, format_value
from .schedule import SCHEDULES, rate_factor, warmup_count

__all__ = ["Task", "TrainingConfig", "TrainingInterrupted", "train"]


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended a run between two steps, after a checkpoint."""


# ---- configuration -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What every stage of training is told.

    Attributes
    ----------
    epochs : int
        Passes over the data.
    max_steps : int or None
        Optimizer steps; overrides `epochs`, and passes over the data again as often as it takes.
    batch_size : int
        Rows in one forward and backward pass.
    sequence_length : int
        Tokens in a row at most; text is packed to it, longer documents are cut.
    gradient_accumulation : int
        Passes whose gradients one optimizer step adds up: equals a batch that many times as large
        (but that errors of hidden states and of alignment are relative to each pass's own).
    learning_rate : float
        Peak of the schedule.
    min_learning_rate : float
        Where cosine and linear schedules end, as a fraction of the peak.
    warmup_ratio : float
        Share of the steps with a rising rate; `warmup_steps` overrides it.
    schedule : "cosine", "linear" or "constant"
    betas, epsilon, weight_decay
        AdamW; the decay touches matrices only.
    max_grad_norm : float
        Gradients are scaled down to this Euclidean norm; 0 leaves them.
    muon_learning_rate : float
        Above 0: Muon with this peak rate on the layers' matrices, AdamW on the rest.
    muon_momentum : float
    vector_rate : float
        Factor on the learning rate of everything that is not a matrix (norms, biases, A_log, D,
        convolutions).
    average_fraction : float
        Share of the steps, at the end, whose weights' mean becomes the trained model; 0: the last
        step's weights. 0.1 is a good value.
    loss_on : "all" or "answers"
        Which tokens of chats count.
    skip_bad : bool
        Leave out bad records instead of stopping at the first.
    checkpointing : bool
        Keep only each layer's input and compute its inside again for the gradients: less memory, a
        third more time.
    seed : int
        Order of the data.
    log_every, eval_every, save_every : int or None
        Steps between metrics, evaluations on validation data, checkpoints; None: only at the end.
    eval_batches : int or None
        Batches of one evaluation; None: all.
    keep_last : int or None
        Checkpoints kept; None: all.
    """

    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 8
    sequence_length: int = 2048
    gradient_accumulation: int = 1
    learning_rate: float = 2e-5
    min_learning_rate: float = 0.0
    warmup_ratio: float = 0.01
    warmup_steps: int | None = None
    schedule: str = "cosine"
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    muon_learning_rate: float = 0.0
    muon_momentum: float = 0.95
    vector_rate: float = 1.0
    average_fraction: float = 0.0
    loss_on: str = "all"
    skip_bad: bool = False
    checkpointing: bool = False
    seed: int = 0
    log_every: int = 1
    eval_every: int | None = None
    eval_batches: int | None = None
    save_every: int | None = 500
    keep_last: int | None = 2

    def __post_init__(self) -> None:
        if isinstance(self.betas, (list, np.ndarray)):
            object.__setattr__(self, "betas", tuple(self.betas))
        name = type(self).__name__
        for field in fields(self):
            problem = self._problem(field.name, getattr(self, field.name))
            if problem:
                raise ArgumentError(
                    f"{name}: {field.name}={shorten(getattr(self, field.name))}: expected {problem}"
                )

    def _problem(self, name: str, value: Any) -> str | None:
        """What was expected of a field, where its value is not that."""
        rule = RULES.get(name)
        if rule is None:
            return None
        check, words = rule
        try:
            return None if check(value) else words
        except (TypeError, OverflowError):
            return words

    # Fields that change when a run saves, reports or how it computes, but not what it computes.
    _FREE: ClassVar[tuple[str, ...]] = (
        "log_every",
        "eval_every",
        "eval_batches",
        "save_every",
        "keep_last",
        "checkpointing",
        "epochs",
        "max_steps",
    )

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        return {
            f.name: jsonable(getattr(self, f.name))
            for f in fields(self)
            if f.name not in self._FREE
        }


def whole(low: int) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        return is_whole and bool(value >= low)

    return check


def number(low: float, high: float = math.inf, *, open_low: bool = False) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
            return False
        above = value > low if open_low else value >= low
        return bool(math.isfinite(value) and above and value <= high)

    return check


def optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def one_of(*choices: str) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value in choices), " or ".join(map(repr, choices))


def flag(value: Any) -> bool:
    return isinstance(value, bool)


def below_one(value: Any) -> bool:
    """In float32 too, in which the optimizer divides by what is left of 1."""
    return number(0)(value) and np.float32(value) < 1


def beta_pair(value: Any) -> bool:
    return len(value) == 2 and all(map(below_one, value))


RULES = {
    "epochs": (whole(1), "a whole number of at least 1"),
    "max_steps": (optional(whole(1)), "a whole number of at least 1, or None"),
    "batch_size": (whole(1), "a whole number of at least 1"),
    "sequence_length": (whole(2), "a whole number of at least 2"),
    "gradient_accumulation": (whole(1), "a whole number of at least 1"),
    "learning_rate": (number(0, open_low=True), "a number above 0"),
    "min_learning_rate": (number(0, 1), "a fraction of the peak, from 0 to 1"),
    "warmup_ratio": (number(0, 1), "a share of the steps, from 0 to 1"),
    "warmup_steps": (optional(whole(0)), "a whole number of at least 0, or None"),
    "schedule": one_of(*SCHEDULES),
    "betas": (beta_pair, "two numbers from 0 to below 1"),
    "epsilon": (number(0, open_low=True), "a number above 0"),
    "weight_decay": (number(0), "a number of at least 0"),
    "max_grad_norm": (number(0), "a number of at least 0 (0: no clipping)"),
    "muon_learning_rate": (number(0), "a number of at least 0 (0: AdamW everywhere)"),
    "muon_momentum": (below_one, "a number from 0 to below 1"),
    "vector_rate": (number(0), "a number of at least 0"),
    "average_fraction": (number(0, 1), "a share of the steps, from 0 to 1"),
    "loss_on": one_of("all", "answers"),
    "skip_bad": (flag, "True or False"),
    "checkpointing": (flag, "True or False"),
    "seed": (whole(0), "a whole number of at least 0"),
    "log_every": (whole(1), "a whole number of at least 1"),
    "eval_every": (optional(whole(1)), "a whole number of at least 1, or None"),
    "eval_batches": (optional(whole(1)), "a whole number of at least 1, or None"),
    "save_every": (optional(whole(1)), "a whole number of at least 1, or None"),
    "keep_last": (optional(whole(1)), "a whole number of at least 1, or None"),
}


def jsonable(value: Any) -> Any:
    """As JSON would give it back, so that it can be compared with a stored record."""
    if isinstance(value, (tuple, list)):
        return [jsonable(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


# ---- the task ----------------------------------------------------------------------------------


class Task:
    """One stage's part of the loop; see distill.py for the one that matters most."""

    config: TrainingConfig
    student: _core.Model
    teacher: _core.Model | None = None
    batches: Batches
    trainer: _core.Trainer

    def prepare(self, folder: Path | None, resume: bool) -> None:
        """What has to be done before the first step; the folder is this run's alone."""

    def draw(self, step: int, total: int) -> list[Batch]:
        """The micro-batches of optimizer step `step` of `total`: a function of its number and the
        weights."""
        return self.batches.step(step)

    def accumulate(self, step: int, total: int, batch: Batch, window: Window) -> dict[str, float]:
        """Adds one micro-batch to the gradients; returns sums that `report` understands."""
        raise NotImplementedError

    def report(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Metrics of the summed micro-batches; must hold `loss`."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, float] | None:
        """Metrics on validation data, or None where there are none."""
        return None

    def notes(self) -> dict[str, Any]:
        """What the metrics say once, at step 0: bad records that were left out."""
        documents = self.batches.documents
        if not documents.skipped:
            return {}
        return {
            "skipped_records": documents.skipped,
            "first_skipped_record": documents.first_skipped,
        }

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on: settings, data, models."""
        raise NotImplementedError

    def tensors(self) -> dict[str, np.ndarray]:
        """The arrays that training changes: weights, moments, masters. Views, not copies."""
        raise NotImplementedError

    def frozen(self) -> str:
        """A hash of the student's weights that training leaves alone: no checkpoint has them."""
        raise NotImplementedError

    def save_model(self, folder: Path) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Window:
    """What the micro-batches of one optimizer step hold together."""

    tokens: int
    counted: float
    labelled: float
    rows: int

    @classmethod
    def of(cls, batches: list[Batch]) -> Window:
        return cls(
            sum(len(batch.tokens) for batch in batches),
            sum(batch.counted for batch in batches),
            sum(batch.labelled for batch in batches),
            sum(batch.rows for batch in batches),
        )


# ---- the loop ----------------------------------------------------------------------------------


def train(
    task: Task,
    output_dir: str | os.PathLike | None,
    *,
    resume: bool = False,
    progress: bool | None = None,
    inputs: Iterable[Any] = (),
) -> History:
    """Runs a task to its end and returns its history.

    `inputs` are the models and data that it was made from: a new run must not move them aside.

    Raises
    ------
    mil.NonFiniteError
        Loss or gradient was not finite; the weights are those of the last step that was.
    mil.FileError
        Metrics or a checkpoint could not be written.
    mil.StateError
        `resume` with other settings, data or models than the run began with; or the folder holds
        what no run has made.
    mil.ArgumentError
        One of `inputs` lies where the run would write.
    TrainingInterrupted
        Ctrl-C or SIGTERM.
    """
    folder = None if output_dir is None else Path(output_dir)
    return Loop(task, folder, progress, inputs).run(resume)


class Loop:
    """State of one run of `train`."""

    # What a run leaves in its folder; set_aside moves it in this order, so its record last.
    RESULTS, COMPANIONS = ("checkpoints", "model"), ("metrics.jsonl", "run.json")

    def __init__(
        self, task: Task, folder: Path | None, progress: bool | None, inputs: Iterable[Any] = ()
    ):
        self.task, self.config, self.folder, self.inputs = task, task.config, folder, inputs
        config = self.config
        self.total = config.max_steps or config.epochs * task.batches.steps_per_epoch
        self.warmup = warmup_count(self.total, config.warmup_steps, config.warmup_ratio)
        self.average: Average | None = None
        if config.average_fraction > 0:
            self.average = Average(task.tensors(), self.total, config.average_fraction)
        self.history = History()
        self.progress = progress
        self.metrics: TextIO | None = None
        # Sums since the last logged step, tokens since the first.
        self.sums: dict[str, float] = {}
        self.tokens = 0
        self.last_good: Path | None = None
        self.clock, self.clock_tokens = time.perf_counter(), 0

    # -- start --

    def identity(self) -> dict[str, Any]:
        identity = {**self.task.identity(), "frozen weights": self.task.frozen()}
        # With a constant rate a run may go on for longer, unless something is a share of the steps.
        shares = (self.config.average_fraction, getattr(self.config, "align_fraction", 0))
        if self.config.schedule != "constant" or any(shares):
            identity["steps in all"] = self.total
        return identity

    @property
    def root(self) -> Path:
        return self.folder / "checkpoints"

    def start(self, resume: bool) -> int:
        """Prepares the folder; returns the first step to take."""
        if self.folder is None:
            return 0
        try:
            sweep(self.folder)
            sweep(self.root)
            checkpoint = latest_checkpoint(self.root)
            if checkpoint is not None and resume:
                return self.resume(checkpoint)
            aside = set_aside(self.folder, self.RESULTS, self.COMPANIONS)
            if aside is not None:
                self.say(f"moved an earlier run to {aside}")
            self.metrics = open(self.folder / "metrics.jsonl", "w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            if isinstance(error, FileError):
                raise
            raise FileError(f"{self.folder}: {error.strerror or error}") from None
        write_text(self.folder / "run.json", json.dumps(self.identity(), indent=1) + "\n")
        return 0

    def check_folder(self, resume: bool) -> None:
        """Refuses a folder that a new run may not use, before anything is written there."""
        if self.folder is not None and not (resume and latest_checkpoint(self.root)):
            check_new_run(self.folder, self.RESULTS, self.COMPANIONS, self.inputs)

    def resume(self, checkpoint: Path) -> int:
        record = read_record(checkpoint)
        now = self.identity()
        # Older versions did not note the frozen weights.
        then = {"frozen weights": now["frozen weights"], **record["identity"]}
        check_identity(checkpoint, then, now)
        if record["step"] > self.total:
            raise StateError(
                f"{checkpoint}: cannot resume: {record['step']} steps are done, {self.total} are "
                "wanted; ask for at least as many (max_steps, epochs), or use another output_dir"
            )
        restore(checkpoint, self.tensors())
        self.task.trainer.step = step = record["step"]
        self.sums, self.tokens = record["sums"], record["tokens"]
        self.last_good = checkpoint
        tidy(checkpoint, self.config.keep_last)
        self.trim_metrics(step)
        self.say(f"resuming from {checkpoint}")
        return step

    def trim_metrics(self, step: int) -> None:
        """Drops what a killed run wrote after its checkpoint, and a line that it cut off."""
        path = self.folder / "metrics.jsonl"
        kept = []
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            if not isinstance(row, dict) or row.get("step", math.inf) > step:
                break
            kept.append(line + "\n")
            self.history.append(row)
        write_text(path, "".join(kept))
        self.metrics = open(path, "a", encoding="utf-8")  # noqa: SIM115

    # -- steps --

    def run(self, resume: bool) -> History:
        with only_run(self.folder):
            return self.run_alone(resume)

    def run_alone(self, resume: bool) -> History:
        self.check_folder(resume)
        self.task.prepare(self.folder, resume)
        first = self.start(resume)
        saved = first if self.last_good else None
        try:
            with stop_signal() as stopped, self.bar(first) as bar:
                if first == 0:
                    self.log(0, {**self.task.notes(), **self.evaluation(0)})
                self.clock = time.perf_counter()
                for step in range(first, self.total):
                    self.step(step, bar)
                    done = step + 1
                    if stopped:
                        saved = self.save(done)
                        raise TrainingInterrupted(self.farewell(done))
                    if (
                        self.config.save_every
                        and done % self.config.save_every == 0
                        and done < self.total
                    ):
                        saved = self.save(done)
            if saved != self.total:
                self.save(self.total)
            if self.folder is not None:
                self.save_final()
        finally:
            if self.metrics is not None:
                self.metrics.close()
        return self.history

    def tensors(self) -> dict[str, np.ndarray]:
        """What a checkpoint holds."""
        means = {} if self.average is None else self.average.tensors()
        return {**self.task.tensors(), **means}

    def step(self, step: int, bar: Any) -> None:
        """One optimizer step, its metrics, and an evaluation where one is due."""
        config, done = self.config, step + 1
        factor = rate_factor(
            step, self.total, self.warmup, config.schedule, config.min_learning_rate
        )
        rate = config.learning_rate * factor
        batches = self.task.draw(step, self.total)
        window = Window.of(batches)
        sums: dict[str, float] = {"steps": 1.0}
        for batch in batches:
            add_sums(sums, self.task.accumulate(step, self.total, batch, window))
        loss = self.task.report(sums)["loss"]
        if not math.isfinite(loss):
            raise NonFiniteError(self.complaint(done, f"the loss is {loss}"))
        try:
            norm = self.task.trainer.apply(
                rate,
                betas=config.betas,
                eps=config.epsilon,
                weight_decay=config.weight_decay,
                max_grad_norm=config.max_grad_norm,
                vector_rate=config.vector_rate,
                muon_rate=config.muon_learning_rate * factor,
                muon_momentum=config.muon_momentum,
            )
        except NonFiniteError as error:
            raise NonFiniteError(self.complaint(done, str(error))) from None
        if self.average is not None:
            self.average.add(done)
        add_sums(self.sums, sums)
        self.tokens += window.tokens
        bar.update()
        row: dict[str, float] = {}
        if done % config.log_every == 0 or done == self.total:
            row = self.measured(rate, norm)
            self.sums = {}
            bar.set_postfix_str(
                ", ".join(f"{k} {format_value(row[k])}" for k in ("loss", "kl") if k in row)
            )
        if done == self.total or (config.eval_every and done % config.eval_every == 0):
            row |= self.evaluation(done)
        self.log(done, row)

    def measured(self, rate: float, norm: float) -> dict[str, float]:
        now = time.perf_counter()
        seconds = now - self.clock
        speed = (self.tokens - self.clock_tokens) / max(seconds, 1e-9)
        self.clock, self.clock_tokens = now, self.tokens
        return {
            **self.task.report(self.sums),
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens_per_second": round(speed, 1),
            "seconds": round(seconds, 4),
            "peak_memory_bytes": peak_memory(),
        }

    def evaluation(self, done: int) -> dict[str, float]:
        begin = time.perf_counter()
        found = self.task.evaluate()
        # Time spent here is not training time.
        self.clock += time.perf_counter() - begin
        if found and self.progress is not False:
            self.say(
                f"step {done}: " + ", ".join(f"{k[5:]} {format_value(v)}" for k, v in found.items())
            )
        return found or {}

    def log(self, done: int, row: Mapping[str, Any]) -> None:
        # JSON has no word for a number that is not finite: it is left out.
        row = {k: v for k, v in row.items() if not isinstance(v, float) or math.isfinite(v)}
        if not row:
            return
        row = {"step": done, "tokens": self.tokens, **row}
        self.history.append(row)
        if self.metrics is None:
            return
        with self.writing_metrics():
            self.metrics.write(json.dumps(row) + "\n")
            self.metrics.flush()

    @contextmanager
    def writing_metrics(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FileError(
                f"{self.folder / 'metrics.jsonl'}: {error.strerror}; "
                f"last good checkpoint: {self.last_good}"
            ) from None

    # -- end --

    def check_weights(self, done: int) -> None:
        """Tries the weights on the next rows: a step can break them, and only the loss of the step
        after it would tell."""
        batch = self.task.batches.step(done)[0]
        sums = _core.evaluate(
            self.task.student, None, batch.tokens, batch.offsets, labels=batch.labels
        )
        if not math.isfinite(sums["ce"]):
            raise NonFiniteError(self.complaint(done, "the weights give no finite loss any more"))

    def save(self, done: int) -> int:
        begin = time.perf_counter()
        self.check_weights(done)
        if self.folder is None:
            return done
        if self.metrics is not None:
            with self.writing_metrics():
                os.fsync(self.metrics.fileno())
        per_epoch = self.task.batches.steps_per_epoch
        record = {
            "step": done,
            "tokens": self.tokens,
            "sums": self.sums,
            # The order of the data is a function of these three (data.Batches.order).
            "position": {
                "seed": self.config.seed,
                "epoch": done // per_epoch,
                "step": done % per_epoch,
            },
            "identity": self.identity(),
        }
        self.last_good = write_checkpoint(
            self.root,
            done,
            self.task.save_model,
            self.tensors(),
            record,
            self.config.keep_last,
        )
        self.clock += time.perf_counter() - begin
        return done

    def save_final(self) -> None:
        """The trained model at run/model."""
        try:
            self.task.save_model(self.folder / "model")
        except FileError as error:
            raise FileError(f"{error}; the trained model is in {self.last_good}") from None

    def complaint(self, done: int, what: str) -> str:
        kept = (
            f"last good checkpoint: {self.last_good}"
            if self.last_good
            else "no checkpoint was due yet"
        )
        mend = (
            "try a lower learning_rate or longer warm-up"
            if self.task.trainer.step
            else f"no step was taken yet: {self.suspect()}"
        )
        return f"step {done}: {what}; {mend}; {kept}"

    def suspect(self) -> str:
        """What is at fault where not even a first step could be taken."""
        alone = self.task.teacher is None
        roles = {"model" if alone else "student": self.task.student, "teacher": self.task.teacher}
        for role, model in roles.items():
            name = None if model is None else broken_parameter(model)
            if name is not None:
                return f"{name} of the {role} holds NaN or infinity; load or make the {role} again"
        return "the models or the settings are at fault"

    def farewell(self, done: int) -> str:
        if self.folder is None:
            return f"interrupted after step {done} of {self.total}; no output_dir, nothing saved"
        return (
            f"interrupted after step {done} of {self.total}; "
            f"resume=True (--resume) goes on from {self.last_good}"
        )

    # -- words --

    @contextmanager
    def bar(self, first: int) -> Iterator[Any]:
        """A progress bar on a terminal or in a notebook, silence elsewhere."""
        from tqdm.auto import tqdm

        show = self.progress if self.progress is not None else is_watched()
        with tqdm(
            total=self.total, initial=first, disable=not show, unit="step", leave=True
        ) as bar:
            yield bar

    def say(self, text: str) -> None:
        """A line above the progress bar; nothing where progress is off."""
        if self.progress or (self.progress is None and is_watched()):
            from tqdm.auto import tqdm

            tqdm.write(text, file=sys.stderr)


# What runs note when they begin: by one of these, results are known as a run's.
RECORDS = ("run.json", "recipe.json")


def check_new_run(
    folder: Path,
    results: Iterable[str],
    companions: Iterable[str] = (),
    inputs: Iterable[Any] = (),
) -> None:
    """Refuses a new run where `set_aside` would move what the run reads, or what no run has made.

    `inputs` are its models and data; those that are neither models of a folder nor paths pass.
    """
    results = list(results)
    places = {os.path.realpath(folder / name): folder / name for name in (*results, *companions)}
    for path in paths_of(inputs):
        whole = os.path.realpath(path)
        for above in (whole, *map(str, Path(whole).parents)):
            if above in places:
                raise ArgumentError(
                    f"{path}: is read by this run and lies in {places[above]}, which a new run in "
                    f"{folder} moves aside; use another output folder (--output)"
                )
    if any((folder / name).exists() for name in RECORDS):
        return
    for name in results:
        if os.path.lexists(folder / name):
            raise StateError(
                f"{folder / name}: stands where the run writes, and no earlier run made it (there "
                f"is no {' or '.join(RECORDS)} beside it); use another output folder (--output)"
            )


def paths_of(inputs: Iterable[Any]) -> Iterator[str]:
    """The paths that exist among inputs: given, in a list, or of the folder of a loaded model."""
    for value in inputs:
        value = getattr(value, "_folder", value)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, (str, os.PathLike)) and os.path.lexists(item):
                yield os.fsdecode(item)


def set_aside(folder: Path, results: Iterable[str], companions: Iterable[str] = ()) -> Path | None:
    """Moves an older run in a folder to previous-N, where it has results: nothing is overwritten.

    Returns where it went, or None.
    """
    results = list(results)
    check_new_run(folder, results)
    if not any(os.path.lexists(folder / name) for name in results):
        return None
    number = 1
    while (folder / f"previous-{number}").exists():
        number += 1
    aside = folder / f"previous-{number}"
    aside.mkdir()
    # The record goes last: who is killed in between leaves results that are known as a run's.
    for name in (*results, *companions):
        if os.path.lexists(folder / name):
            (folder / name).rename(aside / name)
    return aside


def check_identity(where: Any, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to go on with other settings, data or models than a run began with."""
    for name in [*now, *(name for name in then if name not in now)]:
        if then.get(name) != now.get(name):
            raise StateError(
                f"{where}: cannot resume: {name} was {shorten(then.get(name))}, is "
                f"{shorten(now.get(name))} now; use what the run began with, or another output_dir"
            )


def is_watched() -> bool:
    """Whether somebody looks: a terminal, or a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def add_sums(into: dict[str, float], new: Mapping[str, float]) -> None:
    for name, value in new.items():
        into[name] = into.get(name, 0.0) + value


def broken_parameter(model: _core.Model) -> str | None:
    """The name of the first parameter that is not finite, or None."""
    dtypes = model.dtypes()
    for name, array in model.parameters().items():
        if not np.isfinite(to_float32(array, dtypes[name])).all():
            return name
    return None


@contextmanager
def only_run(folder: Path | None) -> Iterator[None]:
    """Keeps a second process out of a run's folder; the lock dies with its holder."""
    if folder is None:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise FileError(f"{folder}: {error.strerror or error}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(
                f"{folder}: another process is training in this folder; wait, or choose another"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield


@contextmanager
def stop_signal() -> Iterator[list[int]]:
    """A list that is no longer empty once Ctrl-C or SIGTERM came; a second Ctrl-C stops at once."""
    stopped: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def note(number: int, frame: Any) -> None:
        if stopped and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopped.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def peak_memory() -> int:
    """Bytes that this process has held at most."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
