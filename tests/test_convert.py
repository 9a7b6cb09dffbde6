"""Conversion: what is copied is exact, what is new has its published distribution, layouts open
elsewhere.

Random starts are checked by their statistics with bounds of five standard deviations; the
calibrated start by what it is for: a KL to the teacher below that of the published one (shared
story model).
"""

import json

import numpy as np
import pytest
from tiny_checkpoints import (
    CONFIGS,
    VOCAB,
    mamba_config,
    mixer_shapes,
    shapes_of,
    tiny,
    tiny_hybrid,
)

import mambainllama as mil
from mambainllama.convert import attention_choice


@pytest.fixture
def teacher(tmp_path):
    return mil.load(tiny(tmp_path / "teacher", "llama-head-dim"))


def attention(model, layer, name):
    return model.parameters()[f"model.layers.{layer}.self_attn.{name}_proj.weight"]


def mixer_of(model, layer):
    prefix = f"model.layers.{layer}.mamba."
    return {
        name.removeprefix(prefix): array
        for name, array in model.parameters().items()
        if name.startswith(prefix)
    }


def logits_kl(student, teacher, tokens):
    def log_softmax(x):
        x = x.astype(np.float64) - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    t, s = log_softmax(teacher(tokens)), log_softmax(student(tokens))
    return (np.exp(t) * (t - s)).sum(-1).mean()


# ---- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_layout(mixer, teacher, tmp_path):
    """Files, keys and shapes are the published ones."""
    student = mil.convert(teacher, mixer, [1], init="paper")
    folder = student.save(tmp_path / "student")
    config = CONFIGS["llama-head-dim"]
    assert json.loads((folder / "mamba_config.json").read_text()) == mamba_config(
        config, mixer, [1]
    )
    assert json.loads((folder / "config.json").read_text()) == {**config, "torch_dtype": "float32"}
    expected = shapes_of(config, dict.fromkeys([0, 2], mixer_shapes(config, mixer)))
    got = {name: array.shape for name, array in student.parameters().items()}
    assert got == expected
    again = mil.load(folder)
    assert again.config.mixer == mixer and again.config.attention_layers == (1,)
    tokens = np.arange(30)[None]
    assert np.array_equal(again(tokens), student(tokens))


@pytest.mark.parametrize("name", ["story-mamba1", "story-mamba2"])
def test_layout_of_the_published_code(name, shared, tmp_path):
    golden = shared / "golden" / name
    student = mil.convert(mil.load(shared / "models" / "story-llama"), name[6:], [1], init="paper")
    assert {k: v.shape for k, v in student.parameters().items()} == {
        k: v.shape for k, v in mil.load(golden).parameters().items()
    }
    folder = student.save(tmp_path / "student")
    theirs = json.loads((golden / "mamba_config.json").read_text())
    assert json.loads((folder / "mamba_config.json").read_text()) == theirs
    assert student.tokenizer is not None and (folder / "tokenizer.json").exists()


def test_the_original_is_untouched(teacher):
    before = {name: array.copy() for name, array in teacher.parameters().items()}
    student = mil.convert(teacher, "mamba2", [0], init="paper")
    for array in student.parameters().values():
        array[:] = 0
    for name, array in teacher.parameters().items():
        assert np.array_equal(array, before[name])
    assert teacher.config.mixer is None


# ---- what is transferred -------------------------------------------------------------------------


def test_transfer_to_mamba2(teacher):
    student = mil.convert(teacher, "mamba2", [1], init="paper")
    rows = mixer_of(student, 2)["in_proj.weight"]
    inner, narrow = 96, 32
    z, x, B, C, dt = np.split(rows, np.cumsum([inner, narrow, narrow, inner]))
    assert np.array_equal(x, attention(teacher, 2, "v"))
    assert np.array_equal(B, attention(teacher, 2, "k"))
    assert np.array_equal(C, attention(teacher, 2, "q"))
    assert np.array_equal(mixer_of(student, 2)["out_proj.weight"], attention(teacher, 2, "o"))
    assert z.shape == (inner, 48) and dt.shape == (6, 48)
    for name, array in student.parameters().items():
        if ".mamba." not in name:
            assert np.array_equal(array, teacher.parameters()[name]), name


