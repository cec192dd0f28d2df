"""How fast are a worker's steps just now, by its own best and by its like?

Its last steps tell. Where they are slow, only those of the newest ones' pace count: the steps
before it became slow must not make it look better than it is, nor those after it recovered worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_low

import msgspec

SLOW = 1.4
"""Times as long as normal that a worker's steps take for it to be slow."""
LAST, LEAST, NEWEST = 20, 10, 3
"""Steps by which a worker is judged; so few say nothing; and so many say how fast it is now."""

Seen = tuple[float, float, float, int]
"""Steps alike: seconds that each would take if all were well, that it took more, and that it would
take at its worker's own best; and their number."""


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """Of some steps, added up. Seconds."""

    steps: float = 0.0
    """0: not enough is known."""
    normal_s: float = 0.0
    """What they would have taken at its like, or at its own best if that is faster..."""
    slow_s: float = 0.0
    """...and what they took more."""
    best_s: float = 0.0
    """What they would have taken at its own best."""

    @property
    def times(self) -> float:
        """As long as normal that its steps take."""
        return 1.0 + self.slow_s / self.normal_s if self.normal_s > 0.0 else 1.0

    @property
    def times_itself(self) -> float:
        """As long as at its own best."""
        return (self.normal_s + self.slow_s) / self.best_s if self.best_s > 0.0 else 1.0


class Slower(msgspec.Struct, frozen=True):
    """What is told of a worker's pace, wherever it is told."""

    than_itself: float
    """Times as long as at its own best that its last steps took..."""
    than_like: float
    """...and as at its like, or at its own best if that is faster."""
    seen_ago_s: float
    """So long ago was the last of them."""
    found: bool
    """It is among the findings: no engine denies it, and nothing else explains it."""


def of_late(seen: Sequence[Seen]) -> Pace:
    """The pace of a worker's last steps; the newest stand last."""
    last: list[Seen] = []
    left = LAST
    for normal_s, slow_s, best_s, count in reversed(seen):
        last.append((normal_s, slow_s, best_s, min(count, left)))
        left -= last[-1][3]
        if not left:
            break
    if LAST - left < LEAST:
        return Pace()
    pace = _together(last)
    if pace.times < SLOW:
        return pace
    now = median_low([_times(step) for step in last[:NEWEST]])
    return _together([s for s in last if now < SLOW * _times(s) and _times(s) < SLOW * now])


def _times(step: Seen) -> float:
    normal_s, slow_s, _, _ = step
    return 1.0 + slow_s / normal_s


def _together(steps: Sequence[Seen]) -> Pace:
    return Pace(
        steps=float(sum(count for _, _, _, count in steps)),
        normal_s=sum(normal_s * count for normal_s, _, _, count in steps),
        slow_s=sum(slow_s * count for _, slow_s, _, count in steps),
        best_s=sum(best_s * count for _, _, best_s, count in steps),
    )
