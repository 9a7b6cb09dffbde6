"""Models on a CUDA device: the CPU's logits, and the same bits in any company.

float32 logits agree with the CPU's to 1e-5 of the largest. 16-bit models keep activations in 16
bits on a GPU, so they are judged against float32 of the same rounded weights. A row's logits are
the same bits alone, among the up to 16 rows of a verify window, and in a batch of up to 16 rows.
"""

import numpy as np
import pytest
from core_models import KINDS, build
from tiny_models import write_llama

import mambainllama as mil
from mambainllama import _core
from mambainllama.devices import cuda_devices

pytestmark = pytest.mark.skipif(
    not cuda_devices(), reason="no CUDA device here, or a build without CUDA operators"
)

LOGITS = 1e-5
DTYPES = {"float32": LOGITS, "bfloat16": 6e-2, "float16": 1.5e-2}


def some_tokens(model, count, seed=0):
    return np.random.default_rng(seed).integers(0, model.config["vocab"], count).astype(np.int32)


def relative(a, b):
    return np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max() / np.abs(b).max()


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
    single = state.copy()
    alone = np.concatenate([model.forward([t], states=[single]) for t in tokens[37:]])
    for size in (2, 5, 16):
        window, parts = state.copy(), []
        for at in range(37, 120, size):
            parts.append(model.forward(tokens[at : at + size], states=[window]))
        np.testing.assert_array_equal(np.concatenate(parts), alone)
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