def test_transfer_to_mamba1(teacher):
    new = mixer_of(mil.convert(teacher, "mamba1", [1], init="paper"), 0)
    assert np.array_equal(new["in_proj_x.weight"], attention(teacher, 0, "v"))
    assert np.array_equal(new["B_proj.weight"], attention(teacher, 0, "k"))
    assert np.array_equal(new["C_proj.weight"], attention(teacher, 0, "q"))
    assert np.array_equal(new["out_proj.weight"], attention(teacher, 0, "o"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_models_stay_16_bit(dtype, tmp_path):
    teacher = mil.load(tiny(tmp_path / "t", "llama-head-dim", dtype=dtype))
    for mixer in ("mamba1", "mamba2"):
        student = mil.convert(teacher, mixer, [1], init="paper")
        dtypes = student.dtypes()
        kept = ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.mamba.out_proj.weight")
        assert all(dtypes[name] == dtype for name in kept)
        assert dtypes["model.layers.0.mamba.A_log"] == "float32"
        assert np.array_equal(mixer_of(student, 0)["out_proj.weight"], attention(teacher, 0, "o"))
        assert np.isfinite(student(np.arange(20)[None])).all()
        again = mil.load(student.save(tmp_path / mixer))
        for name, array in student.parameters().items():
            assert np.array_equal(array, again.parameters()[name])


def test_biases_move_into_the_convolution(tmp_path):
    """Past the first tokens, conv(x + b) = conv(x) + (sum of taps) * b."""
    teacher = mil.load(tiny(tmp_path / "t", "qwen2"))
    student = mil.convert(teacher, "mamba2", [1], init="paper")
    plain = mil.load(tiny(tmp_path / "u", "qwen2"))
    for name, array in plain.parameters().items():
        if name.endswith("_proj.bias"):
            array[:] = 0
    unbiased = mil.convert(plain, "mamba2", [1], init="paper")
    new, old = mixer_of(student, 0), mixer_of(unbiased, 0)
    bias = np.concatenate(
        [teacher.parameters()[f"model.layers.0.self_attn.{name}_proj.bias"] for name in "vkq"]
    )
    taps = new["conv1d.weight"].sum(axis=(1, 2))
    np.testing.assert_allclose(
        new["conv1d.bias"], old["conv1d.bias"] + taps * bias, rtol=1e-5, atol=1e-6
    )
    assert not [name for name in student.parameters() if "layers.0" in name and "self_attn" in name]


def test_mamba1_groups_meet_their_keys(tmp_path):
    """The calibrated start orders query groups so that C.B of a group is a part of the old q.k."""
    config = {**CONFIGS["llama-head-dim"], "head_dim": 32}
    from tiny_checkpoints import write_checkpoint

    teacher = mil.load(write_checkpoint(tmp_path / "t", config))
    student = mil.convert(teacher, "mamba1", [1], "calibrated", np.arange(60)[None] % VOCAB)
    new = mixer_of(student, 0)
    q, k, o = (attention(teacher, 0, name) for name in "qko")
    B_of_group = new["B_proj.weight"].reshape(4, 16, -1).repeat(3, axis=0)  # 12 groups of 16
    C = new["C_proj.weight"].reshape(12, 16, -1)
    columns = new["out_proj.weight"].T.reshape(12, 16, -1)
    seen = set()
    for group in range(12):
        head, part = next(
            (h, s) for h in range(6) for s in range(2)
            if np.array_equal(C[group], q[h * 32 + s * 16 : h * 32 + s * 16 + 16])
        )  # fmt: skip
        seen.add((head, part))
        rows = slice((head // 3) * 32 + part * 16, (head // 3) * 32 + part * 16 + 16)
        assert np.array_equal(B_of_group[group], k[rows])
        begin = head * 32 + part * 16
        assert np.array_equal(columns[group], o.T[begin : begin + 16])
    assert len(seen) == 12


# ---- the published start -------------------------------------------------------------------------


def softplus(x):
    return np.logaddexp(0, x.astype(np.float64))


def assert_uniform(values, bound):
    assert np.abs(values).max() <= bound
    count = values.size
    assert abs(values.mean()) < 5 * bound / np.sqrt(3 * count)
    assert abs((values**2).mean() / (bound**2 / 3) - 1) < 5 * np.sqrt(0.8 / count)


def assert_steps(dt):
    assert dt.min() >= 0.999e-3 and dt.max() <= 0.1001
    spread = (np.log(dt) - np.log(1e-3)) / np.log(100)
    assert abs(spread.mean() - 0.5) < 5 * np.sqrt(1 / 12 / dt.size)


@pytest.fixture
def wide(tmp_path):
    config = {
        **CONFIGS["llama"],
        "hidden_size": 256,
        "num_attention_heads": 64,
        "num_key_value_heads": 16,
        "head_dim": 16,
        "num_hidden_layers": 1,
    }
    from tiny_checkpoints import write_checkpoint

    return mil.load(write_checkpoint(tmp_path / "wide", config))


def test_published_start_of_mamba2(wide):
    new = mixer_of(mil.convert(wide, "mamba2", "none", init="paper"), 0)
    inner, heads = 1024, 64
    assert_uniform(new["in_proj.weight"][:inner], 1 / 16)  # z: a linear layer of 256 inputs
    assert_uniform(new["in_proj.weight"][-heads:], 1 / 16)  # dt
    assert_uniform(new["conv1d.weight"], 0.5)
    assert_uniform(new["conv1d.bias"], 0.5)
    assert_steps(softplus(new["dt_bias"]))
    A = np.exp(new["A_log"].astype(np.float64))
    assert A.min() >= 1 and A.max() <= 16.001
    assert abs(A.mean() - 8.5) < 5 * 15 / np.sqrt(12 * heads)
    assert (new["D"] == 1).all() and (new["norm.weight"] == 1).all()


def test_published_start_of_mamba1(wide):
    new = mixer_of(mil.convert(wide, "mamba1", "none", init="paper"), 0)
    assert_uniform(new["in_proj_z.weight"], 1 / 16)
    assert_uniform(new["dt_proj_down.weight"], 1 / 16)
    assert new["dt_proj_down.weight"].shape == (16, 256)
    assert_uniform(new["dt_proj.weight"], 16**-0.5)
    assert_uniform(new["conv1d.weight"], 0.5)
    assert_steps(softplus(new["dt_proj.bias"]))
    np.testing.assert_allclose(
        np.exp(new["A_log"]), np.tile(np.arange(1, 17), (1024, 1)), rtol=1e-6
    )
    assert (new["D"] == 1).all()


def test_streams_do_not_depend_on_other_layers(teacher):
    one = mil.convert(teacher, "mamba2", [0, 1], init="paper", seed=5)
    all_ = mil.convert(teacher, "mamba2", [], init="paper", seed=5)
    for name, array in mixer_of(one, 2).items():
        assert np.array_equal(array, mixer_of(all_, 2)[name]), name
    other = mil.convert(teacher, "mamba2", [], init="paper", seed=6)
    assert not np.array_equal(
        mixer_of(other, 2)["in_proj.weight"], mixer_of(all_, 2)["in_proj.weight"]
    )
    assert not np.array_equal(mixer_of(all_, 0)["dt_bias"], mixer_of(all_, 1)["dt_bias"])


# ---- the calibrated start ------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_calibrated_start(mixer, teacher, rng):
    tokens = rng.integers(0, VOCAB, (40, 60))
    student = mil.convert(teacher, mixer, [1], init="calibrated", calibration=tokens)
    new = mixer_of(student, 0)
    conv = new["conv1d.weight"][:, 0]
    assert_uniform(conv[:, :-1], 0.05)
    assert_uniform(conv[:, -1] - 1, 0.05 * 1.001)
    assert not new["conv1d.bias"].any()
    z = new["in_proj_z.weight"] if mixer == "mamba1" else new["in_proj.weight"][:96]
    # Layer 0's input is the embedding's norm, known without running the model.
    table = teacher.parameters()["model.embed_tokens.weight"][tokens.reshape(-1)]
    u = table / np.sqrt((table**2).mean(-1, keepdims=True) + 1e-5)
    u = (u * teacher.parameters()["model.layers.0.input_layernorm.weight"]).astype(np.float64)
    w = np.linalg.solve(u.T @ u / len(u) + 1e-3 * np.eye(48), u.mean(0))
    assert_uniform(z - 2 * w, 0.1 / np.sqrt(48) * 1.001)
    if mixer == "mamba2":
        np.testing.assert_allclose(new["A_log"], np.linspace(-4, 0, 6), atol=1e-6)
        assert (new["dt_bias"] == -1).all()
    else:
        assert_steps(softplus(2 * new["dt_proj.bias"]))
        without = mixer_of(mil.convert(teacher, mixer, [], "calibrated", tokens), 0)
        assert (without["dt_proj.bias"] == -0.5).all()
        assert_uniform(without["dt_proj.weight"], 0.1 * 3**-0.5 * 1.001)
        groups = np.linspace(-4, 0, 6)
        np.testing.assert_allclose(
            without["A_log"].reshape(6, 256), groups[:, None].repeat(256, 1), atol=1e-6
        )


def test_calibrated_start_is_nearer(shared):
    teacher = mil.load(shared / "models" / "story-llama")
    tokens = np.load(shared / "data" / "stories" / "train.npz")["tokens"]
    held = tokens[-8:].astype(np.int64)
    kl = {}
    for init in ("paper", "calibrated", "fitted"):
        student = mil.convert(teacher, "mamba2", [1], init=init, calibration=tokens[:32])
        kl[init] = logits_kl(student, teacher, held)
    assert kl["fitted"] < 0.85 < kl["calibrated"] < 3.8 < 6 < kl["paper"]
    student = mil.convert(teacher, "mamba2", [1], calibration=tokens[:32])  # init="auto"
    assert logits_kl(student, teacher, held) == kl["fitted"]


def test_calibration_forms(teacher, shared):
    rows = np.random.default_rng(0).integers(0, VOCAB, (6, 20))
    want = mixer_of(mil.convert(teacher, calibration=rows), 0)["in_proj.weight"]
    for form in (rows.tolist(), list(rows), rows.astype(np.uint16)):
        assert np.array_equal(
            mixer_of(mil.convert(teacher, calibration=form), 0)["in_proj.weight"], want
        )
    mil.convert(teacher, calibration=rows[0])
    mil.convert(teacher, calibration=[[1, 2], [3], []])
    story = mil.load(shared / "models" / "story-llama")
    mil.convert(story, calibration=["Once upon a time", "there was a girl who liked to play."])
    mil.convert(story, calibration="Once upon a time there was a dog.")
    for bad in (
        [],
        5,
        np.zeros((0, 4), int),
        [[]],
        [[1.5]],
        [[VOCAB]],
        [[-1]],
        ["text"],
        np.array(3),
        [1, [2]],
    ):
        with pytest.raises(mil.Error, match="calibration|input_ids|token"):
            mil.convert(teacher, calibration=bad)


# ---- choices and errors --------------------------------------------------------------------------


def test_attention_choice():
    layers = [{}] * 12
    assert attention_choice("half", layers) == [1, 3, 5, 7, 9, 11]
    assert attention_choice("quarter", layers) == attention_choice(0.25, layers) == [3, 7, 11]
    assert attention_choice("eighth", layers) == [7]
    assert attention_choice("none", layers) == attention_choice(0.0, layers) == []
    assert attention_choice("all", layers) == attention_choice(1.0, layers) == list(range(12))
    assert attention_choice(1 / 6, layers) == [5, 11]
    assert attention_choice(np.array([4, 2]), layers) == [2, 4]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"mixer": "mamba3"}, "mamba2"),
        ({"attention_layers": [3]}, "0 to 2"),
        ({"attention_layers": [-1]}, "0 to 2"),
        ({"attention_layers": [1, 1]}, "twice"),
        ({"attention_layers": [0.5]}, "not a layer"),
        ({"attention_layers": [True]}, "not a layer"),
        ({"attention_layers": "third"}, "half"),
        ({"attention_layers": 1.5}, "0 to 1"),
        ({"attention_layers": 1}, "list"),
        ({"attention_layers": None}, "list"),
        ({"init": "magic"}, "calibrated"),
        ({"init": "calibrated"}, "calibration"),
        ({"seed": -1}, "seed"),
        ({"seed": 0.5}, "seed"),
    ],
)
def test_bad_arguments(keys, words, teacher):
    with pytest.raises(mil.ArgumentError, match=words) as error:
        mil.convert(teacher, **{"init": "paper", **keys})
    assert "\n" not in str(error.value)


