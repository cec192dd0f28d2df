"""What text does a model's own chat template make of messages?

As Hugging Face's `apply_chat_template` renders it, which is what vLLM and SGLang call. A template
is a program that came with the model: it runs in jinja2's sandbox, and what clients send is its
data, never a template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatTemplate:
    """One template, and the names of the special tokens that it may use."""

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        """jinja2.TemplateError if it is no template."""
        self._template = _environment.from_string(source, globals=dict(special))
        tree = _environment.parse(source)
        self.takes_parts = any(map(_is_over_content, tree.find_all(nodes.For)))
        """It goes through the parts of a message's content, rather than to take it as a text."""
        self.knows_developers = '"developer"' in source or "'developer'" in source
        """It has a place for messages of that role."""

    def render(self, **told: Any) -> str:
        """TemplateError, or whatever else the template raises, where it refuses the messages."""
        return self._template.render(told)


class _Generation(Extension):
    """`{% generation %}`, by which templates mark answers for training: here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own form)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _is_over_content(loop: nodes.For) -> bool:
    match loop.iter:
        case nodes.Name(name="content") | nodes.Getattr(attr="content"):
            return True
        case nodes.Getitem(arg=nodes.Const(value="content")):
            return True
    return False


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own would escape for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _now(form: str) -> str:
    """Today, by the gateway's clock: engines take theirs."""
    return datetime.now().strftime(form)


_environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
)
_environment.filters["tojson"] = _to_json
_environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
