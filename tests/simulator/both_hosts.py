"""How does a scenario fare in the live host, and how in the simulator, told in the same words?

Both hosts write the same log of facts and commands, and all figures are taken from there: what a
request met is what its gateway saw of it. The live host is a gateway process before a process with
emulated engines, in real time; its requests come open loop, over sockets.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from math import inf
from pathlib import Path
from subprocess import Popen
from typing import Any

import aiohttp
import msgspec
import numpy as np
import yaml

from paceline.demo.stage import free_ports, process, ready, url
from paceline.domain.commands import Command, Dispatch
from paceline.domain.facts import Fact, FirstTokenSeen, RequestArrived, StreamEnded
from paceline.kernel.log import Entry, line, opening, replay
from paceline.simulator.scenario import Requests, Scenario
from paceline.simulator.simulation import Simulation
from paceline.simulator.traffic import arrivals
from paceline.workload.drive import DriveSettings, drive
from paceline.workload.outcome import Outcome

MAX_BEHIND_S = 0.005
MAX_LAG_S = 0.02
"""From there on it is the machine that is measured: tokens that come a few milliseconds early or
late at random are enough for the slower workers to be believed slower. Quiet: 2 and 6 ms."""
STOPS_WITHIN_S = 10.0


class Run(msgspec.Struct, frozen=True):
    """One run in one of the hosts."""

    log: Sequence[bytes]
    """Its facts and commands, as `kernel.log` writes them."""
    groups: dict[str, str]
    """Which of the scenario's groups of workers is meant by a worker's id in the log."""
    clients: Sequence[Outcome] = ()
    """What the clients of the live host saw."""
    lag_s: float = 0.0
    """The latest that emulated engines ever were with a step."""

    @property
    def behind_s(self) -> float:
        """How late the requests were sent: the 99th percentile."""
        return float(np.quantile([o.behind_s for o in self.clients], 0.99)) if self.clients else 0.0

    @property
    def trouble(self) -> str:
        """Why its times say more of this machine than of Paceline; empty if they don't."""
        if self.behind_s < MAX_BEHIND_S and self.lag_s < MAX_LAG_S:
            return ""
        return (
            f"this machine is too busy: requests were sent {1e3 * self.behind_s:.0f} ms late (p99) "
            f"and engines were up to {1e3 * self.lag_s:.0f} ms late"
        )


def written_down(scenario: Scenario, seed: int, file: Path) -> Scenario:
    """The scenario with its requests of this seed in a trace: further seeds change only the chance
    in engines and gateways. Tiers and tenants are left to their defaults."""
    lines = (
        msgspec.json.encode(
            {
                "timestamp": 1e3 * arrival.at_s,
                "input_length": arrival.prompt_tokens,
                "output_length": arrival.output_tokens,
                "hash_ids": arrival.blocks,
            }
        )
        for arrival in arrivals(scenario, seed)
    )
    file.write_bytes(b"\n".join(lines))
    return msgspec.structs.replace(scenario, requests=(Requests(kind="trace", file=str(file)),))


def simulated(scenario: Scenario, policy: str, seed: int) -> Run:
    """The scenario in the simulator."""
    lines: list[bytes] = []

    def keep(now: float, fact: Fact, commands: list[Command]) -> None:
        lines.append(line(now, fact, commands))

    simulation = Simulation(scenario, policy, seed, log=keep)
    simulation.run()
    groups = {name: group.name for group in scenario.workers for name in group.names}
    return Run([opening(simulation.gateways[0].kernel.settings), *lines], groups)


async def live(
    scenario: Scenario, policy: str, seed: int, folder: Path, keys: Mapping[str, str] | None = None
) -> Run:
    """The scenario in processes, with sockets between them.

    With `keys`, the tenants of these names ask with them, each by the tier of its requests; without
    any, everyone asks anonymously.
    """
    keys = dict(keys or {})
    each = [group for group in scenario.workers for _ in group.names]
    listen, admin, *ports = free_ports(2 + len(each))
    log = folder / "facts.log"
    engines = [
        {"profile": g.profile, "speed": g.speed, "model": g.model, "port": port, "seed": seed + i}
        for i, (g, port) in enumerate(zip(each, ports, strict=True))
    ]
    gateway = _gateway(scenario, policy, [url(port) for port in ports], keys) | {
        "listen": f"127.0.0.1:{listen}",
        "admin": f"127.0.0.1:{admin}",
        "log_facts": str(log),
    }
    with ExitStack() as running:
        for command, config, health in (
            ("engine", {"engines": engines}, url(ports[-1]) + "/health"),
            ("serve", gateway, url(listen) + "/health/ready"),
        ):
            file = folder / f"{command}.yaml"
            file.write_text(yaml.safe_dump(config))
            said = file.with_suffix(".log")
            started = running.enter_context(process(said, command, "--config", str(file)))
            await ready(started, health, said)
        settings = DriveSettings(
            url=url(listen), keys=keys, api="completions", force_lengths=True, check_tokens=True
        )
        clients = await drive(list(arrivals(scenario, seed)), settings)
        lag_s = max([await _lag_s(port) for port in ports])
        _stop(started)
    groups = {f"127.0.0.1:{port}": g.name for g, port in zip(each, ports, strict=True)}
    return Run(log.read_bytes().splitlines(), groups, clients, lag_s)


