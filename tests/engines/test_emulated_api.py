"""Does the emulated engine look like vLLM to real clients?"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import msgspec
import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError

from paceline.engines.emulated import EngineSettings, emulated_engines

Body = dict[str, Any]
TINY = EngineSettings(profile="tiny", model="m", speed=20.0)
HELLO = {"role": "user", "content": "Hello, how are you?"}


def numbered(start: int, count: int) -> str:
    return "".join(f" t{i}" for i in range(start, start + count))


def against(
    test: Callable[[aiohttp.ClientSession], Awaitable[None]], settings: EngineSettings = TINY
) -> None:
    async def run() -> None:
        async with (
            emulated_engines([settings]) as (engine,),
            aiohttp.ClientSession(engine.url) as http,
        ):
            await test(http)

    asyncio.run(run())


def with_openai(test: Callable[[AsyncOpenAI], Awaitable[None]]) -> None:
    async def run() -> None:
        async with (
            emulated_engines([TINY]) as (engine,),
            AsyncOpenAI(base_url=engine.url + "/v1", api_key="none", max_retries=0) as client,
        ):
            await test(client)

    asyncio.run(run())


async def post(http: aiohttp.ClientSession, path: str, **body: Any) -> Body:
    async with http.post(path, json=body) as answer:
        assert answer.status == 200, await answer.text()
        return dict(await answer.json())


async def get(http: aiohttp.ClientSession, path: str) -> Body:
    async with http.get(path) as answer:
        return dict(await answer.json())


async def events(http: aiohttp.ClientSession, path: str, **body: Any) -> list[Body]:
    """The events' data; a named event must be of its name's type."""
    found = []
    async with http.post(path, json={**body, "stream": True}) as answer:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        for block in (await answer.text()).removesuffix("\n\n").split("\n\n"):
            *name, data = block.split("\n")
            if data != "data: [DONE]":
                found.append(msgspec.json.decode(data.removeprefix("data: "), type=Body))
                assert name in ([], [f"event: {found[-1].get('type')}"])
    return found


def test_a_chat_streams_each_token_once_and_in_order() -> None:
    async def test(client: AsyncOpenAI) -> None:
        stream = await client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "Hi"}],
            max_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [c.choices[0].delta.content for c in chunks[1:-1]] == [f" t{i}" for i in range(40)]
        assert chunks[-2].choices[0].finish_reason == "length"
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 40

    with_openai(test)


def test_whole_answers_agree_with_streamed_ones() -> None:
    async def test(client: AsyncOpenAI) -> None:
        ask: Any = {"model": "m", "messages": [HELLO], "max_tokens": 200}
        whole = await client.chat.completions.create(**ask)
        text = ""
        async for chunk in await client.chat.completions.create(**ask, stream=True):
            text += chunk.choices[0].delta.content or ""
        assert whole.choices[0].message.content == text
        assert whole.usage is not None
        assert text == numbered(0, whole.usage.completion_tokens)

    with_openai(test)


def test_a_continuation_counts_on_and_ends_where_the_whole_would_have() -> None:
    async def test(http: aiohttp.ClientSession) -> None:
        whole = await post(http, "/v1/chat/completions", messages=[HELLO], max_tokens=3000)
        tokens = whole["usage"]["completion_tokens"]
        begun = {"role": "assistant", "content": numbered(0, tokens - 5)}
        rest = await post(
            http,
            "/v1/chat/completions",
            messages=[HELLO, begun],
            continue_final_message=True,
            add_generation_prompt=False,
        )
        assert rest["choices"][0]["message"]["content"] == numbered(tokens - 5, 5)
        assert rest["choices"][0]["finish_reason"] == "stop"

    against(test, EngineSettings(profile="tiny", speed=100.0, seed=3))


def test_token_ids_go_in_and_out() -> None:
    async def test(http: aiohttp.ClientSession) -> None:
        first = await post(
            http, "/v1/completions", prompt=[1, 2, 3], max_tokens=4, return_token_ids=True
        )
        choice = first["choices"][0]
        assert choice["prompt_token_ids"] == [1, 2, 3]
        chunks = await events(
            http,
            "/v1/completions",
            prompt=choice["prompt_token_ids"] + choice["token_ids"],
            max_tokens=2,
            ignore_eos=True,
            return_token_ids=True,
        )
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == numbered(4, 2)
        ids = [chunk["choices"][0]["token_ids"] for chunk in chunks]
        assert ids == [[choice["token_ids"][-1] + 1], [choice["token_ids"][-1] + 2]]

    against(test)


def test_usage_on_every_chunk_counts_its_tokens() -> None:
    async def test(http: aiohttp.ClientSession) -> None:
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = await events(
            http, "/v1/chat/completions", messages=[HELLO], max_tokens=3, stream_options=options
        )
        usages = [chunk["usage"] for chunk in chunks]
        assert [usage["completion_tokens"] for usage in usages] == [0, 1, 2, 3, 3]
        assert all(u["total_tokens"] == u["prompt_tokens"] + u["completion_tokens"] for u in usages)

    against(test)


def test_a_list_of_prompts_gives_a_choice_for_each() -> None:
    async def test(http: aiohttp.ClientSession) -> None:
        ask: Body = {"prompt": ["one", "two t6", [5, 6]], "max_tokens": 2, "ignore_eos": True}
        whole = await post(http, "/v1/completions", **ask)
        texts = [choice["text"] for choice in whole["choices"]]
        assert texts == [" t0 t1", " t7 t8", " t0 t1"]
        streamed = {0: "", 1: "", 2: ""}
        for chunk in await events(http, "/v1/completions", **ask):
            choice = chunk["choices"][0]
            streamed[choice["index"]] += choice["text"]
        assert list(streamed.values()) == texts

    against(test)


def test_a_second_turn_finds_the_first_in_the_cache() -> None:
    async def test(http: aiohttp.ClientSession) -> None:
        turns: list[Body] = [{"role": "user", "content": "x" * 640}]
        first = await post(http, "/v1/chat/completions", messages=turns, max_tokens=64)
        turns += [{"role": "assistant", "content": first["choices"][0]["message"]["content"]}]
        turns += [HELLO]
        second = await post(http, "/v1/chat/completions", messages=turns, max_tokens=1)
        cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert cached % 16 == 0
        known = first["usage"]["total_tokens"] - 1  # the last token's keys were never computed
        assert cached == known // 16 * 16

    against(test)


def test_responses_and_messages_and_embeddings_speak_their_own_format() -> None:
    async def test(client: AsyncOpenAI) -> None:
        stream = await client.responses.create(
            model="m", input="Hi", max_output_tokens=5, stream=True, extra_body={"ignore_eos": True}
        )
        seen = [event async for event in stream]
        assert [event.sequence_number for event in seen] == list(range(len(seen)))
        deltas = [e.delta for e in seen if e.type == "response.output_text.delta"]
        assert deltas == [f" t{i}" for i in range(5)]
        last = seen[-1]
        assert last.type == "response.incomplete"
        assert last.response.output_text == numbered(0, 5)
        whole = await client.responses.create(model="m", input="Hi", max_output_tokens=5)
        assert whole.usage is not None
        assert numbered(0, 5).startswith(whole.output_text)
        vectors = await client.embeddings.create(model="m", input=["a", "b", "a"])
        assert [len(item.embedding) for item in vectors.data] == [64] * 3
        assert vectors.data[0].embedding == vectors.data[2].embedding != vectors.data[1].embedding

    with_openai(test)


def test_messages_stream_as_anthropic_does() -> None:
    async def test(http: aiohttp.ClientSession) -> None:
        ask: Body = {"messages": [HELLO], "max_tokens": 3, "ignore_eos": True, "system": "Be kind."}
        whole = await post(http, "/v1/messages", **ask)
        assert whole["content"] == [{"type": "text", "text": " t0 t1 t2"}]
        assert whole["stop_reason"] == "max_tokens"
        found = await events(http, "/v1/messages", **ask)
        kinds = [event["type"] for event in found]
        assert kinds == [
            "message_start",
            "content_block_start",
            *["content_block_delta"] * 3,
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
        assert found[-2]["usage"]["output_tokens"] == 3

    against(test)


def test_refusals_are_in_the_shape_that_clients_know() -> None:
    async def test(client: AsyncOpenAI) -> None:
        with pytest.raises(NotFoundError, match="The model `zz` does not exist") as unknown:
            await client.completions.create(model="zz", prompt="Hi")
        assert unknown.value.body == {
            "message": "The model `zz` does not exist. Valid aliases: m.",
            "type": "NotFoundError",
            "param": "model",
            "code": 404,
        }
        with pytest.raises(BadRequestError, match="maximum context length is 4096 tokens"):
            await client.completions.create(model="m", prompt=[1] * 5000)
        with pytest.raises(BadRequestError, match="max_tokens"):
            await client.completions.create(model="m", prompt="Hi", max_tokens=5000)
        with pytest.raises(BadRequestError, match="one choice"):
            await client.completions.create(model="m", prompt="Hi", n=2)
        with pytest.raises(BadRequestError, match="empty"):
            await client.completions.create(model="m", prompt="")

    with_openai(test)


def test_bad_json_and_unknown_paths_are_refused() -> None:
    async def test(http: aiohttp.ClientSession) -> None:
        for path, body, status in (
            ("/v1/completions", b"{", 400),
            ("/v1/completions", b"{}", 400),
            ("/v1/completions", b'{"prompt": [1, "a"]}', 400),
            ("/v1/chat/completions", b'{"messages": []}', 400),
            ("/v1/nothing", b"{}", 404),
            ("/v1/models", b"{}", 405),
        ):
            async with http.post(path, data=body) as answer:
                assert answer.status == status, path

    against(test)


def test_the_other_endpoints_answer_as_vllm_does() -> None:
    async def test(http: aiohttp.ClientSession) -> None:
        for path in ("/health", "/ping"):
            async with http.get(path) as answer:
                assert (answer.status, await answer.read()) == (200, b"")
        assert await get(http, "/version") == {"version": "0.32.0"}
        assert await get(http, "/load") == {"server_load": 0}
        models = await get(http, "/v1/models")
        assert models["data"][0]["id"] == "m"
        assert models["data"][0]["max_model_len"] == 4096
        tokens = await post(http, "/tokenize", prompt="Hello world")
        assert tokens["count"] == len(tokens["tokens"]) == 3

    against(test)


def test_metrics_have_vllm_s_names_and_count_what_happened() -> None:
    async def test(http: aiohttp.ClientSession) -> None:
        for _ in range(2):
            await post(http, "/v1/completions", prompt=[7] * 40, max_tokens=10, ignore_eos=True)
        async with http.get("/metrics") as answer:
            text = await answer.text()
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        of = '{engine="0",model_name="m"}'
        expected = {
            "num_requests_running": 0,
            "num_requests_waiting": 0,
            "kv_cache_usage_perc": 0,
            "prompt_tokens_total": 80,
            "generation_tokens_total": 20,
            "prefix_cache_queries_total": 80,
            "prefix_cache_hits_total": 32,
            "num_preemptions_total": 0,
            "time_to_first_token_seconds_count": 2,
            "inter_token_latency_seconds_count": 18,
            "request_time_per_output_token_seconds_count": 2,
            "e2e_request_latency_seconds_count": 2,
            "request_queue_time_seconds_count": 2,
            "iteration_tokens_total_count": 20,
        }
        assert {name: float(values[f"vllm:{name}{of}"]) for name in expected} == expected
        success = 'vllm:request_success_total{engine="0",finished_reason="length",model_name="m"}'
        assert float(values[success]) == 2
        assert 'block_size="16"' in text
        assert 'num_gpu_blocks="1024"' in text

    against(test)
