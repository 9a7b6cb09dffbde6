"""Chat templates: Jinja programs that come with a checkpoint and write a chat as its model's text.

They are programs by strangers, so they run in Jinja's sandbox, see plain JSON values only, and can
neither change their inputs nor reach Python's internals.  The dialect is that of transformers:
blocks are trimmed, `raise_exception`, `strftime_now`, `tojson`, `break` and `continue` exist, and
``{% generation %}`` (which marks answers for training there) passes its contents through.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .checkpoint import read_file
from .errors import ArgumentError, FormatError, shorten

if TYPE_CHECKING:
    import jinja2

__all__ = ["ChatTemplate", "find_template"]


class ChatTemplate:
    """One or several named templates.

    Parameters
    ----------
    templates
        The source of the template, or sources by name; "default" is used where no name is asked
        for.
    where
        Where it comes from, for messages.

    Examples
    --------
    >>> template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    >>> template.render([{"role": "user", "content": "Hello"}])
    '<user>Hello'
    """

    def __init__(self, templates: str | Mapping[str, str], where: str = "chat template"):
        self.templates = {"default": templates} if isinstance(templates, str) else dict(templates)
        self.where = where

    def source(self, name: str | None = None, tools: bool = False) -> str:
        """The text of a template; with tools, "tool_use" is preferred (as in transformers)."""
        if name is None:
            name = "tool_use" if tools and "tool_use" in self.templates else "default"
        if name not in self.templates:
            raise ArgumentError(
                f"{self.where}: no template {shorten(name)}; there are: "
                f"{', '.join(self.templates) or 'none'}"
            )
        return self.templates[name]

    def render(
        self,
        messages: Sequence[Mapping],
        *,
        add_generation_prompt: bool = False,
        name: str | None = None,
        tools: Sequence[Mapping] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a chat; see `Tokenizer.apply_chat_template`."""
        import jinja2

        if isinstance(messages, (str, Mapping)) or not all(
            isinstance(message, Mapping) for message in messages
        ):
            raise ArgumentError(
                f"messages must be a list of objects with role and content, got {shorten(messages)}"
            )
        try:
            return _compiled(self.source(name, bool(tools))).render(
                messages=_plain(list(messages)),
                tools=_plain(tools),
                documents=None,
                add_generation_prompt=bool(add_generation_prompt),
                **{key: _plain(value) for key, value in variables.items()},
            )
        except jinja2.TemplateSyntaxError as error:
            raise FormatError(
                f"{self.where}: line {error.lineno}: {_one_line(error.message)}"
            ) from None
        except jinja2.TemplateError as error:
            raise ArgumentError(
                f"{self.where}: it refuses these messages: {_one_line(error)}"
            ) from None
        except Exception as error:  # a stranger's program: whatever it does wrong is its own fault
            raise ArgumentError(
                f"{self.where}: it fails on these messages: {type(error).__name__}: "
                f"{_one_line(error)}"
            ) from None

    def __repr__(self) -> str:
        return f"<ChatTemplate {', '.join(self.templates)} from {self.where}>"


def _one_line(message: object) -> str:
    """What a template says went wrong, as one line of bounded length."""
    text = " ".join(str(message).split())
    return text if len(text) <= 300 else text[:297] + "..."


def find_template(folder: str | os.PathLike, tokenizer_config: Mapping) -> ChatTemplate | None:
    """A folder's chat template: chat_template.jinja, or the key in tokenizer_config.json."""
    folder = Path(folder)
    found: dict[str, str] = {}
    where = folder / "tokenizer_config.json"
    value = tokenizer_config.get("chat_template")
    if isinstance(value, str):
        found["default"] = value
    elif isinstance(value, list):  # [{"name": ..., "template": ...}, ...]
        for entry in value:
            if not isinstance(entry, Mapping) or not all(
                isinstance(entry.get(key), str) for key in ("name", "template")
            ):
                raise FormatError(
                    f"{where}: chat_template: expected objects of name and template, got "
                    f"{shorten(entry)}"
                )
            found[entry["name"]] = entry["template"]
    elif value is not None:
        raise FormatError(
            f"{where}: chat_template: expected a string or a list, got {shorten(value)}"
        )
    for path, name in _template_files(folder):
        try:
            found[name] = read_file(path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{path}: not text in UTF-8 ({error}); write it again") from None
        where = path
    return ChatTemplate(found, str(where)) if found else None


def _template_files(folder: Path) -> list[tuple[Path, str]]:
    files = [
        (path, path.stem) for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))
    ]
    single = folder / "chat_template.jinja"
    return [*files, (single, "default")] if single.exists() else files


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@functools.lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %} is its contents."""

        tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own tojson escapes HTML, which no model was trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(str(message))


def _plain(value: Any) -> Any:
    """The value in plain JSON types, so that a template meets no object with methods of its own."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # NumPy scalars
        return _plain(value.item())
    return f"<{type(value).__name__}>"
