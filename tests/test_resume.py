"""A run that was killed, interrupted or cut off by a full disk goes on to the same bits.

The undisturbed run is made in this process; the disturbed ones in processes of their own, killed
with SIGKILL at random moments (so also while a checkpoint is written) and started again with
resume=True.
"""

import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_llama

import mambainllama as mil
from mambainllama.checkpointing import TEMPORARY, latest_checkpoint

STEPS = 16
SETTINGS = {
    "max_steps": STEPS,
    "batch_size": 4,
    "sequence_length": 16,
    "learning_rate": 3e-3,
    "save_every": 2,
    "eval_every": 5,
    "log_every": 3,
    "gradient_accumulation": 2,
    "align_fraction": 0.2,
    "ce_weight": 0.1,
    "muon_learning_rate": 5e-3,
}

RUN = """
import json, sys, time
sys.path.insert(0, {root!r})
import numpy as np
import mambainllama as mil
from mambainllama import training

teacher = mil.load({teacher!r}, dtype={dtype!r})
tokens = np.random.default_rng(1).integers(0, 264, (40, 16))
student = mil.convert(teacher, attention_layers=[1], calibration=tokens)
settings = json.loads({settings!r})
pause = settings.pop("pause", 0)
if pause:
    step = training.Loop.step
    training.Loop.step = lambda self, *a: (time.sleep(pause), step(self, *a))
print("ready", flush=True)
config = mil.DistillConfig(**settings)
mil.distill(student, teacher, tokens, config, {folder!r}, resume=True, validation=tokens[:4])
print("done", flush=True)
"""


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("teacher") / "llama", scale=2.0)


def start(teacher_folder, folder, dtype="auto", prepare=None, **changes):
    code = RUN.format(
        root=str(Path(mil.__file__).parents[1]),
        teacher=str(teacher_folder),
        dtype=dtype,
        settings=json.dumps({**SETTINGS, **changes}),
        folder=str(folder),
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )


def finish(process, limit=120):
    out, error = process.communicate(timeout=limit)
    return process.returncode, out, error


def outcome(folder):
    """Final weights and the metrics that do not tell the time."""
    weights = {
        name: array.copy() for name, array in mil.load(folder / "model").parameters().items()
    }
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for name in ("seconds", "tokens_per_second", "peak_memory_bytes"):
            row.pop(name, None)
    return weights, rows


def assert_same(a, b):
    assert a[1] == b[1]
    for name, array in a[0].items():
        assert np.array_equal(array, b[0][name]), name


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def undisturbed(request, teacher_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    status, _, error = finish(start(teacher_folder, folder, request.param))
    assert status == 0, error
    return request.param, outcome(folder)


@pytest.mark.slow
def test_killed_at_random_moments(undisturbed, teacher_folder, tmp_path):
    dtype, wanted = undisturbed
    chance = random.Random(7)
    kills = 0
    for _ in range(40):
        process = start(teacher_folder, tmp_path / "run", dtype, pause=0.05)
        process.stdout.readline()
        if kills < 3:
            time.sleep(chance.uniform(0.05, 0.4))
            kills += process.poll() is None
            process.kill()
            finish(process)
            continue
        status, out, error = finish(process)
        assert status == 0 and "done" in out, error
        break
    assert kills == 3
    assert_same(outcome(tmp_path / "run"), wanted)
    assert not list((tmp_path / "run" / "checkpoints").glob(f"{TEMPORARY}*"))


def test_interrupt_saves_and_says_so(undisturbed, teacher_folder, tmp_path):
    dtype, wanted = undisturbed
    process = start(teacher_folder, tmp_path / "run", dtype, pause=0.05, save_every=None)
    process.stdout.readline()
    while (
        not (tmp_path / "run" / "metrics.jsonl").exists()
        or "kl" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    ):
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    status, _, error = finish(process)
    assert status != 0 and "interrupted after step" in error and "resume=True" in error
    step = int(latest_checkpoint(tmp_path / "run" / "checkpoints").name.removeprefix("step-"))
    assert 0 < step < STEPS
    status, _, error = finish(start(teacher_folder, tmp_path / "run", dtype, save_every=None))
    assert status == 0, error
    assert_same(outcome(tmp_path / "run"), wanted)


def test_full_disk_keeps_the_last_good_checkpoint(undisturbed, teacher_folder, tmp_path):
    """A limit on file sizes stands for the full disk: writing a larger file fails half-way."""
    dtype, wanted = undisturbed
    half = tmp_path / "run"
    process = start(teacher_folder, half, dtype, pause=0.05)
    process.stdout.readline()
    while latest_checkpoint(half / "checkpoints") is None:
        time.sleep(0.02)
    process.kill()
    finish(process)
    good = latest_checkpoint(half / "checkpoints")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))

    status, _, error = finish(start(teacher_folder, half, dtype, prepare=limit))
    assert status != 0
    last = error.strip().splitlines()[-1]
    assert "checkpoint not written" in last and str(good) in last
    assert latest_checkpoint(half / "checkpoints") == good
    assert not list((half / "checkpoints").glob(f"{TEMPORARY}*"))
    status, _, error = finish(start(teacher_folder, half, dtype))
    assert status == 0, error
    assert_same(outcome(half), wanted)


