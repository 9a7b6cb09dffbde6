"""AdamW against its float64 reference and torch.optim.AdamW, and the sum of squares."""

import numpy as np
import pytest
from reference import adamw as reference
from stepping import in_teams

from mambainllama import ops
from mambainllama.dtypes import from_float32
from mambainllama.errors import ArgumentError

OPTIONS = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("count", [1, 7, 16384, 50001])
def test_steps_against_reference(count):
    rng = np.random.default_rng(4)
    master = rng.normal(size=count).astype(np.float32)
    size = 10.0 ** rng.integers(-6, 4, count)  # of an element's gradients
    m, v = np.zeros(count, np.float32), np.zeros(count, np.float32)
    wide = [a.astype(np.float64) for a in (master, m, v)]
    for step in range(1, 6):
        grad = (rng.normal(size=count) * size).astype(np.float32)
        ops.adamw(master, grad, m, v, step=step, grad_scale=0.5, **OPTIONS)
        wide = reference.step(
            wide[0], grad.astype(np.float64), *wide[1:], step=step, grad_scale=0.5, **OPTIONS
        )
    # Five steps of some eight roundings; a move is at most a few learning rates.
    np.testing.assert_allclose(master, wide[0], atol=5e-7, rtol=5e-7)
    np.testing.assert_allclose(m / size, wide[1] / size, atol=1e-6)
    np.testing.assert_allclose(v / size**2, wide[2] / size**2, rtol=2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_the_rounded_master(dtype):
    rng = np.random.default_rng(5)
    master, grad = (rng.normal(size=40000).astype(np.float32) for _ in range(2))
    weight = from_float32(np.zeros_like(master), dtype)
    m, v = np.zeros_like(master), np.zeros_like(master)
    ops.adamw(
        master,
        grad,
        m,
        v,
        step=1,
        weight=weight,
        dtype="bfloat16" if dtype == "bfloat16" else None,
        **OPTIONS,
    )
    assert np.array_equal(weight, from_float32(master, dtype))


def test_against_pytorch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(6)
    start = rng.normal(size=(31, 9)).astype(np.float32)
    parameter = torch.nn.Parameter(torch.tensor(start.copy()))
    judge = torch.optim.AdamW([parameter], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    master, m, v = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for step in range(1, 11):
        grad = rng.normal(size=start.shape).astype(np.float32)
        parameter.grad = torch.tensor(grad)
        judge.step()
        ops.adamw(master, grad, m, v, step=step, **OPTIONS)
    np.testing.assert_allclose(master, parameter.detach().numpy(), atol=1e-6)


def test_zero_gradients_and_first_step():
    """A gradient of zero moves nothing; the first step is as long as the learning rate."""
    for grad, moved in [(0.0, 0.0), (1e-4, 1e-2), (1e4, 1e-2)]:
        arrays = [np.full(3, x, np.float32) for x in (1.0, grad, 0.0, 0.0)]
        ops.adamw(*arrays, step=1, **(OPTIONS | {"weight_decay": 0.0}))
        np.testing.assert_allclose(arrays[0], 1 - moved, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 9, 16384, 100003])
def test_sum_squares(count):
    x = np.random.default_rng(7).normal(size=count).astype(np.float32) * np.float32(1e10)
    expected = (x.astype(np.float64) ** 2).sum()
    first, *others = in_teams(lambda: ops.sum_squares(x))
    assert first == pytest.approx(expected, rel=1e-13)
    assert others == [first] * 2


def test_error_messages():
    arrays = [np.ones(2, np.float32) for _ in range(4)]
    with pytest.raises(ArgumentError, match="step"):
        ops.adamw(*arrays, step=0, **OPTIONS)
