"""Measuring a teacher on real text: what the calibrated start of a student needs.

A gate silu(z) with random rows of z flips the sign of each channel at random.  It should start as a
positive constant, z = 2 on every input u of the layer, which has no bias to say so.  But real
inputs have a mean: the direction w with w.u closest to 1 on all of them,

    w = argmin E[(w.u - 1)^2] + 1e-3 |w|^2 = (E[u u^T] + 1e-3 I)^-1 E[u],

found from the teacher's activations, makes z = 2 w.u near 2. The sums are float64: on wide models
E[u u^T] is close to singular.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _core
from .errors import ArgumentError, NonFiniteError, shorten

if TYPE_CHECKING:
    from .model import Model

__all__ = [
    "batches",
    "calibration_rows",
    "check_finite",
    "constant_direction",
    "constant_directions",
]

_BATCH_TOKENS = 2048
_SUMS_BYTES = 1 << 30  # of E[u u^T] held at once; more layers take more passes
_RIDGE = 1e-3


def calibration_rows(
    model: Model, calibration: Any, most: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and offsets, packed, of what the user gave: tokens (n, length), token lists or texts.

    At most `most` tokens are taken: rows spread evenly over what was given. E[u u^T] is known well
    from a few tokens for each of its rows, so without `most` these are 16,384 tokens, or four times
    the model's width.
    """
    from .model import pack

    rows = _rows(model, calibration)
    limit = most or max(16_384, 4 * model.config.hidden_size)
    average = max(1, sum(map(len, rows)) // len(rows))
    if len(rows) > limit // average:
        chosen = np.linspace(0, len(rows) - 1, max(1, limit // average)).astype(int)
        rows = [rows[i] for i in chosen]
    tokens, offsets, _ = pack(rows)
    tokens = tokens[:limit]
    offsets = np.unique(np.minimum(offsets, tokens.size))  # without empty rows
    if tokens.size == 0:
        raise ArgumentError("calibration: there is no token in it")
    if tokens.max() >= model.config.vocab_size:
        raise ArgumentError(
            f"calibration: token {tokens.max()} is not in the vocabulary of "
            f"{model.config.vocab_size}"
        )
    return tokens, offsets


def _rows(model: Model, calibration: Any) -> Sequence:
    """The rows of tokens in any of the forms that are allowed."""
    if isinstance(calibration, str):
        calibration = [calibration]
    elif isinstance(calibration, np.ndarray) and calibration.ndim == 1:
        calibration = calibration[None]
    good = isinstance(calibration, (np.ndarray, Sequence)) and getattr(calibration, "ndim", 1) > 0
    if not good or len(calibration) == 0:
        got = shorten(calibration)
        raise ArgumentError(
            f"calibration: expected tokens (n, length) or a list of texts, got {got}"
        )
    if isinstance(calibration[0], str):
        if model.tokenizer is None:
            raise ArgumentError(
                "calibration: texts need the model's tokenizer, and it has none; give tokens, or "
                "set model.tokenizer"
            )
        return model.tokenizer.encode_batch(calibration)
    if isinstance(calibration[0], (int, np.integer)):
        return [calibration]
    if not all(hasattr(row, "__len__") for row in calibration):
        raise ArgumentError("calibration: expected every row to be a list of tokens")
    return calibration


def constant_directions(
    core: _core.Model, layers: Sequence[int], tokens: np.ndarray, offsets: np.ndarray
) -> dict[int, np.ndarray]:
    """For each layer the float64 direction w [hidden] on which its normed inputs are near 1."""
    hidden = core.config["hidden"]
    at_once = max(1, _SUMS_BYTES // (hidden * hidden * 8))
    directions = {}
    for first in range(0, len(layers), at_once):
        directions.update(_directions(core, layers[first : first + at_once], tokens, offsets))
    return directions


def _directions(
    core: _core.Model, layers: Sequence[int], tokens: np.ndarray, offsets: np.ndarray
) -> dict[int, np.ndarray]:
    hidden = core.config["hidden"]
    square = {layer: np.zeros((hidden, hidden)) for layer in layers}
    total = {layer: np.zeros(hidden) for layer in layers}
    for begin, end in batches(offsets):
        part = offsets[begin : end + 1] - offsets[begin]
        rows = tokens[offsets[begin] : offsets[end]]
        capture = [("normed", layer) for layer in layers]
        _, inputs = core.forward(rows, part, rows="none", capture=capture, fast=True)
        for layer, u in zip(layers, inputs, strict=True):
            u = u.astype(np.float64)
            square[layer] += u.T @ u
            total[layer] += u.sum(axis=0)
    count = tokens.size
    for layer in layers:
        check_finite(layer, total[layer], square[layer])
    return {
        layer: constant_direction(square[layer] / count, total[layer] / count) for layer in layers
    }


def check_finite(layer: int, *values: np.ndarray) -> None:
    """Refuses what is not finite: a student that is started from it would not be finite either."""
    if not all(np.isfinite(value).all() for value in values):
        raise NonFiniteError(
            f"calibration: layer {layer} of the model is given or gives values that are not "
            "finite; weights with NaN or infinity, or an overflow of 16-bit weights, cause this"
        )


def constant_direction(square: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """The direction w of the header, from E[u u^T] and E[u]."""
    return np.linalg.solve(square + _RIDGE * np.eye(len(mean)), mean)


def batches(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, end) of runs of sequences with about _BATCH_TOKENS tokens."""
    begin = 0
    for end in range(1, len(offsets)):
        if offsets[end] - offsets[begin] >= _BATCH_TOKENS or end == len(offsets) - 1:
            yield begin, end
            begin = end
