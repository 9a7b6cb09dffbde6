"""Weights of 8 bits: the format's reference, and which matrices become them.

`quantize` is plain NumPy; here it is held against PyTorch's float8 and against exhaustive search.
tests/gpu/test_dense.cu holds the device's codes against the same rule, and tests/test_cuda.py whole
models against `rounded`.
"""

import numpy as np
import pytest
from core_models import KINDS, configuration
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import mambainllama as mil
from mambainllama import _core
from mambainllama.quantize import check_kind, coded, quantize, rounded

FLOAT8 = np.array(
    [m * 2.0**-9 for m in range(8)]
    + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)][:-1]
)  # the last would be NaN


def some_weights(rows=40, columns=130, seed=0):
    random = np.random.default_rng(seed)
    values = random.standard_normal((rows, columns)) * np.exp(3 * random.standard_normal((rows, 1)))
    values[3] = 0
    values[5, 7] = 1000 * np.abs(values[5]).max()
    return values.astype(np.float32)


def nearest(values, choices):
    """The closest choice, the even one of two (choices are all codes in order)."""
    distance = np.abs(np.abs(values)[..., None] - choices)
    first = distance.argmin(-1)
    after = np.minimum(first + 1, len(choices) - 1)
    tie = np.take_along_axis(distance, after[..., None], -1)[..., 0] == distance.min(-1)
    pick = np.where(tie & (after > first) & (first % 2 == 1), after, first)
    return np.copysign(choices[pick], values)


def test_float8_is_the_nearest_code():
    values = some_weights()
    codes, scale = quantize(values, "float8")
    np.testing.assert_array_equal(codes, nearest(values / scale[:, None], FLOAT8))
    assert (np.log2(scale) % 1 == 0).all()
    largest = np.abs(codes).max(1)
    assert ((largest > 224 - 8) & (largest <= 448))[np.abs(values).max(1) > 0].all()


def test_float8_is_pytorchs():
    torch = pytest.importorskip("torch")
    values = some_weights()
    codes, scale = quantize(values, "float8")
    theirs = torch.tensor(values / scale[:, None]).to(torch.float8_e4m3fn).to(torch.float32)
    np.testing.assert_array_equal(codes, theirs.numpy())


def test_int8_is_the_nearest_code():
    values = some_weights()
    codes, scale = quantize(values, "int8")
    np.testing.assert_array_equal(codes, nearest(values / scale[:, None], np.arange(128.0)))
    assert np.abs(codes).max() == 127


@pytest.mark.parametrize("kind", ["float8", "int8"])
@given(
    values=arrays(
        np.float32, (3, 5), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
    )
)
def test_any_finite_values(kind, values):
    codes, scale = quantize(values, kind)
    assert np.isfinite(codes).all() and np.isfinite(scale).all() and (scale > 0).all()
    error = np.abs(codes.astype(np.float64) * scale[:, None].astype(np.float64) - values)
    largest = np.abs(values).max(1, keepdims=True).astype(np.float64)
    bound = (
        largest / 254 if kind == "int8" else np.maximum(np.abs(values) / 16.0, largest * 2.0**-17)
    )
    assert (error <= np.maximum(bound * 1.000001, 2.0**-126 * 448)).all()


@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf])
def test_strange_values_are_refused(strange):
    values = some_weights()
    values[1, 2] = strange
    with pytest.raises(mil.ArgumentError, match="NaN or infinite"):
        rounded(values, "int8")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_matrices_alone_become_codes(kind, tied):
    specs = _core.Model.parameter_specs(configuration(KINDS[kind], tied=tied))
    names = {name for name, *_ in specs}
    found = coded(specs, names, "int8")
    assert all(matrix for name, _, matrix, _ in specs if name in found)
    left = {name for name, _, matrix, _ in specs if matrix} - set(found)
    small = {name for name in names if name.endswith((".x_proj.weight", ".dt_proj.weight"))}
    assert left == ({"model.embed_tokens.weight"} if "lm_head.weight" in names else set()) | small
    assert coded(specs, names, None) == {}


def test_words():
    assert check_kind("float8", "cuda:0") == "float8" and check_kind(None, "cpu") is None
    with pytest.raises(mil.ArgumentError, match="float8"):
        check_kind("int4", "cuda:0")


def test_not_on_the_cpu(tmp_path):
    with pytest.raises(mil.UnsupportedError, match="cuda"):
        mil.load(tmp_path, device="cpu", weights="int8")
    with pytest.raises(mil.UnsupportedError, match="cuda"):
        mil.memory_plan(tmp_path, device="cpu", weights="int8")
