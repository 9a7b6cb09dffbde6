"""Attention: reference against finite differences, C against the reference and PyTorch, and bits.

Tolerances: outputs are averages of numbers of size 1 whose weights carry a float32 exponential and
scores of up to `head_dim` products, so 2e-6 is some ten roundings; gradients sum over up to a
thousand rows, 2e-5.  What must not depend on how rows arrive is compared bit for bit.
"""

import numpy as np
import pytest
from reference import attention as reference
from reference.differences import check
from stepping import assert_same_bits, in_teams

from mambainllama import ops
from mambainllama.dtypes import from_float32, to_float32
from mambainllama.errors import ShapeError

BASE = {"lengths": (37, 1, 90), "heads": 4, "kv_heads": 2, "head_dim": 16, "window": 0}
CHANGES = [
    {},
    {"lengths": (1,)},
    {"lengths": (63,)},
    {"lengths": (64,)},
    {"lengths": (65,)},
    {"lengths": (130, 0, 7)},
    {"lengths": (700,)},
    {"heads": 2},
    {"heads": 6, "kv_heads": 1},
    {"heads": 64, "kv_heads": 1, "head_dim": 4},
    {"head_dim": 1},
    {"head_dim": 5},
    {"head_dim": 24},
    {"head_dim": 128},
    {"window": 1},
    {"window": 7},
    {"window": 64},
    {"window": 1000},
    {"lengths": (700, 600), "window": 100},
]


