"""Muon against its float64 reference, at wide, tall and stacked matrices, and what it promises.

Five products of float32 amplify the rounding of the Gram matrix: 2e-5 of the largest entry is what
is left.
"""

import numpy as np
import pytest
from reference import muon as reference

from mambainllama import ops
from mambainllama.dtypes import from_float32
from mambainllama.errors import ShapeError


@pytest.mark.parametrize(
    "shape, parts",
    [
        ((8, 8), None),
        ((5, 33), None),
        ((130, 7), None),
        ((1, 9), None),
        ((9, 1), None),
        ((30, 16), [16, 8, 5, 1]),
    ],
)
def test_steps_against_reference(shape, parts):
    rng = np.random.default_rng(0)
    master, m = rng.normal(size=shape).astype(np.float32), np.zeros(shape, np.float32)
    wide = master.astype(np.float64), m.astype(np.float64)
    options = {"learning_rate": 0.02, "weight_decay": 0.1, "grad_scale": 0.3}
    for _ in range(4):
        grad = rng.normal(size=shape).astype(np.float32)
        ops.muon(master, grad, m, parts=None if parts is None else np.array(parts), **options)
        wide = reference.step(wide[0], grad.astype(np.float64), wide[1], parts=parts, **options)
    np.testing.assert_allclose(master, wide[0], atol=2e-5)
    np.testing.assert_allclose(m, wide[1], atol=1e-6)


def test_the_update_is_near_orthogonal_and_ignores_the_gradient_s_size():
    rng = np.random.default_rng(1)
    grad = rng.normal(size=(24, 40)).astype(np.float32)
    moves = []
    for size in (1e-12, 1.0, 1e12):
        master, m = np.zeros_like(grad), np.zeros_like(grad)
        ops.muon(master, grad * np.float32(size), m, learning_rate=1.0)
        moves.append(-master / (0.2 * np.sqrt(40)))
    singular = np.linalg.svd(moves[1], compute_uv=False)
    assert 0.6 < singular.min() and singular.max() < 1.3
    np.testing.assert_allclose(moves[0], moves[1], atol=1e-4)
    np.testing.assert_allclose(moves[2], moves[1], atol=1e-4)


def test_a_zero_gradient_only_decays():
    master, zero = np.ones((4, 6), np.float32), np.zeros((4, 6), np.float32)
    ops.muon(master, zero, zero.copy(), learning_rate=0.1, weight_decay=0.5)
    np.testing.assert_allclose(master, 0.95, rtol=1e-6)


def test_threads_and_sixteen_bit_weights():
    rng = np.random.default_rng(2)
    start, grad = (rng.normal(size=(96, 64)).astype(np.float32) for _ in range(2))
    master, m = start.copy(), np.zeros_like(start)
    weight = from_float32(np.zeros_like(start), "bfloat16")
    ops.muon(master, grad, m, learning_rate=0.1, weight=weight, dtype="bfloat16")
    np.testing.assert_array_equal(weight, from_float32(master, "bfloat16"))


def test_parts_that_do_not_fit():
    arrays = [np.ones((4, 3), np.float32) for _ in range(3)]
    with pytest.raises(ShapeError, match="the parts have 3 rows together; the matrix has 4"):
        ops.muon(*arrays, learning_rate=0.1, parts=np.array([2, 1]))
