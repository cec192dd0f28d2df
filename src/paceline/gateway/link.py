"""How is one engine reached: where, with which head, over which kept-alive connection?"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import urlsplit

import msgspec

from paceline.domain.facts import Step
from paceline.domain.worker import Worker
from paceline.gateway.ports import Dialect, Transfer
from paceline.gateway.steps import StepWatch
from paceline.gateway.upstream import EngineConnection

FORWARDED = ("content-type", "accept", "traceparent", "tracestate", "anthropic-version")
"""Client headers that an engine gets to see; credentials and cookies never are."""

MAX_IDLE = 512
"""Connections to one engine that are kept for later."""


class Timeouts(msgspec.Struct, frozen=True):
    """How long an engine may keep a request waiting, in seconds."""

    connect_s: float = 5.0
    first_token_s: float = 600.0
    stall_s: float = 120.0

    def passed(self, silent_s: float, connecting: bool, flows: bool) -> str:
        """Which of them an engine's silence has outlasted; empty: none."""
        if flows:
            return f"no token for {silent_s:.0f} s" if silent_s > self.stall_s else ""
        if connecting and silent_s > self.connect_s:
            return f"no connection within {self.connect_s:g} s"
        return f"no answer within {self.first_token_s:g} s" if silent_s > self.first_token_s else ""


class EngineLink:
    """One engine as the relay uses it: a pool of connections and a watch over its steps."""

    def __init__(
        self,
        worker: Worker,
        dialect: Dialect,
        api_key: str,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        on_step: Callable[[Step], None],
        transfer: Transfer | None = None,
    ) -> None:
        self.worker = worker
        self.dialect = dialect
        self.transfer = transfer
        """How it hands prompts over, if it does."""
        self.watch = StepWatch(on_step)
        parts = urlsplit(worker.url)
        self._hostname = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._prefix = parts.path.rstrip("/")
        self._host = parts.netloc.rpartition("@")[2]
        self._authorization = f"authorization: Bearer {api_key}\r\n" if api_key else ""
        self._spawn = spawn
        self._idle: list[EngineConnection] = []

    def connection(self, fresh: bool = False) -> EngineConnection:
        """A connection, kept alive from before unless it must be `fresh`."""
        if self._idle and not fresh:
            return self._idle.pop()
        connection = EngineConnection(self._forget)
        work = connection.connect(self._hostname, self._port, self._tls)
        connection.connecting = self._spawn(work)
        return connection

    def keep(self, connection: EngineConnection) -> None:
        """The connection has carried its answer to the end and may carry another."""
        connection.reader = None
        if len(self._idle) < MAX_IDLE:
            self._idle.append(connection)
        else:
            connection.close()

    def _forget(self, connection: EngineConnection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)

    def head(
        self, method: str, target: str, headers: dict[str, str], request_id: str, length: int
    ) -> bytes:
        """The request head for the engine, written anew: no framing of the client is kept."""
        passed = "".join(f"{name}: {headers[name]}\r\n" for name in FORWARDED if name in headers)
        return (
            f"{method} {self._prefix}{target} HTTP/1.1\r\nhost: {self._host}\r\n"
            f"x-request-id: {request_id}\r\ncontent-length: {length}\r\n"
            f"{self._authorization}{passed}\r\n"
        ).encode("latin-1")

    def close(self) -> None:
        """Close the connections that wait; those in use end with their requests."""
        while self._idle:
            self._idle.pop().close()
