"""What becomes of a scenario's requests under a policy?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf
from random import Random

from msgspec.structs import replace

from paceline.domain.facts import PeerReported, WorkerAdded
from paceline.domain.worker import Worker
from paceline.enginemodel import PROFILES, Profile
from paceline.kernel import Kernel, Settings
from paceline.simulator.asking import request_of
from paceline.simulator.clock import Clock
from paceline.simulator.faults import schedule_faults
from paceline.simulator.flight import Flight
from paceline.simulator.gateway import Gateway, Log
from paceline.simulator.handing import HandOvers
from paceline.simulator.lateness import Lateness
from paceline.simulator.links import Link
from paceline.simulator.measure import Recorder
from paceline.simulator.oracle import ORACLE, Oracle
from paceline.simulator.replica import Replica
from paceline.simulator.result import Result
from paceline.simulator.scenario import Scenario, Workers
from paceline.simulator.seen import Seen
from paceline.simulator.traffic import arrivals
from paceline.workload.traces import Arrival

STARTING_S = 0.5
"""How often a worker that is not ready is asked again, as the live host does."""
Profiles = Callable[[Workers], Profile]


def by_name(workers: Workers) -> Profile:
    """The profile that the scenario names."""
    return PROFILES[workers.profile]


class Simulation:
    """One run: engines, gateways and requests on one clock. All chance comes from the seed."""

    def __init__(
        self,
        scenario: Scenario,
        policy: str,
        seed: int,
        profiles: Profiles = by_name,
        log: Log | None = None,
    ) -> None:
        self.scenario = scenario
        self.policy = policy
        self.seed = seed
        self.clock = Clock()
        self.replicas: dict[str, Replica] = {}
        self.flights: dict[str, Flight] = {}
        self.recorder = Recorder(scenario)
        network = scenario.network
        names = {group.node or name for group in scenario.workers for name in group.names}
        self.handovers = HandOvers(self.clock, names, network.kv_latency_s, network.kv_bytes_per_s)
        self._rng = Random(f"{seed} gateways")
        self._rngs = [Random(f"{seed} gateway {i}") for i in range(scenario.gateways.count)]
        """What each gateway does not know of its requests."""
        self._rng_news = Random(f"{seed} news")
        settings = Settings(
            policy="headroom" if policy == ORACLE else policy, margin=scenario.margin
        )
        oracle = (
            Oracle(self.replicas, self.flights, self.handovers, lambda: self.clock.now)
            if policy == ORACLE
            else None
        )
        self.gateways = [
            Gateway(
                index,
                Kernel(settings, oracle),
                self.clock,
                scenario.network.latency_s,
                self.flights,
                self._ended,
                self.handovers,
                log,
                self._lateness(index),
            )
            for index in range(scenario.gateways.count)
        ]
        for workers in scenario.workers:
            for number in range(workers.count):
                self._install(workers, number, profiles(workers), seed)
        schedule_faults(self)
        if len(self.gateways) > 1:
            self._gossip(None)
        self._arrivals: Iterator[Arrival] = arrivals(scenario, seed)
        self._arrived = 0

    def run(self) -> Result:
        """Play it all."""
        end_s = self.scenario.seconds + self.scenario.drain_s
        self._next_arrival()
        self.clock.run(until=end_s)
        for flight in list(self.flights.values()):
            flight.gateway.give_up(flight)
        scenario = self.scenario
        for replica in self.replicas.values():
            self.recorder.preempted(replica.preemptions)
        for workers in scenario.workers:
            counted_s = scenario.seconds - max(workers.added_s, scenario.warmup_s)
            hours = max(counted_s, 0.0) / 3600
            self.recorder.cost(workers.count * workers.cost_per_hour * hours)
        return self.recorder.result(scenario.name, self.policy, self.seed)

    # Requests.

    def _next_arrival(self) -> None:
        arrival = next(self._arrivals, None)
        if arrival is not None:
            self.clock.at(arrival.at_s, self._arrive, arrival)

    def _arrive(self, arrival: Arrival) -> None:
        self._next_arrival()
        gateway = self.gateways[self._rng.randrange(len(self.gateways))]
        name = f"r{self._arrived}"
        self._arrived += 1
        request = request_of(name, arrival, self.scenario.tiers, self._rngs[gateway.index])
        gateway.arrive(Flight(name, arrival, gateway, request))

    def _ended(self, flight: Flight, how: str) -> None:
        now, arrival = self.clock.now, flight.arrival
        if arrival.at_s < self.scenario.warmup_s:
            return
        tier = self.scenario.tiers[arrival.tier]
        ttft_s = flight.first_at - arrival.at_s
        itl_s = flight.itl_s if how == "ok" else 0.0
        kept = (
            how == "ok"
            and tier.promise.kept(ttft_s, itl_s, flight.stall_s)
            and now - arrival.at_s <= tier.deadline_s
        )
        self.recorder.add(
            Seen(
                arrival.at_s,
                arrival.tier,
                arrival.tenant,
                arrival.model,
                flight.worker,
                arrival.prompt_tokens,
                arrival.output_tokens if how == "ok" else 0,
                how,
                kept,
                ttft_s,
                itl_s,
                flight.stall_s,
                now - arrival.at_s,
                flight.queued_s,
                flight.degraded,
                flight.paused,
                flight.moved,
            )
        )

    # Gateways.

    def _lateness(self, index: int) -> Lateness | None:
        mean_s = self.scenario.network.jitter_s
        return Lateness(mean_s, Random(f"{self.seed} lateness {index}")) if mean_s else None

    def _gossip(self, _: object) -> None:
        """Every gateway tells the others what it has in flight; some news is late or lost."""
        now, how = self.clock.now, self.scenario.gateways
        for teller in self.gateways:
            teller.look()
            loads = teller.kernel.loads(now)
            fact = PeerReported(f"g{teller.index}", loads, how.delay_s)
            for hearer in self.gateways:
                if hearer is not teller and self._rng_news.random() >= how.loss:
                    self.clock.at(now + how.delay_s, hearer.hear, fact)
        if now < self.scenario.seconds or self.flights:
            self.clock.at(now + how.every_s, self._gossip)

    # Workers.

    def _install(self, workers: Workers, number: int, profile: Profile, seed: int) -> None:
        name = f"{workers.name}{number}"
        worker = Worker(
            id=name,
            model=workers.model,
            url=f"http://{name}",
            node=workers.node,
            cost_per_hour=workers.cost_per_hour,
            role=workers.role,
            transfer=workers.hands_over,
            lease_s=workers.lease_s,
        )
        if workers.kv_tokens is not None:
            profile = replace(profile, kv_tokens=workers.kv_tokens)
        rng = Random(f"{seed} {name}")
        network = self.scenario.network
        link = None
        if network.bytes_per_s < inf:
            link = Link(2.0 * network.latency_s, network.bytes_per_s)
        urgency = self.scenario.urgency if self.scenario.engine_priority else None
        replica = Replica(
            worker, profile, self.clock, rng, self.gateways, workers.speed, link, urgency
        )
        replica.start_up_s = workers.start_up_s
        self.replicas[name] = replica
        self.clock.at(workers.added_s, self._add, replica)

    def _add(self, replica: Replica) -> None:
        self.start(replica, replica.start_up_s if self.clock.now else 0.0)
        for gateway in self.gateways:
            gateway.replicas[replica.worker.id] = replica
            gateway.tell(WorkerAdded(replica.worker))
            self._probe((gateway, replica))

    def start(self, replica: Replica, after_s: float) -> None:
        """The worker becomes ready after so long."""
        if after_s:
            self.clock.at(self.clock.now + after_s, replica.ready)
        else:
            replica.ready()

    def _probe(self, pair: tuple[Gateway, Replica]) -> None:
        gateway, replica = pair
        now, scenario = self.clock.now, self.scenario
        gateway.probe(replica)
        if gateway.index == 0 and replica.up:
            scheduler = replica.scheduler
            self.recorder.sample(
                now, replica.worker.id, scheduler.kv_used, scheduler.running, scheduler.waiting
            )
        gateway.sweep(replica, scenario.first_token_timeout_s, scenario.stall_timeout_s)
        wait_s = scenario.network.probe_s if replica.up else STARTING_S
        if now < scenario.seconds or self.flights:
            self.clock.at(now + wait_s, self._probe, pair)


def play(
    scenario: Scenario,
    policy: str,
    seed: int,
    profiles: Profiles = by_name,
    log: Log | None = None,
) -> Result:
    """The outcome of one run; the same for the same arguments, byte for byte."""
    return Simulation(scenario, policy, seed, profiles, log).run()
