"""What does it cost to know the tokens of chats before a worker is chosen?

    python bench/tokens.py FOLDER [--chats N] [--turns N]

FOLDER has a model's tokenizer.json, tokenizer_config.json and chat template. A gateway in this
process, emulated engines that tell of their KV caches in others. Chats take turns, of which each
has all before it in its prompt; every second chat is tokenised, the others are not, so that both
meet the same moments of the machine. CPU time is this process's, all threads together. Then 100
long prompts come at once, beside a clock that tells how long the event loop was kept. Prints a
table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp
import msgspec
import uvloop
from rich.console import Console
from rich.table import Table

from paceline.domain.kvevents import BlockForm
from paceline.domain.promise import Tier
from paceline.domain.worker import Worker
from paceline.gateway.auth import Directory
from paceline.gateway.exchange import Exchange
from paceline.gateway.link import Timeouts
from paceline.gateway.ordinary import ordinary_app
from paceline.gateway.server import Gateway
from paceline.host import Engine, LiveHost
from paceline.kernel import Kernel, Settings
from paceline.observe.logs import configure
from paceline.tokens import Prompts, load
from paceline.tokens.chat import CHAT
from paceline.wire.server import Limits, Server
from stand import free_ports

HERE = str(Path(__file__).resolve())
ENGINES = 2
SYSTEM_WORDS = 1500
TURN_WORDS = 300
CROWD = 100
CROWD_WORDS = 6000
BEAT_S = 0.001


class Stand:
    """The gateway, and what became of its requests."""

    def __init__(self, host: LiveHost, gateway: Gateway, port: int, prompts: Prompts) -> None:
        self.host, self.gateway, self.prompts = host, gateway, prompts
        self.url = f"http://127.0.0.1:{port}{CHAT}"
        self.known: list[bool] = []
        """Of each request, whether its tokens were known in time."""
        self.waited_s: list[float] = []


@contextlib.asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Stand]:
    ports = free_ports(3 * ENGINES)
    engines = [
        {
            "profile": "h100-llama-8b",
            "model": "m",
            "port": ports[3 * i],
            "speed": 50.0,
            "kv_events_endpoint": f"tcp://127.0.0.1:{ports[3 * i + 1]}",
            "kv_events_replay_endpoint": f"tcp://127.0.0.1:{ports[3 * i + 2]}",
        }
        for i in range(ENGINES)
    ]
    prompts = Prompts(load({"m": str(folder)}))
    stand: Stand

    def closed(exchange: Exchange) -> None:
        # Emulated engines see other tokens: the counts are not compared, else this would end.
        outcome = exchange.outcome()
        stand.known.append(bool(outcome.request.token_blocks))
        stand.waited_s.append(outcome.queued_s)

    host = LiveHost(Kernel(Settings()), Timeouts(), closed, time.time)
    directory = Directory({"standard": Tier("standard")}, (), "standard", True)
    own = ordinary_app({"m": "m"}, time.time(), lambda: host.ready)
    gateway = Gateway(host, directory, {"m": "m"}, own)
    server = Server(gateway, Limits(), monotonic)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as config:
        json.dump({"engines": engines}, config)
        config.flush()
        command = [sys.executable, "-m", "paceline.engines.emulated", "--config", config.name]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)  # noqa: ASYNC220
        assert process.stdout is not None
        urls = [process.stdout.readline().decode().strip() for _ in engines]
    try:
        _, port = await server.listen("127.0.0.1", 0, None)
        stand = Stand(host, gateway, port, prompts)
        workers = [Worker(f"w{i}", "m", url, "vllm") for i, url in enumerate(urls)]
        task = asyncio.create_task(host.run([Engine.of(worker, "") for worker in workers]))
        async with aiohttp.ClientSession() as http:
            while not host.ready or not host.block_forms("m"):  # until there is something to know
                await asyncio.sleep(0.05)
                for url in urls if host.ready else ():
                    body = {"model": "m", "prompt": list(range(64)), "max_tokens": 1}
                    async with http.post(f"{url}/v1/completions", json=body) as answer:
                        await answer.read()
        yield stand
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await server.drain(0.0)
    finally:
        prompts.close()
        process.terminate()
        process.wait()


def text(rng: random.Random, words: list[str], count: int) -> str:
    return " ".join(rng.choices(words, k=count))


async def ask(client: asyncio.subprocess.Process, url: str, messages: list[Any]) -> float:
    """Have another process ask, so that what it costs is not counted; gives the CPU time here."""
    assert client.stdin is not None
    assert client.stdout is not None
    body = {"model": "m", "messages": messages, "max_tokens": 1}
    client.stdin.write(json.dumps({"url": url, "body": body}).encode() + b"\n")
    began = time.process_time()
    assert (await client.stdout.readline()).strip() == b"200"
    return time.process_time() - began


async def asking() -> None:
    """What that process does."""
    loop = asyncio.get_running_loop()
    async with aiohttp.ClientSession() as http:
        while line := await loop.run_in_executor(None, sys.stdin.buffer.readline):
            told = msgspec.json.decode(line)
            async with http.post(told["url"], json=told["body"]) as answer:
                await answer.read()
                print(answer.status, flush=True)


async def turns(stand: Stand, words: list[str], chats: int, count: int) -> list[dict[str, Any]]:
    """CPU time of requests, by turn, tokenised and not."""
    rng = random.Random(1)
    client = await asyncio.create_subprocess_exec(
        sys.executable,
        HERE,
        "--asks",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        limit=1 << 24,
    )
    talks = [
        [{"role": "system", "content": text(rng, words, SYSTEM_WORDS)}] for _ in range(2 * chats)
    ]
    found = []
    tokenizer: Any = stand.prompts._tokenizers["m"]
    for turn in range(count):
        spent: dict[bool, list[float]] = {True: [], False: []}
        stand.known.clear()
        stand.waited_s.clear()
        encoded, remembered = tokenizer.encoded, tokenizer.remembered
        for i, talk in enumerate(talks):
            talk.append({"role": "user", "content": text(rng, words, TURN_WORDS)})
            exact = i % 2 == 0
            stand.gateway.prompts = stand.prompts if exact else None
            await asyncio.sleep(0.05)  # what was told of the one before has been heard
            spent[exact].append(await ask(client, stand.url, talk))
            talk.append({"role": "assistant", "content": text(rng, words, 60)})
        size = tokenizer.encoded - encoded, tokenizer.remembered - remembered
        waited = sorted(stand.waited_s[::2])
        found.append(
            {
                "turn": turn + 1,
                "cpu_off_us": 1e6 * statistics.median(spent[False]),
                "cpu_on_us": 1e6 * statistics.median(spent[True]),
                "waited_p50_ms": 1e3 * waited[len(waited) // 2],
                "waited_max_ms": 1e3 * waited[-1],
                "in_time": sum(stand.known[::2]) / chats,
                "remembered": size[1] / max(sum(size), 1),
            }
        )
    client.terminate()
    await client.wait()
    return found


async def crowd(stand: Stand, words: list[str]) -> dict[str, Any]:
    """How late the loop is while many long prompts are tokenised."""
    rng = random.Random(2)
    bodies = [
        json.dumps(
            {"messages": [{"role": "user", "content": text(rng, words, CROWD_WORDS)}]}
        ).encode()
        for _ in range(CROWD)
    ]
    late: list[float] = []

    async def beat() -> None:
        while True:
            began = monotonic()
            await asyncio.sleep(BEAT_S)
            late.append(monotonic() - began - BEAT_S)

    clock = asyncio.create_task(beat())
    await asyncio.sleep(1.0)
    idle = sorted(late)
    late.clear()
    counts: list[int] = []
    began, spent = monotonic(), time.process_time()
    for i, body in enumerate(bodies):
        while not stand.prompts.read(  # noqa: ASYNC110
            str(i), "m", CHAT, body, [BlockForm(16)], 60.0, lambda found: counts.append(found.count)
        ):
            await asyncio.sleep(BEAT_S)
    while len(counts) < CROWD:  # noqa: ASYNC110 (nothing else is to run meanwhile)
        await asyncio.sleep(BEAT_S)
    seconds, spent = monotonic() - began, time.process_time() - spent
    clock.cancel()
    late.sort()
    return {
        "prompts": CROWD,
        "tokens": sum(counts),
        "seconds": seconds,
        "us_a_token": 1e6 * spent / sum(counts),
        "late_p50_ms": 1e3 * late[len(late) // 2],
        "late_p99_ms": 1e3 * late[int(0.99 * len(late))],
        "late_max_ms": 1e3 * late[-1],
        "idle_p99_ms": 1e3 * idle[int(0.99 * len(idle))],
        "idle_max_ms": 1e3 * idle[-1],
    }


async def measure(folder: Path, chats: int, count: int) -> dict[str, Any]:
    configure("off", "auto")
    vocabulary = msgspec.json.decode((folder / "tokenizer.json").read_bytes())["model"]["vocab"]
    words = [
        word.removeprefix("Ġ") for word in vocabulary if word[:1] == "Ġ" and word[1:].isalpha()
    ]
    async with running(folder) as stand:
        return {
            "turns": await turns(stand, words, chats, count),
            "crowd": await crowd(stand, words),
        }


def main() -> None:
    if sys.argv[1:] == ["--asks"]:
        uvloop.run(asking())
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--chats", type=int, default=10)
    parser.add_argument("--turns", type=int, default=4)
    asked = parser.parse_args()
    found = uvloop.run(measure(asked.folder, asked.chats, asked.turns))
    table = Table(title="A request of a chat, tokenised (on) and not (off)")
    for name in found["turns"][0]:
        table.add_column(name, justify="right")
    for row in found["turns"]:
        table.add_row(
            *(f"{value:,.2f}" if value < 10 else f"{value:,.0f}" for value in row.values())
        )
    Console(width=120).print(table)
    Console(width=120).print({name: round(value, 2) for name, value in found["crowd"].items()})
    print(json.dumps({"bench": "tokens", **found}))


if __name__ == "__main__":
    main()
