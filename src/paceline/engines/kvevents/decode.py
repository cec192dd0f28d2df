"""What does a batch of KV events say?

msgpack `[time, [event, …], rank]`, the same from vLLM and SGLang. Events are maps tagged `type`;
in older releases they were arrays that begin with it. What they say more than is needed here is
passed over, and an event that nobody here knows is counted and costs only itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Raw

from paceline.domain.kvevents import (
    BlockEvent,
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    Medium,
    contents,
    root_name,
    seed,
    short,
)

FULL_ATTENTION = (None, "full_attention", "mla_attention", "sink_full_attention")
"""Layers whose cache must hold the whole prefix. Hybrid models have others beside them, told as
groups of their own under the same hashes."""
REMOTE = "REMOTE"
SLOW = Medium.DISK
MEDIA = {"GPU": Medium.GPU, "CPU": Medium.CPU, "CPU_PINNED": Medium.CPU}
"""All others (STORAGE, DISK, EXTERNAL) are slow."""


class _Stored(msgspec.Struct, gc=False):
    """Fields in the order that they have as an array."""

    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: list[int]
    block_size: Annotated[int, msgspec.Meta(ge=0)]
    lora_id: Any = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    cache_salt: str | None = None
    """SGLang's, and only in maps."""


class _Removed(msgspec.Struct, gc=False):
    block_hashes: list[int | bytes]
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None


class _Cleared(msgspec.Struct, gc=False):
    pass


class _StoredMap(_Stored, tag="BlockStored"):
    pass


class _StoredArray(_Stored, tag="BlockStored", array_like=True):
    pass


class _RemovedMap(_Removed, tag="BlockRemoved"):
    pass


class _RemovedArray(_Removed, tag="BlockRemoved", array_like=True):
    pass


class _ClearedMap(_Cleared, tag="AllBlocksCleared"):
    pass


class _ClearedArray(_Cleared, tag="AllBlocksCleared", array_like=True):
    pass


_Event = _Stored | _Removed | _Cleared
_EventMap = _StoredMap | _RemovedMap | _ClearedMap
_EventArray = _StoredArray | _RemovedArray | _ClearedArray


class _Maps(msgspec.Struct, array_like=True, gc=False):
    at: float
    events: list[_EventMap]


class _Arrays(msgspec.Struct, array_like=True, gc=False):
    at: float
    events: list[_EventArray]


class _Any(msgspec.Struct, array_like=True, gc=False):
    at: float
    events: list[Raw]


_maps = msgspec.msgpack.Decoder(_Maps)
_arrays = msgspec.msgpack.Decoder(_Arrays)
_any = msgspec.msgpack.Decoder(_Any)
_map: msgspec.msgpack.Decoder[_Event] = msgspec.msgpack.Decoder(_EventMap)
_array: msgspec.msgpack.Decoder[_Event] = msgspec.msgpack.Decoder(_EventArray)


class Batch(msgspec.Struct, frozen=True, gc=False):
    """What an engine told at once."""

    at: float
    """By the engine's clock, Unix time."""
    events: Sequence[BlockEvent] = ()
    unreadable: int = 0
    """Events of an unknown type or form: what they told is missing."""


class Decoder:
    """For the batches of one engine."""

    def __init__(self) -> None:
        self.unreadable = 0
        self._group: int | None = None
        self._chosen = False
        """The group of layers that is followed is known."""
        self._form: msgspec.msgpack.Decoder[_Maps] | msgspec.msgpack.Decoder[_Arrays] = _maps
        """The form that this engine was found to speak."""

    def decode(self, payload: bytes) -> Batch:
        """What it says. msgspec.MsgspecError if it is no batch at all."""
        before = self.unreadable
        told: _Maps | _Arrays
        events: Sequence[_Event]
        try:
            told = self._form.decode(payload)
            at, events = told.at, told.events
        except msgspec.ValidationError:
            at, events = self._one_by_one(payload)
        if not self._chosen:
            self._choose(events)
        read = [found for event in events if (found := self._read(event)) is not None]
        return Batch(at, read, self.unreadable - before)

    def _one_by_one(self, payload: bytes) -> tuple[float, list[_Event]]:
        """Something in it is not as expected: find out what can be read."""
        batch, events = _any.decode(payload), []
        for raw in batch.events:
            for form, decoder in ((_maps, _map), (_arrays, _array)):
                try:
                    events.append(decoder.decode(raw))
                except msgspec.ValidationError:
                    continue
                self._form = form
                break
            else:
                self.unreadable += 1
        return batch.at, events

    def _choose(self, events: Sequence[_Event]) -> None:
        """Of several groups of layers one with full attention tells for all."""
        for event in events:
            if isinstance(event, _Stored) and event.kv_cache_spec_kind in FULL_ATTENTION:
                self._group, self._chosen = event.group_idx, True
                return

    def _read(self, event: _Event) -> BlockEvent | None:
        if isinstance(event, _Stored):
            if self._chosen:
                return self._stored(event) if event.group_idx == self._group else None
            self.unreadable += 1  # its cache is of a kind whose blocks do not tell of hits
            return None
        if isinstance(event, _Removed):
            if event.group_idx != self._group:
                return None
            return BlocksRemoved([short(h) for h in event.block_hashes], _medium(event))
        return BlocksCleared()

    def _stored(self, event: _Stored) -> BlocksStored | None:
        lora = event.lora_name or ("" if event.lora_id is None else str(event.lora_id))
        try:
            found = contents(event.token_ids, event.block_size or 1, _seeds(event, lora))
        except OverflowError:
            found = []
        if len(found) != len(event.block_hashes) and (found or event.token_ids):
            self.unreadable += 1
            return None
        parent = event.parent_block_hash
        return BlocksStored(
            [short(h) for h in event.block_hashes],
            found,
            None if parent is None else short(parent),
            root_name(event.block_size, lora) if parent is None else 0,
            _medium(event),
            event.block_size,
        )


def _medium(event: _Stored | _Removed) -> Medium:
    if event.locality == REMOTE:
        return SLOW
    return MEDIA.get(event.medium or "GPU", SLOW)


def _seeds(event: _Stored, lora: str) -> dict[int, int] | None:
    """Of blocks that differ though their tokens are the same: the salt, or an image in them."""
    if event.extra_keys and any(event.extra_keys):
        rest = {
            block: [key for key in keys if key != lora]
            for block, keys in enumerate(event.extra_keys)
            if keys
        }
        return {block: seed(*keys) for block, keys in rest.items() if keys}
    if event.cache_salt and event.parent_block_hash is None:
        return {0: seed(event.cache_salt)}
    return None
