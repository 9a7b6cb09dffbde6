"""An engine: one thread that generates for many others, in one batch.

Requests may come at any time and from any thread; they join the running batch at its next round,
which is what a server needs (continuous batching).  Finished texts leave their states behind for a
while, so a chat's next turn, or another question about the same document, only reads what is new.

>>> with Engine(model) as engine:                                      # doctest: +SKIP
...     tickets = [engine.submit(prompt, max_new_tokens=64) for prompt in prompts]
...     for piece in tickets[0]:                                       # text as it comes
...         print(piece, end="")
...     answers = [ticket.result() for ticket in tickets]
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import _core
from .errors import ArgumentError, OutOfMemoryError, StateError, check_at_least
from .generate import (
    Endings,
    Generation,
    Writer,
    as_generation,
    check_callbacks,
    check_draft,
    check_draft_tokens,
    core_of,
    read_prompts,
    says_stop,
    text_of,
)
from .memory import Call, Text, available, footprint_of, plan_call
from .rope import fixed_until

__all__ = ["Engine", "Ticket"]

#: Tokens of a text that an engine makes room for where nobody says how long texts are.
_CONTEXT = 4096

_OPTIONS = (
    "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed",
    "logprobs", "prompt_logprobs", "top_logprobs", "draft_tokens",
)  # fmt: skip


class Ticket:
    """A request that is being worked on.

    Iterating gives the text piece by piece; `result` waits for the whole.
    """

    def __init__(self, prompt: np.ndarray, writer: Writer, on_text: Callable[[str], Any] | None):
        self._prompt, self._writer, self._on_text = prompt, writer, on_text
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._done = threading.Event()
        self._outcome: Generation | BaseException | None = None
        self._cancelled = False
        self._mishap: BaseException | None = None  # what its on_text raised
        self._state: _core.State | None = None

    def result(self, timeout: float | None = None) -> Generation:
        """The finished generation.

        Raises
        ------
        TimeoutError
            It is not finished yet.
        Error
            What went wrong; whatever `on_text` raised.
        """
        if not self._done.wait(timeout):
            raise TimeoutError("the generation is not finished yet")
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome

    def __iter__(self) -> Iterator[str]:
        while (piece := self._pieces.get()) is not None:
            yield piece
        self._pieces.put(None)  # whoever iterates again, or beside, ends too
        self.result()

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def cancel(self) -> None:
        """Ends it at its next token; the result has finish_reason "cancelled"."""
        self._cancelled = True

    def _tell(self, piece: str) -> None:
        if not piece:
            return
        self._pieces.put(piece)
        if self._on_text is None or self._mishap is not None:
            return
        try:
            self._cancelled |= says_stop(self._on_text(piece))
        except BaseException as error:  # its sender's affair, like every mistake in a request
            self._mishap, self._cancelled = error, True

    def _finish(self, outcome: Generation | BaseException) -> None:
        self._outcome = outcome if self._mishap is None else self._mishap
        self._done.set()
        self._pieces.put(None)


class Engine:
    """Generates for many threads at once.

    Parameters
    ----------
    model
        From `mil.load` or `mil.convert`.
    draft
        As for `mil.generate`.
    max_batch
        Requests that run at once; the others wait. By default 16, or as many texts of 4096 tokens
        as memory has room for. Where longer ones leave no room for the next, it waits.
    cached_states
        How many finished texts' states to keep for prompts that begin with them; 0: none. A state
        takes `model.core.state_bytes(length)` bytes; on a GPU they go where memory is wanted.

    Raises
    ------
    OutOfMemoryError
        Not even one text has room beside the model.
    """

    def __init__(
        self,
        model: Any,
        draft: Any = None,
        max_batch: int | None = None,
        cached_states: int = 8,
    ):
        self.model, self.core = model, core_of(model)
        self._draft = check_draft(model, draft)
        if max_batch is not None:
            check_at_least("Engine", "max_batch", max_batch, 1)
        check_at_least("Engine", "cached_states", cached_states, 0)
        self._footprints = (
            footprint_of(model),
            None if draft is None or isinstance(draft, str) else footprint_of(draft),
        )
        self._room = available(self._footprints[0].device)
        self._need = plan_call(
            "Engine",
            self._call([Text(1, _CONTEXT if max_batch is None else 1)] * 16),
            max_batch,
            None,
        )
        self._max_batch = self._need.batch if max_batch is None else max_batch
        self._cache = StateCache(self.core, cached_states)
        self._condition = threading.Condition()
        self._arrived: deque[tuple[Ticket, dict[str, Any]]] = deque()
        self._tickets: dict[int, Ticket] = {}
        self._count = 0
        self._closed = False
        self._failure = ""  # why it closed, where nobody closed it
        self._thread = threading.Thread(target=self._run, name="mambainllama engine", daemon=True)
        self._thread.start()

    def _call(self, texts: list[Text], draft_tokens: int = 4) -> Call:
        return Call(
            self._footprints[0],
            texts,
            self._footprints[1],
            0 if self._draft is None else draft_tokens,
        )

    def submit(
        self,
        prompt: Any,
        *,
        stop: Any = None,
        on_text: Callable[[str], Any] | None = None,
        skip_special_tokens: bool = True,
        **options: Any,
    ) -> Ticket:
        """Queues one prompt; returns at once.

        Parameters
        ----------
        prompt
            A str, token ids, or a chat, as for `mil.generate`.
        on_text
            Called with each piece of text, in the engine's thread: keep it short. True cancels;
            what it raises ends this text alone, and `Ticket.result` raises it.
        stop, skip_special_tokens, options
            As for `mil.generate`.

        Raises
        ------
        ArgumentError
            The prompt or an option's name makes no sense. (A senseless value is `Ticket.result`'s
            error.)
        OutOfMemoryError
            The text would not fit even alone.
        """
        unknown = [name for name in options if name not in _OPTIONS]
        if unknown:
            raise ArgumentError(
                f"submit: unknown option {unknown[0]}; there are {', '.join(_OPTIONS)}"
            )
        prompts = read_prompts(self.model, prompt)
        if len(prompts) != 1:
            raise ArgumentError(f"submit: expected one prompt, got {len(prompts)}")
        check_callbacks("submit", on_text=on_text)
        if "draft_tokens" in options:
            check_draft_tokens(options["draft_tokens"])
        endings = Endings.of(self.model, stop)
        writer = Writer(self.model, prompts[0], endings.strings, skip_special_tokens)
        ticket = Ticket(prompts[0], writer, on_text)
        if options.get("top_logprobs"):
            options["logprobs"] = True
        request = {"prompt": prompts[0], "stop": endings.tokens, **options}
        alone = self._call([text_of(request)], options.get("draft_tokens", 4))
        plan_call("submit", alone, 1, self._need.prefill_rows, free=self._room)
        with self._condition:
            if self._closed:
                raise StateError(f"submit: the engine is closed{self._failure}")
            self._arrived.append((ticket, request))
            self._condition.notify()
        return ticket

    def close(self, wait: bool = True) -> None:
        """Finishes what was submitted, then stops. New requests are refused at once."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        if wait and threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- in the engine's thread

    def _run(self) -> None:
        while True:
            try:
                _core.generate(
                    self.core,
                    [],
                    draft=self._draft,
                    max_batch=self._max_batch,
                    prefill_rows=self._need.prefill_rows,
                    workspace=self._need.reserve,
                    more=self._more,
                    on_tokens=self._hear,
                    on_finish=self._finished,
                )
                return
            except OutOfMemoryError as error:  # another process took what was free: go on
                self._cache.drop()
                _core.trim_memory()
                running, self._tickets, self._count = [*self._tickets.values()], {}, 0
                with self._condition:
                    if not running:  # it could not even begin: they are whom it lacks memory for
                        running = [ticket for ticket, _ in self._arrived]
                        self._arrived.clear()
                self._fail(running, error)
                if not self._wait():
                    return
            except BaseException as error:  # whoever waits has to know
                with self._condition:
                    self._closed, self._failure = True, f": {error}"
                    running = [*self._tickets.values(), *(ticket for ticket, _ in self._arrived)]
                    self._arrived.clear()
                self._fail(running, error)
                return

    def _wait(self) -> bool:
        """Until a request has come; False where none will."""
        with self._condition:
            while not self._arrived and not self._closed:
                self._condition.wait()
            return bool(self._arrived)

    @staticmethod
    def _fail(tickets: list[Ticket], error: BaseException) -> None:
        for ticket in tickets:
            ticket._finish(error)

    def _more(self, wait: bool) -> list[dict[str, Any]] | None:
        if wait:
            self._wait()
        with self._condition:
            arrived = list(self._arrived)
            self._arrived.clear()
            if not arrived:
                return None if self._closed and wait else []
        requests = []
        for ticket, _ in arrived:  # all of them, before anything can fail: see _run
            self._tickets[self._count] = ticket
            self._count += 1
        for ticket, request in arrived:
            self._make_room(request)
            if request.get("prompt_logprobs", False) is False:  # a senseless one is the core's
                ticket._state = request["state"] = self._cache.find(request["prompt"])
            requests.append(request)
        return requests

    def _make_room(self, request: dict[str, Any]) -> None:
        """Gives up states of finished texts, the oldest first, where a GPU lacks memory."""
        model, _ = self._footprints
        if model.device == "cpu" or not self._cache.kept:
            return
        # Twice: as a copy of a cached state, and grown to its length.
        wanted = 2 * model.text(text_of(request).tokens)
        while self._cache.kept and available(model.device) < wanted:
            self._cache.drop(1)

    def _hear(self, index: int, tokens: list[int]) -> int | None:
        ticket = self._tickets[index]
        piece, keep = ticket._writer.push(tokens)
        ticket._tell(piece)
        return keep if keep is not None else -1 if ticket._cancelled else None

    def _finished(self, index: int, result: dict[str, Any] | BaseException) -> None:
        ticket = self._tickets[index]  # until it knows, so that no failure is kept from it
        if isinstance(result, BaseException):
            ticket._finish(result)
        else:
            ticket._tell(ticket._writer.finish())
            self._cache.add(ticket._state, np.concatenate([ticket._prompt, result["tokens"]]))
            ticket._finish(as_generation(ticket._writer.close(), result, ticket._prompt, None))
        del self._tickets[index]


