"""The three dtypes of weights, and conversions between them.

NumPy has no bfloat16: such arrays are held as uint16, the upper half of the float32 bits, and their
dtype travels beside them as the word "bfloat16".  Conversions to 16 bits round to nearest, ties to
even; what float16 cannot hold becomes infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from . import _core
from .errors import DtypeError, shorten

__all__ = [
    "LINE",
    "PAGE",
    "STORAGE",
    "Room",
    "bytes_of",
    "check_dtype",
    "convert",
    "empty",
    "from_float32",
    "to_float32",
]

#: Bytes of a line of the caches, as wide as the widest vectors of a CPU.
LINE = 64

#: Bytes of a small page of memory.
PAGE = 4096

#: How an array of each dtype lies in memory.
STORAGE: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16),
    "float16": np.dtype(np.float16),
}


def check_dtype(dtype: object, *, auto: bool = True) -> str:
    """The dtype's name, from a name, a NumPy dtype or a torch dtype."""
    name = str(getattr(dtype, "__name__", dtype)).removeprefix("torch.")
    if name in STORAGE or (auto and name == "auto"):
        return name
    choices = [*(["auto"] if auto else []), *STORAGE]
    raise DtypeError(f"dtype {shorten(dtype)} is not known; use one of {', '.join(choices)}")


def to_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    """A float32 array of the values; the array itself where it is float32 already."""
    return convert(array, dtype, "float32")


def from_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    """A new array of `dtype` (uint16 for bfloat16), rounded; float32 stays itself."""
    return convert(array, "float32", dtype)


def empty(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A new array that begins at a line of the caches, so that no vector of weights lies in two."""
    return _bytes(bytes_of(shape, dtype)).view(STORAGE[dtype]).reshape(shape)


def bytes_of(shape: tuple[int, ...], dtype: str) -> int:
    """What an array takes."""
    return math.prod(shape) * STORAGE[dtype].itemsize


def _bytes(size: int, unit: int = LINE) -> np.ndarray:
    memory = np.empty(size + unit, np.uint8)  # NumPy asks for huge pages by itself
    begin = -memory.ctypes.data % unit
    return memory[begin : begin + size]


class Room:
    """Memory in one piece for the arrays of a model, so that nearly all of it lies in huge pages,
    and each begins at a page, as rows of 4 KiB then do, which a processor fetches page by page.

    Arrays by themselves have small pages at their ends, a seventh of a 1B model, which cost up to
    a tenth of the time of a decoded token. It is free again when the last of its arrays is.
    """

    def __init__(self, sizes: Iterable[int]) -> None:
        """`sizes`: bytes of each array."""
        total = sum(-(-size // PAGE) * PAGE for size in sizes)
        try:
            self._left = _bytes(total, PAGE)
        except MemoryError:  # arrays get memory of their own, as long as there is some
            self._left = np.zeros(0, np.uint8)

    def empty(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """The next new array."""
        size = bytes_of(shape, dtype)
        if size > self._left.size:
            return empty(shape, dtype)
        array = self._left[:size].view(STORAGE[dtype]).reshape(shape)
        self._left = self._left[-(-size // PAGE) * PAGE :]
        return array


def convert(
    array: np.ndarray, dtype: str, to: str, new: Callable[..., np.ndarray] = empty
) -> np.ndarray:
    """`array` of `dtype` as an array of `to` that `new` makes; itself where they are the same."""
    if dtype == to:
        return array
    source = np.ascontiguousarray(array, STORAGE[dtype])
    out = new(array.shape, to)
    _core.convert(source, dtype, out, to)
    return out
