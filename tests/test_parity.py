"""Loaded models against transformers: the same logits from the same files.

Every family and every rope type, on random checkpoints of tests/tiny_checkpoints.py, in float32.
The bound, 2e-5 of the largest logit, is about a hundred float32 roundings: transformers' own CPU
and GPU results differ by as much. Lengths pass max_position_embeddings, so that dynamic and
longrope change over. transformers reads the folder itself and must find every tensor and no other,
so names are proven too.
"""

import numpy as np
import pytest
import tiny_checkpoints
from safetensors.numpy import load_file
from tiny_checkpoints import CONFIGS, VOCAB, tiny, tiny_hybrid

import mambainllama as mil

torch = pytest.importorskip("torch", reason="torch is the judge here")
transformers = pytest.importorskip("transformers", reason="transformers is the judge here")

TOLERANCE = 2e-5


def judge_logits(folder, tokens):
    """transformers' float32 logits, after checking that it read all tensors."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens), use_cache=False).logits.numpy()


def error(ours, theirs):
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("case", CONFIGS)
def test_logits(case, tmp_path, rng):
    folder = tiny(tmp_path / "model", case)
    tokens = rng.integers(0, VOCAB, (2, 90))
    assert error(mil.load(folder)(tokens), judge_logits(folder, tokens)) < TOLERANCE


@pytest.mark.parametrize("case", ["llama", "mistral-window", "mamba", "mamba2-groups"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_other_seeds_and_short_inputs(case, seed, tmp_path, rng):
    folder = tiny(tmp_path / "model", case, seed=seed)
    model = mil.load(folder)
    for length in (1, 2, 17):
        tokens = rng.integers(0, VOCAB, (3, length))
        assert error(model(tokens), judge_logits(folder, tokens)) < TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ["llama", "mamba", "mamba2"])
def test_16_bit_files_read_as_float32(case, dtype, tmp_path, rng):
    folder = tiny(tmp_path / "model", case, dtype=dtype)
    tokens = rng.integers(0, VOCAB, (1, 33))
    ours = mil.load(folder, dtype="float32")(tokens)
    assert error(ours, judge_logits(folder, tokens)) < TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_models_are_near_their_float32_selves(dtype, tmp_path, rng):
    """Only the rounding of a product's input differs; bfloat16 keeps 8 bits of it."""
    folder = tiny(tmp_path / "model", "llama", dtype=dtype)
    tokens = rng.integers(0, VOCAB, (2, 40))
    exact, rounded = mil.load(folder, dtype="float32")(tokens), mil.load(folder)(tokens)
    assert 0 < error(rounded, exact) < (0.04 if dtype == "bfloat16" else 0.005)


def test_sharded(tmp_path, rng):
    whole = tiny(tmp_path / "whole", "llama")
    sharded = tiny(tmp_path / "sharded", "llama", shards=3)
    tokens = rng.integers(0, VOCAB, (2, 20))
    assert error(mil.load(sharded)(tokens), judge_logits(sharded, tokens)) < TOLERANCE
    assert np.array_equal(mil.load(sharded)(tokens), mil.load(whole)(tokens))


