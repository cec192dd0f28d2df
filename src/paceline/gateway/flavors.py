"""How does each kind of answer show its first token, and its last events?

Only bytes are looked at: within a JSON string a quote is always escaped, so a pattern with bare
quotes can match a key or a value, never what a user or a model wrote.
"""

from __future__ import annotations

import re

import msgspec


class Flavor(msgspec.Struct, frozen=True, gc=False):
    """Marks in the event stream of one endpoint."""

    first: re.Pattern[bytes]
    """Found in the first event that carries output; role and set-up events lack it."""
    token: re.Pattern[bytes]
    """Found once in each event that carries tokens; those with the usage or an error lack it."""
    openai_usage: bool = False
    """The usage comes in an event of its own, on request: asked for always, stripped if unasked."""
    typed: bool = False
    """Each event names its type."""

    def error_event(self, body: bytes) -> bytes:
        """An error, given in OpenAI's shape, as an event that this endpoint's clients notice."""
        if self.typed:
            return b'event: error\ndata: {"type":"error",%b\n\n' % body[1:]
        return b"data: %b\n\n" % body


CHAT = re.compile(
    rb'"(?:content|reasoning|reasoning_content|refusal|text)"\s*:\s*"(?!")'
    rb'|"(?:tool_calls|function_call|audio)"\s*:\s*[\[{]\s*["{]'
)
OPENAI = Flavor(CHAT, re.compile(rb'"choices"\s*:\s*\[\s*\{'), openai_usage=True)
RESPONSES = re.compile(rb'\.delta"')
MESSAGES = re.compile(rb'"content_block_delta"')

FLAVORS = {
    "/v1/chat/completions": OPENAI,
    "/v1/completions": OPENAI,
    "/v1/responses": Flavor(RESPONSES, RESPONSES, typed=True),
    "/v1/messages": Flavor(MESSAGES, MESSAGES, typed=True),
}
OTHER = Flavor(re.compile(b""), re.compile(b"data:"))

USAGE = re.compile(rb'"usage"\s*:\s*\{')
ERROR = re.compile(rb'^(?:event: error|data: \{\s*"(?:error"|object"\s*:\s*"error"))', re.MULTILINE)
"""At the start of an event by which an engine reports an error."""

DONE = b"data: [DONE]\n\n"
"""How OpenAI's streams end."""

PROMPT_TOKENS = re.compile(rb'"(?:prompt_tokens|input_tokens)"\s*:\s*(\d+)')
OUTPUT_TOKENS = re.compile(rb'"(?:completion_tokens|output_tokens)"\s*:\s*(\d+)')
CACHED_TOKENS = re.compile(rb'"(?:cached_tokens|cache_read_input_tokens)"\s*:\s*(\d+)')


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Token counts as the engine gave them."""

    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None


def usage(tail: bytes) -> Usage:
    """The counts in the last part of an answer, whatever its dialect."""

    def last(pattern: re.Pattern[bytes]) -> int | None:
        found = pattern.findall(tail)
        return int(found[-1]) if found else None

    return Usage(last(PROMPT_TOKENS), last(OUTPUT_TOKENS), last(CACHED_TOKENS))
