"""What does a request become when its promise cannot be kept?"""

from __future__ import annotations

from msgspec.structs import replace

from paceline.domain.promise import Promise, Tier
from paceline.domain.request import Request
from paceline.domain.way_down import with_way_down
from paceline.simulator.scenario import SimTier

HIGH = Tier("high", Promise(0.5, 0.04), weight=8, overload="degrade", degrade_to="low")
LOW = Tier("low", Promise(2.0, 0.08), weight=2, overload="degrade", degrade_to="small")
FLEX = Tier("flex", weight=0.5, overload="shed", preemptible=True, deadline_s=60.0)
MODELS = {"small": "s", "little": "s", "large": "m"}
ASKED = Request(
    "r", "m", "t", "high", HIGH.promise, weight=8, prompt_bytes=9, overload="degrade", seed=7
)


def ways(request: Request, *tiers: Tier) -> list[Request]:
    """The request and what it becomes, one after the other."""
    found: list[Request] = []
    step: Request | None = with_way_down(request, {tier.name: tier for tier in tiers}, MODELS.get)
    while step is not None:
        found.append(replace(step, instead=None))
        step = step.instead
    return found


def test_it_goes_down_tier_by_tier_and_then_to_another_model() -> None:
    low = replace(ASKED, tier="low", promise=LOW.promise, weight=2)
    assert ways(ASKED, HIGH, LOW) == [ASKED, low, replace(low, model="s")]


def test_it_takes_on_all_that_the_lower_tier_says() -> None:
    _, flex = ways(ASKED, replace(HIGH, degrade_to="flex"), FLEX)
    assert (flex.weight, flex.overload, flex.preemptible) == (0.5, "shed", True)
    assert (flex.promise, flex.deadline_s) == (Promise(), 60.0)


def test_it_has_no_way_down_unless_its_tier_degrades() -> None:
    assert ways(ASKED, replace(HIGH, overload="queue", degrade_to=""), LOW) == [ASKED]


def test_a_promise_is_never_tightened_on_the_way_down() -> None:
    loosened = replace(ASKED, promise=Promise(9.0, 0.05))
    assert ways(loosened, HIGH, replace(LOW, overload="queue"))[1].promise == Promise(9.0, 0.08)


def test_its_own_model_by_whatever_name_and_an_unknown_one_are_no_way_down() -> None:
    for name, model in (("large", "m"), ("little", "s"), ("unheard-of", "m")):
        asked = replace(ASKED, model=model)
        assert ways(asked, replace(HIGH, degrade_to=name)) == [asked]


def test_it_goes_down_by_the_tiers_of_a_scenario_as_by_those_of_a_gateway() -> None:
    tiers = {
        tier.name: SimTier(
            ttft_s=tier.promise.ttft_s,
            itl_s=tier.promise.itl_s,
            weight=tier.weight,
            overload="degrade",
            degrade_to=tier.degrade_to,
        )
        for tier in (HIGH, LOW)
    }
    live = {tier.name: tier for tier in (HIGH, LOW)}
    assert with_way_down(ASKED, tiers, MODELS.get) == with_way_down(ASKED, live, MODELS.get)
