"""Causal attention of packed sequences in float64, with all scores at once."""

import numpy as np


def seen(count, past=0, window=0):
    """Which of the keys 0 .. past + count each of the rows past .. past + count sees."""
    row, key = past + np.arange(count)[:, None], np.arange(past + count)[None, :]
    mask = key <= row
    return mask & (key > row - window) if window else mask


def _repeat(x, group):
    return np.repeat(x, group, axis=1)


def one_forward(q, k, v, scale, window=0):
    """One sequence, whose last rows are those of q: y, log_sum_exp and P [heads, rows, keys]."""
    group = q.shape[1] // k.shape[1]
    scores = np.einsum("rhd,khd->hrk", q, _repeat(k, group)) * scale
    scores = np.where(seen(len(q), len(k) - len(q), window), scores, -np.inf)
    top = scores.max(axis=2, keepdims=True, initial=-1e300)
    total = np.exp(scores - top).sum(axis=2, keepdims=True)
    log_sum_exp = top + np.log(total)
    p = np.exp(scores - log_sum_exp)
    return np.einsum("hrk,khd->rhd", p, _repeat(v, group)), log_sum_exp[..., 0].T, p


def one_backward(q, k, v, grad_y, scale, window=0):
    group = q.shape[1] // k.shape[1]
    y, _, p = one_forward(q, k, v, scale, window)
    grad_p = np.einsum("rhd,khd->hrk", grad_y, _repeat(v, group))
    grad_scores = p * (grad_p - np.einsum("rhd,rhd->hr", grad_y, y)[:, :, None])
    grad_q = np.einsum("hrk,khd->rhd", grad_scores, _repeat(k, group)) * scale
    grad_k = np.einsum("hrk,rhd->khd", grad_scores, q) * scale
    grad_v = np.einsum("hrk,rhd->khd", p, grad_y)
    shape = (len(k), k.shape[1], group, k.shape[2])
    return grad_q, grad_k.reshape(shape).sum(axis=2), grad_v.reshape(shape).sum(axis=2)


def _sequences(offsets):
    return [slice(*pair) for pair in zip(offsets[:-1], offsets[1:], strict=True)]


def forward(q, k, v, scale, offsets, window=0):
    results = [one_forward(q[s], k[s], v[s], scale, window) for s in _sequences(offsets)]
    return np.concatenate([r[0] for r in results]), np.concatenate([r[1] for r in results])


def backward(q, k, v, grad_y, scale, offsets, window=0):
    results = [
        one_backward(q[s], k[s], v[s], grad_y[s], scale, window) for s in _sequences(offsets)
    ]
    names = ("grad_q", "grad_k", "grad_v")
    return {name: np.concatenate([r[i] for r in results]) for i, name in enumerate(names)}
