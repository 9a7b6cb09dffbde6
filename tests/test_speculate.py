"""Speculative decoding changes nothing but speed: greedy tokens equal, sampled tokens equally
distributed.

The distribution is tested on whole continuations: 50,000 texts of four tokens from a small
vocabulary, whose exact probabilities follow from the model's logits, must pass a chi-square test,
and must fail it by far when the accept rule is broken on purpose.
"""

import itertools

import numpy as np
import pytest
from core_models import KINDS, build
from reference.sampler import chi_square_p, distribution

from mambainllama import _core
from mambainllama.generate import generate

VOCAB = 61
SPECULATED = ["transformer", "mamba1 hybrid", "mamba2 hybrid", "both mixers", "mamba1", "mamba2"]


def perturbed(model, amount, seed=9, **changes):
    """A draft that often agrees with the model: its parameters with some noise."""
    rng = np.random.default_rng(seed)
    parameters = {
        name: (value + amount * value.std() * rng.standard_normal(value.shape)).astype(np.float32)
        for name, value in model.parameters().items()
    }
    return _core.Model({**model.config, **changes}, parameters, {})


def some_prompts(*lengths, seed=0, vocab=VOCAB):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, length) for length in lengths]


def run(model, prompts, options=None, **engine):
    return _core.generate(model, [{"prompt": p, **(options or {})} for p in prompts], **engine)


def tokens(results):
    return [result["tokens"].tolist() for result in results]


def total(results, what):
    return sum(result["stats"][what] for result in results)


# ---- greedy: equal ------------------------------------------------------------------------------


@pytest.mark.parametrize("draft_kind", ["model", "ngram"])
@pytest.mark.parametrize("kind", SPECULATED)
def test_greedy_tokens_are_equal(kind, draft_kind):
    """Over 200 prompts in all, every number of drafts, alone and seven at a time, across windows'
    ends."""
    model = build(KINDS[kind], seed=1)
    draft = perturbed(model, 0.2) if draft_kind == "model" else "ngram"
    lengths = np.random.default_rng(2).integers(1, 70, 18)
    prompts = [np.tile(p, 2) for p in some_prompts(*lengths)]  # repeated, so that n-grams are found
    # A penalty keeps random models from saying one word for ever.
    common = [
        {"prompt": p, "max_new_tokens": 40, "logprobs": True, "repetition_penalty": 1 + i % 2 / 4}
        for i, p in enumerate(prompts)
    ]
    speculation = [
        {"draft_tokens": 1 + i % 8, "fixed_draft": i % 3 > 0} for i in range(len(prompts))
    ]
    expected = _core.generate(model, common)
    requests = [{**a, **b} for a, b in zip(common, speculation, strict=True)]
    drafted = accepted = 0
    for batch in (1, 7):
        found = _core.generate(model, requests, draft=draft, max_batch=batch, draft_cost=0.1)
        assert tokens(found) == tokens(expected)
        for a, b in zip(found, expected, strict=True):
            assert np.array_equal(a["logprobs"], b["logprobs"])
        drafted, accepted = drafted + total(found, "drafted"), accepted + total(found, "accepted")
        assert total(found, "rounds") < total(expected, "rounds")
    assert (
        0.1 * drafted < accepted < drafted
    )  # neither all nor none: both ways of the rule were walked


