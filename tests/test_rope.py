"""Rotary embedding against the float64 reference, transformers, and its own inverse."""

import numpy as np
import pytest
from reference import rope as reference

from mambainllama import ops

CASES = [  # rows a sequence, past, heads, head_dim, rotary
    ((9,), (0,), 2, 8, 8),
    ((1,), (131071,), 3, 64, 64),
    ((5, 1, 200), (0, 4096, 17), 8, 64, 32),
    ((3, 2), (1, 2), 1, 7, 2),
]


def inverse_frequencies(rotary, base=10000.0):
    return (base ** -(np.arange(0, rotary, 2) / rotary)).astype(np.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_table_and_rotation_against_reference(case):
    lengths, past, heads, head_dim, rotary = case
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    inv_freq = inverse_frequencies(rotary)
    table = ops.rope_table(inv_freq, offsets=offsets, past=past, scale=1.25)
    expected = reference.table(inv_freq, offsets, past, 1.25)
    np.testing.assert_allclose(table, expected, atol=3e-7)  # two roundings

    x = np.random.default_rng(0).normal(size=(sum(lengths), heads, head_dim)).astype(np.float32)
    y = ops.rope(x, table)
    np.testing.assert_allclose(y, reference.rotate(x, table.astype(np.float64)), atol=2e-6)
    np.testing.assert_array_equal(y[..., rotary:], x[..., rotary:])
    back = ops.rope(y, table, inverse=True)
    np.testing.assert_allclose(back[..., :rotary] / 1.25**2, x[..., :rotary], atol=2e-6)


def test_each_sequence_may_have_its_own_frequencies():
    inv_freq = np.stack([inverse_frequencies(8), inverse_frequencies(8, 500000.0)])
    offsets = np.array([0, 3, 7])
    table = ops.rope_table(inv_freq, offsets=offsets, past=[5, 9])
    np.testing.assert_allclose(table, reference.table(inv_freq, offsets, [5, 9]), atol=3e-7)


def test_inverse_is_the_backward():
    """<grad, rope(x)> = <inverse(grad), x>: the rotation is linear, so this is its gradient."""
    rng = np.random.default_rng(0)
    x, grad = rng.normal(size=(2, 6, 2, 8)).astype(np.float32)
    table = ops.rope_table(inverse_frequencies(6), 6)
    forward = (grad.astype(np.float64) * ops.rope(x, table)).sum()
    assert forward == pytest.approx(
        (ops.rope(grad, table, inverse=True).astype(np.float64) * x).sum(), rel=1e-5
    )


def test_against_transformers():
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x = np.random.default_rng(0).normal(size=(12, 3, 16)).astype(np.float32)
    inv_freq = inverse_frequencies(16)
    angle = torch.tensor(np.arange(12, dtype=np.float32)[:, None] * inv_freq)
    cosine, sine = (torch.cat([f(angle)] * 2, dim=-1)[None] for f in (torch.cos, torch.sin))
    q = torch.tensor(x).transpose(0, 1)[None]
    expected, _ = llama.apply_rotary_pos_emb(q, q, cosine, sine)
    y = ops.rope(x, ops.rope_table(inv_freq, 12))
    np.testing.assert_allclose(y, expected[0].transpose(0, 1).numpy(), atol=1e-6)
