"""Does the index say what the engines have, whatever they tell, and in bounded memory?"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paceline.domain.kvevents import (
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    Medium,
    TokenBlocks,
    contents,
    root_name,
    token_blocks,
)
from paceline.kernel.blocks import BlockIndex

SIZE = 2
ROOT = root_name(SIZE)
GPU, CPU, DISK = Medium


class Engine:
    """Tells what it stores, by hashes of its own."""

    def __init__(self, hash_seed: int = 0) -> None:
        self.hash_seed = hash_seed

    def hashes(self, tokens: list[int]) -> list[int]:
        ends = range(SIZE, len(tokens) + 1, SIZE)
        return [hash((self.hash_seed, *tokens[:end])) & 0xFFFF_FFFF for end in ends]

    def stored(
        self, tokens: list[int], first: int = 0, medium: Medium = GPU, root: int = ROOT
    ) -> BlocksStored:
        """The blocks of a text from its `first` on."""
        hashes = self.hashes(tokens)
        parent = hashes[first - 1] if first else None
        return BlocksStored(hashes[first:], contents(tokens, SIZE)[first:], parent, root, medium)

    def removed(self, tokens: list[int], block: int, medium: Medium = GPU) -> BlocksRemoved:
        return BlocksRemoved([self.hashes(tokens)[block]], medium)


TEXT = [1, 2, 3, 4, 5, 6, 7, 8]
OTHER = [1, 2, 3, 4, 9, 9]


def names(tokens: list[int]) -> list[int]:
    return list(token_blocks(tokens, SIZE).names)


def test_engines_with_different_hashes_share_one_index() -> None:
    index = BlockIndex()
    for place in range(3):
        index.begin(place, whole=True)
        index.change(place, [Engine(place).stored(TEXT[: 2 * (place + 1)])])
    assert index.depths(names(TEXT)) == {0: 1, 1: 2, 2: 3}
    assert index.depths(names(OTHER)) == {0: 1, 1: 2, 2: 2}
    index.change(2, [Engine(2).removed(TEXT, 1)])
    assert index.depths(names(TEXT)) == {0: 1, 1: 2, 2: 1}


def test_a_text_told_in_pieces_is_one_chain() -> None:
    index, engine = BlockIndex(), Engine()
    index.change(0, [engine.stored(TEXT[:4]), engine.stored(TEXT, first=2)])
    assert index.depths(names(TEXT)) == {0: 4}


def test_the_same_tokens_for_another_adapter_or_of_another_size_are_other_blocks() -> None:
    index, engine = BlockIndex(), Engine()
    index.change(0, [engine.stored(TEXT, root=root_name(SIZE, "lora"))])
    assert index.depths(names(TEXT)) == {}
    assert index.depths(token_blocks(TEXT, SIZE, "lora").names) == {0: 4}
    assert index.depths(token_blocks(TEXT, 4, "lora").names) == {}


def test_a_copy_given_up_leaves_the_other() -> None:
    index, engine = BlockIndex(), Engine()
    index.change(0, [engine.stored(TEXT), engine.stored(TEXT), engine.removed(TEXT, 0)])
    assert index.depths(names(TEXT)) == {0: 4}
    index.change(0, [engine.removed(TEXT, 0)])
    assert index.depths(names(TEXT)) == {}
    assert len(index) == 3


def test_blocks_whose_beginning_is_unknown_are_left_out_and_counted() -> None:
    index, engine = BlockIndex(), Engine()
    index.begin(0, whole=True)
    index.change(0, [engine.stored(TEXT, first=2), engine.removed(TEXT, 3)])
    assert (len(index), index.orphans, index.strangers) == (0, 2, 1)
    assert not index.follows(0)


def test_a_restart_forgets_one_worker_and_no_other() -> None:
    index = BlockIndex()
    for place in range(2):
        index.change(place, [Engine(place).stored(TEXT)])
    index.begin(0, whole=True)
    assert index.depths(names(TEXT)) == {1: 4}
    assert index.follows(0)


def test_a_place_that_another_worker_takes_holds_nothing() -> None:
    index, engine = BlockIndex(), Engine()
    index.change(0, [engine.stored(TEXT)])
    index.change(1, [engine.stored(OTHER)])
    index.forget(0)
    index.change(2, [engine.stored(TEXT[:4])])
    assert index.depths(names(TEXT)) == {1: 2, 2: 2}
    assert (index.size(0), len(index)) == (0, 5)


def test_only_a_story_heard_from_its_beginning_makes_guesses_needless() -> None:
    index, engine = BlockIndex(), Engine()
    assert not index.follows(0)
    index.change(0, [engine.stored(TEXT)])
    assert not index.follows(0)
    index.change(0, [BlocksCleared()])
    assert index.follows(0)
    index.change(0, [], unreadable=1)
    assert not index.follows(0)


def test_what_the_gpu_gave_up_is_found_on_slower_media() -> None:
    index, engine = BlockIndex(), Engine()
    index.change(0, [engine.stored(TEXT), engine.stored(TEXT, medium=CPU)])
    index.change(0, [engine.removed(TEXT, 2), engine.stored(TEXT[:2], medium=DISK)])
    assert index.depths(names(TEXT)) == {0: 2}
    assert index.depths(names(TEXT), CPU) == index.depths(names(TEXT), DISK) == {0: 4}


def test_an_offloaded_block_told_by_its_hash_alone_has_the_name_that_it_had() -> None:
    index, engine = BlockIndex(), Engine()
    index.change(0, [engine.stored(TEXT)])
    index.change(0, [BlocksStored(engine.hashes(TEXT), [], medium=CPU), BlocksStored([77], [])])
    index.change(0, [engine.removed(TEXT, block) for block in range(4)])
    assert index.depths(names(TEXT)) == {}
    assert index.depths(names(TEXT), CPU) == {0: 4}
    assert index.orphans == 1


def test_of_several_ranks_the_one_that_has_most_counts() -> None:
    index, engine = BlockIndex(), Engine()
    index.change(3, [engine.stored(TEXT[:2])], rank=0)
    index.change(3, [engine.stored(TEXT[:6])], rank=1)
    assert index.depths(names(TEXT)) == {3: 3}
    index.begin(3, rank=1)
    assert index.depths(names(TEXT)) == {3: 1}


def test_the_last_token_is_always_computed() -> None:
    index, engine = BlockIndex(), Engine()
    index.change(0, [engine.stored(TEXT)])
    assert index.cached_tokens(token_blocks(TEXT, SIZE), 8) == {0: 6}
    assert index.cached_tokens(token_blocks([*TEXT, 9], SIZE), 9) == {0: 8}
    assert index.cached_tokens(TokenBlocks(SIZE, ()), 1) == {}


def test_the_largest_view_forgets_its_oldest_blocks_and_is_no_longer_whole() -> None:
    index = BlockIndex(most=50)
    index.begin(0, whole=True)
    index.begin(1, whole=True)
    index.change(1, [Engine(1).stored(TEXT)])
    texts = [[text, *TEXT[1:]] for text in range(20)]
    for text in texts:
        index.change(0, [Engine().stored(text)])
        assert len(index) <= 50
    assert index.depths(names(texts[0])) == {}
    assert index.depths(names(texts[-1])) == {0: 4}
    assert index.depths(names(TEXT)) == {0: 1, 1: 4} or index.depths(names(TEXT)) == {1: 4}
    assert index.follows(1)
    assert not index.follows(0)


small = st.lists(st.integers(0, 3), max_size=4)
events = st.one_of(
    st.builds(
        BlocksStored,
        small,
        small,
        st.none() | st.integers(0, 3),
        st.just(0),
        st.sampled_from(Medium),
    ),
    st.builds(BlocksRemoved, small, st.sampled_from(Medium)),
    st.just(BlocksCleared()),
)


@given(st.lists(st.tuples(st.integers(0, 2), st.lists(events, max_size=4)), max_size=20))
def test_hashes_that_collide_do_no_harm(told: list[tuple[int, list[object]]]) -> None:
    index = BlockIndex(most=8)
    for place, batch in told:
        index.change(place, batch)  # type: ignore[arg-type]
        assert len(index) == sum(index.size(place) for place in range(3)) <= 8
    for place in range(3):
        index.forget(place)
    assert len(index) == 0
    assert not any(index._holders)


class Told(RuleBasedStateMachine):
    """The index beside engines that keep sets of texts."""

    places = 3

    @initialize()
    def start(self) -> None:
        self.index = BlockIndex()
        self.engines = [Engine(place % 2) for place in range(self.places)]
        self.cached: list[list[set[tuple[int, ...]]]] = [
            [set() for _ in Medium] for _ in range(self.places)
        ]

    texts = st.lists(st.integers(0, 1), min_size=2, max_size=10)
    place = st.integers(0, places - 1)
    media = st.sampled_from(Medium)

    @rule(place=place, tokens=texts, medium=media)
    def store(self, place: int, tokens: list[int], medium: Medium) -> None:
        tokens = tokens[: len(tokens) // SIZE * SIZE]
        cached = self.cached[place][medium]
        prefixes = [tuple(tokens[:end]) for end in range(SIZE, len(tokens) + 1, SIZE)]
        first = next((i for i, p in enumerate(prefixes) if p not in cached), len(prefixes))
        fresh = [p for p in prefixes[first:] if p not in cached]
        if len(fresh) == len(prefixes) - first and fresh:
            self.index.change(place, [self.engines[place].stored(tokens, first, medium)])
            cached.update(fresh)

    @rule(place=place, medium=media, which=st.integers(0, 99))
    def remove(self, place: int, medium: Medium, which: int) -> None:
        cached = self.cached[place][medium]
        if cached:
            text = sorted(cached)[which % len(cached)]
            block = len(text) // SIZE - 1
            self.index.change(place, [self.engines[place].removed(list(text), block, medium)])
            cached.remove(text)

    @rule(place=place)
    def clear(self, place: int) -> None:
        self.index.change(place, [BlocksCleared()])
        self.cached[place] = [set() for _ in Medium]

    @rule(place=place)
    def restart(self, place: int) -> None:
        self.index.begin(place, whole=True)
        self.cached[place] = [set() for _ in Medium]

    @rule(place=place)
    def leave(self, place: int) -> None:
        self.index.forget(place)
        self.cached[place] = [set() for _ in Medium]

    @rule(tokens=texts, medium=media)
    def ask(self, tokens: list[int], medium: Medium) -> None:
        expected = {}
        prefixes = [tuple(tokens[:end]) for end in range(SIZE, len(tokens) + 1, SIZE)]
        for place, media in enumerate(self.cached):
            have = set().union(*media[: medium + 1])
            depth = next((i for i, p in enumerate(prefixes) if p not in have), len(prefixes))
            if depth:
                expected[place] = depth
        assert self.index.depths(names(tokens), medium) == expected

    @invariant()
    @precondition(lambda self: hasattr(self, "index"))
    def counts(self) -> None:
        assert len(self.index) == sum(len(blocks) for media in self.cached for blocks in media)


TestTold = Told.TestCase
TestTold.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
