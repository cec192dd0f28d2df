"""What would a gateway see of an engine whose step times are known?

A continuous batch with chunked prefill in order of arrival, on a virtual clock. Only what crosses
the wire is told: first tokens, and steps as their chunks arrive, each late by a random jitter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import exp

import msgspec
import numpy as np

from paceline.domain.facts import Step
from paceline.policy.steptime import Load, StepTimeEstimator
from paceline.policy.windows import Observation, PrefillWindows

Truth = Callable[[Load], float]


def dense(load: Load) -> float:
    """An 8B dense model, slower than the estimator's first guess and of other proportions."""
    tokens = load.streams + load.prefill
    compute = 2.4e-5 * max(tokens - 128, 0.0) + 4e-5 * min(tokens, 128)
    return 0.0119 + compute + 9e-8 * load.kv + 1.6e-9 * load.q


def mixture_of_experts(load: Load) -> float:
    """Concave in the tokens: each wakes experts that no other has woken yet."""
    tokens = load.streams + load.prefill
    experts = 0.022 * (1.0 - exp(-tokens / 20.0))
    return 0.004 + experts + 1.2e-5 * tokens + 4e-8 * load.kv + 8e-10 * load.q


class _Request(msgspec.Struct):
    id: str
    sent_at: float
    prompt: int
    output: int
    prefilled: int = 0
    produced: int = 0


class SyntheticEngine:
    """Serves a Poisson stream of requests and tells `windows` what is seen of it."""

    def __init__(
        self,
        truth: Truth,
        rng: np.random.Generator,
        windows: PrefillWindows,
        *,
        budget: int = 2048,
        rate: float = 2.0,
        jitter_s: float = 0.0003,
        overhead_s: float = 0.0,
        prompts: tuple[int, int] = (50, 3000),
        outputs: tuple[int, int] = (50, 400),
    ) -> None:
        self.truth, self.rng, self.windows, self.budget = truth, rng, windows, budget
        self.rate, self.jitter_s, self.overhead_s = rate, jitter_s, overhead_s
        self.prompts, self.outputs = prompts, outputs
        self.now = 0.0
        self.seen_at = 0.0
        self.next_arrival = 0.0
        self.requests: list[_Request] = []
        self.served = 0

    def steps(self, count: int) -> Iterator[tuple[Load, list[Observation]]]:
        """True load of each step, and what the windows settled when they saw it."""
        for _ in range(count):
            self._arrivals()
            yield self._step()

    def teach(self, estimator: StepTimeEstimator, steps: int) -> None:
        for _, observations in self.steps(steps):
            for seen in observations:
                estimator.observe(seen.load, seen.seconds, seen.steps)

    def _arrivals(self) -> None:
        if not self.requests:
            self.now = max(self.now, self.next_arrival + self.overhead_s)
        while self.next_arrival + self.overhead_s <= self.now:
            prompt, output = (int(self.rng.integers(*r)) for r in (self.prompts, self.outputs))
            request = _Request(f"r{self.served}", self.next_arrival, prompt, output)
            self.windows.dispatched(request.id, prompt, 0, request.sent_at)
            self.requests.append(request)
            self.served += 1
            self.next_arrival += self.rng.exponential(1.0 / self.rate)

    def _step(self) -> tuple[Load, list[Observation]]:
        decoding = [r for r in self.requests if r.produced]
        kv = float(sum(r.prompt + r.produced for r in decoding))
        room = self.budget - len(decoding)
        prefill, q, first = 0, 0.0, []
        for request in self.requests:
            chunk = min(room - prefill, request.prompt - request.prefilled)
            if chunk > 0:
                q += chunk * (request.prefilled + chunk / 2)
                request.prefilled += chunk
                prefill += chunk
                if request.prefilled == request.prompt:
                    first.append(request)
        load = Load(len(decoding), prefill, kv, q)
        self.now += self.truth(load)
        return load, self._show(decoding, first, kv)

    def _show(
        self, decoding: list[_Request], first: list[_Request], kv: float
    ) -> list[Observation]:
        for request in decoding + first:
            request.produced += 1
        self.requests = [r for r in self.requests if r.produced < r.output]
        if not decoding and not first:
            return []
        chunks = self.now + self.rng.uniform(0, self.jitter_s, len(decoding) + len(first))
        seen_at = float(chunks.min())
        for request in first:
            self.windows.first_token(request.id, seen_at)
        seconds = seen_at - self.seen_at if decoding else 0.0
        self.seen_at = seen_at
        return self.windows.stepped(Step(seen_at, seconds, len(decoding), len(decoding)), kv)
