"""How wrong is the simulator about a real engine? vLLM on this CPU, watched and played again.

    python bench/fidelity_vllm.py [--keep FOLDER] [--json]

One vLLM server on a core of its own, a live gateway before it, requests open loop at about half of
what the engine can do. Part 1 is all that timing is learned from; it is exported as `paceline
calibrate` does. Part 2 is scored: the simulator gets its arrivals and lengths, and that timing, and
each request's times are compared with what the gateway saw of it.

Then part 2 comes a second time, with other text of the same lengths. How far that is from the first
time is the noise of the machine, in the measure of which the simulation's errors should be read.

A worker may be slower than usual just when its timing is exported; `paceline calibrate` warns of it
and the simulator takes it as lasting. So part 2 is also played without that factor, and the second
time with what was known when it began.

With `--keep` the recording stays in the folder, and is scored again if it is there already.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise, takewhile
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from time import monotonic

import msgspec
import numpy as np
import yaml
from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

from fidelity import PUBLISHED, PUBLISHED_P99, Seconds, errors, over_all

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "tests" / "simulator"), str(ROOT / "tests" / "real")]

from both_hosts import Met, Run, requests  # type: ignore  # noqa: E402
from install import vllm_is_ready  # type: ignore  # noqa: E402
from servers import vllm_server  # type: ignore  # noqa: E402

from paceline.calibrate import doubts, fetch  # noqa: E402
from paceline.demo.stage import free_ports, process, ready, url  # noqa: E402
from paceline.domain.commands import Command  # noqa: E402
from paceline.domain.facts import Fact  # noqa: E402
from paceline.kernel import Kernel, Settings  # noqa: E402
from paceline.kernel.log import Entry, line, opening  # noqa: E402
from paceline.kernel.timing import Timing, export, from_json, to_json  # noqa: E402
from paceline.simulator.learned import live_fleet, profiles_of  # noqa: E402
from paceline.simulator.scenario import (  # noqa: E402
    Network,
    Requests,
    Scenario,
    SimTier,
)
from paceline.simulator.simulation import Simulation  # noqa: E402
from paceline.workload.drive import DriveSettings, drive  # noqa: E402
from paceline.workload.traces import Arrival  # noqa: E402

MODEL, TIER, POLICY = "m", "standard", "headroom"
TTFT_S, ITL_S = 5.0, 0.5
"""The promise: with one worker nothing depends on it."""
PROMPT, ANSWER = (50, 400), (20, 80)
"""Tokens, evenly spread."""
LEARN_S, SCORE_S = 90.0, 110.0
LOAD = 0.55
"""Of the requests that the engine completes in a second when it is given them all at once."""
BURST = 12
ENGINE_CORE = 0
LATENCY_S = 0.0005
SEEDS = 8
STOPS_WITHIN_S = 10.0

Errors = dict[str, dict[str, float]]


class Recording(msgspec.Struct):
    """What a run leaves beside its log and its timing."""

    burst_rate: float
    """Requests a second that the engine completed of a burst."""
    rate: float
    """Of the parts, on average."""
    parts: list[int]
    """Requests of each part, in the order in which they came."""
    behind_p99_s: float
    """How late the requests were sent."""
    busy_before: float
    """Load average of the last minute before all began: what else is running here."""


# The live run.


def record(folder: Path) -> None:
    """Start the engine, watch it, and leave all that is needed to score."""
    others = os.sched_getaffinity(0) - {ENGINE_CORE}
    busy_before = os.getloadavg()[0]
    if others:
        os.sched_setaffinity(0, others)
    (port,) = free_ports(1)
    with vllm_server(port, ENGINE_CORE, MODEL) as engine:
        recording = asyncio.run(_watched(engine.url, folder))
    recording.busy_before = busy_before
    (folder / "recording.json").write_bytes(msgspec.json.encode(recording))


async def _watched(engine: str, folder: Path) -> Recording:
    burst_rate = await _burst_rate(engine)
    rate = LOAD * burst_rate
    _say(f"a burst goes at {burst_rate:.2f} requests/s: {rate:.2f} it is")
    learned_from = _poisson(rate, LEARN_S, Random("part 1"))
    scored = _poisson(rate, SCORE_S, Random("part 2"))
    listen, admin = free_ports(2)
    config, said = folder / "gateway.yaml", folder / "gateway.log"
    config.write_text(yaml.safe_dump(_gateway(engine, listen, admin, folder)))
    with ExitStack() as running:
        gateway = running.enter_context(process(said, "serve", "--config", str(config)))
        await ready(gateway, url(listen) + "/health/ready", said)
        behind_s: list[float] = []
        for name, part in (("learned from", learned_from), ("scored", scored), ("again", scored)):
            settings = DriveSettings(
                url(listen), MODEL, api="completions", force_lengths=True, salt=name
            )
            began_at = monotonic()
            outcomes = await drive(part, settings)
            failed = [outcome.error for outcome in outcomes if not outcome.ok]
            assert not failed, failed
            behind_s += [outcome.behind_s for outcome in outcomes]
            _say(f"{name}: {len(part)} requests in {monotonic() - began_at:.0f} s")
            if part is learned_from:
                (folder / "timing.json").write_bytes(to_json(await fetch(url(admin))))
        gateway.send_signal(signal.SIGTERM)  # by itself, so that its log is whole
        await asyncio.to_thread(gateway.wait, STOPS_WITHIN_S)
    counts = [len(learned_from), len(scored), len(scored)]
    return Recording(burst_rate, rate, counts, float(np.quantile(behind_s, 0.99)), 0.0)


async def _burst_rate(engine: str) -> float:
    """Of usual requests that come all at once, how many are completed in a second?"""
    usual = Arrival(0.0, sum(PROMPT) // 2, sum(ANSWER) // 2)
    settings = DriveSettings(engine, MODEL, api="completions", force_lengths=True)
    await drive([usual] * 2, replace(settings, salt="warm up"))
    outcomes = await drive([usual] * BURST, settings)
    return BURST / max(outcome.ended_s for outcome in outcomes)


def _poisson(rate: float, seconds: float, rng: Random) -> list[Arrival]:
    found, at_s = [], 0.0
    while (at_s := at_s + rng.expovariate(rate)) < seconds:
        found.append(Arrival(at_s, rng.randint(*PROMPT), rng.randint(*ANSWER)))
    return found


def _gateway(engine: str, listen: int, admin: int, folder: Path) -> dict[str, object]:
    return {
        "listen": f"127.0.0.1:{listen}",
        "admin": f"127.0.0.1:{admin}",
        "models": [{"name": MODEL, "workers": [{"url": engine, "kind": "vllm"}]}],
        "tiers": {TIER: {"ttft_s": TTFT_S, "itl_s": ITL_S}},
        "default_tier": TIER,
        "routing": {"policy": POLICY},
        "log_facts": str(folder / "facts.log"),
        "logging": {"level": "warning"},
    }


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


# The same in the simulator.


def parts_of(log: Sequence[bytes], timing: Timing, counts: Sequence[int]) -> list[list[Met]]:
    """The live requests, part by part, as the gateway saw them."""
    met = requests(Run(log, {worker.id: worker.id for worker in timing.workers}))
    ends = np.cumsum([0, *counts])
    return [met[begin:end] for begin, end in pairwise(ends)]


def played(seen: Sequence[Met], timing: Timing, seed: int, trace: Path) -> list[Met]:
    """The same requests, simulated."""
    first_at = seen[0].at
    asked = [
        {
            "at_s": one.at - first_at,
            "prompt_tokens": one.ended.prompt_tokens,
            "output_tokens": one.ended.output_tokens,
        }
        for one in seen
        if one.ended is not None
    ]
    trace.write_bytes(b"\n".join(map(msgspec.json.encode, asked)))
    scenario = Scenario(
        about="A real engine's requests.",
        seconds=seen[-1].at - first_at + 1.0,
        workers=live_fleet(timing),
        tiers={TIER: SimTier(ttft_s=TTFT_S, itl_s=ITL_S)},
        requests=(Requests(kind="trace", file=str(trace)),),
        network=Network(latency_s=LATENCY_S),
    )
    lines: list[bytes] = []

    def keep(now: float, fact: Fact, commands: list[Command]) -> None:
        lines.append(line(now, fact, commands))

    simulation = Simulation(scenario, POLICY, seed, profiles_of(timing), keep)
    simulation.run()
    groups = {name: group.name for group in scenario.workers for name in group.names}
    met: list[Met] = requests(
        Run([opening(simulation.gateways[0].kernel.settings), *lines], groups)
    )
    return met


def learned_until(log: Sequence[bytes], until: float) -> Timing:
    """What the gateway would have exported at that moment."""
    kernel = Kernel(msgspec.json.decode(log[0], type=Settings))
    decode = msgspec.json.Decoder(Entry).decode
    for entry in takewhile(lambda entry: entry.now < until, map(decode, log[1:])):
        kernel.handle(entry.fact, entry.now)
    return export(kernel)


def at_usual_speed(timing: Timing) -> Timing:
    """Without how much slower than usual the workers were at the moment of the export."""
    return replace(
        timing,
        workers=tuple(replace(w, step=replace(w.step, slowdown=1.0)) for w in timing.workers),
    )


# How far they are apart.


def times(met: Sequence[Met]) -> dict[str, Seconds]:
    """End-to-end time, TTFT and mean ITL of each request."""
    ended = [one.ended for one in met if one.ended is not None]
    ttft_s = np.array([one.ttft_s for one in met])
    itl_s = np.array([end.itl_s for end in ended])
    gaps = np.array([end.output_tokens - 1 for end in ended])
    return {"e2e": ttft_s + gaps * itl_s, "ttft": ttft_s, "itl": itl_s}


def wrong(seen: Sequence[Met], other: Sequence[Met]) -> Errors:
    """Errors in %, request by request and of the whole."""
    truth, guess = times(seen), times(other)
    return {name: errors(truth[name], guess[name]) for name in truth}


def score(folder: Path) -> dict[str, object]:
    """Errors of the simulations, mean over the seeds, and of the second live run."""
    recording = msgspec.json.decode((folder / "recording.json").read_bytes(), type=Recording)
    timing = from_json((folder / "timing.json").read_bytes(), "timing.json")
    log = (folder / "facts.log").read_bytes().splitlines()
    _, seen, again = parts_of(log, timing, recording.parts)
    later = learned_until(log, again[0].at)
    trace = folder / "requests.jsonl"
    cases = {
        "part 2, simulated": (seen, timing),
        "part 2, simulated, usual speed": (seen, at_usual_speed(timing)),
        "part 2 again, simulated, learned from both": (again, later),
    }
    found = {
        name: [wrong(real, played(real, known, seed, trace)) for seed in range(SEEDS)]
        for name, (real, known) in cases.items()
    } | {"part 2 again, real": [wrong(seen, again)]}
    return {
        "bench": "fidelity_vllm",
        "recording": msgspec.to_builtins(recording),
        "seeds": SEEDS,
        "learned": {"from part 1": _known(timing), "from both": _known(later)},
        "error_percent": {name: over_all(each) for name, each in found.items()},
        "bias_percent": {name: _bias(each) for name, each in found.items()},
        "seen_s": {"part 2": _quantiles(seen), "part 2 again": _quantiles(again)},
        "published": {**PUBLISHED, "p99": PUBLISHED_P99},
    }


def _known(timing: Timing) -> dict[str, object]:
    """What was learned of the worker, and what speaks against it."""
    (worker,) = timing.workers
    step = worker.step
    figures = {"slowdown": step.slowdown, "spread": step.spread, "overhead_s": worker.overhead_s}
    return {
        "doubts": list(doubts(timing)),
        "steps": step.samples,
        "prefill_budget": worker.prefill_budget,
        **{name: round(value, 4) for name, value in figures.items()},
    }


def _bias(found: Sequence[Errors]) -> dict[str, float]:
    """Error of the run's mean, with its sign: above 0, the simulation is slow."""
    return {
        name: round(float(np.mean([one[name]["mean"] for one in found])), 2) for name in found[0]
    }


