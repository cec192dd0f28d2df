"""What became of a request, for those who count and log?"""

from __future__ import annotations

from paceline.domain.outcome import Outcome
from paceline.gateway.exchange import Exchange


def outcome_of(exchange: Exchange) -> Outcome:
    """The request, now that it is over."""
    command, tally, done_at = exchange.command, exchange.answer.tally, exchange.done_at
    return Outcome(
        request=exchange.asked,
        worker=exchange.worker_id,
        status=exchange.status,
        error=exchange.error,
        attempts=command.attempt if command is not None else 0,
        because=command.because if command is not None else "",
        predicted=exchange.predicted,
        queued_s=(exchange.sent_at or done_at) - exchange.arrived_at,
        ttft_s=(exchange.first_at or done_at) - exchange.arrived_at,
        itl_s=tally.itl_s,
        stall_s=tally.stall_s,
        seconds=done_at - exchange.arrived_at,
        prompt_tokens=tally.prompt_tokens,
        cached_tokens=tally.cached_tokens,
        output_tokens=tally.tokens,
        degraded_to=exchange.request if exchange.request is not exchange.asked else None,
        moved=tally.moved,
        paused=tally.paused,
        prefilled_at=exchange.prefilled_at,
        prefill_s=exchange.prefill_s,
    )
