"""Generation: the right tokens, the same in any company, and nothing left behind when it ends
early.

"The same" means the same bits of every log-probability: a prompt alone, in a batch, in chunks,
from a cached state and with other thread counts runs through the same roundings.  Against NumPy
log-probabilities agree to 1e-6: they are sums of float32 exponentials.
"""

import _thread
import threading
import time

import numpy as np
import pytest
from core_models import KINDS, build
from reference.sampler import distribution, log_softmax
from tiny_models import write_llama

import mambainllama as mil
from mambainllama import _core
from mambainllama.generate import Writer, generate, score

VOCAB = 61
SAMPLED = {"temperature": 1.0, "top_p": 0.95, "seed": 3}


@pytest.fixture(params=KINDS, ids=str)
def model(request):
    return build(KINDS[request.param])


@pytest.fixture(scope="module")
def hybrid():
    return build(KINDS["mamba2 hybrid"])


@pytest.fixture(scope="module")
def story(shared):
    return mil.load(shared / "models" / "story-llama")


@pytest.fixture
def nothing_left():
    """Whatever the test does, the core holds as much memory afterwards as before."""
    _core.trim_memory()
    before = _core.memory()
    yield
    _core.trim_memory()
    assert _core.memory() == before


def some_prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length) for length in lengths]


def run(model, prompts, options=None, **engine):
    return _core.generate(model, [{"prompt": p, **(options or {})} for p in prompts], **engine)


def same(a, b):
    """Equal tokens, with equal bits of their log-probabilities."""
    return (
        np.array_equal(a["tokens"], b["tokens"])
        and np.array_equal(a["logprobs"], b["logprobs"])
        and a["finish_reason"] == b["finish_reason"]
    )


# ---- the right tokens ---------------------------------------------------------------------------


def test_greedy_is_the_argmax_of_the_whole_text(model):
    prompts = some_prompts(1, 16, 37)
    results = run(model, prompts, {"max_new_tokens": 20})
    for prompt, found in zip(prompts, results, strict=True):
        text = np.concatenate([prompt, found["tokens"]])
        assert (found["tokens"] == model.forward(text)[len(prompt) - 1 : -1].argmax(-1)).all()
        assert found["finish_reason"] == "length" and len(found["tokens"]) == 20


def test_sampling_draws_from_the_filtered_logits(model):
    """Every token is the draw of the sampler at its position, given the text so far."""
    options = {
        "temperature": 0.9,
        "top_k": 20,
        "min_p": 0.01,
        "repetition_penalty": 1.3,
        "seed": 11,
    }
    prompts = some_prompts(3, 20)
    results = run(model, prompts, {**options, "max_new_tokens": 25})
    for prompt, found in zip(prompts, results, strict=True):
        text = np.concatenate([prompt, found["tokens"]])
        logits = model.forward(text)
        for i in range(len(prompt), len(text)):
            assert text[i] == _core.sample(logits[i - 1], options, history=text[:i], position=i)[0]


def test_log_probabilities(model):
    options = {
        **SAMPLED,
        "max_new_tokens": 12,
        "prompt_logprobs": True,
        "logprobs": True,
        "top_logprobs": 3,
    }
    for prompt, found in zip(
        some_prompts(2, 30), run(model, some_prompts(2, 30), options), strict=True
    ):
        text, n = np.concatenate([prompt, found["tokens"]]), len(prompt)
        expected = log_softmax(model.forward(text)[:-1])
        of_tokens = expected[np.arange(len(text) - 1), text[1:]]
        np.testing.assert_allclose(found["logprobs"], of_tokens[n - 1 :], rtol=0, atol=1e-6)
        np.testing.assert_allclose(
            found["prompt_logprobs"][1:], of_tokens[: n - 1], rtol=0, atol=1e-6
        )
        assert np.isnan(found["prompt_logprobs"][0]) and (found["prompt_top_tokens"][0] == -1).all()
        order = np.argsort(-expected, -1, kind="stable")[:, :3]
        assert (found["top_tokens"] == order[n - 1 :]).all()
        assert (found["prompt_top_tokens"][1:] == order[: n - 1]).all()
        best = np.take_along_axis(expected, order, -1)
        np.testing.assert_allclose(found["top_logprobs"], best[n - 1 :], rtol=0, atol=1e-6)
        np.testing.assert_allclose(
            found["prompt_top_logprobs"][1:], best[: n - 1], rtol=0, atol=1e-6
        )


