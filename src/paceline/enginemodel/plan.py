"""What does the engine do in its next steps, and what comes of them?"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import msgspec
from msgspec.structs import replace

from paceline.enginemodel.generation import Running
from paceline.enginemodel.profile import Load


class StepPlan(msgspec.Struct, frozen=True, gc=False):
    """A step to be run now, or several without prompts and of the same streams."""

    load: Load
    """Of the first step."""
    seconds: float
    """Of all steps together."""
    admitted: dict[str, int]
    """Requests that left the queue, with their prompt tokens found in the cache."""
    chunks: Sequence[tuple[Running, int]]
    """Prompts with the tokens of them that are computed."""
    steps: int = 1
    longest_s: float = 0.0
    """The longest of the steps."""
    rise_s: float = 0.0
    """How much longer each step is than the one before: context grows."""
    preempted: Sequence[str] = ()
    """Requests that lost their place for want of blocks, and wait again."""

    def seconds_of(self, steps: int) -> float:
        """What the first so many of the steps take."""
        if steps == self.steps:
            return self.seconds
        mean_s = self.seconds / self.steps
        return steps * (mean_s - 0.5 * self.rise_s * (self.steps - steps))

    def ended_after(self, elapsed_s: float) -> int:
        """How many steps are over after so many seconds; at least one is not."""
        steps, seconds, rise_s = self.steps, self.seconds, self.rise_s
        first_s = seconds / steps - 0.5 * rise_s * steps
        if elapsed_s < first_s:
            return 0
        if rise_s * steps > 2e-9 * first_s:
            done = int((sqrt(first_s * first_s + 2.0 * rise_s * elapsed_s) - first_s) / rise_s)
        else:
            done = int(elapsed_s * steps / seconds)
        return done if done < steps else steps - 1

    def first(self, steps: int) -> StepPlan:
        """The first so many of the steps alone."""
        return replace(self, steps=steps, seconds=self.seconds_of(steps))

    def after(self, steps: int) -> StepPlan:
        """The steps after the first so many, which are completed."""
        seconds = self.seconds - self.seconds_of(steps)
        return replace(self, steps=self.steps - steps, seconds=seconds)


class StepOutcome(msgspec.Struct, frozen=True, gc=False):
    """What the last step gave: one token for each id in `finished` and in `Scheduler.decoding`."""

    first: Sequence[str]
    """Requests whose first token it was; they may be finished with it."""
    resumed: Sequence[str]
    """Preempted requests that have got a token again."""
    finished: Sequence[str]
