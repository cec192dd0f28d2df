"""Which prompt tokens were prefilled in which step?

A gateway sees steps end, when chunks arrive, and prompts end, when a first token arrives. An engine
with chunked prefill serves prompts in order and fills each step up to a token budget, decodes
first. So a prompt whose first token came with a step was prefilled in the last few steps up to it,
as few as have room for it: first tokens are booked backwards.

A step is settled, and can be learned from, once no prompt still waiting for its first
token could reach back to it. What cannot be settled (an aborted prompt, books that don't balance)
is dropped: there will be more steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from math import ceil

import msgspec
from msgspec.structs import replace

from paceline.domain.facts import Step
from paceline.policy.steptime import Load

MOST_STEPS = 256
"""Steps that may await settlement; older ones are dropped."""
REMEMBERED = 512
"""Settled steps kept for whoever explains them."""
BUDGETS = (2048, 1024, 4096, 512, 8192, 256, 16384)
"""Tokens that a step may hold: the likely ones first."""
LEAST_BUDGET = min(BUDGETS)
CONVINCING = 4.0
"""Prompts that must agree on a budget before it is relied on."""
PATIENCE = 8
"""Steps that wait for prompts which only a smaller budget could put there: news must not be old."""
NOTICED = 128
"""A step with so many prompt tokens that took hardly longer than a quiet one did not have them:
their first token came late, because the engine's server was busy."""
WAITS = 32
"""Recent waits between sending and prefill that the overhead is judged by."""
WITHHELD = 8
"""Observations of an idle worker that wait for the overhead to be known."""


class Observation(msgspec.Struct, frozen=True, gc=False):
    """Steps of known load that took so long together: food for `StepTimeEstimator.observe`."""

    load: Load
    """Of each."""
    seconds: float
    """Of all."""
    steps: float = 1.0


class _Prompt(msgspec.Struct):
    uncached: int
    context: int
    sent_at: float
    alone: bool
    """No other prompt was waiting at the same time."""
    first_at: float = 0.0


class PastStep:
    """A step that has ended, and the prompts that are booked on it so far."""

    __slots__ = (
        "chunks",
        "count",
        "each",
        "ended_at",
        "ends",
        "idle",
        "kv",
        "prefill",
        "seconds",
        "spoiled",
        "streams",
        "unplaced",
    )

    def __init__(
        self,
        ended_at: float,
        seconds: float,
        streams: int,
        kv: float,
        each: float = 1.0,
        count: int = 1,
    ) -> None:
        self.ended_at = ended_at
        self.seconds = seconds
        self.streams = streams
        self.kv = kv
        self.each = each
        """Tokens that each stream got."""
        self.count = count
        """Steps told in one; then `seconds` is their mean."""
        self.idle = seconds <= 0
        """The worker had no stream: nothing tells when the step began, nor whether it was one."""
        self.chunks: tuple[tuple[int, int], ...] = ()
        """(tokens, tokens of context before them)."""
        self.prefill = 0
        """Tokens of all chunks."""
        self.ends = False
        """A prompt's first token came with it."""
        self.spoiled = False
        """Nobody knows what was prefilled in it."""
        self.unplaced = 0
        """Tokens of prompts that were prefilled in it or before it, for which the budget that is
        believed in leaves no room."""

    @property
    def began_at(self) -> float:
        return self.ended_at - self.seconds * self.count

    def book(self, tokens: int, context: int) -> None:
        """So many prompt tokens after so many of context were computed in it."""
        self.chunks += ((tokens, context),)
        self.prefill += tokens

    def load(self) -> Load:
        q = 0.0
        for tokens, context in self.chunks:
            q += tokens * (context + tokens / 2)
        return Load(self.streams, self.prefill, self.kv, q)


