"""Steps that are alike may be run in one go: is that the same as one by one?"""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from paceline.enginemodel import PROFILES, Generation, Scheduler

Told = list[tuple[float, str, str]]


def play(seed: int, most: int, kv_tokens: int) -> tuple[Told, dict[str, int], int]:
    """Requests at random times, some aborted; what is told of them, and when."""
    rng = Random(seed)
    engine = Scheduler(replace(PROFILES["tiny"], kv_tokens=kv_tokens), name_tokens=64)
    due = sorted((rng.uniform(0, 2), i) for i in range(rng.randint(1, 30)))
    lengths = {i: (rng.randint(1, 900), rng.randint(1, 200)) for _, i in due}
    now, told = 0.0, []
    plan, began = None, 0.0
    while True:
        if plan is None:
            plan, began = engine.plan(most), now
            if plan is None and not due:
                break
            now = due[0][0] if plan is None else now
        end = began + plan.seconds if plan is not None else now
        if due and due[0][0] <= end:
            at, i = due.pop(0)
            prompt, output = lengths[i]
            blocks = tuple(range(i % 3 * 100, i % 3 * 100 + prompt // 64))
            engine.add(Generation(str(i), prompt, output, blocks))
            if plan is not None and plan.steps > 1:
                plan = plan.first(plan.ended_after(at - began) + 1)
            continue
        if plan is None:
            continue
        now = end
        told += [(round(now, 6), "preempted", name) for name in plan.preempted]
        outcome = engine.complete(plan)
        for kind in ("first", "resumed", "finished"):
            told += [(round(now, 6), kind, name) for name in getattr(outcome, kind)]
        plan = None
    counters = {f: getattr(engine.counters, f) for f in engine.counters.__struct_fields__}
    return told, counters, engine.pool.used


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1280, 2048, 16_384]))
def test_many_steps_at_once_are_the_same_as_one_by_one(seed: int, kv_tokens: int) -> None:
    single, many = play(seed, 1, kv_tokens), play(seed, 256, kv_tokens)
    assert [t[1:] for t in single[0]] == [t[1:] for t in many[0]]
    assert all(abs(a[0] - b[0]) < 1e-4 for a, b in zip(single[0], many[0], strict=True))
    assert single[1:] == many[1:]
    assert single[2] == 0
