"""What would a workload look like that nobody recorded?

Defaults resemble what public traces show: answers of some hundred tokens, prompts with a long tail,
conversations that grow by one turn after the other. `transform` marks and mixes what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import exp, log
from random import Random
from typing import Protocol

from paceline.workload.traces import BLOCK_TOKENS, Arrival, named_blocks
from paceline.workload.transform import merged

Lengths = Callable[[Random], int]
"""Draws a number of tokens."""


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


def arrival_times(rate_per_s: float, rng: Random, *, cv: float = 1.0) -> Iterator[float]:
    """Endless times in seconds, with Gamma gaps of coefficient of variation `cv`; 1 is Poisson."""
    at_s, shape = 0.0, 1 / cv**2
    while True:
        at_s += rng.gammavariate(shape, 1 / (rate_per_s * shape))
        yield at_s


def independent(
    rate_per_s: float,
    duration_s: float,
    rng: Random,
    *,
    cv: float = 1.0,
    prompts: Lengths = PROMPTS,
    answers: Lengths = ANSWERS,
) -> list[Arrival]:
    """Requests that have nothing to do with each other."""
    times = _until(duration_s, arrival_times(rate_per_s, rng, cv=cv))
    return [Arrival(at_s, prompts(rng), answers(rng)) for at_s in times]


def documents(
    rate_per_s: float,
    duration_s: float,
    rng: Random,
    *,
    cv: float = 1.0,
    prompts: Lengths = DOCUMENTS,
    answers: Lengths = SUMMARIES,
) -> list[Arrival]:
    """Long prompts with short answers: what stalls the streams of everybody else."""
    return independent(rate_per_s, duration_s, rng, cv=cv, prompts=prompts, answers=answers)


def chat(
    rate_per_s: float,
    duration_s: float,
    rng: Random,
    *,
    cv: float = 1.0,
    turns: float = 5.0,
    system_tokens: int = 2 * BLOCK_TOKENS,
    questions: Lengths = QUESTIONS,
    answers: Lengths = ANSWERS,
    think_s: float = 8.0,
) -> list[Arrival]:
    """Conversations: each turn's prompt is the one before, its answer and a new question.

    All start with one system prompt, rounded up to whole blocks. `turns` is a mean (geometric) and
    `rate_per_s` counts turns. `think_s` is the mean time between two turns, answer included.
    Conversations begun before the start are there too, so that the load is steady from the first
    second.
    """
    system = named_blocks("system prompt", system_tokens)
    lead_s = 3 * turns * think_s
    out: list[Arrival] = []
    for start_s in _until(lead_s + duration_s, arrival_times(rate_per_s / turns, rng, cv=cv)):
        at_s, name, said = start_s - lead_s, str(rng.getrandbits(64)), 0
        while at_s < duration_s:
            said += questions(rng)
            answer = answers(rng)
            if at_s >= 0:
                blocks = system + named_blocks(name, said)
                out.append(Arrival(at_s, len(system) * BLOCK_TOKENS + said, answer, blocks))
            said += answer
            at_s += rng.expovariate(1 / think_s)
            if rng.random() < 1 / turns:
                break
    return merged(out)


def mixed(
    rate_per_s: float,
    duration_s: float,
    rng: Random,
    *,
    cv: float = 1.0,
    long_share: float = 0.1,
) -> list[Arrival]:
    """Conversations with some long documents among them."""
    return merged(
        chat(rate_per_s * (1 - long_share), duration_s, rng, cv=cv),
        documents(rate_per_s * long_share, duration_s, rng, cv=cv),
    )


class Generator(Protocol):
    """What every generator accepts at least."""

    def __call__(
        self, rate_per_s: float, duration_s: float, rng: Random, *, cv: float = ...
    ) -> list[Arrival]: ...


GENERATORS: dict[str, Generator] = {
    "poisson": independent,
    "chat": chat,
    "long": documents,
    "mixed": mixed,
}
"""By the name that the command line gives them."""


def _until(end_s: float, times: Iterator[float]) -> Iterator[float]:
    for at_s in times:
        if at_s >= end_s:
            return
        yield at_s
