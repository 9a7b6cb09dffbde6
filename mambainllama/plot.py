"""Figures: how a run learnt, how speed depends on the context, which layers matter.

matplotlib is an optional dependency (``pip install 'mambainllama[plot]'``).
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpointing import TEMPORARY, sync
from .errors import ArgumentError, FileError
from .tokenizer import _valid_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_history", "plot_layers", "plot_speed"]

# Distinguishable in print and to colour-blind readers (Okabe & Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def new_axes(columns: int) -> tuple[Figure, Any]:
    """A figure with quiet axes, drawn without a display or the user's settings."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ArgumentError(
            "plots need matplotlib, which is not installed: pip install 'mambainllama[plot]'"
        ) from None

    class Picture(Figure):
        """A figure that notebooks show; of matplotlib's own they do so only beside its pyplot."""

        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png")
            return file.getvalue()

    figure = Picture(figsize=(5.2 * columns, 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def finish(figure: Any, path: str | os.PathLike | None) -> Any:
    if path is not None:
        write(figure, Path(path))
    return figure


def write(figure: Any, path: Path) -> None:
    """Replaces a picture in one step, in the format that its suffix names."""
    try:
        fresh = path.with_name(f"{TEMPORARY}{path.name}")
        figure.savefig(fresh, format=path.suffix[1:] or "png")
        sync(fresh)
        os.replace(fresh, path)
    except OSError as error:
        with suppress(OSError):
            fresh.unlink()
        reason = error.strerror or error
        raise FileError(f"{path}: the figure cannot be written ({reason})") from None
    except ValueError as error:  # a suffix that matplotlib does not know
        raise ArgumentError(f"{path}: {error}") from None


def log_ticks(ax: Any) -> None:
    """A logarithmic axis labelled at 1, 2, 3 and 5 of each decade."""
    from matplotlib.ticker import LogLocator, NullLocator

    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter("{x:g}")


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Means over the last `window` values."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [
        (sums[i + 1] - sums[max(0, i + 1 - window)]) / (i + 1 - max(0, i + 1 - window))
        for i in range(len(values))
    ]


def plot_history(histories: Any, path: str | os.PathLike | None = None) -> Any:
    """Training loss and held-out values over tokens.

    Parameters
    ----------
    histories : History, or a mapping of label to History
    path : PNG to write, or None

    Returns
    -------
    matplotlib.figure.Figure
    """
    named = histories if isinstance(histories, Mapping) else {"": histories}
    if not any(len(history) for history in named.values()):
        raise ArgumentError("plot: the history is empty")
    figure, (ax,) = new_axes(1)
    kind = "KL to the teacher" if any("kl" in row for h in named.values() for row in h) else "loss"
    for colour, (label, history) in zip(COLOURS * len(named), named.items(), strict=False):
        metric = "kl" if kind != "loss" else "loss"
        rows = [row for row in history if metric in row]
        tokens = [row["tokens"] / 1e3 for row in rows]
        values = [row[metric] for row in rows]
        name = f"{label}: " if label else ""
        ax.plot(tokens, values, color=colour, linewidth=0.5, alpha=0.3)
        ax.plot(
            tokens, smooth(values, max(1, len(values) // 40)), color=colour, label=f"{name}training"
        )
        held = f"eval_{metric}" if metric == "kl" else "eval_ce"
        rows = [row for row in history if held in row]
        if rows:
            x, y = [row["tokens"] / 1e3 for row in rows], [row[held] for row in rows]
            ax.plot(
                x,
                y,
                "o",
                color=colour,
                markersize=5,
                markerfacecolor="white",
                clip_on=False,  # the one at 0 stands on the frame
                zorder=3,
                label=f"{name}held out",
            )
    log_ticks(ax)
    ax.set_xlim(left=0)
    ax.set_xlabel("training tokens (thousands)")
    ax.set_ylabel(f"{kind} (nats per token)")
    ax.legend(frameon=False)
    return finish(figure, path)


def plot_speed(
    tables: Mapping[str, Sequence[Mapping[str, float]]], path: str | os.PathLike | None = None
) -> Any:
    """Decoding speed and memory of a sequence over the tokens already in it.

    Parameters
    ----------
    tables : mapping of label to rows of `mambainllama.bench.speed`
    path : PNG to write, or None

    Returns
    -------
    matplotlib.figure.Figure
    """
    if not tables or not all(tables.values()):
        raise ArgumentError("plot: nothing was measured")
    figure, (left, right) = new_axes(2)
    for colour, (label, rows) in zip(COLOURS * len(tables), tables.items(), strict=False):
        lengths = [row["length"] for row in rows]
        left.plot(
            lengths,
            [row["decode_tokens_per_second"] for row in rows],
            "o-",
            color=colour,
            label=_valid_text(label),  # a folder's name may be no text
            markersize=4,
        )
        right.plot(
            lengths,
            [row["state_bytes"] / 2**20 for row in rows],
            "o-",
            color=colour,
            markersize=4,
        )
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(
            lambda value, _: f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"
        )
        ax.set_xlabel("tokens in the sequence")
    fastest = max(row["decode_tokens_per_second"] for rows in tables.values() for row in rows)
    left.set_ylim(0, 1.06 * fastest)  # markers whole
    left.set_ylabel("decoding speed (tokens/s, one sequence)")
    log_ticks(right)
    right.set_ylabel("memory of the sequence (MiB)")
    left.legend(frameon=False)
    return finish(figure, path)


def plot_layers(choice: Any, path: str | os.PathLike | None = None) -> Any:
    """What each layer's attention is worth, and which layers keep it.

    Parameters
    ----------
    choice : LayerChoice, from `mil.choose_layers`
    path : PNG to write, or None

    Returns
    -------
    matplotlib.figure.Figure
    """
    if not choice.scores:
        raise ArgumentError("plot: no layer was measured")
    figure, (ax,) = new_axes(1)
    for kept, colour, label in ((True, COLOURS[0], "attention"), (False, COLOURS[4], choice.mixer)):
        layers = [i for i in choice.scores if (i in choice.layers) == kept]
        if not layers:
            continue
        ax.bar(layers, [choice.scores[i] for i in layers], color=colour, label=label)
    every = 1 if len(choice.scores) <= 16 else 4
    ax.set_xticks(range(0, max(choice.scores) + 1, every))
    ax.set_xlabel("layer")
    effect = "added by replacing" if choice.method == "replace" else "saved by restoring"
    ax.set_ylabel(f"KL {effect} it (nats per token)")
    ax.set_title(f"KL {choice.kl:.3g}, evenly spread {choice.evenly:.3g}", fontsize="medium")
    ax.legend(frameon=False)
    return finish(figure, path)
