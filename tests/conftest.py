"""Lets tests import the helpers that lie beside them."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("kernel", "policy", "workload", "gateway", "engines", "simulator", "tokens", "real"):
    sys.path.insert(0, str(Path(__file__).parent / folder))
