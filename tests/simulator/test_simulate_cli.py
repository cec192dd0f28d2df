from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from paceline import cli
from paceline.kernel.timing import Timing, WorkerTiming, to_json
from paceline.policy.steptime import ROOFLINE, StepModel
from paceline.simulator.cli import plan, policies_named
from paceline.simulator.many import play_all

SCENARIO = """
about: Two small workers with little to do.
seconds: 4
workers: [{profile: tiny, count: 2}]
tiers: {standard: {ttft_s: 5, itl_s: 1}}
requests: [{kind: independent, rate: 5, prompt: [50, 100], output: [5, 10]}]
"""

Said = tuple[int, str, str]
Simulate = Callable[..., Said]


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SCENARIO)
    return path


@pytest.fixture
def simulate(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Simulate:
    """Its exit status, and what it says on stdout and stderr."""

    def run(*args: str) -> Said:
        argv = ["paceline", "simulate", str(scenario), "--workers", "1", *args]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        status = ended.value.code
        assert isinstance(status, int)
        return status, *capsys.readouterr()

    return run


def timing_file(folder: Path) -> Path:
    step = StepModel(theta=(0.01, *[0.0] * (len(ROOFLINE) - 1)), slowdown=1.0, spread=0.1)
    worker = WorkerTiming(id="live-1", model="m", step=step, prefill_budget=2048)
    path = folder / "timing.json"
    path.write_bytes(to_json(Timing(workers=(worker,), models={})))
    return path


def test_people_get_who_is_best_and_how_fast_it_was_played(simulate: Simulate) -> None:
    status, out, err = simulate("--seeds", "2")
    assert status == 0
    assert "headroom" in out
    assert "least-requests" in out
    assert "requests a second" in err


def test_programs_get_json_that_is_the_same_byte_for_byte(simulate: Simulate) -> None:
    args = ("--policy", "random,oracle", "--seeds", "2", "--json")
    status, out, _ = simulate(*args)
    assert status == 0
    (comparison,) = json.loads(out)
    assert list(comparison["policies"]) == ["random", "oracle"]
    assert comparison["seeds"] == [0, 1]
    assert simulate(*args)[1] == out


def test_a_sweep_plays_all_combinations(simulate: Simulate) -> None:
    swept = ("--sweep", "load=1,2", "--sweep", "workers.0.count=1,2,3", "--json")
    _, out, _ = simulate("--policy", "random", "--seeds", "1", *swept)
    comparisons = json.loads(out)
    assert len(comparisons) == 6
    assert comparisons[1]["at"] == {"load": "1", "workers.0.count": "2"}
    assert [len(c["results"][0]["workers"]) for c in comparisons[:3]] == [1, 2, 3]


def test_a_setting_takes_the_place_of_the_files(simulate: Simulate) -> None:
    _, out, _ = simulate("--policy", "random", "--seeds", "1", "--set", "seconds=2", "--json")
    assert json.loads(out)[0]["results"][0]["seconds"] == 2


def test_a_report_with_charts_is_written(simulate: Simulate, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    assert simulate("--seeds", "2", "--html", str(report))[0] == 0
    assert "least-requests" in report.read_text()


def test_learned_timing_brings_the_live_fleet(simulate: Simulate, tmp_path: Path) -> None:
    timing = str(timing_file(tmp_path))
    _, out, _ = simulate("--policy", "random", "--seeds", "1", "--timing", timing, "--json")
    (result,) = json.loads(out)[0]["results"]
    assert [name.startswith("live-1") for name in result["workers"]] == [True]
    assert result["total"]["itl_s"]["p50"] == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--policy", "headrom"], "--policy headrom: unknown; there are headroom, random"),
        (["--set", "seconds"], "--set seconds: give a key"),
        (["--sweep", "load="], "--sweep load=: give a key"),
        (["--set", "second=3"], "--set second=3: second: unknown key"),
        (["--sweep", "load=1,fast"], "--sweep load=fast: load: expected a number"),
        (["--timing", "none.json"], "none.json: No such file"),
        (["--html", "/nowhere/report.html"], "/nowhere/report.html: No such file"),
    ],
)
def test_bad_input_ends_in_one_sentence_and_status_2(
    simulate: Simulate, args: list[str], says: str
) -> None:
    status, _, err = simulate(*args)
    assert status == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_what_does_not_fit_a_live_fleet_is_refused(simulate: Simulate, tmp_path: Path) -> None:
    fault = "faults=[{kind: hang, worker: w1, at_s: 1}]"
    args = ("--timing", str(timing_file(tmp_path)), "--set", fault, "--set", "workers.0.count=3")
    status, _, err = simulate(*args)
    assert status == 2
    assert "workers.0.count: --timing has workers of its own" in err
    assert "no worker is called w1" in err


def test_a_missing_scenario_ends_with_status_2() -> None:
    command = [sys.executable, "-m", "paceline", "simulate", "none.yaml"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "none.yaml" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_all_means_all_policies_and_none_twice() -> None:
    assert {"headroom", "round-robin", "oracle"} < set(policies_named("all"))
    assert policies_named("random, headroom,random") == ("random", "headroom")


def test_policies_and_swept_settings_play_the_same_seeds(scenario: Path) -> None:
    jobs = plan(scenario, policies=("random", "oracle"), seeds=2, sweeps=[("load", "1,2")])
    played = [(job.at["load"], job.policy, job.seed) for job in jobs]
    assert played == sorted(played, key=lambda job: (job[0], job[1] == "oracle", job[2]))
    assert [job.scenario.load for job in jobs] == [1] * 4 + [2] * 4


def test_a_job_plays_the_same_in_another_process(scenario: Path, tmp_path: Path) -> None:
    timing = msgspec.json.decode(timing_file(tmp_path).read_bytes(), type=Timing)
    jobs = plan(scenario, policies=("random",), seeds=2, timing=timing)
    assert play_all(jobs, workers=2) == play_all(jobs, workers=1)
