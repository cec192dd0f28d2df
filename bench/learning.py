"""How fast does a worker's timing become known? Forecast error over requests learned, on real runs.

Three recorded vLLM runs (tests/data/vllm_runs) are watched as a gateway would have: each candidate
learns from the first k completed requests and forecasts the mean ITL of all later ones. Candidates
are the learned step-time model and what load balancers keep instead: an average of ITL with
exponential decay (EWMA), and its peak-sensitive form (peak EWMA, jumping up at once).

    python bench/learning.py [--json]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Protocol

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "policy"))

from vllm_runs import (  # type: ignore[import-not-found]  # noqa: E402
    RUNS,
    Seen,
    Span,
    Timeline,
    learn,
    predicted_itl_s,
    read,
)

from paceline.policy.steptime import StepTimeEstimator  # noqa: E402

COUNTS = (0, 1, 2, 5, 10, 20, 30, 40, 50, 60, 100, 150)


class Forecaster(Protocol):
    def learn(self, request: Seen, spans: list[Span]) -> None: ...
    def itl_s(self, spans: list[Span]) -> float: ...


class Learned:
    """The step-time model."""

    def __init__(self) -> None:
        self._estimator = StepTimeEstimator()

    def learn(self, request: Seen, spans: list[Span]) -> None:
        learn(self._estimator, request, spans)

    def itl_s(self, spans: list[Span]) -> float:
        return float(predicted_itl_s(self._estimator.model(), spans))


class Ewma:
    """One number for the worker, whatever its load."""

    def __init__(self, peak: bool) -> None:
        self._peak = peak
        self._itl_s = 0.0

    def learn(self, request: Seen, spans: list[Span]) -> None:
        pace = 1.0 if not self._itl_s or (self._peak and request.itl_s > self._itl_s) else 0.1
        self._itl_s += pace * (request.itl_s - self._itl_s)

    def itl_s(self, spans: list[Span]) -> float:
        return self._itl_s


def candidates() -> dict[str, Forecaster]:
    return {"learned": Learned(), "EWMA": Ewma(peak=False), "peak EWMA": Ewma(peak=True)}


def errors(path: Path) -> dict[str, list[float]]:
    """Median relative error of each candidate after each of `COUNTS` requests."""
    requests = read(path)
    timeline = Timeline(requests)
    found: dict[str, list[float]] = {}
    spans = [timeline.spans(request) for request in requests]
    for name, candidate in candidates().items():
        found[name] = []
        for k, request in enumerate(requests[: COUNTS[-1] + 1]):
            if k in COUNTS:
                later = zip(requests[k:], spans[k:], strict=True)
                miss = [abs(candidate.itl_s(where) / r.itl_s - 1) for r, where in later]
                found[name].append(round(float(np.median(miss)), 4))
            candidate.learn(request, spans[k])
    return found


def main() -> None:
    results = {path.stem.removesuffix("_requests"): errors(path) for path in RUNS}
    if "--json" not in sys.argv[1:]:
        table = Table(title="median error of the forecast ITL, %, after so many requests")
        for header in ("run", "forecast by", *map(str, COUNTS)):
            table.add_column(header, justify="left" if header.isalpha() else "right")
        for run, by_name in results.items():
            for name, row in by_name.items():
                table.add_row(run, name, *(f"{100 * e:.1f}" for e in row))
        Console(width=150).print(table)
    print(json.dumps({"bench": "learning", "requests": COUNTS, "median_error": results}))


if __name__ == "__main__":
    main()
