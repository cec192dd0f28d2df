"""How much comes in a second, lately?"""

from __future__ import annotations

from math import exp


class Rate:
    """Of something that comes in pieces: an exponentially weighted mean."""

    __slots__ = ("_at", "_rate", "_seconds")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        """Time constant."""
        self._rate = self._at = 0.0

    def add(self, amount: float, at: float) -> None:
        """So much came."""
        self._rate = self.at(at) + amount / self._seconds
        self._at = at

    def at(self, now: float) -> float:
        """So much comes in a second."""
        return self._rate * exp((self._at - now) / self._seconds)