def _gateway(
    scenario: Scenario, policy: str, engines: Sequence[str], keys: Mapping[str, str]
) -> dict[str, Any]:
    """The part of a gateway's configuration that a scenario settles."""
    workers = [{"url": engine, "kind": "vllm"} for engine in engines]
    tiers = {asked.tenant: asked.tier for asked in scenario.requests}
    return {
        "models": [{"name": scenario.model, "workers": workers}],
        "tiers": {name: msgspec.to_builtins(tier) for name, tier in scenario.tiers.items()},
        "default_tier": scenario.tier,
        "tenants": [{"name": n, "tier": tiers[n], "key": key} for n, key in keys.items()],
        "routing": {"policy": policy, "margin": scenario.margin},
        "logging": {"level": "warning"},
    }


async def _lag_s(port: int) -> float:
    async with aiohttp.ClientSession() as session, session.get(url(port) + "/emulate/state") as got:
        return float((await got.json())["worst_lag_s"])


def _stop(gateway: Popen[bytes]) -> None:
    """Let it end by itself, so that its log is whole."""
    gateway.send_signal(signal.SIGTERM)
    gateway.wait(STOPS_WITHIN_S)


def differing(run: Run) -> list[str]:
    """Where a fresh kernel decides otherwise on the same facts."""
    return [
        f"at {entry.now:.3f} s, {entry.fact}: {entry.commands}, and replayed {commands}"
        for entry, commands in replay(run.log)
        if list(entry.commands) != commands
    ]


class Met(msgspec.Struct):
    """What one request met, as its gateway saw it."""

    arrived: RequestArrived
    at: float
    group: str = ""
    """Of the worker that it was sent to last."""
    ttft_s: float = inf
    ended: StreamEnded | None = None

    @property
    def kept(self) -> bool:
        promise, ended = self.arrived.request.promise, self.ended
        return ended is not None and promise.kept(self.ttft_s, ended.itl_s, ended.stall_s)


def requests(run: Run) -> list[Met]:
    """All requests of a run, in the order of arrival."""
    met: dict[str, Met] = {}
    for entry in _entries(run.log):
        match entry.fact:
            case RequestArrived() as fact:
                met[fact.request.id] = Met(fact, entry.now)
            case FirstTokenSeen() as fact:
                met[fact.request_id].ttft_s = fact.at - met[fact.request_id].at
            case StreamEnded() as fact:
                met[fact.request_id].ended = fact
        for command in entry.commands:
            if isinstance(command, Dispatch):
                met[command.request_id].group = run.groups[command.worker_id]
    return list(met.values())


def _entries(log: Sequence[bytes]) -> Iterator[Entry]:
    decode = msgspec.json.Decoder(Entry).decode
    return map(decode, log[1:])


def figures(run: Run, scenario: Scenario, seed: int) -> dict[str, float]:
    """How it went, without the requests of the warm-up. Seconds, and shares."""
    met = requests(run)[_warmup(scenario, seed) :]
    ended = [one.ended for one in met if one.ended is not None]
    sent = Counter(one.group for one in met)
    prompts = sum(end.prompt_tokens or 0 for end in ended)
    return {
        "attainment": sum(one.kept for one in met) / len(met),
        **_times([one.ttft_s for one in met], [end.itl_s for end in ended]),
        "cached": sum(end.cached_tokens or 0 for end in ended) / max(prompts, 1),
        **{f"sent to {g.name}": sent[g.name] / len(met) for g in scenario.workers},
    }


def clients_figures(run: Run, scenario: Scenario, seed: int) -> dict[str, float]:
    """The same as the clients of the live host saw it, from when each request was due."""
    seen = run.clients[_warmup(scenario, seed) :]
    promise = scenario.tiers[scenario.tier].promise
    ttft_s = [inf if o.ttft_s is None else o.ttft_s for o in seen]
    return {
        "attainment": sum(not o.miss(promise) for o in seen) / len(seen),
        **_times(ttft_s, [o.itl_s for o in seen if o.ok]),
    }


def _warmup(scenario: Scenario, seed: int) -> int:
    """How many requests come before any is counted."""
    return sum(arrival.at_s < scenario.warmup_s for arrival in arrivals(scenario, seed))


def _times(ttft_s: Sequence[float], itl_s: Sequence[float]) -> dict[str, float]:
    return {
        f"{name} p{share}": float(np.quantile(seconds, share / 100))
        for name, seconds in (("TTFT", ttft_s), ("ITL", itl_s))
        for share in (50, 90)
    }
