"""Which workers have how much of a prompt in their KV cache, as their engines tell it?

Exact, where `prefix` is a guess. Each cache has a view: the engine's hashes with our names of the
blocks, by medium. The names are what prompts are looked up by, so that engines whose hashes have
nothing in common share one index, and the hashes are what the engine tells the rest by.

Memory is bounded: above `most` blocks in all, the largest view forgets what it heard first. A block
of one worker takes about 150 bytes (bench/prefix.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, islice, repeat

from paceline.domain.kvevents import (
    BlockEvent,
    BlockForm,
    BlocksRemoved,
    BlocksStored,
    Medium,
    TokenBlocks,
    name_after,
    root_name,
)
from paceline.kernel.holders import Holders, depths

MOST_BLOCKS = 2_000_000
"""Kept of all workers together, 300 MB: of 64 with 500,000 tokens each in blocks of 16."""
FORGOTTEN_SHARE = 8
"""One part in so many of a view goes at once, since to find its oldest block costs a search."""


class View:
    """What one cache holds, by what its engine told."""

    __slots__ = ("copies", "media", "roots", "size", "slot", "whole")

    def __init__(self, slot: int) -> None:
        self.slot = slot
        """Its bit among the holders."""
        self.whole = False
        """It has missed nothing: what is not here is not in the cache."""
        self.size = 0
        """Tokens in a block; 0: not told yet."""
        self.roots: set[int] = set()
        """Names that texts were told to begin after: of the model itself, and of each adapter."""
        self.media: tuple[dict[int, int], ...] = tuple({} for _ in Medium)
        """The engine's hashes, oldest first, with the names of the blocks."""
        self.copies: dict[tuple[Medium, int], int] = {}
        """Further copies: vLLM caches a block twice if two prompts with it were computed at once,
        and tells of each copy that it gives up."""

    def name_of(self, engine_hash: int) -> int | None:
        return next((blocks[engine_hash] for blocks in self.media if engine_hash in blocks), None)

    def __len__(self) -> int:
        return sum(map(len, self.media))


