"""How does an OpenAI endpoint fare when these requests come, whether or not it keeps up?

Open loop: a request is sent when it is due, not when an earlier one has ended. If the driver itself
is late, the delay counts into the TTFT and is told as `behind_s`. Every failure, refusal and
unfinished answer becomes an outcome, and counts as a miss.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from time import monotonic
from typing import Any, Literal

import aiohttp
import msgspec

from paceline.workload.meter import Meter, error_text
from paceline.workload.outcome import Outcome
from paceline.workload.prompts import prompt_text
from paceline.workload.traces import Arrival


class DriveSettings(msgspec.Struct, frozen=True):
    url: str
    """Base address, with or without /v1."""
    model: str = ""
    """For arrivals that name none."""
    key: str = ""
    keys: dict[str, str] = {}
    """Keys by tenant or tier, before `key`."""
    api: Literal["chat", "completions"] = "chat"
    force_lengths: bool = False
    """Ask for exactly the trace's output tokens (`ignore_eos`, `min_tokens`: vLLM, SGLang)."""
    exact_tokens: bool = False
    """Ask for a token count on every chunk (`continuous_usage_stats`: vLLM), for engines that put
    several tokens into one."""
    check_tokens: bool = False
    """Demand the emulated engine's text " t0 t1 t2 ...": proof that nothing is lost or doubled."""
    chars_per_token: float = 4.0
    salt: str = ""
    """Goes into the text of prompts, so that a replay with another salt finds no warm caches."""
    timeout_s: float = 600.0
    """For one request, from when it is sent."""
    drain_s: float = 120.0
    """After the last arrival; what is unfinished then is aborted."""
    max_in_flight: int = 0
    """A safety for the driver's machine; 0: no bound. Waiting for it counts as being behind."""


class Progress:
    """A replay under way; the driver updates it."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.sent = 0
        self.outcomes: list[Outcome] = []

    @property
    def in_flight(self) -> int:
        return self.sent - len(self.outcomes)


OnProgress = Callable[[Progress], None]


async def drive(
    arrivals: Sequence[Arrival],
    settings: DriveSettings,
    on_progress: OnProgress = lambda progress: None,
) -> list[Outcome]:
    """Send every arrival when it is due; the outcomes in the order of the trace.

    If cancelled, what is in flight is aborted first and joins `progress.outcomes` as unfinished.
    """
    progress = Progress(len(arrivals))
    async with _session() as session, asyncio.TaskGroup() as group:
        driver = _Driver(session, settings, progress, on_progress)
        tasks = []
        for index, arrival in enumerate(arrivals):
            # Even when late, yield: the streams under way must be read.
            await asyncio.sleep(max(0.0, driver.started + arrival.at_s - monotonic()))
            tasks.append(group.create_task(driver.ask(index, arrival), name=f"request {index}"))
            progress.sent += 1
            on_progress(progress)
        if tasks:
            _, unfinished = await asyncio.wait(tasks, timeout=settings.drain_s)
            for task in unfinished:
                task.cancel()
    return sorted(progress.outcomes, key=lambda outcome: outcome.index)


async def first_model(settings: DriveSettings) -> str:
    """The first model that the endpoint lists, for those who name none."""
    url = f"{_base(settings.url)}/models"
    async with (
        _session() as session,
        session.get(url, headers=_headers(settings.key), timeout=aiohttp.ClientTimeout(10)) as got,
    ):
        got.raise_for_status()
        models = msgspec.json.decode(await got.read())
    return str(models["data"][0]["id"])


class _Driver:
    """What the requests of one replay share."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        settings: DriveSettings,
        progress: Progress,
        on_progress: OnProgress,
    ) -> None:
        self.session = session
        self.settings = settings
        self.progress = progress
        self.on_progress = on_progress
        path = "chat/completions" if settings.api == "chat" else "completions"
        self.url = f"{_base(settings.url)}/{path}"
        self.room = (
            asyncio.Semaphore(settings.max_in_flight) if settings.max_in_flight else nullcontext()
        )
        self.started = monotonic()

    async def ask(self, index: int, arrival: Arrival) -> None:
        """One request, from when it is due to its outcome."""
        meter = Meter(exact=self.settings.exact_tokens, keep_text=self.settings.check_tokens)
        answer = _Answer()
        try:
            async with self.room:
                answer.sent_at = monotonic()
                async with asyncio.timeout(self.settings.timeout_s):
                    await self._exchange(index, arrival, meter, answer)
        except TimeoutError:
            answer.error = f"not finished within {self.settings.timeout_s:g} s"
        except (aiohttp.ClientError, OSError) as trouble:
            answer.error = f"{type(trouble).__name__}: {trouble}"
        except asyncio.CancelledError:
            answer.error = "unfinished when the replay ended"
            raise
        finally:
            self.progress.outcomes.append(self._outcome(index, arrival, meter, answer))
            self.on_progress(self.progress)

    async def _exchange(self, index: int, arrival: Arrival, meter: Meter, answer: _Answer) -> None:
        settings = self.settings
        key = settings.keys.get(arrival.tenant) or settings.keys.get(arrival.tier) or settings.key
        headers = _headers(key, arrival.tier, arrival.tenant, arrival.batch)
        body = msgspec.json.encode(request_body(arrival, settings, index))
        async with self.session.post(self.url, data=body, headers=headers) as response:
            answer.status = response.status
            answer.worker = response.headers.get("x-paceline-worker", "")
            answer.tier = response.headers.get("x-paceline-tier", "")
            if response.status != 200:
                answer.error = _refusal(response.status, await response.read())
                return
            read = response.content.readany
            while data := await read():
                meter.feed(data, monotonic())
        answer.error = meter.error or _trouble(meter, settings)

    def _outcome(self, index: int, arrival: Arrival, meter: Meter, answer: _Answer) -> Outcome:
        due = self.started + arrival.at_s
        now = monotonic()
        return Outcome(
            index=index,
            at_s=arrival.at_s,
            behind_s=max(0.0, (answer.sent_at or now) - due),
            ended_s=now - self.started,
            tier=arrival.tier or answer.tier,
            tenant=arrival.tenant,
            model=arrival.model or self.settings.model,
            worker=answer.worker,
            status=answer.status,
            error=answer.error,
            prompt_tokens=meter.prompt_tokens or arrival.prompt_tokens,
            output_tokens=meter.output_tokens or meter.chunk_tokens,
            ttft_s=None if meter.first_at is None else meter.first_at - due,
            itl_s=meter.itl_s,
            stall_s=meter.stall_s,
            gaps=meter.gaps,
        )


