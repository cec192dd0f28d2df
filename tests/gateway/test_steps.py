"""Chunks in, steps out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.domain.facts import Step
from paceline.gateway.steps import StepWatch

STEP_S = 0.010
JITTER_S = 0.0002


class Streams:
    """Plays an engine's bursts to a watch."""

    def __init__(self) -> None:
        self.told: list[Step] = []
        self.watch = StepWatch(self.told.append)
        self.seen: dict[str, tuple[int, float]] = {}

    def burst(self, names: str, at: float) -> None:
        """One chunk for each stream, a little after one another."""
        for i, name in enumerate(names):
            now = at + i * JITTER_S
            if name in self.seen:
                burst, before = self.seen[name]
                self.seen[name] = (self.watch.token(burst, 1, now - before, now), now)
            else:
                self.seen[name] = (self.watch.first(now), now)

    def end(self, names: str) -> None:
        for name in names:
            self.watch.gone(self.seen.pop(name)[0])


def test_a_step_is_told_once_all_its_streams_have_come() -> None:
    streams = Streams()
    for i in range(4):
        streams.burst("abc", 1 + i * STEP_S)
    first, *rest = streams.told
    assert first == Step(1.0, 0.0, 0, 0)
    assert [(s.streams, s.tokens) for s in rest] == [(3, 3)] * 3
    assert [s.seconds for s in rest] == pytest.approx([STEP_S] * 3)


def test_a_stream_that_begins_is_part_of_the_step_but_does_not_decode_in_it() -> None:
    streams = Streams()
    streams.burst("ab", 1.00)
    streams.burst("ab", 1.01)
    streams.burst("cab", 1.02)
    streams.burst("abc", 1.03)
    streams.burst("abd", 1.04)
    streams.burst("abcd", 1.05)
    assert [s.streams for s in streams.told] == [0, 2, 2, 3, 2, 4]
    assert [s.seconds for s in streams.told[1:]] == pytest.approx([0.01] * 5)


def test_a_stream_that_ends_does_not_hold_up_the_step_of_the_others() -> None:
    streams = Streams()
    streams.burst("abc", 1.00)
    streams.burst("abc", 1.01)
    streams.end("b")
    streams.burst("ac", 1.02)
    assert [s.streams for s in streams.told] == [0, 3, 2]


def test_a_missing_stream_delays_the_news_until_the_next_step() -> None:
    streams = Streams()
    streams.burst("ab", 1.00)
    streams.burst("ab", 1.01)
    streams.burst("a", 1.02)
    assert len(streams.told) == 2
    streams.burst("ab", 1.03)
    assert [s.streams for s in streams.told] == [0, 2, 1, 2]
    assert [s.seconds for s in streams.told[1:]] == pytest.approx([0.01] * 3)


def test_after_idling_no_step_time_is_told() -> None:
    streams = Streams()
    streams.burst("a", 1.00)
    streams.burst("a", 1.01)
    streams.end("a")
    streams.burst("b", 5.00)
    streams.burst("b", 5.01)
    assert [s.seconds for s in streams.told] == pytest.approx([0, 0.01, 0, 0.01])


def test_a_finish_reason_of_its_own_is_no_step() -> None:
    streams = Streams()
    for i in range(3):
        streams.burst("ab", 1 + i * STEP_S)
    streams.burst("a", 1.0205)  # the echo
    streams.end("a")
    streams.burst("b", 1.03)
    assert [s.streams for s in streams.told] == [0, 2, 2, 1]
    assert streams.told[-1].seconds == pytest.approx(STEP_S)


def test_a_slow_first_step_does_not_make_all_others_look_like_echoes() -> None:
    streams = Streams()
    streams.burst("ab", 1.0)
    at = 1.5
    streams.burst("ab", at)  # half a second: the engine was still compiling
    for i in range(1, 40):
        streams.burst("ab", at + i * STEP_S)
    assert [s.seconds for s in streams.told[-10:]] == pytest.approx([STEP_S] * 10)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from(["in", "out"])), max_size=40))
def test_steps_are_true_whoever_comes_and_goes(story: list[tuple[str, str]]) -> None:
    streams = Streams()
    alive: set[str] = set()
    at, expected = 1.0, []
    for name, way in [("a", "in"), *story]:
        decoding = set(alive)
        if way == "in":
            alive.add(name)
        elif name in alive:
            streams.end(name)
            alive.discard(name)
            decoding.discard(name)
        at += STEP_S
        if alive:
            streams.burst("".join(sorted(alive)), at)
            expected.append(len(decoding))
    assert [s.streams for s in streams.told] == expected
    assert all(s.seconds == pytest.approx(STEP_S) for s in streams.told if s.seconds)
