"""How does a test get SGLang or TensorRT-LLM on a machine without a GPU?

A front before the emulated engine, which writes the tokens: it reads and answers as SGLang 0.5.23
and TensorRT-LLM 1.3 do by the source of their servers. What they write no test here can know.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import aiohttp
import msgspec
from aiohttp import web
from recorded_engine import recording

from paceline.engines.metrics import Metrics

Body = dict[str, Any]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
WINDOW, BLOCK = 4096, 16
"""Tokens of a context and of a block of the emulated engine's profile `tiny`."""


class Front:
    """What both have in common: flat errors, any name for the model, slots freed on hanging up."""

    models: ClassVar[str]

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._session: aiohttp.ClientSession | None = None

    def app(self) -> web.Application:
        app = web.Application(middlewares=[hang_up])
        app.cleanup_ctx.append(self._with_session)
        for path in (CHAT, TEXT):
            app.router.add_post(path, self._generate)
        for path, page in self.pages().items():
            app.router.add_get(path, page)
        return app

    def pages(self) -> dict[str, Callable[[web.Request], Any]]:
        return {"/health": self._health, "/v1/models": self._models}

    def asked(self, path: str, body: Body) -> Body:
        """The body as vLLM would want it. ValueError: it is refused."""
        raise NotImplementedError

    def events(self, path: str, event: Body) -> list[bytes]:
        """An event of vLLM's as this one writes it."""
        raise NotImplementedError

    def whole(self, answer: Body) -> Body:
        """An answer of vLLM's in one piece as this one writes it."""
        raise NotImplementedError

    async def engine_metrics(self) -> Metrics:
        assert self._session is not None
        async with self._session.get(self._engine + "/metrics") as response:
            return Metrics(await response.read())

    async def _with_session(self, app: web.Application) -> Any:
        async with aiohttp.ClientSession() as self._session:
            yield

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        return web.Response(body=recording(self.models), content_type="application/json")

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        try:
            body = msgspec.json.decode(await request.read(), type=Body)
            asked = self.asked(request.path, body) | {"model": "m"}
        except (msgspec.MsgspecError, ValueError) as error:
            return refusal(400, str(error))
        assert self._session is not None
        async with self._session.post(self._engine + request.path, json=asked) as answer:
            if answer.status != 200:
                told = await answer.json()
                return refusal(answer.status, told["error"]["message"])
            if not body.get("stream"):
                return web.json_response(self.whole(await answer.json()))
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(request)
            async for line in answer.content:
                for written in self._rewritten(request.path, line):
                    await response.write(written)
            return response

    def _rewritten(self, path: str, line: bytes) -> list[bytes]:
        data = line.removeprefix(b"data: ").strip()
        if not data:
            return []
        if data == b"[DONE]":
            return [b"data: [DONE]\n\n"]
        return self.events(path, msgspec.json.decode(data))


@web.middleware
async def hang_up(request: web.Request, handler: Any) -> web.StreamResponse:
    """If the engine dies, or the client leaves."""
    try:
        response: web.StreamResponse = await handler(request)
    except aiohttp.ClientError:
        if request.transport is not None:
            request.transport.abort()
        return web.Response(status=500)
    return response


def refusal(status: int, message: str) -> web.Response:
    """No `error` around it, unlike OpenAI's."""
    error = {"object": "error", "message": message, "type": "BadRequestError", "param": None}
    return web.json_response(error | {"code": status}, status=status)


def event(body: Body) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


