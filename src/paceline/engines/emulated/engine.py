"""When does which token leave? The engine model on the event loop's clock."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Sequence
from secrets import token_hex
from typing import TYPE_CHECKING, Protocol

import msgspec

from paceline.enginemodel import Generation, Scheduler, StepOutcome, StepPlan
from paceline.engines.emulated.handover import Holder
from paceline.engines.emulated.metrics import EngineMetrics, Tallies
from paceline.engines.emulated.settings import EngineSettings

if TYPE_CHECKING:
    from paceline.engines.emulated.kvevents import KvEventPublisher

MAX_LAG_S = 1.0
"""An emulator further behind its plan than this no longer catches up but starts anew."""


class Reader(Protocol):
    """Who gets the tokens of a generation. May abort generations, also its own."""

    def on_admitted(self, cached_tokens: int) -> None: ...
    def on_token(self) -> None: ...
    def on_finished(self) -> None:
        """After the last `on_token`."""
        ...


class _Progress:
    """A generation's reader and its times, in seconds of the loop's clock."""

    __slots__ = ("arrived", "first", "generation", "reader", "reason", "started")

    def __init__(self, generation: Generation, reader: Reader, reason: str, arrived: float) -> None:
        self.generation = generation
        self.reader = reader
        self.reason = reason
        self.arrived = self.started = self.first = arrived


class StepRecord(msgspec.Struct, frozen=True):
    """One step that was run, as only the engine knows it. Seconds on the loop's clock."""

    began_at: float
    ended_at: float
    """When its tokens left; later than planned if it hung, or if the loop was busy."""
    normal_s: float
    """What a decode of its streams takes by the profile, without prompts, noise and troubles..."""
    prefill_s: float
    """...and what its prompts add to it."""
    slowdown: float
    hung_s: float
    streams: int
    prefill: int
    """Prompt tokens."""
    preempted: Sequence[str]
    waiting: int


