"""A chat that keeps its state: what was read and written before is never computed again.

The state of a sequence (KV caches, SSM states) goes from turn to turn.  A turn adds only the tokens
of the new message and of the template around it, so its cost does not grow with the talk, but for
attention over the cache.

>>> talk = Conversation(model)                        # doctest: +SKIP
>>> talk.ask("What is a state space model?")          # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .errors import ArgumentError
from .generate import GenerationStats, generate

__all__ = ["Conversation"]


class Conversation:
    """Messages, the tokens that they became, and the state that has read them.

    Parameters
    ----------
    model : model with a tokenizer that has a chat template
    system : str or None
        A system message.
    **options
        As for `mil.generate`: max_new_tokens, temperature, top_k, top_p, seed, stop, draft,
        draft_tokens.

    Attributes
    ----------
    messages : list of {"role", "content"}
    stats : GenerationStats or None
        Of the last answer; `cached_tokens` are those that were not computed again.
    """

    def __init__(self, model: Any, system: str | None = None, **options: Any):
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is None or tokenizer.chat_template is None:
            raise ArgumentError(
                "this model has no chat template; use `mambainllama generate` for plain "
                "continuation"
            )
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.system = system
        self.reset()

    def reset(self) -> None:
        """Back to the beginning."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.stats: GenerationStats | None = None
        self.forget()

    def forget(self) -> None:
        """Drops the state; the next turn reads everything again."""
        self.text = ""  # what the tokens say
        self.tokens: list[int] = []
        self.state = self.model.state()

    def ask(self, message: str, on_text: Callable[[int, str], Any] | None = None) -> str:
        """The model's answer to a message. Interrupted, the answer so far is kept."""
        self.messages.append({"role": "user", "content": message})
        prompt = self.next_prompt()
        pieces: list[str] = []

        def hear(index: int, piece: str) -> Any:
            pieces.append(piece)
            return on_text(index, piece) if on_text else None

        try:
            [answer] = generate(
                self.model, [prompt], states=[self.state], on_text=hear, **self.options
            )
        except BaseException as error:
            self.forget()
            if isinstance(error, KeyboardInterrupt):
                self.messages.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": answer.text})
        self.tokens = [*prompt, *answer.token_ids]
        self.text += answer.text
        if self.tokenizer.decode(answer.token_ids).lstrip() != answer.text.lstrip():
            self.forget()  # the tokens of a stop string, which no message says
        self.stats = answer.stats
        return answer.text

    def next_prompt(self) -> list[int]:
        """All tokens up to the opening of the next answer; those already read stay as they are.

        Only text after what was read is tokenised: tokenising the whole again could split an answer
        in other places than the model did. A template that rewrites earlier turns starts afresh.
        """
        whole = self.tokenizer.apply_chat_template(self.messages, add_generation_prompt=True)
        if not self.text or not whole.startswith(self.text):
            self.forget()
        added = self.tokenizer.encode(whole[len(self.text) :], add_special_tokens=False)
        self.text = whole
        return [*self.tokens, *added]
