"""Whole models: logits and gradients against PyTorch in float64, and states bit for bit.

Logits and gradients agree with the float64 judge to a few float32 roundings of the largest value:
2e-5 for logits, 1e-4 for gradients, whose sums run over every row.  States are held to equality,
not closeness: one token at a time, in windows, in chunks, in a batch and after a rollback give the
same bits.
"""

import numpy as np
import pytest
from core_models import KINDS, ORIGINAL_MAMBA1, build, relative, some_tokens
from stepping import in_teams

from mambainllama import _core

torch = pytest.importorskip(
    "torch", reason="PyTorch is the judge of this test; it is not installed"
)
import torch_model  # noqa: E402

LOGITS, GRADIENTS = 2e-5, 1e-4


@pytest.fixture(params=KINDS, ids=str)
def model(request):
    return build(KINDS[request.param])


# ---- forward -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [False, True])
def test_logits_match_pytorch(model, fast):
    lengths = [1, 37, 16, 50]
    tokens, offsets = some_tokens(model, sum(lengths)), np.cumsum([0, *lengths])
    logits = model.forward(tokens, offsets, fast=fast)
    parameters = torch_model.tensors(model.parameters())
    for start, end in zip(offsets, offsets[1:], strict=False):
        expected = torch_model.forward(model.config, parameters, tokens[start:end]).numpy()
        assert relative(logits[start:end], expected) < LOGITS


@pytest.mark.parametrize("tied", [True, False])
def test_scales_and_separate_output(tied):
    model = build(KINDS["mamba2 hybrid"], tied=tied, embedding_scale=3.0, logit_scale=0.25)
    tokens = some_tokens(model, 20)
    expected = torch_model.forward(
        model.config, torch_model.tensors(model.parameters()), tokens
    ).numpy()
    assert relative(model.forward(tokens), expected) < LOGITS


def test_captures(model):
    tokens, layers = some_tokens(model, 21), len(model.config["layers"])
    wanted = [("hidden", i) for i in range(layers)] + [("mixer", i) for i in range(layers)]
    plain = model.forward(tokens)
    logits, captured = model.forward(tokens, capture=wanted)
    hidden, mixers = [], []
    torch_model.forward(
        model.config, torch_model.tensors(model.parameters()), tokens, hidden, mixers
    )
    for got, expected in zip(captured, hidden + mixers, strict=False):
        assert relative(got, expected.numpy()) < LOGITS
    assert relative(logits, plain) < 1e-6  # the mixer's sum is rounded once more


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_weights(dtype):
    """A 16-bit model is the float32 model of its rounded weights, but products round inputs."""
    for layers in KINDS.values():
        small = build(layers, dtype=dtype)
        tokens = some_tokens(small, 40)
        wide = {}
        for name, array in small.parameters().items():
            wide[name] = (
                (array.astype(np.uint32) << 16).view(np.float32)
                if array.dtype == np.uint16
                else array
            )
            wide[name] = np.ascontiguousarray(wide[name], np.float32)
        full = _core.Model(small.config, wide, {})
        assert relative(small.forward(tokens), full.forward(tokens)) < (
            4e-2 if dtype == "bfloat16" else 6e-3
        )


# ---- states ------------------------------------------------------------------------------------


