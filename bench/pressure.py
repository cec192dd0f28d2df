"""How right is the forecast of KV peaks, how dear is relief, and how long do they take?

Workers are full of streams in steady state (long answers are met more often, at any age), whose
peak is known as their ends are. It is forecast from lengths learned from 2,000 other answers:
`alike`, every stream at the 75th percentile of what it has to come, `apart`, each at a quantile of
its own, and `elsewhere`, three quarters of the streams known by sums only. A worker `overflows` if
it needs more than 1 / 0.95 of the forecast. Relief is compared with the best choice of all subsets.

    python bench/pressure.py [--json]
"""

from __future__ import annotations

import json
import sys
import timeit
from collections.abc import Callable
from itertools import combinations

import numpy as np
from rich.console import Console
from rich.table import Table

from paceline.policy.lengths import OutputLengths, own_share
from paceline.policy.pressure import (
    INTERRUPTION,
    KV_FULL,
    Outlook,
    Stream,
    Tokens,
    peak_tokens,
    relief,
)

ANSWERS = {"even": 0.5, "usual": 0.9, "uneven": 1.3}
"""Deviation of the logarithm of answer lengths, whose median is 250 tokens."""
PROMPT_TOKENS = 500.0
WORKERS = 200
"""Of each kind and size."""


def drawn(rng: np.random.Generator, deviation: float, count: int) -> Tokens:
    lengths: Tokens = np.maximum(rng.lognormal(np.log(250.0), deviation, count).round(), 1.0)
    return lengths


def in_flight(rng: np.random.Generator, deviation: float, count: int) -> tuple[Tokens, ...]:
    """Contexts, tokens produced and tokens to come of the streams of one worker."""
    answers = drawn(rng, deviation, 100 * count)
    answers = rng.choice(answers, count, p=answers / answers.sum())
    produced = (answers * rng.random(count)).round()
    prompts = rng.lognormal(np.log(PROMPT_TOKENS), 0.8, count)
    return prompts + produced, produced, answers - produced


def forecasts(
    lengths: OutputLengths, contexts: Tokens, produced: Tokens, serial: int
) -> dict[str, float]:
    """The peak of one worker, by each way to foretell it."""
    size, known = len(contexts), len(contexts) // 4
    alike = [lengths.left("m", "t", p) for p in produced]
    apart = [lengths.left("m", "t", p, None, own_share(serial + i)) for i, p in enumerate(produced)]
    some = Outlook(contexts[:known], apart[:known])
    some.add_unknown(size - known, float(contexts[known:].sum()), float(np.mean(apart[:known])))
    held = contexts.tolist()
    return {
        "alike": peak_tokens(held, alike),
        "apart": peak_tokens(held, apart),
        "elsewhere": some.peak(),
    }


def accuracy() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for name, deviation in ANSWERS.items():
        rng, lengths = np.random.default_rng(1), OutputLengths()
        for tokens in drawn(rng, deviation, 2000):
            lengths.learn("m", "t", int(tokens))
        for size in (4, 16, 64, 256):
            ratios: dict[str, list[float]] = {}
            for i in range(WORKERS):
                contexts, produced, left = in_flight(rng, deviation, size)
                true = peak_tokens(contexts.tolist(), left.tolist())
                for way, peak in forecasts(lengths, contexts, produced, i * size).items():
                    ratios.setdefault(way, []).append(peak / true)
            row: dict[str, object] = {"answers": name, "streams": size}
            for way, seen in ratios.items():
                row[f"{way}_mean"] = round(float(np.mean(seen)), 2)
                row[f"{way}_overflows"] = round(float(np.mean(np.array(seen) < KV_FULL)), 3)
            rows.append(row)
    return rows


def relief_over_best() -> dict[str, float]:
    """Cost of relief over that of the cheapest set: of 12 streams, 6 may be paused."""
    rng, ratios = np.random.default_rng(2), []
    for _ in range(100):
        contexts, _, left = in_flight(rng, 0.9, 12)
        held, to_come = contexts.tolist(), left.tolist()
        streams = [Stream(str(i), held[i], to_come[i]) for i in range(6)]
        limit = 0.8 * peak_tokens(held, to_come)
        best = np.inf
        for chosen in (c for size in range(7) for c in combinations(range(6), size)):
            rest = [i for i in range(12) if i not in chosen]
            if peak_tokens([held[i] for i in rest], [to_come[i] for i in rest]) <= limit:
                best = min(best, sum(held[i] + INTERRUPTION for i in chosen))
        if best < np.inf:
            paused = relief(Outlook(held, to_come), limit, streams)
            ratios.append(sum(held[int(i)] + INTERRUPTION for i in paused) / best)
    return {"mean": round(float(np.mean(ratios)), 3), "worst": round(max(ratios), 2)}


def least_us(call: Callable[[], object]) -> float:
    call()
    return round(min(timeit.repeat(call, number=200, repeat=7)) / 200 * 1e6, 2)


def times(size: int) -> dict[str, float]:
    """Microseconds of each question, the best of seven runs."""
    rng, lengths = np.random.default_rng(3), OutputLengths()
    for tokens in drawn(rng, 0.9, 2000):
        lengths.learn("m", "t", int(tokens))
    contexts, produced, left = in_flight(rng, 0.9, size)
    held, to_come, out = contexts.tolist(), left.tolist(), float(produced[0])
    outlook = Outlook(held, to_come, 16)
    streams = [Stream(str(i), *pair) for i, pair in enumerate(zip(held, to_come, strict=True))]
    limit = 0.9 * outlook.peak()
    return {
        "streams": size,
        "left": least_us(lambda: lengths.left("m", "t", out, 512, 0.6)),
        "peak_tokens": least_us(lambda: peak_tokens(held, to_come, 8.0)),
        "new_outlook": least_us(lambda: Outlook(held, to_come, 16).peak()),
        "peak_with": least_us(lambda: outlook.peak_with(500.0, 300.0)),
        "relief_of_10_percent": least_us(lambda: relief(outlook, limit, streams)),
    }


def show(title: str, rows: list[dict[str, object]]) -> None:
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)


def main() -> None:
    right, dear = accuracy(), relief_over_best()
    quick: list[dict[str, object]] = [{**times(size)} for size in (8, 32, 64, 256)]
    if "--json" not in sys.argv:
        show("Forecast over true peak, and share of workers that overflow", right)
        show("Microseconds", quick)
        print(f"Relief over the best choice: mean {dear['mean']}, worst {dear['worst']}")
    print(json.dumps({"bench": "pressure", "forecast": right, "relief": dear, "us": quick}))


if __name__ == "__main__":
    main()