def test_scores_in_chunks(hybrid):
    """Prompt scores do not depend on how the prompt is cut."""
    options = {"max_new_tokens": 0, "prompt_logprobs": True}
    prompts = some_prompts(100, 1, 2, 57)
    whole = run(hybrid, prompts, options)
    for rows in (1, 7, 16, 33):
        for a, b in zip(whole, run(hybrid, prompts, options, prefill_rows=rows), strict=True):
            assert np.array_equal(a["prompt_logprobs"], b["prompt_logprobs"], equal_nan=True)
            assert b["finish_reason"] == "length" and b["tokens"].size == 0


# ---- the same in any company --------------------------------------------------------------------


def test_alone_and_in_batches(model):
    prompts = some_prompts(1, 40, 16, 3, 17, 31, 5, 64)
    options = {**SAMPLED, "max_new_tokens": 24, "logprobs": True}
    alone = [run(model, [prompt], options)[0] for prompt in prompts]
    for engine in ({}, {"max_batch": 3}, {"max_batch": 1}, {"prefill_rows": 11}):
        assert all(map(same, alone, run(model, prompts, options, **engine)))
    others = some_prompts(9, 50, 2, seed=1)
    assert same(alone[4], run(model, [*others, prompts[4], *others], options)[3])


def test_any_number_of_threads(model, threads):
    prompts = some_prompts(20, 33)
    options = {**SAMPLED, "max_new_tokens": 10, "logprobs": True}
    found = run(model, prompts, options)
    _core.set_threads(1)
    assert all(map(same, found, run(model, prompts, options)))


def test_seeds(hybrid):
    [prompt] = some_prompts(8)
    texts = [
        run(hybrid, [prompt], {**SAMPLED, "seed": s})[0]["tokens"].tolist()
        for s in (0, 1, 2, -1, 2**64 - 1)
    ]
    assert len({tuple(text) for text in texts}) == 4 and texts[3] == texts[4]
    assert run(hybrid, [prompt], {**SAMPLED, "seed": 1})[0]["tokens"].tolist() == texts[1]


def test_many_requests_through_few_places(hybrid):
    """Continuous batching: results come in order whatever the lengths, and places are used
    again."""
    rng = np.random.default_rng(5)
    requests = [
        {
            "prompt": rng.integers(0, VOCAB, rng.integers(1, 30)),
            "max_new_tokens": int(n),
            "logprobs": True,
        }
        for n in rng.integers(0, 20, 50)
    ]
    running, most, finished = set(), 0, []

    def on_tokens(index, tokens):
        nonlocal most
        running.add(index)
        most = max(most, len(running))

    def on_finish(index, result):
        running.discard(index)
        finished.append((index, result))

    _core.generate(hybrid, requests, max_batch=4, on_tokens=on_tokens, on_finish=on_finish)
    assert sorted(index for index, _ in finished) == list(range(50)) and most <= 4
    for index, result in finished:
        assert len(result["tokens"]) == requests[index]["max_new_tokens"]
        assert same(result, _core.generate(hybrid, [requests[index]])[0])


def test_requests_that_arrive_later(hybrid):
    """The server's way: `more` brings requests while others run, and blocks where none do."""
    prompts, results, asked = some_prompts(3, 12, 7, 20), {}, []

    def more(wait):
        asked.append(wait)
        if len(asked) <= len(prompts):
            return [
                {
                    "prompt": prompts[len(asked) - 1],
                    **SAMPLED,
                    "max_new_tokens": 3,
                    "logprobs": True,
                }
            ]
        return [] if not wait else None

    _core.generate(hybrid, [], more=more, on_finish=results.__setitem__)
    alone = run(hybrid, prompts, {**SAMPLED, "max_new_tokens": 3, "logprobs": True})
    assert all(same(results[i], alone[i]) for i in range(4))
    assert asked[0] is True and asked[1] is False and asked[-1] is True


# ---- ends ---------------------------------------------------------------------------------------


