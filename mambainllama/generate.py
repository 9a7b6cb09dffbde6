"""Generation: continue texts, token lists or chats, greedily or by sampling, with or without a
draft.

>>> [answer] = mil.generate(model, "Once upon a time", max_new_tokens=64)    # doctest: +SKIP
>>> answers = mil.generate(model, prompts, temperature=0.8, seed=[1, 2, 3])  # doctest: +SKIP
>>> mil.generate(model, prompts, draft="ngram")[0].stats.acceptance          # doctest: +SKIP

One call to the C core generates everything: prompts of any lengths share its forward passes,
finished ones leave and waiting ones join.  What a prompt yields does not depend on the others, nor
on `max_batch`: the same options and seed give the same tokens alone and in any company.

Filters are those of Hugging Face's ``generate`` in the same order: repetition penalty,
temperature, top-k, top-p, min-p (csrc/decode/sampler.h has the formulas).  Log-probabilities are
those of the model itself, before any filter.

Speculative decoding (`draft`) changes speed, not results: greedy tokens are the same, sampled
tokens have the same distribution (csrc/decode/speculate.c), though not the same values as without
a draft.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import _core
from .errors import ArgumentError, check_at_least, is_integer, shorten
from .memory import Call, Need, Text, footprint_of, plan_call
from .rope import fixed_until
from .tokenizer import _valid_text

__all__ = ["Generation", "GenerationStats", "Score", "generate", "score"]

MAX_DRAFT_TOKENS = _core.WINDOW - 1
# Tokens of the prompt that the decoder sees before the new ones, so that spaces and characters
# that begin in the prompt come out right.
_TEXT_CONTEXT = 8
# Tokens that all prompts must begin with before they are read once for all.
_WORTH_SHARING = 32


@dataclass(frozen=True)
class GenerationStats:
    """What one generation cost. Seconds are wall clock, so they contain other prompts' share of a
    batch.

    Attributes
    ----------
    prompt_tokens, new_tokens : int
    cached_tokens : int
        Tokens of the prompt that a given state had read already.
    rounds : int
        Forward passes after the prompt.
    drafted, accepted : int
        Tokens that a draft proposed, and those of them that the model kept.
    prefill_seconds, decode_seconds : float
        From joining the batch to the first token, and from there to the last one.
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    rounds: int
    drafted: int
    accepted: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def acceptance(self) -> float:
        """Accepted share of the drafted tokens; 0 where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass(frozen=True)
class Generation:
    """What a prompt yielded.

    Attributes
    ----------
    text : str
        The new text, cut before a stop string; "" where the model has no tokenizer.
    token_ids, prompt_token_ids : list of int
        The new tokens, without the stop token, but with those of a stop string; the prompt's.
    finish_reason : str
        "stop", "length" (max_new_tokens) or "cancelled" (by a callback).
    stats : GenerationStats
    logprobs : float64 array (new tokens,), or None where not asked for
        Log-probability of each new token, in nats.
    top_logprobs : list of dict of token id to log-probability, or None
        At each new token, the likeliest tokens there, most likely first.
    prompt_logprobs, prompt_top_logprobs
        The same for the prompt; NaN for its first token and for those that a state had read.
    state : mambainllama.State or None
        The state of the whole text where `states` was given; it has read its first `state.length`
        tokens.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: GenerationStats
    prompt_token_ids: list[int] = field(repr=False)
    logprobs: np.ndarray | None = field(default=None, repr=False)
    top_logprobs: list[dict[int, float]] | None = field(default=None, repr=False)
    prompt_logprobs: np.ndarray | None = field(default=None, repr=False)
    prompt_top_logprobs: list[dict[int, float]] | None = field(default=None, repr=False)
    state: _core.State | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Score:
    """How likely a model thinks a text.

    Attributes
    ----------
    token_ids : list of int
    logprobs : float64 array (tokens,)
        Log-probability of each token after those before it, in nats; NaN for the first.
    greedy : bool array (tokens,)
        Whether each token is the one that the model finds likeliest; False for the first.
    """

    token_ids: list[int]
    logprobs: np.ndarray = field(repr=False)
    greedy: np.ndarray = field(repr=False)

    @property
    def total(self) -> float:
        """Sum of the log-probabilities."""
        return float(np.nansum(self.logprobs))

    @property
    def perplexity(self) -> float:
        """exp of minus the mean; NaN for texts of one token."""
        return (
            math.exp(-self.total / (len(self.token_ids) - 1))
            if len(self.token_ids) > 1
            else math.nan
        )