class PrefillWindows:
    """Books the prompts of one worker on its steps."""

    def __init__(self, budget: int = 0) -> None:
        self._told = budget > 0
        self.budget = budget or BUDGETS[0]
        """Tokens that a step may hold: told, else learned."""
        self.overhead_s = 0.0
        """Seconds that a request spends outside of steps: link, HTTP, tokenising.

        A request sent at any moment of a step waits for its end too, so the least waits show it.
        """
        self._votes = dict.fromkeys(BUDGETS, 0.0)
        self._waiting: dict[str, _Prompt] = {}
        """Sent, no token yet; in the order of sending."""
        self._begun: list[_Prompt] = []
        """Whose first token came, with a step that is not yet known."""
        self._unbooked = 0
        """Tokens of all of these."""
        self._past: deque[PastStep] = deque()
        self.settled: deque[PastStep] = deque(maxlen=REMEMBERED)
        """Steps of which all is known that ever will be, in order; to be taken out by a reader."""
        self._quiet_s = 0.0
        """Of a step without prefill, lately; 0: none was seen."""
        self._waits: deque[float] = deque(maxlen=WAITS)
        self._withheld: list[Observation] = []

    def told(self, budget: int) -> None:
        """The engine or the operator says how many tokens a step may hold."""
        self._told, self.budget = True, budget

    def dispatched(self, request_id: str, uncached: int, context: int, sent_at: float) -> None:
        """A request was sent; `context` of its prompt tokens are believed to be cached."""
        for other in self._waiting.values():
            other.alone = False
        prompt = _Prompt(max(uncached, 1), context, sent_at, alone=not self._waiting)
        self._waiting[request_id] = prompt
        self._unbooked += prompt.uncached

    def first_token(self, request_id: str, at: float) -> None:
        """A request's first token came. Told before the step it came with."""
        prompt = self._waiting.pop(request_id, None)
        if prompt is not None:
            prompt.first_at = at
            self._begun.append(prompt)

    def departed(self, request_id: str) -> None:
        """A request left. Before its first token, nobody knows what was prefilled of it."""
        prompt = self._waiting.pop(request_id, None)
        if prompt is not None:
            self._unbooked -= prompt.uncached
            for past in self._past:
                if past.ended_at > prompt.sent_at:
                    past.spoiled = True

    def stepped(self, step: Step, kv: float) -> list[Observation]:
        """A step ended; its streams had `kv` tokens of context. Returns what is settled by now."""
        if step.count > 1:
            return self._run(step, kv)
        past = self._past
        if self._begun and past:
            self._book(step.ended_at)
        if not self._unbooked and step.streams:
            pace = 0.1 if self._quiet_s else 1.0
            self._quiet_s += pace * (step.seconds - self._quiet_s)
        each = step.tokens / step.streams if step.streams else 0.0
        past.append(PastStep(step.ended_at, step.seconds, step.streams, kv, each))
        if len(past) > MOST_STEPS:
            self.settled.append(past.popleft())
        settled: list[Observation] = []
        unsettled = self._within_reach(step.streams)
        while len(past) > unsettled:
            settled += self._settle(past.popleft())
        return settled

    def _run(self, run: Step, kv: float) -> list[Observation]:
        """Steps told in one; those that prompts may be in are taken one by one."""
        busy = self._unbooked > 0
        apart = min(run.count, self._within_reach(run.streams)) if busy else 0
        together = run.count - apart
        settled: list[Observation] = []
        if together:
            if self._begun and self._past:
                self._book(run.ended_at - (run.count - 1) * run.seconds)
            while self._past:
                settled += self._settle(self._past.popleft())
            if run.seconds > 0:
                ended_at = run.ended_at - apart * run.seconds
                each = run.tokens / run.streams if run.streams else 0.0
                alike = PastStep(ended_at, run.seconds, run.streams, kv, each, together)
                self.settled.append(alike)
                load = Load(run.streams, 0.0, kv)
                settled.append(Observation(load, together * run.seconds, float(together)))
                if not busy:
                    pace = 1.0 - 0.9**together if self._quiet_s else 1.0
                    self._quiet_s += pace * (run.seconds - self._quiet_s)
        for left in reversed(range(apart)):
            ended_at = run.ended_at - left * run.seconds
            settled += self.stepped(Step(ended_at, run.seconds, run.streams, run.tokens), kv)
        return settled

    def _within_reach(self, streams: int) -> int:
        """How many of the last steps the prompts not yet booked could fill, served in order.

        A budget without evidence may be far smaller than the one believed in.
        """
        tokens, budget = self._unbooked, self.budget
        if not tokens:
            return 1
        reach = ceil(tokens / max(budget - streams, budget / 2))
        if not self._told and self._votes[budget] < CONVINCING:
            least = LEAST_BUDGET
            reach = max(reach, min(ceil(tokens / max(least - streams, least / 2)), PATIENCE))
        return 1 + reach

    def _book(self, before: float) -> None:
        """Book the prompts whose first token came with the newest step: the next one has begun."""
        newest = self._past[-1]
        now = sorted((p for p in self._begun if p.first_at < before), key=lambda p: p.sent_at)
        self._begun = [p for p in self._begun if p.first_at >= before]
        if newest.idle and now:
            last_end = self._past[-2].ended_at if len(self._past) > 1 else now[0].sent_at
            newest.seconds = newest.ended_at - max(now[0].sent_at, last_end)
        if now and not newest.idle:
            self._learn_budget(now)
        newest.ends = bool(now)
        for prompt in now:
            self._unbooked -= prompt.uncached
            if newest.idle:
                newest.book(prompt.uncached, prompt.context)
            else:
                self._spread(prompt)

    def _reachable(self, prompt: _Prompt) -> Iterator[PastStep]:
        """Steps that may have prefilled it, newest first: begun after it was sent."""
        steps = reversed(self._past)
        yield next(steps)
        for past in steps:
            if past.idle or past.began_at < prompt.sent_at:
                return
            yield past

    def _spread(self, prompt: _Prompt) -> None:
        """Book a prompt on the fewest steps up to the newest that have room for it."""
        taken: list[tuple[PastStep, int]] = []
        missing = prompt.uncached
        for past in self._reachable(prompt):
            room = max(self.budget - past.streams - past.prefill, 0)
            if self._is_quiet(past):
                room = min(room, max(NOTICED - past.prefill, 0))
            taken.append((past, room))
            missing -= room
            if missing <= 0:
                break
        if missing > 0:
            for past, _ in taken:
                past.spoiled = True
                past.unplaced += prompt.uncached
            return
        done = 0
        for past, room in reversed(taken):
            chunk = min(room, prompt.uncached - done)
            past.book(chunk, prompt.context + done)
            done += chunk
        if prompt.alone:
            self._waits.append(max(taken[-1][0].began_at - prompt.sent_at, 0.0))
            self.overhead_s = sorted(self._waits)[len(self._waits) // 10]

    def _is_quiet(self, past: PastStep) -> bool:
        """Was it over too soon to have had many prompt tokens? As long as no quiet step is known,
        if it took less than half of the newest one's time."""
        return past.seconds < (1.1 * self._quiet_s or 0.5 * self._past[-1].seconds)

    def _learn_budget(self, ended: list[_Prompt]) -> None:
        """Prompts that end with the newest step took so many steps, in a row: which budgets fit?

        They had all that a step may hold from the end of the prompts before them on, and perhaps a
        part of that step too; or else from when the first of them came.
        """
        tokens = sum(prompt.uncached for prompt in ended)
        if self._told or tokens <= LEAST_BUDGET:
            return
        steps, part = 0, 0
        for past in self._reachable(ended[0]):
            if past.ends:
                part = 1
                break
            if steps and self._is_quiet(past):
                break
            steps += 1
        if steps == len(self._past):
            return  # it may have begun before
        votes, streams = self._votes, self._past[-1].streams
        for budget in BUDGETS:
            full = ceil(tokens / max(budget - streams, 1))
            votes[budget] = 0.95 * votes[budget] + (steps <= full <= steps + part)
        self.budget = max(BUDGETS, key=votes.__getitem__)

    def _settle(self, past: PastStep) -> list[Observation]:
        self.settled.append(past)
        if past.spoiled or past.seconds <= 0:
            return []
        if past.prefill >= NOTICED and past.seconds < 1.1 * self._quiet_s:
            return []
        if not past.idle:
            return [Observation(past.load(), past.seconds)]
        self._withheld.append(self._from_idle(past))
        if not self._waits and len(self._withheld) < WITHHELD:
            return []
        ready, self._withheld = self._withheld, []
        spared = [
            replace(seen, seconds=max(seen.seconds - self.overhead_s, 0.5 * seen.seconds))
            for seen in ready
        ]
        return spared

    def _from_idle(self, past: PastStep) -> Observation:
        """The time to a first token on an idle worker: as many steps as its prompts fill."""
        load = past.load()
        steps = ceil(load.prefill / self.budget)
        each = Load(0.0, load.prefill / steps, 0.0, load.q / steps)
        return Observation(each, past.seconds, float(steps))