def test_rope_frequencies_are_the_same_bits():
    """At position 100,000 a last bit of a frequency turns an angle by 0.006, so bits are compared.

    One entry may differ by its last bit: torch's and NumPy's powers do.
    """
    from mambainllama.rope import canonical_rope

    for name, config in CONFIGS.items():
        if not name.startswith("rope-"):
            continue
        for head_dim in (64, 128):
            large = {**config, "head_dim": head_dim}
            for key in ("rope_parameters", "rope_scaling"):
                if "short_factor" in (config.get(key) or {}):
                    factors = [1.0 + 0.1 * i for i in range(head_dim // 2)]
                    large[key] = {**config[key], "short_factor": factors, "long_factor": factors}
            judge = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(
                transformers.LlamaConfig(**large)
            )
            ours = canonical_rope(large, head_dim, name)
            theirs = judge.original_inv_freq.numpy()
            np.testing.assert_array_max_ulp(np.float32(ours["inv_freq"]), theirs, 1)
            assert (np.float32(ours["inv_freq"]) != theirs).sum() <= 1, name
            assert ours["scale"] == pytest.approx(judge.attention_scaling, rel=1e-7), name


def test_story_llama(shared, rng):
    folder = shared / "models" / "story-llama"
    tokens = rng.integers(3, 2048, (2, 100))
    tokens[:, 0] = 1
    assert error(mil.load(folder)(tokens), judge_logits(folder, tokens)) < TOLERANCE


@pytest.mark.parametrize("name", ["story-mamba1", "story-mamba2"])
def test_golden_hybrids(shared, name):
    """The published code's own outputs; 5e-5 of the largest logit."""
    model = mil.load(shared / "golden" / name)
    golden = load_file(shared / "golden" / name / "golden.safetensors")
    assert error(model(golden["input_ids"]), golden["logits"]) < 5e-5

    greedy = golden["greedy"][0]
    state, known = model.state(), 16
    logits = model.core.forward(greedy[:known].astype(np.int32), states=[state], rows="last")
    for expected in greedy[known:]:
        token = int(logits[-1].argmax())
        assert token == expected
        logits = model.core.forward(np.array([token], np.int32), states=[state], rows="last")


ALL_KINDS = [
    "llama",
    "rope-dynamic-old",
    "rope-longrope-old",
    "mistral-window",
    "qwen3",
    "smollm3",
    "mamba",
    "falcon_mamba",
    "mamba2",
    "mamba2-groups",
    "bamba",
    "jamba",
    "hybrid-mamba1",
    "hybrid-mamba2",
]


@pytest.mark.parametrize("case", ALL_KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_token_at_a_time_gives_the_same_bits(case, dtype, tmp_path, rng):
    """Decoding, windows of a few tokens, and the full pass reduce in one order: not a bit differs.

    All of them keep states: a 16-bit model's attention caches are 16-bit, and a pass without any
    has none. Dynamic and longrope choose their frequencies by the length so far, so there the bits
    agree up to the length at which they change.
    """
    if case.startswith("hybrid"):
        folder = tiny_hybrid(tmp_path / "model", case.removeprefix("hybrid-"))
    else:
        folder = tiny(tmp_path / "model", case)
    model = mil.load(folder, dtype=dtype)
    length = {"rope-dynamic-old": 64, "rope-longrope-old": 32}.get(case, 75)
    tokens = rng.integers(0, VOCAB, length).astype(np.int32)
    whole = model.core.forward(tokens, states=[model.state()])
    for sizes in ([1] * length, [40, *[1] * (length - 40)], [3, 16, 1, 5, 7]):
        state, start = model.state(), 0
        for size in sizes:
            part = model.core.forward(tokens[start : start + size], states=[state])
            assert np.array_equal(part, whole[start : start + size]), (sizes[:5], start)
            start += size
            if start >= length:
                break


def test_hybrid_with_repeat_after_the_convolution(tmp_path, rng):
    """`repeat_kv_before_conv: false` is the same model where repeated channels share their taps."""
    after = tiny_hybrid(tmp_path / "after", "mamba1", ssm_cfg={"repeat_kv_before_conv": False})
    tensors = {}
    for name, array in load_file(after / "model.safetensors").items():
        tensors[name] = array
        if "conv1d" in name:
            runs = array.reshape(-1, 16, *array.shape[1:])
            tensors[name] = runs.repeat(3, axis=0).reshape(-1, *array.shape[1:])
    before = tiny_hybrid(tmp_path / "before", "mamba1")
    tiny_checkpoints.write_file(before / "model.safetensors", tensors)
    tokens = rng.integers(0, VOCAB, (2, 40))
    assert error(mil.load(before)(tokens), mil.load(after)(tokens)) < 1e-6
