"""Where does one simulated request stand?"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from paceline.domain.promise import Promise
from paceline.workload.traces import Arrival

if TYPE_CHECKING:
    from paceline.simulator.gateway import Gateway
    from paceline.simulator.replica import Replica


class Flight:
    """A request from its arrival to its end, across attempts."""

    __slots__ = (
        "arrival",
        "attempt",
        "cached_tokens",
        "done_at",
        "first_at",
        "gateway",
        "id",
        "joined",
        "promise",
        "replica",
        "sent_at",
        "stall_s",
    )

    def __init__(self, name: str, arrival: Arrival, promise: Promise, gateway: Gateway) -> None:
        self.id = name
        self.arrival = arrival
        self.promise = promise
        self.gateway = gateway
        self.replica: Replica | None = None
        self.attempt = 0
        self.cached_tokens = 0
        """Prompt tokens found in the worker's cache."""
        self.sent_at = inf
        self.first_at = inf
        self.done_at = inf
        self.joined = 0
        """Steps of the replica before its next token: gaps from there on are its own. 0 while it
        does not decode."""
        self.stall_s = 0.0

    @property
    def itl_s(self) -> float:
        """Mean gap between tokens; 0 with fewer than two."""
        tokens = self.arrival.output_tokens
        return (self.done_at - self.first_at) / (tokens - 1) if tokens > 1 else 0.0
