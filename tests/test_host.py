"""What does the host learn of engines, and in which order does it do what the kernel says?"""

from __future__ import annotations

import asyncio
import io
import socket
from collections.abc import Callable, Sequence
from time import time
from typing import Any

import pytest
from aiohttp import web

from paceline.domain.commands import Command, Degrade, Dispatch, Fail, Hold, Move, Pause, Shed
from paceline.domain.facts import ClientLeft, DispatchFailed, Fact, WorkerAdded, WorkerReported
from paceline.domain.promise import Promise
from paceline.domain.request import Request
from paceline.domain.worker import Worker, WorkerReport
from paceline.engines.engine import Engine, adapter_of
from paceline.gateway.link import Timeouts
from paceline.host import LiveHost
from paceline.kernel import Kernel, Settings
from paceline.kernel.log import line, opening, replay
from paceline.kernel.worker import WorkerState

UNTIL_S = 10.0


async def models(request: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": "weights/7b"}]})


async def probed(worker: Worker) -> WorkerState:
    """The worker as the kernel knows it once the host has asked it how it is."""
    host = LiveHost(Kernel(Settings()), Timeouts(), lambda exchange: None, time)
    running = asyncio.create_task(host.run([Engine(worker, adapter_of(worker, ""), "")]))
    try:
        async with asyncio.timeout(UNTIL_S):
            while True:
                for state in (w for p in host.kernel.pools.values() for w in p.workers.values()):
                    if state.report is not None:
                        return state
                await asyncio.sleep(0.01)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def of_live_engine(kind: str, serves_as: str) -> WorkerState:
    app = web.Application()
    app.router.add_get("/v1/models", models)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    worker = Worker("w", "public", f"http://127.0.0.1:{port}", kind, serves_as=serves_as)
    try:
        return await probed(worker)
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("kind", ["", "openai"])
def test_the_models_name_at_the_engine_is_learned_also_where_the_kind_is_told(kind: str) -> None:
    state = asyncio.run(of_live_engine(kind, ""))
    assert state.report is not None
    assert state.report.healthy
    assert (state.worker.kind, state.worker.serves_as) == ("openai", "weights/7b")


def test_a_name_that_is_told_stays() -> None:
    assert asyncio.run(of_live_engine("", "told")).worker.serves_as == "told"


@pytest.mark.parametrize("kind", ["", "vllm"])
def test_a_worker_at_whose_url_nobody_answers_says_so(kind: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, and never listening: a connection is refused
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        state = asyncio.run(probed(Worker("w", "public", url, kind)))
    assert state.report is not None
    assert not state.report.healthy
    assert state.report.because.startswith(f"nobody answers at {url}: ")


# Facts and commands.


class Wanting:
    """Stands for an exchange: notes what it is told to do, and may tell a fact meanwhile."""

    def __init__(self, name: str, done: list[str], act: Callable[[Command], None]) -> None:
        self.request = Request(name, "m", "t", "standard", Promise())
        self._done = done
        self._act = act

    def _told(self, command: Command, now: float = 0.0) -> None:
        self._done.append(f"{type(command).__name__} {command.request_id}")
        self._act(command)
        self._done.append(f"end of {type(command).__name__} {command.request_id}")

    dispatch = stop = degrade = shed = fail = _told

    def on_bug(self) -> None:
        self._done.append(f"bug of {self.request.id}")


class Answering:
    """Stands for a kernel: gives the commands that are listed for who left."""

    settings = Settings()

    def __init__(self, commands: dict[str, list[Command]]) -> None:
        self._commands = commands

    def handle(self, fact: Fact, now: float) -> list[Command]:
        assert isinstance(fact, ClientLeft)
        return self._commands[fact.request_id]

    def next_deadline(self) -> float:
        return float("inf")


def hosting(kernel: Any, log: io.BytesIO | None = None) -> LiveHost:
    def on_fact(now: float, fact: Fact, commands: Sequence[Command]) -> None:
        if log is not None:
            log.write(line(now, fact, commands))

    host = LiveHost(kernel, Timeouts(), lambda exchange: None, time)
    host.observers = [on_fact]
    return host


def test_commands_run_in_the_order_in_which_they_were_given() -> None:
    done: list[str] = []
    host = hosting(
        Answering({"first": [Shed("a", "", 1.0), Fail("b", "")], "within": [Pause("c", "")]})
    )

    def act(command: Command) -> None:
        if command.request_id == "a":
            host.tell(ClientLeft("within"))

    for name in "abc":
        host.exchanges[name] = Wanting(name, done, act)  # type: ignore[assignment]
    host.tell(ClientLeft("first"))
    told = ["Shed a", "Fail b", "Pause c"]
    assert done == [line for command in told for line in (command, f"end of {command}")]
    assert [decision.command.request_id for decision in host.decisions] == ["a", "b", "c"]


def test_a_command_for_a_request_that_is_over_is_passed_by() -> None:
    done: list[str] = []
    gone: list[Command] = [
        Move("gone", ""),
        Degrade("gone", "t", "m", ""),
        Hold("a", ""),
        Move("a", ""),
    ]
    host = hosting(Answering({"x": gone}))
    host.exchanges["a"] = Wanting("a", done, lambda command: None)  # type: ignore[assignment]
    host.tell(ClientLeft("x"))
    assert done == ["Move a", "end of Move a"]


def test_a_bug_at_one_request_keeps_no_other_from_its_turn() -> None:
    done: list[str] = []
    host = hosting(Answering({"x": [Shed("a", "", 1.0), Shed("b", "", 1.0)]}))

    def act(command: Command) -> None:
        assert command.request_id != "a"

    for name in "ab":
        host.exchanges[name] = Wanting(name, done, act)  # type: ignore[assignment]
    host.tell(ClientLeft("x"))
    assert done == ["Shed a", "bug of a", "Shed b", "end of Shed b"]


def test_facts_told_while_acting_are_logged_as_the_kernel_took_them() -> None:
    async def told() -> bytes:
        settings = Settings(policy="round-robin")
        log = io.BytesIO(opening(settings))
        log.seek(0, io.SEEK_END)
        host = hosting(Kernel(settings), log)

        def act(command: Command) -> None:
            if isinstance(command, Dispatch) and command.worker_id == "w0":
                host.tell(DispatchFailed(command.request_id, "w0", "refused", blame=False))

        for worker in ("w0", "w1"):
            host.tell(WorkerAdded(Worker(worker, "m", f"http://{worker}")))
            host.tell(WorkerReported(worker, WorkerReport(healthy=True)))
        done: list[str] = []
        for name in "abcd":
            host.open(Wanting(name, done, act))  # type: ignore[arg-type]
        assert {decision.command.request_id for decision in host.decisions} == set("abcd")
        return log.getvalue()

    entries = list(replay(asyncio.run(told()).splitlines()))
    assert sum(isinstance(entry.fact, DispatchFailed) for entry, _ in entries) >= 1
    assert all(list(entry.commands) == again for entry, again in entries)
