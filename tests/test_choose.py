"""Choosing attention layers by measurement: the hybrids measured are the hybrids converted.

The choices are checked against brute force over all sets of layers of a tiny model.
"""

import itertools

import numpy as np
import pytest
from tiny_checkpoints import VOCAB, tiny

import mambainllama as mil
from mambainllama.choose import Hybrids, _split


@pytest.fixture
def teacher(tmp_path):
    return mil.load(tiny(tmp_path / "teacher", "llama-head-dim"))


@pytest.fixture
def tokens():
    return np.random.default_rng(5).integers(0, VOCAB, (16, 40))


def converted(teacher, tokens, kept, mixer="mamba2"):
    """The KL of a conversion with these layers, fitted and measured on the same parts of tokens."""
    fitted, (packed, offsets) = _split(teacher, tokens)
    student = mil.convert(teacher, mixer, kept, init="fitted", calibration=fitted)
    rows = [packed[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]
    return mil.evaluate.compare(student, teacher, np.array(rows)).kl


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_hybrids_are_conversions(mixer, teacher, tokens):
    choice = mil.choose_layers(teacher, tokens, 1, mixer, init="fitted")
    assert choice.kl == pytest.approx(converted(teacher, tokens, choice.layers, mixer), rel=1e-5)
    assert choice.evenly == pytest.approx(converted(teacher, tokens, [2], mixer), rel=1e-5)
    assert choice.tokens == 4 * 40 and choice.mixer == mixer


@pytest.mark.parametrize("keep", [0, 1, 2, 3])
def test_methods_against_brute_force(keep, teacher, tokens):
    kl = {
        kept: converted(teacher, tokens, kept)
        for size in range(4)
        for kept in itertools.combinations(range(3), size)
    }
    restore = mil.choose_layers(teacher, tokens, keep, method="restore", init="fitted")
    for i, score in restore.scores.items():
        assert score == pytest.approx(kl[()] - kl[(i,)], rel=1e-4, abs=1e-7)
    assert restore.layers == sorted(sorted(range(3), key=lambda i: kl[(i,)])[:keep])

    replace = mil.choose_layers(teacher, tokens, keep, method="replace", init="fitted")
    without = {i: kl[tuple(j for j in range(3) if j != i)] for i in range(3)}
    assert replace.scores == pytest.approx(without, rel=1e-4, abs=1e-7)
    assert replace.layers == sorted(sorted(range(3), key=lambda i: -without[i])[:keep])

    greedy = mil.choose_layers(teacher, tokens, keep, method="greedy", init="fitted")
    chosen = ()
    for step in greedy.steps:
        options = {i: kl[tuple(sorted((*chosen, i)))] for i in range(3) if i not in chosen}
        assert step == min(options, key=options.get)
        chosen = (*chosen, step)
    assert len(greedy.layers) == keep and set(greedy.scores) == {0, 1, 2}


def test_auto_in_convert(teacher, tokens):
    choice = mil.choose_layers(teacher, tokens, 1, init="fitted")
    for words in ("auto:1", "auto:0.3"):
        student = mil.convert(teacher, attention_layers=words, init="fitted", calibration=tokens)
        assert list(student.config.attention_layers) == choice.layers
    assert (
        mil.convert(
            teacher, attention_layers="auto:none", init="fitted", calibration=tokens
        ).config.attention_layers
        == ()
    )


def test_of_a_hybrid(teacher, tokens):
    first = mil.convert(teacher, "mamba2", [0, 2], init="fitted", calibration=tokens)
    choice = mil.choose_layers(first, tokens, 1)
    assert set(choice.scores) == {0, 2} and choice.layers[0] in (0, 2)


def test_one_sequence_serves_for_both(teacher):
    assert len(mil.choose_layers(teacher, np.arange(50), 2).layers) == 2


def test_the_known_hybrids_are_not_measured_twice(teacher, tokens, monkeypatch):
    count = []
    measure = Hybrids._measure
    monkeypatch.setattr(
        Hybrids, "_measure", lambda self, core: count.append(1) or measure(self, core)
    )
    mil.choose_layers(teacher, tokens, 2, method="greedy")
    assert len(count) <= 1 + 3 + 2 + 1 + 1  # none, each, each beside the first, three, evenly


def test_plot(teacher, tokens, tmp_path):
    pytest.importorskip("matplotlib")
    for method in ("restore", "replace", "greedy"):
        choice = mil.choose_layers(teacher, tokens, 1, method=method)
        choice.plot(tmp_path / f"{method}.png")
        assert (tmp_path / f"{method}.png").stat().st_size > 5000
    assert choice.to_dict()["layers"] == choice.layers


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"keep": 4}, "3 attention layers"),
        ({"keep": -1}, "3 attention layers"),
        ({"keep": "third"}, "half"),
        ({"keep": None}, "number of layers or a share"),
        ({"keep": 1, "method": "best"}, "greedy"),
        ({"keep": 1, "mixer": "mamba3"}, "mamba2"),
        ({"keep": 1, "tokens": None}, "needed"),
        ({"keep": 1, "tokens": [[VOCAB]]}, "vocabulary"),
    ],
)
def test_errors(keys, words, teacher, tokens):
    with pytest.raises(mil.ArgumentError, match=words) as error:
        mil.choose_layers(teacher, **{"tokens": tokens, **keys})
    assert "\n" not in str(error.value)


def test_auto_needs_calibration(teacher):
    with pytest.raises(mil.ArgumentError, match="needs calibration"):
        mil.convert(teacher, attention_layers="auto:1", init="paper")
