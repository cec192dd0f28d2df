"""What may be asked of a running gateway about its troubles?"""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from paceline.domain.errors import InvalidRequest
from paceline.observe.diagnosis import Diagnosis
from paceline.observe.losses import LATE_KEPT


def diagnosis_routes(diagnosis: Diagnosis) -> list[Route]:
    """Findings, and what they rest on."""

    async def findings(request: Request) -> Response:
        """What is wrong, worst first: evidence, since when, who is hurt, a remedy; and in `notes`
        where the GPUs' utilisation misleads."""
        return _json(await diagnosis.to_json())

    async def stalls(request: Request) -> Response:
        """What came late on each worker, each with its causes; `worker=ID`, `limit=N`."""
        text = request.query_params.get("limit", "100")
        if not text.isdecimal() or not 1 <= int(text) <= LATE_KEPT:
            raise InvalidRequest(f"limit must be a number from 1 to {LATE_KEPT}", param="limit")
        return _json(diagnosis.stalls_json(request.query_params.get("worker"), int(text)))

    return [
        Route("/paceline/v1/diagnosis", findings),
        Route("/paceline/v1/stalls", stalls),
    ]


def _json(body: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
