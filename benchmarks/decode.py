"""Speed of writing one token at a time: a Transformer of 1.2 billion parameters and its hybrids.

A token's step reads every weight once and does two operations with each, so memory is the limit: at
B bytes of weights and a read bandwidth of R, at most R / B tokens a second. R is measured in the
same rounds, by a program that only reads. The table gives tokens a second, the bytes of weights
that they read a second, and the share of R.

Before anything is timed, all peers give logits for the same tokens from the same checkpoint.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
from checkpoints import LLAMA_1B, Shape
from peers import Absent, Peer, interleave, start
from report import Report, arguments, middle, ratio, require_memory, spread

OURS, TORCH, LLAMA_CPP, LIMIT = "mambainllama", "PyTorch eager", "llama.cpp", "memory"
READ = "mambainllama, weights read into memory"  # mmap=False: the limit's kind of memory
ELSEWHERE = "llama.cpp, the Llama"  # what it offers beside a hybrid, which it lacks
MODELS = {
    "llama": "Llama 1B",
    "mamba2": "hybrid, half attention, half Mamba-2",
    "mamba1": "hybrid, half attention, half Mamba-1",
}
# Peers round activations at other places; a difference in formula or layout is far past this.
TOLERANCE, AGREEMENT = 0.1, 0.6


def main() -> int:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="of " + ", ".join(MODELS))
    parser.add_argument("--tokens", type=int, default=None, help="written in each round")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.tokens = options.tokens or (8 if options.quick else 32)
    shape = replace(LLAMA_1B, layers=4, vocab=32000) if options.quick else LLAMA_1B
    report = Report("decode", "Decoding, one row, bfloat16 weights", options)
    for model in options.models.split(","):
        if model not in MODELS:
            parser.error(f"--models: {model} is none of {', '.join(MODELS)}")
        measure(report, model, shape)
    report.finish()
    return 0


def wanted_peers(model: str, shape: Shape, options: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    """label -> (worker, arguments of load)."""
    transformer = checkpoints.llama(options.cache, shape)
    folder = transformer if model == "llama" else checkpoints.hybrid(options.cache, shape, model)
    peers = {
        OURS: ("ours", {"folder": str(folder)}),
        READ: ("ours", {"folder": str(folder), "mmap": False}),
        LIMIT: ("memory", {"megabytes": 256 if options.quick else 1024}),
    }
    if options.no_peers:
        return peers
    peers[TORCH] = ("torch_eager", {"folder": str(folder)})
    gguf = options.cache / f"{transformer.name}.gguf"
    label = LLAMA_CPP if model == "llama" else ELSEWHERE
    peers[label] = ("llama_cpp", {"folder": str(transformer), "gguf": str(gguf)})
    return peers


def measure(report: Report, model: str, shape: Shape) -> None:
    options = report.options
    random = np.random.default_rng(1)
    prompt = random.integers(0, shape.vocab, 32).tolist()
    wanted = wanted_peers(model, shape, options)
    pythons = {"llama_cpp": options.llama_python, "torch_eager": options.torch_python}
    require_memory(len(wanted) * shape.weight_bytes)
    with contextlib.ExitStack() as stack:
        peers = start(stack, wanted, options.threads, pythons, report.absent)
        if OURS not in peers:
            raise SystemExit(f"decode: {report.absent[OURS]}")
        report.heard(peers)
        notes = compare(peers, prompt, report.absent)
        sizes = dict.fromkeys(peers, peers[OURS]("weight_bytes"))
        speeds = time_rounds(peers, prompt, options, report.absent)
    if ELSEWHERE in speeds:
        sizes[ELSEWHERE] = shape.weight_bytes
        notes.append(
            "llama.cpp has no such hybrid: its row is the Llama's that this one came from."
        )
    show(report, MODELS[model], sizes, speeds, notes)


def compare(peers: dict[str, Peer], tokens: list[int], absent: dict[str, str]) -> list[str]:
    """Says how close every peer's logits are to ours; one that computes something else leaves."""
    notes, found = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for label in [label for label in peers if label not in (LIMIT, ELSEWHERE)]:
            path = Path(folder) / f"{label}.npy"
            peers[label]("logits", tokens=tokens, path=str(path))
            found[label] = np.load(path)
    ours = found.pop(OURS)
    for label, theirs in found.items():
        difference = float(np.abs(theirs - ours).max() / np.abs(ours).max())
        same = float((theirs.argmax(-1) == ours.argmax(-1)).mean())
        note = f"{label}: logits within {difference:.3f} of the largest of ours, "
        note += f"same likeliest token at {100 * same:.0f} % of {len(tokens)} positions"
        print("    " + note, flush=True)
        notes.append(note + ".")
        if not difference <= TOLERANCE or same < AGREEMENT:
            absent[label] = f"computes something else: {note}"
            del peers[label]
    return notes


def time_rounds(
    peers: dict[str, Peer], prompt: list[int], options: Any, absent: dict[str, str]
) -> dict[str, list[float]]:
    """Tokens a second of each round after a first one (of the limit, bytes a second)."""

    def once(label: str, count: int) -> float:
        if label == LIMIT:
            return peers[label]("read")
        return 1 / peers[label]("decode", tokens=prompt, count=count)

    speeds: dict[str, list[float]] = {label: [] for label in peers}
    for number, order in interleave(peers, options.rounds + 1):
        for label in [label for label in order if label in speeds]:
            try:
                speed = once(label, options.tokens if number else 4)
            except Absent as reason:
                if label in (OURS, LIMIT):
                    raise
                absent[label] = str(reason)
                del speeds[label]
                continue
            speeds[label] += [speed] if number else []
    return speeds


def show(
    report: Report,
    title: str,
    sizes: dict[str, int],
    speeds: dict[str, list[float]],
    notes: list[str],
) -> None:
    limit = speeds[LIMIT]
    rows = []
    for label, values in speeds.items():
        if label == LIMIT:
            continue
        traffic = [speed * sizes[label] for speed in values]
        rows.append(
            [
                label,
                f"{middle(values):.2f}",
                f"{100 * spread(values):.0f} %",
                f"{middle(traffic) / 1e9:.1f}",
                f"{100 * ratio(traffic, limit):.0f} %",
                "" if label == OURS else f"{ratio(speeds[OURS], values):.2f} x",
            ]
        )
    alone = ["limit: reading alone", f"{middle(limit) / sizes[OURS]:.2f}"]
    alone += [f"{100 * spread(limit):.0f} %", f"{middle(limit) / 1e9:.1f}", "100 %", ""]
    report.section(
        f"{title}: {sizes[OURS] / 1e9:.2f} GB of weights a token",
        ["", "tokens/s", "±", "GB/s", "of the limit", "ours is faster"],
        [*rows, alone],
        weight_bytes=sizes,
        tokens_per_second=speeds,
        notes=notes,
    )


if __name__ == "__main__":
    sys.exit(main())
