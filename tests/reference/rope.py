"""Rotary position embedding: the angle is a float32 product, as in Hugging Face; else float64."""

import numpy as np


def positions(offsets, past=None):
    counts = np.diff(offsets)
    past = np.zeros(len(counts), np.int64) if past is None else np.asarray(past)
    return np.concatenate(
        [first + np.arange(count) for first, count in zip(past, counts, strict=True)]
    )


def table(inv_freq, offsets, past=None, scale=1.0):
    inv_freq = np.asarray(inv_freq, np.float32)
    if inv_freq.ndim == 2:  # one row a sequence
        inv_freq = np.repeat(inv_freq, np.diff(offsets), axis=0)
    angle = positions(offsets, past).astype(np.float32)[:, None] * inv_freq
    angle = angle.astype(np.float64)
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1) * scale


def rotate(x, rope_table, inverse=False):
    """x [rows, heads, head_dim]; entry i turns with entry i + rotary / 2."""
    half = rope_table.shape[1]
    cosine, sine = rope_table[:, None, :, 0], rope_table[:, None, :, 1] * (-1 if inverse else 1)
    low, high = x[..., :half], x[..., half : 2 * half]
    return np.concatenate(
        [low * cosine - high * sine, high * cosine + low * sine, x[..., 2 * half :]], axis=-1
    )