def test_stop_tokens(model):
    [prompt] = some_prompts(10)
    options = {"temperature": 1.5, "seed": 2, "max_new_tokens": 30, "logprobs": True}
    free = run(model, [prompt], options)[0]["tokens"].tolist()
    for stop in {free[0], free[4], free[-1]}:
        found = run(model, [prompt], {**options, "stop": [stop, VOCAB - 1]})[0]
        end = min(free.index(t) for t in {stop, VOCAB - 1} & set(free))
        assert found["tokens"].tolist() == free[:end] and found["finish_reason"] == "stop"
        assert found["logprobs"].size == found["stats"]["new_tokens"] == end


def test_callback_cuts_and_cancels(hybrid):
    prompts = some_prompts(4, 9, 30)
    free = run(hybrid, prompts, {"max_new_tokens": 20})
    heard = {0: [], 1: [], 2: []}

    def on_tokens(index, tokens):
        heard[index] += tokens
        if index == 0 and len(heard[0]) == 5:
            return 0
        return -1 if index == 1 and len(heard[1]) == 7 else None

    found = run(hybrid, prompts, {"max_new_tokens": 20}, on_tokens=on_tokens)
    assert [f["finish_reason"] for f in found] == ["stop", "cancelled", "length"]
    for i, count in enumerate((4, 7, 20)):
        assert found[i]["tokens"].tolist() == free[i]["tokens"][:count].tolist()
    assert heard[2] == free[2]["tokens"].tolist()


def test_callback_that_fails(hybrid, nothing_left):
    state = hybrid.state()

    def on_tokens(index, tokens):
        raise LookupError("mine")

    requests = [{"prompt": [1, 2], "state": state}, {"prompt": [3], "max_new_tokens": 10**9}]
    with pytest.raises(LookupError, match="mine"):
        _core.generate(hybrid, requests, on_tokens=on_tokens)
    with pytest.raises(TypeError):
        run(hybrid, [[1]], on_tokens=lambda index, tokens: "often")
    with pytest.raises(ZeroDivisionError):
        run(hybrid, [[1]], {"max_new_tokens": 1}, on_finish=lambda index, result: 1 / 0)
    hybrid.forward([5], states=[state])  # idle again
    del state


def test_interrupt(hybrid, nothing_left):
    """Ctrl-C ends a generation within moments, as KeyboardInterrupt."""
    threading.Timer(0.2, _thread.interrupt_main).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(hybrid, [[1]], {"max_new_tokens": 10**9})
    assert time.monotonic() - started < 5


def test_other_threads_go_on(hybrid):
    """The GIL is free while the core computes: another thread counts, and another generates."""
    counted, results, done = 0, [], threading.Event()

    def work():
        results.extend(run(hybrid, some_prompts(5, 6), {**SAMPLED, "max_new_tokens": 300}))
        done.set()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    while not done.is_set():
        counted += 1
    for thread in threads:
        thread.join()
    assert counted > 100
    assert results[0]["tokens"].tolist() == results[2]["tokens"].tolist()


def test_memory_runs_out_anywhere(hybrid, nothing_left):
    """Each allocation in turn fails: an exception of ours, and nothing leaks."""
    options = {
        **SAMPLED,
        "top_logprobs": 2,
        "logprobs": True,
        "prompt_logprobs": True,
        "repetition_penalty": 1.1,
    }
    draft, failures = build(KINDS["mamba1"], seed=1), 0
    for allowed in range(400):
        _core.trim_memory()
        _core.fail_after(allowed)
        try:
            run(
                hybrid,
                some_prompts(30, 3),
                {**options, "max_new_tokens": 90},
                draft=draft,
                max_batch=1,
            )
            break
        except (_core.OutOfMemoryError, MemoryError):
            failures += 1
        finally:
            _core.fail_after(-1)
    assert 20 < failures < 400
    del draft


# ---- states -------------------------------------------------------------------------------------


def test_prompt_cache(model):
    """From a state that has read a part of the prompt, and from copies and saved images of it."""
    [prompt] = some_prompts(50)
    options = {**SAMPLED, "max_new_tokens": 20, "logprobs": True}
    whole = run(model, [prompt], options)[0]
    for cached in (1, 15, 16, 33, 48, 49):
        state = model.state()
        run(model, [prompt[:cached]], {"max_new_tokens": 0, "state": state})
        assert state.length == cached
        fork, image = state.copy(), state.save()
        restored = _core.State.restore(model, image)
        for one in (state, fork, restored):
            found = run(model, [prompt], {**options, "state": one})[0]
            assert same(found, whole) and found["stats"]["cached_tokens"] == cached
            assert one.length == 50 + 20 - 1


