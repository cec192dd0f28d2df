"""Engines that share requests in the simulator: does every answer come, over links that contend?"""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace
from stage import SMALL, STEP_S, TINY, Stage, ask

from paceline.domain.commands import Dispatch, Prefill
from paceline.domain.facts import FirstTokenSeen, Prefilled
from paceline.kernel.log import line, opening, replay
from paceline.simulator.handing import WITHIN_BYTES_PER_S
from paceline.simulator.replica import HELD_S
from paceline.simulator.scenario import Fault, Network, Requests, Scenario, Workers

pytestmark = pytest.mark.usefixtures("every_prompt_handed_over")

SLOW = TINY.kv_token_bytes * 10_000.0
"""Bytes a second at which 10,000 tokens of KV cache are handed over in a second."""


def pair(*faults: Fault, prefill: int = 1, decode: int = 1, **changed: Any) -> Scenario:
    """So many workers that prefill and that answer, each on a machine of its own."""
    fleet = (
        Workers(profile="tiny", name="p", count=prefill, role="prefill"),
        Workers(profile="tiny", name="d", count=decode, role="decode"),
    )
    return replace(SMALL, **{"workers": fleet, "faults": faults} | changed)


def shared(stage: Stage) -> int:
    """Requests that one worker took over from another."""
    return sum(bool(command.prefilled_at) for _, command in stage.commands(Dispatch))


def test_the_answer_comes_from_the_second_worker_once_the_prompt_is_there() -> None:
    network = Network(latency_s=0.0, kv_latency_s=0.0, kv_bytes_per_s=SLOW)
    stage = Stage(pair(network=network), "least-requests", requests=[ask(prompt=500, output=10)])
    stage.run()
    ((_, prefilled),) = stage.facts(Prefilled)
    ((_, first),) = stage.facts(FirstTokenSeen)
    assert (prefilled.worker_id, prefilled.prompt_tokens) == ("p0", 500)
    assert first.at - prefilled.at == pytest.approx(0.05 + STEP_S, rel=0.02)
    (seen,) = stage.seen
    assert (seen.worker, seen.status, seen.output_tokens) == ("d0", "ok", 10)
    replicas = stage.simulation.replicas
    assert replicas["d0"].scheduler.counters.received_tokens == 499
    assert replicas["p0"].scheduler.pool.used == 0


def test_transfers_share_a_link() -> None:
    network = Network(latency_s=0.0, kv_latency_s=0.0, kv_bytes_per_s=SLOW)
    asked = [ask(prompt=250, output=10), ask(prompt=250, output=10)]
    stage = Stage(pair(network=network, decode=2), "least-requests", requests=asked)
    stage.run()
    begun = min(fact.at for _, fact in stage.facts(Prefilled))
    last = max(fact.at for _, fact in stage.facts(FirstTokenSeen))
    assert last - begun == pytest.approx(0.05 + STEP_S, rel=0.05)


def test_within_a_machine_a_hand_over_is_fast() -> None:
    fleet = tuple(replace(group, node="n") for group in pair().workers)
    network = Network(latency_s=0.0, kv_latency_s=0.0, kv_bytes_per_s=SLOW)
    stage = Stage(
        pair(network=network, workers=fleet), "least-requests", requests=[ask(prompt=500)]
    )
    stage.run()
    ((_, prefilled),) = stage.facts(Prefilled)
    ((_, first),) = stage.facts(FirstTokenSeen)
    inside_s = 500 * TINY.kv_token_bytes / WITHIN_BYTES_PER_S
    assert first.at - prefilled.at == pytest.approx(inside_s + STEP_S, rel=0.02)


@pytest.mark.parametrize("policy", ["headroom", "least-requests", "kv-cost", "oracle"])
def test_every_request_is_answered(policy: str) -> None:
    stage = Stage(pair(prefill=2, decode=2), policy)
    stage.run()
    assert stage.seen
    assert all(seen.status == "ok" for seen in stage.seen)
    assert {seen.worker for seen in stage.seen} == {"d0", "d1"}
    assert (shared(stage) == len(stage.seen)) is (policy in ("least-requests", "kv-cost"))
    for replica in stage.simulation.replicas.values():
        assert replica.scheduler.pool.used == 0


