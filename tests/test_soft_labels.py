"""Stored log-probabilities of a teacher stand in for it: same numbers, and training goes on alike.

Tolerances: float16 keeps a log-probability to 5e-4 of itself, so a KL of the student's size to
some 1e-4 of a nat.
"""

import io
import json
import shutil
import sys

import numpy as np
import pytest
from reference import loss as reference
from tiny_models import write_llama

import mambainllama as mil
from mambainllama.data import Batches, read_documents

VOCAB, TOP = 264, 12


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return mil.load(write_llama(tmp_path_factory.mktemp("teacher") / "llama", scale=2.0))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(5).integers(0, VOCAB, (24, 20)).astype(np.uint16)


def student_of(teacher, tokens):
    return mil.convert(teacher, attention_layers=[1], calibration=tokens)


def config(**changes):
    base = {"batch_size": 8, "sequence_length": 20, "learning_rate": 5e-3, "save_every": None}
    return mil.DistillConfig(**{**base, **changes})


def test_labels_are_the_teachers_likeliest_tokens(teacher, tokens, tmp_path):
    folder = mil.soft_labels(teacher, tokens, tmp_path / "t.labels", top=TOP)
    documents = read_documents(folder, vocab=VOCAB)
    assert len(documents) == 24 and np.array_equal(documents[3], tokens[3])
    batch = Batches(documents, batch_size=24, sequence_length=64, shuffle=False).step(0)[0]
    assert batch.top_tokens.shape == (24 * 20, TOP) and batch.top_tokens.dtype == np.int32
    assert batch.counted == batch.labelled == 24 * 19
    logs = reference.log_softmax(teacher(tokens[:4].astype(int)).reshape(80, VOCAB).astype(float))
    counts = batch.row_weight[:80] > 0
    assert np.array_equal(np.flatnonzero(~counts), [19, 39, 59, 79])
    for row in np.flatnonzero(counts):
        ids = batch.top_tokens[row]
        np.testing.assert_allclose(
            batch.top_logprobs[row, :TOP], logs[row, ids], rtol=6e-4, atol=1e-5
        )
        assert logs[row, ids].min() >= np.sort(logs[row])[-TOP] - 1e-6
        rest = np.log(np.exp(np.delete(logs[row], ids)).sum())
        assert batch.top_logprobs[row, TOP] == pytest.approx(rest, rel=2e-3)


def test_distilling_from_labels_is_distilling_from_buckets(teacher, tokens, tmp_path):
    """The first loss is the NumPy reference's; with all tokens stored it is the teacher's own."""
    folder = mil.soft_labels(teacher, tokens, tmp_path / "t.labels", top=TOP)
    student = student_of(teacher, tokens)
    first = mil.distill(student, None, folder, config(batch_size=24, max_steps=1), None).final
    student = student_of(teacher, tokens)
    ours, theirs = (
        reference.log_softmax(m(tokens.astype(int))[:, :-1].reshape(-1, VOCAB).astype(float))
        for m in (student, teacher)
    )
    top = np.argsort(-theirs, axis=1)[:, :TOP]
    buckets = [
        np.concatenate(
            [
                np.take_along_axis(logs, top, axis=1),
                np.log1p(-np.exp(np.take_along_axis(logs, top, axis=1)).sum(axis=1, keepdims=True)),
            ],
            axis=1,
        )
        for logs in (ours, theirs)
    ]
    expected = (np.exp(buckets[1]) * (buckets[1] - buckets[0])).sum(axis=1).mean()
    assert first["kl"] == pytest.approx(expected, rel=1e-3)
    whole = (np.exp(theirs) * (theirs - ours)).sum(axis=1).mean()
    assert 0 < expected < whole

    everything = mil.soft_labels(teacher, tokens, tmp_path / "all.labels", top=VOCAB)
    first = mil.distill(student, None, everything, config(batch_size=24, max_steps=1), None).final
    assert first["kl"] == pytest.approx(whole, rel=1e-3)
    assert first["agreement"] == pytest.approx((ours.argmax(1) == theirs.argmax(1)).mean())


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_it_learns_without_the_teacher(teacher, tokens, tmp_path, direction):
    folder = mil.soft_labels(teacher, tokens, tmp_path / "t.labels", top=TOP)
    student = student_of(teacher, tokens)
    before = mil.evaluate.compare(student, teacher, tokens).kl
    settings = config(epochs=10, direction=direction)
    history = mil.distill(student, None, folder, settings, tmp_path / "run", validation=folder)
    assert history.final["eval_kl"] < 0.7 * history[0]["eval_kl"]
    assert mil.evaluate.compare(student, teacher, tokens).kl < 0.8 * before
    again = mil.distill(student, None, folder, settings, tmp_path / "run", True, validation=folder)
    assert again == history
    text = mil.distill(student, None, folder, config(max_steps=1), None, validation=tokens)
    assert "eval_perplexity" in text.final and "eval_kl" not in text.final


