"""Simulated fleets with one trouble each, what was found late there, and what was true."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec

from paceline.domain.commands import Command
from paceline.domain.facts import Fact
from paceline.enginemodel import PROFILES, Profile, StepOutcome, StepPlan
from paceline.observe.diagnosis import Diagnosis
from paceline.observe.losses import Late
from paceline.observe.stalls import Stalls
from paceline.policy.causes import Cause
from paceline.policy.look import Finding
from paceline.simulator.replica import Replica
from paceline.simulator.scenario import Fault, Requests, Scenario, SimTier, Workers
from paceline.simulator.simulation import Simulation

CHAT = Requests(rate=9.0, tier="chat", tenant="acme", prompt=(300, 1500), output=(120, 400))
PROMPTS = (Cause.OTHERS_PREFILL, Cause.PREEMPTION)
HEALTHY = Scenario(
    about="Chat on three equal workers, at a third of what they can do.",
    seconds=60.0,
    workers=(Workers(profile="h100-llama-70b-tp4", count=3),),
    tiers={"chat": SimTier(ttft_s=1.0, itl_s=0.04), "documents": SimTier(ttft_s=20.0, itl_s=0.2)},
    requests=(CHAT,),
)


def healthy(*faults: Fault, **changed: Any) -> Scenario:
    """The healthy fleet with these troubles."""
    return msgspec.structs.replace(HEALTHY, **{"faults": faults} | changed)


class TrueStep(msgspec.Struct, frozen=True):
    """One step as the engine model ran it."""

    began_at: float
    ended_at: float
    planned_s: float
    normal_s: float
    """Of its decodes, by the profile."""
    prefill_s: float
    anew_s: float
    """Of that, what computes again what was preempted."""
    slowdown: float


class Watched:
    """A run, with somebody who explains what is late, and a record of what was true."""

    def __init__(
        self,
        scenario: Scenario,
        policy: str = "headroom",
        profile: Callable[[Profile], Profile] = lambda profile: profile,
        seed: int = 1,
    ) -> None:
        self.truth: dict[str, list[TrueStep]] = {}
        self.findings: list[tuple[float, list[Finding]]] = []
        self._early: list[tuple[float, Fact, list[Command]]] = []
        self._stalls: Stalls | None = None
        self.simulation = simulation = Simulation(
            scenario, policy, seed, lambda workers: profile(PROFILES[workers.profile]), self._saw
        )
        kernel = simulation.gateways[0].kernel
        self.stalls = self._stalls = Stalls(kernel)
        for entry in self._early:
            self._stalls.saw(*entry)
        clock = simulation.clock
        self.diagnosis = Diagnosis(kernel, self.stalls, (lambda: clock.now, lambda: clock.now))
        for name, replica in simulation.replicas.items():
            self._record(replica, self.truth.setdefault(name, []))
        clock.at(1.0, self._look)

    def run(self) -> Watched:
        self.simulation.run()
        return self

    @property
    def late(self) -> list[Late]:
        return [late for kept in self.stalls.losses.late.values() for late in kept]

    def causes(self, *whats: str) -> Counter[Cause]:
        """Of late events of these kinds."""
        return Counter(late.cause for late in self.late if late.what in whats)

    def _saw(self, now: float, fact: Fact, commands: list[Command]) -> None:
        if self._stalls is None:
            self._early.append((now, fact, commands))
        else:
            self._stalls.saw(now, fact, commands)

    def _look(self, _: object) -> None:
        now = self.simulation.clock.now
        self.findings.append((now, self.diagnosis.findings(now)))
        if now < self.simulation.scenario.seconds:
            self.simulation.clock.at(now + 1.0, self._look)

    def _record(self, replica: Replica, record: list[TrueStep]) -> None:
        scheduler, clock = replica.scheduler, self.simulation.clock
        complete = scheduler.complete

        def noted(plan: StepPlan, steps: int = 0) -> StepOutcome:
            load, profile, n = plan.load, scheduler.profile, steps or plan.steps
            decode_s = profile.step_seconds(msgspec.structs.replace(load, prefill=0, attention=0.0))
            prefill_s = profile.step_seconds(load) - decode_s
            took_s = plan.seconds_of(n)
            anew = sum(tokens for running, tokens in plan.chunks if running.produced)
            record.append(
                TrueStep(
                    replica.began_at,
                    clock.now,
                    took_s,
                    n * decode_s,
                    prefill_s,
                    prefill_s * anew / max(load.prefill, 1),
                    scheduler.slowdown,
                )
            )
            return complete(plan, steps)

        scheduler.complete = noted  # type: ignore[method-assign]

    def is_right(self, late: Late) -> bool | None:
        """Has a late step the cause that the engine model's record shows? None: there is none.

        Where a step computes prompts and also anew what was preempted, a gateway may call the one
        the other.
        """
        truth, anew = self.true_cause(late)
        if truth is None:
            return None
        return late.cause is truth or (anew and late.cause in PROMPTS and truth in PROMPTS)

    def true_cause(self, late: Late) -> tuple[Cause | None, bool]:
        """What most of a late step went into beyond its decodes; did it compute anything anew?"""
        within = [
            step
            for step in self.truth[late.worker]
            if step.ended_at > late.at - late.seconds + 1e-6 and step.began_at < late.at - 1e-6
        ]
        if not within:
            return None, False
        longest = max(within, key=lambda step: step.ended_at - step.began_at)
        normal_s = longest.normal_s + longest.prefill_s
        parts = {
            Cause.OTHERS_PREFILL: longest.prefill_s - longest.anew_s,
            Cause.PREEMPTION: longest.anew_s,
            Cause.SLOW_WORKER: max(longest.planned_s - normal_s, 0.0),
            Cause.HANG: longest.ended_at - longest.began_at - longest.planned_s,
        }
        return max(parts, key=lambda cause: parts[cause]), longest.anew_s > 0.0
