"""The engine: requests from many threads give what `generate` gives, and nobody's mistake stops
the others."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from core_models import KINDS, build
from tiny_models import byte_tokenizer

import mambainllama as mil
from mambainllama import _core
from mambainllama.engine import Engine, StateCache
from mambainllama.generate import generate
from mambainllama.tokenizer import Tokenizer

SAMPLED = {"temperature": 1.0, "max_new_tokens": 20}


@pytest.fixture(params=["transformer", "mamba1 hybrid", "mamba2"])
def model(request):
    return build(KINDS[request.param])


@pytest.fixture(scope="module")
def story(shared):
    return mil.load(shared / "models" / "story-llama")


def some_prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 61, length) for length in lengths]


@pytest.mark.parametrize("draft", [None, "ngram"])
def test_many_threads(model, draft):
    prompts, found = some_prompts(*range(1, 41)), {}

    def work(first):
        for i in range(first, 40, 4):
            found[i] = engine.submit(prompts[i], seed=i, **SAMPLED).result(60)

    with Engine(model, draft, max_batch=5) as engine:
        threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    expected = generate(model, prompts, seed=range(40), draft=draft, **SAMPLED)
    assert [found[i].token_ids for i in range(40)] == [g.token_ids for g in expected]


def test_streams(story):
    pieces = []
    with Engine(story) as engine:
        ticket = engine.submit("Once upon a time", max_new_tokens=40, on_text=pieces.append)
        other = engine.submit("The", max_new_tokens=40, stop=["."])
        assert "".join(ticket) == ticket.result().text == "".join(pieces)
        assert ticket.done and "".join(other) == other.result().text
    [expected] = generate(story, "Once upon a time", 40)
    assert ticket.result().text == expected.text and ticket.result().finish_reason == "length"
    assert other.result().text == generate(story, "The", 40, stop=["."])[0].text
    with pytest.raises(mil.StateError, match="closed"):
        engine.submit("Once")


def test_cached_states(model):
    """A chat's later turns read only what is new, and say the same."""
    [text] = some_prompts(30)
    with Engine(model) as engine:
        for turn in range(4):
            found = engine.submit(text, seed=turn, **SAMPLED).result(60)
            [expected] = generate(model, [text], seed=turn, **SAMPLED)
            assert found.token_ids == expected.token_ids
            assert found.stats.cached_tokens == (0 if turn == 0 else len(text) - 4)
            text = np.concatenate([text, found.token_ids, [1, 2, turn]])
        again = engine.submit(text[:25], **SAMPLED).result(60)  # begins like them, but ends before
        assert again.stats.cached_tokens == 0
        assert again.token_ids == generate(model, [text[:25]], **SAMPLED)[0].token_ids


@pytest.mark.parametrize(
    "change", [{"long_inv_freq": [0.5, 0.2, 0.04, 0.01]}, {"dynamic_factor": 4.0}]
)
def test_a_text_beyond_the_trained_length_is_read_anew(change):
    """Its positions are others from the first token on: no cached state is a beginning of it."""
    rope = {"rotary": 8, "inv_freq": [1.0, 0.3, 0.1, 0.02], "theta": 1e4, "long_after": 32}
    core = build(KINDS["transformer"], rope={**rope, **change})
    [text] = some_prompts(60)
    with Engine(core) as engine:
        for length, cached in ((20, 0), (30, 20), (60, 0)):
            found = engine.submit(text[:length], max_new_tokens=1).result(60)
            assert found.stats.cached_tokens == cached
            [expected] = generate(core, [text[:length]], max_new_tokens=1, logprobs=True)
            assert found.token_ids == expected.token_ids
    # Nor is what prompts of one call share, once one of them is longer.
    shared = np.concatenate([text, text])
    prompts = [np.append(shared[:80], i) for i in (1, 2)]
    together = generate(core, prompts, max_new_tokens=4, logprobs=True)
    for prompt, found in zip(prompts, together, strict=True):
        [alone] = generate(core, [prompt], max_new_tokens=4, logprobs=True)
        assert found.logprobs.tobytes() == alone.logprobs.tobytes()


def test_cache_keeps_the_latest():
    core = build(KINDS["mamba2"])
    cache = StateCache(core, 2)
    for text in ([1, 2, 3], [4, 5, 6], [7, 8, 9], [7, 8, 9, 1]):
        state = core.state()
        core.forward(text[:-1], states=[state])
        cache.add(state, np.array(text))
    assert [tokens.tolist() for tokens, _ in cache.kept] == [[4, 5], [7, 8, 9]]
    assert cache.find(np.array([1, 2, 3])).length == 0
    assert cache.find(np.array([7, 8, 9, 5])).length == 3
    assert cache.find(np.array([7, 8, 9])).length == 0
    assert StateCache(core, 0).find(np.array([1])) is None


