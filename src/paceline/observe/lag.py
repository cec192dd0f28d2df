"""How late does the event loop come to what is due?"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from math import inf
from time import monotonic

EVERY_S = 0.02
LEAST_LAG_S = 0.005
"""What timers are late by on a quiet machine is less."""
MOST_LAGS = 256


class Lags:
    """When it was late, of late."""

    def __init__(self) -> None:
        self._lags: deque[tuple[float, float]] = deque(maxlen=MOST_LAGS)
        self.last_at = -inf
        """When it was late last."""

    def add(self, at: float, seconds: float) -> None:
        """It came so late to what was due."""
        self._lags.append((at, seconds))
        self.last_at = at

    def between(self, began_at: float, ended_at: float) -> float:
        """By how much it was late within a time."""
        late_s = 0.0
        for at, seconds in reversed(self._lags):
            if at < began_at:
                break
            if at - seconds < ended_at:
                late_s += min(seconds, at - began_at)
        return late_s

    def since(self, when: float) -> list[float]:
        """By how much each time, since then."""
        return [seconds for at, seconds in self._lags if at > when]


async def watch_lag(told: Callable[[float, float], None]) -> None:
    """Tell, for ever, when a short sleep ends late: when that was, and by how much."""
    while True:
        due = monotonic() + EVERY_S
        await asyncio.sleep(EVERY_S)
        now = monotonic()
        if now - due > LEAST_LAG_S:
            told(now, now - due)
