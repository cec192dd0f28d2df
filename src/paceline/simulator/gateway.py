"""What does a gateway replica see and do? The kernel on virtual time, in place of the live host."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from math import inf

from paceline.domain.commands import (
    Command,
    Degrade,
    Dispatch,
    Fail,
    Hold,
    Move,
    Pause,
    Prefill,
    Shed,
)
from paceline.domain.facts import (
    ClientLeft,
    DispatchFailed,
    Fact,
    FirstTokenSeen,
    PeerReported,
    Prefilled,
    RequestArrived,
    Step,
    StepsSeen,
    StreamBroke,
    StreamEnded,
    StreamStopped,
    TimerFired,
    WorkerReported,
)
from paceline.kernel import Kernel
from paceline.simulator.clock import Clock
from paceline.simulator.flight import Flight
from paceline.simulator.handing import HandOvers
from paceline.simulator.lateness import Lateness
from paceline.simulator.replica import Replica

CONNECT_TIMEOUT_S = 5.0
"""How long it takes to learn that a worker cannot be reached."""

Ended = Callable[[Flight, str], None]
"""Takes a request that is over, and how: ok, shed, failed, broke or unfinished."""
Log = Callable[[float, Fact, list[Command]], None]


class _Cut:
    """A worker out of reach."""

    __slots__ = ("began_at", "said", "until")

    def __init__(self, began_at: float) -> None:
        self.began_at = self.until = began_at
        self.said: list[tuple[Flight, Callable[[Flight], None]]] = []
        """What it has said meanwhile of which request, to be heard later."""


class Gateway:
    """One gateway: tells its kernel what happens and carries out what it wants."""

    def __init__(
        self,
        index: int,
        kernel: Kernel,
        clock: Clock,
        latency_s: float,
        flights: dict[str, Flight],
        ended: Ended,
        handovers: HandOvers,
        log: Log | None = None,
        lateness: Lateness | None = None,
    ) -> None:
        self.index = index
        self.kernel = kernel
        self.replicas: dict[str, Replica] = {}
        self.flights = flights
        """All that is under way, of this gateway and of others."""
        self._there: dict[str, dict[str, Flight]] = defaultdict(dict)
        """What has come to each worker from here and is not over, as far as is known here."""
        self._cuts: dict[str, _Cut] = {}
        self._clock = clock
        self._latency_s = latency_s
        self._over = ended
        self._handovers = handovers
        self._log = log
        self._lateness = lateness
        self._timer_due = inf

    # What the clients do.

    def arrive(self, flight: Flight) -> None:
        """A request comes in."""
        self.flights[flight.id] = flight
        self.look()
        self.tell(RequestArrived(flight.request))

    def give_up(self, flight: Flight) -> None:
        """The run is over, and this request is not."""
        self._finish(flight, "unfinished")

    # What the workers do.

    def first_token(self, flight: Flight) -> None:
        """A stream begins."""
        self._notice(flight, self._began)

    def prefilled(self, flight: Flight) -> None:
        """A prompt is computed, for another worker to answer."""
        self._notice(flight, self._prepared)

    def ended(self, flight: Flight) -> None:
        """An answer is complete."""
        if flight.worker not in self._cuts:
            flight.came = flight.output_tokens
            flight.came_at = flight.done_at
        self._notice(flight, self._completed)

    def count(self, flight: Flight) -> None:
        """Take down which tokens have come so far: what was not heard is not among them."""
        if flight.begun and flight.worker not in self._cuts:
            assert flight.replica is not None
            flight.replica.count(flight)

    def crashed(self, replica: Replica) -> None:
        """A worker crashes: its requests are lost, and so is what was not heard of them."""
        lost = list(self._there[replica.worker.id].values())
        cut = self._cuts.get(replica.worker.id)
        if cut is not None:
            cut.said = [(flight, self._disconnected) for flight in lost]
            return
        for flight in lost:
            if self._is_at(replica, flight):
                self._disconnected(flight)

    def steps(self, replica: Replica, step: Step) -> None:
        """Steps of a worker end that give this gateway's streams a token."""
        if self._lateness is None:
            self._see(replica, step)
            return
        for one in self._lateness.steps(replica.worker.id, step):
            if one.ended_at <= self._clock.now:
                self._see(replica, one)
            else:
                self._clock.at(one.ended_at, partial(self._see, replica), one)

    def probe(self, replica: Replica) -> None:
        """Ask a worker how it is."""
        self.look()
        healthy = replica.up and replica.worker.id not in self._cuts
        self.tell(WorkerReported(replica.worker.id, replica.report(healthy)))

    def hear(self, news: PeerReported) -> None:
        """Another gateway tells what it has in flight."""
        self.tell(news)

    def sweep(self, replica: Replica, first_token_s: float, stall_s: float) -> None:
        """Give up on requests of which nothing has come for too long."""
        now, cut = self._clock.now, self._cuts.get(replica.worker.id)
        heard_until = cut.began_at if cut is not None else inf
        stepped_at = replica.stepped_at
        for flight in list(self._there[replica.worker.id].values()):
            if not self._is_at(replica, flight):
                continue
            if not flight.begun:
                late = now - flight.sent_at > first_token_s
            else:
                token_at = stepped_at if flight.joined else flight.done_at
                late = now - min(token_at, heard_until) > stall_s
            if late:
                self._take_off(flight)
                self._lost(flight, "no token in time", timed_out=True)

    def cut_off(self, replica: Replica, until: float) -> None:
        """The worker is out of reach: until then nothing is heard of it, and then all at once."""
        for flight in self._there[replica.worker.id].values():
            self.count(flight)
        cut = self._cuts.setdefault(replica.worker.id, _Cut(self._clock.now))
        cut.until = max(cut.until, until)
        self._clock.at(until, self._reach, replica)

    def _reach(self, replica: Replica) -> None:
        name, now = replica.worker.id, self._clock.now
        cut = self._cuts.get(name)
        if cut is None or now < cut.until:
            return
        del self._cuts[name]
        there = self._there[name]
        for flight in there.values():
            if flight.begun:
                flight.stall_s = max(flight.stall_s, now - cut.began_at)
        for flight, happens in cut.said:
            if self._is_at(replica, flight):
                happens(flight)

    def _is_at(self, replica: Replica, flight: Flight) -> bool:
        """Has it come to this worker, and not been lost there since?"""
        return flight.id in self._there[replica.worker.id]

    def _see(self, replica: Replica, step: Step) -> None:
        if replica.up and replica.worker.id not in self._cuts:
            self.tell(StepsSeen(replica.worker.id, (step,)))

    def _notice(self, flight: Flight, happens: Callable[[Flight], None]) -> None:
        """Something happens to a request: it is heard of now, or a bit later if one is busy."""
        if self._lateness is None:
            self._hear(flight, happens)
            return
        leg = flight.leg

        def noticed(_: object) -> None:
            if flight.leg == leg and flight.id in self._there[flight.worker]:  # not lost since
                self._hear(flight, happens)

        noticed_at, _ = self._lateness.noticed_at(flight.worker, self._clock.now)
        self._clock.at(noticed_at, noticed)

    def _hear(self, flight: Flight, happens: Callable[[Flight], None]) -> None:
        """Something is heard of a request, now or once its worker is in reach again."""
        cut = self._cuts.get(flight.worker)
        if cut is None:
            happens(flight)
        else:
            cut.said.append((flight, happens))

    def _began(self, flight: Flight) -> None:
        now = self._clock.now
        flight.begun = True
        if flight.had:
            flight.stall_s = max(flight.stall_s, now - flight.came_at)
        else:
            flight.first_at = now
            flight.stall_s = 0.0  # what has come behind a partition comes at once
        self.tell(FirstTokenSeen(flight.id, now))

    def _prepared(self, flight: Flight) -> None:
        worker_id = flight.worker
        self._there[worker_id].pop(flight.id, None)
        flight.come_back()
        tokens = flight.prompt_tokens
        self.tell(Prefilled(flight.id, worker_id, self._clock.now, tokens, flight.cached_tokens))

    def _completed(self, flight: Flight) -> None:
        flight.done_at = self._clock.now
        arrival = flight.arrival
        self.tell(
            StreamEnded(
                flight.id,
                arrival.output_tokens,
                flight.itl_s,
                flight.stall_s,
                arrival.prompt_tokens,
                flight.cached_tokens,
            )
        )
        self._finish(flight, "ok")

    def _disconnected(self, flight: Flight) -> None:
        self._lost(flight, "connection lost")

    def _lost(self, flight: Flight, because: str, timed_out: bool = False) -> None:
        """A request is not answered, or no further, by the worker that it was sent to."""
        if flight.begun and flight.came == flight.output_tokens:
            self._completed(flight)  # only its end had not been noticed yet
            return
        self._handovers.drop(flight)
        worker_id, begun, resumable = flight.worker, flight.begun, flight.request.resumable
        self._there[worker_id].pop(flight.id, None)
        flight.come_back()
        flight.moved += begun and resumable
        if not begun or resumable:
            self.look()
        if not begun:
            self.tell(DispatchFailed(flight.id, worker_id, because, timed_out))
            return
        self.tell(StreamBroke(flight.id, worker_id, because, flight.had, resumable))
        if not resumable:
            self._finish(flight, "broke")

    def _stop(self, flight: Flight, command: Pause | Move, leg: int) -> None:
        """Take a request off its worker, unless it is over or cannot go on later."""
        if flight.replica is None or flight.leg != leg:
            return
        if flight.begun and (not flight.request.resumable or flight.came == flight.output_tokens):
            return
        worker_id = flight.worker
        self._take_off(flight)
        flight.come_back()
        if isinstance(command, Pause):
            flight.paused += 1
        else:
            flight.moved += 1
        self.tell(StreamStopped(flight.id, worker_id, flight.had))

    def _take_off(self, flight: Flight) -> None:
        """The worker need not go on with a request."""
        assert flight.replica is not None
        self.count(flight)
        self._handovers.drop(flight)
        flight.replica.abort(flight)
        self._there[flight.worker].pop(flight.id, None)

    # How facts and commands go to and fro.

    def look(self) -> None:
        """Before a decision: take in what the workers have shown so far."""
        for replica in self.replicas.values():
            if replica.streams[self.index]:
                replica.progress()

    def tell(self, fact: Fact) -> None:
        """Hand a fact to the kernel and do what it wants."""
        now = self._clock.now
        commands = self.kernel.handle(fact, now)
        if self._log is not None:
            self._log(now, fact, commands)
        for command in commands:
            self._run(command, now)
        self._wind()

    def _run(self, command: Command, now: float) -> None:
        flight = self.flights[command.request_id]
        match command:
            case Dispatch() | Prefill():
                replica = self.replicas[command.worker_id]
                handing = isinstance(command, Prefill)
                source = "" if isinstance(command, Prefill) else command.prefilled_at
                flight.set_out(replica, now, handing, self.replicas[source] if source else None)
                if command.worker_id in self._cuts:
                    unreached = partial(self._unreached, flight)
                    self._clock.at(now + CONNECT_TIMEOUT_S, unreached, flight.leg)
                else:  # both ways at once: what comes back is not delayed again
                    replica.expect(flight, 2.0 * self._latency_s)
            case Pause() | Move():  # now, but not amid what has led to it
                self._clock.at(now, partial(self._stop, flight, command), flight.leg)
            case Degrade():
                assert flight.request.instead is not None
                flight.request = flight.request.instead
                flight.degraded = True
            case Hold():
                pass
            case Shed():
                self._finish(flight, "broke" if flight.had else "shed")
            case Fail():
                self._finish(flight, "broke" if flight.had else "failed")

    def deliver(self, flight: Flight, leg: int) -> None:
        """A request reaches its worker, unless it was called back."""
        replica = flight.replica
        if replica is None or flight.leg != leg:
            return
        replica.coming.pop(flight.id, None)
        if not replica.up:
            self._lost(flight, "connection refused")
            return
        if flight.source is None:
            self._admit(flight)
            return
        self._there[replica.worker.id][flight.id] = flight
        self._handovers.fetch(flight, flight.source, self._admit)

    def _admit(self, flight: Flight, received: bool = False) -> None:
        """Its worker takes a request in, with its prompt's cache if that has come."""
        replica = flight.replica
        assert replica is not None
        try:
            replica.send(flight, received)
        except ValueError:  # it could never be served: the engine's 400 goes to the client
            self.tell(ClientLeft(flight.id))
            self._finish(flight, "broke" if flight.had else "failed")
            return
        self._there[replica.worker.id][flight.id] = flight

    def _unreached(self, flight: Flight, leg: int) -> None:
        if flight.replica is not None and flight.leg == leg:
            self._lost(flight, "connect timeout", timed_out=True)

    def _wind(self) -> None:
        due = self.kernel.next_deadline()
        if due < self._timer_due:
            self._timer_due = due
            self._clock.at(due, self._ring)

    def _ring(self, _: object) -> None:
        if self._clock.now != self._timer_due:
            return  # an earlier one was wanted since
        self._timer_due = inf
        self.look()
        self.tell(TimerFired())
        self._wind()

    def _finish(self, flight: Flight, how: str) -> None:
        del self.flights[flight.id]
        self._there[flight.worker].pop(flight.id, None)
        flight.replica = None
        self._over(flight, how)
