"""Which text does an engine read of a request's body?

As vLLM 0.32 makes it (`vllm/renderers/chat_utils.py`, `hf.py`). What it would make by settings that
nobody here knows, or of more than text, is not guessed at: such a prompt has no text here.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType

from paceline.tokens.template import ChatTemplate

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
PATHS = (CHAT, COMPLETION)
TEXTS = ("text", "input_text", "output_text")
"""Types of content parts that are text."""
BILLING = "x-anthropic-billing-header"
"""A line that vLLM cuts off system texts, because it changes with each request."""

MOST_MESSAGES = 2000
"""To render more would hold Python's lock for too long."""


class Unreadable(Exception):
    """What the engine reads cannot be known here."""


class Text(msgspec.Struct, frozen=True, gc=False):
    """A prompt as the engine tokenises it."""

    text: str
    with_special: bool
    """Whether the tokenizer adds the tokens that it begins texts with."""
    salt: str = ""


class _Function(msgspec.Struct):
    """vLLM lets templates see these fields alone, in this order."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Tool(msgspec.Struct):
    function: _Function
    type: str = "function"

    def shown(self) -> dict[str, Any]:
        function = msgspec.to_builtins(self.function)
        if function["strict"] is None:
            del function["strict"]
        return {"type": self.type, "function": function}


class _Ask(msgspec.Struct, kw_only=True):
    """What of a body decides about the text, and what leads away from it."""

    messages: list[dict[str, Any]] = msgspec.field(default_factory=list)
    prompt: str | list[str] = ""
    tools: list[_Tool] | None = None
    tool_choice: Any = None
    add_generation_prompt: bool = True
    add_special_tokens: bool | None = None
    documents: Any = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: str | None = None

    chat_template: Raw | UnsetType = UNSET
    continue_final_message: bool = False
    truncate_prompt_tokens: Raw | UnsetType = UNSET
    prompt_embeds: Raw | UnsetType = UNSET


_decode = msgspec.json.Decoder(_Ask).decode


def text_of(path: str, body: bytes, template: ChatTemplate | None) -> Text:
    """What the engine makes of a body. Unreadable where that cannot be known."""
    try:
        ask = _decode(body)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Unreadable(f"the body: {error}") from None
    unknown = (ask.chat_template, ask.truncate_prompt_tokens, ask.prompt_embeds)
    if any(field is not UNSET for field in unknown) or ask.continue_final_message:
        raise Unreadable("a field that the engine alone can follow")
    salt = ask.cache_salt or ""
    if path == COMPLETION:
        return Text(_prompt(ask.prompt), ask.add_special_tokens is not False, salt)
    if template is None:
        raise Unreadable("the tokenizer has no chat template")
    try:
        text = _rendered(ask, template)
    except Exception as error:  # a template is a program, and may raise what it likes
        raise Unreadable(f"the chat template: {error}") from None
    return Text(text, bool(ask.add_special_tokens), salt)


def _prompt(prompt: str | list[str]) -> str:
    texts = [prompt] if isinstance(prompt, str) else prompt
    if len(texts) != 1:
        raise Unreadable("several prompts")
    return texts[0]


def _rendered(ask: _Ask, template: ChatTemplate) -> str:
    if len(ask.messages) > MOST_MESSAGES:
        raise Unreadable("too many messages")
    if ask.tools and ask.tool_choice == "none":
        raise Unreadable("tools that the engine may leave out")
    messages = [_message(message, template.takes_parts) for message in ask.messages]
    if not template.knows_developers and any(m["role"] == "developer" for m in messages):
        raise Unreadable("messages of a role that the template does not know")
    told: dict[str, Any] = {**(ask.chat_template_kwargs or {})}
    if ask.documents is not None:
        told["documents"] = ask.documents
    if ask.reasoning_effort is not None:
        told.setdefault("enable_thinking", ask.reasoning_effort != "none")
        told["reasoning_effort"] = ask.reasoning_effort
    told.setdefault("documents", None)
    return template.render(
        **told
        | {
            "messages": messages,
            "tools": [tool.shown() for tool in ask.tools] if ask.tools is not None else None,
            "add_generation_prompt": ask.add_generation_prompt,
        }
    )


def _message(message: dict[str, Any], takes_parts: bool) -> dict[str, Any]:
    """As templates get to see it."""
    role = message["role"]
    texts = _texts(message.get("content"))
    if role == "system" and any(text.startswith(BILLING) for text in texts):
        raise Unreadable("a text that the engine changes")
    shown: dict[str, Any] = {"role": role}
    if takes_parts and role != "tool":
        shown["content"] = [{"type": "text", "text": text} for text in texts]
    else:
        shown["content"] = "\n".join(filter(None, texts))
    if role == "assistant":
        if message.get("tool_calls"):
            shown["tool_calls"] = [_call(call) for call in message["tool_calls"]]
        if (reasoning := message.get("reasoning")) is not None:
            shown["reasoning"] = shown["reasoning_content"] = reasoning
    elif role == "tool" and "tool_call_id" in message:
        shown["tool_call_id"] = message["tool_call_id"]
    elif role == "developer":
        shown["tools"] = message.get("tools")
    if isinstance(message.get("name"), str):
        shown["name"] = message["name"]
    return shown


def _texts(content: Any) -> list[str]:
    """The parts of a message's content, all of which must be text."""
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        if part["type"] not in TEXTS:
            raise Unreadable(f"a part of type {part['type']}")
        texts.append(part["text"])
    return texts


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """Templates want the arguments of a call as an object; clients send them as JSON text."""
    function = dict(call["function"])
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments)
        except msgspec.DecodeError:
            arguments = {}
    function["arguments"] = arguments if isinstance(arguments, dict) else {}
    return {**call, "function": function}
