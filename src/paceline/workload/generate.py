"""What would a workload look like that nobody recorded?

Defaults resemble what public traces show: answers of some hundred tokens, prompts with a long tail,
conversations that grow by one turn after the other. Workloads come lazily, in order of time, and
keep only what is under way: they may be endless. `transform` marks and mixes what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from heapq import heappop, heappush, heapreplace, merge
from itertools import chain, groupby, repeat, takewhile
from math import exp, inf, log
from operator import attrgetter
from random import Random
from typing import Protocol

from msgspec.structs import replace

from paceline.workload.traces import BLOCK_TOKENS, Arrival, named_blocks

Lengths = Callable[[Random], int]
"""Draws a number of tokens."""

Factors = Iterable[tuple[float, float]]
"""(second, factor) in order: from there on a rate is so many times what it was meant to be."""


def fixed(tokens: int) -> Lengths:
    return lambda rng: tokens


def lognormal(median: int, p99: int, most: int = 32_768) -> Lengths:
    """Long-tailed lengths, as prompts and answers have them."""
    mu, sigma = log(median), log(p99 / median) / 2.326  # The standard normal's 99th percentile.
    return lambda rng: max(1, min(most, round(exp(rng.gauss(mu, sigma)))))


PROMPTS = lognormal(400, 4_000)
QUESTIONS = lognormal(60, 600)
ANSWERS = lognormal(120, 800, most=2_000)
DOCUMENTS = lognormal(6_000, 20_000)
SUMMARIES = lognormal(60, 300)
TOOL_RESULTS = lognormal(200, 3_000)
TOOL_CALLS = lognormal(120, 1_000, most=2_000)


def arrival_times(
    rate_per_s: float,
    rng: Random,
    *,
    cv: float = 1.0,
    start_s: float = 0.0,
    factors: Factors = (),
) -> Iterator[float]:
    """Endless times in seconds, with Gamma gaps of coefficient of variation `cv`; 1 is Poisson.

    `factors` stretch and squeeze the gaps of one steady process (the random time change of Daley
    and Vere-Jones, An Introduction to the Theory of Point Processes, section 7.4), so that arrivals
    are as bursty at any rate. Thinning would tame them. A last factor of 0 is the end.
    """
    shape = 1 / cv**2
    scale_s = 1 / (rate_per_s * shape)
    at_s, factor, gap_s = start_s, 1.0, rng.gammavariate(shape, scale_s)
    for until_s, next_factor in chain(factors, [(inf, 0.0)]):
        while factor and at_s + gap_s / factor < until_s:
            at_s += gap_s / factor
            yield at_s
            gap_s = rng.gammavariate(shape, scale_s)
        gap_s = max(0.0, gap_s - max(0.0, until_s - at_s) * factor)
        at_s, factor = max(at_s, until_s), next_factor


def independent(
    rate_per_s: float,
    duration_s: float,
    rng: Random,
    *,
    cv: float = 1.0,
    factors: Factors = (),
    prompts: Lengths = PROMPTS,
    answers: Lengths = ANSWERS,
    shared_tokens: int = 0,
    name: str = "",
) -> Iterator[Arrival]:
    """Requests that have nothing to do with each other, but perhaps a prefix before all prompts.

    Prefixes differ between workloads of different `name`.
    """
    times = arrival_times(rate_per_s, rng, cv=cv, factors=factors)
    return _requests(_until(duration_s, times), rng, prompts, answers, shared_tokens, name)


documents = partial(independent, prompts=DOCUMENTS, answers=SUMMARIES)
"""Long prompts with short answers: what stalls the streams of everybody else."""


def batch(
    rate_per_s: float,
    duration_s: float,
    rng: Random,
    *,
    cv: float = 1.0,
    factors: Factors = (),
    prompts: Lengths = PROMPTS,
    answers: Lengths = ANSWERS,
    shared_tokens: int = 0,
    name: str = "",
    turns: float | None = None,
) -> Iterator[Arrival]:
    """Jobs of `turns` requests on average (geometric), all of a job at once; each has a name.

    Without `turns` there is one job, at the start, with all requests of the duration.
    """
    if turns is None:
        times: Iterator[float] = repeat(0.0, round(rate_per_s * duration_s))
    else:
        jobs = arrival_times(rate_per_s / turns, rng, cv=cv, factors=factors)
        times = (at_s for at_s in _until(duration_s, jobs) for _ in range(_geometric(turns, rng)))
    requests = _requests(times, rng, prompts, answers, shared_tokens, name)
    by_job = enumerate(groupby(requests, attrgetter("at_s")), 1)
    return (replace(each, batch=f"job-{number}") for number, (_, job) in by_job for each in job)


def chat(
    rate_per_s: float,
    duration_s: float,
    rng: Random,
    *,
    cv: float = 1.0,
    factors: Factors = (),
    prompts: Lengths = QUESTIONS,
    answers: Lengths = ANSWERS,
    shared_tokens: int = 2 * BLOCK_TOKENS,
    families: int = 1,
    name: str = "",
    turns: float = 5.0,
    think_s: float = 8.0,
) -> Iterator[Arrival]:
    """Conversations: each turn's prompt is the one before, its answer and a new question.

    Each starts with one of `families` system prompts, rounded up to whole blocks. `turns` is a mean
    (geometric) and `rate_per_s` counts turns. `think_s` is the mean time between two turns, answer
    included. Conversations begun before the start are there too, so that the load is steady from
    the first second; a changing rate is that at which they begin.
    """
    systems = [named_blocks(f"{name} system prompt {i}", shared_tokens) for i in range(families)]

    def conversation(at_s: float) -> Iterator[Arrival]:
        system, own, said = rng.choice(systems), str(rng.getrandbits(64)), 0
        for _ in range(_geometric(turns, rng)):
            said += prompts(rng)
            answer = answers(rng)
            if at_s >= 0:
                blocks = system + named_blocks(own, said)
                yield Arrival(at_s, len(system) * BLOCK_TOKENS + said, answer, blocks)
            said += answer
            at_s += rng.expovariate(1 / think_s)

    starts = arrival_times(
        rate_per_s / turns, rng, cv=cv, start_s=-3 * turns * think_s, factors=factors
    )
    turns_of_all = _overlapping((start_s, conversation(start_s)) for start_s in starts)
    return takewhile(lambda arrival: arrival.at_s < duration_s, turns_of_all)


agents = partial(
    chat,
    prompts=TOOL_RESULTS,
    answers=TOOL_CALLS,
    shared_tokens=8 * BLOCK_TOKENS,
    families=8,
    turns=8.0,
    think_s=3.0,
)
"""Loops of agents: a family shares instructions and tools, each call adds a tool's result.

