"""Which requests come when?

Three forms of file are read, told apart by their first line:

- Mooncake JSONL (kvcache-ai/Mooncake): `timestamp` in ms, `input_length`, `output_length`,
  `hash_ids`;
- Azure 2023 and 2024 CSV (Azure/AzurePublicDataset): `TIMESTAMP,ContextTokens,GeneratedTokens`;
- Paceline's own JSONL, one request a line:
  `{"at_s": 0.5, "prompt_tokens": 700, "output_tokens": 80}`, optionally with `prefix` (any name;
  requests with the same one start with the same `prefix_tokens` tokens) or `hash_ids` as in
  Mooncake, `tier`, `tenant`, `model`, `batch` and `max_tokens`; or with a literal `prompt` or
  `messages` in place of `prompt_tokens`.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from datetime import datetime
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import xxhash
from msgspec.structs import replace

BLOCK_TOKENS = 512
"""Tokens in one block of a shared prefix, as in the Mooncake traces."""
BATCH_S = 3.0
"""The Mooncake traces tell arrivals in batches of this length; jitter spreads them again."""
BATCH_SLACK_S = 0.005
"""Batches stand up to this far from a multiple of their length."""


class TraceError(ValueError):
    """A trace that can't be used; the message names the file, the line and what to do."""


class Arrival(msgspec.Struct, frozen=True):
    """One request to come."""

    at_s: float
    """Since the start of the trace."""
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    """Names of the prompt's blocks of 512 tokens, from its start; same names mean same text."""
    tier: str = ""
    tenant: str = ""
    model: str = ""
    prefix_tokens: int | None = None
    """How far `blocks` reach into the prompt; None: as far as they can."""
    prompt: str = ""
    """The literal prompt, if the trace has it."""
    messages: tuple[dict[str, Any], ...] = ()
    """The literal chat, if the trace has it."""
    max_tokens: int | None = None
    """The most output tokens, if the client tells."""
    batch: str = ""
    """Of which batch of requests it is, if the client tells."""

    @property
    def shared_tokens(self) -> int:
        """Tokens of the prompt that its blocks describe."""
        reach = (
            len(self.blocks) * BLOCK_TOKENS if self.prefix_tokens is None else self.prefix_tokens
        )
        return min(reach, self.prompt_tokens)


def load_trace(path: Path, rng: Random) -> list[Arrival]:
    """The arrivals of a trace file, in order of time."""
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            return read_trace(lines, rng, str(path))
    except (OSError, UnicodeDecodeError) as trouble:
        raise TraceError(f"{path}: cannot be read ({trouble}); is it a text file?") from trouble


def read_trace(lines: Iterable[str], rng: Random, name: str = "trace") -> list[Arrival]:
    """Read any known form; `name` is what errors call it."""
    numbered = ((n, line) for n, line in enumerate(lines, 1) if line.strip())
    first = next(numbered, None)
    if first is None:
        raise TraceError(f"{name}: the file is empty; give one request a line")
    read = _reader_for(first[1])
    if read is None:
        raise TraceError(
            f"{name}:{first[0]}: no known form of trace; give Mooncake JSONL, Azure CSV with its"
            ' header, or lines like {"at_s": 0.5, "prompt_tokens": 700, "output_tokens": 80}'
        )
    rest = numbered if "ContextTokens" in first[1] else chain([first], numbered)
    arrivals = []
    for number, line in rest:
        try:
            arrivals.append(read(line))
        except (ValueError, LookupError) as trouble:
            raise TraceError(f"{name}:{number}: {trouble}; correct or remove the line") from trouble
    if not arrivals:
        raise TraceError(f"{name}: there is no request after the header; give one request a line")
    if read is _mooncake:
        arrivals = _spread(arrivals, rng)
    arrivals.sort(key=lambda arrival: arrival.at_s)
    return arrivals


