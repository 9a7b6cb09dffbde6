"""Weights of 8 bits: which matrices become them, and what values they then stand for.

A matrix [out, in] is stored as codes of 8 bits and one float32 scale a row; a weight is code *
scale. The codes are made while the weights go to a GPU (kernels/quantized.cu), rounded to nearest,
ties to even:

- "float8" is e4m3: sign, four bits of exponent, three of mantissa, up to 448. The scale is the
  least power of two that keeps the row within 448, so every value is exact in 16 bits. Relative
  errors are up to 1/16, 2.6 % in the mean square, whatever a weight's size.
- "int8" are the integers -127 .. 127; the scale is the largest magnitude / 127. Errors are up to
  half a scale: 0.8 % in the mean square for Gaussian rows of 4,096, more where a row has outliers.

Both halve the memory and the reading of 16-bit weights. Activations, caches, states and vectors
stay as they are.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

import numpy as np

from .errors import ArgumentError, UnsupportedError, shorten

__all__ = ["check_kind", "coded", "quantize", "rounded"]

KINDS = ("float8", "int8")

_LEAST_SCALE = np.float32(2.0**-126)

# Small products within a Mamba-1 mixer, some hundredth of its weights: time steps stand in
# exponents, and kernels take both along with the scan.
_KEPT = (".x_proj.weight", ".dt_proj.weight")


def check_kind(weights: object, device: str) -> str | None:
    """ "float8", "int8" or None; ArgumentError for anything else, UnsupportedError on the CPU."""
    if weights is None:
        return None
    if weights not in KINDS:
        raise ArgumentError(
            f'weights {shorten(weights)} is not known; use "float8", "int8", or None: as they are'
        )
    if device == "cpu":
        raise UnsupportedError(
            f'{weights} weights need device="cuda"; on the CPU use dtype="bfloat16"'
        )
    return weights


def coded(
    specs: Iterable[tuple[str, tuple[int, ...], bool, bool]],
    names: Container[str],
    weights: str | None,
) -> dict[str, str]:
    """Name -> "float8" or "int8" for those parameters that become that; empty without `weights`.

    They are the matrices of `names`, but x_proj and dt_proj of Mamba-1. The embedding table is
    among them only where it is the output product as well (there is no "lm_head.weight"): else one
    row of it is read a token.
    """
    if weights is None:
        return {}
    tied = "lm_head.weight" not in names
    return {
        name: weights
        for name, _, is_matrix, _ in specs
        if is_matrix
        and name in names
        and not name.endswith(_KEPT)
        and (tied or name != "model.embed_tokens.weight")
    }


def quantize(values: np.ndarray, weights: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes of a float32 matrix, as the float32 values that they stand for, and scales [rows].

    Raises
    ------
    ArgumentError
        A value is NaN or infinite.
    """
    largest = np.abs(values).max(axis=1, initial=0.0)
    if not np.isfinite(largest).all():
        raise ArgumentError(
            f"weights: a matrix with NaN or infinite values cannot become {weights}"
        )
    zero = largest == 0
    if weights == "int8":
        scale = np.maximum(largest / np.float32(127), _LEAST_SCALE)
        scale[zero] = 1
        return np.clip(np.rint(values / scale[:, None]), -127, 127), scale
    fraction, exponent = np.frexp(largest)  # largest = fraction * 2^exponent, 448 = 0.875 * 2^9
    scale = np.ldexp(np.float32(1), np.maximum(exponent - np.where(fraction <= 0.875, 9, 8), -126))
    scale[zero] = 1
    codes = values / scale[:, None]
    step = np.ldexp(np.float32(1), np.maximum(np.frexp(codes)[1] - 4, -9))  # 2^-9: of subnormals
    return np.clip(np.rint(codes / step) * step, -448, 448), scale


def rounded(values: np.ndarray, weights: str) -> np.ndarray:
    """The float32 matrix that 8-bit weights put in the place of a float32 matrix.

    >>> rounded(np.array([[1.0, 0.3, -0.01]], np.float32), "int8").round(4)
    array([[ 1.    ,  0.2992, -0.0079]], dtype=float32)
    >>> rounded(np.array([[1.0, 0.3, -0.01]], np.float32), "float8")
    array([[ 1.        ,  0.3125    , -0.00976562]], dtype=float32)
    """
    codes, scale = quantize(values, weights)
    return codes * scale[:, None]
