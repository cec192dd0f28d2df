"""How do vLLM's workers hand over by NIXL? The second pulls, with what the first has answered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import aiohttp
import msgspec

from paceline.domain.worker import Worker
from paceline.engines.transfer.prompt import GENERATES, of_one_token

FIELD = "kv_transfer_params"
KNOW_IT = (*GENERATES, "/v1/responses", "/v1/messages")
"""Paths of vLLM's whose bodies have that field."""
NOBODY = "(nobody: this frees the blocks of a hand-over)"


def refused_by_name(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A completion that vLLM refuses for its model's name: so late that it has understood what was
    to be fetched, and tells the holder; and so early that it computes nothing."""
    return {"model": NOBODY, "prompt": "-", "max_tokens": 1, **fields}


class Held(msgspec.Struct, frozen=True):
    """The answer to a prefill: where the blocks lie."""

    kv_transfer_params: dict[str, Any] | None = None


class Nixl:
    """`NixlConnector` of vLLM 0.32.

    The first worker keeps the blocks for `kv_lease_duration`, 30 s; then it gives them to others,
    and the second would read those others' without noticing.
    """

    together = False

    def __init__(self, worker: Worker, api_key: str) -> None:
        pass

    def none(self, path: str) -> Mapping[str, Any]:
        return {FIELD: None} if path in KNOW_IT else {}

    def prefill(self, body: dict[str, Any], number: int) -> dict[str, Any]:
        """One token of `min_tokens`: an answer that ends at once by a stop token would be held by
        some versions and connectors, and not by others."""
        asked = {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "remote_engine_id": None,
            "remote_block_ids": None,
            "remote_host": None,
            "remote_port": None,
        }
        return {**of_one_token(body), "min_tokens": 1, FIELD: asked}

    def decode(self, path: str, number: int, answer: bytes) -> dict[str, Any] | None:
        """What the first said goes to the second as it is."""
        held = msgspec.json.decode(answer, type=Held).kv_transfer_params
        return {FIELD: held} if held and held.get("do_remote_prefill") else None

    def release(self, fields: Mapping[str, Any]) -> dict[str, Any] | None:
        return refused_by_name(fields)

    async def learn(self, session: aiohttp.ClientSession) -> str:
        return ""
