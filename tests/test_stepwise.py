"""Attention goes part by part, frozen weights stay, alignment learns, and killed runs go on."""

import fcntl
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_llama

import mambainllama as mil
from mambainllama.stepwise import replacement_plan

LENGTH, VOCAB, LAYERS = 16, 264, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("teacher") / "llama", layers=LAYERS, scale=2.0)


@pytest.fixture(scope="module")
def teacher(folder):
    return mil.load(folder)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(5).integers(0, VOCAB, (32, LENGTH)).astype(np.uint16)


def config(**changes):
    base = {"batch_size": 8, "sequence_length": LENGTH, "learning_rate": 5e-3, "save_every": 2}
    return mil.StepwiseConfig(**{**base, **changes})


def weights(model):
    return {name: array.copy() for name, array in model.parameters().items()}


def test_module_examples():
    import doctest

    assert doctest.testmod(sys.modules["mambainllama.stepwise"]).failed == 0


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 30, 32])
@pytest.mark.parametrize("parts", [1, 2, 4, 5, "each"])
def test_every_layer_is_replaced_once_and_spread(count, parts):
    layers = list(range(0, 2 * count, 2))
    plan = replacement_plan(layers, parts)
    assert sorted(layer for part in plan for layer in part) == layers
    assert len(plan) == (count if parts == "each" else min(parts, count))
    done = []
    for part in plan:
        done += part
        # No half of the depth holds more than one (and a third) of the layers that the other does.
        low = sum(layer < count for layer in done)
        assert abs(low - (len(done) - low)) <= max(1, len(done) // 3)


def test_more_parts_than_layers():
    assert replacement_plan([1, 4, 6], 10**11) == replacement_plan([1, 4, 6], "each")


def test_plans_that_are_wrong():
    with pytest.raises(mil.ArgumentError, match="leaves nothing to replace"):
        replacement_plan([], "each")
    with pytest.raises(mil.ArgumentError, match="must name each layer to be replaced once"):
        replacement_plan([0, 1, 2], [[0], [1]])
    for wrong in (0, -1, True, 1.5, "all", [], [[]], [["0"]]):
        with pytest.raises(mil.ArgumentError, match="parts="):
            config(parts=wrong)


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_parts_build_on_each_other(teacher, tokens, tmp_path, mixer):
    before = weights(teacher)
    student, history = mil.stepwise(
        teacher,
        teacher,
        tokens,
        config(epochs=4, parts=2, kl_weight=1.0, ce_weight=0.0),
        tmp_path,
        mixer=mixer,
        attention_layers=[3],
        validation=tokens[:8],
    )
    assert student.config.attention_layers == (3,) and student.config.mixer == mixer
    # Of 0, 1, 2 two come first, spread; training went on where the part before ended.
    first = mil.load(tmp_path / "part-1-of-2" / "model")
    assert first.config.attention_layers == (1, 3)
    assert [row["step"] for row in history if row["part"] == 1] == list(range(17))
    assert history.final["step"] == 32 and history.final["tokens"] == 8 * tokens.size
    found = {
        part: [r["eval_kl"] for r in history if r["part"] == part and "eval_kl" in r]
        for part in (1, 2)
    }
    assert found[1][-1] < found[1][0] and found[2][-1] < found[2][0]
    # Everything but mixers is the teacher's, bit for bit, and the teacher is as it was.
    for name, array in student.parameters().items():
        if ".mamba." not in name:
            assert np.array_equal(array, before[name]), name
    assert all(np.array_equal(before[name], array) for name, array in teacher.parameters().items())
    assert mil.History.read(tmp_path) == history
    saved = weights(mil.load(tmp_path / "model"))
    assert all(np.array_equal(saved[name], array) for name, array in student.parameters().items())


def test_one_by_one_in_memory(teacher, tokens):
    student, history = mil.stepwise(
        teacher, teacher, tokens, config(max_steps=1, parts="each"), None, init="paper"
    )
    assert student.config.attention_layers == () and history.final["part"] == LAYERS


def test_the_start_of_a_new_mixer_is_the_attentions(teacher, tokens):
    """A layer that the second part replaces starts as if it were converted from the teacher."""
    student, _ = mil.stepwise(
        teacher,
        teacher,
        tokens,
        config(max_steps=1, parts=[[0, 2], [1, 3]], learning_rate=1e-12),
        None,
        init="paper",
    )
    at_once = mil.convert(teacher, attention_layers="none", init="paper")
    for name, array in at_once.parameters().items():
        assert np.allclose(array, student.parameters()[name], atol=1e-6), name


def test_a_new_run_sets_the_old_one_aside(teacher, tokens, tmp_path):
    settings = config(max_steps=2, parts=2)
    mil.stepwise(teacher, teacher, tokens, settings, tmp_path)
    mil.stepwise(teacher, teacher, tokens, settings, tmp_path)
    assert (tmp_path / "previous-1" / "part-2-of-2" / "model").is_dir()
    (tmp_path / "part-2-of-2" / "model" / "config.json").unlink()
    (tmp_path / "part-2-of-2" / "model").rename(tmp_path / "elsewhere")
    again, _ = mil.stepwise(teacher, teacher, tokens, settings, tmp_path, resume=True)
    assert again.config.attention_layers == ()
    for changes, words in (
        ({"kl_weight": 0.2}, "kl_weight was 0.1, is 0.2 now"),
        ({"max_steps": 3}, "max_steps was 2, is 3 now"),
        ({"parts": 4}, r"plan was .* is .* now"),
    ):
        changed = config(**{"max_steps": 2, "parts": 2, **changes})
        with pytest.raises(mil.StateError, match=words) as caught:
            mil.stepwise(teacher, teacher, tokens, changed, tmp_path, resume=True)
        assert "\n" not in str(caught.value)
    with pytest.raises(mil.StateError, match="data was"):
        mil.stepwise(teacher, teacher, tokens[:16], settings, tmp_path, resume=True)
    with pytest.raises(mil.StateError, match="conversion's seed was 0, is 1 now"):
        mil.stepwise(teacher, teacher, tokens, settings, tmp_path, resume=True, seed=1)


def test_a_run_does_not_move_its_own_inputs(teacher, tokens, tmp_path):
    settings = config(max_steps=1, parts=2)
    mil.stepwise(teacher, teacher, tokens, settings, tmp_path)
    for place in (tmp_path / "model", tmp_path / "part-1-of-2" / "model"):
        with pytest.raises(mil.ArgumentError, match="model: is read by this run and lies in"):
            mil.stepwise(teacher, mil.load(place), tokens, settings, tmp_path)
    assert not (tmp_path / "previous-1").exists()
    (tmp_path / "run.json").unlink()
    with pytest.raises(mil.StateError, match="no earlier run made it"):
        mil.stepwise(teacher, teacher, tokens, settings, tmp_path)


def test_one_run_in_a_folder(teacher, tokens, tmp_path):
    """A second one would move the first one's parts away."""
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(mil.StateError, match="another process is training in this folder"):
            mil.stepwise(teacher, teacher, tokens, config(max_steps=1), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(mil.FileError, match="file: File exists"):
        mil.stepwise(teacher, teacher, tokens, config(max_steps=1), tmp_path / "file")


def test_layers_chosen_by_measurement(teacher, tokens):
    student, _ = mil.stepwise(
        teacher, teacher, tokens, config(max_steps=1, parts=1), None, attention_layers="auto:1"
    )
    at_once = mil.convert(teacher, attention_layers="auto:1", calibration=tokens)
    assert student.config.attention_layers == at_once.config.attention_layers


def test_nothing_to_replace(teacher, tokens):
    with pytest.raises(mil.ArgumentError, match="leaves nothing to replace"):
        mil.stepwise(teacher, teacher, tokens, config(), None, attention_layers="all")


# ---- alignment


def test_alignment_is_a_stage(teacher, tokens):
    student = mil.convert(teacher, attention_layers="none", calibration=tokens)
    before = weights(student)
    settings = mil.AlignConfig(
        epochs=16,
        batch_size=8,
        sequence_length=LENGTH,
        save_every=None,
        align_fraction=0.25,
        learning_rate=5e-3,
    )
    history = mil.align(student, teacher, tokens, settings, None, validation=tokens[:8])
    rows = [row for row in history if row["step"] > 0]
    assert all("align" in row for row in rows[:16]) and all("hidden" in row for row in rows[16:])
    assert rows[15]["align"] < rows[0]["align"] and rows[-1]["hidden"] < rows[16]["hidden"]
    assert rows[-1]["loss"] == pytest.approx(rows[-1]["hidden"])
    assert history.final["eval_kl"] < history[0]["eval_kl"]
    changed = {n for n, a in student.parameters().items() if not np.array_equal(a, before[n])}
    assert changed == {name for name in before if ".mamba." in name}
    with pytest.raises(mil.ArgumentError, match="expected mil.AlignConfig"):
        mil.align(student, teacher, tokens, mil.DistillConfig(), None)
    with pytest.raises(mil.ArgumentError, match="AlignConfig: .* nothing would be learnt"):
        mil.AlignConfig(align_fraction=0.5, hidden_weight=0)


# ---- killed runs

RUN = """
import sys, time
sys.path.insert(0, {root!r})
import numpy as np
import mambainllama as mil
from mambainllama import training

tokens = np.random.default_rng(5).integers(0, 264, (32, 16)).astype(np.uint16)
teacher = mil.load({teacher!r})
step = training.Loop.step
training.Loop.step = lambda self, *a: (time.sleep({pause}), step(self, *a))
config = mil.StepwiseConfig(
    batch_size=8, sequence_length=16, learning_rate=5e-3, save_every=2, epochs=2, parts=4,
    muon_learning_rate=1e-2,
)
print("ready", flush=True)
mil.stepwise(teacher, teacher, tokens, config, {folder!r}, resume=True, validation=tokens[:4])
print("done", flush=True)
"""


def process(teacher_folder, run, pause):
    root = str(Path(mil.__file__).parents[1])
    code = RUN.format(root=root, teacher=str(teacher_folder), folder=str(run), pause=pause)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def outcome(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for name in ("seconds", "tokens_per_second", "peak_memory_bytes"):
            row.pop(name, None)
    return weights(mil.load(run / "model")), rows


@pytest.mark.slow
def test_killed_at_random_moments(folder, tmp_path):
    whole = process(folder, tmp_path / "whole", 0)
    _, error = whole.communicate(timeout=120)
    assert whole.returncode == 0, error
    chance = random.Random(11)
    kills = 0
    for _ in range(40):
        run = process(folder, tmp_path / "run", 0.12)  # 32 steps outlast five sleeps
        run.stdout.readline()
        if kills < 5:
            time.sleep(chance.uniform(0.1, 0.6))
            kills += run.poll() is None
            run.kill()
            run.communicate()
            continue
        out, error = run.communicate(timeout=120)
        assert run.returncode == 0 and "done" in out, error
        break
    assert kills == 5
    (wanted, rows), (found, again) = outcome(tmp_path / "whole"), outcome(tmp_path / "run")
    assert rows == again
    for name, array in wanted.items():
        assert np.array_equal(array, found[name]), name
