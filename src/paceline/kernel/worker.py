"""What does the kernel know of one worker?"""

from __future__ import annotations

from math import exp, inf, log, sqrt

from paceline.domain.commands import Prediction
from paceline.domain.facts import PeerLoad, Step
from paceline.domain.worker import Worker, WorkerReport
from paceline.kernel.elsewhere import Elsewhere
from paceline.kernel.ledger import Entry, Ledger
from paceline.kernel.pipe import Pipe
from paceline.kernel.rate import Rate
from paceline.policy.pressure import Outlook, limit_tokens, trust_after
from paceline.policy.saturation import Saturation
from paceline.policy.standing import PROBE, Correction, Curve, InFlight, Standing
from paceline.policy.steptime import StepTimeEstimator
from paceline.policy.windows import PrefillWindows

PREFILL_RATES_S = (2.0, 5.0)
"""Time constants of the prefill rate: the higher counts, so that it rises fast and falls slowly."""
EJECT_S = 0.5
"""How long a worker is avoided after its first failure; twice as long after each further one."""
MAX_EJECT_S = 30.0
TOGETHER_S = 0.005
"""Prompts for other workers that are done within this were done by one step."""
TRUST_RATE = 0.1
SCARCE = 0.6
"""Share of the KV cache from which on it is worth a forecast."""
CALIBRATED = 20
"""Outcomes after which predictions are corrected by them."""
WELL_KNOWN = 512
"""Steps after which it is known what a lone stream would get."""
MOST_BIAS = 0.5
"""Predictions are corrected by a factor of e to this at most."""
LEAST_SPREAD = 0.05
"""Standard deviation of log(outcome / corrected prediction) that is always reckoned with."""


