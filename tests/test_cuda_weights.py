"""Weights of 8 bits on a CUDA device: the model that `quantize.rounded` describes.

A float32 table computes in float32, so there a model with 8-bit weights agrees to 1e-5 with the CPU
and the weights' values; 16-bit tables, in the mean square, as far as 16-bit models agree anyway
(0.6 to 1.3 % in bfloat16 on an H200). Everything that holds for rows in company holds here as well.
"""

import numpy as np
import pytest
from core_models import KINDS, build, relative, rows_alone_and_in_windows, some_tokens
from tiny_models import write_llama

import mambainllama as mil
from mambainllama import _core
from mambainllama.devices import cuda_devices
from mambainllama.dtypes import from_float32, to_float32
from mambainllama.quantize import coded, rounded

pytestmark = pytest.mark.skipif(
    not cuda_devices(), reason="no CUDA device here, or a build without CUDA operators"
)

KIND_OF_CODES = ["float8", "int8"]
DTYPES = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}
PROMPTS = ["a", "the state", "01"]


def with_values_of_codes(model, weights, dtype, *, prompt):
    """The CPU's model with the values that its weights, stored in `dtype`, become.

    Products of many rows, and those of codes in rows of no multiple of 16, meet the values rounded
    to `dtype`, which changes those of int8.
    """
    parameters = model.parameters()
    specs = _core.Model.parameter_specs(model.config)
    for name, _, is_matrix, _ in specs:
        if is_matrix:
            stored = parameters[name]
            stored[...] = to_float32(from_float32(stored, dtype), dtype)
    for name in coded(specs, parameters, weights):
        values = rounded(parameters[name], weights)
        if prompt or values.shape[1] % 16 != 0:
            values = to_float32(from_float32(values, dtype), dtype)
        parameters[name][...] = values
    return model


def distance(a, b, dtype):
    """Of all entries in float32, the mean square in 16 bits, whose largest differences are luck."""
    if dtype == "float32":
        return relative(a, b)
    return np.sqrt(
        np.square(a - b, dtype=np.float64).mean() / np.square(b, dtype=np.float64).mean()
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", KIND_OF_CODES)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_codes_values(kind, weights, dtype, tied):
    gpu = build(KINDS[kind], dtype=dtype, device="cuda:0", weights=weights, tied=tied)
    on_prompts, on_tokens = (
        with_values_of_codes(build(KINDS[kind], tied=tied), weights, dtype, prompt=prompt)
        for prompt in (True, False)
    )
    lengths = [1, 37, 16, 50, 300]
    tokens, offsets = some_tokens(gpu, sum(lengths)), np.cumsum([0, *lengths])
    expected = on_prompts.forward(tokens, offsets)
    assert distance(gpu.forward(tokens, offsets), expected, dtype) < DTYPES[dtype]
    state = gpu.state()
    single = np.concatenate([gpu.forward([t], states=[state]) for t in tokens[1:38]])
    assert distance(single, on_tokens.forward(tokens[1:38]), dtype) < DTYPES[dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("weights", KIND_OF_CODES)
@pytest.mark.parametrize("kind", ["transformer", "mamba1 hybrid", "mamba2 hybrid", "mamba2"])
def test_windows_and_batches_give_the_same_bits(kind, weights, dtype):
    model = build(KINDS[kind], dtype=dtype, device="cuda:0", weights=weights)
    tokens, others = some_tokens(model, 90), some_tokens(model, 100, 1)
    state = model.state()
    model.forward(tokens[:37], states=[state], rows="none")
    alone = rows_alone_and_in_windows(model, state, tokens[37:])
    batch = [state.copy(), state.copy()]
    for at in range(37, 85, 5):
        rows = [tokens[at : at + 5], others[at : at + 11]]
        logits = model.forward(np.concatenate(rows), np.array([0, 5, 16]), states=batch)
        np.testing.assert_array_equal(logits[:5], alone[at - 37 : at - 32])


def greedy(model, prompt, count):
    """`count` new tokens, one by one, as the model's logits say."""
    state, tokens = model.state(), []
    logits = model.forward(np.array(prompt, np.int32), states=[state])
    while len(tokens) < count:
        tokens.append(int(logits[-1].argmax()))
        logits = model.forward(np.array(tokens[-1:], np.int32), states=[state])
    return tokens


@pytest.mark.parametrize("weights", KIND_OF_CODES)
@pytest.mark.parametrize("kind", ["mamba1 hybrid", "both mixers"])
def test_recorded_steps_make_values_of_codes_as_well(kind, weights):
    """Rows of 24 codes, which products of few rows do not read as they are."""
    model = build(KINDS[kind], dtype="bfloat16", device="cuda:0", weights=weights)
    prompts = [some_tokens(model, 4 + i, i).tolist() for i in range(3)]  # 15 rows: the same bits
    requests = [{"prompt": prompt, "max_new_tokens": 40} for prompt in prompts]
    expected = [greedy(model, prompt, 40) for prompt in prompts]
    for batch in (1, 3):
        found = _core.generate(model, requests, max_batch=batch)
        assert [one["tokens"].tolist() for one in found] == expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama"), layers=4, hidden=64, scale=3.0)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("weights", KIND_OF_CODES)
def test_load_generate_save(folder, weights, dtype, tmp_path):
    model = mil.load(folder, device="cuda", dtype=dtype, weights=weights)
    assert model.weights == weights and f"{weights} weights" in repr(model)
    alone = [mil.generate(model, [p], max_new_tokens=40, stop=[])[0].token_ids for p in PROMPTS]
    for draft in (None, "ngram", model):
        found = mil.generate(
            model, PROMPTS, max_new_tokens=40, stop=[], draft=draft, draft_tokens=3
        )
        assert [g.token_ids for g in found] == alone
    plain = mil.load(folder, dtype=dtype)
    saved = mil.load(model.save(tmp_path / "saved"))
    specs = _core.Model.parameter_specs(plain.core.config)
    for name in coded(specs, plain.parameters(), weights):
        np.testing.assert_array_equal(saved.parameters()[name], plain.parameters()[name])


def test_weights_that_are_not_finite(folder, tmp_path):
    model = mil.load(folder)
    name = "model.layers.1.mlp.down_proj.weight"
    model.parameters()[name][3, 5] = np.nan
    path = model.save(tmp_path / "nan")
    with pytest.raises(mil.Error, match=f"{name} has NaN") as caught:
        mil.load(path, device="cuda", weights="float8")
    assert "\n" not in str(caught.value)
    assert mil.load(folder, device="cuda", weights="float8").weights == "float8"


def test_less_memory():
    """8-bit weights take about half, and what made them is given back."""
    import gc

    def taken(weights):
        gc.collect()
        _core.trim_memory()
        before = cuda_devices()[0]["free"]
        model = build(
            KINDS["transformer"], dtype="bfloat16", device="cuda:0", weights=weights,
            vocab=20000, hidden=1024, tied=True,
        )  # fmt: skip
        after = cuda_devices()[0]["free"]
        del model
        return before - after

    assert taken("int8") < 0.7 * taken(None)
