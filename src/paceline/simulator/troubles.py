"""When were workers down, hung or slow, as their gateway saw it?

Slow is what takes long for its number of streams, even where no prompt is prefilled: the quickest
fifth of the steps in a second, against what is usual of the worker in the whole log.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import groupby, pairwise
from math import inf
from typing import Literal

import numpy as np

from paceline.domain.facts import Step
from paceline.simulator.scenario import Fault

SLOW = 1.5
"""Times its usual step time: then a worker is slow."""
QUICKEST = 0.2
"""Share of a window's steps that is sure to hold some without prefill."""
WINDOW_S = 1.0
LEAST_WINDOWS = 2
"""In a row, to be slow."""
FEW_STEPS = 5
"""A window with fewer tells nothing."""
PROBE_S = 2.5
"""So long after a worker died at the latest its probe says so."""
SHORTEST_S = 0.1


Kind = Literal["slow", "hang", "crash"]


class Troubles:
    """Told of workers in order of time; gives the faults of a scenario."""

    def __init__(self) -> None:
        self._blamed: dict[str, float] = {}
        """When a worker first failed a request, of late."""
        self._seen: list[Fault] = []
        self._healthy: dict[str, bool] = {}
        self._down: dict[str, float] = {}
        self._hung: dict[str, float] = {}
        self._steps: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
        """When they ended, how long they took, and of how many streams."""

    def reported(self, worker_id: str, healthy: bool, now: float) -> None:
        """Its probe told how it is."""
        if not healthy and self._healthy.get(worker_id):
            blamed = self._blamed.get(worker_id, -inf)
            self._down[worker_id] = blamed if now - blamed < PROBE_S else now
        elif healthy and worker_id in self._down:
            self._was("crash", worker_id, self._down.pop(worker_id), now)
        self._healthy[worker_id] = healthy

    def blamed(self, worker_id: str, now: float) -> None:
        """It failed a request."""
        if now - self._blamed.get(worker_id, -inf) > PROBE_S:
            self._blamed[worker_id] = now

    def hangs(self, worker_id: str) -> None:
        """Requests are taken off it because no step ends."""
        steps = self._steps[worker_id]
        self._hung.setdefault(worker_id, steps[-1][0] if steps else 0.0)

    def stepped(self, worker_id: str, step: Step, now: float) -> None:
        """Steps of it were seen."""
        if worker_id in self._hung:
            self._was("hang", worker_id, self._hung.pop(worker_id), now)
        if step.seconds > 0 and step.streams:
            self._steps[worker_id] += [
                (now - back * step.seconds, step.seconds, step.streams)
                for back in reversed(range(step.count))
            ]

    def faults(self, end_s: float) -> list[Fault]:
        """All of them, by when they began; those that have not ended last to the end.

        A worker that goes down as the log ends is left out: so it looks when all is shut down.
        """
        lasting: list[tuple[Kind, dict[str, float]]] = [("crash", self._down), ("hang", self._hung)]
        for kind, begun in lasting:
            for worker_id, since in begun.items():
                if end_s - since > PROBE_S:
                    self._was(kind, worker_id, since, end_s)
        for worker_id, steps in self._steps.items():
            for since, until, factor in slow_times(np.array(steps), end_s):
                self._was("slow", worker_id, since, until, factor)
        return sorted(self._seen, key=lambda fault: (fault.at_s, fault.worker))

    def _was(
        self, kind: Kind, worker_id: str, since: float, until: float, factor: float = 1.0
    ) -> None:
        for_s = max(until - since, SHORTEST_S)
        fault = Fault(kind=kind, worker=worker_id, at_s=since, for_s=for_s, factor=factor)
        self._seen.append(fault)


def slow_times(
    steps: np.ndarray[tuple[int, ...], np.dtype[np.float64]], end_s: float
) -> Iterator[tuple[float, float, float]]:
    """From when until when a worker was slow, and how many times. Rows: end, seconds, streams.

    It is slow until it is seen to be well: without work nothing is seen of it.
    """
    if not len(steps):
        return
    at, seconds, streams = steps.T
    octave = np.log2(streams).astype(int)
    usual: dict[int, float] = {}
    for size in np.unique(octave)[::-1]:  # fewer streams take no longer, whenever they were seen
        usual[size] = min([np.median(seconds[octave == size]), *usual.values()])
    ratio = seconds / np.array([usual[size] for size in octave])
    window = (at // WINDOW_S).astype(int)
    seen = [
        (int(number), float(np.quantile(ratio[window == number], QUICKEST)))
        for number in np.unique(window)
        if (window == number).sum() >= FEW_STEPS
    ]
    if not seen:
        return
    normal = float(np.median([quickest for _, quickest in seen]))
    runs = [(slow, list(run)) for slow, run in groupby(seen, lambda one: one[1] > SLOW * normal)]
    for (slow, found), (_, after) in pairwise([*runs, (False, [])]):
        if slow and len(found) >= LEAST_WINDOWS:
            factor = float(np.median([quickest for _, quickest in found])) / normal
            well_at = after[0][0] * WINDOW_S if after else end_s
            yield found[0][0] * WINDOW_S, well_at, factor
