"""When does a busy gateway notice what its workers send?"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from random import Random

from paceline.domain.facts import Step

READ_S = 1e-4
"""What was late together is noticed one by one: no step sooner after the one before."""


class Lateness:
    """Each step is noticed a bit late, and all in order."""

    def __init__(self, mean_s: float, rng: Random) -> None:
        self._rate = 1.0 / mean_s
        self._rng = rng
        self._last: dict[str, tuple[float, float, float]] = {}
        """Of each worker's last step: when it ended, when that was noticed, and when the end of
        the one before was."""

    def noticed_at(self, worker_id: str, ended_at: float) -> tuple[float, float]:
        """When all is noticed that a step gave which ended then, and when the one before was."""
        last_at, noticed_at, before_at = self._last.get(worker_id, (-inf, -inf, -inf))
        if ended_at > last_at:
            late_s, before_at = self._rng.expovariate(self._rate), noticed_at
            noticed_at = max(ended_at + late_s, before_at + READ_S)
            self._last[worker_id] = ended_at, noticed_at, before_at
        return noticed_at, before_at

    def steps(self, worker_id: str, step: Step) -> Iterator[Step]:
        """Each step as it is noticed: it seems to begin when the one before was."""
        for later in range(step.count - 1, -1, -1):
            ended_at = step.ended_at - later * step.seconds
            noticed_at, before_at = self.noticed_at(worker_id, ended_at)
            began_at = max(before_at, ended_at - step.seconds)
            seconds = noticed_at - began_at if step.seconds else 0.0
            yield Step(noticed_at, seconds, step.streams, step.tokens)
