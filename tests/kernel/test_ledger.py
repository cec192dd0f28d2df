from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.domain.promise import Promise
from paceline.domain.request import Request
from paceline.kernel.ledger import Entry, Ledger


def entry(name: str, prompt: float = 100.0, cached: float = 0.0, streaming: bool = True) -> Entry:
    request = Request(name, "m", "t", "s", Promise(1.0, 0.05), streaming=streaming)
    return Entry(request, prompt, cached, sent_at=0.0)


def test_context_grows_with_every_step_for_every_stream() -> None:
    ledger = Ledger()
    one, two = entry("a", 100), entry("b", 50)
    ledger.sent(one)
    ledger.decodes(one)
    ledger.grew(1.0)
    ledger.sent(two)
    assert (ledger.ahead, ledger.arriving) == (50.0, 50.0)
    ledger.decodes(two)
    ledger.grew(1.0)
    assert ledger.kv == 102 + 51
    ledger.left("a")
    assert ledger.kv == 51
    assert ledger.streams == 1


def test_cached_tokens_are_context_but_no_work() -> None:
    ledger = Ledger()
    ledger.sent(entry("a", prompt=100, cached=80))
    assert (ledger.ahead, ledger.arriving) == (20.0, 100.0)


def test_an_answer_that_is_no_stream_is_taken_to_decode_once_its_prefill_is_due() -> None:
    ledger = Ledger()
    unseen = entry("a", streaming=False)
    unseen.due_at = 5.0
    ledger.sent(unseen)
    ledger.settle_blind(4.9)
    assert ledger.streams == 0
    ledger.settle_blind(5.0)
    assert (ledger.streams, ledger.blind, ledger.ahead) == (1, 1, 0.0)
    ledger.left("a")
    assert (ledger.streams, ledger.blind) == (0, 0)


def test_leaving_twice_is_leaving_once() -> None:
    ledger = Ledger()
    ledger.sent(entry("a"))
    assert ledger.left("a") is not None
    assert ledger.left("a") is None
    assert ledger.ahead == 0


@given(
    st.lists(
        st.tuples(st.sampled_from(["sent", "decodes", "left", "grew"]), st.integers(0, 5)),
        max_size=80,
    )
)
def test_the_sums_are_those_of_the_entries(story: list[tuple[str, int]]) -> None:
    ledger = Ledger()
    grown: dict[str, float] = {}
    for what, i in story:
        name = f"r{i}"
        here = ledger.entries.get(name)
        if what == "sent" and here is None:
            ledger.sent(entry(name, prompt=10.0 * (i + 1)))
        elif what == "decodes" and here is not None and not here.decoding:
            ledger.decodes(here)
            grown[name] = 0.0
        elif what == "left":
            ledger.left(name)
            grown.pop(name, None)
        elif what == "grew":
            ledger.grew(1.0)
            grown = {name: tokens + 1 for name, tokens in grown.items()}
        waiting = [e for e in ledger.entries.values() if not e.decoding]
        assert ledger.streams == len(grown)
        assert ledger.ahead == pytest.approx(sum(e.uncached for e in waiting))
        prompts = sum(ledger.entries[name].prompt for name in grown)
        assert ledger.kv == pytest.approx(prompts + sum(grown.values()))
        assert sum(ledger.promised.values()) == len(ledger.entries)
