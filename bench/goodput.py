"""Does goodput (requests a second that kept their promise) hold as load passes capacity?

    python bench/goodput.py [--seeds N] [--workers N] [--svg FILE]   # two minutes on two cores

Plays `goodput.yaml` in the simulator at growing load; 1 is about what the fleet can do. Prints a
table and a JSON line. All is simulation.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from paceline.simulator.charts import WIDE, Line, Point, chart, linear_axis, tag
from paceline.simulator.cli import plan
from paceline.simulator.many import play_all

SCENARIO = Path(__file__).with_suffix(".yaml")
POLICIES = ("headroom", "priority", "least-requests", "kv-cost-output")
LOADS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
COLOURS = ("#0b63c5", "#c2410c", "#15803d", "#9333ea")
LOOK = """
svg { background: #fff; font: 11px system-ui, sans-serif } text { fill: #5b6470 }
.end { text-anchor: end } .middle { text-anchor: middle } path { fill: none }
.grid { stroke: #e6e9ed } .rim { stroke: #8a939e }
.line path { stroke: currentColor; stroke-width: 2 }
.line :is(circle, polygon) { fill: currentColor }
"""

LINE = 12.0
"""Height of a label."""

Kept = dict[str, list[float]]


def picture(kept: Kept) -> str:
    """Goodput over load, one line a policy, as a picture that needs no page around it."""
    x = linear_axis("load, of what the fleet can do", 0.0, 1.2 * max(LOADS))
    y = linear_axis("requests/s that kept their promise", 0.0, 1.1 * max(map(max, kept.values())))
    lines, names, looks, taken = [], [], [LOOK], list[float]()
    for style, (name, ys) in enumerate(kept.items()):
        lines.append(Line(name, style, [Point(*at) for at in zip(LOADS, ys, strict=True)]))
        left, top = WIDE.x(x.place(LOADS[-1])) + 6, WIDE.y(y.place(ys[-1])) + 4
        while any(abs(top - other) < LINE for other in taken):  # ends at the same place
            top -= LINE
        taken.append(top)
        names.append(tag("text", name, x=left, y=top, class_=f"n{style}"))
        looks.append(
            f".c{style} {{ color: {COLOURS[style]} }} .n{style} {{ fill: {COLOURS[style]} }}"
        )
    drawn = str(chart("Goodput over load", x, y, lines, markers=len(LOADS)))
    drawn = drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    look = f"<style>{' '.join(looks)}</style>"
    return drawn.replace("</svg>", f"{''.join(names)}{look}</svg>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2, help="runs of each point")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--svg", type=Path, help="draw it into this file")
    asked = parser.parse_args()
    sweep = ",".join(map(str, LOADS))
    jobs = plan(SCENARIO, policies=POLICIES, seeds=asked.seeds, sweeps=[("load", sweep)])
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = defaultdict(list)
    for job, result in zip(jobs, play_all(jobs, asked.workers), strict=True):
        tiers = result.tiers
        premium, free = tiers["premium"].attainment or 0.0, tiers["free"].attainment or 0.0
        row = result.goodput_requests_per_s, premium, free
        found[job.policy, job.at["load"]].append(row)
    table = Table(title="requests/s that kept their promise (premium %, free %)")
    table.add_column("load")
    for policy in POLICIES:
        table.add_column(policy, justify="right")
    kept: Kept = {policy: [] for policy in POLICIES}
    for load in map(str, LOADS):
        cells = []
        for policy in POLICIES:
            goodput, premium, free = map(mean, zip(*found[policy, load], strict=True))
            kept[policy].append(round(goodput, 1))
            cells.append(f"{goodput:.0f} ({100 * premium:.1f}, {100 * free:.1f})")
        table.add_row(load, *cells)
    Console().print(table)
    if asked.svg is not None:
        asked.svg.write_text(picture(kept), encoding="utf-8")
    print(json.dumps({"bench": "goodput", "loads": LOADS, "kept_per_s": kept}))


if __name__ == "__main__":
    main()
