"""Mamba-2's state space recurrence: reference proven, C against it and PyTorch, and bits.

Tolerances: a state is a sum of up to 1 / (1 - decay) products, each with a rounding of 6e-8, and
values are of size 1 to 10, so 5e-6 of the largest value is some ten roundings; gradients of
parameters sum over all rows, 3e-5 of their size.  How tokens arrive must not change a bit: that is
compared exactly.
"""

from itertools import pairwise

import numpy as np
import pytest
from reference import ssd as reference
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
    "heads": 4,
    "head_dim": 16,
    "state_dim": 16,
    "x_heads": 4,
    "B_groups": 4,
    "C_groups": 4,
}
CHANGES = [
    {},
    {"lengths": (1,)},
    {"lengths": (15,)},
    {"lengths": (16,)},
    {"lengths": (17,)},
    {"lengths": (0, 100, 0, 3)},
    {"lengths": (211,)},
    {"x_heads": 2, "B_groups": 2},  # converted Llama with grouped heads
    {"B_groups": 1, "C_groups": 1},  # Mamba-2 as published
    {"heads": 12, "x_heads": 12, "B_groups": 2, "C_groups": 4},
    {"heads": 6, "x_heads": 1, "B_groups": 3, "C_groups": 2},
    {"heads": 1, "x_heads": 1, "B_groups": 1, "C_groups": 1},
    {"head_dim": 64, "state_dim": 64},
    {"head_dim": 64, "state_dim": 128, "heads": 2, "x_heads": 2, "B_groups": 1, "C_groups": 1},
    {"head_dim": 33, "state_dim": 17},
    {"head_dim": 1, "state_dim": 1},
    {"head_dim": 5, "state_dim": 40},
    {"dt_min": 0.05, "dt_max": 0.6},
]
PER_ROW = ("x", "dt", "B", "C")


def make(case, seed=0):
    """Arguments of the operator as a dict, offsets and a gradient of y."""
    rng = np.random.default_rng(seed)
    rows, heads = sum(case["lengths"]), case["heads"]

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    a = {
        "x": normal(rows, case["x_heads"], case["head_dim"]),
        "B": normal(rows, case["B_groups"], case["state_dim"])
        / np.float32(case["state_dim"] ** 0.5),
        "C": normal(rows, case["C_groups"], case["state_dim"]),
        "dt": normal(rows, heads),
        "dt_bias": normal(heads) - 1,
        "A_log": rng.uniform(-3, 1.5, heads).astype(np.float32),
        "D": normal(heads),
    }
    a |= {name: case[name] for name in ("dt_min", "dt_max") if name in case}
    return a, offsets_of(case["lengths"]), normal(rows, heads, case["head_dim"])


def forward_of(a):
    """The operator on chosen rows of the input, as Stepper wants it."""
    fixed = {n: v for n, v in a.items() if n not in PER_ROW}
    return lambda rows, **where: ops.ssd_forward(
        **{n: a[n][rows] for n in PER_ROW}, **fixed, **where
    )


def new_state_of(case):
    return lambda: ops.ssd_state(
        case["heads"],
        case["head_dim"],
        case["state_dim"],
        4,
        1,
        x_heads=case["x_heads"],
        B_groups=case["B_groups"],
    )


@pytest.mark.parametrize(
    "change", [{}, {"x_heads": 2, "B_groups": 1}, {"dt_min": 0.3, "dt_max": 0.8}], ids=str
)
def test_reference_backward_is_the_gradient(change):
    case = BASE | {"lengths": (4, 3), "head_dim": 2, "state_dim": 3} | change
    a, offsets, grad_y = make(case)
    a, grad_y = doubles(a), grad_y.astype(np.float64)
    grads = reference.backward(a, grad_y, offsets)
    names = ("x", "B", "C", "dt", "dt_bias", "A_log", "D")
    check(
        lambda: (reference.forward(a, offsets) * grad_y).sum(),
        {n: a[n] for n in names},
        {n: grads["grad_" + n] for n in names},
    )


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_forward_and_backward_against_reference(change):
    a, offsets, grad_y = make(BASE | change)
    y = ops.ssd_forward(**a, offsets=offsets)
    assert_close(y, reference.forward(doubles(a), offsets), 5e-6, "y")
    grads = ops.ssd_backward(**a, grad_y=grad_y, offsets=offsets)
    expected = reference.backward(doubles(a), grad_y.astype(np.float64), offsets)
    assert grads.keys() == expected.keys()
    for name in expected:
        assert_close(grads[name], expected[name], 3e-5, name)


