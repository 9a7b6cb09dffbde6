"""Distillation learns, its settings mean what they say, and what cannot work is refused."""

import json

import numpy as np
import pytest
from tiny_models import write_llama

import mambainllama as mil
from mambainllama.distill import DistillTask, trainable_names
from mambainllama.pairs import core_of, shared_vocabulary
from mambainllama.training import Window

ROWS, LENGTH, VOCAB = 48, 24, 264


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return mil.load(write_llama(tmp_path_factory.mktemp("teacher") / "llama", scale=2.0))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(5).integers(0, VOCAB, (ROWS, LENGTH)).astype(np.uint16)


def make_student(teacher, tokens, mixer="mamba2", layers="half"):
    return mil.convert(teacher, mixer=mixer, attention_layers=layers, calibration=tokens)


def config(**changes):
    base = {
        "batch_size": 8,
        "sequence_length": LENGTH,
        "learning_rate": 5e-3,
        "warmup_steps": 2,
        "save_every": None,
    }
    return mil.DistillConfig(**{**base, **changes})


def weights(model):
    return {name: array.copy() for name, array in model.parameters().items()}


def same(a, b):
    return all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
@pytest.mark.parametrize("layers", ["half", "none"])
def test_it_learns(teacher, tokens, mixer, layers):
    student = make_student(teacher, tokens, mixer, layers)
    untouched = weights(teacher)
    history = mil.distill(student, teacher, tokens, config(epochs=8), None, validation=tokens[:8])
    assert history.final["step"] == 48 == len(history) - 1
    assert history.final["tokens"] == 8 * ROWS * LENGTH
    first, last = history[0]["eval_kl"], history[-1]["eval_kl"]
    assert last < 0.7 * first
    assert history.final["eval_agreement"] > history[0]["eval_agreement"]
    assert same(untouched, weights(teacher))
    found = mil.evaluate.compare(student, teacher, tokens[:8])
    assert found.kl == pytest.approx(last, rel=1e-6)


def test_same_seed_same_bits(teacher, tokens):
    def run(seed):
        student = make_student(teacher, tokens)
        history = mil.distill(student, teacher, tokens, config(seed=seed), None)
        return weights(student), history.column("loss")[1]

    (a, losses_a), (b, losses_b), (c, _) = run(3), run(3), run(4)
    assert same(a, b) and losses_a == losses_b
    assert not same(a, c)


@pytest.mark.parametrize(
    "loss", [{}, {"ce_weight": 1.0, "kl_weight": 0.1}, {"reduction": "reference"}]
)
def test_accumulation_equals_the_larger_batch(teacher, tokens, loss):
    """The same rows in one pass or in four: the same gradients up to rounding."""

    def gradients(batch_size, accumulation):
        student = make_student(teacher, tokens)
        task = DistillTask(
            student,
            *shared_vocabulary(student, teacher),
            tokens,
            None,
            config(batch_size=batch_size, gradient_accumulation=accumulation, **loss),
        )
        batches = task.batches.step(0)
        window = Window.of(batches)
        for batch in batches:
            task.accumulate(0, 10, batch, window)
        return task.trainer.gradients()

    whole, parts = gradients(16, 1), gradients(4, 4)
    for name, gradient in whole.items():
        scale = np.abs(gradient).max() + 1e-12
        assert np.abs(parts[name] - gradient).max() < 1e-4 * scale, name


def test_reported_losses_are_means_over_tokens(teacher, tokens):
    student = make_student(teacher, tokens)
    found = mil.evaluate.compare(student, teacher, tokens)
    settings = config(batch_size=ROWS, max_steps=1, ce_weight=0.5, learning_rate=1e-9)
    row = mil.distill(student, teacher, tokens, settings, None).final
    assert row["kl"] == pytest.approx(found.kl, rel=1e-5)
    assert np.exp(row["ce"]) == pytest.approx(found.perplexity, rel=1e-4)
    assert row["loss"] == pytest.approx(row["kl"] + 0.5 * row["ce"])


def test_reference_reduction_divides_by_rows(teacher, tokens):
    student = make_student(teacher, tokens)
    settings = config(max_steps=1, reduction="reference", kl_weight=0.1, ce_weight=1.0)
    row = mil.distill(student, teacher, tokens, settings, None).final
    assert row["loss"] == pytest.approx(0.1 * row["kl"] * LENGTH + row["ce"], rel=1e-6)


