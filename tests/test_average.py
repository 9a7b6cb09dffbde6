"""The mean of the last steps' weights: the right mean, the same bits after a resume."""

import numpy as np
import pytest
from tiny_models import write_llama

import mambainllama as mil
from mambainllama import training

SETTINGS = {
    "max_steps": 10,
    "batch_size": 4,
    "sequence_length": 16,
    "learning_rate": 3e-3,
    "muon_learning_rate": 5e-3,
    "save_every": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("teacher") / "llama", scale=2.0)


def run(folder, output=None, dtype="auto", watch=None, resume=False, **changes):
    """A trained student; `watch(step, weights)` sees the float32 weights after each step."""
    teacher = mil.load(folder, dtype=dtype)
    tokens = np.random.default_rng(1).integers(0, 264, (40, 16))
    student = mil.convert(teacher, attention_layers=[1], calibration=tokens)
    config = mil.DistillConfig(**{**SETTINGS, **changes})
    apply = training.Loop.step

    def step(self, number, bar):
        if watch is None:
            return apply(self, number, bar)
        average, self.average = self.average, None
        evaluation, self.evaluation = self.evaluation, lambda done: {}
        apply(self, number, bar)
        self.evaluation, self.average = evaluation, average
        tensors = self.task.tensors()
        watch(number + 1, {
            name[2:]: tensors.get(f"master.{name[2:]}", array).copy()
            for name, array in tensors.items()
            if name.startswith("p.")
        })  # fmt: skip
        if average is not None:
            average.add(number + 1)
        return None

    training.Loop.step = step
    try:
        mil.distill(student, teacher, tokens, config, output, resume)
    finally:
        training.Loop.step = apply
    return student


def bits(student):
    return {name: array.tobytes() for name, array in student.parameters().items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mean_of_the_last_steps(dtype, folder):
    seen = {}
    student = run(folder, dtype=dtype, watch=seen.__setitem__, average_fraction=0.4)
    for name, got in student.parameters().items():
        want = np.mean([seen[step][name] for step in (7, 8, 9, 10)], axis=0, dtype=np.float64)
        if student.dtypes()[name] == "bfloat16":
            got = (got.astype(np.uint32) << 16).view(np.float32)
            np.testing.assert_allclose(got, want.reshape(got.shape), rtol=2**-8, atol=1e-6)
        else:
            np.testing.assert_allclose(got, want.reshape(got.shape), rtol=1e-5, atol=1e-7)


def test_off_and_one_step(folder):
    """A share too small for a step is the last step; 0 leaves everything as it was."""
    assert bits(run(folder, average_fraction=0.01)) == bits(run(folder))
    assert bits(run(folder, average_fraction=0.5)) != bits(run(folder))


@pytest.mark.parametrize("stop", [3, 7, 9])
def test_resumes_to_the_same_bits(stop, folder, tmp_path):
    undisturbed = bits(run(folder, tmp_path / "one", average_fraction=0.5))

    class Stop(Exception):
        pass

    def watch(step, weights):
        if step == stop:
            raise Stop

    with pytest.raises(Stop):
        run(folder, tmp_path / "two", watch=watch, average_fraction=0.5)
    assert bits(run(folder, tmp_path / "two", resume=True, average_fraction=0.5)) == undisturbed
    assert bits(mil.load(tmp_path / "two" / "model")) == undisturbed


def test_another_share_is_another_run(folder, tmp_path):
    run(folder, tmp_path / "run", average_fraction=0.5)
    with pytest.raises(mil.StateError, match="average_fraction"):
        run(folder, tmp_path / "run", resume=True, average_fraction=0.25)
    with pytest.raises(mil.ArgumentError, match="from 0 to 1"):
        mil.DistillConfig(average_fraction=1.5)