def test_gradient_is_that_of_torch():
    torch = pytest.importorskip("torch", reason="torch is the judge here")
    case = BASE | {"lengths": (21,), "x_heads": 2, "B_groups": 2}
    a, offsets, grad_y = make(case)
    leaves = {n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in a.items()}
    x, B = (leaves[n].repeat_interleave(2, dim=1) for n in ("x", "B"))
    dt = torch.nn.functional.softplus(leaves["dt"] + leaves["dt_bias"])
    decay, H, loss = torch.exp(-dt * leaves["A_log"].exp()), 0, 0
    for t in range(21):
        H = decay[t][:, None, None] * H + torch.einsum("h,hp,hn->hpn", dt[t], x[t], B[t])
        y = torch.einsum("hpn,hn->hp", H, leaves["C"][t]) + leaves["D"][:, None] * x[t]
        loss = loss + (y * torch.from_numpy(grad_y[t])).sum()
    loss.backward()
    grads = ops.ssd_backward(**a, grad_y=grad_y, offsets=offsets)
    for name, leaf in leaves.items():
        assert_close(grads["grad_" + name], leaf.grad.numpy(), 3e-5, name)


def test_parameter_gradients_add_and_others_overwrite():
    a, offsets, grad_y = make(BASE)
    new = ops.ssd_backward(**a, grad_y=grad_y, offsets=offsets)
    old = {n: np.full_like(v, 3) for n, v in new.items()}
    ops.ssd_backward(**a, grad_y=grad_y, offsets=offsets, out=old)
    for name, value in new.items():
        adds = name in ("grad_dt_bias", "grad_A_log", "grad_D")
        np.testing.assert_array_equal(old[name], np.float32(3) + value if adds else value)


def test_rows_may_lie_in_a_wider_array():
    """x, B and C as slices of one projection, whose other columns are NaN."""
    a, offsets, grad_y = make(BASE | {"x_heads": 2, "B_groups": 2})
    widths = [a[n][0].size for n in ("x", "B", "C")]
    wide = np.full((offsets[-1], sum(widths) + 7), np.nan, np.float32)
    views, at = {}, 3
    for name, width in zip(("x", "B", "C"), widths, strict=True):
        strides = (wide.strides[0], a[name].strides[1], 4)
        views[name] = np.lib.stride_tricks.as_strided(wide[:, at:], a[name].shape, strides)
        views[name][...] = a[name]
        at += width
    np.testing.assert_array_equal(
        ops.ssd_forward(**(a | views), offsets=offsets), ops.ssd_forward(**a, offsets=offsets)
    )
    expected = ops.ssd_backward(**a, grad_y=grad_y, offsets=offsets)
    grads = ops.ssd_backward(**(a | views), grad_y=grad_y, offsets=offsets)
    for name, value in expected.items():
        np.testing.assert_array_equal(grads[name], value)


# ---- bits ----------------------------------------------------------------------------------------

SHAPES = [
    {},
    {"x_heads": 2, "B_groups": 2},
    {"B_groups": 1, "C_groups": 1, "heads": 10, "x_heads": 10},
    {"head_dim": 33, "state_dim": 17},
    {"head_dim": 64, "state_dim": 128, "heads": 2, "x_heads": 1, "B_groups": 1, "C_groups": 2},
]


