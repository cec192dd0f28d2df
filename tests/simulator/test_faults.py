"""What do clients, gateways and engines go through when something breaks?"""

from __future__ import annotations

from collections import Counter

import pytest
from stage import SMALL, STEP_S, Stage, ask, fragile, seen_by_clients, small

from paceline.domain.commands import Dispatch, Hold
from paceline.domain.facts import DispatchFailed, FirstTokenSeen, StreamBroke, WorkerReported
from paceline.simulator.faults import times
from paceline.simulator.gateway import CONNECT_TIMEOUT_S
from paceline.simulator.scenario import Fault, Network, SimTier, Workers
from paceline.simulator.simulation import Simulation
from paceline.workload.traces import Arrival

PREFIX = tuple(range(1, 5))
"""2,048 tokens that prompts have in common."""


def fault(kind: str, at_s: float, worker: str = "w0", **fields: float | str) -> Fault:
    return Fault(kind=kind, worker=worker, at_s=at_s, **fields)  # type: ignore[arg-type]


def stream(seconds: float, at_s: float = 0.0) -> Arrival:
    """A request whose answer takes about so long on a quiet engine."""
    return ask(at_s, prompt=50, output=round(seconds / STEP_S))


def test_trouble_comes_once_or_again_and_again_until_the_last_arrival() -> None:
    assert list(times(fault("hang", 3.0), 10.0)) == [3.0]
    assert list(times(fault("hang", 3.0, every_s=3.0), 10.0)) == [3.0, 6.0, 9.0]


# Crash.


def test_a_crash_breaks_fragile_streams_and_sends_waiting_requests_elsewhere() -> None:
    crash = small(fault("crash", 0.5, for_s=2.0))
    stage = Stage(
        crash,
        "round-robin",
        requests=[
            fragile(stream(2.0)),
            stream(2.0),
            *[ask(0.495 + 0.0001 * i, prompt=3000, output=10) for i in range(4)],
        ],
    )
    stage.run()
    lost, kept, *late = stage.seen
    assert (lost.worker, lost.status) == ("w0", "broke")
    assert lost.seconds == pytest.approx(0.5)
    assert (kept.worker, kept.status) == ("w1", "ok")
    assert {(s.worker, s.status) for s in late} == {("w1", "ok")}
    assert len(stage.facts(StreamBroke)) == 1
    assert {f.because for _, f in stage.facts(DispatchFailed)} == {"connection lost"}


def test_a_request_on_its_way_to_a_worker_that_crashes_is_refused_and_goes_elsewhere() -> None:
    far = small(fault("crash", 0.5), network=Network(latency_s=0.2))
    stage = Stage(far, "round-robin", requests=[ask(0.3)])
    stage.run()
    ((_, failed),) = stage.facts(DispatchFailed)
    assert (failed.worker_id, failed.because) == ("w0", "connection refused")
    assert [(s.worker, s.status) for s in stage.seen] == [("w1", "ok")]


def test_a_worker_is_back_after_its_repair_and_its_start_and_has_forgotten_its_cache() -> None:
    same = [ask(at_s, 2100, 5, blocks=PREFIX) for at_s in (0.0, 1.0, 5.5)]
    stage = Stage(small(fault("crash", 2.0, for_s=2.0), count=1), requests=same)
    up: list[bool] = []
    for when in (1.9, 2.1, 4.9, 5.1):  # repaired after 2 s, started after 1 s more
        stage.at(when, lambda simulation: up.append(simulation.replicas["w0"].up))
    stage.run()
    assert up == [True, False, False, True]
    fresh, cached, fresh_again = (s.ttft_s for s in stage.seen)
    assert cached < 0.5 * fresh
    assert fresh_again == pytest.approx(fresh, rel=0.1)


def test_requests_wait_for_the_only_worker_and_are_served_once_it_is_back() -> None:
    down = small(fault("crash", 1.0, for_s=1.0), count=1)
    stage = Stage(down, requests=[ask(0.0, 50, 5), ask(1.5), ask(2.0)])
    stage.run()
    assert len(stage.commands(Hold)) == 2
    assert {s.status for s in stage.seen} == {"ok"}
    first, second = (s.at_s + s.ttft_s for s in stage.seen[1:])
    assert 3.0 < first < 4.0 > second > 3.0


def test_without_a_worker_for_too_long_requests_are_turned_away() -> None:
    (early, late) = seen_by_clients(
        ask(0.0, 50, 5), ask(2.0), scenario=small(fault("crash", 1.0), count=1)
    )
    assert (early.status, late.status) == ("ok", "shed")
    assert late.seconds == pytest.approx(5.0, abs=0.2)


