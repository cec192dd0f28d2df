"""Does each way to hand a prompt over say to both engines what they want to hear?

NixlConnector and MooncakeConnector: as vLLM 0.32 reads and writes `kv_transfer_params`. SGLang and
TensorRT-LLM: as their own routers ask them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from paceline.domain.worker import Worker
from paceline.engines.transfer import TRANSFERS, Transfer, make_transfer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASKED: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "hi"}],
    "stream": True,
    "stream_options": {"include_usage": True},
    "max_completion_tokens": 300,
    "min_tokens": 7,
    "temperature": 0.3,
    "tools": [{"type": "function"}],
    "logprobs": True,
    "seed": 5,
}
NUMBER = 0x1234_5678_9ABC_DEF0


def way(transfer: str, url: str = "http://10.0.0.1:8000", port: int = 0) -> Transfer:
    worker = Worker("w", "m", url, transfer=transfer, role="prefill", bootstrap_port=port)
    made = make_transfer(worker, "")
    assert made is not None
    return made


def of(body: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: body.get(name) for name in names}


@pytest.mark.parametrize("transfer", TRANSFERS)
def test_the_prompt_is_rendered_alike_and_answered_in_one_piece(transfer: str) -> None:
    asked = way(transfer).prefill(ASKED, NUMBER)
    assert not asked.get("stream")
    assert "stream_options" not in asked
    same = ("model", "messages", "temperature", "tools", "logprobs", "seed")
    assert of(asked, *same) == of(ASKED, *same)


@pytest.mark.parametrize("transfer", ["nixl", "mooncake"])
def test_vllm_is_asked_for_one_token_whatever_the_client_calls_that(transfer: str) -> None:
    limits = ("max_tokens", "max_completion_tokens", "min_tokens")
    asked = way(transfer).prefill(ASKED, NUMBER)
    assert of(asked, *limits) == dict.fromkeys(limits, 1)
    asked = way(transfer).prefill({"prompt": "x", "max_tokens": None}, NUMBER)
    assert of(asked, *limits) == {"max_tokens": 1, "max_completion_tokens": None, "min_tokens": 1}


@pytest.mark.parametrize("transfer", ["sglang", "trtllm"])
def test_where_the_first_token_is_handed_over_it_is_drawn_as_the_client_wants_it(
    transfer: str,
) -> None:
    asked = way(transfer).prefill(ASKED, NUMBER)
    limits = ("max_tokens", "max_completion_tokens", "min_tokens")
    assert of(asked, *limits) == of(ASKED, *limits)


def test_nixl_passes_on_what_the_first_engine_has_answered() -> None:
    asked = way("nixl").prefill(ASKED, NUMBER)["kv_transfer_params"]
    assert asked["do_remote_decode"] is True
    assert asked["do_remote_prefill"] is False
    held = {"do_remote_prefill": True, "remote_block_ids": [[1, 2]], "what": {"comes": "next"}}
    answer = json.dumps({"choices": [], "kv_transfer_params": held}).encode()
    assert way("nixl").decode(CHAT, NUMBER, answer) == {"kv_transfer_params": held}


@pytest.mark.parametrize("params", [None, {}, {"do_remote_prefill": False}])
def test_an_engine_without_a_connector_holds_nothing(params: Any) -> None:
    answer = json.dumps({"choices": [], "kv_transfer_params": params}).encode()
    assert way("nixl").decode(CHAT, NUMBER, answer) is None


async def learned(transfer: str, path: str, page: Any, port: int = 0) -> tuple[Transfer, str, int]:
    """One that has asked an engine which answers so; gives also its trouble, and where it asked."""

    async def told(request: web.Request) -> web.Response:
        return web.json_response(page)

    app = web.Application()
    app.router.add_get(path, told)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    served = runner.addresses[0][1]
    made = way(transfer, f"http://127.0.0.1:{served}", served if transfer == "mooncake" else port)
    async with aiohttp.ClientSession() as session:
        trouble = await made.learn(session)
    await runner.cleanup()
    return made, trouble, served


def test_mooncake_names_the_first_engine_as_its_bootstrap_server_does() -> None:
    ranks = {"0": {"engine_id": "E7", "worker_addr": {"0": {"0": "tcp://10.0.0.1:9"}}}}
    made, trouble, port = asyncio.run(learned("mooncake", "/query", ranks))
    assert trouble == ""
    first = made.prefill(ASKED, NUMBER)["kv_transfer_params"]
    fields = made.decode(CHAT, NUMBER, b"{}")
    assert fields is not None
    assert fields["kv_transfer_params"] == {
        "do_remote_decode": False,
        "do_remote_prefill": True,
        "remote_bootstrap_addr": f"http://127.0.0.1:{port}",
        "remote_engine_id": "E7",
        "transfer_id": first["transfer_id"],
    }


def test_mooncake_says_what_is_wrong_with_its_bootstrap_server() -> None:
    made, trouble, port = asyncio.run(learned("mooncake", "/query", {}))
    assert trouble == f"Mooncake's bootstrap server at http://127.0.0.1:{port}: it knows no engine"
    assert made.decode(CHAT, NUMBER, b"{}") is None


def test_sglang_meets_in_a_room_at_the_port_that_it_tells() -> None:
    info = {"disaggregation_bootstrap_port": 8765}
    made, trouble, _ = asyncio.run(learned("sglang", "/server_info", info))
    assert (made.together, trouble) == (True, "")
    room = {"bootstrap_host": "127.0.0.1", "bootstrap_port": 8765, "bootstrap_room": NUMBER}
    assert made.decode(CHAT, NUMBER, b"") == room
    assert of(made.prefill(ASKED, NUMBER), *room) == room


def test_sglang_meets_where_the_configuration_says() -> None:
    info = {"disaggregation_bootstrap_port": 8765}
    made, _, _ = asyncio.run(learned("sglang", "/server_info", info, port=9999))
    fields = made.decode(CHAT, NUMBER, b"")
    assert fields is not None
    assert fields["bootstrap_port"] == 9999


@pytest.mark.parametrize(("path", "name"), [(CHAT, "prompt_token_ids"), (TEXT, "prompt")])
def test_trtllm_goes_on_from_the_state_and_the_tokens_of_the_first(path: str, name: str) -> None:
    made = way("trtllm")
    first = made.prefill(ASKED, NUMBER)["disaggregated_params"]
    assert first["request_type"] == "context_only"
    state = {
        "request_type": "context_only",
        "first_gen_tokens": [42],
        "ctx_request_id": 7,
        "encoded_opaque_state": "abc=",
        "draft_tokens": None,
    }
    choice = {"index": 0, "finish_reason": "length", "disaggregated_params": state}
    answer = json.dumps({"choices": [choice], "prompt_token_ids": [1, 2, 3]}).encode()
    fields = made.decode(path, NUMBER, answer)
    assert fields is not None
    assert fields[name] == [1, 2, 3]
    told = fields["disaggregated_params"]
    assert told["request_type"] == "generation_only"
    assert of(told, "first_gen_tokens", "ctx_request_id") == {
        "first_gen_tokens": [42],
        "ctx_request_id": 7,
    }
    assert told["disagg_request_id"] == first["disagg_request_id"] > 1 << 42


def test_trtllm_has_nothing_to_go_on_with_after_an_answer_of_one_token() -> None:
    choice = {"finish_reason": "stop", "disaggregated_params": {"first_gen_tokens": [2]}}
    answer = json.dumps({"choices": [choice]}).encode()
    assert way("trtllm").decode(CHAT, NUMBER, answer) == {}


@pytest.mark.parametrize("transfer", TRANSFERS)
def test_whatever_a_client_claims_of_a_hand_over_is_unsaid(transfer: str) -> None:
    made = way(transfer)
    said = made.prefill(ASKED, NUMBER).keys() - ASKED.keys()
    own = {"kv_transfer_params", "disaggregated_params"}
    own |= {"bootstrap_host", "bootstrap_port", "bootstrap_room"}
    for path in (CHAT, TEXT):
        none = made.none(path)
        assert {name for name in said if name in own} == none.keys()
        assert not any(none.values())
    assert made.none("/v1/embeddings") == {}
