"""With which request does a broken generation go on from its last token?

The partial answer becomes part of the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.domain.continuation import can_go_on

COMPLETION_TOKENS = 16
"""Length of a text completion whose request names none, by OpenAI's API."""
THOUGHTS = ("<think>", "</think>")
"""Marks of thoughts left within an answer: chat templates cut those out of a partial one."""


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
    if token_ids is None or not isinstance(prompt, list):
        return None
    if not all(type(item) is int for item in prompt):
        return None
    return {**body, "prompt": prompt + token_ids}


def longer_chat(body: Mapping[str, Any], text: str, last_is_open: bool) -> dict[str, Any] | None:
    """A chat whose last message is the partial answer.

    `last_is_open`: the request itself left an assistant's message to be continued.
    """
    last = last_message(body)
    if not last or not can_go_on(body) or any(mark in text for mark in THOUGHTS):
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
