"""Soft labels: a teacher's likeliest next tokens, stored, so that distillation needs no teacher.

For every token that counts, the folder holds the `top` likeliest tokens that the teacher expected
there, their log-probabilities, and the log-probability of all other tokens together.  The student
is then compared with those top + 1 buckets,

    KL = sum over the top tokens of t log(t / s) + t_R log(t_R / s_R)

with s_R = 1 - sum of the student's probabilities of the top tokens (csrc/cpu/loss.c).  That is a
lower bound of the KL over the whole vocabulary, and equal to it where both agree on how the rest is
shared out.

    answers.labels/labels.json         what was labelled, by whom, how
    answers.labels/part-00000000.npz   tokens, offsets, targets; top_tokens [n, top],
                                       top_logprobs [n, top + 1] of the n tokens that count

Numbers are float16 (a relative error of 5e-4 at a probability of 0.3, 4e-3 at 1e-5) and
normalised again when they are used; tokens are uint16 where the vocabulary allows it: 130 bytes a
token at top = 32, where all logits of a vocabulary of 128,256 would be 256 kB.

A part is written aside and renamed, so a stopped run leaves whole parts and goes on behind them.

>>> mil.soft_labels(teacher, "chats.jsonl.gz", "chats.labels", top=32)     # doctest: +SKIP
>>> mil.distill(student, None, "chats.labels")                             # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from . import _core
from .checkpointing import TEMPORARY, sweep, sync, write_text
from .data import (
    Documents,
    SoftTargets,
    TokenFile,
    check_tokens,
    cut_pieces,
    read_documents,
)
from .distill import weights_hash
from .errors import ArgumentError, FileError, FormatError, StateError, shorten
from .pairs import core_of

__all__ = ["soft_labels"]

HEAD = "labels.json"
FORMAT = "mambainllama soft labels 1"

# Tokens in a part: some megabytes of labels, some seconds of work that a kill can lose.
PART_TOKENS = 1 << 16

# Log-probability of all other tokens where rounding leaves nothing: 1e-12.
LEAST_REST = -27.6


def soft_labels(
    teacher: Any,
    data: Any,
    output: str | os.PathLike,
    *,
    top: int = 32,
    sequence_length: int = 2048,
    loss_on: str = "all",
    skip_bad: bool = False,
    resume: bool = False,
    max_batch: int = 16,
    progress: bool = False,
) -> Path:
    """Stores the teacher's likeliest tokens for every token of `data` that counts.

    Parameters
    ----------
    teacher : model
    data : as for `mil.distill`: token array (n, length), files, records
    output : folder to write, for `mil.distill(student, None, output)`
    top : int
        Tokens kept at each place, at most 1,024 and the vocabulary.
    sequence_length : int
        Longer documents are cut, as training cuts them: a label depends on what stands before it.
    loss_on : "all" or "answers"
        With "answers", only the assistant's tokens of chats are labelled, and learnt later.
    skip_bad : bool
        Leave bad records out instead of stopping at the first.
    resume : bool
        Go on behind the parts that `output` holds.
    max_batch : int
        Documents read at once.
    progress : bool
        Show a bar.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    mil.ArgumentError, mil.FormatError, mil.FileError
    mil.StateError
        `output` is there already, or was begun with other data, teacher or settings.
    """
    core, folder = core_of(teacher), Path(output)
    vocab = core.config["vocab"]
    check_settings(core, top, sequence_length, max_batch)
    tokenizer = getattr(teacher, "tokenizer", None)
    documents = read_documents(data, tokenizer, vocab=vocab, loss_on=loss_on, skip_bad=skip_bad)
    starts, lengths = cut_pieces(documents.starts, sequence_length)
    if len(starts) == 0:
        raise ArgumentError("soft_labels: data holds no document of two tokens or more")
    parts = cut_parts(lengths)
    head = {
        "format": FORMAT,
        "top": top,
        "vocab": vocab,
        "parts": len(parts),
        "sequence_length": sequence_length,
        "data": documents.fingerprint(),
        "teacher": weights_hash(core),
        "tokenizer": tokenizer_hash(tokenizer),
    }
    open_folder(folder, head, resume)
    for number, (first, end) in enumerate(bar(parts, progress)):
        path = part_path(folder, number)
        if not path.exists():
            spans = list(zip(starts[first:end].tolist(), lengths[first:end].tolist(), strict=True))
            write_part(path, label_pieces(core, documents, spans, top, max_batch))
    return folder


def check_settings(core: _core.Model, top: Any, sequence_length: Any, max_batch: Any) -> None:
    most = min(1024, core.config["vocab"])
    for name, value, least, limit in (
        ("top", top, 1, most),
        ("sequence_length", sequence_length, 2, 0),
        ("max_batch", max_batch, 1, 0),
    ):
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
        if not whole or (limit and value > limit):
            words = f"from {least} to {limit}" if limit else f"of at least {least}"
            raise ArgumentError(
                f"soft_labels: {name}={shorten(value)}: expected a whole number {words}"
            )


def cut_parts(lengths: np.ndarray) -> list[tuple[int, int]]:
    """(first, end) piece of each part."""
    number = (np.cumsum(lengths) - 1) // PART_TOKENS
    edges = np.flatnonzero(np.diff(number, prepend=-1, append=number[-1] + 1))
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


def tokenizer_hash(tokenizer: Any) -> str | None:
    if tokenizer is None:
        return None
    words = sorted(tokenizer.backend.get_vocab().items())
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]


def open_folder(folder: Path, head: dict[str, Any], resume: bool) -> None:
    """Makes the folder, or finds it begun in the same way."""
    path = folder / HEAD
    sweep(folder)
    if path.exists() and not resume:
        raise StateError(f"{folder}: is there already; resume=True goes on, or choose another")
    if path.exists():
        then = read_head(folder)
        for name, value in head.items():
            if then.get(name) != value:
                raise StateError(
                    f"{folder}: cannot resume: {name} was {then.get(name)}, is {value} now; use "
                    "what it began with, or another folder"
                )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise StateError(f"{folder}: holds other files; choose an empty or a new folder")
    except OSError as error:
        raise FileError(f"{folder}: {error.strerror or error}") from None
    write_text(path, json.dumps(head, indent=1) + "\n")


def label_pieces(
    core: _core.Model,
    documents: Documents,
    spans: list[tuple[int, int]],
    top: int,
    max_batch: int,
) -> dict[str, np.ndarray]:
    """The arrays of one part: pieces are (start, length) in the documents' tokens."""
    narrow = core.config["vocab"] <= 1 << 16
    tokens = [np.asarray(documents.tokens[at : at + length], np.int32) for at, length in spans]
    targets = [targets_of(documents, at, length) for at, length in spans]
    results: list[Any] = [None] * len(spans)

    def finished(index: int, result: dict[str, Any]) -> None:
        # Place i of the result is what the teacher expected at token i, so place 0 is empty.
        wanted = targets[index]
        logprobs = result["prompt_top_logprobs"][wanted]
        rest = np.log(np.maximum(1 - np.exp(logprobs).sum(axis=1), np.exp(LEAST_REST)))
        both = np.concatenate([logprobs, rest[:, None]], axis=1)
        results[index] = result["prompt_top_tokens"][wanted], both.astype(np.float16)

    common = {"max_new_tokens": 0, "prompt_logprobs": True, "top_logprobs": top}
    requests = [{"prompt": ids, **common} for ids in tokens]
    _core.generate(core, requests, max_batch=max_batch, on_finish=finished)
    dtype = np.uint16 if narrow else np.int32
    return {
        "tokens": np.concatenate(tokens).astype(dtype),
        "offsets": np.cumsum([0, *map(len, tokens)], dtype=np.int64),
        "targets": np.concatenate(targets),
        "top_tokens": np.concatenate([ids for ids, _ in results]).astype(dtype),
        "top_logprobs": np.concatenate([values for _, values in results]),
    }


