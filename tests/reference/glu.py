"""Gated activations in float64."""

import math

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x):
    return np.where(
        x > 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x)))
    )


def value_and_slope(activation, x):
    """act(x) and its derivative."""
    if activation == "silu":
        s = _sigmoid(x)
        return x * s, s + x * s * (1 - s)
    if activation == "gelu":
        below = (1 + _erf(x / math.sqrt(2))) / 2
        return x * below, below + x * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    if activation == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        t = np.tanh(inner)
        inner_slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
        return x * (1 + t) / 2, (1 + t) / 2 + x * (1 - t**2) / 2 * inner_slope
    positive = np.maximum(x, 0)
    if activation == "relu":
        return positive, (x > 0).astype(np.float64)
    return positive**2, 2 * positive  # relu2


def forward(gate, up, activation):
    value = value_and_slope(activation, gate)[0]
    return value if up is None else value * up


def backward(gate, up, grad_y, activation):
    value, slope = value_and_slope(activation, gate)
    if up is None:
        return {"grad_gate": grad_y * slope}
    return {"grad_gate": grad_y * up * slope, "grad_up": grad_y * value}
