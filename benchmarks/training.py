"""Speed and memory of training: optimizer steps of a hybrid, with and without a teacher.

float32 throughout. The model is a small Llama of which half the attention layers were exchanged for
Mamba-2; the teacher is that Llama. The peer is the same hybrid in plain PyTorch
(workers/torch_hybrid.py) with torch's own AdamW and clipping. Both start from the same checkpoint
and see the same tokens, and their losses of the first steps must agree before times count. Peak
memory is the process's resident set while stepping, less what it held before the first step
(weights, and mapped files that were read).
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from typing import Any

import checkpoints
from checkpoints import LLAMA_SMALL
from peers import Absent, Peer, interleave
from report import Report, arguments, middle, ratio, spread

OURS, RECOMPUTING, TORCH = "mambainllama", "mambainllama, checkpointing", "PyTorch eager"
LEARNING_RATE = 1e-3
TOLERANCE = 2e-3  # of the loss: float32 sums in other orders, two optimizer steps later


def main() -> int:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=None, help="sequences a step")
    parser.add_argument("--length", type=int, default=None, help="tokens a sequence")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 4)
    options.batch = options.batch or (2 if options.quick else 4)
    options.length = options.length or (128 if options.quick else 512)
    shape = replace(LLAMA_SMALL, layers=2, vocab=4096) if options.quick else LLAMA_SMALL
    report = Report("training", "Training steps of a hybrid, float32", options)
    teacher = str(checkpoints.llama(options.cache, shape))
    student = str(checkpoints.hybrid(options.cache, shape, "mamba2"))
    size = f"hidden {shape.hidden}, {shape.layers} layers, vocabulary {shape.vocab}"
    size += f", {options.batch} x {options.length} tokens a step"
    measure(report, f"Distillation (student and teacher: {size})", student, teacher)
    measure(report, f"Cross-entropy alone ({size})", student, None)
    report.finish()
    return 0


def measure(report: Report, title: str, student: str, teacher: str | None) -> None:
    options = report.options
    work = {"student": student, "teacher": teacher, "learning_rate": LEARNING_RATE}
    workers = {OURS: ("ours", {}), RECOMPUTING: ("ours", {"checkpointing": True})}
    if not options.no_peers:
        workers[TORCH] = ("torch_eager", {})
    with contextlib.ExitStack() as stack:
        peers, before = {}, {}
        for label, (worker, more) in workers.items():
            try:
                python = options.torch_python if worker == "torch_eager" else None
                peer = stack.enter_context(Peer(worker, options.threads, python))
                before[label] = peer("training", **work, **more)
                peers[label] = peer
            except Absent as reason:
                report.absent[label] = str(reason)
        report.heard(peers)
        steps = time_rounds(peers, options)
    show(report, title, steps, before)


def time_rounds(peers: dict[str, Peer], options: Any) -> dict[str, list[dict[str, float]]]:
    """label -> what each step answered; the first one warms up."""
    steps: dict[str, list[dict[str, float]]] = {label: [] for label in peers}
    for number, order in interleave(peers, options.rounds + 1):
        for label in order:
            found = peers[label]("train", batch=options.batch, length=options.length, index=number)
            steps[label].append(found)
    return steps


def show(
    report: Report,
    title: str,
    steps: dict[str, list[dict[str, float]]],
    before: dict[str, int],
) -> None:
    options = report.options
    tokens = options.batch * options.length
    speeds = {label: [tokens / s["seconds"] for s in found[1:]] for label, found in steps.items()}
    notes, rows = [], []
    for label, values in speeds.items():
        losses = [s["loss"] for s in steps[label]]
        ours = [s["loss"] for s in steps[OURS]]
        off = max(abs(a / b - 1) for a, b in zip(losses[:3], ours, strict=False))
        if off > TOLERANCE:
            report.absent[f"{label} ({title})"] = (
                f"its losses differ: {losses[:3]}, ours {ours[:3]}"
            )
            continue
        peak = max(s["peak"] for s in steps[label]) - before[label]
        rows.append(
            [
                label,
                f"{middle(values):.0f}",
                f"{100 * spread(values):.0f} %",
                f"{peak / 2**20:.0f} MiB",
                "" if label == OURS else f"{ratio(speeds[OURS], values):.2f} x",
            ]
        )
        if label != OURS:
            notes.append(
                f"{label}: the first losses differ from ours by at most {off:.1e} of them."
            )
    columns = ["", "tokens/s", "±", "peak above weights", "ours is faster"]
    report.section(title, columns, rows, steps=steps, resident_before=before, notes=notes)


if __name__ == "__main__":
    sys.exit(main())
