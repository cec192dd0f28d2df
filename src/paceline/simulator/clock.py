"""What happens next, and when?"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from math import inf
from typing import Any


class Clock:
    """Virtual time: a heap of what will happen. What is due at the same moment goes in order."""

    __slots__ = ("_count", "_heap", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._count = 0

    def at(self, when: float, action: Callable[[Any], None], about: Any = None) -> None:
        """Have `action(about)` happen at `when`, or now if that is past."""
        self._count += 1
        heappush(self._heap, (max(when, self.now), self._count, action, about))

    def run(self, until: float = inf) -> None:
        """Let everything happen that is due before `until`."""
        heap = self._heap
        while heap and heap[0][0] < until:
            self.now, _, action, about = heappop(heap)
            action(about)
