"""Preference training (DPO): of two answers to a prompt, make the chosen one likelier.

With log p the log-probability of an answer under the model and log q the same under a reference
model, usually the model as it was before, each pair of answers gives

    margin = beta * ((log p - log q)(chosen) - (log p - log q)(rejected))
    loss   = -(1 - e) * log sigmoid(margin) - e * log sigmoid(-margin),   e = label_smoothing

and a step's loss is the mean over its pairs.  Log-probabilities are sums over the answer's tokens,
or means with ``length_normalized``.  Only answers count; prompts are read, not learnt.

The reference model is run once over all pairs and its log-probabilities are kept in
``output_dir/reference``, so that training holds one model in memory and runs one; that pass can be
interrupted like the training itself.  With ``store_reference=False`` it stays in memory instead and
is run on each batch, which is less work where only a part of the pairs is ever used.

>>> config = mil.DPOConfig(beta=0.1, learning_rate=5e-7)               # doctest: +SKIP
>>> history = mil.dpo(model, "preferences.jsonl.gz", config)           # doctest: +SKIP
>>> history.final["margin"], history.final["accuracy"]                 # doctest: +SKIP
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from . import _core
from .checkpointing import latest_checkpoint, write_text
from .data import (
    BadRecord,
    Batch,
    Batches,
    Documents,
    DocumentWriter,
    dataset_records,
    describe,
    expand_paths,
    hold_back,
    read_records,
)
from .distill import config_hash, trainable_names, weights_hash
from .errors import ArgumentError, FileError, NonFiniteError, StateError, listing
from .history import History
from .pairs import core_of, shared_vocabulary
from .training import (
    RULES,
    Task,
    TrainingConfig,
    Window,
    add_sums,
    flag,
    is_watched,
    number,
    train,
    whole,
)

__all__ = ["DPOConfig", "dpo"]

PAIR_COLUMNS = ("prompt", "chosen", "rejected")

# Batches of reference log-probabilities between two writes.
BLOCK = 16


@dataclass(frozen=True, kw_only=True)
class DPOConfig(TrainingConfig):
    """Settings of `mil.dpo`, beside those of every training (`mil.TrainingConfig`).

    Attributes
    ----------
    batch_size : int
        Pairs in one forward and backward pass, so twice as many sequences.
    beta : float
        How far answers may move from the reference: small values let them go far.
    label_smoothing : float
        Share of pairs whose answers are thought to be mixed up, below 0.5.
    length_normalized : bool
        Compare means over an answer's tokens instead of sums, so that length does not count. Means
        are smaller: beta wants to be larger, 2 or so.
    sequence_length, prompt_length : int
        A pair that is longer than `sequence_length` loses the beginning of its prompt, which keeps
        at least `prompt_length` tokens, then the ends of its answers.
    store_reference : bool
        Run the reference model once and keep its log-probabilities, or run it on every batch.
    train : "all" or "mixers"
        Every parameter, or only those of the mixers.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalized: bool = False
    batch_size: int = 4
    sequence_length: int = 1024
    prompt_length: int = 512
    learning_rate: float = 5e-7
    warmup_ratio: float = 0.1
    store_reference: bool = True
    loss_on: str = "answers"
    train: str = "all"

    _FREE: ClassVar[tuple[str, ...]] = (*TrainingConfig._FREE, "store_reference")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_on != "answers":
            raise ArgumentError("DPOConfig: loss_on: preference pairs are compared on answers only")
        if self.prompt_length >= self.sequence_length:
            raise ArgumentError(
                f"DPOConfig: prompt_length={self.prompt_length} leaves no room for an answer in "
                f"sequence_length={self.sequence_length}"
            )


RULES.update(
    beta=(number(0, open_low=True), "a number above 0"),
    label_smoothing=(number(0, 0.5), "a share of the pairs, from 0 to 0.5"),
    length_normalized=(flag, "True or False"),
    prompt_length=(whole(1), "a whole number of at least 1"),
    store_reference=(flag, "True or False"),
)


