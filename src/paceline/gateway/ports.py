"""What does the gateway need from the host and the engines' adapters?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from paceline.domain.facts import Fact
from paceline.domain.kvevents import BlockForm, PromptTokens

if TYPE_CHECKING:
    from paceline.gateway.exchange import Exchange
    from paceline.gateway.link import EngineLink


Turn = Literal["moved", "paused", "shed"]
"""What may befall a request: it is taken off its worker to go on elsewhere, or for others; or it is
turned away."""


class Dialect(Protocol):
    """What is particular about requests to one kind of engine."""

    def extras(self, path: str, urgency: int) -> Mapping[str, Any]:
        """Fields to add to a generation's body. `urgency`: 0 is the most urgent tier."""
        ...

    def token_ids(self, path: str) -> Mapping[str, Any]:
        """Fields that ask for the ids of the prompt's and the answer's tokens beside their text.

        Empty: this engine has none, or it needs none to go on with an answer.
        """
        ...

    def continuation(
        self, path: str, body: dict[str, Any], text: str, token_ids: list[int] | None
    ) -> dict[str, Any] | None:
        """The body with which a generation goes on after `text`, which it has produced.

        `token_ids` are the tokens of exactly that text, if known. None: it cannot go on here.
        """
        ...


class Prompts(Protocol):
    """Who tokenises the text of prompts, off the event loop."""

    def reads(self, model: str, path: str, size: int) -> bool:
        """Can the tokens of such a body, of so many bytes, be known?"""
        ...

    def read(
        self,
        request_id: str,
        model: str,
        path: str,
        body: bytes,
        forms: Sequence[BlockForm],
        patience_s: float,
        tell: Callable[[PromptTokens | None], None],
    ) -> bool:
        """Tell the prompt's tokens, in blocks of these forms, within so many seconds; None if they
        are not known by then. False: nothing will be told."""
        ...


class Transfer(Protocol):
    """How a worker hands the KV cache of a prompt that it has prefilled over to another one."""

    @property
    def together(self) -> bool:
        """Both are asked at the same time, and meet; else the second once the first is done."""
        ...

    def none(self, path: str) -> Mapping[str, Any]:
        """Fields of a body that say that nothing is handed over, whatever its client wrote."""
        ...

    def prefill(self, body: dict[str, Any], number: int) -> dict[str, Any]:
        """The body with which this worker prefills the prompt of `body` and holds it.

        `number`: a random one below 2**63 that names this hand-over.
        """
        ...

    def decode(self, path: str, number: int, answer: bytes) -> dict[str, Any] | None:
        """Fields of the body with which another goes on. `answer`: what this one said to it, empty
        where both work together. None: it holds nothing; empty: there is nothing to go on with."""
        ...

    def release(self, fields: Mapping[str, Any]) -> dict[str, Any] | None:
        """The body of a text completion that another worker refuses, and by that has this one free
        what it holds. None: there is no such thing."""
        ...


class Host(Protocol):
    """The live host, as the gateway sees it."""

    def track(self, exchange: Exchange) -> None:
        """A request came in: from now on it is known, and ends when the host does."""
        ...

    def open(self, exchange: Exchange, waited_s: float = 0.0) -> None:
        """Let the kernel decide about a request that came in so long ago."""
        ...

    def knows(self, request_id: str) -> bool:
        """Is a request of this id under way?"""
        ...

    def tell(self, fact: Fact) -> None:
        """Hand a fact to the kernel and run its commands."""
        ...

    def block_forms(self, model: str) -> Sequence[BlockForm]:
        """In what blocks prompts for a model are to be named; none where nobody would ask."""
        ...

    def link(self, worker_id: str) -> EngineLink: ...

    def number(self) -> int:
        """A random one below 2**63."""
        ...

    def give_up(self, holder: EngineLink, fields: Mapping[str, Any]) -> None:
        """Nobody will fetch what this worker holds: have it free that, if there is a way."""
        ...

    def gaps(self, exchange: Exchange) -> list[int]:
        """The ITL histogram that this request's gaps count in."""
        ...

    def note(self, exchange: Exchange, turn: Turn, because: str) -> None:
        """A request takes this turn, to be counted."""
        ...

    def closed(self, exchange: Exchange) -> None:
        """A request is over, in whatever way."""
        ...
