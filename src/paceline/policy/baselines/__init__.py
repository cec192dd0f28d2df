"""How do others choose a worker? Rules to compare with, each as its source publishes it.

They see what `headroom` sees and no more. What may be tuned stands in constants, at the values of
the source unless said otherwise.
"""

from paceline.policy.baselines.kvcost import KvCost, KvCostOutput
from paceline.policy.baselines.latency import GlobalLatency
from paceline.policy.baselines.peakewma import PeakEwma
from paceline.policy.baselines.simple import (
    at_random,
    least_kv,
    least_requests,
    power_of_two,
    prefix_affinity,
    priority,
    round_robin,
)

__all__ = [
    "GlobalLatency",
    "KvCost",
    "KvCostOutput",
    "PeakEwma",
    "at_random",
    "least_kv",
    "least_requests",
    "power_of_two",
    "prefix_affinity",
    "priority",
    "round_robin",
]
