"""Mamba-1's selective scan of packed sequences in float64, token by token."""

from itertools import pairwise

import numpy as np
from reference.activations import silu, silu_slope, step_size
from reference.conv1d import source_of


def _repeated(a):
    """Inputs as each channel sees them.

    x, dt and its slope are [rows, inner]; B and C [rows, inner, state_dim]; A [inner, state_dim].
    """
    inner = a["dt"].shape[1]
    channel = np.arange(inner)
    x = a["x"][:, source_of(inner, a.get("x_repeat", 1), a.get("x_repeat_group", 1))]
    B = a["B"][:, channel * a["B"].shape[1] // inner]
    C = a["C"][:, channel * a["C"].shape[1] // inner]
    raw = a["dt"] + a.get("dt_bias_scale", 1.0) * a["dt_bias"]
    dt, slope = step_size(raw, a.get("dt_min", 0.0), a.get("dt_max", np.inf))
    return x, B, C, dt, slope, -np.exp(a["A_log"])


def _states(x, B, dt, A):
    """H before each token, and after the last: [length + 1, inner, state_dim]."""
    H = np.zeros((len(x) + 1, *A.shape))
    for t in range(len(x)):
        H[t + 1] = np.exp(dt[t, :, None] * A) * H[t] + (dt[t] * x[t])[:, None] * B[t]
    return H


def forward(a, offsets):
    """a: dict of the operator's arguments; z may be missing."""
    x, B, C, dt, _, A = _repeated(a)
    y = a["D"] * x
    for first, end in pairwise(offsets):
        H = _states(x[first:end], B[first:end], dt[first:end], A)[1:]
        y[first:end] += (C[first:end] * H).sum(axis=2)
    return y * silu(a["z"]) if a.get("z") is not None else y


def backward(a, grad_y, offsets):
    x, B, C, dt, slope, A = _repeated(a)
    rows, inner = x.shape
    gate = a.get("z") is not None
    e = grad_y * silu(a["z"]) if gate else grad_y
    grads = {"grad_D": (e * x).sum(axis=0), "grad_A_log": np.zeros_like(A)}
    if gate:
        grads["grad_z"] = grad_y * silu_slope(a["z"]) * forward({**a, "z": None}, offsets)
    gx, gdt, gB, gC = e * a["D"], np.zeros_like(dt), np.zeros_like(B), np.zeros_like(C)
    for first, end in pairwise(offsets):
        H = _states(x[first:end], B[first:end], dt[first:end], A)
        K = np.zeros_like(A)
        for t in range(end - 1, first - 1, -1):
            before, after = H[t - first], H[t - first + 1]
            decay = np.exp(dt[t, :, None] * A)
            K = K + e[t][:, None] * C[t]
            gC[t] = e[t][:, None] * after
            gB[t] = K * (dt[t] * x[t])[:, None]
            gx[t] += dt[t] * (K * B[t]).sum(axis=1)
            q = K * decay * before
            gdt[t] = x[t] * (K * B[t]).sum(axis=1) + (A * q).sum(axis=1)
            grads["grad_A_log"] += dt[t][:, None] * A * q
            K = K * decay
    gdt *= slope
    channel = np.arange(inner)
    grads["grad_dt"] = gdt
    grads["grad_dt_bias"] = a.get("dt_bias_scale", 1.0) * gdt.sum(axis=0)
    for name, values in (("B", gB), ("C", gC)):
        grads["grad_" + name] = np.zeros_like(a[name])
        np.add.at(grads["grad_" + name], (slice(None), channel * a[name].shape[1] // inner), values)
    grads["grad_x"] = np.zeros_like(a["x"])
    np.add.at(
        grads["grad_x"],
        (slice(None), source_of(inner, a.get("x_repeat", 1), a.get("x_repeat_group", 1))),
        gx,
    )
    return grads
