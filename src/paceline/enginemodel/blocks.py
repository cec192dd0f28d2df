"""Which blocks of KV cache are in use, and which prefixes can still be found there?"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class BlockPool:
    """Paged KV cache with prefix caching.

    A block has a name (the hash of all text up to its end) once it is full, and only named blocks
    can be shared, so only they need an identity: of the others a count is enough. A named block
    that nobody holds stays until its room is needed; the longest unused goes first.
    """

    __slots__ = ("_holders", "_idle", "_unnamed", "blocks")

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._holders: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Named blocks that nobody holds, the longest unused first."""
        self._unnamed = 0

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return len(self._holders) + self._unnamed

    @property
    def free(self) -> int:
        """Blocks that nobody holds; what they cache is given up when they are taken."""
        return self.blocks - self.used

    @property
    def cached(self) -> int:
        """Named blocks, held or not."""
        return len(self._holders) + len(self._idle)

    def known(self, names: Sequence[int]) -> int:
        """How many of the first `names` are in the cache, without a gap."""
        holders, idle = self._holders, self._idle
        for count, name in enumerate(names):
            if name not in holders and name not in idle:
                return count
        return len(names)

    def idle(self, names: Sequence[int]) -> int:
        """How many of `names` are cached but held by nobody: holding them costs free blocks."""
        return sum(name in self._idle for name in names)

    def hold(self, names: Sequence[int]) -> None:
        """Share cached blocks."""
        holders = self._holders
        for name in names:
            if name in self._idle:
                del self._idle[name]
            holders[name] = holders.get(name, 0) + 1

    def take(self, count: int) -> None:
        """Take free blocks for something new."""
        assert count <= self.free, "the caller makes room first"
        self._unnamed += count
        self._evict()

    def name(self, name: int) -> bool:
        """Name one of the blocks taken. False: a twin has the name, and the block stays unnamed."""
        if name in self._holders:
            return False
        self._idle.pop(name, None)  # an idle twin is given up for the fresh block
        self._unnamed -= 1
        self._holders[name] = 1
        return True

    def drop(self, names: Sequence[int], unnamed: int) -> None:
        """Give back what was held; of a prefix, the end is evicted first: it serves fewer."""
        self._unnamed -= unnamed
        holders = self._holders
        for name in reversed(names):
            left = holders[name] - 1
            if left:
                holders[name] = left
            else:
                del holders[name]
                self._idle[name] = None

    def _evict(self) -> None:
        idle = self._idle
        room = self.free
        while len(idle) > room:
            idle.popitem(last=False)
