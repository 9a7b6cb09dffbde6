"""Finite differences in float64, the judge of every hand-written backward in this folder."""

import numpy as np


def gradient(function, array, step=1e-6):
    """Central differences of the scalar ``function()`` in each entry of ``array``."""
    result = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        kept = array[index]
        array[index] = kept + step
        above = function()
        array[index] = kept - step
        below = function()
        array[index] = kept
        result[index] = (above - below) / (2 * step)
    return result


def check(function, arrays, gradients, tolerance=1e-6):
    """Assert that ``gradients[name]`` is the gradient of ``function()`` in ``arrays[name]``."""
    for name, array in arrays.items():
        assert array.dtype == np.float64
        expected = gradient(function, array)
        error = np.abs(gradients[name] - expected).max() / max(1.0, np.abs(expected).max())
        assert error < tolerance, f"gradient of {name} is off by {error:.2e}"
