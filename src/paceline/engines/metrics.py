"""What are the current values of a few metrics in a Prometheus text page?

Pages have 60 KB and more, most of it histograms, and one is read every second for each engine in
the gateway's own loop. So the page is searched for the wanted names and never parsed as a whole.
"""

from __future__ import annotations

import re
from math import isfinite

SAMPLE = re.compile(rb'(?:\{((?:[^"}\n]|"(?:[^"\\\n]|\\.)*")*)\})?[ \t]+(\S+)')
"""What follows a metric's name on its line: labels, if any, and a value."""
LABEL = re.compile(r'(\w+)\s*=\s*"((?:[^"\\]|\\.)*)"')


class Metrics:
    """One page. Where a metric has been renamed, the newest of its `names` on the page counts."""

    def __init__(self, page: bytes) -> None:
        self._page = b"\n" + page

    def samples(self, *names: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series, such as one for each engine behind the API server."""
        for name in names:
            if found := self._samples(b"\n" + name.encode()):
                return found
        return []

    def _samples(self, mark: bytes) -> list[tuple[dict[str, str], float]]:
        found = []
        at = self._page.find(mark)
        while at >= 0:
            at += len(mark)
            sample = SAMPLE.match(self._page, at)
            if sample is not None:
                value = _number(sample[2])
                if value is not None:
                    labels = (sample[1] or b"").decode("utf-8", "replace")
                    found.append((dict(LABEL.findall(labels)), value))
            at = self._page.find(mark, at)
        return found

    def total(self, *names: str) -> float | None:
        """Sum over all series; None if there is none."""
        found = self.samples(*names)
        return sum(value for _, value in found) if found else None

    def mean(self, *names: str) -> float | None:
        """Mean over all series; None if there is none."""
        found = self.samples(*names)
        return sum(value for _, value in found) / len(found) if found else None

    def count(self, *names: str) -> int | None:
        """`total` as a whole number of things; None also if it cannot be one."""
        total = self.total(*names)
        return round(total) if total is not None and 0 <= total < 2**53 else None


def _number(text: bytes) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if isfinite(value) else None
