"""How is an engine's refusal said so that clients of OpenAI's API understand it?

Most engines say it in that shape. Older vLLM, SGLang and TensorRT-LLM leave the outer object away,
FastAPI has `detail`, llama.cpp and whatever stands before an engine answer in plain text.
"""

from __future__ import annotations

from typing import Any

import msgspec

from paceline.wire.http1 import REASONS, ResponseHead

MOST_WORDS = 2000
"""Letters of a message in an unknown form: an HTML page may be long."""


def in_openai_shape(head: ResponseHead, body: bytes) -> bytes:
    """The body as clients are to read it; where it changes, the head tells of the new one."""
    if head.get("content-encoding"):
        return body
    try:
        said = msgspec.json.decode(body)
    except (msgspec.MsgspecError, RecursionError):
        said = body.decode("utf-8", "replace").strip()
    if isinstance(said, dict) and isinstance(said.get("error"), dict):
        return body
    error = {
        "message": _message(said)[:MOST_WORDS] or REASONS.get(head.status, b"Unknown").decode(),
        "type": _text(said, "type", "error_type")
        or ("invalid_request_error" if head.status < 500 else "server_error"),
        "param": _text(said, "param"),
        "code": said.get("code", head.status) if isinstance(said, dict) else head.status,
    }
    body = msgspec.json.encode({"error": error})
    head.headers = [(n, v) for n, v in head.headers if n != "content-type"]
    head.headers.append(("content-type", "application/json"))
    return body


def _message(said: Any) -> str:
    """The sentence in it; all of it where none is found."""
    if isinstance(said, str):
        return said
    found = _text(said, "message", "error", "detail")
    if found is not None:
        return found
    rest = said.get("detail", said) if isinstance(said, dict) else said
    return msgspec.json.encode(rest).decode()


def _text(said: Any, *names: str) -> str | None:
    """The first of these members that is a text."""
    if not isinstance(said, dict):
        return None
    return next((text for name in names if isinstance(text := said.get(name), str)), None)