class StateCache:
    """States of recent texts, for prompts that begin with one of them."""

    def __init__(self, core: _core.Model, size: int):
        self.core, self.size = core, size
        self.kept: list[tuple[np.ndarray, _core.State]] = []  # the latest last

    def find(self, prompt: np.ndarray) -> _core.State | None:
        """A copy of the state that has read most of the prompt, or an empty state; None where none
        are kept."""
        if self.size == 0:
            return None
        best = None
        reads_on = len(prompt) <= fixed_until(self.core.config.get("rope"))
        for tokens, state in self.kept if reads_on else ():
            longer = best is None or state.length > best.length
            fits = state.length < len(prompt) and np.array_equal(tokens, prompt[: len(tokens)])
            best = state if longer and fits else best
        return self.core.state() if best is None else best.copy()

    def drop(self, count: int | None = None) -> None:
        """Gives up the oldest states, or all."""
        del self.kept[:count]

    def add(self, state: _core.State | None, text: np.ndarray) -> None:
        """Keeps the state of a finished text, in place of those of its beginnings."""
        if state is None or state.length == 0:
            return
        tokens = text[: state.length]
        self.kept = [
            (old, of) for old, of in self.kept if not np.array_equal(old, tokens[: len(old)])
        ]
        self.kept.append((tokens, state))
        del self.kept[: -self.size]
