"""RMSNorm: reference against finite differences, C against the reference and PyTorch.

Tolerances: a row is a handful of float32 operations on numbers of size 1 (2e-6); grad_weight sums
over rows (2e-5).
"""

import numpy as np
import pytest
from reference import norm as reference
from reference.differences import check
from stepping import assert_same_bits, in_teams

from mambainllama import ops
from mambainllama.errors import ShapeError

BASE = {"rows": 70, "width": 48, "group": 16, "gate": None, "weight": "full", "eps": 1e-5}
CHANGES = [
    {},
    {"rows": 1},
    {"rows": 33, "width": 2048, "group": 2048},
    {"width": 1, "group": 1},
    {"width": 21, "group": 7},
    {"group": 48},
    {"gate": "first"},
    {"gate": "last"},
    {"gate": "first", "width": 62, "group": 31},
    {"weight": None},
    {"weight": "group"},
    {"weight": "group", "gate": "last"},
    {"weight": None, "gate": "first"},
    {"eps": 0.1},
    {"rows": 300, "width": 384, "group": 64, "gate": "first"},
]


def make(case, dtype=np.float32):
    rng = np.random.default_rng(1)
    shape = (case["rows"], case["width"])
    x, z, grad_y = (rng.normal(size=shape).astype(dtype) for _ in range(3))
    size = {"full": case["width"], "group": case["group"]}.get(case["weight"])
    weight = None if size is None else rng.normal(size=size).astype(dtype)
    options = {
        "z": None if case["gate"] is None else z,
        "group": case["group"],
        "norm_before_gate": case["gate"] == "last",
        "weight_per_group": case["weight"] == "group",
        "eps": case["eps"],
    }
    return x, weight, grad_y, options


def doubles(options):
    return options | {"z": None if options["z"] is None else options["z"].astype(np.float64)}


@pytest.mark.parametrize("gate", [None, "first", "last"])
@pytest.mark.parametrize("weight", ["full", "group"])
def test_reference_backward_is_the_gradient(gate, weight):
    case = BASE | {"rows": 3, "width": 6, "group": 3, "gate": gate, "weight": weight}
    x, w, grad_y, options = make(case, np.float64)
    grads = reference.backward(x, w, grad_y, **options)
    arrays = {"grad_x": x, "grad_weight": w} | ({} if gate is None else {"grad_z": options["z"]})
    check(lambda: (reference.forward(x, w, **options) * grad_y).sum(), arrays, grads)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_forward_and_backward_against_reference(change):
    x, weight, grad_y, options = make(BASE | change)
    wide = [None if a is None else a.astype(np.float64) for a in (x, weight, grad_y)]
    expected = reference.forward(*wide[:2], **doubles(options))
    y = ops.norm_forward(x, weight, **options)
    np.testing.assert_allclose(y, expected, atol=2e-6, rtol=2e-6)
    grads = ops.norm_backward(x, weight, grad_y, **options)
    for name, expected in reference.backward(*wide, **doubles(options)).items():
        np.testing.assert_allclose(grads[name], expected, atol=2e-5, rtol=2e-5, err_msg=name)


def test_against_pytorch():
    torch = pytest.importorskip("torch")
    x, weight, grad_y, _ = make(BASE | {"group": 48})
    tx, tw = torch.tensor(x, requires_grad=True), torch.tensor(weight, requires_grad=True)
    ty = torch.nn.functional.rms_norm(tx, (48,), tw, 1e-5)
    ty.backward(torch.tensor(grad_y))
    grads = ops.norm_backward(x, weight, grad_y)
    np.testing.assert_allclose(ops.norm_forward(x, weight), ty.detach().numpy(), atol=2e-6)
    np.testing.assert_allclose(grads["grad_x"], tx.grad.numpy(), atol=5e-6)
    np.testing.assert_allclose(grads["grad_weight"], tw.grad.numpy(), atol=2e-5)


def test_in_place_and_added():
    x, weight, grad_y, options = make(BASE | {"gate": "first"})
    expected = ops.norm_forward(x, weight, **options)
    same = x.copy()
    assert ops.norm_forward(same, weight, out=same, **options) is same
    assert np.array_equal(same, expected)

    plain = ops.norm_backward(x, weight, grad_y, **options)
    out = {"grad_x": np.ones_like(x), "grad_weight": np.ones_like(weight)}
    added = ops.norm_backward(x, weight, grad_y, accumulate=True, out=out, **options)
    assert np.array_equal(added["grad_x"], plain["grad_x"] + 1)
    np.testing.assert_allclose(added["grad_weight"], plain["grad_weight"] + 1, rtol=1e-6)


def test_rows_and_threads_do_not_change_bits():
    x, weight, grad_y, options = make(
        BASE | {"rows": 500, "width": 192, "group": 64, "gate": "first"}
    )
    z = options.pop("z")
    y = ops.norm_forward(x, weight, z=z, **options)
    assert np.array_equal(ops.norm_forward(x[7:8], weight, z=z[7:8], **options), y[7:8])
    assert_same_bits(in_teams(lambda: ops.norm_backward(x, weight, grad_y, z=z, **options)))


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e4, 1e15])
def test_extremes_stay_finite(size):
    x, weight, grad_y, options = make(BASE | {"gate": "first"})
    options["z"] = options["z"] * np.float32(100)
    x = x * np.float32(size)
    assert np.isfinite(ops.norm_forward(x, weight, **options)).all()
    grads = ops.norm_backward(x, weight, grad_y, **options)
    assert all(np.isfinite(g).all() for g in grads.values())


def test_error_messages():
    with pytest.raises(ShapeError, match="group = 5"):
        ops.norm_forward(np.ones((2, 8), np.float32), group=5)
