"""Models on a CUDA device: the CPU's logits, and the same bits in any company.

float32 logits agree with the CPU's to 1e-5 of the largest. 16-bit models keep activations in 16
bits on a GPU, so they are judged against float32 of the same rounded weights. A row's logits are
the same bits alone, among the up to 16 rows of a verify window, and in a batch of up to 16 rows.
"""

import numpy as np
import pytest
from core_models import (
    KINDS,
    build,
    configuration,
    random_parameters,
    relative,
    rows_alone_and_in_windows,
    some_tokens,
    to_bfloat16,
)
from reference.sampler import chi_square_p
from tiny_models import write_llama

import mambainllama as mil
from mambainllama import _core
from mambainllama.devices import cuda_devices, operator_table

pytestmark = pytest.mark.skipif(
    not cuda_devices(), reason="no CUDA device here, or a build without CUDA operators"
)

LOGITS = 1e-5
DTYPES = {"float32": LOGITS, "bfloat16": 6e-2, "float16": 1.5e-2}


@pytest.fixture(params=KINDS, ids=str)
def kind(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_match_the_cpu(kind, dtype):
    cpu, gpu = (build(KINDS[kind], dtype=dtype, device=d) for d in ("cpu", "cuda:0"))
    lengths = [1, 37, 16, 50, 300]
    tokens, offsets = some_tokens(cpu, sum(lengths)), np.cumsum([0, *lengths])
    expected = cpu.forward(tokens, offsets)
    got = gpu.forward(tokens, offsets)
    assert np.isfinite(got).all()
    assert relative(got, expected) < DTYPES[dtype]
    states = [gpu.state() for _ in lengths]
    assert relative(gpu.forward(tokens, offsets, states=states), expected) < DTYPES[dtype]


@pytest.mark.parametrize("sizes", [[1] * 75, [75], [16] * 4 + [11], [17, 5, 5, 1, 40, 7]], ids=str)
def test_states_go_on_where_they_stopped(kind, sizes):
    cpu, gpu = build(KINDS[kind]), build(KINDS[kind], device="cuda:0")
    tokens = some_tokens(cpu, 75)
    expected = cpu.forward(tokens, states=[cpu.state()])
    state, at, parts = gpu.state(), 0, []
    for size in sizes:
        parts.append(gpu.forward(tokens[at : at + size], states=[state]))
        at += size
    assert relative(np.concatenate(parts), expected) < LOGITS


@pytest.mark.parametrize("dtype", DTYPES)
def test_windows_and_batches_give_the_same_bits(kind, dtype):
    """From a common prompt: one by one, in windows, and beside other sequences."""
    model = build(KINDS[kind], dtype=dtype, device="cuda:0")
    tokens = some_tokens(model, 120)
    state = model.state()
    model.forward(tokens[:37], states=[state], rows="none")
    alone = rows_alone_and_in_windows(model, state, tokens[37:])
    batch = [state.copy() for _ in range(3)]
    others = [some_tokens(model, 120, seed) for seed in (1, 2)]
    for at in range(37, 117, 5):
        rows = [tokens[at : at + 5], others[0][at : at + 4], others[1][at : at + 7]]
        logits = model.forward(
            np.concatenate(rows), np.cumsum([0, *(len(r) for r in rows)]), states=batch
        )
        np.testing.assert_array_equal(logits[:5], alone[at - 37 : at - 32])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rollback_is_as_if_it_had_never_happened(kind, dtype):
    model = build(KINDS[kind], dtype=dtype, device="cuda:0")
    rng = np.random.default_rng(1)
    tokens = some_tokens(model, 150)
    single = model.state()
    whole = np.concatenate([model.forward([t], states=[single]) for t in tokens])
    state, at = model.state(), 0
    while at + 17 < len(tokens):
        count = int(rng.integers(1, 17))
        wrong = some_tokens(model, count, seed=at + 100)
        kept = int(rng.integers(0, count + 1))
        wrong[:kept] = tokens[at : at + kept]
        logits = model.forward(wrong, states=[state])
        np.testing.assert_array_equal(logits[:kept], whole[at : at + kept])
        state.rollback(count - kept)
        at += kept


def test_fork_save_restore(kind):
    model = build(KINDS[kind], device="cuda:0")
    tokens = some_tokens(model, 60)
    state = model.state()
    model.forward(tokens[:45], states=[state])
    fork, image = state.copy(), state.save()
    expected = model.forward(tokens[45:], states=[state])
    for other in (fork, _core.State.restore(model, image)):
        np.testing.assert_array_equal(model.forward(tokens[45:], states=[other]), expected)


def test_captures(kind):
    cpu, gpu = build(KINDS[kind]), build(KINDS[kind], device="cuda:0")
    tokens = some_tokens(cpu, 21)
    wanted = [("hidden", i) for i in range(len(KINDS[kind]))] + [("mixer", 0), ("final", 0)]
    for got, expected in zip(
        gpu.forward(tokens, capture=wanted)[1], cpu.forward(tokens, capture=wanted)[1], strict=True
    ):
        assert relative(got, expected) < LOGITS


# ---- generation --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama"), layers=4, hidden=64, scale=3.0)


@pytest.fixture(scope="module", params=[None, "mamba1", "mamba2"], ids=str)
def saved(request, folder, tmp_path_factory):
    if request.param is None:
        return folder
    student = mil.convert(mil.load(folder), mixer=request.param, attention_layers=[1], init="paper")
    return student.save(tmp_path_factory.mktemp("student") / "model")


PROMPTS = ["a", "the state", "01"]  # 12 rows: up to 16 a pass share their bits


def ids(generations):
    return [g.token_ids for g in generations]


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_alone_in_a_batch_and_with_drafts(saved, dtype):
    model = mil.load(saved, device="cuda", dtype=dtype)
    assert model.device == "cuda:0"
    alone = [ids(mil.generate(model, [p], max_new_tokens=50, stop=[]))[0] for p in PROMPTS]
    assert ids(mil.generate(model, PROMPTS, max_new_tokens=50, stop=[])) == alone
    for draft in ("ngram", model):
        drafted = mil.generate(
            model, PROMPTS, max_new_tokens=50, stop=[], draft=draft, draft_tokens=3
        )
        assert ids(drafted) == alone
    if dtype == "float32":
        cpu = mil.load(saved, device="cpu", dtype=dtype)
        assert ids(mil.generate(cpu, PROMPTS, max_new_tokens=50, stop=[])) == alone


def test_sampling_repeats(saved):
    model = mil.load(saved, device="cuda")
    settings = dict(max_new_tokens=40, temperature=0.9, top_k=30, top_p=0.95, seed=7, stop=[])
    first = ids(mil.generate(model, PROMPTS, **settings))
    assert ids(mil.generate(model, PROMPTS, **settings)) == first
    assert [ids(mil.generate(model, [p], **settings))[0] for p in PROMPTS] == first
    cpu = mil.load(saved, device="cpu")
    agreeing = np.mean(
        [
            a == b
            for x, y in zip(ids(mil.generate(cpu, PROMPTS, **settings)), first, strict=True)
            for a, b in zip(x, y, strict=True)
        ]
    )
    assert agreeing > 0.9  # rounding may turn a draw that lies on an edge


def test_stop_strings_and_logprobs(saved):
    model = mil.load(saved, device="cuda")
    cpu = mil.load(saved)
    for settings in (dict(logprobs=True), dict(prompt_logprobs=True), dict(stop=["e", "1"])):
        got = mil.generate(model, PROMPTS, max_new_tokens=20, **settings)
        expected = mil.generate(cpu, PROMPTS, max_new_tokens=20, **settings)
        assert [g.text for g in got] == [g.text for g in expected]


# ---- what goes wrong ----------------------------------------------------------------------------


def test_errors_are_one_line(folder):
    count = len(cuda_devices())
    with pytest.raises(mil.DeviceError, match=f"cuda:{count}"):
        mil.load(folder, device=f"cuda:{count}")
    model, other = mil.load(folder, device="cuda"), mil.load(folder)
    with pytest.raises(mil.DeviceError, match="training runs on the CPU"):
        mil.distill(model, other, np.zeros((2, 8), np.int32))
    with pytest.raises(mil.Error):
        mil.generate(model, ["a"], draft=other)


# ---- speculative rounds without the host -------------------------------------------------------
#
# Requests that ask for log-probabilities take rounds with the host, so the same request with and
# without them compares both ways.

SPECULATED = ["transformer", "mamba1 hybrid", "mamba2 hybrid", "both mixers", "mamba1", "mamba2"]


def noisy(kind, amount, dtype="float32", **changes):
    """A draft that often agrees with build(KINDS[kind]): its parameters with some noise."""
    config = configuration(KINDS[kind], **changes)
    rng = np.random.default_rng(9)
    parameters, dtypes = random_parameters(config, 0), {}
    matrices = {name for name, _, is_matrix, _ in _core.Model.parameter_specs(config) if is_matrix}
    for name, value in parameters.items():
        value = value + amount * value.std() * rng.standard_normal(value.shape)
        parameters[name] = value.astype(np.float32)
        if dtype == "bfloat16" and name in matrices:
            parameters[name], dtypes[name] = to_bfloat16(parameters[name]), "bfloat16"
    return _core.Model(config, parameters, dtypes, operator_table("cuda:0", dtype))


def some_prompts(model, *lengths):
    prompts = [some_tokens(model, length, seed=length) for length in lengths]
    return [np.tile(prompt, 2) for prompt in prompts]  # so that n-grams are found


def generated(model, prompts, draft=None, *, max_batch=16, force=0.0, **options):
    requests = [{"prompt": p, "seed": i, "stop": [], **options} for i, p in enumerate(prompts)]
    return _core.generate(
        model, requests, draft=draft, max_batch=max_batch, _force_acceptance=force
    )


def tokens_of(found):
    return [one["tokens"].tolist() for one in found]


def total(found, what):
    return sum(one["stats"][what] for one in found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("drafts", [1, 4, 15])
@pytest.mark.parametrize("name", SPECULATED)
def test_greedy_rounds_on_the_device(name, drafts, dtype):
    """The tokens of plain decoding, and round for round those of rounds with the host."""
    model = build(KINDS[name], dtype=dtype, device="cuda:0")
    prompts = some_prompts(model, 1, 9, 30)[: 16 // (drafts + 1) or 1]
    expected = tokens_of(generated(model, prompts, max_new_tokens=90))
    common = {"max_new_tokens": 90, "draft_tokens": drafts, "fixed_draft": True}
    for draft in (noisy(name, 0.2, dtype), "ngram"):
        device = generated(model, prompts, draft, **common)
        host = generated(model, prompts, draft, logprobs=True, **common)
        assert tokens_of(device) == expected
        assert tokens_of(host) == expected
        # A recorded round reads the token before the last again: by another kernel, if that was in
        # the prompt, so a draft's bits are not those of the host's rounds.
        exact = dtype == "float32" or draft == "ngram"
        for what in ("rounds", "accepted"):
            expected_total = total(host, what)
            allowed = 0 if exact else 2 + 0.1 * expected_total
            assert abs(total(device, what) - expected_total) <= allowed
        adapting = generated(model, prompts, draft, max_new_tokens=90, draft_tokens=drafts)
        assert tokens_of(adapting) == expected


@pytest.mark.parametrize("batch", [20, 40, 130])
@pytest.mark.parametrize("name", SPECULATED)
def test_greedy_batches_of_many(name, batch):
    """Beyond 16 rows products are other kernels: the same tokens, also where texts join."""
    model = build(KINDS[name], device="cuda:0")
    prompts = some_prompts(model, *(1 + i % 40 for i in range(batch)))
    several = [{"max_new_tokens": 40 + i % 7} for i in range(batch)]
    requests = [{"prompt": p, "stop": [], **more} for p, more in zip(prompts, several, strict=True)]
    expected = tokens_of(_core.generate(model, requests, max_batch=16))
    for most in (batch, batch - batch // 3):
        assert tokens_of(_core.generate(model, requests, max_batch=most)) == expected


@pytest.mark.parametrize("name", SPECULATED)
def test_texts_that_need_logits_on_the_host_beside_others(name):
    """While texts join, tokens are drawn on the device where a request allows it, from the logits
    where not: each text is what it is alone."""
    model = build(KINDS[name], device="cuda:0")
    settings = [
        {},
        {"logprobs": True},
        {"temperature": 0.8, "seed": 3},
        {"repetition_penalty": 1.3},
        {"temperature": 1.1, "top_k": 9, "top_p": 0.9, "seed": 4},
        {"prompt_logprobs": True},
        {"max_new_tokens": 0},
        {"logprobs": True, "temperature": 0.8, "seed": 3},
    ]
    requests = [
        {"prompt": prompt, "stop": [], "max_new_tokens": 5 + 4 * i, **one}
        for i, (prompt, one) in enumerate(
            zip(some_prompts(model, *[1] * len(settings)), settings, strict=True)
        )
    ]
    alone = [tokens_of(_core.generate(model, [request]))[0] for request in requests]
    for most in (2, 5, 8):
        together = _core.generate(model, requests, max_batch=most)
        assert tokens_of(together) == alone
    # A greedy token is the same either way; a sampled one may lie on an edge of rounding.
    assert tokens_of(_core.generate(model, [{**requests[0], "logprobs": True}])) == [alone[0]]


def test_logits_that_are_not_finite():
    config = configuration(KINDS["mamba2 hybrid"])
    parameters = random_parameters(config, 0)
    parameters["model.norm.weight"][:] = np.nan
    model = _core.Model(config, parameters, {}, operator_table("cuda:0", "float32"))
    for wanted in (False, True):
        with pytest.raises(mil.NonFiniteError, match="not finite|logit of token"):
            _core.generate(model, [{"prompt": [1, 2], "logprobs": wanted}])


@pytest.mark.parametrize("drafts", [2, 5, 15])
@pytest.mark.parametrize("name", SPECULATED)
def test_the_model_itself_is_a_draft_that_is_always_right_in_recorded_rounds(name, drafts):
    """Its one-row passes give the bits of verified rows, across windows' ends and after every
    round's going back."""
    model, draft = build(KINDS[name], device="cuda:0"), noisy(name, 0.0)
    options = {"max_new_tokens": 120, "draft_tokens": drafts, "fixed_draft": True}
    for length in (2, 8, 15):
        found = generated(model, some_prompts(model, length), draft, **options)
        # The one token that is read twice (in the prompt, and by the first recorded round) may
        # have other last bits the second time.
        assert total(found, "drafted") - total(found, "accepted") <= 1
        assert total(found, "rounds") <= 3 + 120 / drafts


@pytest.mark.parametrize("settings", [{}, {"top_k": 12, "top_p": 0.9}, {"min_p": 0.05}], ids=str)
@pytest.mark.parametrize("name", SPECULATED)
def test_sampled_rounds_on_the_device(name, settings):
    """The same draws as with the host, but for those that lie on an edge of rounding."""
    model = build(KINDS[name], device="cuda:0")
    draft = noisy(name, 0.2)
    common = {"max_new_tokens": 40, "draft_tokens": 4, "fixed_draft": True, "temperature": 0.8}
    same = count = 0
    for start in range(2, 20, 3):
        prompts = some_prompts(model, start, start + 1, start + 2)
        for kind in (draft, "ngram"):
            device = generated(model, prompts, kind, **common, **settings)
            host = generated(model, prompts, kind, logprobs=True, **common, **settings)
            same += sum(a == b for a, b in zip(tokens_of(device), tokens_of(host), strict=True))
            count += len(prompts)
    assert same >= 0.9 * count


def test_a_draft_that_lacks_tokens():
    """Texts with a token that the draft does not know are drafted for no more."""
    model = build(KINDS["mamba2 hybrid"], device="cuda:0")
    draft = noisy("mamba2 hybrid", 0.1, vocab=50)
    prompts = [p % 50 for p in some_prompts(model, 4, 11, 23)]
    common = {"max_new_tokens": 80, "draft_tokens": 4, "fixed_draft": True}
    expected = tokens_of(generated(model, prompts, max_new_tokens=80))
    assert tokens_of(generated(model, prompts, draft, **common)) == expected
    hot = {**common, "temperature": 1.5}
    device = generated(model, prompts, draft, **hot)
    assert any(token >= 50 for text in tokens_of(device) for token in text)


@pytest.mark.parametrize("name", ["mamba1 hybrid", "mamba2"])
def test_rounds_on_the_device_leave_lent_states_at_the_end(name):
    model = build(KINDS[name], device="cuda:0")
    draft = noisy(name, 0.2)
    [prompt] = some_prompts(model, 12)
    [free] = tokens_of(generated(model, [prompt], max_new_tokens=100))
    for stop in sorted(set(free[5:60]), key=free.index)[:8]:
        for kind in (draft, "ngram"):
            state = model.state()
            request = {"prompt": prompt, "max_new_tokens": 60, "stop": [stop], "state": state}
            request |= {"draft_tokens": 4, "fixed_draft": True}
            [found] = _core.generate(model, [request], draft=kind)
            text = found["tokens"].tolist()
            assert text == free[: free.index(stop)] or len(text) == 60
            rest = {"prompt": np.concatenate([prompt, text, [stop]]), "state": state}
            rest |= {"max_new_tokens": 20, "stop": []}
            if len(text) < 60:
                [more] = _core.generate(model, [rest])
                assert more["tokens"].tolist() == free[len(text) + 1 :][:20]


def test_rounds_of_a_large_batch_and_a_forced_acceptance():
    model = build(KINDS["mamba1 hybrid"], device="cuda:0")
    prompts = some_prompts(model, *range(1, 33))
    common = {"max_new_tokens": 70, "draft_tokens": 4, "fixed_draft": True}
    for draft in (noisy("mamba1 hybrid", 0.2), "ngram"):
        found = generated(model, prompts, draft, max_batch=20, force=0.6, **common)
        assert all(len(one["tokens"]) == 70 for one in found)
        each = total(found, "new_tokens") / total(found, "rounds")
        assert each == pytest.approx(1 + 0.6 + 0.36 + 0.216 + 0.1296, abs=0.15)
        adapting = generated(
            model, prompts, draft, max_batch=20, force=0.01, max_new_tokens=300, draft_tokens=8
        )
        assert total(adapting, "drafted") < total(adapting, "new_tokens")


def test_sampled_rounds_on_the_device_have_the_right_distribution():
    model = build(KINDS["mamba2 hybrid"], device="cuda:0", vocab=5)
    draft = noisy("mamba2 hybrid", 0.5, vocab=5)
    prompt = np.array([1, 3, 2, 1, 3], np.int32)
    counts = np.zeros((5, 5, 5), np.int64)
    request = {"prompt": prompt, "max_new_tokens": 4, "temperature": 1.0, "stop": []}
    request |= {"draft_tokens": 2, "fixed_draft": True}
    requests = [{**request, "seed": seed} for seed in range(10_000)]
    found = _core.generate(model, requests, draft=draft, max_batch=500)
    for one in found:
        counts[tuple(one["tokens"][:3])] += 1
    cpu = build(KINDS["mamba2 hybrid"], vocab=5)
    prefixes = [(i, j) for i in range(5) for j in range(5)]
    texts = np.array([[*prompt, *prefix] for prefix in prefixes], np.int32)
    logits = cpu.forward(texts.ravel(), np.arange(26) * 7).reshape(25, 7, 5).astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    first, second, third = p[0, 4], p[::5, 5], p[:, 6].reshape(5, 5, 5)
    expected = first[:, None, None] * second[:, :, None] * third
    assert chi_square_p(counts, 10_000 * expected) > 1e-4
