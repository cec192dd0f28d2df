"""How do TensorRT-LLM's workers hand over? The second goes on from what the first has answered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import aiohttp
import msgspec

from paceline.domain.worker import Worker
from paceline.engines.transfer.prompt import GENERATES, in_one_piece

FIELD = "disaggregated_params"
GLOBAL = 1 << 42
"""Ids that are unique among servers are above it; below are each server's own."""
GOES_ON = ("length", "not_finished")


class Choice(msgspec.Struct, frozen=True):
    disaggregated_params: dict[str, Any] | None = None
    finish_reason: str | None = None


class Held(msgspec.Struct, frozen=True):
    """The answer to a `context_only` request."""

    choices: list[Choice] = []
    prompt_token_ids: list[int] | None = None


class ContextFirst:
    """`trtllm-serve` of 1.3 as context and as generation server.

    Its own router sends the same fields: the first's token is the second's first one, so the first
    gets the very same request, and the second the tokens of its prompt.
    """

    together = False

    def __init__(self, worker: Worker, api_key: str) -> None:
        pass

    def none(self, path: str) -> Mapping[str, Any]:
        return {FIELD: None} if path in GENERATES else {}

    def prefill(self, body: dict[str, Any], number: int) -> dict[str, Any]:
        return {**in_one_piece(body), FIELD: {"request_type": "context_only", **_name(number)}}

    def decode(self, path: str, number: int, answer: bytes) -> dict[str, Any] | None:
        """Empty where the first token was the whole answer."""
        held = msgspec.json.decode(answer, type=Held)
        choice = held.choices[0] if held.choices else Choice()
        told = choice.disaggregated_params
        if not told:
            return None
        if choice.finish_reason not in GOES_ON:
            return {}
        asked = {**told, "request_type": "generation_only", **_name(number)}
        fields: dict[str, Any] = {FIELD: asked}
        if held.prompt_token_ids is not None:
            name = "prompt" if path == "/v1/completions" else "prompt_token_ids"
            fields[name] = held.prompt_token_ids
        return fields

    def release(self, fields: Mapping[str, Any]) -> dict[str, Any] | None:
        """None: it frees them by its own timeout (`kv_transfer_timeout_ms`)."""
        return None

    async def learn(self, session: aiohttp.ClientSession) -> str:
        return ""


def _name(number: int) -> dict[str, int]:
    return {"disagg_request_id": number | GLOBAL}