def test_a_worker_that_is_down_cannot_crash_again() -> None:
    twice = small(fault("crash", 1.0, for_s=2.0), fault("crash", 2.0, for_s=50.0))
    stage = Stage(twice)
    up: list[bool] = []
    stage.at(4.1, lambda simulation: up.append(simulation.replicas["w0"].up))
    stage.run()
    assert up == [True]


# Hang.


def test_a_hung_worker_makes_one_long_gap_and_then_goes_on() -> None:
    (quiet,) = seen_by_clients(stream(1.0), scenario=small(count=1))
    (hung,) = seen_by_clients(stream(1.0), scenario=small(fault("hang", 0.5, for_s=3.0), count=1))
    assert (hung.status, hung.output_tokens) == ("ok", quiet.output_tokens)
    assert hung.stall_s == pytest.approx(3.0, abs=2 * STEP_S)
    assert hung.seconds == pytest.approx(quiet.seconds + 3.0)


def test_hangs_that_overlap_last_until_the_last_of_them_ends() -> None:
    overlap = small(
        fault("hang", 0.5, for_s=2.0), fault("hang", 1.0, for_s=0.5), fault("hang", 2.0, for_s=2.0),
        count=1,
    )  # fmt: skip
    (seen,) = seen_by_clients(stream(1.0), scenario=overlap)
    assert seen.stall_s == pytest.approx(3.5, abs=2 * STEP_S)


def test_fragile_streams_of_a_hung_worker_time_out() -> None:
    hung = small(fault("hang", 0.5), count=1, stall_timeout_s=5.0)
    (seen,) = seen_by_clients(fragile(stream(1.0)), scenario=hung)
    assert seen.status == "broke"
    assert 5.5 <= seen.seconds <= 5.5 + SMALL.network.probe_s


def test_a_request_without_a_first_token_times_out_and_is_tried_elsewhere() -> None:
    hung = small(fault("hang", 0.5), first_token_timeout_s=4.0)
    stage = Stage(hung, "round-robin", requests=[ask(1.0)])
    stage.run()
    ((_, failed),) = stage.facts(DispatchFailed)
    assert failed.timed_out
    (seen,) = stage.seen
    assert (seen.worker, seen.status) == ("w1", "ok")
    assert 4.0 < seen.queued_s < seen.ttft_s < 4.1 + SMALL.network.probe_s


def test_long_answers_of_a_worker_that_works_do_not_time_out() -> None:
    """Hundreds of steps pass as one event: silence of the simulator is none of the worker."""
    slow = small(fault("slow", 0.0, factor=20.0), count=1, stall_timeout_s=1.0)
    (seen,) = seen_by_clients(ask(0.1, 50, 500), scenario=slow)
    assert seen.status == "ok"
    assert seen.seconds > 15.0


def test_a_hung_worker_gets_no_new_work() -> None:
    hung = small(fault("hang", 4.0, for_s=4.0), seconds=10.0)
    stage = Stage(hung)
    stage.run()

    def share(since: float, until: float) -> float:
        sent = Counter(c.worker_id for now, c in stage.commands(Dispatch) if since < now < until)
        return sent["w0"] / sent.total()

    assert share(1.0, 4.0) > 0.3
    assert share(5.0, 8.0) < 0.15


def test_a_worker_that_crashes_while_it_hangs_comes_back_in_good_health() -> None:
    both = small(fault("hang", 0.5), fault("crash", 1.0, for_s=0.5), count=1)
    first, second = seen_by_clients(fragile(stream(2.0)), ask(3.0), scenario=both)
    assert (first.status, second.status) == ("broke", "ok")
    assert second.ttft_s < 0.1


# Slow.


def test_a_slow_worker_takes_so_many_times_as_long_for_each_token() -> None:
    quick, slow = (
        seen_by_clients(stream(1.0, 0.1), scenario=small(fault("slow", 0.0, factor=f), count=1))[0]
        for f in (1.0, 3.0)
    )
    assert slow.itl_s == pytest.approx(3.0 * quick.itl_s)


def test_troubles_that_overlap_slow_it_together_and_end_each_at_its_time() -> None:
    both = small(fault("slow", 1.0, for_s=3.0), fault("slow", 2.0, for_s=1.0, factor=2.0), count=1)
    stage = Stage(both)
    slowdowns: list[float] = []

    def look(simulation: Simulation) -> None:
        slowdowns.append(simulation.replicas["w0"].scheduler.slowdown)

    for when in (0.5, 1.5, 2.5, 3.5, 4.5):
        stage.at(when, look)
    stage.run()
    assert slowdowns == pytest.approx([1.0, 3.0, 6.0, 3.0, 1.0])


