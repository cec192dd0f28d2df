"""On its PYTHONPATH a `paceline` has every prompt handed over, whatever its policy."""

from math import inf

from paceline.policy import disagg

disagg.LOCAL_TOKENS = 0.0
disagg.QUEUED = inf  # type: ignore[assignment]
