"""What did an engine tell of the blocks in its KV cache?

A block has a name that is ours: a hash of all text up to its end. Engines have hashes of their own,
which are opaque and may differ between two engines with the same text. So a block is told by both:
by the engine's hash, for what is told of it later, and by the hash of its own tokens, from which
the kernel chains the name. The tokens themselves stay with whoever heard them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum, IntEnum
from functools import lru_cache

import msgspec
import xxhash

NAME_BITS = 60
"""Of names and hashes: what Python keeps in 32 bytes. Two of a million blocks get the same name
with a chance of 1 in 2 million, and then a prefix is believed to be longer than it is, no more."""
_MASK = (1 << NAME_BITS) - 1
_FACTOR = 0x9E37_79B9_7F4A_7C15 & _MASK
"""Odd, with bits all over: a chain is a polynomial of hashes, in which their order counts."""


class Medium(IntEnum):
    """Where a block is kept, the fastest first."""

    GPU = 0
    CPU = 1
    DISK = 2
    """Or anything slower than the engine's own memory: a shared store too."""


class BlocksStored(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Blocks of one text, each after the one before, are cached."""

    hashes: Sequence[int]
    """The engine's, cut to `NAME_BITS`."""
    contents: Sequence[int]
    """Of each block its own tokens' hash; none where the engine did not tell the tokens."""
    parent: int | None = None
    """The engine's hash of the block before the first one."""
    root: int = 0
    """Without a parent: the name before the first block (`root_name`)."""
    medium: Medium = Medium.GPU
    size: int = 0
    """Tokens in a block; 0: not told."""


class BlocksRemoved(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Blocks have been given up. Where an engine had several copies, one of each."""

    hashes: Sequence[int]
    medium: Medium = Medium.GPU


class BlocksCleared(msgspec.Struct, frozen=True, tag=True):
    """Nothing is cached any more."""


BlockEvent = BlocksStored | BlocksRemoved | BlocksCleared


class BlocksChanged(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """What an engine's cache did, in order, with nothing missing since the last."""

    worker_id: str
    events: Sequence[BlockEvent]
    rank: int = 0
    """Of data-parallel replicas behind one URL; each has a cache of its own."""
    unreadable: int = 0
    """Events beside these that nobody understood."""


class BlocksUnknown(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """What was known of an engine's cache is void; what is told from now on is all there is."""

    worker_id: str
    because: str
    rank: int = 0
    whole: bool = False
    """The cache is empty, so that nothing of it will be missed."""


class BlockForm(msgspec.Struct, frozen=True, order=True):
    """What makes the blocks of one prompt differ from engine to engine."""

    size: int
    """Tokens in a block."""
    lora: str = ""
    """The adapter that the prompt is for, by its name at the engine; empty: the model itself."""


class TokenBlocks(msgspec.Struct, frozen=True, omit_defaults=True):
    """The names of a prompt's whole blocks, for engines with blocks of this size."""

    size: int
    """Tokens in a block."""
    names: Sequence[int]

    def reusable(self, prompt_tokens: int) -> Sequence[int]:
        """Those that a cache can serve: engines compute at least the last token, and only whole
        blocks are shared (vLLM's `get_computed_blocks`)."""
        return self.names[: max(prompt_tokens - 1, 0) // self.size]


class PromptTokens(msgspec.Struct, frozen=True):
    """What is known of a prompt once it is tokenised."""

    count: int
    blocks: tuple[TokenBlocks, ...]
    """Named in each form that engines have for them."""


# Names.


@lru_cache(maxsize=4096)
def root_name(size: int, lora: str = "") -> int:
    """The name of no text yet: blocks of another size or adapter share nothing with these."""
    return xxhash.xxh3_64_intdigest(f"{size} {lora}".encode()) & _MASK


def name_after(parent: int, content: int) -> int:
    """The name of a block with this content after the text of that name."""
    return (parent * _FACTOR + content) & _MASK


def contents(tokens: Sequence[int], size: int, seeds: Mapping[int, int] | None = None) -> list[int]:
    """The hash of each whole block's tokens, with a seed where not tokens alone make the block.

    OverflowError if something is not a token id.
    """
    digest, ids = xxhash.xxh3_64_intdigest, array("I", tokens)
    if len(ids) == size and not seeds:  # a stream's next block: most events are of one
        return [digest(ids) & _MASK]
    data, step = ids.tobytes(), 4 * size
    starts = range(0, len(data) - step + 1, step)
    if not seeds:
        return [digest(data[i : i + step]) & _MASK for i in starts]
    return [
        digest(data[i : i + step], seeds.get(block, 0)) & _MASK for block, i in enumerate(starts)
    ]


def seed(*parts: object) -> int:
    """What makes blocks differ whose tokens are the same: a salt, the image behind placeholders."""
    return xxhash.xxh3_64_intdigest(repr(parts).encode())


def named_blocks(
    tokens: Sequence[int], forms: Iterable[BlockForm], salt: str = ""
) -> tuple[TokenBlocks, ...]:
    """The blocks of a prompt in each of these forms of which it fills at least one."""
    fits = (form for form in forms if form.size <= len(tokens))
    return tuple(token_blocks(tokens, form.size, form.lora, salt) for form in fits)


def token_blocks(tokens: Sequence[int], size: int, lora: str = "", salt: str = "") -> TokenBlocks:
    """The blocks of a prompt as they will be found in caches."""
    name, names = root_name(size, lora), []
    for content in contents(tokens, size, {0: seed(salt)} if salt else None):
        name = name_after(name, content)
        names.append(name)
    return TokenBlocks(size, tuple(names))


def short(engine_hash: int | bytes) -> int:
    """An engine's hash as we keep it."""
    if isinstance(engine_hash, bytes):
        engine_hash = int.from_bytes(engine_hash[-8:], "big")
    return engine_hash & _MASK


# Order.


class Follows(Enum):
    """How a batch of events stands to the last one known."""

    NEXT = "next"
    REPEATED = "repeated"
    """It is known already: it came by replay too."""
    GAP = "gap"
    """Others are missing before it."""
    RESTARTED = "restarted"
    """The engine counts anew: whatever it had is gone."""


class Position(msgspec.Struct, frozen=True, gc=False):
    """The last batch known of one engine: how far its story is told."""

    number: int = -1
    """Batches are numbered from 0; -1: none is known yet."""
    at: float = 0.0
    """When the engine made it, by the engine's clock."""

    def followed_by(self, number: int, at: float) -> Follows:
        """How does the batch of that number and time stand to this one?

        A number that was there already is a repetition if its time was too, and else is another's.
        """
        if number <= self.number:
            known = at <= self.at if number < self.number else at == self.at
            return Follows.REPEATED if known else Follows.RESTARTED
        return Follows.NEXT if number == self.number + 1 else Follows.GAP