def dpo(
    model: Any,
    data: Any,
    config: DPOConfig | None = None,
    output_dir: str | os.PathLike | None = "run",
    resume: bool = False,
    *,
    reference: Any = None,
    validation: Any = None,
    progress: bool | None = None,
) -> History:
    """Trains `model` in place to prefer the chosen answers of pairs.

    Parameters
    ----------
    model : model from `mil.load` or `mil.convert`, with a tokenizer
        As it is after supervised fine-tuning.
    data : .jsonl, .jsonl.gz or .parquet files, or a list of records
        Records are ``{"prompt": ..., "chosen": ..., "rejected": ...}``. The prompt is a str or a
        list of messages, an answer a str or a list with the assistant's message (the prompt's
        messages may stand before it). Without "prompt" it is what both answers begin with. Strings
        go through the tokenizer's chat template where there is one.
    config : DPOConfig
    output_dir : folder for metrics.jsonl, checkpoints/, reference/ and the trained model/
        None writes nothing.
    resume : bool
        Go on from the newest checkpoint in `output_dir`, to the same bits as without the
        interruption; starts afresh where there is none.
    reference : model or None
        What answers are compared with; None: the model as it is now.
    validation : data, or a share of `data` between 0 and 1 to hold back
        Evaluated before, every `eval_every` steps, and after.
    progress : bool or None
        A progress bar; None: on a terminal.

    Returns
    -------
    History
        loss, accuracy (share of pairs whose margin is above 0), margin, chosen_reward and
        rejected_reward (beta times the log-ratio to the reference), chosen_logprob and
        rejected_logprob; means over pairs. With eval_ before them on validation data.

    Raises
    ------
    mil.ArgumentError, mil.FormatError, mil.FileError, mil.StateError, mil.NonFiniteError
        One line each, with file and line for a bad record.

    References
    ----------
    Rafailov et al. 2023, "Direct preference optimization" (arXiv 2305.18290), equation 7.
    Mitchell 2023, "A note on DPO with noisy preferences" (label smoothing).
    """
    config = DPOConfig() if config is None else config
    if not isinstance(config, DPOConfig):
        raise ArgumentError(f"config: expected mil.DPOConfig, got {type(config).__name__}")
    task = PreferenceTask(model, reference, data, validation, config, progress)
    inputs = (model, reference, data, validation)
    return train(task, output_dir, resume=resume, progress=progress, inputs=inputs)


# ---- pairs ---------------------------------------------------------------------------------------


def read_pairs(data: Any, tokenizer: Any, vocab: int, config: DPOConfig) -> Documents:
    """Documents in twos: the prompt with the chosen answer, then with the rejected one."""
    if isinstance(data, Documents):
        return data
    if tokenizer is None:
        raise ArgumentError("dpo: the model has no tokenizer to read preference pairs with")
    where = str(data) if isinstance(data, (str, os.PathLike)) else "data"
    writer = PairWriter(tokenizer, vocab, config, where)
    for place, record in pair_records(data):
        writer.add(place, record)
    return writer.documents()


def pair_records(data: Any) -> Iterator[tuple[str, Any]]:
    """(place, record) of files or of a list."""
    if hasattr(data, "column_names"):
        yield from dataset_records(data, "data")
        return
    paths = [data] if isinstance(data, (str, os.PathLike)) else data
    if not isinstance(paths, Sequence) or len(paths) == 0:
        raise ArgumentError(
            f"data is {describe(data)}: expected a file, a list of files, or a list of records "
            "such as {'prompt': ..., 'chosen': ..., 'rejected': ...}"
        )
    if all(isinstance(path, (str, os.PathLike)) for path in paths):
        for path in expand_paths(paths):
            if path.name.endswith((".npz", ".npy", ".txt")):
                raise ArgumentError(f"{path}: preference pairs come in .jsonl(.gz) or .parquet")
            yield from read_records(path, False, PAIR_COLUMNS)
        return
    for index, record in enumerate(paths):
        yield f"data[{index}]", record


