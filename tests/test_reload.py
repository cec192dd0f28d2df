"""Does a gateway change while it runs, and end, without a client noticing?"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import aiohttp
import pytest
from scripted import (
    DONE,
    ROLE,
    SSE,
    Act,
    Asked,
    Part,
    Script,
    ScriptedEngine,
    answer,
    counted,
    token,
)
from scripted import scripted as engines

import paceline.app
import paceline.host
from paceline.app import _Application
from paceline.config import load
from paceline.domain.errors import ConfigError
from stand import Client, Reply, on_loop, post, until

CHAT = post({"messages": [], "stream": True})
MODELS = answer(json.dumps({"object": "list", "data": [{"id": "m"}]}).encode())


def speaking(name: str, *between: Part) -> Script:
    """An engine that says its name twice, and what it waits for between the two."""

    def script(asked: Asked) -> Sequence[Part]:
        if asked.method == "GET":
            return [MODELS]
        return [SSE, ROLE, token(name), *between, token(name), counted(2), DONE]

    return script


class Stream:
    """An answer that has begun, with its client."""

    def __init__(self, client: Client) -> None:
        self.client = client

    async def rest(self) -> bytes:
        """What comes after the first token, up to the end of the answer."""
        rest = await self.client.reader.readuntil(b"0\r\n\r\n")
        self.client.leave()
        return rest

    async def is_whole(self) -> bool:
        """Does the second token come, and the end?"""
        rest = await self.rest()
        return rest.count(b'"a"') == 1 and b"data: [DONE]" in rest


class Running:
    """A whole gateway in this process."""

    def __init__(self, file: Path, text: str) -> None:
        self.file = file
        with socket.socket() as listen, socket.socket() as admin:
            for one in (listen, admin):
                one.bind(("127.0.0.1", 0))
            self.port, self.admin_port = (s.getsockname()[1] for s in (listen, admin))
        self.write(text)
        read = partial(load, file, {"KEY": "secret-of-acme"})
        self.app = _Application(read, read())

    @property
    def admin(self) -> str:
        return f"http://127.0.0.1:{self.admin_port}/paceline/v1"

    def write(self, text: str) -> None:
        """Another configuration."""
        self.file.write_text(
            f"listen: 127.0.0.1:{self.port}\nadmin: 127.0.0.1:{self.admin_port}\n"
            f"logging: {{level: 'off'}}\nrouting: {{policy: round-robin}}\n{text}"
        )

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON of the admin API."""
        data = None if body is None else json.dumps(body)
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, self.admin + path, data=data) as told,
        ):
            return told.status, await told.json()

    async def ordered(self, method: str, path: str, body: Any = None) -> Any:
        status, told = await self.ask(method, path, body)
        assert status < 300, told
        return told

    async def reload(self, text: str) -> Any:
        self.write(text)
        return await self.ordered("POST", "/config")

    async def answered(self, request: bytes = CHAT) -> Reply:
        async with await Client.connected(self.port) as client:
            client.write(request)
            return await client.reply()

    async def begun(self) -> Stream:
        """A stream whose first token has come."""
        client = await Client.connected(self.port)
        client.write(CHAT)
        await client.wait_for(b"content-type: text/event-stream")
        await client.wait_for(b'"a"')
        return Stream(client)

    async def who(self) -> str:
        """The name of the engine that answers."""
        return (await self.answered()).text[:1]

    async def health(self, path: str = "ready") -> int:
        lines = f"GET /health/{path} HTTP/1.1\r\nhost: x\r\n\r\n"
        return (await self.answered(lines.encode())).status

    def usable(self, *worker_ids: str) -> bool:
        workers = self.app.host.kernel.workers
        reports = [workers[w].report if w in workers else None for w in worker_ids]
        return all(report is not None and report.healthy for report in reports)


@asynccontextmanager
async def gateway(tmp_path: Path, text: str) -> AsyncIterator[Running]:
    """A gateway that is ready."""
    running = Running(tmp_path / "paceline.yaml", text)
    running.app._notice_s, running.app._grace_s = 0.0, 5.0
    with (
        mock.patch.object(paceline.host, "PROBE_S", 0.1),
        mock.patch.object(paceline.host, "SWEEP_S", 0.02),
    ):
        serving = asyncio.create_task(running.app.run(), name="app")
        try:
            await until(running.app.ready)
            await until(lambda: can_connect(running.admin_port))
            yield running
            if not serving.done():
                assert not running.app.host.exchanges
        finally:
            running.app._told_to_stop(signal.SIGINT)
            await serving


