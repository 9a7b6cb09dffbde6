"""Mamba-1's selective scan: reference proven, C against reference and PyTorch, and bits.

Tolerances: as in test_ssd.py.  How tokens arrive must not change a bit, with and without `current`,
the state after the last token.
"""

from itertools import pairwise

import numpy as np
import pytest
from reference import selective_scan as reference
from reference.conv1d import source_of
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
    "inner": 64,
    "state_dim": 16,
    "B_groups": 4,
    "C_groups": 4,
    "x_repeat": 1,
    "x_repeat_group": 1,
    "z": True,
}
CHANGES = [
    {},
    {"lengths": (1,)},
    {"lengths": (15,)},
    {"lengths": (31,)},
    {"lengths": (32,)},
    {"lengths": (33,)},
    {"lengths": (0, 100, 0, 3)},
    {"lengths": (211,)},
    {"z": False},
    {"B_groups": 1, "C_groups": 1},  # Mamba as published
    {"B_groups": 2},  # converted Llama with grouped heads
    {"inner": 40, "B_groups": 1, "C_groups": 1},
    {"inner": 60, "B_groups": 5, "C_groups": 3},
    {"inner": 6, "B_groups": 6, "C_groups": 2},
    {"state_dim": 1},
    {"state_dim": 7},
    {"state_dim": 33},
    {"x_repeat": 2, "x_repeat_group": 16},
    {"x_repeat": 4, "x_repeat_group": 2},
    {"dt_min": 0.05, "dt_max": 0.6},
    {"dt_bias_scale": 2.0},
]
PER_ROW = ("x", "dt", "B", "C", "z")


def make(case, seed=0):
    """Arguments of the operator as a dict, offsets and a gradient of y."""
    rng = np.random.default_rng(seed)
    rows, inner, state_dim = sum(case["lengths"]), case["inner"], case["state_dim"]

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    a = {
        "x": normal(rows, inner // case["x_repeat"]),
        "dt": normal(rows, inner),
        "B": normal(rows, case["B_groups"], state_dim) / np.float32(state_dim**0.5),
        "C": normal(rows, case["C_groups"], state_dim),
        "z": normal(rows, inner),
        "dt_bias": normal(inner) - 1,
        "A_log": rng.uniform(-3, 1.5, (inner, state_dim)).astype(np.float32),
        "D": normal(inner),
    }
    options = ("dt_min", "dt_max", "dt_bias_scale", "x_repeat", "x_repeat_group")
    a |= {name: case[name] for name in options if name in case}
    if not case["z"]:
        del a["z"]
    return a, offsets_of(case["lengths"]), normal(rows, inner)


def forward_of(a):
    fixed = {n: v for n, v in a.items() if n not in PER_ROW}
    moving = [n for n in PER_ROW if n in a]
    return lambda rows, **where: ops.scan_forward(
        **{n: a[n][rows] for n in moving}, **fixed, **where
    )


def new_state_of(case, current):
    return lambda: ops.scan_state(
        case["inner"],
        case["state_dim"],
        4,
        1,
        B_groups=case["B_groups"],
        x_repeat=case["x_repeat"],
        current=current,
    )


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"z": False},
        {"x_repeat": 2, "x_repeat_group": 1},
        {"dt_bias_scale": 2.0, "dt_min": 0.3, "dt_max": 0.8},
    ],
    ids=str,
)
def test_reference_backward_is_the_gradient(change):
    case = (
        BASE
        | {"lengths": (4, 3), "inner": 4, "state_dim": 3, "B_groups": 1, "C_groups": 2}
        | change
    )
    a, offsets, grad_y = make(case)
    a, grad_y = doubles(a), grad_y.astype(np.float64)
    grads = reference.backward(a, grad_y, offsets)
    arrays = {n: v for n, v in a.items() if isinstance(v, np.ndarray)}
    check(
        lambda: (reference.forward(a, offsets) * grad_y).sum(),
        arrays,
        {n: grads["grad_" + n] for n in arrays},
    )


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_forward_and_backward_against_reference(change):
    a, offsets, grad_y = make(BASE | change)
    y = ops.scan_forward(**a, offsets=offsets)
    assert_close(y, reference.forward(doubles(a), offsets), 5e-6, "y")
    grads = ops.scan_backward(**a, grad_y=grad_y, offsets=offsets)
    expected = reference.backward(doubles(a), grad_y.astype(np.float64), offsets)
    assert grads.keys() == expected.keys()
    for name in expected:
        assert_close(grads[name], expected[name], 3e-5, name)


