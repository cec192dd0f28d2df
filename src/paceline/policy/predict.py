"""What TTFT and ITL follow from a worker's step times and what it has to do?

Every formula takes one worker (`StepModel`, plain numbers) or many at once (`StepModels`, arrays).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from paceline.policy.steptime import Q, stretch

MOST_PREFILL = 0.95
"""Share of time that prefill may be believed to take: beyond it the queue, not the ITL, grows."""
CHUNK = 512.0
"""Prompt tokens over which the cost of a prefill token is averaged."""


class StepTimes(Protocol[Q]):
    """Seconds that a step takes; of one worker or of many."""

    @property
    def p99(self) -> Q: ...

    def step_s(
        self, streams: Q | float, prefill: Q | float = 0.0, kv: Q | float = 0.0, q: Q | float = 0.0
    ) -> Q: ...


def itl_s(model: StepTimes[Q], streams: Q | float, kv: Q | float, prefill_rate: Q | float) -> Q:
    """Mean seconds between tokens over the coming seconds.

    `base / (1 − U)`: prefill at `prefill_rate` tokens/s takes the share U of the time, and the
    decode steps share what it leaves. (Prefill piggy-backed on decodes as in Sarathi-Serve,
    Agrawal et al. 2024.)
    """
    base_s = model.step_s(streams, 0.0, kv)
    token_s = (model.step_s(streams, CHUNK, kv, CHUNK * CHUNK / 2) - base_s) / CHUNK
    itl: Q = base_s / (1.0 - np.minimum(prefill_rate * token_s, MOST_PREFILL))
    return itl


def stall_s(model: StepTimes[Q], streams: Q | float, kv: Q | float, budget: Q | float) -> Q:
    """The longest gap that a prompt can cause: a step with a full chunk of prefill."""
    room = np.maximum(budget - streams, 0.0)
    return model.step_s(streams, room, kv, room * room / 2)


def ttft_s(
    model: StepTimes[Q],
    streams: Q | float,
    kv: Q | float,
    ahead_tokens: Q | float,
    own_tokens: Q | float,
    own_context: Q | float,
    budget: Q | float,
    overhead_s: Q | float,
    open_gap_s: Q | float,
) -> Q:
    """Seconds from sending a request to its first token, KV room permitting.

    The rest of the running step, then `ceil(tokens / (budget − streams))` steps, all but the last
    full, which prefill what waits ahead and the own prompt beside the streams' decodes (chunked
    prefill, Sarathi-Serve). What waits ahead is taken for one prompt without cached context;
    `own_context` tokens are cached and only attended to. An open gap beyond the usual slows all
    steps alike.
    """
    room = np.maximum(budget - streams, 1.0)
    tokens = ahead_tokens + np.maximum(own_tokens, 1.0)
    full_steps = np.ceil(tokens / room) - 1.0
    q = ahead_tokens**2 / 2 + own_tokens * (own_context + own_tokens / 2)
    q_of_step = q / (full_steps + 1.0)
    prefill_s = full_steps * model.step_s(streams, room, kv, q_of_step)
    prefill_s += model.step_s(streams, tokens - full_steps * room, kv, q_of_step)
    running_s = model.step_s(streams, np.minimum(ahead_tokens, room), kv)
    slower = stretch(running_s, open_gap_s, model.p99)
    decode_s = model.step_s(streams, 0.0, kv)
    rest_s = np.where(np.asarray(streams) > 0, np.maximum(decode_s - open_gap_s, 0.0), 0.0)
    ttft: Q = overhead_s + rest_s + slower * prefill_s
    return ttft
