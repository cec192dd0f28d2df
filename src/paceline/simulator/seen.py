"""What became of one simulated request, as its client saw it?"""

from __future__ import annotations

from math import inf

import msgspec


class Seen(msgspec.Struct, gc=False):
    """One request that is over. Seconds and tokens."""

    at_s: float
    """Arrival at the gateway, since the start of the run."""
    tier: str
    """That it came with."""
    tenant: str
    model: str
    worker: str
    """The last one it was sent to; empty if none."""
    prompt_tokens: int
    output_tokens: int
    status: str
    """ok, shed, failed, broke (after its first token), or unfinished."""
    kept: bool
    """Was the promise of its own tier kept? Never unless ok."""
    ttft_s: float = inf
    """From arrival to first token; infinite if none came."""
    itl_s: float = 0.0
    """Mean gap between tokens; 0 with fewer than two."""
    stall_s: float = 0.0
    """Worst gap."""
    seconds: float = 0.0
    """From arrival to the end."""
    queued_s: float = 0.0
    """From arrival until it was sent to the worker that began its answer, or was tried last."""
    degraded: bool = False
    """Was it served as less than what it came as?"""
    paused: int = 0
    """How often it was taken off its worker for others."""
    moved: int = 0
    """How often it was taken off its worker to go on elsewhere, or lost by it."""
