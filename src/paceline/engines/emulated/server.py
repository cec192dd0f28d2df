"""How does an emulated engine look over HTTP? Like vLLM 0.32, with faults on command."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import count
from typing import TypeVar

import msgspec
import structlog

from paceline.engines.emulated import faults
from paceline.engines.emulated.asks import Ask, EmbeddingsAsk, Refusal, TokenizeAsk, error_body
from paceline.engines.emulated.calls import ENDPOINTS, Call, part_of
from paceline.engines.emulated.engine import Engine
from paceline.engines.emulated.formats import Embeddings, Format
from paceline.engines.emulated.handover import (
    NONSENSE,
    Fetch,
    Fetcher,
    Found,
    Place,
    place_of,
)
from paceline.engines.emulated.settings import EngineSettings
from paceline.wire.server import HttpRequest, Limits, Server, ServerConnection

VERSION = "0.32.0"
METRICS_TYPE = "text/plain; version=1.0.0; charset=utf-8"

log = structlog.get_logger()
T = TypeVar("T")


def decode(kind: type[T], body: bytes) -> T:
    """A body as what it should be; Refusal with vLLM's status if it is not."""
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except msgspec.ValidationError as error:
        raise Refusal(400, f"1 validation error: {error}") from error
    except msgspec.DecodeError as error:
        raise Refusal(400, f"1 validation error: JSON decode error: {error}") from error


class _Door(Server):
    """A server that turns newcomers away while it is told to."""

    shut_until = 0.0

    def admit(self, connection: ServerConnection) -> bool:
        if self.now() < self.shut_until:
            connection.abort()
            return True
        return super().admit(connection)


