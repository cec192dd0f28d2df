"""Does the process start, wait for its workers, and stop as an operator expects?"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

BODY = json.dumps({"messages": [{"role": "user", "content": "x"}], "stream": True})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "it never came"
        time.sleep(0.02)


class SlowEngine(BaseHTTPRequestHandler):
    """Healthy, and gives its second token when it is told to."""

    protocol_version = "HTTP/1.1"
    go = threading.Event()

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        body = json.dumps({"object": "list", "data": [{"id": "m"}]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self._event(b'data: {"choices":[{"delta":{"content":"one"}}]}\n\n')
        self.go.wait(20)
        self._event(b'data: {"choices":[{"delta":{"content":"two"}}]}\n\ndata: [DONE]\n\n')
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()


@contextmanager
def slow_engine(port: int) -> Iterator[None]:
    SlowEngine.go.clear()
    server = ThreadingHTTPServer(("127.0.0.1", port), SlowEngine)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield
    finally:
        SlowEngine.go.set()
        server.shutdown()
        thread.join()
        server.server_close()


class Serve:
    """`paceline serve` as a process of its own."""

    def __init__(self, folder: Path, engine_port: int) -> None:
        self.port, self._admin = free_port(), free_port()
        self._engine_port = engine_port
        self._config = folder / "paceline.yaml"
        self.write("")
        self.log = folder / "log"
        with self.log.open("wb") as log:
            command = [sys.executable, "-m", "paceline", "serve", "--config", str(self._config)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)

    def write(self, more: str) -> None:
        """The configuration, with something added."""
        self._config.write_text(
            f"listen: 127.0.0.1:{self.port}\nadmin: 127.0.0.1:{self._admin}\n"
            "models:\n  - name: m\n"
            f"    workers: [{{url: 'http://127.0.0.1:{self._engine_port}', kind: openai}}]\n{more}"
        )

    def status(self, path: str) -> int:
        """0 while nobody listens."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except ConnectionError:
            return 0
        finally:
            connection.close()

    def ask(self) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", BODY, headers)
        return connection.getresponse()


@pytest.fixture
def engine_port() -> int:
    return free_port()


@pytest.fixture
def serve(tmp_path: Path, engine_port: int) -> Iterator[Serve]:
    serve = Serve(tmp_path, engine_port)
    try:
        yield serve
    finally:
        serve.process.kill()
        serve.process.wait()


def test_it_waits_for_its_worker_and_lets_streams_finish_on_sigterm(
    serve: Serve, engine_port: int
) -> None:
    until(lambda: serve.status("/health/live") == 200)
    assert serve.status("/health/ready") == 503
    until(lambda: b"not ready" in serve.log.read_bytes())
    time.sleep(1.5)  # over another probe, which has nothing new to say
    assert serve.log.read_bytes().count(b"not ready") == 1
    with slow_engine(engine_port):
        until(lambda: serve.status("/health/ready") == 200)
        answer = serve.ask()
        assert answer.status == 200
        assert b"one" in answer.readline()
        serve.process.send_signal(signal.SIGTERM)
        until(lambda: serve.status("/health/ready") == 503)
        until(lambda: serve.status("/health/live") == 0)
        assert serve.process.poll() is None
        SlowEngine.go.set()
        rest = answer.read()
        assert b"two" in rest
        assert rest.endswith(b"[DONE]\n\n")
        assert serve.process.wait(20) == 0
    assert b"Traceback" not in serve.log.read_bytes()


def test_it_stops_at_once_when_it_has_nothing_to_do(serve: Serve) -> None:
    until(lambda: serve.status("/health/live") == 200)
    serve.process.send_signal(signal.SIGINT)
    assert serve.process.wait(20) == 0
    assert b"Traceback" not in serve.log.read_bytes()


def test_sighup_reloads_the_configuration_and_a_wrong_one_changes_nothing(
    serve: Serve, engine_port: int
) -> None:
    with slow_engine(engine_port):
        until(lambda: serve.status("/health/ready") == 200)
        serve.write("default_tier: renamed\n")
        serve.process.send_signal(signal.SIGHUP)
        until(lambda: b"configuration reloaded" in serve.log.read_bytes())
        serve.write("default_tier: again\nno_such_thing: 1\n")
        serve.process.send_signal(signal.SIGHUP)
        until(lambda: b"configuration refused" in serve.log.read_bytes())
        assert b"no_such_thing" in serve.log.read_bytes()
        SlowEngine.go.set()
        answer = serve.ask()
        assert answer.headers["x-paceline-tier"] == "renamed"
        assert answer.read().endswith(b"[DONE]\n\n")
    assert b"Traceback" not in serve.log.read_bytes()


def test_a_second_sigterm_ends_at_once_and_tells_the_clients(
    serve: Serve, engine_port: int
) -> None:
    with slow_engine(engine_port):
        until(lambda: serve.status("/health/ready") == 200)
        answer = serve.ask()
        assert b"one" in answer.readline()
        serve.process.send_signal(signal.SIGTERM)
        until(lambda: serve.status("/health/ready") == 503)
        serve.process.send_signal(signal.SIGTERM)
        rest = answer.read()
        assert b"the gateway is shutting down" in rest
        assert b"[DONE]" not in rest
        assert serve.process.wait(20) == 1
    assert b"Traceback" not in serve.log.read_bytes()