def generate(
    model: Any,
    prompts: Any,
    max_new_tokens: int | Sequence[int] = 128,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    seed: int | Sequence[int] = 0,
    stop: Any = None,
    draft: Any = None,
    draft_tokens: int = 4,
    *,
    min_p: float | Sequence[float] = 0.0,
    repetition_penalty: float | Sequence[float] = 1.0,
    adapt_draft: bool = True,
    logprobs: bool = False,
    prompt_logprobs: bool = False,
    top_logprobs: int = 0,
    on_text: Callable[[int, str], Any] | None = None,
    on_tokens: Callable[[int, list[int]], Any] | None = None,
    states: Sequence[_core.State | None] | None = None,
    max_batch: int | None = None,
    prefill_rows: int | None = None,
    progress: bool = False,
    skip_special_tokens: bool = True,
) -> list[Generation]:
    """Continues each prompt.

    Parameters
    ----------
    model
        From `mil.load` or `mil.convert`.
    prompts
        One prompt or a list of them. A prompt is a str, a list of token ids, or a chat (a list of
        messages, each a dict of role and content), which goes through the tokenizer's template.
    max_new_tokens
        The most tokens to add. 0 only reads the prompt.
    temperature
        0 takes the likeliest token; otherwise logits are divided by it.
    top_k, top_p, min_p
        Keep the k likeliest tokens (0: all); the likeliest that hold this much probability (1:
        all); those with at least this share of the likeliest one's probability (0: all).
    seed
        The random draws of a prompt depend on its seed and on positions only, so equal prompts with
        equal seeds give equal texts; for several samples of one prompt give several seeds.
    stop
        Token ids or strings that end the text, one or a list. None: the model's own end tokens.
        []: nothing. Strings alone leave the model's end tokens in force; token ids replace them.
    draft
        A smaller model with the same tokenizer, or "ngram": tokens are copied from where the
        text's last words occurred before.
    draft_tokens
        The most tokens to draft in a round, up to 15. How many are drafted follows how many were
        accepted so far (`adapt_draft`), down to none where drafting does not pay.
    adapt_draft
        False drafts `draft_tokens` in every round. True decides by the text's own acceptance; on a
        GPU by that of the whole batch, so there sampled texts may differ with their company.
    repetition_penalty
        Above 1 makes tokens that occur in the prompt or the answer less likely.
    logprobs, prompt_logprobs, top_logprobs
        Log-probabilities of the new tokens, of the prompt's, and of so many likeliest tokens at
        each of them.
    on_text, on_tokens
        Called with the prompt's index and what was added, as soon as it is certain. Text that
        might become a stop string is held back. Returning True ends that prompt ("cancelled").
    states
        For each prompt, None or a state (`model.state()`) that has read the first `state.length`
        tokens of the prompt; the rest is computed, and the state goes on to read what is
        generated. Copy a state to use it more than once.
    max_batch
        Prompts that run at once; the others wait. By default 16, or as many as memory has room for.
    prefill_rows
        Tokens of prompts that are read in one pass; by default what the device likes and memory
        has room for.
    progress
        Show a bar of finished prompts on a terminal.
    skip_special_tokens
        Leave special tokens out of `text`.

    Notes
    -----
    `max_new_tokens`, `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty` and `seed` may
    also be sequences with one value for each prompt.

    Returns
    -------
    list of Generation
        One for each prompt, in order.

    Raises
    ------
    ArgumentError, DtypeError, StateError
        Something was asked for that makes no sense; the message names it. Nothing is generated
        then.
    NonFiniteError
        The model's logits are NaN or infinite.
    OutOfMemoryError
        What was asked for needs more memory than is free (`mil.memory_plan` shows it): said before
        anything is generated, with the settings that would fit.

    Examples
    --------
    >>> mil.generate(model, "The key is", stop=[".", "\\n"])                  # doctest: +SKIP
    >>> mil.generate(model, [{"role": "user", "content": "Hello"}])           # doctest: +SKIP
    >>> mil.generate(target, prompts, draft=small, temperature=1.0, seed=1)   # doctest: +SKIP
    """
    tokens = read_prompts(model, prompts)
    count = len(tokens)
    endings = Endings.of(model, stop)
    options = {
        "max_new_tokens": one_each("max_new_tokens", max_new_tokens, count),
        "temperature": one_each("temperature", temperature, count),
        "top_k": one_each("top_k", top_k, count),
        "top_p": one_each("top_p", top_p, count),
        "min_p": one_each("min_p", min_p, count),
        "repetition_penalty": one_each("repetition_penalty", repetition_penalty, count),
        "seed": one_each("seed", seed, count),
        "state": check_states(states, count),
    }
    common = {
        "stop": endings.tokens,
        "logprobs": bool(logprobs or top_logprobs),
        "prompt_logprobs": bool(prompt_logprobs),
        "top_logprobs": top_logprobs,
        "draft_tokens": check_draft_tokens(draft_tokens),
        "fixed_draft": not adapt_draft,
    }
    requests = [
        {"prompt": tokens[i], **common, **{key: values[i] for key, values in options.items()}}
        for i in range(count)
    ]
    draft_core = check_draft(model, draft)
    check_callbacks("generate", on_text=on_text, on_tokens=on_tokens)
    need = plan_requests("generate", model, requests, draft, max_batch, prefill_rows)
    share_beginning(core_of(model), requests)
    watch = bool(endings.strings or on_text or on_tokens)
    writers = (
        [Writer(model, ids, endings.strings, skip_special_tokens) for ids in tokens]
        if watch
        else []
    )
    results: list[Any] = [None] * count
    with progress_bar(progress, count) as bar:

        def finished(index: int, result: dict[str, Any]) -> None:
            if writers and on_text and (rest := writers[index].finish()):
                on_text(index, rest)
            results[index] = result
            bar.update()

        _core.generate(
            core_of(model),
            requests,
            draft=draft_core,
            max_batch=need.batch,
            prefill_rows=need.prefill_rows,
            workspace=need.reserve,
            on_tokens=listener(writers, on_text, on_tokens) if watch else None,
            on_finish=finished,
        )
    texts = [
        writers[i].close() if writers else decode(model, tokens[i], results[i], skip_special_tokens)
        for i in range(count)
    ]
    return [
        as_generation(text, result, ids, state)
        for text, result, ids, state in zip(texts, results, tokens, options["state"], strict=True)
    ]


