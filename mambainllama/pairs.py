"""A student and its teacher: the vocabulary that they share.

Checkpoints of one family often differ in rows of padding at the end of the vocabulary (32,000
against 32,768, say).  Such a pair is compared on the rows that both have: the longer matrices are
cut by taking views of their first rows, which costs nothing and keeps training in place.  Anything
else that differs is refused: the same number would mean another word.
"""

from __future__ import annotations

from typing import Any

from . import _core
from .errors import ArgumentError

__all__ = ["core_of", "shared_vocabulary"]

OF_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def core_of(model: Any) -> _core.Model:
    """The C core of a model, which may be given itself."""
    core = getattr(model, "core", model)
    if not isinstance(core, _core.Model):
        raise ArgumentError(
            f"expected a model from mil.load or mil.convert, got {type(model).__name__}"
        )
    return core


def shared_vocabulary(
    student: Any, teacher: Any, role: str = "teacher"
) -> tuple[_core.Model, _core.Model]:
    """Both cores, cut to one vocabulary where only padding tells them apart.

    `role` is what messages call the second one.

    Raises
    ------
    mil.ArgumentError
        The tokenizers differ, or the vocabularies do and no tokenizer tells which rows are padding.
    """
    ours, theirs = core_of(student), core_of(teacher)
    words, their_words = vocabulary(student), vocabulary(teacher)
    if words is not None and their_words is not None and words != their_words:
        differing = {word for word, _ in words.items() ^ their_words.items()}
        raise ArgumentError(
            f"student and {role} have different tokenizers ({len(differing)} tokens differ, for "
            f"example {min(differing)!r}); choose a {role} with the student's tokenizer"
        )
    ours_size, theirs_size = ours.config["vocab"], theirs.config["vocab"]
    if ours_size == theirs_size:
        return ours, theirs
    known = words if words is not None else their_words
    size = min(ours_size, theirs_size)
    if known is None or max(known.values(), default=-1) >= size:
        why = (
            "no tokenizer tells whether the rest is padding"
            if known is None
            else "tokens lie beyond it"
        )
        raise ArgumentError(
            f"the student's vocabulary is {ours_size}, the {role}'s {theirs_size}: {why}; "
            f"choose a {role} with the student's tokenizer"
        )
    return cut_vocabulary(ours, size), cut_vocabulary(theirs, size)


def vocabulary(model: Any) -> dict[str, int] | None:
    """Token to id, where the model has a tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    return None if tokenizer is None else tokenizer.backend.get_vocab()


def cut_vocabulary(core: _core.Model, size: int) -> _core.Model:
    """The same model on the first `size` tokens; its arrays are views of the whole ones."""
    if core.config["vocab"] == size:
        return core
    arrays = {
        name: array[:size] if name in OF_VOCABULARY else array
        for name, array in core.parameters().items()
    }
    return _core.Model({**core.config, "vocab": size}, arrays, core.dtypes())
