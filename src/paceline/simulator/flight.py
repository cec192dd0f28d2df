"""Where does one simulated request stand?"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from paceline.domain.promise import Promise
from paceline.domain.request import Request
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
    """A request from its arrival to its end, over one leg for each worker that it is sent to.

    An answer that is cut goes on in the next leg: its prompt is then the first one with all tokens
    that have come, and the rest of the answer is to be computed.
    """

    __slots__ = (
        "arrival",
        "begun",
        "cached_tokens",
        "came",
        "came_at",
        "degraded",
        "done_at",
        "first_at",
        "gateway",
        "had",
        "handing",
        "id",
        "joined",
        "leg",
        "moved",
        "names",
        "paused",
        "queued_s",
        "replica",
        "request",
        "sent_at",
        "source",
        "stall_s",
        "worker",
    )

    def __init__(self, name: str, arrival: Arrival, gateway: Gateway, request: Request) -> None:
        self.id = name
        self.arrival = arrival
        self.names = request.blocks
        """Of its prompt, each for `NAME_TOKENS`."""
        self.gateway = gateway
        self.request = request
        """What it is now: less than it was, once it has been degraded."""
        self.degraded = False
        self.paused = 0
        self.moved = 0
        """How often it was taken off a worker that failed, or to go on elsewhere."""
        self.queued_s = 0.0
        """Until it was sent to the worker that began its answer, or was tried last."""
        self.cached_tokens = 0
        """Prompt tokens found in the cache of the worker that began its answer."""
        self.first_at = inf
        self.done_at = inf
        """When its last token came, as of when it decoded last."""
        self.stall_s = 0.0
        # Of its leg.
        self.leg = 0
        """How many there were; what is on its way from an earlier one is void."""
        self.replica: Replica | None = None
        """Where it is; None: nowhere, it waits."""
        self.handing = False
        """Its prompt is computed there for another worker."""
        self.source: Replica | None = None
        """The worker from which its prompt's cache is to be fetched."""
        self.worker = ""
        """The last one that it was sent to."""
        self.sent_at = inf
        self.begun = False
        """Has its first token been heard of?"""
        self.joined = 0
        """Steps of the replica before its next token: gaps from there on are its own. 0 while it
        does not decode."""
        self.had = 0
        """Tokens of the answer that came in the legs before."""
        self.came = 0
        """Tokens of this leg that have come to the gateway, as of when they were counted last."""
        self.came_at = inf
        """When the last of them came."""

    @property
    def prompt_tokens(self) -> int:
        """What a worker must have computed before the answer can begin or go on."""
        return self.arrival.prompt_tokens + self.had

    @property
    def output_tokens(self) -> int:
        """What this leg has to give."""
        if self.handing:
            return 1
        return self.arrival.output_tokens - self.had

    @property
    def promise(self) -> Promise:
        return self.request.promise

    @property
    def itl_s(self) -> float:
        """Mean gap between tokens; 0 with fewer than two."""
        tokens = self.arrival.output_tokens
        return (self.done_at - self.first_at) / (tokens - 1) if tokens > 1 else 0.0

    def set_out(
        self, replica: Replica, now: float, handing: bool = False, source: Replica | None = None
    ) -> None:
        """A leg begins: it is sent to a worker."""
        assert self.replica is None, "it is at one worker at most"
        self.leg += 1
        self.replica, self.worker = replica, replica.worker.id
        self.sent_at = now
        self.handing, self.source = handing, source
        self.begun, self.joined, self.came = False, 0, 0
        if not self.had and source is None:
            self.queued_s = now - self.arrival.at_s

    def come_back(self) -> None:
        """A leg is over before the answer is: what has come of it is kept."""
        if self.begun:
            self.had += self.came
        self.replica = None