def test_many_requests_from_one_state(model):
    """Requests that begin alike copy one state, which stays as it was."""
    beginning, rest = some_prompts(45)[0], some_prompts(1, 7, 20, seed=1)
    prompts = [np.concatenate([beginning, tail]) for tail in rest]
    options = {**SAMPLED, "max_new_tokens": 12, "logprobs": True}
    state = model.state()
    run(model, [beginning], {"max_new_tokens": 0, "state": state})
    image = state.save()
    found = run(model, prompts, {**options, "origin": state}, max_batch=2)
    assert all(map(same, found, run(model, prompts, options)))
    assert state.save() == image and all(f["stats"]["cached_tokens"] == 45 for f in found)
    with pytest.raises(_core.StateError, match="in use"):
        run(
            model,
            prompts,
            {"origin": state},
            on_tokens=lambda i, t: model.forward([1], states=[state]),
        )
    with pytest.raises(_core.Error, match="not both"):
        run(model, prompts[:1], {"origin": state, "state": model.state()})


def test_a_shared_beginning_is_read_once(story):
    text = " ".join(
        ["One day, Tom and Lily went to the big park.", "They saw a dog under the tree."] * 3
    )
    found = generate(story, [text] * 3 + [text + " It was"], 10, temperature=1.0, seed=[1, 2, 3, 1])
    assert all(g.stats.cached_tokens == len(found[0].prompt_token_ids) - 1 >= 32 for g in found)
    for g, prompt, seed in zip(found, [text] * 3 + [text + " It was"], [1, 2, 3, 1], strict=True):
        [alone] = generate(story, prompt, 10, temperature=1.0, seed=seed)
        assert alone.token_ids == g.token_ids and alone.stats.cached_tokens == 0


def test_a_state_goes_on(model):
    """Generating in two parts through the state is generating at once."""
    [prompt] = some_prompts(21)
    options = {**SAMPLED, "logprobs": True}
    whole = run(model, [prompt], {**options, "max_new_tokens": 40})[0]["tokens"].tolist()
    state, text = model.state(), prompt.tolist()
    for count in (1, 14, 2, 23):
        text += run(model, [text], {**options, "max_new_tokens": count, "state": state})[0][
            "tokens"
        ].tolist()
        assert state.length == len(text) - 1
    assert text[21:] == whole


def test_a_state_of_the_whole_prompt(hybrid):
    """Its last token is read again where it can be taken back; else the message says what to do."""
    [prompt] = some_prompts(40)
    expected = run(hybrid, [prompt], {**SAMPLED, "max_new_tokens": 5})[0]["tokens"].tolist()
    state = hybrid.state()
    run(hybrid, [prompt], {"max_new_tokens": 0, "state": state})
    found = run(hybrid, [prompt], {**SAMPLED, "max_new_tokens": 5, "state": state})[0]
    assert found["tokens"].tolist() == expected
    state = hybrid.state()
    run(hybrid, [prompt[:32]], {"max_new_tokens": 0, "state": state})
    with pytest.raises(_core.StateError, match="at least one token shorter"):
        run(hybrid, [prompt[:32]], {"state": state})


def test_cut_leaves_the_state_at_the_cut(model):
    """After a callback's cut the state has read the kept tokens only, and can go on from them."""
    [prompt] = some_prompts(19)
    state, heard = model.state(), []

    def on_tokens(index, tokens):
        heard.extend(tokens)
        return len(tokens) if len(heard) >= 9 else None

    options = {"max_new_tokens": 30, "logprobs": True}
    text = (
        prompt.tolist()
        + run(model, [prompt], {**options, "state": state}, on_tokens=on_tokens)[0][
            "tokens"
        ].tolist()
    )
    assert state.length <= len(text)
    text.append(7)  # somebody else's turn
    assert same(run(model, [text], {**options, "state": state})[0], run(model, [text], options)[0])


