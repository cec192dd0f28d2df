"""How does a test get an engine that says exactly what was once recorded?

What SGLang 0.5.23 and TensorRT-LLM 1.3 say was not recorded, for want of a GPU: it was written by
the source of their servers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestServer

Said = web.Response | Callable[[web.Request], Awaitable[web.StreamResponse]]


def recording(name: str) -> bytes:
    return (Path(__file__).parent / "recordings" / name).read_bytes()


def answer(body: bytes | str = b"", status: int = 200, server: str = "uvicorn") -> web.Response:
    body = body.encode() if isinstance(body, str) else body
    return web.Response(status=status, body=body, headers={"server": server})


def vllm() -> dict[str, Said]:
    return {
        "/health": answer(),
        "/version": answer('{"version":"0.32.0"}'),
        "/v1/models": answer(recording("vllm_models.json")),
        "/metrics": answer(recording("vllm_metrics.txt")),
    }


def sglang() -> dict[str, Said]:
    return {
        "/health": answer(),
        "/v1/models": answer(recording("sglang_models.json")),
        "/server_info": answer(recording("sglang_server_info.json")),
        "/v1/loads": answer(recording("sglang_loads.json")),
        "/metrics": answer(recording("sglang_metrics.txt")),
    }


def trtllm() -> dict[str, Said]:
    return {
        "/health": answer(),
        "/version": answer('{"version":"1.3.0"}'),
        "/v1/models": answer(recording("trtllm_models.json")),
        "/openapi.json": answer(recording("trtllm_openapi.json")),
        "/prometheus/metrics": answer(recording("trtllm_metrics.txt")),
        "/metrics": answer(recording("trtllm_steps.json")),
    }


def llamacpp() -> dict[str, Said]:
    pages = {
        "/health": b'{"status":"ok"}',
        "/v1/models": recording("llamacpp_models.json"),
        "/metrics": recording("llamacpp_metrics.txt"),
        "/slots": recording("llamacpp_slots.json"),
        "/props": recording("llamacpp_props.json"),
    }
    return {path: answer(page, server="llama.cpp") for path, page in pages.items()}


def llamacpp_that_loads() -> dict[str, Said]:
    body = '{"error":{"message":"Loading model","type":"unavailable_error","code":503}}'
    return {path: answer(body, 503, "llama.cpp") for path in llamacpp()}


def not_offered() -> web.Response:
    """What llama.cpp says of `/metrics` and `/slots` if it was started without them."""
    message = "This server does not support this endpoint"
    body = f'{{"error":{{"code":501,"message":"{message}","type":"not_supported_error"}}}}'
    return answer(body, 501, "llama.cpp")


@asynccontextmanager
async def recorded(pages: dict[str, Said]) -> AsyncIterator[str]:
    """An engine with these pages and 404 for all others. They may be changed meanwhile."""

    async def say(request: web.Request) -> web.StreamResponse:
        said = pages.get(request.path) or answer('{"detail":"Not Found"}', 404)
        if isinstance(said, web.Response):
            headers = {"server": said.headers["server"]}
            return web.Response(status=said.status, body=said.body, headers=headers)
        return await said(request)

    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", say)
    server = TestServer(app)
    await server.start_server()
    try:
        yield str(server.make_url("")).rstrip("/")
    finally:
        await server.close()


Test = Callable[[str, aiohttp.ClientSession], Awaitable[None]]


def against(pages: dict[str, Said], test: Test) -> None:
    """Run a test with the engine's URL and a session."""

    async def run() -> None:
        async with recorded(pages) as url, aiohttp.ClientSession() as session:
            await test(url, session)

    asyncio.run(run())
