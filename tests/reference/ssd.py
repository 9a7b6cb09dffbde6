"""Mamba-2's recurrence of packed sequences in float64, token by token: no windows, no dual form."""

from itertools import pairwise

import numpy as np
from reference.activations import step_size


def _repeated(a):
    """Inputs as each head sees them.

    x is [rows, heads, head_dim]; B and C [rows, heads, state_dim]; dt, its slope [rows, heads]; A.
    """
    heads = a["dt"].shape[1]
    x, B, C = (a[n][:, np.arange(heads) * a[n].shape[1] // heads] for n in ("x", "B", "C"))
    dt, slope = step_size(a["dt"] + a["dt_bias"], a.get("dt_min", 0.0), a.get("dt_max", np.inf))
    return x, B, C, dt, slope, -np.exp(a["A_log"])


def _states(x, B, dt, A):
    """H before each token, and after the last: [length + 1, heads, head_dim, state_dim]."""
    H = np.zeros((len(x) + 1, *x.shape[1:], B.shape[2]))
    for t in range(len(x)):
        decay = np.exp(dt[t] * A)[:, None, None]
        H[t + 1] = decay * H[t] + dt[t][:, None, None] * x[t][:, :, None] * B[t][:, None, :]
    return H


def forward(a, offsets):
    """a: dict of the operator's arguments."""
    x, B, C, dt, _, A = _repeated(a)
    y = a["D"][:, None] * x
    for first, end in pairwise(offsets):
        H = _states(x[first:end], B[first:end], dt[first:end], A)[1:]
        y[first:end] += np.einsum("thpn,thn->thp", H, C[first:end])
    return y


def backward(a, grad_y, offsets):
    x, B, C, dt, slope, A = _repeated(a)
    heads = dt.shape[1]
    gx, gdt, gB, gC = (
        a["D"][:, None] * grad_y,
        np.zeros_like(dt),
        np.zeros_like(B),
        np.zeros_like(C),
    )
    grads = {"grad_D": (grad_y * x).sum(axis=(0, 2)), "grad_A_log": np.zeros_like(A)}
    for first, end in pairwise(offsets):
        H = _states(x[first:end], B[first:end], dt[first:end], A)
        K = np.zeros_like(H[0])
        for t in range(end - 1, first - 1, -1):
            before, after = H[t - first], H[t - first + 1]
            decay = np.exp(dt[t] * A)
            K = K + grad_y[t][:, :, None] * C[t][:, None, :]
            gC[t] = np.einsum("hpn,hp->hn", after, grad_y[t])
            gB[t] = dt[t][:, None] * np.einsum("hpn,hp->hn", K, x[t])
            into_x = np.einsum("hpn,hn->hp", K, B[t])
            gx[t] += dt[t][:, None] * into_x
            q = decay * (K * before).sum(axis=(1, 2))
            gdt[t] = (into_x * x[t]).sum(axis=1) + A * q
            grads["grad_A_log"] += dt[t] * A * q
            K = K * decay[:, None, None]
    gdt *= slope
    grads["grad_dt"] = gdt
    grads["grad_dt_bias"] = gdt.sum(axis=0)
    for name, values in (("x", gx), ("B", gB), ("C", gC)):
        grads["grad_" + name] = np.zeros_like(a[name])
        np.add.at(
            grads["grad_" + name],
            (slice(None), np.arange(heads) * a[name].shape[1] // heads),
            values,
        )
    return grads
