"""A request and a worker as a policy sees them, for tests that change little of either."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

from paceline.domain.promise import Promise
from paceline.policy.standing import Ask, Curve, InFlight, Standing
from paceline.policy.steptime import StepTimeEstimator

MODEL = StepTimeEstimator().model()
BUDGET = 2048.0
ASK = Ask(
    request_id="r",
    promise=Promise(),
    margin=0.0,
    weight=2.0,
    prompt_tokens=500.0,
    usual_tokens=500.0,
    output_tokens=100.0,
    output_left=100.0,
    cached={},
    blocks_held={},
    blocks=0,
    seed=0,
    now=0.0,
)


def worker(
    streams: int = 10,
    ahead: float = 0.0,
    kv: float = 10_000.0,
    kv_capacity: float = inf,
    delay_s: float = 0.0,
    promised: Mapping[tuple[float, float], int] = {},
) -> Standing:
    """With prompts before it of so many tokens, and streams that hold so many."""
    in_flight = InFlight(
        streams=streams,
        arriving=int(ahead > 0),
        kv=kv,
        kv_arriving=ahead,
        ahead=ahead,
        prefill_rate=0.0,
        budget=BUDGET,
        overhead_s=0.0,
        kv_capacity=kv_capacity,
        last_step_at=0.0,
        through_rate=10_000.0,
        delay_s=delay_s,
    )
    return Standing(MODEL, Curve(MODEL.theta), in_flight, promised)
