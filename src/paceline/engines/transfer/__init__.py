"""How does one worker hand the KV cache of a prompt over to another? One way a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import aiohttp

from paceline.domain.worker import Worker
from paceline.engines.transfer.mooncake import Mooncake
from paceline.engines.transfer.nixl import Nixl
from paceline.engines.transfer.sglang import Bootstrap
from paceline.engines.transfer.trtllm import ContextFirst


class Transfer(Protocol):
    """One worker's way. What it says of a hand-over is said as the one that prefills."""

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

    async def learn(self, session: aiohttp.ClientSession) -> str:
        """Ask the engine, now that it is ready, for what hand-overs need. Returns what is wrong."""
        ...


TRANSFERS: dict[str, Callable[[Worker, str], Transfer]] = {
    "nixl": Nixl,
    "mooncake": Mooncake,
    "sglang": Bootstrap,
    "trtllm": ContextFirst,
}


def make_transfer(worker: Worker, api_key: str) -> Transfer | None:
    """A worker's way; None: it has none."""
    if not worker.transfer:
        return None
    return TRANSFERS[worker.transfer](worker, api_key)