def test_states_that_do_not_fit(hybrid):
    state, other = hybrid.state(), build(KINDS["transformer"]).state()
    with pytest.raises(_core.StateError, match="another model"):
        run(hybrid, [[1, 2]], {"state": other})
    with pytest.raises(_core.StateError, match="in use by another"):
        _core.generate(hybrid, [{"prompt": [1], "state": state}, {"prompt": [1], "state": state}])
    with pytest.raises(_core.StateError, match="in use by another"):
        run(
            hybrid,
            [[1]],
            {"state": state},
            on_tokens=lambda i, t: hybrid.forward([1], states=[state]),
        )
    run(hybrid, [[1, 2, 3]], {"max_new_tokens": 0, "state": state})
    with pytest.raises(_core.StateError, match="more than the prompt"):
        run(hybrid, [[1, 2]], {"state": state})
    with pytest.raises(_core.Error, match="draft_state"):
        run(hybrid, [[1, 2]], {"draft_state": hybrid.state()})


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({}, "no prompt"), ({"prompt": []}, "empty"), ({"prompt": [61]}, "61"),
        ({"prompt": [-1]}, "-1"),
        ({"prompt": [[1]]}, "one axis"), ({"prompt": "text"}, "integers"),
        ({"prompt": [2**40]}, "1099511627776"),
        ({"prompt": [1], "max_new_tokens": -1}, "max_new_tokens"),
        ({"prompt": [1], "max_new_tokens": 1.5}, "max_new"),
        ({"prompt": [1], "max_new_tokens": 2**70}, "max_new_tokens"),
        ({"prompt": [1], "temperature": np.nan}, "temper"),
        ({"prompt": [1], "draft_tokens": 16}, "draft_tokens"),
        ({"prompt": [1], "top_logprobs": 62}, "top_logprobs"),
        ({"prompt": [1], "top_logprobs": -1}, "top_logprobs"),
        ({"prompt": [1], "stop": ["a"]}, "stop"), ({"prompt": [1], "state": 5}, "state"),
        ({"prompt": [1], "topk": 5}, "unknown key"), (5, "dict"),
    ],
)  # fmt: skip
def test_error_messages(hybrid, request_, words):
    with pytest.raises(_core.Error, match=words) as caught:
        _core.generate(hybrid, [{"prompt": [1]}, request_])
    assert "\n" not in str(caught.value)


def test_requests_that_change_while_they_are_read(hybrid):
    """Numbers may be objects with code of their own; what was given first is what counts."""

    class Two:
        def __init__(self, forget):
            self.forget = forget

        def __index__(self):
            self.forget()
            return 2

    requests = []
    first = {"prompt": [1, 2], "max_new_tokens": Two(requests.clear), "state": hybrid.state()}
    requests += [first, {"prompt": [3], "max_new_tokens": 1}]
    second = {"prompt": [1, 2], "state": hybrid.state()}
    second["max_new_tokens"] = Two(second.clear)
    expected = run(hybrid, [[1, 2]], {"max_new_tokens": 2})[0]["tokens"].tolist()
    found = [*_core.generate(hybrid, requests), *_core.generate(hybrid, [second])]
    assert [f["tokens"].size for f in found] == [2, 1, 2]
    assert found[0]["tokens"].tolist() == found[2]["tokens"].tolist() == expected
    assert requests == [] and second == {}
    layers = [dict(layer) for layer in hybrid.config["layers"]]
    config = {**hybrid.config, "layers": layers}
    layers[0]["conv_width"] = Two(layers.clear)
    assert len(_core.Model.parameter_specs(config)) > len(layers) == 0


def test_non_finite_weights():
    model = build(KINDS["transformer"])
    model.parameters()["model.norm.weight"][3] = np.inf
    with pytest.raises(_core.NonFiniteError, match="logit of token"):
        run(model, some_prompts(3, 4))
    with pytest.raises(_core.NonFiniteError, match="logit of token"):
        score(model, some_prompts(3, 4))


# ---- mil.generate -------------------------------------------------------------------------------

PROMPTS = ["Once upon a time", "Lily and Tom went to the park.", "The"]


