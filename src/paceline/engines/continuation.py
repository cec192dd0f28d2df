"""With which request does a broken generation go on from its last token?

The partial answer becomes part of the prompt. That is the same generation only where each token
depends on nothing but the tokens before it; whatever keeps state beside them (a grammar, a tool
parser, several choices, log-probabilities numbered from the start) cannot go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STATEFUL = (
    "audio",
    "echo",
    "function_call",
    "functions",
    "grammar",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "json_schema",
    "logprobs",
    "prompt_logprobs",
    "structured_outputs",
    "suffix",
    "tools",
    "top_logprobs",
    "truncate_prompt_tokens",
    "use_beam_search",
)
"""Fields that, when set, make an answer more than the tokens that follow its prompt."""


def can_go_on(body: Mapping[str, Any]) -> bool:
    """Is the answer to this request nothing but one run of tokens?"""
    if any(_is_set(body.get(name)) for name in STATEFUL):
        return False
    if any((body.get(name) or 1) != 1 for name in ("n", "best_of")):
        return False
    form = body.get("response_format")
    return form is None or (isinstance(form, dict) and form.get("type") == "text")


def _is_set(value: Any) -> bool:
    """`logprobs: 0` asks for something; false, null and empty ask for nothing."""
    return value == 0 if type(value) is int else bool(value)


def longer_prompt(
    body: Mapping[str, Any], text: str, token_ids: list[int] | None
) -> dict[str, Any] | None:
    """A text completion that goes on, in whichever form its prompt was given."""
    if not can_go_on(body):
        return None
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        (prompt,) = prompt
        prompt = [prompt] if isinstance(prompt, int) else prompt
    if isinstance(prompt, str):
        return {**body, "prompt": prompt + text}
    if isinstance(prompt, list) and token_ids and all(type(item) is int for item in prompt):
        return {**body, "prompt": prompt + token_ids}
    return None


def longer_chat(body: Mapping[str, Any], text: str, last_is_open: bool) -> dict[str, Any] | None:
    """A chat whose last message is the partial answer.

    `last_is_open`: the request itself left an assistant's message to be continued.
    """
    last = last_message(body)
    if not last or not can_go_on(body):
        return None
    if not last_is_open:
        return {**body, "messages": [*body["messages"], {"role": "assistant", "content": text}]}
    if not isinstance(last.get("content"), str):
        return None
    longer = {**last, "content": last["content"] + text}
    return {**body, "messages": [*body["messages"][:-1], longer]}


def last_message(body: Mapping[str, Any]) -> dict[str, Any]:
    """The last message of a chat; empty if there is none."""
    messages = body.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    return last if isinstance(last, dict) else {}
