"""Text to tokens and back, with what a checkpoint's files say about special tokens and chats.

The `tokenizers` library does the work from tokenizer.json, which also decides whether a text gets a
start token (`add_bos_token` in tokenizer_config.json is for tokenizers without such a file, as in
transformers). The names of the special tokens come from tokenizer_config.json and
special_tokens_map.json, the chat template from chat.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from .chat import ChatTemplate, find_template
from .checkpoint import read_file, read_json
from .errors import ArgumentError, FormatError, NotFoundError, shorten

__all__ = ["TextStream", "Tokenizer"]

_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    Attributes
    ----------
    bos_token, eos_token, pad_token, unk_token : str or None
    bos_token_id, eos_token_id, pad_token_id : int or None
    chat_template : ChatTemplate or None

    Examples
    --------
    >>> tokenizer = model.tokenizer                                    # doctest: +SKIP
    >>> tokenizer.decode(tokenizer.encode("Once upon a time"))         # doctest: +SKIP
    'Once upon a time'
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: ChatTemplate | None = None,
    ):
        self.backend = backend
        names = {key: _valid_text(name) for key, name in (special_tokens or {}).items()}
        self.bos_token, self.eos_token = names.get("bos_token"), names.get("eos_token")
        self.pad_token, self.unk_token = names.get("pad_token"), names.get("unk_token")
        self.chat_template = chat_template
        # Truncation and padding are settings of a training script that some files still carry.
        backend.no_truncation()
        backend.no_padding()
        missing = [name for name in names.values() if backend.token_to_id(name) is None]
        if missing:
            backend.add_special_tokens(missing)
        added = backend.get_added_tokens_decoder()
        self._special_ids = {token_id for token_id, token in added.items() if token.special}
        self._special_ids |= {self.backend.token_to_id(name) for name in names.values()}

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Tokenizer:
        """Reads a folder's tokenizer files.

        Raises
        ------
        NotFoundError
            There is no tokenizer.json.
        FormatError
            A file is damaged; the message names it.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.exists():
            mend = "; convert tokenizer.model with transformers' AutoTokenizer.save_pretrained"
            raise NotFoundError(
                f"{path}: no such file{mend if (folder / 'tokenizer.model').exists() else ''}"
            )
        content = read_file(path)
        try:
            backend = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare Exception
            raise FormatError(f"{path}: not a tokenizer ({shorten(str(error), 160)})") from None
        config = _read_optional(folder / "tokenizer_config.json")
        special = _special_tokens(_read_optional(folder / "special_tokens_map.json"))
        special.update(_special_tokens(config))
        return cls(backend, special, find_template(folder, config))

    def files(self) -> dict[str, bytes]:
        """The files that `load` reads, by name: for a model whose checkpoint came without them."""
        config: dict[str, Any] = {
            name: getattr(self, name) for name in _SPECIAL_NAMES if getattr(self, name)
        }
        files = {"tokenizer.json": self.backend.to_str(pretty=True).encode()}
        templates = {} if self.chat_template is None else self.chat_template.templates
        if set(templates) == {"default"}:
            files["chat_template.jinja"] = templates["default"].encode()
        elif templates:  # in the other place for them: their names need not be those of files
            config["chat_template"] = [
                {"name": name, "template": text} for name, text in templates.items()
            ]
        files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode()
        return files

    # ---- ids of special tokens

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)

    @property
    def bos_token_id(self) -> int | None:
        """Number of `bos_token`; None where there is none."""
        return self._id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        """Number of `eos_token`; None where there is none."""
        return self._id(self.eos_token)

    @property
    def pad_token_id(self) -> int | None:
        """Number of `pad_token`; None where there is none."""
        return self._id(self.pad_token)

    @property
    def vocab_size(self) -> int:
        """Tokens that it knows, added ones included; the model's vocabulary may be larger."""
        return self.backend.get_vocab_size()

    def token_to_id(self, token: str) -> int | None:
        """The id of one token by its text, None where there is no such token."""
        return self.backend.token_to_id(_valid_text(token))

    def id_to_token(self, token_id: int) -> str | None:
        """The text of one token as the vocabulary spells it."""
        return self.backend.id_to_token(int(token_id))

    # ---- text and tokens

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; `add_special_tokens` adds the start token where the model wants one."""
        if not isinstance(text, str):
            raise ArgumentError(f"encode: text must be a str, got {type(text).__name__}")
        return self.backend.encode(_valid_text(text), add_special_tokens=add_special_tokens).ids

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """`encode` for many texts at once, on all cores."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ArgumentError("encode_batch: texts must be a list of str")
        encoded = self.backend.encode_batch_fast(
            list(map(_valid_text, texts)), add_special_tokens=add_special_tokens
        )
        return [encoding.ids for encoding in encoded]

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Ids beyond the vocabulary are left out (models pad theirs)."""
        ids = [int(token) for token in np.asarray(token_ids, dtype=np.int64).reshape(-1)]
        if ids and min(ids) < 0:
            raise ArgumentError(f"decode: token ids must not be negative, got {min(ids)}")
        if ids and max(ids) > 0xFFFFFFFF:
            raise ArgumentError(f"decode: token id {max(ids)} is too large")
        if (
            skip_special_tokens
        ):  # the library itself overlooks those that are matched as normalised text
            ids = [token for token in ids if token not in self._special_ids]
        return self.backend.decode(ids, skip_special_tokens=False)

    def stream(self, skip_special_tokens: bool = True) -> TextStream:
        """A decoder that takes tokens one by one and gives text as soon as it is certain."""
        return TextStream(self, skip_special_tokens)

    # ---- chats

    def apply_chat_template(
        self,
        messages: Sequence[Mapping],
        add_generation_prompt: bool = False,
        *,
        template: str | None = None,
        tools: Sequence[Mapping] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a chat as the model was trained to see it.

        Encode it with ``add_special_tokens=False``: the template writes the special tokens itself.

        Parameters
        ----------
        messages
            Objects of `role` and `content`.
        add_generation_prompt
            Whether the text ends with the opening of an answer.
        template
            Name of one of several templates; "default" if not given.
        tools, variables
            Passed to the template.

        Raises
        ------
        ArgumentError
            There is no template, or the template refuses these messages.
        """
        if self.chat_template is None:
            raise ArgumentError(
                "this tokenizer has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json); "
                "pass plain text, or set tokenizer.chat_template = ChatTemplate(...)"
            )
        special = {
            name: getattr(self, name) for name in _SPECIAL_NAMES if getattr(self, name) is not None
        }
        return self.chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            name=template,
            tools=tools,
            **special,
            **variables,
        )

    def __repr__(self) -> str:
        chat = "with" if self.chat_template else "without"
        return (
            f"<Tokenizer: {self.vocab_size} tokens, eos {self.eos_token!r}, {chat} chat template>"
        )