class _Answer:
    """What is known of an answer besides its tokens."""

    sent_at = 0.0
    status = 0
    worker = ""
    tier = ""
    error = ""


def request_body(arrival: Arrival, settings: DriveSettings, index: int) -> dict[str, Any]:
    """What is posted for an arrival; its index makes the part of the prompt that nobody shares."""
    text = prompt_text(arrival, index, settings.salt, settings.chars_per_token)
    body: dict[str, Any] = {
        "model": arrival.model or settings.model,
        "max_tokens": arrival.output_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if settings.api == "chat":
        body["messages"] = arrival.messages or [{"role": "user", "content": text}]
    elif arrival.messages:
        body["prompt"] = "\n".join(str(m.get("content", "")) for m in arrival.messages)
    else:
        body["prompt"] = text
    if settings.exact_tokens:
        body["stream_options"]["continuous_usage_stats"] = True
    if settings.force_lengths:
        body |= {"ignore_eos": True, "min_tokens": arrival.output_tokens}
    return body


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


def _base(url: str) -> str:
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


def _headers(key: str, tier: str = "", tenant: str = "", batch: str = "") -> dict[str, str]:
    # Identity: a compressed stream would be held back by the compressor.
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    if tier:
        headers["x-gateway-inference-objective"] = tier
    if tenant:
        headers["x-gateway-inference-fairness-id"] = tenant
    if batch:
        headers["x-paceline-batch"] = batch
    return headers


def _refusal(status: int, body: bytes) -> str:
    try:
        said = msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.DecodeError:
        return f"HTTP {status}: {body[:200].decode(errors='replace').strip()}"
    return f"HTTP {status}: {error_text(said)}"


def _trouble(meter: Meter, settings: DriveSettings) -> str:
    """What is wrong with an answer that came to its end without an error of its own."""
    if not meter.whole:
        return "the stream ended before the answer did"
    if meter.first_at is None:
        return "the answer is empty"
    if settings.check_tokens:
        return broken_at("".join(meter.text), meter.output_tokens)
    return ""


def broken_at(text: str, tokens: int | None = None) -> str:
    """Where " t0 t1 t2 ..." is interrupted, in words; empty if it is unbroken and complete."""
    words = text.split()
    for i, word in enumerate(words):
        if word != f"t{i}":
            return f"token {i} should be t{i} and is {word[:20]}: one was lost or doubled"
    if tokens is not None and len(words) != tokens:
        return f"{len(words)} tokens came where the engine counted {tokens}"
    return ""
