"""Does `paceline diagnose` name each trouble first, how soon, and nothing when all is well?

    python bench/diagnose.py [--trouble "slow worker" …] [--healthy SECONDS] [--screens FOLDER]

A live gateway before four emulated Llama-70B, chat at about a third of what they can do. After a
calm start each trouble is injected into a fleet of its own, and the diagnosis is asked for twice a
second. The engines' own logs of their steps say what each late gap was in truth. Exit status 1 if
a trouble was not named first within 15 s, or anything was found while all was well. With
`--screens` each trouble is looked at on the dashboard, too (see `bench/screens.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from time import monotonic, time
from typing import Any

import aiohttp
import msgspec
import uvloop
import yaml
from rich.console import Console
from rich.table import Table

from paceline.demo.stage import free_ports, process, ready, url
from paceline.workload.drive import DriveSettings, drive
from paceline.workload.generate import fixed, independent, lognormal
from paceline.workload.traces import Arrival
from screens import glance

MODEL, PROFILE, WORKERS = "llama-70b", "h100-llama-70b-tp4", 4
SPEED = 0.33
"""Of the engines: a step of some 50 ms is far longer than what a busy machine is late by."""
TIERS = {
    "premium": {"ttft_s": 2.0, "itl_s": 0.12, "stall_s": 0.8, "attain": 0.99, "weight": 4},
    "plain": {"ttft_s": 2.0, "itl_s": 0.12, "weight": 2},
    "standard": {"ttft_s": 6.0, "itl_s": 0.2, "attain": 0.95},
}
RATE, CALM_S, TROUBLE_S, WITHIN_S = 2.5, 30.0, 25.0, 15.0
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
        while data := await reader.read(65536):
            wait_s = self.delay_s * (1.0 + self._chance.random())
            await queue.put((monotonic() + wait_s, data))
        await queue.put((0.0, b""))
        await passing

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
    await stage.order("hang", seconds=20.0)


async def crash(stage: Stage) -> None:
    await stage.order("crash", engine=1, restart_after_s=15.0)


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
    "flood": Trouble(flood, ("fleet_full", "prefill_in_decode"), "gateway_queue"),
    "starved prefill": Trouble(
        starved_prefill,
        ("phase_imbalance",),
        engine={"hands_over": True},
        policy="least-requests",
        roles=("decode", "prefill", "decode", "decode"),
    ),
    "over quota": Trouble(over_quota, ("quota",)),
}


async def play(name: str, trouble: Trouble, folder: Path, screens: Path | None) -> dict[str, Any]:
    """One fleet, one trouble."""
    stage = Stage(folder, trouble.engine, trouble.policy, trouble.roles)
    alarms: list[str] = []
    named_s: float | None = None
    first: str | None = None
    finding: dict[str, Any] = {}
    with ExitStack() as running:
        await stage.start(running)
        stage.ask(RATE / 2, CALM_S + TROUBLE_S)
        stage.ask(RATE / 2, CALM_S + TROUBLE_S, key="acme", seed=9)
        await asyncio.sleep(CALM_S)
        calm = (await stage.diagnosis())["findings"]
        alarms += [f"{f['kind']}: {f['says']} {f['evidence']}" for f in calm]
        await trouble.inject(stage)
        begun = monotonic()
        while monotonic() < begun + TROUBLE_S:
            await asyncio.sleep(0.5)
            findings = (await stage.diagnosis())["findings"]
            if findings and first is None:
                first = findings[0]["kind"]
            if findings and findings[0]["kind"] in trouble.kinds:
                named_s = named_s or monotonic() - begun
                finding = findings[0]
        seen = [f["kind"] for f in findings]
        if screens is not None:
            await glance(url(stage.admin), screens / f"trouble-{name.replace(' ', '-')}.png")
        truth = await against_truth(stage)
        await stage.stop()
    return {
        "trouble": name,
        "named_s": named_s,
        "first": first,
        "at_the_end": seen,
        "alarms_before": alarms,
        "truth": truth,
        "finding": finding,
    }


async def healthy(seconds: float, folder: Path) -> dict[str, Any]:
    """Mixed load and no trouble: what is found all the same?"""
    stage = Stage(folder, {})
    alarms: list[tuple[float, str, str]] = []
    with ExitStack() as running:
        await stage.start(running)
        stage.ask(RATE, seconds)
        stage.ask(0.2, seconds, seed=7, prompts=lognormal(2000, 3400, most=3500))
        begun = monotonic()
        while monotonic() < begun + seconds:
            await asyncio.sleep(1.0)
            found = (await stage.diagnosis())["findings"]
            at_s = round(monotonic() - begun, 1)
            alarms += [(at_s, finding["kind"], finding["says"]) for finding in found]
        answer = await stage.diagnosis()
        await stage.stop()
    return {"healthy_s": seconds, "alarms": alarms, "last": answer}


# The truth.


async def against_truth(stage: Stage) -> dict[str, Any]:
    """Of the late gaps of whole steps, how many got the cause that the engine's log shows?"""
    offset = time() - monotonic()
    on_the_way = "link" if stage.link.delay_s else "gateway"
    stalls = await stage.get(stage.admin, "/paceline/v1/stalls?limit=256")
    right = wrong = 0
    mistakes: dict[str, int] = {}
    for place, port in enumerate(stage.engines):
        worker = url(stage.front if place == 0 else port).removeprefix("http://")
        late = [e for e in stalls["workers"].get(worker, ()) if e["what"] == "step"]
        with suppress(aiohttp.ClientError, OSError):
            steps = (await stage.get(port, "/emulate/steps"))["steps"]
            for event in late:
                truth = true_cause(steps, event["at"] - offset, event["seconds"], on_the_way)
                if truth == event["cause"] or not truth:
                    right += bool(truth)
                else:
                    wrong += 1
                    pair = f"{truth} taken for {event['cause']}"
                    mistakes[pair] = mistakes.get(pair, 0) + 1
    return {"right": right, "wrong": wrong, "mistakes": mistakes}