def make(case, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    rows, heads, kv_heads, head_dim = (
        sum(case["lengths"]),
        *(case[n] for n in ("heads", "kv_heads", "head_dim")),
    )
    q, grad_y = (rng.normal(size=(rows, heads, head_dim)).astype(np.float32) for _ in range(2))
    k, v = (rng.normal(size=(rows, kv_heads, head_dim)).astype(np.float32) for _ in range(2))
    return q * np.float32(spread), k, v, grad_y, np.concatenate([[0], np.cumsum(case["lengths"])])


def doubles(*arrays):
    return [a.astype(np.float64) for a in arrays]


@pytest.mark.parametrize("window", [0, 3])
def test_reference_backward_is_the_gradient(window):
    case = BASE | {"lengths": (5, 3), "head_dim": 3}
    q, k, v, grad_y, offsets = make(case)
    q, k, v, grad_y = doubles(q, k, v, grad_y)

    def loss():
        return (reference.forward(q, k, v, 0.7, offsets, window)[0] * grad_y).sum()

    grads = reference.backward(q, k, v, grad_y, 0.7, offsets, window)
    check(loss, {"q": q, "k": k, "v": v}, {n: grads["grad_" + n] for n in "qkv"})


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_forward_and_backward_against_reference(change):
    case = BASE | change
    q, k, v, grad_y, offsets = make(case)
    scale, window = case["head_dim"] ** -0.5, case["window"]
    y, log_sum_exp = ops.attention_forward(
        q, k, v, offsets=offsets, window=window, log_sum_exp=True
    )
    expected, expected_log = reference.forward(*doubles(q, k, v), scale, offsets, window)
    np.testing.assert_allclose(y, expected, atol=2e-6, rtol=2e-6)
    np.testing.assert_allclose(log_sum_exp, expected_log, atol=2e-6, rtol=2e-6)

    grads = ops.attention_backward(q, k, v, y, log_sum_exp, grad_y, offsets=offsets, window=window)
    for name, expected in reference.backward(
        *doubles(q, k, v, grad_y), scale, offsets, window
    ).items():
        np.testing.assert_allclose(grads[name], expected, atol=2e-5, rtol=2e-5, err_msg=name)


def test_against_pytorch_autograd():
    torch = pytest.importorskip("torch")
    q, k, v, grad_y, offsets = make(BASE | {"lengths": (150,)})
    y, log_sum_exp = ops.attention_forward(q, k, v, log_sum_exp=True)
    grads = ops.attention_backward(q, k, v, y, log_sum_exp, grad_y)
    tensors = [torch.tensor(a.swapaxes(0, 1), requires_grad=True) for a in (q, k, v)]
    tq, tk, tv = tensors
    out = torch.nn.functional.scaled_dot_product_attention(
        tq, tk, tv, is_causal=True, enable_gqa=True
    )
    out.backward(torch.tensor(grad_y.swapaxes(0, 1)))
    np.testing.assert_allclose(y, out.detach().numpy().swapaxes(0, 1), atol=2e-6)
    for name, tensor in zip(("grad_q", "grad_k", "grad_v"), tensors, strict=True):
        np.testing.assert_allclose(grads[name], tensor.grad.numpy().swapaxes(0, 1), atol=2e-5)


@pytest.mark.parametrize("spread", [1e-6, 100.0, 3000.0])
def test_extreme_scores_stay_finite(spread):
    """Scores up to some 1e4: one key wins, and its neighbours' probabilities underflow to 0."""
    q, k, v, grad_y, offsets = make(BASE, spread=spread)
    y, log_sum_exp = ops.attention_forward(q, k, v, offsets=offsets, log_sum_exp=True)
    grads = ops.attention_backward(q, k, v, y, log_sum_exp, grad_y, offsets=offsets)
    expected, _ = reference.forward(*doubles(q, k, v), 0.25, offsets)
    np.testing.assert_allclose(y, expected, atol=2e-6 + 2e-6 * spread)
    assert all(np.isfinite(g).all() for g in grads.values())


def test_rows_may_be_slices_of_a_wider_array():
    q, k, v, _, offsets = make(BASE)
    wide = np.concatenate(
        [q, k, v], axis=1
    )  # [rows, 8 heads, head_dim], as one projection leaves them
    got = ops.attention_forward(wide[:, :4], wide[:, 4:6], wide[:, 6:], offsets=offsets)
    assert np.array_equal(got, ops.attention_forward(q, k, v, offsets=offsets))


def test_threads_do_not_change_bits():
    """Few heads, many threads: forward is split along the keys, backward goes in two passes."""
    for lengths, heads, kv_heads, window in [
        ((1300,), 2, 1, 0),
        ((700, 90), 2, 2, 0),
        ((900,), 4, 1, 333),
    ]:
        case = BASE | {"lengths": lengths, "heads": heads, "kv_heads": kv_heads}
        q, k, v, grad_y, offsets = make(case)
        where = {"offsets": offsets, "window": window}

        def run(q=q, k=k, v=v, grad_y=grad_y, where=where):
            y, log_sum_exp = ops.attention_forward(q, k, v, **where, log_sum_exp=True)
            grads = ops.attention_backward(q, k, v, y, log_sum_exp, grad_y, **where)
            return grads | {"y": y, "log_sum_exp": log_sum_exp}

        assert_same_bits(in_teams(run))


# ---- caches ------------------------------------------------------------------------------------


def new_caches(count, capacity, case, dtype):
    types = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
    shape = (capacity, case["kv_heads"], case["head_dim"])
    poison = np.uint16(0x7FC0) if dtype == "bfloat16" else np.nan  # unwritten rows must not be read
    return [tuple(np.full(shape, poison, types[dtype]) for _ in range(2)) for _ in range(count)]


def run_cached(q, k, v, caches, dtype, offsets, past, window):
    name = dtype if dtype == "bfloat16" else None
    ops.kv_append(k, v, caches, cache_dtype=name, offsets=offsets, past=past)
    return ops.attention_forward(
        q, caches=caches, cache_dtype=name, offsets=offsets, past=past, window=window
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "change",
    [{}, {"window": 50}, {"heads": 2}, {"head_dim": 20}, {"heads": 6, "kv_heads": 3}],
    ids=str,
)
def test_prefill_decode_verify_and_batch_are_the_same_bits(dtype, change, threads):
    case = BASE | {"lengths": (1100, 260)} | change
    q, k, v, _, offsets = make(case)
    window = case["window"]
    whole = run_cached(q, k, v, new_caches(2, 1100, case, dtype), dtype, offsets, [0, 0], window)

    # Uneven steps of both sequences in a batch: prefill, single tokens, verify windows.
    caches, past = new_caches(2, 1100, case, dtype), np.array([0, 0])
    got = [[], []]
    for steps in [
        (500, 3),
        (11, 60),
        (1, 1),
        (1, 1),
        (5, 5),
        (62, 120),
        (1, 7),
        (17, 0),
        (502, 63),
    ]:
        rows = [slice(offsets[s] + past[s], offsets[s] + past[s] + steps[s]) for s in range(2)]
        parts = [np.concatenate([a[r] for r in rows]) for a in (q, k, v)]
        y = run_cached(*parts, caches, dtype, np.array([0, steps[0], sum(steps)]), past, window)
        got[0].append(y[: steps[0]])
        got[1].append(y[steps[0] :])
        past += steps
    assert list(past) == [1100, 260]
    assert np.array_equal(np.concatenate(got[0] + got[1]), whole)

    # A sequence alone.
    alone = run_cached(
        q[1100:], k[1100:], v[1100:], new_caches(1, 260, case, dtype), dtype, None, [0], window
    )
    assert np.array_equal(alone, whole[1100:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cache_holds_rounded_rows(dtype):
    case = BASE | {"lengths": (90,)}
    q, k, v, _, offsets = make(case)
    caches = new_caches(1, 95, case, dtype)
    y = run_cached(q, k, v, caches, dtype, None, [0], 0)
    if dtype == "bfloat16":
        assert np.array_equal(caches[0][0][:90], from_float32(k, dtype))
        k, v = (to_float32(from_float32(a, dtype), dtype) for a in (k, v))
    else:
        k, v = (a.astype(dtype).astype(np.float32) for a in (k, v))
        assert np.array_equal(caches[0][1][:90], v)
    assert np.isnan(caches[0][0][90:].astype(np.float32)).all() or dtype == "bfloat16"
    assert np.array_equal(y, ops.attention_forward(q, k, v))


def test_error_messages():
    q, k, v, _, _ = make(BASE | {"lengths": (4,)})
    with pytest.raises(ShapeError, match="kv_heads"):
        ops.attention_forward(np.zeros((4, 3, 16), np.float32), k, v)
    with pytest.raises(ValueError):
        ops.attention_forward(q, k[:3], v)
