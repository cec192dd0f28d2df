"""Are a prompt's tokens known in time to choose its worker by them?

Tokenising takes some microseconds a token: nothing for the event loop, nor for a request that has
better things to do than wait. So it happens in a few threads, before which few prompts wait, each
for as long as it is worth; whatever comes too late is remembered for the conversation's next turn.
A tokenizer whose counts differ from the engine's again and again is another model's, and is not
asked any more.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import structlog

from paceline.domain.kvevents import BlockForm, PromptTokens, named_blocks
from paceline.domain.outcome import Outcome
from paceline.tokens.chat import PATHS, Unreadable, text_of
from paceline.tokens.template import ChatTemplate
from paceline.tokens.tokenizer import Tokenizer

THREADS = 2
MOST_WAITING = 32
"""Prompts under way or waiting: for more there would be no time left."""
MOST_BYTES = 1 << 20
"""Of a body that is read at all: some 250,000 tokens."""
MOST_TOKENS = 65_536
"""Of a prompt, those that are named in blocks; all are counted."""
MISTAKES = 3
"""Counts in a row that differ from the engine's, after which a tokenizer is not trusted."""

Tell = Callable[[PromptTokens | None], None]
Work = Future[PromptTokens | None]
log = structlog.get_logger("paceline")


class Tokenizes(Protocol):
    """A model's tokenizer."""

    @property
    def template(self) -> ChatTemplate | None: ...
    def ids(self, text: str, with_special: bool = False) -> array[int]: ...


class _Reading:
    """A prompt that is being tokenised. It is told once: in time, or that it is too late."""

    __slots__ = ("count", "late", "tell", "work")

    def __init__(self, work: Work, tell: Tell) -> None:
        self.work = work
        self.tell: Tell | None = tell
        self.late: asyncio.TimerHandle | None = None
        self.count: int | None = None
        """Its tokens, once they were told."""

    def over(self, found: PromptTokens | None) -> None:
        tell, self.tell = self.tell, None
        if tell is None:
            return
        if self.late is not None:
            self.late.cancel()
        self.count = found.count if found is not None else None
        tell(found)

    def give_up(self) -> None:
        self.work.cancel()  # if it has not begun: else it goes on, for the next turn
        self.over(None)


class Prompts:
    """The tokenizers of all models that have one. Used on one event loop."""

    def __init__(self, tokenizers: Mapping[str, Tokenizes]) -> None:
        self._tokenizers = tokenizers
        self._threads = ThreadPoolExecutor(THREADS, "tokenise")
        self._waiting = 0
        self._mistakes: dict[tuple[str, str], int] = {}
        """In a row, by model and path."""
        self._under_way: dict[str, tuple[tuple[str, str], _Reading]] = {}
        """By request, until it is over."""

    def reads(self, model: str, path: str, size: int) -> bool:
        """Can the tokens of such a body, of so many bytes, be known?"""
        known = model in self._tokenizers and path in PATHS and size <= MOST_BYTES
        return known and self._mistakes.get((model, path), 0) < MISTAKES

    def read(
        self,
        request_id: str,
        model: str,
        path: str,
        body: bytes,
        forms: Sequence[BlockForm],
        patience_s: float,
        tell: Tell,
    ) -> bool:
        """Tell the prompt's tokens, in blocks of these forms, within so many seconds; None if they
        are not known by then. False: there is no room for it, and nothing will be told."""
        if self._waiting >= MOST_WAITING:
            return False
        self._waiting += 1
        loop = asyncio.get_running_loop()
        work = self._threads.submit(_read, self._tokenizers[model], path, body, forms)
        reading = _Reading(work, tell)
        self._under_way[request_id] = (model, path), reading
        reading.late = loop.call_later(patience_s, reading.give_up)

        def done() -> None:
            self._waiting -= 1
            reading.over(None if work.cancelled() else work.result())

        def from_thread(work: Work) -> None:
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(done)

        work.add_done_callback(from_thread)
        return True

    def ended(self, outcome: Outcome) -> None:
        """A request is over: did its engine count as many tokens?"""
        key, reading = self._under_way.pop(outcome.request.id, (None, None))
        counted = outcome.prompt_tokens
        if key is None or reading is None or reading.count is None or counted is None:
            return
        if outcome.moved or outcome.paused or outcome.degraded_to is not None:
            return  # what was counted may not be the prompt as it came
        before = self._mistakes.get(key, 0)
        if before >= MISTAKES:
            return
        self._mistakes[key] = before + 1 if counted != reading.count else 0
        if self._mistakes[key] == MISTAKES:
            log.warning(
                "the tokenizer is not the engine's: these prompts go by the guess",
                model=key[0],
                path=key[1],
                worker=outcome.worker,
                counted=reading.count,
                engine_counted=counted,
            )

    def close(self) -> None:
        """What is under way in the threads ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def load(folders: Mapping[str, str]) -> dict[str, Tokenizes]:
    """The tokenizers of models, by their folders. Of one that cannot be used it says so."""
    found: dict[str, Tokenizes] = {}
    for model, folder in folders.items():
        try:
            found[model] = Tokenizer(Path(folder))
        except (OSError, ValueError) as error:
            log.warning("no tokenizer: prompts go by the guess", model=model, because=str(error))
    return found


def _read(
    tokenizer: Tokenizes, path: str, body: bytes, forms: Sequence[BlockForm]
) -> PromptTokens | None:
    """In a thread. None where what the engine will see cannot be known."""
    try:
        text = text_of(path, body, tokenizer.template)
        ids = tokenizer.ids(text.text, text.with_special)
    except Unreadable:
        return None
    except Exception:
        log.exception("a prompt could not be tokenised")
        return None
    return PromptTokens(len(ids), named_blocks(ids[:MOST_TOKENS], forms, text.salt))