def test_gradient_is_that_of_torch():
    torch = pytest.importorskip("torch", reason="torch is the judge here")
    case = BASE | {
        "lengths": (21,),
        "B_groups": 2,
        "x_repeat": 2,
        "x_repeat_group": 16,
        "dt_bias_scale": 2.0,
    }
    a, offsets, grad_y = make(case)
    leaves = {
        n: torch.tensor(v, dtype=torch.float64, requires_grad=True)
        for n, v in a.items()
        if isinstance(v, np.ndarray)
    }
    x = leaves["x"][:, torch.from_numpy(source_of(64, 2, 16))]
    B, C = leaves["B"].repeat_interleave(32, dim=1), leaves["C"].repeat_interleave(16, dim=1)
    dt = torch.nn.functional.softplus(leaves["dt"] + 2 * leaves["dt_bias"])
    A, H, loss = -leaves["A_log"].exp(), 0, 0
    for t in range(21):
        H = torch.exp(dt[t][:, None] * A) * H + (dt[t] * x[t])[:, None] * B[t]
        y = ((H * C[t]).sum(dim=1) + leaves["D"] * x[t]) * torch.nn.functional.silu(leaves["z"][t])
        loss = loss + (y * torch.from_numpy(grad_y[t])).sum()
    loss.backward()
    grads = ops.scan_backward(**a, grad_y=grad_y, offsets=offsets)
    for name, leaf in leaves.items():
        assert_close(grads["grad_" + name], leaf.grad.numpy(), 3e-5, name)


def test_parameter_gradients_add_and_others_overwrite():
    a, offsets, grad_y = make(BASE)
    new = ops.scan_backward(**a, grad_y=grad_y, offsets=offsets)
    old = {n: np.full_like(v, 3) for n, v in new.items()}
    ops.scan_backward(**a, grad_y=grad_y, offsets=offsets, out=old)
    for name, value in new.items():
        adds = name in ("grad_dt_bias", "grad_A_log", "grad_D")
        np.testing.assert_array_equal(old[name], np.float32(3) + value if adds else value)


def test_rows_may_lie_in_a_wider_array():
    a, offsets, grad_y = make(BASE)
    expected = ops.scan_forward(**a, offsets=offsets)
    grads = ops.scan_backward(**a, grad_y=grad_y, offsets=offsets)
    for name in ("x", "dt", "z"):
        wide = np.full((len(a[name]), 64 + 5), np.nan, np.float32)
        wide[:, 2:66] = a[name]
        a[name] = wide[:, 2:66]
    guarded = np.full((len(a["x"]), 64 + 2), 7, np.float32)
    ops.scan_forward(**a, offsets=offsets, out=guarded[:, 1:65])
    np.testing.assert_array_equal(guarded[:, 1:65], expected)
    assert (guarded[:, [0, 65]] == 7).all()
    for name, value in ops.scan_backward(**a, grad_y=grad_y, offsets=offsets).items():
        np.testing.assert_array_equal(value, grads[name])


# ---- bits ----------------------------------------------------------------------------------------

SHAPES = [
    {},
    {"B_groups": 2, "x_repeat": 2, "x_repeat_group": 16},
    {"inner": 40, "B_groups": 1, "C_groups": 1, "state_dim": 5, "z": False},
]


@pytest.mark.parametrize("current", [False, True])
@pytest.mark.parametrize("change", SHAPES, ids=str)
def test_pieces_give_the_bits_of_the_whole(change, current):
    case = BASE | {"lengths": (131,)} | change
    a, offsets, _ = make(case)
    rng = np.random.default_rng(3)
    whole = ops.scan_forward(**a, offsets=offsets)
    for cuts in cuts_to_try(rng):
        y, _ = run_alone_in_pieces(forward_of(a), 131, new_state_of(case, current), cuts)
        np.testing.assert_array_equal(y, whole)