def test_auto_without_calibration_says_so(teacher):
    with pytest.warns(UserWarning, match="calibration"):
        mil.convert(teacher)


def test_stepwise_conversion(teacher):
    first = mil.convert(teacher, "mamba2", [0, 2], init="paper")
    mixer_of(first, 1)["A_log"][:] = 0.5  # as after training
    second = mil.convert(first, "mamba2", [2], init="paper")
    assert second.config.attention_layers == (2,)
    assert (mixer_of(second, 1)["A_log"] == 0.5).all() and mixer_of(second, 0)
    with pytest.raises(mil.ArgumentError, match="mixer already"):
        mil.convert(first, "mamba2", [1])
    with pytest.raises(mil.ArgumentError, match="must be the same"):
        mil.convert(first, "mamba1", [2])
    done = mil.convert(first, "mamba2", [], init="paper")
    with pytest.raises(mil.ArgumentError, match="no attention layers left"):
        mil.convert(done, "mamba2", [])


def test_what_cannot_be_converted(tmp_path):
    for case in ("mamba2", "bamba"):
        with pytest.raises(mil.UnsupportedError, match="of its own"):
            mil.convert(mil.load(tiny(tmp_path / case, case)), init="paper")
    with pytest.raises(mil.ArgumentError, match=r"mil\.load"):
        mil.convert("a model")
    narrow = mil.load(tiny(tmp_path / "q", "qwen3"))  # 2 KV heads of 12
    with pytest.raises(mil.UnsupportedError, match="multiple of 16"):
        mil.convert(narrow, "mamba1", init="paper")
    assert mil.convert(narrow, "mamba2", init="paper").config.mixer == "mamba2"


