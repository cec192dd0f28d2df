"""The demonstration keeps its word: figures come out, and nothing stays behind."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from io import StringIO
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from paceline.config import load
from paceline.demo import figures, scenario, stage
from paceline.demo.figures import Chat
from paceline.demo.scenario import Scenario
from paceline.demo.screen import Scene, Screen, WorkerView
from paceline.engines.emulated import load_engines
from paceline.workload.outcome import Outcome
from paceline.workload.report import OVERALL

DEMO = (sys.executable, "-m", "paceline", "demo", "--quick", "--no-model")
EXAMPLES = Path(__file__).parents[1] / "examples"
PLAY = Scenario(seconds=9.0, seed=1)


def test_a_quick_demo_gives_its_figures_as_json_and_says_what_happens_in_plain_lines() -> None:
    done = subprocess.run([*DEMO, "--json"], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["ok"]
    assert list(told["acts"]) == list(scenario.POLICIES)
    for act in told["acts"].values():
        requests = {tier: summary["requests"] for tier, summary in act["report"]["tiers"].items()}
        assert requests[OVERALL] == requests["premium"] + requests["standard"] > 0
        assert len(act["report"]["tiers"][OVERALL]["workers"]) >= scenario.WORKERS - 1
        assert 0 <= act["slow_worker_share"] <= 1
        assert act["report"]["tiers"][OVERALL]["itl_s"]["p99"] > 0
    assert "worker 3 now takes 3 times as long" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_the_demo_no_process_of_it_is_left(number: signal.Signals) -> None:
    with subprocess.Popen(DEMO, stdout=subprocess.PIPE, text=True) as demo:
        try:
            assert demo.stdout is not None
            while "of requests" not in demo.stdout.readline():
                assert demo.poll() is None, "the demo ended before its first act"
            started = children_of(demo.pid)
            assert len(started) == 2, "the engines and a gateway"
        finally:
            demo.send_signal(number)
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in started) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in started)


def test_an_exception_ends_a_process(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        stage.process(tmp_path / "log", "engine", "--emulate", "tiny", "--port", "0") as started,
    ):
        raise ZeroDivisionError
    assert started.returncode == -signal.SIGKILL


def test_a_process_that_does_not_start_is_quoted(tmp_path: Path) -> None:
    log = tmp_path / "engines.log"
    with (
        stage.process(log, "engine") as started,
        pytest.raises(stage.DemoFailed, match="engines did not start") as failed,
    ):
        asyncio.run(stage.ready(started, "http://127.0.0.1:9/health", log))
    assert "exactly one of" in str(failed.value)


def test_free_ports_are_all_different() -> None:
    assert len(set(stage.free_ports(20))) == 20


def test_without_its_package_the_small_model_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(stage, "distribution", missing)
    assert stage.find_small_model() is None


def test_both_policies_meet_the_same_requests_and_another_seed_gives_others() -> None:
    assert PLAY.trace() == PLAY.trace() != Scenario(PLAY.seconds, seed=2).trace()
    assert {arrival.tier for arrival in PLAY.trace()} == set(scenario.PROMISES)


@pytest.mark.parametrize("small", ["", "http://127.0.0.1:9009"])
def test_the_configurations_are_valid(small: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(msgspec.yaml.encode(PLAY.engines([9001, 9002])))
    urls = [f"http://127.0.0.1:{engine.port}" for engine in load_engines(file)]
    config = scenario.gateway("headroom", stage.url(9003), stage.url(9004), urls, small)
    file.write_bytes(msgspec.yaml.encode(config))
    loaded = load(file, {})
    assert {name: tier.promise for name, tier in loaded.tiers.items()} == scenario.PROMISES
    assert len(loaded.workers()) == 2 + bool(small)


def test_the_example_engines_are_those_of_the_example_gateway() -> None:
    gateway = load(EXAMPLES / "paceline.yaml", {"ACME_KEY": "a-secret"})
    served = {worker.url: worker.serves_as or worker.model for worker in gateway.workers()}
    engines = load_engines(EXAMPLES / "engines.yaml")
    assert served == {stage.url(engine.port): engine.model_name for engine in engines}


def outcome(at_s: float, worker: str, itl_s: float, error: str = "") -> Outcome:
    timing = {"ttft_s": 0.1, "itl_s": itl_s, "gaps": {1: 9}}
    return Outcome(0, at_s, 0.0, at_s + 1, "premium", worker=worker, error=error, **timing)  # type: ignore[arg-type]


def test_the_middle_third_is_told_apart() -> None:
    outcomes = [outcome(1, "slow", 0.03), outcome(4, "slow", 0.09), outcome(5, "other", 0.03)]
    act = figures.act_of("round-robin", outcomes, PLAY, "slow", [])
    assert act.slow_worker_share == 0.5
    assert act.while_slow.tiers[OVERALL].attainment == 0.5
    assert act.report.tiers[OVERALL].attainment == pytest.approx(2 / 3)
    assert not act.troubles


def test_a_failure_is_told_and_spoils_the_demo() -> None:
    chats = [Chat("Why?", "Because. And", 0.1, 0.01), Chat("When?", "", None, 0.0, "no answer")]
    act = figures.act_of("headroom", [outcome(4, "slow", 0.0, "it broke")], PLAY, "slow", chats)
    said = "\n".join(figures.sentences(PLAY, [act]))
    assert "it broke" in said
    assert "no answer" in said
    assert "“Why?” “Because”" in said
    assert not json.loads(figures.as_json(PLAY, [act]))["ok"]


def test_a_terminal_gets_a_picture_and_a_file_gets_a_line_every_few_seconds() -> None:
    workers = [WorkerView(streams=i, waiting=0, slowdown=1.0, itl_s=0.025) for i in range(4)]
    shown = {}
    for terminal in (True, False):
        console = Console(file=StringIO(), force_terminal=terminal, width=100)
        with Screen(console) as screen:
            for at_s in (1.0, 2.0, 7.0):
                screen.show(Scene("headroom", PLAY, at_s, slow=True, workers=workers, said="Hm."))
        assert isinstance(console.file, StringIO)
        shown[terminal] = console.file.getvalue()
    assert "three times slower" in shown[True]
    assert shown[False].splitlines() == [
        "   1.0 s: streams 0/1/2/3; promises kept: premium -, standard -",
        "   7.0 s: streams 0/1/2/3; promises kept: premium -, standard -",
    ]


def children_of(pid: int) -> list[int]:
    return [child for child in pids() if state_and_parent(child)[1] == pid]


def alive(pid: int) -> bool:
    return state_and_parent(pid)[0] not in "ZX"


def pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def state_and_parent(pid: int) -> tuple[str, int]:
    """From /proc/PID/stat, which see proc(5); a process that is gone counts as dead (X)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "X", 0
    state, parent = stat.rpartition(")")[2].split()[:2]
    return state, int(parent)
