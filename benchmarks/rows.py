"""Cost of a verify window: one forward pass over 2 to 16 rows, relative to one row.

Speculative decoding gains what it accepts and pays for the rows that it verifies. At one row memory
is the limit; further rows use the same weights while they pass, so that up to some number they cost
almost nothing. Each pass continues a sequence of 64 tokens, gives the logits of all its rows and is
taken back. Each number of rows is timed in turns with one row, since what memory and a shared core
give can change by half within seconds.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from typing import Any

import checkpoints
import numpy as np
from checkpoints import LLAMA_1B, Shape
from peers import Absent, Peer, interleave, start
from report import Report, arguments, middle, ratio, require_memory, spread

OURS = "mambainllama"
COUNTS = (2, 3, 4, 5, 6, 8, 16)
CONTEXT = 64


def main() -> int:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=None, help="passes of each number of rows")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 4)
    options.repeats = options.repeats or 3
    shape = replace(LLAMA_1B, layers=4, vocab=32000) if options.quick else LLAMA_1B
    report = Report("rows", "Several rows at once, bfloat16 weights", options)
    measure(report, shape)
    report.finish()
    return 0


def measure(report: Report, shape: Shape) -> None:
    options = report.options
    random = np.random.default_rng(2)
    before = random.integers(0, shape.vocab, CONTEXT).tolist()
    window = random.integers(0, shape.vocab, max(COUNTS)).tolist()
    llama = checkpoints.llama(options.cache, shape)
    hybrid = checkpoints.hybrid(options.cache, shape, "mamba2")
    wanted: dict[str, tuple[str, dict[str, Any]]] = {
        f"{OURS}, Llama": ("ours", {"folder": str(llama)}),
        f"{OURS}, Mamba-2 hybrid": ("ours", {"folder": str(hybrid)}),
    }
    if not options.no_peers:
        gguf = options.cache / f"{llama.name}.gguf"
        wanted["llama.cpp, Llama"] = ("llama_cpp", {"folder": str(llama), "gguf": str(gguf)})
        wanted["PyTorch eager, Llama"] = ("torch_eager", {"folder": str(llama)})
    pythons = {"llama_cpp": options.llama_python, "torch_eager": options.torch_python}
    require_memory(len(wanted) * shape.weight_bytes)
    with contextlib.ExitStack() as stack:
        peers = start(stack, wanted, options.threads, pythons, report.absent)
        report.heard(peers)
        for peer in peers.values():
            peer("context", tokens=before)
        seconds = time_rounds(peers, window, options, report.absent)
    show(report, seconds)


def time_rounds(
    peers: dict[str, Peer], window: list[int], options: Any, absent: dict[str, str]
) -> dict[str, dict[int, list[tuple[float, float]]]]:
    """label -> number of rows -> seconds of one row and of these, in each round."""
    seconds = {label: {count: [] for count in COUNTS} for label in peers}
    for _, order in interleave(peers, options.rounds):
        for label in [label for label in order if label in seconds]:
            try:
                for count in COUNTS:
                    one, these = (
                        peers[label]("rows", tokens=window[:n], repeats=options.repeats)
                        for n in (1, count)
                    )
                    seconds[label][count].append((one, these))
            except Absent as reason:
                absent[label] = str(reason)
                del seconds[label]
    return seconds


def show(report: Report, seconds: dict[str, dict[int, list[tuple[float, float]]]]) -> None:
    rows = []
    for label, by_count in seconds.items():
        ones, costs = [], []
        for pairs in by_count.values():
            one, these = zip(*pairs, strict=True)
            ones += one
            costs.append(ratio(these, one))
        time = f"{1e3 * middle(ones):.1f} ms ± {100 * spread(ones):.0f} %"
        rows.append([label, time, *(f"{cost:.2f}" for cost in costs)])
    report.section(
        "Time of a pass relative to one row",
        ["", "1 row", *(f"{count} rows" for count in COUNTS)],
        rows,
        seconds=seconds,
    )


if __name__ == "__main__":
    sys.exit(main())
