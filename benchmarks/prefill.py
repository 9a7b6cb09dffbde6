"""Speed of reading a prompt, which many-row products bind: tokens a second at two lengths.

Here each weight is used once a token, so arithmetic is the limit and not memory. Checkpoints and
peers are those of decode.py, and so is the check that all compute the same.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace

import numpy as np
from checkpoints import LLAMA_1B, Shape
from decode import LIMIT, MODELS, OURS, compare, wanted_peers
from peers import Absent, Peer, interleave, start
from report import Report, arguments, middle, ratio, require_memory, spread


def main() -> int:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--models", default="llama,mamba2", help="of " + ", ".join(MODELS))
    parser.add_argument("--lengths", default=None, help="tokens of a prompt, separated by commas")
    options = parser.parse_args()
    options.rounds = options.rounds or 2
    lengths = options.lengths or ("16,64" if options.quick else "64,256")
    shape = replace(LLAMA_1B, layers=4, vocab=32000) if options.quick else LLAMA_1B
    report = Report("prefill", "Reading a prompt, bfloat16 weights", options)
    for model in options.models.split(","):
        if model not in MODELS:
            parser.error(f"--models: {model} is none of {', '.join(MODELS)}")
        measure(report, model, shape, [int(length) for length in lengths.split(",")])
    report.finish()
    return 0


def measure(report: Report, model: str, shape: Shape, lengths: list[int]) -> None:
    options = report.options
    tokens = np.random.default_rng(3).integers(0, shape.vocab, max(lengths)).tolist()
    wanted = wanted_peers(model, shape, options)
    del wanted[LIMIT]
    pythons = {"llama_cpp": options.llama_python, "torch_eager": options.torch_python}
    require_memory(len(wanted) * shape.weight_bytes)
    with contextlib.ExitStack() as stack:
        peers = start(stack, wanted, options.threads, pythons, report.absent)
        if OURS not in peers:
            raise SystemExit(f"prefill: {report.absent[OURS]}")
        report.heard(peers)
        notes = compare(peers, tokens[:32], report.absent)
        seconds = time_rounds(peers, tokens, lengths, options.rounds, report.absent)
    show(report, MODELS[model], lengths, seconds, notes)


def time_rounds(
    peers: dict[str, Peer],
    tokens: list[int],
    lengths: list[int],
    rounds: int,
    absent: dict[str, str],
) -> dict[str, dict[int, list[float]]]:
    """label -> length -> seconds of each round; `compare` has warmed up."""
    seconds = {label: {length: [] for length in lengths} for label in peers}
    for _, order in interleave(peers, rounds):
        for label in [label for label in order if label in seconds]:
            try:
                for length in lengths:
                    seconds[label][length].append(peers[label]("prefill", tokens=tokens[:length]))
            except Absent as reason:
                absent[label] = str(reason)
                del seconds[label]
    return seconds


def show(
    report: Report,
    title: str,
    lengths: list[int],
    seconds: dict[str, dict[int, list[float]]],
    notes: list[str],
) -> None:
    columns, rows = [""], []
    for length in lengths:
        columns += [f"{length} tokens: tokens/s", "±", "ours is faster"]
    for label, by_length in seconds.items():
        row = [label]
        for length in lengths:
            values, ours = by_length[length], seconds[OURS][length]
            row += [f"{length / middle(values):.1f}", f"{100 * spread(values):.0f} %"]
            row += ["" if label == OURS else f"{ratio(values, ours):.2f} x"]
        rows.append(row)
    report.section(title, columns, rows, seconds=seconds, notes=notes)


if __name__ == "__main__":
    sys.exit(main())
