"""What happens between the worker that prefills and the one that answers?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from paceline.domain.facts import Fact, Prefilled
from paceline.host import LiveHost


@contextmanager
def between_the_legs() -> Iterator[list[Prefilled]]:
    """Keeps from the kernel that a prompt was prefilled: the test tells it later, if at all."""
    kept: list[Prefilled] = []
    tell = LiveHost.tell

    def told(host: LiveHost, fact: Fact) -> None:
        if isinstance(fact, Prefilled):
            kept.append(fact)
        else:
            tell(host, fact)

    with mock.patch.object(LiveHost, "tell", told):
        yield kept