class PairWriter(DocumentWriter):
    """Collects pairs, tokenises a block of them at once, and writes two documents for each."""

    def __init__(self, tokenizer: Any, vocab: int, config: DPOConfig, where: str):
        super().__init__(tokenizer, vocab, True, config.skip_bad, where=where)
        self.length, self.prompt_length = config.sequence_length, config.prompt_length
        # What the tokenizer puts before every text.
        opening = tokenizer.encode("")
        end = tokenizer.eos_token_id
        self.opening = opening[:-1] if end is not None and opening[-1:] == [end] else opening

    def segments(self, record: Any) -> tuple[list[tuple[str, bool]], bool]:
        prompt, chosen, rejected, plain = pair_texts(record, self.tokenizer)
        return [(prompt, False), (chosen, True), (rejected, True)], plain

    def write(self, runs: list[tuple[list[int], bool]], plain: bool) -> None:
        prompt, *answers = (ids for ids, _ in runs)
        if plain:
            prompt, answers = self.join_plain(prompt, answers)
        if not prompt:
            raise BadRecord("'prompt' is empty")
        longest = max(map(len, answers))
        if len(prompt) + longest > self.length:
            prompt = prompt[-max(self.prompt_length, self.length - longest) :]
        for answer in answers:
            ids = prompt + answer[: self.length - len(prompt)]
            if max(ids) >= self.vocab:
                raise BadRecord(
                    f"the tokenizer gives token {max(ids)}, outside the model's vocabulary "
                    f"[0, {self.vocab})"
                )
        for answer in answers:
            answer = answer[: self.length - len(prompt)]
            self.targets.add([False] * len(prompt) + [True] * len(answer))
            self.tokens.add(prompt + answer)
            self.starts.append(self.tokens.count)

    def join_plain(
        self, prompt: list[int], answers: list[list[int]]
    ) -> tuple[list[int], list[list[int]]]:
        """Special tokens stand around each text: they belong before the prompt and behind answers
        only."""
        end, opening = self.tokenizer.eos_token_id, self.opening
        if end is not None and prompt[-1:] == [end]:
            prompt = prompt[:-1]
        kept = []
        for ids in answers:
            ids = ids[len(opening) :] if ids[: len(opening)] == opening else ids
            kept.append(ids if end is None or ids[-1:] == [end] else [*ids, end])
        return prompt, kept


def pair_texts(record: Any, tokenizer: Any) -> tuple[str, str, str, bool]:
    """(prompt, chosen, rejected) as texts, and whether they are plain instead of a chat's."""
    if isinstance(record, BadRecord):
        raise record
    if not isinstance(record, Mapping) or "chosen" not in record or "rejected" not in record:
        found = listing(record, 5) if isinstance(record, Mapping) else type(record).__name__
        raise BadRecord(f"expected 'prompt', 'chosen' and 'rejected', found {found or 'nothing'}")
    prompt, answers = split_pair(record)
    for name, text in zip(("chosen", "rejected"), answers, strict=True):
        if not text.strip():
            raise BadRecord(f"{name!r} is an empty answer")
    if isinstance(prompt, str) and tokenizer.chat_template is None:
        return prompt, answers[0], answers[1], True
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    chosen, rejected = ([*prompt, {"role": "assistant", "content": text}] for text in answers)
    try:
        opening = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
        texts = [tokenizer.apply_chat_template(messages) for messages in (chosen, rejected)]
    except ValueError as error:
        raise BadRecord(f"the chat template refused it ({error})") from None
    if not all(text.startswith(opening) for text in texts):
        raise BadRecord("the chat template writes the prompt differently before an answer")
    return opening, texts[0][len(opening) :], texts[1][len(opening) :], False