def _quantiles(met: Sequence[Met]) -> dict[str, dict[str, float]]:
    return {
        name: {
            f"p{share}": round(float(np.percentile(seconds, share)), 4) for share in (50, 90, 99)
        }
        for name, seconds in times(met).items()
    }


def table(result: dict[str, object]) -> Table:
    found, bias = result["error_percent"], result["bias_percent"]
    assert isinstance(found, dict)
    assert isinstance(bias, dict)
    shown = Table(
        title="error, % (absolute, but for the bias)",
        caption=f"best published p99: {PUBLISHED_P99}",
    )
    for header in ("", "of"):
        shown.add_column(header)
    for header in ("each: mean", "median", "whole: mean", "p50", "p90", "p99", "bias", "published"):
        shown.add_column(header, justify="right")
    for name, rows in found.items():
        for figure, row in rows.items():
            cells = [f"{value:.1f}" for value in row.values()]
            best = str(PUBLISHED[figure]) if "simulated" in name else ""
            shown.add_row(name, figure, *cells, f"{bias[name][figure]:+.1f}", best)
        shown.add_section()
    return shown


def main(folder: Path, as_json: bool) -> None:
    if not (folder / "recording.json").exists():
        if not vllm_is_ready():
            print("skipped: vLLM is not installed here (python tests/real/install.py all)")
            return
        folder.mkdir(parents=True, exist_ok=True)
        record(folder)
    result = score(folder)
    if not as_json:
        Console(width=140).print(table(result))
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="Where the recording stays.")
    parser.add_argument("--json", action="store_true", help="No table.")
    chosen = parser.parse_args()
    if chosen.keep is not None:
        main(chosen.keep, chosen.json)
    else:
        with TemporaryDirectory(prefix="paceline-bench-") as temporary:
            main(Path(temporary), chosen.json)
