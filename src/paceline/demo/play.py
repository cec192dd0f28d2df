"""What happens when, and what is measured?"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

import aiohttp
import msgspec
import uvloop
from rich.console import Console

from paceline.demo import figures, scenario
from paceline.demo.figures import Act, Chat
from paceline.demo.scenario import Scenario
from paceline.demo.screen import Scene, Screen, WorkerView
from paceline.demo.stage import HOW_TO_GET_THE_MODEL, DemoFailed, Fleet, fleet, small_model
from paceline.workload.drive import DriveSettings, Progress, drive
from paceline.workload.meter import Meter
from paceline.workload.outcome import Outcome

SECONDS = 20.0
QUICK_SECONDS = 5.0
WATCH_S = 0.5
CHAT_PAUSE_S = 3.0
CHAT_TOKENS = 40
STOPPED = 130
"""The exit status of what Ctrl-C ended, as shells have it."""
CHAT_TIMEOUT = aiohttp.ClientTimeout(30)


def run_demo(seed: int, *, quick: bool, keep: bool, as_json: bool, with_model: bool) -> int:
    """Play, tell what was seen, and give the exit status."""
    play = Scenario(QUICK_SECONDS if quick else SECONDS, seed)
    # With JSON on stdout, all that is for people goes to stderr.
    screen = Screen(Console(stderr=as_json))
    try:
        with TemporaryDirectory(prefix="paceline-demo-") as folder, screen:
            demo = _Demo(play, Path(folder), screen)
            return uvloop.run(demo.run(keep=keep, as_json=as_json, with_model=with_model))
    except DemoFailed as failure:
        print(failure, file=sys.stderr)
        return 1
    except asyncio.CancelledError:
        return STOPPED


class _Demo:
    def __init__(self, play: Scenario, folder: Path, screen: Screen) -> None:
        self.play = play
        self.folder = folder
        self.screen = screen

    async def run(self, *, keep: bool, as_json: bool, with_model: bool) -> int:
        """Both acts and the report; 0 if every request ended well."""
        _cancelled_by_signals()
        say = self.screen.say
        acts: list[Act] = []
        async with small_model(self.folder, wanted=with_model) as small:
            real = f" and {scenario.SMALL_MODEL}, a real model on this CPU" if small else ""
            say(f"{scenario.WORKERS} emulated engines{real}; seed {self.play.seed}")
            if with_model and not small:
                say(HOW_TO_GET_THE_MODEL)
            for policy in scenario.POLICIES:
                async with fleet(self.play, policy, small, self.folder, dashboard=keep) as up:
                    acts.append(await _Performance(self.play, policy, up, small, self.screen).run())
                    if policy == scenario.POLICIES[-1]:
                        self._report(acts, as_json=as_json)
                        if keep:
                            self._invite(up, small)
                            with suppress(asyncio.CancelledError):
                                await asyncio.Event().wait()
        return 1 if any(act.troubles for act in acts) else 0

    def _report(self, acts: Sequence[Act], *, as_json: bool) -> None:
        self.screen.clear()
        if as_json:
            print(figures.as_json(self.play, acts).decode(), flush=True)
            return
        self.screen.console.print(figures.as_table(acts))
        for sentence in figures.sentences(self.play, acts):
            self.screen.say(sentence)
        self.screen.say(
            "Next: README.md leads to a fleet of your own, "
            "served by `paceline serve --config examples/paceline.yaml`."
        )

    def _invite(self, up: Fleet, small: str) -> None:
        model = scenario.SMALL_MODEL if small else scenario.MODEL
        body = f'{{"model":"{model}","stream":true,"messages":[{{"role":"user","content":"Hi!"}}]}}'
        slow = '{"factor":3,"seconds":60}'
        replay = f"{sys.executable} -m paceline replay poisson --rate 10 --model {scenario.MODEL}"
        for line in (
            f"All of it stays up until Ctrl-C. The dashboard: {up.admin}",
            "Ask, look, and make an engine slow:",
            f"  curl -N {up.gateway}/v1/chat/completions -d '{body}'",
            f"  curl {up.admin}/paceline/v1/fleet",
            f"  curl {up.engines[0]}/emulate/slowdown -d '{slow}'",
            f"  {replay} --url {up.gateway}",
            f"  cat {self.folder}/{scenario.POLICIES[-1]}.yaml",
        ):
            self.screen.say(line)


class _Performance:
    """One act: the trace under one policy, on a fleet of its own."""

    def __init__(self, play: Scenario, policy: str, up: Fleet, small: str, screen: Screen) -> None:
        self.play = play
        self.up = up
        self.small = small
        self.screen = screen
        self.scene = Scene(policy, play)
        self.started = monotonic()
        self.chats: list[Chat] = []

    async def run(self) -> Act:
        policy, play = self.scene.policy, self.play
        self.screen.say(f"{policy}: {play.seconds:.0f} s of requests, then until the last token")
        try:
            outcomes = await self._perform()
        except* aiohttp.ClientError as troubles:
            raise DemoFailed(f"an engine is gone: {troubles.exceptions[0]!r}") from None
        slow_worker = self.up.engines[scenario.SLOW_WORKER - 1].removeprefix("http://")
        return figures.act_of(policy, outcomes, play, slow_worker, self.chats)

    async def _perform(self) -> list[Outcome]:
        async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as tasks:
            self.started = monotonic()
            watch = tasks.create_task(self._watch(session), name="watch")
            tasks.create_task(self._slow_down(session), name="slow down")
            if self.small:
                tasks.create_task(self._chat(session), name="chat")
            outcomes = await self._drive()
            watch.cancel()
        return outcomes

    async def _drive(self) -> list[Outcome]:
        def on_progress(progress: Progress) -> None:
            self.scene.progress = progress

        settings = DriveSettings(
            url=self.up.gateway, model=scenario.MODEL, force_lengths=True, timeout_s=60.0
        )
        return await drive(self.play.trace(), settings, on_progress)

    async def _slow_down(self, session: aiohttp.ClientSession) -> None:
        play, number = self.play, scenario.SLOW_WORKER
        await self._until(play.slow_from_s)
        engine = self.up.engines[number - 1]
        body = msgspec.json.encode({"factor": scenario.SLOWDOWN})
        async with session.post(f"{engine}/emulate/slowdown", data=body) as response:
            response.raise_for_status()
        self.scene.slow = True
        self.screen.say(f"  worker {number} now takes {scenario.SLOWDOWN:g} times as long")
        await self._until(play.slow_until_s)
        async with session.post(f"{engine}/emulate/reset") as response:
            response.raise_for_status()
        self.scene.slow = False
        self.screen.say(f"  worker {number} is as fast as before")

    async def _watch(self, session: aiohttp.ClientSession) -> None:
        while True:
            with suppress(aiohttp.ClientError):  # If the gateway dies, the requests will say so.
                async with session.get(f"{self.up.admin}/paceline/v1/fleet") as response:
                    seen = msgspec.json.decode(await response.read())
                workers = seen["models"][scenario.MODEL]["workers"]
                self.scene.workers = [WorkerView.of(worker) for worker in workers]
            self.scene.at_s = monotonic() - self.started
            self.screen.show(self.scene)
            await asyncio.sleep(WATCH_S)

    async def _chat(self, session: aiohttp.ClientSession) -> None:
        """A little conversation with the small model while requests come."""
        for question in cycle(scenario.QUESTIONS):
            chat = await self._ask(session, question)
            self.chats.append(chat)
            if monotonic() - self.started + CHAT_PAUSE_S > self.play.seconds:
                return
            await asyncio.sleep(CHAT_PAUSE_S)

    async def _ask(self, session: aiohttp.ClientSession, question: str) -> Chat:
        ask = {
            "model": scenario.SMALL_MODEL,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": CHAT_TOKENS,
            "temperature": 0.0,
            "stream": True,
        }
        meter, asked = Meter(keep_text=True), monotonic()
        try:
            url = f"{self.up.gateway}/v1/chat/completions"
            async with session.post(url, json=ask, timeout=CHAT_TIMEOUT) as response:
                if response.status != 200:
                    raise aiohttp.ClientError(await response.text())
                while data := await response.content.readany():
                    meter.feed(data, monotonic())
                    self.scene.said = " ".join("".join(meter.text).split())
            error = meter.error or ("" if meter.whole else "the stream ended before the answer did")
        except (aiohttp.ClientError, TimeoutError) as trouble:
            error = repr(trouble)
        ttft_s = None if meter.first_at is None else meter.first_at - asked
        return Chat(question, self.scene.said, ttft_s, meter.itl_s, error)

    async def _until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, self.started + at_s - monotonic()))


def _cancelled_by_signals() -> None:
    """Let whatever asks us to end unwind the stack, and with it the processes."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
