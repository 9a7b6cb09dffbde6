"""Preference training: its loss and gradients are PyTorch's, it learns, and bad pairs are named.

Tolerances: the gradient of the whole model carries float32 activations, 2e-4 of its largest entry
(as in test_model.py); losses carry sums of some ten log-probabilities, 1e-5.
"""

import gzip
import json
import resource
import shutil

import numpy as np
import pytest
from core_models import KINDS, build
from tiny_models import write_llama

import mambainllama as mil
from mambainllama import _core
from mambainllama.preference import PreferenceTask, answer_logprobs, read_pairs

WORDS = ["sun", "moon", "tree", "river", "stone", "bird"]


@pytest.fixture
def model(tmp_path):
    return mil.load(write_llama(tmp_path / "llama", scale=1.5))


def pairs(count=24):
    """Prompts whose chosen answers are in capitals, the rejected ones not."""
    return [
        {
            "prompt": f"say {WORDS[n % 6]} {n}",
            "chosen": WORDS[n % 6].upper() * 2,
            "rejected": WORDS[n % 6] * (1 + n % 3),
        }
        for n in range(count)
    ]


def config(**changes):
    base = {
        "batch_size": 6,
        "sequence_length": 64,
        "prompt_length": 32,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "save_every": None,
    }
    return mil.DPOConfig(**{**base, **changes})


# ---- the loss ------------------------------------------------------------------------------------


def some_pairs(rng, vocab, count=3):
    """Packed sequences in twos with the same beginning, labels and weights of their answers."""
    tokens, offsets, labels, weight = [], [0], [], []
    for _ in range(count):
        prompt = rng.integers(0, vocab, rng.integers(1, 9)).tolist()
        for _ in range(2):
            ids = prompt + rng.integers(0, vocab, rng.integers(1, 9)).tolist()
            tokens += ids
            labels += [*ids[1:], -1]
            weight += [float(len(prompt) <= i + 1 < len(ids)) for i in range(len(ids))]
            offsets.append(len(tokens))
    as_int = [np.array(a, np.int32) for a in (tokens, labels)]
    return as_int[0], np.array(offsets, np.int64), as_int[1], np.array(weight, np.float32)


