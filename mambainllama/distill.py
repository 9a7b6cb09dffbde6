"""Distillation: trains a converted student towards its teacher's distributions.

The loss of an optimizer step is, with means over its counted tokens,

    kl_weight * T^2 * mean KL(teacher || student at temperature T) + ce_weight * mean CE(next token)
    + hidden_weight * mean over layers of |h_student - h_teacher|^2 / |h_teacher|^2

Three choices are worth knowing before the first run:

- `align_fraction`: the first part of the steps trains each mixer alone to give what the attention
  that it replaced gives on the teacher's own activations. All layers learn at once, none waits for
  the ones below it to be right, and the KL that follows starts from a model that already works.
- `on_policy`: at a share of the steps the student writes the text and the teacher corrects it, so
  that the student meets its own mistakes. Worth it at the end of a training, when its text is text.
- `reduction="reference"` repeats the published code, whose KL is divided by rows and not by tokens:
  at 2,048 tokens it weighs 2,048 times as much beside the CE as the number in its recipe says.

>>> config = mil.DistillConfig(learning_rate=6e-3)                 # doctest: +SKIP
>>> history = mil.distill(student, teacher, tokens, config)        # doctest: +SKIP
>>> history.final["kl"]                                            # doctest: +SKIP
0.148
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import _core
from .data import Batch, Batches, Documents, hold_back, read_documents
from .errors import ArgumentError
from .evaluate import comparison, counted, perplexity_of, run_batches
from .generate import Endings
from .history import History
from .on_policy import is_on_policy, sample_continuations
from .pairs import core_of, shared_vocabulary
from .training import (
    RULES,
    Task,
    TrainingConfig,
    Window,
    add_sums,
    number,
    one_of,
    train,
    whole,
)

__all__ = ["DistillConfig", "SftConfig", "distill", "sft"]


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainingConfig):
    """Settings of `mil.distill`, beside those of every training (`mil.TrainingConfig`).

    Attributes
    ----------
    kl_weight, ce_weight : float
        Weights of the two losses; both are means over tokens, in nats.
    direction : "forward", "reverse" or "jsd"
        KL(teacher || student); KL(student || teacher); or between both, the generalised
        Jensen-Shannon divergence jsd_mix KL(teacher || m) + (1 - jsd_mix) KL(student || m) from
        m = jsd_mix teacher + (1 - jsd_mix) student.
    jsd_mix : float
    temperature : float
        Divides both logits before the KL, which is multiplied by its square.
    reduction : "token" or "reference"
        Mean over counted tokens, or the published code's sum over tokens divided by rows.
    train : "all" or "mixers"
        Every parameter, or only those of the mixers.
    hidden_weight : float
        Weight of matching the residual stream after each layer.
    align_fraction : float
        Share of the steps, at the start, that match each mixer's output to the attention's instead.
    on_policy : float
        Share of the other steps, drawn at random, on continuations that the student samples itself;
        they count the divergence only (see mambainllama/on_policy.py).
    on_policy_tokens : int
        Tokens that it samples at most.
    on_policy_temperature : float
        Of the sampling.
    on_policy_prompt : int
        Tokens that it starts from in texts without answers; at most half of the text.
    """

    kl_weight: float = 1.0
    ce_weight: float = 0.0
    direction: str = "forward"
    temperature: float = 1.0
    reduction: str = "token"
    train: str = "all"
    hidden_weight: float = 0.0
    align_fraction: float = 0.0
    jsd_mix: float = 0.5
    on_policy: float = 0.0
    on_policy_tokens: int = 128
    on_policy_temperature: float = 1.0
    on_policy_prompt: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = (self.kl_weight, self.ce_weight, self.hidden_weight)
        if not any(weights) and self.align_fraction < 1:
            raise ArgumentError(
                f"{type(self).__name__}: kl_weight, ce_weight and hidden_weight are all 0: "
                "nothing would be learnt"
            )
        if self.on_policy and not self.kl_weight and not self.hidden_weight:
            raise ArgumentError(
                f"{type(self).__name__}: on_policy={self.on_policy} with kl_weight=0: those steps "
                "count the divergence only and would learn nothing"
            )


@dataclass(frozen=True, kw_only=True)
class SftConfig(TrainingConfig):
    """Settings of `mil.sft`: cross-entropy on answers; see `mil.TrainingConfig`."""

    loss_on: str = "answers"
    train: str = "all"


# Logits are multiplied by 1/T in float32, the loss by T^2: far inside what that can hold.
TEMPERATURE = (number(1e-6, 1e6), "a number from 1e-6 to 1e6")

RULES.update(
    kl_weight=(number(0), "a number of at least 0"),
    ce_weight=(number(0), "a number of at least 0"),
    direction=one_of("forward", "reverse", "jsd"),
    temperature=TEMPERATURE,
    reduction=one_of("token", "reference"),
    train=one_of("all", "mixers"),
    hidden_weight=(number(0), "a number of at least 0"),
    align_fraction=(number(0, 1), "a share of the steps, from 0 to 1"),
    jsd_mix=(
        lambda mix: number(0, 1, open_low=True)(mix) and mix < 1,
        "a number between 0 and 1",
    ),
    on_policy=(number(0, 1), "a share of the steps, from 0 to 1"),
    on_policy_tokens=(whole(1), "a whole number of at least 1"),
    on_policy_temperature=TEMPERATURE,
    on_policy_prompt=(whole(1), "a whole number of at least 1"),
)


def distill(
    student: Any,
    teacher: Any,
    data: Any,
    config: DistillConfig | None = None,
    output_dir: str | os.PathLike | None = "run",
    resume: bool = False,
    *,
    validation: Any = None,
    progress: bool | None = None,
) -> History:
    """Trains `student` in place towards `teacher`.

    Parameters
    ----------
    student : model from `mil.convert` or `mil.load`
    teacher : model with the same tokenizer; may be larger than the one the student was made from
        None where `data` is a folder of `mil.soft_labels`, which a teacher left behind.
    data : integer array (n, length), or files, or records
        See `mambainllama.data.read_documents`. Every row of an array is one row of a batch; text is
        tokenised and packed into rows of `sequence_length`, documents kept apart.
    config : DistillConfig
    output_dir : folder for metrics.jsonl, checkpoints/ and the trained model/; None writes nothing
    resume : bool
        Go on from the newest checkpoint in `output_dir`, to the same bits as without the
        interruption; starts afresh where there is none. The weights that are trained come from the
        checkpoint, whatever `student` has there; the others must be those of the start.
    validation : data, or a share of `data` between 0 and 1 to hold back
        Evaluated before, every `eval_every` steps, and after: eval_kl, eval_perplexity,
        eval_agreement.
    progress : bool or None
        A progress bar; None: on a terminal.

    Returns
    -------
    History
        One dictionary a logged step, as in metrics.jsonl.

    Raises
    ------
    mil.ArgumentError, mil.FormatError, mil.FileError, mil.StateError, mil.NonFiniteError
        One line each; checkpoints written before stay whole.

    References
    ----------
    Wang, Paliotta, May, Rush, Dao, "The Mamba in the Llama" (arXiv 2408.15237), section 4.
    """
    config = DistillConfig() if config is None else config
    if not isinstance(config, DistillConfig):
        raise ArgumentError(f"config: expected mil.DistillConfig, got {type(config).__name__}")
    if teacher is None:
        ours, theirs = core_of(student), None
    else:
        ours, theirs = shared_vocabulary(student, teacher)
    task = DistillTask(student, ours, theirs, data, validation, config)
    if teacher is None:
        check_labelled(task, config)
    inputs = (student, teacher, data, validation)
    return train(task, output_dir, resume=resume, progress=progress, inputs=inputs)


def check_labelled(task: DistillTask, config: DistillConfig) -> None:
    """Without a teacher there must be its labels, and nothing that needs itself."""
    if not task.labelled:
        raise ArgumentError(
            "distill: teacher is None, and data holds no soft labels: make them with "
            "mil.soft_labels, or give the teacher"
        )
    check_without_teacher(config)


def check_without_teacher(config: DistillConfig) -> None:
    """Settings that soft labels can serve."""
    for name, without in (
        ("temperature", 1.0),
        ("hidden_weight", 0.0),
        ("align_fraction", 0.0),
        ("on_policy", 0.0),
    ):
        if getattr(config, name) != without:
            raise ArgumentError(
                f"DistillConfig: {name}={getattr(config, name)} needs a teacher; soft labels hold "
                "its distributions at temperature 1 only"
            )


def sft(
    model: Any,
    data: Any,
    config: SftConfig | None = None,
    output_dir: str | os.PathLike | None = "run",
    resume: bool = False,
    *,
    validation: Any = None,
    progress: bool | None = None,
) -> History:
    """Trains `model` in place on the next tokens of `data`; arguments as for `mil.distill`.

    With ``loss_on="answers"`` (the default) only the assistant's words of chats are learnt; with
    "all", every token. Sequence-level distillation is this on answers that a teacher generated.
    """
    config = SftConfig() if config is None else config
    if not isinstance(config, SftConfig):
        raise ArgumentError(f"config: expected mil.SftConfig, got {type(config).__name__}")
    task = DistillTask(model, core_of(model), None, data, validation, config)
    inputs = (model, data, validation)
    return train(task, output_dir, resume=resume, progress=progress, inputs=inputs)


# ---- the task ----------------------------------------------------------------------------------


class DistillTask(Task):
    """KL and CE on batches of tokens; without a teacher or its soft labels, CE alone."""

    config: Any  # of the stage: settings that it lacks have the value that changes nothing

    def __init__(
        self,
        model: Any,
        student: _core.Model,
        teacher: _core.Model | None,
        data: Any,
        validation: Any,
        config: TrainingConfig,
    ):
        self.model, self.student, self.teacher, self.config = model, student, teacher, config
        self.ce_weight = getattr(config, "ce_weight", 1.0)
        self.temperature = getattr(config, "temperature", 1.0)
        self.direction = getattr(config, "direction", "forward")
        self.per_row = getattr(config, "reduction", "token") == "reference"
        self.hidden_weight = getattr(config, "hidden_weight", 0.0)
        self.align_fraction = getattr(config, "align_fraction", 0.0)
        self.names = trainable_names(student, getattr(config, "train", "all"))

        documents = self.read(data)
        distills = isinstance(config, DistillConfig)
        self.labelled = distills and teacher is None and documents.soft is not None
        self.kl_weight = self.config.kl_weight if distills and (teacher or self.labelled) else 0.0
        documents, held = hold_back(documents, validation, self.read)
        self.batches = Batches(
            documents,
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
            accumulation=config.gradient_accumulation,
            seed=config.seed,
        )
        self.held = None
        if held is not None:
            self.held = Batches(
                held,
                batch_size=config.batch_size,
                sequence_length=config.sequence_length,
                shuffle=False,
            )
        self.trainer = _core.Trainer(
            student, teacher, trainable=self.names, checkpointing=config.checkpointing
        )

    def read(self, data: Any) -> Documents:
        return read_documents(
            data,
            getattr(self.model, "tokenizer", None),
            vocab=self.student.config["vocab"],
            loss_on=self.config.loss_on,
            skip_bad=self.config.skip_bad,
        )

    # -- losses --

    def draw(self, step: int, total: int) -> list[Batch]:
        batches = self.batches.step(step)
        if not self.samples(step, total):
            return batches
        config = self.config
        return sample_continuations(
            self.student,
            batches,
            stop=Endings.of(self.model, None).tokens,
            prompt_length=config.on_policy_prompt,
            new_tokens=config.on_policy_tokens,
            sequence_length=config.sequence_length,
            temperature=config.on_policy_temperature,
            seed=config.seed,
            step=step,
        )

    def samples(self, step: int, total: int) -> bool:
        """Whether a step is on-policy."""
        share = getattr(self.config, "on_policy", 0.0)
        aligned = step < round(self.align_fraction * total)
        return not aligned and is_on_policy(self.config.seed, step, share)

    def accumulate(self, step: int, total: int, batch: Batch, window: Window) -> dict[str, float]:
        # The core scales every row alike. The CE counts fewer rows than the KL (a document's last
        # token has no successor), so its weight makes up for that: each loss is a mean of its own.
        share = len(batch.tokens) / window.tokens
        if step < round(self.align_fraction * total):
            sums = self.trainer.backward(batch.tokens, batch.offsets, align_weight=share)
            return {"align": sums["align"] * share, "align_steps": share}
        labelled = max(1.0, window.labelled)
        if self.teacher is None and not self.labelled:
            rows, ce_weight = labelled, self.ce_weight
        else:
            rows = float(window.rows) if self.per_row else max(1.0, window.counted)
            ce_weight = self.ce_weight * rows / labelled
        on_policy = self.samples(step, total)
        sums = self.run(
            batch,
            kl_weight=self.kl_weight,
            ce_weight=0.0 if on_policy else ce_weight,  # nobody said that the samples are right
            scale=1.0 / rows,
            hidden_weight=self.hidden_weight * share,
        )
        if on_policy:
            return {
                "on_policy_kl": sums["kl"],
                "on_policy_rows": batch.rows if self.per_row else sums["kl_rows"],
                "on_policy_tokens": sums["kl_rows"],
                "hidden": sums["hidden"] * share,
                "on_policy_steps": share,
            }
        kept = {
            k: sums[k] for k in ("kl", "ce", "teacher_ce", "kl_rows", "ce_rows", "agree", "correct")
        }
        return {**kept, "hidden": sums["hidden"] * share, "loss_steps": share, "rows": batch.rows}

    def run(self, batch: Batch, **options: Any) -> dict[str, float]:
        """One pass of the trainer over a batch, with what all passes have in common."""
        common = {
            "labels": batch.labels,
            "row_weight": batch.row_weight,
            "temperature": self.temperature,
            "direction": self.direction,
            "mix": getattr(self.config, "jsd_mix", 0.5),
        }
        if self.labelled:
            common |= {"top_tokens": batch.top_tokens, "top_logprobs": batch.top_logprobs}
        return self.trainer.backward(batch.tokens, batch.offsets, **{**common, **options})

    def report(self, sums: Mapping[str, float]) -> dict[str, float]:
        found: dict[str, float] = {}
        loss = 0.0
        if sums.get("kl_rows"):
            found["kl"] = sums["kl"] / sums["kl_rows"]
            found["agreement"] = sums["agree"] / sums["kl_rows"]
            mean = sums["kl"] / sums["rows"] if self.per_row else found["kl"]
            loss += self.kl_weight * self.temperature**2 * mean
        if sums.get("ce_rows"):
            found["ce"] = sums["ce"] / sums["ce_rows"]
            found["accuracy"] = sums["correct"] / sums["ce_rows"]
            loss += self.ce_weight * found["ce"]
        plain, sampled = sums.get("loss_steps", 0.0), sums.get("on_policy_steps", 0.0)
        if sampled:
            found["on_policy_kl"] = sums["on_policy_kl"] / sums["on_policy_tokens"]
            mean = sums["on_policy_kl"] / sums["on_policy_rows"]
            other = self.kl_weight * self.temperature**2 * mean
            loss = (plain * loss + sampled * other) / (plain + sampled)
        if self.hidden_weight and plain + sampled:
            found["hidden"] = sums["hidden"] / (plain + sampled)
            loss += self.hidden_weight * found["hidden"]
        if sums.get("align_steps"):
            found["align"] = sums["align"] / sums["align_steps"]
            loss = loss if plain + sampled else found["align"]
        return {"loss": loss, **found}

    def evaluate(self) -> dict[str, float] | None:
        if self.held is None:
            return None
        if self.labelled and self.held.documents.soft is not None:
            return self.evaluate_labelled()
        sums = run_batches(self.student, self.teacher, self.held, self.config.eval_batches)
        if self.teacher is None:
            return {
                "eval_ce": sums["ce"] / sums["ce_rows"],
                "eval_perplexity": perplexity_of(sums["ce"], sums["ce_rows"]),
            }
        found = comparison(sums)
        return {
            "eval_kl": found.kl,
            "eval_perplexity": found.perplexity,
            "eval_teacher_perplexity": found.teacher_perplexity,
            "eval_agreement": found.agreement,
        }

    def evaluate_labelled(self) -> dict[str, float]:
        sums: dict[str, float] = {}
        for index, batch in enumerate(self.held):
            if index == self.config.eval_batches:
                break
            add_sums(sums, self.run(batch, direction="forward", evaluate=True))
        counted(sums)
        return {
            "eval_kl": sums["kl"] / sums["kl_rows"],
            "eval_perplexity": perplexity_of(sums["ce"], sums["ce_rows"]),
            "eval_agreement": sums["agree"] / sums["kl_rows"],
        }

    # -- what a checkpoint holds --

    def identity(self) -> dict[str, Any]:
        return {
            **self.config.identity(),
            "data": self.batches.documents.fingerprint(),
            "student": config_hash(self.student.config),
            "teacher": None if self.teacher is None else weights_hash(self.teacher),
        }

    def tensors(self) -> dict[str, np.ndarray]:
        arrays = self.student.parameters()
        weights = {f"p.{name}": arrays[name] for name in self.names}
        return {**weights, **self.trainer.state()}

    def frozen(self) -> str:
        return weights_hash(self.student, without=self.names)

    def save_model(self, folder: Path) -> None:
        self.model.save(folder)


def trainable_names(student: _core.Model, which: str) -> list[str]:
    """Names of the parameters to train."""
    names = list(student.parameters())
    if which == "all":
        return names
    mixers = [name for name in names if ".mamba." in name]
    if not mixers:
        raise ArgumentError(
            'train="mixers": the model has no mixers; convert it first, or use train="all"'
        )
    return mixers


def config_hash(config: Mapping[str, Any]) -> str:
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_hash(core: _core.Model, without: Collection[str] = ()) -> str:
    """Tells one model from another by its configuration and the first page of every weight but
    some."""
    digest = hashlib.sha256(config_hash(core.config).encode())
    for name, array in core.parameters().items():
        if name in without:
            continue
        digest.update(name.encode())
        digest.update(array.reshape(-1)[:1024].tobytes())
    return digest.hexdigest()[:16]
