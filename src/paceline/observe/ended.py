"""When is it told that a request is over? Soon, and with others.

What runs again at once is two to three times as fast as what runs now and then between other
things. So those who count and log are told of several requests together, each of them in turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

from paceline.domain.outcome import Outcome

AT_ONCE = 16
"""Requests that are told of together: they keep tokens waiting for a fifth of a millisecond."""
SOON_S = 0.1
"""Until those are told of that are fewer."""

log = structlog.get_logger("paceline")


class Life(Protocol):
    """One request's life at the gateway, on the monotonic clock; 0: it has not come to that."""

    sent_at: float
    first_at: float
    done_at: float


Over = Sequence[tuple[Life, Outcome]]
Listener = Callable[[Over], object]


class Ended:
    """Requests that are over, of which nobody has been told yet."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = listeners
        self._over: list[tuple[Life, Outcome]] = []

    def add(self, life: Life, outcome: Outcome) -> None:
        """A request is over."""
        over = self._over
        over.append((life, outcome))
        if len(over) >= AT_ONCE:
            self.tell()
        elif len(over) == 1:
            asyncio.get_running_loop().call_later(SOON_S, self.tell)

    def tell(self) -> None:
        """Now: somebody wants to know, or it is time."""
        over, self._over = self._over, []
        if not over:
            return
        for listener in self._listeners:
            try:
                listener(over)
            except Exception:  # what is counted is not worth a stream
                log.exception("a bug kept requests from being counted")