def test_temperature_and_direction(teacher, tokens):
    def first(**changes):
        student = make_student(teacher, tokens)
        return mil.distill(student, teacher, tokens, config(max_steps=1, **changes), None).final

    plain, warm, back = first(), first(temperature=2.0), first(direction="reverse")
    assert warm["kl"] < plain["kl"] and warm["loss"] == pytest.approx(4 * warm["kl"])
    assert back["kl"] != plain["kl"]


def test_mixers_only(teacher, tokens):
    student = make_student(teacher, tokens)
    before = weights(student)
    mil.distill(student, teacher, tokens, config(train="mixers"), None)
    after = weights(student)
    changed = {name for name in after if not np.array_equal(after[name], before[name])}
    assert (
        changed
        == {name for name in after if ".mamba." in name}
        == set(trainable_names(core_of(student), "mixers"))
    )
    with pytest.raises(mil.ArgumentError, match="no mixers"):
        mil.distill(teacher, teacher, tokens, config(train="mixers"), None)


def test_alignment_comes_first(teacher, tokens):
    student = make_student(teacher, tokens, layers="none")
    history = mil.distill(student, teacher, tokens, config(epochs=4, align_fraction=0.5), None)
    rows = [row for row in history if row["step"] > 0]
    assert all("align" in row and "kl" not in row for row in rows[:12])
    assert all("kl" in row and "align" not in row for row in rows[12:])
    assert rows[11]["align"] < rows[0]["align"]


def test_hidden_states_can_be_matched(teacher, tokens):
    student = make_student(teacher, tokens)
    history = mil.distill(student, teacher, tokens, config(epochs=4, hidden_weight=0.3), None)
    hidden = history.column("hidden")[1]
    assert hidden[-1] < hidden[0]
    row = history.final
    assert row["loss"] == pytest.approx(row["kl"] + 0.3 * row["hidden"], rel=1e-6)


def test_activation_checkpointing_changes_no_bit(teacher, tokens):
    results = []
    for flag in (False, True):
        student = make_student(teacher, tokens)
        mil.distill(student, teacher, tokens, config(checkpointing=flag), None)
        results.append(weights(student))
    assert same(*results)


def test_text_with_answers_only(teacher):
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"{n} and {n}"},
                {"role": "assistant", "content": f"make {2 * n}"},
            ]
        }
        for n in range(40)
    ]
    student = make_student(teacher, [list(range(40))])
    settings = config(loss_on="answers", sequence_length=64, epochs=2)
    history = mil.distill(student, teacher, chats, settings, None, validation=0.1)
    assert history.final["eval_kl"] < history[0]["eval_kl"]
    # Every answer's token counts once in an epoch: "make N<|end|>" of 36 chats.
    held = mil.evaluate.compare(student, teacher, chats, loss_on="answers")
    assert held.tokens == sum(len(f"make {2 * n}") + 1 for n in range(40))


def test_validation_without_a_token_that_counts(teacher):
    """The only answer is the first token of a second row: nobody predicts it."""

    def chat(question, answer):
        words = (("user", question), ("assistant", answer))
        return {"messages": [{"role": role, "content": text} for role, text in words]}

    chats = [chat("who?", "nobody")] * 8
    settings = config(loss_on="answers", sequence_length=24)
    with pytest.raises(mil.ArgumentError, match="no token of these data counts"):
        mil.distill(
            make_student(teacher, [list(range(40))]),
            teacher,
            chats,
            settings,
            None,
            validation=[chat("q" * 21, "")],
        )
    for share in (1, 1.5, float("nan"), np.float32(2)):
        with pytest.raises(mil.ArgumentError, match="share of them between 0 and 1"):
            mil.sft(teacher, chats, mil.SftConfig(), None, validation=share)


def test_fine_tuning_learns_labels(tmp_path, tokens):
    model = mil.load(write_llama(tmp_path / "llama"))
    settings = mil.SftConfig(
        loss_on="all", epochs=6, batch_size=8, learning_rate=5e-3, save_every=None
    )
    history = mil.sft(model, tokens, settings, None, validation=tokens[:8])
    assert history.final["eval_perplexity"] < 0.8 * history[0]["eval_perplexity"]
    assert "kl" not in history.final


def test_run_folder(teacher, tokens, tmp_path):
    student = make_student(teacher, tokens)
    history = mil.distill(
        student, teacher, tokens, config(save_every=2, keep_last=2), tmp_path / "run"
    )
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines == list(history)
    assert {
        "step",
        "tokens",
        "loss",
        "kl",
        "agreement",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "seconds",
        "peak_memory_bytes",
    } <= set(lines[-1])
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["latest", "step-00000004", "step-00000006"]
    for folder in (
        tmp_path / "run" / "model",
        tmp_path / "run" / "checkpoints" / "step-00000006" / "model",
    ):
        assert same(weights(student), weights(mil.load(folder)))
    assert "6 steps" in repr(history) and "<table>" in history._repr_html_()
    assert mil.History.read(tmp_path / "run") == history


