"""The three dtypes of weights, and conversions between them.

NumPy has no bfloat16: such arrays are held as uint16, the upper half of the float32 bits, and their
dtype travels beside them as the word "bfloat16".  Conversions to 16 bits round to nearest, ties to
even, as the C core does; they work in blocks so that a large matrix never has a float32 copy of
itself beside it.
"""

from __future__ import annotations

import numpy as np

from .errors import DtypeError, shorten

__all__ = ["STORAGE", "check_dtype", "convert", "from_float32", "to_float32"]

#: How an array of each dtype lies in memory.
STORAGE: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16),
    "float16": np.dtype(np.float16),
}

_BLOCK = 1 << 15  # elements converted at a time: they and their temporaries stay in cache


def check_dtype(dtype: object, *, auto: bool = True) -> str:
    """The dtype's name, from a name, a NumPy dtype or a torch dtype."""
    name = str(getattr(dtype, "__name__", dtype)).removeprefix("torch.")
    if name in STORAGE or (auto and name == "auto"):
        return name
    choices = [*(["auto"] if auto else []), *STORAGE]
    raise DtypeError(f"dtype {shorten(dtype)} is not known; use one of {', '.join(choices)}")


def _bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Float32 values rounded to bfloat16: add half of the last kept place, ties to even."""
    bits = values.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    # The sum above would carry a NaN of many set bits into infinity: keep it a quiet NaN.
    nan = np.isnan(values)
    if nan.any():
        rounded[nan] = ((bits[nan] >> 16) | 0x40).astype(np.uint16)
    return rounded


def to_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    """A float32 array of the values; the array itself where it is float32 already."""
    if dtype == "float32":
        return array
    if dtype == "float16":
        return array.astype(np.float32)
    out = np.empty(array.shape, np.uint32)
    np.left_shift(array, 16, out=out, dtype=np.uint32)
    return out.view(np.float32)


def from_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    """A new array of `dtype` (uint16 for bfloat16), rounded; float32 stays itself."""
    if dtype == "float32":
        return array
    out = np.empty(array.shape, STORAGE[dtype])
    source = np.ascontiguousarray(array).reshape(-1)
    target = out.reshape(-1)
    for start in range(0, source.size, _BLOCK):
        block = source[start : start + _BLOCK]
        if dtype == "bfloat16":
            target[start : start + _BLOCK] = _bfloat16_bits(block)
        else:
            with np.errstate(over="ignore"):  # beyond 65504 is infinity, as everywhere
                target[start : start + _BLOCK] = block
    return out


def convert(array: np.ndarray, dtype: str, to: str) -> np.ndarray:
    """`array` of `dtype` as an array of dtype `to`; itself where they are the same."""
    if dtype == to:
        return array
    if to == "float32":
        return to_float32(array, dtype)
    out = np.empty(array.shape, STORAGE[to])
    source, target = np.ascontiguousarray(array).reshape(-1), out.reshape(-1)
    for start in range(0, source.size, _BLOCK):
        block = to_float32(source[start : start + _BLOCK], dtype)
        target[start : start + _BLOCK] = from_float32(block, to)
    return out
