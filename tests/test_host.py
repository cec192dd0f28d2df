"""What does the host learn of an engine before it sends anything there?"""

from __future__ import annotations

import asyncio
import socket
from time import time

import pytest
from aiohttp import web

from paceline.domain.worker import Worker
from paceline.gateway.exchange import Timeouts
from paceline.host import Engine, LiveHost, adapter_of
from paceline.kernel import Kernel, Settings
from paceline.kernel.worker import WorkerState

UNTIL_S = 10.0


async def models(request: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": "weights/7b"}]})


async def probed(worker: Worker) -> WorkerState:
    """The worker as the kernel knows it once the host has asked it how it is."""
    host = LiveHost(Kernel(Settings()), Timeouts(), lambda exchange: None, time)
    running = asyncio.create_task(host.run([Engine(worker, adapter_of(worker, ""), "")]))
    try:
        async with asyncio.timeout(UNTIL_S):
            while True:
                for state in (w for p in host.kernel.pools.values() for w in p.workers.values()):
                    if state.report is not None:
                        return state
                await asyncio.sleep(0.01)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def of_live_engine(kind: str, serves_as: str) -> WorkerState:
    app = web.Application()
    app.router.add_get("/v1/models", models)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    worker = Worker("w", "public", f"http://127.0.0.1:{port}", kind, serves_as=serves_as)
    try:
        return await probed(worker)
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("kind", ["", "openai"])
def test_the_models_name_at_the_engine_is_learned_also_where_the_kind_is_told(kind: str) -> None:
    state = asyncio.run(of_live_engine(kind, ""))
    assert state.report is not None
    assert state.report.healthy
    assert (state.worker.kind, state.worker.serves_as) == ("openai", "weights/7b")


def test_a_name_that_is_told_stays() -> None:
    assert asyncio.run(of_live_engine("", "told")).worker.serves_as == "told"


@pytest.mark.parametrize("kind", ["", "vllm"])
def test_a_worker_at_whose_url_nobody_answers_says_so(kind: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, and never listening: a connection is refused
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        state = asyncio.run(probed(Worker("w", "public", url, kind)))
    assert state.report is not None
    assert not state.report.healthy
    assert state.report.because.startswith(f"nobody answers at {url}: ")