def test_a_second_run_sets_the_first_aside(teacher, tokens, tmp_path):
    for _ in range(2):
        mil.distill(make_student(teacher, tokens), teacher, tokens, config(max_steps=1), tmp_path)
    assert (tmp_path / "previous-1" / "model" / "config.json").exists()
    assert (tmp_path / "model" / "config.json").exists()


def listing(folder):
    return sorted(str(path) for path in folder.rglob("*") if path.name != ".lock")


@pytest.mark.parametrize("role", ["student", "teacher", "data", "validation", "linked"])
def test_a_run_does_not_move_its_own_inputs(role, teacher, tokens, tmp_path):
    run = tmp_path / "run"
    mil.distill(make_student(teacher, tokens), teacher, tokens, config(max_steps=1), run)
    np.save(run / "model" / "tokens.npy", tokens)
    (tmp_path / "link").symlink_to(run / "model")
    place = tmp_path / "link" if role == "linked" else run / "model"
    inside = {
        "student": mil.load(place),
        "teacher": mil.load(place),
        "data": str(place / "tokens.npy"),
        "validation": [place / "tokens.npy"],
    }
    given = {"student": teacher, "teacher": teacher, "data": tokens, "validation": None}
    role = role.replace("linked", "student")
    given[role] = inside[role]
    before = listing(run)
    words = f"{place}.*: is read by this run and lies in {run / 'model'}, .* use another output"
    with pytest.raises(mil.ArgumentError, match=words):
        mil.distill(**given, config=config(max_steps=1), output_dir=run)
    assert listing(run) == before
    mil.distill(**given, config=config(max_steps=1), output_dir=run / "next")
    assert (run / "next" / "model" / "tokenizer.json").exists()


def test_fine_tuning_does_not_move_its_own_model(tokens, tmp_path):
    model = mil.load(write_llama(tmp_path / "model"))  # of no run, in a folder that runs may get
    before = listing(tmp_path)
    settings = mil.SftConfig(max_steps=1, batch_size=2, sequence_length=LENGTH, loss_on="all")
    with pytest.raises(mil.ArgumentError, match="model: is read by this run"):
        mil.sft(model, tokens, settings, tmp_path)
    for resume in (False, True):
        with pytest.raises(mil.StateError, match="model: stands where the run writes") as caught:
            mil.sft(
                mil.load(write_llama(tmp_path.parent / "other")), tokens, settings, tmp_path, resume
            )
        assert "\n" not in str(caught.value)
    assert listing(tmp_path) == before


def test_vocabularies_that_differ_by_padding(teacher, tokens, tmp_path):
    padded = mil.load(write_llama(tmp_path / "padded", vocab=300, scale=2.0, seed=1))
    ours, theirs = shared_vocabulary(teacher, padded)
    assert ours.config["vocab"] == theirs.config["vocab"] == VOCAB
    student = make_student(padded, tokens)
    tail = student.parameters()["model.embed_tokens.weight"][VOCAB:].copy()
    history = mil.distill(student, teacher, tokens, config(epochs=2), None)
    assert history.final["kl"] < history[0].get("kl", history[1]["kl"])
    after = student.parameters()["model.embed_tokens.weight"]
    assert np.array_equal(after[VOCAB:], tail)
    assert not np.array_equal(
        after[:VOCAB], padded.parameters()["model.embed_tokens.weight"][:VOCAB]
    )


