"""How does a prompt's KV cache come from the engine that prefilled it to the one that answers?

Over the nodes' links, which transfers share. What is not there to be fetched, for its worker
crashed or has given it up, the other engine computes itself, as vLLM does with
`kv_load_failure_policy: recompute`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from paceline.simulator.clock import Clock
from paceline.simulator.flight import Flight
from paceline.simulator.links import Fabric
from paceline.simulator.replica import Replica

WITHIN_BYTES_PER_S = 200e9
"""Between engines of one node: NVLink of the H100 generation has 450 GB/s each way, and half of
that is a good transfer."""

Arrived = Callable[[Flight, bool], None]
"""Takes a request, and whether its prompt's cache has come."""


class HandOvers:
    """All transfers of KV cache between engines."""

    def __init__(self, clock: Clock, nodes: set[str], latency_s: float, bytes_per_s: float) -> None:
        self._clock = clock
        self._latency_s = latency_s
        self._speeds: dict[str, float] = {}
        for node in nodes:
            self._speeds |= {node: bytes_per_s, _inside(node): WITHIN_BYTES_PER_S}
        self._fabric = Fabric(latency_s, self._speeds)
        self._due = inf
        self._under_way: dict[str, tuple[Flight, Replica, Arrived]] = {}

    def fetch(self, flight: Flight, source: Replica, arrived: Arrived) -> None:
        """Bring the cache to where the request is."""
        assert flight.replica is not None
        self.drop(flight)
        if flight.id not in source.scheduler.held:
            arrived(flight, False)
            return
        self._under_way[flight.id] = flight, source, arrived
        giver, taker = _ends(source, flight.replica)
        size_bytes = float(flight.prompt_tokens * source.profile.kv_token_bytes)
        self._fabric.start(self._clock.now, flight.id, size_bytes, giver, taker)
        self._await()

    def sending_s(self, source: Replica, taker: Replica, tokens: int) -> float:
        """What so many tokens take if nothing else is sent."""
        slowest = min(self._speeds[end] for end in _ends(source, taker))
        return self._latency_s + tokens * source.profile.kv_token_bytes / slowest

    def drop(self, flight: Flight) -> None:
        """It is not wanted any more."""
        if self._under_way.pop(flight.id, None) is not None:
            self._fabric.drop(self._clock.now, flight.id)
            self._await()

    def lost(self, source: Replica) -> None:
        """A worker crashes, with all that it held."""
        for flight, giver, arrived in list(self._under_way.values()):
            if giver is source:
                self.drop(flight)
                arrived(flight, False)

    def slow(self, node: str, factor: float) -> None:
        """A node's link becomes so many times slower."""
        self._speeds[node] /= factor
        self._fabric.resize(self._clock.now, node, self._speeds[node])
        self._await()

    def _await(self) -> None:
        self._due, _ = self._fabric.next_done()
        if self._due < inf:
            self._clock.at(self._due, self._through, self._due)

    def _through(self, due: float) -> None:
        if due != self._due:
            return  # another has begun since
        for request_id in self._fabric.finish(due):
            flight, source, arrived = self._under_way.pop(request_id)
            source.fetched(flight.id)
            arrived(flight, True)
        self._await()


def _ends(source: Replica, taker: Replica) -> tuple[str, str]:
    """The links that a transfer crosses: of both machines, or within the one."""
    if source.node != taker.node:
        return source.node, taker.node
    return _inside(source.node), _inside(source.node)


def _inside(node: str) -> str:
    return f"inside {node}"
