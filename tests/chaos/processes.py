"""A gateway before emulated engines, each a process of its own that can be killed and started."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from subprocess import Popen
from typing import Any, ParamSpec

import aiohttp
import uvloop
import yaml
from crowd import Crowd, crowd

from paceline.demo.stage import free_ports, process, ready, url

P = ParamSpec("P")
ENGINE: dict[str, Any] = {
    "profile": "tiny",
    "model": "m",
    "speed": 0.15,
    "max_num_seqs": 512,
    "max_num_batched_tokens": 8192,
    "kv_tokens": 2_000_000,
    "keep_alive_s": 0.2,
}
"""A token takes 14 ms, and 18 ms among 70 streams: two cores keep up with hundreds."""
GATEWAY: dict[str, Any] = {
    "timeouts": {"connect_s": 1.0, "first_token_s": 2.0, "stall_s": 1.5},
    "limits": {"head_timeout_s": 0.5, "body_timeout_s": 0.5, "max_body_mb": 1},
    "logging": {"level": "warning", "format": "json"},
}
SOCKETS = 6
"""What a gateway has open that nobody asks, without the connections that look after its engines."""


def on_loop(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """Runs a test on an event loop, within a minute."""

    @functools.wraps(test)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(60):
                await test(*args, **kwargs)

        uvloop.run(bounded())

    return wrapped


class Daemon:
    """A `paceline` process."""

    def __init__(self, log: Path, port: int, health: str, *arguments: str) -> None:
        self.port = port
        self.url = url(port)
        self.log = log
        self._health = self.url + health
        self._arguments = arguments
        self._running = ExitStack()
        self._process: Popen[bytes] | None = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        self._process = self._running.enter_context(process(self.log, *self._arguments))

    async def up(self) -> None:
        """Wait until it is ready."""
        assert self._process is not None
        await ready(self._process, self._health, self.log)

    def kill(self) -> None:
        """`kill -9`: it has no time for anything."""
        self._running.close()

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def ended(self, within_s: float = 20.0) -> int:
        """Wait for it to end by itself; gives its exit code."""
        assert self._process is not None
        return await asyncio.to_thread(self._process.wait, within_s)

    @property
    def sockets(self) -> int:
        """How many it has open."""
        assert self._process is not None
        count = 0
        for file in Path(f"/proc/{self._process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                count += os.readlink(file).startswith("socket:")
        return count

    @property
    def memory_mb(self) -> float:
        """What of it is in memory."""
        assert self._process is not None
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Engine(Daemon):
    """An emulated engine."""

    async def order(self, what: str, **how: Any) -> None:
        """Order a trouble."""
        async with (
            aiohttp.ClientSession() as http,
            http.post(f"{self.url}/emulate/{what}", json=how) as answer,
        ):
            assert answer.status == 200, await answer.text()

    async def state(self) -> dict[str, Any]:
        found: dict[str, Any] = await _get(self.url + "/emulate/state")
        return found

    async def busy(self) -> int:
        """Requests that it has, running and waiting."""
        state = await self.state()
        return int(state["running"] + state["waiting"])


class Fleet:
    """All processes, how to ask them, and what their troubles left behind."""

    def __init__(
        self,
        folder: Path,
        engines: int,
        engine: dict[str, Any],
        config: dict[str, Any],
        parts: Sequence[dict[str, Any]] = (),
    ) -> None:
        listen, admin, *ports = free_ports(2 + engines)
        self.engines = [
            Engine(
                folder / f"engine-{place}.log",
                port,
                "/health",
                "engine",
                "--config",
                _file(
                    folder / f"engine-{place}.yaml",
                    {"engines": [{**ENGINE, **engine, "port": port}]},
                ),
            )
            for place, port in enumerate(ports)
        ]
        more = parts or [{}] * engines
        workers = [
            {"url": url(port), "kind": "vllm", **part}
            for port, part in zip(ports, more, strict=True)
        ]
        settings = {
            "listen": f"127.0.0.1:{listen}",
            "admin": f"127.0.0.1:{admin}",
            "models": [{"name": "m", "workers": workers}],
            **GATEWAY,
            **config,
        }
        file = _file(folder / "gateway.yaml", settings)
        self.gateway = Daemon(
            folder / "gateway.log", listen, "/health/ready", "serve", "--config", file
        )
        self.admin = url(admin)
        self._said = 0
        """How much of its log was there before."""

    def crowd(
        self, count: int, tokens: int, over_s: float = 0.0, narrow: bool = False
    ) -> AbstractAsyncContextManager[Crowd]:
        """Clients of the gateway that have asked."""
        return crowd(self.gateway.port, count, tokens, over_s, narrow)

    async def up(self) -> None:
        """Start what is not running, end the troubles of the rest, and wait until all serve.

        A gateway that avoids a worker for what it did before is started anew.
        """
        afresh = not self.gateway.alive or bool(await self._unusable())
        for engine in self.engines:
            if engine.alive:
                engine.signal(signal.SIGCONT)
                await engine.order("reset")
            else:
                engine.start()
        if afresh:
            await self.restart()
        for engine in self.engines:
            await engine.up()
        await self._once(self._unusable)
        self._said = len(self.gateway.log.read_text())

    async def restart(self) -> None:
        """A gateway that knows nothing."""
        self.gateway.kill()
        self.gateway.start()
        await self.gateway.up()
        self._said = 0

    async def settled(self) -> None:
        """Wait until nothing is left of any request, here or at the engines. No bug was met."""
        said = self.gateway.log.read_text()[self._said :]
        assert "Traceback" not in said, said[said.index("Traceback") :][:4000]
        await self._once(self.left_over, 10.0)

    async def idle_engines(self) -> None:
        """Wait until no engine has anything to do."""

        async def busy() -> int:
            return sum([await engine.busy() for engine in self.engines if engine.alive])

        await self._once(busy)

    async def left_over(self) -> dict[str, Any]:
        """All that a request leaves while it lives, as numbers above 0."""
        seen = await _get(self.admin + "/paceline/v1/fleet")
        found: dict[str, Any] = {"waiting at the gateway": sum(seen["held"].values())}
        for worker in seen["models"]["m"]["workers"]:
            found |= {f"{worker['id']} {name}": n for name, n in worker["in_flight"].items()}
        for engine in self.engines:
            if engine.alive:
                state = await engine.state()
                for name in ("running", "waiting", "kv_blocks_used"):
                    found[f"{engine.url} {name}"] = state[name]
        found["sockets"] = max(self.gateway.sockets - SOCKETS - 4 * len(self.engines), 0)
        return {name: n for name, n in found.items() if n}

    async def _unusable(self) -> list[str]:
        """The workers that the gateway would not use."""
        seen = await _get(self.admin + "/paceline/v1/fleet")
        return [w["id"] for w in seen["models"]["m"]["workers"] if not w["usable"]]

    async def _once(self, wrong: Callable[[], Awaitable[object]], within_s: float = 20.0) -> None:
        """Wait until nothing is wrong; say what is if it never comes."""
        give_up = asyncio.get_running_loop().time() + within_s
        while found := await wrong():
            assert asyncio.get_running_loop().time() < give_up, found
            await asyncio.sleep(0.05)

    def kill(self) -> None:
        for daemon in (self.gateway, *self.engines):
            daemon.kill()


@contextmanager
def running(
    folder: Path,
    engines: int = 3,
    engine: dict[str, Any] | None = None,
    parts: Sequence[dict[str, Any]] = (),
    **config: Any,
) -> Iterator[Fleet]:
    """A fleet that is up, and of which no process survives the block.

    `engine` and `config` change what `ENGINE` and `GATEWAY` say. `parts`: more of each worker,
    where they share requests.
    """
    fleet = Fleet(folder, engines, engine or {}, config, parts)
    try:
        uvloop.run(fleet.up())
        yield fleet
    finally:
        fleet.kill()


def _file(path: Path, content: object) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


async def _get(address: str) -> Any:
    async with aiohttp.ClientSession() as http, http.get(address) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json()
