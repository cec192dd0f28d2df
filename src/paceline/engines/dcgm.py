"""What does a page of NVIDIA's DCGM exporter say of its GPUs?

Names and labels are those of dcgm-exporter 2 to 4. Which fields it tells is up to its operator:
`etc/default-counters.csv` has neither the reasons of the clock nor what is active in a GPU. Of a
GPU that is divided (MIG) it tells each part; the busiest of them counts for the whole.
"""

from __future__ import annotations

from collections.abc import Callable

from paceline.domain.gpu import Gpu
from paceline.engines.metrics import Metrics

BLANK = 1e14
"""DCGM says 2**47 or more where it has no value."""
REASONS = {
    0x04: "power_cap",
    0x08: "hardware",
    0x10: "sync_boost",
    0x20: "heat_software",
    0x40: "heat_hardware",
    0x80: "power_brake",
}
"""Bits of NVML's `nvmlClocksEventReasons`. Left out: that it idles, and clocks set by people."""
FIELDS: dict[str, tuple[tuple[str, ...], Callable[[float], float]]] = {
    "utilisation": (("DCGM_FI_DEV_GPU_UTIL",), lambda percent: percent / 100.0),
    "sm_active": (("DCGM_FI_PROF_SM_ACTIVE",), float),
    "tensor_active": (("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE",), float),
    "memory_active": (("DCGM_FI_PROF_DRAM_ACTIVE",), float),
    "memory_used_mib": (("DCGM_FI_DEV_FB_USED",), float),
    "power_w": (("DCGM_FI_DEV_POWER_USAGE",), float),
    "temperature_c": (("DCGM_FI_DEV_GPU_TEMP",), float),
    "clock_mhz": (("DCGM_FI_DEV_SM_CLOCK",), float),
    "reasons": (("DCGM_FI_DEV_CLOCKS_EVENT_REASONS", "DCGM_FI_DEV_CLOCK_THROTTLE_REASONS"), float),
    "last_xid": (("DCGM_FI_DEV_XID_ERRORS",), float),
}
"""Of `Gpu`: the exporter's names for it, the newest first, and its value in our units."""


def gpus_of(page: bytes) -> dict[int, Gpu]:
    """All GPUs on a page, by index."""
    metrics = Metrics(page)
    seen: dict[int, dict[str, float]] = {}
    names: dict[int, str] = {}
    for field, (known_as, value_of) in FIELDS.items():
        for labels, value in metrics.samples(*known_as):
            index = labels.get("gpu", "")
            if not index.isdecimal() or not 0.0 <= value < BLANK:
                continue
            gpu = seen.setdefault(int(index), {})
            gpu[field] = max(gpu.get(field, 0.0), value_of(value))
            names[int(index)] = labels.get("modelName", "")
    return {index: _gpu(index, names[index], gpu) for index, gpu in sorted(seen.items())}


def _gpu(index: int, name: str, values: dict[str, float]) -> Gpu:
    bits, xid = int(values.pop("reasons", 0.0)), values.pop("last_xid", None)
    reasons = tuple(reason for bit, reason in REASONS.items() if bits & bit)
    return Gpu(index, name, reasons=reasons, last_xid=None if xid is None else int(xid), **values)