def can_connect(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def fleet(*urls: str, name: str = "m", more: str = "") -> str:
    workers = "".join(f"      - {{url: '{url}', kind: openai}}\n" for url in urls)
    return f"models:\n  - name: {name}\n    workers:\n{workers}{more}"


def id_of(engine: ScriptedEngine) -> str:
    return f"127.0.0.1:{engine.port}"


# Reload.


@on_loop
async def test_a_reload_under_way_of_streams_drops_none_of_them(tmp_path: Path) -> None:
    go = asyncio.Event()
    async with (
        engines(speaking("a", go), speaking("b")) as (a, b),
        gateway(tmp_path, fleet(a.url)) as running,
    ):
        streams = [await running.begun() for _ in range(5)]
        done = await running.reload(fleet(b.url))
        assert done == {
            "changed": ["models"],
            "needs_restart": [],
            "workers_added": [id_of(b)],
            "workers_changed": [],
            "workers_draining": [id_of(a)],
        }
        await until(lambda: running.usable(id_of(b)))
        assert await running.who() == "b"
        assert len(running.app.host.exchanges) == 5
        go.set()
        assert all([await stream.is_whole() for stream in streams])
        await until(lambda: id_of(a) not in running.app.host.links)


@on_loop
async def test_tiers_tenants_and_names_are_new_from_the_reload_on(tmp_path: Path) -> None:
    async with engines(speaking("a")) as (a,), gateway(tmp_path, fleet(a.url)) as running:
        assert (await running.answered()).headers["x-paceline-tier"] == "standard"
        tenants = (
            "tiers: {gold: {ttft_s: 1, weight: 8}, lead: {}}\ndefault_tier: lead\n"
            "tenants: [{name: acme, key: '${KEY}', tier: gold, max_streams: 7}]\n"
        )
        done = await running.reload(fleet(a.url, name="new", more=tenants))
        assert done["changed"] == ["models", "tiers", "default_tier", "tenants"]
        await until(lambda: running.app.ready())
        assert (await running.answered()).status == 401
        body = {"messages": [], "stream": True, "model": "new"}
        keyed = await running.answered(post(body, authorization="Bearer secret-of-acme"))
        assert (keyed.status, keyed.headers["x-paceline-tier"]) == (200, "gold")
        (acme,) = (await running.ordered("GET", "/tenants"))["tenants"]
        assert (acme["name"], acme["keys"], acme["max_streams"]) == ("acme", 1, 7)
        names = [tier["name"] for tier in (await running.ordered("GET", "/tiers"))["tiers"]]
        assert names == ["gold", "lead"]
        listed = await running.answered(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        assert [model["id"] for model in listed.json["data"]] == ["new"]
        shown = await running.ordered("GET", "/config")
        assert shown["tenants"][0]["key"] == "***"
        assert "secret" not in json.dumps(shown)


@on_loop
async def test_a_wrong_configuration_changes_nothing_and_is_told_whole(tmp_path: Path) -> None:
    async with engines(speaking("a")) as (a,), gateway(tmp_path, fleet(a.url)) as running:
        before = await running.ordered("GET", "/config")
        running.write(fleet("ftp://x", more="anonymous: 7\nno_such_thing: 1\n"))
        status, told = await running.ask("POST", "/config")
        error = told["error"]
        assert (status, error["code"]) == (400, "invalid_config")
        assert all(word in error["message"] for word in ("url", "no_such_thing", "anonymous"))
        running.file.unlink()
        status, told = await running.ask("POST", "/config")
        assert status == 400
        assert str(running.file) in told["error"]["message"]
        assert await running.ordered("GET", "/config") == before
        assert await running.who() == "a"


@on_loop
async def test_what_needs_a_restart_is_told_each_time_and_left(tmp_path: Path) -> None:
    async with engines(speaking("a")) as (a,), gateway(tmp_path, fleet(a.url)) as running:
        text = fleet(a.url, more="retries: {attempts: 7}\ntimeouts: {stall_s: 7}\n")
        for _ in range(2):
            done = await running.reload(text)
            assert done["needs_restart"] == ["timeouts", "retries"]
            assert done["changed"] == []
        assert (await running.ordered("GET", "/config"))["retries"] == {"attempts": 3}


@on_loop
async def test_a_worker_s_new_key_is_used_and_its_old_connections_are_closed(
    tmp_path: Path,
) -> None:
    go = asyncio.Event()
    async with engines(speaking("a", go)) as (a,), gateway(tmp_path, fleet(a.url)) as running:
        stream = await running.begun()
        worker = f"{{url: '{a.url}', kind: openai, api_key: k2, cost_per_hour: 3}}"
        text = f"models: [{{name: m, workers: [{worker}]}}]\n"
        done = await running.reload(text)
        assert done["workers_changed"] == [id_of(a)]
        assert running.app.host.kernel.workers[id_of(a)].worker.cost_per_hour == 3
        go.set()
        assert await stream.is_whole()
        assert await running.who() == "a"
        keys = [asked.headers.get("authorization") for asked in a.asked if asked.method == "POST"]
        assert keys == [None, "Bearer k2"]
        await until(lambda: not running.app.host._retired)


@on_loop
async def test_a_url_that_is_to_serve_another_model_drains_first(tmp_path: Path) -> None:
    go = asyncio.Event()
    async with engines(speaking("a", go)) as (a,), gateway(tmp_path, fleet(a.url)) as running:
        stream = await running.begun()
        await running.reload(fleet(a.url, name="other"))
        assert not running.app.ready()
        go.set()
        assert await stream.is_whole()
        await until(running.app.ready)
        assert running.app.host.kernel.workers[id_of(a)].worker.model == "other"
        assert await running.who() == "a"


# Workers by admin call.


@on_loop
async def test_a_worker_added_by_admin_call_gets_work_and_survives_a_reload(
    tmp_path: Path,
) -> None:
    async with (
        engines(speaking("a"), speaking("b")) as (a, b),
        gateway(tmp_path, fleet(a.url)) as running,
    ):
        order = {"model": "m", "url": b.url, "kind": "openai", "node": "n2"}
        assert await running.ask("POST", "/workers", order) == (
            201,
            {"id": id_of(b), "new": True},
        )
        assert (await running.ask("POST", "/workers", order))[0] == 200
        await until(lambda: running.usable(id_of(b)))
        assert {await running.who() for _ in range(4)} == {"a", "b"}
        await running.reload(fleet(a.url, more="default_tier: other\n"))
        assert {await running.who() for _ in range(4)} == {"a", "b"}
        listed = (await running.ordered("GET", "/workers"))["workers"]
        assert [(w["id"], w["node"]) for w in listed] == [(id_of(a), ""), (id_of(b), "n2")]


@pytest.mark.parametrize(
    ("order", "status", "says"),
    [
        ({"url": "http://127.0.0.1:9"}, 400, "model"),
        ({"model": "m"}, 400, "url"),
        ({"model": "m", "url": "http://127.0.0.1:9", "cots": 1}, 400, "cots"),
        ({"model": "m", "url": "http://127.0.0.1:9/${HOME}"}, 400, "HOME"),
        ({"model": "x", "url": "http://127.0.0.1:9"}, 404, "x"),
        ([], 400, "a map"),
    ],
)
def test_an_order_that_cannot_be_understood_is_refused(
    tmp_path: Path, order: Any, status: int, says: str
) -> None:
    @on_loop
    async def refused() -> None:
        async with engines(speaking("a")) as (a,), gateway(tmp_path, fleet(a.url)) as running:
            got, told = await running.ask("POST", "/workers", order)
            assert got == status
            assert set(told["error"]) == {"message", "type", "param", "code"}
            assert says in told["error"]["message"]
            twice = {"model": "m", "url": f"http://localhost:{a.port}"}
            assert (await running.ask("POST", "/workers", twice))[0] == 400
            assert (await running.ask("DELETE", "/workers/nobody:1"))[0] == 404
            assert (await running.ask("DELETE", "/workers/nobody:1?now=perhaps"))[0] == 400

    refused()


@on_loop
async def test_a_drained_worker_s_streams_finish_while_new_ones_go_elsewhere(
    tmp_path: Path,
) -> None:
    go = asyncio.Event()
    async with (
        engines(speaking("a", go), speaking("b")) as (a, b),
        gateway(tmp_path, fleet(a.url)) as running,
    ):
        host = running.app.host
        stream = await running.begun()
        await running.reload(fleet(a.url, b.url))
        await until(lambda: running.usable(id_of(b)))
        assert await running.ask("DELETE", f"/workers/{id_of(a)}") == (
            202,
            {"id": id_of(a), "in_flight": 1},
        )
        assert {await running.who() for _ in range(4)} == {"b"}
        go.set()
        assert await stream.is_whole()
        await until(lambda: id_of(a) not in host.links)
        probe = f"probe {id_of(a)}"
        await until(lambda: all(task.get_name() != probe for task in asyncio.all_tasks()))
        assert all(worker != id_of(a) for _, _, worker in host.gap_counts)
        assert all(
            w["id"] != id_of(a) for w in (await running.ordered("GET", "/workers"))["workers"]
        )
        assert id_of(a) in running.app.observing.metrics.text().decode()
        assert id_of(a) not in running.app.observing.metrics.text().decode()
        assert (await running.ask("DELETE", f"/workers/{id_of(a)}"))[0] == 404


@on_loop
async def test_a_worker_removed_at_once_hands_over_what_it_has_not_begun(tmp_path: Path) -> None:
    def silent(asked: Asked) -> Sequence[Part]:
        return [MODELS] if asked.method == "GET" else [Act.HANG]

    async with (
        engines(silent, speaking("b")) as (a, b),
        gateway(tmp_path, fleet(a.url)) as running,
    ):
        answer = asyncio.create_task(running.answered())
        await until(lambda: any(asked.method == "POST" for asked in a.asked))
        await running.reload(fleet(a.url, b.url))
        await until(lambda: running.usable(id_of(b)))
        await running.ordered("DELETE", f"/workers/{id_of(a)}?now=true")
        assert (await answer).text == "bb"
        assert id_of(a) not in running.app.host.links
        running.app.host.remove("nobody:1")  # as if its leaving had just been forgotten


@on_loop
async def test_a_worker_comes_back_while_it_drains_and_after_it_has_left(tmp_path: Path) -> None:
    go = asyncio.Event()
    async with engines(speaking("a", go)) as (a,), gateway(tmp_path, fleet(a.url)) as running:
        order = {"model": "m", "url": a.url, "kind": "openai"}
        stream = await running.begun()
        await running.ordered("DELETE", f"/workers/{id_of(a)}")
        assert not running.app.ready()
        await running.ordered("POST", "/workers", order)
        await until(running.app.ready)
        go.set()
        assert await stream.is_whole()
        assert await running.who() == "a"
        await running.ordered("DELETE", f"/workers/{id_of(a)}")
        assert id_of(a) not in running.app.host.links
        await running.ordered("POST", "/workers", order)
        await until(running.app.ready)
        assert await running.who() == "a"


# The end.


@on_loop
async def test_readiness_is_false_from_the_signal_on_and_streams_complete(tmp_path: Path) -> None:
    go = asyncio.Event()
    async with engines(speaking("a", go)) as (a,), gateway(tmp_path, fleet(a.url)) as running:
        assert await running.health() == 200
        app = running.app
        app._notice_s = 60.0  # the grace would end it
        serving = next(task for task in asyncio.all_tasks() if task.get_name() == "app")
        stream = await running.begun()
        app._told_to_stop(signal.SIGTERM)
        assert await running.health() == 503
        assert await running.health("live") == 200
        late = asyncio.create_task(running.answered())
        await until(lambda: len(app.host.exchanges) == 2)
        go.set()
        assert await stream.is_whole()
        assert (await late).text == "aa"
        app._told_to_stop(signal.SIGTERM)
        assert await serving is True


@on_loop
async def test_what_outlasts_the_grace_ends_with_a_clear_error(tmp_path: Path) -> None:
    async with engines(speaking("a", Act.HANG)) as (a,), gateway(tmp_path, fleet(a.url)) as running:
        serving = next(task for task in asyncio.all_tasks() if task.get_name() == "app")
        stream = await running.begun()
        running.app._told_to_stop(signal.SIGTERM)
        running.app._told_to_stop(signal.SIGTERM)
        rest = await stream.rest()
        assert b"the gateway is shutting down" in rest
        assert b"[DONE]" not in rest
        assert await serving is False
        assert not running.app.host.exchanges


def test_a_configuration_that_is_wrong_at_the_start_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        asyncio.run(paceline.app.serve(partial(load, tmp_path / "none.yaml", {})))
