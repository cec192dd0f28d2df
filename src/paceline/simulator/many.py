"""How are many runs played at once, on all cores?"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from time import process_time

import msgspec

from paceline.simulator.result import Result
from paceline.simulator.scenario import Scenario
from paceline.simulator.simulation import Profiles, by_name, play


class Job(msgspec.Struct, frozen=True):
    """One run that is to be played."""

    scenario: Scenario
    policy: str
    seed: int
    profiles: Profiles = by_name
    at: Mapping[str, str] = {}
    """The swept settings that the scenario was loaded with."""

    @property
    def title(self) -> str:
        settings = (f"{key}={value}" for key, value in self.at.items())
        return ", ".join((self.scenario.name, *settings, self.policy, f"seed {self.seed}"))


class RunFailed(Exception):
    """A run came to no result. The message says which, and why."""


OnDone = Callable[[Job, Result, float], None]
"""Told of each run as it ends, with the seconds that it took of one core."""
Play = Callable[[Job], Result]


def play_job(job: Job) -> Result:
    """What a job means."""
    return play(job.scenario, job.policy, job.seed, job.profiles)


def play_all(
    jobs: Sequence[Job],
    workers: int,
    on_done: OnDone = lambda job, result, core_s: None,
    play: Play = play_job,
) -> list[Result]:
    """The results in the order of the jobs, whichever ends first, from so many processes.

    The first run that fails stops all, with `RunFailed`. One worker is this process itself.
    """
    results: dict[int, Result] = {}
    if min(workers, len(jobs)) <= 1:
        for index, job in enumerate(jobs):
            results[index], core_s = _timed(play, job)
            on_done(job, results[index], core_s)
        return list(results.values())
    with _processes(min(workers, len(jobs))) as pool:
        with _interrupts_ignored():  # Started by a submit, a process inherits this.
            indices = {pool.submit(_timed, play, job): i for i, job in enumerate(jobs)}
        for future in as_completed(indices):
            index = indices[future]
            try:
                results[index], core_s = future.result()
            except BrokenProcessPool:
                left = min(set(indices.values()) - set(results))
                raise RunFailed(
                    f"{jobs[left].title}, or one after it: its process was killed, "
                    "perhaps for want of memory"
                ) from None
            on_done(jobs[index], results[index], core_s)
    return [results[index] for index in range(len(jobs))]


def _timed(play: Play, job: Job) -> tuple[Result, float]:
    began = process_time()
    try:
        result = play(job)
    except Exception as error:
        # Not all exceptions survive the way between processes; this one does.
        raise RunFailed(f"{job.title}: {type(error).__name__}: {error}") from error
    return result, process_time() - began


@contextmanager
def _processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh interpreters, on all systems alike. What they do is dropped if anything goes wrong."""
    others = set(active_children())
    pool = ProcessPoolExecutor(count, get_context("spawn"))
    try:
        yield pool
    except BaseException:
        for process in set(active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ctrl-C goes to all processes of a terminal, and this one ends the others."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
