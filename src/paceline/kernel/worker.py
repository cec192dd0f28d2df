"""What does the kernel know of one worker?"""

from __future__ import annotations

from math import exp, inf, log

from paceline.domain.commands import Prediction
from paceline.domain.facts import PeerLoad, Step
from paceline.domain.worker import Worker, WorkerReport
from paceline.kernel.elsewhere import Elsewhere
from paceline.kernel.ledger import Entry, Ledger
from paceline.policy.standing import Curve, InFlight, Standing
from paceline.policy.steptime import StepTimeEstimator
from paceline.policy.windows import PrefillWindows

PREFILL_RATE_S = 5.0
"""Time constant of the prefill rate."""
EJECT_S = 0.5
"""How long a worker is avoided after its first failure; twice as long after each further one."""
MAX_EJECT_S = 30.0
TRUST_RATE = 0.1


class Accuracy:
    """How well were outcomes predicted? Of log(outcome / prediction)."""

    __slots__ = ("bias", "count", "error")

    def __init__(self) -> None:
        self.count = 0
        self.bias = 0.0
        """Running mean: above 0, outcomes are later than predicted."""
        self.error = 0.0
        """Running mean of the absolute value; 0.1 is about 10 %."""

    def add(self, predicted_s: float, outcome_s: float) -> None:
        """Compare one prediction with its outcome."""
        if predicted_s <= 0 or outcome_s <= 0:
            return
        self.count += 1
        rate = max(1.0 / self.count, 0.02)
        ratio = log(outcome_s / predicted_s)
        self.bias += rate * (ratio - self.bias)
        self.error += rate * (abs(ratio) - self.error)


class WorkerState:
    """One worker: what is in flight there, how fast it is, whether it can be used."""

    def __init__(self, worker: Worker, place: int) -> None:
        self.worker = worker
        self.place = place
        """Its place in the pool, and its bit in the prefix index."""
        self.ledger = Ledger()
        self.elsewhere = Elsewhere()
        self.timing = StepTimeEstimator()
        self.windows = PrefillWindows(worker.prefill_budget)
        self.report: WorkerReport | None = None
        self.draining = False
        self.ejected_until = -inf
        self.failures = 0
        """In a row, with the worker to blame."""
        self.last_step_at = 0.0
        self.trust = 1.0
        """Cached tokens that engines report, per token that was believed to be cached."""
        self.ttft = Accuracy()
        self.itl = Accuracy()
        self._theta = self.timing.model().theta
        self._curve = Curve(self._theta)
        self._prefill_rate = 0.0
        self._rate_at = 0.0

    def usable(self, now: float) -> bool:
        """May new work go there?"""
        healthy = self.report is not None and self.report.healthy
        return healthy and not self.draining and now >= self.ejected_until

    def sent(self, entry: Entry, predicted: Prediction | None, now: float) -> None:
        """A request was sent there."""
        if not self.ledger.entries:
            self.last_step_at = now
        entry.due_at = now + (predicted.ttft_s if predicted else 0.0)
        self.ledger.sent(entry)
        if entry.request.streaming:
            self.windows.dispatched(
                entry.request.id, round(entry.uncached), round(entry.cached), now
            )

    def first_token(self, entry: Entry, at: float) -> None:
        """A stream's prompt has been prefilled."""
        self.failures = 0
        self.windows.first_token(entry.request.id, at)
        self.ledger.decodes(entry)
        if at > entry.deadline:
            self.ledger.release(entry)
        self._prefill_rate = self.prefill_rate(at) + entry.uncached / PREFILL_RATE_S
        self._rate_at = at
        self.last_step_at = max(self.last_step_at, at)

    def prefill_rate(self, now: float) -> float:
        """Prompt tokens a second, lately."""
        return self._prefill_rate * exp((self._rate_at - now) / PREFILL_RATE_S)

    def stepped(self, step: Step) -> None:
        """A step of the worker was seen."""
        self.ledger.settle_blind(step.ended_at)
        each = step.tokens / step.streams if step.streams else 0.0
        blind = self.ledger.blind + self.elsewhere.streams
        if blind:
            everyone = step.streams + blind
            step = Step(step.ended_at, step.seconds, everyone, step.tokens, step.count)
        midway = 0.5 * (step.count - 1) * each * self.ledger.streams
        for seen in self.windows.stepped(step, self.ledger.kv + self.elsewhere.context + midway):
            self.timing.observe_window(seen.steps, seen.seconds)
        self.ledger.grew(step.count * each)
        self.last_step_at = max(self.last_step_at, step.ended_at)

    def left(self, request_id: str) -> Entry | None:
        """A request is no longer there."""
        self.windows.departed(request_id)
        return self.ledger.left(request_id)

    def failed(self, now: float) -> None:
        """The worker is to blame for a failure: avoid it for a while.

        All that fails while it is avoided is the same incident: a crash breaks many streams.
        """
        if now < self.ejected_until:
            return
        self.ejected_until = now + min(EJECT_S * 2**self.failures, MAX_EJECT_S)
        self.failures += 1

    def believed(self, cached: float, reported: int) -> None:
        """An engine told how much of a prompt was cached where `cached` tokens were believed."""
        if cached > 0:
            self.trust += TRUST_RATE * (min(reported / cached, 1.0) - self.trust)

    def load(self, now: float) -> PeerLoad:
        """What is in flight there from here."""
        ledger = self.ledger
        return PeerLoad(
            self.worker.id,
            ledger.streams,
            len(ledger.entries) - ledger.streams,
            ledger.kv,
            ledger.arriving,
            ledger.ahead,
            self.prefill_rate(now),
        )

    def differs(self, standing: Standing) -> bool:
        """Have steps alone moved the worker away from a standing, by more than does not matter?"""
        return (
            self.timing.coefficients is not self._theta
            or abs(self.timing.slowdown - standing.gain) > 0.01 * standing.gain
            or self.ledger.kv - standing.kv > 0.01 * standing.kv
        )

    def standing(self, now: float) -> Standing:
        """The worker as a router sees it."""
        ledger = self.ledger
        ledger.settle_blind(now)
        model = self.timing.model()
        if model.theta is not self._theta:
            self._theta, self._curve = model.theta, Curve(model.theta)
        capacity = self.report.kv_capacity_tokens if self.report is not None else None
        others = self.elsewhere
        in_flight = InFlight(
            streams=ledger.streams + others.streams,
            arriving=len(ledger.entries) - ledger.streams + others.arriving,
            kv=ledger.kv + others.context,
            kv_arriving=ledger.arriving + others.context_arriving,
            ahead=ledger.ahead + others.ahead,
            prefill_rate=self.prefill_rate(now) + others.prefill_rate,
            budget=float(self.windows.budget),
            overhead_s=self.windows.overhead_s,
            kv_capacity=float(capacity) if capacity else inf,
            last_step_at=self.last_step_at,
        )
        return Standing(model, self._curve, in_flight, ledger.promised, now)
