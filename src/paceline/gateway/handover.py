"""How does a prompt get from the worker that prefills it to the one that writes the answer?

The first gets a request of its own, whose answer is not for the client; the second gets the
client's request, with what it needs to fetch the KV cache from the first. That is there for a time
only. Afterwards its blocks are others', and whoever fetched them would write nonsense and notice
nothing. So the time is kept here, and counted from when nothing can have been there yet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import inf
from time import monotonic
from typing import Any, Protocol

import msgspec
from msgspec import Raw

from paceline.domain.facts import Prefilled
from paceline.domain.request import Request
from paceline.gateway.errand import Errand
from paceline.gateway.flavors import Usage, usage
from paceline.gateway.intake import Body
from paceline.gateway.link import EngineLink, Timeouts
from paceline.gateway.ports import Host
from paceline.gateway.reply import BLAMELESS, RETRYABLE, refusal

PATHS = ("/v1/chat/completions", "/v1/completions")
MANY_PROMPTS = re.compile(rb'\[\s*["\[]')

_members = msgspec.json.Decoder(dict[str, Raw]).decode


def shareable(path: str, method: str, body: Body) -> bool:
    """Can one worker prefill the prompt of this request and another one answer it?

    There must be one prompt and one answer, since a hand-over is for one; and nothing may be asked
    of the prompt itself, which the second does not see.
    """
    if path not in PATHS or method != "POST":
        return False
    alone = body.n in (None, 1) and body.best_of in (None, 1)
    told = body.echo or body.prompt_logprobs is not None or body.use_beam_search
    return alone and not told and MANY_PROMPTS.match(bytes(body.prompt)) is None


class Owner(Protocol):
    """Whose prompt it is."""

    request: Request

    def on_unprefilled(self, because: str, timed_out: bool, blame: bool) -> bool:
        """The first worker has failed. False: that does not matter any more."""
        ...

    def on_bug(self) -> None: ...


class HandOver:
    """One prompt, prefilled by one worker for another."""

    __slots__ = (
        "_errand",
        "_fields",
        "_host",
        "_looked_at",
        "_not_yet_at",
        "_number",
        "_owner",
        "_path",
        "_sent_at",
        "fetched",
        "link",
        "together",
        "took_s",
    )

    def __init__(self, owner: Owner, host: Host, link: EngineLink, path: str, now: float) -> None:
        assert link.transfer is not None
        self._owner = owner
        self._host = host
        self._number = host.number()
        self._path = path
        self._errand: Errand | None = None
        self._fields: Mapping[str, Any] | None = None
        self._sent_at = self._not_yet_at = self._looked_at = now
        self.link = link
        self.together = link.transfer.together
        self.took_s = 0.0
        """What prefilling took, sending and answering included; 0: it has not ended."""
        self.fetched = False
        """The second worker knows of it."""

    @property
    def worker_id(self) -> str:
        """The worker that prefills."""
        return self.link.worker.id

    @property
    def under_way(self) -> bool:
        return self._errand is not None

    def body(self, data: bytes) -> bytes:
        """What the first worker gets to read of a body that is the client's otherwise."""
        assert self.link.transfer is not None
        return msgspec.json.encode(self.link.transfer.prefill(_members(data), self._number))

    def start(self, message: bytes, now: float) -> None:
        """Send the first worker its request."""
        assert self.link.transfer is not None
        self._errand = Errand(self.link, message, self, now)
        if self.together:
            self._fields = self.link.transfer.decode(self._path, self._number, b"")

    @property
    def until(self) -> float:
        """How long it may be fetched."""
        return inf if self.together else self._not_yet_at + self.link.worker.lease_s

    def fetch(self, prefilled_at: str, now: float) -> Mapping[str, Any] | None:
        """What the second worker needs, once; None: there is nothing for it, or not any more."""
        if self.fetched or prefilled_at != self.worker_id or now > self.until:
            return None
        if self._fields is None:
            return None
        self.fetched = True
        return self._fields

    def drop(self) -> None:
        """Nobody wants it any more: the first worker is to stop, or to free what it holds."""
        errand, self._errand = self._errand, None
        fields, self._fields = self._fields, None
        if errand is not None:
            errand.abandon()
        elif fields and not (self.fetched or self.together):
            self._host.give_up(self.link, fields)

    def look(self, timeouts: Timeouts, now: float) -> None:
        """Has the first worker been silent for too long?

        What it had not answered at the last look but one cannot have ended before that: had this
        process slept in between, an answer may have come in its sleep, and was not read yet.
        """
        errand = self._errand
        if errand is None:
            return
        self._not_yet_at, self._looked_at = self._looked_at, now
        because = timeouts.passed(now - errand.since, errand.connecting, flows=False)
        if because:
            self._fail(because, timed_out=True)

    def on_told(self, errand: Errand, now: float) -> None:
        """The first worker has answered."""
        self._errand = None
        self.took_s = now - self._sent_at
        if errand.status != 200:
            retry = errand.status in RETRYABLE and errand.status not in BLAMELESS
            self._fail(refusal(errand.status, errand.body), blame=retry)
            return
        transfer, body = self.link.transfer, errand.body
        assert transfer is not None
        if not self.together:
            try:
                self._fields = transfer.decode(self._path, self._number, body)
            except msgspec.MsgspecError as error:
                self._fail(f"it answered the prefill with nonsense: {error}")
                return
            if not self._fields:
                ended = self._fields is not None
                lacks = "the answer ended at once" if ended else "it holds nothing for others"
                self._fail(lacks, blame=not ended)
                return
        self._tell(now, usage(body))

    def _tell(self, now: float, counts: Usage) -> None:
        told = counts.prompt_tokens, counts.cached_tokens, self._not_yet_at
        self._host.tell(Prefilled(self._owner.request.id, self.worker_id, now, *told))

    def on_untold(self, errand: Errand, because: str) -> None:
        """The first worker will not answer."""
        self._errand = None
        self._fail(because)

    def on_bug(self) -> None:
        self._owner.on_bug()

    def _fail(self, because: str, timed_out: bool = False, blame: bool = True) -> None:
        self.drop()
        if not self._owner.on_unprefilled(because, timed_out, blame):
            self._tell(monotonic(), Usage())
