"""Does a collector hear what happened, and does an engine know whose work it does?"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any

import outcomes
import pytest
from live import free_port
from msgspec.structs import replace
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from structlog.testing import capture_logs

from paceline.domain.commands import Command, Dispatch, Hold, Prefill
from paceline.domain.facts import TimerFired
from paceline.domain.outcome import Outcome
from paceline.observe.otel import OpenTelemetry
from paceline.observe.sheet import sheet_of

CHAT = "/v1/chat/completions"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE}-{PARENT}-01"
REQUEST = replace(outcomes.REQUEST, id="r1", max_tokens=100)
OUTCOME = replace(
    outcomes.OUTCOME, path=CHAT, request=REQUEST, because="least cost", ttft_s=0.2, output_tokens=40
)


class Server(ThreadingHTTPServer):
    """A collector, and an engine of one answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.spans: list[Any] = []
        self.metrics: list[Any] = []
        self.engine_headers: list[dict[str, str]] = []
        self.busy = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self._answer(json.dumps({"object": "list", "data": [{"id": "m"}]}).encode())

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/v1/traces":
            told = ExportTraceServiceRequest.FromString(unpacked(self.headers, data))
            for resource in told.resource_spans:
                for scope in resource.scope_spans:
                    self.server.spans += scope.spans
        elif self.path == "/v1/metrics":
            heard = ExportMetricsServiceRequest.FromString(unpacked(self.headers, data))
            for of_resource in heard.resource_metrics:
                for of_scope in of_resource.scope_metrics:
                    self.server.metrics += of_scope.metrics
        else:
            self.server.engine_headers.append({k.lower(): v for k, v in self.headers.items()})
            chunk = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
            self._answer(chunk + chunk + b"data: [DONE]\n\n", "text/event-stream")
            return
        self._answer(b"")

    def _answer(self, body: bytes, kind: str = "application/json") -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def unpacked(headers: Any, data: bytes) -> bytes:
    import gzip

    return gzip.decompress(data) if headers.get("content-encoding") == "gzip" else data


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def http(**headers: str) -> Any:
    return SimpleNamespace(path=CHAT, headers=headers)


def life(**times: float) -> Any:
    now = monotonic()
    return SimpleNamespace(**{"sent_at": now - 0.9, "first_at": now - 0.8, "done_at": now} | times)


def end(otel: OpenTelemetry, life: Any, outcome: Outcome) -> None:
    otel.over([(life, outcome)])
    otel.count(sheet_of(outcome))


def decided(otel: OpenTelemetry, *commands: Command) -> None:
    otel.saw(0.0, TimerFired(), commands)


def told(span: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


def test_a_request_is_one_span_with_what_befell_it(server: Server) -> None:
    otel = OpenTelemetry(server.url, sample=1.0)
    otel.begin("r1", http())
    decided(otel, Hold("r1", "no room"))
    decided(otel, Dispatch("r1", "w0", "it has room"), Dispatch("r2", "w0", "it has room"))
    otel.turned("r1", "moved", "the worker hangs")
    decided(otel, Prefill("r1", "p0", "long prompt"))
    decided(otel, Dispatch("r1", "w1", "least cost", attempt=2))
    end(otel, life(), OUTCOME)
    otel.close()
    (span,) = server.spans
    attributes = told(span)
    assert span.name == "chat m"
    assert [(event.name, told(event).get("paceline.worker", "")) for event in span.events] == [
        ("queued", ""),
        ("dispatched", "w0"),
        ("moved", ""),
        ("prefill", "p0"),
        ("dispatched", "w1"),
        ("first token", ""),
    ]
    assert told(span.events[2])["paceline.because"] == "the worker hangs"
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.provider.name"] == "paceline"
    assert attributes["gen_ai.request.model"] == "m"
    assert attributes["gen_ai.usage.output_tokens"] == 40
    assert attributes["paceline.request_id"] == "r1"
    assert attributes["paceline.kept"] is True
    assert "error.type" not in attributes
    assert span.end_time_unix_nano - span.events[-1].time_unix_nano == pytest.approx(8e8, rel=0.01)
    assert abs(span.end_time_unix_nano - time.time_ns()) < 5e9


def test_what_ended_badly_is_an_error_of_its_kind(server: Server) -> None:
    otel = OpenTelemetry(server.url, sample=1.0)
    otel.begin("r1", http())
    end(otel, life(first_at=0.0), replace(OUTCOME, status=502, error="it died"))
    otel.close()
    (span,) = server.spans
    assert told(span)["error.type"] == "502"
    assert span.status.message == "it died"
    assert not span.events


def test_the_clients_trace_goes_on_and_the_engine_gets_our_span_as_its_parent(
    server: Server,
) -> None:
    otel = OpenTelemetry(server.url, sample=0.0)
    asked = http(traceparent=SAMPLED, tracestate="a=b")
    otel.begin("r1", asked)
    end(otel, life(), OUTCOME)
    otel.close()
    (span,) = server.spans
    assert span.trace_id.hex() == TRACE
    assert span.parent_span_id.hex() == PARENT
    assert asked.headers["traceparent"] == f"00-{TRACE}-{span.span_id.hex()}-01"
    assert asked.headers["tracestate"] == "a=b"


def test_what_is_not_traced_passes_unchanged_and_costs_no_span(server: Server) -> None:
    otel = OpenTelemetry(server.url, sample=1.0)
    not_sampled = http(traceparent=f"00-{TRACE}-{PARENT}-00")
    otel.begin("r1", not_sampled)
    end(otel, life(), OUTCOME)
    otel.close()
    assert not_sampled.headers["traceparent"].endswith("-00")
    assert server.spans == []


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "x",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{PARENT}-01-more",
    ],
)
def test_a_trace_that_cannot_be_read_is_begun_anew(server: Server, broken: str) -> None:
    otel = OpenTelemetry(server.url, sample=1.0)
    asked = http(traceparent=broken, tracestate="a=b")
    otel.begin("r1", asked)
    end(otel, life(), OUTCOME)
    otel.close()
    (span,) = server.spans
    assert span.parent_span_id == b""
    assert asked.headers == {"traceparent": f"00-{span.trace_id.hex()}-{span.span_id.hex()}-01"}


