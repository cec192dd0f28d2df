from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from paceline.kernel.prefix import PrefixIndex


def index(workers: int = 3, capacity: int = 100) -> PrefixIndex:
    made = PrefixIndex()
    for slot in range(workers):
        made.add(slot, capacity)
    return made


def test_each_worker_holds_as_much_as_it_was_sent() -> None:
    prefixes = index()
    prefixes.insert(0, [1, 2, 3, 4])
    prefixes.insert(1, [1, 2, 9])
    assert prefixes.depths([1, 2, 3, 5]) == {0: 3, 1: 2}
    assert prefixes.depths([1, 2, 3, 4]) == {0: 4, 1: 2}
    assert prefixes.depths([7]) == {}
    assert prefixes.depths([]) == {}


def test_the_end_of_the_oldest_prompt_is_forgotten_first() -> None:
    prefixes = index(1, capacity=4)
    prefixes.insert(0, [1, 2, 3])
    prefixes.insert(0, [10, 20])
    assert prefixes.depths([1, 2, 3]) == {0: 2}
    assert prefixes.depths([10, 20]) == {0: 2}
    assert len(prefixes) == 4


def test_a_worker_that_has_restarted_holds_nothing() -> None:
    prefixes = index(2)
    prefixes.insert(0, [1, 2])
    prefixes.insert(1, [1])
    prefixes.remove(0)
    assert prefixes.depths([1, 2]) == {1: 1}
    prefixes.add(0)
    assert prefixes.depths([1, 2]) == {1: 1}


chains = st.lists(st.integers(0, 3), max_size=6).map(
    lambda path: [hash(tuple(path[: i + 1])) for i in range(len(path))]
)


@given(st.lists(st.tuples(st.integers(0, 2), chains), max_size=30), chains)
def test_depths_are_those_of_a_naive_search(
    sent: list[tuple[int, list[int]]], asked: list[int]
) -> None:
    prefixes = index(capacity=1000)
    held: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    for slot, chain in sent:
        prefixes.insert(slot, chain)
        held[slot].update(chain)
    expected = {}
    for slot, blocks in held.items():
        depth = next((i for i, b in enumerate(asked) if b not in blocks), len(asked))
        if depth:
            expected[slot] = depth
    assert prefixes.depths(asked) == expected


@given(st.lists(st.tuples(st.integers(0, 2), chains), max_size=60))
def test_memory_is_bounded(sent: list[tuple[int, list[int]]]) -> None:
    prefixes = index(capacity=5)
    for slot, chain in sent:
        prefixes.insert(slot, chain)
    assert len(prefixes) <= 15
