"""Scalar functions of the mixers in float64, with their derivatives."""

import numpy as np


def sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))


def silu(x):
    return x * sigmoid(x)


def silu_slope(x):
    s = sigmoid(x)
    return s * (1 + x * (1 - s))


def step_size(raw, low=0.0, high=np.inf):
    """clamp(softplus(raw)) and its derivative by raw, which is 0 where clamped."""
    value = np.logaddexp(0, raw)
    inside = (value >= low) & (value <= high)
    return np.clip(value, low, high), np.where(inside, sigmoid(raw), 0)
