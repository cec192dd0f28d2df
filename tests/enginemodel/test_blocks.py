"""Does the block pool share prefixes and never hold more than it has?"""

from hypothesis import given
from hypothesis import strategies as st

from paceline.enginemodel import BlockPool


def filled(pool: BlockPool, names: list[int]) -> None:
    """As a request does that computes a prompt and is done."""
    hits = names[: pool.known(names)]
    pool.hold(hits)
    pool.take(len(names) - len(hits))
    held = hits + [name for name in names[len(hits) :] if pool.name(name)]
    pool.drop(held, len(names) - len(held))


def test_a_prefix_that_nobody_holds_can_still_be_found() -> None:
    pool = BlockPool(8)
    filled(pool, [1, 2, 3])
    assert pool.used == 0
    assert pool.known([1, 2, 9]) == 2


def test_the_longest_unused_prefix_is_evicted_first_and_from_its_end() -> None:
    pool = BlockPool(6)
    filled(pool, [1, 2, 3])
    filled(pool, [4, 5, 6])
    pool.take(2)
    assert pool.known([1, 2, 3]) == 1
    assert pool.known([4, 5, 6]) == 3


def test_a_shared_block_stays_until_its_last_holder_leaves() -> None:
    pool = BlockPool(4)
    filled(pool, [1])
    pool.hold([1])
    pool.hold([1])
    pool.drop([1], 0)
    assert pool.used == 1
    pool.take(3)
    assert pool.known([1]) == 1


def test_two_that_compute_the_same_block_at_once_hold_twins() -> None:
    pool = BlockPool(4)
    pool.take(2)
    assert pool.name(7)
    assert not pool.name(7)
    assert pool.used == 2


@given(st.lists(st.lists(st.integers(0, 12), unique=True, max_size=6), max_size=40))
def test_the_pool_never_overflows_and_ends_empty(prompts: list[list[int]]) -> None:
    pool = BlockPool(8)
    for names in prompts:
        filled(pool, names)
        assert pool.used == 0
        assert pool.cached <= pool.blocks
