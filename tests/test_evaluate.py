"""Evaluation: its formulas in NumPy on the model's own logits, and no dependence on batching."""

import numpy as np
import pytest
from tiny_models import write_llama

import mambainllama as mil


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [mil.load(write_llama(folder / f"m{seed}", scale=2.0, seed=seed)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(2).integers(0, 264, (5, 19))


def log_softmax(logits):
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_compare_is_its_formula(models, tokens):
    student, teacher = models
    s, t = log_softmax(student(tokens)), log_softmax(teacher(tokens))
    found = mil.evaluate.compare(student, teacher, tokens)
    assert found.kl == pytest.approx((np.exp(t) * (t - s)).sum(-1).mean(), rel=1e-5)
    assert found.agreement == pytest.approx((s.argmax(-1) == t.argmax(-1)).mean())
    for logs, value in ((s, found.perplexity), (t, found.teacher_perplexity)):
        picked = np.take_along_axis(logs[:, :-1], tokens[:, 1:, None], -1)
        assert value == pytest.approx(np.exp(-picked.mean()), rel=1e-5)
    assert found.tokens == tokens.size
    assert mil.evaluate.perplexity(student, tokens) == pytest.approx(found.perplexity, rel=1e-6)


def test_a_model_agrees_with_itself(models, tokens):
    found = mil.evaluate.compare(models[0], models[0], tokens)
    assert (found.kl, found.agreement) == (0.0, 1.0)
    assert found.perplexity == found.teacher_perplexity


def test_batches_change_nothing(models, tokens):
    whole = mil.evaluate.compare(*models, tokens, batch_size=5)
    parts = mil.evaluate.compare(*models, tokens, batch_size=2)
    assert parts.kl == pytest.approx(whole.kl, rel=1e-6)
    assert parts.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    some = mil.evaluate.compare(*models, tokens, batch_size=2, max_batches=1)
    assert some.tokens == 2 * tokens.shape[1]


def test_packed_text_equals_text_alone(models):
    texts = ["one", "two and", "three and four"]
    packed = mil.evaluate.compare(*models, [{"text": text} for text in texts])
    alone = [mil.evaluate.compare(*models, [{"text": text}]) for text in texts]
    total = sum(found.tokens for found in alone)
    assert packed.tokens == total
    assert packed.kl == pytest.approx(
        sum(found.kl * found.tokens for found in alone) / total, rel=1e-5
    )


def test_shown_as_words_and_numbers(models, tokens):
    found = mil.evaluate.compare(*models, tokens)
    assert repr(found).startswith("Comparison(kl=") and set(found.to_dict()) == {
        "kl",
        "perplexity",
        "teacher_perplexity",
        "agreement",
        "tokens",
    }


def test_mistakes_are_one_line(models, tokens):
    with pytest.raises(mil.ArgumentError, match="batch_size=0"):
        mil.evaluate.compare(*models, tokens, batch_size=0)
    for batches in (0, -1, "two"):
        with pytest.raises(mil.ArgumentError, match="max_batches=.*at least 1"):
            mil.evaluate.compare(*models, tokens, max_batches=batches)
    with pytest.raises(mil.ArgumentError, match="nothing to predict"):
        mil.evaluate.perplexity(models[0], np.array([[3]]))
    with pytest.raises(mil.ArgumentError, match="outside the model's vocabulary"):
        mil.evaluate.perplexity(models[0], np.array([[3, 264]]))
