"""Where does an engine tell of its KV cache?"""

from __future__ import annotations

from urllib.parse import urlsplit

import aiohttp
import msgspec

from paceline.engines.probe import Probe

ANYWHERE = ("*", "0.0.0.0", "[::]")  # noqa: S104 - as engines write it, to be replaced


class Source(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where the events of one cache are published."""

    endpoint: str
    """ZeroMQ address to subscribe to."""
    replay_endpoint: str = ""
    """Where to ask for what was missed; empty: nowhere."""
    topic: str = ""
    """Of the topics at that address those that begin so."""
    rank: int = 0
    """Of data-parallel replicas behind one URL."""


class _Vllm(msgspec.Struct):
    """One of `GET /kv_event_sources`, by rank."""

    endpoint: str | None = None
    replay_endpoint: str | None = None
    topic: str = ""
    enable_kv_cache_events: bool = False


class _SglangEvents(msgspec.Struct):
    """`kv_events` of SGLang's `GET /server_info`; each rank has the next port."""

    endpoint_host: str
    endpoint_port_base: int
    topic: str = ""
    dp_size: int = 1
    replay_endpoint_port_base: int | None = None


class _Sglang(msgspec.Struct):
    kv_events: _SglangEvents | None = None


async def sources(session: aiohttp.ClientSession, url: str, api_key: str = "") -> list[Source]:
    """As the engine itself says, by rank; none if it does not tell, or cannot be reached."""
    host = urlsplit(url).hostname or ""
    host = f"[{host}]" if ":" in host else host
    probe = Probe(url, api_key)
    told = (await probe.get(session, "/kv_event_sources")).read(dict[int, _Vllm])
    if told is not None:
        return [
            Source(_at(host, s.endpoint), _at(host, s.replay_endpoint or ""), s.topic, rank)
            for rank, s in sorted(told.items())
            if s.endpoint and s.enable_kv_cache_events
        ]
    info = (await probe.get(session, "/server_info")).read(_Sglang)
    if info is None or info.kv_events is None:
        return []
    events = info.kv_events
    there = _at(host, f"tcp://{events.endpoint_host}")
    replay = events.replay_endpoint_port_base
    return [
        Source(
            f"{there}:{events.endpoint_port_base + rank}",
            f"{there}:{replay + rank}" if replay else "",
            events.topic,
            rank,
        )
        for rank in range(events.dp_size)
    ]


def _at(host: str, endpoint: str) -> str:
    """An address as it is to be dialled: where an engine listens everywhere, it is at its URL."""
    for wildcard in ANYWHERE:
        if endpoint.startswith(f"tcp://{wildcard}"):
            return f"tcp://{host}{endpoint.removeprefix(f'tcp://{wildcard}')}"
    return endpoint
