"""How does Paceline talk to llama.cpp's server, embedded or on its own?"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import aiohttp
import msgspec

from paceline.domain.worker import WorkerReport
from paceline.engines.continuation import last_message, longer_chat, longer_prompt
from paceline.engines.metrics import Metrics
from paceline.engines.probe import Answer, Probe


class Slot(msgspec.Struct, frozen=True):
    """One of the sequences that it decodes at once, from `/slots`."""

    is_processing: bool
    n_prompt_tokens: int = 0
    """Tokens of its context, the generated ones included; an idle slot's are only cached."""


class Generation(msgspec.Struct, frozen=True):
    """`default_generation_settings` of `/props`."""

    n_ctx: int
    """Context of one slot, tokens."""


class Props(msgspec.Struct, frozen=True):
    """How the server was started, from `/props`."""

    default_generation_settings: Generation
    total_slots: int
    build_info: str = ""


class LlamaCpp:
    """The dialect of llama.cpp's server. It may be started without `/metrics`, or `/slots`."""

    kind = "llamacpp"

    def __init__(self, url: str, model_name_at_engine: str, api_key: str) -> None:
        self._probe = Probe(url, api_key)
        self._props: Props | None = None
        """Asked anew after each time that it was not healthy."""

    def extras(self, path: str, urgency: int) -> Mapping[str, Any]:
        """None: its queue knows no priorities."""
        return {}

    def token_ids(self, path: str) -> Mapping[str, Any]:
        """None: OpenAI's endpoints have none here."""
        return {}

    def continuation(
        self, path: str, body: dict[str, Any], text: str, token_ids: list[int] | None
    ) -> dict[str, Any] | None:
        """A last message of the assistant is always continued. Streams bring what is new; an
        answer in one piece would repeat the part before, so it is not asked for."""
        if path == "/v1/completions":
            return longer_prompt(body, text, token_ids)
        if path != "/v1/chat/completions" or not body.get("stream"):
            return None
        is_open = last_message(body).get("role") == "assistant"
        return longer_chat(body, text, last_is_open=is_open)

    async def report(self, session: aiohttp.ClientSession) -> WorkerReport:
        """`/health` answers 503 while the model loads."""
        health, metrics, slots = await asyncio.gather(
            *(self._probe.get(session, path) for path in ("/health", "/metrics", "/slots"))
        )
        if not health.ok:
            self._props = None
            loads = health.status == 503 and b"oading" in health.body
            return WorkerReport(False, "loading" if loads else health.trouble)
        if self._props is None:
            self._props = (await self._probe.get(session, "/props")).read(Props)
        return figures(metrics, slots.read(list[Slot]), self._props)


def figures(metrics: Answer, slots: list[Slot] | None, props: Props | None) -> WorkerReport:
    """A healthy server's report from what it offers."""
    page = Metrics(metrics.body if metrics.ok else b"")
    running = page.count("llamacpp:requests_processing")
    if running is None and slots is not None:
        running = sum(slot.is_processing for slot in slots)
    context = props.default_generation_settings.n_ctx if props else None
    capacity = props.total_slots * context if props and context else None
    used = page.mean("llamacpp:kv_cache_usage_ratio")
    if used is None and capacity and slots is not None:
        used = sum(slot.n_prompt_tokens for slot in slots if slot.is_processing) / capacity
    return WorkerReport(
        healthy=True,
        running=running,
        waiting=page.count("llamacpp:requests_deferred"),
        kv_used=used,
        kv_capacity_tokens=capacity,
        max_model_len=context,
    )
