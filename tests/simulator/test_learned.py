"""Does a simulated engine behave as the live one was seen to?"""

from __future__ import annotations

import pickle
from math import inf, log
from random import Random
from statistics import median, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from stage import ask, seen_by_clients, small

from paceline.enginemodel import PROFILES, Load
from paceline.kernel.timing import Timing, WorkerTiming, export
from paceline.policy.steptime import ROOFLINE, StepModel
from paceline.simulator.learned import (
    AMPLE_KV,
    learned_profile,
    live_fleet,
    profiles_of,
)
from paceline.simulator.scenario import Network, Requests, Scenario, SimTier, Workers
from paceline.simulator.simulation import Simulation

WORKER = WorkerTiming(id="live", model="m", step=StepModel(), prefill_budget=2048)

thetas = st.tuples(
    st.floats(1e-4, 0.1), *[st.floats(0, 1e-3)] * 7, st.floats(0, 1e-6), st.floats(0, 1e-8)
)
loads = st.builds(
    Load, st.integers(0, 1024), st.integers(0, 16_384), st.integers(0, 10**6), st.floats(0, 1e9)
)


@given(thetas, st.floats(0.9, 1.1), loads)
def test_a_step_takes_as_long_as_the_kernel_expects(
    theta: tuple[float, ...], slowdown: float, load: Load
) -> None:
    model = StepModel(theta=theta, slowdown=slowdown)
    expected_s = model.step_s(load.streams, load.prefill, load.context, load.attention)
    profile = learned_profile(replace(WORKER, step=model))
    assert profile.step_seconds(load) == pytest.approx(expected_s)


@pytest.mark.parametrize("slowdown", [0.5, 1.46, 3.0])
def test_a_disturbance_at_the_time_of_the_export_is_taken_to_pass(slowdown: float) -> None:
    disturbed = learned_profile(replace(WORKER, step=StepModel(slowdown=slowdown)))
    assert disturbed.step_seconds(Load(32)) == learned_profile(WORKER).step_seconds(Load(32))


@pytest.mark.parametrize("spread", [0.02, 0.1, 0.3])
def test_steps_spread_as_they_were_seen_to(spread: float) -> None:
    profile = learned_profile(replace(WORKER, step=StepModel(spread=spread)))
    rng, load = Random(1), Load(32, 0, 32_000)
    usual_s = profile.step_seconds(load)
    residuals = [log(profile.step_seconds(load, rng) / usual_s) for _ in range(4000)]
    assert pstdev(residuals) == pytest.approx(spread, rel=0.1)
    assert abs(median(residuals)) < 0.1 * spread


@pytest.mark.parametrize("bytes_per_s", [inf, 1e15])
@pytest.mark.parametrize(("latency_s", "beyond_s"), [(0.0, 0.05), (0.01, 0.05), (0.1, 0.2)])
def test_a_first_token_takes_the_learned_overhead_of_which_the_latency_is_a_part(
    latency_s: float, beyond_s: float, bytes_per_s: float
) -> None:
    still = StepModel(spread=0.0)
    profile = learned_profile(replace(WORKER, step=still, overhead_s=0.05))
    scenario = small(count=1, network=Network(latency_s=latency_s, bytes_per_s=bytes_per_s))
    request = ask(at_s=1.0, prompt=100)
    (seen,) = seen_by_clients(request, scenario=scenario, profiles=lambda _: profile)
    step_s = profile.step_seconds(Load(prefill=100, attention=100 * 50))
    assert seen.ttft_s == pytest.approx(beyond_s + step_s)


def test_limits_are_the_worker_s_where_they_are_known() -> None:
    known = learned_profile(replace(WORKER, kv_capacity_tokens=4096, block_size=32))
    assert (known.kv_tokens, known.block_size, known.max_num_batched_tokens) == (4096, 32, 2048)
    unknown = learned_profile(WORKER)
    assert (unknown.kv_tokens, unknown.block_size) == (AMPLE_KV, 16)


def test_a_small_budget_bounds_the_streams_too() -> None:
    assert learned_profile(replace(WORKER, prefill_budget=128)).max_num_seqs == 128


def test_blocks_of_an_odd_size_become_ones_that_the_simulator_can_name() -> None:
    assert learned_profile(replace(WORKER, block_size=784)).block_size == 16


def test_a_scenario_may_name_live_workers_beside_known_profiles() -> None:
    profiles = profiles_of(Timing(workers=(WORKER,), models={}))
    assert profiles(Workers(profile="live")).name == "live"
    assert profiles(Workers(profile="tiny")) is PROFILES["tiny"]


def test_profiles_reach_the_processes_of_a_parallel_run() -> None:
    profiles = pickle.loads(pickle.dumps(profiles_of(Timing(workers=(WORKER,), models={}))))
    live = Workers(profile="live")
    assert profiles(live).step_seconds(Load(8)) == learned_profile(WORKER).step_seconds(Load(8))


def test_a_live_fleet_keeps_names_models_places_and_costs() -> None:
    dear = replace(WORKER, id="dear", node="a", cost_per_hour=4.0)
    timing = Timing(workers=(dear, WORKER), models={})
    first, second = live_fleet(timing)
    assert (first.name, first.model, first.node, first.cost_per_hour) == ("dear", "m", "a", 4.0)
    assert second.cost_per_hour == 1.0


SCENARIO = Scenario(
    about="Chat on two unlike workers.",
    seconds=30.0,
    workers=(
        Workers(profile="h100-llama-8b", name="h"),
        Workers(profile="a100-llama-8b", name="a"),
    ),
    tiers={"standard": SimTier(ttft_s=0.5, itl_s=0.03)},
    requests=(Requests(rate=12.0, prompt=(600, 4000), output=(150, 600)),),
)


def test_a_fleet_played_with_what_was_learned_of_it_serves_as_it_did() -> None:
    """From live engines (of another form than the learner's) through an export to a simulation."""
    live = Simulation(SCENARIO, "least-requests", 1)
    truth = live.run()
    timing = export(live.gateways[0].kernel)
    again = replace(SCENARIO, workers=live_fleet(timing))
    played = Simulation(again, "least-requests", 1, profiles_of(timing)).run()
    for seen, simulated, near in (
        (truth.total.itl_s, played.total.itl_s, 0.1),
        (truth.total.ttft_s, played.total.ttft_s, 0.2),  # who meets whom is left to chance
    ):
        assert simulated.p50 == pytest.approx(seen.p50, rel=near)
        assert simulated.p90 == pytest.approx(seen.p90, rel=0.2)


def test_the_guess_for_an_unknown_worker_can_be_played() -> None:
    assert learned_profile(WORKER).step_seconds(Load(1)) == pytest.approx(sum(ROOFLINE[:2]))
