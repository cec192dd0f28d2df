"""Does the simulator tell what live gateways do? One scenario, played in both hosts.

Same requests, same kernel, same engine model. What differs, and how much that may be:

- Chance. Engines draw their noise in another order, so that decisions part after some seconds. The
  simulator plays the same requests several times, and the live run is one more such draw: standard
  deviations of a run are about 1 point of attainment, 4 points of a worker's share, 4 % (5 %) of
  the median (90th percentile) TTFT, 1 % (2 %) of ITL.
- The link. The scenario has half a millisecond each way; loopback, two event loops and the waking
  of processes take one to three in all, of a TTFT around 120.
- What the gateway knows. Live clients name the length of their answer as `max_tokens`, and their
  prompts have exactly four bytes a token; in the simulator lengths are unknown and bytes vary. That
  is worth about a point of attainment and two of a share.
- Jitter. Live tokens come a little late at random. With 2 (5) ms on average the simulator too sends
  3 (8) points less to the slower worker; on a machine that is so busy nothing is compared.

How steps are told (one by one, or several at once where nothing changes) makes no difference. The
driver's delay is in none of the figures: they are taken at the gateway in both hosts.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import uvloop
from both_hosts import Run, differing, figures, live, requests, simulated, written_down

from paceline.kernel import Settings
from paceline.simulator.load import load_scenario
from paceline.simulator.scenario import Scenario

POLICY, SEED, DRAWS = "headroom", 1, 8
LIVE_RUNS = 3
"""One that is apart may be the machine's doing; all of them apart is the simulator's."""
POINTS = {"attainment": 0.03, "cached": 0.01, "sent to h": 0.15, "sent to a": 0.15}
"""By how much shares may differ, four or more standard deviations."""
RELATIVE = {"TTFT p50": 0.2, "TTFT p90": 0.25, "ITL p50": 0.05, "ITL p90": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def scenario(folder: Path) -> Scenario:
    as_written = load_scenario(Path(__file__).with_name("parity.yaml"))
    return written_down(as_written, SEED, folder / "requests.jsonl")


@pytest.fixture(scope="module")
def from_sockets(scenario: Scenario, folder: Path) -> Run:
    return uvloop.run(live(scenario, POLICY, SEED, folder))


@pytest.fixture(scope="module")
def from_simulator(scenario: Scenario) -> list[Run]:
    return [simulated(scenario, POLICY, seed) for seed in range(DRAWS)]


def test_on_the_facts_of_the_live_host_a_fresh_kernel_decides_the_same(from_sockets: Run) -> None:
    assert differing(from_sockets) == []


def test_on_the_facts_of_the_simulator_a_fresh_kernel_decides_the_same(
    from_simulator: list[Run],
) -> None:
    assert differing(from_simulator[0]) == []


def test_the_simulator_plays_the_same_log_again(
    scenario: Scenario, from_simulator: list[Run]
) -> None:
    assert simulated(scenario, POLICY, 0).log == from_simulator[0].log


def test_both_hosts_set_their_kernels_alike_and_compute_the_same_tokens(
    from_sockets: Run, from_simulator: list[Run]
) -> None:
    ours, other = from_sockets, from_simulator[0]
    ours_set, other_set = (msgspec.json.decode(run.log[0], type=Settings) for run in (ours, other))
    assert ours_set == other_set
    assert tokens(ours) == tokens(other)
    assert not [o.error for o in ours.clients if not o.ok]


def test_promises_kept_times_and_shares_of_workers_are_those_of_the_live_host(
    scenario: Scenario, folder: Path, from_sockets: Run, from_simulator: list[Run]
) -> None:
    played = [figures(run, scenario, SEED) for run in from_simulator]
    expected = {name: float(np.mean([one[name] for one in played])) for name in played[0]}
    run = from_sockets
    for left in reversed(range(LIVE_RUNS)):
        apart = unlike(figures(run, scenario, SEED), expected)
        if not apart:
            return
        if run.trouble:
            pytest.skip(run.trouble)
        assert left, apart
        run = uvloop.run(live(scenario, POLICY, SEED, folder))


def unlike(seen: dict[str, float], expected: dict[str, float]) -> dict[str, tuple[float, float]]:
    """The figures that differ by more than they may: what was seen, and what was expected."""
    allowed = POINTS | {name: share * expected[name] for name, share in RELATIVE.items()}
    assert seen.keys() == expected.keys() == allowed.keys()
    return {
        name: (seen[name], expected[name])
        for name, by in allowed.items()
        if abs(seen[name] - expected[name]) > by
    }


def tokens(run: Run) -> list[tuple[int | None, int]]:
    """Tokens of prompts and answers, in an order that does not depend on time."""
    ends = [one.ended for one in requests(run) if one.ended is not None]
    return sorted((end.prompt_tokens, end.output_tokens) for end in ends)
