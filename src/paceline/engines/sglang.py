"""How does Paceline talk to SGLang?"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
import msgspec

from paceline.domain.worker import WorkerReport
from paceline.engines.continuation import (
    COMPLETION_TOKENS,
    last_message,
    longer_chat,
    longer_prompt,
)
from paceline.engines.metrics import Metrics
from paceline.engines.probe import Models, Probe

WITH_PRIORITY = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


class Load(msgspec.Struct, frozen=True):
    """What one scheduler has to do, from `/v1/loads`: one for each data-parallel rank."""

    num_running_reqs: int
    num_waiting_reqs: int
    token_usage: float
    """Share of its KV cache in use; what is only cached does not count."""
    max_total_num_tokens: int


class Loads(msgspec.Struct, frozen=True):
    """The answer of `/v1/loads`."""

    loads: list[Load]


class Info(msgspec.Struct, frozen=True):
    """How the server was started, from `/server_info`."""

    max_total_num_tokens: int | None = None
    page_size: int | None = None
    """Tokens of a block of its KV cache."""
    chunked_prefill_size: int | None = None
    """Tokens that a step may prefill; -1: it does not split prompts."""
    enable_priority_scheduling: bool = False
    schedule_low_priority_values_first: bool = False


class SGLang:
    """SGLang's dialect as of 0.5.23, and its older `/get_server_info`.

    A closed connection frees its slot: that of a stream at once, and in older versions after two
    seconds; that of an answer in one piece when the server looks next, within four seconds or 50
    tokens. So nobody needs its `/abort_request`, which may want a key of its own.
    """

    kind = "sglang"

    def __init__(self, url: str, model_name_at_engine: str, api_key: str) -> None:
        self._probe = Probe(url, api_key)
        self._name = model_name_at_engine
        self._models: Models | None = None
        """What it serves, asked anew after each time that it was not healthy. So with the rest."""
        self._info: Info | None = None

    def extras(self, path: str, urgency: int) -> Mapping[str, Any]:
        """Its `priority`: higher runs earlier, unless it was started to see it the other way.

        Only for a server that schedules by it: others ignore it at best, and at worst refuse it.
        Running requests are preempted only for one that is above theirs by more than ten.
        """
        info = self._info
        if info is None or not info.enable_priority_scheduling or path not in WITH_PRIORITY:
            return {}
        return {"priority": urgency if info.schedule_low_priority_values_first else -urgency}

    def token_ids(self, path: str) -> Mapping[str, Any]:
        """Chats go on by their messages, so that their ids would serve nothing."""
        return {"return_token_ids": True} if path == "/v1/completions" else {}

    def continuation(
        self, path: str, body: dict[str, Any], text: str, token_ids: list[int] | None
    ) -> dict[str, Any] | None:
        """A chat's partial answer is written again after the mark with which answers begin.

        Its penalty for repetitions is for what the answer has said, and a prompt does not get it.
        An assistant's last message that is not to be continued it takes for a user's: with more
        after it, it would be an assistant's again.
        """
        if body.get("repetition_penalty") not in (None, 1):
            return None
        if path == "/v1/completions":
            return longer_prompt({"max_tokens": COMPLETION_TOKENS, **body}, text, token_ids)
        if path != "/v1/chat/completions":
            return None
        is_open = bool(body.get("continue_final_message"))
        if not is_open and last_message(body).get("role") == "assistant":
            return None
        longer = longer_chat(body, text, last_is_open=is_open)
        return None if longer is None else {**longer, "continue_final_message": True}

    async def report(self, session: aiohttp.ClientSession) -> WorkerReport:
        """`/health` waits for a sign of life: a second at least, and an idle engine writes a token
        for it. So the figures are asked for after it. `/metrics` needs `--enable-metrics`."""
        health = await self._probe.get(session, "/health")
        because = "" if health.ok else health.trouble
        if not because and self._models is None:
            because = await self._ask_models(session)
        if because:
            self._models = self._info = None
            return WorkerReport(False, because)
        assert self._models is not None
        if self._info is None:
            self._info = await self._ask_info(session)
        loads, metrics = await asyncio.gather(
            self._probe.get(session, "/v1/loads?include=core"), self._probe.get(session, "/metrics")
        )
        told = loads.read(Loads)
        page = metrics.body if metrics.ok else b""
        return figures(told.loads if told else [], page, self._info, self._models.max_model_len)

    async def _ask_models(self, session: aiohttp.ClientSession) -> str:
        """Learn what is served. Returns what is wrong with it, if anything."""
        self._models, because = await self._probe.serves(session, self._name)
        base, _, _ = self._name.rpartition(":")  # so is a LoRA adapter of it named
        return "" if self._models and base in self._models.names else because

    async def _ask_info(self, session: aiohttp.ClientSession) -> Info | None:
        answer = await self._probe.get(session, "/server_info")
        if answer.status == 404:
            answer = await self._probe.get(session, "/get_server_info")
        return answer.read(Info)


def figures(
    loads: Sequence[Load], page: bytes, info: Info | None, max_model_len: int | None
) -> WorkerReport:
    """A healthy engine's report. Its loads are newer than its metrics, where it has both."""
    metrics, info = Metrics(page), info or Info()
    running = _of_all(metrics, "sglang:num_running_reqs")
    waiting = _of_all(metrics, "sglang:num_queue_reqs")
    used = metrics.mean("sglang:token_usage")
    capacity = metrics.count("sglang:max_total_num_tokens") or info.max_total_num_tokens
    if loads:
        running = sum(load.num_running_reqs for load in loads)
        waiting = sum(load.num_waiting_reqs for load in loads)
        used = sum(load.token_usage for load in loads) / len(loads)
        capacity = sum(load.max_total_num_tokens for load in loads) or capacity
    budget = info.chunked_prefill_size or 0
    return WorkerReport(
        healthy=True,
        running=running,
        waiting=waiting,
        kv_used=used,
        kv_capacity_tokens=capacity or None,
        block_size=info.page_size,
        preemptions_total=metrics.total("sglang:num_retracted_requests_total"),
        prefix_queries_total=metrics.total("sglang:prompt_tokens_total"),
        prefix_hits_total=metrics.total("sglang:cached_tokens_total"),
        max_model_len=max_model_len,
        prefill_budget=budget if budget > 0 else None,
    )


def _of_all(metrics: Metrics, name: str) -> int | None:
    """A number of requests; those of each priority are counted again under its label."""
    found = [n for labels, n in metrics.samples(name) if not labels.get("priority")]
    return int(sum(found)) if found else None
