"""What is one generation to the engine, and where does it stand?"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Generation(msgspec.Struct, frozen=True):
    """What the engine shall compute, decided in advance."""

    id: str
    prompt_tokens: int
    output_tokens: int
    blocks: Sequence[int] = ()
    """Hash chain over the prompt, a name for each full `Scheduler.name_tokens`. May go on past the
    prompt, where the caller knows the answer: then a next turn finds that too."""
    priority: int = 0
    """Lower runs earlier, if the engine schedules by priority."""
    hold: bool = False
    """Prefill it for another engine: its answer is one token, and then its blocks stay in use until
    `Scheduler.release`."""
    received: int = 0
    """Prompt tokens that another engine has prefilled. They take blocks and are not computed; the
    last of the prompt is, for from it comes the first of the answer."""


class Running:
    """A generation's place in the engine. Counts are as of `joined` while it decodes."""

    __slots__ = (
        "arrival",
        "computed",
        "ends",
        "generation",
        "grows",
        "id",
        "joined",
        "looked_at",
        "named",
        "order",
        "produced",
        "received",
        "unnamed",
    )

    def __init__(self, generation: Generation, order: tuple[int, int]) -> None:
        self.generation = generation
        self.id = generation.id
        self.order = order
        """The least is served first, the greatest preempted first."""
        self.produced = 0
        self.received = generation.received
        """Tokens that need not be computed; none once they are given up."""
        self.computed = 0
        """Tokens in the KV cache."""
        self.named: list[int] = []
        self.unnamed = 0
        """Blocks without a name; while it decodes, those that it had when it joined."""
        self.looked_at = 0
        """How many names were considered."""
        self.joined = self.ends = self.grows = 0
        """Steps: the one before the first decode, the last one, the first that needs a block."""
