"""Does a crash of one worker in four cost anybody a token?

Four engines carry 60 % of the load that they could; at a moment drawn by the seed one is killed
(`kill -9`) and comes back some seconds later. Clients come open loop, and every token of every
answer is checked. Prints a table and a JSON line.

    python tests/chaos/crash_of_one_in_four.py [SEED ...]
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from time import perf_counter

import msgspec
import uvloop
from answers import CHAT, COMPLETIONS, Answer, Question, Verdict
from crowd import Client, all_over
from processes import Fleet, running

ENGINES = 4
SEEDS = (1, 2, 3, 4, 5)
SECONDS = 10.0
"""For how long clients come."""
STREAMS = 32
"""Streams that an engine can have at once; with all of them it is full."""
LOAD = 0.6
STEP_S = 0.025
"""What a step of a full engine takes, by its profile and `SPEED`."""
SPEED = 0.1
DOWN_S = 2.0
MEAN_TOKENS = 100


class Run(msgspec.Struct):
    """What became of all clients of one run."""

    seed: int
    requests: int
    in_flight: int
    """Streams on the engine when it was killed."""
    right: int
    failed: int
    wrong: int
    """Answers with tokens lost or doubled, or that seemed whole and were not."""
    worst_gap_s: float
    """The longest that a client with a right answer waited between two pieces of it."""


class Timed(Client):
    """A client that also keeps its worst wait."""

    last_at = 0.0
    worst_gap_s = 0.0

    def data_received(self, data: bytes) -> None:
        now = perf_counter()
        if self.last_at:
            self.worst_gap_s = max(self.worst_gap_s, now - self.last_at)
        self.last_at = now
        super().data_received(data)


async def come(fleet: Fleet, rng: Random) -> list[Timed]:
    """Clients at random moments, with answers of random lengths."""
    rate = LOAD * ENGINES * STREAMS / (MEAN_TOKENS * STEP_S)
    clients: list[Timed] = []
    loop = asyncio.get_running_loop()
    at = start = loop.time()
    async with asyncio.TaskGroup() as asking:
        while (at := at + rng.expovariate(rate)) < start + SECONDS:
            await asyncio.sleep(max(at - loop.time(), 0.0))
            tokens = min(1 + int(rng.expovariate(1 / MEAN_TOKENS)), 8 * MEAN_TOKENS)
            path = rng.choice((CHAT, COMPLETIONS))
            clients.append(Timed(Question(len(clients), tokens, path)))
            asking.create_task(clients[-1].ask(fleet.gateway.port))
    return clients


async def crash(fleet: Fleet, rng: Random) -> int:
    """Kill one of the engines at a random moment, and start it again later."""
    await asyncio.sleep(SECONDS * rng.uniform(0.2, 0.7))
    engine = rng.choice(fleet.engines)
    in_flight = await engine.busy()
    engine.kill()
    await asyncio.sleep(DOWN_S)
    engine.start()
    await engine.up()
    return in_flight


async def run(fleet: Fleet, seed: int) -> Run:
    """One crash."""
    await fleet.up()
    async with asyncio.TaskGroup() as both:
        coming = both.create_task(come(fleet, Random(f"clients {seed}")))
        crashing = both.create_task(crash(fleet, Random(f"crash {seed}")))
    clients = coming.result()
    answers = await all_over(clients, 60.0)
    for client in clients:
        client.leave()
    bad = Counter(f"{a.verdict.value}: {a.because}" for a in answers if a.because)
    for because, count in bad.most_common(5):
        print(f"seed {seed}: {count} x {because[:300]}", file=sys.stderr)
    await fleet.settled()
    return Run(
        seed=seed,
        requests=len(clients),
        in_flight=crashing.result(),
        right=_count(answers, Verdict.RIGHT),
        failed=len(answers) - _count(answers, Verdict.RIGHT, Verdict.WRONG),
        wrong=_count(answers, Verdict.WRONG),
        worst_gap_s=max((client.worst_gap_s for client in clients), default=0.0),
    )


def _count(answers: list[Answer], *verdicts: Verdict) -> int:
    return sum(answer.verdict in verdicts for answer in answers)


def main() -> None:
    seeds = [int(word) for word in sys.argv[1:]] or list(SEEDS)
    engine = {"max_num_seqs": STREAMS, "speed": SPEED}
    with TemporaryDirectory() as folder, running(Path(folder), ENGINES, engine) as fleet:
        runs = [uvloop.run(run(fleet, seed)) for seed in seeds]
    names = Run.__struct_fields__
    print(*(f"{name:>12}" for name in names))
    for each in runs:
        values = (getattr(each, name) for name in names)
        print(*(f"{v:>12.2f}" if isinstance(v, float) else f"{v:>12}" for v in values))
    total = {name: sum(getattr(r, name) for r in runs) for name in ("requests", "failed", "wrong")}
    found = {"benchmark": "crash_of_one_in_four", **total, "runs": msgspec.to_builtins(runs)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
