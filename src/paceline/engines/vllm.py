"""How does Paceline talk to vLLM? Also to the emulated engine, which looks like it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import aiohttp

from paceline.domain.worker import WorkerReport
from paceline.engines.continuation import COMPLETION_TOKENS, longer_chat, longer_prompt
from paceline.engines.metrics import Metrics
from paceline.engines.probe import Models, Probe

GAPS = ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds")
WITH_PRIORITY = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


class VLLM:
    """vLLM's dialect as of 0.32, and older names of its metrics."""

    kind = "vllm"

    def __init__(self, url: str, model_name_at_engine: str, api_key: str) -> None:
        self._probe = Probe(url, api_key)
        self._name = model_name_at_engine
        self._models: Models | None = None
        """What it serves, asked anew after each time that it was not healthy."""

    def extras(self, path: str, urgency: int) -> Mapping[str, Any]:
        """Its `priority`: lower runs earlier. Without `--scheduling-policy priority` ignored."""
        return {"priority": urgency} if path in WITH_PRIORITY else {}

    def token_ids(self, path: str) -> Mapping[str, Any]:
        """Chats go on by their messages, so that their ids would serve nothing."""
        return {"return_token_ids": True} if path == "/v1/completions" else {}

    def continuation(
        self, path: str, body: dict[str, Any], text: str, token_ids: list[int] | None
    ) -> dict[str, Any] | None:
        """A chat's partial answer is left open at its end; its template must allow that."""
        if path == "/v1/completions":
            return longer_prompt({"max_tokens": COMPLETION_TOKENS, **body}, text, token_ids)
        if path != "/v1/chat/completions":
            return None
        longer = longer_chat(body, text, last_is_open=bool(body.get("continue_final_message")))
        if longer is None:
            return None
        return {**longer, "continue_final_message": True, "add_generation_prompt": False}

    async def report(self, session: aiohttp.ClientSession) -> WorkerReport:
        """`/health` says whether its engine core lives; the figures are in `/metrics`."""
        health, metrics = await asyncio.gather(
            self._probe.get(session, "/health"), self._probe.get(session, "/metrics")
        )
        because = "" if health.ok else health.trouble
        if not because and self._models is None:
            self._models, because = await self._probe.serves(session, self._name)
        if because:
            self._models = None
            return WorkerReport(False, because)
        assert self._models is not None
        return figures(metrics.body if metrics.ok else b"", self._models.max_model_len)


def figures(page: bytes, max_model_len: int | None) -> WorkerReport:
    """A healthy engine's report from its metrics; with data parallelism, over all its engines."""
    metrics = Metrics(page)
    blocks = [labels for labels, _ in metrics.samples("vllm:cache_config_info")]
    sizes = [_whole(labels.get("block_size")) for labels in blocks]
    capacities = [_capacity(labels) for labels in blocks]
    return WorkerReport(
        healthy=True,
        running=metrics.count("vllm:num_requests_running"),
        waiting=metrics.count("vllm:num_requests_waiting"),
        kv_used=metrics.mean("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
        kv_capacity_tokens=sum(capacities) or None,
        block_size=sizes[0] or None if sizes else None,
        preemptions_total=metrics.total("vllm:num_preemptions_total", "vllm:num_preemptions"),
        prefix_queries_total=metrics.total(
            "vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total"
        ),
        prefix_hits_total=metrics.total(
            "vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"
        ),
        max_model_len=max_model_len,
        gaps_total=metrics.total(*(f"{name}_count" for name in GAPS)),
        gaps_s_total=metrics.total(*(f"{name}_sum" for name in GAPS)),
    )


def _capacity(labels: Mapping[str, str]) -> int:
    """Tokens that fit the KV cache; where layers differ in kind, only the engine can tell."""
    told = _whole(labels.get("kv_cache_size_tokens"))
    return told or _whole(labels.get("num_gpu_blocks")) * _whole(labels.get("block_size"))


def _whole(text: str | None) -> int:
    """A label's number; 0 where it says None."""
    return int(text) if text and text.isdecimal() and len(text) < 16 else 0
