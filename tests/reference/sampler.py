"""Slow, obvious sampling filters in float64, and a chi-square test (SciPy is not among the
dependencies)."""

import math

import numpy as np


def distribution(
    logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, history=()
):
    """Probabilities [vocab] after the filters of csrc/decode/sampler.h, in their order."""
    scores = np.array(logits, np.float64)
    for token in set(int(token) for token in history):
        scores[token] = (
            scores[token] * repetition_penalty
            if scores[token] < 0
            else scores[token] / repetition_penalty
        )
    if temperature == 0:
        return np.eye(scores.size)[int(np.argmax(scores))]
    if 0 < top_k < scores.size:
        threshold = np.sort(scores)[-top_k]
        scores[scores < threshold] = -np.inf
    probabilities = np.exp((scores - scores.max()) / temperature)
    probabilities /= probabilities.sum()
    if top_p < 1:
        order = np.lexsort((np.arange(scores.size), -scores))
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= top_p]] = 0
    probabilities[probabilities < min_p * probabilities.max()] = 0
    return probabilities / probabilities.sum()


def log_softmax(logits):
    """Natural logarithms of softmax(logits) over the last axis, in float64."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def chi_square_p(observed, expected):
    """Probability of counts at least this far from `expected`, if they were drawn from it.

    Cells that expect fewer than 5 are merged into one, as the approximation wants; a count where
    nothing is expected makes the probability 0."""
    observed, expected = (
        np.asarray(observed, np.float64).ravel(),
        np.asarray(expected, np.float64).ravel(),
    )
    if (observed[expected == 0] > 0).any():
        return 0.0
    rare = expected < 5
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    return upper_gamma((observed.size - 1) / 2, statistic / 2)


def upper_gamma(shape, x):
    """The regularised upper incomplete gamma function Q(shape, x)."""
    if x <= 0:
        return 1.0
    scale = math.exp(shape * math.log(x) - x - math.lgamma(shape))
    if x < shape + 1:  # series of the lower function
        term = total = 1 / shape
        n = shape
        while term > total * 1e-15:
            n += 1
            term *= x / n
            total += term
        return 1 - scale * total
    b, c = x + 1 - shape, 1e300  # continued fraction, modified Lentz
    d = 1 / b
    fraction = d
    for i in range(1, 10_000):
        a = -i * (i - shape)
        b += 2
        d = 1 / (a * d + b)
        c = b + a / c
        fraction *= d * c
        if abs(d * c - 1) < 1e-14:
            break
    return scale * fraction
