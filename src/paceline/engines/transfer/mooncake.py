"""How do vLLM's workers hand over by Mooncake? The first pushes when the second asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec

from paceline.domain.worker import Worker
from paceline.engines.probe import Probe
from paceline.engines.transfer.nixl import FIELD, KNOW_IT, refused_by_name
from paceline.engines.transfer.prompt import of_one_token

PORT = 8998
"""vLLM's VLLM_MOONCAKE_BOOTSTRAP_PORT, if nobody sets it."""


class Rank(msgspec.Struct, frozen=True):
    """One data-parallel rank in the answer of the bootstrap server's `/query`."""

    engine_id: str


class Mooncake:
    """`MooncakeConnector` of vLLM 0.32: both workers know a hand-over by its `transfer_id`.

    The first keeps its blocks for VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT, 480 s.
    """

    together = False

    def __init__(self, worker: Worker, api_key: str) -> None:
        host = urlsplit(worker.url).hostname or ""
        host = f"[{host}]" if ":" in host else host
        self._address = f"http://{host}:{worker.bootstrap_port or PORT}"
        self._engine_id = ""
        """Another one after each start of the engine, unless it was told one."""

    def none(self, path: str) -> Mapping[str, Any]:
        return {FIELD: None} if path in KNOW_IT else {}

    def prefill(self, body: dict[str, Any], number: int) -> dict[str, Any]:
        """One token and not none: blocks are held only if it was the limit that ended the answer,
        as `min_tokens` makes sure."""
        asked = {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "transfer_id": _name(number),
        }
        return {**of_one_token(body), "min_tokens": 1, FIELD: asked}

    def decode(self, path: str, number: int, answer: bytes) -> dict[str, Any] | None:
        """The first has said nothing of it: it was agreed upon before."""
        if not self._engine_id:
            return None
        return {
            FIELD: {
                "do_remote_decode": False,
                "do_remote_prefill": True,
                "remote_bootstrap_addr": self._address,
                "remote_engine_id": self._engine_id,
                "transfer_id": _name(number),
            }
        }

    def release(self, fields: Mapping[str, Any]) -> dict[str, Any] | None:
        return refused_by_name(fields)

    async def learn(self, session: aiohttp.ClientSession) -> str:
        """Only its first data-parallel rank is used."""
        answer = await Probe(self._address, "").get(session, "/query")
        ranks = answer.read(dict[str, Rank])
        if not ranks:
            trouble = "it knows no engine" if answer.ok else answer.trouble
            return f"Mooncake's bootstrap server at {self._address}: {trouble}"
        self._engine_id = ranks[min(ranks)].engine_id
        return ""


def _name(number: int) -> str:
    return f"paceline-{number:016x}"