def test_mistakes_stay_their_sender_s(model):
    with Engine(model) as engine:
        good = engine.submit([1, 2, 3], **SAMPLED)
        bad = [engine.submit([1], temperature=-1.0), engine.submit([1], top_logprobs=62)]
        with pytest.raises(mil.ArgumentError, match="unknown option temprature"):
            engine.submit([1], temprature=1.0)
        with pytest.raises(mil.ArgumentError, match="holds token 61"):
            engine.submit([61])
        with pytest.raises(mil.ArgumentError, match="one prompt"):
            engine.submit([[1], [2]])
        with pytest.raises(mil.ArgumentError, match="temperature"):
            bad[0].result(60)
        with pytest.raises(mil.ArgumentError, match="top_logprobs"):
            list(bad[1])
        assert len(good.result(60).token_ids) == 20


def test_a_callback_that_fails_is_its_sender_s(model):
    model = SimpleNamespace(core=model, tokenizer=Tokenizer(byte_tokenizer()))

    def fail(piece):
        raise ZeroDivisionError(piece)

    with Engine(model, max_batch=3) as engine:
        good = engine.submit([1, 2, 3], **SAMPLED)
        bad = engine.submit([55, 56], max_new_tokens=10**9, on_text=fail)
        with pytest.raises(ZeroDivisionError):
            bad.result(60)
        with pytest.raises(ZeroDivisionError):
            list(bad)
        for name in ("logprobs", "prompt_logprobs"):
            odd = engine.submit([1, 2, 3], **SAMPLED, **{name: np.zeros(2)})
            with pytest.raises(mil.DtypeError, match=f" {name} must be true or false"):
                odd.result(60)
        with pytest.raises(mil.ArgumentError, match="on_text must be a function, not 5"):
            engine.submit([1], on_text=5)
        assert len(good.result(60).token_ids) == 20
        assert len(engine.submit([4], **SAMPLED).result(60).token_ids) == 20


def test_a_ticket_can_be_iterated_again(story):
    with Engine(story) as engine:
        ticket = engine.submit("Once upon a time", max_new_tokens=5)
        assert "".join(ticket) and list(ticket) == []


def test_no_ticket_is_forgotten(model):
    """Two requests arrive together and memory runs out over the first; later it is there again."""
    engine = Engine(model)
    find = engine._cache.find

    def find_no_memory(prompt):
        engine._cache.find = find
        raise mil.OutOfMemoryError("none left")

    engine._cache.find = find_no_memory
    with engine._condition:
        tickets = [engine.submit([i], **SAMPLED) for i in (1, 2)]
    for ticket in tickets:
        with pytest.raises(mil.OutOfMemoryError, match="none left"):
            ticket.result(60)
    assert len(engine.submit([3], **SAMPLED).result(60).token_ids) == 20
    engine._cache.add = lambda state, text: 1 / 0
    with pytest.raises(ZeroDivisionError):
        engine.submit([1], **SAMPLED).result(60)
    with pytest.raises(mil.StateError, match="closed: division by zero"):
        engine.submit([1], **SAMPLED)


def test_no_memory_to_begin_with(model):
    """Not even for a batch: each request is told, and later ones find memory again."""
    with Engine(model) as engine:
        assert len(engine.submit([1], **SAMPLED).result(60).token_ids) == 20
        for _ in range(3):
            _core.fail_after(0)
            try:
                with pytest.raises(mil.OutOfMemoryError):
                    engine.submit([1], **SAMPLED).result(60)
            finally:
                _core.fail_after(-1)
        assert len(engine.submit([1], **SAMPLED).result(60).token_ids) == 20
        _core.fail_after(0)
        try:
            engine.close()
        finally:
            _core.fail_after(-1)


@pytest.mark.parametrize("name", ["max_batch", "cached_states"])
@pytest.mark.parametrize("value", [-1, 2.5, "2", 2**70, True])
def test_settings_that_make_no_sense(model, name, value):
    with pytest.raises(mil.ArgumentError, match=f"Engine: {name} must be an integer of at "):
        Engine(model, **{name: value})
    with pytest.raises(mil.ArgumentError, match="cached_states must"):
        Engine(model, cached_states=None)


def test_cancel(model):
    with Engine(model, max_batch=2) as engine:
        endless = engine.submit([5], max_new_tokens=10**9)
        with pytest.raises(TimeoutError):
            endless.result(0.05)
        endless.cancel()
        found = endless.result(60)
    assert found.finish_reason == "cancelled" and 0 < len(found.token_ids) < 10**9


def test_a_failing_model_tells_everybody():
    model = build(KINDS["transformer"])
    model.parameters()["model.norm.weight"][0] = np.nan
    engine, failures = Engine(model, max_batch=1), 0
    for _ in range(3):
        try:
            engine.submit([1, 2], **SAMPLED).result(60)
        except mil.NonFiniteError:  # those that it had taken
            failures += 1
        except mil.StateError as error:  # and those that came too late
            assert "closed" in str(error)
    assert failures >= 1
