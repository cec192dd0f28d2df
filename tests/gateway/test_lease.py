"""From when does the time count for which a prompt is held? From when it cannot have begun."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from paceline.gateway.errand import Errand
from paceline.gateway.handover import HandOver
from paceline.gateway.link import Timeouts

LEASE_S = 20.0
PATIENT = Timeouts(first_token_s=1000.0)


class Nothing:
    """A way to hand over that says nothing."""

    together = False

    def decode(self, *_: object) -> dict[str, Any]:
        return {"kv_transfer_params": {}}


def prefilling(now: float = 0.0) -> HandOver:
    worker = SimpleNamespace(id="w", lease_s=LEASE_S)
    link = SimpleNamespace(worker=worker, transfer=Nothing(), connection=lambda fresh: Mute())
    host = SimpleNamespace(number=lambda: 1, tell=lambda fact: None)
    owner = SimpleNamespace(request=SimpleNamespace(id="r"))
    handover = HandOver(cast(Any, owner), cast(Any, host), cast(Any, link), "/v1/completions", now)
    handover.start(b"", now)
    return handover


class Mute:
    connecting = None
    carried = 1

    def start(self, *_: object) -> None: ...
    def close(self) -> None: ...


def done(handover: HandOver, now: float) -> None:
    errand = SimpleNamespace(status=200, body=b"{}")
    handover.on_told(cast(Errand, errand), now)


def looks(handover: HandOver, *at: float) -> None:
    for now in at:
        handover.look(PATIENT, now)


def test_a_long_prefill_leaves_as_much_time_as_a_short_one() -> None:
    handover = prefilling()
    looks(handover, *(i / 4 for i in range(1, 401)))
    done(handover, 100.1)
    assert handover.until == pytest.approx(100 - 0.25 + LEASE_S)


def test_an_answer_that_came_while_this_process_slept_is_as_old_as_the_sleep() -> None:
    handover = prefilling()
    looks(handover, 0.25, 0.5, 0.75, 60.0)  # it may have come at 0.76, and is read at 60.1
    done(handover, 60.1)
    assert handover.until <= 0.76 + LEASE_S
    assert handover.fetch("w", 60.1) is None


def test_without_any_look_it_counts_from_when_it_was_sent() -> None:
    handover = prefilling(now=5.0)
    done(handover, 30.0)
    assert handover.until == 5.0 + LEASE_S


def test_it_is_fetched_once() -> None:
    handover = prefilling()
    done(handover, 0.1)
    assert handover.fetch("another", 0.2) is None
    assert handover.fetch("w", 0.2) is not None
    assert handover.fetch("w", 0.3) is None
