"""Do the GPUs' figures make a finding more certain, and is it said where utilisation misleads?"""

from __future__ import annotations

from typing import Any

import pytest

from paceline.domain.gpu import Gpu
from paceline.policy.causes import Cause
from paceline.policy.diagnose import diagnose
from paceline.policy.gpus import REASONS, misleading
from paceline.policy.look import Finding, Look, Loss, WorkerLook

SLOW = {"steps": 20.0, "normal_s": 0.4, "best_s": 0.4, "slow_s": 0.6, "slowdown": 2.5}


def gpu(index: int = 0, **of: Any) -> Gpu:
    usual = {"clock_mhz": 1980.0, "best_clock_mhz": 1980.0, "utilisation": 0.98, "sm_active": 0.7}
    return Gpu(index, **usual | of)


def finding_of(*gpus: Gpu, **of: Any) -> Finding:
    sick = WorkerLook(id="w", model="m", gpus=gpus, **of)
    (finding,) = diagnose(Look(now=1.0, window_s=30.0, requests=9, workers=[sick]))
    return finding


@pytest.mark.parametrize("reason", REASONS)
def test_a_slow_worker_with_a_lowered_clock_is_told_why_and_where_to_look(reason: str) -> None:
    held = gpu(3, clock_mhz=1095.0, temperature_c=88.0, reasons=(reason,))
    finding = finding_of(gpu(2), held, **SLOW)
    why, where = REASONS[reason]
    assert f"The clock of its GPU 3 is lowered to 1,095 MHz: {why}." in finding.says
    assert finding.remedy == f"Look {where}; drain w until GPU 3 is well."
    told = finding.evidence
    assert (told["gpu"], told["gpu_clock_mhz"], told["gpu_best_clock_mhz"]) == (3, 1095.0, 1980.0)
    assert (told["gpu_lowered_by"], told["gpu_temperature_c"]) == (reason, 88.0)


def test_a_slow_worker_whose_gpus_run_at_their_clock_has_neighbours() -> None:
    finding = finding_of(gpu(), **SLOW)
    assert "usual clock" in finding.says
    assert "what else uses its GPUs" in finding.remedy


def test_a_gpu_that_idles_does_not_speak_for_the_clock() -> None:
    assert "clock" not in finding_of(gpu(clock_mhz=210.0), **SLOW).says


@pytest.mark.parametrize("sick", [{"silent_s": 3.0}, {"healthy": False}, SLOW])
def test_the_last_error_of_a_gpu_is_said_of_a_worker_in_trouble(sick: dict[str, Any]) -> None:
    finding = finding_of(gpu(), gpu(1, last_xid=79), **sick)
    assert "GPU 1 was XID 79" in finding.says
    assert "XID" in finding.remedy


def test_without_gpus_a_finding_says_what_it_always_said() -> None:
    finding = finding_of(**SLOW)
    assert not [name for name in finding.evidence if name.startswith("gpu")]
    assert finding.remedy.startswith("Look at its GPU's clocks")


def notes(*gpus: Gpu, lost: int = 0) -> list[str]:
    losses = [Loss("m", "w", Cause.BATCH, promises=lost)] if lost else []
    w = WorkerLook(id="w", model="m", gpus=gpus)
    return list(misleading(Look(now=1.0, window_s=30.0, requests=90, workers=[w], losses=losses)))


def test_utilisation_that_misleads_is_said() -> None:
    (kept,) = notes(gpu())
    assert "98% utilised, and every promise is kept" in kept
    (little,) = notes(gpu(sm_active=0.2), lost=20)
    assert "98% utilised, but their multiprocessors have work for 20% of the time" in little
    (calm,) = notes(gpu(utilisation=0.3), lost=20)
    assert "30% utilised, and promises are broken" in calm


def test_utilisation_that_does_not_mislead_is_not_spoken_of() -> None:
    assert notes(gpu(), lost=20) == []
    assert notes(gpu(utilisation=0.7)) == []
    assert notes(Gpu(0)) == []
    assert notes() == []


def test_what_broke_promises_comes_with_how_busy_the_gpus_were() -> None:
    w = WorkerLook(id="w", model="m", gpus=[gpu(tensor_active=0.1), gpu(tensor_active=0.3)])
    losses = [Loss("m", "w", Cause.OTHERS_PREFILL, promises=20)]
    look = Look(now=1.0, window_s=30.0, requests=90, workers=[w], losses=losses)
    (finding,) = diagnose(look)
    assert finding.evidence["gpu_utilisation_share"] == 0.98
    assert finding.evidence["gpu_tensor_active_share"] == 0.2
