"""Should a request go to a worker now, or wait at the gateway?

What waits here can still be overtaken, and goes where there is room first; what waits in an engine
cannot. So a request waits while no worker is open to it. A worker is open if

- it has little prefill before it, beyond the step under way (of a worker that is far away, or a
  fleet of its own: more is under way),
- there is room in its KV cache, and
- the harm to its residents is no more than the request is worth: its weight times the chance that
  its own promise is kept there.

With one worker open the request goes to the one of least cost, open or not: then waiting is a
matter of that worker alone, and cost knows it. But never to one that those of more weight need
faster (`paceline.policy.reserve`). A request whose promise is lost is worth next to nothing to
promises, and goes where it does no harm; when it has waited longest of all, its turn comes whatever
it is worth.

(Late binding: Mooncake, Qin et al. 2024. docs/design/0008 has what else was tried.)
"""

from __future__ import annotations

from paceline.policy.headroom import Forecast, harm, loss
from paceline.policy.standing import Ask, Standing

AHEAD = 1024.0
"""Prompt tokens that a worker may have before it where residents are promised an ITL, besides this
request's own: enough to keep it busy, and what waits here instead goes by what is known then. Else
as many as a full step holds, which does some tenth more a second."""
FULL_PIPE = 4.0
"""Or times what is on its way there and back: so a worker shows that it can take more."""
FREE_HARM = 0.02
"""Broken promises, in units of a request's weight, that are too few to wait for."""


def is_open(worker: Standing, ask: Ask, seen: Forecast) -> bool:
    """May the request go to this worker now?

    Beyond the usual load harm is judged with caution.
    """
    if not worker.everyone:
        return True
    if worker.ahead > _ahead(worker) and worker.ahead > FULL_PIPE * worker.pipe:
        return False
    if seen.kv_left < 0.0:
        return False
    hurt = harm(worker, ask, seen, cautious=seen.after_s > worker.itl.usual_s)
    return is_worth(ask, loss(worker, ask, seen), hurt)


def is_worth(ask: Ask, loss: float, harm: float) -> bool:
    """Is the request worth so much harm, where its own promise is lost by that chance?"""
    worth = 1.0 if ask.overdue else 1.0 - loss + FREE_HARM
    return harm <= ask.weight * worth


def _ahead(worker: Standing) -> float:
    """Prompt tokens that it may have before it."""
    return min(AHEAD, worker.room) if worker.promised else worker.room
