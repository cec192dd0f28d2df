"""Which workers have how much of a prompt in their KV cache, as far as our own dispatches tell?

An approximation: whatever was sent to a worker is taken to be cached there until newer prompts push
it out. How far that can be trusted is learned from the cached tokens that engines report.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from paceline.kernel.holders import Holders, depths

DEFAULT_BLOCKS = 8192
"""Blocks remembered of a worker that does not tell the size of its cache: 2 MB of text."""


class PrefixIndex:
    """Block hashes to the set of workers (a bit each) that have the text up to that block."""

    def __init__(self) -> None:
        self._holders = Holders()
        self._recent: dict[int, OrderedDict[int, None]] = {}
        self._capacity: dict[int, int] = {}

    def add(self, slot: int, capacity: int = DEFAULT_BLOCKS) -> None:
        """Know a worker, by its bit."""
        self._recent.setdefault(slot, OrderedDict())
        self._capacity[slot] = capacity

    def remove(self, slot: int) -> None:
        """Forget a worker's blocks: it is gone, or has restarted."""
        for block in self._recent.pop(slot, ()):
            self._holders.drop(block, 1 << slot)

    def depths(self, blocks: Sequence[int]) -> dict[int, int]:
        """How many leading blocks each worker holds; workers that hold none are left out."""
        return depths(blocks, self._holders.get)

    def insert(self, slot: int, blocks: Sequence[int]) -> None:
        """A worker is given a prompt."""
        recent, bit = self._recent[slot], 1 << slot
        for block in reversed(blocks):  # the prompt's start is the last to be forgotten
            if block in recent:
                recent.move_to_end(block)
            else:
                recent[block] = None
                self._holders.add(block, bit)
        while len(recent) > self._capacity[slot]:
            self._holders.drop(recent.popitem(last=False)[0], bit)

    def size(self, slot: int) -> int:
        """How many blocks a worker is believed to hold."""
        return len(self._recent[slot])

    def __len__(self) -> int:
        return len(self._holders)