def test_story(story):
    found = generate(story, PROMPTS, max_new_tokens=30)
    assert [g.finish_reason for g in found] == ["length"] * 3
    for prompt, g in zip(PROMPTS, found, strict=True):
        assert g.prompt_token_ids == story.tokenizer.encode(prompt)
        whole = story.tokenizer.decode(g.prompt_token_ids + g.token_ids)
        assert prompt + g.text == whole and len(g.token_ids) == 30
        logits = story([g.prompt_token_ids + g.token_ids])[0]
        assert g.token_ids == logits[len(g.prompt_token_ids) - 1 : -1].argmax(-1).tolist()
    assert found[0].stats.tokens_per_second > 0 and found[0].stats.acceptance == 0
    [single] = generate(story, PROMPTS[1], max_new_tokens=30)
    assert single.text == found[1].text
    [single] = generate(story, np.array(found[1].prompt_token_ids), max_new_tokens=30)
    assert single.token_ids == found[1].token_ids


def test_story_ends(story):
    """Left alone it ends with its end token; with [] it never does."""
    [ended] = generate(story, "Once", max_new_tokens=400, temperature=1.0, seed=4)
    assert ended.finish_reason == "stop" and not set(ended.token_ids) & set(story.stop_tokens)
    [endless] = generate(
        story, "Once", max_new_tokens=len(ended.token_ids) + 5, temperature=1.0, seed=4, stop=[]
    )
    assert endless.finish_reason == "length"
    assert endless.token_ids[: len(ended.token_ids) + 1] == [*ended.token_ids, story.stop_tokens[0]]


@pytest.mark.parametrize("draft", [None, "ngram"])
def test_stop_strings(story, draft):
    [free] = generate(story, PROMPTS[0], max_new_tokens=80)
    for stop in (" was", "little", "e", free.text[30:37], free.text[:1], "no such words"):
        pieces = []
        [g] = generate(
            story,
            PROMPTS[0],
            80,
            stop=stop,
            draft=draft,
            on_text=lambda *args, to=pieces: to.append(args[1]),
        )
        end = free.text.find(stop)
        assert g.text == (free.text[:end] if end >= 0 else free.text) == "".join(pieces)
        assert g.finish_reason == ("stop" if end >= 0 else "length")
        assert g.token_ids == free.token_ids[: len(g.token_ids)]
        assert end < 0 or stop in story.tokenizer.decode(g.prompt_token_ids + g.token_ids)
    [g] = generate(story, PROMPTS[0], 80, stop=["was", "!", free.text[5:9]])
    assert (
        g.text
        == free.text[: min(free.text.find(s) for s in ("was", free.text[5:9]) if s in free.text)]
    )
    [g] = generate(story, PROMPTS[0], 400, stop=["<|end_story|>"])  # a special token, given as text
    assert g.finish_reason == "stop" and "end_story" not in g.text


def test_streaming(story):
    """Pieces put together are the text, and tokens the tokens, for every prompt."""
    pieces, tokens = {0: "", 1: "", 2: ""}, {0: [], 1: [], 2: []}

    def on_text(index, piece):
        assert piece
        pieces[index] += piece

    found = generate(
        story, PROMPTS, 40, temperature=0.8, seed=[1, 2, 3], draft="ngram", on_text=on_text,
        on_tokens=lambda index, new: tokens[index].extend(new),
    )  # fmt: skip
    assert [g.text for g in found] == list(pieces.values())
    assert [g.token_ids for g in found] == list(tokens.values())
    assert [
        g.text for g in generate(story, PROMPTS, 40, temperature=0.8, seed=[1, 2, 3], draft="ngram")
    ] == list(pieces.values())
    [g] = generate(story, PROMPTS[0], 40, on_text=lambda index, piece: "," in piece or None)
    assert g.finish_reason == ("cancelled" if "," in g.text else "length")


def test_stop_strings_across_tokens():
    """The writer holds back what may begin a stop string, and not a character more."""

    class Letters:
        def stream(self, skip):
            return self

        def push(self, token):
            return chr(token)

        def held(self):
            return ""

        def finish(self):
            return ""

    class Model:
        tokenizer = Letters()

    def play(text, stops):
        writer = Writer(Model, np.zeros(0, np.int32), stops, True)
        given = []
        for letter in text:
            piece, keep = writer.push([ord(letter)])
            given.append(piece)
            if keep is not None:
                break
        return given, writer.close()

    assert play("abcabd", ["abd"]) == (["", "", "abc", "", "", ""], "abc")
    assert play("aaab", ["aab"]) == (["", "", "a", ""], "a")
    assert play("xyz", ["zz"]) == (["x", "y", ""], "xyz")
    assert play("hello", ["lo", "ell"]) == (["h", "", "", ""], "h")


