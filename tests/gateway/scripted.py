"""Engines that answer by script over raw sockets: whatever can come over a wire."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from enum import Enum
from typing import Any

SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def event(body: Any) -> bytes:
    """One server-sent event in a chunk of its own."""
    text = body if isinstance(body, str) else json.dumps(body, separators=(",", ":"))
    data = b"data: %b\n\n" % text.encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


def token(text: str = "hi") -> bytes:
    return event({"id": "c", "choices": [{"index": 0, "delta": {"content": text}}]})


ROLE = event({"id": "c", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
DONE = event("[DONE]") + END


def counted(tokens: int) -> bytes:
    usage = {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": 5 + tokens}
    return event({"id": "c", "choices": [], "usage": usage})


def stream(tokens: int = 3) -> bytes:
    """A whole chat stream, usage included."""
    return SSE + ROLE + token() * tokens + counted(tokens) + DONE


def answer(body: bytes = b'{"ok":true}', status: int = 200, *headers: bytes) -> bytes:
    """A whole answer of known length."""
    head = (b"content-type: application/json", b"content-length: %d" % len(body), *headers)
    return b"HTTP/1.1 %d X\r\n%b\r\n\r\n%b" % (status, b"\r\n".join(head), body)


class Act(Enum):
    """What an engine may do beside sending bytes."""

    CLOSE = "close the connection in order"
    RESET = "break it"
    HANG = "stay silent until the gateway closes"
    PAUSE = "let the gateway read what was sent before the rest comes"


Part = bytes | Act | asyncio.Event
"""Bytes are sent, events waited for."""


class Asked:
    """A request as the engine got it."""

    def __init__(self, head: bytes, body: bytes) -> None:
        first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
        self.method, self.target, _ = first.split(" ")
        self.raw = head
        self.body = body
        self.lines = lines
        self.headers = {
            name.lower(): value for name, _, value in (x.partition(": ") for x in lines)
        }

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Script = Callable[[Asked], Sequence[Part]]


class ScriptedEngine:
    """Plays `script` for each request."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.asked: list[Asked] = []
        self.port = 0
        self.scheme = "http"
        self.opened = 0
        self.open: set[asyncio.StreamWriter] = set()
        """Connections that the gateway has not closed yet."""

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        self.open.add(writer)
        try:
            while await self._answer(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open.discard(writer)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        asked = Asked(head, b"")
        asked.body = await reader.readexactly(int(asked.headers.get("content-length", 0)))
        self.asked.append(asked)
        for part in self.script(asked):
            if isinstance(part, bytes):
                writer.write(part)
                await writer.drain()
            elif isinstance(part, asyncio.Event):
                await part.wait()
            elif part is Act.HANG:
                await reader.read()
                return False
            elif part is Act.PAUSE:
                await asyncio.sleep(0.05)
            elif part is Act.RESET:
                writer.transport.abort()
                return False
            else:
                return False
        return True

    @asynccontextmanager
    async def serving(self, **options: Any) -> AsyncIterator[ScriptedEngine]:
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0, **options)
        self.scheme = "https" if "ssl" in options else "http"
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for writer in list(self.open):
                writer.transport.abort()


def always(*parts: Part) -> Script:
    return lambda asked: parts


def in_turn(*scripts: Sequence[Part]) -> Script:
    """One script after the other, the last one for ever."""
    left = list(scripts)
    return lambda asked: left.pop(0) if len(left) > 1 else left[0]


@asynccontextmanager
async def scripted(*scripts: Script) -> AsyncIterator[list[ScriptedEngine]]:
    """One engine for each script."""
    if not scripts:
        yield []
        return
    async with ScriptedEngine(scripts[0]).serving() as first, scripted(*scripts[1:]) as rest:
        yield [first, *rest]