class EmulatedEngine:
    """One engine behind one port: a handler of connections."""

    def __init__(self, settings: EngineSettings, host: str) -> None:
        self.settings = settings
        self.host = host
        self.port = settings.port
        self.listening = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._engine = Engine(settings, self._loop)
        self._started_at = int(time.time())
        self._ids = count(1)
        self._fetcher = Fetcher(settings)
        self._faults: deque[faults.Fault] = deque()
        self._crash: asyncio.Future[faults.Crash] = self._loop.create_future()
        self._slowdown_ends: asyncio.TimerHandle | None = None
        self._get: dict[str, Callable[[ServerConnection], None]] = {
            "/health": lambda c: c.answer(200, b""),
            "/ping": lambda c: c.answer(200, b""),
            "/version": lambda c: _answer(c, {"version": VERSION}),
            "/load": lambda c: _answer(c, {"server_load": self._unfinished}),
            "/v1/models": lambda c: _answer(c, {"object": "list", "data": [self._model_card()]}),
            "/kv_event_sources": lambda c: _answer(c, self._kv_event_sources()),
            "/metrics": lambda c: c.answer(200, self._engine.metrics.text(), METRICS_TYPE),
            "/emulate/state": lambda c: _answer(c, self.state()),
            "/emulate/steps": lambda c: _answer(c, {"steps": list(self._engine.steps)}),
        }
        self._post: dict[str, Callable[[ServerConnection, HttpRequest], None]] = {
            **dict.fromkeys(ENDPOINTS, self._generate),
            "/tokenize": self._tokenize,
            "/reset_prefix_cache": self._reset_prefix_cache,
            "/ping": lambda c, _: c.answer(200, b""),
            "/emulate/fetch": self._fetched,
            "/emulate/slowdown": self._slow_down,
            "/emulate/hang": self._hang,
            "/emulate/crash": self._crash_soon,
            "/emulate/fault": self._fault,
            "/emulate/refuse": self._refuse,
            "/emulate/cut": self._cut,
            "/emulate/reset": self._reset,
        }

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def _unfinished(self) -> int:
        return self._engine.scheduler.running + self._engine.scheduler.waiting

    async def run(self) -> None:
        """Serve until cancelled, or until a crash without a restart."""
        limits = Limits(idle_timeout_s=self.settings.keep_alive_s)
        while True:
            self._door = server = _Door(self, limits, self._loop.time)
            _, self.port = await server.listen(self.host, self.port)
            self.listening.set()
            tasks = [asyncio.create_task(server.sweep(), name=f"sweep {self.url}")]
            if self._engine.kv_events is not None:
                repeat = self._engine.kv_events.repeat()
                tasks.append(asyncio.create_task(repeat, name=f"repeat KV events {self.url}"))
            try:
                crash = await self._crash
            finally:
                for task in tasks:
                    task.cancel()
                self._engine.stop()
                self._fetcher.stop()
                for connection in list(server.connections):
                    connection.abort()
                await server.drain(0.0)
            self.listening.clear()
            self._crash = self._loop.create_future()
            self._faults.clear()
            if crash.restart_after_s is None:
                return
            await asyncio.sleep(crash.restart_after_s)
            self._engine = Engine(self.settings, self._loop)

    # The connection calls.

    def on_request(self, connection: ServerConnection, request: HttpRequest) -> None:
        get, post = self._get.get(request.path), self._post.get(request.path)
        try:
            if request.method in ("GET", "HEAD") and get:
                get(connection)
            elif request.method == "POST" and post:
                post(connection, request)
            elif get or post:
                _answer(connection, {"detail": "Method Not Allowed"}, 405)
            else:
                _answer(connection, {"detail": "Not Found"}, 404)
        except Refusal as refusal:
            connection.answer(refusal.status, refusal.body())
        except Exception as error:  # as any server: a bug costs one request, not all of them
            log.exception("request failed", path=request.path)
            connection.answer(500, error_body(500, repr(error)))

    def on_client_left(self, connection: ServerConnection) -> None:
        if isinstance(connection.context, Call):
            connection.context.abort()

    def on_writable(self, connection: ServerConnection) -> None:
        """An engine does not wait for slow readers: their tokens pile up."""

    def on_refused(self, status: int, because: str) -> tuple[bytes, str]:
        return error_body(status, because), "application/json"

    # Generations.

    def _generate(self, connection: ServerConnection, request: HttpRequest) -> None:
        kind, form = ENDPOINTS[request.path]
        ask = decode(kind, request.body)
        try:
            self._answer_to(ask, form, connection, request)
        except Refusal:
            place = place_of(ask.kv_transfer_params)
            if place.do_remote_prefill:  # what lies there for it would lie there in vain
                self._fetcher.fetch(place, lambda found: None)
            raise

    def _answer_to(
        self, ask: Ask, form: type[Format], connection: ServerConnection, request: HttpRequest
    ) -> None:
        name = self.settings.model_name
        if ask.model not in (None, "", name):
            message = f"The model `{ask.model}` does not exist. Valid aliases: {name}."
            raise Refusal(404, message, "model")
        if ask.n not in (None, 1):
            raise Refusal(400, "n: the emulated engine gives one choice for a prompt", "n")
        parts = [
            part_of(ask, index, prompt, self._engine, self.settings)
            for index, prompt in enumerate(ask.prompts())
        ]
        if not parts:
            raise Refusal(400, "The prompt is empty.", "prompt")
        request_id = request.headers.get("x-request-id") or f"{next(self._ids):016x}"
        answer = form(request_id, int(time.time()), name, parts)
        stream = bool(ask.stream) and form is not Embeddings
        self._set_options(answer, ask)
        fault = self._faults.popleft() if self._faults else None
        if fault and not (stream and fault.kind in faults.SPOILS):
            faults.fail_at_once(connection, fault.kind)
            return
        call = Call(connection, self._engine, answer, stream, fault)
        connection.context = call
        serial = next(self._ids)
        names = [f"{serial}-{part.index}" for part in parts]
        place = place_of(ask.kv_transfer_params) if self.settings.hands_over else Place()
        if place.do_remote_prefill:
            self._fetcher.fetch(place, lambda found: self._go_on(call, ask, names, found))
            return
        if place.do_remote_decode and not stream and len(parts) == 1:
            call.hold = lambda name, tokens: self._engine.holder.hold(
                name, tokens, self.host, self.port
            )
        call.start(ask, ask.cache_salt or "", names)

    def _go_on(self, call: Call, ask: Ask, names: Sequence[str], found: Found) -> None:
        """The prompt has come from another engine, or what was taken for it, or nothing."""
        if call.gone:
            return
        if found == "nothing" and self.settings.kv_load_failure_policy == "fail":
            message = "KV load failure: the prompt could not be fetched"
            call.connection.answer(500, error_body(500, message))
            return
        if found == "others":
            for part in call.answer.parts:
                part.first_number = NONSENSE
        call.start(ask, ask.cache_salt or "", names, received=found != "nothing")

    def _fetched(self, connection: ServerConnection, request: HttpRequest) -> None:
        _answer(connection, self._engine.holder.fetch(decode(Fetch, request.body)))

    def _set_options(self, answer: Format, ask: Ask) -> None:
        if ask.stream_options:
            answer.include_usage = bool(ask.stream_options.include_usage)
            answer.continuous_usage = answer.include_usage and bool(
                ask.stream_options.continuous_usage_stats
            )
        answer.token_ids = bool(ask.return_token_ids)
        if isinstance(ask, EmbeddingsAsk) and isinstance(answer, Embeddings):
            answer.base64 = ask.encoding_format == "base64"

    # What else is asked.

    def _tokenize(self, connection: ServerConnection, request: HttpRequest) -> None:
        (ids,) = decode(TokenizeAsk, request.body).prompts()
        limit = self._engine.scheduler.context_limit
        answer = {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": None}
        _answer(connection, answer)

    def _model_card(self) -> dict[str, object]:
        return {
            "id": self.settings.model_name,
            "object": "model",
            "created": self._started_at,
            "owned_by": "vllm",
            "root": self.settings.profile,
            "parent": None,
            "max_model_len": self._engine.scheduler.context_limit,
            "permission": [],
        }

    def _reset_prefix_cache(self, connection: ServerConnection, request: HttpRequest) -> None:
        _answer(connection, {"success": self._engine.reset_prefix_cache()})

    def _kv_event_sources(self) -> dict[int, object]:
        """By data-parallel rank, of which there is one."""
        settings = self.settings
        if not settings.kv_events_endpoint:
            return {}
        return {
            0: {
                "enable_kv_cache_events": True,
                "publisher": "zmq",
                "endpoint": settings.kv_events_endpoint,
                "replay_endpoint": settings.kv_events_replay_endpoint or None,
                "buffer_steps": settings.kv_events_buffer,
                "topic": settings.kv_events_topic,
            }
        }

    # Faults on command.

    def state(self) -> dict[str, object]:
        """What `/emulate/state` tells, for tests and demonstrations."""
        scheduler = self._engine.scheduler
        return {
            "profile": self.settings.profile,
            "model": self.settings.model_name,
            "running": scheduler.running,
            "waiting": scheduler.waiting,
            "kv_blocks_used": scheduler.pool.used,
            "kv_blocks": scheduler.pool.blocks,
            "steps": scheduler.counters.steps,
            "generated_tokens": scheduler.counters.generated_tokens,
            "preemptions": scheduler.counters.preemptions,
            "received_tokens": scheduler.counters.received_tokens,
            "held": len(scheduler.held),
            "fetched": self._engine.holder.fetched,
            "expired": self._engine.holder.expired,
            "slowdown": scheduler.slowdown,
            "hangs_s": max(0.0, self._engine.hangs_until - self._loop.time()),
            "faults": Counter(fault.kind for fault in self._faults),
            "worst_lag_s": self._engine.worst_lag_s,
        }

    def _slow_down(self, connection: ServerConnection, request: HttpRequest) -> None:
        order = decode(faults.Slowdown, request.body)
        self._forget_slowdown()
        self._engine.scheduler.slowdown = order.factor
        if order.seconds is not None:
            scheduler = self._engine.scheduler
            self._slowdown_ends = self._loop.call_later(
                order.seconds, setattr, scheduler, "slowdown", 1.0
            )
        _answer(connection, self.state())

    def _hang(self, connection: ServerConnection, request: HttpRequest) -> None:
        order = decode(faults.Hang, request.body)
        self._engine.hangs_until = self._loop.time() + order.seconds
        _answer(connection, self.state())

    def _crash_soon(self, connection: ServerConnection, request: HttpRequest) -> None:
        order = decode(faults.Crash, request.body)
        _answer(connection, self.state())
        if not self._crash.done():
            self._crash.set_result(order)

    def _fault(self, connection: ServerConnection, request: HttpRequest) -> None:
        order = decode(faults.Fault, request.body)
        self._faults.extend([order] * order.count)
        _answer(connection, self.state())

    def _refuse(self, connection: ServerConnection, request: HttpRequest) -> None:
        order = decode(faults.Refuse, request.body)
        self._door.shut_until = self._loop.time() + order.seconds
        _answer(connection, self.state())

    def _cut(self, connection: ServerConnection, request: HttpRequest) -> None:
        decode(faults.Cut, request.body)
        for other in list(self._door.connections):
            if isinstance(other.context, Call):
                other.abort()
        _answer(connection, self.state())

    def _reset(self, connection: ServerConnection, request: HttpRequest) -> None:
        self._forget_slowdown()
        self._faults.clear()
        self._engine.recover()
        _answer(connection, self.state())

    def _forget_slowdown(self) -> None:
        if self._slowdown_ends is not None:
            self._slowdown_ends.cancel()
            self._slowdown_ends = None


def _answer(connection: ServerConnection, body: object, status: int = 200) -> None:
    connection.answer(status, msgspec.json.encode(body))


@asynccontextmanager
async def emulated_engines(
    engines: Sequence[EngineSettings], host: str = "127.0.0.1"
) -> AsyncIterator[list[EmulatedEngine]]:
    """The engines, listening, on this loop for as long as the block lasts."""
    emulated = [EmulatedEngine(settings, host) for settings in engines]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(e.run(), name=f"engine {e.settings.port}") for e in emulated]
        for engine in emulated:
            await engine.listening.wait()
        try:
            yield emulated
        finally:
            for task in tasks:
                task.cancel()


async def serve_emulated(
    engines: Sequence[EngineSettings],
    host: str = "127.0.0.1",
    on_ready: Callable[[Sequence[str]], None] = lambda urls: None,
) -> None:
    """Run the engines until cancelled; `on_ready` gets their URLs once all listen."""
    async with emulated_engines(engines, host) as emulated:
        on_ready([engine.url for engine in emulated])
        await asyncio.Event().wait()
