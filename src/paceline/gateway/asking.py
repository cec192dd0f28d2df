"""What does an engine get to read of a client's request?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from paceline.gateway.answer import Answer
from paceline.gateway.flavors import FLAVORS, OTHER
from paceline.gateway.handover import HandOver
from paceline.gateway.intake import Body, Payload, payload, with_fields
from paceline.gateway.link import EngineLink
from paceline.gateway.seam import Seam
from paceline.gateway.sieve import Sieve
from paceline.wire.server import HttpRequest


class Asking:
    """One client's request, to be put to any engine."""

    __slots__ = ("_http", "_id", "_urgency", "body")

    def __init__(
        self, http: HttpRequest, body: Body | None, request_id: str, urgency: Callable[[str], int]
    ) -> None:
        """`urgency`: of a tier, as engines with priorities are to be told."""
        self._http = http
        self._id = request_id
        self._urgency = urgency
        self.body = body
        """Its fields; None: it is no JSON, or not needed any more."""

    def forget(self) -> None:
        """A long prompt need not outlive its sending."""
        self._http.body, self.body = b"", None

    def whole(
        self,
        data: bytes,
        link: EngineLink,
        tier: str,
        answer: Answer,
        seam: Seam | None,
        handed: Mapping[str, Any] | None,
    ) -> tuple[bytes, Sieve]:
        """The request for an answer, and what sifts that.

        `data` is its body, or what goes on with it where there is a `seam`; `handed` are fields
        with which the engine fetches the prompt's KV cache from another one.
        """
        ask = self._payload(data, link, tier, keep_ids=answer.produced is not None)
        data = ask.data
        if link.transfer is not None and self.body is not None:
            fields = dict(handed or link.transfer.none(self._http.path))
            data = with_fields(data, fields) if fields else data
        plain = self._http.version == "1.0"
        flavor = FLAVORS.get(self._http.path, OTHER)
        sieve = Sieve(flavor, ask.strip_usage, plain, ask.cut_ids, answer.produced, seam)
        return self._head(link, data) + data, sieve

    def prompt(self, link: EngineLink, tier: str, handover: HandOver) -> bytes:
        """The request that has an engine prefill the prompt for another one."""
        data = handover.body(self._payload(self._http.body, link, tier, keep_ids=False).data)
        return self._head(link, data) + data

    def _payload(self, data: bytes, link: EngineLink, tier: str, keep_ids: bool) -> Payload:
        path, urgency = self._http.path, self._urgency(tier)
        return payload(data, self.body, path, link.worker, link.dialect, urgency, keep_ids)

    def _head(self, link: EngineLink, data: bytes) -> bytes:
        http = self._http
        target = f"{http.path}?{http.query}" if http.query else http.path
        return link.head(http.method, target, http.headers, self._id, len(data))
