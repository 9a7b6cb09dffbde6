"""How much of its teacher a student has kept, by likelihood and by generation.

By likelihood, on held-out text, with t and s the two models' distributions after each token:

    kept          exp(-mean KL(t || s)): of the probability that the teacher gives its own words,
                  the share that the student gives them (geometric mean over words)
    same top      share of places where both think the same token likeliest
    perplexity    the teacher's divided by the student's, on the text itself

By generation, where a model goes on from its own words, and errors add up (likelihood hides that:
"When Perplexity Lies", arXiv 2603.26556):

    kept          exp(-mean KL(s || t)) on text that the student itself samples at temperature 1, as
                  answers to prompts: of the probability that it gives its own words, the share
                  that the teacher gives them; where it ends an answer counts as a word
    same start    the same prompts answered greedily by both: common beginning / longer answer, mean
                  over prompts; strict, since one other word ends it
    same answers  share of prompts on which the greedy answers are equal from beginning to end
    same words    tokens that both greedy answers hold, wherever they stand: 2 * common / sum of
                  lengths, mean over prompts

A student that is its teacher has 1 everywhere.  Prompts and seeds are fixed and sums are float64,
so figures repeat on one machine.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import _core
from .data import Batches, Documents
from .errors import ArgumentError
from .evaluate import comparison, run_batches
from .generate import Endings, Generation, generate
from .on_policy import batch_of, sample
from .pairs import shared_vocabulary

__all__ = ["Yardstick", "prompts_of"]

# Of text that is no chat, this many first tokens are the prompt, or half of a shorter text.
PROMPT_TOKENS = 32


class Yardstick:
    """Measures students against one teacher, on the same text and prompts.

    Parameters
    ----------
    teacher : model
    documents : Documents, held out
        With `targets`, only those tokens are compared (answers of chats).
    prompts : list of token lists
    tokens : about how many tokens of the documents are read; evenly spread documents are taken
    max_new_tokens : of each answer
    """

    def __init__(
        self,
        teacher: Any,
        documents: Documents,
        prompts: Sequence[Sequence[int]],
        *,
        tokens: int = 32_768,
        max_new_tokens: int = 64,
        sequence_length: int = 2048,
        batch_size: int = 8,
    ):
        self.teacher, self.prompts = teacher, [list(map(int, prompt)) for prompt in prompts]
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.batches = Batches(
            spread(documents, tokens),
            batch_size=batch_size,
            sequence_length=sequence_length,
            shuffle=False,
        )
        self._answers: list[Generation] | None = None

    def on_its_own_words(
        self, student: Any, ours: _core.Model, theirs: _core.Model
    ) -> float | None:
        """exp(-mean KL(student || teacher)) over the tokens that the student samples, those that
        end its answers among them; None where there are none."""
        stop = set(Endings.of(student, None).tokens)
        total, rows = 0.0, 0.0
        for at in range(0, len(self.prompts), self.batch_size):
            requests: list[dict[str, Any]] = [
                {
                    "prompt": np.array(prompt, np.int32),
                    "max_new_tokens": self.max_new_tokens,
                    "temperature": 1.0,
                    "seed": at + i,
                    "stop": [],
                }
                for i, prompt in enumerate(self.prompts[at : at + self.batch_size])
            ]
            samples = sample(ours, requests, stop)
            pairs = [(r["prompt"], new) for r, new in zip(requests, samples, strict=True)]
            batch = batch_of(pairs, len(pairs))
            found = _core.evaluate(
                ours,
                theirs,
                batch.tokens,
                batch.offsets,
                row_weight=batch.row_weight,
                direction="reverse",
            )
            total, rows = total + found["kl"], rows + found["kl_rows"]
        return math.exp(-total / rows) if rows else None

    @property
    def answers(self) -> list[Generation]:
        """The teacher's."""
        if self._answers is None:
            self._answers = self.answer(self.teacher)
        return self._answers

    def answer(self, model: Any) -> list[Generation]:
        """A model's greedy answers."""
        if not self.prompts:
            return []
        return generate(
            model, self.prompts, max_new_tokens=self.max_new_tokens, max_batch=self.batch_size
        )

    def measure(self, student: Any) -> dict[str, Any]:
        """{"likelihood": ..., "generation": ..., "answers": greedy texts, and what of them is the
        teacher's}."""
        ours, theirs = shared_vocabulary(student, self.teacher)
        found = comparison(run_batches(ours, theirs, self.batches, None))
        answers = self.answer(student)
        pairs = [
            (list(map(int, mine.token_ids)), list(map(int, its.token_ids)))
            for mine, its in zip(answers, self.answers, strict=True)
        ]
        return {
            "likelihood": {
                "kept": math.exp(-found.kl),
                "same_top": found.agreement,
                "perplexity_ratio": found.teacher_perplexity / found.perplexity,
                **found.to_dict(),
            },
            "generation": {
                "kept": self.on_its_own_words(student, ours, theirs),
                **greedy_kept(pairs),
            }
            if pairs
            else {},
            "answers": [
                {"text": answer.text, "start": self.words_of(pair[0][: common_beginning(*pair)])}
                for answer, pair in zip(answers, pairs, strict=True)
            ],
        }

    def words_of(self, tokens: list[int]) -> str:
        tokenizer = getattr(self.teacher, "tokenizer", None)
        return "" if tokenizer is None else tokenizer.decode(tokens)


