"""How does Paceline talk to TensorRT-LLM's server, `trtllm-serve`?"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import aiohttp
import msgspec
from msgspec import Raw

from paceline.domain.worker import WorkerReport
from paceline.engines.continuation import longer_prompt
from paceline.engines.metrics import Metrics
from paceline.engines.probe import Models, Probe

BODIES = {"/v1/chat/completions": "ChatCompletionRequest", "/v1/completions": "CompletionRequest"}
"""What its description of its own API calls the bodies of its endpoints."""


class Body(msgspec.Struct, frozen=True):
    """The fields of a body."""

    properties: dict[str, Raw] = {}


class Components(msgspec.Struct, frozen=True):
    schemas: dict[str, Body]


class Description(msgspec.Struct, frozen=True):
    """The answer of `/openapi.json`."""

    components: Components

    def takes(self, field: str) -> frozenset[str]:
        """The endpoints whose bodies have this field."""
        known = self.components.schemas
        return frozenset(
            path
            for path, body in BODIES.items()
            if body in known and field in known[body].properties
        )


class Cache(msgspec.Struct, frozen=True, rename="camel"):
    """`kvCacheStats`. Blocks that are only cached are not used; the last two are totals."""

    max_num_blocks: int = 0
    used_num_blocks: int = 0
    tokens_per_block: int = 0
    reused_blocks: int = 0
    missed_blocks: int = 0


class Step(msgspec.Struct, frozen=True, rename="camel"):
    """One of the engine's iterations, from `/metrics`, which is JSON here."""

    num_active_requests: int | None = None
    num_queued_requests: int | None = None
    max_num_tokens_runtime: int | None = None
    kv_cache_stats: Cache = Cache()


class TRTLLM:
    """The dialect of `trtllm-serve` as of 1.3; before, it has no priorities and fewer figures.

    A closed connection frees its slot within a second: so often the server looks.
    """

    kind = "trtllm"

    def __init__(self, url: str, model_name_at_engine: str, api_key: str) -> None:
        self._probe = Probe(url, api_key)
        self._name = model_name_at_engine
        self._models: Models | None = None
        """What it serves, asked anew after each time that it was not healthy. So with the rest."""
        self._with_priority: frozenset[str] = frozenset()
        self._last: Step | None = None

    def extras(self, path: str, urgency: int) -> Mapping[str, Any]:
        """Its `priority`, 0 to 1: higher runs earlier, with `waiting_queue_policy: priority`.

        It refuses bodies with fields that it does not know, so it is asked whether it knows this.
        """
        return {"priority": 1 / (1 + urgency)} if path in self._with_priority else {}

    def token_ids(self, path: str) -> Mapping[str, Any]:
        """None: it answers with text or with ids, never with both."""
        return {}

    def continuation(
        self, path: str, body: dict[str, Any], text: str, token_ids: list[int] | None
    ) -> dict[str, Any] | None:
        """Text completions go on; one of no stated length fills the context. A chat cannot: there
        is no field to leave its last message open."""
        return longer_prompt(body, text, token_ids) if path == "/v1/completions" else None

    async def report(self, session: aiohttp.ClientSession) -> WorkerReport:
        """`/health` tells if the engine failed. Figures need `enable_iter_perf_stats`, and on a
        page for Prometheus `return_perf_metrics` too; there they move as requests end. Without it
        they are in `/metrics`: reading empties it, and takes two seconds if it is empty."""
        health, page = await asyncio.gather(
            self._probe.get(session, "/health"), self._probe.get(session, "/prometheus/metrics")
        )
        because = "" if health.ok else health.trouble
        if not because and self._models is None:
            because = await self._learn(session)
        if because:
            self._models = self._last = None
            return WorkerReport(False, because)
        if page.ok:
            return figures(Metrics(page.body))
        steps = (await self._probe.get(session, "/metrics")).read(list[Step])
        if steps:
            self._last = steps[-1]
        return WorkerReport(True) if self._last is None else figures_of(self._last, not steps)

    async def _learn(self, session: aiohttp.ClientSession) -> str:
        """Ask what it serves and reads. Returns what is wrong with it, if anything."""
        told = (await self._probe.get(session, "/openapi.json")).read(Description)
        self._with_priority = told.takes("priority") if told else frozenset()
        self._models, because = await self._probe.serves(session, self._name)
        return because


def figures(page: Metrics) -> WorkerReport:
    """A healthy engine's report from its page for Prometheus."""
    blocks = int(page.mean("trtllm_kv_cache_max_blocks") or 0)
    block_size = int(page.mean("trtllm_kv_cache_tokens_per_block") or 0)
    configs = [labels for labels, _ in page.samples("trtllm_model_config_info")]
    lengths = [config.get("max_model_len", "") for config in configs]
    return WorkerReport(
        healthy=True,
        running=page.count("trtllm_num_requests_running"),
        waiting=page.count("trtllm_num_requests_waiting"),
        kv_used=page.mean("trtllm_kv_cache_utilization"),
        kv_capacity_tokens=blocks * block_size or None,
        block_size=block_size or None,
        prefix_queries_total=page.total("trtllm_prompt_tokens_total"),
        prefix_hits_total=page.total("trtllm_prompt_cached_tokens_total"),
        max_model_len=next((int(length) for length in lengths if length.isdecimal()), None),
        prefill_budget=int(page.mean("trtllm_max_num_tokens_runtime") or 0) or None,
    )


def figures_of(step: Step, idle: bool) -> WorkerReport:
    """A healthy engine's report from the last step that it told of. Idle: it made none since."""
    cache = step.kv_cache_stats
    used = 0 if idle else cache.used_num_blocks
    tokens, found = cache.tokens_per_block, float(cache.reused_blocks)
    return WorkerReport(
        healthy=True,
        running=0 if idle else step.num_active_requests,
        waiting=0 if idle else step.num_queued_requests,
        kv_used=used / cache.max_num_blocks if cache.max_num_blocks else None,
        kv_capacity_tokens=cache.max_num_blocks * tokens or None,
        block_size=tokens or None,
        prefix_queries_total=tokens * (found + cache.missed_blocks) if tokens else None,
        prefix_hits_total=tokens * found if tokens else None,
        prefill_budget=step.max_num_tokens_runtime or None,
    )
