"""A whole gateway on a test's own loop, and clients that do what no library would let them."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from time import monotonic, time
from typing import Any, ParamSpec
from unittest import mock

import aiohttp
import h11
import msgspec
import uvloop

import paceline.host
import paceline.wire.server
from paceline.domain.outcome import Outcome
from paceline.domain.promise import Tenant, Tier
from paceline.domain.worker import Worker, WorkerReport
from paceline.engines.engine import Engine
from paceline.engines.transfer import make_transfer
from paceline.gateway.auth import Directory
from paceline.gateway.exchange import Exchange
from paceline.gateway.link import Timeouts
from paceline.gateway.ordinary import ordinary_app
from paceline.gateway.outcome import outcome_of
from paceline.gateway.server import Gateway
from paceline.host import LiveHost
from paceline.kernel import Kernel, Settings
from paceline.tokens import Prompts
from paceline.wire.server import Limits, Server

P = ParamSpec("P")
MODEL = "m"
CHAT = "/v1/chat/completions"


def on_loop(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """Runs a test on the loop that the gateway runs on in earnest."""

    @functools.wraps(test)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(30):
                await test(*args, **kwargs)

        uvloop.run(bounded())

    return wrapped


async def until(condition: Callable[[], object]) -> None:
    """Wait for what other tasks bring about; the test's own timeout bounds it."""
    while not condition():  # noqa: ASYNC110 - the state of a server, which tells nobody
        await asyncio.sleep(0.002)


class Sound:
    """An adapter that says what the test wants."""

    kind = "openai"

    def __init__(self) -> None:
        self.healthy = True
        self.fields: dict[str, Any] = {}

    def extras(self, path: str, urgency: int) -> Mapping[str, Any]:
        return self.fields

    def token_ids(self, path: str) -> Mapping[str, Any]:
        return {}

    def continuation(self, *_: object) -> None: ...

    async def report(self, session: aiohttp.ClientSession) -> WorkerReport:
        return WorkerReport(healthy=self.healthy, because="" if self.healthy else "told so")


class Stand:
    """What runs, and how to ask it."""

    def __init__(self, host: LiveHost, server: Server, port: int, outcomes: list[Outcome]) -> None:
        self.host = host
        self.server = server
        self.port = port
        self.outcomes = outcomes
        self.adapters: list[Sound] = []
        self.tls: ssl.SSLContext | None = None

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def left_over(self) -> dict[str, int]:
        """All that a request leaves while it lives, as counts above 0."""
        workers = self.host.kernel.workers.values()
        found = {
            "exchanges": len(self.host.exchanges),
            "kernel": len(self.host.kernel.requests),
            "held": sum(self.host.kernel.held().values()),
            "ledger": sum(len(w.ledger.entries) + w.ledger.streams for w in workers),
            "tokens": sum(round(w.ledger.ahead + w.ledger.kv) for w in workers),
            "watch": sum(link.watch._live for link in self.host.links.values()),
            "connects": sum(t.get_name() == "connect" for t in asyncio.all_tasks()),
        }
        return {name: n for name, n in found.items() if n}

    async def settled(self) -> None:
        """Wait until nothing of any request is left."""
        await until(lambda: not self.left_over)

    async def client(self, **options: Any) -> Client:
        return await Client.connected(self.port, tls=self.tls, **options)

    async def raw(self, data: bytes, **options: Any) -> Reply:
        """The answer to these bytes, on a connection of their own."""
        async with await self.client(**options) as client:
            client.write(data)
            return await client.reply()

    async def ask(self, body: Any = None, path: str = CHAT, **headers: str) -> Reply:
        return await self.raw(post(body or {"messages": []}, path, **headers))

    async def stream(self, path: str = CHAT, **fields: Any) -> Reply:
        return await self.ask({"messages": [], "stream": True, **fields}, path)