def score(
    model: Any, texts: Any, *, max_batch: int | None = None, progress: bool = False
) -> list[Score]:
    """Log-probability of every token of each text.

    Parameters
    ----------
    model
        From `mil.load` or `mil.convert`.
    texts
        As `prompts` of `generate`: str, token lists or chats (without the opening of an answer).
    max_batch, progress
        Texts that are read at once, and a bar, as for `generate`.

    Returns
    -------
    list of Score
        One for each text, in order.

    Raises
    ------
    ArgumentError, DtypeError, OutOfMemoryError
        As for `generate`.
    NonFiniteError
        The model's logits are NaN or infinite.

    Examples
    --------
    >>> [found] = mil.score(model, "Once upon a time")             # doctest: +SKIP
    >>> found.perplexity, found.greedy.mean()                      # doctest: +SKIP
    """
    tokens = read_prompts(model, texts, open_answer=False)
    request = {"max_new_tokens": 0, "prompt_logprobs": True, "top_logprobs": 1}
    with progress_bar(progress, len(tokens)) as bar:
        results: list[Any] = [None] * len(tokens)

        def finished(index: int, result: dict[str, Any]) -> None:
            results[index] = result
            bar.update()

        requests = [{"prompt": ids, **request} for ids in tokens]
        need = plan_requests("score", model, requests, None, max_batch, None)
        _core.generate(
            core_of(model),
            requests,
            max_batch=need.batch,
            prefill_rows=need.prefill_rows,
            workspace=need.reserve,
            on_finish=finished,
        )
    return [
        Score(ids.tolist(), result["prompt_logprobs"], result["prompt_top_tokens"][:, 0] == ids)
        for ids, result in zip(tokens, results, strict=True)
    ]