def targets_of(documents: Documents, at: int, length: int) -> np.ndarray:
    """Which tokens of a piece are predicted: never the first."""
    wanted = (
        np.ones(length, bool)
        if documents.targets is None
        else np.array(documents.targets[at : at + length], bool)
    )
    wanted[0] = False
    return wanted


# ---- files ---------------------------------------------------------------------------------------


def part_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:08d}.npz"


def write_part(path: Path, arrays: dict[str, np.ndarray]) -> None:
    fresh = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        with open(fresh, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
        sync(path.parent)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise FileError(
            f"{path}: {error.strerror or error}; parts before it are whole, resume=True goes on"
        ) from None


def is_labels(path: Any) -> bool:
    """Whether a path is a folder of soft labels."""
    return isinstance(path, (str, os.PathLike)) and (Path(path) / HEAD).is_file()


def read_head(folder: Path) -> dict[str, Any]:
    path = folder / HEAD
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: damaged ({error})") from None
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise FormatError(f"{path}: expected {FORMAT!r}, found {shorten(head)}")
    for name in ("top", "vocab", "parts"):
        if not isinstance(head.get(name), int) or head[name] < 1:
            raise FormatError(f"{path}: {name} is {shorten(head.get(name))}")
    return head


def read_labels(folders: list[Any], tokenizer: Any, vocab: int) -> Documents:
    """Documents with soft targets of one or several folders of the same teacher's kind.

    Everything goes into unnamed temporary files that are mapped: memory does not grow with it.
    """
    heads = [read_head(Path(folder)) for folder in folders]
    ours = tokenizer_hash(tokenizer)
    for folder, head in zip(folders, heads, strict=True):
        if head["top"] != heads[0]["top"]:
            raise ArgumentError(
                f"{folder}: holds {head['top']} tokens at each place, {folders[0]} "
                f"{heads[0]['top']}: label both alike"
            )
        if None not in (ours, head.get("tokenizer")) and ours != head["tokenizer"]:
            raise ArgumentError(f"{folder}: its teacher's tokenizer is not this model's")
    dtype = np.uint16 if vocab <= 1 << 16 else np.int32
    top = heads[0]["top"]
    tokens, targets, index = TokenFile(dtype), TokenFile(np.bool_), TokenFile(np.int64)
    top_tokens, top_logprobs = TokenFile(dtype), TokenFile(np.float16)
    starts, labelled = [np.zeros(1, np.int64)], 0
    for folder, head in zip(folders, heads, strict=True):
        for number in range(head["parts"]):
            part = read_part(Path(folder), number, head, vocab)
            starts.append(part["offsets"][1:] + tokens.count)
            tokens.add(part["tokens"])
            targets.add(part["targets"])
            index.add(rows_of(part["targets"], labelled))
            labelled += len(part["top_tokens"])
            top_tokens.add(part["top_tokens"].reshape(-1))
            top_logprobs.add(part["top_logprobs"].reshape(-1))
    if labelled == 0:
        raise FormatError(f"{folders[0]}: no token in it is labelled")
    soft = SoftTargets(
        index.array(),
        top_tokens.array().reshape(-1, top),
        top_logprobs.array().reshape(-1, top + 1),
    )
    return Documents(tokens.array(), np.concatenate(starts), targets.array(), soft=soft)


def rows_of(targets: np.ndarray, first: int) -> np.ndarray:
    """For each token, where the label of the token after it stands; -1: nowhere."""
    predicts = np.append(targets[1:], False)
    return np.where(predicts, first + np.cumsum(predicts) - 1, -1)


def read_part(folder: Path, number: int, head: dict[str, Any], vocab: int) -> dict[str, np.ndarray]:
    """One part's arrays, whose shapes and values are those that training relies on."""
    path, top = part_path(folder, number), head["top"]
    if not path.exists():
        raise StateError(
            f"{folder}: part {number + 1} of {head['parts']} is missing: labelling did not end; "
            "go on with resume=True"
        )
    try:
        with np.load(path, allow_pickle=False) as content:
            names = ("tokens", "offsets", "targets", "top_tokens", "top_logprobs")
            part = {name: content[name] for name in names}
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from None
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise FormatError(f"{path}: not a part of soft labels ({error})") from None
    if not well_formed(part, top):
        raise FormatError(f"{path}: the arrays do not belong together, or have another form")
    check_tokens(part["tokens"], part["offsets"], vocab, str(path))
    rows = np.arange(len(part["top_tokens"]) + 1, dtype=np.int64) * top
    check_tokens(part["top_tokens"].reshape(-1), rows, vocab, f"{path}: top_tokens")
    return part


def well_formed(part: dict[str, np.ndarray], top: int) -> bool:
    tokens, offsets, targets = part["tokens"], part["offsets"], part["targets"]
    if tokens.dtype not in (np.uint16, np.int32) or part["top_tokens"].dtype != tokens.dtype:
        return False
    if (offsets.dtype, targets.dtype) != (np.int64, np.bool_):
        return False
    if not tokens.ndim == offsets.ndim == targets.ndim == 1 or len(tokens) != len(targets):
        return False
    if len(offsets) < 2 or (np.diff(offsets) < 2).any():
        return False
    if offsets[0] != 0 or offsets[-1] != len(tokens) or targets[offsets[:-1]].any():
        return False
    count, logprobs = int(targets.sum()), part["top_logprobs"]
    shapes = part["top_tokens"].shape == (count, top) and logprobs.shape == (count, top + 1)
    return shapes and logprobs.dtype == np.float16 and not np.isnan(logprobs).any()


def bar(parts: list[Any], progress: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(parts, desc="soft labels", unit="part", disable=not progress)
