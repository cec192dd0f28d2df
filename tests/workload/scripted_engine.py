"""An engine that answers by script: what the driver must cope with, over a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

Body = dict[str, Any]


def event(body: Body | str) -> bytes:
    text = body if isinstance(body, str) else json.dumps(body, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def role() -> bytes:
    return event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})


def token(text: str, **delta: Any) -> bytes:
    choice = {"index": 0, "delta": delta or {"content": text}, "finish_reason": None}
    return event({"choices": [choice]})


def end(output_tokens: int, prompt_tokens: int = 7) -> bytes:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": output_tokens}
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}
    return event(last) + event({"choices": [], "usage": usage}) + event("[DONE]")


def answer(tokens: int) -> bytes:
    return role() + b"".join(token(f" t{i}") for i in range(tokens)) + end(tokens)


class Hang:
    """In a script: nothing more comes, and the connection stays open."""


class Cut:
    """In a script: the connection breaks."""


Script = list[bytes | type[Hang] | type[Cut]]
Reply = tuple[int, Script]


class ScriptedEngine:
    """Answers each request by `reply(body)` and remembers what came."""

    def __init__(self, reply: Callable[[Body], Reply]) -> None:
        self.reply = reply
        self.bodies: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""
        self._stopping = asyncio.Event()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[ScriptedEngine]:
        app = web.Application(client_max_size=1 << 28)
        app.router.add_post("/v1/chat/completions", self._answer)
        app.router.add_post("/v1/completions", self._answer)
        app.router.add_get("/v1/models", self._models)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            self._stopping.set()
            await runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "small"}]})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        status, script = self.reply(body)
        response = web.StreamResponse(status=status, headers={"x-paceline-worker": "w1"})
        await response.prepare(request)
        for part in script:
            if part is Hang:
                await self._stopping.wait()
            elif part is Cut:
                assert request.transport is not None
                request.transport.abort()
            elif isinstance(part, bytes):
                await response.write(part)
        return response