def test_the_oracle_weighs_the_transfer_against_the_harm_of_a_prefill_in_place() -> None:
    def shared_over(bytes_per_s: float) -> int:
        network = Network(kv_bytes_per_s=bytes_per_s)
        requests = (Requests(rate=30.0, prompt=(600, 1500), output=(100, 300)),)
        stage = Stage(pair(network=network, requests=requests), "oracle")
        stage.run()
        assert all(seen.status == "ok" for seen in stage.seen)
        return shared(stage)

    assert shared_over(100.0 * SLOW) > 10
    assert shared_over(0.01 * SLOW) == 0


TROUBLES = [
    Fault(kind="crash", worker="p0", at_s=3.0, for_s=1.0),
    Fault(kind="crash", worker="d0", at_s=3.0, for_s=1.0),
    Fault(kind="crash", worker="*", at_s=3.0, for_s=0.5, every_s=2.0),
    Fault(kind="hang", worker="p0", at_s=3.0, for_s=3.0),
    Fault(kind="partition", worker="p0", at_s=3.0, for_s=2.0),
    Fault(kind="partition", worker="d0", at_s=3.0, for_s=2.0),
    Fault(kind="link", worker="p0", at_s=3.0, for_s=3.0, factor=1e4),
    Fault(kind="slow", worker="p0", at_s=3.0, for_s=3.0, factor=5.0),
]


@pytest.mark.parametrize("policy", ["headroom", "least-requests"])
@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda fault: f"{fault.kind} {fault.worker}")
def test_no_trouble_loses_a_request(trouble: Fault, policy: str) -> None:
    stage = Stage(pair(trouble, prefill=2, decode=2), policy)
    stage.run()
    assert {seen.status for seen in stage.seen} <= {"ok", "failed"}
    assert sum(seen.status == "ok" for seen in stage.seen) > 0.95 * len(stage.seen)
    assert not stage.simulation.flights
    assert not stage.simulation.gateways[0].kernel.requests


def test_what_a_crashed_worker_held_is_computed_by_the_other() -> None:
    network = Network(latency_s=0.0, kv_latency_s=0.0, kv_bytes_per_s=SLOW)
    crash = Fault(kind="crash", worker="p0", at_s=0.03, for_s=1.0)
    asked = [ask(prompt=500, output=10)]
    stage = Stage(pair(crash, network=network), "least-requests", requests=asked)
    stage.run()
    ((at, _),) = stage.facts(Prefilled)
    assert at < 0.03  # it crashed amid the transfer
    assert stage.seen[0].status == "ok"
    assert stage.simulation.replicas["d0"].scheduler.counters.received_tokens == 0


def test_what_nobody_fetches_is_given_up_by_the_engine() -> None:
    away = Fault(kind="crash", worker="d0", at_s=0.005, for_s=100.0)
    stage = Stage(pair(away, drain_s=200.0), "least-requests", requests=[ask(prompt=500)])
    used: list[int] = []
    for when in (5.0, HELD_S + 5.0):
        stage.at(when, lambda s: used.append(s.replicas["p0"].scheduler.pool.used))
    stage.run()
    assert used[0] > 0
    assert used[1] == 0


def test_no_prompt_is_ever_fetched_after_its_lease() -> None:
    lease_s = 0.4
    fleet = tuple(replace(group, lease_s=lease_s) for group in pair(decode=1).workers)
    plan = pair(
        Fault(kind="partition", worker="d0", at_s=2.0, for_s=1.0, every_s=2.0),
        Fault(kind="partition", worker="p0", at_s=1.5, for_s=0.7, every_s=1.7),
        workers=fleet,
        requests=(Requests(rate=30.0, prompt=(300, 900), output=(40, 200)),),
    )
    stage = Stage(plan, "least-requests")
    stage.run()
    sent: dict[str, float] = {}
    fetched = 0
    for now, _, commands in stage.log:
        for command in commands:
            if isinstance(command, Prefill):
                sent[command.request_id] = now
            elif isinstance(command, Dispatch) and command.prefilled_at:
                fetched += 1
                assert now < sent[command.request_id] + lease_s
    assert fetched > 20
    assert len(stage.commands(Prefill)) > fetched


def test_a_recorded_log_gives_the_same_commands_to_a_fresh_kernel() -> None:
    stage = Stage(pair(TROUBLES[0], prefill=2, decode=2), seed=2)
    stage.run()
    lines = [opening(stage.simulation.gateways[0].kernel.settings)]
    lines += [line(now, fact, commands) for now, fact, commands in stage.log]
    assert sum(bool(commands) for _, commands in replay(lines)) > 100
    for entry, commands in replay(lines):
        assert list(entry.commands) == commands
