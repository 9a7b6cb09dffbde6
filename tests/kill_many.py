"""Kills every stage of training at random moments, and proves that it ends with the same bits.

    python tests/kill_many.py                         50 kills of each stage, about five minutes
    python tests/kill_many.py dpo label --kills 8     some of them

A stage is run once undisturbed.  Then processes that run it with resume=True are killed with
SIGKILL at moments drawn evenly over its duration, until one gets to its end; its weights, moments,
metrics and files are compared bit for bit, and another run begins, until enough kills were made.
Kills so fall into loading, passes over the data, steps, checkpoints, renames and the final save.

Processes are forked from this one, which has loaded the library but computed nothing: a kill costs
a third of a second instead of the interpreter's start.  tests/test_kills.py makes some kills of
each stage in every run of the test suite.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# One thread, so that no team of threads is lost in a fork.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
from tiny_models import write_llama  # noqa: E402

import mambainllama as mil  # noqa: E402
from mambainllama import preference, training  # noqa: E402
from mambainllama.checkpointing import TEMPORARY, write_text  # noqa: E402

PAUSE = 0.004  # seconds before each step: a tiny model's steps are too short to be hit
SETTINGS = {
    "max_steps": 24,
    "batch_size": 4,
    "sequence_length": 32,
    "learning_rate": 3e-3,
    "save_every": 3,
    "eval_every": 7,
    "log_every": 2,
    "gradient_accumulation": 2,
}
WORDS = ["sun", "moon", "tree", "river", "stone", "bird", "cloud"]

# ---- stages --------------------------------------------------------------------------------------


def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 264, (40, 32))


def chats() -> list[dict]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"{WORDS[n % 7]} {n}"},
                {"role": "assistant", "content": WORDS[(n + 2) % 7]},
            ]
        }
        for n in range(40)
    ]


def student_of(teacher: mil.Model) -> mil.Model:
    return mil.convert(teacher, attention_layers=[1], calibration=tokens())


def label(teacher: mil.Model, folder: Path) -> None:
    module = sys.modules["mambainllama.label"]
    module.BLOCK = 4
    slowly(module, "append")
    prompts = [f"{WORDS[n % 7]} {n}" for n in range(30)]
    mil.label(
        teacher, prompts, folder / "answers.jsonl", resume=True, max_new_tokens=12, temperature=0.9
    )


def soft_labels(teacher: mil.Model, folder: Path) -> None:
    module = sys.modules["mambainllama.soft_labels"]
    module.PART_TOKENS = 150
    slowly(module, "write_part")
    mil.soft_labels(teacher, tokens(), folder / "t.labels", top=9, resume=True)


def distill(teacher: mil.Model, folder: Path) -> None:
    config = mil.DistillConfig(
        **SETTINGS, align_fraction=0.2, ce_weight=0.1, hidden_weight=0.1, muon_learning_rate=5e-3
    )
    student, data = student_of(teacher), tokens()
    mil.distill(student, teacher, data, config, folder, resume=True, validation=data[:4])


def on_policy(teacher: mil.Model, folder: Path) -> None:
    config = mil.DistillConfig(
        **SETTINGS, on_policy=0.6, direction="jsd", on_policy_tokens=12, loss_on="answers"
    )
    student = student_of(teacher)
    mil.distill(student, teacher, chats(), config, folder, resume=True, validation=0.1)


def distill_labels(teacher: mil.Model, folder: Path) -> None:
    labels = mil.soft_labels(teacher, chats(), folder / "t.labels", top=9, resume=True)
    config = mil.DistillConfig(**SETTINGS)
    mil.distill(student_of(teacher), None, labels, config, folder, resume=True, validation=0.1)


def sft(teacher: mil.Model, folder: Path) -> None:
    mil.sft(teacher, chats(), mil.SftConfig(**SETTINGS), folder, resume=True, validation=0.1)


def dpo(teacher: mil.Model, folder: Path) -> None:
    preference.BLOCK = 2
    slowly(preference, "append_numbers")
    pairs = [
        {"prompt": f"{WORDS[n % 7]} {n}", "chosen": WORDS[(n + 2) % 7], "rejected": WORDS[n % 7]}
        for n in range(40)
    ]
    config = mil.DPOConfig(**{**SETTINGS, "batch_size": 2}, prompt_length=16)
    mil.dpo(teacher, pairs, config, folder, resume=True, validation=0.1)


def stepwise(teacher: mil.Model, folder: Path) -> None:
    config = mil.StepwiseConfig(**{**SETTINGS, "max_steps": 10}, parts="each")
    data = tokens()
    mil.stepwise(teacher, teacher, data, config, folder, resume=True, validation=data[:4])


def align(teacher: mil.Model, folder: Path) -> None:
    config = mil.AlignConfig(**SETTINGS, align_fraction=0.5)
    mil.align(student_of(teacher), teacher, tokens(), config, folder, resume=True)


RECIPE = """
[teacher]
model = "teacher"
[student]
attention_layers = "auto:1"
[data]
files = "tokens.npy"
validation = 0.1
[training]
max_steps = 6
batch_size = 4
sequence_length = 32
save_every = 2
[align]
[distill]
[sft]
loss_on = "all"
[report]
prompts = 3
max_new_tokens = 4
"""


def recipe(teacher: mil.Model, folder: Path) -> None:
    beside = folder.parent
    if not (beside / "recipe.toml").exists():
        np.save(beside / "tokens.npy", tokens())
        write_text(beside / "recipe.toml", RECIPE)
    path, dtype = beside / "recipe.toml", teacher.dtype
    mil.run_recipe(path, folder, resume=True, dtype=dtype, progress=False)


STAGES: dict[str, Callable[[mil.Model, Path], None]] = {
    stage.__name__: stage
    for stage in (
        label,
        soft_labels,
        stepwise,
        align,
        distill,
        on_policy,
        distill_labels,
        sft,
        dpo,
        recipe,
    )
}


def slowly(module, name: str) -> None:
    """Makes a function of a module wait before it does its work."""
    work = getattr(module, name)
    setattr(module, name, lambda *args: (time.sleep(PAUSE), work(*args))[1])


# ---- killing -------------------------------------------------------------------------------------


def start(stage: str, teacher: Path, dtype: str, folder: Path) -> int:
    """Forks a process that runs a stage; returns its number."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        folder.mkdir(exist_ok=True)
        slowly(training.Loop, "step")
        STAGES[stage](mil.load(teacher, dtype=dtype), folder)
        status = 0
    except BaseException as error:
        print(f"{stage}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def ended(child: int, seconds: float) -> bool:
    """Whether a process came to its end in this time; killed otherwise. A failure is ours."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, "the stage failed; see above"
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), "the stage failed; see above"
    return code == 0


def outcome(folder: Path) -> dict[str, str]:
    """A hash of every file that a run left, of metrics without what tells the time."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"):
        content = path.read_bytes()
        assert not path.name.startswith(TEMPORARY), path
        if path.name == "metrics.jsonl":
            rows = [untimed(json.loads(line)) for line in content.splitlines()]
            content = json.dumps(rows).encode()
        if path.name in ("recipe.json", "stage.json", "kept.json", "results.json"):
            content = json.dumps(untimed(json.loads(content))).encode()
        if path.name == "report.html":
            content = b"shows what results.json holds"
        if path.name == "trainer.json":
            record = json.loads(content)
            content = json.dumps([record["step"], record["tokens"], record["sums"]]).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    assert found, f"{folder}: nothing was written"
    return found


