"""Do two real vLLM processes share a request by Mooncake as they do by NIXL?"""

from __future__ import annotations

import os
from ctypes.util import find_library

import msgspec
import pytest
import uvloop
from install import connectors_are_ready
from live import free_port
from servers import together, vllm_server
from test_real_disaggregation import (
    TEXT,
    alone,
    body_of,
    fetched,
    gateway_before,
    long_prompt,
    words,
)

pytestmark = [
    pytest.mark.real,
    pytest.mark.usefixtures("every_prompt_handed_over"),
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        not connectors_are_ready() and os.environ.get("PACELINE_REAL") != "1",
        reason="engines are not installed: python tests/real/install.py all",
    ),
    pytest.mark.skipif(
        find_library("ibverbs") is None,
        reason="Mooncake needs libibverbs (Debian: apt install libibverbs1)",
    ),
]


def test_what_one_engine_prefilled_another_answers_as_if_it_were_its_own() -> None:
    bootstrap = free_port()
    servers = []
    for core, role in enumerate(("kv_producer", "kv_consumer")):
        connector = {
            "kv_connector": "MooncakeConnector",
            "kv_role": role,
            "engine_id": role,
            "kv_connector_extra_config": {"mooncake_protocol": "tcp"},
        }
        extra = ["--kv-transfer-config", msgspec.json.encode(connector).decode()]
        environment = {
            "PACELINE_SMALL_CPUS": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_MOONCAKE_BOOTSTRAP_PORT": str(free_port() if core else bootstrap),
        }
        servers.append(vllm_server(free_port(), core, extra=extra, env=environment))

    async def run() -> None:
        async with gateway_before(pair, "mooncake", bootstrap_port=bootstrap) as gateway:
            for name in ("Ann", "Bob"):
                had, prompt = await fetched(pair[1]), long_prompt(name)
                reply = await gateway.ask(body_of(TEXT, prompt, stream=True), TEXT)
                outcome = gateway.outcomes[-1]
                assert outcome.prefilled_at == "w0"
                assert await fetched(pair[1]) - had >= (outcome.prompt_tokens or 0) - 64 > 100
                assert words(reply) == await alone(pair[1], TEXT, prompt)

    with together(*servers) as pair:
        uvloop.run(run())
