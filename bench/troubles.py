"""Which troubles can befall a live fleet on one machine, on command?

A gateway before four emulated engines, chat at about a third of what they can do, and a way to
bring each trouble about. `diagnose.py` plays them.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any

import aiohttp
import msgspec
import yaml

from paceline.demo.stage import free_ports, process, ready, url
from paceline.workload.drive import DriveSettings, drive
from paceline.workload.generate import fixed, independent, lognormal
from paceline.workload.traces import Arrival

MODEL, PROFILE, WORKERS = "llama-70b", "h100-llama-70b-tp4", 4
SPEED = 0.33
"""Of the engines: a step of some 50 ms is far longer than what a busy machine is late by."""
TIERS = {
    "premium": {"ttft_s": 2.0, "itl_s": 0.12, "stall_s": 0.8, "attain": 0.99, "weight": 4},
    "plain": {"ttft_s": 2.0, "itl_s": 0.12, "weight": 2},
    "standard": {"ttft_s": 6.0, "itl_s": 0.2, "attain": 0.95},
}
RATE, TROUBLE_S = 2.5, 25.0
CHAT = {"prompts": lognormal(400, 2500, most=4000), "answers": lognormal(80, 200, most=300)}


class Slow:
    """The way between gateway and one engine, which can be made slow while it is used."""

    def __init__(self, target: int) -> None:
        self.delay_s = 0.0
        self._target = target
        self._chance = Random(1)

    async def serve(self, port: int) -> asyncio.Server:
        return await asyncio.start_server(self._connected, "127.0.0.1", port)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.CancelledError):
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
            await asyncio.gather(self._pipe(reader, back), self._pipe(there, writer))

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """In order, each piece as late as the delay is when it comes, and up to as much again."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(10_000)
        passing = asyncio.create_task(self._pass(queue, writer))
        try:
            while data := await reader.read(65536):
                wait_s = self.delay_s * (1.0 + self._chance.random())
                await queue.put((monotonic() + wait_s, data))
            await queue.put((0.0, b""))
            await passing
        finally:
            passing.cancel()

    async def _pass(
        self, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        while True:
            due, data = await queue.get()
            if not data:
                writer.close()
                return
            await asyncio.sleep(max(due - monotonic(), 0.0))
            with suppress(RuntimeError):  # closed meanwhile
                writer.write(data)


class Stage:
    """A gateway before a fleet, and whoever asks them."""

    def __init__(
        self,
        folder: Path,
        engine: dict[str, Any],
        policy: str = "headroom",
        roles: Sequence[str] = ("both",) * WORKERS,
    ) -> None:
        self.listen, self.admin, self.front, *self.engines = free_ports(3 + WORKERS)
        self.link = Slow(self.engines[0])
        self.gateway = 0
        self._policy = policy
        self._roles = roles
        self._folder = folder
        common = {"profile": PROFILE, "model": MODEL, "speed": SPEED, "step_log": 20_000}
        self._engine = {**common, **engine}
        self._asking: list[asyncio.Task[Any]] = []

    async def start(self, running: ExitStack) -> None:
        server = await self.link.serve(self.front)
        running.callback(server.close)
        engines = [
            {**self._engine, "port": port, "seed": place} for place, port in enumerate(self.engines)
        ]
        urls = [url(self.front), *(url(port) for port in self.engines[1:])]
        workers = [
            {"url": each, "kind": "vllm", "role": role}
            for each, role in zip(urls, self._roles, strict=True)
        ]
        gateway = {
            "listen": f"127.0.0.1:{self.listen}",
            "admin": f"127.0.0.1:{self.admin}",
            "models": [{"name": MODEL, "workers": workers}],
            "tiers": TIERS,
            "default_tier": "premium",
            "tenants": [
                {"name": "bulk", "key": "bulk", "tier": "standard", "requests_per_minute": 12},
                {"name": "acme", "key": "acme", "tier": "plain"},
            ],
            "anonymous": True,
            "routing": {"policy": self._policy},
            "observe": {"dashboard": True},
            "logging": {"level": "warning"},
        }
        for command, content, health in (
            ("engine", {"engines": engines}, url(self.engines[0]) + "/health"),
            ("serve", gateway, url(self.listen) + "/health/ready"),
        ):
            file = self._folder / f"{command}-{self.listen}.yaml"
            file.write_text(yaml.safe_dump(content))
            log = file.with_suffix(".log")
            started = running.enter_context(process(log, command, "--config", str(file)))
            await ready(started, health, log)
            self.gateway = started.pid

    def ask(
        self, rate: float, seconds: float, port: int = 0, key: str = "", seed: int = 1, **of: Any
    ) -> None:
        """So many requests a second, from now on; of the gateway, unless another port is told."""
        lengths = {**CHAT, **of}
        arrivals: list[Arrival] = list(independent(rate, seconds, Random(seed), **lengths))
        settings = DriveSettings(
            url=url(port or self.listen), model=MODEL, force_lengths=True, timeout_s=60.0, key=key
        )
        self._asking.append(asyncio.create_task(drive(arrivals, settings, lambda _: None)))

    async def order(self, what: str, engine: int = 0, **how: Any) -> None:
        """Trouble of an emulated engine."""
        address = f"{url(self.engines[engine])}/emulate/{what}"
        async with aiohttp.ClientSession() as http, http.post(address, json=how) as answer:
            answer.raise_for_status()

    async def get(self, port: int, path: str) -> Any:
        async with aiohttp.ClientSession() as http, http.get(url(port) + path) as answer:
            return await answer.json()

    async def diagnosis(self) -> dict[str, Any]:
        found: dict[str, Any] = await self.get(self.admin, "/paceline/v1/diagnosis")
        return found

    async def stop(self) -> None:
        for task in self._asking:
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)


