"""On-policy distillation: the student writes, the teacher corrects.

A student that is only shown good text never sees the text that its own mistakes lead to.  So at a
share of the steps (`DistillConfig.on_policy`, lambda in the paper) the batch's continuations are
replaced by ones that the student samples at that moment, with this library's own decoder, and the
divergence from the teacher is taken on the sampled tokens.  Nothing is differentiated through the
sampling.

A prompt is what stands before an answer of a chat (one of its answers, drawn at random), or the
first `on_policy_prompt` tokens of a text.  Whether a step is on-policy, which answers are drawn and
what is sampled depend on the seed, the step's number and the weights alone, so a resumed run
samples the same tokens.

References
----------
Agarwal et al. 2024, "On-policy distillation of language models: learning from self-generated
mistakes" (GKD, arXiv 2306.13649), algorithm 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _core
from .data import Batch

__all__ = ["is_on_policy", "sample_continuations"]


def is_on_policy(seed: int, step: int, share: float) -> bool:
    """Whether step `step` is one of the `share` of steps that sample."""
    return share > 0 and np.random.default_rng([seed, 3, step]).random() < share


def sample_continuations(
    core: _core.Model,
    batches: list[Batch],
    *,
    stop: list[int],
    prompt_length: int,
    new_tokens: int,
    sequence_length: int,
    temperature: float,
    seed: int,
    step: int,
) -> list[Batch]:
    """The same prompts with continuations of the model's own; only sampled tokens count.

    Parameters
    ----------
    batches : a step's micro-batches; where `row_weight` is given it tells what answers are
    stop : tokens that end a text; the one that came is part of the sample
    prompt_length : tokens of a text without answers that are its prompt, at most half of it
    new_tokens : sampled at most; a prompt and its sample fit in `sequence_length`
    """
    draw = np.random.default_rng([seed, 4, step])
    prompts = [prompt for batch in batches for prompt in prompts_of(batch, prompt_length, draw)]
    requests: list[dict[str, Any]] = []
    for prompt in prompts:
        prompt = prompt[: sequence_length - 1]
        requests.append(
            {
                "prompt": prompt,
                "max_new_tokens": min(new_tokens, sequence_length - len(prompt)),
                "temperature": temperature,
                "seed": int(draw.integers(1 << 62)),
                "stop": [],
            }
        )
    samples = sample(core, requests, set(stop))
    found, first = [], 0
    for batch in batches:
        end = first + len(batch.offsets) - 1
        pairs = [(requests[i]["prompt"], samples[i]) for i in range(first, end)]
        found.append(batch_of(pairs, batch.rows))
        first = end
    return found


def prompts_of(batch: Batch, prompt_length: int, draw: np.random.Generator) -> list[np.ndarray]:
    """The beginning of each sequence, up to an answer or of a fixed length."""
    prompts = []
    for begin, end in zip(batch.offsets[:-1], batch.offsets[1:], strict=True):
        tokens = batch.tokens[begin:end]
        count = min(prompt_length, len(tokens) // 2)
        if batch.row_weight is not None:
            counts = batch.row_weight[begin:end] > 0
            openings = np.flatnonzero(counts & ~np.append(False, counts[:-1])) + 1
            if len(openings):
                count = int(draw.choice(openings))
        prompts.append(tokens[: max(1, count)])
    return prompts


def sample(core: _core.Model, requests: list[dict[str, Any]], stop: set[int]) -> list[np.ndarray]:
    """New tokens of each request, the one that ended it among them."""
    results: list[Any] = [None] * len(requests)

    def hear(index: int, tokens: list[int]) -> int | None:
        return next((i + 1 for i, token in enumerate(tokens) if token in stop), None)

    def finished(index: int, result: dict[str, Any]) -> None:
        results[index] = result["tokens"]

    _core.generate(core, requests, max_batch=len(requests), on_tokens=hear, on_finish=finished)
    return results


def batch_of(pairs: list[tuple[np.ndarray, np.ndarray]], rows: int) -> Batch:
    """(prompt, sample) pairs as documents in which only the samples' tokens count."""
    texts = [np.concatenate(pair).astype(np.int32) for pair in pairs]
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    tokens = np.concatenate(texts)
    labels = np.append(tokens[1:], -1).astype(np.int32)
    labels[offsets[1:] - 1] = -1
    weight = np.zeros(len(tokens), np.float32)
    for (prompt, sampled), begin in zip(pairs, offsets[:-1], strict=True):
        at = begin + len(prompt) - 1
        weight[at : at + len(sampled)] = 1
    return Batch(tokens, offsets, labels, weight, rows)