@pytest.mark.parametrize("change", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_pieces_give_the_bits_of_the_whole(change, seed):
    case = BASE | {"lengths": (131,)} | change
    a, offsets, _ = make(case, seed)
    rng = np.random.default_rng(seed)
    whole = ops.ssd_forward(**a, offsets=offsets)
    for cuts in cuts_to_try(rng):
        y, _ = run_alone_in_pieces(forward_of(a), 131, new_state_of(case), cuts)
        np.testing.assert_array_equal(y, whole)


@pytest.mark.parametrize("change", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_what_was_taken_back_never_happened(change, seed):
    case = BASE | {"lengths": (90,)} | change
    a, offsets, _ = make(case, seed)
    rng = np.random.default_rng(seed)
    whole = ops.ssd_forward(**a, offsets=offsets)
    y, _ = run_alone_in_pieces(
        forward_of(a), 90, new_state_of(case), rng.integers(1, 20, 99), rng=rng, wrong_rows=90
    )
    np.testing.assert_array_equal(y, whole)


def test_a_batch_gives_the_bits_of_each_alone(threads):
    case = BASE | {"lengths": (40, 3, 75, 16, 33), "head_dim": 64, "state_dim": 64}
    a, offsets, grad_y = make(case)
    rng = np.random.default_rng(5)
    pieces = run_together_in_pieces(forward_of(a), case["lengths"], new_state_of(case), rng)
    together = ops.ssd_forward(**a, offsets=offsets)
    np.testing.assert_array_equal(pieces, together)
    grads = ops.ssd_backward(**a, grad_y=grad_y, offsets=offsets)
    for first, end in pairwise(offsets):
        own = {n: v[first:end] if n in PER_ROW else v for n, v in a.items()}
        np.testing.assert_array_equal(together[first:end], ops.ssd_forward(**own))
        alone = ops.ssd_backward(**own, grad_y=grad_y[first:end])
        for name in PER_ROW:
            np.testing.assert_array_equal(grads["grad_" + name][first:end], alone["grad_" + name])


def test_threads_do_not_change_a_bit():
    case = BASE | {
        "lengths": (70, 300),
        "head_dim": 64,
        "state_dim": 64,
        "B_groups": 2,
        "x_heads": 1,
    }
    a, offsets, grad_y = make(case)

    def run():
        grads = ops.ssd_backward(**a, grad_y=grad_y, offsets=offsets)
        return grads | {"y": ops.ssd_forward(**a, offsets=offsets)}

    assert_same_bits(in_teams(run))


def test_what_lies_in_unused_memory_does_not_matter():
    """A state full of NaN beyond what device.h promises to read gives the same bits."""
    case = BASE | {"lengths": (75,)}
    a, offsets, _ = make(case)
    whole = ops.ssd_forward(**a, offsets=offsets)

    def dirty_state():
        state = new_state_of(case)()
        for name in ("x", "B", "dt"):
            state[name][...] = np.nan
        return state

    rng = np.random.default_rng(1)
    y, _ = run_alone_in_pieces(
        forward_of(a), 75, dirty_state, rng.integers(1, 30, 99), rng=rng, wrong_rows=75
    )
    np.testing.assert_array_equal(y, whole)


# ---- extremes and errors -------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [-50.0, 50.0, -200.0, 1e4])
@pytest.mark.parametrize("A_log", [-80.0, 0.0, 10.0, 100.0])
def test_extremes_stay_finite_and_right(bias, A_log):
    a, offsets, grad_y = make(BASE | {"lengths": (60, 3)})
    a["dt_bias"][:], a["A_log"][:] = bias, A_log
    a["dt"][::7] *= 30
    y = ops.ssd_forward(**a, offsets=offsets)
    with np.errstate(over="ignore", under="ignore"):
        assert_close(y, reference.forward(doubles(a), offsets), 1e-5)
    grads = ops.ssd_backward(**a, grad_y=grad_y, offsets=offsets)
    assert all(np.isfinite(g).all() for g in grads.values())


def test_a_long_sequence_keeps_its_digits():
    case = BASE | {
        "lengths": (5000,),
        "heads": 2,
        "x_heads": 2,
        "B_groups": 1,
        "C_groups": 1,
        "head_dim": 8,
        "state_dim": 8,
    }
    a, offsets, grad_y = make(case)
    a["A_log"][:] = -6  # a memory of some thousand tokens
    y = ops.ssd_forward(**a, offsets=offsets)
    assert_close(y, reference.forward(doubles(a), offsets), 2e-5)
    grads = ops.ssd_backward(**a, grad_y=grad_y, offsets=offsets)
    expected = reference.backward(doubles(a), grad_y.astype(np.float64), offsets)
    for name in expected:
        assert_close(grads[name], expected[name], 1e-4, name)


def test_a_large_step_in_a_window_keeps_the_digits_of_the_small_ones():
    """exp of a difference of sums would lose them: in float32, -1e6 - 0.51 + 1e6 is -0.5."""
    a, offsets, _ = make(BASE | {"lengths": (16,)})
    a["dt"][:], a["dt_bias"][:], a["A_log"][:] = -0.4327521, 0, 0  # softplus = 0.5
    a["dt"][3] = 1e6
    y = ops.ssd_forward(**a, offsets=offsets)
    assert_close(y, reference.forward(doubles(a), offsets), 1e-6)


def test_errors_name_the_argument():
    a, offsets, grad_y = make(BASE)
    with pytest.raises(ShapeError, match="B"):
        ops.ssd_forward(**(a | {"B": a["B"][:, :3]}), offsets=offsets)
    with pytest.raises(ArgumentError, match="dt_m"):
        ops.ssd_forward(**a, dt_min=2.0, dt_max=1.0, offsets=offsets)
    with pytest.raises((ShapeError, ArgumentError), match="offsets"):
        ops.ssd_forward(**a, offsets=[0, 5])
    with pytest.raises(ArgumentError, match="boundary"):
        ops.ssd_forward(
            **a,
            offsets=offsets,
            past=[5] * 4,
            boundary=[3] * 4,
            states=[new_state_of(BASE)() for _ in range(4)],
        )
