"""Is a recorded incident played again as it was?"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from paceline import cli
from paceline.domain.commands import Command
from paceline.domain.errors import ConfigError
from paceline.domain.facts import Fact, Step
from paceline.kernel.log import known_workers, line, opening
from paceline.simulator.compare import compare
from paceline.simulator.from_log import in_words, recorded, write_scenario
from paceline.simulator.incident import Incident, incident
from paceline.simulator.learned import profiles_of
from paceline.simulator.load import load_scenario
from paceline.simulator.result import Result
from paceline.simulator.scenario import Fault, Requests, Scenario, SimTier, Workers
from paceline.simulator.simulation import Simulation, play
from paceline.simulator.troubles import Troubles

SECONDS = 40.0
SLOW = Fault(kind="slow", worker="w1", at_s=12.0, for_s=8.0, factor=3.0)
CRASH = Fault(kind="crash", worker="w2", at_s=27.0, for_s=5.0)
SCENARIO = Scenario(
    name="trouble",
    about="A slow worker, then a dead one.",
    seconds=SECONDS,
    drain_s=40.0,
    workers=(Workers(profile="h100-llama-8b", count=3),),
    tiers={
        "premium": SimTier(ttft_s=0.3, itl_s=0.02, weight=8.0),
        "standard": SimTier(ttft_s=2.0, itl_s=0.05, overload="shed"),
    },
    requests=(
        Requests(kind="chat", rate=16.0, tier="premium", tenant="acme"),
        Requests(kind="documents", rate=3.0, tier="standard", prompt=(3000, 9000)),
    ),
    faults=(SLOW, CRASH),
)
NEAR = 0.03
"""Of attainment: so near the incident played again comes to what happened."""


class Log:
    """What a gateway in the simulator would have written, in one file or several."""

    def __init__(self, folder: Path, rotate_after: int = 10**9) -> None:
        self.folder = folder
        self._rotate_after = rotate_after
        self._lines: list[bytes] = []
        self.files: list[Path] = []

    def record(self, scenario: Scenario, policy: str = "headroom", seed: int = 1) -> Result:
        simulation = Simulation(scenario, policy, seed, log=self._note)
        (self._gateway,) = simulation.gateways
        self._lines = [opening(self._gateway.kernel.settings)]
        result = simulation.run()
        self._put_away()
        return result

    def _note(self, now: float, fact: Fact, commands: list[Command]) -> None:
        self._lines.append(line(now, fact, commands))
        if len(self._lines) > self._rotate_after:
            self._put_away()
            kernel = self._gateway.kernel
            self._lines = [opening(kernel.settings, continued=True), *known_workers(kernel, now)]

    def _put_away(self) -> None:
        file = self.folder / f"facts.log.{len(self.files)}"
        file.write_bytes(b"".join(self._lines))
        self.files.append(file)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    log = Log(tmp_path_factory.mktemp("whole"))
    log.record(SCENARIO)
    return log


@pytest.fixture(scope="module")
def told(log: Log) -> Incident:
    return incident(log.files)


def played(told: Incident, folder: Path, policy: str, seed: int = 0) -> tuple[Result, Result]:
    """What happened, and what would have under a policy."""
    scenario = load_scenario(write_scenario(told, folder, "again"))
    fleet = tuple(replace(workers, profile=workers.name, count=1) for workers in scenario.workers)
    scenario = replace(scenario, workers=fleet)
    result = play(scenario, policy, seed, profiles_of(told.timing))
    return recorded(told, scenario, seed), result


def test_a_kernel_of_today_decides_as_the_one_that_was_recorded(told: Incident) -> None:
    assert told.differing == 0
    assert not told.opening.continued


def test_what_happened_is_told_as_the_simulation_saw_it(tmp_path: Path, told: Incident) -> None:
    truth = play(SCENARIO, "headroom", 1)
    happened, _ = played(told, tmp_path, "headroom")
    assert happened.total.requests == truth.total.requests
    assert happened.attainment == pytest.approx(truth.attainment, abs=0.005)
    assert happened.total.ttft_s.p50 == pytest.approx(truth.total.ttft_s.p50, rel=0.05)
    assert happened.total.itl_s.p50 == pytest.approx(truth.total.itl_s.p50, rel=0.05)
    assert happened.tiers.keys() == truth.tiers.keys()


def test_an_incident_played_again_comes_near_to_what_happened(
    tmp_path: Path, told: Incident
) -> None:
    happened, again = played(told, tmp_path, "headroom")
    assert again.attainment == pytest.approx(happened.attainment, abs=NEAR)
    assert again.total.itl_s.p50 == pytest.approx(happened.total.itl_s.p50, rel=0.1)
    assert again.total.ttft_s.p50 == pytest.approx(happened.total.ttft_s.p50, rel=0.25)


def test_another_policy_is_compared_with_what_happened(tmp_path: Path, told: Incident) -> None:
    happened, other = played(told, tmp_path, "round-robin")
    comparison = compare([happened, other])
    assert list(comparison.policies) == ["recorded", "round-robin"]
    assert other.attainment < happened.attainment


def test_troubles_of_workers_are_seen(told: Incident) -> None:
    slow, crash = (next(f for f in told.faults if f.kind == kind) for kind in ("slow", "crash"))
    assert len(told.faults) == 2
    assert slow.worker == "w1"
    assert slow.at_s == pytest.approx(SLOW.at_s, abs=2.0)
    assert slow.for_s == pytest.approx(SLOW.for_s, abs=2.0)
    assert slow.factor == pytest.approx(SLOW.factor, rel=0.2)
    assert crash.worker == "w2"
    assert crash.at_s == pytest.approx(CRASH.at_s, abs=0.5)
    assert crash.for_s == pytest.approx(CRASH.for_s, abs=2.5)
    words = "\n".join(in_words(told))
    assert "w1: slow" in words
    assert "w2: crash" in words


def test_a_calm_fleet_under_long_prompts_has_no_troubles(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.record(replace(SCENARIO, faults=(), seconds=30.0))
    assert incident(log.files).faults == []


def test_files_of_one_life_are_one_log(tmp_path: Path, told: Incident) -> None:
    log = Log(tmp_path, rotate_after=2000)
    log.record(SCENARIO)
    assert len(log.files) > 3
    again = incident(log.files[::-1])
    assert again.differing == 0
    assert len(again.stories) == len(told.stories)
    assert again.timing == told.timing


def test_a_file_that_begins_within_a_life_can_be_played_too(tmp_path: Path) -> None:
    log = Log(tmp_path, rotate_after=2500)
    log.record(replace(SCENARIO, faults=()))
    told = incident(log.files[1:2])
    assert told.opening.continued
    assert any("begins within the gateway's life" in words for words in in_words(told))
    happened, again = played(told, tmp_path, "headroom")
    assert happened.total.requests > 100
    assert again.total.itl_s.p50 == pytest.approx(happened.total.itl_s.p50, rel=0.15)


def test_what_is_shared_and_asked_for_comes_again(tmp_path: Path, told: Incident) -> None:
    write_scenario(told, tmp_path, "again")
    trace = [json.loads(text) for text in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert {line["tenant"] for line in trace} == {"acme", "anonymous"}
    chats = [tuple(line["hash_ids"]) for line in trace if line["tier"] == "premium"]
    assert len({names[0] for names in chats if names}) < len(chats) / 2
    scenario = load_scenario(tmp_path / "scenario.yaml")
    assert scenario.tiers == SCENARIO.tiers


def test_files_of_several_lives_are_refused(tmp_path: Path, log: Log) -> None:
    other = Log(tmp_path)
    other.record(replace(SCENARIO, seconds=2.0, faults=()))
    with pytest.raises(ConfigError, match="several lives"):
        incident([*log.files, *other.files])


@pytest.mark.parametrize("text", ["", "no json\n", '{"policy": "headroom"}\n', "[1, 2]\n"])
def test_what_is_no_log_is_refused_in_a_sentence(tmp_path: Path, text: str) -> None:
    file = tmp_path / "facts.log"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"facts\.log"):
        incident([file])
    with pytest.raises(ConfigError, match="No such file"):
        incident([tmp_path / "none"])


def test_prefill_alone_makes_no_worker_slow() -> None:
    troubles, now = Troubles(), 0.0
    for number in range(4000):
        busy = 1000 < number < 2000 and number % 3
        seconds = 0.06 if busy else 0.01
        now += seconds
        troubles.stepped("w", Step(now, seconds, 8, 8), now)
    assert troubles.faults(now) == []


# The command.

Simulate = Callable[..., tuple[int, str, str]]


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Simulate:
    """Its exit status, and what it says on stdout and stderr."""

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["paceline", "simulate", "--workers", "1", *args])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        status = ended.value.code
        assert isinstance(status, int)
        return status, *capsys.readouterr()

    return run


def test_the_command_compares_policies_with_what_happened(
    tmp_path: Path, log: Log, simulate: Simulate
) -> None:
    options = ("--policy", "round-robin", "--seeds", "2", "--json", "--keep", str(tmp_path))
    status, out, err = simulate("--from-log", str(log.files[0]), *options)
    assert status == 0
    assert "w1: slow" in err
    (comparison,) = json.loads(out)
    assert list(comparison["policies"]) == ["recorded", "round-robin"]
    assert comparison["seeds"] == [0, 1]
    kept = (str(tmp_path / "scenario.yaml"), "--timing", str(tmp_path / "timing.json"))
    status, out, _ = simulate(*kept, "--policy", "round-robin", "--seeds", "2", "--json")
    assert status == 0
    (again,) = json.loads(out)
    assert again["policies"]["round-robin"] == comparison["policies"]["round-robin"] | {
        "to_first": None
    }


def test_a_changed_incident_is_not_compared_with_what_happened(
    log: Log, simulate: Simulate
) -> None:
    options = ("--policy", "headroom", "--seeds", "1", "--json", "--set", "load=0.5")
    status, out, _ = simulate("--from-log", str(log.files[0]), *options)
    assert status == 0
    assert list(json.loads(out)[0]["policies"]) == ["headroom"]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ((), "give a scenario file, or --from-log"),
        (("--keep", "."), "--keep is for --from-log"),
        (("s.yaml", "--from-log", "{log}"), "has a scenario and a timing of its own"),
        (("--from-log", "{log}", "--keep", "/nowhere"), "there is no such folder"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: tuple[str, ...], why: str, log: Log, simulate: Simulate
) -> None:
    status, _, err = simulate(*(option.format(log=log.files[0]) for option in options))
    assert status == 2
    assert why in err