def test_answers_are_labelled_beside_their_text(teacher, tmp_path):
    prompts = [f"question {n}" for n in range(5)]
    path = tmp_path / "answers.jsonl"
    mil.label(teacher, prompts, path, max_new_tokens=6, top_logprobs=4)
    documents = read_documents(tmp_path / "answers.labels", teacher.tokenizer, vocab=VOCAB)
    text = read_documents(path, teacher.tokenizer, vocab=VOCAB, loss_on="answers")
    assert np.array_equal(documents.tokens, text.tokens)
    assert np.array_equal(documents.targets, text.targets)
    assert len(documents.soft.tokens) == text.targets.sum()
    part, rest = documents.split(0.2)
    assert len(part) == 4 and len(rest) == 1
    assert part.fingerprint() != documents.fingerprint()
    with pytest.raises(mil.ArgumentError, match="give a file"):
        mil.label(teacher, prompts, top_logprobs=4)


def test_a_stopped_pass_goes_on(teacher, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["mambainllama.soft_labels"], "PART_TOKENS", 100)
    whole = mil.soft_labels(teacher, tokens, tmp_path / "whole", top=TOP)
    parts = sorted(path.name for path in whole.glob("part-*"))
    assert len(parts) == 5
    half = tmp_path / "half"
    shutil.copytree(whole, half)
    for name in parts[2:]:
        (half / name).unlink()
    with pytest.raises(mil.StateError, match="part 3 of 5 is missing"):
        read_documents(half, vocab=VOCAB)
    with pytest.raises(mil.StateError, match="is there already"):
        mil.soft_labels(teacher, tokens, half, top=TOP)
    with pytest.raises(mil.StateError, match="data was"):
        mil.soft_labels(teacher, tokens[1:], half, top=TOP, resume=True)
    mil.soft_labels(teacher, tokens, half, top=TOP, resume=True)
    for name in parts:
        assert (half / name).read_bytes() == (whole / name).read_bytes()
    both = read_documents([whole, half], vocab=VOCAB)
    assert len(both) == 48 and both.soft.index.max() == 2 * 24 * 19 - 1


def test_mistakes(teacher, tokens, tmp_path):
    folder = mil.soft_labels(teacher, tokens, tmp_path / "t.labels", top=TOP)
    student = student_of(teacher, tokens)
    with pytest.raises(mil.ArgumentError, match="holds no soft labels"):
        mil.distill(student, None, tokens, config(), None)
    for changes in ({"temperature": 2.0}, {"hidden_weight": 0.1}, {"align_fraction": 0.1}):
        with pytest.raises(mil.ArgumentError, match="needs a teacher"):
            mil.distill(student, None, folder, config(**changes), None)
    with pytest.raises(mil.ArgumentError, match="top=0: expected a whole number from 1 to 264"):
        mil.soft_labels(teacher, tokens, tmp_path / "x", top=0)
    other = mil.load(write_llama(tmp_path / "words"))
    other.tokenizer.backend.add_tokens(["new"])
    with pytest.raises(mil.ArgumentError, match="tokenizer is not this model's"):
        mil.distill(other, None, folder, config(), None)


def test_damaged_parts_are_refused(teacher, tokens, tmp_path):
    folder = mil.soft_labels(teacher, tokens, tmp_path / "t.labels", top=TOP)
    path = folder / "part-00000000.npz"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(mil.FormatError, match="not a part of soft labels"):
        read_documents(folder, vocab=VOCAB)
    arrays = dict(np.load(io.BytesIO(content)))
    for changes in (
        {"top_tokens": arrays["top_tokens"][:-1]},
        {"offsets": arrays["offsets"][::-1].copy()},
        {"targets": np.ones_like(arrays["targets"])},
        {"top_logprobs": arrays["top_logprobs"].astype(np.float64)},
        {"tokens": arrays["tokens"].astype(np.float32)},
        {"top_logprobs": np.full_like(arrays["top_logprobs"], np.nan)},
    ):
        np.savez(path, **(arrays | changes))
        with pytest.raises(mil.FormatError, match="do not belong together"):
            read_documents(folder, vocab=VOCAB)
    np.savez(path, **(arrays | {"top_tokens": np.full_like(arrays["top_tokens"], 999)}))
    with pytest.raises(mil.ArgumentError, match="top_tokens: token 999"):
        read_documents(folder, vocab=VOCAB)
    (folder / "labels.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(mil.FormatError, match="expected 'mambainllama soft labels 1'"):
        read_documents(folder, vocab=VOCAB)
