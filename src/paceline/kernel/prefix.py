"""Which workers have how much of a prompt in their KV cache, as far as our own dispatches tell?

An approximation: whatever was sent to a worker is taken to be cached there until newer prompts push
it out. How far that can be trusted is learned from the cached tokens that engines report.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

DEFAULT_BLOCKS = 8192
"""Blocks remembered of a worker that does not tell the size of its cache: 2 MB of text."""


class PrefixIndex:
    """Block hashes to the set of workers (a bit each) that have the text up to that block."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        self._recent: dict[int, OrderedDict[int, None]] = {}
        self._capacity: dict[int, int] = {}

    def add(self, slot: int, capacity: int = DEFAULT_BLOCKS) -> None:
        """Know a worker, by its bit."""
        self._recent.setdefault(slot, OrderedDict())
        self._capacity[slot] = capacity

    def remove(self, slot: int) -> None:
        """Forget a worker's blocks: it is gone, or has restarted."""
        for block in self._recent.pop(slot, ()):
            self._drop(block, slot)

    def depths(self, blocks: Sequence[int]) -> dict[int, int]:
        """How many leading blocks each worker holds; workers that hold none are left out."""
        depths: dict[int, int] = {}
        holders, depth = -1, 0
        for depth, block in enumerate(blocks):
            still = self._holders.get(block, 0) & holders
            if still != holders and depth:
                _each(holders & ~still, depth, depths)
            holders = still
            if not holders:
                return depths
        _each(holders if blocks else 0, depth + 1, depths)
        return depths

    def insert(self, slot: int, blocks: Sequence[int]) -> None:
        """A worker is given a prompt."""
        recent, bit = self._recent[slot], 1 << slot
        for block in reversed(blocks):  # the prompt's start is the last to be forgotten
            if block in recent:
                recent.move_to_end(block)
            else:
                recent[block] = None
                self._holders[block] = self._holders.get(block, 0) | bit
        while len(recent) > self._capacity[slot]:
            self._drop(recent.popitem(last=False)[0], slot)

    def size(self, slot: int) -> int:
        """How many blocks a worker is believed to hold."""
        return len(self._recent[slot])

    def _drop(self, block: int, slot: int) -> None:
        left = self._holders[block] & ~(1 << slot)
        if left:
            self._holders[block] = left
        else:
            del self._holders[block]

    def __len__(self) -> int:
        return len(self._holders)


def _each(bits: int, depth: int, depths: dict[int, int]) -> None:
    while bits:
        low = bits & -bits
        depths[low.bit_length() - 1] = depth
        bits ^= low
