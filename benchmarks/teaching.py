"""Ways of being taught at equal tokens: teacher in memory, stored, sampled from, or only quoted.

    python benchmarks/teaching.py                        some minutes on one core
    python benchmarks/teaching.py --rows 2048 --ways "teacher, forward" "top 32"

Teacher and data are those of quality.py: models/story-llama of the shared data, and rows of 256
tokens sampled from it.  Each way starts from the same student, half of its attention replaced, and
trains on the same rows once; only the loss differs.  Shown are, on the last 128 rows, KL(teacher ||
student) and top-1 agreement; and on words that the student samples itself behind 32 tokens of those
rows, KL(student || teacher), where its own mistakes add up.  Seconds are those of the training.

MAMBAINLLAMA_SHARED, or ../shared beside the repository, holds the data.
"""

import argparse
import math
import os
import tempfile
import time
from pathlib import Path

import numpy as np

import mambainllama as mil
from mambainllama.data import read_documents
from mambainllama.kept import Yardstick
from mambainllama.pairs import shared_vocabulary

LENGTH, HELD, PROMPT = 256, 128, 32
SETTINGS = {
    "batch_size": 8,
    "sequence_length": LENGTH,
    "learning_rate": 4e-3,
    "min_learning_rate": 0.1,
    "warmup_steps": 10,
    "save_every": None,
    "log_every": 1 << 20,
}
SAMPLING = {"on_policy_tokens": LENGTH - PROMPT, "on_policy_prompt": PROMPT}

# Name -> (stored tokens at each place or 0, settings of mil.DistillConfig).
WAYS = {
    "teacher, forward": (0, {}),
    "teacher, reverse": (0, {"direction": "reverse"}),
    "teacher, jsd 0.5": (0, {"direction": "jsd"}),
    "top 128": (128, {}),
    "top 32": (32, {}),
    "top 8": (8, {}),
    "top 4": (4, {}),
    "text alone (CE)": (0, {"kl_weight": 0.0, "ce_weight": 1.0}),
    "on-policy 0.25, forward": (0, {"on_policy": 0.25, **SAMPLING}),
    "on-policy 0.25, reverse": (0, {"on_policy": 0.25, "direction": "reverse", **SAMPLING}),
    "on-policy 0.5, jsd 0.5": (0, {"on_policy": 0.5, "direction": "jsd", **SAMPLING}),
}


def train(teacher, rows, top, settings):
    """A student taught in one way, and the seconds that it took."""
    student = mil.convert(teacher, attention_layers="half", calibration=rows[:128].astype(int))
    config = mil.DistillConfig(**{**SETTINGS, **settings})
    with tempfile.TemporaryDirectory() as folder:
        data = rows
        if top:
            data = mil.soft_labels(
                teacher, rows, Path(folder) / "labels", top=top, sequence_length=LENGTH
            )
        begin = time.perf_counter()
        mil.distill(student, None if top else teacher, data, config, None, progress=False)
    return student, time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=512, help="rows of 256 tokens to train on")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), metavar="WAY", help="some of them")
    options = parser.parse_args()
    unknown = [way for way in options.ways if way not in WAYS]
    if unknown:
        parser.error(f"no such way: {unknown[0]}; there are {', '.join(map(repr, WAYS))}")
    root = Path(__file__).resolve().parents[1]
    shared = Path(os.environ.get("MAMBAINLLAMA_SHARED") or root.parent / "shared")
    teacher = mil.load(shared / "models" / "story-llama")
    tokens = np.load(shared / "data" / "stories" / "train.npz")["tokens"]
    held = tokens[-HELD:]
    yardstick = Yardstick(
        teacher,
        read_documents(held, vocab=teacher.config.vocab_size),
        held[:, :PROMPT],
        max_new_tokens=LENGTH - PROMPT,
    )
    print(f"{options.rows * LENGTH:,} tokens")
    print(f"{'way':24} {'KL':>7} {'agreement':>10} {'KL, own words':>14} {'seconds':>8}")
    for way in options.ways:
        student, seconds = train(teacher, tokens[: options.rows], *WAYS[way])
        found = mil.evaluate.compare(student, teacher, held)
        own = -math.log(yardstick.on_its_own_words(student, *shared_vocabulary(student, teacher)))
        agreement = f"{100 * found.agreement:.1f} %"
        print(f"{way:24} {found.kl:7.4f} {agreement:>10} {own:14.4f} {seconds:8.0f}", flush=True)


if __name__ == "__main__":
    main()
