"""Products alone: one x of few rows with weights that no cache holds, through mambainllama.ops."""

import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[2]))  # built in place, if not installed
from peers import serve

weights: list[np.ndarray] = []
kind = None


def start(threads):
    global ops
    from mambainllama import __version__, _core, ops

    ops.set_threads(threads)
    return {"mambainllama": f"{__version__} ({_core.cpu_info()['level']})"}


def load(dtype, width, out, megabytes):
    """As many weights [out, width] as fill `megabytes`: by the time that one comes round again, the
    others have passed through the caches."""
    global weights, kind
    kind = "bfloat16" if dtype == "bfloat16" else None
    stored = np.uint16 if dtype == "bfloat16" else np.dtype(dtype)
    values = np.random.default_rng(5).normal(size=(out, width)).astype(np.float32)
    first = (values.view(np.uint32) >> 16).astype(np.uint16) if kind else values.astype(stored)
    weights = [first.copy() for _ in range(max(2, -(-(megabytes << 20) // first.nbytes)))]


def weight_bytes():
    """Of all weights, which is what one pass reads."""
    return sum(weight.nbytes for weight in weights)


def multiply(rows, passes):
    """Seconds of one pass over all weights: the best of `passes`."""
    out, width = weights[0].shape
    x = np.random.default_rng(6).normal(size=(rows, width)).astype(np.float32)
    y = np.empty((rows, out), np.float32)
    best = float("inf")
    for _ in range(passes):
        started = time.perf_counter()
        for weight in weights:
            ops.linear_forward(x, weight, dtype=kind, out=y)
        best = min(best, time.perf_counter() - started)
    return best


serve({"start": start, "load": load, "weight_bytes": weight_bytes, "multiply": multiply})
