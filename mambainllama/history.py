"""What a training run leaves behind: one dictionary a logged step, as in metrics.jsonl.

>>> history = History([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "eval_kl": 1.4}])
>>> history.final["loss"]
1.5
>>> history.column("eval_kl")
([2], [1.4])
"""

from __future__ import annotations

import html
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import FormatError, NotFoundError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["History"]

# What a notebook's table shows, in this order, where the run has it.
SHOWN = (
    "step",
    "tokens",
    "loss",
    "kl",
    "ce",
    "on_policy_kl",
    "agreement",
    "margin",
    "accuracy",
    "eval_loss",
    "eval_margin",
    "eval_accuracy",
    "eval_kl",
    "eval_perplexity",
    "eval_agreement",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
)


class History(list):
    """A list of dictionaries, oldest first, that prints as a table and plots itself."""

    @classmethod
    def read(cls, path: str | os.PathLike) -> History:
        """The history of a run's folder, or of its metrics.jsonl."""
        path = Path(path)
        file = path / "metrics.jsonl" if path.is_dir() else path
        if not file.exists():
            raise NotFoundError(f"{file}: no such metrics file")
        history = cls()
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            try:
                history.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise FormatError(f"{file}:{number}: not a line of metrics ({error})") from None
        return history

    @property
    def final(self) -> dict[str, Any]:
        """The last value of every metric."""
        merged: dict[str, Any] = {}
        for row in self:
            merged.update(row)
        return merged

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one metric where it was measured."""
        rows = [row for row in self if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]

    def plot(self, path: str | os.PathLike | None = None) -> Figure:
        """Draws losses over tokens, to a PNG where `path` is given; returns the figure."""
        from .plot import plot_history

        return plot_history(self, path)

    def __repr__(self) -> str:
        if not self:
            return "History(no steps)"
        final = self.final
        shown = ", ".join(
            f"{name} {format_value(final[name])}" for name in SHOWN[1:] if name in final
        )
        return f"History({final['step']} steps: {shown})"

    def _repr_html_(self) -> str:
        names = [name for name in SHOWN if any(name in row for row in self)]
        # A long run is shown by evenly spaced rows, the last one always among them.
        stride = -(-len(self) // 20) or 1
        rows = self[::-stride][::-1]
        head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in names)
        body = "".join(
            "<tr>" + "".join(f"<td>{format_value(row.get(name))}</td>" for name in names) + "</tr>"
            for row in rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def format_value(value: Any) -> str:
    """A number as a reader wants it: integers with separators, others to four places."""
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}"
