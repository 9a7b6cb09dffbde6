"""The exceptions of mambainllama: one line each, naming the culprit, what was expected, and the
mend.

All of them are subclasses of `Error`, and each is also the built-in exception that fits, so both
``except mil.Error`` and ``except ValueError`` do what they say.  The classes are made by the
extension module, which raises most of them; only `NotFoundError` is added here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ._core import (
    ArgumentError,
    DeviceError,
    DtypeError,
    Error,
    FileError,
    FormatError,
    NonFiniteError,
    OutOfMemoryError,
    ShapeError,
    StateError,
    StoppedError,
    UnsupportedError,
)

__all__ = [
    "ArgumentError",
    "DeviceError",
    "DtypeError",
    "Error",
    "FileError",
    "FormatError",
    "NonFiniteError",
    "NotFoundError",
    "OutOfMemoryError",
    "ShapeError",
    "StateError",
    "StoppedError",
    "UnsupportedError",
]


class NotFoundError(FileError, FileNotFoundError):
    """A file, a folder or a Hub repository that does not exist."""

    __module__ = "mambainllama"


def shorten(value: object, limit: int = 80) -> str:
    """`value` on one line of at most `limit` characters, for messages that quote input."""
    try:
        text = " ".join(repr(value).split())
    except RecursionError:  # JSON may be nested almost as deeply as Python can follow
        text = f"a {type(value).__name__} that is nested too deeply"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def listing(names: Iterable[object], limit: int = 3) -> str:
    """The first names of a long list, and how many more there are: "a, b, c and 9 more"."""
    names = list(names)
    shown = [str(name) for name in names[:limit]]
    text = ", ".join(
        name if name.isprintable() and len(name) <= 200 else shorten(name) for name in shown
    )
    return text if len(names) <= limit else f"{text} and {len(names) - limit} more"


def is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_at_least(what: str, name: str, value: Any, least: int) -> None:
    most = (1 << 63) - 1
    if not is_integer(value) or not least <= value <= most:
        above = is_integer(value) and value > most
        limit = f"at most {most}" if above else f"at least {least}"
        raise ArgumentError(f"{what}: {name} must be an integer of {limit}, not {shorten(value)}")
