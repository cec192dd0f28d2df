"""Lets tests import what lies beside them; no property is judged by how long it takes."""

from __future__ import annotations

import sys
from math import inf
from pathlib import Path

import pytest
from hypothesis import settings

from paceline.policy import disagg

settings.register_profile("paceline", deadline=None)
settings.load_profile("paceline")

for folder in ("kernel", "policy", "workload", "gateway", "engines", "simulator", "tokens", "real"):
    sys.path.insert(0, str(Path(__file__).parent / folder))


@pytest.fixture
def every_prompt_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies other than `headroom` keep no prompt in place."""
    monkeypatch.setattr(disagg, "LOCAL_TOKENS", 0.0)
    monkeypatch.setattr(disagg, "QUEUED", inf)
