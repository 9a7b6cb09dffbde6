"""The fused distillation loss against direct computation, differences and PyTorch; relative_mse.

Tolerances: a row's loss carries float32 logits (hidden products) and exponentials, some 1e-6 of its
size; sums of gradients over rows and vocabulary 1e-5 of the largest.
"""

import numpy as np
import pytest
from reference import loss as reference
from reference.differences import check
from stepping import in_teams

from mambainllama import ops
from mambainllama.dtypes import from_float32, to_float32
from mambainllama.errors import ArgumentError

BASE = {
    "rows": 37,
    "vocab": 301,
    "hidden": 24,
    "teacher_hidden": 40,
    "labels": True,
    "weights": True,
    "padding": 0,
}
INTEGERS = ("labels", "top_tokens")
OPTIONS = {"kl_weight": 0.7, "ce_weight": 0.3, "scale": 0.25}
CHANGES = [
    ({}, {}),
    ({}, {"direction": "reverse"}),
    ({}, {"direction": "jsd"}),
    ({}, {"direction": "jsd", "mix": 0.05, "temperature": 2.0}),
    ({"signed": True}, {}),
    ({"top": 5}, {}),
    ({"top": 5}, {"direction": "reverse", "ce_weight": 0.0}),
    ({"top": 8, "labels": False}, {"direction": "jsd", "mix": 0.3, "logit_scale": 0.4}),
    ({"top": 301, "signed": True}, {}),
    ({}, {"temperature": 2.5}),
    ({}, {"temperature": 0.5, "direction": "reverse"}),
    ({}, {"logit_scale": 0.3, "teacher_logit_scale": 1.7}),
    ({}, {"kl_weight": 0.0}),
    ({}, {"ce_weight": 0.0, "temperature": 3.0}),
    ({"labels": False}, {}),
    ({"labels": False}, {"direction": "reverse", "temperature": 2.0}),
    ({"weights": False}, {}),
    ({"teacher_hidden": 0}, {"kl_weight": 0.0}),
    ({"teacher_hidden": 0, "weights": False}, {"kl_weight": 0.0, "logit_scale": 2.0}),
    ({"padding": 19}, {}),
    ({"rows": 1}, {}),
    ({"vocab": 1}, {}),
    ({"vocab": 7, "hidden": 1, "teacher_hidden": 1}, {}),
    ({"vocab": 4096, "rows": 70, "hidden": 64}, {}),
    ({"rows": 2500, "vocab": 33}, {}),  # more rows than one block
    (
        {"rows": 140, "vocab": 33001, "hidden": 8, "teacher_hidden": 4, "weights": False},
        {},
    ),  # blocks cut by their bytes
]


def make(case, dtype=np.float32, spread=1.0):
    rng = np.random.default_rng(8)
    rows, vocab, stored = case["rows"], case["vocab"], case["vocab"] + case["padding"]
    inputs = {
        "x": rng.normal(size=(rows, case["hidden"])),
        "weight": rng.normal(size=(stored, case["hidden"])) / case["hidden"] ** 0.5 * spread,
    }
    top = case.get("top", 0)
    if top:
        teacher = rng.normal(size=(rows, vocab)) * 2 * spread
        ranked = np.argsort(-teacher, axis=1)
        inputs["top_tokens"] = ranked[:, :top].astype(np.int32)
        logs = np.take_along_axis(reference.log_softmax(teacher), ranked, axis=1)
        others = np.exp(logs[:, top:]).sum(axis=1, keepdims=True)
        with np.errstate(divide="ignore"):
            inputs["top_logprobs"] = np.concatenate([logs[:, :top], np.log(others)], axis=1)
    elif case["teacher_hidden"]:
        inputs["teacher_x"] = rng.normal(size=(rows, case["teacher_hidden"]))
        inputs["teacher_weight"] = rng.normal(size=(stored, case["teacher_hidden"])) * 0.3 * spread
    if case["labels"]:
        inputs["labels"] = np.where(rng.random(rows) < 0.3, -100, rng.integers(0, vocab, rows))
    if case["weights"]:
        least = -2 if case.get("signed") else 0
        inputs["row_weight"] = rng.integers(least, 3, rows).astype(np.float64)
    return {n: a if n in INTEGERS else a.astype(dtype) for n, a in inputs.items()}