def greedy_kept(pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, float]:
    """How alike greedy answers are, one or more, given as (student's, teacher's).

    >>> found = greedy_kept([([5, 6, 7, 8], [5, 6, 9, 7]), ([1, 2], [1, 2])])
    >>> found["same_start"], found["same_answers"], found["same_words"]
    (0.75, 0.5, 0.875)
    """
    starts = [common_beginning(a, b) / max(len(a), len(b)) if a or b else 1.0 for a, b in pairs]
    words = [
        2 * sum((Counter(a) & Counter(b)).values()) / (len(a) + len(b)) if a or b else 1.0
        for a, b in pairs
    ]
    return {
        "same_start": float(np.mean(starts)),
        "same_answers": float(np.mean([a == b for a, b in pairs])),
        "same_words": float(np.mean(words)),
        "prompts": len(pairs),
        "tokens": sum(len(b) for _, b in pairs),
    }


def common_beginning(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens are equal."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


def spread(documents: Documents, tokens: int) -> Documents:
    """Evenly spread documents of about so many tokens; all where there are fewer."""
    total = len(documents.tokens)
    if total <= tokens:
        return documents
    count = max(1, round(len(documents) * tokens / total))
    keep = np.zeros(len(documents), bool)
    keep[np.linspace(0, len(documents) - 1, count).astype(int)] = True
    return documents._select(keep)


def prompts_of(documents: Documents, count: int, longest: int) -> list[list[int]]:
    """Prompts from documents: a chat up to its first answer, the beginning of other text.

    Parameters
    ----------
    documents : Documents; `targets` tell where answers are
    count : how many, from documents spread evenly
    longest : tokens in a prompt at most; longer chats are passed over
    """
    prompts: list[list[int]] = []
    usable = 0
    order = np.linspace(0, len(documents) - 1, min(len(documents), 4 * count)).astype(int)
    for index in dict.fromkeys(order.tolist()):
        begin, end = int(documents.starts[index]), int(documents.starts[index + 1])
        length = min(PROMPT_TOKENS, (end - begin) // 2)
        if documents.targets is not None:
            targets = documents.targets[begin:end]
            first = int(np.argmax(targets))
            length = first if first > 0 else length if targets[0] else 0
        if 1 <= length <= longest:
            prompts.append(documents.tokens[begin : begin + length].tolist())
            usable += 1
    if not prompts:
        raise ArgumentError(
            f"no held-out document gives a prompt of 1 to {longest} tokens: name other [report] "
            "files, or set its prompts = 0"
        )
    chosen = np.linspace(0, usable - 1, min(usable, count)).astype(int)
    return [prompts[i] for i in dict.fromkeys(chosen.tolist())]
