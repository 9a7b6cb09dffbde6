"""Causal convolution: reference proven, C against reference and PyTorch, and bits.

Tolerances: an output is a sum of up to 9 products and one SiLU, so 1e-6 is some ten roundings;
gradients of taps sum over all rows, 1e-5 of their size.  How tokens arrive must not change a bit.
"""

import numpy as np
import pytest
from reference import conv1d as reference
from reference.differences import check
from stepping import (
    assert_close,
    assert_same_bits,
    cuts_to_try,
    doubles,
    in_teams,
    offsets_of,
    run_alone_in_pieces,
    run_together_in_pieces,
)

from mambainllama import ops
from mambainllama.errors import ArgumentError, ShapeError

BASE = {
    "lengths": (37, 1, 16, 50),
    "channels": 48,
    "width": 4,
    "repeat": 1,
    "repeat_group": 1,
    "silu": True,
}
CHANGES = [
    {},
    {"lengths": (1,)},
    {"lengths": (0, 2, 3, 0)},
    {"lengths": (17,)},
    {"lengths": (613,)},  # three pieces of the sums over rows
    {"silu": False},
    {"width": 2},
    {"width": 3},
    {"width": 8},
    {"channels": 1},
    {"channels": 31},
    {"channels": 64},
    {"channels": 200},
    {"repeat": 2, "repeat_group": 8},
    {"repeat": 4, "repeat_group": 1},
    {"repeat": 3, "repeat_group": 16},
    {"repeat": 2, "repeat_group": 70, "channels": 420},
]


