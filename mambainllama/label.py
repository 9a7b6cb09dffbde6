"""Labelling: a teacher answers prompts, and the answers become training data.

Sequence-level distillation trains a student on what its teacher says: this makes that text, in the
form that `mil.sft` and `mil.distill` read.  Every finished block of answers is appended to the file
at once, and a run that was stopped goes on behind the last whole line.  With `top_logprobs` the
teacher's likeliest tokens at each answered token are stored beside it (soft_labels.py), so that
distillation needs the teacher no more.

>>> rows = mil.label(teacher, ["What is a list?"], "answers.jsonl")      # doctest: +SKIP
>>> mil.sft(student, "answers.jsonl")                                    # doctest: +SKIP
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .data import BadRecord, expand_paths, read_records
from .errors import ArgumentError, FileError, FormatError, StateError, shorten
from .generate import generate
from .soft_labels import check_settings, soft_labels

__all__ = ["label"]

PROMPT_KEYS = ("messages", "prompt", "text")  # of which a record has one
BLOCK = 64  # prompts answered between two writes


def label(
    teacher: Any,
    prompts: Any,
    output: str | os.PathLike | None = None,
    *,
    resume: bool = False,
    max_new_tokens: int = 1024,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    max_batch: int | None = None,
    top_logprobs: int = 0,
    sequence_length: int = 2048,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """The teacher's answers to prompts, as training records.

    Parameters
    ----------
    teacher : model with a tokenizer
    prompts : list of str or of chats, or a .jsonl(.gz) file of {"prompt": ...}, {"messages": ...},
        {"text": ...}. A chat is answered from its last user message on; a str is a user's message
        where the teacher has a chat template, else a text to continue.
    output : file to append records to, or None
    resume : bool
        Keep what `output` holds, and answer the prompts behind it.
    max_new_tokens, temperature, top_k, top_p, seed, max_batch
        As for `mil.generate`; the prompt with number i draws with seed + i.
    top_logprobs, sequence_length
        Above 0, `mil.soft_labels` then stores so many likeliest tokens for the answers in `output`,
        in a folder beside it: answers.labels for answers.jsonl.
    progress : bool
        Show a bar.

    Returns
    -------
    list of dict
        {"messages": [...]} with the answer as its last message, or {"text": prompt + answer}. Those
        of this call; with `resume`, those in the file are not among them.

    Raises
    ------
    mil.ArgumentError, mil.FormatError, mil.FileError, mil.StateError
    """
    if teacher.tokenizer is None:
        raise ArgumentError("label: the teacher has no tokenizer")
    for name, value in (("seed", seed), ("max_batch", max_batch or 0)):
        if not isinstance(value, (int, np.integer)):
            raise ArgumentError(f"label: {name}={shorten(value)}: expected a whole number")
    chats = teacher.tokenizer.chat_template is not None
    asked = [as_prompt(place, record, chats) for place, record in records_of(prompts)]
    named = isinstance(prompts, (str, os.PathLike))
    if named and not asked:
        raise FormatError(f"{prompts}: holds no prompt")
    done = 0
    path = None if output is None else Path(output)
    if path is not None and path.exists():
        if named and os.path.realpath(prompts) == os.path.realpath(path):
            raise ArgumentError(f"{path}: holds the prompts; choose another file for the answers")
        if not resume:
            raise StateError(
                f"{path}: is there already; resume=True goes on, or choose another file"
            )
        done = keep_answers(path, asked)
    if top_logprobs:
        # Before hours of answers, not after them.
        labels_batch = 16 if max_batch is None else max_batch
        check_settings(teacher.core, top_logprobs, sequence_length, labels_batch)
        if path is None or path.suffix != ".jsonl":
            raise ArgumentError(
                f"label: output={output}: top_logprobs are stored beside it: give a file that ends "
                "in .jsonl"
            )
        if done < len(asked):
            check_no_labels(labels_beside(path))
    if path is not None and not path.exists():
        append(path, [])  # refused here where it cannot be written
        path.unlink()
    rows: list[dict[str, Any]] = []
    for first in bar(range(done, len(asked), BLOCK), progress):
        block = asked[first : first + BLOCK]
        answers = generate(
            teacher,
            block,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=[seed + first + i for i in range(len(block))],
            max_batch=max_batch,
        )
        new = [as_record(prompt, a.text) for prompt, a in zip(block, answers, strict=True)]
        if path is not None:
            append(path, new)
        rows += new
    if top_logprobs:
        soft_labels(
            teacher,
            path,
            labels_beside(path),
            top=top_logprobs,
            sequence_length=sequence_length,
            loss_on="answers",
            skip_bad=True,
            resume=resume,
            max_batch=labels_batch,
            progress=progress,
        )
    return rows


def labels_beside(path: Path) -> Path:
    """The folder of soft labels of a file: answers.labels for answers.jsonl."""
    return path.with_name(f"{path.name.removesuffix('.jsonl')}.labels")


def check_no_labels(folder: Path) -> None:
    """Labels come after the last answer: what is there before that is another run's."""
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise StateError(
            f"{folder}: is there already, from other answers; delete {folder.name}, or choose "
            "another file for the answers"
        )


