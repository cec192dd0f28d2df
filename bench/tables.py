"""Where do the figures of the engine profiles come from? Writes enginemodel/figures.py anew.

The kernels' times were measured by the makers of aiconfigurator-core (PyPI, Apache-2.0): GEMM,
mixture of experts, attention and all-reduce, each on the GPU with vLLM's kernels. Its own mixed
steps count too little attention where a prefix is cached, so steps are composed here of its
operations: `paceline.enginemodel.tables` has the form. Then the tables are compared with steps
between their knots.

    pip install aiconfigurator-core    (600 MB with what it needs; Python 3.11 to 3.13)
    python bench/tables.py [--write] [--json]
"""

from __future__ import annotations

import json
import logging
import random
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from math import ceil, exp, log
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from paceline.enginemodel import PROFILES, Load
from paceline.enginemodel.profile import (
    DECODE_CONTEXT,
    DECODE_STREAMS,
    FIGURES_MS,
    PREFILL_TOKENS,
)

PACKAGE = "aiconfigurator_core"
FIGURES = Path(__file__).parent.parent / "src" / "paceline" / "enginemodel" / "figures.py"

TOKENS = (
    *(0, 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256),
    *(320, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192),
)
STREAMS = (1, 16, 64, 128, 256, 512, 1024)
CONTEXT = (0, 2**12, 2**14, 2**16, 2**19)
PREFILL = (1, 128, 512, 2048, 8192)
PAIRS = (0, 2**17, 2**19, 2**21, 2**25, 2**30)

SHORTEST, LONGEST = 16, 131_072
"""Tokens of a prompt. What only longer ones could give is taken to be of more of them."""


class Engine(NamedTuple):
    """A profile, and what aiconfigurator-core calls its model and GPU."""

    profile: str
    model: str
    system: str
    gpus: int


ENGINES = (
    Engine("a100-llama-8b", "meta-llama/Meta-Llama-3.1-8B", "a100_sxm", 1),
    Engine("h100-llama-8b", "meta-llama/Meta-Llama-3.1-8B", "h100_sxm", 1),
    Engine("h100-llama-70b-tp4", "meta-llama/Meta-Llama-3.1-70B", "h100_sxm", 4),
    Engine("h100-qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", "h100_sxm", 1),
)


