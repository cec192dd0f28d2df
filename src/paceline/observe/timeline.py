"""What did one worker spend its time on, between any two moments?

The parts of its steps are summed up once; a moment that matters to somebody (a request was sent,
its first token came, it ended) is a mark, which gets the sums as they stood then. That is known
only once the steps up to it are settled, a step or some later.
"""

from __future__ import annotations

from collections import deque
from math import inf
from operator import add
from struct import Struct

import msgspec

from paceline.policy.causes import (
    AGAIN,
    AT_BEST,
    BATCH,
    LINK,
    NOTHING,
    PREFILL,
    SLOW,
    STEPS,
    Speed,
    Sums,
    step_sums,
)
from paceline.policy.pace import LAST, Seen
from paceline.policy.standing import Curve
from paceline.policy.windows import PastStep

FOLLOWED = 8
"""Steps after a late one that show whether it is caught up..."""
MADE_UP = 0.5
"""...which it is if they make up for such a share of it."""
PATIENCE_S = 1.0
"""Until what is known of a step has to suffice."""
REPORT_S = 2.5
"""Within so long an engine's next report comes, if it is well."""
MOST_OPEN = 256
"""Late steps that wait for those after them."""
MOST_WORST = 64
"""Late steps kept, each shorter than the one before."""

_SUMS = Struct(f"{len(NOTHING)}d")


class Mark(msgspec.Struct, gc=False):
    """A moment, and the sums up to it once they are known."""

    at: float
    before: bytes | None = None
    """The sums when the step that it is in began, in one piece, as they are kept for long..."""
    after: bytes | None = None
    """...and when that ended."""
    share: float = 1.0
    """Of that step, up to the moment."""

    @property
    def sums(self) -> Sums | None:
        """Few are ever asked for."""
        before, after, share = self.before, self.after, self.share
        if before is None or after is None:
            return None
        began, ended = _SUMS.unpack(before), _SUMS.unpack(after)
        return [b + share * (a - b) for b, a in zip(began, ended, strict=True)]


class LateStep(msgspec.Struct):
    """A step longer than somebody's patience."""

    at: float
    seconds: float
    sums: Sums
    followed: int = 0
    regained_s: float = 0.0
    """By which steps of decodes since then were quicker than expected."""
    told: bool = False
    """Its engine has reported since."""
    misbooked_s: float = 0.0
    """The same of steps with prompts, that may have been prefilled in this one."""


