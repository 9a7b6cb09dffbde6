"""Speed of a model at several lengths of context: reading a prompt, and writing token by token.

Each length is measured from a state of its own.  A figure is the median of several short runs, so
that one hiccup of the machine does not show; figures of one call compare, those of different
machines do not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from .errors import ArgumentError, check_at_least
from .pairs import core_of

__all__ = ["speed"]

BLOCK = 512  # rows read in one call while a context is built


def speed(
    model: Any,
    lengths: Iterable[int] = (128, 512, 2048, 8192),
    tokens: int = 32,
    repeats: int = 3,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Measures one sequence at each length.

    Parameters
    ----------
    model : model
    lengths : tokens already in the sequence
    tokens, repeats : decoded one by one at each length, so many times
    seed : of the tokens

    Returns
    -------
    list of dict
        length, prefill_tokens_per_second, decode_tokens_per_second, decode_spread (half the
        distance of the fastest and the slowest repeat, relative to the median), state_bytes.
    """
    core = core_of(model)
    lengths = list(lengths)
    for name, values in (("length", lengths), ("tokens", [tokens]), ("repeats", [repeats])):
        for value in values:
            check_at_least("bench", name, value, 1)
    if not lengths:
        raise ArgumentError("bench: lengths is empty; give at least one")
    lengths = sorted(set(lengths))
    random = np.random.default_rng(seed)
    state = core.state(lengths[-1] + tokens + 1)
    table, done = [], 0
    for length in lengths:
        prompt = random.integers(0, core.config["vocab"], length - done, dtype=np.int32)
        begin = time.perf_counter()
        for at in range(0, len(prompt), BLOCK):
            core.forward(prompt[at : at + BLOCK], states=[state], rows="none")
        prefill = len(prompt) / (time.perf_counter() - begin)
        done = length
        rates = [decode_rate(core, state.copy(), random, tokens) for _ in range(repeats)]
        middle = statistics.median(rates)
        table.append(
            {
                "length": length,
                "prefill_tokens_per_second": round(prefill, 1),
                "decode_tokens_per_second": round(middle, 1),
                "decode_spread": round((max(rates) - min(rates)) / (2 * middle), 3),
                "state_bytes": core.state_bytes(length),
            }
        )
    return table


def decode_rate(core: Any, state: Any, random: np.random.Generator, count: int) -> float:
    """Tokens per second of `count` one-token steps, the first of them not timed."""
    ids = random.integers(0, core.config["vocab"], (count + 1, 1), dtype=np.int32)
    core.forward(ids[0], states=[state], rows="last")
    begin = time.perf_counter()
    for token in ids[1:]:
        core.forward(token, states=[state], rows="last")
    return count / (time.perf_counter() - begin)