@pytest.mark.parametrize("kind", ["transformer", "mamba2 hybrid", "both mixers"])
@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.1},
        {"beta": 2.0, "label_smoothing": 0.2, "scale": 0.25},
        {"beta": 3.0, "length_normalized": True},
    ],
    ids=str,
)
def test_loss_and_gradients_match_pytorch(kind, options):
    torch = pytest.importorskip("torch")
    torch_model = pytest.importorskip("torch_model")
    core, rng = build(KINDS[kind]), np.random.default_rng(3)
    tokens, offsets, labels, weight = some_pairs(rng, core.config["vocab"])
    reference = rng.normal(-3, 1, len(offsets) - 1)
    trainer = _core.Trainer(core)
    got = trainer.backward(
        tokens, offsets, labels=labels, row_weight=weight, reference=reference, **options
    )

    parameters = torch_model.tensors(core.parameters(), True)
    beta, e = options["beta"], options.get("label_smoothing", 0.0)
    logprobs = []
    for begin, end in zip(offsets, offsets[1:], strict=False):
        logs = torch_model.forward(core.config, parameters, tokens[begin:end]).log_softmax(-1)
        chosen = torch.as_tensor(weight[begin:end]).bool()
        label = torch.as_tensor(labels[begin:end]).long()
        picked = logs[chosen].gather(1, label[chosen][:, None])
        logprobs.append(picked.mean() if options.get("length_normalized") else picked.sum())
    ratio = torch.stack(logprobs) - torch.tensor(reference)
    margin = beta * (ratio[::2] - ratio[1::2])
    logsigmoid = torch.nn.functional.logsigmoid
    loss = (-(1 - e) * logsigmoid(margin) - e * logsigmoid(-margin)).sum()
    (loss * options.get("scale", 1.0)).backward()

    assert got["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert got["margin"] == pytest.approx(margin.sum().item(), rel=1e-4, abs=1e-4)
    assert got["pairs"] == 3 and got["pairs_correct"] == (margin > 0).sum().item()
    assert got["chosen_logprob"] == pytest.approx(sum(logprobs[::2]).item(), rel=1e-5)
    for name, gradient in trainer.gradients().items():
        expected = parameters[name].grad.numpy()
        assert np.abs(gradient - expected).max() <= 2e-4 * np.abs(expected).max() + 1e-7, name

    again = trainer.backward(
        tokens, offsets, labels=labels, row_weight=weight, reference=reference, evaluate=True,
        **options,
    )  # fmt: skip
    assert again["loss"] == pytest.approx(got["loss"], rel=1e-6)


def test_extremes_stay_finite():
    """Margins of millions, and answers that say the same."""
    core, rng = build(KINDS["mamba2 hybrid"]), np.random.default_rng(4)
    tokens, offsets, labels, weight = some_pairs(rng, core.config["vocab"], 1)
    trainer = _core.Trainer(core)
    for reference in ([0.0, 1e4], [1e4, 0.0]):
        for smoothing in (0.0, 0.3):
            got = trainer.backward(
                tokens, offsets, labels=labels, row_weight=weight, reference=reference, beta=1e3,
                label_smoothing=smoothing,
            )  # fmt: skip
            assert np.isfinite(list(got.values())).all()
            assert np.isfinite(trainer.apply(0.0))
    half = offsets[1]
    same = (np.tile(tokens[:half], 2), np.array([0, half, 2 * half]))
    got = trainer.backward(
        *same, labels=np.tile(labels[:half], 2), row_weight=np.tile(weight[:half], 2),
        reference=[0.0, 0.0], beta=5.0,
    )  # fmt: skip
    # Equal but for the rounding of products, whose order may depend on the place of a row.
    assert got["loss"] == pytest.approx(np.log(2), rel=1e-4)
    assert max(np.abs(g).max() for g in trainer.gradients().values()) < 1e-4


def test_core_refuses_what_makes_no_sense():
    core, rng = build(KINDS["transformer"]), np.random.default_rng(5)
    tokens, offsets, labels, weight = some_pairs(rng, core.config["vocab"], 2)
    trainer = _core.Trainer(core)

    def run(offsets=offsets, **changes):
        known = {"labels": labels, "row_weight": weight, "reference": np.zeros(len(offsets) - 1)}
        trainer.backward(tokens, offsets, **(known | changes))

    with pytest.raises(mil.ArgumentError, match="two sequences a pair"):
        run(np.array([0, *offsets[2:]]))
    with pytest.raises(mil.ShapeError, match="reference needs one entry for each of the 4"):
        run(reference=np.zeros(3))
    with pytest.raises(mil.ArgumentError, match="beta = 0"):
        run(beta=0.0)
    with pytest.raises(mil.ArgumentError, match="label_smoothing = 0.7"):
        run(label_smoothing=0.7)


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", [True, False])
def test_it_learns_to_prefer(model, tmp_path, store):
    settings = config(epochs=6, beta=0.5, store_reference=store)
    history = mil.dpo(model, pairs(), settings, tmp_path / "run", validation=0.25)
    first, last = history[0], history.final
    assert first["eval_loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert first["eval_margin"] == pytest.approx(0, abs=1e-5)
    assert last["eval_loss"] < 0.5 and last["eval_accuracy"] == 1.0
    assert last["margin"] == pytest.approx(last["chosen_reward"] - last["rejected_reward"])
    assert last["chosen_reward"] > last["rejected_reward"]
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert (tmp_path / "run" / "reference").exists() == store


def test_stored_and_computed_references_train_alike(tmp_path):
    def run(itself=False, **changes):
        model = mil.load(write_llama(tmp_path / "llama", scale=1.5))
        reference = model if itself else None
        history = mil.dpo(model, pairs(), config(**changes), None, reference=reference)
        return history.column("loss")[1], model.parameters()["model.norm.weight"].copy()

    stored = run()
    for itself in (False, True):  # the model given as its own reference stays as it is, too
        computed = run(itself, store_reference=False)
        assert stored[0] == pytest.approx(computed[0], rel=1e-5)
        np.testing.assert_allclose(stored[1], computed[1], atol=1e-5)
    normal = run(length_normalized=True)
    assert normal[0][0] == pytest.approx(np.log(2), abs=1e-5) and normal[0] != stored[0]


def test_another_reference(model, tmp_path):
    other = mil.load(write_llama(tmp_path / "other", seed=3, scale=1.5))
    before = other.parameters()["model.norm.weight"].copy()
    first = mil.dpo(model, pairs(), config(max_steps=1), None, reference=other)[0]
    assert abs(first["margin"]) > 1e-3
    assert np.array_equal(before, other.parameters()["model.norm.weight"])


def test_reference_is_kept_and_goes_on(model, tmp_path):
    """A stored pass is used again, cut to whole blocks, and refused where the pairs changed."""
    folder = tmp_path / "run"
    settings = config(max_steps=2, batch_size=1, save_every=1)
    mil.dpo(model, pairs(40), settings, folder)
    stored = folder / "reference" / "pairs.f64"
    whole = stored.read_bytes()
    assert len(whole) == 40 * 16
    stored.write_bytes(whole[: 16 * 16 + 5])  # killed in the second block

    again = mil.load(tmp_path / "llama")
    mil.dpo(again, pairs(40), settings, folder)
    assert stored.read_bytes() == whole
    with pytest.raises(mil.StateError, match="cannot resume: pairs was"):
        mil.dpo(again, pairs(39), settings, folder, resume=True)
    # The weights that the model has on resuming are not the reference: the stored ones are.
    trained = mil.load(folder / "model")
    assert mil.dpo(trained, pairs(40), settings, folder, resume=True).final["step"] == 2


def test_a_pass_of_the_reference_does_not_go_on_with_another_model(model, tmp_path):
    folder = tmp_path / "run"
    settings = config(max_steps=1, batch_size=1)
    mil.dpo(model, pairs(40), settings, folder)
    shutil.rmtree(folder / "checkpoints")  # as if killed before the first
    shutil.rmtree(folder / "model")
    stored = folder / "reference" / "pairs.f64"
    whole = stored.read_bytes()
    other = mil.load(write_llama(tmp_path / "other", scale=1.5, seed=4))
    for left in (16 * 16, len(whole)):
        stored.write_bytes(whole[:left])
        with pytest.raises(mil.StateError, match="cannot resume: reference was"):
            mil.dpo(other, pairs(40), settings, folder, resume=True)
        assert len(stored.read_bytes()) == left
        again = mil.load(tmp_path / "llama")
        assert mil.dpo(again, pairs(40), settings, folder, resume=True).final["step"] == 1
        assert stored.read_bytes() == whole
        shutil.rmtree(folder / "checkpoints")
        shutil.rmtree(folder / "model")


def test_a_run_does_not_move_its_own_reference(model, tmp_path):
    mil.dpo(model, pairs(), config(max_steps=1), tmp_path / "run")
    ours = mil.load(tmp_path / "run" / "model")
    for given in ({"model": ours}, {"model": model, "reference": ours}):
        with pytest.raises(mil.ArgumentError, match="run/model: is read by this run"):
            mil.dpo(data=pairs(), config=config(max_steps=1), output_dir=tmp_path / "run", **given)


# ---- data ----------------------------------------------------------------------------------------


def documents(model, records, **changes):
    return read_pairs(records, model.tokenizer, 264, config(**changes))


def test_forms_of_pairs(model, tmp_path):
    """Strings, messages, whole chats and no prompt at all say the same."""
    user = {"role": "user", "content": "hi"}
    yes, no = ({"role": "assistant", "content": words} for words in ("yes", "no!"))
    forms = [
        {"prompt": "hi", "chosen": "yes", "rejected": "no!"},
        {"prompt": [user], "chosen": "yes", "rejected": "no!"},
        {"prompt": [user], "chosen": [yes], "rejected": [no]},
        {"prompt": "hi", "chosen": [user, yes], "rejected": [user, no]},
        {"chosen": [user, yes], "rejected": [user, no], "extra": 1},
    ]
    path = tmp_path / "pairs.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(form) + "\n" for form in forms)
    found = documents(model, path)
    texts = [model.tokenizer.decode(found[i], False) for i in range(len(found))]
    whole = "<|user|>hi<|end|><|assistant|>{}<|end|>"
    assert texts[:2] == [whole.format("yes"), whole.format("no!")]
    assert texts == texts[:2] * 5
    answers = [model.tokenizer.decode(found[i][m], False) for i, m in enumerate(masks(found))]
    assert answers[:2] == ["yes<|end|>", "no!<|end|>"]
    assert found.fingerprint() != documents(model, forms[:4]).fingerprint()


def masks(found):
    return [found.targets[a:b] for a, b in zip(found.starts, found.starts[1:], strict=False)]


def test_plain_text_and_parquet(model, tmp_path):
    model.tokenizer.chat_template = None
    record = {"prompt": "abc", "chosen": " yes", "rejected": " no"}
    found = documents(model, [record])
    assert model.tokenizer.decode(found[0], False) == "abc yes<|end|>"
    assert masks(found)[1].tolist() == [False] * 3 + [True] * 4
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([record] * 3), tmp_path / "p.parquet")
    assert len(documents(model, tmp_path / "p.parquet")) == 6


def test_long_pairs_are_cut_alike(model):
    model.tokenizer.chat_template = None
    record = {"prompt": "p" * 50 + "q" * 10, "chosen": "c" * 40, "rejected": "r" * 4}
    found = documents(model, [record], sequence_length=32, prompt_length=8)
    chosen, rejected = (model.tokenizer.decode(found[i], False) for i in (0, 1))
    assert chosen == "q" * 8 + "c" * 24 and rejected == "q" * 8 + "rrrr<|end|>"
    with pytest.raises(mil.ArgumentError, match="prompt_length=32 leaves no room"):
        config(sequence_length=32)


@pytest.mark.parametrize(
    "record, words",
    [
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "'rejected' is an empty answer"),
        ({"prompt": "a", "chosen": "b"}, "expected 'prompt', 'chosen' and 'rejected', found"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "'prompt' must be a string or a list"),
        ({"chosen": "b", "rejected": "c"}, "'prompt' must be a string or a list"),
        (
            {"prompt": "a", "chosen": [{"role": "user", "content": "x"}] * 3, "rejected": "c"},
            "'rejected' must be a string or a list",
        ),
        (
            {"prompt": "a", "chosen": [{"role": "user"}], "rejected": []},
            r"chosen\[0\] must have a 'role' and a 'content'",
        ),
        ([], "expected 'prompt', 'chosen' and 'rejected', found list"),
    ],
)
def test_bad_pairs_are_named(model, tmp_path, record, words):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(pairs(1)[0]) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(mil.FormatError, match=rf"pairs\.jsonl:2: {words}") as caught:
        documents(model, path)
    assert "\n" not in str(caught.value)
    assert documents(model, path, skip_bad=True).skipped == 1


