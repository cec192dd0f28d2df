"""When has a transfer arrived, if others are on the same link?

Bandwidth is shared fairly: of n transfers on a link each gets an n-th of it, at every moment. What
is sent still flies for the latency. Nothing here reads a clock: times are passed in and never go
back, in seconds. So the host asks `next_done`, waits until then, and asks again after each change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Mapping
from heapq import heapify, heappop, heappush
from math import inf

import msgspec

Done = tuple[float, str]
"""When, and which transfer; (infinity, "") if none is on its way."""

NONE: Done = (inf, "")


class _Shared(ABC):
    """Transfers that slow each other while they are sent, and not while they fly."""

    def __init__(self, latency_s: float) -> None:
        self._latency_s = latency_s
        self._now = 0.0
        self._flying: deque[Done] = deque()
        """In order, for what is sent first arrives first."""

    def next_done(self) -> Done:
        """Which transfer arrives next, and when, if no other starts before."""
        if self._flying:
            return self._flying[0]
        sent_at, transfer = self._next_sent()
        return sent_at + self._latency_s, transfer

    def finish(self, now: float) -> list[str]:
        """All that has arrived since the last call; at `next_done` that is one at least."""
        self._advance(now)
        arrived = []
        while self._flying and self._flying[0][0] <= now:
            arrived.append(self._flying.popleft()[1])
        return arrived

    def drop(self, now: float, transfer: str) -> None:
        """Give up a transfer, wherever it is; the others have its share from now on."""
        self._advance(now)
        self._flying = deque(done for done in self._flying if done[1] != transfer)
        self._forget(transfer)

    def _advance(self, now: float) -> None:
        while (sent := self._next_sent())[0] <= now:
            self._serve_until(sent[0])
            self._take(sent[1])
            self._flying.append((sent[0] + self._latency_s, sent[1]))
        self._serve_until(now)

    @abstractmethod
    def _next_sent(self) -> Done:
        """Whose last byte leaves next."""

    @abstractmethod
    def _serve_until(self, now: float) -> None:
        """Bytes flow; none is the last of its transfer before `now`."""

    @abstractmethod
    def _take(self, transfer: str) -> None:
        """The one of `_next_sent` is sent."""

    @abstractmethod
    def _forget(self, transfer: str) -> None:
        """A transfer need not be sent any further, if it is there."""


class Link(_Shared):
    """One link. A change costs O(log n), by the virtual time of processor sharing.

    Each transfer on the link gets the same service. So a transfer ends when the service that one
    of them has attained since the link was idle is as much as at its start and its own size.
    Service is in seconds of the whole link, which stays finite if bandwidth does not.
    (Parekh and Gallager, A generalized processor sharing approach to flow control, 1993.)
    """

    def __init__(self, latency_s: float, bytes_per_s: float) -> None:
        super().__init__(latency_s)
        self._bytes_per_s = bytes_per_s
        self._attained_s = 0.0
        self._sending: list[tuple[float, str]] = []
        """A heap: the attained service at which each is sent."""

    def start(self, now: float, transfer: str, size_bytes: float) -> None:
        """A transfer begins."""
        self._advance(now)
        heappush(self._sending, (self._attained_s + size_bytes / self._bytes_per_s, transfer))

    def _next_sent(self) -> Done:
        if not self._sending:
            return NONE
        until_s, transfer = self._sending[0]
        return self._now + (until_s - self._attained_s) * len(self._sending), transfer

    def _serve_until(self, now: float) -> None:
        if self._sending:
            self._attained_s += (now - self._now) / len(self._sending)
        else:
            self._attained_s = 0.0
        self._now = now

    def _take(self, transfer: str) -> None:
        # Set, not summed: rounding must not let the next one end before now.
        self._attained_s, _ = heappop(self._sending)

    def _forget(self, transfer: str) -> None:
        self._sending = [entry for entry in self._sending if entry[1] != transfer]
        heapify(self._sending)


class _Sending(msgspec.Struct):
    left_bytes: float
    ends: tuple[tuple[str, str], tuple[str, str]]
    """The sender's way out and the receiver's way in."""
    bytes_per_s: float = 0.0


class Fabric(_Shared):
    """Nodes that send to each other, each with a link of its own into the fabric (full duplex).

    A transfer has the slower of its fair shares, the sender's and the receiver's, and what it
    cannot use goes to the others there: max-min fairness, computed anew at each change. That suits
    the few transfers of KV cache that are between nodes at once, not thousands.
    """

    def __init__(self, latency_s: float, bytes_per_s: Mapping[str, float]) -> None:
        super().__init__(latency_s)
        self._bytes_per_s = dict(bytes_per_s)
        self._sending: dict[str, _Sending] = {}

    def start(
        self, now: float, transfer: str, size_bytes: float, sender: str, receiver: str
    ) -> None:
        """A transfer begins from one node to another."""
        self._advance(now)
        self._sending[transfer] = _Sending(size_bytes, (("out", sender), ("in", receiver)))
        self._share()

    def resize(self, now: float, node: str, bytes_per_s: float) -> None:
        """A node's link becomes faster or slower."""
        self._advance(now)
        self._bytes_per_s[node] = bytes_per_s
        self._share()

    def _next_sent(self) -> Done:
        now = self._now
        ends = ((now + s.left_bytes / s.bytes_per_s, id_) for id_, s in self._sending.items())
        return min(ends, default=NONE)

    def _serve_until(self, now: float) -> None:
        elapsed_s = now - self._now
        if elapsed_s > 0:
            for sending in self._sending.values():
                served = elapsed_s * sending.bytes_per_s
                sending.left_bytes = max(0.0, sending.left_bytes - served)
        self._now = now

    def _take(self, transfer: str) -> None:
        self._forget(transfer)

    def _forget(self, transfer: str) -> None:
        if self._sending.pop(transfer, None):
            self._share()

    def _share(self) -> None:
        """Fill all rates alike; the link that is full first settles those that cross it.

        Progressive filling (Bertsekas and Gallager, Data networks, 1992, section 6.5.2).
        """
        unsettled = dict(self._sending)
        free = {end: self._bytes_per_s[end[1]] for s in unsettled.values() for end in s.ends}
        while unsettled:
            crossing = Counter(end for sending in unsettled.values() for end in sending.ends)
            share, full = min((free[end] / count, end) for end, count in crossing.items())
            for id_ in [id_ for id_, sending in unsettled.items() if full in sending.ends]:
                settled = unsettled.pop(id_)
                settled.bytes_per_s = share
                for end in settled.ends:
                    free[end] = max(0.0, free[end] - share) if share < inf else inf
