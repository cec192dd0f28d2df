"""Does a request go by what engines tell of their caches, and by a guess only where none tells?"""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st
from msgspec.json import encode

from paceline.domain.commands import Command, Dispatch
from paceline.domain.facts import Fact, RequestArrived, StreamEnded, WorkerAdded, WorkerReported
from paceline.domain.facts import WorkerRemoved as Removed
from paceline.domain.kvevents import (
    BlockForm,
    BlocksChanged,
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    BlocksUnknown,
    TokenBlocks,
    contents,
    named_blocks,
    root_name,
    token_blocks,
)
from paceline.domain.promise import Promise
from paceline.domain.request import Request
from paceline.domain.worker import Worker, WorkerReport
from paceline.kernel import Kernel, Settings
from paceline.kernel.log import line, opening, replay

SIZE = 16
TEXT = list(range(64 * SIZE))
TEXT_BLOCKS = 8
"""Of 256 bytes, in which the approximate index sees the same prompt."""


def stored(worker_id: str, tokens: list[int] = TEXT, size: int = SIZE) -> BlocksChanged:
    """The engine's hashes are its own."""
    count = len(tokens) // size
    hashes = [hash((worker_id, *tokens[: size * (i + 1)])) & 0xFFFF_FFFF for i in range(count)]
    event = BlocksStored(hashes, contents(tokens, size), None, root_name(size), size=size)
    return BlocksChanged(worker_id, [event])


def empty(worker_id: str, rank: int = 0) -> BlocksUnknown:
    return BlocksUnknown(worker_id, "its engine has started", rank, whole=True)


def request(name: str, *blocks: TokenBlocks, tokens: list[int] = TEXT) -> Request:
    return Request(
        name,
        "m",
        "acme",
        "standard",
        Promise(1.0, 0.05),
        prompt_bytes=256 * TEXT_BLOCKS,
        prompt_tokens=len(tokens),
        blocks=tuple(range(TEXT_BLOCKS)),
        token_blocks=blocks,
    )


def named(name: str, tokens: list[int] = TEXT) -> Request:
    return request(name, token_blocks(tokens, SIZE), tokens=tokens)


class Fleet:
    """A kernel, and all that it was told."""

    def __init__(self, count: int = 3) -> None:
        self.kernel = Kernel(Settings())
        self.log = [opening(self.kernel.settings)]
        self.now = 0.0
        for i in range(count):
            self.tell(WorkerAdded(Worker(f"w{i}", "m", f"http://w{i}")))
            self.tell(WorkerReported(f"w{i}", WorkerReport(healthy=True)))

    def tell(self, *facts: Fact) -> list[Command]:
        commands: list[Command] = []
        for fact in facts:
            self.now += 0.01
            commands = self.kernel.handle(fact, self.now)
            self.log.append(line(self.now, fact, commands))
        return commands

    def sent(self, asked: Request) -> str:
        (command,) = self.tell(RequestArrived(asked))
        assert isinstance(command, Dispatch)
        return command.worker_id

    def cached(self, asked: Request) -> Mapping[int, float]:
        return self.kernel.pools["m"].ask(asked, 0.0, self.now).cached

    @property
    def sizes(self) -> list[int]:
        return [form.size for form in self.forms]

    @property
    def forms(self) -> list[BlockForm]:
        return list(self.kernel.pools["m"].block_forms(self.now))


def test_a_request_goes_where_its_prefix_is_although_another_gateway_sent_it_there() -> None:
    for holder in ("w0", "w1", "w2"):
        fleet = Fleet()
        fleet.tell(empty("w0"), empty("w1"), empty("w2"), stored(holder))
        assert fleet.sent(named("r")) == holder