def doubles(inputs):
    return {n: a if n in INTEGERS else a.astype(np.float64) for n, a in inputs.items()}


def assert_equals_reference(got, expected):
    for name in ("kl", "ce", "teacher_ce"):
        assert got[name] == pytest.approx(expected[name], rel=3e-6, abs=1e-5), name
    for name in ("kl_rows", "ce_rows", "agree", "correct"):
        assert got[name] == expected[name], name
    for name in ("grad_x", "grad_weight"):
        size = max(1e-3, np.abs(expected[name]).max())
        np.testing.assert_allclose(got[name] / size, expected[name] / size, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("top", [0, 3])
def test_reference_backward_is_the_gradient(direction, top):
    small = {"rows": 5, "vocab": 9, "hidden": 3, "teacher_hidden": 4, "padding": 1, "top": top}
    inputs = make(BASE | small | {"signed": True}, np.float64)
    options = OPTIONS | {"direction": direction, "mix": 0.2, "logit_scale": 1.3, "vocab": 9}
    options["temperature"] = 1.0 if top else 1.7
    grads = reference.linear_loss(**inputs, **options)
    check(
        lambda: reference.linear_loss(**inputs, **options)["loss"],
        {"grad_x": inputs["x"], "grad_weight": inputs["weight"]},
        grads,
    )


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_against_direct_computation(change):
    case, options = BASE | change[0], OPTIONS | change[1]
    if case["padding"]:
        options["vocab"] = case["vocab"]
    inputs = make(case)
    expected = reference.linear_loss(**doubles(inputs), **options)
    got = ops.linear_loss(**inputs, **options)
    assert_equals_reference(got, expected)

    only_sums = ops.linear_loss(**inputs, **options, gradients=False)
    assert "grad_x" not in only_sums
    assert only_sums["kl"] == got["kl"] and only_sums["ce"] == got["ce"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_16_bits(dtype):
    inputs = make(BASE)
    stored = {n: from_float32(inputs[n], dtype) for n in ("weight", "teacher_weight")}
    name = "bfloat16" if dtype == "bfloat16" else None
    got = ops.linear_loss(**(inputs | stored), **OPTIONS, dtype=name, teacher_dtype=name)
    rounded = {n: to_float32(a, dtype) for n, a in stored.items()}
    assert_equals_reference(got, reference.linear_loss(**doubles(inputs | rounded), **OPTIONS))


@pytest.mark.slow
def test_large_weights_of_16_bits_are_widened_in_panels():
    """135 million weights, all but a few rows zero, so that the float64 judge stays small."""
    rng = np.random.default_rng(10)
    vocab, hidden, some = 131_500, 1031, rng.choice(131_500, 40, replace=False)
    x = rng.normal(size=(3, hidden)).astype(np.float32)
    weight = np.zeros((vocab, hidden), np.uint16)
    rows = from_float32(rng.normal(size=(40, hidden)).astype(np.float32) / 10, "bfloat16")
    weight[some] = rows
    labels = some[:3]
    got = ops.linear_loss(
        x, weight, labels=labels, ce_weight=1.0, dtype="bfloat16", out={"grad_weight": None}
    )
    z = np.zeros((3, vocab))
    z[:, some] = x.astype(np.float64) @ to_float32(rows, "bfloat16").T
    log_p = reference.log_softmax(z)
    assert got["ce"] == pytest.approx(-log_p[np.arange(3), labels].sum(), rel=1e-6)
    grad_z = np.exp(log_p)
    grad_z[np.arange(3), labels] -= 1
    expected = grad_z[:, some] @ to_float32(rows, "bfloat16")
    np.testing.assert_allclose(got["grad_x"], expected, atol=1e-6)


def test_skipped_rows_and_added_gradients():
    """Rows of weight 0 may hold anything; grad_weight is added to, and may be left out."""
    inputs = make(BASE)
    got = ops.linear_loss(**inputs, **OPTIONS)
    skipped = inputs["row_weight"] == 0
    inputs["x"][skipped] = np.nan
    out = {"grad_x": np.full_like(inputs["x"], 7), "grad_weight": np.ones_like(inputs["weight"])}
    again = ops.linear_loss(**inputs, **OPTIONS, out=out)
    assert again["kl"] == got["kl"]
    assert (again["grad_x"][skipped] == 0).all()
    assert np.array_equal(again["grad_x"], got["grad_x"])
    np.testing.assert_allclose(again["grad_weight"], got["grad_weight"] + 1, rtol=1e-6)
    frozen = ops.linear_loss(**inputs, **OPTIONS, out={"grad_weight": None})
    assert "grad_weight" not in frozen or frozen["grad_weight"] is None
    assert np.array_equal(frozen["grad_x"], got["grad_x"])


def test_nothing_to_learn_from():
    inputs = make(BASE)
    inputs["row_weight"][:] = 0
    got = ops.linear_loss(**inputs, **OPTIONS)
    assert got["kl"] == got["ce"] == got["kl_rows"] == 0
    assert not got["grad_x"].any() and not got["grad_weight"].any()


def test_same_model_has_no_divergence():
    inputs = make(BASE)
    inputs |= {"teacher_x": inputs["x"], "teacher_weight": inputs["weight"]}
    for direction in ("forward", "reverse", "jsd"):
        got = ops.linear_loss(**inputs, kl_weight=1.0, ce_weight=0.0, direction=direction)
        assert got["kl"] == pytest.approx(0, abs=1e-5) and got["agree"] == got["kl_rows"]
        assert direction == "jsd" or got["kl"] == 0
        assert np.abs(got["grad_x"]).max() < 1e-6


def test_stored_tokens_bound_the_divergence():
    """More stored tokens tell more of it; all of them tell all."""
    whole = make(BASE | {"top": 301, "labels": False})
    teacher = np.full((37, 301), -np.inf)
    np.put_along_axis(teacher, whole["top_tokens"], whole["top_logprobs"][:, :301], axis=1)
    student = reference.log_softmax(whole["x"].astype(np.float64) @ whole["weight"].T)
    exact = whole["row_weight"] @ (np.exp(teacher) * (teacher - student)).sum(axis=1)
    found = []
    for top in (1, 4, 30, 300, 301):
        inputs = make(BASE | {"top": top, "labels": False})
        found.append(ops.linear_loss(**inputs, gradients=False)["kl"])
    assert sorted(found) == found
    assert found[-1] == pytest.approx(exact, rel=1e-6)
    assert found[-2] == pytest.approx(exact, rel=1e-6)  # one token in the bucket is told apart


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_extreme_stored_tokens_stay_finite(direction):
    """The stored tokens hold all probability for one side, next to none for the other."""
    inputs = make(BASE | {"top": 4, "labels": False}, spread=1e4)
    got = ops.linear_loss(**inputs, direction=direction)
    assert np.isfinite(got["kl"]) and got["kl"] > 0
    assert np.isfinite(got["grad_x"]).all() and np.isfinite(got["grad_weight"]).all()
    inputs["top_logprobs"][2, 1] = np.nan
    assert np.isnan(ops.linear_loss(**inputs, direction=direction)["kl"])


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_extreme_logits_stay_finite(direction, temperature):
    """Logits of about 1e4: nearly every probability underflows."""
    inputs = make(BASE, spread=1e4)
    options = OPTIONS | {"direction": direction, "temperature": temperature}
    got = ops.linear_loss(**inputs, **options)
    expected = reference.linear_loss(**doubles(inputs), **options)
    # A divergence of 1e4 nats hides the logits' own rounding, 1e-3; one bounded by log 2 does not.
    close = 1e-3 if direction == "jsd" else 1e-5
    for name in ("kl", "ce"):
        assert got[name] == pytest.approx(expected[name], rel=close)
    assert np.isfinite(got["grad_x"]).all() and np.isfinite(got["grad_weight"]).all()


def test_threads_do_not_change_the_sums():
    inputs = make(BASE | {"rows": 200, "vocab": 1000})
    first, *others = in_teams(lambda: ops.linear_loss(**inputs, **OPTIONS))
    for other in others:
        assert other["kl"] == pytest.approx(first["kl"], rel=1e-6)
        np.testing.assert_allclose(other["grad_x"], first["grad_x"], atol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_against_pytorch_autograd(direction):
    torch = pytest.importorskip("torch")
    inputs = make(BASE | {"weights": False})
    x, weight = (torch.tensor(inputs[n], requires_grad=True) for n in ("x", "weight"))
    temperature, rows = 2.0, len(inputs["x"])
    student = x @ weight.T
    teacher = torch.tensor(inputs["teacher_x"]) @ torch.tensor(inputs["teacher_weight"]).T
    logs = [torch.log_softmax(z / temperature, dim=-1) for z in (student, teacher)]
    to, of = logs if direction == "forward" else logs[::-1]
    kl = torch.nn.functional.kl_div(to, of, log_target=True, reduction="sum")
    ce = torch.nn.functional.cross_entropy(student, torch.tensor(inputs["labels"]), reduction="sum")
    ((0.7 * temperature**2 * kl + 0.3 * ce) / rows).backward()
    options = {"kl_weight": 0.7, "ce_weight": 0.3, "scale": 1 / rows, "temperature": temperature}
    got = ops.linear_loss(**inputs, **options, direction=direction)
    assert got["kl"] == pytest.approx(kl.item(), rel=1e-5)
    assert got["ce"] == pytest.approx(ce.item(), rel=1e-5)
    np.testing.assert_allclose(got["grad_x"], x.grad.numpy(), atol=1e-6)
    np.testing.assert_allclose(got["grad_weight"], weight.grad.numpy(), atol=2e-6)


def test_error_messages():
    inputs = make(BASE)
    with pytest.raises(ArgumentError, match="temperature"):
        ops.linear_loss(**inputs, **OPTIONS, temperature=0.0)
    with pytest.raises(ArgumentError, match="mix = 1; expected"):
        ops.linear_loss(**inputs, **OPTIONS, direction="jsd", mix=1.0)
    stored = make(BASE | {"top": 3})
    with pytest.raises(ArgumentError, match="taken at temperature 1"):
        ops.linear_loss(**stored, temperature=2.0)
    with pytest.raises(ValueError, match="top_logprobs has 3 columns; expected 4"):
        ops.linear_loss(**(stored | {"top_logprobs": stored["top_logprobs"][:, :3].copy()}))
    with pytest.raises(ArgumentError, match="give both"):
        ops.linear_loss(**(stored | {"top_logprobs": None}))
    row = int(np.argmax(stored["row_weight"] != 0))
    stored["top_tokens"][row, 2] = stored["top_tokens"][row, 0]
    with pytest.raises(
        ArgumentError, match=rf"top_tokens\[{row}, 2\] = \d+; it stands there twice"
    ):
        ops.linear_loss(**stored)
    inputs["labels"][3] = 301
    with pytest.raises(ValueError, match="labels"):
        ops.linear_loss(**inputs, **OPTIONS)


# ---- relative error of hidden states ------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (5, 17), (300, 257)], ids=str)
def test_relative_mse(shape):
    rng = np.random.default_rng(9)
    x, target = rng.normal(size=(2, *shape)).astype(np.float32)
    expected = reference.relative_mse(x.astype(np.float64), target.astype(np.float64), 0.3)
    start = np.ones_like(x)
    got = ops.relative_mse(x, target, weight=0.3, out={"grad_x": start})
    assert got["value"] == pytest.approx(expected["value"], rel=1e-6)
    np.testing.assert_allclose(start, 1 + expected["grad_x"], rtol=2e-6)


def test_relative_mse_reference_and_zero_target():
    rng = np.random.default_rng(9)
    x, target = rng.normal(size=(2, 3, 4))
    grads = reference.relative_mse(x, target, 0.3)
    check(lambda: 0.3 * reference.relative_mse(x, target)["value"], {"grad_x": x}, grads)
    ones = np.ones((2, 3), np.float32)
    got = ops.relative_mse(ones, np.zeros_like(ones))
    assert got["value"] == 6 and np.array_equal(got["grad_x"], 2 * ones)