def post(body: Any, path: str = CHAT, version: str = "1.1", **headers: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {"host": "x", "content-type": "application/json", "content-length": str(len(data))}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return f"POST {path} HTTP/{version}\r\n{lines}\r\n".encode("latin-1") + data


def get(path: str, method: str = "GET", **headers: str) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"{method} {path} HTTP/1.1\r\nhost: x\r\n{lines}\r\n".encode("latin-1")


class Reply(msgspec.Struct):
    """An answer as an independent parser reads it."""

    status: int
    headers: dict[str, str]
    body: bytes
    whole: bool
    """Its framing says that nothing is missing."""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's shape, with nothing missing."""
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    @property
    def events(self) -> list[Any]:
        lines = [x for x in self.body.decode().split("\n") if x.startswith("data: ")]
        return [x[6:] if x == "data: [DONE]" else json.loads(x[6:]) for x in lines]

    @property
    def text(self) -> str:
        choices = [c for e in self.events if isinstance(e, dict) for c in e.get("choices", ())]
        return "".join(c["delta"].get("content") or "" for c in choices)


class Client:
    """A client on a bare socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._parser = h11.Connection(h11.CLIENT)

    @classmethod
    async def connected(cls, port: int, **options: Any) -> Client:
        tls = options.pop("tls", None)
        return cls(*await asyncio.open_connection("127.0.0.1", port, ssl=tls, **options))

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    def write(self, data: bytes) -> None:
        self.writer.write(data)

    def leave(self) -> None:
        self.writer.transport.abort()

    async def wait_for(self, text: bytes) -> None:
        await self.reader.readuntil(text)

    async def reply(self, method: str = "POST") -> Reply:
        """The next answer on this connection."""
        if self._parser.our_state is h11.DONE:
            self._parser.start_next_cycle()
        parser = self._parser
        parser.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
        parser.send(h11.EndOfMessage())
        reply, body = Reply(0, {}, b"", False), bytearray()
        while True:
            found = parser.next_event()
            if found is h11.NEED_DATA:
                try:
                    data = await self.reader.read(65536)
                    parser.receive_data(data)
                    if not data and not reply.status:
                        return reply
                except (ConnectionError, h11.RemoteProtocolError):
                    reply.body = bytes(body)
                    return reply
            elif isinstance(found, h11.Response):
                reply.status = found.status_code
                reply.headers = {n.decode(): v.decode("latin-1") for n, v in found.headers}
            elif isinstance(found, h11.Data):
                body += found.data
            elif isinstance(found, h11.EndOfMessage):
                reply.whole, reply.body = True, bytes(body)
                return reply
            elif not isinstance(found, h11.InformationalResponse):
                return reply

    async def closed(self) -> bytes:
        """All that still comes, until the gateway closes."""
        try:
            return await self.reader.read()
        except ConnectionError:
            return b""


def tenant(name: str, key: str, tier: str = "standard") -> Tenant:
    return Tenant(name, tier, hashlib.sha256(key.encode()).digest())


QUICK = Settings(policy="round-robin", hold_s=0.2)
"""Each worker has its turn, and a test has the patience for the retries."""


@asynccontextmanager
async def live_gateway(
    *urls: str,
    settings: Settings = QUICK,
    timeouts: Timeouts = Timeouts(),  # noqa: B008 (frozen)
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    tenants: Iterable[Tenant] = (),
    anonymous: bool = True,
    names: Mapping[str, str] | None = None,
    serves_as: str = "",
    kind: str = "openai",
    api_key: str = "",
    tls: ssl.SSLContext | None = None,
    ready: bool = True,
    prompts: Prompts | None = None,
    parts: Sequence[Mapping[str, Any]] = (),
    asks: bool = False,
) -> AsyncIterator[Stand]:
    """A gateway before these engines, wired as `paceline.app` does it.

    `parts`: more of each worker, where they share requests. `asks`: its engines are asked how they
    are, as in earnest; else a test says it.
    """
    names = {MODEL: MODEL} if names is None else names
    outcomes: list[Outcome] = []

    def closed(exchange: Exchange) -> None:
        outcomes.append(outcome_of(exchange))
        if prompts is not None:
            prompts.ended(outcomes[-1])

    host = LiveHost(Kernel(settings), timeouts, closed, time)
    tiers = {"standard": Tier("standard")}
    directory = Directory(tiers, tenants, "standard", anonymous)
    own = ordinary_app(names, time(), lambda: host.ready)
    gateway = Gateway(host, directory, names, own, prompts=prompts)
    server = Server(gateway, limits, monotonic)
    adapters = [Sound() for _ in urls]
    engines = []
    for place, (url, adapter) in enumerate(zip(urls, adapters, strict=True)):
        adapter.healthy = ready
        more = parts[place] if parts else {}
        worker = Worker(f"w{place}", MODEL, url, kind, serves_as=serves_as or MODEL, **more)
        told = Engine(worker, adapter, api_key, make_transfer(worker, api_key))
        engines.append(Engine.of(worker, api_key) if asks else told)
    async with AsyncExitStack() as stack:
        for module, seconds in ((paceline.host, 0.02), (paceline.wire.server, 0.02)):
            stack.enter_context(mock.patch.object(module, "SWEEP_S", seconds))
        probe_s = 1.0 if asks else 0.05
        stack.enter_context(mock.patch.object(paceline.host, "PROBE_S", probe_s))
        _, port = await server.listen("127.0.0.1", 0, tls)
        tasks = [
            asyncio.create_task(host.run(engines), name="host"),
            asyncio.create_task(server.sweep(), name="sweep"),
        ]
        stand = Stand(host, server, port, outcomes)
        stand.adapters = adapters
        try:
            if urls and ready:
                await until(lambda: host.ready)
            yield stand
            assert not any(task.done() for task in tasks), tasks
        finally:
            await server.drain(0.0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if prompts is not None:
                prompts.close()
