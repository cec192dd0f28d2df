"""Who waits for a worker of one model, and at what pace are they sent?"""

from __future__ import annotations

from collections import deque
from math import exp, inf

from paceline.kernel.live import Live
from paceline.kernel.waiting import Waiting

RATE_S = 5.0
"""Time constant of the pace at which those who wait are sent."""
LEAST_BUSY_S = 0.2
"""Of so much waiting at least a pace is made."""


class Pace:
    """Work sent a second while somebody waits: of the time when nobody does it says nothing.

    Both the work and the seconds that it took fade, so that those of late count.
    """

    __slots__ = ("_at", "_busy_s", "_sent")

    def __init__(self) -> None:
        self._sent = self._busy_s = self._at = 0.0

    def passed(self, now: float, busy: bool) -> None:
        """Time has passed since the last call, with somebody waiting or not."""
        if busy:
            fade = exp((self._at - now) / RATE_S)
            self._sent *= fade
            self._busy_s = self._busy_s * fade + RATE_S * (1.0 - fade)  # these seconds fade too
        self._at = now

    def sent(self, cost: float) -> None:
        """So much work was sent just now."""
        self._sent += cost

    def seconds_for(self, cost: float) -> float:
        """How long so much work takes to be sent; 0 as long as that is not known."""
        known = self._busy_s > LEAST_BUSY_S and self._sent >= 1.0
        return cost * self._busy_s / self._sent if known else 0.0


class Room:
    """The waiting room of one model."""

    def __init__(self) -> None:
        self.waiting: Waiting[Live] = Waiting()
        self.handed: deque[Live] = deque()
        """Prefilled, and kept for the worker that is to answer: they go before all others."""
        self.returning: deque[Live] = deque()
        """Begun or tried before: they go first, at the pace of the retry budget."""
        self.pace = Pace()
        self.down_since = inf
        """Since when no worker is usable."""

    def __len__(self) -> int:
        return len(self.waiting) + len(self.returning) + len(self.handed)

    def enter(self, now: float) -> None:
        """Somebody comes to wait: the time when nobody did says nothing."""
        self.pace.passed(now, busy=len(self) > 0)
        if not len(self):
            self.down_since = inf
