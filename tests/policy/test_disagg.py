"""Does each prompt go the way that breaks the fewest promises, without a threshold?"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import pytest
from msgspec.structs import replace
from standings import ASK, BUDGET

from paceline.domain.promise import Promise
from paceline.policy.baselines import least_requests
from paceline.policy.disagg import (
    LOCAL_TOKENS,
    QUEUED,
    apart,
    conditional,
    fetching,
    ways_of,
)
from paceline.policy.links import TransferTime
from paceline.policy.route import headroom
from paceline.policy.standing import Ask, Correction, Curve, InFlight, Standing
from paceline.policy.steptime import StepTimeEstimator

MODEL = StepTimeEstimator().model()
PREFILL, DECODE = 0, 1
LONG = replace(
    ASK, prompt_tokens=6000.0, usual_tokens=6000.0, promise=Promise(ttft_s=3.0, itl_s=0.03)
)


def worker(
    streams: int = 0,
    ahead: float = 0.0,
    itl_s: float = 0.03,
    kv: float | None = None,
    limit: float = inf,
) -> Standing:
    """With streams that were promised this ITL, of 1,000 tokens each, and prompts before it."""
    held = 1000.0 * streams if kv is None else kv
    in_flight = InFlight(streams, int(ahead > 0), held, 0.0, ahead, 0.0, BUDGET, 0.0, limit, 0.0)
    promised = {(itl_s, 1.0): streams} if streams else {}
    return Standing(MODEL, Curve(MODEL.theta), in_flight, promised, kv_limit=limit, probe=2000.0)


class Pair:
    """A worker that prefills, one that answers, and the way between them."""

    turn = 0
    ids = ("p", "d")
    handed = Correction()

    def __init__(self, prefill: Standing, decode: Standing, token_s: float = 5e-6) -> None:
        self._workers = prefill, decode
        self.way = TransferTime(learns=False)
        self.way.latency_s, self.way.token_s = 0.002, token_s
        self.lease = 20.0

    def load(self, place: int) -> int:
        return self._workers[place].everyone

    def remembered(self, place: int) -> int:
        return 0

    def standing(self, place: int, now: float) -> Standing:
        return self._workers[place]

    def link(self, source: int, place: int) -> TransferTime | None:
        return self.way if (source, place) == (PREFILL, DECODE) else None

    def prefill_limit(self, source: int) -> float:
        return BUDGET

    def lease_s(self, source: int) -> float:
        return self.lease


def source_of(pair: Pair, ask: Ask = LONG, sources: Sequence[int] = (PREFILL,)) -> int | None:
    choice = conditional(pair, ask, [DECODE], sources)
    assert choice.place == DECODE
    return choice.source


def test_on_an_idle_fleet_a_prompt_stays_where_it_is_answered() -> None:
    assert source_of(Pair(worker(), worker())) is None


def test_a_long_prompt_goes_elsewhere_for_the_sake_of_the_residents() -> None:
    assert source_of(Pair(worker(), worker(streams=60, itl_s=0.016))) == PREFILL


def test_a_short_prompt_stays() -> None:
    short = replace(LONG, prompt_tokens=30.0)
    assert source_of(Pair(worker(), worker(streams=60, itl_s=0.016)), short) is None


def test_a_cached_prompt_stays() -> None:
    cached = replace(LONG, cached={DECODE: 5990.0})
    assert source_of(Pair(worker(), worker(streams=60, itl_s=0.016)), cached) is None


def test_over_a_slow_link_a_prompt_stays() -> None:
    assert source_of(Pair(worker(), worker(streams=60, itl_s=0.016), token_s=2e-3)) is None


def test_behind_a_full_link_a_prompt_stays() -> None:
    pair = Pair(worker(), worker(streams=60, itl_s=0.016))
    pair.way.carries("others", 2e6, 100.0)
    assert source_of(pair) is None


def test_a_prompt_stays_that_would_not_be_fetched_well_before_its_lease_ends() -> None:
    pair = Pair(worker(), worker(streams=60, itl_s=0.016))
    pair.lease = 0.1
    assert source_of(pair) is None


@pytest.mark.parametrize(
    ("prefill", "waits"),
    [
        (worker(), False),
        (worker(ahead=BUDGET + 1), True),
        (worker(kv=9000.0, limit=10_000.0), True),
    ],
)
def test_a_prompt_waits_for_a_prefill_worker_that_is_busy_or_full(
    prefill: Standing, waits: bool
) -> None:
    choice = apart(Pair(prefill, worker()), LONG, [DECODE], [PREFILL])
    assert (choice.source, choice.wait) == (PREFILL, waits)


def test_a_prompt_waits_for_a_prefill_worker_until_its_promise_is_at_stake() -> None:
    pair = Pair(worker(ahead=BUDGET + 1), worker(streams=10, itl_s=0.013))
    fresh = conditional(pair, LONG, [DECODE], [PREFILL])
    assert (fresh.source, fresh.wait) == (PREFILL, True)
    late = replace(LONG, waited_s=1.5, promise=Promise(ttft_s=1.5, itl_s=0.03))
    assert conditional(pair, late, [DECODE], [PREFILL]).source is None


def test_a_link_that_is_free_does_not_open_a_worker_that_has_no_room_for_a_prefill() -> None:
    pair = Pair(worker(), worker(streams=60, itl_s=0.022), token_s=5e-3)
    pair.lease = 1000.0
    lost = replace(LONG, promise=Promise(ttft_s=1e-3, itl_s=0.03))
    assert headroom(pair, lost, [DECODE]).wait
    assert not apart(pair, lost, [DECODE], [PREFILL]).wait
    choice = conditional(pair, lost, [DECODE], [PREFILL])
    assert (choice.source, choice.wait) == (None, True)


def test_the_choice_says_which_way_and_what_to_expect() -> None:
    pair = Pair(worker(), worker(streams=60, itl_s=0.016))
    choice = conditional(pair, LONG, [DECODE], [PREFILL])
    assert choice.because.endswith("prefill on p")
    here = headroom(pair, LONG, [DECODE]).predicted
    assert here is not None
    assert choice.predicted is not None
    assert choice.predicted.ttft_s > here.ttft_s
    assert choice.predicted.headroom > here.headroom
    assert choice.predicted.cached_tokens == 0


def test_what_is_prefilled_goes_to_the_worker_that_is_free() -> None:
    class Two(Pair):
        ids = ("p", "d", "e")  # type: ignore[assignment]

        def __init__(self) -> None:
            super().__init__(worker(), worker(streams=60, itl_s=0.016))
            self._workers = (*self._workers, worker())  # type: ignore[assignment]

        def link(self, source: int, place: int) -> TransferTime | None:
            return self.way

    choice = fetching(headroom, Two(), LONG, [1, 2], PREFILL)
    assert (choice.place, choice.source) == (2, None)


def by_others(pair: Pair, ask: Ask = LONG) -> int | None:
    """The source where `least-requests` routes."""
    ways, _ = ways_of(least_requests)
    choice = ways(pair, ask, [DECODE], [PREFILL])
    assert choice.place == DECODE
    return choice.source


def test_other_policies_hand_over_what_is_long_and_not_cached() -> None:
    pair = Pair(worker(), worker())
    assert by_others(pair) == PREFILL
    assert by_others(pair, replace(LONG, prompt_tokens=LOCAL_TOKENS)) is None
    assert by_others(pair, replace(LONG, cached={DECODE: 6000.0 - LOCAL_TOKENS})) is None


def test_other_policies_keep_a_prompt_in_place_while_enough_is_prefilled_elsewhere() -> None:
    pair = Pair(worker(), worker())
    waiting = dict.fromkeys(range(QUEUED - 1), 0)
    pair.load = lambda place: len(waiting)  # type: ignore[method-assign]
    assert by_others(pair) == PREFILL
    waiting[QUEUED] = 0
    assert by_others(pair) is None


def test_streams_of_a_worker_that_answers_too_are_no_prompts_that_wait_there() -> None:
    assert by_others(Pair(worker(streams=10 * QUEUED), worker())) == PREFILL


def test_where_a_worker_cannot_prefill_every_policy_hands_over() -> None:
    _, alone_cannot = ways_of(least_requests)
    short = replace(LONG, prompt_tokens=30.0)
    assert alone_cannot(Pair(worker(), worker()), short, [DECODE], [PREFILL]).source == PREFILL
    assert alone_cannot(Pair(worker(), worker()), short, [PREFILL], [DECODE]).source is None
    assert ways_of(headroom) == (conditional, apart)
