"""Which requests come when, in this scenario and with this seed?

Each stream of the scenario has chance of its own, so that another stream beside it, or another
number of workers, changes nothing in it: policies and settings are compared on the same requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import merge
from math import ceil, pi, sin
from operator import attrgetter
from pathlib import Path
from random import Random

from msgspec.structs import asdict, replace

from paceline.domain.promise import ANONYMOUS
from paceline.simulator.scenario import Pattern, Requests, Scenario
from paceline.workload.generate import (
    Lengths,
    agents,
    batch,
    chat,
    documents,
    independent,
    lognormal,
)
from paceline.workload.traces import Arrival, load_trace
from paceline.workload.transform import clipped, mean_rate, sped_up

SLOTS = 96
"""A sine is played in so many steps, as a day has quarters of an hour."""
LONGEST = 3
"""Lengths are cut at so many times their 99th percentile."""

GENERATORS: dict[str, Callable[..., Iterator[Arrival]]] = {
    "independent": independent,
    "chat": chat,
    "documents": documents,
    "agents": agents,
    "batch": batch,
}


class Fragile(Arrival, frozen=True):
    """A request whose answer, once begun, ends with its worker."""


def arrivals(scenario: Scenario, seed: int) -> Iterator[Arrival]:
    """All requests in order of time, with tier, tenant and model; made while they are asked for."""
    streams = [_stream(scenario, index, seed) for index in range(len(scenario.requests))]
    return merge(*streams, key=attrgetter("at_s"))


def _stream(scenario: Scenario, index: int, seed: int) -> Iterator[Arrival]:
    """One stream on the scenario's clock, each request with all its names."""
    asked = scenario.requests[index]
    end_s = min(asked.until_s, scenario.seconds)
    rng, luck = Random(f"{seed}/{index}"), Random(f"{seed}/{index} fragile")
    if asked.kind == "trace":
        came = _recorded(asked, scenario.load, rng)
    else:
        came = _generated(asked, scenario.load, end_s, f"stream {index}", rng)
    for arrival in came:
        at_s = asked.from_s + arrival.at_s
        if at_s >= end_s:
            return
        named = replace(
            arrival,
            at_s=at_s,
            output_tokens=min(arrival.output_tokens, asked.max_tokens or arrival.output_tokens),
            max_tokens=asked.max_tokens or arrival.max_tokens,
            tier=asked.tier or arrival.tier or scenario.tier,
            tenant=asked.tenant or arrival.tenant or ANONYMOUS,
            model=asked.model or arrival.model or scenario.model,
        )
        fragile = asked.resumable < 1.0 and luck.random() >= asked.resumable
        yield Fragile(**asdict(named)) if fragile else named


def _recorded(asked: Requests, load: float, rng: Random) -> Iterator[Arrival]:
    trace = clipped(load_trace(Path(asked.file), rng), asked.most_prompt)
    own_rate = mean_rate(trace)
    faster = asked.rate / own_rate if asked.rate and own_rate else 1.0
    return iter(sped_up(trace, faster * load))


def _generated(
    asked: Requests, load: float, end_s: float, name: str, rng: Random
) -> Iterator[Arrival]:
    if asked.rate is None:
        raise ValueError(f"requests of kind {asked.kind} need a rate")
    wishes = {
        "prompts": _lengths(asked.prompt),
        "answers": _lengths(asked.output),
        "shared_tokens": asked.shared,
        "families": asked.families,
        "turns": asked.turns,
        "think_s": asked.think_s,
    }
    return GENERATORS[asked.kind](
        asked.rate * load,
        end_s - asked.from_s,
        rng,
        cv=asked.cv,
        factors=_factors(asked.pattern, asked.from_s, end_s),
        name=name,
        **{wish: value for wish, value in wishes.items() if value is not None},
    )


def _lengths(quantiles: tuple[int, int] | None) -> Lengths | None:
    if quantiles is None:
        return None
    median, p99 = quantiles
    return lognormal(median, p99, most=LONGEST * p99)


def _factors(pattern: Pattern, from_s: float, end_s: float) -> Iterator[tuple[float, float]]:
    """The pattern in steps, in seconds since `from_s`."""
    step = sine = 1.0
    for at_s, is_step, factor in merge(
        ((at_s, True, factor) for at_s, factor in pattern.steps), _sine(pattern, end_s)
    ):
        if is_step:
            step = factor
        else:
            sine = factor
        yield at_s - from_s, step * sine


def _sine(pattern: Pattern, end_s: float) -> Iterator[tuple[float, bool, float]]:
    if pattern.diurnal_period_s:
        slot_s = pattern.diurnal_period_s / SLOTS
        for slot in range(ceil(end_s / slot_s)):
            angle = 2 * pi * (slot + 0.5) / SLOTS
            yield slot * slot_s, False, 1 + pattern.diurnal_swing * sin(angle)
