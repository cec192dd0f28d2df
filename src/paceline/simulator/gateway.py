"""What does a gateway replica see and do? The kernel on virtual time, in place of the live host."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from math import inf
from random import Random

from paceline.domain.commands import Command, Dispatch, Fail, Hold, Shed
from paceline.domain.facts import (
    ClientLeft,
    DispatchFailed,
    Fact,
    FirstTokenSeen,
    PeerReported,
    RequestArrived,
    Step,
    StepsSeen,
    StreamBroke,
    StreamEnded,
    TimerFired,
    WorkerReported,
)
from paceline.domain.request import Request
from paceline.kernel import Kernel
from paceline.simulator.clock import Clock
from paceline.simulator.flight import BYTES_PER_TOKEN, NAME_TOKENS, Flight
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
        rng: Random,
        latency_s: float,
        flights: dict[str, Flight],
        ended: Ended,
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
        self._rng = rng
        self._latency_s = latency_s
        self._over = ended
        self._log = log
        self._lateness = lateness
        self._timer_due = inf

    # What the clients do.

    def arrive(self, flight: Flight, request: Request) -> None:
        """A request comes in."""
        self.flights[flight.id] = flight
        self.look()
        self.tell(RequestArrived(request))

    def request(self, flight: Flight, tier: str, weight: float) -> Request:
        """What the kernel is told of a request: bytes for tokens, as a live gateway knows it."""
        arrival = flight.arrival
        bytes_each = BYTES_PER_TOKEN * (0.9 + 0.2 * self._rng.random())
        return Request(
            id=flight.id,
            model=arrival.model,
            tenant=arrival.tenant,
            tier=tier,
            promise=flight.promise,
            weight=weight,
            prompt_bytes=round(arrival.prompt_tokens * bytes_each),
            max_tokens=arrival.max_tokens,
            blocks=flight.names,
            seed=self._rng.getrandbits(32),
            block_bytes=round(NAME_TOKENS * bytes_each),
        )

    def give_up(self, flight: Flight) -> None:
        """The run is over, and this request is not."""
        self._finish(flight, "unfinished")

    # What the workers do.

    def first_token(self, flight: Flight) -> None:
        """A stream begins."""
        self._notice(flight, self._began)

    def ended(self, flight: Flight) -> None:
        """An answer is complete."""
        self._notice(flight, self._completed)

    def crashed(self, replica: Replica) -> None:
        """A worker crashes: its requests are lost, and so is what was not heard of them."""
        lost = list(self._there[replica.worker.id].values())
        cut = self._cuts.get(replica.worker.id)
        if cut is not None:
            cut.said = [(flight, self._disconnected) for flight in lost]
            return
        for flight in lost:
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
            if flight.first_at == inf:
                late = now - flight.sent_at > first_token_s
            else:
                token_at = stepped_at if flight.joined else flight.done_at
                late = now - min(token_at, heard_until) > stall_s
            if late:
                replica.abort(flight)
                self._lost(flight, "no token in time", timed_out=True)

    def cut_off(self, replica: Replica, until: float) -> None:
        """The worker is out of reach: until then nothing is heard of it, and then all at once."""
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
            if flight.first_at < inf:
                flight.stall_s = max(flight.stall_s, now - cut.began_at)
        for flight, happens in cut.said:
            if flight.id in there:
                happens(flight)

    def _see(self, replica: Replica, step: Step) -> None:
        if replica.up and replica.worker.id not in self._cuts:
            self.tell(StepsSeen(replica.worker.id, (step,)))

    def _notice(self, flight: Flight, happens: Callable[[Flight], None]) -> None:
        """Something happens to a request: it is heard of now, or a bit later if one is busy."""
        if self._lateness is None:
            self._hear(flight, happens)
            return
        assert flight.replica is not None
        worker_id, attempt = flight.replica.worker.id, flight.attempt

        def noticed(_: object) -> None:
            if flight.attempt == attempt and flight.id in self._there[worker_id]:  # not lost since
                self._hear(flight, happens)

        noticed_at, _ = self._lateness.noticed_at(worker_id, self._clock.now)
        self._clock.at(noticed_at, noticed)

    def _hear(self, flight: Flight, happens: Callable[[Flight], None]) -> None:
        """Something is heard of a request, now or once its worker is in reach again."""
        assert flight.replica is not None
        cut = self._cuts.get(flight.replica.worker.id)
        if cut is None:
            happens(flight)
        else:
            cut.said.append((flight, happens))

    def _began(self, flight: Flight) -> None:
        flight.first_at = self._clock.now
        flight.stall_s = 0.0  # what has come behind a partition comes at once
        self.tell(FirstTokenSeen(flight.id, flight.first_at))

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
        """A request is not answered by the worker that it was sent to."""
        assert flight.replica is not None
        worker_id = flight.replica.worker.id
        self._there[worker_id].pop(flight.id, None)
        if flight.first_at < inf:
            self.tell(StreamBroke(flight.id, worker_id, because))
            self._finish(flight, "broke")
        else:
            self.look()
            self.tell(DispatchFailed(flight.id, worker_id, because, timed_out))

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

    def _run(self, command: Command, now: float) -> None:
        flight = self.flights[command.request_id]
        match command:
            case Dispatch():
                flight.sent_at = now
                flight.attempt = command.attempt
                flight.replica = self.replicas[command.worker_id]
                if command.worker_id in self._cuts:
                    self._clock.at(now + CONNECT_TIMEOUT_S, self._unreached, flight)
                else:  # both ways at once: what comes back is not delayed again
                    flight.replica.expect(flight, 2.0 * self._latency_s)
            case Hold():
                self._wind()
            case Shed():
                self._finish(flight, "shed")
            case Fail():
                self._finish(flight, "failed")

    def deliver(self, flight: Flight) -> None:
        """A request reaches its worker."""
        replica = flight.replica
        assert replica is not None
        replica.coming.pop(flight.id, None)
        if not replica.up:
            self._lost(flight, "connection refused")
            return
        try:
            replica.send(flight)
        except ValueError:  # it could never be served: the engine's 400 goes to the client
            self.tell(ClientLeft(flight.id))
            self._finish(flight, "failed")
            return
        self._there[replica.worker.id][flight.id] = flight

    def _unreached(self, flight: Flight) -> None:
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
        if flight.replica is not None:
            self._there[flight.replica.worker.id].pop(flight.id, None)
        self._over(flight, how)