def small_run(teacher_folder, folder, *, tokens=None, resume=False, seed=0, **changes):
    teacher = mil.load(teacher_folder)
    if tokens is None:
        tokens = np.random.default_rng(1).integers(0, 264, (40, 16))
    student = mil.convert(teacher, attention_layers=[1], calibration=tokens, seed=seed)
    settings = mil.DistillConfig(**{**SETTINGS, "max_steps": 4, **changes})
    return mil.distill(student, teacher, tokens, settings, folder, resume=resume)


def test_finished_runs_and_free_settings(teacher_folder, tmp_path):
    first = small_run(teacher_folder, tmp_path)
    again = small_run(teacher_folder, tmp_path, resume=True, log_every=1, keep_last=None)
    assert again == first
    assert small_run(teacher_folder, tmp_path / "new", resume=True).final["step"] == 4


def test_other_settings_or_data_are_refused(teacher_folder, tmp_path):
    small_run(teacher_folder, tmp_path)
    with pytest.raises(mil.StateError, match=r"learning_rate was 0\.003, is 0\.001 now"):
        small_run(teacher_folder, tmp_path, resume=True, learning_rate=1e-3)
    with pytest.raises(mil.StateError, match="steps in all was 4, is 8 now"):
        small_run(teacher_folder, tmp_path, resume=True, max_steps=8)
    with pytest.raises(mil.StateError, match="data was"):
        small_run(teacher_folder, tmp_path, resume=True, tokens=np.zeros((40, 16), int))


@pytest.mark.parametrize("train", ["all", "mixers"])
def test_another_student_is_refused(teacher_folder, tmp_path, train):
    """As far as the checkpoint has not its weights: what is trained may come as it began, as the
    checkpoint left it or, after a failure in a notebook, ahead of that."""
    teacher = mil.load(teacher_folder)
    tokens = np.random.default_rng(1).integers(0, 264, (40, 16))
    settings = mil.DistillConfig(**{**SETTINGS, "max_steps": 4, "train": train})

    def student(seed=0):
        return mil.convert(teacher, attention_layers=[1], calibration=tokens, seed=seed)

    def run(model):
        return mil.distill(model, teacher, tokens, settings, tmp_path, resume=True)

    mine = student()
    history = run(mine)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000004")  # as if killed before
    assert run(mine).final["loss"] == history.final["loss"]
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000004")
    other = student()
    other.parameters()["model.layers.0.mlp.up_proj.weight"][...] *= 0.5
    before = {name: array.copy() for name, array in other.parameters().items()}
    if train == "mixers":
        words = "step-00000002: cannot resume: frozen weights was .*, is .* now"
        with pytest.raises(mil.StateError, match=words):
            run(other)
        assert all(
            np.array_equal(array, before[name]) for name, array in other.parameters().items()
        )
    left = mil.load(tmp_path / "checkpoints" / "step-00000002" / "model")
    for given in (left, mil.load(tmp_path / "model"), student(), *([other] * (train == "all"))):
        assert run(given).final["loss"] == history.final["loss"]
        for name, array in mine.parameters().items():
            assert np.array_equal(given.parameters()[name], array), name


