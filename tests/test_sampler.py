"""The sampler: filters against NumPy and transformers, random numbers against Philox's published
vectors.

Weights are float32 exponentials of float32 exponents up to a few dozen, so probabilities agree
with the float64 reference to 1e-5 of themselves; which tokens survive a filter must agree exactly,
except where a threshold falls on a token to float32 rounding, which the fixed seeds here avoid.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.sampler import chi_square_p, distribution

from mambainllama import _core

RELATIVE = 1e-5
BASE = {"temperature": 1.0}
FILTERS = [
    {},
    {"temperature": 0.3},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 10**9},
    {"top_p": 0.9},
    {"top_p": 0.2},
    {"top_p": 1e-9},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.5},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.02, "temperature": 0.7, "repetition_penalty": 1.2},
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 5.0},
]


def probabilities(logits, options, history=()):
    _, weights, total = _core.sample(logits, options, history=np.array(history, np.int64))
    assert total == pytest.approx(weights.sum(dtype=np.float64), rel=1e-12)
    return weights.astype(np.float64) / total


# ---- filters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 2, 7, 300, 5000])
@pytest.mark.parametrize("change", FILTERS, ids=str)
def test_filters_match_numpy(vocab, change, rng):
    options = {**BASE, **change}
    for spread in (0.5, 4.0):
        logits = (spread * rng.standard_normal(vocab)).astype(np.float32)
        history = rng.integers(0, vocab, 20)
        got = probabilities(logits, options, history)
        expected = distribution(logits, **options, history=history)
        clear = (expected == 0) | (expected > 1e-30)  # float32 weights end in subnormals and zeros
        assert ((got > 0) == (expected > 0))[clear].all()
        np.testing.assert_allclose(got, expected, rtol=RELATIVE, atol=1e-30)


@pytest.mark.parametrize("change", FILTERS, ids=str)
def test_filters_match_transformers(change, rng):
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    options = {**BASE, **change}
    if options["temperature"] == 0:
        pytest.skip("greedy decoding has no warpers there")
    vocab = 1000
    logits = (3 * rng.standard_normal(vocab)).astype(np.float32)
    history = rng.integers(0, vocab, 50)
    ids, scores = torch.tensor(history)[None], torch.tensor(logits)[None]
    if "repetition_penalty" in options:
        scores = processors.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"])(
            ids, scores
        )
    scores = processors.TemperatureLogitsWarper(options["temperature"])(ids, scores)
    if "top_k" in options:
        scores = processors.TopKLogitsWarper(options["top_k"])(ids, scores)
    if "top_p" in options:
        scores = processors.TopPLogitsWarper(options["top_p"])(ids, scores)
    if "min_p" in options:
        scores = processors.MinPLogitsWarper(options["min_p"])(ids, scores)
    expected = torch.softmax(scores.double(), -1)[0].numpy()
    got = probabilities(logits, options, history)
    assert ((got > 0) == (expected > 0)).all()
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_ties():
    logits = np.array([1, 3, 3, 2, 3, 0], np.float32)
    assert _core.sample(logits, {"temperature": 0.0})[0] == 1
    assert (probabilities(logits, {**BASE, "top_k": 2}) > 0).tolist() == [0, 1, 1, 0, 1, 0]
    assert (probabilities(logits, {**BASE, "top_p": 0.3}) > 0).tolist() == [0, 1, 1, 0, 0, 0]
    assert (probabilities(np.zeros(2000, np.float32), {**BASE, "top_p": 0.5}) > 0).sum() == 1000


def test_extremes():
    top, low = np.float32(3e38), np.float32(-3e38)
    for temperature in (1e-45, 1e-38, 1.0, 1e38):
        got = probabilities(np.array([low, top, 0, 1], np.float32), {"temperature": temperature})
        assert np.isfinite(got).all() and got.argmax() == 1
    got = probabilities(
        np.array([1, -1, 2], np.float32), {**BASE, "repetition_penalty": 1e-38}, [0, 1, 2]
    )
    assert np.isfinite(got).all()
    logits = np.linspace(-5, 5, 3000, dtype=np.float32)
    for order in (1, -1):  # sorted input, the bad case of a careless selection
        got = probabilities(logits[::order].copy(), {**BASE, "top_k": 300, "top_p": 0.95})
        expected = distribution(logits[::order], top_k=300, top_p=0.95)
        np.testing.assert_allclose(got, expected, rtol=RELATIVE)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_non_finite_logits(wrong):
    logits = np.zeros(100, np.float32)
    logits[63] = wrong
    for temperature in (0.0, 1.0):
        with pytest.raises(_core.NonFiniteError, match="token 63"):
            _core.sample(logits, {"temperature": temperature})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0), ("temperature", float("nan")), ("temperature", float("inf")),
        ("temperature", "hot"), ("top_k", -1), ("top_k", 1.5), ("top_p", 0.0),
        ("top_p", 1.5), ("top_p", float("nan")),
        ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")), ("seed", 1.5),
    ],
)  # fmt: skip
def test_error_messages(name, value):
    with pytest.raises(_core.Error, match=name) as caught:
        _core.sample(np.zeros(4, np.float32), {name: value})
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 400), st.integers(0, 2**32), st.floats(0.05, 5), st.integers(0, 500),
    st.floats(0.01, 1), st.floats(0, 1),
)  # fmt: skip
def test_any_filter_leaves_a_distribution(vocab, seed, temperature, top_k, top_p, min_p):
    logits = np.random.default_rng(seed).standard_normal(vocab).astype(np.float32).round(1)
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
    }
    token, weights, total = _core.sample(logits, options, position=seed % 1000)
    assert weights[token] > 0 and weights[np.argmax(logits)] == 1 and total >= 1
    kept = logits[weights > 0]
    assert (
        kept.min() >= np.sort(logits)[-kept.size]
    )  # no kept token is less likely than a dropped one


# ---- random numbers -----------------------------------------------------------------------------


def test_philox_vectors():
    """Salmon et al. 2011, Random123's kat_vectors for philox4x32-10."""
    ones = 0xFFFFFFFF
    assert _core.philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert _core.philox((ones,) * 4, (ones,) * 2) == (
        0x408F276D,
        0x41C83B0E,
        0xA20BC7C6,
        0x6D5451FD,
    )
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert _core.philox(*pi) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_uniform_numbers():
    values = np.array(
        [[[_core.uniform(seed, p, s) for p in range(300)] for s in range(3)] for seed in range(40)]
    )
    assert (values >= 0).all() and (values < 1).all()
    counts, _ = np.histogram(values, 50, (0, 1))
    assert chi_square_p(counts, np.full(50, values.size / 50)) > 1e-3
    flat = values.reshape(120, 300)  # neighbouring positions, streams and seeds are unrelated
    for a, b in [
        (flat[:, :-1], flat[:, 1:]),
        (values[:, 0], values[:, 1]),
        (values[:-1], values[1:]),
    ]:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)
    assert np.unique(values).size == values.size


@pytest.mark.parametrize("options", [{}, {"top_k": 6}, {"top_p": 0.7, "temperature": 2.0}], ids=str)
def test_draws_follow_the_distribution(options, rng):
    logits = (1.5 * rng.standard_normal(20)).astype(np.float32)
    options, draws = {**BASE, **options, "seed": 7}, 20_000
    tokens = [_core.sample(logits, options, position=p)[0] for p in range(draws)]
    expected = draws * distribution(logits, **{k: v for k, v in options.items() if k != "seed"})
    assert chi_square_p(np.bincount(tokens, minlength=20), expected) > 1e-3


def test_chi_square_itself(rng):
    """Its probabilities are uniform for honest counts, and tiny for a small bias."""
    p = distribution(rng.standard_normal(30))
    honest = [chi_square_p(rng.multinomial(5000, p), 5000 * p) for _ in range(400)]
    assert 0.4 < np.mean(honest) < 0.6 and min(honest) > 1e-5
    assert chi_square_p([10], [0.0]) == 0
    assert chi_square_p([60, 40], [50, 50]) == pytest.approx(0.0455003, rel=1e-5)
    assert chi_square_p([11, 9, 10, 10, 10], [10] * 5) == pytest.approx(0.9953212, rel=1e-5)
