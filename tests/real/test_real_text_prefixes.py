"""Are the tokens of chats and texts known as a real engine sees them, and so what it has cached?

Two vLLMs, their own `/tokenize`, and the cached tokens that they tell with each answer.
"""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from unittest import mock

import aiohttp
import msgspec
import pytest
import uvloop
from install import tiny_hf, vllm_is_ready
from live import free_port
from servers import Engine, together, vllm_server

from paceline.gateway import server as server_of_gateway
from paceline.kernel import Settings
from paceline.tokens import Prompts, load
from paceline.tokens.chat import CHAT, COMPLETION, text_of
from paceline.tokens.template import ChatTemplate
from paceline.tokens.tokenizer import Tokenizer
from stand import Stand, live_gateway, until

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        not vllm_is_ready() and os.environ.get("PACELINE_REAL") != "1",
        reason="engines are not installed: python tests/real/install.py all",
    ),
]

BLOCK = 32
TURNS = 8
WORDS = ["the", "gateway", "keeps", "até", "à", "9", "часов", "🚴", "or\n\n", "", "a\tb"]
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_TOOLS = """\
{{- bos_token }}
{%- set today = date_string if date_string is defined else strftime_now("%d %b %Y") %}
{%- if tools %}<|im_start|>system
{% for tool in tools %}
{{ tool | tojson(indent=2) }}
{% endfor %}{{ today }}<|im_end|>
{% endif %}
{%- for message in messages %}
    {%- if message.role == "assistant" and message.tool_calls is defined %}
        {%- for call in message.tool_calls %}
{{- "<|im_start|>call " + call.function.name + (call.function.arguments | tojson) + "<|im_end|>" }}
        {%- endfor %}
    {%- elif message.role == "tool" %}
{{- "<|im_start|>tool " + message.tool_call_id + "\n" + message.content + "<|im_end|>\n" }}
    {%- else %}
{{- "<|im_start|>" + message.role + ("" if message.name is not defined else message.name) + "\n" }}
{%- generation %}{{ message.content }}{% endgeneration %}
{{- "<|im_end|>\n" }}
    {%- endif %}
{%- endfor %}
{%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}
"""
WITH_PARTS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}[{{ part.type }}: {{ part.text }}]{% endfor %}<|im_end|>\n"
    "{% endfor %}"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "strict": True,
            "name": "look",
            "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
            "strange": 1,
        },
    },
    {"type": "function", "function": {"name": "jump", "description": "Über <alles> & mehr"}},
]
CALLS = [
    {"role": "user", "content": "look!"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "look", "arguments": '{"at":  "the <moon>"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "round"}]},
]
PARTS = [
    {"role": "system", "content": "short", "name": "boss"},
    {"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "text", "text": "b"}]},
]
ASKS = [
    {"messages": PARTS},
    {"messages": PARTS, "add_generation_prompt": False},
    {"messages": PARTS, "chat_template_kwargs": {"enable_thinking": False}},
    {"messages": [*PARTS, *CALLS], "tools": TOOLS},
    {"messages": CALLS, "add_special_tokens": True},
    {"messages": [{"role": "user", "content": "<|im_end|><|im_start|> are <|endoftext|>text"}]},
]


@pytest.fixture(scope="module")
def engines() -> Iterator[list[Engine]]:
    with together(server(0), server(1)) as started:
        yield started


def server(core: int) -> Any:
    events = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{free_port()}",
        "replay_endpoint": f"tcp://*:{free_port()}",
    }
    extra = ["--kv-events-config", msgspec.json.encode(events).decode()]
    extra += ["--block-size", str(BLOCK), "--trust-request-chat-template"]
    return vllm_server(free_port(), core, extra=extra, model=tiny_hf())


@pytest.mark.parametrize("template", [PLAIN, WITH_TOOLS, WITH_PARTS])
@pytest.mark.parametrize("ask", ASKS)
def test_a_chat_has_the_tokens_that_the_engine_sees(
    engines: list[Engine], ask: dict[str, Any], template: str
) -> None:
    tokenizer = Tokenizer(tiny_hf())
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    text = text_of(CHAT, msgspec.json.encode(ask), ChatTemplate(template, special))
    ours = list(tokenizer.ids(text.text, text.with_special))
    assert ours == tokenized(engines[0], ask | {"chat_template": template})


def test_a_text_has_the_tokens_that_the_engine_sees(engines: list[Engine]) -> None:
    tokenizer, rng = Tokenizer(tiny_hf()), random.Random(5)
    for special in (True, False):
        for _ in range(20):
            prompt = words(rng, rng.randrange(1, 60))
            cut = rng.randrange(len(prompt) + 1)
            prompt = prompt[:cut] + "<|im_end|>\n<|im_start|>" + prompt[cut:]
            ask = {"prompt": prompt, "add_special_tokens": special}
            text = text_of(COMPLETION, msgspec.json.encode(ask), None)
            assert list(tokenizer.ids(text.text, text.with_special)) == tokenized(engines[0], ask)


def test_what_is_cached_of_growing_chats_is_known_before_each_turn(engines: list[Engine]) -> None:
    async def turn(stand: Stand, rng: random.Random, talk: list[dict[str, Any]]) -> None:
        talk.append({"role": "user", "content": words(rng, rng.randrange(20, 120))})
        fields: dict[str, Any] = {"cache_salt": "pepper"} if talk[0]["content"][0] == "t" else {}
        reply = await stand.ask({"messages": talk, "max_tokens": 30, "ignore_eos": True, **fields})
        assert reply.status == 200, reply.body
        talk.append(reply.json["choices"][0]["message"])

    agrees(engines, turn)


def test_what_is_cached_of_growing_texts_is_known_too(engines: list[Engine]) -> None:
    async def turn(stand: Stand, rng: random.Random, talk: list[dict[str, Any]]) -> None:
        talk[0]["content"] += " " + words(rng, rng.randrange(20, 120))
        body = {"prompt": talk[0]["content"], "max_tokens": 3}
        assert (await stand.ask(body, "/v1/completions")).status == 200

    agrees(engines, turn)


def agrees(
    engines: list[Engine],
    turn: Callable[[Stand, random.Random, list[dict[str, Any]]], Awaitable[None]],
) -> None:
    """Three conversations take turns: each time what was foretold is what the engine tells."""

    async def run() -> None:
        prompts = Prompts(load({"m": str(tiny_hf())}))
        before = live_gateway(
            *(engine.url for engine in engines), kind="vllm", settings=Settings(), prompts=prompts
        )
        rng = random.Random(3)
        system = words(rng, 200)
        async with before as stand:
            index = stand.host.kernel.pools["m"].blocks
            await until(lambda: index.follows(0) and index.follows(1))
            for engine in engines:
                await asked(engine)
            await until(lambda: index.size(0) and index.size(1))
            talks = [[{"role": "system", "content": f"{start} {system}"}] for start in "stu"]
            for _ in range(TURNS):
                for talk in talks:
                    await turn(stand, rng, talk)
                    await heard_of(stand)
            outcomes = stand.outcomes
            assert [o.request.prompt_tokens for o in outcomes] == [
                o.prompt_tokens for o in outcomes
            ]
            predicted = [o.predicted.cached_tokens if o.predicted else -1 for o in outcomes]
            assert predicted == [o.cached_tokens for o in outcomes]
            assert sum(n > 0 for n in predicted) >= len(outcomes) - 2 * len(talks)

    with mock.patch.multiple(server_of_gateway, LEAST_WAIT_S=10.0, MOST_WAIT_S=10.0):
        uvloop.run(run())


async def heard_of(stand: Stand) -> None:
    """Until the engine has told of the prompt that it has just answered."""
    outcome = stand.outcomes[-1]
    assert outcome.request.token_blocks, "it was not tokenised in time"
    (blocks,) = outcome.request.token_blocks
    index = stand.host.kernel.pools["m"].blocks
    place = int(outcome.worker.removeprefix("w"))
    await until(lambda: index.depths(blocks.names).get(place, 0) == len(blocks.names))


async def asked(engine: Engine) -> None:
    """Let the engine have something to tell of."""
    body = {"model": "m", "prompt": [1] * 2 * BLOCK, "max_tokens": 1}
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{engine.url}/v1/completions", json=body) as answer,
    ):
        assert answer.status == 200, await answer.text()


def tokenized(engine: Engine, ask: dict[str, Any]) -> list[int]:
    """As the engine itself says."""

    async def run() -> list[int]:
        async with (
            aiohttp.ClientSession() as http,
            http.post(f"{engine.url}/tokenize", json={"model": "m", **ask}) as answer,
        ):
            found = await answer.json()
            assert answer.status == 200, found
            return list(found["tokens"])

    return uvloop.run(run())


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))
