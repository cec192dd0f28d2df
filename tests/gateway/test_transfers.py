"""Do engines that hand over in other ways than the emulated one get what they want?

They answer by script here, as SGLang, TensorRT-LLM and vLLM with Mooncake would by their source.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from typing import Any

import pytest
from scripted import Act, Asked, Part, answer, scripted, stream

from paceline.gateway.link import Timeouts
from paceline.kernel import Settings
from stand import Stand, live_gateway, on_loop, until

pytestmark = pytest.mark.usefixtures("every_prompt_handed_over")

POLICY = Settings(policy="least-requests", hold_s=0.2)
SAID: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "seed": 3}
COUNTS = {"usage": {"prompt_tokens": 7, "completion_tokens": 1, "prompt_tokens_details": None}}


def parts(transfer: str, **first: Any) -> list[dict[str, Any]]:
    of = {"transfer": transfer}
    return [{"role": "prefill", **of, **first}, {"role": "decode", **of}]


def whole(body: Any) -> bytes:
    return answer(json.dumps({**COUNTS, **body}).encode())


async def ask(gateway: Stand, **fields: Any) -> Any:
    return await gateway.ask({**SAID, "stream": True, **fields})


class Rooms:
    """Where SGLang's workers meet: neither answers before the other is there."""

    def __init__(self) -> None:
        self.open: dict[int, dict[str, asyncio.Event]] = defaultdict(
            lambda: {"first": asyncio.Event(), "second": asyncio.Event()}
        )
        self.bodies: list[Any] = []

    def enter(self, asked: Asked, who: str, other: str) -> asyncio.Event:
        self.bodies.append(asked.json)
        room = self.open[asked.json["bootstrap_room"]]
        room[who].set()
        return room[other]

    def first(self, asked: Asked) -> list[Part]:
        return [self.enter(asked, "first", "second"), whole({"choices": []})]

    def second(self, asked: Asked) -> list[Part]:
        return [self.enter(asked, "second", "first"), stream(3)]


@pytest.mark.parametrize("policy", ["least-requests", "headroom"])
@on_loop
async def test_sglang_s_workers_get_the_same_request_at_the_same_time(policy: str) -> None:
    rooms = Rooms()
    async with (
        scripted(rooms.first, rooms.second) as (first, second),
        live_gateway(
            first.url,
            second.url,
            settings=Settings(policy=policy, hold_s=0.2),
            parts=parts("sglang", bootstrap_port=8765),
        ) as gateway,
    ):
        reply = await ask(gateway)
        assert reply.text == "hihihi"
        one, two = rooms.bodies
        assert one["bootstrap_room"] == two["bootstrap_room"] < 1 << 63
        assert (one["bootstrap_host"], one["bootstrap_port"]) == ("127.0.0.1", 8765)
        streaming = ("stream", "stream_options")
        assert {k: v for k, v in two.items() if k not in streaming} == one
        ids = {e.asked[-1].headers["x-request-id"] for e in (first, second)}
        assert len(ids) == 1
        await gateway.settled()
        assert gateway.outcomes[0].prefilled_at == "w0"


@pytest.mark.parametrize("dies", ["first", "second"])
@on_loop
async def test_if_one_of_sglang_s_workers_fails_the_other_is_let_go(dies: str) -> None:
    def gone(asked: Asked) -> list[Part]:
        return [Act.RESET]

    def waits(asked: Asked) -> list[Part]:
        return [Act.HANG]

    async with (
        scripted(*((gone, waits) if dies == "first" else (waits, gone))) as engines,
        live_gateway(
            *(engine.url for engine in engines),
            settings=POLICY,
            parts=parts("sglang", bootstrap_port=1),
        ) as gateway,
    ):
        reply = await ask(gateway)
        assert reply.status in (429, 502, 503)
        await gateway.settled()
        await until(lambda: not any(engine.open for engine in engines))


@on_loop
async def test_a_client_that_leaves_both_of_sglang_s_workers_frees_both() -> None:
    def waits(asked: Asked) -> list[Part]:
        return [Act.HANG]

    async with (
        scripted(waits, waits) as engines,
        live_gateway(
            *(engine.url for engine in engines),
            settings=POLICY,
            parts=parts("sglang", bootstrap_port=1),
        ) as gateway,
    ):
        asking = asyncio.create_task(ask(gateway))
        await until(lambda: all(engine.asked for engine in engines))
        asking.cancel()
        await until(lambda: not any(engine.open for engine in engines))
        await gateway.settled()


