"""stub"""
from __future__ import annotations
import msgspec
from paceline.policy.causes import Cause
class Loss(msgspec.Struct):
    """What one cause took on one worker, of late."""

    model: str
    worker: str
    """Empty: before any worker was chosen."""
    cause: Cause
    promises: int = 0
    """Requests whose promise it broke."""
    gaps: int = 0
    """Streams that it made wait, each time."""
    seconds: float = 0.0
    tiers: dict[str, int] = {}
    tenants: dict[str, int] = {}
    since: float = 0.0
