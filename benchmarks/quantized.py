"""What 8-bit weights cost in quality: a model against itself with float8 and int8 weights.

    python benchmarks/quantized.py [--model FOLDER] [--data FILE] [--device cuda]

On the CPU every matrix that a GPU would hold in 8 bits is replaced by the float32 values that those
stand for (`mambainllama.quantize.rounded`, which the tests hold equal to the GPU's codes), and all
is computed in float32: the figures are the weights' alone. With --device cuda the model is loaded
with `weights=` and compared with itself in 16 bits, as a user would run both.

Without --model the two small models at hand are measured, each on text it was not trained on: the
packaged teacher on Python's library, and models/story-llama of the shared data on stories. KL is
KL(as stored || 8-bit) in nats a token; agreement is the share of tokens with the same likeliest
next one. The last lines are the errors of Gaussian rows of 4,096 inputs, the size of real models.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np

import mambainllama as mil
from mambainllama import _core, corpus
from mambainllama.data import read_documents, sample_rows
from mambainllama.quantize import KINDS, coded, rounded

HERE = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("MAMBAINLLAMA_SHARED", HERE.parent / "shared"))
LENGTH = 256


def token_rows(data, model: mil.Model, count: int) -> np.ndarray:
    documents = read_documents(data, model.tokenizer, vocab=model.config.vocab_size)
    return sample_rows(documents, count, LENGTH)


def subjects(options) -> list[tuple[str, Path, np.ndarray]]:
    """Name, folder and held-out tokens [rows, length] of each model."""
    if options.model:
        model = mil.load(options.model)
        rows = token_rows(options.data, model, options.rows)
        return [(Path(options.model).name, Path(options.model), rows)]
    found = []
    teacher = Path(mil.__file__).parent / "packaged" / "teacher"
    records = [{"text": text} for text in corpus.documents()[1]]
    rows = token_rows(records, mil.load(teacher), options.rows)
    found.append(("packaged teacher", teacher, rows))
    stories = SHARED / "data" / "stories" / "train.npz"
    if stories.exists():
        tokens = np.load(stories)["tokens"][-options.rows :].astype(np.int32)
        found.append(("story-llama", SHARED / "models" / "story-llama", tokens))
    return found


def with_rounded_weights(folder: Path, kind: str) -> mil.Model:
    """The model in float32 with the values of its 8-bit weights."""
    model = mil.load(folder, dtype="float32")
    specs = _core.Model.parameter_specs(model.core.config)
    for name in coded(specs, model.parameters(), kind):
        array = model.parameters()[name]
        array[...] = rounded(array, kind)
    return model


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def compare(student, teacher, tokens: np.ndarray) -> dict[str, float]:
    """KL, perplexities and agreement over all positions, from logits, so on any device."""
    kl = own = others = same = 0.0
    for start in range(0, len(tokens), 4):
        rows = tokens[start : start + 4]
        t, s = log_softmax(teacher(rows)), log_softmax(student(rows))
        kl += (np.exp(t) * (t - s)).sum()
        same += (t.argmax(-1) == s.argmax(-1)).sum()
        labels = rows[:, 1:, None].astype(np.int64)
        others -= np.take_along_axis(t[:, :-1], labels, -1).sum()
        own -= np.take_along_axis(s[:, :-1], labels, -1).sum()
    predicted = tokens.shape[0] * (tokens.shape[1] - 1)
    return {
        "kl": kl / tokens.size,
        "perplexity": float(np.exp(own / predicted)),
        "perplexity_before": float(np.exp(others / predicted)),
        "agreement": same / tokens.size,
        "tokens": int(tokens.size),
    }


def gaussian_error(kind: str, columns: int = 4096, rows: int = 256) -> float:
    """Root of the mean square of the error, relative to the weights'."""
    values = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    difference = rounded(values, kind) - values
    return float(np.sqrt(np.square(difference).mean() / np.square(values).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of a model to measure instead")
    parser.add_argument("--data", nargs="+", help="held-out text for it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=256, help=f"sequences of {LENGTH} tokens")
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    if options.model and not options.data:
        parser.error("--model needs --data")
    results = []
    for name, folder, tokens in subjects(options):
        on_gpu = options.device != "cpu"
        stored = mil.load(folder, options.device, "bfloat16" if on_gpu else "float32")
        for kind in KINDS:
            if on_gpu:
                student = mil.load(folder, options.device, "bfloat16", weights=kind)
            else:
                student = with_rounded_weights(folder, kind)
            found = compare(student, stored, tokens)
            results.append({"model": name, "weights": kind, "device": options.device, **found})
            print(
                f"{name:17s} {kind:7s} KL {found['kl']:.5f}, perplexity {found['perplexity']:.4f} "
                f"(before {found['perplexity_before']:.4f}), agreement "
                f"{100 * found['agreement']:.2f} %, {found['tokens']:,} tokens",
                flush=True,
            )
    for kind in KINDS:
        print(f"Gaussian rows of 4,096: {kind} is off by {100 * gaussian_error(kind):.2f} %")
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
