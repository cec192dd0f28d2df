"""How does Paceline talk to anything that speaks the OpenAI API and is not known better?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import aiohttp

from paceline.domain.worker import WorkerReport
from paceline.engines.continuation import COMPLETION_TOKENS, longer_prompt
from paceline.engines.probe import Models, Probe


class OpenAI:
    """The common ground: no field is sent that OpenAI does not document, no figure expected."""

    kind = "openai"

    def __init__(self, url: str, model_name_at_engine: str, api_key: str) -> None:
        self._probe = Probe(url, api_key)

    def extras(self, path: str, urgency: int) -> Mapping[str, Any]:
        """None: strict servers refuse what they do not know."""
        return {}

    def token_ids(self, path: str) -> Mapping[str, Any]:
        """None: there is no field for it."""
        return {}

    def continuation(
        self, path: str, body: dict[str, Any], text: str, token_ids: list[int] | None
    ) -> dict[str, Any] | None:
        """Text completions go on everywhere; how a chat would is each engine's own affair."""
        if path != "/v1/completions":
            return None
        return longer_prompt({"max_tokens": COMPLETION_TOKENS, **body}, text, token_ids)

    async def report(self, session: aiohttp.ClientSession) -> WorkerReport:
        """Healthy if `/v1/models` answers; where that path is not served, if `/health` does."""
        models = await self._probe.get(session, "/v1/models")
        if models.ok:
            listed = models.read(Models)
            return WorkerReport(True, max_model_len=listed.max_model_len if listed else None)
        if models.status not in (404, 405, 501):
            return WorkerReport(False, models.trouble)
        health = await self._probe.get(session, "/health")
        if health.ok:
            return WorkerReport(True)
        return WorkerReport(False, f"neither /v1/models nor /health answers: {health.trouble}")
