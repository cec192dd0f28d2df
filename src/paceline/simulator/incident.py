"""What happened, as a gateway's log of facts tells it?

Each request's story is taken down, and each trouble of a worker. Then the log is lived through once
more by a kernel of our own, which learns the workers' timing from the recorded steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import inf
from pathlib import Path

import msgspec
from msgspec.structs import replace

from paceline.domain.commands import Command, Degrade, Dispatch, Fail, Move, Pause, Shed
from paceline.domain.errors import ConfigError
from paceline.domain.facts import (
    ClientLeft,
    DispatchFailed,
    FirstTokenSeen,
    RequestArrived,
    StepsSeen,
    StreamBroke,
    StreamEnded,
    StreamStopped,
    WorkerAdded,
    WorkerRemoved,
    WorkerReported,
)
from paceline.domain.request import Request
from paceline.kernel import Kernel
from paceline.kernel.log import Entry, Opening, read
from paceline.kernel.timing import Timing, WorkerTiming, export
from paceline.policy.fleet import Choice, Fleet
from paceline.policy.standing import Ask
from paceline.simulator.scenario import Fault
from paceline.simulator.troubles import Troubles

LEARNED = 200
"""Steps after which a worker's timing is known well enough to be taken from before a trouble."""
EARLIER_S = 2.0
"""So long before a trouble is noticed it may have begun."""
HANGS = " hangs"
"""How the reason ends for which the kernel moves requests off a worker without steps."""


class Story(msgspec.Struct):
    """One request. Times since the first fact."""

    request: Request
    """As it came."""
    at_s: float
    queued_s: float = 0.0
    first_at: float = inf
    over_at: float = inf
    how: str = ""
    """ok, shed, failed, broke, or left by its client; empty: it was under way at the end."""
    worker: str = ""
    itl_s: float = 0.0
    stall_s: float = 0.0
    output_tokens: int = 0
    """As far as is known."""
    prompt_tokens: int | None = None
    degraded: bool = False
    paused: int = 0
    moved: int = 0


class Incident(msgspec.Struct, frozen=True):
    """All that a log tells."""

    opening: Opening
    seconds: float
    """From its first fact to its last."""
    stories: Sequence[Story]
    """By arrival."""
    timing: Timing
    """Of workers as they were before any trouble."""
    faults: Sequence[Fault]
    differing: int
    """Facts after which a kernel of today would have said something else."""


def incident(paths: Sequence[Path]) -> Incident:
    """What these files tell, which are of one gateway's life."""
    opening, entries = _read(paths)
    if not entries:
        raise ConfigError([f"{paths[0]}: there is no fact in it"])
    began_at, seconds = entries[0].now, entries[-1].now - entries[0].now
    witness = _Witness(began_at)
    for entry in entries:
        witness.take_down(entry)
    faults = witness.troubles.faults(seconds)
    first = {fault.worker: began_at + fault.at_s - EARLIER_S for fault in faults[::-1]}
    timing, differing = _learned(opening, entries, first)
    known = {worker.id for worker in timing.workers}
    faults = [fault for fault in faults if fault.worker in known]
    return Incident(opening, seconds, witness.stories, timing, faults, differing)


def _read(paths: Sequence[Path]) -> tuple[Opening, list[Entry]]:
    """The files in order of time, without what is said again at the heads of later ones."""
    told = sorted(map(_read_file, paths), key=lambda part: part[1][0].now if part[1] else inf)
    (opening, entries), *others = told
    for other, more in others:
        if abs(other.unix_at_0 - opening.unix_at_0) > 60.0 or not other.continued:
            raise ConfigError(["the files are of several lives of a gateway: play one at a time"])
        entries = entries + list(_without_head(more))
    return opening, entries


def _read_file(path: Path) -> tuple[Opening, list[Entry]]:
    try:
        with path.open("rb") as lines:
            return read(lines)
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror or error}"]) from None
    except (msgspec.MsgspecError, ValueError) as error:
        raise ConfigError(
            [f"{path}: no log of facts as this Paceline writes it: {error}"]
        ) from None


def _without_head(entries: Sequence[Entry]) -> Iterator[Entry]:
    """What has happened after a file began."""
    heads = (WorkerAdded, WorkerReported, WorkerRemoved)
    in_head = True
    for entry in entries:
        in_head = in_head and entry.now == entries[0].now and isinstance(entry.fact, heads)
        if not in_head:
            yield entry


class _AsRecorded:
    """The policy that has chosen what the log says, for a kernel that lacks what led to it."""

    def __init__(self) -> None:
        self.chosen: dict[str, str] = {}
        """Workers by request, of those that are sent now."""

    def __call__(self, fleet: Fleet, ask: Ask, places: Sequence[int]) -> Choice:
        worker = self.chosen.get(ask.request_id)
        known = worker is not None and worker in fleet.ids
        place = fleet.ids.index(worker) if known and worker is not None else places[0]
        return Choice(place, "as recorded", wait=not known)


