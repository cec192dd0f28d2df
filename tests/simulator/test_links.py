from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.simulator.links import Fabric, Link

KV_2K_TOKENS = 2048 * 320 * 1024
"""Bytes of the KV cache of 2,048 tokens of a 70B model."""
GB = 1e9


def arrivals(link: Link | Fabric) -> list[tuple[str, float]]:
    """Who arrives when, if nothing more is sent."""
    arrived: list[tuple[str, float]] = []
    while (at := link.next_done()[0]) < inf:
        arrived += [(transfer, at) for transfer in link.finish(at)]
    return arrived


@pytest.mark.parametrize(("bytes_per_s", "ms"), [(50 * GB, 13.4), (3 * GB, 223.7)])
def test_a_kv_cache_takes_its_size_over_the_bandwidth(bytes_per_s: float, ms: float) -> None:
    link = Link(latency_s=0.0, bytes_per_s=bytes_per_s)
    link.start(1.0, "kv", KV_2K_TOKENS)
    assert dict(arrivals(link)) == pytest.approx({"kv": 1 + ms / 1e3}, abs=1e-4)


def test_two_at_once_take_twice_as_long() -> None:
    link = Link(latency_s=0.0, bytes_per_s=50 * GB)
    link.start(0.0, "a", KV_2K_TOKENS)
    link.start(0.0, "b", KV_2K_TOKENS)
    assert dict(arrivals(link)) == pytest.approx({"a": 0.02684, "b": 0.02684}, rel=1e-3)


def test_a_late_one_slows_the_first_and_gets_the_whole_link_after_it() -> None:
    link = Link(latency_s=0.0, bytes_per_s=1.0)
    link.start(0.0, "first", 4.0)
    assert link.next_done() == (4.0, "first")
    link.start(2.0, "late", 4.0)
    assert link.next_done() == (6.0, "first")
    assert arrivals(link) == [("first", 6.0), ("late", 8.0)]


def test_latency_delays_but_takes_no_bandwidth() -> None:
    link = Link(latency_s=10.0, bytes_per_s=1.0)
    link.start(0.0, "a", 1.0)
    link.start(5.0, "b", 1.0)
    assert link.finish(10.9) == []
    assert arrivals(link) == [("a", 11.0), ("b", 16.0)]


def test_a_link_without_limit_takes_only_its_latency() -> None:
    link = Link(latency_s=0.5, bytes_per_s=inf)
    for i in range(3):
        link.start(float(i), str(i), 1e12)
    assert arrivals(link) == [("0", 0.5), ("1", 1.5), ("2", 2.5)]


def test_what_is_dropped_leaves_its_share_to_the_others() -> None:
    link = Link(latency_s=1.0, bytes_per_s=1.0)
    link.start(0.0, "flies", 0.0)
    link.start(0.0, "stays", 4.0)
    link.start(0.0, "goes", 9.0)
    link.drop(0.5, "flies")
    link.drop(2.0, "goes")
    assert arrivals(link) == [("stays", 6.0)]


def test_nothing_on_its_way_arrives_never() -> None:
    assert Link(0.0, 1.0).next_done() == (inf, "")
    assert Fabric(0.0, {}).next_done() == (inf, "")


def test_between_two_nodes_the_slower_fair_share_counts() -> None:
    fabric = Fabric(0.0, {"p0": 10.0, "p1": 10.0, "d0": 10.0, "d1": 4.0})
    fabric.start(0.0, "a", 40.0, "p0", "d1")  # 4 a second: d1 is slow.
    fabric.start(0.0, "b", 57.0, "p0", "d0")  # 5, then 6: what a leaves, and not half of p0.
    fabric.start(0.0, "c", 15.0, "p1", "d0")  # 5: half of d0.
    assert arrivals(fabric) == [("c", 3.0), ("a", 10.0), ("b", 10.0)]


def test_a_node_sends_and_receives_at_once() -> None:
    fabric = Fabric(0.0, {"x": 1.0, "y": 1.0})
    fabric.start(0.0, "there", 2.0, "x", "y")
    fabric.start(0.0, "back", 2.0, "y", "x")
    assert arrivals(fabric) == [("back", 2.0), ("there", 2.0)]


def test_a_fabric_without_limit_takes_only_its_latency() -> None:
    fabric = Fabric(0.5, {"x": inf, "y": inf, "z": 1.0})
    fabric.start(0.0, "a", 1e12, "x", "y")
    fabric.start(0.0, "b", 2.0, "x", "z")
    assert arrivals(fabric) == [("a", 0.5), ("b", 2.5)]


Transfers = st.lists(st.tuples(st.floats(0, 100), st.floats(0, 50)), min_size=1, max_size=12)
"""When each starts, and its size."""


def played(link: Link | Fabric, transfers: list[tuple[float, float]]) -> dict[str, float]:
    """When each arrives."""
    arrived: dict[str, float] = {}
    for i, (start_at, size) in enumerate(sorted(transfers)):
        while (at := link.next_done()[0]) <= start_at:
            arrived |= dict.fromkeys(link.finish(at), at)
        if isinstance(link, Link):
            link.start(start_at, str(i), size)
        else:
            link.start(start_at, str(i), size, f"sender {i}", "receiver")
    return arrived | dict(arrivals(link))


@given(Transfers)
def test_bandwidth_is_never_idle_while_something_is_to_send(
    transfers: list[tuple[float, float]],
) -> None:
    """The last byte leaves when a queue of one server with the same work would be empty."""
    busy_until = 0.0
    for start_at, size in sorted(transfers):
        busy_until = max(busy_until, start_at) + size / 2.0
    arrived = played(Link(0.0, 2.0), transfers)
    assert len(arrived) == len(transfers)
    assert max(arrived.values()) == pytest.approx(busy_until)


@given(Transfers)
def test_no_transfer_is_faster_than_alone_nor_slower_than_with_all_others(
    transfers: list[tuple[float, float]],
) -> None:
    arrived = played(Link(0.1, 2.0), transfers)
    for i, (start_at, size) in enumerate(sorted(transfers)):
        took_s = arrived[str(i)] - start_at
        assert 0.1 + size / 2 <= took_s + 1e-9
        assert took_s <= 0.1 + size / 2 * len(transfers) + 1e-9


@given(Transfers)
def test_one_bottleneck_in_a_fabric_is_a_link(transfers: list[tuple[float, float]]) -> None:
    nodes = {"receiver": 2.0} | {f"sender {i}": 100.0 for i in range(len(transfers))}
    fabric, link = played(Fabric(0.1, nodes), transfers), played(Link(0.1, 2.0), transfers)
    assert fabric == pytest.approx(link)
