"""What does a request ask for, and what does its engine get to read?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
import xxhash
from msgspec import UNSET, Raw, UnsetType

from paceline.domain.errors import InvalidRequest
from paceline.domain.kvevents import BlockForm, TokenBlocks, named_blocks
from paceline.domain.request import BLOCK_BYTES
from paceline.domain.worker import Worker
from paceline.gateway.flavors import FLAVORS
from paceline.gateway.ports import Dialect

MAX_BLOCKS = 1024
"""Longest prefix that is told apart: 256 KB of text."""
MAX_TOKENS = 65_536
"""Of a prompt of token ids, those that are looked at: what `MAX_BLOCKS` are in text."""
IMAGE_BYTES = 3000
"""What an inlined image counts for as prompt text, about 750 tokens."""
INLINE_DATA = b";base64,"
BATCH_HEADER = "x-paceline-batch"
BATCH = re.compile(r"[A-Za-z0-9._:-]{1,64}")
MULTIPART_MODEL = re.compile(rb'name="model"[^\r\n]*(?:\r\n[^\r\n]+)*\r\n\r\n([^\r\n]{1,256})\r\n')


class Body(msgspec.Struct):
    """The fields of any `/v1/*` JSON body that Paceline reads; all others pass unseen."""

    model: str | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | UnsetType | None = UNSET
    max_tokens: int | float | None = None
    max_completion_tokens: int | float | None = None
    max_output_tokens: int | float | None = None
    service_tier: str | UnsetType | None = UNSET
    tools: Raw = Raw(b"")
    system: Raw = Raw(b"")
    instructions: Raw = Raw(b"")
    messages: Raw = Raw(b"")
    prompt: Raw = Raw(b"")
    input: Raw = Raw(b"")
    cache_salt: Any = None
    n: Any = None
    best_of: Any = None
    echo: Any = None
    prompt_logprobs: Any = None
    use_beam_search: Any = None


_decode = msgspec.json.Decoder(Body).decode
_decode_ids = msgspec.json.Decoder(list[Annotated[int, msgspec.Meta(ge=0, lt=2**32)]]).decode


def read(body: bytes) -> Body:
    """The body's fields. Raises InvalidRequest with msgspec's sentence and place."""
    try:
        return _decode(body)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidRequest(f"the body is not a valid JSON request: {error}") from None


def prompt_text(body: Body) -> bytes:
    """The prompt in the order in which chat templates render it, as raw JSON: it names prefixes."""
    return b"".join(
        bytes(part)
        for part in (
            body.tools,
            body.system,
            body.instructions,
            body.messages,
            body.prompt,
            body.input,
        )
    )


def max_tokens(body: Body) -> int | None:
    """The most output tokens that the answer may have, by whichever name the endpoint has."""
    limits = (body.max_completion_tokens, body.max_tokens, body.max_output_tokens)
    return next((int(limit) for limit in limits if limit is not None and limit >= 1), None)


def prompt_size(text: bytes) -> tuple[int, int | None]:
    """Length of the prompt in bytes of JSON, and in tokens where it consists of token ids."""
    if text[:1] == b"[" and text[1:2].isdigit():
        return len(text), text.count(b",") + 1
    size, end = len(text), 0
    while (start := text.find(INLINE_DATA, end)) >= 0:
        end = text.find(b'"', start)
        size += IMAGE_BYTES - (end - start)
    return size, None


def prefix_blocks(text: bytes) -> tuple[int, ...]:
    """Hash chain over whole blocks of the prompt: equal numbers mean equal text up to there."""
    digest, blocks = 0, []
    for block in range(min(len(text) // BLOCK_BYTES, MAX_BLOCKS)):
        start = block * BLOCK_BYTES
        digest = xxhash.xxh3_64_intdigest(text[start : start + BLOCK_BYTES], digest)
        blocks.append(digest)
    return tuple(blocks)


def exact_blocks(body: Body, forms: Sequence[BlockForm]) -> tuple[TokenBlocks, ...]:
    """A prompt of token ids in blocks of these forms.

    None for a prompt of text: its tokens are the engine's to know.
    """
    try:
        ids = _decode_ids(body.prompt)[:MAX_TOKENS]
    except msgspec.MsgspecError:
        return ()
    salt = body.cache_salt if isinstance(body.cache_salt, str) else ""
    return named_blocks(ids, forms, salt)


def batch_of(headers: Mapping[str, str]) -> str:
    """Of which batch a request with these headers is; empty: of none."""
    name = headers.get(BATCH_HEADER)
    if name is None:
        return ""
    if not BATCH.fullmatch(name):
        raise InvalidRequest(
            f"{BATCH_HEADER} must be 1 to 64 characters of A-Z a-z 0-9 . _ : -", param=BATCH_HEADER
        )
    return name


def multipart_model(body: bytes) -> str | None:
    """The `model` field of a multipart form, as audio uploads carry it."""
    start = body.find(b'name="model"')  # `re` would take ten times as long to pass a large file
    found = MULTIPART_MODEL.match(body, start) if start >= 0 else None
    return found[1].decode("utf-8", "replace") if found else None


def with_fields(body: bytes, fields: dict[str, Any]) -> bytes:
    """The JSON object `body` with `fields` set; all else stays as the client wrote it.

    Appended where the client named none of them: the last of two equal keys wins, so that even a
    name in disguise (`"mod\\u0065l"`) changes nothing.
    """
    if any(b'"%b"' % name.encode() in body for name in fields):
        members = msgspec.json.decode(body, type=dict[str, Raw])
        members |= {name: Raw(msgspec.json.encode(value)) for name, value in fields.items()}
        return msgspec.json.encode(members)
    end = body.rindex(b"}")
    comma = b"" if body[:end].rstrip().endswith(b"{") else b","
    return body[:end] + comma + msgspec.json.encode(fields)[1:]


def wants_usage(body: Body) -> bool:
    """Shall the stream end with its token counts?"""
    return bool(body.stream_options and body.stream_options.get("include_usage"))


class Payload(msgspec.Struct, frozen=True, gc=False):
    """A request's body as its engine gets to read it."""

    data: bytes
    strip_usage: bool = False
    """We ask for the usage and the client does not: cut it out again."""
    cut_ids: bool = False
    """So with the token ids."""


def payload(
    data: bytes,
    body: Body | None,
    path: str,
    worker: Worker,
    dialect: Dialect,
    urgency: int,
    resumable: bool,
) -> Payload:
    """What this worker gets to read of the body `data`, whose fields are `body`."""
    if body is None:
        return Payload(data)
    fields: dict[str, Any] = {}
    strip = cut = False
    name = worker.serves_as or worker.model
    if body.model is not None and body.model != name:
        fields["model"] = name
    if (flavor := FLAVORS.get(path)) is not None:
        fields.update(dialect.extras(path, urgency))
        if flavor.openai_usage and body.stream:
            strip = not wants_usage(body)
            if strip:
                options = body.stream_options or {}
                fields["stream_options"] = {**options, "include_usage": True}
        # Stop strings make engines hold text back, for which ids would be ahead of it.
        if resumable and b'"stop"' not in data and b'"return_token_ids"' not in data:
            ids = dialect.token_ids(path)
            cut = bool(ids)
            fields.update(ids)
    return Payload(with_fields(data, fields) if fields else data, strip, cut)