def test_prompts_that_end_in_a_replacement_character(tmp_path):
    """It is the prompt's, and no part of the answer, unless the answer completes a character."""
    model = mil.load(write_llama(tmp_path / "bytes"))
    prompts = ["\ufffd", "a\ufffd\ufffd", model.tokenizer.encode("\U0001f642")[:2]]
    for count in (0, 3):
        options = {"max_new_tokens": count, "stop": []}
        pieces = ["", "", ""]

        def hear(index, piece, pieces=pieces):
            pieces[index] += piece

        answers = generate(model, prompts, **options)
        streamed = generate(model, prompts, on_text=hear, **options)
        for prompt, answer, again, heard in zip(prompts, answers, streamed, pieces, strict=True):
            before = prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)
            whole = model.tokenizer.decode([*answer.prompt_token_ids, *answer.token_ids])
            assert answer.text == again.text == heard == whole.removeprefix(before)
    smile = model.tokenizer.encode("\U0001f642!")
    writer = Writer(model, np.array(smile[:2]), [], True)
    assert "".join(writer.push([token])[0] for token in smile[2:]) == "\U0001f642!"


def test_log_probability_results(story):
    [g] = generate(story, PROMPTS[0], 10, prompt_logprobs=True, top_logprobs=4, temperature=1.0)
    logits = log_softmax(story([g.prompt_token_ids + g.token_ids])[0])
    n = len(g.prompt_token_ids)
    np.testing.assert_allclose(g.logprobs, logits[np.arange(n - 1, n + 9), g.token_ids], atol=1e-6)
    assert len(g.top_logprobs) == 10 and all(len(top) == 4 for top in g.top_logprobs)
    assert list(g.top_logprobs[0]) == np.argsort(-logits[n - 1], kind="stable")[:4].tolist()
    assert len(g.prompt_top_logprobs) == n and g.prompt_top_logprobs[0] == {}
    [plain] = generate(story, PROMPTS[0], 3)
    assert plain.logprobs is None and plain.top_logprobs is None and plain.prompt_logprobs is None


def test_score(story):
    found = score(story, PROMPTS)
    for prompt, one in zip(PROMPTS, found, strict=True):
        ids = story.tokenizer.encode(prompt)
        logits = log_softmax(story([ids])[0])
        expected = logits[np.arange(len(ids) - 1), ids[1:]]
        assert one.token_ids == ids
        np.testing.assert_allclose(one.logprobs[1:], expected, atol=1e-6)
        assert one.total == pytest.approx(expected.sum(), abs=1e-5)
        assert one.perplexity == pytest.approx(np.exp(-expected.mean()), rel=1e-5)
        assert one.greedy[1:].tolist() == (logits[:-1].argmax(-1) == ids[1:]).tolist()


def test_states_of_loaded_models(story):
    """As docs/generation.md shows: room, saving and restoring with what `mil.load` gives."""
    prompt, options = "Once upon a time", {"max_new_tokens": 20, "stop": []}
    [whole] = generate(story, prompt, **options)
    state = story.state(100)
    tokens = whole.prompt_token_ids + whole.token_ids[:7]
    generate(story, [tokens], max_new_tokens=0, states=[state])
    for model in (story, story.core):
        restored = mil.State.restore(model, state.save())
        [rest] = generate(story, [tokens + whole.token_ids[7:8]], states=[restored], **options)
        assert rest.token_ids[:12] == whole.token_ids[8:]
        assert rest.stats.cached_tokens == len(tokens)
    for other in (None, "story", state):
        with pytest.raises(mil.DtypeError, match="not a Model"):
            mil.State.restore(other, state.save())
    for capacity in (-1, 2.5, "4", 10**30):
        with pytest.raises(mil.ArgumentError, match="capacity"):
            story.state(capacity)