def test_hybrids_saved_by_others_can_be_converted_on(tmp_path):
    hybrid = mil.load(tiny_hybrid(tmp_path / "h", "mamba1", [0, 1]))
    assert mil.convert(hybrid, "mamba1", [0], init="paper").config.attention_layers == (0,)


@pytest.mark.parametrize(
    ("mixer", "ssm_cfg"),
    [
        ("mamba1", {"d_state": 8}),
        ("mamba1", {"repeat_kv_before_conv": False}),
        ("mamba1", {"dt_limit": [0.01, 0.5]}),
        ("mamba2", {"dt_limit": [0.01, 0.5]}),
    ],
)
def test_mixers_of_other_sizes_do_not_mix_with_new_ones(mixer, ssm_cfg, tmp_path):
    """One mamba_config.json describes all: a student with both kinds could be saved, not loaded."""
    hybrid = mil.load(tiny_hybrid(tmp_path / "h", mixer, [0, 1], ssm_cfg))
    with pytest.raises(mil.UnsupportedError, match="ssm_cfg"):
        mil.convert(hybrid, mixer, [0], init="paper")


@pytest.mark.parametrize("init", ["calibrated", "fitted"])
@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_a_broken_teacher_is_not_measured(mixer, init, teacher):
    """Else the student's mixers are NaN too, or a decomposition of NaN fails."""
    teacher.parameters()["model.layers.0.mlp.up_proj.weight"][3, 5] = np.nan
    rows = np.random.default_rng(0).integers(0, VOCAB, (3, 30))
    with pytest.raises(mil.NonFiniteError, match="layer 1 of the model"):
        mil.convert(teacher, mixer, [0], init=init, calibration=rows)