class Engine:
    """Runs steps for as long as there is work.

    Each step starts where the one before was planned to end, not when the loop came to it: so the
    pace is the profile's own, whatever else the loop has to do, and `worst_lag_s` tells how late
    the bursts of tokens really were.
    """

    def __init__(self, settings: EngineSettings, loop: asyncio.AbstractEventLoop) -> None:
        profile = settings.resolved()
        self.kv_events: KvEventPublisher | None = None
        if settings.kv_events_endpoint:
            from paceline.engines.emulated.kvevents import KvEventPublisher

            self.kv_events = KvEventPublisher(settings, profile.block_size)
        self.scheduler = Scheduler(
            profile,
            by_priority=settings.priority_scheduling,
            rng=random.Random(settings.seed),  # noqa: S311
            journal=self.kv_events,
        )
        self.holder = Holder(self.scheduler, f"emulated-{token_hex(8)}", settings, loop)
        self.tallies = Tallies()
        self.metrics = EngineMetrics(settings.model_name, self.scheduler, self.tallies)
        self.hangs_until = 0.0
        self.worst_lag_s = 0.0
        self._loop = loop
        self._speed = settings.speed
        self._progress: dict[str, _Progress] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._hung: StepPlan | None = None
        """The step that does not end."""
        self._hung_s = 0.0
        """How much longer it took by that."""
        self._last_end = 0.0
        self.steps: deque[StepRecord] = deque(maxlen=settings.step_log)
        """The newest ones, for whoever wants the truth."""

    def start(self, generation: Generation, reader: Reader, reason: str) -> None:
        """Queue a generation; `reason` is why it will finish, for the metrics."""
        self.scheduler.add(generation)
        now = self._loop.time()
        self._progress[generation.id] = _Progress(generation, reader, reason, now)
        if self._timer is None:
            self._last_end = now
            self._begin(now)

    def abort(self, generation_id: str) -> None:
        if self.scheduler.abort(generation_id):
            del self._progress[generation_id]
            self.tallies.finished["abort"] += 1

    def stop(self) -> None:
        """For good: the process died."""
        self.holder.stop()
        if self._timer is not None:
            self._timer.cancel()
        if self.kv_events is not None:
            self.kv_events.close()

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks. False: not while some are in use."""
        done = self.scheduler.pool.clear()
        if done and self.kv_events is not None:
            self.kv_events.cleared()
        return done

    def recover(self) -> None:
        """End a slowdown and a hang."""
        self.scheduler.slowdown = 1.0
        self.hangs_until = 0.0
        if self._hung is not None and self._timer is not None:
            self._timer.cancel()
            self._end(self._hung, self._loop.time())

    def _begin(self, at: float) -> None:
        plan = self.scheduler.plan()
        if plan is None:
            self._timer = None
            return
        for request_id, cached_tokens in plan.admitted.items():
            progress = self._progress[request_id]
            progress.started = max(at, progress.arrived)
            self.tallies.queue_s.observe(progress.started - progress.arrived)
            progress.reader.on_admitted(cached_tokens)
        end = at + plan.seconds / self._speed
        self._timer = self._loop.call_at(end, self._end, plan, end)

    def _end(self, plan: StepPlan, end: float) -> None:
        now = self._loop.time()
        if now < self.hangs_until:
            resumed = self.hangs_until
            self._hung = plan
            self._hung_s = resumed - end
            self._timer = self._loop.call_at(resumed, self._end, plan, resumed)
            return
        self._hung = None
        self.worst_lag_s = max(self.worst_lag_s, now - end)
        if now - end > MAX_LAG_S:
            end = now
        if self.steps.maxlen:
            self._note(plan, now)
        outcome = self.scheduler.complete(plan)
        self._tally(plan, outcome, end)
        self._last_end = end
        if self.kv_events is not None:
            self.kv_events.tell()
        for request_id in [*self.scheduler.decoding, *outcome.finished]:
            if request_id in self._progress:  # not aborted by what another reader did
                self._progress[request_id].reader.on_token()
        for request_id in outcome.finished:
            if request_id in self._progress:
                self._progress.pop(request_id).reader.on_finished()
        self._begin(end)

    def _note(self, plan: StepPlan, now: float) -> None:
        load, profile = plan.load, self.scheduler.profile
        decode_s = profile.step_seconds(msgspec.structs.replace(load, prefill=0, attention=0.0))
        prefill_s = profile.step_seconds(load) - decode_s
        self.steps.append(
            StepRecord(
                self._last_end,
                now,
                decode_s / self._speed,
                prefill_s / self._speed,
                self.scheduler.slowdown,
                self._hung_s,
                load.streams,
                load.prefill,
                plan.preempted,
                self.scheduler.waiting,
            )
        )
        self._hung_s = 0.0

    def _tally(self, plan: StepPlan, outcome: StepOutcome, end: float) -> None:
        """The engine's own view of its latencies, by planned times."""
        tallies = self.tallies
        tallies.step_tokens.observe(plan.load.streams + plan.load.prefill)
        if plan.load.streams:
            tallies.itl_s.observe(end - self._last_end, plan.load.streams)
        for request_id in outcome.first:
            progress = self._progress[request_id]
            progress.first = end
            tallies.ttft_s.observe(end - progress.arrived)
            tallies.prefill_s.observe(end - progress.started)
        for request_id in outcome.finished:
            progress = self._progress[request_id]
            decode_s, tokens = end - progress.first, progress.generation.output_tokens
            tallies.finished[progress.reason] += 1
            tallies.e2e_s.observe(end - progress.arrived)
            tallies.decode_s.observe(decode_s)
            tallies.prompt_tokens.observe(progress.generation.prompt_tokens)
            tallies.answer_tokens.observe(tokens)
            if tokens > 1:
                tallies.mean_itl_s.observe(decode_s / (tokens - 1))
