"""When is it told that a request is over? Soon, and with others.

What runs again at once is two to three times as fast as what runs now and then between other
things. So those who log are told of several requests together, each of them in turn. Those who
count get whole sheets of them, when one is full or somebody wants to know.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import structlog

from paceline.domain.outcome import Outcome
from paceline.observe.sheet import MOST_ROWS, Sheet, Sheets

T = TypeVar("T")

AT_ONCE = 32
"""Requests that are told of together: they keep tokens waiting for a third of a millisecond."""
SOON_S = 0.25
"""Until those are told of that are fewer."""

log = structlog.get_logger("paceline")


class Life(Protocol):
    """One request's life at the gateway, on the monotonic clock; 0: it has not come to that."""

    sent_at: float
    first_at: float
    done_at: float


Over = Sequence[tuple[Life, Outcome]]
Listener = Callable[[Over], object]
Counter = Callable[[Sheet], object]


class Ended:
    """Requests that are over, of which nobody has been told yet, or that nobody has counted."""

    def __init__(self, listeners: Sequence[Listener], counters: Sequence[Counter] = ()) -> None:
        """Those who want to know soon, and those who count."""
        self._listeners = (*listeners, self._write_down)
        self._counters = counters
        self._over: list[tuple[Life, Outcome]] = []
        self._sheets = Sheets()

    def add(self, life: Life, outcome: Outcome) -> None:
        """A request is over."""
        over = self._over
        over.append((life, outcome))
        if len(over) >= AT_ONCE:
            self.tell()
        elif len(over) == 1:
            asyncio.get_running_loop().call_later(SOON_S, self.tell)

    def tell(self) -> None:
        """It is time."""
        over, self._over = self._over, []
        if over:
            _tell(self._listeners, over)

    def count(self) -> None:
        """Somebody wants to know what all of them come to."""
        self.tell()
        if self._sheets:
            _tell(self._counters, self._sheets.take())

    def _write_down(self, over: Over) -> None:
        for _, outcome in over:
            self._sheets.add(outcome)
        if len(self._sheets) >= MOST_ROWS:
            _tell(self._counters, self._sheets.take())


def _tell(who: Sequence[Callable[[T], object]], what: T) -> None:
    for listener in who:
        try:
            listener(what)
        except Exception:  # what is counted is not worth a stream
            log.exception("a bug kept requests from being counted")
