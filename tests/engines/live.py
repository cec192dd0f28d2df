"""How does a test get an engine that runs, and a gateway in front of it?"""

from __future__ import annotations

import asyncio
import http.client
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import SystemRandom
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
import pytest
from dialects import Front, SGLangFront, TRTLLMFront, served
from install import gguf_is_ready, vllm_is_ready
from servers import llamacpp_server, vllm_server

from paceline.domain.worker import WorkerReport
from paceline.engines.adapter import Adapter, make_adapter
from paceline.engines.detect import Detected, detect

READY_S = 30.0
TIMEOUT_S = 90.0
"""For one read of an answer. vLLM on one core compiles parts of itself at its first requests."""
Body = dict[str, Any]


@dataclass(frozen=True)
class LiveEngine:
    """An engine under test, as the suite wants to see it."""

    url: str
    kind: str
    exact: bool
    """The same prompt gives the same answer to the letter, and each token its own event."""
    model: str = "m"

    @cached_property
    def adapter(self) -> Adapter:
        """One that has seen the engine: what it sends may depend on that."""
        adapter = make_adapter(self.kind, self.url, self.model, "")
        report_by(adapter)
        return adapter

    def report(self) -> WorkerReport:
        return report_by(self.adapter)

    def detected(self) -> Detected | None:
        async def run() -> Detected | None:
            async with aiohttp.ClientSession() as session:
                return await detect(session, self.url, "")

        return asyncio.run(run())


@dataclass(frozen=True)
class Client:
    """Somebody with requests, at the engine itself or at a gateway before it."""

    engine: LiveEngine
    url: str
    model: str
    is_gateway: bool

    def send(self, path: str, body: bytes | Body) -> http.client.HTTPResponse:
        """POST, and the answer as far as its head. Closing it hangs up."""
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_S)
        data = body if isinstance(body, bytes) else msgspec.json.encode(body)
        headers = {"content-type": "application/json", "connection": "close"}
        connection.request("POST", path, data, headers)
        return connection.getresponse()

    def post(self, path: str, body: bytes | Body) -> tuple[int, Body]:
        """Status and body."""
        with self.send(path, body) as response:
            return response.status, msgspec.json.decode(response.read())

    def ask(self, path: str, **body: Any) -> Body:
        """The answer in one piece."""
        status, answer = self.post(path, {"model": self.model, "temperature": 0, **body})
        assert status == 200, answer
        return answer

    def stream(self, path: str, **body: Any) -> list[Body]:
        """The events of an answer, which must end as it should."""
        return events_of(self.open_stream(path, **body))

    def open_stream(self, path: str, **body: Any) -> http.client.HTTPResponse:
        """An answer that begins."""
        whole = {"model": self.model, "temperature": 0, "stream": True, **body}
        response = self.send(path, whole)
        assert response.status == 200, response.read()
        assert (response.getheader("content-type") or "").startswith("text/event-stream")
        return response


def report_by(adapter: Adapter) -> WorkerReport:
    async def run() -> WorkerReport:
        async with aiohttp.ClientSession() as session:
            return await adapter.report(session)

    return asyncio.run(run())


def events_of(response: http.client.HTTPResponse) -> list[Body]:
    """All events of a stream but the last, which tells that it is whole."""
    with response:
        lines = response.read().decode().splitlines()
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [msgspec.json.decode(line) for line in data]


@contextmanager
def live_engine(name: str) -> Iterator[LiveEngine]:
    """One of `STARTS`, for as long as the block lasts."""
    kind = "vllm" if name == "emulated" else name
    with STARTS[name]() as url:
        yield LiveEngine(url, kind, exact=name not in ("vllm", "llamacpp"))


@dataclass(frozen=True)
class Emulated:
    """An emulated engine and its process, for who wants to kill it."""

    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def emulated() -> Iterator[Emulated]:
    port = free_port()
    command = ["paceline.engines.emulated", "--emulate", "tiny", "--port", str(port)]
    with _process(*command, "--model", "m") as process:
        yield Emulated(_ready(f"http://127.0.0.1:{port}", "/health"), process)


@contextmanager
def _emulated() -> Iterator[str]:
    with emulated() as engine:
        yield engine.url


@contextmanager
def _vllm() -> Iterator[str]:
    _need(vllm_is_ready(), "vLLM", "python tests/real/install.py all")
    with vllm_server(free_port(), core=0) as engine:
        yield engine.url


@contextmanager
def _llamacpp() -> Iterator[str]:
    _need(gguf_is_ready(), "a GGUF model", "python tests/real/install.py model")
    _need(importlib.util.find_spec("xllamacpp") is not None, "llama.cpp", 'pip install "[demo]"')
    with llamacpp_server(free_port(), slots=2, context=1024) as engine:
        yield engine.url


def _behind(front: type[Front]) -> Callable[[], AbstractContextManager[str]]:
    @contextmanager
    def start() -> Iterator[str]:
        with emulated() as engine, served(front(engine.url)) as url:
            yield url

    return start


STARTS: Mapping[str, Callable[[], AbstractContextManager[str]]] = {
    "emulated": _emulated,
    "sglang": _behind(SGLangFront),
    "trtllm": _behind(TRTLLMFront),
    "vllm": _vllm,
    "llamacpp": _llamacpp,
}


def _need(there: bool, what: str, remedy: str) -> None:
    """Without it the test is skipped; but where real engines are demanded, it fails."""
    if there:
        return
    message = f"{what} is not installed: {remedy}"
    if os.environ.get("PACELINE_REAL") == "1":
        pytest.fail(message)
    pytest.skip(message)


@contextmanager
def gateway_before(engines: Sequence[LiveEngine], folder: Path, model: str) -> Iterator[str]:
    """`paceline serve` with these engines, of which it is told nothing but the URLs."""
    port = free_port()
    config = folder / f"{engines[0].kind}-{port}.yaml"
    workers = ", ".join(f"{{url: '{engine.url}'}}" for engine in engines)
    config.write_text(
        f"listen: 127.0.0.1:{port}\nadmin: 127.0.0.1:0\n"
        f"models: [{{name: {model}, workers: [{workers}]}}]\n"
        "tiers: {standard: {ttft_s: 60, itl_s: 5}}\ndefault_tier: standard\n"
    )
    with _process("paceline", "serve", "--config", str(config)):
        yield _ready(f"http://127.0.0.1:{port}", "/health/ready")


@contextmanager
def _process(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-m", *command], stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready(url: str, path: str) -> str:
    """The URL, once it answers."""
    ends = time.monotonic() + READY_S
    while time.monotonic() < ends:
        try:
            with urllib.request.urlopen(url + path, timeout=2.0):
                return url
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise TimeoutError(f"{url}{path} does not answer 200 within {READY_S:g} s")


def free_port() -> int:
    """A port that nobody listens on, nor will by chance: below those that the kernel hands out.

    Some engines take theirs only when they have loaded, a minute later.
    """
    for port in SystemRandom().sample(range(10_000, 30_000), 100):
        with socket.socket() as listener, suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port among a hundred")