# ---- prompts and options ------------------------------------------------------------------------


def core_of(model: Any, name: str = "model") -> _core.Model:
    """The C core of a model, which may be given itself."""
    core = getattr(model, "core", model)
    if not isinstance(core, _core.Model):
        raise ArgumentError(
            f"generate: {name} must come from mil.load or mil.convert, not {shorten(model)}"
        )
    return core


def tokenizer_of(model: Any) -> Any:
    return getattr(model, "tokenizer", None)


def is_one_prompt(prompts: Any) -> bool:
    """A str, a chat, or a list of token ids, as opposed to a list of such."""
    if isinstance(prompts, (str, Mapping)):
        return True
    if isinstance(prompts, np.ndarray):
        return prompts.ndim == 0 or prompts.ndim == 1 and np.issubdtype(prompts.dtype, np.integer)
    return len(prompts) > 0 and (isinstance(prompts[0], Mapping) or is_integer(prompts[0]))


def read_prompts(model: Any, prompts: Any, open_answer: bool = True) -> list[np.ndarray]:
    """The tokens of each prompt, int32, checked against the vocabulary."""
    if not isinstance(prompts, (str, Mapping, np.ndarray, Sequence)):
        prompts = list(prompts) if hasattr(prompts, "__iter__") else [prompts]
    listed = [prompts] if is_one_prompt(prompts) else list(prompts)
    vocab = core_of(model).config["vocab"]
    return [read_prompt(model, prompt, i, vocab, open_answer) for i, prompt in enumerate(listed)]