def make(case, seed=0):
    rng = np.random.default_rng(seed)
    rows, channels = sum(case["lengths"]), case["channels"]

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    a = {
        "x": normal(rows, channels // case["repeat"]),
        "weight": normal(channels, case["width"]),
        "bias": normal(channels),
    }
    options = {name: case[name] for name in ("silu", "repeat", "repeat_group")}
    return a, options, offsets_of(case["lengths"]), normal(rows, channels)


def forward_of(a, options):
    rest = {n: a[n] for n in ("weight", "bias")}
    return lambda rows, **where: ops.conv1d_forward(a["x"][rows], **rest, **options, **where)


def new_state_of(case):
    inputs = case["channels"] // case["repeat"]
    return lambda: {"conv": np.zeros((case["width"] - 1 + ops.TAIL, inputs), np.float32)}


@pytest.mark.parametrize("change", [{}, {"silu": False}, {"repeat": 2, "repeat_group": 3}], ids=str)
def test_reference_backward_is_the_gradient(change):
    case = BASE | {"lengths": (5, 2), "channels": 6, "width": 3} | change
    a, options, offsets, grad_y = make(case)
    a, grad_y = doubles(a), grad_y.astype(np.float64)
    grads = reference.backward(**a, grad_y=grad_y, offsets=offsets, **options)
    check(
        lambda: (reference.forward(**a, offsets=offsets, **options) * grad_y).sum(),
        a,
        {n: grads["grad_" + n] for n in a},
    )


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_forward_and_backward_against_reference(change):
    a, options, offsets, grad_y = make(BASE | change)
    y = ops.conv1d_forward(**a, **options, offsets=offsets)
    assert_close(y, reference.forward(**doubles(a), **options, offsets=offsets), 1e-6)
    grads = ops.conv1d_backward(**a, **options, grad_y=grad_y, offsets=offsets)
    expected = reference.backward(
        **doubles(a), **options, grad_y=grad_y.astype(np.float64), offsets=offsets
    )
    assert grads.keys() == expected.keys()
    for name in expected:
        assert_close(grads[name], expected[name], 1e-5, name)


def test_no_bias_is_a_bias_of_zero():
    a, options, offsets, grad_y = make(BASE)
    zero = ops.conv1d_forward(
        **(a | {"bias": np.zeros_like(a["bias"])}), **options, offsets=offsets
    )
    a["bias"] = None
    np.testing.assert_array_equal(ops.conv1d_forward(**a, **options, offsets=offsets), zero)
    assert "grad_bias" not in ops.conv1d_backward(**a, **options, grad_y=grad_y, offsets=offsets)


def test_gradient_is_that_of_torch():
    torch = pytest.importorskip("torch", reason="torch is the judge here")
    case = BASE | {"lengths": (29,)}
    a, options, offsets, grad_y = make(case)
    leaves = {n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in a.items()}
    padded = torch.nn.functional.pad(leaves["x"].T, (3, 0))
    pre = torch.nn.functional.conv1d(padded, leaves["weight"][:, None], leaves["bias"], groups=48)
    y = torch.nn.functional.silu(pre).T
    (y * torch.from_numpy(grad_y)).sum().backward()
    assert_close(ops.conv1d_forward(**a, **options), y.detach().numpy(), 1e-6)
    grads = ops.conv1d_backward(**a, **options, grad_y=grad_y, offsets=offsets)
    for name, leaf in leaves.items():
        assert_close(grads["grad_" + name], leaf.grad.numpy(), 1e-5, name)


def test_parameter_gradients_add_and_others_overwrite():
    a, options, offsets, grad_y = make(BASE)
    new = ops.conv1d_backward(**a, **options, grad_y=grad_y, offsets=offsets)
    old = {n: np.full_like(v, 3) for n, v in new.items()}
    ops.conv1d_backward(**a, **options, grad_y=grad_y, offsets=offsets, out=old)
    for name, value in new.items():
        np.testing.assert_array_equal(
            old[name], value if name == "grad_x" else np.float32(3) + value
        )


def test_rows_may_lie_in_a_wider_array():
    a, options, offsets, grad_y = make(BASE | {"repeat": 2, "repeat_group": 8})
    wide = np.full((len(a["x"]), 24 + 9), np.nan, np.float32)
    wide[:, 5:29] = a["x"]
    guarded = np.full((len(a["x"]), 48 + 2), 7, np.float32)
    expected = ops.conv1d_forward(**a, **options, offsets=offsets)
    a["x"] = wide[:, 5:29]
    ops.conv1d_forward(**a, **options, offsets=offsets, out=guarded[:, 1:49])
    np.testing.assert_array_equal(guarded[:, 1:49], expected)
    assert (guarded[:, [0, 49]] == 7).all()


SHAPES = [
    {},
    {"repeat": 3, "repeat_group": 16},
    {"width": 8, "channels": 71},
    {"width": 2, "silu": False},
]


@pytest.mark.parametrize("change", SHAPES, ids=str)
def test_pieces_give_the_bits_of_the_whole(change):
    case = BASE | {"lengths": (131,)} | change
    a, options, offsets, _ = make(case)
    rng = np.random.default_rng(3)
    whole = ops.conv1d_forward(**a, **options, offsets=offsets)
    for cuts in cuts_to_try(rng):
        y, _ = run_alone_in_pieces(forward_of(a, options), 131, new_state_of(case), cuts)
        np.testing.assert_array_equal(y, whole)


@pytest.mark.parametrize("change", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_what_was_taken_back_never_happened(change, seed):
    case = BASE | {"lengths": (90,)} | change
    a, options, offsets, _ = make(case, seed)
    rng = np.random.default_rng(seed)
    y, _ = run_alone_in_pieces(
        forward_of(a, options),
        90,
        new_state_of(case),
        rng.integers(1, 20, 99),
        rng=rng,
        wrong_rows=90,
    )
    np.testing.assert_array_equal(y, ops.conv1d_forward(**a, **options, offsets=offsets))


def test_a_batch_gives_the_bits_of_each_alone():
    case = BASE | {"lengths": (40, 3, 75, 16, 33), "channels": 500}
    a, options, offsets, _ = make(case)
    together = ops.conv1d_forward(**a, **options, offsets=offsets)
    rng = np.random.default_rng(5)
    pieces = run_together_in_pieces(
        forward_of(a, options), case["lengths"], new_state_of(case), rng
    )
    np.testing.assert_array_equal(pieces, together)


def test_threads_do_not_change_a_bit():
    a, options, offsets, grad_y = make(BASE | {"lengths": (40, 3, 75, 16, 33), "channels": 500})

    def run():
        grads = ops.conv1d_backward(**a, **options, grad_y=grad_y, offsets=offsets)
        return grads | {"y": ops.conv1d_forward(**a, **options, offsets=offsets)}

    assert_same_bits(in_teams(run))


def test_extremes_stay_finite():
    a, options, offsets, grad_y = make(BASE)
    a["x"] *= np.float32(1e6)
    assert np.isfinite(ops.conv1d_forward(**a, **options, offsets=offsets)).all()
    grads = ops.conv1d_backward(**a, **options, grad_y=grad_y, offsets=offsets)
    assert all(np.isfinite(g).all() for g in grads.values())


def test_errors_name_the_argument():
    a, options, offsets, _ = make(BASE)
    with pytest.raises(ShapeError, match="x"):
        ops.conv1d_forward(a["x"][:, :40], a["weight"], a["bias"], offsets=offsets)
    with pytest.raises(ShapeError, match="taps"):
        ops.conv1d_forward(a["x"], np.ones((48, 9), np.float32), offsets=offsets)
    with pytest.raises(ShapeError, match="repeat"):
        ops.conv1d_forward(a["x"], a["weight"], a["bias"], repeat=5, offsets=offsets)
    with pytest.raises(ArgumentError, match="past"):
        ops.conv1d_forward(a["x"], a["weight"], a["bias"], offsets=offsets, past=[1, 0, 0, 0])