class Timeline:
    """The steps of one worker."""

    def __init__(self) -> None:
        self.sums: Sums = NOTHING.copy()
        self.last: deque[Seen] = deque(maxlen=LAST)
        """Its last steps, however long ago."""
        self.reached = -inf
        """Up to when its steps are known."""
        self.speed = Speed(Curve((1e-3, *[0.0] * 9)))
        self.late: deque[LateStep] = deque(maxlen=MOST_OPEN)
        """Late steps that are not explained yet."""
        self._worst: deque[LateStep] = deque(maxlen=MOST_WORST)
        """Late steps, only those that no later one exceeds."""
        self._saved_s = 0.0
        """By how much steps with prompts just now were quicker than expected."""
        self._marks: deque[Mark] = deque()

    def mark(self, at: float) -> Mark:
        """A moment that matters; in order of time, or nearly."""
        mark = Mark(at)
        if at <= self.reached:
            mark.before = mark.after = _SUMS.pack(*self.sums)
        else:
            self._marks.append(mark)
        return mark

    def stepped(self, step: PastStep, lag_s: float, late_s: float) -> None:
        """A step is settled, `late_s` from when on it is late."""
        marks, ended_at = self._marks, step.ended_at
        self.reached = ended_at
        before = _SUMS.pack(*self.sums) if marks and marks[0].at <= ended_at else None
        plain = not (step.prefill or step.idle or step.spoiled or lag_s or self.late)
        if plain and step.count == 1 and step.seconds <= late_s and step.each < 1.5:
            self._decoded(step)
        else:
            self._split(step, step_sums(step, self.speed, lag_s), late_s)
        if before is not None:
            self._passed(step, before)

    def _split(self, step: PastStep, each: Sums, late_s: float) -> None:
        """A step of which there is more to say than that its streams got a token."""
        count = step.count
        if count == 1:
            self.sums = list(map(add, self.sums, each))
        else:
            self.sums = [a + count * b for a, b in zip(self.sums, each, strict=True)]
        self.last.append((each[BATCH] + each[PREFILL], each[SLOW], each[AT_BEST], count))
        if self.late:
            self._follow(step, each)
        if step.seconds > late_s:
            self._keep(LateStep(step.ended_at, step.seconds, each, misbooked_s=self._saved_s))
        saved_s = max(-each[SLOW], 0.0)
        self._saved_s = saved_s if step.prefill else 0.5 * self._saved_s

    def _passed(self, step: PastStep, before: bytes) -> None:
        """What was marked within a step is known now."""
        marks, ended_at, after = self._marks, step.ended_at, _SUMS.pack(*self.sums)
        span_s = step.count * step.seconds
        while marks and marks[0].at <= ended_at:
            mark = marks.popleft()
            share = 1.0 - (ended_at - mark.at) / span_s if span_s > 0.0 else 1.0
            mark.before, mark.after, mark.share = before, after, min(max(share, 0.0), 1.0)

    def _decoded(self, step: PastStep) -> None:
        """Nearly all steps: `step_sums` in short, for this is done some thousand times a second."""
        speed, sums = self.speed, self.sums
        best_s = (speed.curve.at(step.streams) + speed.curve.kv_s * step.kv) / speed.aged
        batch_s = best_s * speed.aged / max(speed.like, speed.aged)
        slow_s = step.seconds - batch_s
        sums[BATCH] += batch_s
        sums[SLOW] += slow_s
        sums[STEPS] += 1.0
        sums[AT_BEST] += best_s
        self.last.append((batch_s, slow_s, best_s, 1))

    def _follow(self, step: PastStep, each: Sums) -> None:
        """Was a late step made up for by this one?"""
        saved_s = max(-step.count * each[SLOW], 0.0)
        for late in self.late:
            late.followed += step.count
            if step.prefill:
                late.misbooked_s += saved_s
            else:
                late.regained_s += saved_s

    def _keep(self, late: LateStep) -> None:
        self.late.append(late)
        while self._worst and self._worst[-1].seconds <= late.seconds:
            self._worst.pop()
        self._worst.append(late)

    def worst(self, since: float) -> LateStep | None:
        """The longest of the late steps that began after a moment."""
        began = since - 1e-3
        return next((late for late in self._worst if late.at - late.seconds >= began), None)

    def told(self, held_up: bool, preempted: bool) -> None:
        """The engine has told how it was up to now: late steps may not have been its fault.

        `held_up`: its own gaps were not late. `preempted`: it had to compute streams anew.
        """
        for late in self.late:
            late.told = True
            if preempted or held_up:
                _shift(late.sums, AGAIN if preempted else LINK)

    def explained(self, now: float) -> list[LateStep]:
        """Late steps of which enough is known by now.

        Where a worker seems slow, its engine's next report may say that it was not.
        """
        done = []
        while self.late:
            late = self.late[0]
            slow_s, age_s = late.sums[SLOW], now - late.at
            if slow_s > 0.5 * late.seconds and not late.told:
                if age_s < REPORT_S:
                    break
            elif late.followed < FOLLOWED and age_s < PATIENCE_S:
                break
            self.late.popleft()
            if slow_s > 0.0:
                if late.misbooked_s > MADE_UP * slow_s:
                    _shift(late.sums, PREFILL)
                elif late.regained_s > MADE_UP * slow_s:  # tokens were held up
                    _shift(late.sums, LINK)
            done.append(late)
        return done

    def settle(self, before: float) -> None:
        """What is marked before and not known by now will not be known any better."""
        while self._marks and self._marks[0].at < before:
            mark = self._marks.popleft()
            mark.before = mark.after = _SUMS.pack(*self.sums)


def _shift(sums: Sums, to: int) -> None:
    """The worker was not slow: it was something else."""
    if sums[SLOW] > 0.0:
        sums[to] += sums[SLOW]
        sums[SLOW] = 0.0


def between(first: Mark, last: Mark) -> Sums:
    """What went by between two marks that are known."""
    began, ended = first.sums, last.sums
    assert began is not None
    assert ended is not None
    return [b - a for a, b in zip(began, ended, strict=True)]
