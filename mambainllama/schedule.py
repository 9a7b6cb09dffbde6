"""Learning-rate schedules: a linear warm-up, then cosine, linear or constant.

With w warm-up steps of n in all and a floor f (a fraction of the peak), step s, counted from 0,
gets

    (s + 1) / w                                    while s < w
    f + (1 - f) * (1 + cos(pi * p)) / 2            cosine,   p = (s - w) / (n - w)
    f + (1 - f) * (1 - p)                          linear
    1                                              constant

times the peak.  A schedule is a function of the step's number, so that a resumed run needs no state
of it.
"""

from __future__ import annotations

import math

__all__ = ["SCHEDULES", "rate_factor", "warmup_count"]

SCHEDULES = ("cosine", "linear", "constant")


def warmup_count(total: int, warmup_steps: int | None, warmup_ratio: float) -> int:
    """Warm-up steps: as given, or a share of all steps, rounded up."""
    steps = math.ceil(total * warmup_ratio) if warmup_steps is None else warmup_steps
    return min(steps, total)


def rate_factor(step: int, total: int, warmup: int, schedule: str, floor: float) -> float:
    """The share of the peak rate that step `step` (from 0) of `total` takes.

    >>> [round(rate_factor(s, 5, 1, "linear", 0.0), 2) for s in range(5)]
    [1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    falling = (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress
    return floor + (1 - floor) * falling
