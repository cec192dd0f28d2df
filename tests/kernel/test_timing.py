"""Does what was learned survive its way through a file, and is a wrong file refused?"""

from __future__ import annotations

import msgspec
import pytest
from stage import Stage

from paceline.domain.errors import ConfigError
from paceline.domain.facts import WorkerAdded, WorkerReported
from paceline.domain.worker import Worker, WorkerReport
from paceline.kernel import Kernel
from paceline.kernel.timing import Timing, export, from_json, to_json
from paceline.policy.steptime import ROOFLINE
from paceline.simulator.scenario import Requests, Scenario, SimTier, Workers


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    """One that has served a fleet."""
    scenario = Scenario(
        about="Two workers to be told apart.",
        seconds=12.0,
        workers=(Workers(profile="h100-llama-8b"), Workers(profile="a100-llama-8b", name="x")),
        tiers={"t": SimTier(ttft_s=0.5, itl_s=0.02)},
        requests=(Requests(rate=15.0, prompt=(800, 5000), output=(150, 600)),),
    )
    stage = Stage(scenario)
    stage.run()
    return stage.simulation.gateways[0].kernel


def test_a_file_holds_all_that_was_exported(kernel: Kernel) -> None:
    timing = export(kernel)
    assert from_json(to_json(timing), "timing.json") == timing


def test_each_worker_is_exported_as_it_was_learned(kernel: Kernel) -> None:
    quick, slow = export(kernel).workers
    assert (quick.id, slow.id) == ("w0", "x0")
    for exported in (quick, slow):
        state = kernel.workers[exported.id]
        assert exported.step == state.timing.model()
        assert exported.step.samples > 100
        assert exported.predictions == state.itl.count > 0
    assert quick.step.step_s(32, kv=64_000) < slow.step.step_s(32, kv=64_000)


def test_lengths_are_exported_by_model(kernel: Kernel) -> None:
    text = export(kernel).models["m"]
    assert 1 < text.output_p50 < text.output_p90 < text.output_p99
    assert text.tokens_per_byte == pytest.approx(0.25, rel=0.05)


def test_what_engine_and_operator_say_is_exported_too() -> None:
    kernel = Kernel()
    worker = Worker("w", "m", "http://w", kind="vllm", node="a", cost_per_hour=4.0)
    kernel.handle(WorkerAdded(worker), 0.0)
    report = WorkerReport(True, kv_capacity_tokens=4096, block_size=32, prefill_budget=8192)
    kernel.handle(WorkerReported("w", report), 0.0)
    (told,) = export(kernel).workers
    assert (told.kind, told.node, told.cost_per_hour) == ("vllm", "a", 4.0)
    assert (told.kv_capacity_tokens, told.block_size, told.prefill_budget) == (4096, 32, 8192)


def test_of_an_unknown_worker_the_guess_is_exported_and_that_it_is_one() -> None:
    kernel = Kernel()
    kernel.handle(WorkerAdded(Worker("w", "m", "http://w")), 0.0)
    (guessed,) = export(kernel).workers
    assert guessed.step.theta == ROOFLINE
    assert (guessed.step.samples, guessed.kv_capacity_tokens) == (0, None)


def with_worker(**changed: object) -> bytes:
    """A file in which something about its one worker is changed."""
    kernel = Kernel()
    kernel.handle(WorkerAdded(Worker("w", "m", "http://w")), 0.0)
    plain = msgspec.json.decode(to_json(export(kernel)))
    step = plain["workers"][0]["step"]
    step |= {name: changed.pop(name) for name in list(changed) if name in step}
    plain["workers"][0] |= changed
    return msgspec.json.encode(plain)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "no timing"),
        (b"\xff\xfe", "no timing"),
        (b"model: m", "no timing"),
        (b'{"workers": []}', "version"),
        (b'{"version": 2, "workers": []}', "version 2, and this Paceline reads 1"),
        (b'{"version": 1}', "workers"),
        (with_worker(theta=[0.01, 0.0]), "w: step.theta has 2 coefficients instead of 10"),
        (with_worker(theta=[0.0, *ROOFLINE[1:]]), "w: step.theta"),
        (with_worker(theta=[*ROOFLINE[:-1], -1e-9]), "w: step.theta"),
        (with_worker(slowdown=0.0), "w: step.slowdown"),
        (with_worker(prefill_budget=0), "w: prefill_budget"),
        (with_worker(kv_capacity_tokens=0), "w: kv_capacity_tokens"),
    ],
)
def test_a_wrong_file_is_refused_with_a_reason(data: bytes, complaint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        from_json(data, "timing.json")
    (problem,) = refused.value.problems
    assert problem.startswith("timing.json: ")
    assert complaint in problem


def test_fields_of_later_versions_do_no_harm() -> None:
    data = to_json(Timing(workers=(), models={})).replace(b'"version"', b'"later": 1, "version"')
    assert from_json(data, "timing.json") == Timing(workers=(), models={})
