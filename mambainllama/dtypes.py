"""The three dtypes of weights, and conversions between them.

NumPy has no bfloat16: such arrays are held as uint16, the upper half of the float32 bits, and their
dtype travels beside them as the word "bfloat16".  Conversions to 16 bits round to nearest, ties to
even; what float16 cannot hold becomes infinite.
"""

from __future__ import annotations

import math

import numpy as np

from . import _core
from .errors import DtypeError, shorten

__all__ = ["LINE", "STORAGE", "check_dtype", "convert", "empty", "from_float32", "to_float32"]

#: Bytes of a line of the caches, as wide as the widest vectors of a CPU.
LINE = 64

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
    size = math.prod(shape) * STORAGE[dtype].itemsize
    memory = np.empty(size + LINE, np.uint8)  # NumPy asks for huge pages by itself
    begin = -memory.ctypes.data % LINE
    return memory[begin : begin + size].view(STORAGE[dtype]).reshape(shape)


def convert(array: np.ndarray, dtype: str, to: str) -> np.ndarray:
    """`array` of `dtype` as an array of dtype `to`; itself where they are the same."""
    if dtype == to:
        return array
    source = np.ascontiguousarray(array, STORAGE[dtype])
    out = empty(array.shape, to)
    _core.convert(source, dtype, out, to)
    return out
