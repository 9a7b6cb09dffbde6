"""Training checkpoints: complete or absent, never half there.

    run/checkpoints/step-00000400/model/               the model, a folder for mil.load
    run/checkpoints/step-00000400/trainer.safetensors  weights bit for bit, moments, masters
    run/checkpoints/step-00000400/trainer.json         step, data position, running sums, settings
    run/checkpoints/latest                             the newest folder's name

A checkpoint is written to a folder of another name, every file and the folder are flushed to the
disk, and only then is it renamed.  Whoever is killed before the rename leaves the last checkpoint
untouched and a folder that the next start sweeps away; a full disk ends the same way, with one line
that says so.

The weights stand twice in it: in model/ to be used, and in trainer.safetensors bit for bit,
whatever the published layout makes of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import read_header, write_safetensors
from .dtypes import STORAGE
from .errors import FileError, FormatError, StateError

__all__ = ["latest_checkpoint", "restore", "write_checkpoint", "write_text", "write_tensors"]

NAME = re.compile(r"step-(\d{8,})")
TEMPORARY = ".writing-"
LATEST = "latest"

# ---- files that last ---------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Flushes a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replaces a small file in one step: readers see the old or the new one."""
    fresh = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        with open(fresh, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
        sync(path.parent)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise FileError(f"{path}: {error.strerror or error}") from None


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Arrays as they lie in memory; uint16 is bfloat16 (see dtypes.py)."""
    words = {storage: word for word, storage in STORAGE.items()}
    write_safetensors(path, {name: (array, words[array.dtype]) for name, array in tensors.items()})


def read_tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of a file of `write_tensors`; the arrays are views of the mapped file."""
    mapped = None
    for name, tensor in read_header(path).items():
        if mapped is None:
            mapped = np.memmap(path, np.uint8, mode="r")
        dtype = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(tensor.dtype)
        if dtype is None:
            raise FormatError(
                f"{path}: {name} is {tensor.dtype}: not a file of this library's trainer"
            )
        yield name, mapped[tensor.begin : tensor.end].view(STORAGE[dtype]).reshape(tensor.shape)


# ---- checkpoints -------------------------------------------------------------------------------


def write_checkpoint(
    root: Path,
    step: int,
    save_model: Callable[[Path], None],
    tensors: Mapping[str, np.ndarray],
    record: Mapping[str, Any],
    keep_last: int | None,
) -> Path:
    """Writes checkpoint `step` under `root`, then drops all but the `keep_last` newest.

    Raises
    ------
    mil.FileError
        It could not be written. Nothing of it is left, and older checkpoints are as they were.
    """
    final = root / f"step-{step:08d}"
    fresh = root / f"{TEMPORARY}{final.name}"
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        save_model(fresh / "model")
        write_tensors(fresh / "trainer.safetensors", tensors)
        (fresh / "trainer.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for path in [*fresh.rglob("*"), fresh]:
            sync(path)
        if final.exists():
            shutil.rmtree(final)
        os.rename(fresh, final)
        sync(root)
        write_text(root / LATEST, final.name + "\n")
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        good = latest_checkpoint(root)
        kept = f"the last good one is {good}" if good else "there is none before it"
        reason = (error.strerror if error.errno else None) or str(error)
        raise FileError(f"{final}: checkpoint not written: {reason}; {kept}") from None
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    prune(root, keep_last)
    return final


def tidy(checkpoint: Path, keep_last: int | None) -> None:
    """What a run killed right after the newest checkpoint's rename left undone."""
    name = checkpoint.name + "\n"
    latest = checkpoint.parent / LATEST
    if not latest.exists() or latest.read_text(encoding="utf-8") != name:
        write_text(latest, name)
    prune(checkpoint.parent, keep_last)


def prune(root: Path, keep_last: int | None) -> None:
    """Drops all but the newest checkpoints."""
    if keep_last is not None:
        for old in complete_checkpoints(root)[:-keep_last]:
            shutil.rmtree(old, ignore_errors=True)


def complete_checkpoints(root: Path) -> list[Path]:
    """All checkpoints under `root`, oldest first."""
    if not root.is_dir():
        return []
    found = [
        (int(match[1]), path) for path in root.iterdir() if (match := NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def latest_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    return next(reversed(complete_checkpoints(root)), None)


def sweep(root: Path) -> None:
    """Removes what a killed run was writing: files, checkpoints, a model beside its place; and the
    folder where nothing is left in it."""
    if not root.is_dir():
        return
    for pattern in (f"{TEMPORARY}*", ".model.saving-*"):
        for path in root.glob(pattern):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(
                missing_ok=True
            )
    if not any(root.iterdir()):
        root.rmdir()


def read_record(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "trainer.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        missing = {"step", "tokens", "sums", "identity"} - set(record)
    except (OSError, ValueError, TypeError) as error:
        raise FormatError(f"{path}: damaged checkpoint ({error})") from None
    if missing:
        raise FormatError(f"{path}: damaged checkpoint ({min(missing)!r} is missing)")
    return record


def restore(checkpoint: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Copies a checkpoint's tensors into the run's own arrays, bit for bit."""
    path = checkpoint / "trainer.safetensors"
    missing = set(tensors)
    for name, array in read_tensors(path):
        target = tensors.get(name)
        if target is None or target.shape != array.shape or target.dtype != array.dtype:
            have = "nothing" if target is None else f"{target.dtype} {target.shape}"
            raise StateError(
                f"{path}: {name} is {array.dtype} {array.shape}, this run has {have} there"
            )
        np.copyto(target, array)
        missing.discard(name)
    if missing:
        raise StateError(
            f"{path}: {min(missing)} is missing, and {len(missing) - 1} more: another model's run"
        )