# What differs from run to run, and where a run is.
TIMED = (
    "seconds",
    "training_seconds",
    "tokens_per_second",
    "peak_memory_bytes",
    "begun",
    "written",
    "output",
)


def untimed(value: object) -> object:
    """The same without what tells the time, however deep."""
    if isinstance(value, dict):
        return {key: untimed(item) for key, item in value.items() if key not in TIMED}
    return [untimed(item) for item in value] if isinstance(value, list) else value


def prove(stage: str, teacher: Path, root: Path, kills: int, dtype: str, seed: int = 0) -> str:
    """Kills a stage so many times, and asserts that every finished run is the undisturbed one."""
    chance = random.Random(f"{stage} {dtype} {seed}")
    begin = time.monotonic()
    assert ended(start(stage, teacher, dtype, root / "whole"), 300)
    duration = time.monotonic() - begin
    wanted, made, finished = outcome(root / "whole"), 0, 0
    folder = root / "killed"
    while made < kills or folder.exists():
        moment = chance.uniform(0, duration) if made < kills else 300
        child = start(stage, teacher, dtype, folder)
        if not ended(child, moment):
            made += 1
            continue
        found = outcome(folder)
        assert found == wanted, f"{stage}: {sorted(set(found.items()) ^ set(wanted.items()))}"
        finished += 1
        shutil.rmtree(folder)
    shutil.rmtree(root / "whole")
    return f"{made} kills, {finished} finished runs, {len(wanted)} files equal"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", default=list(STAGES), metavar="STAGE")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for stage in options.stages:
        if stage not in STAGES:
            parser.error(f"{stage}: no such stage; there are {', '.join(STAGES)}")
    with tempfile.TemporaryDirectory(prefix="mambainllama-kills-") as root:
        teacher = write_llama(Path(root) / "teacher", scale=2.0)
        for stage in options.stages:
            begin = time.monotonic()
            words = prove(stage, teacher, Path(root), options.kills, options.dtype, options.seed)
            print(f"{stage:15} {words}, {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