def test_other_vocabularies_are_refused(teacher, tokens, tmp_path):
    other = mil.load(write_llama(tmp_path / "bare", vocab=270, text=False))
    bare = mil.load(write_llama(tmp_path / "bare2", vocab=280, text=False))
    with pytest.raises(mil.ArgumentError, match="vocabulary is 280, the teacher's 270"):
        mil.distill(bare, other, tokens, config(), None)
    small = mil.load(write_llama(tmp_path / "small", vocab=200))
    with pytest.raises(mil.ArgumentError, match="tokens lie beyond it"):
        mil.distill(small, teacher, tokens, config(), None)
    words = tmp_path / "words"
    write_llama(words)
    text = (words / "tokenizer.json").read_text().replace("<|user|>", "<|human|>")
    (words / "tokenizer.json").write_text(text)
    with pytest.raises(mil.ArgumentError, match="different tokenizers"):
        mil.distill(mil.load(words), teacher, tokens, config(), None)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"kl_weight": 0.0}, "nothing would be learnt"),
        ({"direction": "sideways"}, "direction='sideways'"),
        ({"temperature": 0}, "temperature=0"),
        ({"temperature": 1e300}, "temperature=1e[+]300: expected a number from 1e-6 to 1e6"),
        ({"temperature": 1e-300}, "temperature=1e-300"),
        ({"on_policy_temperature": 1e-300}, "on_policy_temperature=1e-300"),
        ({"reduction": "mean"}, "reduction='mean'"),
        ({"train": "none"}, "train='none'"),
        ({"align_fraction": 1.5}, "align_fraction=1.5"),
        ({"betas": 0.9}, "betas=0.9: expected two numbers"),
        ({"betas": (0.9, 1 - 1e-9)}, "betas=.*below 1"),
        ({"muon_momentum": 1 - 1e-9}, "muon_momentum=.*below 1"),
        ({"learning_rate": 10**400}, "learning_rate=1000.*above 0"),
        ({"on_policy": 0.5, "kl_weight": 0, "ce_weight": 1}, "would learn nothing"),
    ],
)
def test_bad_settings(changes, words):
    with pytest.raises(mil.ArgumentError, match=words):
        config(**changes)


def test_wrong_arguments(teacher, tokens):
    with pytest.raises(mil.ArgumentError, match="expected mil.DistillConfig, got dict"):
        mil.distill(teacher, teacher, tokens, {"epochs": 1}, None)
    with pytest.raises(mil.ArgumentError, match="expected a model"):
        mil.distill("student", teacher, tokens, config(), None)
    with pytest.raises(mil.ArgumentError, match=r"token 999 at row 0, column 1"):
        mil.distill(teacher, teacher, np.array([[1, 999]]), config(), None)


def test_a_loss_that_is_not_finite_stops_the_run(teacher, tokens, tmp_path):
    student = make_student(teacher, tokens)
    settings = config(
        epochs=2,
        save_every=2,
        learning_rate=1e30,
        warmup_steps=9,
        max_grad_norm=0,
        schedule="constant",
    )
    with pytest.raises(mil.NonFiniteError, match=r"step \d+: .*checkpoint") as caught:
        mil.distill(student, teacher, tokens, settings, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("save_every", [1, None])
def test_broken_weights_are_not_saved(teacher, tokens, tmp_path, save_every):
    """A step can break the weights; only the loss of the next one would tell, if there is one."""
    student = make_student(teacher, tokens)
    settings = config(max_steps=1 + bool(save_every), learning_rate=1e38, warmup_steps=0)
    settings = mil.DistillConfig(**{**vars(settings), "save_every": save_every, "eval_every": 1})
    with pytest.raises(mil.NonFiniteError, match="step 1: .*no checkpoint was due yet"):
        mil.distill(student, teacher, tokens, settings, tmp_path, validation=tokens[:4])
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("role", ["student", "teacher", "model"])
def test_broken_weights_are_named(role, teacher, tokens, tmp_path):
    """A run that fails at its first step says whose weights are at fault, and which."""
    name = "model.layers.1.mlp.up_proj.weight"
    models = {"student": make_student(teacher, tokens), "teacher": mil.load(teacher.save(tmp_path))}
    models["model"] = models["student"]
    models[role].parameters()[name].flat[7] = np.inf
    with pytest.raises(mil.NonFiniteError, match=f"no step .*: {name} of the {role} holds NaN or"):
        if role == "model":
            mil.sft(models[role], tokens, mil.SftConfig(max_steps=1, loss_on="all"), None)
        else:
            mil.distill(models["student"], models["teacher"], tokens, config(), None)


def test_metrics_are_json(teacher, tokens, tmp_path):
    """Figures that are not finite are left out: NaN and Infinity are no JSON."""

    def refuse(word):
        raise AssertionError(word)

    student = make_student(teacher, tokens)
    student.parameters()["model.norm.weight"][:] = np.nan
    with pytest.raises(mil.NonFiniteError, match="step 1: the loss is nan; no step was taken yet"):
        mil.distill(student, teacher, tokens, config(), tmp_path, validation=tokens[:4])
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_plots(teacher, tokens, tmp_path):
    pytest.importorskip("matplotlib")
    history = mil.distill(
        make_student(teacher, tokens), teacher, tokens, config(), None, validation=tokens[:4]
    )
    history.plot(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(mil.ArgumentError, match="empty"):
        mil.History().plot()
