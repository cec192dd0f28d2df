"""Which blocks of KV cache are in use, and which prefixes can still be found there?"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol


class Journal(Protocol):
    """Who wants to know what becomes of named blocks."""

    def stored(self, names: Sequence[int], at: int) -> None:
        """The one at that place among the names of a text is cached; perhaps it was already."""
        ...

    def removed(self, name: int) -> None:
        """It has been given up."""
        ...


class BlockPool:
    """Paged KV cache with prefix caching.

    Text has a name (the hash of all text up to its end) once its `per_name` blocks are full, and
    only what is named can be shared, so only that needs an identity: of other blocks a count is
    enough. What is named and held by nobody stays until its room is needed; the longest unused
    goes first.
    """

    __slots__ = ("_holders", "_idle", "_unnamed", "blocks", "journal", "per_name")

    def __init__(self, blocks: int, per_name: int = 1, journal: Journal | None = None) -> None:
        self.blocks = blocks
        self.journal = journal
        self.per_name = per_name
        """Blocks under one name: 1 as in vLLM; more make long prompts cheaper to simulate."""
        self._holders: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Names that nobody holds, the longest unused first."""
        self._unnamed = 0

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return self.per_name * len(self._holders) + self._unnamed

    @property
    def free(self) -> int:
        """Blocks that nobody holds; what they cache is given up when they are taken."""
        return self.blocks - self.used

    @property
    def cached(self) -> int:
        """Named blocks, held or not."""
        return self.per_name * (len(self._holders) + len(self._idle))

    def known(self, names: Sequence[int]) -> int:
        """How many of the first `names` are in the cache, without a gap."""
        holders, idle = self._holders, self._idle
        for count, name in enumerate(names):
            if name not in holders and name not in idle:
                return count
        return len(names)

    def idle(self, names: Sequence[int]) -> int:
        """Blocks of `names` that are cached but held by nobody: holding them costs free blocks."""
        return self.per_name * sum(name in self._idle for name in names)

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
        """Name `per_name` of the blocks taken. False: a twin has the name; they stay unnamed."""
        if name in self._holders:
            return False
        self._idle.pop(name, None)  # an idle twin is given up for what is fresh
        self._unnamed -= self.per_name
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

    def clear(self) -> bool:
        """Forget what is cached. False: not while somebody holds blocks."""
        if self.used:
            return False
        self._idle.clear()
        return True

    def _evict(self) -> None:
        idle = self._idle
        room = self.free
        while self.per_name * len(idle) > room:
            name, _ = idle.popitem(last=False)
            if self.journal is not None:
                self.journal.removed(name)
