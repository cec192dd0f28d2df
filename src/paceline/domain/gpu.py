"""What is known of the GPUs under a worker, where somebody tells?"""

from __future__ import annotations

import msgspec

LOWERED = 0.9
"""Of the best clock seen: below that a power cap lowers it. At full load it is often active."""


class Gpus(msgspec.Struct, frozen=True):
    """Which GPUs are a worker's own, and who tells of them."""

    url: str
    """Of a DCGM exporter, without `/metrics`."""
    indices: tuple[int, ...] = ()
    """As the exporter numbers them (its label `gpu`); none: all that it has."""


class Gpu(msgspec.Struct, frozen=True):
    """One GPU at one moment. None: its exporter does not tell."""

    index: int
    name: str = ""
    utilisation: float | None = None
    """Share of time in which anything ran on it, however little."""
    sm_active: float | None = None
    """Share of time in which its multiprocessors had work, on average over all of them."""
    tensor_active: float | None = None
    """Share of time in which its tensor cores worked."""
    memory_active: float | None = None
    """Share of time in which its memory was read or written."""
    memory_used_mib: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    clock_mhz: float | None = None
    """Of its multiprocessors."""
    best_clock_mhz: float | None = None
    """The highest that was seen of it."""
    reasons: tuple[str, ...] = ()
    """Why its clock may be lower than it could be: power_cap, hardware, sync_boost, heat_software,
    heat_hardware or power_brake."""
    last_xid: int | None = None
    """The last error that its driver reported, however long ago; 0: none."""

    @property
    def lowered_by(self) -> tuple[str, ...]:
        """What makes it slower than it could be."""
        if self.clock_mhz is None or self.best_clock_mhz is None:
            capped = False
        else:
            capped = self.clock_mhz < LOWERED * self.best_clock_mhz
        return tuple(reason for reason in self.reasons if reason != "power_cap" or capped)
