from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from paceline.simulator.many import Job, RunFailed, play_all
from paceline.simulator.measure import Recorder
from paceline.simulator.result import Result
from paceline.simulator.scenario import Requests, Scenario, SimTier, Workers

SCENARIO = Scenario(
    name="small",
    about="A stand-in.",
    seconds=1.0,
    workers=(Workers(profile="tiny"),),
    tiers={"standard": SimTier()},
    requests=(Requests(rate=1.0),),
)


def jobs(seeds: int) -> list[Job]:
    return [Job(SCENARIO, "headroom", seed) for seed in range(seeds)]


def empty(job: Job) -> Result:
    return Recorder(job.scenario).result(job.scenario.name, job.policy, job.seed)


def first_waits_for_last(folder: Path, last: int, job: Job) -> Result:
    if job.seed == last:
        (folder / "done").touch()
    while job.seed == 0 and not (folder / "done").exists():
        time.sleep(0.01)
    return empty(job)


class TwoArguments(Exception):
    """Exceptions like this one cannot be sent between processes."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one}, {two}")


def second_fails(job: Job) -> Result:
    if job.seed == 1:
        raise TwoArguments("no room", "no time")
    return empty(job)


def second_is_killed(job: Job) -> Result:
    if job.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return empty(job)


@pytest.mark.parametrize("workers", [1, 2])
def test_each_job_has_its_result_in_its_place(workers: int) -> None:
    seen: list[int] = []

    def on_done(job: Job, result: Result, core_s: float) -> None:
        assert (job.seed, core_s >= 0) == (result.seed, True)
        seen.append(job.seed)

    results = play_all(jobs(3), workers, on_done, play=empty)
    assert [result.seed for result in results] == [0, 1, 2]
    assert sorted(seen) == [0, 1, 2]


def test_results_are_in_order_whichever_ends_first(tmp_path: Path) -> None:
    ended: list[int] = []
    results = play_all(
        jobs(3),
        2,
        lambda job, result, core_s: ended.append(job.seed),
        play=partial(first_waits_for_last, tmp_path, 2),
    )
    assert ended[-1] == 0
    assert [result.seed for result in results] == [0, 1, 2]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_run_is_named_with_its_scenario_policy_and_seed(workers: int) -> None:
    named = "small, headroom, seed 1: TwoArguments: no room, no time"
    with pytest.raises(RunFailed, match=named):
        play_all(jobs(3), workers, play=second_fails)


def test_a_killed_process_is_no_endless_wait() -> None:
    with pytest.raises(RunFailed, match="or one after it: its process was killed"):
        play_all(jobs(3), 2, play=second_is_killed)


def test_a_title_names_the_swept_settings() -> None:
    job = Job(SCENARIO, "headroom", 3, at={"load": "1.2"})
    assert job.title == "small, load=1.2, headroom, seed 3"


def test_no_jobs_have_no_results() -> None:
    assert play_all([], 4) == []


STUCK = """
import sys
sys.path.insert(0, {tests!r})
from test_many import jobs
from paceline.simulator.many import play_all
import stuck

if __name__ == "__main__":
    play_all(jobs(2), 2, play=stuck.forever)
"""
FOREVER = """
import os, pathlib, time

def forever(job):
    (pathlib.Path(__file__).parent / f"{job.seed}.pid").write_text(str(os.getpid()))
    time.sleep(600)
"""


def test_an_interrupt_ends_all_processes_at_once(tmp_path: Path) -> None:
    main = tmp_path / "main.py"
    main.write_text(STUCK.format(tests=str(Path(__file__).parent)))
    (tmp_path / "stuck.py").write_text(FOREVER)
    process = subprocess.Popen(
        [sys.executable, str(main)], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    pids = [tmp_path / f"{seed}.pid" for seed in range(2)]
    while process.poll() is None and not all(p.exists() and p.read_text() for p in pids):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == -signal.SIGINT
    assert said.count("Traceback") == 1  # Of the main process alone.
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)
