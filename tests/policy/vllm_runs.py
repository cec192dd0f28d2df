"""What would a gateway have seen of a recorded vLLM run?

The records have one line a request: prompt tokens, output tokens, and when the first and last token
came. Between two such moments nobody joined or left, so the load of the worker was steady; a
request's life is a chain of such spans. How many steps a span had is not recorded, only
that a request with k tokens saw k - 1 steps in all: the model itself shares them out.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from math import ceil
from pathlib import Path

import msgspec

from paceline.policy.steptime import Load, StepModel, StepTimeEstimator

RUNS = sorted((Path(__file__).parent.parent / "data" / "vllm_runs").glob("*.jsonl"))
BUDGET = 2048
"""max_num_batched_tokens of all three runs."""


class Seen(msgspec.Struct, frozen=True):
    """One request, as a gateway saw it; times in seconds on its own clock."""

    prompt_tokens: int
    output_tokens: int
    first_at: float
    last_at: float

    @property
    def itl_s(self) -> float:
        return (self.last_at - self.first_at) / (self.output_tokens - 1)


class Span(msgspec.Struct, frozen=True):
    """A time in which no stream joined or left until its very end."""

    seconds: float
    decode: Load
    prefills: tuple[Load, ...]
    """Steps that also prefilled, for the requests whose first token ended the span."""


def read(path: Path) -> list[Seen]:
    """The requests of a run in the order in which they completed."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    seen = [
        Seen(r["input_toks"], r["output_toks"], r["first_token_ts"], r["last_token_ts"])
        for r in lines
    ]
    return sorted(seen, key=lambda r: r.last_at)


class Timeline:
    """Who was in flight when."""

    def __init__(self, requests: Sequence[Seen]) -> None:
        self._moments = sorted({t for r in requests for t in (r.first_at, r.last_at)})
        residents: list[list[Seen]] = [[] for _ in self._moments]
        joined: list[list[Seen]] = [[] for _ in self._moments]
        for r in requests:
            begin, end = self._index(r.first_at), self._index(r.last_at)
            joined[begin].append(r)
            for i in range(begin + 1, end + 1):
                residents[i].append(r)
        pairs = zip(residents[1:], joined[1:], strict=True)
        self._spans = [
            _span(begin, end, *who)
            for begin, end, who in zip(self._moments, self._moments[1:], pairs, strict=False)
        ]

    def _index(self, moment: float) -> int:
        return bisect_left(self._moments, moment)

    def spans(self, request: Seen) -> list[Span]:
        """The decoding life of a request."""
        return self._spans[self._index(request.first_at) : self._index(request.last_at)]


def _span(begin: float, end: float, residents: list[Seen], joined: list[Seen]) -> Span:
    middle = (begin + end) / 2
    streams = len(residents)
    kv = sum(r.prompt_tokens + (middle - r.first_at) / r.itl_s for r in residents)
    tokens = sum(r.prompt_tokens for r in joined)
    steps = ceil(tokens / (BUDGET - streams))
    # A step's share of a prompt attends to what came before it: Σ p·(context + p/2) = prompt²/2.
    q = sum(r.prompt_tokens**2 / 2 for r in joined)
    chunk = [Load(streams, tokens / steps, kv, q / steps)] * steps if steps else []
    return Span(end - begin, Load(streams, 0, kv, 0), tuple(chunk))


def steps_of(model: StepModel, spans: Sequence[Span]) -> Iterator[tuple[Load, float]]:
    """How many steps of which load the model believes to have filled the spans.

    A span too short for its prefill saw only a part of it: the rest was done before, or elsewhere,
    by another data-parallel rank.
    """
    for span in spans:
        prefill_s = sum(map(model.expected_s, span.prefills))
        part = min(1.0, span.seconds / prefill_s) if prefill_s else 0.0
        yield from ((load, part) for load in span.prefills)
        yield span.decode, (span.seconds - part * prefill_s) / model.expected_s(span.decode)


def predicted_itl_s(model: StepModel, spans: Sequence[Span]) -> float:
    """Mean ITL of a stream through these spans, not knowing how many tokens it got."""
    return sum(s.seconds for s in spans) / sum(count for _, count in steps_of(model, spans))


def learn(estimator: StepTimeEstimator, request: Seen, spans: Sequence[Span]) -> None:
    """Tell the estimator of a completed request: its steps, of which only the sum is known."""
    steps = list(steps_of(estimator.model(), spans))
    believed = sum(count for _, count in steps)
    share = (request.output_tokens - 1) / believed
    estimator.observe_window(
        [(load, count * share) for load, count in steps], request.last_at - request.first_at
    )