def test_where_an_engine_tells_all_its_word_stands_against_the_guess() -> None:
    fleet = Fleet(1)
    fleet.sent(named("first"))
    assert fleet.cached(named("r")) == {0: len(TEXT) - 1}  # as was guessed
    fleet.tell(empty("w0"))
    assert fleet.cached(named("r")) == {}
    fleet.tell(stored("w0", TEXT[: 4 * SIZE]))
    assert fleet.cached(named("r")) == {0: 4 * SIZE}


def test_of_an_engine_that_tells_a_part_the_more_of_word_and_guess_counts() -> None:
    fleet = Fleet(2)
    fleet.tell(BlocksUnknown("w0", "events are lost"), stored("w0", TEXT[: 4 * SIZE]))
    assert fleet.cached(named("r")) == {0: 4 * SIZE}
    place = int(fleet.sent(named("first"))[1:])
    assert fleet.cached(named("r"))[place] == len(TEXT) - 1


def test_a_model_that_is_an_adapter_at_its_engine_is_looked_up_as_that_adapter() -> None:
    fleet = Fleet(2)
    fleet.tell(WorkerAdded(Worker("w1", "m", "http://w1", serves_as="poet")))
    fleet.tell(empty("w0"), empty("w1"), stored("w0", [9] * SIZE), stored("w1", [9] * SIZE))
    assert fleet.forms == [BlockForm(SIZE)]
    blocks = BlocksStored([1, 2], contents(TEXT[: 2 * SIZE], SIZE), None, root_name(SIZE, "poet"))
    fleet.tell(BlocksChanged("w1", [blocks]))
    assert fleet.forms == [BlockForm(SIZE), BlockForm(SIZE, "poet")]
    asked = request("r", *named_blocks(TEXT, fleet.forms))
    assert fleet.cached(asked) == {1: 2 * SIZE}
    assert fleet.cached(named("s")) == {}


def test_what_is_told_holds_without_trust() -> None:
    fleet = Fleet(1)
    fleet.tell(empty("w0"), stored("w0"))
    fleet.kernel.workers["w0"].trust = 0.1
    assert fleet.cached(named("r")) == {0: len(TEXT) - SIZE}  # the last token is always computed
    fleet.tell(BlocksUnknown("w0", "events are lost"))
    fleet.sent(named("first"))
    assert fleet.cached(named("r"))[0] == 0.1 * (len(TEXT) - 1)


def test_trust_in_guesses_is_not_learned_from_what_was_told() -> None:
    fleet = Fleet(1)
    fleet.tell(empty("w0"), stored("w0"))
    fleet.sent(named("r"))
    fleet.tell(StreamEnded("r", 5, prompt_tokens=len(TEXT), cached_tokens=0))
    assert fleet.kernel.workers["w0"].trust == 1.0


def test_what_is_removed_or_cleared_is_not_cached_any_more() -> None:
    fleet = Fleet(1)
    fleet.tell(empty("w0"), changed := stored("w0"))
    (event,) = changed.events
    assert isinstance(event, BlocksStored)
    fleet.tell(BlocksChanged("w0", [BlocksRemoved(event.hashes[10:])]))
    assert fleet.cached(named("r")) == {0: 10 * SIZE}
    fleet.tell(BlocksChanged("w0", [BlocksCleared()]))
    assert fleet.cached(named("r")) == {}


def test_engines_with_blocks_of_different_sizes_are_compared_in_tokens() -> None:
    fleet = Fleet(2)
    fleet.tell(empty("w0"), empty("w1"), stored("w0", TEXT[:64], 16), stored("w1", TEXT[:96], 32))
    assert fleet.sizes == [16, 32]
    both = [token_blocks(TEXT, size) for size in fleet.sizes]
    assert fleet.cached(request("r", *both)) == {0: 64, 1: 96}


