"""What has the kernel learned that a simulation could start from?

One JSON file: for each worker how long its steps take and what it can hold, for each model how long
answers are. A gateway exports it; `paceline simulate --timing` reads it.
"""

from __future__ import annotations

from math import isfinite

import msgspec

from paceline.domain.errors import ConfigError
from paceline.kernel.kernel import Kernel
from paceline.kernel.pool import Pool
from paceline.kernel.worker import WorkerState
from paceline.policy.steptime import ROOFLINE, StepModel

VERSION = 1
"""Of the file. To be raised when a field changes its meaning; coefficients do so with `KNOTS`."""
SAMPLE_BYTES = 1_000_000
"""Of a prompt by which tokens per byte are asked: so many that no rounding shows."""


class WorkerTiming(msgspec.Struct, frozen=True, kw_only=True):
    """What was learned of one worker. Seconds and tokens."""

    id: str
    model: str
    """As clients name it."""
    node: str = ""
    kind: str = ""
    step: StepModel
    prefill_budget: int
    """Tokens that a step may hold."""
    overhead_s: float = 0.0
    """What a first token takes beyond the steps."""
    kv_capacity_tokens: int | None = None
    """None: the engine does not say."""
    block_size: int | None = None
    cost_per_hour: float = 0.0
    predictions: int = 0
    """ITL predictions that were compared with their outcome; 0 where the policy makes none."""
    itl_error: float = 0.0
    """Mean |log(outcome / prediction)|, of late; 0.1 is about 10 %."""
    ttft_error: float = 0.0


class ModelText(msgspec.Struct, frozen=True, kw_only=True):
    """What was learned of a model's prompts and answers."""

    output_p50: float
    """Quantiles of the tokens of an answer."""
    output_p90: float
    output_p99: float
    tokens_per_byte: float
    """Of a prompt's JSON."""


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """All of it, as it stood at one moment."""

    version: int = VERSION
    workers: tuple[WorkerTiming, ...]
    """By id."""
    models: dict[str, ModelText]


def export(kernel: Kernel) -> Timing:
    """What the kernel knows now."""
    return Timing(
        workers=tuple(_worker(state) for _, state in sorted(kernel.workers.items())),
        models={model: _text(model, pool) for model, pool in sorted(kernel.pools.items())},
    )


def _worker(state: WorkerState) -> WorkerTiming:
    worker, report = state.worker, state.report
    return WorkerTiming(
        id=worker.id,
        model=worker.model,
        node=worker.node,
        kind=worker.kind,
        step=state.timing.model(),
        prefill_budget=state.windows.budget,
        overhead_s=state.windows.overhead_s,
        kv_capacity_tokens=report.kv_capacity_tokens if report else None,
        block_size=report.block_size if report else None,
        cost_per_hour=worker.cost_per_hour,
        predictions=state.itl.count,
        itl_error=state.itl.error,
        ttft_error=state.ttft.error,
    )


def _text(model: str, pool: Pool) -> ModelText:
    p50, p90, p99 = (pool.lengths.quantile(model, "", share) for share in (0.5, 0.9, 0.99))
    tokens_per_byte = pool.tokens_per_byte.tokens(model, SAMPLE_BYTES) / SAMPLE_BYTES
    return ModelText(
        output_p50=p50, output_p90=p90, output_p99=p99, tokens_per_byte=tokens_per_byte
    )


def to_json(timing: Timing) -> bytes:
    """The file's content, for people too."""
    return msgspec.json.format(msgspec.json.encode(timing), indent=2) + b"\n"


class _Opening(msgspec.Struct):
    version: int


def from_json(data: bytes, source: str) -> Timing:
    """A file's content; a `ConfigError` says what is wrong with `source`."""
    try:
        version = msgspec.json.decode(data, type=_Opening).version
        if version != VERSION:
            raise ConfigError(
                [f"{source}: version {version}, and this Paceline reads {VERSION}; calibrate anew"]
            )
        timing = msgspec.json.decode(data, type=Timing)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(
            [f"{source}: no timing as `paceline calibrate` writes it: {error}"]
        ) from None
    if problems := [f"{source}: {w.id}: {what}" for w in timing.workers if (what := _wrong(w))]:
        raise ConfigError(problems)
    return timing


def _wrong(worker: WorkerTiming) -> str:
    """What cannot be of this worker; empty if all can."""
    theta = worker.step.theta
    if len(theta) != len(ROOFLINE):
        return f"step.theta has {len(theta)} coefficients instead of {len(ROOFLINE)}"
    if not all(c >= 0 and isfinite(c) for c in theta) or not theta[0] > 0:
        return "step.theta must be 0 or more, and its first, the base, above"
    if not worker.step.slowdown > 0 or not worker.step.spread >= 0:
        return "step.slowdown must be above 0 and step.spread 0 or more"
    if worker.prefill_budget < 1 or worker.overhead_s < 0:
        return "prefill_budget must be above 0 and overhead_s 0 or more"
    if any(
        size is not None and size < 1 for size in (worker.kv_capacity_tokens, worker.block_size)
    ):
        return "kv_capacity_tokens and block_size must be above 0, or null if unknown"
    return ""
