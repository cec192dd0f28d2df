"""Where does one simulated request stand?"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from paceline.domain.promise import Promise
from paceline.workload.traces import BLOCK_TOKENS, Arrival

if TYPE_CHECKING:
    from paceline.simulator.gateway import Gateway
    from paceline.simulator.replica import Replica

BYTES_PER_TOKEN = 4
"""Of prompt text, about."""
NAME_TOKENS = 256
"""Tokens under one name of prompt text; it is 512 in workloads and 16 in vLLM. The finer, the more
of a growing chat is found again, and the more each request costs: about 1 us a name."""
PARTS = BLOCK_TOKENS // NAME_TOKENS


def names_of(arrival: Arrival) -> tuple[int, ...]:
    """Names of the prompt's text, finer than those of its workload, as far as it can be shared."""
    count = arrival.shared_tokens // NAME_TOKENS
    blocks = arrival.blocks[: -(-count // PARTS)]
    return tuple([name * PARTS + part for name in blocks for part in range(PARTS)][:count])


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
        "names",
        "promise",
        "replica",
        "sent_at",
        "stall_s",
    )

    def __init__(self, name: str, arrival: Arrival, promise: Promise, gateway: Gateway) -> None:
        self.id = name
        self.arrival = arrival
        self.names = names_of(arrival)
        """Of its prompt, each for `NAME_TOKENS`."""
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