class BlockIndex:
    """The blocks of all workers of a model. A worker is known by its place, as in the pool."""

    def __init__(self, most: int = MOST_BLOCKS) -> None:
        self._most = most
        self._size = 0
        self._holders = tuple(Holders() for _ in Medium)
        self._views: dict[int, dict[int, View]] = {}
        """By place, and there by rank."""
        self._places: list[int | None] = []
        """Of each slot the place; None: it is free."""
        self.orphans = 0
        """Blocks told of that could not be named: of the text before them we never heard."""
        self.strangers = 0
        """Blocks removed that were not known."""
        self.heard = 0
        """Events, those that could not be understood included."""

    def begin(self, place: int, rank: int = 0, whole: bool = False) -> None:
        """Nothing is known of this cache any more. `whole`: because it is empty."""
        ranks = self._views.setdefault(place, {})
        view = ranks.get(rank)
        if view is None:
            view = ranks[rank] = View(self._slot(place))
        self._empty(view)
        view.whole = whole

    def forget(self, place: int) -> None:
        """The worker has left."""
        for view in self._views.pop(place, {}).values():
            self._empty(view)
            self._places[view.slot] = None

    def change(
        self, place: int, events: Sequence[BlockEvent], rank: int = 0, unreadable: int = 0
    ) -> None:
        """An engine told what its cache did, and perhaps more that could not be understood."""
        if rank not in self._views.get(place, ()):
            self.begin(place, rank)
        view = self._views[place][rank]
        self.heard += len(events) + unreadable
        for event in events:
            if isinstance(event, BlocksStored):
                self._store(view, event)
            elif isinstance(event, BlocksRemoved):
                self._remove(view, event)
            else:
                self._empty(view)
                view.whole = True
        if unreadable:
            view.whole = False
        while self._size > self._most:
            views = (view for ranks in self._views.values() for view in ranks.values())
            self._shrink(max(views, key=lambda view: (len(view), view.slot)))

    def follows(self, place: int) -> bool:
        """Is all that this worker caches known, so that no guess is needed?"""
        ranks = self._views.get(place, {})
        return bool(ranks) and all(view.whole for view in ranks.values())

    def forms(self, served_as: Callable[[int], str]) -> list[BlockForm]:
        """What prompts are to be named by to be looked up, where all that a worker caches is known.

        `served_as`: the name, at the engine of a place, of what prompts are for. If blocks of an
        adapter of that name were told of, it is that adapter.
        """
        found = set()
        for place, ranks in self._views.items():
            for view in ranks.values() if self.follows(place) else ():
                name = served_as(place)
                lora = name if root_name(view.size, name) in view.roots else ""
                if view.size:
                    found.add(BlockForm(view.size, lora))
        return sorted(found)

    def depths(self, names: Sequence[int], medium: Medium = Medium.GPU) -> dict[int, int]:
        """How many leading blocks each place has, in this medium or a faster one.

        Of several ranks at a place the one that has most counts: which will serve is not known.
        """
        used = [holders for holders in self._holders[: medium + 1] if holders]
        if len(used) == 1:
            found = depths(names, used[0].get)
        else:
            found = depths(names, lambda name: _union(holders.get(name, 0) for holders in used))
        most: dict[int, int] = {}
        for slot, depth in found.items():
            place = self._places[slot]
            assert place is not None
            most[place] = max(depth, most.get(place, 0))
        return most

    def cached_tokens(
        self, blocks: TokenBlocks, prompt_tokens: int, medium: Medium = Medium.GPU
    ) -> dict[int, int]:
        """How many tokens of a prompt need no prefill, by place."""
        found = self.depths(blocks.reusable(prompt_tokens), medium)
        return {place: depth * blocks.size for place, depth in found.items()}

    def held(self, place: int, medium: Medium = Medium.GPU, rank: int = 0) -> Mapping[int, int]:
        """The engine's hashes of the blocks that a cache holds there, with their names."""
        view = self._views.get(place, {}).get(rank)
        return view.media[medium] if view is not None else {}

    def size(self, place: int) -> int:
        """How many blocks are known of a place."""
        return sum(map(len, self._views.get(place, {}).values()))

    def __len__(self) -> int:
        return self._size

    # What the engine told.

    def _store(self, view: View, event: BlocksStored) -> None:
        blocks, holders = view.media[event.medium], self._holders[event.medium]
        bit = 1 << view.slot
        before = len(blocks)
        view.size = event.size or view.size
        if event.parent is None:
            view.roots.add(event.root)
        for engine_hash, name in zip(event.hashes, self._names(view, event), strict=False):
            if name is None:
                self.orphans += 1
                view.whole = False
            elif engine_hash in blocks:
                key = event.medium, engine_hash
                view.copies[key] = view.copies.get(key, 0) + 1
            else:
                blocks[engine_hash] = name
                holders.add(name, bit)
        self._size += len(blocks) - before

    def _names(self, view: View, event: BlocksStored) -> Iterable[int | None]:
        """The blocks' names; None for those that cannot be named."""
        if not event.contents:  # offloaded: told by the hash alone, but known from the GPU
            return map(view.name_of, event.hashes)
        before = event.root if event.parent is None else view.name_of(event.parent)
        if before is None:
            return repeat(None, len(event.hashes))
        return islice(accumulate(event.contents, name_after, initial=before), 1, None)

    def _remove(self, view: View, event: BlocksRemoved) -> None:
        blocks, holders = view.media[event.medium], self._holders[event.medium]
        bit = 1 << view.slot
        for engine_hash in event.hashes:
            copies = view.copies.pop((event.medium, engine_hash), 0) if view.copies else 0
            if copies > 1:
                view.copies[event.medium, engine_hash] = copies - 1
            if copies:
                continue
            name = blocks.pop(engine_hash, None)
            if name is None:
                self.strangers += 1
            else:
                holders.drop(name, bit)
                self._size -= 1

    # What is forgotten.

    def _empty(self, view: View) -> None:
        self._size -= len(view)
        for blocks, holders in zip(view.media, self._holders, strict=True):
            for name in blocks.values():
                holders.drop(name, 1 << view.slot)
            blocks.clear()
        view.copies.clear()
        view.roots.clear()

    def _shrink(self, view: View) -> None:
        """Forget the oldest blocks of the medium of which there are most."""
        medium = max(Medium, key=lambda m: len(view.media[m]))
        blocks = view.media[medium]
        view.whole = False
        for engine_hash in list(islice(blocks, len(blocks) // FORGOTTEN_SHARE + 1)):
            self._holders[medium].drop(blocks.pop(engine_hash), 1 << view.slot)
            view.copies.pop((medium, engine_hash), None)
            self._size -= 1

    def _slot(self, place: int) -> int:
        if None in self._places:
            slot = self._places.index(None)
            self._places[slot] = place
            return slot
        self._places.append(place)
        return len(self._places) - 1


def _union(sets: Iterable[int]) -> int:
    union = 0
    for bits in sets:
        union |= bits
    return union
