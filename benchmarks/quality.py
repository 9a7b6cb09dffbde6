"""Quality at equal tokens: the protocol under which the published code was measured, run with ours.

    python benchmarks/quality.py --attention half --tokens 4.2M --json row.json

Teacher: models/story-llama of the shared data.  Data: data/stories/train.npz, 16,384 rows of 256
tokens sampled from that teacher; the first 15,360 train, the last 1,024 are held out.  The
published recipe (its own start, batch 32, learning rate 3e-3, 50 warm-up steps, cosine to a tenth,
clip 1) reached, on these tokens, the figures in PUBLISHED below; ours prints its row beside them.

Defaults are our best settings for one epoch: fitted start, an eighth of the steps on layerwise
alignment, hidden states matched at 0.3, batch 8, Muon at 2e-2 on matrices and AdamW at 4e-3 on the
rest, the mean of the last tenth of the weights.  --published runs their recipe with our code, which
should land on their figures.

--tokens 0 measures the start alone.  --teacher packaged takes the teacher of this package and the
text of Python's library (mambainllama.corpus) instead: nothing was tuned on it.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np

import mambainllama as mil
from mambainllama import _core, corpus
from mambainllama.data import read_documents, sample_rows

TRAIN_ROWS, HELD_ROWS, LENGTH = 15_360, 1_024, 256

# (attention, million tokens) -> KL, perplexity, top-1 agreement (per cent) of the published code,
# Mamba-2.
PUBLISHED = {
    ("half", 0.5): (1.065, 46.0, 40.0),
    ("half", 1.0): (0.392, 23.5, 61.9),
    ("half", 2.1): (0.268, 20.7, 67.9),
    ("half", 4.2): (0.221, 19.8, 70.5),
    ("half", 16.8): (0.133, 18.1, 76.2),
    ("none", 0.5): (1.815, 97.3, 24.6),
    ("none", 1.0): (0.892, 38.7, 43.6),
    ("none", 2.1): (0.516, 26.6, 56.0),
    ("none", 4.2): (0.404, 23.8, 60.6),
    ("none", 16.8): (0.194, 19.2, 71.6),
}


def token_count(text):
    """4.2M, 500k or a plain number."""
    units = {"k": 1e3, "m": 1e6}
    unit = units.get(text[-1].lower(), 1.0)
    return float(text[:-1] if unit > 1 else text) * unit


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--shared",
        type=Path,
        default=None,
        help="folder of the shared data (default: MAMBAINLLAMA_SHARED, ../shared)",
    )
    add(
        "--teacher",
        choices=("story", "packaged"),
        default="story",
        help="story: models/story-llama of the shared data; packaged: the one in this package",
    )
    add("--mixer", choices=("mamba1", "mamba2"), default="mamba2")
    add(
        "--attention",
        choices=("half", "none"),
        default="half",
        help="half keeps every second layer",
    )
    add(
        "--tokens",
        type=token_count,
        default=15_360 * 256,
        help="training tokens, e.g. 4.2M (one epoch of the stories: 3.93M); 0: the start alone",
    )
    add("--init", choices=("fitted", "calibrated", "paper"), default="fitted")
    add("--calibration-rows", type=int, default=256, help="rows of 256 tokens for the start")
    add("--batch", type=int, default=8)
    add("--learning-rate", type=float, default=4e-3)
    add("--muon", type=float, default=0.02, help="rate of Muon on matrices; 0: AdamW alone")
    add("--warmup-steps", type=int, default=50)
    add("--min-learning-rate", type=float, default=0.1)
    add("--vector-rate", type=float, default=1.0)
    add("--align", type=float, default=0.125, help="share of the steps on layerwise alignment")
    add("--hidden", type=float, default=0.3, help="weight of matching hidden states")
    add("--average", type=float, default=0.1, help="share of the steps whose weights are averaged")
    add("--held-rows", type=int, default=HELD_ROWS, help="held-out rows that are evaluated")
    add("--eval-every", type=int, default=None)
    add("--published", action="store_true", help="the published recipe instead of ours")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=None)
    add(
        "--output",
        type=Path,
        default=None,
        help="folder for checkpoints and metrics; needed for --resume",
    )
    add("--resume", action="store_true")
    add("--json", type=Path, default=None, help="file to write the row to")
    options = parser.parse_args()
    if options.published:
        options.init, options.batch, options.learning_rate = "paper", 32, 3e-3
        options.align = options.hidden = options.muon = options.average = 0.0
    return options


def shared_folder(given):
    root = Path(__file__).resolve().parents[1]
    folder = given or Path(os.environ.get("MAMBAINLLAMA_SHARED") or root.parent / "shared")
    if not (folder / "data" / "stories" / "train.npz").exists():
        sys.exit(
            f"quality.py: no shared data at {folder}: give --shared, or set MAMBAINLLAMA_SHARED"
        )
    return folder


def story(options):
    """(teacher, text to train on, held-out text, rows for the start)."""
    shared = shared_folder(options.shared)
    teacher = mil.load(shared / "models" / "story-llama", dtype="float32")
    tokens = np.load(shared / "data" / "stories" / "train.npz")["tokens"]
    train, held = tokens[:TRAIN_ROWS], tokens[-HELD_ROWS:][: options.held_rows]
    return teacher, train, held, train[: options.calibration_rows]


def packaged(options):
    """The same of the teacher in the package: documents are packed to rows, kept apart."""
    folder = Path(mil.__file__).parent / "packaged" / "teacher"
    teacher = mil.load(folder, dtype="float32")
    train, held = (
        read_documents(
            [{"text": text} for text in texts],
            teacher.tokenizer,
            vocab=teacher.config.vocab_size,
        )
        for texts in corpus.documents()
    )
    rows = sample_rows(train, options.calibration_rows, LENGTH, options.seed)
    return teacher, train, held, rows


def compare(student, teacher, held):
    return mil.evaluate.compare(student, teacher, held, batch_size=16, sequence_length=LENGTH)


def main():
    options = parse()
    if options.threads:
        _core.set_threads(options.threads)
    teacher, train, held, calibration = (
        packaged(options) if options.teacher == "packaged" else story(options)
    )
    begin = time.perf_counter()
    student = mil.convert(
        teacher,
        mixer=options.mixer,
        attention_layers=options.attention,
        init=options.init,
        calibration=calibration if options.init != "paper" else None,
        seed=options.seed,
    )
    conversion = time.perf_counter() - begin
    before = compare(student, teacher, held)
    print(f"before training: {before!r}", file=sys.stderr)
    if options.tokens == 0:
        finish(options, {"conversion_seconds": round(conversion, 1)}, before, before)
        return
    config = mil.DistillConfig(
        max_steps=max(1, round(options.tokens / (options.batch * LENGTH))),
        batch_size=options.batch,
        sequence_length=LENGTH,
        learning_rate=options.learning_rate,
        muon_learning_rate=options.muon,
        warmup_steps=options.warmup_steps,
        min_learning_rate=options.min_learning_rate,
        vector_rate=options.vector_rate,
        align_fraction=options.align,
        hidden_weight=options.hidden,
        average_fraction=options.average,
        seed=options.seed,
        log_every=20,
        eval_every=options.eval_every,
        save_every=200,
    )
    begin = time.perf_counter()
    history = mil.distill(
        student,
        teacher,
        train,
        config,
        options.output,
        options.resume,
        validation=held[:64] if options.eval_every else None,
    )
    seconds = time.perf_counter() - begin
    found = {
        "tokens": history.final["tokens"],
        "steps": config.max_steps,
        "conversion_seconds": round(conversion, 1),
        "seconds": round(seconds, 1),
        "training_tokens_per_second": round(history.final["tokens"] / seconds, 1),
    }
    finish(options, found, before, compare(student, teacher, held))


def finish(options, found, before, after):
    """Writes and prints the row."""
    row = {
        "teacher": options.teacher,
        "mixer": options.mixer,
        "attention": options.attention,
        **found,
        "before": before.to_dict(),
        "after": after.to_dict(),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "threads": _core.get_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {_core.cpu_info()['level']}",
        "versions": {
            "mambainllama": mil.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    if options.json:
        options.json.write_text(json.dumps(row, indent=2) + "\n")
    print_row(row, before, after)


def print_row(row, before, after):
    millions = row.get("tokens", 0) / 1e6
    print(
        f"{row['teacher']} teacher, {row['mixer']}, attention {row['attention']}, "
        f"{millions:.2f} M tokens, {row.get('seconds', row['conversion_seconds']):.0f} s"
    )
    print(f"{'':24}{'KL':>9}{'perplexity':>12}{'top-1':>9}")
    stages = (("before training", before), ("after", after))
    for name, found in stages[: 2 if millions else 1]:
        print(f"{name:24}{found.kl:9.3f}{found.perplexity:12.2f}{100 * found.agreement:8.1f}%")
    near = [
        key
        for key in PUBLISHED
        if key[0] == row["attention"] and abs(key[1] - millions) < 0.1 * key[1]
    ]
    if near and (row["mixer"], row["teacher"]) == ("mamba2", "story"):
        kl, perplexity, top = PUBLISHED[near[0]]
        print(f"{f'published code, {near[0][1]} M':24}{kl:9.3f}{perplexity:12.1f}{top:8.1f}%")
    print(f"{'teacher':24}{0:9.3f}{after.teacher_perplexity:12.2f}{100:8.1f}%")


if __name__ == "__main__":
    main()
