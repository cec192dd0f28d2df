"""How is an incident played again? As a scenario of its own, in files that can be changed.

`scenario.yaml` has the fleet, the promises and the troubles, `trace.jsonl` the requests, and
`timing.json` what was learned of the workers. What the log does not tell is guessed: the length of
an answer that never ended is the usual one of its model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import yaml

from paceline.domain.request import Request
from paceline.kernel.timing import to_json
from paceline.simulator.incident import Incident, Story
from paceline.simulator.learned import live_fleet
from paceline.simulator.measure import Recorder
from paceline.simulator.result import Result
from paceline.simulator.scenario import Scenario, SimTier
from paceline.simulator.seen import Seen
from paceline.workload.traces import BLOCK_TOKENS

RECORDED = "recorded"
"""What stands in place of a policy for what really happened."""
PLACEHOLDER = "tiny"
"""A profile must be named, and the timing of the live workers then takes its place."""
NAME_BITS = 48
"""Of a block's hash: that is enough to tell blocks apart."""


def write_scenario(told: Incident, folder: Path, name: str) -> Path:
    """Write the incident as a scenario; gives the path of it."""
    (folder / "timing.json").write_bytes(to_json(told.timing))
    (folder / "trace.jsonl").write_bytes(b"".join(_trace(told)))
    path = folder / "scenario.yaml"
    text = yaml.safe_dump(_scenario(told, name), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")
    return path


def _scenario(told: Incident, name: str) -> dict[str, Any]:
    resumable = [story.request.resumable for story in told.stories]
    trace = {"kind": "trace", "file": "trace.jsonl", "resumable": sum(resumable) / len(resumable)}
    return {
        "name": name,
        "about": f"{len(told.stories)} requests, as they came to a gateway.",
        "seconds": round(told.seconds, 3) + 0.001,
        "margin": told.opening.margin,
        "workers": [
            {"profile": PLACEHOLDER, "name": worker.name, "model": worker.model}
            for worker in live_fleet(told.timing)
        ],
        "tiers": {name: msgspec.to_builtins(tier) for name, tier in _tiers(told).items()},
        "requests": [trace],
        "faults": [
            {
                "kind": fault.kind,
                "worker": f"{fault.worker}0",  # of the replicas that are called so, the first
                "at_s": round(fault.at_s, 3),
                "for_s": round(fault.for_s, 3),
                "factor": round(fault.factor, 3),
            }
            for fault in told.faults
        ],
    }


def _tiers(told: Incident) -> dict[str, SimTier]:
    """The usual terms of each tier: clients may have asked for less than it promises."""
    seen: dict[str, Counter[SimTier]] = {}
    for story in told.stories:
        asked: Request | None = story.request
        while asked is not None:
            seen.setdefault(asked.tier, Counter())[_terms(asked)] += 1
            asked = asked.instead
    return {name: found.most_common(1)[0][0] for name, found in seen.items()}


def _terms(request: Request) -> SimTier:
    promise, instead = request.promise, request.instead
    to = ""
    if instead is not None:
        to = instead.model if instead.model != request.model else instead.tier
    return SimTier(
        ttft_s=promise.ttft_s,
        itl_s=promise.itl_s,
        stall_s=promise.stall_s,
        weight=request.weight,
        overload=cast(Any, request.overload) if to or request.overload != "degrade" else "queue",
        degrade_to=to,
        preemptible=request.preemptible,
        deadline_s=request.deadline_s,
    )


def _trace(told: Incident) -> Iterator[bytes]:
    """A line for each request."""
    for story in told.stories:
        request = story.request
        prompt = _prompt_tokens(told, story)
        tokens_per_byte = _tokens_per_byte(told, request.model)
        stride = max(round(BLOCK_TOKENS / tokens_per_byte / request.block_bytes), 1)
        line = {
            "at_s": round(story.at_s, 6),
            "prompt_tokens": prompt,
            "output_tokens": _output_tokens(told, story),
            "hash_ids": [
                block >> (64 - NAME_BITS) for block in request.blocks[stride - 1 :: stride]
            ],
            "tier": request.tier,
            "tenant": request.tenant,
            "model": request.model,
            "max_tokens": request.max_tokens,
        }
        yield msgspec.json.encode(line) + b"\n"


def _prompt_tokens(told: Incident, story: Story) -> int:
    request = story.request
    known = story.prompt_tokens or request.prompt_tokens
    guessed = request.prompt_bytes * _tokens_per_byte(told, request.model)
    return max(known or round(guessed), 1)


def _tokens_per_byte(told: Incident, model: str) -> float:
    text = told.timing.models.get(model)
    return text.tokens_per_byte if text is not None else 0.25


def _output_tokens(told: Incident, story: Story) -> int:
    text = told.timing.models.get(story.request.model)
    usual = round(text.output_p50) if story.how != "ok" and text is not None else 1
    return max(min(usual, story.request.max_tokens or usual), story.output_tokens, 1)


def recorded(told: Incident, scenario: Scenario, seed: int) -> Result:
    """What really happened, in the words of a run. What was under way at the end is left out."""
    recorder = Recorder(scenario)
    for story in told.stories:
        if story.how:
            recorder.add(_seen(told, story))
    for workers in scenario.workers:
        hours = scenario.seconds / 3600
        recorder.cost(workers.count * workers.cost_per_hour * hours)
    return recorder.result(scenario.name, RECORDED, seed)


def _seen(told: Incident, story: Story) -> Seen:
    request, ok = story.request, story.how == "ok"
    ttft_s, seconds = story.first_at - story.at_s, story.over_at - story.at_s
    in_time = request.promise.kept(ttft_s, story.itl_s, story.stall_s)
    return Seen(
        at_s=story.at_s,
        tier=request.tier,
        tenant=request.tenant,
        model=request.model,
        worker=story.worker and f"{story.worker}0",
        prompt_tokens=_prompt_tokens(told, story),
        output_tokens=story.output_tokens if ok else 0,
        status="unfinished" if story.how == "left" else story.how,
        kept=ok and in_time and seconds <= request.deadline_s,
        ttft_s=ttft_s,
        itl_s=story.itl_s if ok else 0.0,
        stall_s=story.stall_s,
        seconds=seconds,
        queued_s=story.queued_s,
        degraded=story.degraded,
        paused=story.paused,
        moved=story.moved,
    )


def in_words(told: Incident) -> Iterator[str]:
    """What was found in the log, for people."""
    workers = len(told.timing.workers)
    yield f"{len(told.stories)} requests in {told.seconds:.0f} s on {workers} workers."
    for fault in told.faults:
        how = f" {fault.factor:.1f} times" if fault.kind == "slow" else ""
        yield f"{fault.worker}: {fault.kind}{how} from {fault.at_s:.0f} s, for {fault.for_s:.0f} s."
    ends = Counter(story.how for story in told.stories)
    if ends[""]:
        yield f"{ends['']} requests were under way at its end: how they ended is not known."
    if told.opening.continued:
        yield "It begins within the gateway's life: what was under way then is not in it."
    elif told.differing:
        yield f"This Paceline would have decided otherwise after {told.differing} of its facts."
