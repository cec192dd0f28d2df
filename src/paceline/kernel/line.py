"""Who comes first, where members may leave or change place at any time?"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Any


class Line:
    """A priority queue whose members may leave, or change place; ties go by name.

    A heap with old entries in it, which are dropped when they come to the top, and all at once when
    they outnumber the others.
    """

    __slots__ = ("_entries", "_heap")

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Any, str]] = {}
        self._heap: list[tuple[Any, str]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, name: str, key: Any) -> None:
        """Let it stand by this key, whether or not it stood here before."""
        entry = key, name
        if self._entries.get(name) == entry:
            return
        self._entries[name] = entry
        heappush(self._heap, entry)
        self._tidy()

    def remove(self, name: str) -> None:
        if self._entries.pop(name, None) is not None:
            self._tidy()

    def first(self) -> tuple[Any, str] | None:
        """Least key and its name."""
        heap, entries = self._heap, self._entries
        while heap and entries.get(heap[0][1]) is not heap[0]:
            heappop(heap)
        return heap[0] if heap else None

    def pop(self) -> tuple[Any, str]:
        """The first, which must be there, leaves."""
        first = self.first()
        assert first is not None
        del self._entries[first[1]]
        return heappop(self._heap)

    def _tidy(self) -> None:
        if len(self._heap) > 2 * len(self._entries) + 8:
            self._heap = list(self._entries.values())
            heapify(self._heap)
