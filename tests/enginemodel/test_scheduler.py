"""Does the scheduler compute just what was asked, within its bounds, and lose nobody?"""

from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.enginemodel import PROFILES, Generation, Profile, Scheduler, StepPlan

TINY = msgspec.structs.replace(
    PROFILES["tiny"], kv_tokens=256, max_num_seqs=6, max_num_batched_tokens=32
)


def profile(**changes: int) -> Profile:
    return msgspec.structs.replace(TINY, **changes)


def step(engine: Scheduler, tokens: Counter[str]) -> StepPlan | None:
    plan = engine.plan()
    if plan is not None:
        outcome = engine.complete(plan)
        tokens.update(outcome.finished)
        tokens.update(engine.decoding)
    return plan


def run(engine: Scheduler, steps: int = 10_000) -> Counter[str]:
    """Tokens of each request until the engine is idle."""
    tokens: Counter[str] = Counter()
    for _ in range(steps):
        if step(engine, tokens) is None:
            return tokens
    raise AssertionError("the engine does not come to an end")


def chain(seed: int, count: int) -> tuple[int, ...]:
    return tuple(seed * 1000 + i for i in range(count))


generations = st.lists(
    st.tuples(
        st.integers(1, 120),  # prompt
        st.integers(1, 100),  # answer
        st.integers(0, 3),  # which prefix
        st.integers(0, 2),  # priority
        st.integers(0, 30),  # steps until it arrives after the one before
        st.one_of(st.none(), st.integers(0, 60)),  # steps until it is aborted
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(generations, st.booleans())
def test_no_request_is_lost_and_each_gets_its_tokens_within_all_bounds(
    arrivals: list[tuple[int, int, int, int, int, int | None]], by_priority: bool
) -> None:
    engine = Scheduler(TINY, by_priority=by_priority)
    tokens: Counter[str] = Counter()
    asked: dict[str, int] = {}
    aborts: dict[int, list[str]] = {}
    now = 0

    def tick() -> bool:
        nonlocal now
        plan = engine.plan()
        now += 1
        for request_id in aborts.pop(now, ()):
            if engine.abort(request_id):
                del asked[request_id]
        if plan is None:
            return False
        assert plan.load.streams + plan.load.prefill <= TINY.max_num_batched_tokens
        assert engine.running <= TINY.max_num_seqs
        assert engine.pool.used <= engine.pool.blocks
        assert engine.pool.cached <= engine.pool.blocks
        outcome = engine.complete(plan)
        tokens.update(outcome.finished)
        tokens.update(engine.decoding)
        return True

    for i, (prompt, answer, prefix, priority, gap, abort_after) in enumerate(arrivals):
        for _ in range(gap):
            tick()
        engine.add(Generation(str(i), prompt, answer, chain(prefix, prompt // 16), priority))
        asked[str(i)] = answer
        if abort_after is not None:
            aborts.setdefault(now + 1 + abort_after, []).append(str(i))
    for _ in range(20_000):
        if not tick() and not aborts:
            break
    assert {request: tokens[request] for request in asked} == asked
    assert engine.running == engine.waiting == engine.pool.used == 0
    assert engine._context == 0


def test_decodes_go_before_prompts_and_a_long_prompt_is_chunked() -> None:
    engine, tokens = Scheduler(TINY), Counter[str]()
    engine.add(Generation("old", 4, 50))
    step(engine, tokens)
    engine.add(Generation("long", 100, 5))
    loads = [plan.load for _ in range(4) if (plan := step(engine, tokens))]
    assert [(load.streams, load.prefill) for load in loads] == [(1, 31), (1, 31), (1, 31), (1, 7)]
    assert loads[1].attention == 31 * (31 + 31 / 2)
    assert tokens["long"] == 1
    assert tokens["old"] == 5


def test_the_last_to_come_is_preempted_and_finishes_later() -> None:
    engine = Scheduler(TINY)
    for i in range(4):
        engine.add(Generation(str(i), 40, 80))
    tokens = run(engine)
    assert engine.counters.preemptions > 0
    assert tokens == {"0": 80, "1": 80, "2": 80, "3": 80}


def test_the_first_to_come_is_never_preempted() -> None:
    engine, tokens = Scheduler(TINY), Counter[str]()
    for i in range(4):
        engine.add(Generation(str(i), 40, 80))
    while "0" not in engine.decoding:
        step(engine, tokens)
    for expected in range(tokens["0"], 79):
        assert tokens["0"] == expected
        step(engine, tokens)


def test_priority_decides_who_enters_and_who_is_preempted() -> None:
    engine, tokens = Scheduler(profile(max_num_seqs=1), by_priority=True), Counter[str]()
    engine.add(Generation("a", 8, 4, priority=1))
    engine.add(Generation("b", 8, 4, priority=1))
    engine.add(Generation("urgent", 8, 4, priority=0))
    order: list[str] = []
    while (plan := engine.plan()) is not None:
        order += plan.admitted
        engine.complete(plan)
    assert order == ["urgent", "a", "b"]
    assert not tokens


def test_without_priority_scheduling_the_field_is_ignored() -> None:
    engine = Scheduler(profile(max_num_seqs=1))
    engine.add(Generation("a", 8, 1, priority=1))
    engine.add(Generation("b", 8, 1, priority=0))
    plan = engine.plan()
    assert plan is not None
    assert list(plan.admitted) == ["a"]


def test_a_second_request_finds_the_prefix_but_computes_its_last_token() -> None:
    engine = Scheduler(TINY)
    engine.add(Generation("a", 64, 2, chain(1, 4)))
    run(engine)
    engine.add(Generation("b", 64, 2, chain(1, 4)))
    plan = engine.plan()
    assert plan is not None
    assert plan.admitted == {"b": 48}
    assert plan.load.prefill == 16
    assert engine.counters.prefix_hit_tokens == 48
    assert engine.counters.prefix_queried_tokens == 128


def test_an_answer_whose_blocks_are_named_is_cached_for_the_next_turn() -> None:
    engine = Scheduler(TINY)
    engine.add(Generation("turn 1", 32, 49, chain(1, 5)))
    run(engine)
    engine.add(Generation("turn 2", 90, 2, chain(1, 5)))
    plan = engine.plan()
    assert plan is not None
    assert plan.admitted == {"turn 2": 80}


def test_an_abort_frees_the_blocks_at_once() -> None:
    engine, tokens = Scheduler(TINY), Counter[str]()
    engine.add(Generation("a", 64, 50))
    step(engine, tokens)
    assert engine.pool.used == 4
    assert engine.abort("a")
    assert engine.pool.used == 0
    assert not engine.abort("a")
    assert engine.plan() is None


def test_a_request_that_could_never_fit_is_refused() -> None:
    engine = Scheduler(TINY)
    with pytest.raises(ValueError, match="257 tokens, 256 fit"):
        engine.add(Generation("a", 200, 57))


def test_a_slowdown_stretches_steps() -> None:
    engine = Scheduler(TINY)
    engine.add(Generation("a", 8, 9))
    plan = engine.plan()
    assert plan is not None
    engine.complete(plan)
    usual = engine.plan()
    assert usual is not None
    engine.complete(usual)
    engine.slowdown = 3.0
    slow = engine.plan()
    assert slow is not None
    assert slow.seconds == pytest.approx(3 * usual.seconds, rel=0.01)


def test_a_prompt_held_for_another_engine_keeps_its_blocks_until_it_is_fetched() -> None:
    engine = Scheduler(TINY)
    engine.add(Generation("a", 40, 1, chain(1, 2), hold=True))
    assert run(engine) == {"a": 1}
    assert "a" not in engine
    assert (engine.running, list(engine.held), engine.pool.used) == (0, ["a"], 3)
    with pytest.raises(ValueError, match="already"):
        engine.add(Generation("a", 40, 1))
    assert engine.release("a")
    assert not engine.release("a")
    assert (engine.pool.used, engine.pool.cached) == (0, 2)


def test_who_finds_no_room_beside_held_prompts_runs_once_they_are_fetched() -> None:
    engine = Scheduler(TINY)
    engine.add(Generation("held", 200, 1, hold=True))
    run(engine)
    engine.add(Generation("next", 100, 5))
    assert engine.plan() is None
    engine.release("held")
    assert run(engine)["next"] == 5


def test_an_answer_of_many_tokens_is_not_held() -> None:
    with pytest.raises(ValueError, match="one token"):
        Scheduler(TINY).add(Generation("a", 40, 2, hold=True))


def test_what_another_engine_has_prefilled_is_not_computed_but_for_its_last_token() -> None:
    engine, tokens = Scheduler(TINY), Counter[str]()
    engine.add(Generation("a", 100, 3, received=100))
    assert engine.prompt_left() == 1
    plan = step(engine, tokens)
    assert plan is not None
    assert plan.load.prefill == 1
    assert plan.admitted == {"a": 0}
    assert tokens == {"a": 1}
    assert engine.pool.used == 7
    assert engine.counters.received_tokens == 99
    assert run(engine)["a"] == 2


def test_what_was_received_can_be_found_by_the_next_with_this_prefix() -> None:
    engine = Scheduler(TINY)
    engine.add(Generation("a", 100, 3, chain(1, 6), received=100))
    run(engine)
    engine.add(Generation("b", 100, 3, chain(1, 6)))
    plan = engine.plan()
    assert plan is not None
    assert plan.admitted == {"b": 96}


def test_what_was_received_is_lost_with_a_preemption_and_computed() -> None:
    engine = Scheduler(TINY)
    for i in range(4):
        engine.add(Generation(str(i), 40, 80, received=40))
    prefilled = 0
    while (plan := engine.plan()) is not None:
        prefilled += plan.load.prefill
        engine.complete(plan)
    assert engine.counters.preemptions > 0
    assert prefilled > 4 + 40 * engine.counters.preemptions
