"""Lets tests import what lies beside them; no property is judged by how long it takes."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import settings

settings.register_profile("paceline", deadline=None)
settings.load_profile("paceline")

for folder in ("kernel", "policy", "workload", "gateway", "engines", "simulator", "tokens", "real"):
    sys.path.insert(0, str(Path(__file__).parent / folder))
