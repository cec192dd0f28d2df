"""What is left of a request where only its prompt is wanted?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LIMITS = ("max_completion_tokens", "min_tokens")
GENERATES = ("/v1/chat/completions", "/v1/completions")
"""Paths whose requests are shared."""
STREAMING = ("stream", "stream_options")


def in_one_piece(body: Mapping[str, Any]) -> dict[str, Any]:
    """Its answer comes whole. All else stays: the template must render the very same prompt."""
    return {name: value for name, value in body.items() if name not in STREAMING}


def of_one_token(body: Mapping[str, Any]) -> dict[str, Any]:
    """Its answer comes whole, and is the one token with which any prefill ends."""
    short = {**in_one_piece(body), "max_tokens": 1}
    return short | {name: 1 for name in LIMITS if name in body}
