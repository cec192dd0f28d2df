"""What must Paceline know about a kind of engine, and which kinds does it know?

A new kind is one file with one class, listed in `ADAPTERS`, and one more row in the conformance
suite (`tests/engines/test_conformance.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import aiohttp

from paceline.domain.worker import WorkerReport
from paceline.engines.llamacpp import LlamaCpp
from paceline.engines.openai import OpenAI
from paceline.engines.sglang import SGLang
from paceline.engines.trtllm import TRTLLM
from paceline.engines.vllm import VLLM


class Adapter(Protocol):
    """One engine's dialect.

    There is no method to abort a generation: all engines free its slot when the connection closes,
    some of them after a second or two.
    """

    @property
    def kind(self) -> str:
        """As configs name it."""
        ...

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

        `token_ids` are the tokens of exactly that text, if known. The caller lowers the limits
        on tokens. None: this engine, or this request, cannot go on without changing the answer.
        """
        ...

    async def report(self, session: aiohttp.ClientSession) -> WorkerReport:
        """How the engine is now. Trouble makes a report that is not healthy, never an exception."""
        ...


ADAPTERS = {adapter.kind: adapter for adapter in (VLLM, SGLang, TRTLLM, LlamaCpp, OpenAI)}


def make_adapter(kind: str, url: str, model_name_at_engine: str, api_key: str) -> Adapter:
    """The adapter of a kind, for one engine. KeyError: there is no such kind."""
    adapter: Adapter = ADAPTERS[kind](url, model_name_at_engine, api_key)
    return adapter