def records_of(prompts: Any) -> Iterator[tuple[str, Any]]:
    """(place, prompt) of a list or of a file."""
    if isinstance(prompts, (str, os.PathLike)):
        for path in expand_paths([prompts]):
            if path.name.endswith((".npz", ".npy", ".txt")):
                raise ArgumentError(f"{path}: prompts come in .jsonl(.gz) or .parquet")
            yield from read_records(path, False, PROMPT_KEYS)
    elif isinstance(prompts, Sequence):
        for index, prompt in enumerate(prompts):
            yield f"prompts[{index}]", prompt
    else:
        raise ArgumentError("label: prompts must be a list of str or chats, or a .jsonl file")


def as_prompt(place: str, record: Any, chats: bool) -> Any:
    """What `generate` takes: a str or a chat that ends with a user's message."""
    if isinstance(record, BadRecord):
        raise FormatError(f"{place}: {record}")
    if isinstance(record, Mapping):
        found = next((record[k] for k in PROMPT_KEYS if k in record), None)
        if found is None:
            raise FormatError(f"{place}: expected 'prompt', 'messages' or 'text'")
        record = found
    if isinstance(record, str):
        return [{"role": "user", "content": record}] if chats else record
    messages = list(record) if isinstance(record, Sequence) else []
    while messages and isinstance(messages[-1], Mapping) and messages[-1].get("role") != "user":
        messages.pop()
    if not messages or not all(isinstance(m, Mapping) for m in messages):
        raise FormatError(f"{place}: expected a str, or a chat with a user's message")
    if not all(isinstance(m.get(key), str) for m in messages for key in ("role", "content")):
        raise FormatError(f"{place}: every message needs a 'role' and a 'content', both strings")
    if not chats:
        raise FormatError(f"{place}: is a chat, but the teacher has no chat template")
    return [{"role": m.get("role"), "content": m.get("content")} for m in messages]


def as_record(prompt: Any, answer: str) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"text": prompt + answer}
    return {"messages": [*prompt, {"role": "assistant", "content": answer}]}


def as_line(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair in a prompt: only JSON's escapes hold it
        return json.dumps(row).encode() + b"\n"


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    before = path.stat().st_size if path.exists() else None
    try:
        with open(path, "ab") as file:
            file.writelines(as_line(row) for row in rows)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            if before is None:
                path.unlink()  # it would be in the way of the next try
            else:
                os.truncate(path, before)
        raise FileError(
            f"{path}: {error.strerror}; what was written before is whole lines"
        ) from None


def keep_answers(path: Path, asked: list[Any]) -> int:
    """How many answers to these prompts a file holds. What a killed run left of a line is cut, but
    nothing of a file that holds anything else.
    """
    whole, done = 0, 0
    try:
        with open(path, "rb") as file:
            for line in file:
                if done == len(asked):
                    more = done + sum(rest.endswith(b"\n") for rest in (line, *file))
                    raise StateError(f"{path}: holds {more} answers, but there are {done} prompts")
                is_whole = line.endswith(b"\n")
                if not (is_answer if is_whole else begins_answer)(line, asked[done]):
                    raise StateError(
                        f"{path}:{done + 1}: cannot resume: this is not an answer to prompt "
                        f"{done + 1}; use the prompts that it began with, or another file"
                    )
                if is_whole:
                    whole, done = whole + len(line), done + 1
        if whole < path.stat().st_size:
            os.truncate(path, whole)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from None
    return done


def is_answer(line: bytes, prompt: Any) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    if not isinstance(row, Mapping):
        return False
    if isinstance(prompt, str):
        return str(row.get("text", "")).startswith(prompt)
    return isinstance(row.get("messages"), list) and row["messages"][:-1] == prompt


def begins_answer(line: bytes, prompt: Any) -> bool:
    """Whether the answer's line could have begun like this."""
    whole = as_line(as_record(prompt, ""))
    known = whole[: whole.rindex(b'"')]  # up to the end of the answer, which is empty here
    return line.startswith(known) or known.startswith(line)


def bar(blocks: range, progress: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(blocks, desc="label", unit=f"{BLOCK} prompts", disable=not progress)
