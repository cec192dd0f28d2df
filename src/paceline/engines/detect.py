"""What kind of engine answers at this URL, and what does it serve?"""

from __future__ import annotations

import asyncio

import aiohttp
import msgspec

from paceline.engines.llamacpp import Props
from paceline.engines.probe import Answer, Models, Probe


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
    models, version, props, metrics = await asyncio.gather(
        *(probe.get(session, path) for path in ("/v1/models", "/version", "/props", "/metrics"))
    )
    if not models.status or models.status >= 500:
        return None
    return judge(models, version, props, metrics)


def judge(models: Answer, version: Answer, props: Answer, metrics: Answer) -> Detected:
    """The kind whose marks the answers bear; `openai` if they bear none."""
    listed = models.read(Models) or Models([])
    owners = {model.owned_by for model in listed.data}
    length = listed.max_model_len
    told = version.read(Version)
    number = told.version if told else ""
    if "vllm" in owners or b"\nvllm:" in metrics.body:
        return Detected("vllm", listed.names, number, length)
    if "sglang" in owners or b"\nsglang:" in metrics.body:
        return Detected("sglang", listed.names, number, length)
    if "tensorrt_llm" in owners:
        return Detected("trtllm", listed.names, number, length)
    started = props.read(Props)
    if started is not None:
        length = started.default_generation_settings.n_ctx
        return Detected("llamacpp", listed.names, started.build_info, length)
    if "llamacpp" in owners or models.server == "llama.cpp":
        return Detected("llamacpp", listed.names, "", length)
    return Detected("openai", listed.names, "", length)