def test_a_prompt_is_to_be_named_only_where_that_can_change_a_decision() -> None:
    fleet = Fleet(2)
    assert fleet.sizes == []
    fleet.tell(empty("w0"))
    assert fleet.sizes == []  # nobody has anything
    fleet.tell(stored("w0"))
    assert fleet.sizes == [SIZE]
    fleet.tell(WorkerReported("w1", WorkerReport(healthy=False)))
    assert fleet.sizes == []  # there is no choice
    fleet.tell(WorkerReported("w1", WorkerReport(healthy=True)))
    fleet.tell(BlocksUnknown("w0", "events are lost"), stored("w0"))
    assert fleet.sizes == []  # nobody is known whole


def test_what_was_just_sent_will_be_cached_before_whoever_comes_after_it() -> None:
    fleet = Fleet()
    fleet.tell(empty("w0"), empty("w1"), empty("w2"), stored("w0", [9] * SIZE))
    first = fleet.sent(named("r"))
    assert fleet.cached(named("s")) == {int(first[1:]): len(TEXT) - SIZE}
    assert fleet.cached(named("s", TEXT[: 4 * SIZE] + [9] * SIZE)) == {int(first[1:]): 4 * SIZE}
    assert fleet.cached(named("s", [8] * SIZE + TEXT)) == {}


def test_a_dispatch_of_which_its_engine_never_tells_is_not_counted_for_long() -> None:
    fleet = Fleet(2)
    fleet.tell(empty("w0"), empty("w1"), stored("w0", [9] * SIZE))
    fleet.sent(named("r"))
    fleet.now += 1.0
    assert fleet.cached(named("s"))
    fleet.now += 4.0
    assert fleet.cached(named("s")) == {}


def test_what_was_sent_to_an_engine_that_has_lost_its_cache_is_not_counted() -> None:
    for news in (BlocksUnknown("w0", "events are lost"), BlocksChanged("w0", [BlocksCleared()])):
        fleet = Fleet(1)
        fleet.tell(empty("w0"), stored("w0", [9] * SIZE))
        fleet.sent(request("r", token_blocks(TEXT, SIZE)))
        fleet.tell(news, empty("w0"))
        assert fleet.cached(named("s")) == {}


def test_a_worker_that_has_left_has_nothing_and_its_place_is_free_for_another() -> None:
    fleet = Fleet(2)
    fleet.tell(empty("w0"), stored("w0"), Removed("w0"))
    assert len(fleet.kernel.pools["m"].blocks) == 0
    fleet.tell(WorkerAdded(Worker("w9", "m", "http://w9")))
    assert fleet.cached(named("r")) == {}


def test_what_is_told_of_a_worker_that_nobody_knows_is_passed_over() -> None:
    fleet = Fleet(1)
    assert fleet.tell(empty("stranger"), stored("stranger")) == []
    assert len(fleet.kernel.pools["m"].blocks) == 0


def test_a_log_with_block_events_gives_the_same_commands_to_a_fresh_kernel() -> None:
    fleet = Fleet()
    fleet.tell(empty("w0"), empty("w1", rank=1), stored("w2"), stored("w0", TEXT[:80]))
    fleet.sent(named("r1"))
    fleet.tell(BlocksChanged("w2", [BlocksCleared()], unreadable=1), stored("w1"))
    fleet.sent(named("r2"))
    for entry, commands in replay(fleet.log):
        assert list(entry.commands) == commands
    assert isinstance(entry.fact, RequestArrived)
    assert encode(entry.fact.request) == encode(named("r2"))


TOLD = st.sampled_from((
    stored("w0"), stored("w1", TEXT[:160]), empty("w0"), empty("w1"),
    BlocksUnknown("w0", "events are lost"), BlocksChanged("w1", [BlocksCleared()]),
))  # fmt: skip


@given(st.lists(TOLD, max_size=12))
def test_whatever_is_told_changes_nothing_for_prompts_whose_tokens_nobody_knows(
    told: list[Fact],
) -> None:
    with_events, without = Fleet(), Fleet()
    with_events.tell(*told)
    with_events.now = without.now = 5.0
    for i in range(6):
        asked = RequestArrived(request(str(i)))
        assert with_events.tell(asked) == without.tell(asked)