@pytest.mark.parametrize("current", [False, True])
@pytest.mark.parametrize("change", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_what_was_taken_back_never_happened(change, current, seed):
    case = BASE | {"lengths": (90,)} | change
    a, offsets, _ = make(case, seed)
    rng = np.random.default_rng(seed)
    y, _ = run_alone_in_pieces(
        forward_of(a),
        90,
        new_state_of(case, current),
        rng.integers(1, 20, 99),
        rng=rng,
        wrong_rows=90,
    )
    np.testing.assert_array_equal(y, ops.scan_forward(**a, offsets=offsets))


def test_states_are_the_same_bits_however_tokens_came():
    case = BASE | {"lengths": (75,)}
    a, _, _ = make(case)
    rng = np.random.default_rng(0)
    ends = []
    for current in (False, True):
        for cuts in (np.ones(75), rng.integers(1, 9, 75)):
            _, stepper = run_alone_in_pieces(forward_of(a), 75, new_state_of(case, current), cuts)
            ends.append(stepper.states[0]["state"])
            assert stepper.boundary == [64]
    for other in ends[1:]:
        np.testing.assert_array_equal(ends[0], other)


def test_a_batch_gives_the_bits_of_each_alone():
    case = BASE | {"lengths": (40, 3, 75, 16, 33)}
    a, offsets, grad_y = make(case)
    rng = np.random.default_rng(5)
    pieces = run_together_in_pieces(forward_of(a), case["lengths"], new_state_of(case, True), rng)
    together = ops.scan_forward(**a, offsets=offsets)
    np.testing.assert_array_equal(pieces, together)
    grads = ops.scan_backward(**a, grad_y=grad_y, offsets=offsets)
    for first, end in pairwise(offsets):
        own = {n: v[first:end] if n in PER_ROW else v for n, v in a.items()}
        alone = ops.scan_backward(**own, grad_y=grad_y[first:end])
        for name in PER_ROW:
            np.testing.assert_array_equal(grads["grad_" + name][first:end], alone["grad_" + name])


def test_threads_do_not_change_a_bit():
    a, offsets, grad_y = make(
        BASE | {"lengths": (70, 150), "B_groups": 2, "x_repeat": 2, "x_repeat_group": 16}
    )

    def run():
        grads = ops.scan_backward(**a, grad_y=grad_y, offsets=offsets)
        return grads | {"y": ops.scan_forward(**a, offsets=offsets)}

    assert_same_bits(in_teams(run))


def test_what_lies_in_unused_memory_does_not_matter():
    case = BASE | {"lengths": (75,)}
    a, offsets, _ = make(case)

    def dirty_state():
        state = new_state_of(case, False)()
        for name in ("x", "B", "dt"):
            state[name][...] = np.nan
        return state

    rng = np.random.default_rng(1)
    y, _ = run_alone_in_pieces(
        forward_of(a), 75, dirty_state, rng.integers(1, 30, 99), rng=rng, wrong_rows=75
    )
    np.testing.assert_array_equal(y, ops.scan_forward(**a, offsets=offsets))


# ---- extremes and errors -------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [-50.0, 50.0, -200.0, 1e4])
@pytest.mark.parametrize("A_log", [-80.0, 0.0, 10.0, 100.0])
def test_extremes_stay_finite_and_right(bias, A_log):
    a, offsets, grad_y = make(BASE | {"lengths": (60, 3)})
    a["dt_bias"][:], a["A_log"][:] = bias, A_log
    a["dt"][::7] *= 30
    y = ops.scan_forward(**a, offsets=offsets)
    with np.errstate(over="ignore", under="ignore"):
        assert_close(y, reference.forward(doubles(a), offsets), 1e-5)
    grads = ops.scan_backward(**a, grad_y=grad_y, offsets=offsets)
    assert all(np.isfinite(g).all() for g in grads.values())


def test_a_long_sequence_keeps_its_digits():
    case = BASE | {"lengths": (5000,), "inner": 8, "B_groups": 1, "C_groups": 1, "state_dim": 4}
    a, offsets, grad_y = make(case)
    a["A_log"][:] = -6
    assert_close(
        ops.scan_forward(**a, offsets=offsets), reference.forward(doubles(a), offsets), 2e-5
    )
    grads = ops.scan_backward(**a, grad_y=grad_y, offsets=offsets)
    expected = reference.backward(doubles(a), grad_y.astype(np.float64), offsets)
    for name in expected:
        assert_close(grads[name], expected[name], 1e-4, name)


def test_errors_name_the_argument():
    a, offsets, _ = make(BASE)
    with pytest.raises(ShapeError, match="B"):
        ops.scan_forward(**(a | {"B": a["B"][:, :3]}), offsets=offsets)
    with pytest.raises(ShapeError, match="x"):
        ops.scan_forward(**(a | {"x_repeat": 3}), offsets=offsets)
    with pytest.raises(ArgumentError, match="dt_m"):
        ops.scan_forward(**a, dt_min=2.0, dt_max=1.0, offsets=offsets)
    with pytest.raises(ArgumentError, match="boundary"):
        ops.scan_forward(
            **a,
            offsets=offsets,
            past=[40] * 4,
            boundary=[0] * 4,
            states=[new_state_of(BASE, True)() for _ in range(4)],
        )