def test_of_those_who_do_not_say_a_share_is_traced(server: Server) -> None:
    draws = iter([0.05, 0.5, 0.09, 0.2])
    otel = OpenTelemetry(server.url, sample=0.1, chance=lambda: next(draws))
    for number in range(4):
        otel.begin(str(number), http())
        end(otel, life(), replace(OUTCOME, request=replace(REQUEST, id=str(number))))
    otel.close()
    assert [told(span)["paceline.request_id"] for span in server.spans] == ["0", "2"]


def test_metrics_count_every_request_by_the_conventions(server: Server) -> None:
    otel = OpenTelemetry(server.url, sample=0.0)
    for number, outcome in enumerate([OUTCOME, OUTCOME, replace(OUTCOME, status=429, error="no")]):
        otel.begin(str(number), http())
        end(otel, life(), replace(outcome, request=replace(REQUEST, id=str(number))))
    otel.close()
    found = {metric.name: metric for metric in server.metrics}
    assert set(found) == {
        "gen_ai.server.request.duration",
        "gen_ai.server.time_to_first_token",
        "gen_ai.server.time_per_output_token",
    }
    assert all(metric.unit == "s" for metric in found.values())
    counts = {
        told(point).get("error.type"): point.count
        for point in found["gen_ai.server.request.duration"].histogram.data_points
    }
    assert counts == {None: 2, "429": 1}
    (point,) = found["gen_ai.server.time_per_output_token"].histogram.data_points
    assert point.sum == pytest.approx(0.04)
    assert sum(point.bucket_counts) == point.count == 2
    assert len(point.bucket_counts) == len(point.explicit_bounds) + 1


def test_a_collector_that_is_away_costs_nothing_but_a_little_patience_at_the_end() -> None:
    otel = OpenTelemetry(f"http://127.0.0.1:{free_port()}", sample=1.0)
    for number in range(50):
        otel.begin(str(number), http())
        end(otel, life(), replace(OUTCOME, request=replace(REQUEST, id=str(number))))
    began = monotonic()
    with capture_logs() as said:
        otel.close()
    assert monotonic() - began < 20.0
    assert [event["event"] for event in said] == ["traces or metrics are lost"]


# The whole gateway.


@contextmanager
def gateway(config: dict[str, Any], folder: Path) -> Iterator[None]:
    (folder / "paceline.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "paceline", "serve", "-c", str(folder / "paceline.yaml")]
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen(command, stderr=said)
        try:
            yield
        finally:
            process.terminate()
            assert process.wait(30) == 0


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    give_up = monotonic() + seconds
    while not condition():
        assert monotonic() < give_up, "it never came"
        time.sleep(0.02)


def test_a_gateway_traces_from_the_client_to_the_engine(tmp_path: Path, server: Server) -> None:
    clients, admin = free_port(), free_port()
    config = {
        "listen": f"127.0.0.1:{clients}",
        "admin": f"127.0.0.1:{admin}",
        "models": [{"name": "m", "workers": [{"url": server.url, "kind": "openai"}]}],
        "shutdown": {"notice_s": 0, "grace_s": 5},
        "observe": {"otlp": server.url, "sample": 0},
    }

    def ready() -> bool:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{admin}/health/ready", timeout=2).close()
        except OSError:
            return False
        return True

    body = json.dumps({"model": "m", "messages": [], "stream": True}).encode()
    with gateway(config, tmp_path):
        until(ready)
        for headers in ({"traceparent": SAMPLED, "x-request-id": "mine"}, {}):
            kind = {"content-type": "application/json", **headers}
            asked = urllib.request.Request(f"http://127.0.0.1:{clients}{CHAT}", body, kind)
            with urllib.request.urlopen(asked, timeout=10) as answer:
                answer.read()
    (span,) = server.spans
    assert span.trace_id.hex() == TRACE
    assert told(span)["paceline.request_id"] == "mine"
    assert [event.name for event in span.events] == ["dispatched"]
    traced, not_traced = server.engine_headers
    assert traced["traceparent"] == f"00-{TRACE}-{span.span_id.hex()}-01"
    assert "traceparent" not in not_traced
    assert {metric.name for metric in server.metrics} >= {"gen_ai.server.request.duration"}
    lines = [json.loads(line) for line in (tmp_path / "said").read_text().splitlines()]
    assert "mine" in {line.get("id") for line in lines if line["event"] == "request"}


def test_without_a_collector_nothing_of_opentelemetry_is_loaded() -> None:
    code = "import sys, paceline.app; sys.exit('opentelemetry.sdk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
