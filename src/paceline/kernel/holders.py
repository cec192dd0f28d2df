"""Who has how much of a prompt? Blocks, each with the set of those who have it."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Holders(dict[int, int]):
    """Of each block that anybody has, the holders: a bit each in one number."""

    def add(self, block: int, bit: int) -> None:
        held = self.get(block)
        # A block that one alone has, as most are, takes no number of its own.
        self[block] = held | bit if held else bit

    def drop(self, block: int, bit: int) -> None:
        held = self.get(block)
        if held is None:
            return
        left = held & ~bit
        if left:
            self[block] = left
        else:
            del self[block]


def depths(blocks: Sequence[int], held: Callable[[int], int | None]) -> dict[int, int]:
    """How many leading blocks each holder has, by bit; those who have none are left out."""
    found: dict[int, int] = {}
    left = (held(blocks[0]) or 0) if blocks else 0
    if not left:
        return found
    depth = 0
    for depth, bits in enumerate(map(held, blocks)):
        if bits == left:
            continue
        still = (bits or 0) & left
        if still != left:
            _each(left & ~still, depth, found)
            if not still:
                return found
            left = still
    _each(left, depth + 1, found)
    return found


def _each(bits: int, depth: int, found: dict[int, int]) -> None:
    while bits:
        low = bits & -bits
        found[low.bit_length() - 1] = depth
        bits ^= low