def test_a_machine_of_another_speed_takes_its_share_of_the_time() -> None:
    fast, slow = (
        seen_by_clients(ask(), scenario=small(workers=(Workers(profile="tiny", speed=s),)))[0]
        for s in (2.0, 0.5)
    )
    assert slow.itl_s == pytest.approx(4.0 * fast.itl_s)


# Partition.


def test_behind_a_partition_work_goes_on_and_is_heard_of_when_it_ends() -> None:
    (quiet,) = seen_by_clients(stream(2.0), scenario=small(count=1))
    cut = small(fault("partition", 0.5, for_s=1.0), count=1)
    (seen,) = seen_by_clients(stream(2.0), scenario=cut)
    assert seen.status == "ok"
    assert seen.seconds == pytest.approx(quiet.seconds)
    assert seen.stall_s == pytest.approx(1.0)


def test_what_ends_behind_a_partition_ends_for_its_client_when_that_is_over() -> None:
    cut = small(fault("partition", 0.5, for_s=3.0), count=1)
    begun, unheard = seen_by_clients(stream(1.0), stream(1.0, 0.4975), scenario=cut)
    assert (begun.status, unheard.status) == ("ok", "ok")
    assert begun.seconds == pytest.approx(3.5)
    assert begun.stall_s == pytest.approx(3.0)
    assert unheard.at_s + unheard.ttft_s == pytest.approx(3.5)
    assert unheard.itl_s == unheard.stall_s == 0.0  # all came at once


def test_behind_a_partition_dispatches_fail_after_the_connect_timeout() -> None:
    cut = small(fault("partition", 0.5, for_s=4.0))
    stage = Stage(cut, "round-robin", requests=[ask(0.6), ask(0.7)])
    stage.run()
    ((now, failed),) = stage.facts(DispatchFailed)
    assert (failed.worker_id, failed.because) == ("w0", "connect timeout")
    assert now == pytest.approx(0.6 + CONNECT_TIMEOUT_S)
    assert [s.status for s in stage.seen] == ["ok", "ok"]


def test_a_worker_out_of_reach_is_found_unhealthy_and_gets_no_work() -> None:
    stage = Stage(small(fault("partition", 3.0, for_s=4.0)))
    stage.run()
    reports = [(now, f.report.healthy) for now, f in stage.facts(WorkerReported)]
    assert (4.0, False) in reports
    assert all(c.worker_id == "w1" for now, c in stage.commands(Dispatch) if 4.0 < now < 7.0)
    assert any(c.worker_id == "w0" for now, c in stage.commands(Dispatch) if now > 8.0)


def test_streams_behind_a_long_partition_time_out_and_come_to_life_no_more() -> None:
    cut = small(fault("partition", 0.5, for_s=8.0), stall_timeout_s=3.0, first_token_timeout_s=3.0)
    requests = [fragile(stream(1.0)), stream(1.0, 0.1), stream(1.0, 0.4975)]
    stage = Stage(cut, "round-robin", requests=requests)
    stage.run()
    begun, other, unheard = stage.seen
    assert (begun.worker, begun.status) == ("w0", "broke")
    assert 3.5 <= begun.seconds <= 5.5
    assert other.status == "ok"
    assert (unheard.worker, unheard.status) == ("w1", "ok")
    assert len(stage.facts(FirstTokenSeen)) == 3


def test_partitions_that_overlap_last_until_the_last_of_them_ends() -> None:
    cut = small(fault("partition", 0.5, for_s=2.0), fault("partition", 1.0, for_s=3.0), count=1)
    (seen,) = seen_by_clients(stream(1.0), scenario=cut)
    assert seen.stall_s == pytest.approx(3.5)


def test_of_a_crash_behind_a_partition_one_hears_when_that_is_over() -> None:
    both = small(fault("partition", 0.5, for_s=3.0), fault("crash", 1.0, for_s=1.0))
    requests = [fragile(stream(2.0)), stream(2.0, 0.1), stream(2.0, 0.4975)]
    stage = Stage(both, "round-robin", requests=requests)
    stage.run()
    begun, _, waiting = stage.seen
    assert begun.status == "broke"
    assert begun.seconds == pytest.approx(3.5)
    assert (waiting.status, waiting.worker) == ("ok", "w1")
    assert waiting.queued_s == pytest.approx(3.5 - waiting.at_s)


# Late.


def test_a_worker_that_is_added_later_takes_work_once_it_has_started() -> None:
    fleet = (
        Workers(profile="tiny"),
        Workers(profile="tiny", name="late", added_s=3.0, start_up_s=2.0),
    )
    stage = Stage(small(workers=fleet, tiers={"t": SimTier(ttft_s=0.5, itl_s=0.004)}))
    stage.run()
    sent = [now for now, c in stage.commands(Dispatch) if c.worker_id == "late0"]
    assert 5.0 <= sent[0] < 6.5
    assert len(sent) > 20
