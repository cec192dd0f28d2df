"""How long was the longest gap between steps since a stream joined them?"""

from __future__ import annotations

from bisect import bisect_left


class Gaps:
    """The gaps of one worker, in little memory: only what no later gap exceeds is kept."""

    __slots__ = ("_gaps", "_steps")

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._gaps: list[float] = []

    def add(self, step: int, gap_s: float) -> None:
        """The steps up to this one had no longer gap."""
        steps, gaps = self._steps, self._gaps
        while gaps and gaps[-1] <= gap_s:
            gaps.pop()
            steps.pop()
        steps.append(step)
        gaps.append(gap_s)

    def longest_s(self, since: int) -> float:
        """The longest gap of the steps after `since`; 0 if there was none."""
        place = bisect_left(self._steps, since + 1)
        return self._gaps[place] if place < len(self._gaps) else 0.0
