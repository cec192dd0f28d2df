"""What does the admin listener answer, and does `paceline calibrate` understand it?"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

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
from paceline.domain.errors import ConfigError
from paceline.domain.facts import Step, StepsSeen, WorkerAdded
from paceline.domain.worker import Worker
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


def admin_of(kernel: Kernel) -> Starlette:
    return admin_app(kernel, Metrics(kernel, {}, [0.1]), lambda: (), lambda: 0.0, lambda: True)


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