def read_prompt(model: Any, prompt: Any, index: int, vocab: int, open_answer: bool) -> np.ndarray:
    if isinstance(prompt, Mapping):
        prompt = [prompt]
    is_chat = (
        isinstance(prompt, (list, tuple)) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
    )
    if isinstance(prompt, str) or is_chat:
        tokenizer = tokenizer_of(model)
        if tokenizer is None:
            raise ArgumentError(
                "generate: this model has no tokenizer; give token ids, or set model.tokenizer"
            )
        if is_chat:
            text = tokenizer.apply_chat_template(prompt, add_generation_prompt=open_answer)
            ids = tokenizer.encode(text, add_special_tokens=False)
        else:
            ids = tokenizer.encode(prompt)
    else:
        ids = prompt
    try:
        array = np.asarray(ids)
    except ValueError:
        array = np.empty((0, 0))
    if array.size == 0 and array.ndim == 1:
        raise ArgumentError(f"generate: prompt {index} is empty; give at least one token")
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ArgumentError(
            f"generate: prompt {index} must be a str, a list of token ids or a chat, "
            f"not {shorten(prompt)}"
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= vocab:
        wrong = low if low < 0 else high
        raise ArgumentError(
            f"generate: prompt {index} holds token {wrong}; "
            f"the model's vocabulary is 0 to {vocab - 1}"
        )
    return array.astype(np.int32)


def one_each(name: str, value: Any, count: int) -> list[Any]:
    """The value for each prompt, from one for all or a sequence."""
    if (
        isinstance(value, (Sequence, np.ndarray))
        and not isinstance(value, (str, bytes))
        and np.ndim(value) == 1
    ):
        if len(value) != count:
            raise ArgumentError(f"generate: {name} has {len(value)} values for {count} prompts")
        return list(value)
    return [value] * count


def check_states(states: Any, count: int) -> list[Any]:
    if states is None:
        return [None] * count
    listed = list(states) if isinstance(states, Iterable) else [states]
    if not all(state is None or isinstance(state, _core.State) for state in listed):
        raise ArgumentError(
            "generate: states must be a list with None or a state (model.state() makes one) for "
            f"each prompt, not {shorten(states)}"
        )
    if len(listed) != count:
        raise ArgumentError(f"generate: states has {len(listed)} entries for {count} prompts")
    return listed


def check_callbacks(what: str, **callbacks: Any) -> None:
    for name, callback in callbacks.items():
        if callback is not None and not callable(callback):
            raise ArgumentError(f"{what}: {name} must be a function, not {shorten(callback)}")


def check_draft_tokens(draft_tokens: Any) -> int:
    if not is_integer(draft_tokens) or not 0 <= draft_tokens <= MAX_DRAFT_TOKENS:
        raise ArgumentError(
            f"generate: draft_tokens must be an integer from 0 to {MAX_DRAFT_TOKENS}, "
            f"not {shorten(draft_tokens)}"
        )
    return int(draft_tokens)


def check_draft(model: Any, draft: Any) -> Any:
    """The draft as the core takes it. A draft model must mean the same words by the same
    numbers."""
    if draft is None:
        return None
    if isinstance(draft, str):
        if draft != "ngram":
            raise ArgumentError(
                'generate: draft must be a model (mil.load gives one) or "ngram", '
                f"not {shorten(draft)}"
            )
        return draft
    core = core_of(draft, "draft")
    ours, theirs = tokenizer_of(model), tokenizer_of(draft)
    if ours is not None and theirs is not None and ours is not theirs:
        words, their_words = ours.backend.get_vocab(), theirs.backend.get_vocab()
        if words != their_words:
            odd = min(word for word, _ in words.items() ^ their_words.items())
            raise ArgumentError(
                f"generate: the draft's tokenizer differs from the model's (in {odd!r}, "
                "for example); a draft must share the model's tokenizer"
            )
        return core
    size, draft_size = core_of(model).config["vocab"], core.config["vocab"]
    known = ours or theirs
    if size != draft_size and (known is None or known.vocab_size > min(size, draft_size)):
        raise ArgumentError(
            f"generate: the draft's vocabulary is {draft_size}, the model's {size}, and no "
            "tokenizer says that the rest is padding; a draft must share the model's tokenizer"
        )
    return core


def plan_requests(
    what: str,
    model: Any,
    requests: Sequence[Mapping[str, Any]],
    draft: Any,
    max_batch: int | None,
    prefill_rows: int | None,
) -> Need:
    """How these requests run in the memory that is free; see `memory.plan_call`.

    A senseless number in a request is left to the core, whose message names it.
    """
    for name, value in (("max_batch", max_batch), ("prefill_rows", prefill_rows)):
        if value is not None:
            check_at_least(what, name, value, 1)
    drafted = max((r.get("draft_tokens", 0) for r in requests), default=0) if draft else 0
    texts = [text_of(request) for request in requests]
    first = footprint_of(model)
    second = None if draft is None or isinstance(draft, str) else footprint_of(draft)
    shared = first.text(shared_length(core_of(model), requests)) if len(requests) > 1 else 0
    call = Call(first, texts or [Text(1, 0)], second, drafted, shared)
    return plan_call(what, call, max_batch, prefill_rows)


def text_of(request: Mapping[str, Any]) -> Text:
    """What a request may grow to."""
    new, state = request.get("max_new_tokens", 128), request.get("state")
    known = is_integer(new) and new > 0  # as Python's integer: a sum with NumPy's may wrap
    return Text(len(request["prompt"]), int(new) if known else 0, state.capacity if state else 0)


def share_beginning(core: _core.Model, requests: list[dict[str, Any]]) -> None:
    """Where all prompts begin alike (one prompt sampled many times, a system message, examples),
    that part is read once and each request starts from a copy of the state. The results are the
    same bits."""
    length = shared_length(core, requests)
    if length == 0:
        return
    origin = core.state(length)
    reading = {"prompt": requests[0]["prompt"][:length], "max_new_tokens": 0, "state": origin}
    _core.generate(core, [reading])
    for request in requests:
        request["origin"] = origin


def shared_length(core: _core.Model, requests: Sequence[Mapping[str, Any]]) -> int:
    """Tokens that all prompts begin with, where reading them once is worth it; else 0."""
    prompts = [request["prompt"] for request in requests]
    if len(prompts) < 2 or any(request.get("state") is not None for request in requests):
        return 0
    if max(map(len, prompts)) > fixed_until(core.config.get("rope")):
        return 0
    shortest = min(map(len, prompts))
    differs = np.zeros(shortest, bool)
    for prompt in prompts[1:]:
        differs |= prompt[:shortest] != prompts[0][:shortest]
    # Each prompt keeps at least one token to predict from.
    length = min(int(differs.argmax()) if differs.any() else shortest, shortest - 1)
    if length < _WORTH_SHARING or any(request.get("prompt_logprobs") for request in requests):
        return 0
    return length


@dataclass(frozen=True)
class Endings:
    """What ends a text."""

    tokens: list[int]
    strings: list[str]

    @classmethod
    def of(cls, model: Any, stop: Any) -> Endings:
        own = [int(token) for token in getattr(model, "stop_tokens", ())]
        if stop is None:
            return cls(own, [])
        if isinstance(stop, str) or is_integer(stop):
            stop = [stop]
        listed = isinstance(stop, (Sequence, np.ndarray, set, frozenset))
        if not listed or isinstance(stop, (bytes, bytearray)):
            raise ArgumentError(f"generate: stop must be strings or token ids, not {shorten(stop)}")
        items = list(stop)
        tokens = [int(item) for item in items if is_integer(item)]
        strings = [_valid_text(item) for item in items if isinstance(item, str)]
        if len(tokens) + len(strings) < len(items) or "" in strings:
            raise ArgumentError(
                "generate: stop must be token ids or strings that are not empty, "
                f"not {shorten(stop)}"
            )
        if strings and tokenizer_of(model) is None:
            raise ArgumentError("generate: this model has no tokenizer, so stop must be token ids")
        if strings and not tokens:
            tokens = own
        # A special token leaves no trace in the decoded text, so its string is looked for as a
        # token.
        tokenizer = tokenizer_of(model)
        for string in strings:
            token = tokenizer.token_to_id(string)
            if token is not None and token not in tokens and tokenizer.decode([token]) == "":
                tokens = [*tokens, token]
        return cls(tokens, strings)


# ---- text as it comes ---------------------------------------------------------------------------


class Writer:
    """The text of one prompt's answer, token by token, up to a stop string."""

    def __init__(self, model: Any, prompt: np.ndarray, stops: list[str], skip_special_tokens: bool):
        tokenizer = tokenizer_of(model)
        self.stream = None if tokenizer is None else tokenizer.stream(skip_special_tokens)
        if self.stream is not None:
            for token in prompt[-_TEXT_CONTEXT:].tolist():
                self.stream.push(token)
        # The end of a prompt whose last character may be incomplete: the prompt's own unless the
        # answer makes another character of it.
        self.before = "" if self.stream is None else self.stream.held()
        self.stops = stops
        self.text = ""
        self.given = 0
        self.stopped = False

    def push(self, tokens: list[int]) -> tuple[str, int | None]:
        """The text that is certain now, and how many of the tokens to keep if a stop string
        came."""
        if self.stream is None:
            return "", None
        for i, token in enumerate(tokens):
            if self.add(self.stream.push(token)):
                return self.give(len(self.text)), i + 1
        return self.give(len(self.text) - self.held_back()), None

    def finish(self) -> str:
        """What is left to give when no more tokens come."""
        if self.stream is not None and not self.stopped:
            self.add(self.stream.finish())
        return self.give(len(self.text))

    def close(self) -> str:
        self.finish()
        return self.text

    def add(self, piece: str) -> bool:
        """Adds text; True where it completed a stop string, which is then cut off."""
        if piece and self.before:
            piece, self.before = piece.removeprefix(self.before), ""
        longest = max(map(len, self.stops), default=0)
        start = max(0, len(self.text) - longest + 1)
        self.text += piece
        found = [at for at in (self.text.find(stop, start) for stop in self.stops) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True
        return bool(found)

    def held_back(self) -> int:
        """Characters at the end that may turn out to begin a stop string."""
        most = 0
        for stop in self.stops:
            for length in range(min(len(stop) - 1, len(self.text)), most, -1):
                if self.text.endswith(stop[:length]):
                    most = length
                    break
        return most

    def give(self, end: int) -> str:
        piece = self.text[self.given : end]
        self.given = max(self.given, end)
        return piece


def says_stop(answer: Any) -> bool:
    """Whether a callback returned True, NumPy's included; nothing else that counts as true does."""
    return answer is True or answer is np.True_


def listener(
    writers: list[Writer], on_text: Any, on_tokens: Any
) -> Callable[[int, list[int]], int | None]:
    """The core's callback: None goes on, n >= 0 ends after n of the tokens, -1 cancels."""

    def hear(index: int, tokens: list[int]) -> int | None:
        piece, keep = writers[index].push(tokens)
        cancel = False
        if on_tokens:
            cancel = says_stop(on_tokens(index, tokens[:keep]))
        if on_text and piece:
            cancel = says_stop(on_text(index, piece)) or cancel
        return keep if keep is not None else -1 if cancel else None

    return hear


def decode(
    model: Any, prompt: np.ndarray, result: dict[str, Any], skip_special_tokens: bool
) -> str:
    """The new tokens' text, as the continuation of the prompt."""
    tokenizer = tokenizer_of(model)
    if tokenizer is None:
        return ""
    context = prompt[-_TEXT_CONTEXT:].tolist()
    before = tokenizer.decode(context, skip_special_tokens)
    whole = tokenizer.decode([*context, *result["tokens"].tolist()], skip_special_tokens)
    if not whole.startswith(before):  # the prompt ends inside a character that the answer completes
        before = before.rstrip("\ufffd")
    if not whole.startswith(before):  # a decoder that rewrites across the border
        return tokenizer.decode(result["tokens"], skip_special_tokens)
    return whole[len(before) :]


# ---- results ------------------------------------------------------------------------------------


def as_generation(text: str, result: dict[str, Any], prompt: np.ndarray, state: Any) -> Generation:
    return Generation(
        text=text,
        token_ids=result["tokens"].tolist(),
        finish_reason=result["finish_reason"],
        stats=GenerationStats(**result["stats"]),
        prompt_token_ids=prompt.tolist(),
        logprobs=result["logprobs"],
        top_logprobs=as_dicts(result["top_tokens"], result["top_logprobs"]),
        prompt_logprobs=result["prompt_logprobs"],
        prompt_top_logprobs=as_dicts(result["prompt_top_tokens"], result["prompt_top_logprobs"]),
        state=state,
    )


def as_dicts(tokens: np.ndarray | None, values: np.ndarray | None) -> list[dict[int, float]] | None:
    """One dict a row; rows without values (token -1) are empty. None where nothing was asked
    for."""
    if tokens is None or values is None or tokens.ndim != 2:
        return None
    return [
        {token: value for token, value in zip(row, row_values, strict=True) if token >= 0}
        for row, row_values in zip(tokens.tolist(), values.tolist(), strict=True)
    ]


class NoBar:
    def __enter__(self) -> NoBar:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def update(self) -> None:
        pass


def progress_bar(wanted: bool, count: int) -> Any:
    if not wanted:
        return NoBar()
    from tqdm import tqdm

    return tqdm(total=count, desc="generate", unit="prompt", disable=None)
