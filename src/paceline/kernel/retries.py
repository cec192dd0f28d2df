"""May one more request be sent a second time?

Retries are what turns a small outage into a large one. So they are bought with requests that were
sent for the first time: ten of those pay for one. A crash may move many streams at once; for that
there are savings. Beyond them moves wait for their turn; they are not lost.
(Retry budgets: Finagle, https://twitter.github.io/finagle/guide/Clients.html#retries)
"""

from __future__ import annotations

SHARE = 0.1
"""Retries that each request sent for the first time pays for."""
SAVINGS = 200.0
"""Retries at once, after quiet times."""
RATE = 2.0
"""Retries a second that are always paid for, so that a small fleet can retry too."""


class RetryBudget:
    """A token bucket, filled by first attempts."""

    __slots__ = ("_at", "_saved")

    def __init__(self) -> None:
        self._saved = SAVINGS
        self._at = 0.0

    def first_attempt(self) -> None:
        """A request was sent for the first time."""
        self._saved = min(self._saved + SHARE, SAVINGS)

    def spend(self, now: float) -> bool:
        """Pay for one retry; False if there is nothing left."""
        self._saved = min(self._saved + RATE * (now - self._at), SAVINGS)
        self._at = now
        if self._saved < 1.0:
            return False
        self._saved -= 1.0
        return True

    def refund(self) -> None:
        """The retry was not made after all."""
        self._saved += 1.0