On average about 8,600 tokens in and 180 out, as in the tool and agent trace of Mooncake (Qin et
al., FAST'25)."""


def mixed(
    rate_per_s: float,
    duration_s: float,
    rng: Random,
    *,
    cv: float = 1.0,
    long_share: float = 0.1,
) -> Iterator[Arrival]:
    """Conversations with some long documents among them."""
    return merge(
        chat(rate_per_s * (1 - long_share), duration_s, rng, cv=cv),
        documents(rate_per_s * long_share, duration_s, rng, cv=cv),
        key=attrgetter("at_s"),
    )


class Generator(Protocol):
    """What every generator accepts at least."""

    def __call__(
        self, rate_per_s: float, duration_s: float, rng: Random, *, cv: float = ...
    ) -> Iterator[Arrival]: ...


GENERATORS: dict[str, Generator] = {
    "poisson": independent,
    "chat": chat,
    "agents": agents,
    "long": documents,
    "batch": batch,
    "mixed": mixed,
}
"""By the name that the command line gives them."""


def _requests(
    times: Iterable[float],
    rng: Random,
    prompts: Lengths,
    answers: Lengths,
    shared_tokens: int,
    name: str,
) -> Iterator[Arrival]:
    prefix = named_blocks(f"{name} prefix", shared_tokens)
    for at_s in times:
        prompt = shared_tokens + prompts(rng)
        yield Arrival(at_s, prompt, answers(rng), prefix, prefix_tokens=shared_tokens)


def _overlapping(sessions: Iterable[tuple[float, Iterator[Arrival]]]) -> Iterator[Arrival]:
    """All arrivals of sessions, which come by their start; only those under way are kept."""
    alive: list[tuple[float, int, Arrival, Iterator[Arrival]]] = []
    for number, (start_s, session) in enumerate(chain(sessions, [(inf, iter(()))])):
        while alive and alive[0][0] < start_s:
            _, order, arrival, rest = alive[0]
            yield arrival
            following = next(rest, None)
            if following is None:
                heappop(alive)
            else:
                heapreplace(alive, (following.at_s, order, following, rest))
        first = next(session, None)
        if first is not None:
            heappush(alive, (first.at_s, number, first, session))


def _geometric(mean: float, rng: Random) -> int:
    """At least 1."""
    count = 1
    while rng.random() >= 1 / mean:
        count += 1
    return count


def _until(end_s: float, times: Iterator[float]) -> Iterator[float]:
    return takewhile(lambda at_s: at_s < end_s, times)
