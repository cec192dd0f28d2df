"""What do the GPUs under the workers say of a trouble, and where does their utilisation mislead?

Utilisation is the share of time in which anything ran, be it one small kernel on one of a hundred
multiprocessors. It can be high while little is done, and while every promise is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import mean

import msgspec

from paceline.domain.gpu import LOWERED, Gpu
from paceline.policy.look import LEAST_LOST, LOST_SHARE, Evidence, Finding, Look, WorkerLook

BUSY, CALM = 0.9, 0.5
"""Utilisation from which on, and up to which, GPUs look busy or idle."""
LITTLE = 0.4
"""Share of time with work, over all multiprocessors, up to which little is done."""

REASONS = {
    "heat_hardware": ("it is too hot", "at its cooling (fans, air flow, its neighbours' heat)"),
    "heat_software": ("it is too hot", "at its cooling (fans, air flow, its neighbours' heat)"),
    "power_brake": ("its machine lacks power", "at the machine's power supplies"),
    "power_cap": ("it may draw no more power", "at its power limit (nvidia-smi -q -d POWER)"),
    "hardware": ("its hardware says so", "at its cooling and its power supply"),
    "sync_boost": ("it waits for others of its group", "at the other GPUs of its boost group"),
}
"""Of a lowered clock: why, and where to look; the surest first."""


def with_gpus(finding: Finding, worker: WorkerLook) -> Finding:
    """A finding of a worker that is slow or silent, with what its GPUs say of that."""
    if not worker.gpus:
        return finding
    worst = min(worker.gpus, key=lambda gpu: (not gpu.lowered_by, _clock_share(gpu), gpu.index))
    says, remedy = finding.says, finding.remedy
    for reason, (why, where) in REASONS.items():
        if reason in worst.lowered_by:
            clock = f" to {worst.clock_mhz:,.0f} MHz" if worst.clock_mhz is not None else ""
            says += f" The clock of its GPU {worst.index} is lowered{clock}: {why}."
            remedy = f"Look {where}; drain {worker.id} until GPU {worst.index} is well."
            break
    else:
        if finding.kind == "slow_worker" and _clock_share(worst) >= LOWERED:
            says += " Its GPUs run at their usual clock."
            remedy = "Look at what else uses its GPUs and its host's CPUs; drain it if it stays so."
    for gpu in worker.gpus:
        if gpu.last_xid:
            says += f" The last error of its GPU {gpu.index} was XID {gpu.last_xid}."
            remedy += " Look up what the XID means, and in the kernel's log when it was."
            break
    evidence = finding.evidence | _evidence(worst)
    return msgspec.structs.replace(finding, says=says, remedy=remedy, evidence=evidence)


def _clock_share(gpu: Gpu) -> float:
    """Of its best; 0: unknown."""
    return (gpu.clock_mhz or 0.0) / gpu.best_clock_mhz if gpu.best_clock_mhz else 0.0


def _evidence(gpu: Gpu) -> Evidence:
    told: dict[str, float | str | None] = {
        "gpu": gpu.index,
        "gpu_clock_mhz": gpu.clock_mhz,
        "gpu_best_clock_mhz": gpu.best_clock_mhz,
        "gpu_lowered_by": ", ".join(gpu.lowered_by) or None,
        "gpu_temperature_c": gpu.temperature_c,
        "gpu_power_w": gpu.power_w,
        "gpu_last_xid": gpu.last_xid or None,
        **activity([gpu]),
    }
    return {name: value for name, value in told.items() if value is not None}


SHARES: dict[str, Callable[[Gpu], float | None]] = {
    "gpu_utilisation_share": lambda gpu: gpu.utilisation,
    "gpu_sm_active_share": lambda gpu: gpu.sm_active,
    "gpu_tensor_active_share": lambda gpu: gpu.tensor_active,
    "gpu_memory_active_share": lambda gpu: gpu.memory_active,
}


def activity(gpus: Sequence[Gpu]) -> dict[str, float]:
    """How busy GPUs look, and how busy they are, on average and as far as it is told."""
    found = {name: [share_of(gpu) for gpu in gpus] for name, share_of in SHARES.items()}
    known = {name: [s for s in shares if s is not None] for name, shares in found.items()}
    return {name: mean(shares) for name, shares in known.items() if shares}


def misleading(look: Look) -> Iterator[str]:
    """Where would somebody who looks at utilisation alone be wrong?"""
    for model in sorted({w.model for w in look.workers}):
        gpus = [gpu for w in look.workers if w.model == model for gpu in w.gpus]
        active = activity(gpus)
        utilisation = active.get("gpu_utilisation_share")
        if utilisation is None or not look.requests:
            continue
        lost = sum(loss.promises for loss in look.losses if loss.model == model)
        breaking = lost >= max(LEAST_LOST, LOST_SHARE * look.requests)
        little = active.get("gpu_sm_active_share", 1.0)
        so = f"The GPUs of {model} are {utilisation:.0%} utilised"
        if utilisation >= BUSY and not lost:
            yield f"{so}, and every promise is kept: no reason to add workers."
        elif utilisation >= BUSY and breaking and little <= LITTLE:
            yield (
                f"{so}, but their multiprocessors have work for {little:.0%} of the time: kernels "
                "are small or wait, for the engine's CPU, for memory or for other GPUs."
            )
        elif utilisation <= CALM and breaking:
            yield f"{so}, and promises are broken: the time is lost elsewhere."