def split(tokens, sizes):
    edges = np.cumsum([0, *sizes])
    assert edges[-1] == len(tokens)
    return [tokens[a:b] for a, b in zip(edges, edges[1:], strict=False)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sizes",
    [[1] * 75, [75], [16] * 4 + [11], [17, 5, 5, 1, 40, 7], [3, 14, 2, 30, 16, 10]],
    ids=str,
)
def test_any_split_gives_the_same_bits(kind, dtype, sizes):
    model = build(KINDS[kind], dtype=dtype)
    tokens = some_tokens(model, 75)
    whole = model.forward(tokens, states=[model.state()])
    state = model.state()
    parts = [model.forward(part, states=[state]) for part in split(tokens, sizes)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert state.length == 75
    if (
        dtype == "float32"
    ):  # a 16-bit cache rounds keys and values, which a stateless forward does not
        np.testing.assert_array_equal(model.forward(tokens), whole)


def test_batch_gives_the_same_bits(model):
    """Sequences at different places advance together, each as if alone."""
    streams = [some_tokens(model, 60, seed) for seed in range(5)]
    places = [0, 5, 16, 31, 33]
    rows = [1, 5, 2, 16, 1]
    states, alone = [], []
    for tokens, place, count in zip(streams, places, rows, strict=False):
        state = model.state()
        if place:
            model.forward(tokens[:place], states=[state], rows="none")
        alone.append(model.forward(tokens[place : place + count], states=[state.copy()]))
        states.append(state)
    packed = np.concatenate([t[p : p + n] for t, p, n in zip(streams, places, rows, strict=False)])
    together = model.forward(packed, np.cumsum([0, *rows]), states=states)
    np.testing.assert_array_equal(together, np.concatenate(alone))


def test_threads_give_the_same_bits(model):
    tokens = some_tokens(model, 50)
    first, *others = in_teams(lambda: model.forward(tokens, states=[model.state()]))
    for other in others:
        np.testing.assert_array_equal(other, first)


def test_rollback_is_as_if_it_had_never_happened(model):
    rng = np.random.default_rng(1)
    tokens = some_tokens(model, 200)
    whole = model.forward(tokens, states=[model.state()])
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
        assert state.length == at
    np.testing.assert_array_equal(model.forward(tokens[at:], states=[state]), whole[at:])


def test_rollback_past_the_fold_is_refused():
    model = build(KINDS["mamba2 hybrid"])
    state = model.state()
    model.forward(some_tokens(model, 40), states=[state])
    with pytest.raises(_core.StateError, match="cannot take back 9 of 40"):
        state.rollback(9)
    attention = build(KINDS["transformer"])
    state = attention.state()
    attention.forward(some_tokens(attention, 40), states=[state])
    state.rollback(39)
    assert state.length == 1


def test_fork_save_restore(model):
    tokens = some_tokens(model, 90)
    whole = model.forward(tokens, states=[model.state()])
    state = model.state()
    model.forward(tokens[:45], states=[state])
    fork, image = state.copy(), state.save()
    model.forward(some_tokens(model, 20, seed=9), states=[state])
    restored = _core.State.restore(model, image)
    for copy in (fork, restored):
        np.testing.assert_array_equal(model.forward(tokens[45:], states=[copy]), whole[45:])
    state.clear()
    np.testing.assert_array_equal(model.forward(tokens, states=[state]), whole)


def test_damaged_images_are_refused(model):
    state = model.state()
    model.forward(some_tokens(model, 20), states=[state])
    image = state.save()
    rng = np.random.default_rng(0)
    other = build([*KINDS["transformer"], *KINDS["mamba2"]])
    for bad in (b"", image[:50], image[:-1], image + b"x", b"x" + image[1:]):
        with pytest.raises(_core.FormatError):
            _core.State.restore(model, bad)
    with pytest.raises(_core.FormatError, match="another model"):
        _core.State.restore(other, image)
    for _ in range(200):  # any header: refused, or harmless
        damaged = bytearray(image)
        damaged[int(rng.integers(8, 56))] = int(rng.integers(0, 256))
        try:
            restored = _core.State.restore(model, bytes(damaged))
        except _core.Error:
            continue
        model.forward([1, 2, 3], states=[restored])


def test_an_image_without_attention_has_any_length():
    """The length of a text is no measure of its image where nothing grows with it."""
    model = build([{**ORIGINAL_MAMBA1, "inner": 8}], hidden=8)
    state, tokens = model.state(), np.zeros(len(model.state().save()) + 100, np.int32)
    model.forward(tokens, states=[state], rows="none")
    restored = _core.State.restore(model, state.save())
    assert restored.length == len(tokens)
    np.testing.assert_array_equal(
        model.forward([1], states=[restored]), model.forward([1], states=[state])
    )


@pytest.mark.parametrize("read, more", [(20, 20), (16, 17), (20, 3)])
def test_a_pass_that_fails_half_way(model, read, more):
    """Each allocation of a pass in turn fails: the state is as before, or says that it is lost."""
    tokens = some_tokens(model, read + more)
    state = model.state(100)
    model.forward(tokens[:read], states=[state])
    expected, failures = model.forward(tokens[read:], states=[state.copy()]), 0
    for allowed in range(100):
        tried = state.copy()
        _core.trim_memory()
        _core.fail_after(allowed)
        try:
            model.forward(tokens[read:], states=[tried])
            break
        except _core.OutOfMemoryError:
            failures += 1
        finally:
            _core.fail_after(-1)
        try:
            found = model.forward(tokens[read:], states=[tried])
        except _core.StateError as error:
            assert "lost: clear() it" in str(error)
            for use in (tried.copy, tried.save, lambda: tried.rollback(1)):  # noqa: B023
                with pytest.raises(_core.StateError, match="lost"):
                    use()
            with pytest.raises(_core.StateError, match="lost"):
                _core.generate(model, [{"prompt": tokens, "state": tried}])
            tried.clear()
            found = model.forward(tokens, states=[tried])[read:]
        np.testing.assert_array_equal(found, expected)
    assert 5 < failures < 100


def test_memory_does_not_grow(model):
    tokens = some_tokens(model, 64)
    state = model.state(64)
    for _ in range(2):
        state.clear()
        model.forward(tokens, states=[state])
    before = _core.memory()
    for _ in range(5):
        state.clear()
        model.forward(tokens, states=[state])
    assert _core.memory() == before


# ---- training ----------------------------------------------------------------------------------


def judge(student, teacher, tokens, offsets, labels, weight, options):
    """The loss of one micro-step and its gradients, by autograd in float64."""
    p, q = (
        torch_model.tensors(student.parameters(), True),
        torch_model.tensors(teacher.parameters()),
    )
    loss, temperature = 0.0, options.get("temperature", 1.0)
    ours, theirs = [], []
    for a, b in zip(offsets, offsets[1:], strict=False):
        h, ht = [], []
        s = torch_model.forward(student.config, p, tokens[a:b], hidden=h)
        t = torch_model.forward(teacher.config, q, tokens[a:b], hidden=ht)
        ours.append(h)
        theirs.append(ht)
        log_s, log_t = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
        if options.get("direction") == "reverse":
            kl = (log_s.exp() * (log_s - log_t)).sum(-1)
        else:
            kl = (log_t.exp() * (log_t - log_s)).sum(-1)
        rows = torch.as_tensor(weight[a:b], dtype=torch.float64)
        label = torch.as_tensor(labels[a:b], dtype=torch.long)
        ce = -s.log_softmax(-1).gather(1, label.clamp(min=0)[:, None])[:, 0] * (label >= 0)
        loss = (
            loss
            + (
                rows
                * (
                    options.get("kl_weight", 1.0) * temperature**2 * kl
                    + options.get("ce_weight", 0.0) * ce
                )
            ).sum()
        )
    loss = loss * options.get("scale", 1.0)
    layers = len(student.config["layers"])
    for i in range(layers if options.get("hidden_weight") else 0):
        x, target = (torch.cat([h[i] for h in every]) for every in (ours, theirs))
        loss = (
            loss
            + options["hidden_weight"]
            / layers
            * (x - target).square().sum()
            / target.square().sum()
        )
    loss.backward()
    return loss.item(), {name: t.grad.numpy() for name, t in p.items()}


OPTIONS = {
    "kl": {},
    "reverse at 2": {"direction": "reverse", "temperature": 2.0, "scale": 0.01},
    "kl and ce": {"kl_weight": 0.3, "ce_weight": 1.0, "scale": 0.02},
    "hidden": {"hidden_weight": 0.7, "scale": 0.02},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_match_autograd(kind, options):
    student = build(KINDS[kind])
    teacher = build([KINDS["transformer"][0]] * len(KINDS[kind]), seed=3)
    lengths = [19, 1, 33]
    tokens, offsets = some_tokens(student, sum(lengths)), np.cumsum([0, *lengths])
    rng = np.random.default_rng(5)
    labels = rng.integers(-1, 61, len(tokens)).astype(np.int32)
    weight = rng.integers(0, 3, len(tokens)).astype(np.float32)
    loss, expected = judge(student, teacher, tokens, offsets, labels, weight, options)
    for checkpointing in (False, True):
        trainer = _core.Trainer(student, teacher, checkpointing=checkpointing)
        sums = trainer.backward(tokens, offsets, labels=labels, row_weight=weight, **options)
        temperature = options.get("temperature", 1.0)
        got = (
            options.get("kl_weight", 1.0) * temperature**2 * sums["kl"]
            + options.get("ce_weight", 0.0) * sums["ce"]
        )
        got = got * options.get("scale", 1.0) + options.get("hidden_weight", 0.0) * sums["hidden"]
        assert got == pytest.approx(loss, rel=1e-5)
        gradients = trainer.gradients()
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            scale = np.abs(expected[name]).max()
            assert np.abs(gradient - expected[name]).max() <= GRADIENTS * scale + 1e-7, name


@pytest.mark.parametrize("kind", ["mamba1 hybrid", "mamba2 hybrid", "both mixers"])
def test_alignment_gradients_match_autograd(kind):
    student, teacher = build(KINDS[kind]), build(KINDS["transformer"], seed=3)
    tokens = some_tokens(student, 45)
    p, q = (
        torch_model.tensors(student.parameters(), True),
        torch_model.tensors(teacher.parameters()),
    )
    hidden, mixers = [], []
    torch_model.forward(teacher.config, q, tokens, hidden, mixers)
    inputs = [q["model.embed_tokens.weight"][torch.as_tensor(tokens, dtype=torch.long)], *hidden]
    converted = [i for i, c in enumerate(student.config["layers"]) if c["mixer"] != "attention"]
    loss = 0.0
    for i in converted:
        c, prefix = student.config["layers"][i], f"model.layers.{i}."
        own = {name[len(prefix) :]: t for name, t in p.items() if name.startswith(prefix)}
        u = torch_model.rms_norm(
            inputs[i], own["input_layernorm.weight"], student.config["norm_eps"]
        )
        y = torch_model.MIXERS[c["mixer"]](u, own, c, student.config)
        loss = loss + (y - mixers[i]).square().sum() / mixers[i].square().sum() / len(converted)
    loss.backward()
    trainer = _core.Trainer(student, teacher)
    sums = trainer.backward(tokens, align_weight=1.0)
    assert sums["align"] == pytest.approx(loss.item(), rel=1e-5)
    for name, gradient in trainer.gradients().items():
        expected = np.zeros_like(gradient) if p[name].grad is None else p[name].grad.numpy()
        assert np.abs(gradient - expected).max() <= GRADIENTS * np.abs(expected).max() + 1e-7, name


def test_frozen_parameters_have_no_gradient():
    student, teacher = build(KINDS["mamba2 hybrid"]), build(KINDS["transformer"], seed=3)
    names = [name for name in student.parameters() if ".mamba." in name]
    tokens = some_tokens(student, 30)
    full, part = _core.Trainer(student, teacher), _core.Trainer(student, teacher, trainable=names)
    for trainer in (full, part):
        trainer.backward(tokens)
    assert set(part.gradients()) == set(names)
    for name, gradient in part.gradients().items():
        np.testing.assert_array_equal(gradient, full.gradients()[name])
    before = {name: array.copy() for name, array in student.parameters().items()}
    part.apply(1e-2)
    for name, array in student.parameters().items():
        assert np.array_equal(array, before[name]) == (name not in names), name


def test_micro_steps_add_up():
    student, teacher = build(KINDS["both mixers"]), build(KINDS["transformer"], seed=3)
    tokens = some_tokens(student, 60)
    whole, parts = _core.Trainer(student, teacher), _core.Trainer(student, teacher)
    whole.backward(tokens, [0, 30, 60])
    parts.backward(tokens[:30])
    parts.backward(tokens[30:])
    for name, gradient in parts.gradients().items():
        assert relative(gradient, whole.gradients()[name]) < 1e-5, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_lowers_the_loss_and_repeats(dtype):
    teacher = build(KINDS["transformer"], seed=3)
    tokens, ends = some_tokens(teacher, 128), [0, 64, 128]
    runs = []
    for _ in range(2):
        student = build(KINDS["mamba2 hybrid"], dtype=dtype)
        trainer = _core.Trainer(student, teacher)
        losses = []
        for _ in range(30):
            losses.append(trainer.backward(tokens, ends, scale=1 / 128)["kl"] / 128)
            trainer.apply(1e-2)
        assert trainer.step == 30
        runs.append((losses, {name: array.copy() for name, array in student.parameters().items()}))
    assert runs[0][0] == runs[1][0]
    assert all(np.array_equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])
    assert runs[0][0][-1] < 0.6 * runs[0][0][0]


def test_a_gradient_that_is_not_finite_changes_nothing():
    student, teacher = build(KINDS["mamba2 hybrid"]), build(KINDS["transformer"], seed=3)
    trainer = _core.Trainer(student, teacher)
    before = {name: array.copy() for name, array in student.parameters().items()}
    trainer.backward(some_tokens(student, 20), scale=float("inf"))
    with pytest.raises(_core.NonFiniteError, match="step 1"):
        trainer.apply(1e-2)
    assert trainer.step == 0
    for name, array in student.parameters().items():
        np.testing.assert_array_equal(array, before[name])
    assert all(not gradient.any() for gradient in trainer.gradients().values())


def test_evaluate_equals_the_micro_step():
    student, teacher = build(KINDS["mamba1 hybrid"]), build(KINDS["transformer"], seed=3)
    tokens = some_tokens(student, 50)
    labels = np.append(tokens[1:], -1)
    sums = _core.evaluate(student, teacher, tokens, labels=labels)
    trained = _core.Trainer(student, teacher).backward(tokens, labels=labels)
    assert sums["kl"] == pytest.approx(trained["kl"], rel=1e-6)
    logits = teacher.forward(tokens).astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert sums["teacher_ce"] == pytest.approx(-log_p[np.arange(49), labels[:-1]].sum(), rel=1e-5)
    assert sums["ce_rows"] == 49 and sums["kl_rows"] == 50


# ---- bad arguments -----------------------------------------------------------------------------


def test_state_bytes():
    model = build(KINDS["transformer"])  # 2 layers of 2 heads of 8: keys and values, float32
    assert model.state_bytes(0) == 0
    assert model.state_bytes(1000) == 1000 * 2 * 2 * 2 * 8 * 4
    for length in (-1, 2**62):
        with pytest.raises(_core.ArgumentError, match=f"state_bytes: {length} tokens cannot be"):
            model.state_bytes(length)


def test_messages():
    model = build(KINDS["mamba2 hybrid"])
    state = model.state()
    cases = [
        (
            lambda: model.forward([3, 61]),
            "token 61 at position 1 of sequence 0 is outside the vocabulary of 61",
        ),
        (lambda: model.forward([3, -1]), "token -1"),
        (lambda: model.forward([2**40]), "outside any vocabulary"),
        (lambda: model.forward([]), "sequence 0 is empty"),
        (lambda: model.forward([1.5]), "integers"),
        (lambda: model.forward([1, 2], [0, 2, 2]), "offsets must ascend"),
        (lambda: model.forward([1, 2], [0, 1, 2], states=[state, state]), "share one state"),
        (lambda: model.forward([1], states=[state, state]), "2 states for 1 sequences"),
        (lambda: model.forward([1], states=[build(KINDS["mamba1"]).state()]), "another model"),
        (lambda: model.forward([1], rows=[1]), "row 1 is not among"),
        (lambda: model.forward([1], capture=[("nonsense", 0)]), "cannot capture"),
        (lambda: _core.Trainer(model).backward([1], kl_weight=1.0), "need a teacher"),
        (lambda: _core.Trainer(model, trainable=["x"]), "not parameters"),
        (lambda: _core.Model({**model.config, "vocab": 0}, {}), "vocab = 0"),
        (lambda: _core.Model({**model.config, "typo": 0}, {}), "not known"),
        (lambda: _core.Model({**model.config, "tied": np.zeros(2)}, {}), "tied is not a truth"),
        (lambda: _core.Model({**model.config, "rope": {"rotary": "8"}}, {}), "not an integer"),
        (lambda: _core.Model(model.config, {}), "model.embed_tokens.weight is missing"),
    ]
    for call, words in cases:
        with pytest.raises(_core.Error, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
