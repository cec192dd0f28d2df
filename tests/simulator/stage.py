"""Small runs of the simulator, and what every client saw in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from paceline.domain.commands import Command
from paceline.domain.facts import Fact
from paceline.enginemodel import PROFILES, Profile
from paceline.simulator.measure import Recorder
from paceline.simulator.result import Result
from paceline.simulator.scenario import Fault, Network, Requests, Scenario, SimTier, Workers
from paceline.simulator.seen import Seen
from paceline.simulator.simulation import Simulation
from paceline.simulator.traffic import Fragile
from paceline.workload.traces import Arrival

TINY = PROFILES["tiny"]
STEP_S = TINY.weights_s + TINY.stream_s
"""About what a step of one stream takes."""

SMALL = Scenario(
    about="Some short requests on two quick engines.",
    seconds=10.0,
    workers=(Workers(profile="tiny", count=2, start_up_s=1.0),),
    tiers={"t": SimTier(ttft_s=0.5, itl_s=0.02)},
    requests=(Requests(rate=20.0, prompt=(100, 900), output=(40, 200)),),
)


def small(*faults: Fault, count: int = 2, **changed: Any) -> Scenario:
    """The small scenario with these troubles, on so many workers."""
    fleet = tuple(msgspec.structs.replace(w, count=count) for w in SMALL.workers)
    return msgspec.structs.replace(SMALL, **{"faults": faults, "workers": fleet} | changed)


def ask(at_s: float = 0.0, prompt: int = 100, output: int = 50, **fields: Any) -> Arrival:
    """One request to come."""
    return Arrival(at_s, prompt, output, tier="t", tenant="a", model="m", **fields)


def fragile(arrival: Arrival) -> Fragile:
    """The same request, but once begun it ends with its worker."""
    return Fragile(**msgspec.structs.asdict(arrival))


class _Watching(Recorder):
    """Keeps what was seen."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(scenario)
        self.seen: list[Seen] = []

    def add(self, seen: Seen) -> None:
        self.seen.append(seen)
        super().add(seen)


class Stage:
    """One run, with a look behind the scenes."""

    def __init__(
        self,
        scenario: Scenario = SMALL,
        policy: str = "headroom",
        seed: int = 1,
        requests: Iterable[Arrival] | None = None,
        profiles: Callable[[Workers], Profile] = lambda workers: PROFILES[workers.profile],
    ) -> None:
        self.log: list[tuple[float, Fact, list[Command]]] = []
        self.simulation = Simulation(
            scenario, policy, seed, profiles, lambda *entry: self.log.append(entry)
        )
        self._watching = self.simulation.recorder = _Watching(scenario)
        if requests is not None:
            self.simulation._arrivals = iter(requests)

    @property
    def seen(self) -> list[Seen]:
        """Every request that is over, in order of arrival."""
        return sorted(self._watching.seen, key=lambda seen: seen.at_s)

    def at(self, when: float, look: Callable[[Simulation], None]) -> None:
        """Have somebody look at the simulation then."""
        self.simulation.clock.at(when, lambda _: look(self.simulation))

    def run(self) -> Result:
        return self.simulation.run()

    def facts(self, kind: type[Any]) -> list[tuple[float, Any]]:
        """All of this kind that any kernel was told, and when."""
        return [(now, fact) for now, fact, _ in self.log if isinstance(fact, kind)]

    def commands(self, kind: type[Any]) -> list[tuple[float, Any]]:
        """All of this kind that any kernel gave, and when."""
        return [(now, c) for now, _, commands in self.log for c in commands if isinstance(c, kind)]


def seen_by_clients(*requests: Arrival, scenario: Scenario = SMALL, **kind: Any) -> list[Seen]:
    """What becomes of these requests."""
    stage = Stage(scenario, requests=requests, **kind)
    stage.run()
    return stage.seen


QUICK = Network(latency_s=0.0)