def _reader_for(first: str) -> Callable[[str], Arrival] | None:
    if "ContextTokens" in first:
        return _azure_reader(first)
    if first.lstrip().startswith("{") and '"at_s"' in first:
        return _own
    return _mooncake if '"hash_ids"' in first or '"input_length"' in first else None


class _MooncakeLine(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


_decode_mooncake = msgspec.json.Decoder(_MooncakeLine).decode


def _mooncake(text: str) -> Arrival:
    line = _decode_mooncake(text)
    at_s = line.timestamp / 1000
    return _checked(Arrival(at_s, line.input_length, line.output_length, line.hash_ids))


def _spread(arrivals: list[Arrival], rng: Random) -> list[Arrival]:
    """Each request somewhere in its batch, if the whole trace stands in batches."""
    starts_s = [round(arrival.at_s / BATCH_S) * BATCH_S for arrival in arrivals]
    together = zip(arrivals, starts_s, strict=True)
    if any(abs(arrival.at_s - start_s) > BATCH_SLACK_S for arrival, start_s in together):
        return arrivals
    return [
        replace(arrival, at_s=start_s + rng.random() * BATCH_S)
        for arrival, start_s in zip(arrivals, starts_s, strict=True)
    ]


def _azure_reader(header: str) -> Callable[[str], Arrival]:
    names = [name.strip().lstrip("\ufeff") for name in next(csv.reader([header]))]
    start: datetime | None = None

    def read(text: str) -> Arrival:
        nonlocal start
        row = dict(zip(names, next(csv.reader([text])), strict=True))
        at = datetime.fromisoformat(row["TIMESTAMP"])
        start = start or at
        at_s = (at - start).total_seconds()
        return _checked(Arrival(at_s, int(row["ContextTokens"]), int(row["GeneratedTokens"])))

    return read


class _OwnLine(msgspec.Struct, forbid_unknown_fields=True):
    at_s: float
    output_tokens: int
    prompt_tokens: int | None = None
    prefix: str = ""
    prefix_tokens: int = 0
    tier: str = ""
    tenant: str = ""
    model: str = ""
    prompt: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    hash_ids: tuple[int, ...] = ()
    max_tokens: int | None = None
    batch: str = ""


_decode_own = msgspec.json.Decoder(_OwnLine).decode


def _own(text: str) -> Arrival:
    line = _decode_own(text)
    tokens = line.prompt_tokens
    if tokens is None:
        if not (line.prompt or line.messages):
            raise ValueError("one of prompt_tokens, prompt or messages is needed")
        letters = len(line.prompt) or sum(len(str(m.get("content", ""))) for m in line.messages)
        tokens = max(1, letters // 4)  # A token of English is about four characters.
    if bool(line.prefix) != bool(line.prefix_tokens):
        raise ValueError("prefix and prefix_tokens go together")
    if line.prefix and line.hash_ids:
        raise ValueError("either prefix or hash_ids says what is shared")
    if line.prefix_tokens > tokens:
        raise ValueError("prefix_tokens is more than prompt_tokens")
    return _checked(
        Arrival(
            line.at_s,
            tokens,
            line.output_tokens,
            line.hash_ids or named_blocks(line.prefix, line.prefix_tokens),
            line.tier,
            line.tenant,
            line.model,
            line.prefix_tokens if line.prefix else None,
            line.prompt,
            line.messages,
            line.max_tokens,
            line.batch,
        )
    )


def named_blocks(name: str, tokens: int) -> tuple[int, ...]:
    """Names of the blocks of a text of so many tokens: same name, same blocks, on any machine."""
    base = xxhash.xxh3_64_intdigest(name.encode()) >> 16
    return tuple(range(base, base - (-tokens // BLOCK_TOKENS)))


def _checked(arrival: Arrival) -> Arrival:
    if not 0 <= arrival.at_s < float("inf"):
        raise ValueError("the time must not lie before the start")
    if arrival.prompt_tokens < 1 or arrival.output_tokens < 1:
        raise ValueError("a request needs at least one prompt token and one output token")
    return arrival
