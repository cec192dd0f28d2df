"""How is an answer written? As vLLM 0.32 writes chat, text completions and embeddings.

A token's chunk is rendered once as a template. All numbers in it run along with the token's own, so
that writing one is a single formatting of bytes.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import msgspec
import numpy as np

from paceline.engines.emulated.tokens import TEXT_IDS

FINGERPRINT = "vllm-0.32.0-emulated"
DONE = b"data: [DONE]\n\n"
NUMBER, TOKEN_ID, COUNT, TOTAL, SEQUENCE = (f"@@{slot}@@" for slot in "nicts")
NOT_TOLD = b'"prompt_token_ids":null'
_SLOT = re.compile(rb'"(@@[icts]@@)"|(@@n@@)')


class Part(msgspec.Struct, kw_only=True):
    """One prompt of a call and the answer to it."""

    index: int
    prompt: list[int]
    first_number: int
    """Number of the answer's first token: not 0 where it continues a partial answer."""
    tokens: int
    """Tokens that the answer will have."""
    finish_reason: str
    cached_tokens: int = 0

    @property
    def numbers(self) -> range:
        return range(self.first_number, self.first_number + self.tokens)

    @property
    def text(self) -> str:
        return "".join(f" t{i}" for i in self.numbers)

    @property
    def token_ids(self) -> range:
        start = TEXT_IDS + self.first_number
        return range(start, start + self.tokens)


class Format:
    """The answer to one call. Subclasses say what is written when."""

    prefix: ClassVar[str]

    def __init__(
        self,
        request_id: str,
        created: int,
        model: str,
        parts: Sequence[Part],
        include_usage: bool = False,
        continuous_usage: bool = False,
        token_ids: bool = False,
    ) -> None:
        self.id = f"{self.prefix}{request_id}"
        self.created = created
        self.model = model
        self.parts = parts
        self.include_usage = include_usage
        self.continuous_usage = continuous_usage
        self.token_ids = token_ids
        self.kv_transfer_params: dict[str, Any] | None = None
        """Where another engine can fetch the prompt."""

    def opening(self, part: Part) -> bytes:
        """What comes right before the first token of a part."""
        return b""

    def token(self, part: Part, finish_reason: str | None = None) -> Callable[[int], bytes]:
        """The event of a token, by its number."""
        raise NotImplementedError

    def closing(self) -> bytes:
        """What comes after the last token of all parts."""
        return DONE

    def whole(self) -> bytes:
        """The answer in one piece."""
        raise NotImplementedError

    @property
    def prompt_tokens(self) -> int:
        return sum(len(part.prompt) for part in self.parts)

    @property
    def answer_tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.answer_tokens,
            "completion_tokens": self.answer_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(p.cached_tokens for p in self.parts)},
        }


class _OpenAI(Format):
    """What chat and text completions share."""

    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _choice(self, part: Part, finish_reason: str | None) -> dict[str, Any]:
        """One token as a choice of a chunk."""
        raise NotImplementedError

    def _answer(self, part: Part) -> dict[str, Any]:
        """The whole answer as a choice."""
        raise NotImplementedError

    def token(self, part: Part, finish_reason: str | None = None) -> Callable[[int], bytes]:
        choice = self._choice(part, finish_reason)
        if finish_reason:
            choice["stop_reason"] = None
        if self.token_ids:
            choice["token_ids"] = [TOKEN_ID]
        chunk = self._body(self.chunk_object, [choice])
        if self.continuous_usage:
            chunk["usage"] = {
                "prompt_tokens": len(part.prompt),
                "total_tokens": TOTAL,
                "completion_tokens": COUNT,
            }
        return numbered(event(chunk), part)

    def closing(self) -> bytes:
        if not self.include_usage:
            return DONE
        chunk = self._body(self.chunk_object, [])
        return event({**chunk, "usage": self.usage(), "system_fingerprint": FINGERPRINT}) + DONE

    def whole(self) -> bytes:
        body = self._body(self.whole_object, [self._answer(part) for part in self.parts])
        rest = {"service_tier": None, "system_fingerprint": FINGERPRINT, "usage": self.usage()}
        return msgspec.json.encode({**body, **rest, "kv_transfer_params": self.kv_transfer_params})


