"""What have other gateways in flight on a worker, as far as they have told?"""

from __future__ import annotations

from paceline.domain.facts import PeerLoad

FORGET_S = 10.0
"""A gateway that has been silent for so long is gone, and its requests with it."""


class Elsewhere:
    """The load of one worker that comes from other gateways: the sum of what each told last."""

    __slots__ = (
        "_told",
        "ahead",
        "arriving",
        "context",
        "context_arriving",
        "prefill_rate",
        "streams",
    )

    def __init__(self) -> None:
        self._told: dict[str, tuple[PeerLoad, float]] = {}
        self._sum()

    @property
    def requests(self) -> int:
        return self.streams + self.arriving

    def heard(self, gateway: str, load: PeerLoad | None, at: float) -> bool:
        """What a gateway had in flight at a time; False if that changes nothing."""
        if load is not None:
            self._told[gateway] = load, at
        elif self._told.pop(gateway, None) is None:
            return False
        self._sum()
        return True

    def forget(self, now: float) -> None:
        """Leave out whoever has been silent for too long."""
        silent = [g for g, (_, at) in self._told.items() if at <= now - FORGET_S]
        for gateway in silent:
            del self._told[gateway]
        if silent:
            self._sum()

    def _sum(self) -> None:
        loads = [load for load, _ in self._told.values()]
        self.streams = sum(load.streams for load in loads)
        self.arriving = sum(load.arriving for load in loads)
        self.context = sum(load.context for load in loads)
        self.context_arriving = sum(load.context_arriving for load in loads)
        self.ahead = sum(load.ahead for load in loads)
        self.prefill_rate = sum(load.prefill_rate for load in loads)
