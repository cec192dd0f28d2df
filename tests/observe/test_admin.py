"""What does the admin listener answer, and does `paceline calibrate` understand it?"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvicorn
from msgspec.structs import replace
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from typer.testing import CliRunner

from paceline import calibrate
from paceline.calibrate import NoTiming, doubts, fetch
from paceline.cli import app as command_line
from paceline.domain.commands import Hold
from paceline.domain.errors import ConfigError, NotFound
from paceline.domain.facts import Step, StepsSeen, WorkerAdded
from paceline.domain.worker import Worker
from paceline.host import Decision
from paceline.kernel import Kernel
from paceline.kernel.timing import Timing, WorkerTiming, export, from_json
from paceline.observe.admin import admin_app
from paceline.observe.metrics import Metrics
from paceline.policy.steptime import StepModel

KNOWN = WorkerTiming(id="w0", model="m", step=StepModel(samples=5000), prefill_budget=2048)


def gateway_kernel() -> Kernel:
    kernel = Kernel()
    for name in ("w0", "w1"):
        kernel.handle(WorkerAdded(Worker(name, "m", f"http://{name}")), 0.0)
    return kernel


class Idle:
    """A gateway that refuses every order; how they are carried out: tests/test_reload.py."""

    def ready(self) -> bool:
        return True

    def decisions(self) -> Iterable[Decision]:
        return [Decision(float(i), Hold(f"r{i}", "no worker is usable")) for i in range(3)]

    def settings(self) -> dict[str, Any]:
        return {"listen": "here"}

    def tiers(self) -> list[dict[str, Any]]:
        return [{"name": "gold"}]

    def tenants(self) -> list[dict[str, Any]]:
        return [{"name": "acme"}]

    async def reload(self) -> Decision:
        raise ConfigError(["line 1: one thing", "line 2: and another"])

    def add(self, order: str) -> tuple[str, bool]:
        raise ConfigError([f"not understood: {order}"])

    def remove(self, worker_id: str, at_once: bool) -> None:
        raise NotFound(f"{worker_id} {at_once}")


def admin_of(kernel: Kernel) -> Starlette:
    return admin_app(kernel, Metrics(kernel, {}, [0.1]), Idle(), lambda: 0.0)


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[str]:
    """The application on a socket of its own; gives its URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        task = asyncio.create_task(server.serve(sockets=[listener]), name="admin")
        try:
            yield "http://{}:{}".format(*listener.getsockname())
        finally:
            server.should_exit = True
            await task


def fetched(app: Any, path: str = "") -> Timing:
    async def ask() -> Timing:
        async with serving(app) as url:
            return await fetch(url + path)

    return asyncio.run(ask())


def answering(status: int, body: bytes) -> Starlette:
    async def answer(request: Request) -> Response:
        return Response(body, status)

    return Starlette(routes=[Route("/{path:path}", answer)])


def test_timing_is_exported_over_http() -> None:
    kernel = gateway_kernel()
    assert fetched(admin_of(kernel)) == export(kernel)


def test_a_gateway_without_workers_exports_nothing() -> None:
    assert fetched(admin_of(Kernel())) == Timing(workers=(), models={})


def test_steps_that_were_seen_show_in_the_export() -> None:
    kernel = gateway_kernel()
    steps = [Step(0.02 * k, 0.02, 4, 4) for k in range(1, 50)]
    kernel.handle(StepsSeen("w0", steps), 1.0)
    first, second = fetched(admin_of(kernel)).workers
    assert first.step.samples > 40 > second.step.samples == 0
    assert first.step.step_s(4) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("app", "error", "says"),
    [
        (answering(404, b"{}"), NoTiming, "HTTP 404; is this the admin listener"),
        (answering(200, b"<html>"), ConfigError, "no timing"),
        (answering(200, b'{"version": 99}'), ConfigError, "version 99"),
    ],
)
def test_another_server_s_answer_is_refused(app: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        fetched(app)


def test_nothing_that_listens_is_told_in_a_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        with pytest.raises(NoTiming, match=r"is `paceline serve` running"):
            asyncio.run(fetch(f"127.0.0.1:{taken.getsockname()[1]}"))


def test_a_listener_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "TIMEOUT_S", 0.05)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(NoTiming, match="no answer"):
            asyncio.run(fetch(f"127.0.0.1:{silent.getsockname()[1]}"))


def test_an_address_that_is_none_is_told_in_a_sentence() -> None:
    with pytest.raises(NoTiming, match="http://:"):
        asyncio.run(fetch("http://:/"))


# Orders, and what is asked.


