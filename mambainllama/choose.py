"""Which layers should stay attention: by measurement instead of evenly spread.

All layers are converted once, each fitted on the teacher's own activations, so that its mixer does
not depend on which others are replaced.  Any hybrid between the teacher and the student without
attention is then put together from the two without copying a weight, and its KL to the teacher is
measured on tokens that the fit has not seen.  Three ways to choose n layers:

    restore   from no attention: the n whose attention, put back alone, lowers the KL most
    replace   from the teacher: the n whose attention, replaced alone, raises the KL most
    greedy    restore one layer after another, each time the one that helps most beside the others

With N layers the first two take N + 1 passes over the tokens; greedy takes about n N, and sees what
they cannot: two layers that do the same work are worth little more than one of them.

>>> choice = mil.choose_layers(model, tokens, keep=4)          # doctest: +SKIP
>>> student = mil.convert(model, attention_layers=choice.layers, calibration=tokens)
...                                                            # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from . import _core
from .calibrate import batches, calibration_rows
from .convert import _check_arguments, _check_convertible, _convert, attention_choice
from .errors import ArgumentError, shorten
from .model import Model

__all__ = ["LayerChoice", "choose_layers"]

_METHODS = ("restore", "replace", "greedy")
_SCORED = 4  # one sequence of so many is kept from the fit to measure on


@dataclass(frozen=True)
class LayerChoice:
    """Which layers stay attention, and what was measured.

    Attributes
    ----------
    layers : list of int
        Those that stay attention, ascending.
    scores : dict of int to float
        Nats a token that a layer's attention is worth: how much the KL falls when it is restored,
        or rises when it is replaced. Greedy: of the layers in `steps`, when their turn came; of
        the others, in the last round.
    kl : float
        KL(teacher || student) with this choice, before any training.
    evenly : float
        The same with as many layers, evenly spread.
    steps : list of int
        The layers in the order in which they were chosen.
    method, mixer : str
    tokens : int
        Tokens that were measured on.
    """

    layers: list[int]
    scores: dict[int, float]
    kl: float
    evenly: float
    steps: list[int]
    method: str
    mixer: str
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """All attributes, for JSON."""
        return asdict(self)

    def plot(self, path: Any = None) -> Any:
        """A bar for each layer; see `mambainllama.plot.plot_layers`."""
        from .plot import plot_layers

        return plot_layers(self, path)


def choose_layers(
    model: Model,
    tokens: Any,
    keep: int | float | str,
    mixer: str = "mamba2",
    method: str = "replace",
    *,
    init: str = "auto",
    seed: int = 0,
) -> LayerChoice:
    """The `keep` layers of a Transformer whose attention matters most.

    Parameters
    ----------
    model
        A Transformer, or a hybrid whose remaining attention layers are to be judged.
    tokens
        As for `mil.convert`'s calibration: tokens (n, length), token lists or texts. A quarter of
        the sequences is measured on, the rest fits the mixers.
    keep
        How many layers stay attention, or a share: "half", "quarter", "eighth", a fraction.
    mixer, init, seed
        As for `mil.convert`.
    method
        "replace", "restore" or "greedy": on a teacher of four layers the first and the last chose
        the same two, which left less KL than those of "restore" (docs/quality.md).

    Returns
    -------
    LayerChoice

    Raises
    ------
    ArgumentError
        One line that names the argument.
    """
    if method not in _METHODS:
        raise ArgumentError(
            f'choose_layers: method {shorten(method)} is not known; use "restore", "replace" or '
            '"greedy"'
        )
    _check_arguments(model, mixer, init, tokens, seed)
    if tokens is None:
        raise ArgumentError("choose_layers: tokens (n, length) or texts are needed to measure on")
    layers = model.core.config["layers"]
    candidates = [i for i, layer in enumerate(layers) if layer["mixer"] == "attention"]
    count = _count(keep, len(layers))
    if not 0 <= count <= len(candidates):
        raise ArgumentError(
            f"choose_layers: keep={shorten(keep)}: the model has {len(candidates)} attention layers"
        )
    _check_convertible(model, mixer, [])
    fitted, measured = _split(model, tokens)
    # A Mamba-1 start depends on whether any attention is left.
    student = _convert(model, mixer, [], init, fitted, int(seed), any_attention=count > 0)
    hybrids = Hybrids(model, student, candidates, measured)
    chosen, scores = (_greedy if method == "greedy" else _one_shot)(hybrids, count, method)
    evenly = [candidates[(i + 1) * len(candidates) // count - 1] for i in range(count)]
    return LayerChoice(
        layers=sorted(chosen),
        scores=scores,
        kl=hybrids.kl(chosen),
        evenly=hybrids.kl(evenly),
        steps=list(chosen),
        method=method,
        mixer=mixer,
        tokens=int(measured[0].size),
    )


def _count(keep: Any, layers: int) -> int:
    """How many layers a number, a word or a share means."""
    if isinstance(keep, (int, np.integer)) and not isinstance(keep, bool):
        return int(keep)
    if isinstance(keep, (str, float)):
        return len(attention_choice(keep, [{}] * layers))
    raise ArgumentError(
        f"choose_layers: keep={shorten(keep)}: expected a number of layers or a share"
    )


def _split(model: Model, tokens: Any) -> tuple[list[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Sequences to fit on, and (tokens, offsets) to measure on; a single one serves for both."""
    packed, offsets = calibration_rows(model, tokens, 1 << 40)
    rows = [packed[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]
    held = rows[_SCORED - 1 :: _SCORED] or rows
    fitted = [row for i, row in enumerate(rows) if i % _SCORED != _SCORED - 1] or rows
    ends = np.cumsum([0, *map(len, held)])
    return fitted, (np.concatenate(held), ends)


# ---- hybrids between the teacher and the student -------------------------------------------------


class Hybrids:
    """The KL of every mixture of a teacher's attention layers and a student's mixers."""

    def __init__(
        self,
        teacher: Model,
        student: Model,
        candidates: Sequence[int],
        measured: tuple[np.ndarray, np.ndarray],
    ):
        self.teacher, self.student, self.candidates = teacher.core, student.core, candidates
        self.tokens, self.offsets = measured
        self.known: dict[frozenset[int], float] = {}

    def kl(self, kept: Iterable[int]) -> float:
        """KL(teacher || hybrid) where the layers in `kept` are attention, nats a token."""
        key = frozenset(kept)
        if key not in self.known:
            self.known[key] = self._measure(self._built(key))
        return self.known[key]

    def _built(self, kept: frozenset[int]) -> _core.Model:
        """The hybrid, over the two models' own arrays."""
        config = dict(self.student.config)
        old = self.teacher.config["layers"]
        config["layers"] = [
            old[i] if i in kept else layer for i, layer in enumerate(config["layers"])
        ]
        arrays, dtypes = {}, {}
        for core, wants in ((self.student, False), (self.teacher, True)):
            types = core.dtypes()
            for name, array in core.parameters().items():
                parts = name.split(".")
                number = int(parts[2]) if parts[:2] == ["model", "layers"] else None
                if (number in kept) == wants:
                    arrays[name], dtypes[name] = array, types[name]
        return _core.Model(config, arrays, dtypes)

    def _measure(self, core: _core.Model) -> float:
        total = rows = 0.0
        for begin, end in batches(self.offsets):
            part = self.offsets[begin : end + 1]
            found = _core.evaluate(
                core, self.teacher, self.tokens[part[0] : part[-1]], part - part[0]
            )
            total += found["kl"]
            rows += found["kl_rows"]
        return total / max(rows, 1.0)


def _one_shot(hybrids: Hybrids, count: int, method: str) -> tuple[list[int], dict[int, float]]:
    """The layers with the largest scores, each measured alone."""
    layers = hybrids.candidates
    if method == "restore":
        base = hybrids.kl([])
        scores = {i: base - hybrids.kl([i]) for i in layers}
    else:
        scores = {i: hybrids.kl(set(layers) - {i}) for i in layers}
    return _largest(scores, count), scores


def _greedy(hybrids: Hybrids, count: int, method: str) -> tuple[list[int], dict[int, float]]:
    """One layer after another."""
    chosen: list[int] = []
    scores: dict[int, float] = {}
    while True:
        base = hybrids.kl(chosen)
        left = [i for i in hybrids.candidates if i not in chosen]
        if len(chosen) == count and (scores or not left):
            return chosen, dict(sorted(scores.items()))
        gains = {i: base - hybrids.kl([*chosen, i]) for i in left}
        scores |= gains
        if len(chosen) == count:
            return chosen, dict(sorted(scores.items()))
        chosen += _largest(gains, 1)


def _largest(scores: dict[int, float], count: int) -> list[int]:
    """The `count` layers with the largest scores, best first; of equals the last, as evenly spread
    layers are the last of their runs."""
    return sorted(scores, key=lambda i: (scores[i], i), reverse=True)[:count]