def test_wrong_arguments(model, tmp_path):
    with pytest.raises(mil.ArgumentError, match="expected mil.DPOConfig, got dict"):
        mil.dpo(model, pairs(), {"beta": 1}, None)
    with pytest.raises(mil.ArgumentError, match="data is empty"):
        mil.dpo(model, [], config(), None)
    with pytest.raises(mil.ArgumentError, match=r"beta=0: expected a number above 0"):
        config(beta=0)
    with pytest.raises(mil.ArgumentError, match="label_smoothing=0.6"):
        config(label_smoothing=0.6)
    model.tokenizer = None
    with pytest.raises(mil.ArgumentError, match="no tokenizer"):
        mil.dpo(model, pairs(), config(), None)


def test_references_that_cannot_be(model, tmp_path):
    other = mil.load(write_llama(tmp_path / "words"))
    other.tokenizer.backend.add_tokens(["new"])
    with pytest.raises(mil.ArgumentError, match="choose a reference with the student's tokenizer"):
        mil.dpo(model, pairs(), config(), None, reference=other)
    broken = mil.load(write_llama(tmp_path / "broken"))
    broken.parameters()["model.norm.weight"][3] = np.nan
    with pytest.raises(mil.NonFiniteError, match="log-probabilities of pair 1 are not finite"):
        mil.dpo(model, pairs(), config(), None, reference=broken)


def test_a_full_disk_is_told(model, tmp_path):
    """A limit on file sizes stands for the full disk; what was written goes on to be used."""
    settings, folder = config(max_steps=1, batch_size=1), tmp_path / "run"
    data = documents(model, pairs(40))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        with pytest.raises(mil.FileError, match=r"pairs\.f64: .*; resume=True goes on from it"):
            mil.dpo(model, data, settings, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (folder / "reference" / "pairs.f64").stat().st_size == 300
    assert mil.dpo(model, data, settings, folder, resume=True).final["step"] == 1
    assert (folder / "reference" / "pairs.f64").stat().st_size == 40 * 16


def test_a_loss_that_is_not_finite_stops_the_run(model, tmp_path):
    task = PreferenceTask(model, None, pairs(), None, config(), False)
    batch = task.batches.step(0)[0]
    assert answer_logprobs(task.student, batch).shape == (12,)
    settings = config(learning_rate=1e30, warmup_steps=9, max_grad_norm=0, epochs=4)
    with pytest.raises(mil.NonFiniteError, match=r"step \d+: .*checkpoint"):
        mil.dpo(model, pairs(), settings, tmp_path / "run")