def asked(method: str, path: str, body: bytes = b"") -> tuple[int, Any]:
    """Status and JSON."""

    async def ask() -> tuple[int, Any]:
        async with (
            serving(admin_of(gateway_kernel())) as url,
            aiohttp.ClientSession() as session,
            session.request(method, url + path, data=body) as told,
        ):
            return told.status, await told.json()

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/health/ready", {"status": "ready"}),
        ("/paceline/v1/config", {"listen": "here"}),
        ("/paceline/v1/tenants", {"tenants": [{"name": "acme"}]}),
        ("/paceline/v1/tiers", {"tiers": [{"name": "gold"}]}),
    ],
)
def test_what_the_gateway_says_of_itself_is_shown(path: str, shown: object) -> None:
    assert asked("GET", path) == (200, shown)


def test_the_newest_decision_comes_first() -> None:
    _, told = asked("GET", "/paceline/v1/decisions?limit=2")
    assert [d["command"]["request_id"] for d in told["decisions"]] == ["r2", "r1"]


def test_each_worker_is_listed() -> None:
    _, told = asked("GET", "/paceline/v1/workers")
    assert [(w["id"], w["usable"], w["draining"]) for w in told["workers"]] == [
        ("w0", False, False),
        ("w1", False, False),
    ]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"),
    [
        ("POST", "/paceline/v1/config", b"", 400, "one thing\nline 2: and another"),
        ("POST", "/paceline/v1/workers", b"nonsense", 400, "not understood: nonsense"),
        ("POST", "/paceline/v1/workers", b"\xff", 400, "UTF-8"),
        ("DELETE", "/paceline/v1/workers/h:1/engine-1", b"", 404, "h:1/engine-1 False"),
        ("DELETE", "/paceline/v1/workers/h:1?now=true", b"", 404, "h:1 True"),
        ("DELETE", "/paceline/v1/workers/h:1?now=maybe", b"", 400, "now"),
        ("PUT", "/paceline/v1/workers", b"", 405, "PUT"),
        ("GET", "/paceline/v1/nothing", b"", 404, "nothing"),
    ],
)
def test_a_refusal_has_the_shape_of_openai_s(
    method: str, path: str, body: bytes, status: int, says: str
) -> None:
    got, told = asked(method, path, body)
    assert got == status
    assert set(told["error"]) == {"message", "type", "param", "code"}
    assert says in told["error"]["message"]


# What the command prints.


def told(timing: Timing) -> Callable[[str], Awaitable[Timing]]:
    async def fetch(admin: str) -> Timing:
        return timing

    return fetch


def test_the_command_writes_a_file_that_can_be_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing = Timing(workers=(KNOWN,), models={})
    monkeypatch.setattr(calibrate, "fetch", told(timing))
    path = tmp_path / "timing.json"
    result = CliRunner().invoke(command_line, ["calibrate", "--out", str(path)])
    assert result.exit_code == 0
    assert "w0" in result.output
    assert from_json(path.read_bytes(), str(path)) == timing
    printed = CliRunner().invoke(command_line, ["calibrate", "--json"])
    assert printed.stdout_bytes == path.read_bytes()


@pytest.mark.parametrize("name", ["http://10.128.0.117:8000", "http://llama-70b-0.llama" * 4])
def test_the_name_of_a_worker_is_never_cut_or_folded(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    models = ("meta-llama/Llama-3.1-70B-Instruct", "m")
    workers = tuple(replace(KNOWN, id=f"{name}/{i}", model=model) for i, model in enumerate(models))
    monkeypatch.setattr(calibrate, "fetch", told(Timing(workers=workers, models={})))
    shown = CliRunner().invoke(command_line, ["calibrate"], env={"COLUMNS": "80"})
    lines = shown.output.splitlines()
    for worker in workers:
        row = next(line for line in lines if line.startswith(worker.id))
        assert "5,000" in row
    assert all(len(line.rstrip()) <= 80 for line in lines) == (len(name) < 33)


def test_a_folder_that_is_not_there_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "fetch", told(Timing(workers=(), models={})))
    result = CliRunner().invoke(command_line, ["calibrate", "-o", str(tmp_path / "no" / "t.json")])
    assert isinstance(result.exception, NoTiming)


def test_a_worker_known_well_raises_no_doubt() -> None:
    assert list(doubts(Timing(workers=(KNOWN,), models={}))) == []


@pytest.mark.parametrize(
    ("worker", "doubt"),
    [
        (replace(KNOWN, step=StepModel(samples=0)), "send about 50 streamed requests more"),
        (replace(KNOWN, step=StepModel(samples=990)), "send about 1 streamed request more"),
        (replace(KNOWN, step=StepModel(samples=5000, slowdown=2.0)), "2.00 times its usual time"),
        (replace(KNOWN, predictions=80, itl_error=0.4), "predicted 40% wrong"),
    ],
)
def test_a_doubtful_worker_is_named_with_the_reason(worker: WorkerTiming, doubt: str) -> None:
    (said,) = doubts(Timing(workers=(worker,), models={}))
    assert said.startswith("w0: ")
    assert doubt in said


def test_an_empty_fleet_is_said_to_be_one() -> None:
    assert list(doubts(Timing(workers=(), models={}))) == ["The gateway has no workers."]