def split_pair(record: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The prompt, a str or messages, and the answers' words."""
    chosen, rejected = record["chosen"], record["rejected"]
    prompt = record.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if not isinstance(prompt, str):
            return check_messages(prompt, "prompt"), [chosen, rejected]
        return prompt, [chosen, rejected]
    chats = [check_messages(record[name], name) for name in ("chosen", "rejected")]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    elif prompt is None:
        prompt = chats[0][:-1]
    else:
        prompt = check_messages(prompt, "prompt")
    words = []
    for name, messages in zip(("chosen", "rejected"), chats, strict=True):
        rest = messages[len(prompt) :] if messages[: len(prompt)] == prompt else messages
        if len(rest) != 1 or rest[0]["role"] != "assistant":
            raise BadRecord(f"{name!r} must be one assistant message, or the prompt and that one")
        words.append(rest[0]["content"])
    return prompt, words


def check_messages(messages: Any, name: str) -> list[dict[str, str]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or len(messages) == 0:
        raise BadRecord(f"{name!r} must be a string or a list of messages")
    checked = []
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadRecord(f"{name}[{index}] must have a 'role' and a 'content', both strings")
        checked.append({"role": role, "content": content})
    return checked


class PairBatches(Batches):
    """Batches whose rows are pairs: two sequences each."""

    def _pack(self, sequence_length: int) -> None:
        self.row_bounds = np.arange(0, len(self.piece_starts) + 1, 2, dtype=np.int64)


# ---- the reference -------------------------------------------------------------------------------


def answer_logprobs(core: _core.Model, batch: Batch) -> np.ndarray:
    """float64 [sequences]: the sum over each answer's tokens."""
    found = _core.evaluate(
        core,
        None,
        batch.tokens,
        batch.offsets,
        labels=batch.labels,
        row_weight=batch.row_weight,
        rows=True,
    )
    return -np.add.reduceat(found["row_ce"], batch.offsets[:-1])


def stored_logprobs(
    core: _core.Model, batches: PairBatches, path: Path | None, show: bool
) -> np.ndarray:
    """Log-probabilities of all answers, float64 [pairs, 2]; computed where `path` lacks them.

    The file holds the numbers of whole blocks, one after another, and is cut to those when an
    interrupted pass goes on: every number is then computed in the same batch, to the same bits.
    """
    from tqdm.auto import tqdm

    pairs, size = batches.rows_per_epoch, batches.batch_size * BLOCK
    parts = [] if path is None else [whole_blocks(path, pairs, size)]
    done = sum(len(part) for part in parts)
    with tqdm(
        total=pairs, initial=done, desc="reference", unit="pair", disable=not show, leave=False
    ) as bar:
        for first in range(done, pairs, size):
            rows = np.arange(first, min(first + size, pairs))
            found = [
                answer_logprobs(core, batches.batch(rows[at : at + batches.batch_size]))
                for at in range(0, len(rows), batches.batch_size)
            ]
            parts.append(np.concatenate(found).reshape(-1, 2))
            check_finite(parts[-1], first)
            if path is not None:
                append_numbers(path, parts[-1])
            bar.update(len(rows))
    return np.concatenate(parts)


def check_finite(logprobs: np.ndarray, first: int) -> None:
    bad = np.flatnonzero(~np.isfinite(logprobs).all(axis=1))
    if len(bad):
        raise NonFiniteError(
            f"dpo: the reference model's log-probabilities of pair {first + bad[0] + 1} are not "
            "finite: its weights or activations are broken"
        )


def whole_blocks(path: Path, pairs: int, size: int) -> np.ndarray:
    """What a finished or interrupted pass left: [n, 2], n whole blocks or all pairs."""
    if not path.exists():
        return np.empty((0, 2))
    count = path.stat().st_size // 16
    count = pairs if count == pairs else count // size * size
    if count > pairs:
        count = 0  # of other data
    os.truncate(path, count * 16)
    return np.fromfile(path, np.float64).reshape(-1, 2)


def append_numbers(path: Path, numbers: np.ndarray) -> None:
    try:
        with open(path, "ab") as file:
            file.write(numbers.tobytes())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}; resume=True goes on from it") from None


# ---- the task ------------------------------------------------------------------------------------


class PreferenceTask(Task):
    """The loss of pairs, in place of one against a teacher."""

    config: DPOConfig
    batches: PairBatches

    def __init__(
        self,
        model: Any,
        reference: Any,
        data: Any,
        validation: Any,
        config: DPOConfig,
        progress: bool | None,
    ):
        self.model, self.config = model, config
        if reference is None:
            self.student, self.reference = core_of(model), None
        else:
            self.student, self.reference = shared_vocabulary(model, reference, "reference")
        self.show = is_watched() if progress is None else progress
        self.names = trainable_names(self.student, config.train)
        documents, held = hold_back(self.read(data), validation, self.read, together=2)
        self.batches = self.batches_of(documents, config.gradient_accumulation)
        self.held = None if held is None else self.batches_of(held, 1, shuffle=False)
        self.logprobs: dict[str, np.ndarray] = {}
        self.reference_hash = ""
        self.trainer = _core.Trainer(
            self.student, None, trainable=self.names, checkpointing=config.checkpointing
        )

    def read(self, data: Any) -> Documents:
        tokenizer = getattr(self.model, "tokenizer", None)
        return read_pairs(data, tokenizer, self.student.config["vocab"], self.config)

    def batches_of(
        self, documents: Documents, accumulation: int, shuffle: bool = True
    ) -> PairBatches:
        config = self.config
        return PairBatches(
            documents,
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
            accumulation=accumulation,
            seed=config.seed,
            shuffle=shuffle,
        )

    # -- the reference --

    def prepare(self, folder: Path | None, resume: bool) -> None:
        """Runs the reference model over all pairs, or copies it, before the weights change."""
        core = self.student if self.reference is None else self.reference
        self.reference_hash = weights_hash(core)
        if not self.config.store_reference:
            # The model itself may have been given: it must not move along.
            self.reference = copy_of(core) if core is self.student else core
            return
        if folder is not None:
            folder = folder / "reference"
            self.check_stored(folder, resume)
        kinds = {"pairs": self.batches, "validation": self.held}
        for name, batches in kinds.items():
            if batches is not None:
                path = None if folder is None else folder / f"{name}.f64"
                self.logprobs[name] = stored_logprobs(core, batches, path, self.show)
        self.reference = None  # its numbers are all that is needed

    def check_stored(self, folder: Path, resume: bool) -> None:
        """Makes the folder of stored log-probabilities; older ones stay where they are of the same
        pairs and model."""
        now = {
            "reference": self.reference_hash,
            "pairs": self.batches.documents.fingerprint(),
            "validation": None if self.held is None else self.held.documents.fingerprint(),
            "batch_size": self.config.batch_size,
        }
        path = folder / "reference.json"
        then = None
        if path.exists():
            try:
                then = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                then = None
        trained = latest_checkpoint(folder.parent / "checkpoints") is not None
        if resume and isinstance(then, dict) and self.reference is None and trained:
            # The pass is done and the checkpoint has the trained weights: whatever the model has
            # now, the run began with those of the stored numbers.
            now["reference"] = self.reference_hash = then.get("reference")
        if then == now:
            return
        if resume and isinstance(then, dict):
            name = next(name for name in now if then.get(name) != now[name])
            raise StateError(
                f"{folder}: cannot resume: {name} was {then.get(name)}, is {now[name]} now; use "
                "what the run began with, or another output_dir"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("pairs", "validation"):
                (folder / f"{name}.f64").unlink(missing_ok=True)
        except OSError as error:
            raise FileError(f"{folder}: {error.strerror or error}") from None
        write_text(path, json.dumps(now, indent=1) + "\n")

    def reference_of(self, batch: Batch, kind: str) -> np.ndarray:
        """Log-probabilities of a batch's answers under the reference, as the loss compares them."""
        if self.reference is not None:
            values = answer_logprobs(self.reference, batch)
        else:
            values = self.logprobs[kind][batch.numbers].reshape(-1)
        if self.config.length_normalized:
            values = values / np.add.reduceat(batch.row_weight, batch.offsets[:-1])
        return values

    # -- losses --

    def run(self, batch: Batch, kind: str, **options: Any) -> dict[str, float]:
        config = self.config
        return self.trainer.backward(
            batch.tokens,
            batch.offsets,
            labels=batch.labels,
            row_weight=batch.row_weight,
            reference=self.reference_of(batch, kind),
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            length_normalized=config.length_normalized,
            **options,
        )

    def accumulate(self, step: int, total: int, batch: Batch, window: Window) -> dict[str, float]:
        return self.run(batch, "pairs", scale=1.0 / window.rows)

    def report(self, sums: Mapping[str, float]) -> dict[str, float]:
        names = {
            "loss": "loss",
            "accuracy": "pairs_correct",
            "margin": "margin",
            "chosen_reward": "chosen_reward",
            "rejected_reward": "rejected_reward",
            "chosen_logprob": "chosen_logprob",
            "rejected_logprob": "rejected_logprob",
        }
        return {name: sums[key] / sums["pairs"] for name, key in names.items()}

    def evaluate(self) -> dict[str, float] | None:
        if self.held is None:
            return None
        sums: dict[str, float] = {}
        for index, batch in enumerate(self.held):
            if index == self.config.eval_batches:
                break
            add_sums(sums, self.run(batch, "validation", evaluate=True))
        return {f"eval_{name}": value for name, value in self.report(sums).items()}

    # -- what a checkpoint holds --

    def identity(self) -> dict[str, Any]:
        return {
            **self.config.identity(),
            "data": self.batches.documents.fingerprint(),
            "student": config_hash(self.student.config),
            "reference": self.reference_hash,
        }

    def tensors(self) -> dict[str, np.ndarray]:
        arrays = self.student.parameters()
        weights = {f"p.{name}": arrays[name] for name in self.names}
        return {**weights, **self.trainer.state()}

    def frozen(self) -> str:
        return weights_hash(self.student, without=self.names)

    def save_model(self, folder: Path) -> None:
        self.model.save(folder)


def copy_of(core: _core.Model) -> _core.Model:
    """The same model with arrays of its own."""
    arrays = {name: array.copy() for name, array in core.parameters().items()}
    return _core.Model(core.config, arrays, core.dtypes())