@pytest.mark.parametrize("drafts", [1, 7, 15])
def test_longest_drafts_and_ends(drafts):
    """Requests that end inside a round: by length, and by a stop token among the drafts."""
    for kind in SPECULATED:
        model = build(KINDS[kind], seed=4)
        draft, prompts = perturbed(model, 0.1), some_prompts(3, 14, 30)
        for count in (1, 2, 3, 16, 17, 40):
            free = run(model, prompts, {"max_new_tokens": count})
            found = run(
                model,
                prompts,
                {"max_new_tokens": count, "draft_tokens": drafts, "fixed_draft": True},
                draft=draft,
            )
            assert tokens(found) == tokens(free)
            stop = free[0]["tokens"][count // 2]
            ending = {"max_new_tokens": count, "stop": [stop]}
            ended = run(
                model, prompts, {**ending, "draft_tokens": drafts, "fixed_draft": True}, draft=draft
            )
            assert tokens(ended) == tokens(run(model, prompts, ending))


@pytest.mark.parametrize("drafts", [2, 5, 15])
@pytest.mark.parametrize("kind", SPECULATED)
def test_the_model_itself_is_a_draft_that_is_always_right(kind, drafts):
    """Its one-row passes give the bits of verified rows, across windows' ends and after every
    round's going back, so each draft must stand."""
    model = build(KINDS[kind], seed=5)
    options = {"max_new_tokens": 70, "draft_tokens": drafts, "fixed_draft": True}
    found = run(model, some_prompts(3, 16, 29), options, draft=perturbed(model, 0.0))
    assert total(found, "accepted") == total(found, "drafted") > 100
    assert tokens(found) == tokens(run(model, some_prompts(3, 16, 29), {"max_new_tokens": 70}))


def test_penalised_greedy_tokens_are_equal():
    """Each verified row is penalised for its own history, drafts before it included."""
    model = build(KINDS["mamba2 hybrid"], seed=3)
    prompts = [np.tile(p, 3) for p in some_prompts(5, 9, 20)]
    options = {"max_new_tokens": 50, "repetition_penalty": 1.4}
    expected = tokens(run(model, prompts, options))
    for draft in (perturbed(model, 0.1), "ngram"):
        found = run(
            model, prompts, {**options, "draft_tokens": 6, "fixed_draft": True}, draft=draft
        )
        assert tokens(found) == expected and 0 < total(found, "accepted")


# ---- sampled: equally distributed ---------------------------------------------------------------

SMALL, LENGTH, SAMPLES = 5, 4, 50_000


def exact_distribution(model, prompt, options):
    """Probability of each continuation of LENGTH tokens: an array with one axis a token."""
    expected = np.ones((SMALL,) * LENGTH)
    for depth in range(LENGTH):
        prefixes = list(itertools.product(range(SMALL), repeat=depth))
        texts = np.array([[*prompt, *prefix] for prefix in prefixes])
        offsets = np.arange(len(prefixes) + 1) * texts.shape[1]
        logits = model.forward(texts.ravel(), offsets, rows="last")
        rows = [
            distribution(row, **options, history=text)
            for row, text in zip(logits, texts, strict=True)
        ]
        expected *= np.reshape(rows, (SMALL,) * (depth + 1) + (1,) * (LENGTH - depth - 1))
    assert expected.sum() == pytest.approx(1)
    return expected


def sampled_counts(model, draft, prompt, options, samples=SAMPLES, broken=0):
    # The first token follows the prompt without a draft; one more than LENGTH lets a round draft
    # all others.
    request = {"prompt": prompt, **options, "max_new_tokens": LENGTH + 1}
    request |= {"draft_tokens": LENGTH - 1, "fixed_draft": True}
    counts = np.zeros((SMALL,) * LENGTH, np.int64)
    for start in range(0, samples, 5000):
        requests = [{**request, "seed": start + i} for i in range(min(5000, samples - start))]
        found = _core.generate(model, requests, draft=draft, max_batch=500, _break_accept=broken)
        texts = np.array([result["tokens"][:LENGTH] for result in found])
        np.add.at(counts, tuple(texts.T), 1)
    return counts, total(found, "accepted") / max(total(found, "drafted"), 1)


@pytest.fixture(scope="module")
def small():
    """A model of five words, and a draft that is wrong about a third of the time. One thread: such
    a model has less work than a team needs to meet."""
    threads = _core.get_threads()
    _core.set_threads(1)
    model = build([{**KINDS["mamba2 hybrid"][0]}, KINDS["mamba2 hybrid"][1]], vocab=SMALL, seed=6)
    yield model, perturbed(model, 0.5)
    _core.set_threads(threads)


PROMPT = [0, 1, 2, 3, 0, 1, 4, 2, 3, 0, 1, 2]  # ends in a window and repeats itself, for n-grams
SAMPLING = [{}, {"temperature": 0.6, "top_k": 4}, {"top_p": 0.8, "repetition_penalty": 1.3}]


@pytest.mark.parametrize("options", SAMPLING, ids=str)
@pytest.mark.parametrize("draft_kind", ["model", "ngram"])
def test_sampled_texts_have_the_model_s_distribution(small, draft_kind, options):
    model, draft = small
    if draft_kind == "ngram" and options:
        pytest.skip("n-gram drafts do not see the filters: one case is enough")
    options = {"temperature": 1.0, **options}
    draft = draft if draft_kind == "model" else "ngram"
    samples = SAMPLES if len(options) == 1 else SAMPLES // 4
    counts, acceptance = sampled_counts(model, draft, PROMPT, options, samples)
    assert 0.1 < acceptance < 0.95
    assert chi_square_p(counts, samples * exact_distribution(model, PROMPT, options)) > 1e-3


@pytest.mark.parametrize("draft_kind", ["model", "ngram"])
@pytest.mark.parametrize("broken", [1, 2], ids=["accept all", "redraw from p"])
def test_the_test_would_notice(small, broken, draft_kind):
    """With the rule broken the same test fails beyond doubt, on a fifth of the samples."""
    model, draft = small
    draft = draft if draft_kind == "model" else "ngram"
    counts, _ = sampled_counts(model, draft, PROMPT, {"temperature": 1.0}, SAMPLES // 5, broken)
    assert (
        chi_square_p(counts, SAMPLES // 5 * exact_distribution(model, PROMPT, {"temperature": 1.0}))
        < 1e-9
    )


@pytest.mark.parametrize("draft_kind", ["model", "ngram"])
def test_company_changes_nothing(draft_kind):
    """Speculated samples, too, are the same alone and in a batch, with the number of drafts
    adapting."""
    model = build(KINDS["both mixers"], seed=2)
    draft = perturbed(model, 0.3) if draft_kind == "model" else "ngram"
    prompts = [np.tile(p, 2) for p in some_prompts(4, 9, 16, 31, 2)]
    options = {"temperature": 0.8, "seed": 5, "max_new_tokens": 60, "draft_tokens": 6}
    together = run(model, prompts, options, draft=draft, draft_cost=0.1)
    alone = [run(model, [p], options, draft=draft, draft_cost=0.1)[0] for p in prompts]
    assert (
        tokens(together) == tokens(alone)
        and total(together, "drafted") == total(alone, "drafted") > 0
    )


# ---- how many drafts ----------------------------------------------------------------------------


def test_a_draft_reads_beside_the_others():
    """While the draft model reads a long prompt, the other texts go on, and nothing changes."""
    model, draft = build(KINDS["mamba2 hybrid"]), build(KINDS["mamba1 hybrid"], seed=1)
    options = {"max_new_tokens": 60, "draft_tokens": 3, "fixed_draft": True, "temperature": 1.0}
    prompts = some_prompts(400, 5)
    requests = [{"prompt": prompt, **options} for prompt in prompts]
    heard = []
    found = _core.generate(
        model,
        requests,
        draft=draft,
        prefill_rows=16,
        on_tokens=lambda index, tokens: heard.append(index),
    )
    first, second = [at for at, index in enumerate(heard) if index == 0][:2]
    assert second - first > 10  # 400 tokens are 25 passes of 16
    for request, one in zip(requests, found, strict=True):
        [alone] = _core.generate(model, [request], draft=draft)
        assert alone["tokens"].tolist() == one["tokens"].tolist()
        assert alone["stats"]["rounds"] == one["stats"]["rounds"]


def test_number_of_drafts_follows_acceptance():
    model = build(KINDS["mamba2 hybrid"], seed=7)
    prompts = some_prompts(20, 30)
    options = {"temperature": 1.0, "max_new_tokens": 120, "draft_tokens": 8}
    good = run(model, prompts, options, draft=perturbed(model, 0.0), draft_cost=0.1)
    assert total(good, "drafted") == total(good, "accepted") > 0.75 * total(good, "new_tokens")
    bad = run(model, prompts, options, draft=build(KINDS["mamba2"], seed=99), draft_cost=0.3)
    assert total(bad, "drafted") < 0.4 * total(bad, "new_tokens")
    dear = run(model, prompts, options, draft=perturbed(model, 0.0))  # as dear as the model itself
    assert total(dear, "drafted") < 0.3 * total(dear, "new_tokens")
    none = run(model, prompts, {**options, "draft_tokens": 0}, draft=perturbed(model, 0.0))
    assert total(none, "drafted") == 0


def test_ngrams():
    propose = _core.ngram_propose
    text = [1, 2, 3, 4, 9, 9, 2, 3, 5, 1, 2, 3]
    assert propose(text, 4, 2, 3).tolist() == [
        4,
        9,
        9,
    ]  # three words match at the start, two later on
    assert propose(text, 2, 2, 3).tolist() == [5, 1, 2]  # the latest of equals
    assert propose(text, 4, 4, 3).tolist() == []
    assert propose([7, 8, 7, 8, 7, 8], 4, 2, 5).tolist() == [7, 8, 7, 8, 7]  # a loop goes on
    assert propose([5, 5, 5], 4, 2, 4).tolist() == [5, 5, 5, 5]
    assert (
        propose([], 4, 2, 4).tolist()
        == propose([1], 4, 2, 4).tolist()
        == propose([1, 1], 4, 2, 4).tolist()
        == []
    )


@pytest.mark.parametrize("kind", ["long", "dynamic"])
def test_frequencies_that_depend_on_the_length(kind):
    """Greedy tokens stay equal where the rotary frequencies change in the middle of a text."""
    rope = {"rotary": 8, "inv_freq": [1.0, 0.3, 0.1, 0.02], "long_after": 40, "theta": 50.0}
    if kind == "long":
        rope |= {"long_inv_freq": [0.5, 0.1, 0.03, 0.005], "scale": 1.2}
    else:
        rope |= {"dynamic_factor": 2.0}
    model = build(KINDS["transformer"], seed=3, rope=rope)
    prompts = some_prompts(5, 33, 39, 40, 60, 90)
    expected = run(
        model, prompts, {"max_new_tokens": 30, "repetition_penalty": 1.2}, prefill_rows=16
    )
    for prompt, found in zip(
        prompts, expected, strict=True
    ):  # a prompt has its whole length's frequencies
        [logits] = model.forward(prompt, rows="last")
        penalty = {"repetition_penalty": 1.2}
        assert found["tokens"][0] == _core.sample(logits, penalty, history=prompt)[0]
    options = {
        "max_new_tokens": 30,
        "repetition_penalty": 1.2,
        "draft_tokens": 6,
        "fixed_draft": True,
    }
    for draft in (perturbed(model, 0.1), "ngram"):
        assert tokens(run(model, prompts, options, draft=draft)) == tokens(expected)


# ---- states, vocabularies -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPECULATED)
def test_states_after_speculation(kind):
    """Speculation leaves states as if it had not been: later turns go on exactly, with both
    models' states."""
    model = build(KINDS[kind], seed=5)
    draft = perturbed(model, 0.2)
    [prompt] = some_prompts(27)
    state, draft_state, text = model.state(), draft.state(), prompt.tolist()
    options = {"draft_tokens": 5, "fixed_draft": True}
    for turn, count in enumerate((9, 1, 22, 4)):
        expected = run(model, [text], {"max_new_tokens": count})
        found = run(
            model,
            [text],
            {"max_new_tokens": count, "state": state, "draft_state": draft_state, **options},
            draft=draft,
        )
        assert tokens(found) == tokens(expected)
        text += [*tokens(found)[0], turn]
        assert state.length == len(text) - 2 and draft_state.length <= state.length


def test_vocabularies_that_differ_by_padding():
    """A draft that knows fewer tokens, or pads to more, drafts what both know."""
    model = build(KINDS["transformer"], seed=8, vocab=61)
    prompts = some_prompts(5, 20, vocab=50)
    for size in (50, 80):
        parameters = perturbed(model, 0.1).parameters()
        embedding = np.zeros((size, 32), np.float32)
        embedding[: min(size, 61)] = parameters["model.embed_tokens.weight"][:size]
        draft = _core.Model(
            {**model.config, "vocab": size},
            {**parameters, "model.embed_tokens.weight": embedding},
            {},
        )
        for temperature in (0.0, 1.0):
            options = {
                "temperature": temperature,
                "max_new_tokens": 40,
                "draft_tokens": 4,
                "fixed_draft": True,
            }
            found = run(model, prompts, options, draft=draft)
            assert total(found, "accepted") > 0
            if temperature == 0:
                assert tokens(found) == tokens(run(model, prompts, options))
        odd = run(
            model,
            [[3, 60, 4]],
            {"max_new_tokens": 10, "draft_tokens": 4, "fixed_draft": True},
            draft=draft,
        )
        assert tokens(odd) == tokens(run(model, [[3, 60, 4]], {"max_new_tokens": 10}))
        with pytest.raises(_core.Error, match="vocabulary"):
            generate(model, [[1]], draft=draft)


def test_public_drafts(shared):
    import mambainllama as mil

    story, hybrid = (
        mil.load(shared / path) for path in ("models/story-llama", "golden/story-mamba2")
    )
    prompts = ["Once upon a time", "Tom saw a big red ball. Tom saw a"]
    plain = generate(story, prompts, 60)
    for draft in (hybrid, "ngram", story):
        found = generate(story, prompts, 60, draft=draft, draft_tokens=5, adapt_draft=False)
        assert [g.token_ids for g in found] == [g.token_ids for g in plain]
        assert all(g.stats.acceptance > 0 for g in found) or draft is hybrid
    assert found[0].stats.acceptance == 1
