"""Is the same understood of what vLLM and SGLang, new and old, say of their caches?

`recordings/kv_events.json` has frames in hexadecimal: from vLLM 0.32 on a CPU, and from the event
classes of two SGLang releases, of which the older one speaks in arrays.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    token_blocks,
)
from paceline.engines.kvevents import Batch, Decoder
from paceline.kernel.blocks import BlockIndex

RECORDED: dict[str, list[list[str]]] = msgspec.json.decode(
    Path(__file__).with_name("recordings").joinpath("kv_events.json").read_bytes()
)
TEXT = list(range(100, 164))


def batches(engine: str) -> list[Batch]:
    decoder = Decoder()
    decoded = [decoder.decode(bytes.fromhex(payload)) for _, _, payload in RECORDED[engine]]
    assert decoder.unreadable == 0
    return decoded


def depths(told: list[Batch], tokens: list[int], size: int, **others: str) -> dict[int, int]:
    index = BlockIndex()
    for batch in told:
        index.change(0, batch.events)
    return index.depths(token_blocks(tokens, size, **others).names)


def decode(*events: Any) -> tuple[list[BlockEvent], int]:
    """What is understood of these events, and how many were not."""
    batch = Decoder().decode(msgspec.msgpack.encode([1.0, events, 0]))
    return list(batch.events), batch.unreadable


def stored(**fields: Any) -> dict[str, Any]:
    event = {"type": "BlockStored", "block_hashes": [1], "parent_block_hash": None}
    return {**event, "token_ids": [7, 8], "block_size": 2, "medium": "GPU", **fields}


def test_vllm_in_maps() -> None:
    told = batches("vllm 0.32.0")
    assert [batch.at for batch in told] == sorted(batch.at for batch in told)
    prompt = list(range(100, 140))
    assert depths(told[:1], prompt, 32) == {0: 1}
    assert depths(told[:1], prompt, 32, salt="s") == {}
    assert depths(told[:2], prompt, 32, salt="s") == {0: 1}
    assert depths(told[:3], list(range(500)), 32) == {0: 15}
    assert depths(told[:4], prompt, 32) == {}
    assert depths(told[:4], list(range(500)), 32)[0] < 15
    assert depths(told, prompt, 32) == {0: 1}
    assert depths(told, list(range(500)), 32) == {}


@pytest.mark.parametrize("engine", ["sglang 0.5.2", "sglang 0.5.23"])
def test_sglang_in_arrays_and_in_maps(engine: str) -> None:
    told = batches(engine)
    assert depths(told[:1], TEXT, 16) == {0: 3}
    assert depths(told[:2], TEXT, 16) == {0: 2}
    assert (
        depths(told, TEXT, 16)[0] == 1 if engine == "sglang 0.5.2" else not depths(told, TEXT, 16)
    )


def test_sglangs_salts_adapters_and_host_memory_are_kept_apart() -> None:
    told = batches("sglang 0.5.23")
    assert depths(told[:2], TEXT, 16, salt="pepper") == {0: 1}
    assert depths(told[:2], TEXT, 16, lora="poet") == {0: 1}
    assert [event.medium for event in told[0].events if isinstance(event, BlocksStored)] == [
        Medium.GPU,
        Medium.GPU,
        Medium.CPU,
    ]


def test_what_is_new_in_an_event_is_passed_over() -> None:
    events, unreadable = decode(stored(colour="red", token_ids=[7, 8, 9, 10], block_hashes=[1, 2]))
    assert events == [BlocksStored([1, 2], contents([7, 8, 9, 10], 2), None, root_name(2), size=2)]
    assert unreadable == 0


@pytest.mark.parametrize(
    "strange",
    [
        {"type": "BlockMoved", "block_hashes": [1]},
        {"type": "BlockStored"},
        ["BlockStored"],
        ["BlockMoved", [1]],
        {"no": "type"},
        17,
        stored(token_ids=[[7, 8], [8, 9]]),  # SGLang's pairs, for EAGLE
        stored(token_ids=[7, -1]),
        stored(block_hashes=[1, 2]),
        stored(kv_cache_spec_kind="sliding_window", group_idx=0),
    ],
)
def test_an_event_that_nobody_understands_costs_only_itself(strange: Any) -> None:
    assert decode(strange, {"type": "AllBlocksCleared"}) == ([BlocksCleared()], 1)


def test_both_forms_in_one_batch_are_read() -> None:
    array = ["BlockStored", [1], None, [7, 8], 2, None]
    assert decode(array, stored(), ["BlockRemoved", [1]]) == (
        [
            BlocksStored([1], contents([7, 8], 2), None, root_name(2), size=2),
            BlocksStored([1], contents([7, 8], 2), None, root_name(2), size=2),
            BlocksRemoved([1]),
        ],
        0,
    )


def test_of_several_groups_of_layers_one_with_full_attention_counts() -> None:
    window = {"group_idx": 0, "kv_cache_spec_kind": "sliding_window"}
    full = {"group_idx": 1, "kv_cache_spec_kind": "full_attention"}
    more = {"group_idx": 2, "kv_cache_spec_kind": "full_attention"}
    removed = {"type": "BlockRemoved", "block_hashes": [1], "group_idx": 0}
    events, unreadable = decode(
        stored(**window), stored(**full), stored(**more), removed, {**removed, "group_idx": 1}
    )
    assert [type(event) for event in events] == [BlocksStored, BlocksRemoved]
    assert unreadable == 0


def test_images_and_salts_make_other_blocks_and_an_adapters_name_does_not() -> None:
    (event,), _ = decode(
        stored(
            block_hashes=[1, 2, 3],
            token_ids=[7, 8] * 3,
            lora_name="poet",
            extra_keys=[["poet", "salt"], ["poet"], ["poet", ["image", 3]]],
        )
    )
    assert isinstance(event, BlocksStored)
    plain = contents([7, 8], 2)
    salted = contents([7, 8], 2, {0: seed("salt")})
    pictured = contents([7, 8], 2, {0: seed(["image", 3])})
    assert event.contents == salted + plain + pictured
    assert event.root == root_name(2, "poet")


def test_an_offloaded_block_may_be_told_without_its_tokens() -> None:
    (event,), unreadable = decode(stored(token_ids=[], block_size=0, medium="CPU"))
    assert event == BlocksStored([1], [], None, root_name(0), Medium.CPU)
    assert unreadable == 0


def test_hashes_may_be_bytes_and_media_have_many_names() -> None:
    digest = bytes(range(32))
    (event, removed), _ = decode(
        stored(block_hashes=[digest], medium="EXTERNAL"),
        {"type": "BlockRemoved", "block_hashes": [digest], "medium": "CPU_PINNED"},
    )
    assert event.hashes == removed.hashes == [short(digest)]  # type: ignore[union-attr]
    assert (event.medium, removed.medium) == (Medium.DISK, Medium.CPU)  # type: ignore[union-attr]


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(payload: bytes) -> None:
    with suppress(msgspec.MsgspecError):
        Decoder().decode(payload)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
fields = st.fixed_dictionaries(
    {"type": st.sampled_from(["BlockStored", "BlockRemoved", "AllBlocksCleared", "else"])},
    optional=dict.fromkeys(
        ("block_hashes", "parent_block_hash", "token_ids", "block_size", "extra_keys"), values
    ),
)


@given(st.lists(fields | values, max_size=4))
def test_whatever_an_event_holds_the_others_are_read(events: list[Any]) -> None:
    good = {"type": "AllBlocksCleared"}
    found, _ = decode(*events, good)
    assert found[-1] == BlocksCleared()
