"""A request that is over, of which tests change what they are about."""

from __future__ import annotations

from paceline.domain.outcome import Outcome
from paceline.domain.promise import Promise
from paceline.domain.request import Request

REQUEST = Request("r", "m", "acme", "premium", Promise(0.5, 0.04))
OUTCOME = Outcome(
    request=REQUEST,
    worker="w0",
    status=200,
    error="",
    attempts=1,
    because="",
    predicted=None,
    queued_s=0.01,
    ttft_s=0.1,
    itl_s=0.02,
    stall_s=0.1,
    seconds=1.0,
    prompt_tokens=10,
    cached_tokens=4,
    output_tokens=100,
)