def test_options_for_each_prompt(story):
    settings = {
        "max_new_tokens": [3, 7, 0],
        "temperature": [0.0, 1.0, 0.5],
        "seed": (5, 6, 7),
        "top_k": [0, 4, 2],
    }
    found = generate(story, PROMPTS, **settings)
    for i in range(3):
        alone = generate(story, PROMPTS[i], **{key: values[i] for key, values in settings.items()})
        assert found[i].token_ids == alone[0].token_ids
    with pytest.raises(mil.ArgumentError, match="seed has 2 values for 3 prompts"):
        generate(story, PROMPTS, seed=[1, 2])


def test_chats(story):
    chat = [{"role": "user", "content": "Hello"}]
    with pytest.raises(mil.Error, match="chat template"):
        generate(story, chat)
    tokenizer = story.tokenizer
    try:
        tokenizer.chat_template = mil.chat.ChatTemplate(
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}me: {% endif %}"
        )
        [one] = generate(story, chat, 5)
        assert one.prompt_token_ids == tokenizer.encode(
            "user: Hello\nme: ", add_special_tokens=False
        )
        two = generate(story, [chat, chat], 5)
        assert [g.token_ids for g in two] == [one.token_ids] * 2
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompts": [[]]}, "prompt 0 is empty"),
        ({"prompts": ["a", [1, 2048]]}, "prompt 1 holds token 2048"),
        ({"prompts": [[1.5]]}, "prompt 0"), ({"prompts": [None]}, "prompt 0"),
        ({"prompts": 5.0}, "prompt 0"),
        ({"prompts": [[1], [[2]]]}, "prompt 1"), ({"stop": 1.5}, "stop"), ({"stop": [""]}, "stop"),
        ({"stop": [None]}, "stop"), ({"draft": "trigram"}, "draft"), ({"draft": 5}, "draft|model"),
        ({"draft_tokens": 0.5}, "draft_tokens"), ({"draft_tokens": 99}, "draft_tokens"),
        ({"temperature": -1}, "temper"), ({"temperature": float("nan")}, "temperature"),
        ({"max_new_tokens": -1}, "max_new_tokens"), ({"max_new_tokens": "ten"}, "max_new_tokens"),
        ({"top_p": 0}, "top_p"), ({"states": [None, None]}, "states"),
        ({"max_batch": -3}, "max_batch"), ({"model": "story-llama"}, "mil.load"),
        ({"max_batch": 2.5}, "max_batch"), ({"prefill_rows": 2**70}, "prefill_rows"),
        ({"states": 5}, "states"), ({"states": ["a"]}, "states"), ({"stop": b"ab"}, "stop"),
        ({"on_text": 5}, "on_text must"), ({"on_tokens": "print"}, "on_tokens must"),
        ({"prompts": np.array("a")}, "prompt 0"), ({"draft": 7}, "draft must come from"),
    ],
)  # fmt: skip
def test_public_error_messages(story, settings, words):
    with pytest.raises(mil.Error, match=words) as caught:
        generate(**{"model": story, "prompts": "Once", "max_new_tokens": 2, **settings})
    assert "\n" not in str(caught.value)


def test_without_a_tokenizer(hybrid):
    [g] = generate(hybrid, [1, 2, 3], 4)
    assert g.text == "" and len(g.token_ids) == 4
    assert generate(hybrid, []) == []
    with pytest.raises(mil.ArgumentError, match="no tokenizer"):
        generate(hybrid, "text")
    with pytest.raises(mil.ArgumentError, match="no tokenizer"):
        generate(hybrid, [1], stop="text")


def test_sampled_text_has_the_filtered_distribution(hybrid):
    """First tokens over many seeds, against the float64 filters."""
    from reference.sampler import chi_square_p

    options = {"temperature": 1.3, "top_k": 12, "max_new_tokens": 1}
    [prompt] = some_prompts(6)
    requests = [{"prompt": prompt, **options, "seed": seed} for seed in range(2000)]
    tokens = [r["tokens"][0] for r in _core.generate(hybrid, requests, max_batch=256)]
    expected = distribution(hybrid.forward(prompt, rows="last")[0], temperature=1.3, top_k=12)
    assert chi_square_p(np.bincount(tokens, minlength=VOCAB), 2000 * expected) > 1e-3
