"""What does the gateway need from the host and the engines' adapters?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from paceline.domain.facts import Fact

if TYPE_CHECKING:
    from paceline.gateway.exchange import Exchange
    from paceline.gateway.link import EngineLink


class Dialect(Protocol):
    """What is particular about requests to one kind of engine."""

    def extras(self, path: str, urgency: int) -> Mapping[str, Any]:
        """Fields to add to a generation's body. `urgency`: 0 is the most urgent tier."""
        ...


class Host(Protocol):
    """The live host, as the gateway sees it."""

    def open(self, exchange: Exchange) -> None:
        """A request came in: track it, and let the kernel decide."""
        ...

    def knows(self, request_id: str) -> bool:
        """Is a request of this id under way?"""
        ...

    def tell(self, fact: Fact) -> None:
        """Hand a fact to the kernel and run its commands."""
        ...

    def link(self, worker_id: str) -> EngineLink: ...

    def gaps(self, exchange: Exchange) -> list[int]:
        """The ITL histogram that this request's gaps count in."""
        ...

    def closed(self, exchange: Exchange) -> None:
        """A request is over, in whatever way."""
        ...