class Chat(_OpenAI):
    prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, part: Part) -> bytes:
        delta = {"role": "assistant", "content": ""}
        choice = {"index": part.index, "delta": delta, "logprobs": None, "finish_reason": None}
        chunk = self._body(self.chunk_object, [choice])
        if self.continuous_usage:
            tokens = len(part.prompt)
            chunk["usage"] = {
                "prompt_tokens": tokens,
                "total_tokens": tokens,
                "completion_tokens": 0,
            }
        if self.token_ids:
            chunk["prompt_token_ids"] = part.prompt
        return event(chunk)

    def _choice(self, part: Part, finish_reason: str | None) -> dict[str, Any]:
        return {
            "index": part.index,
            "delta": {"content": f" t{NUMBER}"},
            "logprobs": None,
            "finish_reason": finish_reason,
        }

    def _answer(self, part: Part) -> dict[str, Any]:
        return {
            "index": part.index,
            "message": {"role": "assistant", "content": part.text, "refusal": None},
            "logprobs": None,
            "finish_reason": part.finish_reason,
            "stop_reason": None,
            "token_ids": list(part.token_ids) if self.token_ids else None,
        }


class Completion(_OpenAI):
    prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"

    def token(self, part: Part, finish_reason: str | None = None) -> Callable[[int], bytes]:
        """The first one's event tells the prompt's ids, the others' that it has been told."""
        write = super().token(part, finish_reason)
        if not self.token_ids:
            return write
        told = b'"prompt_token_ids":' + msgspec.json.encode(part.prompt)

        def tell(number: int) -> bytes:
            written = write(number)
            return written if number > part.first_number else written.replace(NOT_TOLD, told)

        return tell

    def _choice(self, part: Part, finish_reason: str | None) -> dict[str, Any]:
        choice = {
            "index": part.index,
            "text": f" t{NUMBER}",
            "logprobs": None,
            "finish_reason": finish_reason,
            "stop_reason": None,
        }
        return {**choice, "prompt_token_ids": None} if self.token_ids else choice

    def _answer(self, part: Part) -> dict[str, Any]:
        return {
            "index": part.index,
            "text": part.text,
            "logprobs": None,
            "finish_reason": part.finish_reason,
            "stop_reason": None,
            "token_ids": list(part.token_ids) if self.token_ids else None,
            "prompt_token_ids": part.prompt if self.token_ids else None,
        }


class Embeddings(Format):
    """A unit vector for each input, drawn from its tokens."""

    prefix = "embd-"
    dimensions = 64
    base64 = False

    def whole(self) -> bytes:
        data = [
            {"object": "embedding", "index": part.index, "embedding": self._vector(part.prompt)}
            for part in self.parts
        ]
        usage = {"prompt_tokens": self.prompt_tokens, "total_tokens": self.prompt_tokens}
        return msgspec.json.encode(
            {"id": self.id, "object": "list", "model": self.model, "data": data, "usage": usage}
        )

    def _vector(self, tokens: list[int]) -> list[float] | str:
        angles = np.outer(np.array(tokens, dtype=np.float64), np.arange(1, self.dimensions + 1))
        vector = np.sin(angles).sum(axis=0)
        vector = (vector / np.linalg.norm(vector)).astype("<f4")
        values: list[float] = vector.tolist()
        return b64encode(vector.tobytes()).decode() if self.base64 else values


def event(body: Mapping[str, Any], kind: str = "") -> bytes:
    """A server-sent event."""
    named = b"event: %b\n" % kind.encode() if kind else b""
    return named + b"data: " + msgspec.json.encode(body) + b"\n\n"


def numbered(template: bytes, part: Part, sequence: int = 0) -> Callable[[int], bytes]:
    """A writer of `template` for token i. Each slot in it is i plus something fixed."""
    offsets = {
        NUMBER: 0,
        TOKEN_ID: TEXT_IDS,
        COUNT: 1 - part.first_number,
        TOTAL: len(part.prompt) + 1 - part.first_number,
        SEQUENCE: sequence - part.first_number,
    }
    slots = [(quoted or bare).decode() for quoted, bare in _SLOT.findall(template)]
    form = _SLOT.sub(b"%d", template.replace(b"%", b"%%"))
    if slots == [NUMBER]:
        return form.__mod__
    added = [offsets[slot] for slot in slots]
    return lambda number: form % tuple([number + offset for offset in added])
