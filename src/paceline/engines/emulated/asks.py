"""What does a client ask for? The bodies of vLLM's endpoints, reduced to token ids and limits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from paceline.engines.emulated.tokens import encode


class Refusal(Exception):
    """An answer in vLLM's error shape."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param

    def body(self) -> bytes:
        return error_body(self.status, str(self), self.param)


def error_body(status: int, message: str, param: str | None = None) -> bytes:
    kind = {404: "NotFoundError", 400: "BadRequestError"}.get(status, "InternalServerError")
    return msgspec.json.encode(
        {"error": {"message": message, "type": kind, "param": param, "code": status}}
    )


Inputs = str | list[str | int | list[int]]
"""A text, its token ids, or a list of either."""


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class Ask(msgspec.Struct, kw_only=True):
    """What all endpoints share, by vLLM's names. Fields that change nothing here are ignored."""

    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = 1
    max_tokens: int | None = None
    min_tokens: int | None = 0
    ignore_eos: bool | None = False
    priority: int | None = 0
    return_token_ids: bool | None = False
    cache_salt: str | None = None
    kv_transfer_params: dict[str, Any] | None = None

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer; None: as many as fit."""
        return self.max_tokens

    def prompts(self) -> list[list[int]]:
        raise NotImplementedError


class ChatAsk(Ask, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = False

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def prompts(self) -> list[list[int]]:
        if not self.messages:
            raise Refusal(400, "messages: at least one is needed", "messages")
        if self.continue_final_message and self.add_generation_prompt:
            raise Refusal(
                400,
                "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
                "continue_final_message",
            )
        return [rendered(self.messages, open_end=bool(self.continue_final_message))]


class CompletionAsk(Ask, kw_only=True):
    prompt: Inputs
    max_tokens: int | None = 16

    def prompts(self) -> list[list[int]]:
        return token_lists(self.prompt)


class ResponsesAsk(Ask, kw_only=True):
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None

    @property
    def limit(self) -> int | None:
        return self.max_output_tokens

    def prompts(self) -> list[list[int]]:
        asked = self.input
        items = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        return [rendered([*system, *items])]


class MessagesAsk(Ask, kw_only=True):
    messages: list[dict[str, Any]]
    max_tokens: int
    system: str | list[dict[str, Any]] | None = None

    def prompts(self) -> list[list[int]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [rendered([*system, *self.messages])]


class EmbeddingsAsk(Ask, kw_only=True):
    input: Inputs
    max_tokens: int | None = 1
    encoding_format: str | None = "float"

    def prompts(self) -> list[list[int]]:
        return token_lists(self.input)


class TokenizeAsk(Ask, kw_only=True):
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = True

    def prompts(self) -> list[list[int]]:
        if self.messages is not None:
            return [rendered(self.messages, closing=bool(self.add_generation_prompt))]
        return [encode(self.prompt or "")]


def token_lists(inputs: Inputs) -> list[list[int]]:
    """The prompts in what OpenAI lets `prompt` and `input` be."""
    if isinstance(inputs, str):
        return [encode(inputs)]
    ids = [item for item in inputs if isinstance(item, int)]
    if not ids:
        return [encode(item) if isinstance(item, str) else _ids(item) for item in inputs]  # type: ignore[arg-type]
    if len(ids) < len(inputs):
        raise Refusal(400, "A list of token ids holds nothing else.", "prompt")
    return [_ids(ids)]


def _ids(ids: list[int]) -> list[int]:
    if any(not 0 <= i < 1 << 32 for i in ids):
        raise Refusal(400, "Token id out of vocabulary.", "prompt")
    return ids


def rendered(
    messages: Iterable[dict[str, Any]], open_end: bool = False, closing: bool = True
) -> list[int]:
    """Messages through a ChatML template. With `open_end` the last one is left to be continued."""
    turns = [f"<|{m.get('role', 'user')}|>{text_of(m.get('content'))}" for m in messages]
    text = "<|end|>\n".join(turns)
    if open_end:
        return encode(text)
    return encode(text + "<|end|>\n" + ("<|assistant|>" if closing else ""))


def text_of(content: Any) -> str:
    """Text of a message's content: a string, or parts of which those with text count."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""
