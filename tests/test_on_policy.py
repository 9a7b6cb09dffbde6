"""On-policy steps: the student's own samples, only they count, and the same ones after a resume."""

import numpy as np
import pytest
from reference import loss as reference
from tiny_models import write_llama

import mambainllama as mil
from mambainllama.data import Batches, read_documents
from mambainllama.on_policy import is_on_policy, sample_continuations
from mambainllama.pairs import core_of

VOCAB = 264


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return mil.load(write_llama(tmp_path_factory.mktemp("teacher") / "llama", scale=2.0))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(5).integers(0, VOCAB, (24, 20)).astype(np.uint16)


def student_of(teacher, tokens):
    return mil.convert(teacher, attention_layers=[1], calibration=tokens)


def config(**changes):
    base = {
        "batch_size": 8,
        "sequence_length": 20,
        "learning_rate": 5e-3,
        "save_every": None,
        "on_policy": 1.0,
        "on_policy_prompt": 6,
    }
    return mil.DistillConfig(**{**base, **changes})


def sampled(model, data, step=0, **changes):
    documents = read_documents(data, model.tokenizer, vocab=VOCAB, loss_on="answers")
    batches = Batches(documents, batch_size=4, sequence_length=64, accumulation=2).step(0)
    options = {
        "stop": [256],
        "prompt_length": 6,
        "new_tokens": 9,
        "sequence_length": 64,
        "temperature": 1.0,
        "seed": 3,
        "step": step,
    }
    return batches, sample_continuations(core_of(model), batches, **{**options, **changes})


def test_samples_continue_prompts(teacher, tokens):
    given, found = sampled(teacher, tokens)
    assert [batch.rows for batch in found] == [4, 4]
    for before, after in zip(given, found, strict=True):
        for i in range(4):
            old, new = (b.tokens[b.offsets[i] : b.offsets[i + 1]] for b in (before, after))
            assert np.array_equal(old[:6], new[:6])
            weight = after.row_weight[after.offsets[i] : after.offsets[i + 1]]
            assert weight.tolist() == [0] * 5 + [1] * (len(new) - 6) + [0]
            assert len(new) == 15 or new[-1] == 256
            assert (new[:-1][6:] != 256).all()
        assert (after.labels[after.row_weight > 0] >= 0).all()
    _, again = sampled(teacher, tokens)
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(found, again, strict=True))
    _, other = sampled(teacher, tokens, step=1)
    assert not np.array_equal(found[0].tokens, other[0].tokens)
    _, short = sampled(teacher, tokens, sequence_length=8)
    assert np.diff(short[0].offsets).max() <= 8


def test_chats_are_continued_from_a_question(teacher):
    chats = [
        {
            "messages": [
                {"role": "user", "content": "ab"},
                {"role": "assistant", "content": "cd"},
                {"role": "user", "content": "ef"},
                {"role": "assistant", "content": "gh"},
            ]
        }
    ] * 8
    _, found = sampled(teacher, chats)
    openings = set()
    for batch in found:
        for i in range(len(batch.offsets) - 1):
            row = slice(batch.offsets[i], batch.offsets[i + 1])
            count = int(np.argmax(batch.row_weight[row] > 0)) + 1
            openings.add(teacher.tokenizer.decode(batch.tokens[row][:count].tolist(), False))
    first = "<|user|>ab<|end|><|assistant|>"
    assert openings == {first, first + "cd<|end|><|user|>ef<|end|><|assistant|>"}


def test_the_loss_is_the_divergence_on_samples(teacher, tokens):
    student = student_of(teacher, tokens)
    settings = config(batch_size=24, max_steps=1, ce_weight=0.5, seed=7, learning_rate=1e-9)
    row = mil.distill(student, teacher, tokens, settings, None).final
    documents = read_documents(tokens, vocab=VOCAB)
    batches = Batches(documents, batch_size=24, sequence_length=20, seed=7).step(0)
    [batch] = sample_continuations(
        core_of(student), batches, stop=[256], prompt_length=6, new_tokens=128,
        sequence_length=20, temperature=1.0, seed=7, step=0,
    )  # fmt: skip
    logs = [
        reference.log_softmax(core_of(m).forward(batch.tokens, batch.offsets).astype(float))
        for m in (student, teacher)
    ]
    kl = (np.exp(logs[1]) * (logs[1] - logs[0])).sum(axis=1)[batch.row_weight > 0].mean()
    assert row["on_policy_kl"] == pytest.approx(kl, rel=1e-5)
    assert row["loss"] == row["on_policy_kl"] and "kl" not in row and "ce" not in row


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_it_learns_from_its_own_samples(teacher, tokens, direction):
    student = student_of(teacher, tokens)
    settings = config(epochs=12, direction=direction, on_policy=0.5, jsd_mix=0.2)
    history = mil.distill(student, teacher, tokens, settings, None, validation=tokens[:8])
    rows = [row for row in history if row["step"] > 0]
    own = ["on_policy_kl" in row for row in rows]
    assert own == [is_on_policy(0, step, 0.5) for step in range(len(rows))]
    assert 0.2 < np.mean(own) < 0.8
    assert history.final["eval_kl"] < 0.8 * history[0]["eval_kl"]


def test_alignment_and_logging_go_with_it(teacher, tokens):
    student = student_of(teacher, tokens)
    settings = config(epochs=4, align_fraction=0.5, on_policy=0.5, log_every=6, ce_weight=0.1)
    history = mil.distill(student, teacher, tokens, settings, None)
    assert "align" in history[0] and "on_policy_kl" not in history[0]
    last = history.final
    assert {"kl", "ce", "on_policy_kl"} <= set(last) and np.isfinite(last["loss"])


def test_bad_settings():
    for changes in ({"on_policy": 1.5}, {"on_policy_tokens": 0}, {"on_policy_temperature": 0}):
        with pytest.raises(mil.ArgumentError, match=next(iter(changes))):
            config(**changes)
    with pytest.raises(mil.ArgumentError, match="jsd_mix=1.0: expected a number between 0 and 1"):
        config(jsd_mix=1.0)
