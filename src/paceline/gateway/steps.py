"""Which chunks of a worker's streams belong to one step of its engine?

Each step of a continuous batch gives every decoding stream one chunk. So a stream that comes a
second time begins a new step, as does a chunk after a pause that no burst would make; and once
every live stream has come, the step is whole.
"""

from __future__ import annotations

from collections.abc import Callable

from paceline.domain.facts import Step

PAUSE_SHARE = 0.5
"""A pause longer than this share of a usual step begins a new one."""
PAUSE_MIN_S = 0.001
ECHO_SHARE = 0.2
"""A stream's chunk sooner than this share of a usual step after its last one belongs to the same
step: some engines send the finish reason on its own."""


class StepWatch:
    """Sums one worker's chunks into steps."""

    __slots__ = (
        "_before",
        "_began_at",
        "_burst",
        "_last_at",
        "_live",
        "_pause_s",
        "_seen",
        "_sink",
        "_streams",
        "_tokens",
        "_told",
        "_usual_s",
    )

    def __init__(self, sink: Callable[[Step], None]) -> None:
        self._sink = sink
        self._live = 0  # streams between their first token and their end
        self._burst = 0  # number of the step whose chunks are coming in
        self._began_at = 0.0
        self._last_at = 0.0
        self._seen = 0  # live streams that have come in this burst
        self._streams = 0  # those among them that were decoding
        self._tokens = 0
        self._told = True
        self._before = 0.0  # when the step told last began to arrive; 0: none since idle
        self._usual_s = 0.0  # a step without prefill, about
        self._pause_s = PAUSE_MIN_S

    def first(self, now: float) -> int:
        """A stream's first token came; gives the burst that it belongs to."""
        if now - self._last_at > self._pause_s:
            self._begin(now)
        self._live += 1
        self._seen += 1
        self._last_at = now
        if self._seen >= self._live:
            self._tell()
        return self._burst

    def token(self, burst: int, tokens: int, gap_s: float, now: float) -> int:
        """A decoding stream's chunk came, `gap_s` after its last one, which was in `burst`.

        Gives the burst of this one.
        """
        if burst == self._burst and gap_s < ECHO_SHARE * self._usual_s:
            return -burst  # an echo, of which a stream has one at most in a burst
        if abs(burst) == self._burst or now - self._last_at > self._pause_s:
            self._begin(now)
        self._seen += 1
        self._streams += 1
        self._tokens += tokens
        self._last_at = now
        if self._seen >= self._live:
            self._tell()
        return self._burst

    def gone(self, burst: int) -> None:
        """A live stream, seen last in `burst`, ended."""
        self._live -= 1
        if abs(burst) == self._burst:
            self._seen -= 1
        elif self._seen >= self._live:
            self._tell()
        if not self._live:
            self._before = 0.0

    def _begin(self, now: float) -> None:
        self._tell()
        self._burst += 1
        self._told = False
        self._began_at = now
        self._seen = self._streams = self._tokens = 0

    def _tell(self) -> None:
        if self._told:
            return
        self._told = True
        began, before, self._before = self._began_at, self._before, self._began_at
        seconds = began - before if before and self._streams else 0.0
        if seconds:
            self._usual_s = min(seconds, 1.1 * self._usual_s) if self._usual_s else seconds
            self._pause_s = max(PAUSE_MIN_S, PAUSE_SHARE * self._usual_s)
        self._sink(Step(began, seconds, self._streams, self._tokens))
