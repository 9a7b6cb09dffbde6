"""Depthwise causal convolution of packed sequences in float64, tap by tap."""

from itertools import pairwise

import numpy as np
from reference.activations import silu as silu_function
from reference.activations import silu_slope


def source_of(channels, repeat, repeat_group):
    """The input that each channel reads: each run of repeat_group inputs `repeat` times."""
    if repeat == 1:
        return np.arange(channels)
    inputs = np.arange(channels // repeat).reshape(-1, 1, repeat_group)
    return np.repeat(inputs, repeat, axis=1).reshape(-1)


def _pre(x, weight, bias):
    """One sequence, x [length, channels] already repeated."""
    width = weight.shape[1]
    padded = np.concatenate([np.zeros((width - 1, x.shape[1])), x])
    return bias + sum(weight[:, j] * padded[j : j + len(x)] for j in range(width))


def forward(x, weight, bias, offsets, silu=True, repeat=1, repeat_group=1):
    x = x[:, source_of(len(weight), repeat, repeat_group)]
    pre = np.concatenate([_pre(x[a:b], weight, bias) for a, b in pairwise(offsets)])
    return silu_function(pre) if silu else pre


def backward(x, weight, bias, grad_y, offsets, silu=True, repeat=1, repeat_group=1):
    source, width = source_of(len(weight), repeat, repeat_group), weight.shape[1]
    grads = {
        "grad_x": np.zeros_like(x),
        "grad_weight": np.zeros_like(weight),
        "grad_bias": np.zeros_like(bias),
    }
    for a, b in pairwise(offsets):
        own = x[a:b, source]
        g = grad_y[a:b] * (silu_slope(_pre(own, weight, bias)) if silu else 1)
        grads["grad_bias"] += g.sum(axis=0)
        for t in range(b - a):
            for j in range(width):
                if t - width + 1 + j >= 0:
                    u = t - width + 1 + j
                    grads["grad_weight"][:, j] += g[t] * own[u]
                    np.add.at(grads["grad_x"][a + u], source, g[t] * weight[:, j])
    return grads
