"""Gated activations: reference against finite differences, C against the reference and PyTorch.

Tolerance: an activation is some ten float32 operations; the relative part covers inputs of 10.
"""

import numpy as np
import pytest
from reference import glu as reference
from reference.differences import check

from mambainllama import ops

ACTIVATIONS = ["silu", "gelu", "gelu_tanh", "relu", "relu2"]
SHAPES = [(1, 1), (3, 17), (70, 512)]


def make(shape, dtype=np.float32):
    rng = np.random.default_rng(2)
    gate, up, grad_y = (rng.normal(size=shape).astype(dtype) for _ in range(3))
    return gate * dtype(3), up, grad_y


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_backward_is_the_gradient(activation):
    gate, up, grad_y = make((4, 5), np.float64)
    grads = reference.backward(gate, up, grad_y, activation)
    arrays = {"grad_gate": gate, "grad_up": up}
    check(lambda: (reference.forward(gate, up, activation) * grad_y).sum(), arrays, grads)
    check(
        lambda: (reference.forward(gate, None, activation) * grad_y).sum(),
        {"grad_gate": gate},
        reference.backward(gate, None, grad_y, activation),
    )


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_and_backward_against_reference(activation, shape, gated):
    gate, up, grad_y = make(shape)
    up = up if gated else None
    wide = [None if a is None else a.astype(np.float64) for a in (gate, up, grad_y)]
    y = ops.glu_forward(gate, up, activation=activation)
    np.testing.assert_allclose(y, reference.forward(*wide[:2], activation), atol=2e-6, rtol=2e-6)
    grads = ops.glu_backward(gate, up, grad_y, activation=activation)
    for name, expected in reference.backward(*wide, activation).items():
        np.testing.assert_allclose(grads[name], expected, atol=3e-6, rtol=3e-6, err_msg=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extremes(activation):
    """Far out the activations are 0 and x (relu2: x^2), and nothing overflows on the way."""
    gate = np.array([[-3e4, -1e4, -200, -90, 0, 90, 200, 1e4, 3e4]], np.float32)
    y = ops.glu_forward(gate, activation=activation)
    positive = np.maximum(gate, 0)
    np.testing.assert_allclose(y, positive**2 if activation == "relu2" else positive, atol=1e-30)
    grads = ops.glu_backward(gate, np.ones_like(gate), np.ones_like(gate), activation=activation)
    assert np.isfinite(grads["grad_gate"]).all() and np.isfinite(grads["grad_up"]).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_pytorch_autograd(activation):
    torch = pytest.importorskip("torch")
    function = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "relu": torch.relu,
        "relu2": lambda x: torch.relu(x) ** 2,
    }[activation]
    gate, up, grad_y = make((8, 33))
    tg, tu = torch.tensor(gate, requires_grad=True), torch.tensor(up, requires_grad=True)
    out = function(tg) * tu
    out.backward(torch.tensor(grad_y))
    grads = ops.glu_backward(gate, up, grad_y, activation=activation)
    np.testing.assert_allclose(
        ops.glu_forward(gate, up, activation=activation), out.detach().numpy(), atol=5e-6
    )
    np.testing.assert_allclose(grads["grad_gate"], tg.grad.numpy(), atol=5e-6)
    np.testing.assert_allclose(grads["grad_up"], tu.grad.numpy(), atol=5e-6)


def test_in_place():
    gate, up, _ = make((5, 40))
    expected = ops.glu_forward(gate, up)
    assert ops.glu_forward(gate, up, out=gate) is gate
    assert np.array_equal(gate, expected)
