"""What does a request become when its promise cannot be kept?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from msgspec.structs import replace

from paceline.domain.promise import Promise
from paceline.domain.request import Request


class Terms(Protocol):
    """What a tier says of its requests."""

    @property
    def promise(self) -> Promise: ...
    @property
    def weight(self) -> float: ...
    @property
    def overload(self) -> str: ...
    @property
    def degrade_to(self) -> str: ...
    @property
    def preemptible(self) -> bool: ...
    @property
    def deadline_s(self) -> float: ...


def with_way_down(
    request: Request, tiers: Mapping[str, Terms], model_of: Callable[[str], str | None]
) -> Request:
    """The request with all that it may become, step by step: of lower tiers, then of another model,
    which is as far down as it goes.

    `model_of` gives the model that a name means, None for a name that means none.
    """
    terms = tiers[request.tier]
    if terms.overload != "degrade":
        return request
    lower = tiers.get(terms.degrade_to)
    if lower is None:
        model = model_of(terms.degrade_to)
        other = model is not None and model != request.model
        return replace(request, instead=replace(request, model=model)) if other else request
    below = replace(
        request,
        tier=terms.degrade_to,
        promise=request.promise.loosest(lower.promise),
        weight=lower.weight,
        overload=lower.overload,
        preemptible=lower.preemptible,
        deadline_s=lower.deadline_s,
    )
    return replace(request, instead=with_way_down(below, tiers, model_of))