def _learned(
    opening: Opening, entries: Sequence[Entry], troubled_at: Mapping[str, float]
) -> tuple[Timing, int]:
    """The workers' timing, as it was before each one's first trouble if it was known by then; and
    after how many facts a kernel of today says something else."""
    policy = _AsRecorded()
    kernel = Kernel(opening, policy if opening.continued else None)
    before: dict[str, WorkerTiming] = {}
    differing = 0
    for entry in entries:
        for worker_id, at in troubled_at.items():
            if worker_id not in before and entry.now >= at:
                before |= {w.id: w for w in export(kernel).workers if w.id == worker_id}
        told = entry.commands
        policy.chosen = {c.request_id: c.worker_id for c in told if isinstance(c, Dispatch)}
        differing += kernel.handle(entry.fact, entry.now) != list(told)
        for command in told:
            if isinstance(command, Shed | Fail):  # then it is over here too
                kernel.handle(ClientLeft(command.request_id), entry.now)
    timing = export(kernel)
    sound = {name: worker for name, worker in before.items() if worker.step.samples >= LEARNED}
    workers = tuple(_lasting(sound.get(worker.id, worker)) for worker in timing.workers)
    return replace(timing, workers=workers), differing


def _lasting(worker: WorkerTiming) -> WorkerTiming:
    """The pace that it had then is its own: it was not in trouble."""
    step = worker.step
    theta = tuple(step.slowdown * seconds for seconds in step.theta)
    return replace(worker, step=replace(step, theta=theta, slowdown=1.0))


class _Witness:
    """Goes through a log once."""

    def __init__(self, began_at: float) -> None:
        self._began_at = began_at
        self._open: dict[str, Story] = {}
        self.stories: list[Story] = []
        self.troubles = Troubles()

    def take_down(self, entry: Entry) -> None:
        """What happened next."""
        now = entry.now - self._began_at
        self._of_request(entry, now)
        self._of_worker(entry, now)

    # Requests.

    def _of_request(self, entry: Entry, now: float) -> None:
        fact = entry.fact
        if isinstance(fact, RequestArrived):
            story = self._open[fact.request.id] = Story(fact.request, now)
            self.stories.append(story)
        else:
            known = self._open.get(getattr(fact, "request_id", ""))
            if known is not None:
                self._goes_on(known, entry, now)
        for command in entry.commands:
            if (found := self._open.get(command.request_id)) is not None:
                self._ordered(found, command, now)

    def _goes_on(self, story: Story, entry: Entry, now: float) -> None:
        match entry.fact:
            case FirstTokenSeen(at=at):
                story.first_at = min(story.first_at, at - self._began_at)
            case StreamEnded() as ended:
                story.output_tokens = ended.output_tokens
                story.prompt_tokens = ended.prompt_tokens
                story.itl_s, story.stall_s = ended.itl_s, ended.stall_s
                story.first_at = min(story.first_at, now)
                self._over(story, "ok", now)
            case StreamStopped(produced=produced):
                story.output_tokens = produced
            case StreamBroke(produced=produced, resumable=resumable):
                story.output_tokens = produced
                story.moved += resumable
                if not resumable:
                    self._over(story, "broke", now)
            case ClientLeft():
                self._over(story, "left", now)

    def _ordered(self, story: Story, command: Command, now: float) -> None:
        match command:
            case Dispatch(worker_id=worker_id):
                story.worker = worker_id
                if story.first_at == inf:
                    story.queued_s = now - story.at_s
            case Shed():
                self._over(story, "shed", now)
            case Fail():
                self._over(story, "failed", now)
            case Degrade():
                story.degraded = True
            case Pause():
                story.paused += 1
            case Move(because=because):
                story.moved += 1
                if because.endswith(HANGS):
                    self.troubles.hangs(story.worker)

    def _over(self, story: Story, how: str, now: float) -> None:
        story.how, story.over_at = how, now
        del self._open[story.request.id]

    # Workers.

    def _of_worker(self, entry: Entry, now: float) -> None:
        troubles = self.troubles
        match entry.fact:
            case WorkerReported(worker_id=worker_id, report=report):
                troubles.reported(worker_id, report.healthy, now)
            case DispatchFailed(worker_id=worker_id, blame=True):
                troubles.blamed(worker_id, now)
            case StreamBroke(worker_id=worker_id, blame=True):
                troubles.blamed(worker_id, now)
            case StepsSeen(worker_id=worker_id, steps=steps):
                for step in steps:
                    troubles.stepped(worker_id, step, now)
