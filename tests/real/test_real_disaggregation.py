"""Do two real vLLM processes share a request as if there were but one?

One prefills, the other answers, and the KV cache goes from one to the other by NIXL. What the
second engine answers by itself, at temperature 0, is what the client must get.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any
from unittest import mock

import aiohttp
import msgspec
import pytest
import uvloop
from handed import between_the_legs
from install import connectors_are_ready
from live import free_port
from servers import Engine, together, vllm_server

from paceline.engines.metrics import Metrics
from paceline.kernel import Settings
from paceline.kernel.handover import HandOver
from stand import MODEL, Reply, Stand, live_gateway, until

pytestmark = [
    pytest.mark.real,
    pytest.mark.usefixtures("every_prompt_handed_over"),
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        not connectors_are_ready() and os.environ.get("PACELINE_REAL") != "1",
        reason="engines are not installed: python tests/real/install.py all",
    ),
]

LEASE_S = 12
"""How long the first engine holds a prompt: not vLLM's 30 s, so that a test can wait for it."""
SURE_S = 6.0
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
STORY = "Once upon a time an old clockmaker repaired every clock in the valley. "
TOKENS = 12


def handing_over(role: str, core: int) -> Any:
    """A vLLM that prefills (`kv_producer`) or answers (`kv_consumer`)."""
    connector = {
        "kv_connector": "NixlConnector",
        "kv_role": role,
        "kv_buffer_device": "cpu",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"kv_lease_duration": LEASE_S},
    }
    extra = ["--kv-transfer-config", msgspec.json.encode(connector).decode(), "--block-size", "64"]
    environment = {
        "PACELINE_SMALL_CPUS": "1",
        "UCX_NET_DEVICES": "lo",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
    }
    return vllm_server(free_port(), core, extra=extra, env=environment)


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Engine]]:
    with together(handing_over("kv_producer", 0), handing_over("kv_consumer", 1)) as engines:
        yield engines


@asynccontextmanager
async def gateway_before(
    pair: list[Engine], transfer: str = "nixl", **first: Any
) -> AsyncIterator[Stand]:
    """A live gateway; `first`: settings of the worker that prefills."""
    first = {"role": "prefill", "transfer": transfer, "lease_s": SURE_S, **first}
    async with live_gateway(
        *(engine.url for engine in pair),
        kind="vllm",
        settings=Settings(policy="least-requests"),
        parts=[first, {"role": "decode", "transfer": transfer}],
        asks=True,
    ) as gateway:
        await until(lambda: all(w.usable(1e12) for w in gateway.host.kernel.workers.values()))
        yield gateway
        await gateway.settled()


def body_of(path: str, prompt: str, tokens: int = TOKENS, **fields: Any) -> dict[str, Any]:
    said = (
        {"messages": [{"role": "user", "content": prompt}]} if path == CHAT else {"prompt": prompt}
    )
    limits = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return {"model": MODEL, **said, **limits, **fields}


def long_prompt(name: str) -> str:
    return f"The story of {name}. " + STORY * 15


async def alone(engine: Engine, path: str, prompt: str, tokens: int = TOKENS) -> str:
    """What it answers by itself, of a cache that nobody else has written."""
    body = body_of(path, prompt, tokens, cache_salt="alone")
    async with aiohttp.ClientSession() as http, http.post(engine.url + path, json=body) as answer:
        choice = (await answer.json())["choices"][0]
    return str(choice["message"]["content"] if path == CHAT else choice["text"])


def words(reply: Reply) -> str:
    choices = [c for e in reply.events if isinstance(e, dict) for c in e.get("choices", ())]
    return "".join(c["delta"].get("content") or "" if "delta" in c else c["text"] for c in choices)


async def metrics(engine: Engine) -> Metrics:
    async with aiohttp.ClientSession() as http, http.get(engine.url + "/metrics") as page:
        return Metrics(await page.read())


async def fetched(engine: Engine) -> float:
    """Tokens of prompts that it has had from the other engine."""
    return (await metrics(engine)).total("vllm:external_prefix_cache_hits_total") or 0.0


async def computed(engine: Engine) -> float:
    """Tokens of prompts that it has computed by itself."""
    samples = (await metrics(engine)).samples("vllm:prompt_tokens_by_source_total")
    return sum(n for labels, n in samples if labels["source"] == "local_compute")