class Kernels:
    """The times of one engine's operations, in milliseconds."""

    def __init__(self, engine: Engine) -> None:
        sdk: Any = import_module(f"{PACKAGE}.sdk")
        self._handle = sdk.EngineHandle.compile(
            engine.model,
            engine.system,
            "vllm",
            tp_size=engine.gpus,
            moe_tp_size=engine.gpus,
            moe_ep_size=1,
        )
        self._logits_of_one = self._decode(1, 1, "logits")

    def dense(self, tokens: int) -> float:
        """All but attention, and the logits of one stream."""
        everything = self._decode(max(tokens, 1), 1, "")
        attention = self._decode(max(tokens, 1), 1, "attention")
        logits = self._decode(max(tokens, 1), 1, "logits")
        return everything - attention - logits + self._logits_of_one

    def decode(self, streams: int, context: int) -> float:
        """Attention of streams that have so many tokens together, and the logits of the others."""
        streams = max(streams, ceil(context / LONGEST))
        each = max(context // streams, 1)
        logits = self._decode(streams, each, "logits") - self._logits_of_one
        return self._decode(streams, each, "attention") + logits

    def prefill(self, tokens: int, pairs: float) -> float:
        """Attention of so many prompt tokens: of one prompt that goes on, or of many short ones."""
        tokens = max(tokens, ceil(pairs / LONGEST))
        before = pairs / tokens - tokens / 2
        if before >= 0:
            return self._prefill(1, tokens, int(before))
        each = max(int(2 * pairs / tokens), min(SHORTEST, tokens))
        return self._prefill(max(tokens // each, 1), each, 0)

    def _decode(self, streams: int, context: int, part: str) -> float:
        return _sum(self._handle.decode_step_per_op(streams, context, 2), part)

    def _prefill(self, prompts: int, tokens: int, before: int) -> float:
        operations, _ = self._handle.run_static_per_op(
            batch_size=prompts, isl=before + tokens, prefix=before, osl=1, mode="static_ctx"
        )
        return _sum(operations, "attention")


def _sum(operations: Sequence[tuple[str, float, float, str]], part: str) -> float:
    return sum(ms for name, ms, *_ in operations if part in name)


def rising(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Halfway between the least surface above that falls nowhere, and the greatest below."""
    above, below = values, values
    for axis in range(values.ndim):
        above = np.maximum.accumulate(above, axis)
        below = np.flip(np.minimum.accumulate(np.flip(below, axis), axis), axis)
    return (above + below) / 2


def measured(ms: Callable[..., float], *knots: Sequence[int]) -> list[Any]:
    """What was measured at all combinations of the knots, smoothed; four digits."""
    shape = [len(axis) for axis in knots]
    values = [
        ms(*point)
        for point in np.stack(np.meshgrid(*knots, indexing="ij"), -1)
        .reshape(-1, len(knots))
        .tolist()
    ]
    rounded = np.vectorize(lambda x: float(f"{x:.4g}"))(rising(np.reshape(values, shape)))
    listed: list[Any] = rounded.tolist()
    return listed


def figures() -> str:
    """The module of figures, as text."""
    kernels = {engine.profile: Kernels(engine) for engine in ENGINES}
    knots = ("TOKENS", "STREAMS", "CONTEXT", "PREFILL", "PAIRS")
    lines = [HEAD, *(f"{name} = (\n{row(globals()[name], 4)}\n)" for name in knots)]
    lines.append("DENSE_MS = {")
    for profile, of in kernels.items():
        lines.append(f'    "{profile}": (\n{row(measured(of.dense, TOKENS))}\n    ),')
    lines += ["}", "DECODE_MS = {"]
    for profile, of in kernels.items():
        lines += grid(profile, measured(of.decode, STREAMS, CONTEXT))
    lines += ["}", "PREFILL_MS = {"]
    for profile, of in kernels.items():
        lines += grid(profile, measured(of.prefill, PREFILL, PAIRS))
    return "\n".join([*lines, "}\n"])


def grid(profile: str, rows: Sequence[Sequence[float]]) -> list[str]:
    return [f'    "{profile}": (', *(f"        ({row(values, 0)})," for values in rows), "    ),"]


HEAD = '''"""What was measured of kernels? Milliseconds at the knots; `tables` adds them up.

From aiconfigurator-core 0.12.0 (PyPI, Apache-2.0): vLLM, BF16, GPU time alone. Written by
bench/tables.py, which tells how; not by hand.
"""
# fmt: off
'''


def row(values: Sequence[float], indent: int = 8) -> str:
    """Numbers as source code."""
    text = ", ".join(map(repr, values)) + ","
    return fill(text, 100, initial_indent=" " * indent, subsequent_indent=" " * indent)


def loads(count: int, kv_tokens: int) -> list[tuple[int, int, int, float]]:
    """Steps as they occur, none at the knots: streams, prompt tokens, context, pairs."""
    rng = random.Random(1)
    drawn: list[tuple[int, int, int, float]] = []
    while len(drawn) < count:
        streams = round(exp(rng.uniform(0, log(512))))
        context = streams * round(exp(rng.uniform(log(50), log(16_000))))
        prefill = rng.choice((0, round(exp(rng.uniform(log(10), log(8000))))))
        before = rng.choice((0, round(exp(rng.uniform(log(100), log(30_000))))))
        if context + prefill + before <= kv_tokens:
            drawn.append((streams, prefill, context, prefill * (before + prefill / 2)))
    return drawn


def misses(engine: Engine) -> list[float]:
    """How far the bundled table is off between its knots, as a share, sorted."""
    kernels, profile = Kernels(engine), PROFILES[engine.profile]
    errors = []
    for streams, prefill, context, pairs in loads(500, profile.kv_tokens):
        ms = kernels.dense(streams + prefill) + kernels.decode(streams, context)
        if prefill:
            ms += kernels.prefill(prefill, pairs)
        load = Load(streams, prefill, context, pairs)
        errors.append(abs(profile.step_seconds(load) * 1e3 / ms - 1))
    return sorted(errors)


def figure_misses(name: str) -> list[float]:
    """How far the bundled table is off at the published figures, as a share, one by one."""
    loads = [Load(prefill=p, attention=p * p / 2) for p in PREFILL_TOKENS]
    loads += [Load(streams=n, context=n * DECODE_CONTEXT) for n in DECODE_STREAMS]
    published = [ms for figures in FIGURES_MS[name] for ms in figures]
    return [
        PROFILES[name].step_seconds(load) * 1e3 / ms - 1
        for load, ms in zip(loads, published, strict=True)
    ]


def main() -> None:
    logging.disable()
    if not find_spec(PACKAGE):
        sys.exit("aiconfigurator-core is not installed: the bundled figures stay as they are.")
    if "--write" in sys.argv:
        FIGURES.write_text(figures())
        return
    report = []
    table = Table("profile", "off at the figures, %", "between knots: median, %", "p95", "worst")
    for engine in ENGINES:
        off, between = figure_misses(engine.profile), misses(engine)
        shares = between[len(between) // 2], between[len(between) * 95 // 100], between[-1]
        table.add_row(
            engine.profile,
            " ".join(f"{100 * e:+.1f}" for e in off),
            *(f"{100 * e:.1f}" for e in shares),
        )
        report.append({"profile": engine.profile, "at_figures": off, "between_knots": shares})
    if "--json" in sys.argv:
        print(json.dumps(report))
    else:
        Console().print(table)


if __name__ == "__main__":
    main()
