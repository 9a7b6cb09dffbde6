"""RMSNorm over groups of columns, with an optional gate, in float64 (csrc/cpu/norm.c)."""

import numpy as np


def silu(z):
    return z / (1 + np.exp(-z))


def silu_slope(z):
    s = 1 / (1 + np.exp(-z))
    return s + z * s * (1 - s)


def _grouped(x, group):
    return x.reshape(x.shape[0], -1, group)


def _weights(weight, weight_per_group, groups, group):
    if weight is None:
        return np.ones((groups, group))
    return np.tile(weight, (groups, 1)) if weight_per_group else weight.reshape(groups, group)


def forward(
    x, weight=None, z=None, group=None, norm_before_gate=False, weight_per_group=False, eps=1e-5
):
    u = _grouped(x if z is None or norm_before_gate else x * silu(z), group or x.shape[1])
    y = u / np.sqrt((u**2).mean(axis=2, keepdims=True) + eps)
    y = (y * _weights(weight, weight_per_group, *u.shape[1:])).reshape(x.shape)
    return y * silu(z) if z is not None and norm_before_gate else y


def backward(
    x, weight, grad_y, z=None, group=None, norm_before_gate=False, weight_per_group=False, eps=1e-5
):
    gate_first, gate_last = (
        z is not None and not norm_before_gate,
        z is not None and norm_before_gate,
    )
    u = _grouped(x * silu(z) if gate_first else x, group or x.shape[1])
    w = _weights(weight, weight_per_group, *u.shape[1:])
    g = _grouped(grad_y * silu(z) if gate_last else grad_y, u.shape[2])
    r = 1 / np.sqrt((u**2).mean(axis=2, keepdims=True) + eps)

    grad_weight = (g * u * r).sum(axis=0)
    grad_u = r * g * w - u * r**3 * (u * g * w).mean(axis=2, keepdims=True)
    grad_u = grad_u.reshape(x.shape)
    grads = {"grad_x": grad_u * silu(z) if gate_first else grad_u}
    if gate_first:
        grads["grad_z"] = grad_u * x * silu_slope(z)
    if gate_last:
        grads["grad_z"] = grad_y * (u * r * w).reshape(x.shape) * silu_slope(z)
    if weight is not None:
        grads["grad_weight"] = (
            grad_weight.sum(axis=0) if weight_per_group else grad_weight.reshape(-1)
        )
    return grads
