"""What kind of engine answers at this URL, and what does it serve?"""

from __future__ import annotations

import asyncio

import aiohttp
import msgspec

from paceline.engines.llamacpp import Props
from paceline.engines.probe import Models, Probe

OWNERS = {"vllm": "vllm", "sglang": "sglang", "tensorrt_llm": "trtllm"}
"""Kinds by who owns their models."""
METRICS = {b"\nvllm:": "vllm", b"\nsglang:": "sglang"}
"""Kinds by a mark on their page of metrics, which may be open where the list of models is not."""


class Detected(msgspec.Struct, frozen=True):
    """What an engine shows of itself."""

    kind: str
    models: tuple[str, ...] = ()
    version: str = ""
    max_model_len: int | None = None

    @property
    def serves_as(self) -> str:
        """The model's name at the engine, if there can be no doubt; else empty."""
        return self.models[0] if len(self.models) == 1 else ""


class Version(msgspec.Struct, frozen=True):
    """The `/version` of vLLM and TensorRT-LLM."""

    version: str


async def detect(session: aiohttp.ClientSession, url: str, api_key: str) -> Detected | None:
    """Look at the engine; None while it does not answer, or still loads."""
    probe = Probe(url, api_key)
    models, version, props = await asyncio.gather(
        *(probe.get(session, path) for path in ("/v1/models", "/version", "/props"))
    )
    if not models.status or models.status >= 500:
        return None
    listed = models.read(Models) or Models([])
    owners = {model.owned_by for model in listed.data}
    told = version.read(Version)
    number, length = told.version if told else "", listed.max_model_len
    for owner, kind in OWNERS.items():
        if owner in owners:
            return Detected(kind, listed.names, number, length)
    started = props.read(Props)
    if started is not None:
        length = started.default_generation_settings.n_ctx
        return Detected("llamacpp", listed.names, started.build_info, length)
    if "llamacpp" in owners or models.server == "llama.cpp":
        return Detected("llamacpp", listed.names, "", length)
    metrics = await probe.get(session, "/metrics")
    for mark, kind in METRICS.items():
        if mark in metrics.body:
            return Detected(kind, listed.names, number, length)
    return Detected("openai", listed.names, "", length)