class Accuracy:
    """How well were outcomes predicted? Of log(outcome / prediction)."""

    __slots__ = ("_correction", "_rate", "_square", "_usual", "bias", "count", "error")

    def __init__(self, rate: float = 0.02) -> None:
        self._rate = rate
        """Weight of the newest outcome, once there are some."""
        self.count = 0
        self.bias = 0.0
        """Running mean: above 0, outcomes are later than predicted."""
        self.error = 0.0
        """Running mean of the absolute value; 0.1 is about 10 %."""
        self._square = 0.0
        self._usual = 0.0
        """Running mean of log(prediction)."""
        self._correction: Correction | None = Correction()

    @property
    def correction(self) -> Correction:
        """What predictions are to be corrected by; nothing before there are some outcomes."""
        if self._correction is None:
            factor = exp(min(max(self.bias, -MOST_BIAS), MOST_BIAS))
            spread = sqrt(max(self._square - self.bias * self.bias, LEAST_SPREAD**2))
            self._correction = Correction(factor, spread, factor * exp(self._usual))
        return self._correction

    def add(self, predicted_s: float, outcome_s: float) -> None:
        """Compare one prediction with its outcome."""
        if predicted_s <= 0 or outcome_s <= 0:
            return
        self.count += 1
        rate = max(1.0 / self.count, self._rate)
        expected = log(predicted_s)
        ratio = log(outcome_s) - expected
        self.bias += rate * (ratio - self.bias)
        self.error += rate * (abs(ratio) - self.error)
        self._square += rate * (ratio * ratio - self._square)
        self._usual += rate * (expected - self._usual)
        if self.count >= CALIBRATED:
            self._correction = None


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
        self.troubles = 0
        """Times that what was in its KV cache may have been lost."""
        self._passed_on_at = -inf
        """When a step ended that finished prompts for other workers."""
        self.saturation = Saturation()
        """Of a worker that prefills for others."""
        self.on_trial: str | None = None
        """The request that tries whether a worker that has failed is well again."""
        self.last_step_at = 0.0
        self.trust = 1.0
        """Cached tokens that engines report, per token that was believed to be cached."""
        self.outlook: Outlook | None = None
        """What its streams will need of the KV cache, as last looked at."""
        self.outlook_at = -inf
        self.kv_capacity = inf
        """Tokens; infinite if unknown."""
        self.kv_trust = 1.0
        """How far that forecast is to be trusted: less after the engine has preempted."""
        self.preemptions = 0
        """Times that the engine threw a stream out of its KV cache: a failure of ours."""
        self.ttft = Accuracy()
        self.itl = Accuracy()
        self.pipe = Pipe()
        self._theta = self.timing.coefficients
        self._curve = Curve(self._theta)
        self._prefill_rates = [Rate(seconds) for seconds in PREFILL_RATES_S]

    def usable(self, now: float) -> bool:
        """May new work go there?"""
        healthy = self.report is not None and self.report.healthy
        if not healthy or self.draining or now < self.ejected_until:
            return False
        return self.on_trial is None

    def sent(self, entry: Entry, predicted: Prediction | None, now: float) -> None:
        """A request was sent there."""
        if not self.ledger.entries:
            self.last_step_at = now
        if self.failures:
            self.on_trial = entry.request.id
        entry.due_at = now + (predicted.ttft_s if predicted else 0.0)
        self.ledger.sent(entry)
        if self.outlook is not None:
            self.outlook.add(entry.prompt, entry.left)
        if entry.passes_on:
            self.saturation.sent()
        if (entry.request.streaming or entry.passes_on) and not entry.fetches:
            self.windows.dispatched(
                entry.request.id, round(entry.uncached), round(entry.cached), now
            )

    def first_token(self, entry: Entry, at: float) -> None:
        """A stream's prompt has been prefilled."""
        self.recovered()
        self.windows.first_token(entry.request.id, at)
        self.ledger.decodes(entry)
        for rate in self._prefill_rates:
            rate.add(entry.uncached, at)
        if not entry.fetches:
            self.pipe.through(entry.uncached, entry.ahead, at - entry.sent_at)
        self.last_step_at = max(self.last_step_at, at)

    def prefilled(self, entry: Entry, at: float, until: float) -> None:
        """A prompt for another worker is done: that is all that is seen of the steps it was in."""
        self.recovered()
        if at > self._passed_on_at + TOGETHER_S:
            self._passed_on_at = at
            if not self.ledger.streams:
                self.stepped(Step(at, 0.0, 0, 0))
        self.windows.first_token(entry.request.id, self._passed_on_at)
        for rate in self._prefill_rates:
            rate.add(entry.uncached, at)
        self.last_step_at = max(self.last_step_at, at)
        budget = float(self.windows.budget)
        self.saturation.done(entry.ahead, budget, entry.uncached, entry.sent_at, at)
        self.left(entry.request.id)
        self.ledger.hold(entry.request.id, entry.prompt, until)

    @property
    def quiet_since(self) -> float:
        """Since when nothing was seen of it that should have been.

        A prompt for another worker shows nothing before it is done. One that is fetched waits for a
        link, and says nothing of the worker that it comes to.
        """
        ledger = self.ledger
        if not ledger.entries or ledger.streams:
            return self.last_step_at
        here = [entry for entry in ledger.entries.values() if not entry.fetches]
        due_at = [entry.due_at if entry.passes_on else entry.sent_at for entry in here]
        return max(self.last_step_at, min(due_at, default=inf))

    @property
    def prefill_limit(self) -> float:
        """While fewer prompt tokens than this are ahead, it may prefill another for others."""
        return self.saturation.limit(float(self.windows.budget))

    def prefill_rate(self, now: float) -> float:
        """Prompt tokens a second, lately."""
        fast, slow = self._prefill_rates
        return max(fast.at(now), slow.at(now))

    def stepped(self, step: Step) -> None:
        """A step of the worker was seen."""
        ledger = self.ledger
        ledger.settle_blind(step.ended_at)
        each = step.tokens / step.streams if step.streams else 0.0
        blind = ledger.blind + self.elsewhere.streams
        if blind:
            everyone = step.streams + blind
            step = Step(step.ended_at, step.seconds, everyone, step.tokens, step.count)
        midway = 0.5 * (step.count - 1) * each * ledger.streams
        for seen in self.windows.stepped(step, ledger.kv + self.elsewhere.context + midway):
            self.timing.observe(seen.load, seen.seconds, seen.steps)
        ledger.grew(step.count * each)
        self.last_step_at = max(self.last_step_at, step.ended_at)

    def left(self, request_id: str) -> Entry | None:
        """A request is no longer there."""
        self.windows.departed(request_id)
        if request_id == self.on_trial:
            self.on_trial = None
        return self.ledger.left(request_id)

    def reported(self, report: WorkerReport) -> None:
        """The engine told how it is."""
        before, self.report = self.report, report
        self.troubles += not report.healthy
        self.kv_capacity = float(report.kv_capacity_tokens or inf)
        if before is not None and report.preemptions_total is not None:
            more = int(report.preemptions_total - (before.preemptions_total or 0.0))
            self.preemptions += max(more, 0)
            self.kv_trust = trust_after(self.kv_trust, more > 0)

    @property
    def kv_limit(self) -> float:
        """Tokens that its streams may need; infinite if unknown."""
        return limit_tokens(self.kv_capacity, self.kv_trust)

    def kv_is_scarce(self) -> bool:
        """May it run out, if no stream ended before all were at their longest?"""
        others = self.elsewhere.context + self.elsewhere.context_arriving
        return self.ledger.due + self.ledger.held + 2.0 * others > SCARCE * self.kv_capacity

    def recovered(self) -> None:
        """It has answered."""
        self.failures, self.on_trial = 0, None

    def failed(self, now: float) -> None:
        """The worker is to blame for a failure: avoid it for a while.

        All that fails while it is avoided is the same incident: a crash breaks many streams.
        """
        self.troubles += 1
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
            len(ledger.entries) - ledger.streams - ledger.passing,
            ledger.kv,
            ledger.arriving + ledger.held,
            ledger.ahead,
            self.prefill_rate(now),
        )

    def _protected(self, factor: float) -> dict[tuple[float, float], int]:
        """The promises to residents that can be kept here at all.

        What not even a lone stream would get is lost whatever is done: it shall shut nobody out.
        """
        promised = self.ledger.promised
        if self.timing.samples < WELL_KNOWN:
            return promised
        lone_s = factor * self._curve.least_s
        for itl_s, _ in promised:
            if itl_s <= lone_s:
                return {each: n for each, n in promised.items() if each[0] > lone_s}
        return promised

    def differs(self, standing: Standing) -> bool:
        """Have steps alone moved the worker away from a standing, by more than does not matter?"""
        return (
            self.timing.coefficients is not self._theta
            or abs(self.timing.slowdown - standing.gain) > 0.01 * standing.gain
            or self.ledger.kv - standing.kv > 0.01 * standing.kv
        )

    def standing(
        self,
        now: float,
        ttft: Accuracy,
        itl: Accuracy,
        outlook: Outlook | None,
        usual_tokens: float,
    ) -> Standing:
        """The worker as a router sees it, predictions corrected by how they turned out lately."""
        ledger = self.ledger
        ledger.settle_blind(now)
        ledger.settle_held(now)
        theta = self.timing.coefficients
        if theta is not self._theta:
            self._theta, self._curve = theta, Curve(theta)
        others = self.elsewhere
        in_flight = InFlight(
            streams=ledger.streams + others.streams,
            arriving=len(ledger.entries) - ledger.streams - ledger.passing + others.arriving,
            kv=ledger.kv + others.context,
            kv_arriving=ledger.arriving + ledger.held + others.context_arriving,
            ahead=ledger.ahead + others.ahead,
            prefill_rate=self.prefill_rate(now) + others.prefill_rate,
            budget=float(self.windows.budget),
            overhead_s=self.windows.overhead_s,
            kv_capacity=self.kv_capacity,
            last_step_at=self.quiet_since,
            through_rate=self.pipe.rate,
            delay_s=self.pipe.delay_s,
        )
        return Standing(
            self.timing,
            self._curve,
            in_flight,
            self._protected(itl.correction.factor),
            ttft.correction,
            itl.correction,
            now,
            outlook,
            self.kv_limit,
            # Whether a prompt goes elsewhere turns on what prompts like those that come cost here.
            max(usual_tokens, PROBE) if self.worker.transfer else PROBE,
        )
