"""What has a client of its answer, and how does the answer go on?"""

from __future__ import annotations

from paceline.domain.facts import StreamEnded
from paceline.gateway.intake import Body, wants_usage
from paceline.gateway.ports import Dialect
from paceline.gateway.relay import Relay
from paceline.gateway.resume import Produced
from paceline.gateway.seam import Seam
from paceline.gateway.tally import Tally


class Answer:
    """One answer across all workers that write it: how much there is, and what was said."""

    __slots__ = ("path", "produced", "tally")

    def __init__(self, path: str, resumable: bool) -> None:
        self.path = path
        self.tally = Tally()
        self.produced = Produced() if resumable else None
        """What was said; None: it is not kept, because the answer could not go on anyway."""

    @property
    def tokens(self) -> int:
        """Those that the client has."""
        return self.tally.tokens

    @property
    def goes_on(self) -> bool:
        """Can it go on from where it stands?"""
        return self.produced is not None and self.produced.can_go_on

    @property
    def is_whole(self) -> bool:
        """Does the client have all of it but the formalities?"""
        return self.produced is not None and self.produced.finished

    def can_move(self, body: bytes, dialect: Dialect) -> bool:
        """Would taking it off its worker leave it the same answer?"""
        return not self.is_whole and self.goes_on and self.rest(body, dialect) is not None

    def rest(self, body: bytes, dialect: Dialect) -> bytes | None:
        """What is left to be asked of a worker; empty: nothing. None: it cannot go on."""
        if self.produced is None:
            return None
        return self.produced.rest(self.path, body, dialect, self.tokens)

    def seam(self) -> Seam:
        """Another worker goes on: what joins its events to those that the client has."""
        produced = self.produced
        assert produced is not None
        produced.moves_on()
        return Seam(produced.identity, self.tokens, produced.again(self.path))

    def wrote(self, relay: Relay) -> None:
        """A worker has done its part."""
        self.tally.wrote(relay, self.produced)

    def last_words(self, finish_reason: str, body: Body | None, prompt_tokens: int | None) -> bytes:
        """What its last worker left unsaid. `prompt_tokens`: a guess, for want of the engine's."""
        produced, told = self.produced, self.tally.prompt_tokens
        assert produced is not None
        if told is None:
            told = produced.prompt_tokens or prompt_tokens
        wanted = told if body is not None and wants_usage(body) else None
        return produced.last_words(finish_reason, wanted, self.tokens)

    def ended(self, request_id: str) -> StreamEnded:
        """The fact that this was all."""
        return self.tally.ended(request_id)
