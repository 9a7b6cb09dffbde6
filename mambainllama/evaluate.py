"""How close a student is to its teacher, and how well a model predicts text, on held-out tokens.

With t and s the teacher's and the student's distributions after each token,

    kl          mean over tokens of  sum t (log t - log s), in nats
    perplexity  exp(mean over tokens of  -log s[next token])
    agreement   share of tokens after which both think the same token likeliest

All three are sums in float64 over the rows of a batch, so figures repeat on one machine.

>>> mil.evaluate.compare(student, teacher, held_out)        # doctest: +SKIP
Comparison(kl=0.148, perplexity=18.4, teacher_perplexity=15.85, agreement=0.75, tokens=262144)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from . import _core
from .data import Batches, check_whole, read_documents
from .errors import ArgumentError
from .pairs import core_of, shared_vocabulary

__all__ = ["Comparison", "compare", "perplexity"]


@dataclass(frozen=True)
class Comparison:
    """A student against its teacher.

    Attributes
    ----------
    kl : float
        KL(teacher || student), nats a token.
    perplexity, teacher_perplexity : float
    agreement : float
        Share of tokens with the same likeliest next token, from 0 to 1.
    tokens : int
        Rows compared.
    """

    kl: float
    perplexity: float
    teacher_perplexity: float
    agreement: float
    tokens: int

    def to_dict(self) -> dict[str, float]:
        """All attributes, for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        return (
            f"Comparison(kl={self.kl:.4g}, perplexity={self.perplexity:.4g}, "
            f"teacher_perplexity={self.teacher_perplexity:.4g}, agreement={self.agreement:.4g}, "
            f"tokens={self.tokens})"
        )


def compare(
    student: Any,
    teacher: Any,
    data: Any,
    *,
    batch_size: int = 8,
    sequence_length: int = 2048,
    max_batches: int | None = None,
    loss_on: str = "all",
) -> Comparison:
    """KL, perplexities and agreement of a student and its teacher.

    Parameters
    ----------
    student, teacher : models with the same tokenizer
    data : as for `mil.distill`: token array (n, length), files, records
    batch_size, sequence_length : rows of a batch, tokens of a row
        They change memory and speed but no results, except that longer documents are cut.
    max_batches : int or None
        Stop after so many.
    loss_on : "all" or "answers"
        Which tokens of chats count.

    Returns
    -------
    Comparison

    Raises
    ------
    mil.ArgumentError
        Different tokenizers, or data without two tokens in a row.
    """
    ours, theirs = shared_vocabulary(student, teacher)
    batches = evaluation_batches(
        data,
        getattr(student, "tokenizer", None),
        ours.config["vocab"],
        batch_size,
        sequence_length,
        loss_on,
    )
    return comparison(run_batches(ours, theirs, batches, max_batches))


def perplexity(
    model: Any,
    data: Any,
    *,
    batch_size: int = 8,
    sequence_length: int = 2048,
    max_batches: int | None = None,
    loss_on: str = "all",
) -> float:
    """exp of the mean negative log-likelihood of the next token; arguments as for `compare`."""
    core = core_of(model)
    batches = evaluation_batches(
        data,
        getattr(model, "tokenizer", None),
        core.config["vocab"],
        batch_size,
        sequence_length,
        loss_on,
    )
    sums = run_batches(core, None, batches, max_batches)
    return perplexity_of(sums["ce"], sums["ce_rows"])


def evaluation_batches(
    data: Any, tokenizer: Any, vocab: int, batch_size: int, sequence_length: int, loss_on: str
) -> Batches:
    check_whole("batch_size", batch_size, 1)
    check_whole("sequence_length", sequence_length, 2)
    documents = read_documents(data, tokenizer, vocab=vocab, loss_on=loss_on)
    return Batches(documents, batch_size=batch_size, sequence_length=sequence_length, shuffle=False)


def run_batches(
    student: _core.Model, teacher: _core.Model | None, batches: Batches, max_batches: int | None
) -> dict[str, float]:
    """The sums of _core.evaluate over batches, in order."""
    if max_batches is not None:
        check_whole("max_batches", max_batches, 1)
    sums: dict[str, float] = {"tokens": 0}
    for number, batch in enumerate(batches):
        if max_batches is not None and number == max_batches:
            break
        found = _core.evaluate(
            student,
            teacher,
            batch.tokens,
            batch.offsets,
            labels=batch.labels,
            row_weight=batch.row_weight,
        )
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value
        sums["tokens"] += batch.counted
    return counted(sums)


def counted(sums: dict[str, float]) -> dict[str, float]:
    """The same sums; refused where no token counted, as there is no mean of none."""
    if not sums["ce_rows"]:
        raise ArgumentError(
            "evaluation: no token of these data counts: answers were cut off by sequence_length, "
            "or stand behind the batches that are read; take longer rows, more batches or other "
            "data"
        )
    return sums


def comparison(sums: Mapping[str, float]) -> Comparison:
    return Comparison(
        kl=sums["kl"] / sums["kl_rows"],
        perplexity=perplexity_of(sums["ce"], sums["ce_rows"]),
        teacher_perplexity=perplexity_of(sums["teacher_ce"], sums["ce_rows"]),
        agreement=sums["agree"] / sums["kl_rows"],
        tokens=int(sums["tokens"]),
    )


def perplexity_of(total: float, rows: float) -> float:
    mean = total / rows
    return math.inf if mean >= 700 else math.exp(mean)