def true_cause(steps: list[dict[str, Any]], at: float, seconds: float, on_the_way: str) -> str:
    """What most of a gap went into beyond its decodes; empty: the log does not reach so far.

    `on_the_way`: what holds tokens up behind the engine, if anything does.
    """
    within = [s for s in steps if s["ended_at"] > at - seconds and s["began_at"] < at - 1e-3]
    if not within:
        return ""
    longest = max(within, key=lambda s: s["ended_at"] - s["began_at"])
    took_s = longest["ended_at"] - longest["began_at"]
    normal_s = longest["normal_s"] + longest["prefill_s"]
    held_up_s = seconds - took_s
    parts = {
        "others_prefill": longest["prefill_s"],
        "slow_worker": normal_s * (longest["slowdown"] - 1.0),
        "hang": longest["hung_s"],
        on_the_way: held_up_s,
    }
    return max(parts, key=lambda cause: parts[cause])


async def main(names: list[str], healthy_s: float, screens: Path | None) -> bool:
    results = []
    with TemporaryDirectory(prefix="paceline-bench-") as folder:
        for name in names:
            results.append(await play(name, TROUBLES[name], Path(folder), screens))
            print(
                json.dumps({k: v for k, v in results[-1].items() if k != "finding"}),
                file=sys.stderr,
            )
        calm = await healthy(healthy_s, Path(folder)) if healthy_s else None
    table = Table("trouble", "named after", "first finding", "at the end", "late gaps right",
                  title="Named first within 15 s?")  # fmt: skip
    good = True
    for result in results:
        named_s, truth = result["named_s"], result["truth"]
        good &= named_s is not None and named_s <= WITHIN_S and not result["alarms_before"]
        judged = truth["right"] + truth["wrong"]
        table.add_row(
            result["trouble"],
            f"{named_s:.1f} s" if named_s is not None else "never",
            str(result["first"]),
            ", ".join(result["at_the_end"]),
            f"{truth['right']} of {judged}" if judged else "-",
        )
    console = Console()
    console.print(table)
    if calm is not None:
        good &= not calm["alarms"]
        console.print(f"All well for {healthy_s:.0f} s: {len(calm['alarms'])} alarms")
    print(json.dumps({"bench": "diagnose", "results": results, "healthy": calm}))
    return good


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trouble", nargs="*", default=list(TROUBLES))
    parser.add_argument("--healthy", type=float, default=0.0)
    parser.add_argument("--screens", type=Path, metavar="FOLDER")
    chosen = parser.parse_args()
    sys.exit(0 if uvloop.run(main(chosen.trouble, chosen.healthy, chosen.screens)) else 1)