class TextStream:
    """Turns tokens that arrive one by one into pieces of text whose concatenation is the decoded
    whole.

    A token may hold a part of a character, and decoders look at neighbours (a leading space is
    dropped at the start only), so a token cannot be decoded alone.  The stream decodes from the
    start of the last piece that it gave, and gives what was added once that does not end in an
    incomplete character.

    Examples
    --------
    >>> stream = tokenizer.stream()                                    # doctest: +SKIP
    >>> pieces = [stream.push(token) for token in tokens] + [stream.finish()]   # doctest: +SKIP
    """

    _WINDOW = 32  # tokens decoded again with each new one, at most (more inside a long odd run)
    _CONTEXT = (
        8  # of them, tokens that are given out already: a decoder looks that far back at most
    )

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._given = 0  # characters of the decoded ids that were given out
        self._cuts: list[int] = []  # counts of ids after which the text was whole

    def push(self, token_id: int) -> str:
        """The text that this token made certain; often one word, sometimes nothing."""
        self._ids.append(int(token_id))
        text = self._tokenizer.decode(self._ids, self._skip)
        if len(text) <= self._given or text.endswith("\ufffd"):
            return ""
        piece, self._given = text[self._given :], len(text)
        self._cuts.append(len(self._ids))
        if len(self._ids) > self._WINDOW:
            self._forget()
        return piece

    def held(self) -> str:
        """What is held back now: it ends in a character that may be incomplete."""
        return self._tokenizer.decode(self._ids, self._skip)[self._given :]

    def finish(self) -> str:
        """What was held back for characters that never became complete."""
        piece = self.held()
        self._given += len(piece)
        return piece

    def _forget(self) -> None:
        """Drops tokens that are given out, up to a place where no character is cut in two."""
        cut = max((cut for cut in self._cuts if cut <= len(self._ids) - self._CONTEXT), default=0)
        self._ids = self._ids[cut:]
        self._cuts = [later - cut for later in self._cuts if later > cut]
        self._given = len(self._tokenizer.decode(self._ids, self._skip))


def _read_optional(path: Path) -> dict:
    return read_json(path) if path.exists() else {}


def _special_tokens(config: Mapping) -> dict[str, str]:
    """bos_token and its like, each a string or an object with `content`."""
    found = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str) and value:
            found[name] = value
    return found


def _valid_text(text: str) -> str:
    """The text without lone surrogates, which no tokenizer can take: they become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