async def held(engine: Engine) -> float:
    return (await metrics(engine)).mean("vllm:kv_cache_usage_perc") or 0.0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_two_engines_answer_as_one(pair: list[Engine], path: str, stream: bool) -> None:
    async def run() -> None:
        prompt = long_prompt(f"{path} {stream}")
        async with gateway_before(pair) as gateway:
            had, made = await fetched(pair[1]), await computed(pair[1])
            reply = await gateway.ask(body_of(path, prompt, stream=stream), path)
            tokens = gateway.outcomes[0].prompt_tokens or 0
            assert await fetched(pair[1]) - had == tokens > 200
            assert await computed(pair[1]) == made
            assert gateway.outcomes[0].prefilled_at == "w0"
            if stream:
                said = words(reply)
            else:
                choice = reply.json["choices"][0]
                said = choice["message"]["content"] if path == CHAT else choice["text"]
            assert said == await alone(pair[1], path, prompt)

    uvloop.run(run())


def test_requests_at_once_are_not_mixed_up(pair: list[Engine]) -> None:
    async def run() -> None:
        prompts = [long_prompt(name) for name in ("Ann", "Bob", "Cid", "Dee")]
        async with gateway_before(pair) as gateway:
            asks = [gateway.ask(body_of(TEXT, p, stream=True), TEXT) for p in prompts]
            replies = await asyncio.gather(*asks)
            for prompt, reply in zip(prompts, replies, strict=True):
                assert words(reply) == await alone(pair[1], TEXT, prompt)
            assert [outcome.prefilled_at for outcome in gateway.outcomes] == ["w0"] * 4

    uvloop.run(run())


def test_a_client_that_leaves_between_the_legs_frees_the_blocks(pair: list[Engine]) -> None:
    async def run() -> None:
        async with gateway_before(pair) as gateway:
            with between_the_legs() as kept:
                body = body_of(TEXT, long_prompt("nobody"), stream=True)
                asking = asyncio.create_task(gateway.ask(body, TEXT))
                await until(lambda: kept)
                before = await held(pair[0])
                assert before > 0
                asking.cancel()
                async with asyncio.timeout(SURE_S):  # sooner than they would be by themselves
                    while await held(pair[0]) > 0:  # noqa: ASYNC110 - an engine tells nobody
                        await asyncio.sleep(0.1)
            assert not (await metrics(pair[0])).total("vllm:nixl_num_kv_expired_reqs_total")

    uvloop.run(run())


def test_what_is_too_old_is_prefilled_again(pair: list[Engine]) -> None:
    """Fetched, it would be others' blocks: here another prompt's, which takes the room."""

    async def run() -> None:
        prompt = long_prompt("patience")
        async with gateway_before(pair) as gateway:
            had = await fetched(pair[1])
            with between_the_legs() as kept:
                asking = asyncio.create_task(gateway.ask(body_of(TEXT, prompt, stream=True), TEXT))
                await until(lambda: kept)
                while await held(pair[0]) > 0:  # noqa: ASYNC110
                    await asyncio.sleep(0.2)
            assert (await metrics(pair[0])).total("vllm:nixl_num_kv_expired_reqs_total") == 1
            with mock.patch.object(HandOver, "holds", return_value=True):  # the kernel errs
                gateway.host.tell(kept[0])
            reply = await asking
            assert await fetched(pair[1]) == had
            assert words(reply) == await alone(pair[1], TEXT, prompt)

    uvloop.run(run())


def test_an_engine_killed_while_it_prefills_costs_no_request(pair: list[Engine]) -> None:
    async def run() -> None:  # from here on the first engine is dead
        prompt = long_prompt("the last one of its kind")
        async with gateway_before(pair) as gateway:
            asking = asyncio.create_task(gateway.ask(body_of(TEXT, prompt, stream=True), TEXT))
            await until(lambda: any(e.prefills_at for e in gateway.host.exchanges.values()))
            await asyncio.sleep(0.3)
            os.killpg(pair[0].process_id, signal.SIGKILL)
            reply = await asking
            assert gateway.outcomes[0].prefilled_at == ""
            assert words(reply) == await alone(pair[1], TEXT, prompt)

    uvloop.run(run())


def test_an_engine_killed_within_its_answer_ends_it_clearly(pair: list[Engine]) -> None:
    async def run() -> None:  # and the second one, too
        async with live_gateway(pair[1].url, kind="vllm", asks=True) as gateway:
            body = body_of(TEXT, STORY, tokens=200, stream=True)
            asking = asyncio.create_task(gateway.ask(body, TEXT))
            await until(lambda: any(e.first_at for e in gateway.host.exchanges.values()))
            os.killpg(pair[1].process_id, signal.SIGKILL)
            reply = await asking
            assert "error" in reply.events[-1]

    uvloop.run(run())