class SGLangFront(Front):
    """Started with `--enable-cache-report --enable-priority-scheduling` and without metrics."""

    models = "sglang_models.json"

    def pages(self) -> dict[str, Callable[[web.Request], Any]]:
        return super().pages() | {"/server_info": self._info, "/v1/loads": self._loads}

    def asked(self, path: str, body: Body) -> Body:
        messages = body.get("messages") or [{}]
        if body.get("continue_final_message"):
            return body | {"add_generation_prompt": False}
        if messages[-1].get("role") == "assistant":
            return body | {"messages": [*messages[:-1], messages[-1] | {"role": "user"}]}
        return body

    def events(self, path: str, said: Body) -> list[bytes]:
        found = []
        for choice in said["choices"]:
            choice["matched_stop"] = choice.pop("stop_reason", None)
            if path == CHAT:
                choice["delta"] = {"reasoning_content": None} | choice["delta"]
                if choice["finish_reason"] and choice["delta"].get("content"):
                    found.append(event(said | {"choices": [choice | {"finish_reason": None}]}))
                    choice["delta"] = dict.fromkeys(("role", "content", "reasoning_content"))
        said.pop("system_fingerprint", None)
        return [*found, event({"usage": None} | said)]

    def whole(self, answer: Body) -> Body:
        for choice in answer["choices"]:
            choice["matched_stop"] = choice.pop("stop_reason", None)
        names = ("id", "object", "created", "model", "choices", "usage")
        return {name: answer[name] for name in names} | {"metadata": {"weight_version": "default"}}

    async def _info(self, request: web.Request) -> web.Response:
        info = msgspec.json.decode(recording("sglang_server_info.json"))
        return web.json_response(info | {"page_size": BLOCK})

    async def _loads(self, request: web.Request) -> web.Response:
        metrics, loads = await self.engine_metrics(), recording("sglang_loads.json")
        told = msgspec.json.decode(loads)
        told["loads"][0] |= {
            "num_running_reqs": metrics.count("vllm:num_requests_running"),
            "num_waiting_reqs": metrics.count("vllm:num_requests_waiting"),
            "token_usage": metrics.mean("vllm:kv_cache_usage_perc"),
        }
        return web.json_response(told)


class TRTLLMFront(Front):
    """Started with `enable_iter_perf_stats` and without `return_perf_metrics`."""

    models = "trtllm_models.json"

    def __init__(self, engine: str) -> None:
        super().__init__(engine)
        self._made_steps = True  # it tries itself out when it starts
        description = msgspec.json.decode(recording("trtllm_openapi.json"))
        schemas = description["components"]["schemas"]
        self._fields = {
            CHAT: schemas["ChatCompletionRequest"]["properties"].keys(),
            TEXT: schemas["CompletionRequest"]["properties"].keys(),
        }

    def pages(self) -> dict[str, Callable[[web.Request], Any]]:
        return super().pages() | {"/openapi.json": self._description, "/metrics": self._steps}

    def asked(self, path: str, body: Body) -> Body:
        if unknown := body.keys() - self._fields[path]:
            raise ValueError(f"Extra inputs are not permitted: {', '.join(sorted(unknown))}")
        if not 0.0 <= body.pop("priority", 0.5) <= 1.0:
            raise ValueError("priority: Input should be between 0 and 1")
        self._made_steps = True
        return {"max_tokens": WINDOW // 2} | body

    def events(self, path: str, said: Body) -> list[bytes]:
        said.pop("system_fingerprint", None)
        if path == TEXT:
            for choice in said["choices"]:
                choice |= {"token_ids": None, "stop_reason": None}
            return [event({"usage": None} | said)]
        if said["choices"] and said["choices"][0]["delta"].get("role"):
            del said["choices"][0]["delta"]["content"]
            return [event(said).replace(b"\n\n", b" \n\n")]  # so it does
        for choice in said["choices"]:
            choice["delta"] |= {"reasoning_content": ""}
        return [event(said)]

    def whole(self, answer: Body) -> Body:
        names = ("id", "object", "created", "model", "choices", "usage")
        return {name: answer[name] for name in names} | {"prompt_token_ids": None}

    async def _description(self, request: web.Request) -> web.Response:
        return web.Response(body=recording("trtllm_openapi.json"), content_type="application/json")

    async def _steps(self, request: web.Request) -> web.Response:
        """The last step since somebody read them; none, if there was nothing to do."""
        metrics = await self.engine_metrics()
        running = metrics.count("vllm:num_requests_running") or 0
        if not running and not self._made_steps:
            return web.json_response([])
        self._made_steps = bool(running)
        step = msgspec.json.decode(recording("trtllm_steps.json"))[-1]
        waiting = metrics.count("vllm:num_requests_waiting")
        return web.json_response(
            [step | {"numActiveRequests": running, "numQueuedRequests": waiting}]
        )


@contextmanager
def served(front: Front) -> Iterator[str]:
    """The URL at which it answers, from a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="front", daemon=True)
    thread.start()

    def run(task: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(task, loop).result(10)

    runner = web.AppRunner(front.app(), shutdown_timeout=0.1)
    try:
        run(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        run(site.start())
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        run(runner.cleanup())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