@on_loop
async def test_trtllm_s_second_worker_goes_on_from_the_first_one_s_state() -> None:
    def context(asked: Asked) -> list[Part]:
        told = asked.json["disaggregated_params"]
        assert told["request_type"] == "context_only"
        state = {**told, "first_gen_tokens": [42], "encoded_opaque_state": "abc="}
        choice = {"finish_reason": "length", "disaggregated_params": state}
        return [whole({"choices": [choice], "prompt_token_ids": [1, 2, 3]})]

    def generation(asked: Asked) -> list[Part]:
        told = asked.json["disaggregated_params"]
        assert (told["request_type"], told["first_gen_tokens"]) == ("generation_only", [42])
        assert told["encoded_opaque_state"] == "abc="
        assert asked.json["prompt_token_ids"] == [1, 2, 3]
        assert asked.json["messages"] == SAID["messages"]
        return [stream(4)]

    async with (
        scripted(context, generation) as engines,
        live_gateway(*(e.url for e in engines), settings=POLICY, parts=parts("trtllm")) as gateway,
    ):
        assert (await ask(gateway)).text == "hi" * 4
        assert gateway.outcomes[0].prefilled_at == "w0"


@on_loop
async def test_trtllm_s_answer_of_one_token_is_written_by_one_worker() -> None:
    def context(asked: Asked) -> list[Part]:
        choice = {"finish_reason": "stop", "disaggregated_params": {"first_gen_tokens": [2]}}
        return [whole({"choices": [choice]})]

    def generation(asked: Asked) -> list[Part]:
        assert asked.json["disaggregated_params"] is None
        return [stream(1)]

    async with (
        scripted(context, generation) as engines,
        live_gateway(*(e.url for e in engines), settings=POLICY, parts=parts("trtllm")) as gateway,
    ):
        assert (await ask(gateway)).text == "hi"
        assert not any(w.failures for w in gateway.host.kernel.workers.values())


@on_loop
async def test_mooncake_s_workers_know_a_hand_over_by_its_name() -> None:
    """The first one's bootstrap server is on the same port as its API here."""
    names: list[str] = []

    def first(asked: Asked) -> list[Part]:
        if asked.target == "/query":
            return [answer(b'{"0": {"engine_id": "E7", "worker_addr": {}}}')]
        told = asked.json["kv_transfer_params"]
        assert told["do_remote_decode"]
        assert (asked.json["max_tokens"], asked.json["min_tokens"]) == (1, 1)
        names.append(told["transfer_id"])
        return [whole({"choices": [], "kv_transfer_params": None})]

    def second(asked: Asked) -> list[Part]:
        if asked.target == "/query":
            return [answer(b"", 404)]
        told = asked.json["kv_transfer_params"]
        assert (told["remote_engine_id"], told["transfer_id"]) == ("E7", names[0])
        assert told["do_remote_prefill"]
        assert asked.json["max_tokens"] == SAID["max_tokens"]
        return [stream(2)]

    async with scripted(first, second) as engines:
        ports = [{"bootstrap_port": engine.port} for engine in engines]
        shares = [{**part, **port} for part, port in zip(parts("mooncake"), ports, strict=True)]
        async with live_gateway(
            *(engine.url for engine in engines), settings=POLICY, parts=shares
        ) as gateway:
            await until(lambda: any(asked.target == "/query" for asked in engines[0].asked))
            assert (await ask(gateway)).text == "hihi"
            assert gateway.outcomes[0].prefilled_at == "w0"


@pytest.mark.parametrize(
    "said",
    [
        b"{}",
        b"[]",
        b"not json",
        b'{"kv_transfer_params": 5}',
        b'{"kv_transfer_params": {"do_remote_prefill": "yes", "remote_port": []}, "usage": 5}',
    ],
)
@on_loop
async def test_whatever_a_worker_answers_to_a_prefill_costs_no_request(said: bytes) -> None:
    def first(asked: Asked) -> list[Part]:
        return [answer(said)]

    def second(asked: Asked) -> list[Part]:
        return [stream(2)]

    async with (
        scripted(first, second) as engines,
        live_gateway(*(e.url for e in engines), settings=POLICY, parts=parts("nixl")) as gateway,
    ):
        assert (await ask(gateway)).text == "hihi"


@pytest.mark.parametrize("silence", ["connecting", "answering"])
@on_loop
async def test_a_prefill_that_takes_too_long_is_given_up(silence: str) -> None:
    def first(asked: Asked) -> list[Part]:
        return [Act.HANG]

    def second(asked: Asked) -> list[Part]:
        return [stream(2)]

    timeouts = Timeouts(connect_s=0.2, first_token_s=0.2)
    async with scripted(first, second) as (one, two):
        url = "http://10.255.255.1:9" if silence == "connecting" else one.url
        async with live_gateway(
            url, two.url, settings=POLICY, parts=parts("nixl"), timeouts=timeouts
        ) as gateway:
            assert (await ask(gateway)).text == "hihi"
            await gateway.settled()
            await until(lambda: not one.open)