def test_runs_that_did_not_note_their_student_go_on(teacher_folder, tmp_path):
    """Those of older versions; also from a checkpoint that was written since."""
    whole = small_run(teacher_folder, tmp_path / "whole", save_every=1, keep_last=None)
    shutil.copytree(tmp_path / "whole", tmp_path / "old")
    checkpoints = tmp_path / "old" / "checkpoints"
    for step in (3, 4):
        shutil.rmtree(checkpoints / f"step-0000000{step}")
    path = checkpoints / "step-00000002" / "trainer.json"
    record = json.loads(path.read_text())
    del record["identity"]["frozen weights"]
    path.write_text(json.dumps(record))
    for _ in range(2):
        resumed = small_run(
            teacher_folder, tmp_path / "old", resume=True, save_every=1, keep_last=None
        )
        assert resumed.final["loss"] == whole.final["loss"]
        shutil.rmtree(checkpoints / "step-00000004")


def test_fewer_steps_than_are_done_are_refused(teacher_folder, tmp_path):
    settings = {"schedule": "constant", "align_fraction": 0.0}
    small_run(teacher_folder, tmp_path, **settings)
    before = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    with pytest.raises(mil.StateError, match="4 steps are done, 3 are wanted; ask for at least"):
        small_run(teacher_folder, tmp_path, resume=True, **settings, max_steps=3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == before
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() in before


@pytest.mark.parametrize("share", ["average_fraction", "align_fraction"])
def test_shares_of_the_steps_hold_a_constant_rate_to_their_number(teacher_folder, tmp_path, share):
    """A mean of weights begun at another step would be no mean."""
    settings = {"schedule": "constant", "align_fraction": 0.0, share: 0.5}
    small_run(teacher_folder, tmp_path, **settings)
    with pytest.raises(mil.StateError, match="steps in all was 4, is 3 now"):
        small_run(teacher_folder, tmp_path, resume=True, **settings, max_steps=3)
    free = {"schedule": "constant", "align_fraction": 0.0}
    small_run(teacher_folder, tmp_path / "free", **free)
    assert small_run(teacher_folder, tmp_path / "free", resume=True, **free, max_steps=6)


def test_damaged_checkpoints_are_told(teacher_folder, tmp_path):
    small_run(teacher_folder, tmp_path)
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    path = checkpoint / "trainer.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(mil.FormatError, match="trainer.safetensors") as caught:
        small_run(teacher_folder, tmp_path, resume=True)
    assert "\n" not in str(caught.value)
    path.write_bytes(content)
    (checkpoint / "trainer.json").write_text("{")
    with pytest.raises(mil.FormatError, match="damaged checkpoint"):
        small_run(teacher_folder, tmp_path, resume=True)
    (checkpoint / "trainer.json").write_text("{}")
    with pytest.raises(mil.FormatError, match="damaged checkpoint.*is missing"):
        small_run(teacher_folder, tmp_path, resume=True)


def test_damaged_metrics_are_dropped(teacher_folder, tmp_path):
    small_run(teacher_folder, tmp_path)
    for damage in (b"5\n", b"{}\n", b"\xff\0\n"):
        (tmp_path / "metrics.jsonl").write_bytes(damage)
        small_run(teacher_folder, tmp_path, resume=True)
        assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_two_runs_in_one_folder(teacher_folder, tmp_path):
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(mil.StateError, match="another process is training in this folder"):
            small_run(teacher_folder, tmp_path)
    small_run(teacher_folder, tmp_path)


def test_output_that_cannot_be_written(teacher_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(mil.FileError, match="file"):
        small_run(teacher_folder, tmp_path / "file")
    if os.geteuid() != 0:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        with pytest.raises(mil.FileError, match="Permission denied"):
            small_run(teacher_folder, closed / "run")