# The troubles.


async def slow_worker(stage: Stage) -> None:
    await stage.order("slowdown", factor=8.0)


async def hang(stage: Stage) -> None:
    await stage.order("hang", seconds=TROUBLE_S)


async def crash(stage: Stage) -> None:
    await stage.order("crash", engine=1, restart_after_s=TROUBLE_S)


async def long_prompts(stage: Stage) -> None:
    stage.ask(0.7, TROUBLE_S, seed=2, prompts=fixed(7000), answers=fixed(20))


async def tiny_kv(stage: Stage) -> None:
    """Answers become longer than a cache of 8k tokens can hold; trouble once an engine preempts."""
    stage.ask(6.0, 2 * TROUBLE_S, seed=3, prompts=fixed(1000), answers=fixed(600))
    for _ in range(60):
        states = [await stage.get(port, "/emulate/state") for port in stage.engines]
        if any(state["preemptions"] for state in states):
            break
        await asyncio.sleep(0.5)


async def engine_queue(stage: Stage) -> None:
    """More is sent at once than the four places that each engine has."""
    stage.ask(4.0, TROUBLE_S, seed=4, prompts=fixed(100), answers=fixed(100))


async def strangers(stage: Stage) -> None:
    """Others use an engine, past the gateway."""
    stage.ask(4.0, TROUBLE_S, stage.engines[1], seed=8, prompts=fixed(1500), answers=fixed(200))


async def slow_link(stage: Stage) -> None:
    stage.link.delay_s = 0.3


async def busy_gateway(stage: Stage) -> None:
    """It gets no CPU for half of the time."""

    async def starve() -> None:
        while True:
            os.kill(stage.gateway, signal.SIGSTOP)
            try:
                await asyncio.sleep(0.6)
            finally:
                os.kill(stage.gateway, signal.SIGCONT)
            await asyncio.sleep(0.6)

    stage._asking.append(asyncio.create_task(starve()))


async def flood(stage: Stage) -> None:
    stage.ask(22.0, TROUBLE_S, seed=5, prompts=fixed(1500), answers=fixed(20))


async def starved_prefill(stage: Stage) -> None:
    """One worker prefills for three, and gets more prompts than it can."""
    stage.ask(2.0, TROUBLE_S, seed=10, prompts=fixed(6000), answers=fixed(20))


async def far_caches(stage: Stage) -> None:
    """Long prompts are prefilled by one worker for another, and take seconds to get there."""
    stage.ask(0.7, TROUBLE_S, seed=30, prompts=fixed(5500), answers=fixed(20))


async def over_quota(stage: Stage) -> None:
    stage.ask(4.0, TROUBLE_S, key="bulk", seed=6)


class Trouble(msgspec.Struct, frozen=True):
    """What is injected, and what is to be found."""

    inject: Callable[[Stage], Awaitable[None]]
    kinds: tuple[str, ...]
    cause: str = ""
    """Of the late gaps that it makes."""
    engine: dict[str, Any] = {}
    policy: str = "headroom"
    """What `headroom` foresees does not happen: for that it takes another."""
    roles: tuple[str, ...] = ("both",) * WORKERS


TROUBLES = {
    "slow worker": Trouble(slow_worker, ("slow_worker",), "slow_worker"),
    "hang": Trouble(hang, ("hung_worker",), "hang"),
    "crash": Trouble(crash, ("lost_worker",), "lost_worker"),
    "long prompts": Trouble(
        long_prompts,
        ("prefill_in_decode",),
        "others_prefill",
        {"max_num_batched_tokens": 16_384},
    ),
    "tiny KV": Trouble(
        tiny_kv, ("kv_pressure",), "preemption", {"kv_tokens": 8_192}, "round-robin"
    ),
    "engine queue": Trouble(
        engine_queue, ("engine_queue",), "engine_queue", {"max_num_seqs": 4}, "round-robin"
    ),
    "strangers": Trouble(strangers, ("foreign_load",)),
    "slow link": Trouble(slow_link, ("slow_link",), "link"),
    "busy gateway": Trouble(busy_gateway, ("gateway_saturated",), "gateway"),
    "flood": Trouble(flood, ("fleet_full",), "gateway_queue"),
    "starved prefill": Trouble(
        starved_prefill,
        ("phase_imbalance",),
        engine={"hands_over": True},
        policy="least-requests",
        roles=("decode", "prefill", "decode", "decode"),
    ),
    "far caches": Trouble(
        far_caches,
        ("slow_transfer",),
        "transfer",
        {"kv_tokens_per_s": 2500.0},
        "least-requests",
        ("decode", "prefill", "prefill", "decode"),
    ),
    "over quota": Trouble(over_quota, ("quota",)),
}
