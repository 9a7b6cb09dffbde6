"""Every stage, killed at random moments, ends with the bits of an undisturbed run.

Some kills of each; `python tests/kill_many.py` makes fifty.  It runs in a process of its own,
because it forks, which a process that has threads of OpenMP must not.
"""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kill_many.py")
STAGES = (
    "label",
    "soft_labels",
    "stepwise",
    "align",
    "distill",
    "on_policy",
    "distill_labels",
    "sft",
    "dpo",
    "recipe",
)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_killed_at_random_moments(dtype):
    command = [sys.executable, str(SCRIPT), *STAGES, "--kills", "3", "--dtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(STAGES)
    assert all("3 kills" in line for line in lines)
